"""Shares: which part of every tensor this rank holds, writes, and copies for a save.

The invariant: over all ranks, every number of the state is written exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .shardfile import Box, Piece

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SLAB, _ALIGNMENT = 2**26, 64  # bytes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def held(tensor: Tensor) -> tuple[Tensor, Box]:
    """Return what this rank holds of a tensor, sharing its memory, and where that lies in it."""
    if not isinstance(tensor, DTensor):
        return tensor, Box.whole(tensor.shape)
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    for count, index, placement in _layout(tensor):
        if isinstance(placement, Shard):
            # As torch.chunk: parts of equal size, of which the last are smaller or empty.
            rest = sizes[placement.dim]
            size = -(-rest // count)
            begin = min(index * size, rest)
            offsets[placement.dim] += begin
            sizes[placement.dim] = min(size, rest - begin)
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(sizes), f"{tuple(local.shape)} is not the share {sizes}"
    return local, Box(tuple(offsets), tuple(sizes))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be divided by rows; all ranks that share it must call.

    In the collective of `DTensor.full_tensor`, processes that talk by gloo crashed, or waited for
    ever in the destructor of a buffer (torch 2.14.1).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, f"{placement} is not by rows"
            count, rows = tensor.device_mesh.size(dim), len(tensor)
            part = local.new_zeros(-(-rows // count), *local.shape[1:])
            part[: len(local)] = local
            parts = local.new_empty(count * len(part), *local.shape[1:])
            dist.all_gather_into_tensor(parts, part, group=tensor.device_mesh.get_group(dim))
            local = parts[:rows]
    return local


def written(tensor: Tensor, *, turn: int, rank: int, world_size: int) -> tuple[Tensor, Box] | None:
    """Return what this rank writes of a tensor, and where that lies in it; None if nothing.

    What several ranks hold alike is divided among them by rows. `turn` numbers the tensors: what
    is left over falls to other ranks each time.
    """
    copy, copies = rank, world_size
    if isinstance(tensor, DTensor):
        copy, copies = 0, 1
        for count, index, placement in _layout(tensor):
            if isinstance(placement, Replicate):
                copy, copies = copy * count + index, copies * count
    local, box = held(tensor)
    part = box.share((copy + turn) % copies, copies)
    return None if part is None else (local[part.within(box)], part)


def _layout(tensor: DTensor) -> list[tuple[int, int, Placement]]:
    """Return (ranks, this rank's place, placement) for each dimension of a tensor's mesh."""
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "this rank is no part of the tensor's mesh"
    for placement in tensor.placements:  # a subclass may divide otherwise
        assert type(placement) in (Shard, Replicate), f"{placement} cannot be saved"
    return list(zip(tensor.device_mesh.shape, place, tensor.placements, strict=True))


class HostCopy:
    """This rank's share of the state, copied to memory of the host that every save uses again.

    The memory comes in slabs: buffers of their own, between tensors that come and go, would leave
    holes, and pinned ones are rounded up to a power of two each.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._slabs: list[Tensor] = []
        self._slab, self._end = 0, 0  # what is filled: all slabs before, this one up to the end

    @torch.no_grad()
    def take(self, state: Iterable[tuple[str, Tensor]]) -> list[tuple[Piece, memoryview]]:
        """Copy this rank's share tensor by tensor; the answer holds until the next call."""
        self._slab, self._end = 0, 0
        pieces = []
        for turn, (name, tensor) in enumerate(state):
            part = written(tensor, turn=turn, rank=self.rank, world_size=self.world_size)
            if part is None:
                continue
            source, box = part
            buffer = self._buffer(source.nbytes)
            copy = buffer.view(source.dtype).view(source.shape)
            copy.copy_(source, non_blocking=True)
            piece = Piece(name, _NAMES[source.dtype], tuple(tensor.shape), box)
            pieces.append((piece, buffer.numpy().data))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return pieces

    def _buffer(self, size: int) -> Tensor:
        """The next `size` free bytes, uint8 [size]."""
        begin = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        while self._slab < len(self._slabs) and begin + size > self._slabs[self._slab].nbytes:
            self._slab, begin = self._slab + 1, 0
        if self._slab == len(self._slabs):
            pinned = torch.cuda.is_available()  # a device copies straight into it
            slab = torch.empty(max(size, _SLAB), dtype=torch.uint8, pin_memory=pinned)
            self._slabs.append(slab)
        self._end = begin + size
        return self._slabs[self._slab][begin : self._end]
