"""TransXNet (Lou et al., arXiv 2310.19380): every size, any input size, official parameter names.

Invariant: maps are channels-last [B, H, W, C] from stem to head; 1x1 convolutions are linear
layers. Shapes: B batch, H×W stage grid, N = H·W, M keys, C width, c = C/2, h heads, G groups of
dynamic kernels, K their side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Backbone, Block, drop_path_rates, stage_grids
from .kernels import adaptive_pool, dynamic_conv, relative_attention
from .kernels.eager import widen
from .layers import (
    BatchNorm,
    Conv,
    Depthwise,
    GroupNorm,
    LayerScale,
    MultiScaleConv,
    Pointwise,
    add_branch,
    norm_conv,
    norm_linear,
)

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TransXNetConfig:
    """What makes one size: four entries each, one per stage.

    `groups` are the dynamic kernels mixed per sample, `kernel` their side. `drop_path` is the
    published rate of the last block. `pretrain_size` is the input side of the position tables.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    drop_path: float
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 4)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    kernel: int = 7
    stem_stride: int = 4
    layer_scale: float = 1e-5
    pretrain_size: int = 224


class ConvBN(nn.Module):
    """A convolution and its batch norm, named as in the official files."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = BatchNorm(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, H', W', C']."""
        out: Tensor = self.bn(self.conv(x))
        return out


