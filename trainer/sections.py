"""The sections of a run's configuration: every setting, its default and what it means.

Torch-free. The line below a setting is its help on the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network: a name from the model registry and what the registry's build() takes."""

    name: str = "transnext_tiny"
    """A name in the model registry, such as transnext_base."""
    img_size: int = 224
    """Side of the square training images, in pixels."""
    pretrain_size: int | None = None
    """Image side at which position biases were trained; unset means img_size."""
    fixed_pool_size: int | None = None
    """Side of the pooled key grid at any image size (TransNeXt's linear mode)."""
    layer_scale: float | None = None
    """Initial gain of TransNeXt's residual branches (CaiT, arXiv 2103.17239); unset has none."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; earlier blocks rise to it linearly."""
    num_classes: int = 1000
    """Outputs of the classifier."""

    @property
    def squash(self) -> bool:
        """Whether evaluation warps the whole image to the square instead of cropping it."""
        return self.img_size >= 384


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are augmented."""

    source: Literal["webdataset", "ffcv", "folder", "synthetic", "ffcv_native"] = "webdataset"
    """Storage: indexed tar or .beton shards, one folder per class, generated, FFCV's own loader."""
    train: str = "datasets/imagenet/train"
    """Folder or URL of the training split; synthetic: num_samples=256,num_classes=10,size=32."""
    val: str = "datasets/imagenet/val"
    """Folder or URL of the evaluation split; synthetic as above."""
    cache_dir: str | None = None
    """Folder, one per machine, in which shards of URLs are kept; unset requests single images."""
    cache_gb: float | None = None
    """How much it may hold of each split, in 10^9 bytes; unset leaves it to the disk."""
    order: Literal["full", "stream"] = "full"
    """Shuffle of all images, or shard by shard in lanes: for data that is far away."""
    lanes: int = 64
    """Sequences of shards that the stream order reads side by side: a multiple of the processes."""
    window: int = 16_384
    """Consecutive images of a lane among which the stream order shuffles."""
    allow_unmixed: bool = False
    """Stream shards that are sorted by class all the same."""
    max_bad: float = 1e-4
    """Share of the training images that may be unusable, and replaced, before the run stops."""
    num_workers: int = 8
    """Decoding threads per process."""
    prefetch: int = 4
    """Micro-batches prepared ahead, those of one step at least."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Resampling of training crops; random draws one of the two per image."""
    dct_scaling: bool = False
    """Decode large JPEG files at a fraction of their size: faster, and slightly other pixels."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """Policy in timm's notation: rand-m9-mstd0.5-inc1, original, v0r, 3a, augmix-m3 and so on."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; of policies, 3a alone keeps it."""
    hue_jitter: float = 0.0
    """Strength of hue jitter, as a share of the circle; goes with color_jitter."""
    color_jitter_prob: float = 1.0
    """Probability of colour jitter."""
    grayscale_prob: float = 0.0
    """Probability of turning an image grey."""
    gaussian_blur_prob: float = 0.0
    """Probability of a Gaussian blur."""
    solarize_prob: float = 0.0
    """Probability of inverting what is brighter than half."""
    repeats: int = 1
    """Differently augmented copies of an image in an epoch that shows 1/repeats of the images."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    erase_prob: float = 0.0
    """Probability of random erasing (pixel mode)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of images in 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations of images in 0..1."""

    @property
    def mix_group(self) -> int:
        """Neighbouring images that are mixed with one another: pairs, or each by itself."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches and precision."""

    epochs: int = 300
    """Passes over the training images, cool-down included."""
    batch_size: int = 1024
    """Images per optimizer step over all processes."""
    accumulate: int = 1
    """Micro-batches that one step is split into."""
    microbatch: Literal["set", "auto"] = "set"
    """Split steps as accumulate says, or into the fewest micro-batches that fit in memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute type of matrix products and activations; weights and statistics stay fp32.
    fp16 scales the loss."""
    label_smoothing: float = 0.1
    """Probability mass spread over all classes."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function in the loss (PaLM, arXiv 2204.02311)."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average; 0 is off."""
    ema_warmup: bool = False
    """Hold that decay to (1 + step) / (10 + step) at first."""
    drop_path_ramp: Literal["none", "linear", "cosine"] = "none"
    """How drop-path rates rise from 0 at the first step to model.drop_path at the last."""
    progressive: str | None = None
    """Image side by first epoch, such as 0:128,100:176,200:224; unset trains at model.img_size."""
    init_from: str | None = None
    """Weights to begin with, for fine-tuning: of a run, checkpoint, bundle or weight file."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and drop path."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time: slower on GPUs."""

    def image_sides(self) -> tuple[tuple[int, int], ...]:
        """Return (first epoch, image side) pairs, rising from epoch 0; none if not progressive.

        Raises:
            ValueError: if `progressive` is not such a list.
        """
        if self.progressive is None:
            return ()
        if not re.fullmatch(r"0:[1-9]\d*(,[1-9]\d*:[1-9]\d*)*", self.progressive):
            raise ValueError(self.progressive)
        pairs = [tuple(map(int, item.split(":"))) for item in self.progressive.split(",")]
        sides = tuple((epoch, side) for epoch, side in pairs)
        if any(first >= second for (first, _), (second, _) in pairwise(sides)):
            raise ValueError(self.progressive)
        return sides


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedules."""

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    """AdamW (arXiv 1711.05101), LAMB for huge batches (1904.00962), or Muon, with AdamW for what
    are no matrices of hidden layers."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine and during cool-down."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up."""
    cooldown_epochs: int = 0
    """Last epochs, run at min_lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the parameters that the model does not exempt."""
    weight_decay_end: float | None = None
    """Weight decay at the end of a cosine that begins at weight_decay; unset keeps it."""
    layer_decay: float = 1.0
    """Factor on the learning rate with every residual block away from the head, for fine-tuning."""
    clip_grad: float | None = None
    """Largest global gradient norm; unset does not clip."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a trained network, the teacher, beside the labels."""

    teacher: str | None = None
    """A timm bundle that foveate export wrote, or a model's name, as timm:NAME; unset has none."""
    weights: str | None = None
    """The safetensors file of a teacher given by name."""
    kind: Literal["hard", "soft"] = "hard"
    """Learn the teacher's first choice (DeiT, arXiv 2012.12877) or its tempered predictions."""
    temperature: float = 3.0
    """What logits are divided by before soft predictions are compared."""
    weight: float = 0.5
    """The teacher's share of the loss."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How the model is spread over processes."""

    name: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """ddp replicates the training state, fsdp (FSDP2) shards it, zero1 to zero3 are DeepSpeed's."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the CPU's memory: the optimizer's state, or (zero3) weights too."""
    offload_dir: str | None = None
    """Folder on a fast disk of each node for the optimizer's state (zero3); unset: CPU memory."""
    replicas: int = 1
    """Copies of the training state that fsdp keeps, each divided (HSDP); a copy for each machine
    lets only gradients cross the network."""
    reshard: str = "yes"
    """Let fsdp divide weights again after the forward pass: yes, no, or among so many processes."""
    prefetch: int = 0
    """Blocks whose weights fsdp gathers ahead of the one that runs; 0 leaves it to FSDP2."""

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage: 1 divides the optimizer's state, 2 gradients too, 3 weights too; else 0."""
        return int(self.name[4:]) if self.name.startswith("zero") else 0

    def reshard_after_forward(self) -> bool | int:
        """Return `reshard` as FSDP2 takes it.

        Raises:
            ValueError: if `reshard` is neither yes, no nor a number from 2.
        """
        if self.reshard in ("yes", "no"):
            return self.reshard == "yes"
        if not re.fullmatch(r"[2-9]|[1-9]\d+", self.reshard):
            raise ValueError(self.reshard)
        return int(self.reshard)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory against time."""

    checkpointing: str = "none"
    """Activation checkpointing: none, full, selective (full, but keeps linear layers' outputs), or
    the stages to recompute, such as 1,2."""
    offload_activations: bool = False
    """Move what blocks that are not recomputed keep for the backward pass to the CPU's memory."""
    compile: bool = False
    """Compile every block with torch.compile."""

    def stages(self) -> tuple[int, ...]:
        """Return the stages (1-4) whose blocks are recomputed in the backward pass.

        Raises:
            ValueError: if `checkpointing` is neither none, full, selective nor a list of stages.
        """
        if self.checkpointing in ("none", "full", "selective"):
            return () if self.checkpointing == "none" else (1, 2, 3, 4)
        if not re.fullmatch(r"[1-4](,[1-4])*", self.checkpointing):
            raise ValueError(self.checkpointing)
        return tuple(sorted({int(stage) for stage in self.checkpointing.split(",")}))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the whole evaluation split."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 1024
    """Images per forward pass over all processes."""
    crop_pct: float = 0.875
    """Side of the centre crop as a share of the resized image (from 384 pixels on, none is cut)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1250
    """Steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep those of all steps that are a multiple of this too; unset keeps none for that."""
    keep_best: bool = True
    """Keep the checkpoint of the best evaluation too."""
    async_save: bool = True
    """Write in the background while training goes on."""
    local_dir: str | None = None
    """Folder on a fast disk of each node, to which saves go first, and from there to the run's."""
    grace: float | None = None
    """Seconds from a signal to the kill; a last save that takes longer is left. Unset: no limit."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when losses jump or a rank gets stuck."""

    spike: float = 0.0
    """A loss is a spike this many median deviations above the median of those before; 0 is off."""
    window: int = 128
    """Losses before a step that it is compared with."""
    action: Literal["skip", "rollback", "abort"] = "skip"
    """On a spike: leave the update out, go back to the weights saved before it, or stop."""
    max_rollbacks: int = 3
    """Times to go back before the run stops."""
    record: int = 64
    """Last steps that are written to logs/steps_*.json when something goes wrong."""
    hang_seconds: float = 900.0
    """Time without progress after which a run ends and names the rank that got stuck; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, and how often."""

    every: int = 50
    """Steps between log lines."""
    images: int = 16
    """Augmented inputs shown in TensorBoard at each start; 0 shows none."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a job does around a run."""

    preflight: bool = True
    """Check the nodes of a Slurm job at its head, and leave bad ones to others."""
