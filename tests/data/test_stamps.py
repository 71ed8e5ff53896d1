"""The toy set of cut-outs on photographs: exact masks, files that agree, all of it or nothing."""

import io
import json
import subprocess
import threading

import numpy as np
import pytest
from faster_coco_eval import COCO
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data import stamps as stamps_module
from data.__main__ import main
from data.base import DataError
from data.collage import HEIGHT, WIDTH, Scraps, compose, run_lengths
from data.stamps import CLASSES, COUNTS, fetch_stamps, source_files

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
GREY = Image.new("RGB", (400, 300), (128, 128, 128))
RECTANGLES = Scraps(
    photographs=[GREY],
    cutouts=[[Image.new("RGBA", (200, 80 + 60 * n), COLORS[n])] for n in range(4)],
)


def disc():
    """White, opaque within, with a soft edge, on black."""
    rows, columns = np.mgrid[:200, :200]
    alpha = np.clip(255 * (90 - np.hypot(rows - 100, columns - 100)) / 10, 0, 255)
    image = Image.new("RGBA", (200, 200), "white")
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return Scraps(photographs=[Image.new("RGB", (400, 300))], cutouts=[[image]])


def test_a_mask_has_exactly_the_pixels_that_show_the_cutout():
    seen = set()
    for number in range(60):
        pixels, instances = compose(RECTANGLES, split="train", number=number)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        for category, color in enumerate(COLORS, start=1):
            masks = [one.mask for one in instances if one.category == category]
            shown = (pixels == color).all(-1)
            assert np.array_equal(shown, np.logical_or.reduce(masks or [shown & False]))
        assert sum(one.mask.astype(int) for one in instances).max() == 1, "a pixel is of one alone"
        seen.add(len(instances))
        seen |= {"hidden" for one in instances if one.mask.sum() < one.whole}
    assert seen == {1, 2, 3, 4, "hidden"}


def test_a_soft_edge_belongs_to_the_mask_where_it_is_more_than_half_opaque():
    alone = [compose(disc(), split="val", number=number) for number in range(30)]
    alone = [(pixels, instances[0]) for pixels, instances in alone if len(instances) == 1]
    assert len(alone) > 3
    for pixels, instance in alone:
        assert np.array_equal(instance.mask, pixels[..., 0] >= 128)
        assert (pixels[instance.mask, 0] < 250).any(), "the edge is soft"


def test_at_least_half_of_everything_is_visible():
    for number in range(200):
        _, instances = compose(RECTANGLES, split="train", number=number)
        assert 1 <= len(instances) <= 4
        assert all(2 * one.mask.sum() >= one.whole for one in instances)


def test_a_picture_is_a_function_of_split_and_number():
    first, _ = compose(RECTANGLES, split="train", number=3)
    assert np.array_equal(first, compose(RECTANGLES, split="train", number=3)[0])
    assert not np.array_equal(first, compose(RECTANGLES, split="train", number=4)[0])
    assert not np.array_equal(first, compose(RECTANGLES, split="val", number=3)[0])


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_are_those_of_coco(mask):
    counts = run_lengths(mask)
    values = np.arange(len(counts)) % 2
    assert np.array_equal(np.repeat(values, counts).reshape(mask.shape[::-1]).T, mask)
    assert all(count > 0 for count in counts[1:]), "the shortest way to say it"


def picture(format, mode, size, color):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Packages of the real ones' names and files, with other pictures in them."""
    folder = tmp_path_factory.mktemp("packages")
    for package, names in source_files().items():
        tree = folder / package
        for number, name in enumerate(names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".png"):
                content = picture("PNG", "RGBA", (60, 50), (number, 0, 0, 255))
            else:
                content = picture("JPEG", "RGB", (400, 300), (0, number, 200))
            (tree / name).write_bytes(content)
        notes = tree / "usr/share/doc" / package / "copyright"
        notes.parent.mkdir(parents=True)
        notes.write_text(f"free, says {package}\n")
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/control").write_text(
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@b.org>\n"
            "Description: pictures\n"
        )
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, folder]
        subprocess.run(command, check=True, capture_output=True)
    return sorted(folder.glob("*.deb"))


@pytest.fixture
def out(tmp_path, packages, monkeypatch):
    """Where to make a small set, with the packages downloaded already."""
    monkeypatch.setattr(stamps_module, "COUNTS", {"train": 6, "val": 3})
    beside = tmp_path / ".stamps.part"
    beside.mkdir()
    for package in packages:
        (beside / package.name).symlink_to(package)
    return tmp_path / "stamps"


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_was_downloaded_is_used_and_the_same_packages_give_the_same_bytes(
    out, packages, monkeypatch, capsys
):
    assert main(["fetch", "stamps", "--out", str(out)]) == 0
    assert f"{out} holds 6 + 3 pictures" in capsys.readouterr().out
    first = contents(out)
    assert list(out.parent.iterdir()) == [out], "nothing is left beside"
    assert "tuxpaint-data_1_all.deb (SHA-256 " in first["SOURCES.txt"].decode()
    assert first["licences/tuxpaint-data.txt"] == b"free, says tuxpaint-data\n"
    assert main(["fetch", "stamps", "--out", str(out)]) == 0
    assert f"{out} holds the pictures already" in capsys.readouterr().out
    out.rename(out.with_name("first"))
    beside = out.parent / ".stamps.part"
    beside.mkdir()
    for package in packages:
        (beside / package.name).symlink_to(package)
    fetch_stamps(out)
    assert contents(out) == first


