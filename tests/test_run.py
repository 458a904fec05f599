"""The command line, the run folder and the checkpoints, without a network."""
import csv
import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from common import run
from sngan_iclevr import QUICK, Config


@dataclass
class Small:
    iters: int = 10  # how long
    device: str = "cpu"  # on what
    lr: float = 0.5  # how fast
    loss: Literal["a", "b"] = "a"  # which one
    trick: bool = True  # 50% more
    log_every: int = 5  # how often
    out: str = ""  # where


def parse(*argv, config=Small, quick=None):
    return run.parse(config, quick or {}, "text", list(argv))


def test_flags_are_the_fields_and_help_their_comments(capsys):
    action, cfg, folder = parse("--iters", "3", "--no-trick", "--loss", "b")
    assert (action, folder) == ("train", None) and cfg == Small(iters=3, trick=False, loss="b")
    with pytest.raises(SystemExit) as left:
        parse("--help")
    text = capsys.readouterr().out
    assert left.value.code == 0
    for part in ("how long (default: 10)", "which one (default: a)", "50% more", "--no-trick"):
        assert part in text


def test_every_field_of_the_script_has_a_comment(capsys):
    with pytest.raises(SystemExit):
        parse("--help", config=Config)
    assert " (default:" in capsys.readouterr().out
    import inspect
    import re
    lines = [line for line in inspect.getsource(Config).splitlines() if re.match(r"    \w+:", line)]
    assert lines and all("#" in line for line in lines)


def test_quick_is_a_preset_that_flags_override():
    cfg = parse("--quick", "--ch", "5", config=Config, quick=QUICK)[1]
    assert cfg.iters == QUICK["iters"] and cfg.ch == 5 and cfg.lr_g == QUICK["lr_g"]


def test_defaults_are_the_write_up_s():
    cfg = Config()
    assert (cfg.iters, cfg.batch_size, cfg.n_dis, cfg.lr_g, cfg.lr_d, cfg.ch) == (
        30_000,
        64,
        4,
        3e-4,
        1e-4,
        64,
    )
    assert (cfg.z_dim, cfg.image_size, cfg.add_noise, cfg.relativistic, cfg.flip_labels) == (
        128,
        64,
        True,
        False,
        0,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--iters", "0"],
        ["--iters", "-3"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--lr", "x"],
        ["--loss", "c"],
        ["--nothing", "1"],
        ["--log-every", "-1"],
        ["--ite", "3"],
    ],
)
def test_values_out_of_range_are_refused(argv):
    with pytest.raises(run.UserError):
        parse(*argv)


def stored(folder, script="test_run.py", **changes):
    folder.mkdir()
    values = vars(Small()) | changes
    (folder / "config.json").write_text(json.dumps({"script": script, "config": values}))
    return str(folder)


def test_resume_takes_the_stored_config_and_longer_iters(tmp_path):
    folder = stored(tmp_path / "a", lr=0.25)
    action, cfg, where = parse("--resume", folder, "--iters", "20", "--log-every", "1", "--lr", "0.25")
    assert action == "resume" and str(where) == folder and cfg == Small(iters=20, lr=0.25, log_every=1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr", "0.5"], "lr is 0.25 there and 0.5 here"),
        (["--no-trick", "--loss", "b"], "trick is True there.*loss is 'a' there"),
        (["--quick"], "--quick is for a new run"),
        (["--iters", "0"], "--iters 0"),
    ],
)
def test_resume_refuses_another_config_and_names_the_fields(tmp_path, argv, message):
    with pytest.raises(run.UserError, match=message):
        parse("--resume", stored(tmp_path / "a", lr=0.25), *argv)


