"""Each script's loop on a pretended CUDA device: FakeTensorMode's tensors have shape, dtype and device, no
values. Without a GPU it finds tensors on two devices, dtypes that clash, copies and reads by the host.
"""
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.datasets import Data
from tests.conftest import TINY
from tests.test_networks import SCRIPTS, labels_of

OTHERS = {"cdcgan_iclevr": {"targets": dict(smooth_labels=True, flip_labels=0.1)},
          "sngan_iclevr": {"flips": dict(loss="rahinge", g_net="cnn", d_net="cnn", flip_labels=0.1)}}
ONE_DTYPE = "mm addmm mv grid_sampler_2d index_put_ binary_cross_entropy_with_logits".split()


class Guard(TorchDispatchMode):
    """While it is on, refuses tensors on the CPU, those made of Python's numbers, and clashes of dtypes."""
    on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        if self.on and name != "device":  # this C++ asks, where no error is allowed
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            dtypes = {x.dtype for x in tensors if x.is_floating_point()}
            assert name != "lift_fresh" and all(x.is_cuda for x in tensors), f"{name}: a tensor from the CPU"
            assert len(dtypes) < 2 or name not in ONE_DTYPE, f"{name}: {dtypes}"  # fails, or loses digits
            assert name != "mean" or torch.bfloat16 not in dtypes, "a mean in bf16, which has few digits"
        return out


def gradients(loss: torch.Tensor, create_graph: bool = False) -> dict:
    """{leaf: gradient}. Torch's engine needs a driver; this calls the same nodes, the latest first."""
    waiting = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.set_grad_enabled(create_graph):
        while nodes := [node for node in waiting if not hasattr(node, "variable")]:  # leaves remain
            node = max(nodes, key=lambda node: node._sequence_nr())
            given = waiting.pop(node)
            out = node(*map(given.get, range(len(node._input_metadata))))
            for g, (child, i) in zip(out if type(out) is tuple else [out], node.next_functions, strict=True):
                if g is not None and child is not None:
                    meta, sums = child._input_metadata[i], waiting.setdefault(child, {})
                    g = g.sum_to_size(meta.shape).to(meta.dtype)
                    sums[i] = sums[i] + g if i in sums else g
    return {node.variable: sums[0] for node, sums in waiting.items()}


def backward(loss: torch.Tensor) -> None:
    for leaf, g in gradients(loss).items():
        leaf.grad = g


def swap(x: torch.Tensor, new: torch.Tensor) -> None:
    x.data, x.fake_device = new.data, new.fake_device


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name, fields", [
    pytest.param(name, fields, id=f"{name}-{recipe}") for name, module in SCRIPTS.items() for recipe, fields
    in {**module.RECIPES, **getattr(module, "VARIANTS", {}), **OTHERS.get(name, {})}.items()])
def test_training_needs_nothing_of_the_host(name, fields, precision, monkeypatch):
    def steps():
        guard.on = True
        yield 1
        guard.on = False

    def log(**values):
        assert all((x.is_cuda, x.dtype, x.ndim) == (True, torch.float32, 0) for x in values.values())

    for place, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda: True, "torch.cuda.mem_get_info": lambda _: (2**40, 2**40),
            "torch.autograd.grad": lambda y, x, create_graph: [gradients(y, create_graph)[x]],
            "torch.Tensor.backward": backward, "torch.utils.swap_tensors": swap,  # in net.to(); fakes refuse
            "torch.randperm": lambda n, generator: torch.arange(n, device="cuda"),  # else copied, each epoch
            "evaluator.get_scorer": lambda *_: None, "evaluator.finish": lambda *_, **__: None}.items():
        monkeypatch.setattr(place, value)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", lambda x, _: x.detach().clone(), raising=False)
    with FakeTensorMode(), Guard() as guard:
        images = torch.zeros(99, 1 if "mnist" in name else 3, 32, 32, dtype=torch.uint8)
        y, = labels_of(name, 99) or [torch.zeros(99)]
        data = Data("fake", "", "", images, y, ("",) * 15, "", test_label_sets={"test": y})
        cfg = SCRIPTS[name].Config(**fields | TINY[name] | dict(precision=precision, batch_size=16))
        SCRIPTS[name].main(SimpleNamespace(
            cfg=cfg, device=torch.device("cuda"), get_data=lambda *_: data, register=lambda *_, **__: None,
            steps=steps, log=log, is_due=lambda _: False))
