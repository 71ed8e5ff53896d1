"""Shards cached on disk: processes that race, die, run out of room, and know what comes next."""

import subprocess
import sys
import tarfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data import jpeg, remote
from data.augment import AugmentSpec
from data.base import DataError, Shard
from data.build import build
from data.cachefolder import CacheFolder
from data.folder import SyntheticSource
from data.index import Manifest
from data.order import StreamShuffle
from data.pack import pack
from data.pipeline import ImagePipeline
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph
from tests.data.readers import read_everything, read_one
from tests.data.servers import FileServer, s3_server, upload
from tests.data.test_index import add, flip_byte
from tests.dist import prepared_context, run_distributed
from tests.trainer.disk import on_small_disk

ROOT = Path(__file__).parents[2]
IMAGES = SyntheticSource(num_samples=240, num_classes=4, size=8)
NAMES = [f"set-{number:06d}.tar" for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve shards of twenty samples."""
    folder = tmp_path_factory.mktemp("origin") / "set"
    pack(IMAGES, folder, samples_per_shard=20, progress=lambda _: None)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 1e-4)
    with FileServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def size(folder):
    """Of a shard: all have about the same."""
    return max((folder / name).stat().st_size for name in NAMES)


def held(cache):
    """The numbers of the shards in a cache folder."""
    return {NAMES.index(path.name) for path in cache.glob("*/*.tar")}


def parts(cache):
    return [path.name for path in cache.glob("*/*.part*")]


def settled(cache):
    """The same, once what is downloaded ahead is there."""
    for thread in threading.enumerate():
        if thread.name == "foveate-cache":
            thread.join()
    return held(cache)


def images(source, ids=range(240)):
    return [source.read(id).image for id in ids]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_race_for_a_shard_download_it_once(server, folder, tmp_path, count):
    run_distributed(read_everything, count, server.url, str(folder), str(tmp_path), None, 0)
    assert {server.count(name) for name in NAMES} == {1}
    assert {server.count(name.replace("tar", "idx")) for name in NAMES} == {1}
    assert held(tmp_path) == set(range(12))


def test_processes_that_share_too_small_a_cache_get_what_they_read(server, folder, tmp_path, size):
    run_distributed(read_everything, 3, server.url, str(folder), str(tmp_path), 4 * size, 1)
    assert parts(tmp_path) == []
    assert len(held(tmp_path)) <= 4 + 3


def start_reading(url, cache, chunk):
    process = prepared_context().Process(target=read_one, args=(url, cache, chunk))
    process.start()
    return process


def exit_code(process):
    process.join(60)
    return process.exitcode


@pytest.fixture
def half_way(server, tmp_path, size):
    """A process that waits for the second half of the first shard."""
    server.faults[NAMES[0]].extend([None, "stall"])
    process = start_reading(server.url, tmp_path, -(-size // 2))
    assert server.stalled.acquire(timeout=60)
    assert len(parts(tmp_path)) == 1
    assert held(tmp_path) == set()
    yield process
    process.kill()
    process.join()


def test_what_a_killed_process_began_is_removed_and_done_by_another(
    half_way, server, folder, tmp_path
):
    waiting = start_reading(server.url, tmp_path, 1 << 20)
    half_way.kill()
    half_way.join()
    assert exit_code(waiting) == 0
    assert parts(tmp_path) == []
    assert images(TarSource(server.url, tmp_path)) == images(TarSource(folder))


def test_what_a_killed_process_left_is_removed_at_the_start(half_way, server, tmp_path):
    half_way.kill()
    half_way.join()
    TarSource(server.url, tmp_path)
    assert parts(tmp_path) == []
    assert server.count(NAMES[0]) == 2


def test_what_another_process_is_at_is_left_alone(half_way, server, tmp_path):
    source = TarSource(server.url, tmp_path)
    source.read(30)
    assert len(parts(tmp_path)) == 1
    server.release.set()
    assert exit_code(half_way) == 0
    assert parts(tmp_path) == []
    assert held(tmp_path) == {0, 1}


def test_a_shard_that_arrives_damaged_is_downloaded_again(server, folder, tmp_path):
    server.faults[NAMES[0]].extend(["corrupt"] * 2)
    assert TarSource(server.url, tmp_path).read(3) == TarSource(folder).read(3)
    assert server.count(NAMES[0]) == 3


def test_a_shard_that_stays_damaged_is_named_with_both_hashes(server, folder, tmp_path):
    server.faults[NAMES[0]].extend(["corrupt"] * 3)
    source = TarSource(server.url, tmp_path)
    expected = Manifest.load(folder).shards[0].sha256
    with pytest.raises(
        DataError, match=rf"{NAMES[0]} has the SHA-256 [0-9a-f]{{64}} instead of"
    ) as e:
        source.read(3)
    assert f"instead of {expected}, in each of 3 downloads: restore the shard" in str(e.value)
    assert parts(tmp_path) == []
    assert held(tmp_path) == set()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_shard_that_decayed_in_the_cache_is_downloaded_again(server, folder, tmp_path, damage):
    source = TarSource(server.url, tmp_path)
    expected = images(source, range(20))
    [path] = tmp_path.glob(f"*/{NAMES[0]}")
    if damage == "flip":
        flip_byte(path, path.read_bytes().index(expected[5]) + 9)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    assert images(TarSource(server.url, tmp_path), range(20)) == expected
    assert server.count(NAMES[0]) == 2
    assert path.read_bytes() == (folder / NAMES[0]).read_bytes()


def test_the_cache_holds_what_is_read_soonest(server, tmp_path, size):
    source = TarSource(server.url, tmp_path, 4 * size)
    next_use = np.array([9, 0, 30, 1, 30, 2, 30, 30, 8, 30, 30, 30])
    source.expect(next_use)
    assert settled(tmp_path) == {1, 3, 5, 8}
    downloaded = len(server.requests)
    source.expect(next_use)
    assert settled(tmp_path) == {1, 3, 5, 8}
    assert len(server.requests) == downloaded
    next_use[[1, 3]] = 30, 0
    source.expect(next_use)
    assert settled(tmp_path) == {0, 3, 5, 8}
    next_use[[0, 3, 5, 8]] = 1, 29, 2, 0
    source.expect(next_use)
    assert settled(tmp_path) == {0, 3, 5, 8}
    for unexpected in (11, 10, 9, 7):  # what is read last makes room, for one after the other
        source.read(20 * unexpected)
        assert held(tmp_path) == {0, 5, 8, unexpected}
    assert {server.count(name) for name in NAMES} == {0, 1}


def test_what_was_evicted_keeps_no_disk_space(server, tmp_path, size):
    """Other processes may have it open: they let go at what they expect next."""
    ours, theirs = (TarSource(server.url, tmp_path, 3 * size) for _ in range(2))
    theirs.read(0)
    ours.expect(np.array([30, 0, 1, 2, *[30] * 8]))
    assert settled(tmp_path) == {1, 2, 3}
    assert theirs.read(1).id == 1  # it is open, and not downloaded again
    assert open_and_removed(tmp_path) == 1
    theirs.expect(np.array([30, 0, 1, 2, *[30] * 8]))
    settled(tmp_path)
    assert open_and_removed(tmp_path) == 0


def open_and_removed(cache):
    links = [Path("/proc/self/fd") / name for name in Path("/proc/self/fd").iterdir()]
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    return sum(t.startswith(str(cache)) and t.endswith("(deleted)") for t in targets)


def test_closing_ends_what_is_downloaded_ahead(server, tmp_path):
    source = TarSource(server.url, tmp_path)
    server.faults[NAMES[2]].extend(["stall"] * 2)
    source.expect(np.array([5, 1, 0, *[9] * 9]))
    assert server.stalled.acquire(timeout=60)
    source.close()
    assert not server.release.is_set()
    assert held(tmp_path) == set()
    assert parts(tmp_path) == []
    source.close()


def test_a_cache_that_is_too_small_is_refused_before_anything_is_read(server, tmp_path, size):
    source = TarSource(server.url, tmp_path, 3 * size)
    with pytest.raises(DataError, match=r"has room for .* GB, but 3 shards .* the next 2 take"):
        source.expect(np.array([0, 0, 0, *[9] * 9]))
    with pytest.raises(DataError, match=r"12 shards .*: give it as much"):
        source.expect(np.zeros(12, np.int64))
    assert held(tmp_path) == set()


@pytest.mark.parametrize("place", ["a file", "a folder without permission"])
def test_a_folder_that_cannot_be_used_is_named(server, tmp_path, place):
    if place == "a file":
        (tmp_path / "cache").write_text("")
    else:
        (tmp_path / "cache").symlink_to("/proc/1/no")
    with pytest.raises(DataError, match=r"cache .*cannot be used .*or choose another cache_dir"):
        TarSource(server.url, tmp_path / "cache" / "here")


READ = """
import sys
from pathlib import Path
from data.base import DataError
from data.webdataset import TarSource
url, cache = sys.argv[1:]
try:
    source = TarSource(url, cache)
    for id in [*range(240), 0]:
        source.read(id)
    print("read", end=" ")
except DataError as error:
    print(error, end=" ")
print(sorted(path.name for path in Path(cache).glob("*/set-*.tar*")))
"""


@pytest.mark.parametrize("room", [2.5, 0.5])
def test_on_a_full_disk_the_last_needed_goes_or_one_message_says_so(server, tmp_path, size, room):
    indexes = sum(path.stat().st_size + 4096 for path in server.folder.glob("*.idx"))
    command = [sys.executable, "-c", READ, server.url, str(tmp_path)]
    done = subprocess.run(
        on_small_disk(tmp_path, command, num_bytes=int(indexes + room * size)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    if room > 1:
        assert done.stdout.startswith("read ['set-0")
        assert ".part" not in done.stdout
    else:
        assert "is full: set-000000.tar needs" in done.stdout
        assert "no other shard is left to make room; free some" in done.stdout
        assert done.stdout.endswith(" []\n")


@pytest.mark.skipif(not jpeg.works(), reason="built without libjpeg-turbo's headers")
def test_regions_come_and_go_with_their_shard(tmp_path):
    origin, cache = tmp_path / "origin", tmp_path / "cache"
    origin.mkdir()
    for name in "abc":
        with tarfile.open(origin / f"{name}.tar", "w") as archive:
            add(archive, "0.jpg", encode(photograph(96, 64), "JPEG"))
            add(archive, "0.cls", b"0")
    build(origin, progress=lambda _: None)
    size = (origin / "a.tar").stat().st_size + (origin / "a.roi").stat().st_size
    source = TarSource(f"file://{origin}", cache, 2 * size)
    for id in range(3):
        assert source.read(id) == TarSource(origin).read(id)
        assert source.read(id).regions
    names = sorted(path.stem for path in cache.glob("*/*.roi"))
    assert names == sorted(path.stem for path in cache.glob("*/*.tar"))
    assert len(names) == 2


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # finished and renamed, or removed, by another thread
        return 0


def batches(source, shuffle, count, before=lambda batch: None):
    """The images and ids of the first batches of 24, with a stop between two of them."""
    settings = {"augment": AugmentSpec(size=8), "global_batch": 24, "seed": 1, "num_workers": 2}
    pipeline = ImagePipeline(source, shuffle=shuffle, **settings)
    stream = pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))
    for number in range(count):
        before(number)
        yield from ((b.images.numpy(), b.ids.tolist()) for b, _ in islice(stream, 1))
    stream.close()


def test_a_stream_from_s3_through_a_small_cache_is_the_local_one(folder, tmp_path, monkeypatch):
    local = TarSource(folder)
    shuffle = StreamShuffle(shard_sizes=local.shard_sizes, seed=1, lanes=2, window=20)
    places = shuffle.lane_length // 12  # batches of 24 take 12 places of each lane
    sizes = np.array([(folder / name).stat().st_size for name in NAMES])

    def expected(number):
        return shuffle.next_use(number // places, number % places * 12, np.arange(2))

    least = max((expected(number) == 0).sum() for number in range(2 * places)) + 2
    limit = int(np.sort(sizes)[-least:].sum())
    assert limit < 0.8 * sizes.sum()
    sums = []

    def reserve(self, *arguments, unpatched=CacheFolder.reserve, **settings):
        done = unpatched(self, *arguments, **settings)
        sums.append(sum(map(size_of, self.path.glob("*.tar*"))))
        return done

    monkeypatch.setattr(CacheFolder, "reserve", reserve)
    with s3_server():
        upload(folder, "s3://bucket/set")
        source = TarSource("s3://bucket/set", tmp_path, limit)
        far = batches(source, shuffle, 2 * places, lambda number: source.expect(expected(number)))
        near = batches(local, shuffle, 2 * places)
        for (pixels, ids), (expected_pixels, expected_ids) in zip(far, near, strict=True):
            assert ids == expected_ids
            assert np.array_equal(pixels, expected_pixels)
        source.close()
    assert len(sums) > 12  # it had to download some again
    assert max(sums) <= limit + sizes.max()
