"""Predictions for whole pictures: windows, scales and mirrored views."""

import pytest
import torch
from torch import nn

from tests.trainer.finetune.drawings import small
from trainer.finetune.semantic_inference import MULTI_SCALE, Inference, predict


class Bright(nn.Module):
    """Stands for a head that knows each pixel by itself: its scores are the three colours."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        return images * 4

    def probabilities(self, scores):
        return scores.softmax(1)


def _picture(height, width):
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth[0] * 255).to(torch.uint8)


def _expected(picture):
    return (picture.float() / 255 * 4).softmax(0)


def test_a_picture_is_scaled_into_the_box_and_its_scores_back():
    head = Bright()
    picture = _picture(60, 80)
    shares = predict(head, picture, Inference(box=(2048, 120)))
    assert head.sizes == [(120, 160)]
    assert shares.shape == (3, 60, 80)
    assert torch.allclose(shares, _expected(picture), atol=0.02)
    assert torch.allclose(shares.sum(0), torch.ones(60, 80))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 100), (130, 64), (30, 50)])
def test_windows_cover_every_pixel_and_end_at_the_edge(height, width):
    head = Bright()
    picture = _picture(height, width)
    how = Inference(box=(200, min(height, width)), window=64, stride=43)
    shares = predict(head, picture, how)
    assert torch.allclose(shares, _expected(picture), atol=1e-5)
    assert set(head.sizes) == {(min(height, 64), min(width, 64))}
    count = {64: 1, 100: 2, 130: 3, 30: 1, 50: 1}  # one every 43 pixels until the edge is seen
    assert len(head.sizes) == count[height] * count[width]


def test_windows_average_scores_where_they_overlap():
    class Places(Bright):
        """Scores that tell the windows apart: the number of the call."""

        def forward(self, images):
            super().forward(images)
            return torch.full_like(images, float(len(self.sizes)))

        def probabilities(self, scores):
            return scores

    shares = predict(Places(), _picture(64, 100), Inference(box=(200, 64), window=64, stride=43))
    assert (shares[:, :, :36] == 1).all()
    assert (shares[:, :, 36:64] == 1.5).all()
    assert (shares[:, :, 64:] == 2).all()


def test_scales_and_mirrored_views_are_averaged():
    head = Bright()
    picture = _picture(64, 80)
    how = Inference(box=(256, 64), scales=MULTI_SCALE, flip=True)
    shares = predict(head, picture, how)
    sides = [round(64 * scale) for scale in MULTI_SCALE]
    assert [size[0] for size in head.sizes] == [side for side in sides for _ in range(2)]
    assert torch.allclose(shares, _expected(picture), atol=0.05)

    class Sided(Bright):
        """Says class 0 on the left and class 1 on the right of whatever it sees."""

        def forward(self, images):
            scores = torch.zeros_like(images)
            half = images.shape[3] // 2
            scores[:, 0, :, :half] = 9
            scores[:, 1, :, half:] = 9
            return scores

    shares = predict(Sided(), picture, Inference(box=(256, 64), flip=True))
    assert torch.allclose(shares[0], shares[1], atol=1e-5)


@pytest.mark.parametrize("head", ["semantic_fpn", "mask2former"])
def test_windows_of_the_whole_picture_are_the_whole_picture(head):
    model = small(head).eval()
    picture = _picture(64, 64)
    whole = predict(model, picture, Inference(box=(64, 64)))
    assert whole.shape == (3, 64, 64)
    windows = predict(model, picture, Inference(box=(64, 64), window=64, stride=43))
    assert torch.allclose(whole, windows, atol=1e-6)
