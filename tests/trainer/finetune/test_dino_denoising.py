"""Contrastive denoising: how far copies are moved, what they are told, whom they see."""

import itertools

import pytest
import torch

from tests.trainer.finetune.dino_small import SMALL, detector, shaken
from trainer.finetune.heads.dino.boxes import to_corners
from trainer.finetune.heads.dino.decoder import Decoder
from trainer.finetune.heads.dino.denoising import denoise, visibility
from trainer.finetune.heads.dino.pyramid import lay_out
from trainer.finetune.heads.dino.truth import Truth


def truth(counts=(3, 1), num_classes=10):
    """Objects in the middle of their images: no copy is cut off at the border."""
    torch.manual_seed(0)
    most = max(counts)
    boxes = torch.cat([0.4 + 0.2 * torch.rand(len(counts), most, 2),
                       0.05 + 0.1 * torch.rand(len(counts), most, 2)], -1)  # fmt: skip
    return Truth(torch.randint(num_classes, (len(counts), most)), boxes, tuple(counts))


def by_group(noisy, values):
    """Values [B, D, ...] as [B, groups, (positive, negative), M, ...]."""
    return values.unflatten(1, (noisy.groups, 2, -1))


def test_groups_fill_up_the_number_of_queries():
    for most, groups in ((1, 100), (3, 33), (60, 1), (150, 1)):
        noisy = denoise(truth((most, 1)), num_classes=10, queries=100)
        assert noisy.groups == groups
        assert noisy.anchors.shape == (2, groups * 2 * most, 4)


def test_positives_move_less_than_half_a_side_and_negatives_more():
    known = truth((3, 3))
    noisy = denoise(known, num_classes=10, queries=900)
    corners = by_group(noisy, to_corners(noisy.anchors.sigmoid()))
    moved = corners - to_corners(known.boxes)[:, None, None]
    half_sides = known.boxes[:, None, None, :, 2:].repeat(1, 1, 1, 1, 2) / 2
    # [2 images, groups, (positive, negative), 3 boxes, (left, top, right, bottom)]
    shift = moved / half_sides
    positive, negative = shift[:, :, 0].reshape(-1, 4), shift[:, :, 1].reshape(-1, 2, 2)
    assert positive.abs().max() < 1 + 1e-3
    assert positive.abs().max() > 0.98
    assert positive.abs().min() < 0.02
    assert positive.mean(0).abs().max() < 0.05  # in all directions
    # A negative whose opposite corners both moved inwards has no side left.
    low, high = negative[:, 0].flatten(), negative[:, 1].flatten()
    inwards = high - low < -1.9
    assert inwards.float().mean() == pytest.approx(0.25, abs=0.05)
    low, high = low[~inwards].abs(), high[~inwards].abs()
    for side in (low, high):
        assert side.min() > 1 - 1e-3
        assert 1.98 < side.max() < 2 + 1e-3


def test_positives_are_to_find_their_object_and_negatives_nothing():
    known = truth()
    noisy = denoise(known, num_classes=10, queries=12)
    labels, boxes = by_group(noisy, noisy.goals.labels), by_group(noisy, noisy.goals.boxes)
    real = by_group(noisy, noisy.real)
    for group in range(noisy.groups):
        assert torch.equal(labels[0, group, 0], known.labels[0])
        assert torch.equal(labels[1, group, 0, :1], known.labels[1, :1])
        assert torch.equal(boxes[:, group, 0], known.boxes)
    assert (labels[:, :, 1] == 10).all()
    assert (labels[1, :, 0, 1:] == 10).all()
    assert real[0].all()
    assert real[1].flatten(0, 1).int().tolist() == [[1, 0, 0]] * 2 * noisy.groups


def test_a_quarter_of_the_queries_is_told_a_random_class():
    known = truth((1,), num_classes=1000)
    noisy = denoise(known, num_classes=1000, queries=4000)
    assert (noisy.labels != known.labels).float().mean() == pytest.approx(0.25, abs=0.03)


def test_noise_comes_from_torchs_generator_alone():
    known = truth()
    torch.manual_seed(5)
    first = denoise(known, num_classes=10, queries=12)
    torch.manual_seed(5)
    again, other = (denoise(known, num_classes=10, queries=12) for _ in range(2))
    assert torch.equal(first.anchors, again.anchors)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.anchors, other.anchors)


def test_images_without_objects_have_no_denoising_queries():
    empty = Truth(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 4), (0, 0))
    assert denoise(empty, num_classes=3, queries=10).anchors.shape == (2, 0, 4)


def test_a_query_sees_its_group_and_the_matched_ones_and_no_other():
    denoising = torch.tensor([[True] * 4, [True, False] * 2])
    matched = torch.tensor([[True, True, True], [True, True, False]])
    visible = visibility(denoising, matched, groups=2)
    assert visible[0].int().tolist() == [
        [1, 1, 0, 0, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        *[[0, 0, 0, 0, 1, 1, 1]] * 3,
    ]
    # What is not real is seen by itself alone.
    assert visible[1].int().tolist() == [
        [1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]


def test_nothing_leaks_from_a_group_to_others_or_to_matched_queries():
    torch.manual_seed(0)
    decoder = shaken(Decoder(SMALL, levels=2, num_classes=3).eval())
    pyramid = lay_out(torch.tensor([[32.0, 32.0]]), ((4, 4), (2, 2)), (8, 16))
    queries, anchors = torch.randn(1, 12, SMALL.width), torch.randn(1, 12, 4)
    tokens = torch.randn(1, 20, SMALL.width)
    real = torch.ones(1, 12, dtype=torch.bool)
    visible = visibility(real[:, :8], real[:, 8:], groups=2)
    parts = {"first": slice(0, 4), "second": slice(4, 8), "matched": slice(8, 12)}
    before = decoder(queries, anchors, visible, tokens, pyramid)
    for changed, watched in itertools.product(parts, parts):
        other = queries.clone()
        other[:, parts[changed]] += torch.randn(4, SMALL.width)
        after = decoder(other, anchors, visible, tokens, pyramid)
        same = all(
            torch.allclose(one[:, :, parts[watched]], two[:, :, parts[watched]], atol=1e-6)
            for one, two in zip(before, after, strict=True)
        )
        assert same == (watched != changed and changed != "matched"), (changed, watched)


def test_the_class_that_a_query_is_told_is_learned():
    model = detector()
    image = torch.rand(3, 32, 32)
    target = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
    losses = model([image], [target])
    sum(value for name, value in losses.items() if "denoising" in name).backward()
    assert model.class_embedding.weight.grad[1].abs().sum() > 0
    assert model.selection.content.weight.grad is not None
