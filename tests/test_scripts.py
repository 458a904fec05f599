"""What all six scripts promise: runs end to end, resumes to the bit, samples, scores, recipes, refuses."""
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common.files import UserError
from harness.cli import Settings, parse
from harness.run import Run
from tests.conftest import TINY, CountReads, call, flags, rows_of, run_here, same, same_runs, script

NAMES = list(TINY)
GANS = [name for name in NAMES if name != "vae_celeba"]
SHOWN = {name: "last" if "mnist" in name else "best" for name in NAMES}  # what pictures and summary are of
OTHER = dict.fromkeys(NAMES, "r3gan") | {"infogan_mnist": "robust", "vae_celeba": "beta"}  # than paper
SCENES = ["test", "new_test", "real_beside_generated", "objects"]
GRIDS = {
    "dcgan_mnist": ["samples", "real_beside_generated", "interpolation", "extrapolation"],
    "infogan_mnist": ["samples", "real_beside_generated", "code_1", "code_2", "category_0_code_1"],
    "acgan_celeba": ["samples", "real_beside_generated", "attributes"],
    "vae_celeba": ["samples", "reconstructions", "interpolation", "arithmetic"],
    "sngan_iclevr": SCENES, "cdcgan_iclevr": SCENES,
}


@pytest.fixture(scope="module")
def finished(workdir):
    """script → folder, output and titles of pictures of nine iterations of its other recipe."""
    made = {}

    def get(name):
        if name not in made:
            titles, textwrap = [], importlib.import_module("textwrap")
            spy = SimpleNamespace(wrap=lambda title, n: titles.append(title) or textwrap.wrap(title, n))
            fields = dict(recipe=OTHER[name], iters=9, sample_every=3, eval_every=4, save_every=4)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(workdir)
                patch.setattr("harness.pictures.textwrap", spy)
                status, output, errors = call(name, *flags(TINY[name] | fields))
            assert (status, errors) == (0, "")
            made[name] = workdir / "runs" / f"{name}-{OTHER[name]}-synthetic", output, titles
        return made[name]
    return get


