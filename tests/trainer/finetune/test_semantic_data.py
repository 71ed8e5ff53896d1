"""Folders of labelled pictures: what is read, what is refused, and how samples are changed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import UserError
from trainer.finetune.semantic_augment import Augmentation, augment, distort, fitted_size
from trainer.finetune.semantic_data import (
    SemanticViews,
    ade20k,
    index_folder,
)

SMALL = Augmentation(box=(256, 64), crop=48)


def _photo(path, width=60, height=40, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3))
    Image.fromarray(noise.astype(np.uint8)).resize((width, height)).save(path)


def _labels(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one below a folder, with classes 0 to 2 and a strip that is ignored."""
    for number, name in enumerate(("a.jpg", "b.png", "deep/c.JPG")):
        _photo(tmp_path / "images" / name, seed=number)
        values = np.arange(60)[None].repeat(40, 0) // 20
        values[:3] = 255
        _labels((tmp_path / "labels" / name).with_suffix(".png"), values)
    (tmp_path / "classes.txt").write_text("road\nsky\n\ntree\n")
    return tmp_path


def _read(folder):
    return index_folder(folder / "images", folder / "labels", folder / "classes.txt")


def test_pictures_are_found_by_name_with_their_labels(folder):
    pictures = _read(folder)
    assert [picture.name for picture in pictures.pictures] == ["a", "b", "deep/c"]
    assert pictures.classes == ("road", "sky", "tree")
    pictures.check()
    image, labels = pictures.read(2)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 40, 60))
    assert (labels.dtype, labels.shape) == (torch.uint8, (40, 60))
    assert labels[3:].unique().tolist() == [0, 1, 2]
    assert (labels[:3] == 255).all()
    (folder / "names.json").write_text(json.dumps(["x", "y", "z"]))
    named = index_folder(folder / "images", folder / "labels", folder / "names.json")
    assert named.classes == ("x", "y", "z")


def test_ade20k_counts_its_classes_from_one_and_ignores_zero(tmp_path):
    for split in ("training", "validation"):
        _photo(tmp_path / "images" / split / "ADE_1.jpg", 20, 10)
        values = np.zeros((10, 20))
        values[:, 5:], values[:, 10:], values[:, 15:] = 1, 150, 255
        _labels(tmp_path / "annotations" / split / "ADE_1.png", values)
    pictures = ade20k(tmp_path, "validation")
    assert pictures.classes[:2] == ("class 1", "class 2")
    assert len(pictures.classes) == 150
    _, labels = pictures.read(0)
    assert labels[0, ::5].tolist() == [255, 0, 149, 255]
    rows = [f"{number}\t0.1\t2\t3\tname {number}, alias" for number in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert ade20k(tmp_path, "training").classes[149] == "name 150"
    _labels(tmp_path / "annotations" / "training" / "ADE_1.png", np.full((10, 20), 151))
    with pytest.raises(UserError, match=r"ADE_1.png has label 151 in row 0, column 0, .* 1 to 150"):
        ade20k(tmp_path, "training").check()


def test_palettes_and_16_bits_are_read_as_indices(folder):
    values = np.full((40, 60), 2, np.uint8)
    indexed = Image.fromarray(values)
    indexed.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    indexed.save(folder / "labels" / "a.png")
    Image.fromarray(values.astype(np.uint16)).save(folder / "labels" / "b.png")
    pictures = _read(folder)
    for index in range(2):
        assert (pictures.read(index)[1] == 2).all()


def test_a_picture_is_read_the_way_up_that_its_camera_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 60)).save(folder / "images" / "a.jpg", exif=exif)
    assert _read(folder).read(0)[0].shape == (3, 40, 60)


def _truncate(folder):
    path = folder / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def _torn_labels(folder):
    path = folder / "labels" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


