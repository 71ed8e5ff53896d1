"""Official checkpoint files: containers, prefixes, and errors that name what does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from models import build
from models.base import ModelError
from models.convert import load_weights, read_weights


@pytest.fixture
def weights():
    return build("transnext_pico", img_size=32, num_classes=4).state_dict()


def fresh():
    torch.manual_seed(7)
    return build("transnext_pico", img_size=32, num_classes=4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {"state_dict": {k: v * 0 for k, v in w.items()}, "state_dict_ema": w},
    ],
)
def test_unwraps(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "file.pth")
    model = fresh()
    load_weights(model, tmp_path / "file.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "file.safetensors")
    read = read_weights(tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_errors_name_what_does_not_fit(tmp_path, weights):
    weights["head.extra"] = weights.pop("norm4.weight")
    weights["head.bias"] = torch.zeros(9)
    torch.save({"model": weights}, tmp_path / "file.pth")
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "file.pth")
    for part in ("missing: norm4.weight", "unknown: head.extra", r"head.bias (9,) instead of (4,)"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Arbitrary:
    pass


@pytest.mark.parametrize("content", [{"lr": 0.1}, [1, 2], {"model": Arbitrary()}])
def test_unreadable_files(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ModelError, match=r"file\.pth"):
        read_weights(tmp_path / "file.pth")
    with pytest.raises(ModelError, match=r"absent\.pth"):
        read_weights(tmp_path / "absent.pth")
