"""Mask2Former against transformers' own assembly of it; its losses against plain loops."""

import itertools

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

from models.registry import build
from tests.trainer.finetune.drawings import MEAN, SMALL, STD, drawn, parameter_count, small
from trainer.finetune.heads.assignment import assign
from trainer.finetune.heads.mask2former import Mask2Former
from trainer.finetune.heads.mask2former_loss import (
    Prediction,
    mask2former_losses,
    mask_losses,
    pair_costs,
    sample,
    uncertain_points,
)
from trainer.finetune.trunk import Trunk


def test_transnext_tiny_has_the_published_size():
    with torch.device("meta"):
        trunk = Trunk(build("transnext_tiny", img_size=512, pretrain_size=224))
        model = Mask2Former(trunk, num_classes=150, mean=MEAN, std=STD)
    assert parameter_count(model) == pytest.approx(47.5e6, rel=0.01)


class _Maps(torch.nn.Module):
    """A backbone as transformers' model calls it, which returns given maps."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        return type("Output", (), {"feature_maps": self.maps})


def test_predictions_are_those_of_transformers():
    images, _ = drawn(2)
    model = small("mask2former").eval()
    maps = model.trunk((images - model.mean) / model.std)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=SMALL.width,
        mask_feature_size=SMALL.width,
        hidden_dim=SMALL.width,
        encoder_layers=SMALL.pixel_layers,
        encoder_feedforward_dim=SMALL.pixel_feedforward,
        decoder_layers=SMALL.query_layers + 1,
        dim_feedforward=SMALL.query_feedforward,
        num_queries=SMALL.num_queries,
    )
    theirs = Mask2FormerModel(config).eval()
    theirs.pixel_level_module.encoder = _Maps(maps)
    theirs.pixel_level_module.decoder = model.decoders.pixels
    theirs.transformer_module.load_state_dict(model.decoders.queries.state_dict())
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True)
        predictions = model.decoders(maps)
    queries = expected.transformer_decoder_intermediate_states
    assert len(predictions) == len(queries) == SMALL.query_layers + 1
    for own, masks, query in zip(predictions, expected.masks_queries_logits, queries, strict=True):
        assert torch.allclose(own.masks, masks, atol=1e-5)
        assert torch.allclose(own.classes, model.decoders.classes(query.transpose(0, 1)), atol=1e-5)


def test_scores_add_up_what_queries_say():
    images, _ = drawn(1)
    model = small("mask2former").eval()
    with torch.no_grad():
        last = model.decoders(model.trunk((images - model.mean) / model.std))[-1]
        scores = model(images)
        masks = torch.nn.functional.interpolate(last.masks, size=(64, 64), mode="bilinear")
        expected = torch.zeros(3, 64, 64)
        for query in range(SMALL.num_queries):
            shares = last.classes[0, query].softmax(0)
            for label in range(3):
                expected[label] += shares[label] * masks[0, query].sigmoid()
    assert torch.allclose(scores[0], expected, atol=1e-5)


def test_heads_begin_by_looking_around_each_point():
    attention = small("mask2former").decoders.pixels.encoder.layers[0].self_attn
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    offsets = attention.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    assert torch.allclose(offsets.abs().amax(-1), torch.arange(1.0, 5.0).expand(8, 3, 4))
    assert torch.allclose(offsets[:, 0].sum(0), torch.zeros(4, 2), atol=1e-5)
    assert len({tuple(pair) for pair in offsets[:, 0, 0].round().tolist()}) == 8


# The assignment.


@pytest.mark.parametrize("whole", [False, True])  # whole numbers: with ties
def test_the_assignment_is_the_cheapest_of_all(whole):
    generator = np.random.default_rng(0)
    for _ in range(150):
        rows = int(generator.integers(0, 5))
        columns = int(generator.integers(max(rows, 1), 7))
        shape = (rows, columns)
        costs = generator.normal(size=shape) * 10.0 ** generator.integers(-3, 4)
        if whole:
            costs = generator.integers(-2, 3, size=shape).astype(float)
        chosen = assign(costs)
        assert len(set(chosen.tolist())) == rows
        best = min(
            sum(costs[row, column] for row, column in enumerate(columns_))
            for columns_ in itertools.permutations(range(columns), rows)
        )
        assert costs[np.arange(rows), chosen].sum() == pytest.approx(best, abs=1e-9)


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="3 rows cannot have a column each of 2"):
        assign(np.zeros((3, 2)))


# The losses.


def _by_hand(logits, truth):
    """Mean cross-entropy and dice loss of one mask, in float64."""
    shares = 1 / (1 + np.exp(-logits.double().numpy()))
    truth = truth.double().numpy()
    cross_entropy = -(truth * np.log(shares) + (1 - truth) * np.log(1 - shares)).mean()
    return cross_entropy, 1 - (2 * (shares * truth).sum() + 1) / (shares.sum() + truth.sum() + 1)


def test_costs_and_losses_of_masks_are_those_of_plain_loops():
    logits = 3 * torch.randn(4, 50)
    truth = torch.rand(3, 50).round()
    cross_entropy, dice = pair_costs(logits, truth)
    for query in range(4):
        for target in range(3):
            expected = _by_hand(logits[query], truth[target])
            assert cross_entropy[query, target].item() == pytest.approx(expected[0], rel=1e-5)
            assert dice[query, target].item() == pytest.approx(expected[1], rel=1e-5)
    sums = mask_losses(logits[:3], truth)
    expected = np.sum([_by_hand(*pair) for pair in zip(logits[:3], truth, strict=True)], axis=0)
    assert [loss.item() for loss in sums] == pytest.approx(expected.tolist(), rel=1e-5)


def test_maps_are_sampled_between_the_centres_of_pixels():
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None]
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]])
    assert sample(values, points)[0, 0].tolist() == pytest.approx([0.0, 1.0, 1.5, 2.0])


def test_most_points_of_the_loss_lie_where_masks_are_uncertain():
    masks = torch.linspace(-8, 8, 64)[None, None, None].expand(2, 1, 64, 64).contiguous()
    points = uncertain_points(masks, 1000)
    assert points.shape == (2, 1000, 2)
    near = (points[..., 0] - 0.5).abs() < 0.15
    assert near[:, :750].float().mean() > 0.9  # of three times as many candidates, the nearest
    assert near[:, 750:].float().mean() == pytest.approx(0.3, abs=0.08)


def _perfect(labels, num_classes, num_queries, strength):
    """A prediction that is right about each class of the labels, in some order of queries."""
    masks = torch.full((len(labels), num_queries, *labels.shape[1:]), -strength)
    classes = torch.zeros(len(labels), num_queries, num_classes + 1)
    classes[..., -1] = strength
    for index, image in enumerate(labels):
        for place, label in enumerate(image.unique()[image.unique() != 255].tolist()):
            query = num_queries - 1 - place
            masks[index, query][image == label] = strength
            classes[index, query] = strength * torch.eye(num_classes + 1)[label]
    return Prediction(classes, masks)


def test_right_answers_cost_little_and_wrong_ones_much():
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 8:20, 4:30] = 2
    labels[1, :, :6] = 255
    right = _perfect(labels, 3, 6, strength=20.0)
    losses = mask2former_losses([right, right], labels, num_points=2000)
    assert losses["class"] < 1e-5
    total = sum(losses[name].item() for name in ("class", "mask", "dice"))
    assert losses["auxiliary"].item() == pytest.approx(total, rel=0.3)  # it has points of its own
    wrong = Prediction(right.classes.roll(1, dims=2), -right.masks)
    worse = mask2former_losses([right, wrong], labels, num_points=2000)
    for name in ("class", "mask", "dice"):  # right masks have a price at their edges
        assert worse[name] > 3 + 3 * losses[name], name


def test_more_classes_than_queries_are_matched_as_far_as_queries_go():
    labels = torch.arange(6).repeat_interleave(4).repeat(24, 1)[None]
    prediction = _perfect(labels[:, :, :8], 6, 2, strength=1.0)
    prediction = Prediction(prediction.classes, torch.randn(1, 2, 24, 24))
    losses = mask2former_losses([prediction, prediction], labels, num_points=100)
    assert all(loss.isfinite() for loss in losses.values())


def test_predictions_that_are_not_finite_end_in_a_loss_that_says_so():
    _, labels = drawn(1)
    prediction = Prediction(torch.full((1, 4, 4), float("nan")), torch.zeros(1, 4, 16, 16))
    losses = mask2former_losses([prediction, prediction], labels, num_points=50)
    assert losses["class"].isnan()
