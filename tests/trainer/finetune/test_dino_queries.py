"""Where queries begin, and how their boxes are refined."""

import torch

from tests.trainer.finetune.dino_small import SMALL, shaken
from trainer.finetune.heads.dino.decoder import Decoder
from trainer.finetune.heads.dino.pyramid import lay_out
from trainer.finetune.heads.dino.selection import QuerySelection

SHAPES = ((8, 8), (4, 4))


def pyramid_of(*sizes):
    return lay_out(torch.tensor(sizes), SHAPES, (8, 16))


def selected(sizes=((64.0, 64.0), (48.0, 64.0))):
    torch.manual_seed(0)
    selection = shaken(QuerySelection(SMALL, num_classes=3))
    tokens = torch.randn(len(sizes), 80, SMALL.width, requires_grad=True)
    return selection, tokens, selection(tokens, pyramid_of(*sizes))


def test_contents_are_learned_and_positions_are_the_encoders():
    selection, tokens, found = selected()
    assert torch.equal(found.content[0], selection.content.weight)
    assert torch.equal(found.content[0], found.content[1])
    assert not torch.equal(found.anchors[0], found.anchors[1])
    assert not found.anchors.requires_grad
    torch.testing.assert_close(found.anchors, found.box_logits)
    (grad,) = torch.autograd.grad(found.box_logits.sum(), tokens)
    assert grad.abs().sum() > 0  # the encoder learns from its own predictions


def test_the_tokens_with_the_surest_class_are_taken():
    selection, tokens, found = selected()
    pyramid = pyramid_of((64.0, 64.0), (48.0, 64.0))
    best = selection.class_head(selection.transform(tokens)).amax(-1)
    best = best.masked_fill(~pyramid.inside, -torch.inf)
    expected = best.sort(descending=True).values[:, : SMALL.queries]
    torch.testing.assert_close(found.logits.amax(-1), expected)
    assert found.real.all()


def test_proposals_are_squares_around_tokens_that_grow_with_the_stride():
    torch.manual_seed(0)
    selection = QuerySelection(SMALL, num_classes=3)  # its box head moves nothing yet
    pyramid = pyramid_of((64.0, 64.0))
    boxes = selection(torch.randn(1, 80, SMALL.width), pyramid).anchors[0].sigmoid()
    for box in boxes:
        centre, side = box[:2], box[2]
        assert side.isclose(torch.tensor(0.05)) or side.isclose(torch.tensor(0.1))
        nearest = (pyramid.centres[0] - centre).abs().sum(1).argmin()
        torch.testing.assert_close(pyramid.centres[0, nearest], centre)
        assert (nearest >= 64) == (side > 0.07)


def test_an_image_with_few_tokens_has_few_real_queries():
    _, _, found = selected(((64.0, 64.0), (16.0, 16.0)))
    assert found.real[0].all()
    assert found.real[1].sum() == 2 * 2 + 1


def decoded(layers_watched):
    torch.manual_seed(0)
    config = SMALL.__class__(**{**SMALL.__dict__, "decoder_layers": 3})
    decoder = shaken(Decoder(config, levels=2, num_classes=3))
    count = 6
    logits, boxes = decoder(
        torch.randn(1, count, config.width),
        torch.randn(1, count, 4),
        torch.ones(1, count, count, dtype=torch.bool),
        torch.randn(1, 80, config.width),
        pyramid_of((64.0, 64.0)),
    )
    assert logits.shape == (3, 1, count, 3)
    return decoder, boxes[layers_watched]


def test_a_layer_teaches_its_own_shift_and_the_one_before_it():
    for layer in range(3):
        decoder, boxes = decoded(layer)
        boxes.sum().backward()
        for index, head in enumerate(decoder.box_heads):
            grad = head[-1].bias.grad
            # Not the shift two layers before: boxes pass to what follows without a gradient.
            taught = grad is not None and bool(grad.abs().sum() > 0)
            assert taught == (index in (layer, layer - 1)), (layer, index)


def test_boxes_go_on_from_layer_to_layer():
    decoder, first = decoded(0)
    with torch.no_grad():
        for head in decoder.box_heads:
            head[-1].weight.zero_()
            head[-1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        anchors = torch.randn(1, 6, 4)
        _, boxes = decoder(
            torch.randn(1, 6, SMALL.width),
            anchors,
            torch.ones(1, 6, 6, dtype=torch.bool),
            torch.randn(1, 80, SMALL.width),
            pyramid_of((64.0, 64.0)),
        )
    assert first.shape == anchors.shape
    for layer in range(3):
        shift = (layer + 1) * torch.tensor([0.1, 0.2, 0.3, 0.4])
        torch.testing.assert_close(boxes[layer], (anchors + shift).sigmoid())
