"""InfoGAN: its losses, its grids, and the meaning of its codes."""
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

import infogan_mnist
from common.files import UserError
from common.losses import minimax_d, nonsaturating_g
from harness import run
from infogan_mnist import Config, join, q_losses
from synthetic.measures import category_digits, match, slant_and_width
from tests.conftest import Reader, judge_of, rows_of, run_here


def networks(ch=2, image_size=32, k=10, c=2):
    torch.manual_seed(0)
    features = infogan_mnist.widths(ch, image_size)[-1]
    return (infogan_mnist.Generator(62 + k + c, ch, image_size), infogan_mnist.Body(ch, image_size),
            infogan_mnist.QHead(features, k, c))


@pytest.mark.parametrize("size, k, c", [(32, 3, 1), (64, 12, 4)])
def test_sizes_and_numbers_of_codes_are_settings_and_a_code_has_its_layout(size, k, c):
    (G, body, Q), cfg = networks(2, size, k, c), Config(n_categories=k, n_continuous=c)
    z, category, continuous = infogan_mnist.grid_codes(cfg, torch.Generator(), 2, None)
    code = join(z, category, continuous, k)
    torch.testing.assert_close(code, torch.cat([z, one_hot(category, k), continuous], 1))
    assert G(code).shape == (2 * k, 1, size, size)
    assert [part.shape for part in Q(body(G(code)))] == [(2 * k, k), (2 * k, c), (2 * k, c)]


def test_q_s_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, mean = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    variance, codes = torch.rand(5, 3, dtype=torch.float64) + 0.1, torch.randn(5, 3, dtype=torch.float64)
    category = torch.tensor([0, 3, 2, 2, 1])
    cross_entropy, likelihood = q_losses((logits, mean, variance), category, codes)
    rows = [-math.log(logits[i, k].exp() / logits[i].exp().sum()) for i, k in enumerate(category)]
    assert cross_entropy.item() == pytest.approx(sum(rows) / 5)
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(codes)
    torch.testing.assert_close(likelihood, -density.mean())


def test_the_variance_can_not_reach_zero():
    Q = infogan_mnist.QHead(4, 10, 2)
    nn.init.constant_(Q.variance.bias, -1e4)
    _, mean, variance = Q(torch.zeros(3, 4, 4, 4))
    assert (variance >= 0.01).all()
    assert q_losses((torch.zeros(3, 10), mean, variance), torch.zeros(3).long(), mean)[1].isfinite()


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_g_and_q_learn_by_their_losses_and_the_category_is_read_from_changed_images(augment):
    (_, body, Q), D = networks(), nn.Sequential(nn.Conv2d(4 * 2, 1, 4), nn.Flatten())
    cfg = Config(q_weight=0.3, augment=augment, precision="fp32")
    real, fake, changed = torch.rand(3, 8, 1, 32, 32)
    category, continuous = torch.randint(10, (8,)), torch.rand(8, 2) * 2 - 1
    opt = torch.optim.SGD([*body.parameters(), *D.parameters()], 0.0)
    found = infogan_mnist.d_step(body, D, opt, real, fake, cfg)
    torch.testing.assert_close(found["d_loss"], minimax_d(D(body(real)), D(body(fake))))
    learning = [fake.requires_grad_(), *Q.parameters()]
    opt = torch.optim.SGD(learning, 0.0)
    found = infogan_mnist.g_step(body, D, Q, opt, fake, changed, category, continuous, cfg)
    score, (logits, mean, variance) = D(body(fake)), Q(body(fake))
    logits = Q(body(changed))[0] if augment else logits
    losses = nonsaturating_g(score), *q_losses((logits, mean, variance), category, continuous)
    torch.testing.assert_close((found["g_loss"], found["q_category"], found["q_continuous"]), losses)
    slopes = torch.autograd.grad(losses[0] + losses[1] + 0.3 * losses[2], learning)
    torch.testing.assert_close([p.grad for p in learning], list(slopes))


