"""Distillation: the losses by their formulas, and teachers that answer as they were trained to."""

from dataclasses import replace
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.base import ModelError
from models.registry import build
from trainer.config import UserError, override
from trainer.exports.formats import export
from trainer.exports.source import fold
from trainer.pretrained import Pretrained
from trainer.recipes import recipe
from trainer.sections import DistillConfig
from trainer.task import classification, distillation
from trainer.teacher import load_teacher

CPU = torch.device("cpu")
DEMO = replace(recipe("demo").model, img_size=32, num_classes=10)


def run_config(*arguments):
    return override(recipe("demo"), ["--model.img-size", "32", *map(str, arguments)])


def loss_of(logits, advice, targets, z_loss=0.0, **settings):
    """The loss of a model and a teacher that say always the same."""
    return distillation(
        lambda images, noise: logits, torch.empty(0), targets, None,
        z_loss=z_loss, teacher=lambda images: advice, config=DistillConfig(**settings),
    )  # fmt: skip


@pytest.fixture
def numbers():
    """Logits, a teacher's logits and soft targets of 6 images and 5 classes."""
    generator = torch.Generator().manual_seed(0)
    logits, advice, targets = torch.randn(3, 6, 5, generator=generator)
    return logits, advice, targets.softmax(dim=1)


def test_a_hard_teacher_s_first_choice_is_a_label(numbers):
    logits, advice, targets = numbers
    found = loss_of(logits, advice, targets, kind="hard", weight=0.25)
    own = -(targets * logits.log_softmax(1)).sum(1).mean()
    chosen = -logits.log_softmax(1)[torch.arange(6), advice.argmax(1)].mean()
    torch.testing.assert_close(found.total, 0.75 * own + 0.25 * chosen)
    torch.testing.assert_close(found.parts["loss"], own)
    torch.testing.assert_close(found.parts["distill_loss"], chosen)


def test_a_soft_teacher_s_predictions_are_tempered(numbers):
    logits, advice, targets = numbers
    found = loss_of(logits, advice, targets, kind="soft", weight=0.9, temperature=3.0)
    student, teacher = (values.div(3).softmax(1) for values in (logits, advice))
    divergence = (teacher * (teacher / student).log()).sum(1).mean()
    torch.testing.assert_close(found.parts["distill_loss"], 9 * divergence)
    own = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found.total, 0.1 * own + 8.1 * divergence)


def test_without_weight_the_loss_is_the_classification_s(numbers):
    logits, advice, targets = numbers
    found = loss_of(logits, advice, targets, z_loss=1e-2, weight=0.0)
    alone = classification(lambda images, noise: logits, None, targets, None, z_loss=1e-2)
    torch.testing.assert_close(found.total, alone.total)


def test_a_timm_teacher_sees_its_own_colours(tmp_path):
    net = timm.create_model("test_vit", num_classes=10, img_size=32).eval()  # mean and std of 0.5
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    weights = tmp_path / "net.safetensors"
    config = run_config("--distill.teacher", "timm:test_vit", "--distill.weights", weights)
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std)
    )
    found = load_teacher(config, CPU)((pixels - mean) / std)
    assert not found.requires_grad
    cfg = net.pretrained_cfg
    assert cfg["mean"] != config.data.mean
    its_mean, its_std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(found, net((pixels - its_mean) / its_std), rtol=1e-4, atol=1e-4)


def bundle(folder, config, *, folded=False):
    """Export a fresh model as if a run had trained it; return it."""
    model = build(config.name, img_size=config.img_size, num_classes=10, drop_path=0.0).eval()
    data = recipe("demo").data
    source = Pretrained(source="a test", config=config, model=model, mean=data.mean, std=data.std)
    with mock.patch("trainer.exports.folder.run_check", return_value=None):  # its own tests do
        export(fold(source) if folded else source, folder, form="timm")
    return model


@pytest.mark.parametrize(
    ("name", "folded"),
    [("transnext_pico", False), ("transxnet_pico", True), ("timm:test_resnet", False)],
)
def test_an_exported_teacher_answers_as_it_was_trained_at_any_size(name, folded, tmp_path):
    model = bundle(tmp_path / "bundle", replace(DEMO, name=name), folded=folded)
    (tmp_path / "bundle" / "foveate_model.py").write_text("raise SystemExit('it was run')")
    config = run_config("--distill.teacher", tmp_path / "bundle", "--model.img-size", 16)
    teacher = load_teacher(config, CPU)
    for side in (16, 32):
        model.reset_buffers((side, side))
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-4)


def test_what_is_no_teacher_is_refused_by_name(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    cases = {
        ("--distill.teacher", tmp_path / "none"): "distill.teacher: ",
        (
            *("--distill.teacher", "timm:test_vit"),
            *("--distill.weights", tmp_path / "net.pt"),
        ): "give a .safetensors file",
    }
    for arguments, said in cases.items():
        with pytest.raises(UserError) as error:
            load_teacher(run_config(*arguments), CPU)
        assert said in str(error.value)
    with pytest.raises(UserError, match="without a teacher"):
        run_config("--distill.weights", "net.safetensors")


def test_a_teacher_of_other_classes_or_a_fixed_size_is_refused(tmp_path):
    bundle(tmp_path / "bundle", DEMO)
    with pytest.raises(UserError, match=r"knows 10 classes and .* is 7"):
        load_teacher(
            run_config("--distill.teacher", tmp_path / "bundle", "--model.num-classes", 7), CPU
        )
    net = timm.create_model("test_vit", num_classes=10, img_size=32)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    named = ["--distill.teacher", "timm:test_vit"]
    named += ["--distill.weights", tmp_path / "net.safetensors"]
    with pytest.raises(ModelError, match="cannot change to"):
        load_teacher(run_config(*named, "--train.progressive", "0:16,1:32"), CPU)
