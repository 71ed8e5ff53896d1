"""BatchNorm against torch's own: numbers, dtypes, synchronisation, recomputation, accumulation."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from models import build
from models.base import ModelError
from models.layers import BatchNorm, micro_batch, recomputing
from tests.dist import run_distributed
from trainer.backends.wrap import wrap_blocks
from trainer.sections import MemoryConfig


def random_map(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def pair(width, dtype=torch.float64):
    """Ours and torch's, with equal random parameters and statistics."""
    theirs = nn.BatchNorm2d(width, dtype=dtype)
    for seed, value in enumerate(theirs.state_dict().values()):
        if value.is_floating_point():
            value.copy_(random_map(width, seed=seed).abs())
    ours = BatchNorm(width).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_same_state(ours, theirs):
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_equals_torch():
    ours, theirs = pair(5)
    for seed in range(3):
        x = random_map(4, 3, 2, 5, seed=seed).requires_grad_()
        probe = random_map(4, 3, 2, 5, seed=9)
        mine, other = ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(mine, other)
        grads = (
            torch.autograd.grad(y, [x, *m.parameters()], probe)
            for y, m in [(mine, ours), (other, theirs)]
        )
        for grad, reference in zip(*grads, strict=True):
            torch.testing.assert_close(grad, reference)
    assert_same_state(ours, theirs)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_half_precision_keeps_statistics_wide():
    ours, theirs = pair(5, torch.float32)
    x = random_map(8, 4, 4, 5, dtype=torch.bfloat16)
    before = ours.running_mean.clone()
    ours.bfloat16()
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.running_mean, before)
    assert ours(x).dtype == torch.bfloat16
    theirs(x.float().permute(0, 3, 1, 2))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.eval()(x).dtype == torch.bfloat16


def test_recomputation_moves_nothing():
    ours, _ = pair(5)
    plain = copy.deepcopy(ours)
    x = random_map(4, 3, 2, 5).requires_grad_()
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    contexts = lambda: (torch.enable_grad(), recomputing())  # noqa: E731
    out = checkpoint(ours, x, use_reentrant=False, context_fn=contexts)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert_same_state(ours, plain)
    assert ours.num_batches_tracked == 1


def test_recomputed_blocks_move_once():
    """The operators that blocks fuse their norms into are repeated like plain ones."""
    torch.manual_seed(0)
    plain = build("transxnet_pico", img_size=32, num_classes=3)
    ours = copy.deepcopy(plain)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(plain.num_blocks, 2, 4)
    wrap_blocks(ours, MemoryConfig(checkpointing="full"))
    for model in (plain, ours):
        model(images, noise).square().sum().backward()
    assert_same_state(ours, plain)
    assert ours.network[0][0].mlp.norm.num_batches_tracked == 1
    for recomputed, parameter in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(recomputed.grad, parameter.grad)


def test_accumulation_is_one_update_with_the_average():
    ours, _ = pair(5)
    batches = [random_map(4, 3, 2, 5, seed=seed) * (seed + 1) for seed in range(4)]
    values = [batch.flatten(0, 2) for batch in batches]
    means = torch.stack([value.mean(0) for value in values]).mean(0)
    variances = torch.stack([value.var(0) for value in values]).mean(0)
    expected = ours.running_mean.lerp(means, 0.1), ours.running_var.lerp(variances, 0.1)
    for index, batch in enumerate(batches):
        with micro_batch(index, count=len(batches)):
            ours(batch)
    torch.testing.assert_close(ours.running_mean, expected[0])
    torch.testing.assert_close(ours.running_var, expected[1])
    assert ours.num_batches_tracked == 1
    ours(batches[0])
    assert ours.num_batches_tracked == 2


def test_one_graph_for_all_updates():
    """A compiled block is not compiled again for recomputation or for each micro-batch."""
    ours, theirs = pair(5)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    x = random_map(4, 3, 2, 5)
    compiled(x)
    theirs(x.permute(0, 3, 1, 2))
    with recomputing():
        compiled(x)
    assert_same_state(ours, theirs)
    for index in range(4):
        with micro_batch(index, count=4):
            compiled(x)
    assert len(graphs) == 1
    theirs(x.permute(0, 3, 1, 2))
    assert_same_state(ours, theirs)


def test_a_single_value_is_an_error():
    with pytest.raises(ModelError, match="one value per channel"):
        BatchNorm(5)(random_map(1, 1, 1, 5, dtype=torch.float32))


def synchronised(rank, world_size, compiled):
    """Unequal slices of one batch, and the gradient of the sum over all ranks."""
    ours, _ = pair(5)
    ours.process_group = distributed.group.WORLD
    module = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    whole = random_map(7, 3, 2, 5)
    mine = (whole[:1] if rank == 0 else whole[1:]).requires_grad_()
    probe = random_map(7, 3, 2, 5, seed=9)
    out = module(mine)
    out.backward(probe[:1] if rank == 0 else probe[1:])
    return {
        "out": out.detach(),
        "grad": mine.grad,
        "parameters": [p.grad for p in ours.parameters()],
        "state": ours.state_dict(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_synchronised_over_processes(compiled):
    ranks = run_distributed(synchronised, 2, compiled)
    ours, _ = pair(5)
    x = random_map(7, 3, 2, 5).requires_grad_()
    out = ours(x)
    out.backward(random_map(7, 3, 2, 5, seed=9))
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), out)
    torch.testing.assert_close(torch.cat([rank["grad"] for rank in ranks]), x.grad)
    for first, second, parameter in zip(
        *(rank["parameters"] for rank in ranks), ours.parameters(), strict=True
    ):
        torch.testing.assert_close(first + second, parameter.grad)
    for rank in ranks:
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(rank["state"][name], value)


def single_images(rank, world_size):
    """Each process trains on one image: only synchronised statistics allow it."""
    torch.manual_seed(0)
    model = build("transxnet_pico", img_size=32, num_classes=3)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.process_group = distributed.group.WORLD
    images = torch.randn(2, 3, 32, 32)
    logits = model(images[rank : rank + 1])
    logits.sum().backward()
    return {"logits": logits.detach(), "stem": model.patch_embed.proj.conv.weight.grad}


@pytest.mark.slow
def test_batch_of_one_per_process():
    ranks = run_distributed(single_images, 2)
    torch.manual_seed(0)
    model = build("transxnet_pico", img_size=32, num_classes=3)
    logits = model(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    together = torch.cat([rank["logits"] for rank in ranks])
    torch.testing.assert_close(together, logits, rtol=1e-4, atol=1e-5)
    stem = ranks[0]["stem"] + ranks[1]["stem"]
    expected = model.patch_embed.proj.conv.weight.grad
    assert (stem - expected).abs().max() < 1e-3 * expected.abs().max()