MISTAKES = {
    "a truncated JPEG": (_truncate, r"a\.jpg cannot be read .*: replace it, or take"),
    "torn labels": (_torn_labels, r"labels/b\.png cannot be read .*: replace it, or take"),
    "another size": (
        lambda folder: _labels(folder / "labels" / "a.png", np.zeros((30, 60))),
        r"a\.jpg has 60 x 40 pixels and .*a\.png labels 60 x 30: make the labels for the picture",
    ),
    "no such class": (
        lambda folder: _labels(folder / "labels" / "b.png", np.full((40, 60), 3)),
        r"b\.png has label 3 in row 0, column 0, and the 3 classes are 0 to 2, with 255",
    ),
    "colours for labels": (
        lambda folder: _photo(folder / "labels" / "b.png"),
        r"b\.png is a picture of mode RGB: labels are PNG files with one channel",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_picture_that_cannot_be_trained_on_is_one_clear_message(mistake, folder):
    spoil, message = MISTAKES[mistake]
    pictures = _read(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        pictures.check()
    training = SemanticViews(pictures, SMALL)
    with pytest.raises(UserError, match=message):
        [training.view(index) for index in range(3)]


def test_a_folder_that_cannot_be_trained_on_is_one_clear_message(folder):
    (folder / "labels" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures in .* have no labels, such as .*b\.png"):
        _read(folder)
    _photo(folder / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png share one name"):
        _read(folder)
    with pytest.raises(UserError, match="nowhere is no folder: ADE20K has images/"):
        index_folder(folder / "nowhere", folder / "labels", folder / "classes.txt")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures"):
        index_folder(folder / "empty", folder / "labels", folder / "classes.txt")


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "[]", "torn["])
def test_a_list_of_classes_that_is_none_is_one_clear_message(text, folder):
    (folder / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        index_folder(folder / "images", folder / "labels", folder / "classes.json")


# Augmentation.


def test_a_sample_is_what_the_generator_makes_of_it(folder):
    training = SemanticViews(_read(folder), SMALL)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(training.view(1))
    image, labels = views[0]
    assert (image.dtype, image.shape) == (torch.float32, (3, 48, 48))
    assert 0 <= image.min() <= image.max() <= 1
    assert (labels.dtype, labels.shape) == (torch.int64, (48, 48))
    assert torch.equal(image, views[1][0])
    assert torch.equal(labels, views[1][1])
    assert not torch.equal(image, views[2][0])


def test_pictures_fit_into_the_box_whichever_way_they_lie():
    assert fitted_size((512, 683), (2048, 512)) == (512, 683)
    assert fitted_size((300, 400), (2048, 512)) == (512, 683)
    assert fitted_size((400, 300), (2048, 512)) == (683, 512)
    assert fitted_size((100, 1000), (2048, 512)) == (205, 2048)
    assert fitted_size((512, 683), (2048, 512), 0.5) == (256, 342)


def _coordinates(height, width):
    """A picture whose colour says where a pixel was, and labels that say it too, in stripes."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows * 255 // height, columns * 255 // width, 0 * rows])
    return image.to(torch.uint8), (columns * 8 // width).to(torch.uint8)


def test_labels_move_with_their_pixels(monkeypatch):
    monkeypatch.setattr("trainer.finetune.semantic_augment.distort", lambda image: image)
    image, labels = _coordinates(120, 160)
    mirrored = set()
    for seed in range(20):
        torch.manual_seed(seed)
        one, its = augment(image, labels, Augmentation(box=(400, 100), crop=64))
        assert one.shape == (3, 64, 64)
        assert its.shape == (64, 64)
        shown = its != 255
        stripes = one[1].float() / 255 * 8  # the middle of a stripe is half past its number
        assert ((stripes - its - 0.5).abs()[shown] < 0.7).all()
        padding = one[:, ~shown].unique(dim=1)
        assert padding.numel() == 0 or padding.flatten().tolist() == [124, 116, 104]
        columns = one[1, 0, shown[0]].float()
        mirrored.add(bool(columns[0] > columns[-1]))
    assert mirrored == {False, True}


def test_crops_are_not_all_of_one_class():
    image = torch.zeros(3, 64, 256, dtype=torch.uint8)
    labels = torch.zeros(64, 256, dtype=torch.uint8)
    labels[:, :64] = 1
    spec = Augmentation(box=(256, 64), ratios=(1, 1), crop=64)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        counts = torch.bincount(augment(image, labels, spec)[1].flatten(), minlength=2)
        shares.append(counts.max().item() / counts.sum().item())
    # A crop is fit with a quarter of each at least: in one place of six, of which ten are tried.
    assert sum(share < 0.75 for share in shares) > 28


def test_sizes_and_colours_vary_as_far_as_the_recipe_says():
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    image[0] = 140
    seen = []
    for seed in range(300):
        torch.manual_seed(seed)
        changed = distort(image)
        assert changed.dtype == torch.uint8
        seen.append(changed[:, 0, 0].tolist())
    assert any(pixel == [140, 100, 100] for pixel in seen)  # sometimes nothing happens
    brightness = [sum(pixel) / 340 for pixel in seen]
    assert 0.3 < min(brightness) < 0.6
    assert 1.3 < max(brightness) < 2.0
    assert len({tuple(pixel) for pixel in seen}) > 200
