"""ACGAN on faces: where the condition enters, every variant, and the script as a user runs it."""
import csv
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import acgan_celeba
from common import worlds
from common.datasets import load_faces
from tests.conftest import CountReads, cut_off_and_resumed, main, same, script

SCRIPT = acgan_celeba  # what `refuses` runs
FIELDS = dict(data="drawn", n_drawn=300, image_size=32, ch=1, z_dim=4, batch_size=8, n_dis=2, judge_width=8,
              judge_steps=4, eval_images=20, eval_draws=2, log_every=2, device="cpu")
TINY = [text for name, value in FIELDS.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def networks(**fields):
    torch.manual_seed(0)
    cfg = acgan_celeba.Config(**{"ch": 2, "z_dim": 4, "image_size": 64, **fields})
    return acgan_celeba.build(cfg, 15, torch.device("cpu"))[:2]


def labels(n):
    return worlds.faces(n, 8)[1].float()


# ------------------------------------------------------------------------------------------------- networks

def test_the_networks_are_the_write_up_s():
    G, D = networks(ch=32, z_dim=128, image_size=128)
    assert G.first.weight.shape == (512 * 4 * 4, 128 + 15)
    widths = [512, 256, 128, 64, 32, 3]
    assert [conv.weight.shape for conv in G.convs] == [(i + 15, o, 4, 4) for i, o in zip(widths, widths[1:])]
    assert [conv.weight.shape[:2] for conv in D.convs] == [*zip(widths[-2::-1], widths[::-1])]
    for conv in [*G.convs, *D.convs]:
        assert conv.stride == (2, 2) and conv.padding == (1, 1)
    kinds = [type(norm) for norm in D.norms]
    assert kinds == [nn.Identity] + [nn.BatchNorm2d] * 4
    assert D.score.in_features == 512 * 4 * 4 + 15 and D.attributes.weight.shape == (15, 512 * 4 * 4)
    images = G(torch.randn(2, 128), labels(2))
    assert images.shape == (2, 3, 128, 128) and images.abs().max() <= 1
    score, seen = D(images, labels(2))
    assert score.shape == (2,) and seen.shape == (2, 15)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_other_sizes_end_in_4_by_4(size):
    G, D = networks(image_size=size)
    images = G(torch.randn(2, 4), labels(2))
    assert images.shape == (2, 3, size, size) and len(G.convs) == len(D.convs) == {32: 3, 64: 4, 128: 5}[size]
    assert D.attributes.in_features == 16 * 2 * 4 * 4 and D(images, labels(2))[0].shape == (2,)


def test_spectral_norm_bounds_all_that_the_score_passes():
    for cond in ("concat", "projection"):
        torch.manual_seed(0)
        _, D = networks(d_norm="spectral", d_cond=cond)
        layers = [*D.convs, D.score, *([D.embed] if cond == "projection" else [])]
        for _ in range(30):
            D(torch.zeros(1, 3, 64, 64), labels(1))  # power iterations
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)
            raw = layer.parametrizations.weight.original  # initialised before it was wrapped
            assert raw.std().item() == pytest.approx(0.02, rel=0.3)
        assert not parametrize.is_parametrized(D.attributes) and not any(
            isinstance(m, nn.BatchNorm2d) for m in D.modules())


def test_the_condition_enters_every_layer_of_g_as_maps_and_only_the_first_as_input():
    y, z = labels(6), torch.randn(6, 4)
    for cond in ("maps", "input"):
        G, _ = networks(g_cond=cond)
        inputs = []
        for conv in G.convs:
            conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        G(z, y)
        assert len(inputs) == 4
        for h, width in zip(inputs, (32, 16, 8, 4)):
            assert h.shape[1] == width + (15 if cond == "maps" else 0)
            if cond == "maps":
                assert torch.equal(h[:, width:], y[:, :, None, None].expand(-1, -1, *h.shape[2:]))

        def heeds(layer) -> bool:  # does G heed y where the weights that y meets are 0 in all but one layer?
            G, _ = networks(g_cond=cond)
            G.eval()
            with torch.no_grad():
                for k, weight in enumerate([G.first.weight.T, *(conv.weight for conv in G.convs)]):
                    if k != layer and (k == 0 or cond == "maps"):
                        weight[-15:] = 0
                return not torch.equal(G(z, y), G(z, y.flip(1)))
        expected = [False, True, *[cond == "maps"] * 4]
        assert [heeds(k) for k in range(-1, 5)] == expected


def test_concat_shifts_the_score_and_projection_weighs_the_features():
    x, y = torch.randn(5, 3, 64, 64), labels(5)
    for cond in ("concat", "projection"):
        _, D = networks(d_cond=cond)
        D.eval()
        (one, seen), (other, again) = D(x, y), D(x, y.roll(1, 1))
        assert torch.equal(seen, again)  # the attributes' logits are of the features alone
        features = []
        D.attributes.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        D(x, y)
        if cond == "concat":
            shift = (y.roll(1, 1) - y) @ D.score.weight[0, -15:]
            torch.testing.assert_close(other - one, shift)
        else:
            h = features[0]
            expected = D.score(h)[:, 0] + torch.einsum("na,fa,nf->n", y, D.embed.weight, h)
            torch.testing.assert_close(one, expected)


