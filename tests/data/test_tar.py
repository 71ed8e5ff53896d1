"""Tars of any make: where labels are found, what images are flagged, and what is refused."""

import io
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.base import DataError
from data.build import build, scan
from data.columns import Flag
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph
from tests.data.test_index import IMAGES, add

PHOTO = photograph(90, 60)
JPEG = encode(PHOTO, "JPEG")


def archive_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            add(archive, name, content)
    return file


def labels(members, **settings):
    return scan(archive_of(members), "a.tar", **settings)["label"].tolist()


def sample(key, **members):
    return [(f"{key}.{suffix}", content) for suffix, content in members.items()]


def as_json(**fields):
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"cls": b"3\n", "json": as_json(label=4), "txt": b"5"}, 3),
        ({"json": as_json(label=4, cls=6), "txt": b"5"}, 6),
        ({"json": as_json(label="4", cls="cat"), "txt": b"5"}, 4),
        ({"json": as_json(url="http", width=7), "txt": b" 5 \n"}, 5),
        ({"txt": b"5"}, 5),
        ({"json": b"{", "txt": b"5"}, 5),
    ],
)
def test_a_label_is_found_in_one_order(members, expected):
    for order in (members, dict(reversed(members.items()))):
        assert labels(sample("x", jpg=JPEG, **order)) == [expected]
        assert labels([*sample("x", **order), ("x.jpg", JPEG)]) == [expected]


def test_a_named_field_is_the_only_place_looked_at():
    members = sample("x", jpg=JPEG, cls=b"1", txt=b"2", json=as_json(label=3, category=4))
    assert labels(members, label_field="category") == [4]
    with pytest.raises(DataError, match=r"no number in \.json \(fields breed\)"):
        labels(members, label_field="breed")


def test_img2datasets_layout_says_how_to_name_the_label():
    """As img2dataset writes: a caption, and what is known of the download."""
    meta = as_json(caption="a cat", url="http://x/y.jpg", key="000000000", status="success")
    members = [
        *sample("000000000", jpg=JPEG, json=meta, txt=b"a cat"),
        *sample("000000001", jpg=JPEG, json=meta, txt=b"a cat"),
    ]
    with pytest.raises(DataError) as error:
        labels(members)
    assert str(error.value) == (
        "a.tar: '000000000' lacks its class label, as do 1 more: no number in .cls, .json, .txt "
        "(fields cls, label), there is .json with caption='a cat', url='http://x/y.jpg', "
        "key='000000000', status='success'; .txt that begins b'a cat'; add .cls members with the "
        "class number, or name the .json field that holds it with --label-field"
    )
    meta = as_json(caption="a cat", category=7)
    assert labels(sample("0", jpg=JPEG, json=meta, txt=b"a cat"), label_field="category") == [7]


@pytest.mark.parametrize("value", [True, 1.5, -1, 1_000_000, "seven", None, [1]])
def test_what_is_no_class_number_is_no_label(value):
    with pytest.raises(DataError, match="lacks its class label"):
        labels(sample("x", jpg=JPEG, json=as_json(label=value)))


@pytest.mark.parametrize(
    "members",
    [
        [*sample("x", cls=b"1", jpg=JPEG), ("x.jpg", JPEG)],
        [*sample("x", cls=b"1", jpg=JPEG), ("x.png", IMAGES.read(0).image)],
        [*sample("x", jpg=JPEG, json=as_json(label=1)), ("./x.json", as_json(label=2))],
    ],
)
def test_two_members_of_one_name_are_refused(members):
    with pytest.raises(DataError, match="sample 'x' occurs twice"):
        labels(members)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (JPEG, Flag(0)),
        (encode(PHOTO, "JPEG", progressive=True), Flag.PROGRESSIVE),
        (encode(PHOTO.convert("CMYK"), "JPEG"), Flag.CMYK),
        (encode(PHOTO.convert("L"), "JPEG"), Flag.GREY),
        (encode(PHOTO, "JPEG", exif=exif(6)), Flag.ROTATED),
        (encode(PHOTO, "JPEG", exif=exif(1)), Flag(0)),
        (encode(PHOTO, "JPEG", exif=b"Exif\0\0torn"), Flag(0)),
        (encode(PHOTO, "PNG"), Flag.NOT_JPEG),
        (encode(PHOTO.convert("L"), "PNG"), Flag.NOT_JPEG | Flag.GREY),
        (encode(PHOTO, "JPEG", icc_profile=bytes(30_000)), Flag(0)),
        (encode(PHOTO, "JPEG", icc_profile=bytes(200_000)), Flag(0)),
    ],
)
@pytest.mark.parametrize("headers_only", [False, True])
def test_images_are_described_from_all_of_them_or_the_beginning(image, expected, headers_only):
    file = archive_of(sample("x", jpg=image, cls=b"0"))
    columns = scan(file, "a.tar", headers_only=headers_only)
    assert columns["flags"][0] == expected | (Flag.NO_CRC if headers_only else 0)
    assert (columns["width"][0], columns["height"][0]) == (90, 60)
    assert (columns["crc32"][0] == 0) == headers_only


