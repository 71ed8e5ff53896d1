"""Pictures of segmentations: what is where, and in which colour."""

import numpy as np
import torch

from trainer.finetune.draw_masks import draw_masks, palette


def test_labels_are_on_the_left_and_predictions_on_the_right():
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    labels = torch.zeros(40, 60, dtype=torch.long)
    labels[:, 30:] = 1
    labels[:10] = 255
    predictions = torch.full((40, 60), 2)
    drawn = draw_masks(image, labels, predictions, ["road", "sky", "tree", "unseen"])
    assert drawn.dtype == np.uint8
    assert drawn.shape[1] == 2 * 60 + 6
    assert drawn.shape[0] > 40 + 14  # the names are below
    colours = palette(4).astype(int)

    def shows(pixel, label):
        return np.abs(pixel - (0.4 * 100 + 0.6 * colours[label])).max() <= 1

    assert shows(drawn[20, 5], 0)
    assert shows(drawn[20, 55], 1)
    assert shows(drawn[20, 71], 2)
    assert not drawn[5, :60].any()  # ignored
    assert not drawn[5, 66:].any()
    legend = {tuple(pixel) for pixel in drawn[40:].reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in colours[:3].tolist()} <= legend
    assert tuple(colours[3].tolist()) not in legend


def test_colours_of_150_classes_differ():
    colours = palette(150).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(150, dtype=int)
    assert apart.min() > 3
    assert np.abs(np.diff(colours, axis=0)).sum(-1).min() > 100


def test_a_picture_without_labels_is_black():
    image = torch.full((3, 20, 200), 100, dtype=torch.uint8)
    ignored = torch.full((20, 200), 255)
    drawn = draw_masks(image, ignored, torch.zeros_like(ignored), ["road"])
    assert not drawn[:20, :200].any()