class PatchEmbed(nn.Module):
    """A strided convolution that starts a stage."""

    def __init__(self, channels: int, width: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = ConvBN(Conv(channels, width, kernel, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, H', W', C']."""
        out: Tensor = self.proj(x)
        return out


class DynamicConv(nn.Module):
    """Input-dependent depthwise convolution (IDConv): each sample mixes its kernel from G.

    `proj` sees the map twice, pooled to K×K for the kernel and to 1×1 for the bias, so in
    training its batch norm normalises and moves its statistics twice.
    """

    def __init__(self, width: int, *, groups: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(groups, width))
        self.proj = nn.Sequential(
            ConvBN(Pointwise(width, width // 4, bias=False)),
            Pointwise(width // 4, groups * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, c] -> [B, H, W, c]."""
        kernels = widen(self.weight).permute(2, 3, 0, 1)
        weight = (self._mixture(x, side=self.weight.shape[-1]) * kernels).sum(dim=-2)
        bias = (self._mixture(x, side=1) * widen(self.bias)).sum(dim=-2)
        return dynamic_conv(x, weight.to(x.dtype), bias.flatten(1).to(x.dtype))

    def _mixture(self, x: Tensor, *, side: int) -> Tensor:
        """The share of each group at each kernel cell, [B, side, side, G, c], at least float32."""
        reduce, expand = self.proj
        pooled = adaptive_pool(x, (side, side))
        logits: Tensor = expand(F.gelu(reduce(pooled)))
        return widen(logits.view(*logits.shape[:3], *self.bias.shape)).softmax(dim=-2)


class OverlappingAttention(nn.Module):
    """Spatial-reduction attention over overlapping patches (OSRA), with a position table."""

    def __init__(self, width: int, *, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Pointwise(width, width)
        self.kv = Pointwise(width, 2 * width)
        self.sr = nn.Sequential()
        if sr_ratio > 1:
            patches = Depthwise(width, sr_ratio + 3, stride=sr_ratio, bias=False)
            self.sr = nn.Sequential(ConvBN(patches), ConvBN(Depthwise(width, 1, bias=False)))
        self.local_conv = Depthwise(width, 3)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, H, W, c], position [h, N, M] -> [B, H, W, c]."""
        reduced = x
        if len(self.sr) > 0:
            reduced = self.sr[1](F.gelu(self.sr[0](x)))
        reduced = reduced + self.local_conv(reduced)
        return relative_attention(
            self.q(x), self.kv(reduced), position=position, num_heads=self.num_heads
        )


class Mixer(nn.Module):
    """D-Mixer: half of the channels by dynamic convolution, half by attention, then squeezed."""

    def __init__(
        self, width: int, *, groups: int, kernel: int, num_heads: int, sr_ratio: int
    ) -> None:
        super().__init__()
        half, hidden = width // 2, max(16, width // 8)
        self.local_unit = DynamicConv(half, groups=groups, kernel=kernel)
        self.global_unit = OverlappingAttention(half, num_heads=num_heads, sr_ratio=sr_ratio)
        self.proj = nn.Sequential(
            Depthwise(width, 3),
            nn.GELU(),
            BatchNorm(width),
            Pointwise(width, hidden),
            nn.GELU(),
            BatchNorm(hidden),
            Pointwise(hidden, width),
            BatchNorm(width),
        )

    def forward(self, x: Tensor, position: Tensor, scale: LayerScale | None = None) -> Tensor:
        """x [B, H, W, C], position [h, N, M] -> [B, H, W, C], scaled if so asked."""
        near, far = x.chunk(2, dim=-1)
        x = torch.cat([self.local_unit(near), self.global_unit(far, position)], dim=-1)
        parts: list[Any] = list(self.proj)
        conv, _, norm, squeeze, _, squeezed_norm, expand, last_norm = parts
        squeezed = norm_linear(conv(x), norm, squeeze)
        expanded = norm_linear(squeezed, squeezed_norm, expand)
        if scale is not None:
            return scale.onto(last_norm.scaled(expanded, scale), x)
        out: Tensor = x + last_norm(expanded)
        return out


class FeedForward(nn.Module):
    """Multi-scale feed-forward network (MS-FFN)."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = width * ratio
        self.fc1 = nn.Sequential(Pointwise(width, hidden, bias=False), nn.GELU(), BatchNorm(hidden))
        self.dwconv = MultiScaleConv(hidden)
        self.norm = BatchNorm(hidden)
        self.fc2 = nn.Sequential(Pointwise(hidden, width, bias=False), BatchNorm(width))

    def forward(self, x: Tensor, scale: LayerScale | None = None) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C], scaled if so asked."""
        parts: list[Any] = [*self.fc1, *self.fc2]
        expand, _, norm, project, last_norm = parts
        mixed = norm_linear(norm_conv(expand(x), norm, self.dwconv), self.norm, project)
        out: Tensor = last_norm(mixed) if scale is None else last_norm.scaled(mixed, scale)
        return out


class ResidualBlock(nn.Module):
    """Position by convolution, then D-Mixer and MS-FFN, each normed, scaled and dropped."""

    def __init__(self, mixer: Mixer, width: int, *, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = Depthwise(width, 7)
        self.norm1 = GroupNorm(width)
        self.token_mixer = mixer
        self.norm2 = GroupNorm(width)
        self.mlp = FeedForward(width, mlp_ratio)
        self.layer_scale_1 = LayerScale(width)
        self.layer_scale_2 = LayerScale(width)

    def forward(self, x: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
        """x [B, H, W, C], position [h, N, M], keep [2, B] or None -> [B, H, W, C]."""
        first, second = (None, None) if keep is None else keep.unbind()
        x = self.pos_embed.residual(x)
        mixed = self.token_mixer(self.norm1(x), position, self.layer_scale_1)
        x = add_branch(x, mixed, first)
        fed = self.mlp(self.norm2(x), self.layer_scale_2)
        return add_branch(x, fed, second)


class TransXNet(Backbone):
    """The backbone; `network` alternates stages (even places) and downsamplings (odd places).

    The position tables `relative_pos_enc` fit `pretrain_size` (default: the configuration's);
    at any other size their [N, M] matrices are resized as images, as published.
    """

    def __init__(
        self,
        config: TransXNetConfig,
        *,
        img_size: Pair,
        pretrain_size: Pair | None,
        drop_path: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.drop_path = drop_path_rates(drop_path, num_blocks=sum(config.depths))
        stride = config.stem_stride
        self.patch_embed = PatchEmbed(3, config.widths[0], kernel=2 * stride - 1, stride=stride)
        self.relative_pos_enc = nn.ParameterList(
            torch.empty(1, heads, queries, keys)
            for heads, (queries, keys) in zip(
                config.heads,
                self._table_shapes(pretrain_size or (config.pretrain_size,) * 2),
                strict=True,
            )
        )
        self.network = nn.ModuleList()
        for stage, width in enumerate(config.widths):
            if stage > 0:
                before = config.widths[stage - 1]
                self.network.append(PatchEmbed(before, width, kernel=3, stride=2))
            self.network.append(nn.ModuleList(self._stage_blocks(stage)))
        self.classifier = nn.Sequential(
            GroupNorm(config.widths[3]), nn.Identity(), Pointwise(config.widths[3], num_classes)
        )
        self.feature_info = [
            {"num_chs": width, "reduction": stride * 2**stage, "module": f"network.{2 * stage}"}
            for stage, width in enumerate(config.widths)
        ]
        self.reset_buffers(img_size)

    def _stage_blocks(self, stage: int) -> Iterator[ResidualBlock]:
        config, width = self.config, self.config.widths[stage]
        for _ in range(config.depths[stage]):
            mixer = Mixer(
                width,
                groups=config.groups[stage],
                kernel=config.kernel,
                num_heads=config.heads[stage],
                sr_ratio=config.sr_ratios[stage],
            )
            yield ResidualBlock(mixer, width, mlp_ratio=config.mlp_ratios[stage])

    def _table_shapes(self, size: Pair) -> list[Pair]:
        """Queries and keys of each stage for inputs of `size`."""
        grids = stage_grids(size, stem_stride=self.config.stem_stride)
        return [
            (rows * columns, -(-rows // ratio) * -(-columns // ratio))
            for (rows, columns), ratio in zip(grids, self.config.sr_ratios, strict=True)
        ]

    def blocks(self) -> list[Block]:
        """Every part in the order of the forward pass; see `Block`."""
        parts = [
            Block("patch_embed", self.patch_embed, 1, 0, residual=False),
            Block("relative_pos_enc", self.relative_pos_enc, 1, 0, residual=False),
        ]
        depth = 0
        for place, module in enumerate(self.network):
            name, stage = f"network.{place}", place // 2 + 1
            if place % 2 == 1:
                parts.append(Block(name, module, stage + 1, depth, residual=False))
                continue
            for index, block in enumerate(module.children()):
                parts.append(Block(f"{name}.{index}", block, stage, depth))
                depth += 1
        return [*parts, Block("classifier", self.classifier, 4, depth, residual=False)]

    def stages(self, x: Tensor, drop_noise: Tensor | None) -> list[Tensor]:
        """The outputs [B, C, H, W] of the last block of every stage."""
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        keep = self._keep(drop_noise)
        outputs, depth = [], 0
        for place, module in enumerate(self.network):
            if place % 2 == 1:
                x = module(x)
                continue
            position = self._position(place // 2)
            for block in module.children():
                x = block(x, position, None if keep is None else keep[depth])
                depth += 1
            outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def _position(self, stage: int) -> Tensor:
        """The position table [h, N, M] of a stage (0 to 3) at the current size."""
        table, shape = widen(self.relative_pos_enc[stage]), self._table_shapes(self.size)[stage]
        if table.shape[2:] != shape:
            table = F.interpolate(table, shape, mode="bicubic")
        return table[0]

    def pool(self, x: Tensor) -> Tensor:
        """Norm, then mean over the map."""
        pooled: Tensor = self.classifier[0](x.permute(0, 2, 3, 1)).mean(dim=(1, 2))
        return pooled

    def classify(self, x: Tensor) -> Tensor:
        """Pool, then the linear head."""
        logits: Tensor = self.classifier[2](self.pool(x))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head, keeping its norm; see `Backbone.reset_classifier`."""
        self.num_classes = num_classes
        self.classifier[2] = nn.Identity()
        if num_classes > 0:
            head = Pointwise(self.config.widths[3], num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.get_parameter("bias"))
            self.classifier[2] = head.to(self.device)

    def reset_buffers(self, size: Pair) -> None:
        """Accept inputs of `size`; the position tables are parameters, resized on the fly."""
        self.size = size

    def no_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """Vectors and biases (the dynamic convolution's matrix of biases included)."""
        return parameter.dim() == 1 or name.endswith(".bias")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published: convolutions and dynamic kernels N(0, 0.02), tables 0, layer scale 1e-5."""
        for module in self.modules():
            if isinstance(module, LayerScale):
                nn.init.constant_(module.weight, self.config.layer_scale)
            elif isinstance(module, nn.Conv2d | DynamicConv):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, DynamicConv):
                nn.init.trunc_normal_(module.bias, std=0.02)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm | nn.GroupNorm):
                module.reset_parameters()
        for table in self.relative_pos_enc:
            nn.init.zeros_(table)
