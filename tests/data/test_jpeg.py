"""The fast path for JPEG files: the pixels of Pillow's, whatever is cut out and however damaged."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import jpeg
from data.decode import RESAMPLING, Geometry, decode, decode_whole
from tests.data.pictures import FOLDER, as_samples, encode, photograph

pytestmark = pytest.mark.skipif(not jpeg.works(), reason="built without libjpeg-turbo's headers")

KINDS = {
    "4:2:0": {"subsampling": 2, "quality": 90},
    "4:2:2": {"subsampling": 1, "quality": 75},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "grey": {"quality": 85},
    "optimised": {"subsampling": 2, "quality": 60, "optimize": True},
    "progressive": {"subsampling": 2, "quality": 85, "progressive": True},
    "restarting": {"subsampling": 2, "quality": 85, "restart_marker_blocks": 3},
}
INDEXED = set(KINDS) - {"progressive", "restarting"}
PHOTO = photograph(331, 247)


def picture(kind, size=PHOTO.size):
    photo = PHOTO.crop((0, 0, *size))
    return encode(photo.convert("L") if kind == "grey" else photo, "JPEG", **KINDS[kind])


def with_a_full_table(image):
    """The file with one more Huffman table, unused: 256 symbols, none of them a category."""
    counts = bytes(7) + bytes([254, 2]) + bytes(7)
    payload = b"\x03" + counts + b"\xff" * 256
    return image[:2] + b"\xff\xc4" + (2 + len(payload)).to_bytes(2, "big") + payload + image[2:]


def fast(image, plan, *, regions=None):
    """The pixels of one image, which must not have been left to Pillow."""
    out = np.zeros((1, *plan.shape, 3), np.uint8)
    jobs = [jpeg._job(Image.open(io.BytesIO(image)).size, plan, flip=False, reduce=False)]
    assert jpeg._native.decode([image], [regions], np.array(jobs, np.int32), out) == [None]
    return out[0]


@st.composite
def boxes(draw, size):
    left, top = (draw(st.integers(0, side - 1)) for side in size)
    return left, top, draw(st.integers(left + 1, size[0])), draw(st.integers(top + 1, size[1]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_is_to_the_bit_that_of_the_whole(kind, data):
    size = data.draw(st.tuples(st.integers(1, PHOTO.width), st.integers(1, PHOTO.height)))
    image, box = picture(kind, size), data.draw(boxes(size))
    whole = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    expected = whole[box[1] : box[3], box[0] : box[2]]
    plan = Geometry(box, (box[2] - box[0], box[3] - box[1]))
    regions = jpeg.build_regions(image)
    assert (regions is not None) == (kind in INDEXED)
    for index in (None, regions):
        assert np.array_equal(fast(image, plan, regions=index), expected)


@pytest.mark.parametrize("name", ["seeding.jpg", "fruits.jpg"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_part_of_a_real_photograph_is_to_the_bit_that_of_the_whole(name, data):
    image = (FOLDER / name).read_bytes()
    whole = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    box = data.draw(boxes(whole.shape[1::-1]))
    plan = Geometry(box, (box[2] - box[0], box[3] - box[1]))
    for regions in (None, jpeg.build_regions(image)):
        found = fast(image, plan, regions=regions)
        assert np.array_equal(found, whole[box[1] : box[3], box[0] : box[2]])


@pytest.mark.parametrize("kind", sorted(INDEXED))
def test_with_an_index_nothing_but_the_region_is_read(kind):
    """Bits outside of it may be anything."""
    image = picture(kind)
    regions = jpeg.build_regions(image)
    plan = Geometry((120, 130, 200, 180), (80, 50))
    expected = fast(image, plan)
    scan = image.index(b"\xff\xda") + 14
    damaged = bytearray(image)
    damaged[scan : scan + 200] = bytes(200)
    damaged[-1200:-2] = bytes(1198)
    damaged = bytes(damaged)
    assert not np.array_equal(Image.open(io.BytesIO(damaged)), Image.open(io.BytesIO(image)))
    assert np.array_equal(fast(damaged, plan, regions=regions), expected)


def test_a_full_table_has_no_room_for_more():
    image, plan = with_a_full_table(picture("4:2:0")), Geometry((120, 130, 200, 180), (80, 50))
    regions = jpeg.build_regions(image)
    assert regions is not None
    assert np.array_equal(fast(image, plan, regions=regions), fast(image, plan))


def test_an_index_that_names_the_same_bits_again_and_again_is_not_used():
    """What it asks for would be many times the file."""
    image, plan = picture("4:2:0"), Geometry((120, 2, 200, 240), (80, 238))
    regions = bytearray(jpeg.build_regions(image))
    step, per_row, rows = (int.from_bytes(regions[i : i + 2], "little") for i in (0, 2, 4))
    columns = -(-per_row // step)
    for entry in range(rows * columns):
        start = 12 + 10 * entry
        regions[start : start + 4] = bytes(4) if entry % columns < 5 else regions[8:12]
    assert np.array_equal(fast(image, plan, regions=bytes(regions)), fast(image, plan))


@settings(max_examples=200, deadline=None)
@given(
    box=boxes(PHOTO.size),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
    data=st.data(),
)
def test_resized_pixels_are_within_one_step_of_the_exact_ones(box, size, interpolation, data):
    window = data.draw(boxes(size))
    image = picture("4:2:0")
    plan = Geometry(box, size, window, interpolation)
    whole = np.asarray(Image.open(io.BytesIO(image)))
    exact = resized(whole[box[1] : box[3], box[0] : box[2]], size, interpolation)
    exact = exact[window[1] : window[3], window[0] : window[2]]
    assert np.abs(fast(image, plan, regions=jpeg.build_regions(image)) - exact).max() <= 1.6


def resized(pixels, size, interpolation):
    """The definition in float64: rows first, as the order matters where a kernel overshoots."""
    columns = weights(pixels.shape[1], size[0], interpolation)
    rows = weights(pixels.shape[0], size[1], interpolation)
    wide = (columns @ pixels.astype(float)).clip(0, 255)
    return np.einsum("hy,ywc->hwc", rows, wide).clip(0, 255)


def weights(inputs, outputs, interpolation):
    scale = inputs / outputs
    width = max(scale, 1.0)
    distance = (np.arange(inputs) + 0.5 - (np.arange(outputs)[:, None] + 0.5) * scale) / width
    t = np.abs(distance)
    if interpolation == "bilinear":
        kernel = np.maximum(1 - t, 0)
    else:
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        kernel = np.where(t < 1, near, np.where(t < 2, far, 0))
    return kernel / kernel.sum(axis=1, keepdims=True)


def test_resized_pixels_are_nearly_always_pillows():
    image, total, apart = picture("4:2:0"), 0, 0
    draws = np.random.default_rng(3)
    for _ in range(60):
        left, top = draws.integers(0, 200), draws.integers(0, 150)
        box = (left, top, left + draws.integers(20, 131), top + draws.integers(20, 97))
        plan = Geometry(tuple(map(int, box)), (64, 64))
        pillows = decode(image, lambda *_, plan=plan: plan)
        difference = np.abs(fast(image, plan).astype(int) - pillows)
        total, apart = total + difference.size, apart + (difference > 1).sum()
    assert apart <= total / 10_000


def test_a_batch_of_all_kinds_is_decoded_and_mirrored_row_by_row():
    """What the extension does not take is decoded by Pillow, and errors name their row."""
    images = [picture(kind, (90, 70)) for kind in KINDS]
    images += [encode(PHOTO.crop((0, 0, 90, 70)), "PNG"), b"no image", images[0][:1000]]
    images += [encode(PHOTO.crop((0, 0, 90, 70)).convert("CMYK"), "JPEG")]
    plan = Geometry((10, 5, 80, 61), (32, 24))
    out = np.zeros((len(images), 24, 32, 3), np.uint8)
    flips = [row % 2 == 1 for row in range(len(images))]
    regions = [jpeg.build_regions(image) for image in images]
    samples = as_samples(images, regions)
    failures = jpeg.decode_all(samples, lambda row, width, height: plan, out, flips=flips)
    broken = [len(KINDS) + 1, len(KINDS) + 2]
    assert sorted(failures) == broken
    for row in set(range(len(images))) - set(broken):
        expected = decode(images[row], lambda *_: plan)
        found = out[row, :, ::-1] if flips[row] else out[row]
        assert np.abs(found.astype(int) - expected).max() <= 1, row


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_pixels_at_hand_become_what_their_file_does(kind, data):
    image = picture(kind)
    pixels = decode_whole(image)
    sides = st.integers(1, 300)
    plan = Geometry(
        data.draw(st.none() | boxes(PHOTO.size)),
        size := (data.draw(sides), data.draw(sides)),
        data.draw(st.none() | boxes(size)),
        data.draw(st.sampled_from(sorted(RESAMPLING))),
    )
    out = np.zeros((3, *plan.shape, 3), np.uint8)
    samples = as_samples([image, pixels, encode(Image.fromarray(pixels), "PNG")])
    flips = [data.draw(st.booleans())] * 3
    assert jpeg.decode_all(samples, lambda *_: plan, out, flips=flips) == {}
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((9, 8, 3), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint16),
    ],
)
def test_pixels_of_another_shape_are_refused(pixels):
    jobs = np.array([jpeg._job((8, 8), Geometry(None, (4, 4)), flip=False, reduce=False)], np.int32)
    out = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="do not fit"):
        jpeg._native.decode([pixels], [None], jobs, out)


def test_without_the_extension_pillow_does_it_all(monkeypatch):
    monkeypatch.setattr(jpeg, "works", lambda: False)
    image, plan = picture("4:2:0"), Geometry((10, 5, 80, 61), (32, 24))
    out = np.zeros((1, 24, 32, 3), np.uint8)
    assert jpeg.decode_all(as_samples([image]), lambda *_: plan, out, flips=[True]) == {}
    assert np.array_equal(out[0, :, ::-1], decode(image, lambda *_: plan))
    assert jpeg.build_regions(image) is None


def test_reduced_decoding_is_close():
    image = encode(photograph(800, 600), "JPEG", quality=92)
    plan = Geometry((13, 21, 773, 590), (96, 72))
    outs = np.zeros((2, 1, 72, 96, 3), np.uint8)
    for out, reduce in zip(outs, (False, True), strict=True):
        assert jpeg.decode_all(as_samples([image]), lambda *_: plan, out, reduce=reduce) == {}
    difference = outs[1].astype(float) - outs[0]
    assert np.abs(difference).max() > 0, "it was decoded at a fraction of the size"
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 35


@pytest.mark.parametrize(
    "jobs",
    [
        np.zeros((1, 15), np.int32),
        np.zeros((1, 14), np.int32),
        np.zeros((2, 15), np.int32),
        np.array([[8, 8, 0, 0, 9, 8, 4, 4, 0, 0, 4, 4, 1, 0, 0]], np.int32),
        np.array([[8, 8, 0, 0, 8, 8, 4, 4, 0, 0, 4, 3, 1, 0, 0]], np.int32),
        np.array([[8, 8, 0, 0, 8, 8, 4, 4, 0, 0, 4, 4, 2, 0, 0]], np.int32),
        np.zeros((1, 15), np.int64),
    ],
)
def test_impossible_jobs_are_refused(jobs):
    with pytest.raises(ValueError, match="do not fit"):
        jpeg._native.decode([b""], [None], jobs, np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.slow
def test_damaged_files_and_indexes_do_no_harm(tmp_path):
    """No access out of bounds, and no part that decodes quietly to other pixels than the whole."""
    root = Path(__file__).parents[2]
    files = []
    for kind in KINDS:
        for size in ((90, 70), (331, 40), (17, 9)):
            files.append(tmp_path / f"{len(files)}.jpg")
            files[-1].write_bytes(picture(kind, size))
    files.append(tmp_path / "full.jpg")
    files[-1].write_bytes(with_a_full_table(picture("4:2:0", (90, 70))))
    files.append(tmp_path / "cmyk.jpg")
    files[-1].write_bytes(encode(PHOTO.crop((0, 0, 90, 70)).convert("CMYK"), "JPEG"))
    sources = [root / f"data/native/{part}.c" for part in ("decode", "region", "resample", "scan")]
    compiler = ["cc", "-g", "-O1", "-std=gnu11", "-fsanitize=address,undefined"]
    compiler += ["-fno-sanitize-recover=all", f"-I{root}/data/native"]
    fuzz = [*compiler, Path(__file__).with_name("fuzz_jpeg.c"), *sources, "-ljpeg", "-lm"]
    subprocess.run([*fuzz, "-o", tmp_path / "fuzz"], check=True)
    done = subprocess.run(
        [tmp_path / "fuzz", "12000", *files], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 2000, "many still had an index"