def scores_of(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_everything_and_the_best_of_its_scored_steps(finished, name):
    folder, output, _ = finished(name)
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]  # losses and scores of a step share a row
    loss, score = "loss" if "vae" in name else "d_loss", "accuracy_test" if "iclevr" in name else "fd_judge"
    assert [loss in row for row in rows] == [True] * 5
    assert [score in row for row in rows] == [False, True, False, True, True]
    samples = sorted(p.name for p in (folder / "samples").iterdir())
    assert samples == [f"step_000000{i}.png" for i in (3, 6, 9)]
    for file in ["config.json", "last.pt", "previous.pt", "best.pt", "progress.gif", "curves.png",
                 "tensorboard", *(f"{grid}.png" for grid in GRIDS[name])]:
        assert (folder / file).stat().st_size > 0, file
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames <= 3
    scores = scores_of(folder)
    assert scores["data"].startswith("synthetic ") and "held-out accuracy" in scores["judge"]
    assert scores["last"]["step"] == 9 and scores["summary"]
    assert all(value == scores[SHOWN[name]][column] for column, value in scores["summary"].items())
    judges = ["digit CNN"] if "mnist" in name else ["VGG", "ResNet-18"]  # the first reports
    assert re.findall("^judge: (.*) of width", output, re.M) == judges
    assert scores["judge"].startswith(judges[0]) and ("chosen_by" in scores) == (len(judges) == 2)
    for line in ("device: cpu", "data: synthetic", "run: "):  # what each start says
        assert len(re.findall(f"^{line}", output, re.M)) == 1, line
    assert "FID" not in output  # on a CPU
    best = torch.load(folder / "best.pt", weights_only=True)
    column, sign = ("accuracy_val", 1) if "iclevr" in name else ("fd_judge", -1)
    values = {row["step"]: sign * row[column] for row in rows if column in row}
    assert best["best"] == pytest.approx(max(values.values()), rel=1e-5)
    assert values[best["step"]] == max(values.values())


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_run_leaves_names_its_recipe(finished, name):
    """Its fields that have other values, too; the final pictures are of the scored checkpoint."""
    (folder, output, titles), values = finished(name), importlib.import_module(name).RECIPES[OTHER[name]]
    scores, content = scores_of(folder), json.loads((folder / "config.json").read_text())
    changed = [f"{f} {TINY[name][f]}" for f in values if values[f] != TINY[name].get(f, values[f])]
    assert scores["recipe"] == ", ".join([OTHER[name], *changed])
    assert content["config"]["recipe"] == OTHER[name]
    assert f"--recipe {OTHER[name]}" in content["sittings"][0]["command"]
    about = f"{scores['data']}, recipe {scores['recipe']}, "
    assert f"{folder.name}: data {about}judge {scores['judge']}, " in output
    assert all(title.startswith(f"{name} on {about}") for title in titles)
    steps = [int(re.search(r", seed 0, step (\d+)", title)[1]) for title in titles]
    assert steps[:3] == [3, 6, 9] and set(steps[3:]) == {scores[SHOWN[name]]["step"]}
    assert len(steps) >= 3 + len(GRIDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_eval_and_sample_read_the_same_checkpoint_again(finished, workdir, monkeypatch, name):
    folder = finished(name)[0]
    monkeypatch.chdir(workdir)
    before = scores_of(folder)
    grids = {folder / f"{grid}.png": (folder / f"{grid}.png").read_bytes() for grid in GRIDS[name]}
    (folder / "scores.json").write_text(json.dumps({k: v for k, v in before.items() if k == "chosen_by"}))
    for path in grids:
        path.unlink()
    run_here(name, "eval", folder)
    assert not any(path.exists() for path in grids)
    after = scores_of(folder)
    assert after.keys() == before.keys()  # the judge that chose best.pt is kept
    assert all(after.get(key) == before.get(key) for key in ("recipe", "chosen_by"))
    for column, (mean, _) in before["summary"].items():
        assert after["summary"][column][0] == pytest.approx(mean, rel=1e-3, abs=1e-6), column
    (folder / "scores.json").unlink()
    run_here(name, "sample", folder)
    assert not (folder / "scores.json").exists()
    assert grids == {path: path.read_bytes() for path in grids}
    run_here(name, "sample", folder, seed=5)  # other z, of the same training
    assert grids != {path: path.read_bytes() for path in grids}


VARIANTS = [(name, {}) for name in NAMES] + [(name, dict(recipe=OTHER[name])) for name in GANS] + [
    ("dcgan_mnist", dict(net="mlp", ema=0.9)), ("acgan_celeba", dict(d_norm="spectral", d_cond="projection")),
    ("cdcgan_iclevr", dict(d_cond="projection", smooth_labels=True, flip_labels=0.2, ema=0.9, halve_every=1)),
    ("sngan_iclevr", dict(loss="rahinge", flip_labels=0.1, label_embed="sum", lr_decay_from=3))]


@pytest.mark.parametrize("name, fields", VARIANTS, ids=str)
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(here, monkeypatch, name, fields):
    def log(self):
        original(self)
        if self.step >= 6:
            raise InterruptedError
    fields, original = fields | dict(iters=9, sample_every=5, eval_every=4, save_every=3), Run._log
    run_here(name, out="whole", **fields)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Run, "_log", log)
        run_here(name, out="cut", **fields)
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 3
    shutil.copytree("cut", "early")  # as if it had been killed before its first checkpoint
    for path in Path("early").glob("*.pt"):
        path.unlink()
    for folder in ("cut", "early") if name == "dcgan_mnist" else ("cut",):
        run_here(name, "resume", folder)
        same_runs(here / folder, here / "whole")


@pytest.mark.parametrize("name, recipe", [(name, r) for name in NAMES for r in ("paper", OTHER[name])])
def test_an_iteration_reads_nothing_back(here, monkeypatch, name, recipe):
    monkeypatch.setattr("harness.dist.all_reduce_max", lambda number: number)  # which reads from the CPU
    counts = []
    for iters in (1, 2, 4):  # the first renders the data
        with CountReads() as mode:
            run_here(name, iters=iters, judge="none", log_every=100, recipe=recipe, out=f"r{iters}")
        counts.append(mode.reads)
    assert counts[1] == counts[2] > 0


@pytest.mark.parametrize("name", NAMES)
def test_precision_averages_and_determinism_are_switches(here, name):
    fields = dict(iters=2, judge="none", precision="bf16", deterministic=True)
    folder = run_here(name, **fields if name == "vae_celeba" else fields | dict(ema=0.0))
    assert folder.name == f"{name}-synthetic" and not (folder / "best.pt").exists()
    state = torch.load(folder / "last.pt", weights_only=True)
    if name != "vae_celeba":
        same(state["ema"], state["G"])  # an average with decay 0 is G itself
    weights = [v for key in ("G", "vae") for v in state.get(key, {}).values() if v.is_floating_point()]
    assert weights and all(v.dtype == torch.float32 for v in weights)