# ------------------------------------------------------------------------------------------------- training

def rows_of(folder):
    rows = csv.DictReader(open(folder / "metrics.csv"))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


VARIANTS = [*acgan_celeba.VARIANTS.values(), dict(loss="hinge", d_norm="spectral", d_cond="projection"),
            dict(loss="bce", d_cond="projection", g_cond="input"), dict(loss="wgan-div", d_norm="spectral"),
            dict(aux_fake=True)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_variant_trains_and_its_loss_is_its_parts(tmp_path, monkeypatch, workdir, finished, variant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    monkeypatch.setattr(acgan_celeba, "draw", lambda *_: None)  # pictures have tests of their own
    fields = {**FIELDS, **variant, "judge": "none", "log_every": 1, "iters": 2, "aux_weight": 3.0}
    assert acgan_celeba.train(acgan_celeba.Config(out="x", **fields)) == 0
    loss = fields.get("loss", "wgan-gp")
    for row in rows_of(tmp_path / "x"):  # Run.log has refused what is not finite
        assert row["aux_real"] > 0 and row["aux_fake"] > 0
        assert (row["penalty"] > 0) == (loss in ("wgan-gp", "wgan-div"))
        if loss.startswith("wgan"):
            parts = row["d_fake"] - row["d_real"] + row["penalty"] + 3 * row["aux_real"]
            extra = row["d_loss"] - parts  # three times the generated images' part
            assert extra > 0.5 if variant.get("aux_fake") else abs(extra) < 1e-3
    D = torch.load(tmp_path / "x" / "last.pt", weights_only=True)["D"]
    weights = torch.cat([v.flatten() for k, v in D.items() if "running" not in k and "num_batches" not in k])
    if loss == "wgan-clip":
        assert weights.abs().max() == pytest.approx(0.01)
    else:
        assert weights.abs().max() > 0.03


def test_the_penalties_weights_are_settings(tmp_path, monkeypatch, workdir, finished):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    monkeypatch.setattr(acgan_celeba, "draw", lambda *_: None)
    fields = {**FIELDS, "judge": "none", "log_every": 1, "iters": 1, "n_dis": 1}

    def penalty(**more):
        name = ",".join(f"{k}={v}" for k, v in more.items())
        assert acgan_celeba.train(acgan_celeba.Config(out=name, **{**fields, **more})) == 0
        return rows_of(tmp_path / name)[0]["penalty"]
    assert penalty(gp_weight=20.0) == pytest.approx(2 * penalty(gp_weight=10.0), rel=1e-5)
    k2 = penalty(loss="wgan-div", div_k=2.0)
    assert penalty(loss="wgan-div", div_k=6.0) == pytest.approx(3 * k2, rel=1e-5)
    assert penalty(loss="wgan-div", div_p=2.0) != pytest.approx(k2, rel=1e-2)


# ------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(workdir):
    done = script("acgan_celeba.py", *TINY, "--iters", "9", "--out", "runs/acgan", "--sample-every", "1",
                  "--eval-every", "4", "--save-every", "4", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "acgan", done.stdout


def test_a_run_leaves_everything(finished):
    folder, told = finished
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert list(rows[0]) == ["step", "seconds", "d_loss", "g_loss", "d_real", "d_fake", "penalty", "aux_real",
                             "aux_fake", "fd_judge", "accuracy"]
    assert [r["step"] for r in rows if r["d_loss"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["fd_judge"]] == ["4", "8", "9"]
    for name in ("samples", "real_beside_generated", "attributes", "combinations"):
        assert (folder / f"{name}.png").stat().st_size > 0, name
    with Image.open(folder / "attributes.png") as a, Image.open(folder / "combinations.png") as c:
        assert a.width == 8 * 66 + 2 and a.height > 15 * 66 and c.width == 6 * 66 + 2 and c.height > 24 * 66
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames == 9
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["data"] == "drawn faces" and scores["n_real"] == 30 and scores["last"]["step"] == 9
    assert scores["attributes"] == ["blonde hair … white hair", "brown eyes … black eyes",
                                    "African face … Caucasian face", "with glasses … without glasses"]
    assert scores["summary"] == {name: scores["best"][name] for name in ("FD (judge)", "accuracy", "exact")}
    fds = [float(r["fd_judge"]) for r in rows if r["fd_judge"]]
    assert torch.load(folder / "best.pt", weights_only=True)["best"] == pytest.approx(min(fds), rel=1e-5)
    for part in ("training images", "their labels shuffled", "held-out accuracy", "white hair"):
        assert part in told
    assert "FID: not measured" in told and told.count("FID") == 1  # and nothing else goes by that name


def test_sample_and_eval_read_a_run(finished, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    folder, _ = finished
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    main(acgan_celeba, "--eval", "runs/acgan")
    after = json.loads((folder / "scores.json").read_text())
    assert after["best"]["FD (judge)"] == pytest.approx(before["best"]["FD (judge)"], rel=1e-4)
    (folder / "combinations.png").unlink()
    main(acgan_celeba, "--sample", "runs/acgan")
    assert (folder / "combinations.png").exists()


@pytest.mark.parametrize("variant", [{}, dict(d_norm="spectral", d_cond="projection")], ids=["bn", "sn"])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, finished, monkeypatch, tmp_path, variant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")  # faces and judge
    cut_off_and_resumed(acgan_celeba, at=8, iters=12, ema=0.9, sample_every=5, eval_every=4, save_every=3,
                        **FIELDS, **variant)


def test_the_variants_make_one_table(workdir, finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    monkeypatch.setattr(acgan_celeba, "draw", lambda *_: None)
    main(acgan_celeba, *TINY, "--iters", "1", "--sample-every", "0", "--sweep", "variants", "--out", "six")
    table = list(csv.reader(open("six/sweep.csv", newline="")))
    assert [row[0] for row in table[1:]] == list(acgan_celeba.VARIANTS)
    assert table[0][1:4] == ["FD (judge)", "accuracy", "exact"] and all(all(row) for row in table)
    configs = [json.loads(path.read_text())["config"] for path in (tmp_path / "six").glob("*/config.json")]
    assert len({(c["loss"], c["d_norm"], c["d_cond"], c["g_cond"]) for c in configs}) == 6


@pytest.mark.parametrize("loss", ["wgan-gp", "hinge"])
def test_an_iteration_reads_nothing_back(workdir, finished, tmp_path, monkeypatch, loss):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    monkeypatch.setattr(acgan_celeba, "draw", lambda *_: None)
    counts = []
    for iters in (2, 5):
        fields = {**FIELDS, "iters": iters, "loss": loss, "judge": "none", "log_every": 100}
        with CountReads() as mode:
            assert acgan_celeba.train(acgan_celeba.Config(**fields)) == 0
        counts.append(mode.reads)
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------------- asking

def test_labels_are_asked_for_evenly_in_groups_and_else_as_they_are(workdir, finished, monkeypatch):
    monkeypatch.chdir(workdir)
    data, g = load_faces("drawn", 32, n_drawn=300), torch.Generator().manual_seed(0)
    asked = acgan_celeba.ask(data, 14400, g)
    combinations, counts = asked.unique(dim=0, return_counts=True)
    assert len(combinations) == 144 and 60 < counts.min() and counts.max() < 145
    for columns in data.groups:
        assert (asked[:, list(columns)].sum(1) == 1).all()
    y = acgan_celeba.switched(asked[:50], 2, 1, data)  # brown hair
    assert (y[:, :6] == F.one_hot(torch.tensor(2), 6)).all() and torch.equal(y[:, 6:], asked[:50, 6:])
    some = load_faces("drawn", 32, "with glasses,blue hair", n_drawn=300)  # blue hair alone is no group
    assert some.groups == ()
    asked = acgan_celeba.ask(some, 6000, g).float()
    torch.testing.assert_close(asked.mean(0), some.labels.float().mean(0), atol=0.03, rtol=0)
    y = acgan_celeba.switched(asked[:50], 1, 0, some)
    assert not y[:, 1].any() and torch.equal(y[:, 0], asked[:50, 0])


def test_without_groups_attributes_are_shown_without_and_with(workdir, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    fields = {**FIELDS, "judge": "none", "iters": 1, "attributes": "with glasses,blue hair", "ema": 0.0}
    assert acgan_celeba.train(acgan_celeba.Config(out="x", **fields)) == 0
    assert not (tmp_path / "x" / "combinations.png").exists()
    with Image.open("x/attributes.png") as grid:
        assert grid.width == 8 * 66 + 2 and grid.height < 3 * 66 + 60
    state = torch.load("x/last.pt", weights_only=True)
    same(state["ema"], state["G"])


# ------------------------------------------------------------------------------------------------- bad input

def test_bad_values(refuses):
    refuses("--loss", "wgan-clip", "--d-norm", "spectral", message="clipping does nothing")
    refuses("--loss", "wgan-clip", "--clip", "0", message="leaves D no weights")
    refuses("--loss", "wgan", message="invalid choice")
    refuses("--aux-fake", "--aux-weight", "0", message="there is no loss of attributes to extend")
    refuses("--loss", "wgan-div", "--div-p", "0.5", message="below 1")
    refuses("--ema", "1", message="must be below 1")
    refuses("--data", "nowhere", message="there is no list_attr_celeba.txt or cartoon_attr.txt in it")
    refuses("--data", "drawn", "--n-drawn", "10", message="10 images are too few")
    refuses("--data", "drawn", "--n-drawn", "30", "--attributes", "Hat", message="Hat; the drawn set has")
    refuses("--sweep", "variants", "loss=bce", message="--sweep loss=bce: give each field")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("loss", ["wgan-gp", "wgan-clip", "wgan-div", "hinge", "bce"])
def test_a_short_run_on_cuda(tmp_path, loss):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script("acgan_celeba.py", *args, "--iters", "4", "--loss", loss, "--device", "cuda", "--precision",
                  "bf16", "--fid-weights", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
