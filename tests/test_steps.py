"""Steps of all scripts: their losses, their one shape, and that they can be copied without the rest."""
import ast
import copy
import inspect
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import acgan_celeba
import evaluator
from common import blocks, losses
from tests.conftest import TINY, run_here
from tests.test_networks import BUILD, SCRIPTS, build, labels_of

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


# ---------------------------------------------------------------------- losses

D_LOSS = {"bce": losses.minimax_d, "hinge": losses.hinge_d, "rahinge": losses.rahinge, "rpgan": losses.rpgan,
          **dict.fromkeys(["wgan-gp", "wgan-clip", "wgan-div"], lambda real, fake: fake.mean() - real.mean())}
G_LOSS = {"bce": lambda real, fake: losses.nonsaturating_g(fake),
          **{name: lambda real, fake, name=name: D_LOSS[name](fake, real) for name in ("rahinge", "rpgan")}}
R3GAN = dict(loss="rpgan", d_norm="none", gamma=0.5)


@pytest.mark.parametrize("name, fields", [
    ("dcgan_mnist", {}), ("dcgan_mnist", dict(net="mlp")), ("dcgan_mnist", R3GAN),
    ("cdcgan_iclevr", {}), ("cdcgan_iclevr", dict(flip_labels=1 - 1e-9)),
    ("cdcgan_iclevr", R3GAN | dict(d_cond="projection", aux_weight=3.0)),
    ("cdcgan_iclevr", R3GAN),
    ("sngan_iclevr", {}), ("sngan_iclevr", dict(flip_labels=0.3, d_norm="none")),
    ("sngan_iclevr", dict(loss="rahinge")), ("sngan_iclevr", R3GAN | dict(flip_labels=0.3, aux_weight=3.0)),
    ("sngan_iclevr", R3GAN | dict(d_norm="spectral", d_net="cnn", batch_size=4)),  # such as a process's share
    *(("acgan_celeba", variant) for variant in acgan_celeba.VARIANTS.values()),
    ("acgan_celeba", dict(gp_weight=5.0)), ("acgan_celeba", dict(loss="rpgan")),
    ("acgan_celeba", R3GAN | dict(d_cond="projection"))], ids=str)
def test_losses_are_their_formulas(name, fields):
    _, D, cfg = build(name, **dict(batch_size=16) | fields)
    for p in D.parameters() if "sngan" not in name else ():  # so that slopes are not tiny
        p.data = nn.init.xavier_normal_(p) if p.ndim > 1 else p
    module, n, loss = SCRIPTS[name], cfg.batch_size, cfg.loss
    flip, weight = vars(cfg).get("flip_labels", 0), vars(cfg).get("aux_weight", 0)
    y, real, fake = labels_of(name, n), *(torch.rand(2, n, 1 if name == "dcgan_mnist" else 3, 32, 32) * 2 - 1)
    fake.requires_grad_()

    def score(net, x, *y) -> tuple[torch.Tensor, torch.Tensor | None]:
        if name == "acgan_celeba":
            return net(x, *y)
        return net(x, *y).view(len(x), -1)[:, 0], net.classify(x) if weight else None

    def aux(logits) -> torch.Tensor | float:
        target = blocks.multi_hot(*y, 24) if "iclevr" in name else y and y[0]
        return weight * binary_cross_entropy_with_logits(logits, target) if weight else 0.0

    def penalty(net) -> torch.Tensor | float:
        if loss in ("wgan-gp", "wgan-div"):
            of, factor = (module.wgan_gp, cfg.gp_weight) if loss == "wgan-gp" else (module.wgan_div, 1.0)
            torch.manual_seed(1)
            return factor * of(lambda x: net(x, *y)[0], real, fake.detach())
        if loss != "rpgan" or not cfg.gamma:
            return 0.0
        some = [*range(0, n, 8)]  # an eighth, rounded up, of both kinds
        x = torch.cat([real[some], fake.detach()[some]]).requires_grad_()
        slope, = torch.autograd.grad(score(net, x, *(labels[some + some] for labels in y))[0].sum(), x)
        r1, r2 = slope.square().sum((1, 2, 3)).view(2, -1).mean(1)
        return cfg.gamma / 2 * (r1 + r2)

    before = copy.deepcopy(D)
    torch.manual_seed(1)
    found = module.d_step(D, torch.optim.Adam(D.parameters(), 1e-2), real, fake.detach(), *y, cfg)
    with blocks.cached_spectral_norm(before):
        (r, logits), (f, of_fake), extra = score(before, real, *y), score(before, fake, *y), penalty(before)
    means = [(x.sigmoid() if loss == "bce" or "dcgan" in name else x).mean() for x in (r, f)]
    torch.testing.assert_close([found["d_real"], found["d_fake"]], means)
    torch.manual_seed(1)
    swap = torch.rand(n) < flip  # the targets of these pairs
    r, f = r.where(~swap, f), f.where(~swap, r)
    expected = D_LOSS[loss](r, f) + extra + aux(logits)  # the classifier learns from real images
    if "iclevr" in name and weight:  # and to find nothing in generated ones
        expected += 0.3 * weight * binary_cross_entropy_with_logits(of_fake, torch.zeros_like(of_fake))
    torch.testing.assert_close(found["d_loss"], expected, rtol=3e-5, atol=1e-6)
    assert (extra > 1e-3) == (loss in ("wgan-gp", "wgan-div") or loss == "rpgan" and cfg.gamma > 0)
    after = copy.deepcopy(D)
    found = module.g_step(D, torch.optim.SGD([fake], 0.0), real, fake, *y, cfg)
    with blocks.cached_spectral_norm(after):
        (f, logits), (r, _) = score(after, fake, *y), score(after, real, *y)
    expected = (G_LOSS[loss](r, f) if loss in G_LOSS else -f.mean()) + aux(logits)
    torch.testing.assert_close(found["g_loss"], expected, rtol=3e-5, atol=1e-6)
    if "d_fake_updated" in found:
        torch.testing.assert_close(found["d_fake_updated"], f.sigmoid().mean())


