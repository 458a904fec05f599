"""Steps as someone who copies them meets them: one shape in all scripts, and no need of the rest."""
import ast
import importlib
import inspect
import re
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluator
from common import blocks
from tests.conftest import ROOT, TINY, run_here

SCRIPTS = {name: importlib.import_module(name) for name in TINY}
GANS = [name for name in SCRIPTS if name != "vae_celeba"]
ORDER = "vae body D Q opt real fake changed x y category continuous cfg".split()  # of all steps' arguments


def steps_of(module) -> dict:
    return {name: getattr(module, name) for name in ("d_step", "g_step", "vae_step") if hasattr(module, name)}


def named(step) -> set[str]:
    """The fields of cfg that a step's docstring names."""
    return set(re.search(r"Reads cfg\.([\w, ]+)\.", " ".join(step.__doc__.split()))[1].split(", "))


def weights(*nets) -> list[torch.Tensor]:
    return [p.detach().clone() for net in nets for p in net.parameters()]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class Recorded:
    """A config that notes which of its fields are read."""

    def __init__(self, cfg, names: set[str]):
        self.cfg, self.names = cfg, names

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.cfg, name)


@pytest.fixture
def train(here, monkeypatch):
    """Trains a script for two iterations; watch(kind, arguments, step) stands for each of its steps."""
    monkeypatch.setattr(evaluator, "finish", lambda *args, **options: {})

    def run(name, watch, **fields):
        module = SCRIPTS[name]
        with monkeypatch.context() as patch:
            for kind, step in steps_of(module).items():
                def call(*args, kind=kind, step=step):
                    return watch(kind, inspect.signature(step).bind(*args).arguments, step)
                patch.setattr(module, kind, call)
            run_here(name, iters=2, judge="none", sample_every=0, **fields)
    return run


# ---------------------------------------------------------------------- one shape in all scripts

@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_name_the_settings_that_steps_read(train, name):
    module, read = SCRIPTS[name], defaultdict(set)

    def watch(kind, given, step):
        return step(**given | {"cfg": Recorded(given["cfg"], read[kind])})
    for fields in [*module.RECIPES.values(), *getattr(module, "VARIANTS", {}).values()]:
        train(name, watch, **fields)
    assert read == {kind: named(step) for kind, step in steps_of(module).items()}
    assert max(map(len, read.values())) <= 6


def test_arguments_have_one_order():
    for name, module in SCRIPTS.items():
        signatures = [inspect.signature(step) for step in steps_of(module).values()]
        for parameters in (list(signature.parameters) for signature in signatures):
            assert parameters == sorted(parameters, key=ORDER.index)
        assert name == "infogan_mnist" or len(set(signatures)) == 1  # whose G's step has Q and codes, too


@pytest.mark.parametrize("name, recipe", [(name, key) for name in GANS for key in SCRIPTS[name].RECIPES])
def test_each_step_is_of_its_own_networks(train, name, recipe):
    def watch(kind, given, step):
        nets = [given[key] for key in ("body", "D") if key in given]
        for p in nn.ModuleList(nets).parameters():
            p.grad = None
        of_opt, of_d = given["opt"].param_groups[0]["params"], weights(*nets)
        before = [p.detach().clone() for p in of_opt]
        found = step(**given)
        assert given["fake"].requires_grad == (kind == "g_step")  # D's are cut off from G
        assert not same(before, of_opt) and same(of_d, weights(*nets)) == (kind == "g_step")
        if kind == "g_step":  # D is left without gradients, and ready for its own step
            assert all(p.grad is None and p.requires_grad for net in nets for p in net.parameters())
        if hasattr(nets[-1], "classify"):  # neither built nor computed at weight 0
            aux = found["aux_real" if kind == "d_step" else "aux_fake"]
            assert (nets[-1].classify is None) == (aux == 0) == (given["cfg"].aux_weight == 0)
        return found
    train(name, watch, recipe=recipe)


@pytest.mark.parametrize("name", GANS)
def test_one_pass_of_g_serves_both_updates(train, monkeypatch, name):
    """With n_dis > 1, the further steps of D have their own images. All are augmented for both steps."""
    module, made, passes = SCRIPTS[name], [], []
    forward, augments = module.Generator.forward, name in ("acgan_celeba", "cdcgan_iclevr", "sngan_iclevr")

    def count(self, *inputs):
        passes.append(self.training)
        return forward(self, *inputs)

    def watch(kind, given, step):
        images = dict(real=given.get("real"), fake=given["fake"])
        made.append(SimpleNamespace(kind=kind, passes=len(passes), **images))
        return step(**given)
    monkeypatch.setattr(module.Generator, "forward", count)
    for place in (module, blocks):
        monkeypatch.setattr(place, "random_flip_translate", lambda x, share: x + 3 * share, raising=False)
    train(name, watch, **{"augment": 1.0} if augments else {})
    n = TINY[name].get("n_dis", 1)
    assert [x.kind for x in made] == 2 * [*["d_step"] * n, "g_step"]
    for_d, for_g = [x for x in made if x.kind == "d_step"], made[n::n + 1]
    assert all(passes) and [x.passes for x in for_d] == [*range(1, 2 * n + 1)]
    for images in ([x.real for x in for_d], [x.fake for x in for_d]):
        assert len(torch.cat(images).unique(dim=0)) == 8 * len(for_d) == 16 * n
        assert not augments or torch.cat(images).min() > 1.9
    for x, last in zip(for_g, for_d[n - 1::n], strict=True):
        assert x.passes == last.passes and x.fake.data_ptr() == last.fake.data_ptr()
        assert x.real is None or x.real is last.real


