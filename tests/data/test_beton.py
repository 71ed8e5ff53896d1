"""Betons: the same samples, order and batches as the tars they were made from; damage is named."""

from pathlib import Path

import numpy as np
import pytest

from data.augment import AugmentSpec
from data.base import BadSample, DataError, Shard
from data.beton import BetonWriter
from data.build import build
from data.columns import Flag, parse_index
from data.decode import decode_whole
from data.folder import FolderSource, SyntheticSource
from data.index import Manifest, check_shard, verify
from data.order import StreamShuffle
from data.pack import pack
from data.pipeline import ImagePipeline
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph

MODES = ("jpg", "raw", "mixed")
COUNT = 40


def quiet(_):
    pass


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """An indexed set of photographs small and large: JPEG of all kinds, and PNG."""
    folder = tmp_path_factory.mktemp("images")
    kinds = [
        ("jpg", {"quality": 90}),
        ("jpg", {"progressive": True}),
        ("png", {}),
        ("jpg", {"subsampling": 0}),
    ]
    for id in range(COUNT):
        suffix, options = kinds[id % 4]
        picture = photograph(*((64, 48) if id % 3 else (301, 199))).rotate(9 * id)
        picture = {9: picture.convert("L"), 13: picture.convert("CMYK")}.get(id, picture)
        path = folder / f"class_{id % 5}" / f"{id:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture, "PNG" if suffix == "png" else "JPEG", **options))
    out = tmp_path_factory.mktemp("sets") / "tars"
    pack(FolderSource(folder), out, samples_per_shard=9, progress=quiet)
    return TarSource(out)


@pytest.fixture(scope="module")
def betons(tars, tmp_path_factory):
    """The set as a .beton of each mode."""
    folder, sources = tmp_path_factory.mktemp("betons"), {}
    for mode in MODES:
        pack(tars, folder / mode, format="beton", image_mode=mode, progress=quiet)
        sources[mode] = TarSource(folder / mode)
    return sources


@pytest.mark.parametrize("mode", MODES)
def test_samples_keep_order_labels_and_pixels(tars, betons, mode):
    beton = betons[mode]
    assert beton.labels.tolist() == tars.labels.tolist()
    assert beton.classes == tars.classes
    for id in range(COUNT):
        ours, theirs = beton.read(id), tars.read(id)
        assert (ours.id, ours.label) == (theirs.id, theirs.label)
        if isinstance(ours.image, bytes):
            assert ours == theirs  # its regions, too
        else:
            assert np.array_equal(ours.image, decode_whole(theirs.image))


def test_modes_store_what_they_say(tars, betons):
    is_raw = {
        mode: np.array([not isinstance(source.read(id).image, bytes) for id in range(COUNT)])
        for mode, source in betons.items()
    }
    images = [tars.read(id).image for id in range(COUNT)]
    is_file = np.array([image.startswith(b"\xff\xd8\xff") for image in images])
    is_large = np.array([decode_whole(image).size > 128 << 10 for image in images])
    assert is_raw["raw"].all()
    assert (is_raw["mixed"] == ~(is_file & is_large) | is_raw["jpg"]).all()
    assert (is_raw["jpg"] & is_file).sum() == 1  # of four colours, which FFCV cannot decode
    assert not is_raw["jpg"][is_file].all()


def test_fingerprint_and_shards_of_the_order_are_those_of_the_tars(tars, betons):
    for beton in betons.values():
        assert beton.fingerprint == tars.fingerprint
        assert beton.shard_sizes.tolist() == tars.shard_sizes.tolist() == [8] * 5


def pipeline(source, *, stream):
    shuffle = StreamShuffle(shard_sizes=source.shard_sizes, seed=1, lanes=4, window=6)
    return ImagePipeline(
        source,
        augment=AugmentSpec(size=40, auto_augment="rand-m9-mstd0.5-inc1"),
        global_batch=8,
        shuffle=shuffle if stream else None,
        seed=1,
    )


def batches(source, start, count, *, stream):
    taken = []
    loader = pipeline(source, stream=stream).batches(start, Shard(rank=0, world_size=1))
    for _ in range(count):
        batch, cursor = next(loader)
        taken.append((batch.images.numpy(), batch.labels.tolist(), batch.ids.tolist(), cursor))
    loader.close()
    return taken


@pytest.mark.parametrize("stream", [False, True], ids=["full", "stream"])
def test_a_run_changes_between_tar_and_beton_unnoticed(tars, betons, stream):
    start = pipeline(tars, stream=stream).start()
    expected = batches(tars, start, 8, stream=stream)
    middle = expected[2][-1]
    assert 0 < middle.samples < COUNT
    for beton in betons.values():
        found = batches(beton, start, 3, stream=stream)
        found += batches(beton, found[-1][-1], 2, stream=stream)
        found += batches(tars, found[-1][-1], 1, stream=stream)
        found += batches(beton, found[-1][-1], 2, stream=stream)
        for ours, theirs in zip(found, expected, strict=True):
            assert np.array_equal(ours[0], theirs[0])
            assert ours[1:] == theirs[1:]


def test_a_beton_packed_again_is_the_same_and_becomes_tars(betons, tmp_path):
    raw = betons["raw"]
    pack(raw, tmp_path / "again" / "raw", format="beton", image_mode="raw", progress=quiet)
    again = TarSource(tmp_path / "again" / "raw")
    assert again.fingerprint == raw.fingerprint
    assert again.shard_sizes.tolist() == raw.shard_sizes.tolist()
    pack(raw, tmp_path / "tars", samples_per_shard=15, seed=5, progress=quiet)
    shuffled = TarSource(tmp_path / "tars")
    assert shuffled.fingerprint != raw.fingerprint
    assert shuffled.labels.tolist() != raw.labels.tolist()
    pixels = {decode_whole(shuffled.read(id).image).tobytes() for id in range(COUNT)}
    assert pixels == {raw.read(id).image.tobytes() for id in range(COUNT)}


