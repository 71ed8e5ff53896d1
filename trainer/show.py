"""A contact sheet of what the network will see: its inputs as pictures, with their targets."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.base import Shard

from .config import RunConfig
from .doctor import open_pipeline
from .inputs import make_mixer

_LEAST_SIDE = 112  # pixels; smaller pictures are enlarged by a whole factor
_CAPTION = 14
_GAP = 6
_SHARE = 0.06  # targets below this are left out of a caption


def draw_contact_sheet(config: RunConfig, *, count: int, epoch: int) -> tuple[Image.Image, int]:
    """Return the first `count` training images of `epoch`, augmented and mixed, with their targets.

    With them comes their number, which is smaller where the set has no more.
    They are those of any run of this configuration: the first that it shows, whatever its batch.

    Raises:
        DataError: if the data cannot be read, or there are fewer than two images.
    """
    pipeline = open_pipeline(config, batch_size=count + count % 2)
    start = replace(pipeline.start(), epoch=epoch)
    with closing(pipeline.batches(start, Shard(rank=0, world_size=1))) as stream:
        images, targets = make_mixer(config)(next(stream)[0])
    pictures = [_picture(image, config) for image in images[:count]]
    captions = [_caption(target, pipeline.source.classes) for target in targets[:count]]
    return _sheet(pictures, captions), len(pictures)


def write_contact_sheet(config: RunConfig, out: Path, *, count: int, epoch: int) -> None:
    """Write the contact sheet as a PNG file."""
    sheet, shown = draw_contact_sheet(config, count=count, epoch=epoch)
    sheet.save(out, "PNG")
    print(f"wrote {out}: {shown} images of epoch {epoch} as {config.recipe} sees them")


def _picture(image: Tensor, config: RunConfig) -> Image.Image:
    """Undo the normalisation of float32 [3, H, W]."""
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    pixels = (image.permute(1, 2, 0) * std + mean).mul(255).round().clamp(0, 255).byte()
    picture = Image.fromarray(pixels.contiguous().numpy())
    factor = -(-_LEAST_SIDE // picture.width)
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def _caption(target: Tensor, classes: tuple[str, ...]) -> str:
    """Name the classes that matter in a soft target, float32 [num_classes], and their shares."""
    shares, labels = target.topk(min(2, len(classes)))
    named = [(classes[label], float(share)) for share, label in zip(shares, labels, strict=True)]
    if len(named) == 1 or named[1][1] < _SHARE:
        return str(named[0][0])
    return " + ".join(f"{share:.2f} {name}" for name, share in named if share >= _SHARE)


def _sheet(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].width + _GAP, pictures[0].height + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_CAPTION - 4)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _GAP + index % columns * width, _GAP + index // columns * height
        sheet.paste(picture, (left, top))
        while draw.textlength(caption, font=font) > picture.width and len(caption) > 1:
            caption = caption[:-2] + "…"
        draw.text((left, top + picture.height), caption, fill="black", font=font)
    return sheet
