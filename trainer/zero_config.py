"""What a run asks of DeepSpeed, as DeepSpeed's own configuration. Torch-free.

Nothing of it is a setting by itself: it follows from the run's configuration. The optimizer, its
schedule and the batches are ours, so only the division of the training state is left to say.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RunConfig

# Elements of a message between processes: DeepSpeed's own size, made for language models, would
# be a buffer larger than the networks here.
BUCKET = 25_000_000

# How the disk is asked: by many requests at once, of which each is large.
AIO = {"block_size": 2**20, "queue_depth": 32, "single_submit": False, "overlap_events": True}


def zero_config(config: RunConfig) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, as plain JSON values.

    Keys as in https://www.deepspeed.ai/docs/config-json/.
    """
    found: dict[str, Any] = {
        # It only counts images with this one; the micro-batches are what the loader gives.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.train.accumulate,
        "gradient_clipping": config.optim.clip_grad or 0.0,
        "zero_optimization": _zero_optimization(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # It switches the caller's autocast off. An empty list keeps what travels in fp32.
        "torch_autocast": {
            "enabled": config.train.precision != "fp32",
            "dtype": "float16" if config.train.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    if config.backend.offload_dir is not None:
        found["aio"] = AIO
    return found


def _zero_optimization(config: RunConfig) -> dict[str, Any]:
    stage = config.backend.zero_stage
    found: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.backend.offload != "none":
        found["offload_optimizer"] = _place(config)
    if config.backend.offload == "all":
        found["offload_param"] = {"device": "cpu", "pin_memory": True}
    if stage == 3:
        # Weights of any size are divided: those kept whole would be stale after an evaluation of
        # the average.
        found["stage3_param_persistence_threshold"] = 0
        found["stage3_prefetch_bucket_size"] = BUCKET
        # Its own 10^9 would keep all of these networks gathered from forward to backward.
        found["stage3_max_reuse_distance"] = BUCKET
        # It would replace F.linear in the whole process by one that adds the bias in place.
        found["memory_efficient_linear"] = False
    if config.backend.offload_dir is not None:
        found["sub_group_size"] = BUCKET  # what is read, stepped and written at a time
    return found


def _place(config: RunConfig) -> dict[str, Any]:
    """Where the optimizer's state is offloaded to; runs that share a disk have each their folder.

    The weights that compute stay in memory: the moving average needs them at every step.
    """
    if config.backend.offload_dir is None:
        return {"device": "cpu", "pin_memory": True}
    run = hashlib.sha256(str(Path(config.run_dir).resolve()).encode()).hexdigest()[:16]
    return {
        "device": "nvme",
        "nvme_path": str(Path(config.backend.offload_dir) / run),
        "buffer_count": 4,  # a weight, its gradient and two moments
        "pin_memory": True,
    }
