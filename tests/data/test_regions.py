"""The file beside a shard with which parts of its images are decoded alone."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from data import jpeg
from data.augment import AugmentSpec
from data.build import build
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph
from tests.data.test_index import add

pytestmark = pytest.mark.skipif(not jpeg.works(), reason="built without libjpeg-turbo's headers")


@pytest.fixture
def folder(tmp_path):
    """A shard of three indexable JPEG files, a progressive one and a PNG file."""
    photo = photograph(300, 200)
    images = {f"{n}.jpg": encode(photo.rotate(90 * n), "JPEG", quality=85) for n in range(3)}
    images["3.jpg"] = encode(photo, "JPEG", progressive=True)
    images["4.png"] = encode(photo, "PNG")
    index(tmp_path, images)
    return tmp_path


def index(folder, images):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, image in images.items():
            add(archive, name, image)
            add(archive, name[0] + ".cls", b"0")
    build(folder, progress=lambda line: None)


def regions(folder):
    source = TarSource(folder)
    return [source.read(id).regions for id in range(len(source))]


def views(folder):
    source, out = TarSource(folder), np.empty((5, 48, 48, 3), np.uint8)
    samples = [source.read(id) for id in range(5)]
    spec = AugmentSpec(size=48, scale=(0.08, 0.2))
    assert spec.render(samples, np.arange(5), out, seed=0, epoch=0) == {}
    return out


def test_indexing_writes_the_regions_of_every_image_that_has_them(folder):
    source = TarSource(folder)
    found = regions(folder)
    assert found[:3] == [jpeg.build_regions(source.read(id).image) for id in range(3)]
    assert found[3:] == [None, None]
    assert all(found[:3])


def test_pixels_are_the_same_with_and_without(folder):
    seen = views(folder)
    (folder / "a.roi").unlink()
    assert regions(folder) == [None] * 5
    assert np.array_equal(views(folder), seen)


@pytest.mark.parametrize("place", [0, 8, 20, 52, 100, -1])
def test_damage_costs_no_more_than_the_regions(folder, place):
    seen, intact = views(folder), regions(folder)
    content = bytearray((folder / "a.roi").read_bytes())
    content[place] ^= 0x55
    (folder / "a.roi").write_bytes(content)
    assert all(found in (None, whole) for found, whole in zip(regions(folder), intact, strict=True))
    assert regions(folder) != intact
    assert np.array_equal(views(folder), seen)


def test_truncated_or_of_another_index_they_are_not_used(folder):
    seen, content = views(folder), (folder / "a.roi").read_bytes()
    for kept in (0, 30, 60, len(content) // 2):
        (folder / "a.roi").write_bytes(content[:kept])
        assert None in regions(folder)[:3]
        assert np.array_equal(views(folder), seen)
    (folder / "a.roi").write_bytes(content[:16] + bytes(32) + content[48:])
    assert regions(folder) == [None] * 5


def test_a_shard_without_jpeg_files_has_no_such_file(tmp_path):
    (tmp_path / "a.roi").write_bytes(b"of an earlier shard")
    index(tmp_path, {"0.png": encode(Image.new("RGB", (8, 8)), "PNG")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.tar", "manifest.json"]
