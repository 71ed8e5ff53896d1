"""TransNeXt (Shi, arXiv 2311.17132): every size, any input size, official parameter names.

Invariant: what depends on resolution is in `geometry`, shared by the blocks of a stage and never
part of the state dict.
Shapes: B batch, H×W stage grid, N = H·W tokens, C width, h heads, M pooled tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Backbone, Block, ModelError, drop_path_rates, stage_grids
from .geometry import BUFFERS, Geometry, Pair, StagePlan, stage_geometry, stage_plan
from .kernels import aggregated_attention, conv_glu, cosine_attention, pooled_gelu
from .kernels.choice import exporting
from .layers import Conv, Depthwise, Pointwise, add_branch
from .position import PositionBias

PositionMode = Literal["extrapolate", "interpolate"]


@dataclass(frozen=True, kw_only=True)
class TransNeXtConfig:
    """What makes one size: four entries each, one per stage.

    A spatial reduction ratio of 1 makes a stage attend globally; above 1 it aggregates the 3x3
    window and a view pooled by that ratio. `drop_path` is the published rate of the last block.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    drop_path: float
    mlp_ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    stem_stride: int = 4


class AggregatedAttention(PositionBias):
    """Window and pooled attention of the stages with a spatial reduction ratio above 1."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        head_width = width // num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_width))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, 9))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_width, 9))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, 9))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = Pointwise(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, num_heads)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C]."""
        pooled = self.norm(pooled_gelu(self.sr(x), geometry.plan.pool).flatten(1, 2))
        mixed = aggregated_attention(
            self.q(x),
            *_linear_halves(self.kv, x),
            *_linear_halves(self.kv, pooled),
            query_embedding=self.query_embedding,
            temperature=self.temperature,
            key_count=geometry.key_count,
            local_bias=self.relative_pos_bias_local[:, None],
            pool_bias=self.position_bias(geometry),
            tokens=self.learnable_tokens,
            token_bias=self.learnable_bias,
            outside=geometry.outside,
        )
        out: Tensor = self.proj(mixed)
        return out


def _linear_halves(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a linear layer's output, each contiguous: two products and no split."""
    (first, second), (first_bias, second_bias) = layer.weight.chunk(2), layer.bias.chunk(2)
    return F.linear(x, first, first_bias), F.linear(x, second, second_bias)


class Attention(PositionBias):
    """Global cosine attention of a stage with spatial reduction ratio 1."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, width // num_heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, num_heads)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C]."""
        mixed = cosine_attention(
            self.qkv(x),
            query_embedding=self.query_embedding,
            temperature=self.temperature,
            key_count=geometry.key_count,
            bias=self.position_bias(geometry),
        )
        out: Tensor = self.proj(mixed)
        return out


class DepthwiseConv(nn.Module):
    """Holds the 3x3 depthwise weights under their official name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = Depthwise(width, 3)


class ConvGLU(nn.Module):
    """Gated feed-forward whose gate sees its 3x3 neighbourhood."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = 2 * width * ratio // 3
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C]."""
        gate, value = _linear_halves(self.fc1, x)
        return conv_glu(gate, value, *self.dwconv.dwconv.parameters(), *self.fc2.parameters())


class ResidualBlock(nn.Module):
    """x + DropPath(attention(norm(x))), then x + DropPath(ConvGLU(norm(x))).

    With a layer scale, each branch is multiplied by a gain a channel before it is added.
    """

    layer_scale_1: nn.Parameter | None
    layer_scale_2: nn.Parameter | None

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        mlp_ratio: int,
        sr_ratio: int,
        layer_scale: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        mixer = Attention if sr_ratio == 1 else AggregatedAttention
        self.attn = mixer(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = ConvGLU(width, mlp_ratio)
        for name in ("layer_scale_1", "layer_scale_2"):
            gain = nn.Parameter(torch.empty(width)) if layer_scale else None
            self.register_parameter(name, gain)

    def forward(self, x: Tensor, geometry: Geometry, keep: Tensor | None) -> Tensor:
        """x [B, H, W, C], keep [2, B] or None -> [B, H, W, C]."""
        first, second = (None, None) if keep is None else keep.unbind()
        mixed = _times(self.attn(self.norm1(x), geometry), self.layer_scale_1)
        x = add_branch(x, mixed, first)
        fed = _times(self.mlp(self.norm2(x)), self.layer_scale_2)
        return add_branch(x, fed, second)


def _times(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x * gain


class PatchEmbed(nn.Module):
    """A strided convolution and a norm: the start of a stage."""

    def __init__(self, channels: int, width: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = Conv(channels, width, kernel, stride=stride)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C_in] -> [B, H', W', C]."""
        out: Tensor = self.norm(self.proj(x))
        return out


