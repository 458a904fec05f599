"""What all six scripts promise: runs end to end, resumes to the bit, samples, scores, stops, refuses."""
import importlib
import inspect
import json
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image

from common.errors import UserError
from tests.conftest import TINY, CountReads, flags, process, rows_of, run_here, same, same_runs, script

NAMES = list(TINY)
HEADLINE = {name: "last" if "mnist" in name else "best" for name in NAMES}  # what pictures and summary are of
EVERY = dict(sample_every=3, eval_every=4, save_every=4)
GRIDS = {
    "dcgan_mnist": ["samples", "real_beside_generated", "interpolation", "extrapolation"],
    "infogan_mnist": ["samples", "real_beside_generated", "code_1", "code_2", "category_0_code_1"],
    "acgan_celeba": ["samples", "real_beside_generated", "attributes"],
    "vae_celeba": ["samples", "reconstructions", "interpolation", "arithmetic"],
    "sngan_iclevr": ["test", "new_test", "real_beside_generated", "objects", "interpolation"],
    "cdcgan_iclevr": ["test", "new_test", "real_beside_generated", "objects", "interpolation"],
}


@pytest.fixture(scope="module")
def finished(workdir):
    """{script: (folder of a run of nine iterations, its output)}, made when first needed."""
    made = {}

    def get(name):
        if name not in made:
            args = flags(TINY[name] | EVERY | dict(iters=9, out=f"runs/{name}"))
            output = script(name, *args, cwd=workdir)
            made[name] = workdir / "runs" / name, output
        return made[name]
    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_everything_and_the_best_of_its_scored_steps(finished, name):
    folder, output = finished(name)
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]  # losses and scores of a step share a row
    loss, score = "loss" if "vae" in name else "d_loss", "accuracy_test" if "iclevr" in name else "fd_judge"
    assert [loss in row for row in rows] == [True] * 5
    assert [score in row for row in rows] == [False, True, False, True, True]
    samples = sorted(p.name for p in (folder / "samples").iterdir())
    assert samples == [f"step_000000{i}.png" for i in (3, 6, 9)]
    for file in ["config.json", "last.pt", "best.pt", "progress.gif", "curves.png", "tensorboard",
                 *(f"{grid}.png" for grid in GRIDS[name])]:
        assert (folder / file).stat().st_size > 0, file
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames <= 3
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["data"].startswith("synthetic ") and "held-out accuracy" in scores["judge"]
    assert scores["last"]["step"] == 9 and scores["summary"]
    for column, value in scores["summary"].items():
        assert value == scores[HEADLINE[name]][column]
    for line in ("device: cpu", "data: synthetic", "judge: (ResNet|digit)", "run: "):  # what each start says
        assert len(re.findall(f"^{line}", output, re.M)) == 1, line
    assert "FID: not measured" in output if "iclevr" not in name else "FID" not in output
    assert output.count("FID") == ("iclevr" not in name)  # nothing else goes by that name
    best = torch.load(folder / "best.pt", weights_only=True)
    column, sign = ("accuracy_val", 1) if "iclevr" in name else ("fd_judge", -1)
    values = {row["step"]: sign * row[column] for row in rows if column in row}
    assert best["best"] == pytest.approx(max(values.values()), rel=1e-5)
    assert values[best["step"]] == max(values.values())


@pytest.mark.parametrize("name", NAMES)
def test_eval_and_sample_read_the_same_checkpoint_again(finished, workdir, monkeypatch, name):
    folder, _ = finished(name)
    monkeypatch.chdir(workdir)
    before = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    grids = {grid: (folder / f"{grid}.png").read_bytes() for grid in GRIDS[name]}
    (folder / "scores.json").unlink()
    for grid in grids:
        (folder / f"{grid}.png").unlink()
    run_here(name, "eval", folder)
    assert not any((folder / f"{grid}.png").exists() for grid in grids)
    after = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert after.keys() == before.keys()
    for column, (mean, _) in before["summary"].items():
        assert after["summary"][column][0] == pytest.approx(mean, rel=1e-3, abs=1e-6), column
    (folder / "scores.json").unlink()
    run_here(name, "sample", folder)
    assert not (folder / "scores.json").exists()
    assert grids == {grid: (folder / f"{grid}.png").read_bytes() for grid in grids}
    run_here(name, "sample", folder, seed=5)  # other z, of the same training
    assert grids != {grid: (folder / f"{grid}.png").read_bytes() for grid in grids}


VARIANTS = [(name, {}) for name in NAMES] + [
    ("dcgan_mnist", dict(net="mlp", ema=0.9)), ("acgan_celeba", dict(d_norm="spectral", d_cond="projection")),
    ("cdcgan_iclevr", dict(d_cond="projection", smooth_labels=True, flip_labels=0.2, ema=0.9)),
    ("sngan_iclevr", dict(loss="relativistic", flip_labels=0.1, label_embed="sum", lr_decay_from=3)),
    ("sngan_iclevr", dict(loss="paired", gamma=0.2, aux_weight=5.0, d_net="cnn", d_norm="none", beta1=0.0))]