# ---------------------------------------------------------------------- copies

LABELS = "torch.randint(25, (6, 3))"
COPIES = {  # networks, G's images, labels
    "dcgan_mnist": (
        'G, D = Generator("conv", 8, 4), Discriminator("conv", 4, "none")', "G(torch.randn(6, 8))"),
    "sngan_iclevr": ('G, D = Generator(24, 8, 2, 32), Discriminator(24, 2, 32, "cnn", "none", "sum", True)',
                     "G(torch.randn(6, 8), y)", LABELS),
    "cdcgan_iclevr": ('G, D = Generator(24, 8, 2, 32), Discriminator(24, 2, 32, "projection", "none", True)',
                      "G(torch.randn(6, 8), y)", LABELS),
    "acgan_celeba": ('G, D = Generator(5, 8, 1, 32, "maps"), Discriminator(5, 1, 32, "none", "projection")',
                     "G(torch.randn(6, 8), y)", "torch.randint(2, (6, 5)).float()"),
}


def copied(module, names: list[str]) -> str:
    """The source of these definitions and of all that they use, but Config and the line for torchrun.

    They may import torch and common/, not the rest of the project: runs, data, pictures, scores.
    """
    own, imports, taken = {}, {}, {"Config", "dist"}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            own[node.targets[0].id if isinstance(node, ast.Assign) else node.name] = node
        for alias in getattr(node, "names", []):
            start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            imports[alias.asname or alias.name] = f"{start}import {ast.unparse(alias)}"
    while names := [name for name in names if name in own.keys() | imports and name not in taken]:
        taken.update(names)
        nodes = [node for name in names if name in own for node in ast.walk(own[name])]
        names = [node.id for node in nodes if isinstance(node, ast.Name)]
    taken -= {"Config", "dist"}
    lines = [imports[name] for name in taken & imports.keys()]
    for line in lines:
        pattern = r"(from|import) (torch|math|itertools|collections|common)\b(?!.* (datasets|files))"
        assert re.match(pattern, line.replace("common.", "common ")), line
    text = "\n".join([*lines, *(ast.unparse(node) for name, node in own.items() if name in taken)])
    return text.replace("dist.average_gradients(opt)", "pass")


@pytest.mark.parametrize("name", COPIES)
def test_copied_networks_and_steps_train(name):
    module, (networks, images, *labels) = SCRIPTS[name], COPIES[name]
    steps = steps_of(module).values()
    cfg = module.Config(**module.RECIPES["r3gan"], precision="fp32")
    cfg = SimpleNamespace(**{field: getattr(cfg, field) for step in steps for field in named(step)})
    torch.manual_seed(0)
    space = {"Config": SimpleNamespace, "cfg": cfg, "__name__": "copied"}
    exec(copied(module, "Generator Discriminator d_step g_step torch".split()) + "\n" + networks, space)
    G, D = space["G"], space["D"]
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-3) for net in (G, D))
    before = weights(G), weights(D)
    for _ in range(3):
        y = space["y"] = eval(labels[0], space) if labels else None
        fake = eval(images, space)
        real, rest = torch.rand_like(fake), [y, cfg] if labels else [cfg]
        found = space["d_step"](D, opt_d, real, fake.detach(), *rest)
        found |= space["g_step"](D, opt_g, real, fake, *rest)
        assert all(value.isfinite() for value in found.values())
    assert not same(before[0], weights(G)) and not same(before[1], weights(D))


def test_dcgan_of_a_folder_of_images(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for i in range(40):
        Image.new("RGB", (30 + i, 60), (6 * i, 0, 100)).save(tmp_path / "mine" / f"{i}.png")
    source = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
    more = ["image_size: int = 32", "crop: int = 0", 'attributes: str = ""', "skip_bad_images: bool = False"]
    for old, new in {  # what README.md says to change for a folder of images
            "load_digits, 32": "load_faces, False", "Data, load_digits": "Data, load_faces",
            "    pairs: int": "\n".join([*(f"    {field}" for field in more), "    pairs: int"]),
            "nn.ConvTranspose2d(h, 1, 4, 2, 1)": "nn.ConvTranspose2d(h, 3, 4, 2, 1)",
            "nn.Conv2d(1, h, 4, 2, 1)": "nn.Conv2d(3, h, 4, 2, 1)"}.items():
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "dcgan_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TINY, "dcgan_mine", TINY["dcgan_mnist"])
    folder = run_here("dcgan_mine", data="mine", iters=2, sample_every=1)
    grid = np.asarray(Image.open(folder / "samples" / "step_0000002.png"))
    assert (grid[..., 0] != grid[..., 2]).any()  # in colour