def test_a_member_beyond_four_gigabytes_is_passed_over(tmp_path):
    """It is a hole in the file, which takes no room."""
    path, hole = tmp_path / "a.tar", 5 << 30
    with path.open("wb") as file:
        video = tarfile.TarInfo("movie.mp4")
        video.size = hole
        file.write(video.tobuf(tarfile.GNU_FORMAT))
        file.seek(hole, io.SEEK_CUR)
        file.write(archive_of(sample("x", jpg=JPEG, cls=b"1")).getvalue())
    with path.open("rb") as file:
        columns = scan(file, "a.tar")
        assert columns["offset"].tolist() == [hole + 1024]
        file.seek(int(columns["offset"][0]))
        assert file.read(int(columns["size"][0])) == JPEG


def test_a_damaged_header_does_not_pass_for_the_end():
    file = archive_of([*sample("x", jpg=JPEG, cls=b"1"), *sample("y", jpg=JPEG, cls=b"1")])
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as archive:
        offset = archive.getmembers()[2].offset
    content = bytearray(file.getvalue())
    content[offset + 3] ^= 1
    with pytest.raises(DataError, match=f"damaged: no member begins at byte {offset}"):
        scan(io.BytesIO(content), "a.tar")


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_archives_of_the_tar_command_are_read(tmp_path, format):
    folder = tmp_path / "set" / ("deep" * 20 if format in ("gnu", "pax") else "deep")
    folder.mkdir(parents=True)
    for id in range(6):
        (folder / f"{id}.jpg").write_bytes(JPEG)
        (folder / f"{id}.cls").write_text(str(id % 2))
    command = ["tar", f"--format={format}", "--sort=name", "-cf", str(tmp_path / "a.tar"), "."]
    subprocess.run(command, cwd=tmp_path / "set", check=True)
    shutil.rmtree(tmp_path / "set")
    build(tmp_path, progress=lambda _: None)
    source = TarSource(tmp_path)
    assert source.labels.tolist() == [0, 1] * 3
    assert all(source.read(id).image == JPEG for id in range(6))


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
def test_an_image_stored_with_holes_is_refused(tmp_path):
    holes = encode(PHOTO, "PNG") + bytes(1 << 20)
    (tmp_path / "x.png").write_bytes(holes)
    (tmp_path / "x.cls").write_text("0")
    with (tmp_path / "x.png").open("r+b") as file:
        file.truncate(len(holes) - (1 << 20))
        file.truncate(len(holes))
    command = ["tar", "--sparse", "-cf", "a.tar", "x.png", "x.cls"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"x\.png is stored with holes"):
        build(tmp_path, progress=lambda _: None)


def test_a_scan_of_many_members_reads_the_right_bytes():
    random = np.random.default_rng(0)
    images = [encode(PHOTO.rotate(n), "JPEG") for n in range(20)]
    members = [m for n, image in enumerate(images) for m in sample(n, jpg=image, cls=b"%d" % n)]
    members += [(f"{n}.mp4", bytes(int(random.integers(2000)))) for n in range(20)]
    members = [members[place] for place in random.permutation(len(members))]
    file = archive_of(members)
    for headers_only in (False, True):
        columns = scan(file, "a.tar", headers_only=headers_only)
        for offset, size, label in zip(
            *(columns[name].tolist() for name in ("offset", "size", "label")), strict=True
        ):
            assert file.getvalue()[offset : offset + size] == images[label]


