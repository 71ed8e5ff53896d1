"""Tokens of several maps: where they lie, and that padding stays out of them."""

import torch
from torch import nn

from trainer.finetune.heads.dino.pyramid import ImageGroupNorm, Projection, lay_out


def test_cells_know_where_in_their_image_they_lie():
    pyramid = lay_out(torch.tensor([[8.0, 16.0], [6.0, 8.0]]), ((2, 4), (1, 2)), (4, 8))
    assert pyramid.levels().tolist() == [0] * 8 + [1] * 2
    torch.testing.assert_close(pyramid.centres[0, :5, 0] * 16, torch.tensor([2.0, 6, 10, 14, 2]))
    torch.testing.assert_close(pyramid.centres[0, :5, 1] * 8, torch.tensor([2.0, 2, 2, 2, 6]))
    torch.testing.assert_close(pyramid.centres[1, -2] * 8, torch.tensor([4.0, 4 / 6 * 8]))
    assert pyramid.inside[0].all()
    # A cell counts if the image reaches into it: 6 rows of pixels reach into 2 rows of cells.
    assert pyramid.inside[1].int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    torch.testing.assert_close(pyramid.coverage[1, 0], torch.tensor([0.5, 0.75]))


def test_the_norm_is_torchs_where_there_is_no_padding():
    torch.manual_seed(0)
    ours, theirs = ImageGroupNorm(4, 8), nn.GroupNorm(4, 8)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = 3 + 2 * torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(ours(x, torch.ones(2, 1, 5, 6)), theirs(x))


def test_an_images_tokens_do_not_depend_on_its_padding():
    torch.manual_seed(0)
    projection = Projection((6, 10), (4, 8), 32)
    size = torch.tensor([[24.0, 40.0]])
    maps = [torch.randn(1, 6, 6, 10), torch.randn(1, 10, 3, 5)]
    alone, own = projection(maps, size)
    wider = [
        nn.functional.pad(one, (0, 8 // step, 0, 4 // step), value=7.0)
        for one, step in zip(maps, (1, 2), strict=True)
    ]
    tokens, pyramid = projection(wider, size)
    assert pyramid.inside.sum() == own.inside.sum() == 60 + 15 + 6
    torch.testing.assert_close(tokens[pyramid.inside], alone[own.inside])
    torch.testing.assert_close(pyramid.centres[pyramid.inside], own.centres[own.inside])
