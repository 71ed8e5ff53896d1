"""Draw the figures of the model page, and renew its table.

    python docs/draw_models.py

Writes images/transnext.svg, images/transxnet.svg and the table between the markers in models.md,
beside this file; the tests hold that what is committed is what this script writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The checkout, so that `docs` is a package when this file is run as a script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs.svg import Box, Drawing, Point
from docs.tabulate_models import table

WIDTH, GAP = 1180, 20
INNER = WIDTH - 2 * GAP
SUBSCRIPTS = "₁₂₃₄"
# Around the table in models.md.
START, END = "<!-- variants -->", "<!-- end of variants -->"


def transnext() -> Drawing:
    """Stages, one block, the gated feed-forward, and aggregated attention."""
    page = Drawing(WIDTH, 1120, "TransNeXt: stages, block, ConvGLU and aggregated attention")
    _stages(
        page,
        note="a stage's output is that of its last norm",
        norm="LayerNorm",
        closing="LayerNorm",
        mixers=["aggregated, r = 8", "aggregated, r = 4", "aggregated, r = 2", "global attention"],
        head=("mean, Linear",),
    )
    _transnext_block(page, GAP, 320)
    _conv_glu(page, 660, 320)
    _aggregated_attention(page, GAP, 530)
    page.legend(GAP + 16, 1093)
    return page


def transxnet() -> Drawing:
    """Stages, one block, D-Mixer and the multi-scale feed-forward."""
    page = Drawing(WIDTH, 1216, "TransXNet: stages, block, D-Mixer and MS-FFN")
    _stages(
        page,
        note="a stage's output is that of its last block",
        norm="BatchNorm",
        closing=None,
        mixers=["keys at 1/8", "keys at 1/4", "keys at 1/2", "keys at full grid"],
        head=("GroupNorm,", "mean, Linear"),
    )
    _transxnet_block(page, GAP, 278)
    _mixer(page, GAP, 464)
    _multi_scale(page, GAP, 924)
    page.legend(GAP + 16, 1188)
    return page


def _stages(
    page: Drawing,
    *,
    note: str,
    norm: str,
    closing: str | None,
    mixers: list[str],
    head: tuple[str, ...],
) -> None:
    """The row of four stages between the image and the head."""
    page.panel(GAP, GAP, INNER, 280 if closing else 238, "Four stages", note)
    before = page.box(88, 173, 96, "image", "H × W × 3", kind="plain")
    for index, mixer in enumerate(mixers):
        x, side = 250 + 200 * index, 4 * 2**index
        conv = "Conv 3×3, stride 2" if index else "Conv 7×7, stride 4"
        embed = page.box(x, 100, 160, conv, norm, kind="weights")
        blocks = page.box(x, 175, 146, f"Block × L{SUBSCRIPTS[index]}", kind="mix", stacked=True)
        page.arrow(embed.bottom, (x, blocks.top[1] - 8))
        after = Box(x + 4, blocks.y, blocks.width + 8, blocks.height)  # the stack's right edge
        if closing is not None:
            after = page.box(x, 231, 160, closing, kind="norm", height=32)
            page.arrow(blocks.bottom, after.top)
        grid = f"H/{side} × W/{side} × C{SUBSCRIPTS[index]}"
        page.text(x, 262 if closing else 222, grid, size=14, faint=True)
        page.text(x, 281 if closing else 241, mixer, size=14, faint=True)
        _climb(page, before, embed)
        before = after
    top = page.box(1074, 100, 124, *head, kind="weights", height=58)
    _climb(page, before, top)
    page.arrow(top.bottom, page.box(1074, 175, 124, "logits", kind="plain").top)


def _climb(page: Drawing, before: Box, after: Box) -> None:
    """From the right of one box to the left of the next column's, turning before the latter."""
    turn = after.left[0] - 20
    page.arrow(before.right, (turn, before.y), (turn, after.y), after.left)


def _residual(page: Drawing, fork: tuple[float, float], plus: Box, lift: float) -> None:
    """The way around a branch, from `fork` over it into `plus`."""
    page.arrow(fork, (fork[0], fork[1] - lift), (plus.x, fork[1] - lift), plus.top)
    page.fork(*fork)


def _transnext_block(page: Drawing, x: float, y: float) -> None:
    page.panel(x, y, 620, 190, "Block", "each branch under drop path")
    start, middle = (x + 14, y + 118), y + 118
    for left, branch in ((x + 32, "Attention"), (x + 322, "ConvGLU")):
        norm = page.box(left + 70, middle, 102, "LayerNorm", kind="norm")
        inner = page.box(left + 188, middle, 98, branch, kind="mix")
        plus = page.sign(left + 266, middle, "+")
        page.arrow(start, norm.left)
        page.chain(norm, inner, plus)
        _residual(page, (left, middle), plus, 54)
        start = plus.right
    page.arrow(start, (x + 614, middle))


