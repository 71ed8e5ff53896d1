"""Who is assigned to whom at the least total cost: the Hungarian problem."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each row of `costs` [R, C], R <= C, a column of its own, at the least total cost.

    Rows are taken in one by one, each along the shortest path of reassignments (Jonker and
    Volgenant, Computing 38, 1987): R² · C steps at most. Costs must be finite.
    """
    num_rows, num_columns = costs.shape
    if num_rows > num_columns:
        raise ValueError(f"{num_rows} rows cannot have a column each of {num_columns}")
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    row_of = np.full(num_columns, -1, np.int64)
    for row in range(num_rows):
        distance = np.full(num_columns, np.inf)
        before = np.full(num_columns, -1, np.int64)  # the column that a path comes from
        open_ = np.ones(num_columns, np.bool_)
        column, at, length = -1, row, 0.0
        while at >= 0:  # until a column is reached that no row has
            through = length + costs[at] - row_price[at] - column_price
            shorter = open_ & (through < distance)
            distance[shorter], before[shorter] = through[shorter], column
            column = int(np.where(open_, distance, np.inf).argmin())
            length, open_[column], at = float(distance[column]), False, int(row_of[column])
        seen = np.flatnonzero(~open_)
        shift = length - distance[seen]
        column_price[seen] -= shift
        row_price[row] += length
        taken = row_of[seen] >= 0
        row_price[row_of[seen][taken]] += shift[taken]
        while column >= 0:  # hand the columns of the path on, from its end
            previous = int(before[column])
            row_of[column] = row if previous < 0 else row_of[previous]
            column = previous
    columns = np.full(num_rows, -1, np.int64)
    owned = np.flatnonzero(row_of >= 0)
    columns[row_of[owned]] = owned
    return columns
