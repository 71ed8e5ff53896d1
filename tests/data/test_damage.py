"""Images that were cut off or damaged before they were indexed: known from then on, by name."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import jpeg
from data.augment import AugmentSpec
from data.base import BadSample, DataError, Shard
from data.build import build, scan
from data.columns import Flag
from data.decode import Geometry
from data.folder import FolderSource
from data.index import known_classes, verify
from data.ledger import settle
from data.pack import pack
from data.pipeline import ImagePipeline
from data.store import LocalStore
from data.webdataset import TarSource
from tests.data.pictures import as_samples, encode, photograph
from tests.data.test_tar import archive_of, sample

PHOTO = photograph(180, 120)
JPEG = encode(PHOTO, "JPEG", quality=90)
PROGRESSIVE = encode(PHOTO, "JPEG", progressive=True)
CMYK = encode(PHOTO.convert("CMYK"), "JPEG")
PNG = encode(PHOTO, "PNG")
EXIF = b"\xff\xe1" + (2 + 8 + len(JPEG)).to_bytes(2, "big") + b"Exif\0\0\0\0" + JPEG
PIXELS = JPEG.index(b"\xff\xda")

WHOLE = {
    "jpeg": JPEG,
    "progressive": PROGRESSIVE,
    "cmyk": CMYK,
    "grey": encode(PHOTO.convert("L"), "JPEG"),
    "restarts": encode(PHOTO, "JPEG", restart_marker_blocks=3),
    "png": PNG,
    "padded": JPEG + bytes(1000),
    "followed": JPEG + b"a video follows" * 9,
    "thumbnail": JPEG[:2] + EXIF + JPEG[2:],
    "fill bytes": JPEG[:2] + b"\xff\xff" + JPEG[2:] + bytes(9),
    "bytes too many": JPEG[:-2] + bytes(3) + JPEG[-2:],
}
DAMAGED = {
    "cut": JPEG[: len(JPEG) * 3 // 4],
    "cut near its end": JPEG[:-1],
    "cut in its header": JPEG[:100],
    "cut behind a thumbnail": (JPEG[:2] + EXIF + JPEG[2:])[:-2000],
    "cut and ended": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "cut, progressive": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "cut, cmyk": CMYK[: len(CMYK) // 2],
    "cut png": PNG[:-2000],
    "altered png": PNG[:2000] + bytes([PNG[2000] ^ 1]) + PNG[2001:],
    "empty": b"",
}
BY_PILLOW = set(DAMAGED) - {"cut and ended"}  # it makes up what is missing, without a word


def quiet(_):
    pass


def flags_of(image):
    return Flag(int(scan(archive_of(sample("x", jpg=image, cls=b"0")), "a.tar")["flags"][0]))


@pytest.fixture(params=["extension", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(jpeg, "works", lambda: False)
    elif not jpeg.works():
        pytest.skip("built without libjpeg-turbo's headers")
    return request.param


def test_indexing_tells_damaged_images_from_whole_ones(decoder):
    assert [name for name, image in WHOLE.items() if flags_of(image) & Flag.CORRUPT] == []
    found = {name for name, image in DAMAGED.items() if flags_of(image) & Flag.CORRUPT}
    assert found == (BY_PILLOW if decoder == "pillow" else set(DAMAGED))


@pytest.mark.parametrize("name", ["jpeg", "progressive", "cmyk", "restarts", "thumbnail"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_known_to_be_damaged(name, data):
    image, padding = WHOLE[name], data.draw(st.sampled_from([b"", bytes(9), b"\xff" * 9, b"\n"]))
    cut = image[: data.draw(st.integers(3, len(image) - 1))]
    assert flags_of(cut + padding) & Flag.CORRUPT
    assert not flags_of(image + padding) & Flag.CORRUPT


def test_an_image_without_its_end_is_refused_wherever_the_crop_falls(decoder, tmp_path):
    folder = tmp_path / "images" / "kind"
    folder.mkdir(parents=True)
    for name in ("cut", "cut near its end", "cut behind a thumbnail"):
        (folder / f"{name}.jpg").write_bytes(DAMAGED[name])
    for name in ("padded", "followed", "thumbnail"):
        (folder / f"whole {name}.jpg").write_bytes(WHOLE[name])
    source = FolderSource(tmp_path / "images")
    samples = [source.read(id) for id in range(6)]
    for box in ((0, 0, 40, 10), (0, 0, 180, 120), (100, 100, 180, 120)):
        plan, out = Geometry(box, (8, 8)), np.empty((6, 8, 8, 3), np.uint8)
        failures = jpeg.decode_all(samples, lambda *_, plan=plan: plan, out)
        assert sorted(failures) == [0, 1, 2], box
        assert "its end marker is missing" in str(failures[0])


@pytest.fixture
def shards(tmp_path):
    """Two shards of ten images, of which two are damaged."""
    images = [encode(PHOTO.rotate(n), "JPEG") for n in range(20)]
    images[3], images[14] = DAMAGED["cut"], b""
    for part in (0, 1):
        rows = range(10 * part, 10 * part + 10)
        members = [m for n in rows for m in sample(f"{n:02}", jpg=images[n], cls=b"%d" % (n % 2))]
        (tmp_path / "set" / f"{part}.tar").parent.mkdir(exist_ok=True)
        (tmp_path / "set" / f"{part}.tar").write_bytes(archive_of(members).getvalue())
    build(tmp_path / "set", classes=["x", "y"], progress=quiet)
    return tmp_path / "set"


def test_index_and_verify_name_what_is_damaged(shards):
    named = [f"damaged: {shards}/0.tar:03.jpg", f"damaged: {shards}/1.tar:14.jpg"]
    for look in (build, verify):
        lines = []
        look(shards, progress=lines.append)
        assert [line for line in lines if line.startswith("damaged")] == named
        assert any(line.startswith("NOTE: 2 of 20 images are damaged") for line in lines)


def test_a_damaged_sample_is_never_read(shards):
    source = TarSource(shards)
    with pytest.raises(BadSample, match=r"0\.tar:03\.jpg \(sample 3\) was damaged before it was"):
        source.read(3)
    with pytest.raises(BadSample, match=r"1\.tar:14\.jpg \(sample 14\) was damaged"):
        source.read(14)
    assert source.read(4).label == 0


def test_what_is_not_read_is_not_fetched_either(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(LocalStore, "prefetch", lambda store, places: asked.extend(places))
    source = TarSource(shards)
    source.prefetch(range(20))
    assert len(asked) == 18
    assert all(num_bytes > 0 for _, _, num_bytes in asked)


def test_any_number_of_ranks_replaces_the_same_ones(shards):
    def shown(world_size):
        ids, cursors = {}, []
        for rank in range(world_size):
            pipeline = ImagePipeline(
                TarSource(shards),
                augment=AugmentSpec(size=8, scale=(0.05, 0.2)),
                global_batch=4,
                max_replaced=2,
            )
            stream = pipeline.batches(pipeline.start(), Shard(rank=rank, world_size=world_size))
            for _ in range(2 * pipeline.steps_per_epoch):
                batch, cursor = next(stream)
                places = [(batch.epoch, place) for place in batch.positions.tolist()]
                ids |= dict(zip(places, batch.ids.tolist(), strict=True))
            cursors.append(cursor)
            stream.close()
        return sorted(ids.items()), replace(settle(cursors), samples=0)

    with pytest.warns(UserWarning, match="takes its place"):
        alone, cursor = shown(1)
    assert cursor.quarantine == (3, 14)
    assert {3, 14}.isdisjoint(id for _, id in alone)
    with pytest.warns(UserWarning, match="takes its place"):
        assert shown(2) == (alone, cursor)


def test_a_damaged_image_is_packed_as_it_is_and_said_to_be(shards, tmp_path):
    for format, damaged in (("tar", ["-000000.tar:03.jpg", "-000000.tar:14.jpg"]), ("beton", None)):
        lines = []
        if format == "beton":
            (shards / "1.tar").unlink()
            build(shards, classes=["x", "y"], progress=quiet)
        pack(TarSource(shards), tmp_path / format, format=format, progress=lines.append)
        named = sorted(line for line in lines if line.startswith("damaged: "))
        endings = damaged or [".beton:3"]
        assert named == [f"damaged: {tmp_path / format}/{format}{end}" for end in endings]
    with pytest.raises(BadSample, match=r"sample 3.* was damaged before it was indexed"):
        TarSource(tmp_path / "beton").read(3)
    with pytest.raises(DataError, match=r"0\.tar:03\.jpg .* is damaged: there are no pixels"):
        pack(TarSource(shards), tmp_path / "raw", format="beton", image_mode="raw", progress=quiet)


def test_a_set_of_an_earlier_format_is_to_be_indexed_again(shards):
    manifest = shards / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(DataError, match=rf"format 2 is not 3; run `foveate data index {shards}`"):
        TarSource(shards)
    assert known_classes(shards) == ("x", "y")


@pytest.mark.skipif(not jpeg.works(), reason="built without libjpeg-turbo's headers")
def test_what_is_whole_decodes_anywhere():
    images = list(WHOLE.values())
    for box in ((0, 0, 20, 10), (0, 0, 180, 120), (160, 110, 180, 120)):
        plan, out = Geometry(box, (8, 8)), np.empty((len(images), 8, 8, 3), np.uint8)
        assert jpeg.decode_all(as_samples(images), lambda *_, plan=plan: plan, out) == {}