def test_noise_is_on_all_images_of_d_and_q_and_falls_to_zero(here, monkeypatch):
    stds, given = [], []
    for name in ("d_step", "g_step"):
        monkeypatch.setattr(infogan_mnist, name, lambda *args: given.extend(
            x.min().item() for x in args if isinstance(x, torch.Tensor) and x.ndim == 4) or {})
    monkeypatch.setattr(infogan_mnist, "instance_noise", lambda x, std: stds.append(std) or x + std)
    monkeypatch.setattr(infogan_mnist.evaluator, "finish", lambda *args, **options: {})
    run_here("infogan_mnist", iters=5, noise=8.0, noise_iters=4, augment=1.0, judge="none", sample_every=0)
    assert stds == pytest.approx([std for std in (6, 4, 2, 0, 0) for _ in range(4)])
    assert len(given) == 5 * 4 and all(x >= stds[4 * (i // 4)] - 1 for i, x in enumerate(given))
    monkeypatch.undo()
    assert infogan_mnist.instance_noise(torch.zeros(9999), 0.5).std() == pytest.approx(0.5, abs=0.03)


def test_the_grid_s_layout():
    cfg, g = Config(n_categories=5, n_continuous=3, z_dim=7), torch.Generator().manual_seed(0)
    z, category, codes = infogan_mnist.grid_codes(cfg, g, 10, 1)
    assert torch.equal(category.view(10, 5), torch.arange(5).expand(10, 5))  # constant down a column
    assert (z.view(10, 5, 7) == z.view(10, 5, 7)[0]).all()  # so is the noise
    assert len(z[:5].unique(dim=0)) == 5  # but columns differ
    codes = codes.view(10, 5, 3)
    torch.testing.assert_close(codes[:, 2, 1], torch.linspace(-1, 1, 10))
    assert not codes[..., [0, 2]].any()
    z, category, codes = infogan_mnist.grid_codes(cfg, g, 10, None)
    assert len(z.unique(dim=0)) == 50 and codes.abs().max() <= 1 and z.abs().max() <= 1 and z.min() < -0.9


def test_match_finds_the_best_one_to_one_assignment():
    shares = torch.zeros(3, 10)
    shares[0, 7], shares[0, 1], shares[1, 7], shares[1, 4], shares[2, 5] = 0.9, 0.1, 0.8, 0.2, 1.0
    digit, agree = match(shares)  # 0 and 1 both look like 7
    assert digit == [7, 4, 5] and agree == pytest.approx((0.9 + 0.2 + 1) / 3)
    digit, agree = match(torch.eye(10)[torch.arange(12) % 10])  # more categories than digits
    assert sorted(digit)[:2] == [-1, -1] and agree == pytest.approx(10 / 12)


def test_category_digits_of_known_digits():
    """Category k shows digit (k + 3) % 10; a tenth of the images shows the next digit."""
    g = torch.Generator().manual_seed(1)

    def make(z, category, codes):
        wrong = (torch.rand(len(category), generator=g) < 0.1).long()
        return ((category + 3 + wrong) % 10)[:, None, None, None].float().expand(-1, 1, 32, 32)

    judge = judge_of("digits", Reader(lambda x: one_hot(x[:, 0, 0, 0].round().long(), 10).float()))
    found = category_digits(make, judge, 2000, 62, 10, 2, torch.Generator().manual_seed(0))
    assert match(found["shares"])[0] == [(k + 3) % 10 for k in range(10)]
    assert found["code → digit"] == pytest.approx(0.9, abs=0.02)
    assert found["shares"].max(1).values.tolist() == pytest.approx([0.9] * 10, abs=0.06)


def test_pictures_and_scores_of_a_run(here):
    folder = run_here("infogan_mnist", iters=2, eval_every=2, category=7)
    for name, columns in (("samples", 10), ("code_1", 10), ("code_2", 10), ("category_7_code_1", 21)):
        with Image.open(folder / f"{name}.png") as grid:
            assert grid.width == columns * 66 + 2
    assert {"accuracy_code", "q_category", "q_continuous"} < rows_of(folder)[-1].keys()
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    last, summary = scores["last"], scores["summary"]
    assert list(summary) == ["code → digit", "a code ~ slant", "a code ~ width", "FD (judge)"]
    assert 0 <= min(last[f"a code ~ {name}"][0] for name in ("slant", "width")) <= 1
    assert 0.1 <= last["code → digit"][0] <= 1 and [len(row) for row in last["shares"][0]] == [10] * 10


def test_images_are_changed_each_in_its_own_way():
    torch.manual_seed(0)
    bar = -torch.ones(64, 1, 32, 32)
    bar[..., 8:24, 15:18] = 1  # upright, three pixels wide
    assert infogan_mnist.random_affine(bar, 0.0) is bar
    changed = infogan_mnist.random_affine(bar, 1.0)
    assert changed.shape == bar.shape and changed.min() >= -1 and changed.max() <= 1
    slant, width = slant_and_width(changed)
    assert slant.min() < -0.2 and slant.max() > 0.2  # leaning to both sides
    before = slant_and_width(bar[:1])[1]
    assert width.min() < 0.7 * before and width.max() > 1.4 * before  # thinner and thicker
    ink, at = changed[:, 0] + 1, torch.arange(32.0)
    for axis in (1, 2):  # moved up and down, left and right
        assert ((ink.sum(axis) * at).sum(1) / ink.sum((1, 2))).std() > 0.5
    with Operations() as used:
        infogan_mnist.random_affine(bar, 1.0)
    assert "rand" in used.names and "lift_fresh" not in used.names


class Operations(TorchDispatchMode):
    """Their names; lift_fresh makes a tensor of the host's numbers, for which a GPU would wait."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_gradient_that_cuda_has_not_is_refused_before_the_training(here, monkeypatch):
    monkeypatch.setattr(run, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(run, "hardware", lambda _: "")
    for augment, message in ((1.0, "--deterministic: .* give --augment 0, too"), (0.0, "reached the data")):
        with pytest.raises(UserError, match=message), monkeypatch.context() as patch:
            patch.setattr(infogan_mnist, "load_digits", no_data)
            run_here("infogan_mnist", deterministic=True, augment=augment, precision="fp32")
    assert not (here / "runs").exists()


def no_data(*_):
    raise UserError("reached the data")
