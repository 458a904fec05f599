"""Several processes under torchrun: each takes its share of every batch; rank 0 writes and scores."""
import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started, if it did. Only rank 0 prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    # a day, because the others wait while rank 0 scores or trains a judge
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=1))
    with open(os.devnull, "w") as nowhere:
        try:
            with contextlib.redirect_stdout(nowhere) if rank() else contextlib.nullcontext():
                yield
        finally:
            dist.destroy_process_group()  # after errors too: its threads might abort the exit


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Average gradients over all processes, before the optimiser's step; a no-op without torchrun."""
    if world_size() > 1:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        together = torch.cat([p.grad.flatten() for p in weights]) / world_size()
        dist.all_reduce(together)
        for p, mean in zip(weights, together.split([p.numel() for p in weights]), strict=True):
            p.grad.copy_(mean.view_as(p))


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of x over all processes, with its gradient."""
    if world_size() == 1:
        return x.mean()
    from torch.distributed.nn.functional import all_reduce  # deprecated, but there is no other yet
    return all_reduce(x.mean()) / world_size()


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers; it waits for all of them, but not for a GPU."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def all_gather(x) -> list:
    """Each process's x, in order of rank; it waits for all of them."""
    found = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, x)
    return found
