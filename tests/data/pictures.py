"""Pictures for the tests of the data plane."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.base import Sample


def photograph(width=500, height=375):
    """Smooth shading, edges and texture with the 1/f spectrum of natural images."""
    generator = np.random.default_rng(7)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    spectrum = np.fft.fft2(generator.normal(size=(3, height, width)))
    pixels = np.fft.ifft2(spectrum / np.maximum(frequency, 1 / width) ** 1.2).real
    pixels = 128 + 60 * pixels / pixels.std()
    pixels[:, height // 3 : height // 2, width // 4 : width // 2] += 70
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


FOLDER = Path(__file__).parent / "photos"
PHOTOGRAPHS = ("drawn", "seeding.jpg", "fruits.jpg")  # made up, and real ones


def named_photograph(name, width=240, height=160):
    """One of PHOTOGRAPHS."""
    if name == "drawn":
        return photograph(width, height)
    return Image.open(FOLDER / name).convert("RGB").resize((width, height))


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def as_samples(images, regions=None):
    regions = regions or [None] * len(images)
    pairs = enumerate(zip(images, regions, strict=True))
    return [Sample(id=id, image=image, label=0, regions=index) for id, (image, index) in pairs]