@pytest.mark.parametrize("name", NAMES)
def test_settings_have_help_and_come_from_flags_else_quick_else_recipe_else_default(name):
    module = importlib.import_module(name)
    source = inspect.getsource(module.Config) + inspect.getsource(Settings)
    lines = [line for line in source.splitlines() if re.match(r"    \w+: ", line)]
    assert len(lines) > 20 and all("  # " in line for line in lines)
    default, recipes, quick = vars(module.Config()), module.RECIPES, module.QUICK
    other = recipes[OTHER[name]] | dict(recipe=OTHER[name])

    def parsed(*argv: str) -> dict:
        return vars(parse(module.Config, recipes, quick, "", argv, Path(module.__file__))[1])
    assert [*recipes] == ["paper", OTHER[name]] and not recipes["paper"] and quick["recipe"] == OTHER[name]
    assert parsed() == parsed("--recipe", "paper") == default and default["recipe"] == "paper"
    assert parsed("--recipe", OTHER[name]) == default | other
    assert parsed("--quick") == default | other | quick
    assert parsed("--quick", "--recipe", "paper") == default | quick | dict(recipe="paper")
    given = dict(iters=7, log_every=3) | {next(f for f, v in other.items() if isinstance(v, float)): 0.125}
    assert parsed("--quick", *flags(given)) == default | other | quick | given


@pytest.mark.parametrize("name", NAMES)
def test_other_runs_and_unknown_recipes_are_refused(finished, refuses, name):
    folder, other, tiny = finished(name)[0], NAMES[NAMES.index(name) - 1], flags(TINY[name] | dict(iters=1))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    refuses(name, *tiny, "--recipe", "best", message="--recipe: invalid choice: 'best' (choose from")
    refuses(name, "--resume", folder, "--recipe", "paper", message=f"--recipe is '{OTHER[name]}' there")
    refuses(name, "--sample", folder, "--save-every", "9", message="--save-every is 4 there, 9 here")
    refuses(name, "--eval", finished(other)[0], message=f"is a run of {other}.py")
    refuses(name, *tiny, "--out", folder, message="already exists")
    refuses(name, *tiny, "--data", "nowhere", message="--data nowhere: there is no such folder\n")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_resuming_with_other_images_is_refused(here, iclevr):
    folder = run_here("sngan_iclevr", iters=2, batch_size=4, data=str(iclevr), judge="none")
    assert folder.name == "sngan_iclevr"  # real data and the paper's recipe: no suffix
    Image.new("RGB", (40, 30)).save(next((iclevr / "images").iterdir()))
    with pytest.raises(UserError, match="does not hold the images"):
        run_here("sngan_iclevr", "resume", folder, iters=4)


def test_folders_of_images_train_with_their_classes_or_without_labels(here):
    """Any pictures, a class of them in each folder; more classes than a picture has rows."""
    for i in range(180):
        path = here / "pets" / f"kind {i % 45}" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i % 9, 40), (i % 45 * 5, i, 0)).save(path)
    fields = dict(data=str(here / "pets"), iters=2)
    status, output, errors = call("acgan_celeba", *flags(TINY["acgan_celeba"] | fields | dict(out="r")))
    assert (status, errors) == (0, "") and "162 training images" in output
    scores = scores_of(here / "r")
    assert (scores["data"], scores["attributes"]) == ("pets", ["kind 0 … kind 9"])
    shutil.rmtree(here / "pets" / "kind 0")
    call("acgan_celeba", "--sample", "r", "--to", "images", "--n", "5", "--with", "kind 7")
    assert [*json.loads(Path("images", "labels.json").read_text()).values()] == [["kind 7"]] * 5
    status, output, errors = call("vae_celeba", *flags(TINY["vae_celeba"] | fields | dict(out="v")))
    assert (status, errors) == (0, "") and "no judge and no scores: the images have no labels" in output
    assert (here / "v" / "reconstructions.png").exists() and not (here / "v" / "scores.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_on_cuda(tmp_path, name):
    fields = TINY[name] | dict(device="cuda", precision="bf16", iters=4)
    fields |= {} if "iclevr" in name else dict(fid_weights="none")
    script(name, *flags(fields), cwd=tmp_path)