def _conv_glu(page: Drawing, x: float, y: float) -> None:
    page.panel(x, y, 500, 190, "ConvGLU", "D = ⅔ · ratio · C hidden channels")
    middle, split = y + 118, x + 148
    expand = page.box(x + 76, middle, 92, "Linear", "C → 2D", kind="weights")
    conv = page.box(x + 222, middle - 34, 100, "depthwise", "Conv 3×3", kind="weights")
    gelu = page.box(x + 316, middle - 34, 60, "GELU", kind="plain")
    times = page.sign(x + 374, middle, "×")
    reduce = page.box(x + 440, middle, 84, "Linear", "D → C", kind="weights")
    page.arrow((x + 8, middle), expand.left)
    page.arrow(expand.right, (split, middle), (split, conv.y), conv.left)
    page.arrow(expand.right, (split, middle), (split, y + 168), (times.x, y + 168), times.bottom)
    page.chain(conv, gelu)
    page.arrow(gelu.right, (times.x, gelu.y), times.top)
    page.chain(times, reduce)
    page.arrow(reduce.right, (x + 496, middle))
    page.text(split + 18, conv.y - 14, "gate", size=14, faint=True, anchor="end")
    page.text(x + 222, y + 155, "value", size=14, faint=True)


def _aggregated_attention(page: Drawing, x: float, y: float) -> None:
    note = "stages 1 to 3: one softmax over a 3×3 window and M pooled keys, n in all"
    page.panel(x, y, INNER, 534, "Aggregated attention", note)
    queries, window, pooled = y + 118, y + 264, y + 442
    for row in (queries, pooled):
        page.arrow((x + 14, window), (x + 30, window), (x + 30, row), (x + 48, row))
    page.text(x + 22, window - 16, "x", size=16)
    near_keys, near_values = _window_row(page, x, window)
    far_keys, far_values = _pooled_row(page, x, pooled)
    near, far = _logits(page, x + 696, window, pooled)
    middle = (window + pooled) / 2
    softmax = page.box(
        x + 830, middle, 84, "softmax", "over", "9 + M", kind="mix", height=pooled - window + 58
    )
    mixes = [
        page.box(x + 1000, row, 116, "weights", "· values", kind="mix") for row in (window, pooled)
    ]
    for values, mix, lane in (
        (near_values, mixes[0].top, window - 58),
        (far_values, mixes[1].bottom, pooled + 58),
    ):
        page.arrow(page.fork(*values), (values[0], lane), (mix[0], lane), mix)
        page.text(x + 496, lane + 13, "values", size=14, faint=True, anchor="start")
    for keys, logits in ((near_keys, near), (far_keys, far)):
        page.arrow(keys.right, logits.left)
        page.arrow(logits.right, (softmax.left[0], logits.y))
    unit = _queries(page, x, queries, ends=[(near.left[0], row - 16) for row in (window, pooled)])
    tokens = page.box(x + 906, queries, 140, "unit query ·", "learned tokens", kind="learned")
    page.arrow(unit, (unit[0], queries - 50), (tokens.x, queries - 50), tokens.top)
    plus = page.sign(tokens.x, window, "+")
    page.arrow(tokens.bottom, plus.top, over=True)
    page.arrow((softmax.right[0], window), plus.left)
    page.chain(plus, mixes[0])
    page.arrow((softmax.right[0], pooled), mixes[1].left)
    total = page.sign(x + 1000, middle, "+")
    page.arrow(mixes[0].bottom, total.top)
    page.arrow(mixes[1].top, total.bottom)
    out = page.box(x + 1078, middle, 76, "Linear", kind="weights")
    page.chain(total, out)
    page.arrow(out.right, (x + INNER - 4, middle))


def _queries(page: Drawing, x: float, y: float, *, ends: list[Point]) -> Point:
    """Unit queries, embedded and scaled, down to both rows of logits; returns their fork."""
    linear = page.box(x + 92, y, 84, "Linear", kind="weights")
    unit = page.box(x + 204, y, 84, "L2 norm", kind="plain")
    plus = page.sign(x + 340, y, "+")
    embedding = page.box(x + 340, y + 52, 142, "query embedding", kind="learned", height=32)
    scale = page.box(x + 480, y, 160, "× softplus(τ) · ln n", kind="learned")
    page.chain(linear, unit, plus, scale)
    page.arrow(embedding.top, plus.bottom)
    near, far = ends
    page.arrow(scale.right, (x + 600, y), (x + 600, far[1]), far, over=True)
    page.arrow(page.fork(x + 600, near[1]), near)
    page.text(x + 92, y - 34, "queries", size=14, faint=True)
    return page.fork(x + 266, y)


