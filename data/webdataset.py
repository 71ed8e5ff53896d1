"""Random access to samples in indexed tar shards (the WebDataset layout).

Owns the memory maps of the shards. Invariant: sample ids number the samples shard after shard in
the manifest's order, and a sample whose bytes do not match their CRC is never returned.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.base import DataError, Sample
from data.index import Columns, Manifest, check_shard, member_name


class TarSource:
    """The `Source` over a folder of tar shards with their manifest.

    Opening checks the size of every shard and the hash of every index; reading checks the
    sample's CRC. Raises DataError naming the shard and the remedy.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        manifest = Manifest.load(self._folder)
        self._shards = manifest.shards
        self._columns: list[Columns] = [check_shard(self._folder, s) for s in manifest.shards]
        self._maps = [_map_file(self._folder / shard.name) for shard in manifest.shards]
        counts = [shard.num_samples for shard in manifest.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.fingerprint = manifest.fingerprint
        self.classes = manifest.classes
        self.labels: NDArray[np.int64] = np.concatenate(
            [columns["label"] for columns in self._columns]
        ).astype(np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, id: int) -> Sample:
        """Return sample `id`; raises DataError naming shard and member if its bytes changed."""
        shard, row = self._locate(id)
        columns = self._columns[shard]
        offset = int(columns["offset"][row])
        image = self._maps[shard][offset : offset + int(columns["size"][row])]
        if zlib.crc32(image) != columns["crc32"][row]:
            raise DataError(
                f"{self.name(id)} has changed since it was indexed; restore the shard, or run "
                f"`foveate data index {self._folder}`"
            )
        return Sample(id=id, image=image, label=int(columns["label"][row]))

    def name(self, id: int) -> str:
        """Return `SHARD:MEMBER (sample id)`."""
        shard, row = self._locate(id)
        offset = int(self._columns[shard]["offset"][row])
        member = member_name(self._maps[shard][offset - 512 : offset])
        return f"{self._folder / self._shards[shard].name}:{member} (sample {id})"

    def _locate(self, id: int) -> tuple[int, int]:
        """Return the shard's index and the row in it."""
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return shard, id - int(self._ends[shard] - self._shards[shard].num_samples)


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
