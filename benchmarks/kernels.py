"""The fused operators of the models on a GPU beside the same in plain PyTorch.

    python benchmarks/kernels.py [OPERATOR ...] [--cpu]

Every round times a forward and a backward pass of each form in turn: our kernels, the definition,
the definition compiled, and of attention also `scaled_dot_product_attention` and FlexAttention,
compiled. Printed are ratios to our kernels' time, and the bandwidth that our kernels reach if each
map is moved once. Without a GPU nothing is run: lines then say `"dry": true` and hold counted bytes
and FLOPs and what they would take at the makers' figures. With `--cpu`, the definition is timed on
this CPU beside the definition compiled. One JSON line per operator and pass.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# This file's own folder would otherwise hide the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.utils.flop_counter import FlopCounterMode

from models.geometry import Geometry, StagePlan, stage_geometry
from models.kernels import (
    aggregated_attention,
    conv_glu,
    cosine_attention,
    dynamic_conv,
    gelu_norm_conv,
    relative_attention,
)
from models.kernels.choice import force

# GB/s, and bfloat16 TFLOP/s with and without tensor cores, of the makers.
GPUS = {"A100": (2039, 312, 19.5), "H100": (3350, 989, 67), "B200": (8000, 2250, 75)}

Op = Callable[..., Tensor]


class Case(NamedTuple):
    """An operator, the shapes of what it takes at 224 pixels, and other ways to compute it.

    The first `maps` inputs are maps; the others are float32 parameters. Most of its arithmetic is
    matrix products, or nothing for `tensor_cores`.
    """

    op: Op
    shapes: Sequence[tuple[int, ...]]
    maps: int
    tensor_cores: bool
    rivals: dict[str, Op]


def aggregated(geometry: Geometry, *given: Tensor) -> Tensor:
    """`aggregated_attention` on a grid; inputs in the order of `cases`."""
    *maps, embedding, temperature, tokens, token_bias, local_bias, pool_bias = given
    return aggregated_attention(
        *maps,
        query_embedding=embedding,
        temperature=temperature,
        key_count=geometry.key_count.to(embedding.device),
        local_bias=local_bias,
        pool_bias=pool_bias,
        tokens=tokens,
        token_bias=token_bias,
        outside=geometry.outside.to(embedding.device),
    )


def aggregated_flex(geometry: Geometry, mask: BlockMask, *given: Tensor) -> Tensor:
    """Its softmax alone by FlexAttention, up to rounding: there is no place for the tokens."""
    q, k, v, pool_k, pool_v, embedding, temperature, _, _, local_bias, pool_bias = given
    heads, count, columns = len(embedding), q.shape[1] * q.shape[2], q.shape[2]

    def split(x: Tensor) -> Tensor:
        return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, right = steps(columns, query, key)
        slot = (down * 3 + right + 4).clamp(0, 8)
        far = pool_bias[head, query, (key - count).clamp_min(0)]
        return score + torch.where(key < count, local_bias[head, 0, slot], far)

    scale = F.softplus(temperature) * geometry.key_count.float().log()[:, None]
    queries = ((F.normalize(split(q).float(), dim=-1) + embedding) * scale).to(v.dtype)
    keys = F.normalize(torch.cat([split(k), split(pool_k)], dim=2).float(), dim=-1).to(v.dtype)
    values = torch.cat([split(v), split(pool_v)], dim=2)
    mixed: Any = flex_attention(queries, keys, values, score_mod=biased, block_mask=mask, scale=1.0)
    return mixed.transpose(1, 2).reshape(q.shape)


def window_mask(grid: tuple[int, int], pooled: int, device: str) -> BlockMask:
    """For FlexAttention: a query's window of three, and all pooled keys, which come after it."""
    count, columns = grid[0] * grid[1], grid[1]

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, right = steps(columns, query, key)
        return (key >= count) | ((down.abs() <= 1) & (right.abs() <= 1))

    return create_block_mask(near, None, None, count, count + pooled, device=device)


def steps(columns: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns from queries to keys, which are numbered row by row."""
    return key // columns - query // columns, key % columns - query % columns


def cosine(qkv: Tensor, embedding: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """`cosine_attention` of one grid, all of whose tokens are keys."""
    tokens = bias.shape[-1]
    count = torch.full((tokens,), tokens, device=qkv.device)
    return cosine_attention(
        qkv, query_embedding=embedding, temperature=temperature, key_count=count, bias=bias
    )


def cosine_parts(
    qkv: Tensor, embedding: Tensor, temperature: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, unit keys and values, as other attention takes them: [B, h, N, d]."""
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, len(bias), -1)).permute(2, 0, 3, 1, 4)
    scale = F.softplus(temperature) * math.log(bias.shape[-1])
    unit = F.normalize(q.float(), dim=-1)
    return ((unit + embedding) * scale).to(v.dtype), F.normalize(k.float(), dim=-1).to(v.dtype), v


