"""The command line, the run folder and the checkpoints, with a network of one layer."""
import json
import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from PIL import Image

from common import cli, system
from common.errors import NotFinite, Stopped, UserError, exit_status
from common.run import Run
from tests.conftest import rows_of


@dataclass
class Small(cli.Settings):
    iters: int = 10  # how long
    lr: float = 0.5  # how fast
    loss: Literal["a", "b"] = "a"  # which one
    size: Literal[32, 64] = 32  # how large
    trick: bool = True  # 50% more
    ema: float = 0.0  # how slow
    device: str = "cpu"  # on what


def parse(*argv, quick=None):
    return cli.parse(Small, quick or {}, "text", list(argv))


# ---------------------------------------------------------------------- the command line

def test_flags_are_the_fields_and_help_their_comments(capsys):
    args = "--iters 1 --no-trick --loss b --size 64 --lr 0 --ema 0.999 --log-every 0".split()
    changed = dict(iters=1, trick=False, loss="b", size=64, lr=0, ema=0.999, log_every=0)
    assert parse(*args) == ("train", Small(**changed), None)
    quick = dict(iters=3, lr=9.0)  # a preset, which flags override
    assert parse("--quick", "--iters", "5", quick=quick)[1] == Small(iters=5, lr=9.0)
    assert parse("--iters", "5", quick=quick)[1] == Small(iters=5)
    with pytest.raises(SystemExit) as left:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in ("how long (default: 10)", "which one (default: a)", "50% more", "--no-trick", "{32,64}",
                 "of weights, noise and the order of batches (default: 0)"):
        assert left.value.code == 0 and part in text


@pytest.mark.parametrize("argv, message", [
    ("--iters 0", "--iters 0: must be at least 1"), ("--iters -3", "--iters -3: must be at least 1"),
    ("--lr -1", "--lr -1.0: must be at least 0"), ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"),
    ("--log-every -1", "--log-every -1: must be at least 0"), ("--seed -1", "--seed -1: must be at least 0"),
    ("--ema 1", "--ema 1.0: must be below 1"), ("--lr x", "invalid float value"), ("--size 48", "invalid choice"),
    ("--loss c", "invalid choice"), ("--nothing 1", "unrecognized arguments: --nothing"),
    ("--ite 3", "unrecognized arguments: --ite"), ("--sample a --eval b", "not allowed with")])
def test_refused_command_lines(argv, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse(*argv.split())
    assert "\n" not in str(error.value)


def stored(folder, script="test_run.py", **changes) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"script": script, "config": vars(Small()) | changes}))
    return str(folder)


def test_a_stored_config_with_the_fields_that_may_change(tmp_path):
    folder = stored(tmp_path / "a", lr=0.25)
    found = parse("--resume", folder, "--iters", "20", "--log-every", "1", "--lr", "0.25")
    assert found == ("resume", Small(iters=20, lr=0.25, log_every=1), Path(folder))
    found = parse("--sample", folder, "--seed", "3", "--judge", "none")
    assert found == ("sample", Small(lr=0.25, seed=3, judge="none"), Path(folder))


@pytest.mark.parametrize("argv, message", [
    ("--resume --lr 0.5", "--lr is 0.25 there, 0.5 here"),
    ("--resume --no-trick --loss b", "--trick is True there, False here, --loss is 'a' there, 'b' here"),
    ("--resume --seed 1", "--seed is 0 there, 1 here"), ("--eval --iters 20", "--iters is 10 there, 20 here"),
    ("--resume --quick", "--quick is for a new run"), ("--resume --iters 0", "--iters 0: must be at least 1"),
    ("--eval --judge none", "--eval needs a judge")])
def test_other_changes_are_refused_and_named(tmp_path, argv, message):
    action, *rest = argv.split()
    with pytest.raises(UserError, match=re.escape(message)):
        parse(action, stored(tmp_path / "a", lr=0.25), *rest)


