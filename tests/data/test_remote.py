"""Sets that lie below a URL, on servers that fail in every way they can."""

import subprocess
import sys
from pathlib import Path

import pytest

from data import connection, remote
from data.__main__ import main
from data.base import BadSample, DataError
from data.build import build
from data.folder import SyntheticSource
from data.index import verify
from data.pack import pack
from data.remote import Remote
from data.webdataset import TarSource
from tests.data.readers import read_in_a_fork
from tests.data.servers import FileServer, s3_server, upload
from tests.dist import prepared_context

ROOT = Path(__file__).parents[2]
IMAGES = SyntheticSource(num_samples=20, num_classes=4, size=8)
SHARD = "set-000000.tar"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_PAUSE", 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four shards of five samples."""
    folder = tmp_path_factory.mktemp("origin") / "set"
    pack(IMAGES, folder, samples_per_shard=5, progress=lambda _: None)
    return folder


@pytest.fixture
def server(folder):
    with FileServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(folder):
    with s3_server():
        upload(folder, "s3://bucket/some/set")
        yield "s3://bucket/some/set"


def read_all(source):
    return [source.read(id) for id in range(len(source))]


def assert_same(source, folder):
    local = TarSource(folder)
    assert source.fingerprint == local.fingerprint
    assert source.classes == local.classes
    assert source.labels.tolist() == local.labels.tolist()
    assert source.shard_sizes.tolist() == local.shard_sizes.tolist()
    assert read_all(source) == read_all(local)


@pytest.mark.parametrize("cached", [False, True], ids=["ranged", "cached"])
@pytest.mark.parametrize("protocol", ["s3", "http", "file"])
def test_a_remote_set_is_the_local_one(folder, server, bucket, tmp_path, protocol, cached):
    url = {"s3": bucket, "http": server.url, "file": f"file://{folder}"}[protocol]
    source = TarSource(url + "/", tmp_path if cached else None)
    source.prefetch(range(10))
    assert_same(source, folder)
    assert source.name(7).startswith(f"{url}/set-000001.tar:")
    assert source.name(7).endswith(" (sample 7)")
    held = {path.name for path in tmp_path.glob("*/*.tar")}
    assert held == ({path.name for path in folder.glob("*.tar")} if cached else set())


def test_a_process_that_was_forked_reads_with_connections_of_its_own(server, folder):
    process = prepared_context().Process(target=read_in_a_fork, args=(server.url, folder))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


FAULTS = ["drop", "short", "503", "corrupt"]


@pytest.mark.parametrize("fault", ["drop", "short", "503"])
def test_what_fails_is_asked_for_again(server, fault):
    server.faults["manifest.json"].extend([fault, fault])
    expected = (server.folder / "manifest.json").read_bytes()
    reader = Remote(server.url)
    assert reader.read("manifest.json", start=0, end=len(expected)) == expected
    assert server.count("manifest.json") == 3


