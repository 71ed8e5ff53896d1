"""Any classifier of the timm library as a backbone: what `build("timm:NAME")` returns.

Invariant: the network is timm's own, its parameters' names behind `net.`; only batch norms and
drop path are ours, so that they obey recomputation, accumulation and the caller's keys.
timm holds a thousand networks to compare ours with; nothing else here needs it, so it is imported
when one of them is built.
"""

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backbone, Block, ModelError, keep_scale
from .layers import BatchNorm, drop_path

Pair = tuple[int, int]

# SplitMix64's multipliers (Steele, Lea and Flood, OOPSLA 2014), as signed numbers.
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Noise:
    """The drop-path noise [2, B] of one block, handed out branch by branch in a forward pass."""

    def __init__(self) -> None:
        self.values: Tensor | None = None
        # A tensor: a compiled block bakes in the value of a number.
        self.share = torch.ones((), device="cpu")
        self.calls = 0

    def next(self, size: int) -> Tensor | None:
        """The numbers [size] of the next branch, or None without noise.

        Some networks fold windows or patches into the batch: those share their sample's number.
        """
        if self.values is None:
            return None
        call, self.calls = self.calls, self.calls + 1
        row = self.values[call] if call < 2 else _hashed(self.values, call)
        return row.repeat_interleave(size // row.shape[0])


def _hashed(noise: Tensor, call: int) -> Tensor:
    """Uniform numbers [B] for the branches beyond the two that `noise` [2, B] is made for."""
    bits = (noise * 2**24).long()
    state = (bits[0] << 24 | bits[1]) * 64 + call
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        state = (state ^ (state >> shift)) * multiplier
    return (state >> 40 & 0xFFFFFF) * 2.0**-24


class DropPath(nn.Module):
    """Stochastic depth decided by the block's noise instead of the global generator."""

    def __init__(self, rate: float, noise: Noise) -> None:
        super().__init__()
        self.rate = rate
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """Drop a residual branch [B, ...] per sample; see `layers.drop_path`."""
        noise, rate = self.noise.next(x.shape[0]), self.rate * self.noise.share
        return drop_path(x, None if noise is None else keep_scale(noise, rate))


class ChannelsFirst(BatchNorm):
    """Our batch norm over [B, C, ...], with the activation that some of timm's carry."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map and activate it."""
        last = x.movedim(1, -1)
        normed = super().forward(last.reshape(x.shape[0], 1, -1, x.shape[1]))
        normed = normed.reshape(last.shape).movedim(-1, 1)
        if self.training:
            # timm works on it in place, which autograd forbids on views of a custom function.
            normed = normed.clone(memory_format=torch.contiguous_format)
        out: Tensor = self.act(self.drop(normed))
        return out


class TimmModel(Backbone):
    """timm's classifier `name`, built for images of `img_size` where it has to know their size.

    Its blocks are the modules that own a drop path; a network without any, or whose blocks share
    parameters (CoaT), is described as one part. `drop_path` is the rate of the last block (timm's
    drop_path_rate). Where blocks are numbered within stages, a fifth stage and later ones count as
    the fourth; otherwise a stage is a quarter of the blocks. It has one feature map: what timm's
    head takes, in timm's layout. Raises ModelError if timm is missing, knows no such model or
    cannot build it like this.
    """

    def __init__(self, name: str, *, img_size: Pair, drop_path: float, num_classes: int) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ModelError(f"drop_path is {drop_path}; it must be at least 0 and below 1")
        self.name = name
        self.size = img_size
        self.num_classes = num_classes
        side = img_size[0] if img_size[0] == img_size[1] else img_size
        # Without a rate timm makes no drop paths, and those tell the blocks.
        self._options: dict[str, Any] = {"img_size": side, "drop_path_rate": drop_path or 0.5}
        self.net: Any = self._create()
        if drop_path > 0 and "drop_path_rate" not in self._options:
            raise ModelError(f"timm:{name} has no drop path: drop_path is {drop_path}, set it to 0")
        self._noises = {block: Noise() for block in _find_blocks("net", self.net)}
        self.drop_path = tuple(
            _use_noise(self.get_submodule(block), noise, scale=float(drop_path > 0))
            for block, noise in self._noises.items()
        )
        _use_batch_norm(self.net)
        reductions = [entry["reduction"] for entry in getattr(self.net, "feature_info", [])]
        width, reduction = self.net.num_features, max(reductions, default=32)
        self.feature_info = [{"num_chs": width, "reduction": reduction, "module": "net"}]

    def _create(self) -> nn.Module:
        """A network as timm makes it; options that it does not know leave `self._options`."""
        timm = _timm()
        if self.name not in (known := timm.list_models()):
            nearest = get_close_matches(self.name, known, n=1, cutoff=0)[0]
            raise ModelError(f"unknown model 'timm:{self.name}'; the nearest is 'timm:{nearest}'")
        while True:
            try:
                net: nn.Module = timm.create_model(
                    self.name, pretrained=False, num_classes=self.num_classes, **self._options
                )
            except Exception as error:  # whatever timm meets, it was asked for what it cannot make
                unknown = [option for option in self._options if f"'{option}'" in str(error)]
                if not unknown or not isinstance(error, TypeError):
                    raise ModelError(
                        f"timm cannot build {self.name} for images of {self.size} pixels and "
                        f"{self.num_classes} classes: {error}"
                    ) from error
                del self._options[unknown[0]]
            else:
                return net

    def _fresh(self) -> nn.Module:
        """A network with the values that timm starts from, on the CPU."""
        with torch.device("cpu"):
            return self._create()

    def blocks(self) -> list[Block]:
        """Every part in the order in which timm registers them; see `Block`."""
        if _shares_parameters(self.net):
            return [Block("net", self.net, 1, 0, residual=False)]
        stages = _stages(list(self._noises))
        described: list[Block] = []
        depth = 0
        for name, module in self._parts("net", self.net):
            residual = name in self._noises
            stage = stages[min(depth, len(stages) - 1)]
            described.append(Block(name, module, stage, depth, residual))
            depth += residual
        return described

    def _parts(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The blocks within a module, and the largest modules around them that hold none."""
        if name in self._noises or not any(block.startswith(f"{name}.") for block in self._noises):
            if any(True for _ in module.parameters()):
                yield name, module
            return
        own = dict(module.named_parameters(recurse=False))
        if own:
            yield name, nn.ParameterDict(own)
        for child, submodule in module.named_children():
            yield from self._parts(f"{name}.{child}", submodule)

    def stages(self, x: Tensor, drop_noise: Tensor | None) -> list[Tensor]:
        """timm's features, alone in a list; of some networks, such as CrossViT, they are a list."""
        for index, noise in enumerate(self._noises.values()):
            # Kept after the pass: a block that is recomputed takes the same numbers again.
            noise.values = None if drop_noise is None else drop_noise[index]
            noise.share.fill_(self.drop_share)
        return [self.net.forward_features(x)]

    def _noise(self, x: Tensor, drop_noise: Tensor | None) -> Tensor | None:
        return super()._noise(x, drop_noise) if self.drop_path else None

    def pool(self, x: Tensor) -> Tensor:
        """What the linear head sees [B, C] of timm's features."""
        pooled: Tensor = self.net.forward_head(x, pre_logits=True)
        return pooled

    def classify(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of timm's features."""
        logits: Tensor = self.net.forward_head(x)
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head; see `Backbone.reset_classifier`."""
        self.num_classes = num_classes
        self.net.reset_classifier(num_classes)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As timm does, from torch's global generator on the CPU."""
        values = dict(_tensors(self._fresh()))
        for name, tensor in _tensors(self.net):
            tensor.copy_(values[name])

    @torch.no_grad()
    def reset_buffers(self, size: Pair) -> None:
        """Restore the buffers that timm computes when it builds the network.

        Raises ModelError for another size than it was built for, where the network depends on it.
        """
        if size != self.size and "img_size" in self._options:
            raise ModelError(
                f"timm:{self.name} is built for images of {self.size} pixels and cannot change to "
                f"{size}; build it with that img_size"
            )
        self.size = size
        kept = self.net.state_dict()
        computed = [(name, buffer) for name, buffer in self.net.named_buffers() if name not in kept]
        if computed:
            with torch.random.fork_rng(devices=[]):
                values = dict(self._fresh().named_buffers())
            for name, buffer in computed:
                buffer.copy_(values[name])

    @property
    def model_args(self) -> dict[str, Any]:
        """What `timm.create_model` needs, beside name and classes, to build this network again."""
        return {name: self._options[name] for name in ("img_size",) if name in self._options}

    def no_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """timm's rule: vectors, biases, and what the network itself names."""
        named: Callable[[], Any] = getattr(self.net, "no_weight_decay", tuple)
        if parameter.dim() <= 1 or name.endswith(".bias"):
            return True
        return any(fnmatch(name.removeprefix("net."), pattern) for pattern in named())


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"models called timm:NAME need the timm library ({error}); "
            "install it: pip install 'timm>=1.0.22,<2'"
        ) from error
    return timm


def _find_blocks(name: str, net: nn.Module) -> Iterator[str]:
    """The names of the outermost modules of those classes that own a drop path somewhere."""
    kind = _timm().layers.DropPath
    owners = {
        type(module)
        for module in net.modules()
        if any(isinstance(child, kind) for child in module.children())
    }

    def visit(name: str, module: nn.Module) -> Iterator[str]:
        if type(module) in owners:
            yield name
            return
        for child, submodule in module.named_children():
            yield from visit(f"{name}.{child}", submodule)

    return visit(name, net)


def _use_noise(block: nn.Module, noise: Noise, *, scale: float) -> float:
    """Let the drop paths of a block take `noise`; return the highest of their rates × `scale`."""
    kind = _timm().layers.DropPath
    highest = 0.0
    for module in list(block.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                rate = scale * child.drop_prob
                setattr(module, name, DropPath(rate, noise))
                highest = max(highest, rate)
    block.forward = partial(_restarted, noise, block.forward)
    return highest


def _restarted(noise: Noise, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A block's forward pass whose first branch takes the first number, when recomputed too."""
    noise.calls = 0
    return forward(*args, **options)


def _use_batch_norm(net: nn.Module) -> None:
    """Put our batch norm in the place of torch's, under the same names."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, ChannelsFirst(child))


def _stages(blocks: list[str]) -> list[int]:
    """The stage (1 to 4) of each block by the numbers in its name, never falling."""
    numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in blocks]
    if max(map(len, numbers), default=0) < 2:
        return [1 + 4 * index // len(blocks) for index in range(len(blocks))] or [1]
    lowest = min(places[0] for places in numbers if places)
    stages = [1]
    for places in numbers:
        stage = 1 + min(places[0] - lowest, 3) if places else 1
        stages.append(max(stage, stages[-1]))
    return stages[1:]


def _shares_parameters(net: nn.Module) -> bool:
    names = net.named_parameters(remove_duplicate=False)
    return len(list(names)) > len(list(net.parameters()))


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()
