"""Graphs that run without the model's code: torch.export's programs and ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ..pretrained import Pretrained
from .sample import Outputs, output_names, sample_images

MAX_BATCH = 2**16


def write_program(source: Pretrained, out: Path) -> None:
    """Write model.pt2, a program for batches of any size."""
    program = _traced(source, any_size=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # which line of ours it comes from
    torch.export.save(program, out / "model.pt2")


def write_onnx(source: Pretrained, out: Path) -> None:
    """Write model.onnx for batches of any size and, where positions allow it, images of any size.

    Weights beyond the 2 GB that the format takes are in a file beside it.
    """
    any_size = _takes_any_size(source)
    program = _traced(source, any_size=any_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        # Runtimes optimise graphs when they load them, and faster.
        graph = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=output_names(source.model),
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},)
            if any_size
            else ({0: "batch"},),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert graph is not None
    for node in graph.model.graph:
        node.metadata_props.clear()  # which line of ours it comes from, several times its size
    num_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in program.state_dict.values()
    )
    graph.save(out / "model.onnx", external_data=num_bytes > 2**30)


def _takes_any_size(source: Pretrained) -> bool:
    """Whether the sizes of images can be left open: pooling to fixed grids depends on them."""
    is_transnext = source.config.name.startswith("transnext")
    return is_transnext and source.config.fixed_pool_size is None


def _traced(source: Pretrained, *, any_size: bool) -> ExportedProgram:
    """Record what the model computes, `Outputs`, for any number of images."""
    height, width = source.model.size
    dims: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if any_size:  # sides that differ, so that neither is taken for the other
        height, width = height + 8, width + 16
        dims |= {2: Dim.AUTO, 3: Dim.AUTO}
    images = sample_images((height, width))[[0, 1, 0]]
    with torch.no_grad():
        return torch.export.export(Outputs(source.model), (images,), dynamic_shapes=(dims,))