def cosine_sdpa(qkv: Tensor, embedding: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """The same by `scaled_dot_product_attention`, up to rounding."""
    q, k, v = cosine_parts(qkv, embedding, temperature, bias)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(v.dtype), scale=1.0)
    return mixed.transpose(1, 2).flatten(2).view(*qkv.shape[:3], -1)


def cosine_flex(qkv: Tensor, embedding: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """The same by FlexAttention, up to rounding."""
    q, k, v = cosine_parts(qkv, embedding, temperature, bias)
    mixed = flex_attention(q, k, v, score_mod=partial(add_bias, bias), scale=1.0)
    return mixed.transpose(1, 2).flatten(2).view(*qkv.shape[:3], -1)


def add_bias(bias: Tensor, score: Tensor, _: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A score with its bias, as FlexAttention asks for it."""
    return score + bias[head, q, k]


def relative(q: Tensor, kv: Tensor, position: Tensor) -> Tensor:
    """`relative_attention`."""
    return relative_attention(q, kv, position=position, num_heads=len(position))


def relative_sdpa(q: Tensor, kv: Tensor, position: Tensor) -> Tensor:
    """The same by `scaled_dot_product_attention`."""
    mixed = F.scaled_dot_product_attention(
        *relative_parts(q, kv, len(position)), attn_mask=position.to(q.dtype)
    )
    return mixed.transpose(1, 2).reshape(q.shape)


def relative_flex(q: Tensor, kv: Tensor, position: Tensor) -> Tensor:
    """The same by FlexAttention."""
    parts = relative_parts(q, kv, len(position))
    mixed: Any = flex_attention(*parts, score_mod=partial(add_bias, position))
    return mixed.transpose(1, 2).reshape(q.shape)


def relative_parts(q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, h, tokens, d]."""
    k, v = kv.chunk(2, dim=-1)
    queries, keys, values = (
        x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)
    )
    return queries, keys, values


def norm_conv(x: Tensor, gain: Tensor, shift: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
    """`gelu_norm_conv` in one process, without the statistics that it returns."""
    return gelu_norm_conv(x, gain, shift, list(weights), bias, eps=1e-5, group=None)[0]


def cases(batch: int, device: str) -> dict[str, Case]:
    """The operators in the first stage (attention: where it is used) of the Base variants."""
    b, grid, pool = batch, (56, 56), (7, 7)
    plan = StagePlan(grid, pool, grid, pool, grid, windowed=True)
    geometry = stage_geometry(plan, device=torch.device(device))
    flex = {}
    if device == "cuda":
        flex["flex"] = partial(aggregated_flex, geometry, window_mask(grid, 49, device))
    return {
        "aggregated_attention": Case(
            partial(aggregated, geometry),
            [
                *[(b, 56, 56, 96)] * 3,
                *[(b, 49, 96)] * 2,
                *[(4, 1, 24), (4, 1, 1), (4, 24, 9), (4, 1, 9), (4, 1, 9), (4, 3136, 49)],
            ],
            5,
            True,
            flex,
        ),
        "conv_glu": Case(
            conv_glu,
            [(b, 56, 56, 512), (b, 56, 56, 512), (512, 1, 3, 3), (512,), (96, 512), (96,)],
            2,
            True,
            {},
        ),
        "cosine_attention": Case(
            cosine,
            [(b, 7, 7, 3 * 768), (32, 1, 24), (32, 1, 1), (32, 49, 49)],
            1,
            True,
            {"sdpa": cosine_sdpa, "flex": cosine_flex},
        ),
        "relative_attention": Case(
            relative,
            [(b, 56, 56, 38), (b, 7, 7, 76), (2, 3136, 49)],
            2,
            True,
            {"sdpa": relative_sdpa, "flex": relative_flex},
        ),
        "dynamic_conv": Case(dynamic_conv, [(b, 56, 56, 38), (b, 7, 7, 38), (b, 38)], 3, False, {}),
        "gelu_norm_conv": Case(
            norm_conv,
            [(b, 56, 56, 608), *[(608,)] * 3, *[(152, 1, side, side) for side in (1, 3, 5, 7)]],
            1,
            False,
            {},
        ),
    }


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random inputs with gradients."""
    return [
        torch.randn(
            shape, device=device, dtype=dtype if number < case.maps else torch.float32
        ).requires_grad_()
        for number, shape in enumerate(case.shapes)
    ]


class Cost(NamedTuple):
    """Of a pass: bytes if every input is read and every result written once, and FLOPs."""

    moved: int
    flops: int
    tensor_cores: bool

    def least_ms(self, gpu: str) -> float:
        """The milliseconds that it takes at the least, by the maker's figures."""
        bandwidth, dense, plain = GPUS[gpu]
        rate = dense if self.tensor_cores else plain
        return max(self.moved / bandwidth / 1e6, self.flops / rate / 1e9)


def costs(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    """Count both passes on the meta device, where nothing is computed."""
    inputs = make_inputs(case, dtype, "meta")
    with force("triton"):
        with FlopCounterMode(display=False) as forward:
            out = case.op(*inputs)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, inputs, torch.empty_like(out))
    read, written = sum(x.nbytes for x in inputs), out.nbytes
    return {
        "forward": Cost(read + written, forward.get_total_flops(), case.tensor_cores),
        "backward": Cost(2 * read + written, backward.get_total_flops(), case.tensor_cores),
    }


def dry(name: str, case: Case, dtype: torch.dtype) -> None:
    """Print what is counted."""
    for which, cost in costs(case, dtype).items():
        row = {"operator": name, "pass": which, "dry": True, "least_bytes": cost.moved}
        least = {gpu: round(cost.least_ms(gpu), 4) for gpu in GPUS}
        print(json.dumps({**row, "flops": cost.flops, "least_ms": least}), flush=True)


def timed(device: str, run: Callable[[], Any]) -> float:
    """Milliseconds on the device."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def passes(case: Case, dtype: torch.dtype, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Time every form in turn: the median milliseconds of both passes, by form."""
    inputs = make_inputs(case, dtype, device)
    forms: dict[str, tuple[str, Op]] = {
        "eager": ("eager", case.op),
        "compiled": ("eager", torch.compile(case.op, fullgraph=True)),
    }
    if device == "cuda":
        forms["triton"] = ("triton", case.op)
        forms |= {rival: ("eager", torch.compile(op)) for rival, op in case.rivals.items()}
    spent: dict[str, dict[str, list[float]]] = {"forward": {}, "backward": {}}
    for index in range(rounds + 3):
        for form, (forced, op) in forms.items():
            with force(forced):
                outs: list[Tensor] = []
                forward = timed(device, lambda op=op, outs=outs: outs.append(op(*inputs)))
                grad = torch.ones_like(outs[0])
                backward = timed(device, partial(torch.autograd.grad, outs[0], inputs, grad))
            if index >= 3:
                spent["forward"].setdefault(form, []).append(forward)
                spent["backward"].setdefault(form, []).append(backward)
    return {
        which: {form: median(times) for form, times in taken.items()}
        for which, taken in spent.items()
    }


def race(name: str, case: Case, dtype: torch.dtype, rounds: int) -> None:
    """Print how long the other forms take next to our kernels, and what these reach."""
    device = torch.cuda.get_device_name()
    known = next((gpu for gpu in GPUS if gpu in device), None)
    spent = passes(case, dtype, rounds, "cuda")
    for which, cost in costs(case, dtype).items():
        own = spent[which]["triton"]
        row = {"operator": name, "pass": which, "device": device, "ms": round(own, 4)}
        ratios = {form: round(other / own, 2) for form, other in spent[which].items()}
        share = None if known is None else round(cost.least_ms(known) / own, 3)
        row |= {"ratio": ratios, "gb_per_s": round(cost.moved / own / 1e6, 1)}
        print(json.dumps({**row, "share_of_roofline": share}), flush=True)


def race_on_cpu(name: str, case: Case, dtype: torch.dtype, rounds: int) -> None:
    """Print how long the definition takes compiled, next to itself as it is."""
    for which, ms in passes(case, dtype, rounds, "cpu").items():
        row = {"operator": name, "pass": which, "device": "cpu", "dtype": str(dtype)}
        print(json.dumps({**row, "ratio": round(ms["compiled"] / ms["eager"], 2)}), flush=True)


def main() -> None:
    """Time, or count."""
    known = cases(1, "cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(known)}")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--rounds", type=int, default=30, help="timed passes of each form")
    parser.add_argument("--cpu", action="store_true", help="time the definitions on this CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    if unknown := set(arguments.operators) - set(known):
        parser.error(f"unknown operator {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    dtype = getattr(torch, arguments.dtype)
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    for name, case in cases(arguments.batch, device).items():
        if arguments.operators and name not in arguments.operators:
            continue
        if arguments.cpu:
            race_on_cpu(name, case, dtype, arguments.rounds)
        elif device == "cuda":
            race(name, case, dtype, arguments.rounds)
        else:
            dry(name, case, dtype)


if __name__ == "__main__":
    main()