def _window_row(page: Drawing, x: float, y: float) -> tuple[Box, Point]:
    """Keys of the window; returns them and where the values leave."""
    linear = page.box(x + 92, y, 84, "Linear", "C → 2C", kind="weights")
    gather = page.box(x + 214, y, 112, "3×3 window", "of each query", kind="plain")
    norm = page.box(x + 536, y, 84, "L2 norm", kind="plain")
    page.arrow((x + 14, y), linear.left)
    page.fork(x + 30, y)
    page.chain(linear, gather, norm)
    page.text(x + 420, y - 14, "keys", size=14, faint=True)
    return norm, (x + 290, y)


def _pooled_row(page: Drawing, x: float, y: float) -> tuple[Box, Point]:
    """Keys of the pooled view; returns them and where the values leave."""
    conv = page.box(x + 92, y, 84, "Conv 1×1", "GELU", kind="weights")
    pool = page.box(x + 205, y, 106, "average pool", "H/r × W/r", kind="plain")
    norm = page.box(x + 320, y, 96, "LayerNorm", kind="norm")
    linear = page.box(x + 428, y, 92, "the same", "Linear", kind="weights")
    unit = page.box(x + 536, y, 84, "L2 norm", kind="plain")
    page.chain(conv, pool, norm, linear, unit)
    return unit, (x + 484, y)


def _logits(page: Drawing, x: float, window: float, pooled: float) -> tuple[Box, Box]:
    near = page.box(x, window, 140, "window logits", "q · k + bias", kind="mix")
    far = page.box(x, pooled, 140, "pooled logits", "q · k + bias", kind="mix")
    slots = page.box(x, window + 58, 140, "bias of 9 slots", kind="learned", height=32)
    bias = page.box(x, pooled - 68, 140, "perceptron of", "log offsets", kind="learned", height=46)
    page.arrow(slots.top, near.bottom)
    page.arrow(bias.bottom, far.top)
    return near, far


def _transxnet_block(page: Drawing, x: float, y: float) -> None:
    page.panel(x, y, INNER, 166, "Block", "each branch but the first under drop path")
    middle = y + 112
    conv = page.box(x + 112, middle, 100, "depthwise", "Conv 7×7", kind="weights")
    plus = page.sign(x + 200, middle, "+")
    page.arrow((x + 14, middle), conv.left)
    page.chain(conv, plus)
    _residual(page, (x + 36, middle), plus, 54)
    for left, branch in ((x + 236, "D-Mixer"), (x + 686, "MS-FFN")):
        norm = page.box(left + 82, middle, 116, "GroupNorm", kind="norm")
        inner = page.box(left + 208, middle, 98, branch, kind="mix")
        scale = page.box(left + 327, middle, 102, "LayerScale", kind="learned")
        page.arrow(plus.right, norm.left)
        plus = page.sign(left + 412, middle, "+")
        page.chain(norm, inner, scale, plus)
        _residual(page, (left, middle), plus, 54)
    page.arrow(plus.right, (x + INNER - 8, middle))


def _mixer(page: Drawing, x: float, y: float) -> None:
    note = "half of the channels through IDConv, half through OSRA, then a squeeze over both"
    page.panel(x, y, INNER, 440, "D-Mixer", note)
    conv, middle, attention = y + 170, y + 222, y + 280
    near = _dynamic_conv(page, x, conv)
    far = _overlapping_attention(page, x, attention)
    page.text(x + 22, middle - 14, "x", size=16)
    for end in (near.left, (x + 66, attention)):
        page.arrow((x + 14, middle), (x + 36, middle), (x + 36, end[1]), end)
    join = page.box(x + 722, middle, 76, "concat", kind="plain")
    page.arrow(near.right, (join.x, near.y), join.top)
    page.arrow(far.right, (join.x, far.y), join.bottom)
    first = page.box(x + 838, middle, 96, "depthwise", "Conv 3×3", "GELU, BN", kind="weights")
    squeeze = page.box(x + 944, middle, 92, "Conv 1×1", "C → C/8", "GELU, BN", kind="weights")
    expand = page.box(x + 1044, middle, 84, "Conv 1×1", "C/8 → C", "BN", kind="weights")
    plus = page.sign(x + 1110, middle, "+")
    page.chain(join, first, squeeze, expand, plus)
    _residual(page, (x + 774, middle), plus, 62)
    page.arrow(plus.right, (x + INNER - 4, middle))