@pytest.mark.parametrize("name, fields", VARIANTS, ids=str)
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(here, monkeypatch, name, fields):
    from common.run import Run

    class Cut(Exception):
        pass

    def log(self):
        original(self)
        if self.step >= 8:
            raise Cut
    fields = fields | dict(iters=12, sample_every=5, eval_every=4, save_every=3)
    run_here(name, out="whole", **fields)
    original = Run._log
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Run, "_log", log)
        run_here(name, out="cut", **fields)
    assert 0 < torch.load("cut/last.pt", weights_only=True)["step"] < 8
    run_here(name, "resume", "cut")
    same_runs(here / "cut", here / "whole")


LONG = flags(TINY["sngan_iclevr"] | dict(iters=22, sample_every=7, eval_every=8, save_every=5))


@pytest.fixture(scope="module")
def uninterrupted(workdir):
    script("sngan_iclevr", *LONG, "--out", "runs/whole", cwd=workdir)
    return workdir / "runs" / "whole"


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_resumes_to_the_same_bits(workdir, uninterrupted, how, status):
    folder = workdir / "runs" / how.name
    running = subprocess.Popen(**process("sngan_iclevr", *LONG, "--out", str(folder), cwd=workdir))
    table, until = folder / "metrics.csv", time.monotonic() + 120
    while not table.exists() or len(table.read_text().splitlines()) < 6:
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    running.send_signal(how)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == status
    assert how == signal.SIGKILL or f"to continue: sngan_iclevr.py --resume {folder}" in output
    assert 5 <= torch.load(folder / "last.pt", weights_only=True)["step"] < 22
    script("sngan_iclevr", "--resume", str(folder), cwd=workdir)
    same_runs(folder, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_over(workdir, uninterrupted):
    folder = workdir / "runs" / "early"
    shutil.copytree(uninterrupted, folder)
    for name in ("last.pt", "previous.pt", "best.pt"):
        (folder / name).unlink()
    script("sngan_iclevr", "--resume", str(folder), cwd=workdir)
    same_runs(folder, uninterrupted)


@pytest.mark.parametrize("name", NAMES)
def test_an_iteration_reads_nothing_back(here, name):
    counts = []
    for iters in (2, 2, 5):  # the first renders the data
        with CountReads() as mode:
            run_here(name, iters=iters, judge="none", log_every=100, out=f"runs/{len(counts)}")
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
def test_every_setting_has_its_help(name):
    from common.cli import Settings, parse
    module = importlib.import_module(name)
    source = inspect.getsource(module.Config) + inspect.getsource(Settings)
    lines = [line for line in source.splitlines() if re.match(r"    \w+: ", line)]
    assert len(lines) > 20 and all("  # " in line for line in lines)
    cfg = parse(module.Config, module.QUICK, "", ["--quick", "--iters", "7"])[1]
    assert cfg.iters == 7 and cfg.log_every == module.QUICK["log_every"]


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_and_other_runs_are_refused(finished, refuses, name):
    folder, _ = finished(name)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    refuses(name, "--resume", folder, "--batch-size", "9", message="--batch-size is 8 there, 9 here")
    refuses(name, "--sample", folder, "--save-every", "9", message="--save-every is 4 there, 9 here")
    refuses(name, "--out", folder, message="already exists")
    refuses(name, "--data", "nowhere", message="nowhere")
    other = NAMES[NAMES.index(name) - 1]
    if (folder.parent / other).exists():
        refuses(name, "--eval", folder.parent / other, message=f"is a run of {other}.py")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_resuming_with_other_images_is_refused(here, iclevr):
    fields = dict(iters=2, batch_size=4, data=str(iclevr), judge="none")
    folder = run_here("sngan_iclevr", **fields)
    assert folder.name == "sngan_iclevr"  # real data: no suffix
    Image.new("RGB", (40, 30)).save(next((iclevr / "images").iterdir()))
    with pytest.raises(UserError, match="does not hold the images"):
        run_here("sngan_iclevr", "resume", folder, iters=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_on_cuda(tmp_path, name):
    fields = TINY[name] | dict(device="cuda", precision="bf16", iters=4)
    fields |= {} if "iclevr" in name else dict(fid_weights="none")
    script(name, *flags(fields), cwd=tmp_path)


@pytest.mark.parametrize("name, calls", [("sngan_iclevr", 4), ("acgan_celeba", 6), ("cdcgan_iclevr", 4)])
def test_augment_moves_all_that_d_is_given(here, monkeypatch, name, calls):
    """Real and generated images in the steps of D, two but for the cDCGAN, and in that of G."""
    module, given = importlib.import_module(name), []
    moved = module.moved
    monkeypatch.setattr(module, "moved", lambda x, share: given.append((x, share)) or moved(x, share))
    run_here(name, iters=1, augment=0.1, loss="paired", d_norm="none", judge="none")
    assert len(given) == calls and {share for _, share in given} == {0.1}
    assert any(x.requires_grad for x, _ in given)  # G learns through it
