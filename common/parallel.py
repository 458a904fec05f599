"""Several processes under torchrun: each takes its share of every batch; the first one writes and scores."""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import NotFinite, Stopped, UserError, reading


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes():
    """Within, the processes that torchrun started, if it did, know each other. Only the first one prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    with reading("WORLD_SIZE", "set by torchrun, along with where its processes meet"):
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=1)))
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if nccl:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(days=1))  # the others wait while the first scores or trains a judge
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)  # after errors, too: else its threads may abort the exit
        if rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except (UserError, NotFinite):
            if rank():  # the first has met the same
                sys.exit(2)
            store.set("told", "")
            raise
        except ConnectionError:
            with contextlib.suppress(RuntimeError):  # the store may be gone with its process
                if store.check(["told"]):
                    sys.exit(2)
            raise
        except Stopped as stopped:
            if rank():
                sys.exit(128 + stopped.args[1])
            raise


@contextlib.contextmanager
def _together():
    """Turn an error of a collective operation, in which a process is missing, into ConnectionError."""
    try:
        yield
    except RuntimeError:
        raise ConnectionError("another of torchrun's processes has ended") from None


def share(index: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch."""
    return index[rank()::world()]


def average_gradients(optimizer: torch.optim.Optimizer, *_) -> None:
    """Make gradients the mean over all processes; to be called before each step of the optimiser."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    together = torch.cat([x.flatten() for x in gradients])
    with _together():
        dist.all_reduce(together)
    for x, mean in zip(gradients, (together / world()).split([x.numel() for x in gradients]), strict=True):
        x.copy_(mean.view_as(x))


def largest(number: int) -> int:
    """The largest of the processes' numbers; it waits for all of them."""
    if world() == 1:
        return number
    found = torch.tensor(number)
    with _together():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def gather(x) -> list:
    """What each process gives, in order of their numbers."""
    if world() == 1:
        return [x]
    found = [None] * world()
    with _together():
        dist.all_gather_object(found, x)
    return found