class TransNeXt(Backbone):
    """The backbone; stage i is `patch_embed{i}`, the list `block{i}` and `norm{i}`.

    `pretrain_size` scales the coordinates of the position bias (default: `img_size`);
    `fixed_pool_size` pools every aggregating stage to that many cells a side at any input size.
    At another input size than `img_size`, `position_mode` "extrapolate" (the default) evaluates
    the bias there and "interpolate" resizes the one of `img_size`. `layer_scale` is the initial
    gain of every residual branch (CaiT, arXiv 2103.17239), which keeps deep and wide variants
    stable at the start; None, as published, leaves the gains out. Raises ModelError for a
    `fixed_pool_size` beyond a grid.
    """

    def __init__(
        self,
        config: TransNeXtConfig,
        *,
        img_size: Pair,
        pretrain_size: Pair | None,
        fixed_pool_size: int | None,
        position_mode: PositionMode | None,
        layer_scale: float | None,
        drop_path: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        if position_mode not in (None, *get_args(PositionMode)):
            modes = " or ".join(get_args(PositionMode))
            raise ModelError(f"position_mode is {position_mode!r}; it must be {modes}")
        self.config = config
        self.img_size = img_size
        self.pretrain_size = pretrain_size or img_size
        self.fixed_pool_size = fixed_pool_size
        self.position_mode = position_mode
        self.layer_scale = layer_scale
        self.num_classes = num_classes
        self.drop_path = drop_path_rates(drop_path, num_blocks=sum(config.depths))
        for stage in range(4):
            self._add_stage(stage)
        self.head: nn.Module = nn.Linear(config.widths[3], num_classes)
        self.feature_info = [
            {
                "num_chs": width,
                "reduction": config.stem_stride * 2**stage,
                "module": f"norm{stage + 1}",
            }
            for stage, width in enumerate(config.widths)
        ]
        self.reset_buffers(img_size)

    def _add_stage(self, stage: int) -> None:
        config, number = self.config, stage + 1
        width = config.widths[stage]
        if stage == 0:
            stride = config.stem_stride
            embed = PatchEmbed(3, width, kernel=2 * stride - 1, stride=stride)
        else:
            embed = PatchEmbed(config.widths[stage - 1], width, kernel=3, stride=2)
        blocks = nn.ModuleList(
            ResidualBlock(
                width,
                num_heads=config.heads[stage],
                mlp_ratio=config.mlp_ratios[stage],
                sr_ratio=config.sr_ratios[stage],
                layer_scale=self.layer_scale is not None,
            )
            for _ in range(config.depths[stage])
        )
        self.add_module(f"patch_embed{number}", embed)
        self.add_module(f"block{number}", blocks)
        self.add_module(f"norm{number}", nn.LayerNorm(width, eps=1e-6))

    def blocks(self) -> list[Block]:
        """Every part in the order of the forward pass; see `Block`."""
        parts, depth = [], 0
        for stage in range(1, 5):
            name = f"patch_embed{stage}"
            parts.append(Block(name, self.get_submodule(name), stage, depth, residual=False))
            for index, module in enumerate(self.get_submodule(f"block{stage}").children()):
                parts.append(Block(f"block{stage}.{index}", module, stage, depth))
                depth += 1
            name = f"norm{stage}"
            parts.append(Block(name, self.get_submodule(name), stage, depth, residual=False))
        return [*parts, Block("head", self.head, 4, depth, residual=False)]

    def stages(self, x: Tensor, drop_noise: Tensor | None) -> list[Tensor]:
        """The outputs [B, C, H, W] of norm1 to norm4."""
        size = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1)
        keep = self._keep(drop_noise)
        outputs, depth = [], 0
        for stage in range(1, 5):
            # In a graph for other runtimes, of images whose size may be known only there.
            geometry = self._geometry_at(size, stage) if exporting() else self.geometry(stage)
            x = self.get_submodule(f"patch_embed{stage}")(x)
            for block in self.get_submodule(f"block{stage}").children():
                x = block(x, geometry, None if keep is None else keep[depth])
                depth += 1
            x = self.get_submodule(f"norm{stage}")(x)
            outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the tokens."""
        return x.mean(dim=(2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """Pool, then the linear head."""
        logits: Tensor = self.head(self.pool(x))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head; see `Backbone.reset_classifier`."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.config.widths[3], num_classes, device=self.device)
            _init_linear(head)
            self.head = head

    def reset_buffers(self, size: Pair) -> None:
        """Fit the geometry of every stage to inputs of `size`; see `Backbone.reset_buffers`."""
        self._plans = [self._plan(stage, size) for stage in range(4)]
        self.size = size
        for stage in range(1, 5):
            geometry = self._geometry_at(size, stage)
            for name in BUFFERS:
                self.register_buffer(f"{name}{stage}", getattr(geometry, name), persistent=False)

    def geometry(self, stage: int) -> Geometry:
        """The geometry of stage 1 to 4 at the current size."""
        tensors = (self.get_buffer(f"{name}{stage}") for name in BUFFERS)
        return Geometry(self._plans[stage - 1], *tensors)

    def _geometry_at(self, size: Pair, stage: int) -> Geometry:
        return stage_geometry(self._plan(stage - 1, size), device=self.device)

    def _plan(self, stage: int, size: Pair) -> StagePlan:
        stride = self.config.stem_stride
        bias_size = self.img_size if self.position_mode == "interpolate" else size
        return stage_plan(
            stage_grids(size, stem_stride=stride)[stage],
            bias_grid=stage_grids(bias_size, stem_stride=stride)[stage],
            span=stage_grids(self.pretrain_size, stem_stride=stride)[stage],
            sr_ratio=self.config.sr_ratios[stage],
            fixed_pool_size=self.fixed_pool_size,
        )

    def no_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """Biases, vectors, query embeddings, local and continuous position bias, temperatures."""
        keywords = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        if parameter.dim() == 1 or name.endswith(".bias"):
            return True
        return any(keyword in name for keyword in keywords)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published: linear N(0, 0.02), convolutions He by fan-out, temperature 1/0.24."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.constant_(module.get_parameter("bias"), 0)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Attention | AggregatedAttention):
                _init_attention(module)
            elif isinstance(module, ResidualBlock) and self.layer_scale is not None:
                for gain in (module.layer_scale_1, module.layer_scale_2):
                    nn.init.constant_(cast(Tensor, gain), self.layer_scale)


def _init_linear(module: nn.Linear) -> None:
    nn.init.trunc_normal_(module.weight, std=0.02)
    nn.init.zeros_(module.bias)


def _init_attention(module: Attention | AggregatedAttention) -> None:
    nn.init.constant_(module.temperature, math.log(math.exp(1 / 0.24) - 1))
    nn.init.trunc_normal_(module.query_embedding, std=0.02)
    if isinstance(module, AggregatedAttention):
        nn.init.trunc_normal_(module.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(module.learnable_tokens, std=0.02)
        nn.init.zeros_(module.learnable_bias)
