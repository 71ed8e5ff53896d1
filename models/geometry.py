"""Where the tokens of a TransNeXt stage are: a function of the grid sizes alone.

Invariant: tables are integers, computed by arithmetic (never by searching for unique values), so
they build on the meta device and no cast of the model can blur them.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .base import ModelError
from .kernels.exported import bin_edges

Pair = tuple[int, int]
BUFFERS = ("rows", "columns", "pairs", "key_count", "outside")


class Geometry(NamedTuple):
    """Where the tokens of one stage are; every tensor holds integers.

    rows [R], columns [S]: the distinct query-minus-key offsets along each axis, doubled (centres
    of pooling bins are half-integers). pairs [N·M]: for every query and key, which of the R·S
    pairs of offsets. key_count [N]: keys visible to each query. outside [N, 9] (bool): slots of
    the 3x3 window beyond the image.
    """

    plan: "StagePlan"
    rows: Tensor
    columns: Tensor
    pairs: Tensor
    key_count: Tensor
    outside: Tensor

    def features(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log-spaced offsets along rows [R] and columns [S]: the input of the bias MLP."""
        rows, columns = self.plan.span
        return _log_offset(self.rows.to(dtype), rows), _log_offset(self.columns.to(dtype), columns)


class StagePlan(NamedTuple):
    """The sizes of one stage.

    `grid` and `pool` are the query and key grids; `bias_grid` and `bias_pool` those on which the
    position bias is evaluated, which differ under interpolation only. `span` is the pretraining
    grid, by which coordinates are scaled. `windowed` stages see a 3x3 window besides the keys.
    """

    grid: Pair
    pool: Pair
    bias_grid: Pair
    bias_pool: Pair
    span: Pair
    windowed: bool


def stage_plan(
    grid: Pair, *, bias_grid: Pair, span: Pair, sr_ratio: int, fixed_pool_size: int | None
) -> StagePlan:
    """The sizes of a stage whose keys are the grid itself, or pooled where `sr_ratio` is above 1.

    Raises ModelError for a `fixed_pool_size` beyond the grid.
    """

    def pool(grid: Pair) -> Pair:
        if sr_ratio == 1:
            return grid
        if fixed_pool_size is None:
            rows, columns = (torch.sym_max(1, side // sr_ratio) for side in grid)
            return cast(int, rows), cast(int, columns)
        if not 1 <= fixed_pool_size <= min(grid):
            raise ModelError(
                f"fixed_pool_size is {fixed_pool_size}, but a stage has {grid[0]}x{grid[1]} "
                f"tokens; choose at most {min(grid)} or larger images"
            )
        return fixed_pool_size, fixed_pool_size

    return StagePlan(grid, pool(grid), bias_grid, pool(bias_grid), span, windowed=sr_ratio > 1)


def _log_offset(doubled: Tensor, span: int) -> Tensor:
    # A span of one cell would divide by zero; there is then a single offset, zero.
    delta = doubled * (4.0 / max(span - 1, 1))
    return delta.sign() * (1 + delta.abs()).log2() / 3


def _axis_offsets(size: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct doubled offsets of `size` queries from the centres of `bins` pooling bins.

    Returns the sorted offsets [R] and, for each query and bin, the place of theirs among them
    [size, bins]. Bins of equal size have centres of one parity, so that every other offset is
    enough.
    """
    start, end = bin_edges(size, bins, device)
    centres = start + end - 1
    reach = size - 1 + (bins - 1) * size // bins  # from the last query to the first centre
    step = cast(int, 2 - torch.sym_min(1, size % bins))
    offsets = torch.arange(2 * reach // step + 1, device=device) * step - reach
    places = (2 * torch.arange(size, device=device)[:, None] - centres + reach) // step
    return offsets, places


def _visible_keys(grid: Pair, device: torch.device) -> Tensor:
    """[N, 9] bool: whether each slot of each query's 3x3 window lies in the image."""
    row_hit, column_hit = (
        torch.arange(size, device=device)[:, None] + torch.arange(-1, 2, device=device)
        for size in grid
    )
    row_hit = (row_hit >= 0) & (row_hit < grid[0])
    column_hit = (column_hit >= 0) & (column_hit < grid[1])
    return (row_hit[:, None, :, None] & column_hit[None, :, None, :]).reshape(-1, 9)


def stage_geometry(plan: StagePlan, *, device: torch.device) -> Geometry:
    """Compute the geometry of a stage on `device`, which may be meta."""
    rows, row_places = _axis_offsets(plan.bias_grid[0], plan.bias_pool[0], device)
    columns, column_places = _axis_offsets(plan.bias_grid[1], plan.bias_pool[1], device)
    by_row, by_column = row_places[:, None, :, None], column_places[None, :, None, :]
    visible = _visible_keys(plan.grid, device)
    return Geometry(
        plan=plan,
        rows=rows,
        columns=columns,
        pairs=(by_row * columns.shape[0] + by_column).flatten(),
        key_count=visible.sum(dim=1) * plan.windowed + math.prod(plan.pool),
        outside=~visible,
    )
