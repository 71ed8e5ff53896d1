"""Checks of the device of one process: what it computes per second, and what nvidia-smi says."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod

import torch
import torch.nn.functional as F

from launcher.process import Process
from models.base import Backbone

from . import nvidia_smi
from .config import RunConfig
from .group import gpu_index
from .readings import Reading

_STAGE = 2  # the third stage: most blocks are there
_EXPANSION = 4  # of a block's perceptron, about
_CPU_FLOP = 1e9  # of one multiplication there: a fraction of a second
_MOST_IMAGES = 256
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REPEATS = 5
_CALLS = 20  # on a GPU, between two looks at the clock


def device_kind() -> Iterator[Reading]:
    """Which devices torch sees on this node, the same on each.

    Raises:
        RuntimeError: if nvidia-smi sees GPUs that torch does not, or fails.
    """
    listed, hidden = nvidia_smi.listed(), os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if hidden is None and count < listed:
        raise RuntimeError(f"nvidia-smi lists {listed} GPUs, torch sees {count}")
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    yield Reading(
        check="device", value=f"{count} × {', '.join(names)}" if count else "CPU", better="same"
    )


class Device:
    """The GPU of a process, or the CPU, with the checks of it.

    Raises:
        UserError: if there is no GPU left for it.
    """

    def __init__(self, config: RunConfig, process: Process, model: Backbone) -> None:
        self._config, self._process = config, process
        self._channels = [stage["num_chs"] for stage in model.feature_info]
        self._sides = [config.model.img_size // s["reduction"] for s in model.feature_info]
        self.device, self._where = torch.device("cpu"), ""
        if torch.cuda.is_available():
            index = gpu_index(process, torch.cuda.device_count())
            self.device, self._where = torch.device("cuda", index), f"GPU {index}"
            self._uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"

    def checks(self) -> list[tuple[str, Callable[[], Iterator[Reading]]]]:
        """Return the checks by name, in order."""
        compute: list[tuple[str, Callable[[], Iterator[Reading]]]] = [
            ("matrix product", self.matmul),
            ("convolution", self.convolution),
        ]
        if self.device.type == "cpu":
            return compute
        return [("strangers on GPU", self.strangers), *compute, ("state of GPU", self.state)]

    def strangers(self) -> Iterator[Reading]:
        """Processes of others on this GPU; this one has not touched it yet."""
        asked = nvidia_smi.command(self._uuid, "compute-apps", nvidia_smi.PROCESSES)
        yield from nvidia_smi.process_readings(_answer(asked), self._where)
        torch.cuda.set_device(self.device)

    def matmul(self) -> Iterator[Reading]:
        """The rate of a matrix product as in a perceptron of the third stage."""
        call, flop = self._product()
        yield self._rate("matrix product", call, flop)

    def convolution(self) -> Iterator[Reading]:
        """The rate of the convolution that leads into the third stage."""
        inputs, outputs = self._channels[_STAGE - 1 : _STAGE + 1]
        side = self._sides[_STAGE]
        flop_per_image = 2 * 9 * inputs * outputs * side**2
        images = self._images(flop_per_image)
        images_BCHW = self._random(images, inputs, 2 * side, 2 * side)
        weight_OIHW = self._random(outputs, inputs, 3, 3)
        yield self._rate(
            "convolution",
            lambda: F.conv2d(images_BCHW, weight_OIHW, stride=2, padding=1),
            images * flop_per_image,
        )

    def state(self) -> Iterator[Reading]:
        """What nvidia-smi says of the GPU while it works."""
        call, _ = self._product()
        asked = nvidia_smi.command(self._uuid, "gpu", nvidia_smi.STATE)
        answer = _answer(asked, meanwhile=lambda: self._timed(call, _CALLS))
        yield from nvidia_smi.state_readings(answer, self._where)
        asked = nvidia_smi.command(self._uuid, "remapped-rows", nvidia_smi.ROWS)
        yield from nvidia_smi.row_readings(_answer(asked), self._where)

    def _product(self) -> tuple[Callable[[], object], float]:
        width, tokens = self._channels[_STAGE], self._sides[_STAGE] ** 2
        flop_per_image = 2 * tokens * width * _EXPANSION * width
        images = self._images(flop_per_image)
        tokens_TC = self._random(images * tokens, width)
        weight_CE = self._random(width, _EXPANSION * width)
        return lambda: tokens_TC @ weight_CE, images * flop_per_image

    def _images(self, flop_per_image: float) -> int:
        """Return a process's share of a micro-batch, or fewer images where that takes long."""
        train = self._config.train
        share = train.batch_size // (train.accumulate * self._process.world_size)
        most = _MOST_IMAGES if self.device.type == "cuda" else int(_CPU_FLOP / flop_per_image)
        return max(1, min(share, most))

    def _random(self, *shape: int) -> torch.Tensor:
        """Return random numbers, small, so that their sums fit into any type."""
        kind = _TYPES[self._config.train.precision] if self.device.type == "cuda" else torch.float32
        return torch.randn(shape, dtype=kind, device=self.device).div_(prod(shape[1:]) ** 0.5)

    def _rate(self, name: str, call: Callable[[], object], flop: float) -> Reading:
        """Return what the fastest of several calls computes per second.

        Other work on the machine makes a CPU slow, which says nothing about the node.
        """
        on_gpu = self.device.type == "cuda"
        calls = _CALLS if on_gpu else 1
        seconds = min(self._timed(call, calls) for _ in range(_REPEATS)) / calls
        return Reading(
            check=name,
            where=self._where,
            value=flop / seconds / 1e12,
            unit="TFLOP/s",
            share=0.15 if on_gpu else 0.5,
            worst="fail" if on_gpu else "warn",
        )

    def _timed(self, call: Callable[[], object], calls: int) -> float:
        call()  # what comes up with the first call, and a clock that has to rise
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _answer(command: list[str], meanwhile: Callable[[], object] | None = None) -> str:
    """Return what a command prints; `meanwhile` is called again and again while it runs.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while meanwhile is not None and process.poll() is None:
            meanwhile()
        code = process.wait()
        output.seek(0)
        text = output.read()
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} fails: {text.strip()}")
    return text
