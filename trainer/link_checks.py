"""Checks that nodes make together: links, the clock, collectives and the shared run folder.

Invariant: a node that does not come, or leaves in the middle, is no reason for the others to stop.
Who came by the deadline makes the group, links are pairs with a process group of their own, and
every wait has an end.
"""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch's typing

from launcher.process import Process

from .config import RunConfig
from .node_checks import existing
from .readings import Reading, failed

_BYTES = {"cuda": 2**27, "cpu": 2**22}  # of what is summed over a group
_REPEATS = 3
_ROUNDS = 5  # in which clocks are compared: the median forgives a late one
_SKEW = 5.0  # seconds; logs and file times no longer tell what came first
_SLOWEST = 0.01  # GB/s of any network
_POLL = 0.05


class Meeting:
    """The processes that came in time, with the checks they make together.

    Raises:
        RuntimeError: if rank 0 cannot be reached, or began without this process.
    """

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        device: torch.device,
        host: str,
        *,
        doors: float,
        seconds: float,
    ) -> None:
        self._config, self._device, self._seconds = config, device, seconds
        self._store = _store(process, doors)
        came = _meet(self._store, process, host, doors=doors, slack=seconds / 8)
        self._names = names = [name for _, name in came]
        self._rank = [rank for rank, _ in came].index(process.rank)
        self._hosts = list(dict.fromkeys(names))
        self._leaders = [names.index(name) for name in self._hosts]
        self._mates = [rank for rank, name in enumerate(names) if name == host]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=self._rank,
            world_size=len(came),
            timeout=timedelta(seconds=seconds / 8),
        )

    def checks(self) -> list[tuple[str, Callable[[], Iterator[Reading]]]]:
        """Return the checks by name, in order: all processes make them all."""
        return [
            ("network", self.links),
            ("clock", self.clock),
            ("all-reduce in node", self.within_node),
            ("all-reduce", self.over_all),
            ("shared run folder", self.shared_folder),
        ]

    def links(self) -> Iterator[Reading]:
        """Measure the link from each node to the next in a ring of all.

        A link that is slow could be either end's fault; a node is slow by the better of its two.
        """
        rates, errors = [], []
        for turn, links in enumerate(ring(len(self._hosts))):
            pairs = [(self._leaders[first], self._leaders[second]) for first, second in links]
            pair = next((pair for pair in pairs if self._rank in pair), (self._rank, self._rank))
            other = self._names[pair[pair[0] == self._rank]]
            # Who waited in vain comes late to its next pair, which has to wait longer.
            limit = self._seconds / 24 * (turn + 1)
            try:
                rate = self._bandwidth(sorted(set(pair)), seconds=limit)
            except RuntimeError as error:
                said = failed("link", error, joint=True).error
                errors.append(f"no link to {other}: {said}")
                continue
            if rate is None:
                continue
            rates.append(rate)
            if self._rank == pair[0]:
                yield Reading(
                    check="link", where=f"to {other}", value=rate, unit="GB/s", share=0.5,
                    worst="warn",
                )  # fmt: skip
        if rates:
            yield Reading(
                check="network", value=max(rates), unit="GB/s", limit=_SLOWEST,
                # Between CPUs it is as fast as other work on the machines lets it be.
                share=0.5 if self._device.type == "cuda" else None,
            )  # fmt: skip
        for lost in errors:
            yield Reading(
                check="network", error=lost, joint=True, worst="warn" if rates else "fail"
            )

    def clock(self) -> Iterator[Reading]:
        """Compare this node's clock with rank 0's, as all leave a barrier."""
        skews = []
        for _ in range(_ROUNDS):
            self._barrier()
            now = torch.tensor([time.time()], dtype=torch.float64)
            times = [torch.empty_like(now) for _ in range(dist.get_world_size())]
            dist.all_gather(times, now)
            skews.append(times[self._rank].item() - times[0].item())
        if self._rank in self._leaders:
            skew = abs(statistics.median(skews))
            yield Reading(check="clock", value=skew, unit="s", better="low", limit=_SKEW)

    def within_node(self) -> Iterator[Reading]:
        """Sum over the processes of this node."""
        rate = self._bandwidth(self._mates, seconds=self._seconds / 8)
        if rate is not None and self._rank == self._mates[0]:
            yield Reading(
                check="all-reduce in node", value=rate, unit="GB/s", share=0.3,
                worst="fail" if self._device.type == "cuda" else "warn",
            )  # fmt: skip

    def over_all(self) -> Iterator[Reading]:
        """Sum over all processes, as a run does with its gradients."""
        everyone = list(range(dist.get_world_size()))
        rate = self._bandwidth(everyone, seconds=self._seconds / 8)
        if rate is not None and self._rank == 0:
            yield Reading(check="all-reduce", value=rate, unit="GB/s")

    def shared_folder(self) -> Iterator[Reading]:
        """Look on every node for a file that the first has written beside the run folder."""
        folder = existing(Path(self._config.run_dir))
        told: list[str | None] = [None]
        if self._rank == 0:
            told = [_leave_file(folder)]
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        path = Path(str(told[0]))
        seen = path.exists()
        self._barrier()
        if self._rank == 0:
            path.unlink(missing_ok=True)
        if self._rank in self._leaders and len(self._hosts) > 1:
            error = f"{folder} is another folder than on {self._hosts[0]}: use a shared one"
            yield Reading(check="shared run folder", value="seen", error="" if seen else error)

    def _bandwidth(self, ranks: list[int], *, seconds: float) -> float | None:
        """Return how many GB/s each of `ranks` sends while all of them sum a tensor.

        Whoever has nobody to do it with, and gets None, makes a group all the same: torch names a
        group after how many its process has made before, so that all have to make as many.

        Raises:
            RuntimeError: if one of them does not take part in time.
        """
        group = dist.new_group(
            ranks, timeout=timedelta(seconds=seconds), use_local_synchronization=True
        )
        assert isinstance(group, dist.ProcessGroup), "this process is one of them"
        if len(ranks) == 1:
            return None
        values = torch.zeros(_BYTES[self._device.type] // 4, device=self._device)
        times = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        # A ring sends every part of the tensor twice, but for a process's own share.
        sent = 2 * (len(ranks) - 1) / len(ranks) * _BYTES[self._device.type]
        return sent / min(times[1:]) / 1e9

    def _barrier(self) -> None:
        dist.all_reduce(torch.zeros(1))  # between CPUs: NCCL's would leave the host ahead


def ring(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Return the links (node, next node) of a ring by turns; links of a turn share no node."""
    if num_nodes < 3:
        return [[(0, 1)]] if num_nodes == 2 else []
    links = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    even = num_nodes - num_nodes % 2
    turns = [links[0:even:2], links[1:even:2], links[even:]]
    return [turn for turn in turns if turn]


def _store(process: Process, doors: float) -> TCPStore:
    try:
        return TCPStore(
            process.address,
            process.port,
            is_master=process.rank == 0,
            timeout=_until(doors),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"rank 0 does not answer at {process.address}:{process.port}: {error}"
        ) from None


def _until(moment: float) -> timedelta:
    """Return the time until a moment of the monotonic clock, a second at the least."""
    return timedelta(seconds=max(1.0, moment - time.monotonic()))


def _meet(
    store: TCPStore, process: Process, host: str, *, doors: float, slack: float
) -> list[tuple[int, str]]:
    """Return (rank, host) of those who came in time, the same to all of them."""
    store.set(f"host/{process.rank}", host)
    if process.rank == 0:
        came = _wait_for_all(store, process.world_size, doors)
        store.set("came", json.dumps([(rank, store.get(f"host/{rank}").decode()) for rank in came]))
    store.wait(["came"], _until(doors + slack))
    found = [(rank, name) for rank, name in json.loads(store.get("came"))]
    if process.rank not in dict(found):
        raise RuntimeError(f"rank {process.rank} came too late for the others")
    return found


def _wait_for_all(store: TCPStore, world_size: int, doors: float) -> list[int]:
    came: set[int] = set()
    while len(came) < world_size and time.monotonic() < doors:
        missing = set(range(world_size)) - came
        came |= {rank for rank in missing if store.check([f"host/{rank}"])}
        time.sleep(_POLL)
    return sorted(came)


def _leave_file(folder: Path) -> str:
    path = folder / f".preflight_{uuid.uuid4().hex}"
    path.touch()
    return str(path)