def test_folders_that_are_no_run_of_this_script(tmp_path):
    with pytest.raises(run.UserError, match="is no run"):
        parse("--resume", str(tmp_path))
    with pytest.raises(run.UserError, match="is a run of vae_celeba.py"):
        parse("--sample", stored(tmp_path / "b", script="vae_celeba.py"))
    with pytest.raises(run.UserError, match="other fields.*more"):
        parse("--eval", stored(tmp_path / "c", more=1))
    folder = stored(tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text("{")
    with pytest.raises(run.UserError, match="not a run's config"):
        parse("--resume", folder)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.txt"
    run.write_whole(path, lambda p: p.write_text("old"))

    def half(p):
        p.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        run.write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_written(tmp_path):
    path = tmp_path / "last.pt"
    run.save_checkpoint(path, {"step": 1, "G": {"w": torch.ones(2)}})
    with pytest.raises(run.NotFinite, match="G.w is not finite at step 2"):
        run.save_checkpoint(path, {"step": 2, "G": {"w": torch.tensor([1.0, float("nan")])}})
    assert run.load_checkpoint(path, "cpu")["step"] == 1
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(run.UserError, match="can't be read as a checkpoint"):
        run.load_checkpoint(path, "cpu")


def new_run(tmp_path, step=0, resume=None, **changes):
    cfg = Small(out="" if resume else str(tmp_path / "r"), **changes)
    return run.Run(cfg, "x.py", "x", resume, step, ["loss", "accuracy"])


def test_rows_and_pictures_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    folder = new_run(tmp_path).folder
    with new_run(tmp_path, resume=folder) as r:
        for step in (5, 10, 15):
            r.log(step, loss=step / 3)
            r.picture(step, torch.zeros(2, 1, 8, 8), "a title")
    for name in (".last.123.pt", "samples/.step_0000010.123.png"):  # what SIGKILL leaves
        (folder / name).write_bytes(b"half")
    (folder / "scores.json").write_text("{}")  # of the end before
    with open(folder / "metrics.csv", "a") as table:
        table.write("1")  # of a step 15 or so: a full disk cut it off
    again = new_run(tmp_path, step=10, resume=folder)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [r["step"] for r in rows] == ["5", "10"] and rows[0]["accuracy"] == ""
    assert float(rows[1]["loss"]) == pytest.approx(10 / 3, rel=1e-5)
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step_0000005.png", "step_0000010.png"]
    assert not list(folder.glob(".*")) and not (folder / "scores.json").exists()
    again.draw_progress("a title")
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames == 2 or gif.n_frames == 1  # equal pictures may be one frame
    assert (folder / "curves.png").exists() == bool(run.plt)


def test_an_existing_folder_is_never_written_over(tmp_path, monkeypatch):
    new_run(tmp_path)
    with pytest.raises(run.UserError, match="exists already"):
        new_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(run.free_folder("", "dcgan").name)
        (tmp_path / "runs" / names[-1]).mkdir(parents=True)
    assert names == ["dcgan", "dcgan-2", "dcgan-3"]


def test_a_folder_that_holds_no_run_is_taken_and_one_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    left = tmp_path / "left"  # killed between the folder's making and config.json's
    (left / "samples").mkdir(parents=True)
    (left / ".config.json.77").touch()
    assert run.free_folder(str(left), "") == left
    (left / "samples" / "step_0000001.png").touch()
    with pytest.raises(run.UserError, match="exists already"):
        run.free_folder(str(left), "")
    with pytest.raises(run.UserError, match="exists already"):
        run.free_folder(str(left / "samples" / "step_0000001.png"), "")
    with pytest.raises(run.UserError, match="step_0000001.png is not a folder that can be written to"):
        run.free_folder(str(left / "samples" / "step_0000001.png" / "here"), "")
    monkeypatch.setattr(run.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(run.UserError, match="not a folder that can be written to"):
        run.free_folder(str(tmp_path / "two" / "levels"), "")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with new_run(tmp_path) as r, pytest.raises(run.NotFinite, match="loss is nan at step 5"):
        r.log(5, loss=float("nan"))


def test_signals_ask_first_and_insist_second(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    with new_run(tmp_path) as r:
        assert r.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert r.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error, status", [(None, 0), (run.UserError("x"), 2), (run.NotFinite("x"), 3),
                                           (KeyboardInterrupt(), 130)])
def test_exit_status(error, status, capsys):
    def main():
        if error:
            raise error
    with pytest.raises(SystemExit) as left:
        run.entry(main)
    assert left.value.code == status
    if status in (2, 3):
        assert capsys.readouterr().err == "error: x\n"


def test_a_grid_shows_the_images_and_a_title(tmp_path):
    images = torch.stack([torch.full((3, 64, 64), v) for v in (-1.0, 0.0, 1.0)])
    run.save_grid(tmp_path / "g.png", images, "a title that is long enough to need a second line", nrow=3)
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width == 3 * 66 + 2 and grid.height > 66 + 2 + 14
        below = grid.height - 34
        assert [grid.getpixel((34 + 66 * i, below)) for i in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
        title = grid.crop((0, 0, grid.width, grid.height - 68)).convert("L")
        assert title.getextrema()[0] < 100  # ink


# ------------------------------------------------------------------------------------------ several runs

def test_a_sweep_is_every_combination_in_a_folder_of_its_own():
    action, configs, folder = parse("--sweep", "lr=0.1,1e-2", "trick=true,false", "loss=b", "--iters", "3",
                                    "--out", "x")
    assert action == "sweep" and folder is None and all(c.iters == 3 and c.loss == "b" for c in configs)
    assert [(c.lr, c.trick) for c in configs] == [(0.1, True), (0.1, False), (0.01, True), (0.01, False)]
    assert [c.out for c in configs][:2] == ["x/lr=0.1,trick=true,loss=b", "x/lr=0.1,trick=false,loss=b"]
    assert parse("--sweep", "iters=2", "--quick", quick={"lr": 9.0})[1][0] == \
        Small(iters=2, lr=9.0, out="runs/test_run-sweep/iters=2")


def test_a_sweep_of_variants_is_named_by_them():
    variants = {"plain": {}, "low": dict(lr=0.01, trick=False)}

    def configs(*argv):
        return run.parse(Small, {}, "text", ["--sweep", *argv], variants)[1]
    assert [(c.lr, c.trick, c.out) for c in configs("variants", "--out", "x")] == \
        [(Small.lr, Small.trick, "x/plain"), (0.01, False, "x/low")]
    assert [c.out for c in configs("--out", "x")] == ["x/plain", "x/low"]  # --sweep alone
    with pytest.raises(run.UserError, match="--lr with --sweep variants: the variants set it"):
        configs("--lr", "0.5")  # "plain" would have it too
    assert [(c.loss, c.out) for c in configs("variants", "loss=a,b", "--iters", "3", "--out", "x")][2:] == \
        [("a", "x/low,loss=a"), ("b", "x/low,loss=b")]
    for argv in (["variants", "lr=1"], ["lr=1", "variants"], ["variants", "variants"]):
        with pytest.raises(run.UserError, match="give each field.* or the word variants"):
            configs(*argv)


@pytest.mark.parametrize("argv, message", [
    ([], "give each field"), (["variants"], "give each field"), (["lr"], "give each field"),
    (["rate=1"], "give each field"),
    (["out=a,b"], "give each field"),
    (["lr=1", "lr=2"], "give each field"), (["lr=1,x"], "invalid float value"),
    (["loss=c"], "invalid choice"), (["trick=maybe"], "ignored explicit argument"),
    (["iters=2,0"], "--iters 0: must be at least 1"),
])
def test_refused_sweeps(argv, message):
    with pytest.raises(run.UserError, match=message) as error:
        parse("--sweep", *argv)
    assert "\n" not in str(error.value)


def trained(calls, fail=None):
    """A stand-in for a script's train, which leaves what it leaves."""
    def train(cfg, resume=None):
        calls.append((cfg.out, resume))
        if cfg.lr == fail:
            raise run.NotFinite("d_loss is nan")
        with run.Run(cfg, "test_run.py", "x", resume, 0, ["loss", "accuracy"]) as r:
            for step in (2, 4):
                r.log(step, loss=1.0)
            r.log(4, accuracy=0.5)
        scores = {"summary": {"accuracy": [cfg.lr, 0.125], "n": 7}}
        (r.folder / "scores.json").write_text(json.dumps(scores))
        return 0
    return train


def test_a_sweep_ends_in_one_table_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []
    configs = parse("--sweep", "lr=0.1,0.25", "--out", "x")[1]
    assert run.sweep(configs, trained(calls)) == 0 and len(calls) == 2
    table = list(csv.reader(open("x/sweep.csv", newline="")))
    assert table[0] == ["run", "accuracy", "n", "s / 1,000 its"]
    assert [row[:3] for row in table[1:]] == [["lr=0.1", "0.1 ± 0.12", "7"], ["lr=0.25", "0.25 ± 0.12", "7"]]
    assert "lr=0.25  0.25 ± 0.12  7" in capsys.readouterr().out
    assert run.sweep(parse("--sweep", "lr=0.1,0.25", "--out", "x")[1], trained(calls)) == 0
    assert len(calls) == 2  # both were finished
    (tmp_path / "x/lr=0.25/scores.json").unlink()  # this one was not
    run.sweep(parse("--sweep", "lr=0.1,0.25", "--out", "x")[1], trained(calls))
    assert calls[2:] == [("x/lr=0.25", Path("x/lr=0.25"))]
    run.sweep(parse("--sweep", "lr=0.1", "--out", "x", "--iters", "20")[1], trained(calls))  # longer
    assert calls[3:] == [("x/lr=0.1", Path("x/lr=0.1"))]
    with pytest.raises(run.UserError, match="loss is 'a' there and 'b' here"):
        run.sweep(parse("--sweep", "lr=0.1", "--out", "x", "--loss", "b")[1], trained(calls))


def test_seeds_are_summed_up(tmp_path, monkeypatch, capsys):
    @dataclass
    class Seeded(Small):
        seed: int = 0  # a seed

    def train(cfg, resume=None):
        (tmp_path / cfg.out).mkdir(parents=True)
        (tmp_path / cfg.out / "metrics.csv").write_text("step,seconds,loss\n1,1,0\n2,2,0\n")
        scores = {"summary": {"accuracy": [cfg.lr * cfg.seed, 9.0]}}
        if cfg.seed == 1:  # a score that the other seeds lack has no mean
            scores["summary"]["FID"] = [1.0, 0.0]
        (tmp_path / cfg.out / "scores.json").write_text(json.dumps(scores))
        return 0

    monkeypatch.chdir(tmp_path)
    ways = ["--sweep", "lr=1,10", "seed=1,2,6", "--out", "x"]
    assert run.sweep(parse(*ways, config=Seeded)[1], train) == 0
    table = [row[:2] for row in csv.reader(open("x/sweep.csv", newline=""))]
    assert len(table) == 1 + 6 + 2
    assert table[-2:] == [["lr=1: 3 seeds", "3 ± 2.6"], ["lr=10: 3 seeds", "30 ± 26"]]  # 1, 2, 6
    assert run.sweep(parse("--sweep", "seed=1,2", "--out", "y", config=Seeded)[1], train) == 0
    assert "2 seeds" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_diverges_ends_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.sweep(parse("--sweep", "lr=0.1,0.2,0.3", "--out", "x")[1], trained([], fail=0.2)) == 3
    out = capsys.readouterr().out
    assert "diverged: d_loss is nan" in out and "0.3 ± 0.12" in out and "0.1 ± 0.12" in out


def test_seconds_per_iteration_leave_out_what_is_rare(tmp_path):
    lines = ["step,seconds,loss,score", "10,2,1,", "20,4,1,", "20,9,,5", "30,11,1,", "40,13,1,"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    assert run.seconds_per_iteration(tmp_path / "m.csv") == pytest.approx(0.2)
    (tmp_path / "m.csv").write_text(lines[0] + "\n")
    assert math.isnan(run.seconds_per_iteration(tmp_path / "m.csv"))
