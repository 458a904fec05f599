"""Speed beside the usual way: that all ways train alike and see the same images; refused command lines."""
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch
from torch import nn

from common import blocks, datasets
from common.files import UserError
from harness.run import Run
from tests.conftest import settings
from tools import throughput


def test_all_ways_train_for_the_same_number_of_iterations(here):
    tiny = "n_scenes=8 batch_size=4 ch=2 image_size=32 recipe=paper n_dis=2".split()
    args = Namespace(iters=2, threads=torch.get_num_threads(), device="cpu", set=tiny)
    options = ["--iters", "2", "--threads", "1", "--device", "cpu", "--set", *tiny]
    for way in throughput.WAYS:
        n, usual = throughput.WARM_UP + 2, way == "usual"  # which changes its process
        run, given = (throughput.measure, options) if usual else (throughput.child, args)
        assert run("sngan_iclevr", way, here, given) > 0
        state = torch.load(here / way / "last.pt", weights_only=True)
        assert state["step"] == n and state["opt_d"]["state"][0]["step"] == 2 * n
        assert state["opt_g"]["state"][0]["step"] == n
        assert bool(state["opt_g"]["param_groups"][0]["fused"]) is not usual
        assert all(w.is_contiguous() for w in state["G"].values()) is usual
        assert way == "script" or state["config"]["precision"] == "fp32"


@pytest.mark.parametrize("load, tolerance", [
    (datasets.load_iclevr, 1e-6), (lambda cfg: datasets.load_digits(cfg, 32), 1.01 / 127.5)])  # a grey level
def test_the_usual_way_sees_the_same_images(here, monkeypatch, load, tolerance):
    replaced = {"resize": datasets, "to": nn.Module, "log": Run, "cached_spectral_norm": blocks}
    for name, place in replaced.items():
        monkeypatch.setattr(place, name, getattr(place, name))  # to put it back at the end
    module = ModuleType("script")
    throughput.make_usual(module, here / "png")
    data = load(settings())
    real = datasets.to_float(data.images)
    images, labels = module.Batches(data, len(real), 0, torch.device("cpu"), 0, 1)(0)  # an epoch
    assert images.shape == real.shape and images.dtype == torch.float32
    distance, which = (images[:, None] - real).abs().amax((2, 3, 4)).min(1)
    assert sorted(which.tolist()) == list(range(len(real))) and distance.max() <= tolerance
    assert torch.equal(labels, data.labels[which])


@pytest.mark.parametrize("argv, message", [
    (["evaluator.py"], "evaluator is not a script of this collection: name dcgan_mnist"),
    (["dcgan_mnist.py", "--set", "ch=2"], "--set ch=2: give a field of dcgan_mnist.py"),
    (["dcgan_mnist", "--set", "iters=2"], "as FIELD=VALUE, but none of judge"),
    (["dcgan_mnist", "--set", "batch_size=0"], "--batch-size 0"), (["--rounds", "0"], "must be at least 1"),
])
def test_bad_command_lines_are_refused(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *argv])
    with pytest.raises(UserError, match=message):
        throughput.main()
