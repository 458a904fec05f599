"""InfoGAN: its networks and losses by the numbers, its measures, and the script as a user runs it."""
import csv
import json
import math

import pytest
import scipy
import torch
from PIL import Image
from torch import nn

import evaluator
import infogan_mnist
from common import worlds
from common.datasets import Digits
from tests.conftest import CountReads, cut_off_and_resumed, main, same, script

SCRIPT = infogan_mnist  # what `refuses` runs
CPU = torch.device("cpu")
TINY = ["--data", "drawn", "--n-drawn", "60", "--ch", "2", "--image-size", "32", "--batch-size", "8",
        "--judge-width", "8", "--judge-steps", "4", "--eval-images", "60", "--eval-draws", "2",
        "--log-every", "2", "--device", "cpu"]


# ------------------------------------------------------------------------------------------- networks, losses

def test_the_networks_are_the_write_up_s():
    cfg = infogan_mnist.Config()
    G, body, D, Q, _ = infogan_mnist.build(cfg, CPU)
    code = infogan_mnist.join(torch.rand(2, 62), torch.tensor([3, 0]), torch.rand(2, 2), 10)
    assert code.shape == (2, 74)
    shapes, x = [], code
    for layer in G:
        x = layer(x)
        shapes += [tuple(x.shape[1:])] if isinstance(layer, nn.ConvTranspose2d) else []
    assert shapes == [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (1, 64, 64)]
    assert x.abs().max() <= 1
    shapes = []
    for layer in body:
        x = layer(x)
        shapes += [tuple(x.shape[1:])] if isinstance(layer, nn.Conv2d) else []
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert not any(getattr(m, "bias", None) is not None for net in (G, body, D) for m in net.modules()
                   if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
    assert [m for m in body][1].negative_slope == 0.2 and not isinstance(body[2], nn.BatchNorm2d)
    assert D(x).shape == (2, 1)
    logits, mean, variance = Q(x)
    assert logits.shape == (2, 10) and mean.shape == variance.shape == (2, 2)
    linear = [m for m in Q.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8192, 100), (100, 10)]
    heads = [m for m in Q.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in heads] == [
        (10, 10, (1, 1)), (10, 2, (1, 1)), (10, 2, (1, 1))]


@pytest.mark.parametrize("size, categories, continuous", [(32, 3, 1), (64, 12, 4)])
def test_other_sizes_and_numbers_of_codes(size, categories, continuous):
    cfg = infogan_mnist.Config(ch=2, image_size=size, n_categories=categories, n_continuous=continuous)
    G, body, D, Q, _ = infogan_mnist.build(cfg, CPU)
    z, category, codes = infogan_mnist.columns_of_classes(cfg, torch.Generator(), 2, None)
    x = infogan_mnist.make(cfg, G, z, category, codes)
    assert x.shape == (2 * categories, 1, size, size)
    logits, mean, variance = Q(body(x))
    assert logits.shape[1] == categories and mean.shape[1] == variance.shape[1] == continuous
    assert D(body(x)).shape == (2 * categories, 1)


def test_the_code_s_layout():
    z, continuous = torch.rand(3, 4), torch.rand(3, 2)
    code = infogan_mnist.join(z, torch.tensor([1, 0, 2]), continuous, 3)
    assert torch.equal(code[:, :4], z) and torch.equal(code[:, 7:], continuous)
    assert code[:, 4:7].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_q_s_losses_against_written_out_formulas():
    torch.manual_seed(0)
    logits, mean = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    variance, codes = torch.rand(5, 3, dtype=torch.float64) + 0.1, torch.randn(5, 3, dtype=torch.float64)
    category = torch.tensor([0, 3, 2, 2, 1])
    cross_entropy, likelihood = infogan_mnist.q_losses((logits, mean, variance), category, codes)
    rows = [-math.log(logits[i, k].exp() / logits[i].exp().sum()) for i, k in enumerate(category)]
    assert cross_entropy.item() == pytest.approx(sum(rows) / 5)
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(codes)
    torch.testing.assert_close(likelihood, -density.mean())


def test_the_variance_can_not_reach_zero():
    Q = infogan_mnist.QHead(4, 10, 2)
    nn.init.constant_(Q.variance.bias, -1e4)
    _, mean, variance = Q(torch.zeros(3, 4, 4, 4))
    assert (variance >= 0.01).all()
    _, loss = infogan_mnist.q_losses((torch.zeros(3, 10), mean, variance), torch.zeros(3).long(), mean)
    assert loss.isfinite()


@pytest.mark.parametrize("which", ["d", "g"])
def test_each_update_reaches_what_it_should_and_nothing_else(tmp_path, monkeypatch, which):
    """One iteration in which one of the two optimisers has a rate of zero."""
    monkeypatch.chdir(tmp_path)
    rates = {"lr_d": 0.0 if which == "g" else 0.01, "lr_g": 0.0 if which == "d" else 0.01}
    cfg = infogan_mnist.Config(iters=1, data="drawn", n_drawn=60, ch=2, image_size=32, batch_size=8,
                               judge="none", device="cpu", out="run", **rates)
    torch.manual_seed(cfg.seed)
    before = dict(zip(("G", "body", "D", "Q"), infogan_mnist.build(cfg, CPU)))
    assert infogan_mnist.train(cfg) == 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)

    def moved(name: str) -> set[bool]:
        return {not torch.equal(p, state[name][key]) for key, p in before[name].named_parameters()}
    trained = {name for name in before if moved(name) == {True}}
    assert trained == ({"body", "D"} if which == "d" else {"G", "Q"})
    assert all(moved(name) in ({True}, {False}) for name in before)