def links(*members):
    """A tar of (name, content), where a content that is text is the target of a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            if isinstance(content, bytes):
                add(archive, name, content)
            else:
                link, kind = tarfile.TarInfo(name), content.partition(":")[0]
                link.type = tarfile.SYMTYPE if kind == "sym" else tarfile.LNKTYPE
                link.linkname = content.partition(":")[2]
                archive.addfile(link)
    return file


@pytest.mark.parametrize(
    "members",
    [
        [("a/x.jpg", JPEG), ("a/x.cls", b"1"), ("b/y.jpg", "hard:a/x.jpg"), ("b/y.cls", b"2")],
        [("a/x.jpg", JPEG), ("a/x.cls", b"1"), ("b/y.jpg", "sym:../a/x.jpg"), ("b/y.cls", b"2")],
        [("a/x.jpg", "sym:./z"), ("a/x.cls", b"1"), ("a/z", "hard:b/y.jpg"), ("b/y.jpg", JPEG),
         ("b/y.cls", b"2")],
        [("./x.jpg", JPEG), ("./x.cls", b"1"), ("./y.jpg", "hard:./x.jpg"), ("./n", b"2"),
         ("./y.cls", "sym:n"), ("./z.mp4", "sym:/elsewhere")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("headers_only", [False, True])
def test_a_link_is_what_it_leads_to(members, headers_only):
    file = links(*members)
    columns = scan(file, "a.tar", headers_only=headers_only)
    assert columns["label"].tolist() == [1, 2]
    for offset, size in zip(columns["offset"].tolist(), columns["size"].tolist(), strict=True):
        assert file.getvalue()[offset : offset + size] == JPEG


@pytest.mark.parametrize("target", ["hard:z.jpg", "sym:/data/x.jpg", "sym:x.jpg", "sym:y"])
def test_a_link_that_leads_nowhere_is_refused(target):
    folder = [("y", "sym:y2"), ("y2", "sym:y")]
    with pytest.raises(DataError, match=r"a\.tar: x\.jpg is a link to .*, which is no file in it"):
        scan(links(("x.cls", b"1"), ("x.jpg", target), *folder), "a.tar")


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
def test_files_of_two_names_are_read_as_the_tar_command_stores_them(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(JPEG)
    (folder / "b.jpg").hardlink_to(folder / "a.jpg")
    for name in ("a", "b"):
        (folder / f"{name}.cls").write_text("1")
    subprocess.run(["tar", "-cf", str(tmp_path / "s.tar"), "-C", str(folder), "."], check=True)
    build(tmp_path, progress=lambda _: None)
    assert [TarSource(tmp_path).read(id).image for id in range(2)] == [JPEG, JPEG]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_need_not_be_utf_8(tmp_path, format):
    """As archives of the nineties have them; two that differ in such a byte alone stay two."""
    with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="latin-1") as archive:
        for label, name in enumerate(("caf\xe9", "caf\xe8")):
            add(archive, f"{name}.jpg", JPEG)
            add(archive, f"{name}.cls", b"%d" % label)
    lines = []
    build(tmp_path, progress=lines.append)
    source = TarSource(tmp_path)
    assert source.labels.tolist() == [0, 1]
    source.name(1).encode()  # can be printed
    add_to = archive_of([("caf\udce9.jpg", JPEG)])
    with pytest.raises(DataError, match="lacks its class label") as error:
        scan(add_to, "a.tar")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.jpg", JPEG), ("x.cls", b"")], r"x\.cls holds b'', not a class number"),
        (
            [("x.jpg", JPEG), ("x.json", b"")],
            r"lacks its class label: .*\.json that cannot be read",
        ),
    ],
)
def test_an_empty_label_is_refused(members, message):
    with pytest.raises(DataError, match=message):
        scan(archive_of(members), "a.tar")


def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence():
    first, second = (archive_of(sample(key, jpg=JPEG, cls=b"1")).getvalue() for key in "xy")
    assert len(scan(io.BytesIO(first + bytes(1 << 20)), "a.tar")["label"]) == 1
    with pytest.raises(DataError, match=r"a\.tar goes on after its end, .* several tars in one"):
        scan(io.BytesIO(first + second), "a.tar")


def test_a_long_name_is_shown_whole(tmp_path):
    name = "folder/" * 18 + "x"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, f"{name}.jpg", JPEG)
        add(archive, f"{name}.cls", b"1")
    build(tmp_path, progress=lambda _: None)
    assert TarSource(tmp_path).name(0) == f"{tmp_path}/a.tar:{name}.jpg (sample 0)"


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_said_to_be_one(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        add(archive, "x.jpg", JPEG)
    with pytest.raises(DataError, match=r"a\.tar is compressed; uncompress it"):
        scan(file, "a.tar")