def test_folders_that_are_no_run_of_this_script(tmp_path):
    for folder, message in ((str(tmp_path), "is not a run: it has no config.json"),
                            (stored(tmp_path / "b", script="vae_celeba.py"), "is a run of vae_celeba.py, not of"),
                            (stored(tmp_path / "c", more=1), r"another version of .* \(fields \['more'\]\)")):
        with pytest.raises(UserError, match=message):
            parse("--resume", folder)
    for text in ("{", "[]", '{"config": {}}'):
        (tmp_path / "b" / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json can't be read .*written by test_run.py"):
            parse("--resume", str(tmp_path / "b"))


# ---------------------------------------------------------------------- files, devices, exit status

def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.txt"
    system.write_whole(path, lambda p: p.write_text("old"))

    def half(p):
        p.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        system.write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_run_never_takes_a_folder_with_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/gan", "runs/gan-2", "runs/gan-3"):
        assert system.free_folder("", "gan") == Path(expected)
        Path(expected).mkdir(parents=True)
    left, picture = Path("left"), Path("left/samples/step_0000001.png")
    (left / "samples").mkdir(parents=True)
    (left / ".config.77.json").touch()  # killed between the folder's making and config.json's
    assert system.free_folder("left", "") == left
    picture.touch()
    for out in (left, picture):
        with pytest.raises(UserError, match="already exists, and a run is never overwritten"):
            system.free_folder(str(out), "")
    with pytest.raises(UserError, match="step_0000001.png is not a writable folder"):
        system.free_folder(str(picture / "here"), "")
    monkeypatch.setattr(system.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="is not a writable folder"):
        system.free_folder(str(tmp_path / "two" / "levels"), "")


def test_devices_and_what_figures_depend_on():
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match=f"--device {name} is not available .*use --device cpu$"):
            system.pick_device(name)
    found = system.circumstances(system.pick_device("cpu"))
    assert found["torch"] == torch.__version__ and "thread" in found["hardware"] and found["commit"]


@pytest.mark.parametrize("error, status", [(None, 0), (UserError("x"), 2), (NotFinite("x"), 3),
                                           (KeyboardInterrupt(), 130), (Stopped("x", signal.SIGTERM), 143)])
def test_exit_status(error, status, capsys):
    def main():
        if error:
            raise error
    assert exit_status(main) == status
    assert capsys.readouterr().err == ("error: x\n" if status in (2, 3) else "")


# ---------------------------------------------------------------------- a run

def train(folder: Path, action="train", at=lambda *_: None, **fields) -> SimpleNamespace:
    """A run whose G gains 1 a step, with loss = step; the score -|step - 4| is best at 4, if it is due there.
    at(step, run, parts) is called in each iteration. → the run, steps made, checkpoints found."""
    G, made = torch.nn.Linear(1, 1), []
    torch.nn.init.zeros_(G.weight)
    parts = dict(G=G, opt=torch.optim.Adam(G.parameters(), 1e-9))
    cfg = Small(out=str(folder), **dict(log_every=2, sample_every=5, eval_every=3, save_every=4) | fields)
    with Run(cfg, Path("x.py"), action, None if action == "train" else folder) as run:
        run.track(SimpleNamespace(name="dots", source="dots", digest="d1"), **parts)
        for step in run.steps():
            made.append(step)
            G(torch.ones(1, 1)).sum().backward()
            parts["opt"].step()
            G.weight.data += 1
            run.record(loss=torch.tensor(float(step)))
            if run.due("sample"):
                run.picture(torch.full((2, 1, 8, 8), step / 10 - 1), "a title")
            if run.due("eval"):
                run.score(best=-abs(step - 4), accuracy=-abs(step - 4))
            at(step, run, parts)
        found = [(name, step, round(G.weight.item())) for name, step in run.checkpoints("last", "best")]
    return SimpleNamespace(run=run, made=made, found=found)


def step_of(folder: Path) -> int:
    return torch.load(folder / "last.pt", weights_only=True)["step"]