# ------------------------------------------------------------------------------------------------- pictures

def test_the_grid_s_layout():
    cfg = infogan_mnist.Config(n_categories=5, n_continuous=3, z_dim=7)
    z, category, codes = infogan_mnist.columns_of_classes(cfg, torch.Generator().manual_seed(0), 10, 1)
    assert torch.equal(category.view(10, 5), torch.arange(5).expand(10, 5))  # constant down a column
    assert (z.view(10, 5, 7) == z.view(10, 5, 7)[0]).all()  # so is the noise
    assert len(z[:5].unique(dim=0)) == 5  # but columns differ
    codes = codes.view(10, 5, 3)
    torch.testing.assert_close(codes[:, 2, 1], torch.linspace(-1, 1, 10))
    assert not codes[..., [0, 2]].any()
    z, category, codes = infogan_mnist.columns_of_classes(cfg, torch.Generator().manual_seed(0), 10, None)
    assert len(z.unique(dim=0)) == 50 and codes.abs().max() <= 1 and z.abs().max() <= 1 and z.min() < -0.9


# ------------------------------------------------------------------------------------------------- measures

def test_match_finds_the_best_one_to_one_assignment():
    codes = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    digits = torch.tensor([7] * 9 + [1] + [7] * 8 + [4] * 2 + [5] * 10)  # 0 and 1 both look like 7
    digit, agree, purity = evaluator.match(codes, digits, 3)
    assert digit == [7, 4, 5] and agree == pytest.approx((9 + 2 + 10) / 30)
    assert purity.tolist() == pytest.approx([0.9, 0.8, 1.0])
    codes, digits = torch.arange(12), torch.arange(12) % 10  # more codes than digits
    digit, agree, _ = evaluator.match(codes, digits, 12)
    assert sorted(digit)[:2] == [-1, -1] and agree == pytest.approx(10 / 12)


def test_score_category_of_known_digits():
    """Code k writes digit (k + 3) % 10; a tenth of the images is of the next digit."""
    class Net(nn.Module):
        size = 32

        def forward(self, x):
            return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 10).float()

    def sample(category, g):
        wrong = (torch.rand(len(category), generator=g) < 0.1).long()
        return ((category + 3 + wrong) % 10)[:, None, None, None].float().expand(-1, 1, 32, 32)

    result = evaluator.score_category(sample, 10, evaluator.Judge(Net(), "", None), 2000, 3, 0)
    assert result["digit"] == [(k + 3) % 10 for k in range(10)]
    mean, std = result["accuracy"]
    assert mean == pytest.approx(0.9, abs=0.02) and 0 < std < 0.02
    assert all(p == pytest.approx(0.9, abs=0.06) for p in result["purity"][0])


def test_slant_and_width_are_the_true_ones():
    for size in (28, 64):
        images, labels, factors = worlds.digits(400, image_size=size)
        slant, width = evaluator.slant_and_width(images / 127.5 - 1)
        ones = labels == 1  # a plain stroke in most of them
        assert evaluator.spearman(slant[ones], factors["slant"][ones]) > 0.9
        assert evaluator.spearman(slant, factors["slant"]) > 0.85
        assert evaluator.spearman(width, factors["width"]) > 0.95
        assert (width / factors["width"]).median() == pytest.approx(1, abs=0.06)
    assert evaluator.slant_and_width(-torch.ones(2, 1, 28, 28))[0].isnan().all()


def test_spearman_is_scipy_s():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 30).round(decimals=1)  # with ties
    for row, x, y in zip(evaluator.spearman(a, b), a, b):
        assert row.item() == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    b[0, 3], b[1] = torch.nan, 4.0
    assert evaluator.spearman(a, b)[:2].tolist() == [0, 0] and evaluator.spearman(a, b)[2] != 0


def test_score_continuous_tells_what_a_code_moves():
    """Code 1 shears a bar, code 2 thins it; noise and category must not matter."""
    def make(z, category, codes):
        at = torch.linspace(-1, 1, 32)
        x = at[None, None, :] + 0.4 * codes[:, 0, None, None] * at[None, :, None] + 0.1 * z[:, :1, None]
        width = 0.14 - 0.04 * codes[:, 1, None, None]
        ink = ((width - x.abs()) / 0.04 + 0.5).clamp(0, 1) * (at.abs() < 0.8)[None, :, None]
        return ink[:, None] * 2 - 1

    result = evaluator.score_continuous(make, 3, 10, 2, draws=2, seed=0, ways=20)
    assert result["code 1 ~ slant"][0] > 0.99 and result["code 2 ~ width"][0] < -0.99
    assert result["code 1: change of slant"][0] == pytest.approx(0.8, abs=0.1)
    assert -0.16 * 14 < result["code 2: change of width"][0] < -0.08 * 14  # ends count, too
    assert abs(result["code 2: change of slant"][0]) < 0.1
    blank = evaluator.score_continuous(lambda z, *_: -torch.ones(len(z), 1, 32, 32), 3, 10, 1, 1, 0, ways=4)
    assert blank["code 1 ~ slant"] == (0.0, 0.0)


