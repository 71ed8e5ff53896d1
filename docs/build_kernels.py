"""Builds every kernel for GPUs that need not be there, and writes what it takes of them.

    python docs/build_kernels.py [--check]

Writes docs/kernel_builds.md, in ten minutes of a CPU. With --check, says whether that page is of
the kernels as they are: it names their sources' digest, and one build of each is made again.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import models.kernels
from models.kernels.launch import Launch, noted
from models.kernels.triton_aggregated import aggregate, aggregate_gradients
from models.kernels.triton_attention import attention, attention_gradients
from models.kernels.triton_conv_glu import gated_conv, gated_conv_gradients
from models.kernels.triton_dynamic_conv import convolve_each, convolve_each_gradients
from models.kernels.triton_norm_conv import activated_gradient, mixed_conv, mixed_conv_gradients

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Of a multiprocessor: registers and warps (of 32 threads), and KiB of shared memory by target.
REGISTERS, WARPS = 65536, 64
SHARED = {80: 164, 90: 228, 100: 228}
KERNELS = Path(models.kernels.__file__).parent
PAGE = Path(__file__).with_name("kernel_builds.md")
TEXT = """# What the kernels' builds take

Made by `python docs/build_kernels.py` with Triton {version} of the kernels with the digest
`{digest}`. Registers, stack and local memory are a thread's, the latter two 0 where nothing
spills; shared memory, in bytes, is a program's; warps are what a multiprocessor can hold of the
kernel at once, out of 64. A kernel appears once for each shape of a map that it is built for: those
of attention for TransNeXt-Base's last stage at 224 and 384 pixels, TransXNet-Base's first and
TransXNet-Small's second at 224, in this order, and then, with those of aggregated attention, for
TransNeXt-Base's first stage at 224 and 384.

"""
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
    """What the operators start on the maps of TransNeXt-Base and TransXNet-Base at 224 pixels."""
    gate = torch.empty(1, 56, 56, 512, dtype=dtype)
    weight, bias = gate.new_empty(512, 1, 3, 3), gate.new_empty(512)
    near = gate.new_empty(1, 14, 14, 336).chunk(2, dim=-1)[0]
    kernels, biases = gate.new_empty(1, 7, 7, 168), gate.new_empty(1, 168)
    hidden, ends = gate.new_empty(1, 14, 14, 1344), (336, 672, 1008)
    line, taps = torch.empty(3, 1344), torch.empty(7, 7, 1344)
    with noted() as started:
        gated_conv(gate, gate, weight, bias)
        gated_conv_gradients(gate, gate, gate, weight, bias)
        convolve_each(near, kernels, biases)
        convolve_each_gradients(near, near, kernels)
        mixed_conv(hidden, line, taps, line[0], ends)
        mixed_conv_gradients(hidden, hidden, line, taps, ends)
        activated_gradient(hidden, hidden, line)
        _attend(dtype)
        _aggregate(dtype)
    return started


def _attend(dtype: torch.dtype) -> None:
    """The last stage of TransNeXt-Base at 224 and 384 pixels, the first two of two TransXNets."""
    for side in (7, 12):
        tokens = side**2
        qkv = torch.empty(16, side, side, 3 * 768, dtype=dtype)
        cosine = torch.empty(32, tokens, tokens), torch.empty(32, 1, 24), torch.empty(32, tokens, 1)
        attention_gradients(*attention([qkv], *cosine), [qkv], *cosine)
    for side, width in ((56, 38), (28, 64)):
        q, kv = (torch.empty(16, s, s, c, dtype=dtype) for s, c in ((side, width), (7, 2 * width)))
        relative = torch.empty(2, side**2, 49), None, None
        attention_gradients(*attention([q, kv], *relative), [q, kv], *relative)


def _aggregate(dtype: torch.dtype) -> None:
    """TransNeXt-Base's first stage at 224 and 384 pixels, whose image is pooled to a 32nd."""
    for side in (56, 96):
        image = torch.empty(1, side, side, 96, dtype=dtype)
        pooled = torch.empty(1, (side // 8) ** 2, 96, dtype=dtype)
        learned = torch.empty(4, 1, 24), torch.empty(4, side**2, 1), torch.empty(4, 24, 9)
        biases = *torch.empty(2, 4, 1, 9), torch.empty(4, side**2, pooled.shape[1])
        given = image, image, image, pooled, pooled, *learned, *biases
        aggregate_gradients(*aggregate(*given), *given)


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


def task(dtype: torch.dtype, index: int, target: int) -> Build:
    """Make one of all builds: what the operators start as number `index`."""
    return build(launches(dtype)[index], target)


def page() -> str:
    """Return the whole page, from builds in as many processes as there are CPUs."""
    tasks = [
        (dtype, index, target)
        for dtype in POINTERS
        for index in range(len(launches(dtype)))
        for target in SHARED
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        builds = list(processes.map(task, *zip(*tasks, strict=True)))
    names = list(Build.__dataclass_fields__)
    rows = [line(names), line(["---"] * len(names)), *(row(build) for build in builds)]
    return TEXT.format(version=triton.__version__, digest=digest()) + "\n".join(rows) + "\n"


def row(build: Build) -> str:
    """A build as a row of the table."""
    return line([str(value) for value in asdict(build).values()])


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def digest() -> str:
    """A digest of the kernels, and of what starts them, without their comments."""
    code = sha256()
    for path in sorted([*KERNELS.glob("device/*.py"), *KERNELS.glob("triton_*.py")]):
        code.update(ast.dump(ast.parse(path.read_text())).encode())
    return code.hexdigest()[:16]


def stale() -> str | None:
    """Return why the page is not of these kernels, or None if it is."""
    written = PAGE.read_text()
    if digest() not in written:
        return "the kernels have changed since"
    first: dict[str, Launch] = {}
    for launch in launches(torch.bfloat16):
        first.setdefault(launch.kernel.__name__, launch)
    for launch in first.values():
        found = row(build(launch, 90))
        if found not in written.splitlines():
            return f"it does not have {found}"
    return None


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", said)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif (why := stale()) is not None:
        sys.exit(f"{PAGE.name} is stale: {why}; run python docs/build_kernels.py")
