"""The detector as a whole: its size, its losses, its detections, what they must not depend on."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_iou

from models.registry import build
from tests.dist import run_distributed
from tests.trainer.finetune.dino_small import (
    COLOURS,
    NOTHING,
    SMALL,
    detector,
    picture,
    shaken,
)
from trainer.finetune.heads.dino.model import Dino
from trainer.finetune.heads.dino.pyramid import lay_out
from trainer.finetune.trunk import Trunk

OBJECTS = {
    "boxes": torch.tensor([[2.0, 3.0, 20.0, 30.0], [10.0, 4.0, 30.0, 22.0]]),
    "labels": torch.tensor([0, 2]),
}


@pytest.mark.parametrize(
    ("name", "num_scales", "published"),
    [
        ("transnext_tiny", 4, 47.8),
        ("transnext_tiny", 5, 48.1),
        ("transnext_small", 5, 69.6),
        ("transnext_base", 5, 110),
    ],
)
def test_a_detector_has_as_many_parameters_as_published(name, num_scales, published):
    with torch.device("meta"):
        model = Dino(Trunk(build(name)), num_classes=80, num_scales=num_scales, **COLOURS)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(published, abs=0.5 if published == 110 else 0.05)


def image(height=32, width=32, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def test_losses_are_those_of_all_layers_the_encoder_and_denoising():
    losses = detector()([image(), image(seed=1)], [OBJECTS, NOTHING])
    names = [f"{part}{kind}" for part in ("", "auxiliary_", "encoder_", "denoising_")
             for kind in ("class", "l1", "giou")]  # fmt: skip
    assert list(losses) == names
    assert all(value.shape == () and value.isfinite() for value in losses.values())


@pytest.mark.parametrize("targets", [[OBJECTS, NOTHING], [NOTHING, NOTHING]], ids=["some", "none"])
@pytest.mark.parametrize(
    ("name", "num_scales"),
    [("transnext_pico", 4), ("transnext_pico", 5), ("transxnet_pico", 4)],
)
def test_every_parameter_that_is_trained_has_a_gradient(name, num_scales, targets):
    model = detector(Trunk(build(name, img_size=32)), num_scales=num_scales)
    losses = model([image(), image(seed=1)], targets)
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


def test_training_needs_targets():
    with pytest.raises(ValueError, match="targets"):
        detector()([image()])


def test_detections_are_boxes_in_the_pixels_of_each_image():
    model = shaken(detector()).eval()
    sizes = [(40, 64), (64, 33)]
    with torch.no_grad():
        found = model([image(*size) for size in sizes])
    for (height, width), one in zip(sizes, found, strict=True):
        assert one["boxes"].shape == (60, 4)
        assert one["labels"].dtype == torch.int64
        assert set(one["labels"].tolist()) == {0, 1, 2}
        assert (one["scores"].diff() <= 0).all()
        assert one["boxes"].min() >= 0
        assert one["boxes"][:, 0::2].max() <= width
        assert one["boxes"][:, 1::2].max() <= height


def test_an_image_gets_300_detections():
    model = detector(config=replace(SMALL, queries=80), num_classes=5).eval()
    with torch.no_grad():
        (found,) = model([image()])
    assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) == 300


class LocalTrunk(nn.Module):
    """Maps whose cells see nothing but their own pixels, none of the padding beside them."""

    strides = (4, 8, 16, 32)
    channels = (8, 8, 16, 16)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(3, width, stride, stride)
            for width, stride in zip(self.channels, self.strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.Identity() for _ in self.stages)

    def forward(self, images):
        return [stage(images) for stage in self.stages]


def assert_same_detections(one, other):
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("queries", [20, 200], ids=["few queries", "more queries than tokens"])
def test_an_image_is_detected_the_same_alone_and_padded_to_a_larger_one(queries):
    config = replace(SMALL, queries=queries)
    model = shaken(detector(LocalTrunk(), config=config), scale=0.2).eval()
    small = image(50, 64)
    with torch.no_grad():
        (alone,) = model([small])
        padded, _ = model([small, image(120, 90, seed=1)])
    assert len(alone["scores"]) >= 60
    assert_same_detections(alone, padded)


def test_an_image_is_detected_the_same_whatever_its_neighbour_shows():
    model = shaken(detector()).eval()
    with torch.no_grad():
        one, _ = model([image(50, 40), image(64, 64, seed=1)])
        other, _ = model([image(50, 40), image(64, 64, seed=2)])
    assert_same_detections(one, other)


def test_losses_and_boxes_are_float32_under_autocast():
    model = shaken(detector())
    images, targets = [image(), image(seed=1)], [OBJECTS, NOTHING]
    totals = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model(images, targets)
        assert all(value.dtype == torch.float32 for value in losses.values())
        totals.append(sum(losses.values()))
    totals[0].backward()
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=0.1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.eval()(images)[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_boxes_keep_their_digits_under_autocast():
    decoder = detector().decoder  # its box heads move nothing yet
    pyramid = lay_out(
        torch.tensor([[32.0, 32.0]]), ((8, 8), (4, 4), (2, 2), (1, 1)), (4, 8, 16, 32)
    )
    anchors = torch.randn(1, 20, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, boxes = decoder(
            torch.randn(1, 20, SMALL.width),
            anchors,
            torch.ones(1, 20, 20, dtype=torch.bool),
            torch.randn(1, 85, SMALL.width),
            pyramid,
        )
    torch.testing.assert_close(boxes[-1], anchors.sigmoid())


def matched(losses):
    """The sum of the losses without a random part."""
    return sum(value for name, value in losses.items() if not name.startswith("denoising"))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _two_steps(rank, world_size):
    model = detector()
    parallel = DistributedDataParallel(model)  # which by itself waits for every parameter
    matched(parallel([image(seed=rank)], [[OBJECTS, NOTHING][rank]])).backward()
    first = gradients(model)
    model.zero_grad()
    sum(parallel([image(seed=rank)], [NOTHING]).values()).backward()
    return first


def test_processes_compute_the_gradient_of_their_joint_batch():
    model = detector()
    matched(model([image(seed=0), image(seed=1)], [OBJECTS, NOTHING])).backward()
    expected = gradients(model)
    for found in run_distributed(_two_steps, 2, timeout=300):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_small_detector_learns_to_find_the_squares_in_four_pictures():
    torch.set_num_threads(1)
    images, targets = zip(*(picture(seed) for seed in range(4)), strict=True)
    model = detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.2)
    totals = []
    for _ in range(150):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        totals.append(loss.item())
    assert sum(totals[-10:]) < 0.4 * sum(totals[:10])
    with torch.no_grad():
        detections = model.eval()(images)
    for target, found in zip(targets, detections, strict=True):
        best = slice(len(target["boxes"]))
        overlap = box_iou(target["boxes"], found["boxes"][best])
        overlap *= target["labels"][:, None] == found["labels"][best]
        assert overlap.amax(1).min() > 0.75  # each square is found, by the surest detections
        assert found["scores"][best].min() > 0.35