# ---------------------------------------------------------------------- one shape in all scripts

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
def test_one_pass_of_g_serves_both_updates_each_of_its_own_networks(train, monkeypatch, name, recipe):
    """With n_dis > 1, the further steps of D have their own images. All are augmented for both steps."""
    module, made, passes = SCRIPTS[name], [], []
    forward, n = module.Generator.forward, TINY[name].get("n_dis", 1)

    def count(self, *inputs):
        passes.append(self.training)
        return forward(self, *inputs)

    def moved(x, share):
        return x + 3 * (share > 0)

    def watch(kind, given, step):
        of_g, cfg, fake, nets = kind == "g_step", given["cfg"], given["fake"], [given.get("body"), given["D"]]
        nets = nn.ModuleList(filter(None, nets))
        for p in nets.parameters():
            p.grad = None
        made.append(SimpleNamespace(kind=kind, passes=len(passes), real=given.get("real"), fake=fake))
        of_opt, of_d = given["opt"].param_groups[0]["params"], weights(nets)
        before = [p.detach().clone() for p in of_opt]
        found = step(**given)
        assert fake.requires_grad == of_g  # D's are cut off from G
        assert not same(before, of_opt) and same(of_d, weights(nets)) == of_g
        if of_g:  # D is left without gradients, and ready for its own step
            assert all(p.grad is None and p.requires_grad for p in nets.parameters())
        if hasattr(given["D"], "classify"):  # neither built nor computed at weight 0
            aux = found["aux_fake" if of_g else "aux_real"]
            assert (given["D"].classify is None) == (aux == 0) == (cfg.aux_weight == 0)
        if name in ("acgan_celeba", "cdcgan_iclevr", "sngan_iclevr"):
            assert all((x.min() > 1.9) == (cfg.augment > 0) for x in (given["real"], fake))
        return found

    monkeypatch.setattr(module.Generator, "forward", count)
    for place in (module, blocks):
        monkeypatch.setattr(place, "random_translate", moved, raising=False)
    quiet = {"sngan_iclevr": dict(add_noise=False), "infogan_mnist": dict(noise=0.0)}
    train(name, watch, recipe=recipe, **quiet.get(name, {}))
    assert [x.kind for x in made] == 2 * [*["d_step"] * n, "g_step"]
    for_d, for_g = [x for x in made if x.kind == "d_step"], made[n::n + 1]
    assert all(passes) and [x.passes for x in for_d] == [*range(1, 2 * n + 1)]
    for images in ([x.real for x in for_d], [x.fake for x in for_d]):
        assert len(torch.cat(images).unique(dim=0)) == 16 * n
    for x, last in zip(for_g, for_d[n - 1::n], strict=True):
        assert x.passes == last.passes and x.fake.data_ptr() == last.fake.data_ptr()
        assert x.real is None or x.real is last.real


# ---------------------------------------------------------------------- copies

def copied(module) -> str:
    """A script's networks, losses and steps without the rest: Config, runs, data, torchrun's line."""
    kept, rest = [], r"(import|from) (evaluator|harness|synthetic|common\.datasets|common\.files)|@dataclass"
    for node in ast.parse(inspect.getsource(module)).body:
        kept += [ast.unparse(node)] if not re.match(rest, ast.unparse(node)) else []
        if getattr(node, "name", "") == "g_step":
            break
    return "\n".join(kept).replace("dist.average_gradients(opt)", "pass").replace("dist.mean", "torch.mean")


@pytest.mark.parametrize("name", BUILD)
def test_copied_networks_and_steps_train(name):
    module, y = SCRIPTS[name], labels_of(name, 6)
    cfg = module.Config(**module.RECIPES["r3gan"] | TINY[name] | dict(precision="fp32"))
    space = {"Config": SimpleNamespace, "__name__": "copied"}
    exec(copied(module), space)
    G, D = BUILD[name](SimpleNamespace(**space), cfg)
    z, fields = torch.randn(6, cfg.z_dim if y else 5), named(module.d_step) | named(module.g_step)
    cfg = SimpleNamespace(**{field: getattr(cfg, field) for field in fields})
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-3) for net in (G, D))
    before = weights(G), weights(D)
    for _ in range(3):
        fake = G(z, *y)
        real = torch.rand_like(fake)
        found = space["d_step"](D, opt_d, real, fake.detach(), *y, cfg)
        found |= space["g_step"](D, opt_g, real, fake, *y, cfg)
        assert all(value.isfinite() for value in found.values())
    assert not same(before[0], weights(G)) and not same(before[1], weights(D))
