"""Gradients summed in buckets during the backward pass are the sums of all processes' gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ietagc_diffusers.training.gradients import GradientSum

STEPS = 3


def model_and_batches(rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 30), torch.nn.Linear(30, 1)
    )
    torch.manual_seed(10 + rank)
    return model, [torch.randn(5, 6) for _ in range(STEPS)]


def own_gradients(rank, step):
    """Of one process by itself; in the second step process 1 has nothing to differentiate."""
    model, batches = model_and_batches(rank)
    if (rank, step) != (1, 1):
        model(batches[step]).pow(2).mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def process(rank, folder, bucket_bytes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, batches = model_and_batches(rank)
    gradients = GradientSum(list(model.parameters()), bucket_bytes=bucket_bytes)
    sums = []
    for step, batch in enumerate(batches):
        half = torch.zeros(())  # another micro-batch before the last one: its gradients only accumulate
        (model(batch) * half).sum().backward()
        gradients.expect()
        if (rank, step) != (1, 1):
            model(batch).pow(2).mean().backward()
        gradients.finish()
        sums.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.save(sums, folder / f"sums-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 10**9])
def test_sums_are_those_of_the_processes_by_themselves(tmp_path, bucket_bytes):
    mp.start_processes(process, (tmp_path, bucket_bytes), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"sums-{rank}.pt", weights_only=True) for rank in range(2))
    for step in range(STEPS):
        own = zip(own_gradients(0, step), own_gradients(1, step), strict=True)
        for mine, theirs, (a, b) in zip(first[step], second[step], own, strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, a + b)