@pytest.mark.parametrize("cached", [False, True], ids=["ranged", "cached"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_failure_reaches_a_sample(server, folder, tmp_path, fault, cached):
    server.faults[SHARD].extend([fault, fault] if fault != "corrupt" else [fault])
    server.faults["set-000001.idx"].extend([fault] if fault != "short" else [None])
    source = TarSource(server.url, tmp_path if cached else None)
    source.prefetch(range(20))
    assert_same(source, folder)
    assert server.count("set-000001.idx") == (1 if fault == "short" else 2)


def test_an_interrupted_download_goes_on_where_it_was(server, folder, tmp_path, monkeypatch):
    size = (folder / SHARD).stat().st_size
    monkeypatch.setattr(remote, "_CHUNK", -(-size // 8))
    monkeypatch.setattr(remote, "_CHUNKS_AHEAD", 1)
    server.faults[SHARD].extend([None, None, None, "drop", "drop"])
    TarSource(server.url, tmp_path).read(0)
    spans = [span for name, span in server.requests if name == SHARD]
    assert len(spans) == 10
    assert len(set(spans)) == 8
    assert spans.count(spans[3]) == 3
    assert (next(tmp_path.glob(f"*/{SHARD}"))).read_bytes() == (folder / SHARD).read_bytes()


def test_a_server_that_stays_away_is_given_up_on(server, monkeypatch):
    server.faults["manifest.json"].extend(["503"] * 10)
    with (
        pytest.warns(UserWarning, match=r"manifest\.json.*trying on"),
        pytest.raises(DataError, match=r"/manifest\.json cannot be read after 10 tries .*503") as e,
    ):
        TarSource(server.url)
    assert "that this machine reaches it" in str(e.value)
    assert server.count("manifest.json") == 10


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [
        ("403", "manifest.json", r"manifest\.json may not be read .*credentials"),
        (None, "nothing.json", r"nothing\.json is missing: check the address, restore .* index"),
    ],
)
def test_a_refusal_is_final(server, fault, name, message):
    server.faults[name].append(fault)
    with pytest.raises(DataError, match=message):
        Remote(server.url).read(name)
    assert server.count(name) == 1


def test_a_bucket_that_cannot_be_is_named_at_once(bucket):
    with pytest.raises(DataError, match=r"Invalid bucket name .*: check the address"):
        TarSource("s3://Bad_Bucket!/set")


def test_a_bucket_without_the_set_is_named(bucket):
    with pytest.raises(DataError, match=r"s3://bucket/other/manifest\.json is missing"):
        TarSource("s3://bucket/other")


def test_a_server_without_ranges_is_named(server):
    server.faults[SHARD].extend(["whole"] * 3)
    with pytest.raises(DataError, match=r"after 3 tries: .* the server knows no ranges"):
        Remote(server.url).read(SHARD, start=512, end=1024)


def test_an_index_of_another_set_is_named(server, tmp_path):
    server.faults["set-000002.idx"].extend(["corrupt"] * 3)
    with pytest.raises(DataError, match=r"set-000002\.idx is not what the manifest says after 3"):
        TarSource(server.url, tmp_path)
    assert not list(tmp_path.glob("*/set-000002*"))


def test_a_sample_that_stays_damaged_is_a_bad_sample(server):
    server.faults[SHARD].extend(["corrupt"] * 2)
    with pytest.raises(BadSample, match=rf"{SHARD}:.* \(sample 3\) has changed"):
        TarSource(server.url).read(3)


def test_a_request_that_is_slower_than_others_is_made_twice(server, monkeypatch):
    monkeypatch.setattr(connection, "_SILENCE", 1e6)
    monkeypatch.setattr(connection, "_FAMILIAR", 30)  # before which none is asked twice
    reader = Remote(server.url)
    expected = (server.folder / SHARD).read_bytes()
    for place in range(30):
        reader.read(SHARD, start=place, end=place + 100)
    before = server.count(SHARD)
    server.faults[SHARD].append("stall")
    assert reader.start(SHARD, start=0, end=100).result(timeout=60) == expected[:100]
    assert not server.release.is_set()
    assert server.count(SHARD) == before + 2


def test_a_server_that_says_nothing_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(connection, "_SILENCE", 0.05)
    server.faults["manifest.json"].extend(["stall"] * 4)
    expected = (server.folder / "manifest.json").read_bytes()
    assert Remote(server.url).read("manifest.json") == expected


def test_bytes_that_keep_coming_may_take_their_time(server, monkeypatch):
    monkeypatch.setattr(connection, "_SILENCE", 1.0)
    server.faults["manifest.json"].extend(["trickle"] * 40)
    expected = (server.folder / "manifest.json").read_bytes()
    assert Remote(server.url).read("manifest.json", start=0, end=100) == expected[:100]


@pytest.mark.parametrize("headers_only", [False, True])
def test_an_index_is_made_from_afar_whatever_fails(folder, tmp_path, headers_only):
    shard, folder = (folder / SHARD).read_bytes(), tmp_path / "origin"
    (folder / "a b").mkdir(parents=True)
    for number in range(4):
        (folder / "a b" / f"{number}.tar").write_bytes(shard)
    with FileServer(folder) as server:
        for name in ("", "a b/", "a b/1.tar"):
            server.faults[name].extend(["503", "drop", "503", "503", "drop"])
        manifest = build(
            server.url, out=tmp_path / "far", headers_only=headers_only, progress=lambda _: None
        )
        assert [s.name for s in manifest.shards] == [f"a b/{number}.tar" for number in range(4)]
        assert not server.faults["a b/1.tar"]
        server.faults["a b/2.tar"].extend(["503", "drop", "503", "drop"])
        assert verify(tmp_path / "far", progress=lambda _: None) == manifest
    near = build(folder, headers_only=headers_only, progress=lambda _: None)
    for ours, theirs in zip(manifest.shards, near.shards, strict=True):
        assert (ours.num_samples, ours.sha256) == (theirs.num_samples, theirs.sha256)


def test_samples_are_requested_once_and_before_they_are_read(server):
    source = TarSource(server.url)
    names = {f"set-{number:06d}.tar" for number in range(4)}
    for name in names:
        server.faults[name].extend(["stall"] * 5)
    source.prefetch([*range(20), 3])
    for _ in range(20):  # all are under way before any is read
        server.stalled.acquire()
    server.release.set()
    for name in names:
        server.faults[name].clear()
    samples = [*read_all(source), source.read(3)]
    assert samples[3] == samples[20]
    # Each was dropped once by the server, when it was released, and asked for again.
    assert sum(server.count(name) for name in names) == 40


def test_a_source_that_is_closed_forgets_what_it_asked_for(server, folder):
    source = TarSource(server.url)
    server.faults[SHARD].extend(["stall"] * 5)
    source.prefetch(range(5))
    for _ in range(5):
        server.stalled.acquire()
    source.close()
    assert read_all(source) == read_all(TarSource(folder))
    assert not server.release.is_set()


def test_batches_that_are_never_read_are_forgotten(server, folder):
    source = TarSource(server.url)
    for _ in range(3):
        for id in range(20):
            source.prefetch([id])
    source.prefetch(range(20))
    for id in range(20):
        source.prefetch([id])
    assert_same(source, folder)


def test_a_protocol_that_nobody_speaks_is_named():
    program = """
import sys
from data.base import DataError
from data.webdataset import TarSource
for blocked in ("s3fs", "aiohttp", "gcsfs"):
    sys.modules[blocked] = None
for url in ("s3://bucket/set", "https://host/set", "gs://bucket/set", "pigeon://loft/set"):
    try:
        TarSource(url)
    except DataError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, url, extra in (
        (lines[0], "s3://bucket/set", "remote"),
        (lines[1], "https://host/set", "remote"),
        (lines[2], "gs://bucket/set", "gcs"),
    ):
        assert line.startswith(f"{url} cannot be opened")
        assert f"run `pip install --editable '.[{extra}]'` in Foveate's folder" in line
    assert "'pigeon' is not a protocol that fsspec knows" in lines[3]


@pytest.mark.parametrize("url", ["s3://", "https://", "file:///"])
def test_a_url_of_nothing_is_refused(url):
    with pytest.raises(DataError, match=f"^{url} names no bucket, server or folder"):
        TarSource(url)


def test_what_is_elsewhere_is_verified_by_its_index(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "s3://bucket/set"])
    said = "s3://bucket/set is elsewhere: index it with --out FOLDER, and verify that folder"
    assert said in capsys.readouterr().err


def test_a_name_that_leaves_the_cache_folder_is_refused(folder, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    text = (folder / "manifest.json").read_text().replace(SHARD, f"../../{SHARD}")
    (origin / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"'\.\./\.\./set-000000\.tar' outside of its folder"):
        TarSource(f"file://{origin}", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (origin / "manifest.json").write_text(text.replace("../../", "sub/"))
    with pytest.raises(DataError, match=r"'sub/set-000000\.tar', which is no file name"):
        TarSource(f"file://{origin}", tmp_path / "cache")