def test_score_reading_against_true_factors():
    images, labels, factors = worlds.digits(300)
    data = Digits("drawn digits", images, labels, images, labels, factors, "x")
    codes = torch.stack([factors["slant"] * 2, -factors["width"]], 1)
    result = evaluator.score_reading(((labels + 1) % 10, codes), data)
    assert result["Q's category → class"][0] == 1
    assert result["Q's code 1 ~ slant"][0] == pytest.approx(1)
    assert result["Q's code 2 ~ width"][0] == pytest.approx(-1)
    assert abs(result["Q's code 1 ~ width"][0]) < 0.4


# ------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(workdir):
    done = script("infogan_mnist.py", *TINY, "--iters", "9", "--out", "runs/infogan", "--sample-every", "3",
                  "--eval-every", "4", "--save-every", "4", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "infogan", done.stdout


def test_a_run_leaves_everything(finished):
    folder, told = finished
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [r["step"] for r in rows if r["q_category"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["accuracy_code"]] == ["4", "8", "9"]
    assert float(rows[0]["q_category"]) == pytest.approx(math.log(10), abs=0.5)  # nothing is known yet
    for name in ("last.pt", "best.pt", "progress.gif", "real_beside_generated.png"):
        assert (folder / name).stat().st_size > 0, name
    for name, columns in (("samples", 10), ("code_1", 10), ("code_2", 10), ("category_0_code_1", 21)):
        with Image.open(folder / f"{name}.png") as grid:
            assert grid.width == columns * 66 + 2
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores["summary"]) == {"code → digit", "a code ~ slant", "a code ~ width", "FD (judge)"}
    strongest = max(abs(scores["last"][f"code {c} ~ width"][0]) for c in (1, 2))
    assert scores["summary"]["a code ~ width"][0] == strongest
    assert 0.1 <= scores["last"]["code → digit"][0] <= 1 and len(scores["last"]["digit"]) == 10
    for part in ("code → digit", "Q's category → class", "Q's code 2 ~ width", "held-out accuracy"):
        assert part in told


def test_sample_and_eval_read_a_run(finished, workdir, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(workdir)
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    main(infogan_mnist, "--eval", "runs/infogan")
    after = json.loads((folder / "scores.json").read_text())
    assert set(after) == set(before) and after["last"]["digit"] == before["last"]["digit"]
    assert after["last"]["FD (judge)"] == pytest.approx(before["last"]["FD (judge)"], rel=1e-4)
    main(infogan_mnist, "--sample", "runs/infogan", "--category", "7")
    assert (folder / "category_7_code_2.png").exists()


def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")  # digits and judge
    cut_off_and_resumed(infogan_mnist, at=16, iters=25, data="drawn", n_drawn=60, ch=2, image_size=32,
                        batch_size=8, judge_width=8, judge_steps=4, eval_images=40, log_every=2,
                        sample_every=7, eval_every=8, save_every=5, device="cpu")
    state = torch.load("cut/last.pt", weights_only=True)
    same(state["ema"], state["G"])


def test_an_iteration_reads_nothing_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = []
    for iters in (2, 2, 5):  # the first one draws the digits
        cfg = infogan_mnist.Config(iters=iters, data="drawn", n_drawn=60, ch=2, image_size=32, batch_size=8,
                                   judge="none", log_every=100, device="cpu")
        with CountReads() as mode:
            assert infogan_mnist.train(cfg) == 0
        counts.append(mode.reads)
    assert counts[1] == counts[2] > 0


def test_bad_input(refuses, finished, tmp_path):
    folder = str(finished[0])
    refuses("--n-categories", "1", message="--n-categories 1 at least 2")
    refuses("--n-continuous", "0", message="--n-continuous 0: must be at least 1")
    refuses("--image-size", "28", message="invalid choice")
    refuses("--resume", folder, "--n-continuous", "3", message="n_continuous is 2 there and 3 here")
    refuses("--sample", folder, "--n-categories", "12", message="n_categories is 10 there and 12 here")
    refuses("--sample", folder, "--category", "10", message="this run has 0 to 9")
    (tmp_path / "empty").mkdir()
    refuses("--sample", "empty", message="is no run")
    (tmp_path / "empty" / "config.json").write_text((finished[0] / "config.json").read_text())
    refuses("--sample", "empty", message="has saved no checkpoint yet")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_short_run_on_cuda(tmp_path):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script("infogan_mnist.py", *args, "--iters", "4", "--device", "cuda", "--precision", "bf16",
                  "--fid-weights", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