def _dynamic_conv(page: Drawing, x: float, y: float) -> Box:
    """IDConv: a kernel for every sample, mixed from G learned ones by its pooled map."""
    above = y - 84
    pool = page.box(x + 124, above, 108, "average pool", "to K × K", kind="plain")
    reduce = page.box(x + 250, above, 96, "Conv 1×1", "BN, GELU", kind="weights")
    expand = page.box(x + 364, above, 88, "Conv 1×1", kind="weights")
    softmax = page.box(x + 472, above, 88, "softmax", "over G", kind="mix")
    bank = page.box(x + 600, above, 120, "mix of G", "kernels K × K", kind="learned")
    conv = page.box(x + 600, y, 140, "depthwise Conv", "by that kernel", kind="mix")
    page.arrow(page.fork(x + 52, y), (x + 52, above), pool.left)
    page.chain(pool, reduce, expand, softmax, bank)
    page.arrow(bank.bottom, conv.top)
    page.text(x + 300, y - 13, "IDConv: first half of the channels", size=14, faint=True)
    return conv


def _overlapping_attention(page: Drawing, x: float, y: float) -> Box:
    """OSRA: every query against keys from overlapping patches."""
    below = y + 100
    query = page.box(x + 132, y, 132, "Conv 1×1", kind="weights")
    attend = page.box(x + 600, y, 140, "softmax(q · k", "+ table) · v", kind="mix")
    page.arrow(query.right, attend.left)
    page.text(x + 364, y - 13, "OSRA: second half of the channels", size=14, faint=True)
    patches = page.box(
        x + 132, below, 132, "depthwise Conv", "(r + 3)², stride r", "BN, GELU", kind="weights"
    )
    scale = page.box(x + 256, below, 76, "scale", "BN", kind="weights")
    refine = page.box(x + 378, below, 96, "depthwise", "Conv 3×3", kind="weights")
    plus = page.sign(x + 452, below, "+")
    expand = page.box(x + 522, below, 84, "Conv 1×1", "→ k, v", kind="weights")
    positions = page.box(x + 720, below, 124, "position table", kind="learned")
    page.arrow(page.fork(x + 52, y), (x + 52, below), patches.left)
    page.chain(patches, scale, refine, plus, expand)
    _residual(page, (x + 312, below), plus, 48)
    page.arrow(expand.right, (x + 582, below), (x + 582, attend.bottom[1]))
    page.arrow(positions.left, (x + 638, below), (x + 638, attend.bottom[1]))
    return attend


def _multi_scale(page: Drawing, x: float, y: float) -> None:
    page.panel(
        x, y, INNER, 236, "MS-FFN", "four depthwise kernels, each on a quarter of E channels"
    )
    middle = y + 140
    expand = page.box(x + 104, middle, 104, "Conv 1×1", "C → E", "GELU, BN", kind="weights")
    join = page.box(x + 520, middle, 84, "concat", kind="plain")
    page.arrow((x + 14, middle), expand.left)
    for index in range(4):
        row, side = middle - 63 + 42 * index, 2 * index + 1
        conv = page.box(x + 346, row, 160, f"depthwise {side}×{side}", kind="weights", height=32)
        page.arrow(expand.right, (x + 226, middle), (x + 226, row), conv.left)
        page.arrow(conv.right, (x + 448, row), (x + 448, middle), join.left)
    plus = page.sign(x + 640, middle, "+")
    act = page.box(x + 770, middle, 104, "GELU, BN", kind="norm")
    reduce = page.box(x + 950, middle, 104, "Conv 1×1", "E → C", "BN", kind="weights")
    page.chain(join, plus, act, reduce)
    _residual(page, (x + 188, middle), plus, 96)
    page.arrow(reduce.right, (x + INNER - 8, middle))


def outputs() -> dict[Path, str]:
    """Every file that follows from the code, with its text."""
    here = Path(__file__).resolve().parent
    page = here / "models.md"
    before, _, rest = page.read_text().partition(START)
    after = rest.partition(END)[2]
    return {
        here / "images" / "transnext.svg": transnext().svg(),
        here / "images" / "transxnet.svg": transxnet().svg(),
        page: f"{before}{START}\n{table()}{END}{after}",
    }


def main() -> None:
    """Write them."""
    for path, text in outputs().items():
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