def test_a_folder_becomes_a_shuffled_beton_of_its_own(tmp_path):
    images = SyntheticSource(num_samples=30, num_classes=3, size=8)
    for seed in (0, 1):
        pack(images, tmp_path / str(seed), format="beton", seed=seed, progress=quiet)
    ours = [TarSource(tmp_path / str(seed)) for seed in (0, 1)]
    assert ours[0].fingerprint != ours[1].fingerprint
    assert ours[0].labels.tolist() != ours[1].labels.tolist()
    assert Manifest.load(tmp_path / "0").origin is None
    assert [path.name for path in sorted((tmp_path / "0").iterdir())] == [
        *("0.beton", "0.idx", "manifest.json", "pack.json")
    ]


def write(path, samples, **settings):
    with path.open("wb") as file:
        writer = BetonWriter(file, num_samples=len(samples), largest=100, **settings)
        for content, label, size, raw in samples:
            writer.add(content, label=label, size=size, raw=raw)
        writer.close()


PIXELS = bytes(range(36))
JPEG = encode(photograph(20, 10), "JPEG")


def test_images_larger_than_a_page_get_larger_pages(tmp_path):
    sizes = [(1500, 1000), (2000, 1500), (1, 1), (2000, 1500), (1, 1)]
    content = [bytes([n]) * (3 * width * height) for n, (width, height) in enumerate(sizes)]
    with (tmp_path / "a.beton").open("wb") as file:
        writer = BetonWriter(file, num_samples=len(sizes), largest=max(map(len, content)))
        for image, size in zip(content, sizes, strict=True):
            writer.add(image, label=1, size=size, raw=True)
        writer.close()
    build(tmp_path, progress=quiet)
    source, page = TarSource(tmp_path), 1 << 24
    assert np.fromfile(tmp_path / "a.beton", "<u4", 2)[1] == page
    assert [source.read(id).image.tobytes() for id in range(len(sizes))] == content
    offsets = check_shard(tmp_path, Manifest.load(tmp_path).shards[0])["offset"].tolist()
    ends = [offset + len(image) - 1 for offset, image in zip(offsets, content, strict=True)]
    assert [offset // page for offset in offsets] == [end // page for end in ends]


def test_a_named_sample_is_its_number(tmp_path):
    write(tmp_path / "a.beton", [(PIXELS, 1, (4, 3), True), (JPEG, 0, (20, 10), False)])
    lines = []
    build(tmp_path, progress=lines.append)
    assert "of 2 images: 1 not JPEG, 1 raw pixels" in lines
    source = TarSource(tmp_path)
    assert source.read(0).image.shape == (3, 4, 3)
    assert source.read(1).image == JPEG
    content = bytearray((tmp_path / "a.beton").read_bytes())
    content[content.index(PIXELS) + 3] ^= 1
    (tmp_path / "a.beton").write_bytes(content)
    with pytest.raises(BadSample, match=r"a\.beton:0 \(sample 0\) has changed"):
        TarSource(tmp_path).read(0)
    with pytest.raises(DataError, match=r"a\.beton was altered"):
        verify(tmp_path, progress=quiet)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((PIXELS, 1, (4, 4), True), "sample 0 has 36 bytes for 4 × 4 pixels"),
        ((JPEG, 1, (20, 11), False), "sample 0 has 20 × 10 pixels instead of 20 × 11"),
        ((b"GIF89a", 1, (20, 11), False), "sample 0 is neither JPEG nor PNG"),
        ((PIXELS, -1, (4, 3), True), "sample 0 has class -1"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, sample, message):
    write(tmp_path / "a.beton", [sample])
    with pytest.raises(DataError, match=rf"a\.beton: {message}"):
        build(tmp_path, progress=quiet)


@pytest.mark.parametrize("kept", [0, 10, 1000, 2200, 1 << 23, (1 << 23) + 20, -24, -1])
def test_a_beton_cut_anywhere_is_not_indexed(tmp_path, kept):
    write(tmp_path / "a.beton", [(PIXELS, 1, (4, 3), True), (JPEG, 0, (20, 10), False)])
    content = (tmp_path / "a.beton").read_bytes()
    (tmp_path / "a.beton").write_bytes(content[:kept])
    with pytest.raises(DataError, match=r"a\.beton .*(truncated|does not say)"):
        build(tmp_path, progress=quiet)


def test_any_byte_of_the_layout_may_be_wrong(tmp_path):
    path = tmp_path / "a.beton"
    write(path, [(PIXELS, 1, (4, 3), True), (JPEG, 0, (20, 10), False)])
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        place = int(random.choice([random.integers(2200), random.integers(len(content))]))
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            build(tmp_path, progress=quiet)
        except DataError:
            continue
        assert len(TarSource(tmp_path)) == 2


def test_headers_alone_give_the_same_but_for_the_crc(tars, betons, tmp_path):
    folder = Path(betons["mixed"]._location)
    whole = check_shard(folder, Manifest.load(folder).shards[0])
    manifest = build(folder, out=tmp_path, headers_only=True, progress=quiet)
    assert manifest.base == str(folder.resolve())
    assert manifest.shards[0].sha256 is None
    columns = parse_index((tmp_path / "mixed.idx").read_bytes())
    assert (columns["flags"] == whole["flags"] | Flag.NO_CRC).all()
    for name in ("offset", "size", "label", "width", "height", "key"):
        assert (columns[name] == whole[name]).all()
