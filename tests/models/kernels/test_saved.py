"""What a block keeps for the backward pass where the kernels compute it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.geometry import StagePlan, stage_geometry
from models.kernels.choice import force
from models.transnext import ResidualBlock

# Maps [B, H, W, C] in float32 that the authors' code keeps of a block of the first two stages.
AUTHORS = 68


def test_a_block_of_the_first_stage_keeps_a_third_of_what_the_authors_code_does():
    """TransNeXt-Base's at 224 pixels: what is not a parameter, of which a batch has only one."""
    plan = StagePlan((56, 56), (7, 7), (56, 56), (7, 7), (56, 56), windowed=True)
    geometry = stage_geometry(plan, device=torch.device("cpu"))
    block = ResidualBlock(96, num_heads=4, mlp_ratio=8, sr_ratio=8, layer_scale=False)
    own = {x.untyped_storage()._cdata for x in (*block.parameters(), *geometry[1:])}
    saved = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), force("triton"):
        x = torch.empty(64, 56, 56, 96, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            block(x, geometry, None)
        assert sum(storage.nbytes() for storage in saved.values()) <= AUTHORS / 3 * x.nbytes
