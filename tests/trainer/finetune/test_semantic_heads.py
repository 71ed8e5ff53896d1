"""What all semantic heads have in common: losses, scores, gradients, precision, randomness."""

import pytest
import torch

from tests.trainer.finetune.drawings import CLASSES, HEADS, drawn, small
from trainer.finetune.heads.semantic import pixel_loss

LOSSES = {
    "upernet": {"segmentation", "auxiliary"},
    "mask2former": {"class", "mask", "dice", "auxiliary"},
    "semantic_fpn": {"segmentation"},
}


@pytest.mark.parametrize("trunk", ["transnext_pico", "transxnet_pico"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ignored", ["a row", "everything"])
def test_every_trained_parameter_has_a_gradient(head, trunk, ignored):
    model = small(head, trunk).train()
    images, labels = drawn(2)
    if ignored == "everything":
        labels.fill_(255)
    losses = model(images, labels)
    assert set(losses) == LOSSES[head]
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", HEADS)
def test_scores_fit_images_of_any_size(head):
    model = small(head).eval()
    for height, width in ((64, 64), (40, 57)):
        with torch.no_grad():
            scores = model(torch.rand(2, 3, height, width))
        assert scores.shape == (2, len(CLASSES), height, width)
        assert scores.dtype == torch.float32
        shares = model.probabilities(scores)
        assert shares.min() >= 0
        if head != "mask2former":
            assert torch.allclose(shares.sum(1), torch.ones(2, height, width))


@pytest.mark.parametrize("head", HEADS)
def test_losses_and_scores_are_float32_under_autocast(head):
    model = small(head).train()
    images, labels = drawn(2)
    torch.manual_seed(3)
    exact = model(images, labels)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, labels)
        with torch.no_grad():
            assert model.eval()(images).dtype == torch.float32
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name


@pytest.mark.parametrize("head", HEADS)
def test_the_seed_alone_decides_a_step(head):
    images, labels = drawn(2)
    model = small(head).train()
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        answers.append({name: loss.item() for name, loss in model(images, labels).items()})
    assert answers[0] == answers[1]


@pytest.mark.parametrize("head", HEADS)
def test_images_are_normalised_by_the_colours_of_the_trunk(head):
    model = small(head).eval()
    images, _ = drawn(1)
    with torch.no_grad():
        expected = model(images)
        model.mean.zero_()
        before, _ = model.std.clone(), model.std.fill_(1.0)
        plain = model((images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / before)
    assert torch.allclose(expected, plain, atol=1e-5)


def test_ignored_pixels_weigh_nothing_but_count():
    scores = torch.randn(1, 3, 4, 4)
    labels = torch.randint(0, 3, (1, 4, 4))
    labels[0, :2] = 255
    alone = torch.nn.functional.cross_entropy(scores, labels, ignore_index=255)
    assert torch.allclose(pixel_loss(scores, labels), alone / 2)