def test_processes_that_make_the_same_set_wait_for_one_another(out):
    said = []
    threads = [
        threading.Thread(target=fetch_stamps, args=[out], kwargs={"progress": said.append})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.count("reading the packages") == 1
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_of_something_else_is_left_alone(out, capsys):
    out.mkdir()
    (out / "thesis.tex").touch()
    assert main(["fetch", "stamps", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out} is in the way: it holds no complete set; remove or rename it" in error
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.98])
def test_a_damaged_package_is_named_and_the_others_are_kept(out, share, capsys):
    damaged = next((out.parent / ".stamps.part").glob("tuxpaint-stamps*"))
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[: int(share * len(content))])
    assert main(["fetch", "stamps", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged} is damaged (")
    assert error.endswith("remove it and run this again\n")
    assert not out.exists()
    damaged.write_bytes(content)
    fetch_stamps(out)


def test_a_package_without_the_pictures_is_refused(out, capsys):
    beside = out.parent / ".stamps.part"
    (beside / "tuxpaint-data_1_all.deb").unlink()
    other = next(beside.glob("lomiri*")).resolve()
    (beside / "tuxpaint-data_2_all.deb").symlink_to(other)
    assert main(["fetch", "stamps", "--out", str(out)]) == 2
    assert "tuxpaint-data_2_all.deb holds no usr/share/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"), [("apt-get", "needs apt-get"), ("dpkg-deb", "needs dpkg-deb")]
)
def test_without_debians_tools_the_remedy_is_named(out, missing, message, monkeypatch, capsys):
    if missing == "apt-get":
        next((out.parent / ".stamps.part").glob("lomiri*")).unlink()
    monkeypatch.setenv("PATH", str(out.parent))
    assert main(["fetch", "stamps", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "run this on a Debian or Ubuntu machine, and copy the finished folder" in error


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Give apt-get settings of its own, with no lists of packages; returns a function."""

    def configure(sources):
        (tmp_path / "sources.list").write_text(sources)
        (tmp_path / "apt.conf").write_text(
            f'Dir::State::Lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\n'
            f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
            'APT::Sandbox::User "root";\nAcquire::Retries "0";\nAcquire::http::Proxy "DIRECT";\n'
        )
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))

    return configure


def test_packages_come_from_the_sources_of_apt_without_lists_of_the_machine(out, packages, apt):
    repository = packages[0].parent
    index = []
    for package in packages:
        fields = subprocess.run(
            ["dpkg-deb", "--field", package], check=True, capture_output=True, text=True
        ).stdout
        digest = subprocess.run(
            ["sha256sum", package], check=True, capture_output=True, text=True
        ).stdout.split()[0]
        index.append(
            f"{fields}Filename: ./{package.name}\nSize: {package.stat().st_size}\n"
            f"SHA256: {digest}\n"
        )
        (out.parent / ".stamps.part" / package.name).unlink()
    (repository / "Packages").write_text("\n".join(index))
    apt(f"deb [trusted=yes] copy:{repository} ./\n")
    fetch_stamps(out)
    assert "tuxpaint-data_1_all.deb" in (out / "SOURCES.txt").read_text()


def test_without_a_network_one_message_says_so(out, apt, capsys):
    for package in (out.parent / ".stamps.part").iterdir():
        package.unlink()
    apt("deb http://127.0.0.1:9/debian bookworm main\n")
    assert main(["fetch", "stamps", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tuxpaint-stamps-default could not be downloaded" in error
    assert "127.0.0.1" in error
    assert "see to the network" in error


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is the current folder"):
        fetch_stamps(tmp_path)


@pytest.mark.slow
def test_all_files_of_the_real_set_agree(stamps):
    assert json.loads((stamps / "classes.json").read_text()) == list(CLASSES)
    for split, count in COUNTS.items():
        coco = COCO(str(stamps / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count
        assert [coco.cats[id]["name"] for id in range(1, 17)] == list(CLASSES[1:])
        found = set()
        for id, record in coco.imgs.items():
            photograph = Image.open(stamps / split / record["file_name"])
            assert photograph.size == (record["width"], record["height"]) == (320, 240)
            index = np.zeros((240, 320), np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[id], iscrowd=False)):
                mask = coco.annToMask(annotation).astype(bool)
                rows, columns = np.nonzero(mask)
                left, top, width, height = annotation["bbox"]
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
                assert annotation["area"] == mask.sum() >= 100
                assert not index[mask].any(), "masks do not overlap"
                index[mask] = annotation["category_id"]
            semantic = stamps / f"{split}_semantic" / record["file_name"].replace("jpg", "png")
            assert np.array_equal(np.asarray(Image.open(semantic)), index)
            assert index.any()
            found |= set(np.unique(index).tolist())
        assert found == set(range(17))
