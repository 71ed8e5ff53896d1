"""What is drawn is what the network computes: its attention's weights, its pixels' gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.kernels import pooled_gelu
from models.registry import build
from models.transnext import AggregatedAttention, Attention
from models.transxnet import OverlappingAttention
from tests.data.pictures import FOLDER
from trainer.explain.__main__ import main
from trainer.explain.attention import attention
from trainer.explain.fields import Field, receptive_fields

PHOTOGRAPHS = [str(FOLDER / name) for name in ("fruits.jpg", "seeding.jpg")]
SIZE = (40, 52)  # not square, and no multiple of any stride
KINDS = (AggregatedAttention, Attention, OverlappingAttention)


def network(name, size=SIZE):
    """A network in which every weight matters."""
    torch.manual_seed(2)
    model = build(name, img_size=size, num_classes=5, drop_path=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


def last_attention(model):
    """The attention of the last block of each stage."""
    last = {block.stage: block.module for block in model.blocks() if block.residual}
    return [part for block in last.values() for part in block.modules() if isinstance(part, KINDS)]


def inputs_and_outputs(model, image):
    """What goes into and comes out of these, in a plain forward pass."""
    noted = []
    handles = [
        part.register_forward_hook(lambda module, args, out: noted.append((module, args, out)))
        for part in last_attention(model)
    ]
    model.forward_features(image)
    for handle in handles:
        handle.remove()
    return noted


def mixed(module, args, seen):
    """The module's output at the query, from the weights that are shown and its values."""
    x = args[0]
    num_heads = seen.keys.shape[0]

    def values(tokens, layer):
        part = layer(tokens).chunk(3 if layer is getattr(module, "qkv", None) else 2, dim=-1)[-1]
        return part.reshape(-1, num_heads, part.shape[-1] // num_heads)

    weights = seen.keys.flatten(1)
    if isinstance(module, OverlappingAttention):
        reduced = x
        if len(module.sr) > 0:
            reduced = module.sr[1](torch.nn.functional.gelu(module.sr[0](x)))
        reduced = reduced + module.local_conv(reduced)
        return torch.einsum("hm,mhd->hd", weights, values(reduced[0], module.kv)).flatten()
    if isinstance(module, Attention):
        out = torch.einsum("hm,mhd->hd", weights, values(x[0], module.qkv))
        return module.proj(out.flatten())
    pooled = module.norm(pooled_gelu(module.sr(x), args[1].plan.pool).flatten(1, 2))[0]
    out = torch.einsum("hm,mhd->hd", weights, values(pooled, module.kv))
    for slot in range(9):
        row, column = (at + d - 1 for at, d in zip(seen.query, divmod(slot, 3), strict=True))
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            out += seen.window[:, slot, None] * values(x[0, row, column], module.kv)[0]
    return module.proj(out.flatten())


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 0.0), (1.0, 0.3)])
@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico"])
@torch.no_grad()
def test_weights_times_values_are_what_the_block_computes(name, place):
    model = network(name)
    image = torch.randn(1, 3, *SIZE)
    before = model(image)
    seen = attention(model, image, place)
    noted = inputs_and_outputs(model, image)
    assert len(seen) == len(noted) == 4
    for one, (module, args, output) in zip(seen, noted, strict=True):
        row, column = one.query
        assert one.grid == tuple(output.shape[1:3])
        torch.testing.assert_close(
            mixed(module, args, one), output[0, row, column], rtol=1e-4, atol=1e-5
        )
    assert torch.equal(model(image), before), "looking changes nothing"


def test_the_map_holds_all_of_the_attention_at_the_cells_that_get_it():
    seen = attention(network("transnext_pico"), torch.randn(1, 3, *SIZE), (1.0, 0.5))
    for one in seen:
        parts = [one.keys.flatten(1), *([] if one.window is None else [one.window])]
        total = sum(float(part.abs().sum(dim=1).mean()) for part in parts)
        assert one.density().shape == one.grid
        assert float(one.density().sum()) == pytest.approx(total, rel=1e-5)
    windowed = seen[0]
    row, column = windowed.query
    assert row == windowed.grid[0] - 1, "the place is at the lower border"
    assert torch.all(windowed.window.view(-1, 3, 3)[:, 2] == 0), "nothing lies beyond it"
    without = windowed.rows.t() @ windowed.keys.abs().mean(dim=0).double() @ windowed.columns
    gained = windowed.density() - without
    assert float(gained[row - 1 : row + 1, column - 1 : column + 2].min()) > 0
    assert int((gained.abs() > 1e-12).sum()) == 6


@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico"])
def test_a_receptive_field_is_how_much_each_pixel_moves_the_centre(name):
    model = network(name, (32, 40)).double()
    images = [torch.randn(1, 3, 32, 40, dtype=torch.float64) for _ in range(2)]
    fields = receptive_fields(model, images)
    step = 1e-6
    with torch.no_grad():
        for row, column in ((16, 20), (3, 7)):
            expected = torch.zeros(len(fields), dtype=torch.float64)
            for image in images:
                for colour in range(3):
                    moved = []
                    for sign in (1, -1):
                        pixels = image.clone()
                        pixels[0, colour, row, column] += sign * step
                        moved.append(centres(model.forward_features(pixels)))
                    expected += (moved[0] - moved[1]).abs() / (2 * step) / len(images)
            found = torch.stack([field.pixels[row, column] for field in fields])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def centres(maps):
    return torch.stack(
        [one[0, :, one.shape[2] // 2, one.shape[3] // 2].relu().sum() for one in maps]
    )


def test_the_area_of_a_field_is_that_of_the_box_which_holds_a_share_of_it():
    even = Field(pixels=torch.ones(100, 200), centre=(50, 100))
    assert even.area(0.5) == pytest.approx(0.5, abs=0.02)
    pixels = torch.zeros(100, 200)
    pixels[45:55, 90:110] = 1
    assert Field(pixels=pixels, centre=(50, 100)).area(0.99) == pytest.approx(0.01, abs=0.002)


def test_the_command_draws_photographs_at_any_size(tmp_path, capsys):
    options = ["--source", "transnext_pico", "--out", str(tmp_path), "--img-size", "40", "60"]
    assert main([*PHOTOGRAPHS, *options, "--query", "0.2", "0.9"]) == 0
    names = ["attention_fruits", "attention_seeding", "receptive_fields"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert sorted(board.Tags()["images"]) == names
    said = capsys.readouterr().out
    for name in names:
        assert f"{name}.png" in said
        with Image.open(tmp_path / f"{name}.png") as picture:
            colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
            assert picture.width > picture.height > 200
        assert len(np.unique(colours, axis=0)) > 500, "it shows something"


def test_a_model_without_attention_of_ours_gets_its_receptive_fields(tmp_path):
    arguments = [PHOTOGRAPHS[0], "--source", "timm:resnet10t", "--img-size", "64"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["receptive_fields.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg cannot be read (No such file or directory)"),
        ([__file__], "cannot be read (no image): give JPEG or PNG files"),
        ([PHOTOGRAPHS[0], PHOTOGRAPHS[0]], "two of the images have one name"),
        ([PHOTOGRAPHS[0], "--source", "transnext_pic"], "transnext_pic does not exist"),
        ([PHOTOGRAPHS[0], "--query", "2", "0"], "--query 2 0: give a row and a column as shares"),
        ([PHOTOGRAPHS[0], "--img-size", "16"], "--img-size 16: give a side, or height and width"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    source = [] if "--source" in arguments else ["--source", "transnext_pico"]
    assert main([*arguments, *source, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not Path(tmp_path / "out").exists()
