"""Vision backbones: `build(name, ...)` makes any of `registry.MODELS`."""

from .registry import build as build
