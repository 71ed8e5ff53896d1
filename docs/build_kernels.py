"""Builds every kernel for GPUs that need not be there, and says what it takes of them.

    python docs/build_kernels.py [--json]

A table for docs/kernels.md, or a JSON line for each build.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels.launch import Launch, noted
from models.kernels.triton_attention import attention, attention_gradients
from models.kernels.triton_conv_glu import gated_conv, gated_conv_gradients

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Of a multiprocessor: registers and warps (of 32 threads), and KiB of shared memory by target.
REGISTERS, WARPS = 65536, 64
SHARED = {80: 164, 90: 228, 100: 228}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Build:
    """One kernel for one dtype and target, and what it takes.

    `registers` of a thread; `stack` and `local` bytes of a thread, both 0 where nothing spills;
    `shared` bytes of a program; `warps` that a multiprocessor can hold at once.
    """

    kernel: str
    dtype: str
    target: str
    registers: int
    stack: int
    local: int
    shared: int
    warps: int


def launches(dtype: torch.dtype) -> list[Launch]:
    """What the operators start on the maps of TransNeXt-Base at 224 pixels."""
    gate = torch.empty(1, 56, 56, 256, dtype=dtype)
    weight, bias = gate.new_empty(256, 1, 3, 3), gate.new_empty(256)
    with noted() as started:
        gated_conv(gate, gate, weight, bias)
        gated_conv_gradients(gate, gate, gate, weight, bias)
        _attend(dtype)
    return started


def _attend(dtype: torch.dtype) -> None:
    """TransNeXt-Base's last stage at 224 and 384 pixels, TransXNet-Base's first at 224."""
    for side in (7, 12):
        tokens = side**2
        qkv = torch.empty(16, side, side, 3 * 768, dtype=dtype)
        cosine = torch.empty(32, tokens, tokens), torch.empty(32, 1, 24), torch.empty(32, tokens, 1)
        attention_gradients(*attention([qkv], *cosine), [qkv], *cosine)
    maps = [torch.empty(16, 56, 56, 38, dtype=dtype), torch.empty(16, 7, 7, 76, dtype=dtype)]
    relative = torch.empty(2, 56**2, 49), None, None
    attention_gradients(*attention(maps, *relative), maps, *relative)


def build(launch: Launch, target: int) -> Build:
    """Build what a launch starts for sm_`target`."""
    names = launch.kernel.arg_names
    signature, constants, aligned = {}, {}, {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if value is None:
            signature[name] = "constexpr"
            constants[(place,)] = None
        elif isinstance(value, Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = dict(launch.options)
    for place, name in enumerate(names):
        if name in options:
            signature[name] = "constexpr"
            constants[(place,)] = options.pop(name)
    source = ASTSource(launch.kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    taken = _resources(built.asm["cubin"])
    # Registers are handed out to a warp 256 at a time.
    by_registers = REGISTERS // (-(-taken["REG"] * 32 // 256) * 256) // built.metadata.num_warps
    shared = built.metadata.shared
    by_shared = SHARED[target] * 1024 // (shared + 1024)
    programs = min(by_registers, by_shared, WARPS // built.metadata.num_warps)
    dtype = next(value.dtype for value in launch.arguments if isinstance(value, Tensor))
    return Build(
        kernel=launch.kernel.__name__,
        dtype=str(dtype).removeprefix("torch."),
        target=f"sm_{target}",
        registers=taken["REG"],
        stack=taken["STACK"],
        local=taken["LOCAL"],
        shared=shared,
        warps=programs * built.metadata.num_warps,
    )


def builds() -> Iterator[Build]:
    """Build every kernel for every dtype and target."""
    for dtype in POINTERS:
        for launch in launches(dtype):
            for target in SHARED:
                yield build(launch, target)


def table() -> str:
    """Return the builds as a Markdown table."""
    names = list(Build.__dataclass_fields__)
    rows = [names, ["---"] * len(names), *([str(v) for v in asdict(b).values()] for b in builds())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", said)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    if parser.parse_args().json:
        for made in builds():
            print(json.dumps(asdict(made)), flush=True)
    else:
        print(table())
