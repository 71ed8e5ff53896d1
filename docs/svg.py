"""Block diagrams as SVG: boxes, arrows that turn at right angles, and the panels around them.

Invariant: equal calls give equal bytes, so a committed drawing can be compared with its script.
Coordinates are pixels from the top left; a box is placed by its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal["weights", "norm", "plain", "mix", "learned"]
Point = tuple[float, float]

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"
INK, FAINT, LINE, EDGE = "#1f2328", "#59636e", "#475569", "#d0d7de"
PAPER, PANEL = "#ffffff", "#f6f8fa"
FILLS: dict[Kind, tuple[str, str]] = {
    "weights": ("#dbeafe", "#3b82f6"),
    "norm": ("#ede9fe", "#8b5cf6"),
    "plain": ("#e9edf2", "#7b8794"),
    "mix": ("#ffedd5", "#f08a24"),
    "learned": ("#dcfce7", "#22a559"),
}
LEGEND: dict[Kind, str] = {
    "weights": "linear layer or convolution",
    "norm": "normalisation",
    "plain": "no parameters",
    "mix": "attention and mixing",
    "learned": "other learned parameters",
}
BOX_HEIGHT, LEADING = 40.0, 18.0


class Box(NamedTuple):
    """A drawn box: its centre, width and height; the four sides are where arrows attach."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        """The middle of the left side."""
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        """The middle of the right side."""
        return self.x + self.width / 2, self.y

    @property
    def top(self) -> Point:
        """The middle of the upper side."""
        return self.x, self.y - self.height / 2

    @property
    def bottom(self) -> Point:
        """The middle of the lower side."""
        return self.x, self.y + self.height / 2


class Drawing:
    """A page on which things are drawn in the order of the calls; `svg()` gives the file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def panel(self, x: float, y: float, width: float, height: float, title: str, note: str) -> None:
        """A titled area; `note` follows the title in a fainter hand."""
        self._rect(x, y, width, height, radius=10, fill=PANEL, stroke=EDGE)
        spans = (
            f'<tspan font-weight="600">{escape(title)}</tspan>'
            f'<tspan dx="12" font-size="14" fill="{FAINT}">{escape(note)}</tspan>'
        )
        self._parts.append(f'<text x="{x + 16:g}" y="{y + 27:g}" font-size="17">{spans}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        *lines: str,
        kind: Kind,
        height: float = 0,
        stacked: bool = False,
    ) -> Box:
        """A labelled box as high as its lines; `stacked` shows that there are several."""
        height = height or BOX_HEIGHT + LEADING * (len(lines) - 1)
        fill, stroke = FILLS[kind]
        for offset in (8, 4, 0) if stacked else (0,):
            left, top = x - width / 2 + offset, y - height / 2 - offset
            self._rect(left, top, width, height, radius=7, fill=fill, stroke=stroke)
        self.text(x, y, *lines)
        return Box(x, y, width, height)

    def sign(self, x: float, y: float, sign: Literal["+", "×"]) -> Box:
        """A circle in which streams meet."""
        arm = 5.0 if sign == "+" else 4.0
        strokes = (
            f"M{x - arm:g} {y:g}H{x + arm:g}M{x:g} {y - arm:g}V{y + arm:g}"
            if sign == "+"
            else f"M{x - arm:g} {y - arm:g}L{x + arm:g} {y + arm:g}"
            f"M{x - arm:g} {y + arm:g}L{x + arm:g} {y - arm:g}"
        )
        self._parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{PAPER}" stroke="{LINE}" '
            f'stroke-width="1.5"/><path d="{strokes}" stroke="{INK}" stroke-width="1.75"/>'
        )
        return Box(x, y, 24, 24)

    def text(
        self,
        x: float,
        y: float,
        *lines: str,
        size: float = 15,
        faint: bool = False,
        anchor: Literal["start", "middle", "end"] = "middle",
    ) -> None:
        """Lines of text, centred on `y` as a whole."""
        leading = LEADING * size / 15
        first = y - leading * (len(lines) - 1) / 2 + size * 0.35
        for index, line in enumerate(lines):
            self._parts.append(
                f'<text x="{x:g}" y="{first + index * leading:g}" font-size="{size:g}" '
                f'text-anchor="{anchor}" fill="{FAINT if faint else INK}">{escape(line)}</text>'
            )

    def arrow(self, *points: Point, over: bool = False) -> None:
        """A line through `points` with rounded turns; `over` interrupts the lines it crosses."""
        if over:  # a band of the panel's colour that spares the boxes at both ends
            first, last = _towards(points[0], points[1]), _towards(points[-1], points[-2])
            band = _path([first, *points[1:-1], last])
            self._parts.append(f'<path d="{band}" stroke="{PANEL}" stroke-width="9" fill="none"/>')
        self._parts.append(
            f'<path d="{_path(points)}" stroke="{LINE}" stroke-width="1.5" fill="none" '
            'marker-end="url(#head)"/>'
        )

    def chain(self, *boxes: Box) -> None:
        """Arrows from each box to the next one on its right."""
        for before, after in pairwise(boxes):
            self.arrow(before.right, after.left)

    def fork(self, x: float, y: float) -> Point:
        """A dot where a stream is used more than once."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="3" fill="{LINE}"/>')
        return x, y

    def legend(self, x: float, y: float) -> None:
        """What the fills mean, in one row."""
        for kind, meaning in LEGEND.items():
            fill, stroke = FILLS[kind]
            self._rect(x, y - 8, 16, 16, radius=4, fill=fill, stroke=stroke)
            self.text(x + 24, y, meaning, size=14, faint=True, anchor="start")
            x += 56 + 7.6 * len(meaning)

    def svg(self) -> str:
        """The drawing as a file; its own page colour keeps it legible on any background."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" '
                f'font-family="{FONT}" fill="{INK}">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                'markerHeight="7" orient="auto" markerUnits="userSpaceOnUse">'
                f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" '
                f'rx="14" fill="{PAPER}" stroke="{EDGE}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    def _rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        radius: float,
        fill: str,
        stroke: str,
    ) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.25"/>'
        )


def _path(points: Sequence[Point]) -> str:
    """Straight lines between `points`, joined by rounded corners."""
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        (x1, y1), (x2, y2) = _towards(corner, before), _towards(corner, after)
        path += f"L{x1:g} {y1:g}Q{corner[0]:g} {corner[1]:g} {x2:g} {y2:g}"
    return path + f"L{points[-1][0]:g} {points[-1][1]:g}"


def _towards(corner: Point, end: Point, radius: float = 8) -> Point:
    """The point `radius` away from `corner` on the way to `end`, at most half of that way."""
    dx, dy = end[0] - corner[0], end[1] - corner[1]
    share = min(radius / max(abs(dx) + abs(dy), 1e-9), 0.5)
    return corner[0] + dx * share, corner[1] + dy * share