def test_one_row_a_step_in_a_table_whose_columns_grow(tmp_path, capsys):
    train(tmp_path / "r", iters=7)
    assert rows_of(tmp_path / "r") == [  # losses are means since the last row that has them
        {"step": 2, "loss": 1.5}, {"step": 3, "accuracy": -1}, {"step": 4, "loss": 3.5},
        {"step": 6, "loss": 5.5, "accuracy": -2}, {"step": 7, "loss": 7, "accuracy": -3}]
    lines = (tmp_path / "r" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,seconds,loss,accuracy" and all(line.count(",") == 3 for line in lines)
    assert re.search(r"^step 6/7  loss 5.500  \d+\.\d\d it/s  0:00:00 left$", capsys.readouterr().out, re.M)


def test_checkpoints_hold_all_that_is_tracked_and_best_only_improves(tmp_path):
    folder = tmp_path / "r"
    done = train(folder, iters=9, seed=3)
    assert done.found == [("last", 9, 9), ("best", 3, 3)]
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state.keys() == {"G", "opt", "step", "best", "means", "data", "rng", "config"}
    assert (state["data"], state["best"], state["config"]["iters"]) == ("d1", -1, 9)
    again = train(folder, "sample", seed=5)
    assert again.found == [("best", 3, 3)]  # without scores only the one that is pictured
    assert again.run.title(SimpleNamespace(name="dots"), "ch 4") == "x on dots, ch 4, seed 3"  # the training's
    assert train(folder, "eval").found == done.found
    (folder / "best.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="best.pt can't be read .*a checkpoint of this run"):
        train(folder, "eval")
    for path in folder.glob("*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="has no checkpoint yet: continue it with --resume"):
        train(folder, "sample")


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    folder, fields, kept = tmp_path / "r", dict(iters=16, save_every=12), {}
    with pytest.raises(ZeroDivisionError):  # as a kill would: nothing is saved
        train(folder, at=lambda step, *_: 1 / (15 - step), **fields)
    assert rows_of(folder)[-1]["step"] == 14 and step_of(folder) == 12
    for name in (".last.123.pt", "samples/.step_0000010.123.png"):  # what SIGKILL leaves
        (folder / name).write_bytes(b"half")
    (folder / "scores.json").write_text("{}")  # of an earlier end
    with open(folder / "metrics.csv", "a") as table:
        table.write("1")  # of a row that a full disk cut off

    def look(step, *_):
        kept.setdefault("rows", [row["step"] for row in rows_of(folder)])
        kept.setdefault("files", {p.name for p in folder.rglob("*") if p.suffix in (".png", ".pt", ".json")})
    done = train(folder, "resume", at=look, **fields)
    assert done.made == [13, 14, 15, 16] and done.found[0] == ("last", 16, 16)
    assert kept["rows"] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert kept["files"] == {"config.json", "last.pt", "best.pt", "step_0000005.png", "step_0000010.png"}
    assert [row["step"] for row in rows_of(folder)] == [*kept["rows"], 14, 15, 16]
    seconds = [float(line.split(",")[1]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert seconds == sorted(seconds)
    assert [s["from_step"] for s in json.loads((folder / "config.json").read_text())["sittings"]] == [0, 12]
    assert train(folder, "resume", **fields).made == []  # nothing is left to do
    assert train(folder, "resume", **fields | dict(iters=18)).made == [17, 18]
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames == 5  # 5, 10, 15, and 16 and 18, where runs ended


@pytest.mark.parametrize("spoil, message", [
    (lambda run, parts: parts["G"].weight.data.fill_(math.nan), "G.weight is not finite at step 8"),
    (lambda run, parts: parts["opt"].state[parts["G"].weight]["exp_avg"].fill_(math.inf),
     "opt.state.0.exp_avg is not finite at step 8"),
    (lambda run, parts: run.record(loss=torch.tensor(math.nan)), "loss is nan at step 8")])
def test_what_is_not_finite_is_never_saved(tmp_path, spoil, message):
    with pytest.raises(NotFinite, match=f"^{message}. last.pt keeps the last good state"):
        train(tmp_path / "r", eval_every=0, at=lambda step, *parts: step == 8 and spoil(*parts))
    assert step_of(tmp_path / "r") == 4


def test_the_first_signal_ends_the_loop_and_the_second_the_iteration(tmp_path):
    before, after = signal.getsignal(signal.SIGINT), []

    def stop(step, *_):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            after.append(step)  # the iteration goes on
    with pytest.raises(Stopped, match="stopped at step 3; to continue: x.py --resume") as stopped:
        train(tmp_path / "a", at=stop)
    assert after == [3] and stopped.value.args[1] == signal.SIGTERM and step_of(tmp_path / "a") == 3
    assert train(tmp_path / "a", "resume").made == [4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(Stopped):
        train(tmp_path / "b", at=lambda step, *_: (stop(3), stop(3)))
    assert after == [3, 3] and not (tmp_path / "b" / "last.pt").exists()
    with Run(Small(), Path("x.py")), pytest.raises(Stopped):  # outside of the loop
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_due_and_bf16():
    run = Run(Small(iters=7, log_every=3, save_every=0, precision="bf16"), Path("x.py"))
    due = {what: [run.step for run.step in range(1, 8) if run.due(what)] for what in ("log", "save")}
    assert due == {"log": [3, 6, 7], "save": []}  # the last iteration too, unless never
    with run.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with Run(Small(), Path("x.py")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
