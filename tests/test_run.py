"""The command line, the run folder and the checkpoints, without a method."""
import errno
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import join, split
from typing import Literal

import pytest
import torch
from torch import nn

from common.datasets import Data
from common.files import UserError, atomic_write, cached, lock, reading, write_json
from harness import device
from harness.cli import NotFinite, Settings, Stopped, exit_status, parse, stored_config
from harness.run import SIGNALS, Run, new_run_dir
from tests.conftest import rows_of

SCRIPT = Path(__file__)


@dataclass
class Small(Settings):
    recipe: Literal["paper", "fast"] = "paper"  # what to do
    iters: int = 10  # how long
    lr: float = 0.5  # how fast
    loss: Literal["a", "b"] = "a"  # which one
    trick: bool = True  # 50% more
    ema: float = 0.0  # decay
    device: str = "cpu"  # on what
    data: str = "auto"  # images of what
    log_every: int = 5  # how often
    sample_every: int = 5  # how often
    save_every: int = 5  # how often


RECIPES = {"paper": {}, "fast": dict(lr=1.0, loss="b", trick=False)}
QUICK = dict(recipe="fast", iters=4, lr=2.0)


def call(*argv):
    return parse(Small, RECIPES, QUICK, "text", list(argv))


# ---------------------------------------------------------------------- command line

def test_flags_are_the_fields_and_help_their_comments(capsys):
    action, cfg, folder = call("--iters", "3", "--no-trick", "--loss", "b")
    assert (action, folder) == ("train", None) and cfg == Small(iters=3, trick=False, loss="b")
    with pytest.raises(SystemExit) as left:
        call("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and text.index("--lr") < text.index("--seed")  # the script's own flags first
    for part in ("how long (default: 10)", "which one (default: a)", "50% more", "--no-trick", "of weights",
                 str(QUICK)):
        assert part in text


@pytest.mark.parametrize("argv, recipe, expected, named", [
    ("", "paper", {}, ""), ("--lr 3 --iters 2", "paper", dict(lr=3.0, iters=2), ", lr 3.0"),
    ("--recipe fast", "fast", dict(lr=1.0, loss="b", trick=False), ""),
    ("--recipe fast --loss a --trick", "fast", dict(lr=1.0), ", loss a, trick True"),
    ("--quick", "fast", dict(lr=2.0, loss="b", trick=False, iters=4), ", lr 2.0"),
    ("--quick --recipe paper", "paper", dict(lr=2.0, iters=4), ", lr 2.0"),
    ("--quick --lr 1 --iters 6 --ema 0.5", "fast", dict(lr=1.0, loss="b", trick=False, iters=6, ema=0.5), ""),
])
def test_defaults_give_way_to_the_recipe_then_quick_then_flags(argv, recipe, expected, named):
    """A run is named by its recipe and those of recipes' fields that have other values."""
    cfg = call(*argv.split())[1]
    assert cfg == Small(recipe=recipe, **expected)
    assert Run(cfg, SCRIPT, recipes=RECIPES).recipe == f"recipe {recipe}{named}"


def write_config(folder: Path, cfg: Small) -> None:
    """A run's config.json."""
    content = {"script": SCRIPT.name, "config": vars(cfg), "sittings": [{"commit": "c0ffee1234"}]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))


def test_a_run_is_used_with_its_own_config_and_longer_iters(tmp_path):
    write_config(tmp_path, Small(lr=0.25))
    action, cfg, where = call("--resume", ".", "--iters", "20", "--log-every", "1", "--lr", "0.25")
    assert (action, where, cfg) == ("resume", Path("."), Small(iters=20, lr=0.25, log_every=1))
    assert call("--sample", ".", "--seed", "5", "--judge", "none")[1] == Small(lr=0.25, seed=5, judge="none")
    assert call(*"--eval . --judge-width 8 --judge-steps 9".split())[1] == Small(
        lr=0.25, judge_width=8, judge_steps=9)
    for argv, message in (("--resume . --ema 0.5", "--ema is 0.0 there, 0.5 here.*only --iters, .*change"),
                          ("--resume . --quick", "--recipe is 'paper' there, 'fast' here"),
                          ("--resume . --judge-width 8", "--judge-width is 64 there, 8 here"),
                          ("--eval . --no-trick --loss b", "--trick is True there.*--loss is 'a' there")):
        with pytest.raises(UserError, match=message):
            call(*argv.split())


def test_continue_starts_a_run_or_resumes_the_one_there(tmp_path):
    again = "--continue --quick --ema 0.5 --out r".split()
    for _ in range(2):
        action, cfg, folder = call(*again)
        assert (action, folder) == ("train", None)
        (tmp_path / "r" / "samples").mkdir(parents=True, exist_ok=True)  # as if it had been killed there
        (tmp_path / "r" / ".writing-9-config.json").touch()
        Run(cfg, SCRIPT)
    write_config(tmp_path / "r", cfg)
    assert call(*again) == ("resume", cfg, Path("r"))
    assert call(*again, "--iters", "20") == ("resume", Small(**vars(cfg) | dict(iters=20)), Path("r"))
    assert call("--resume", "r", "--quick")[:2] == ("resume", cfg)
    for argv, message in (("--continue", "--continue needs --out FOLDER"),
                          ("--continue --out r --loss a", "--loss is 'b' there, 'a' here"),
                          ("--continue --resume r", "not allowed with argument"),
                          ("--continue --out r --to x", "--to is for --sample")):
        with pytest.raises(UserError, match=message):
            call(*argv.split())


# ---------------------------------------------------------------------- errors and files

@pytest.mark.parametrize("raised, status, text", [
    (UserError("what, where"), 2, "error: what, where\n"), (NotFinite("g is nan"), 3, "error: g is nan\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\n x"), 2, "error: CUDA out of memory. Tried x\n"),
    (OSError(28, "No space left", "metrics.csv"), 2, "error: [Errno 28] No space left: 'metrics.csv'\n"),
    (Stopped("stopped", 15), 143, "\nstopped\n"), (KeyboardInterrupt(), 130, ""), (None, 0, "")])
def test_exit_status(capsys, raised, status, text):
    def main():
        if raised:
            raise raised
    assert exit_status(main) == status and tuple(capsys.readouterr()) == ("", text)


def test_an_error_is_one_line_whatever_the_names_in_it(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", terminal)
    names = "one\nline\r\nof", os.fsdecode(b"\xff\x80"), "\u2028end"  # a file's name may hold these
    assert exit_status(lambda: (_ for _ in ()).throw(UserError(" ".join(names)))) == 2
    terminal.flush()
    assert terminal.buffer.getvalue().decode() == "error: one line of ?? end\n"


def test_any_error_while_a_file_is_read_names_the_file():
    for raised, error, message in (
            (KeyError("G"), UserError, "^x.pt can't be read .KeyError: 'G'.: it should be a checkpoint$"),
            (UserError("as it is"), UserError, "^as it is$"), (Stopped("no damage"), Stopped, "^no damage$")):
        with pytest.raises(error, match=message), reading("x.pt", "a checkpoint"):
            raise raised


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "x.txt"
    atomic_write(path, lambda p: p.write_text("old"))
    for error, message in ((OSError("full"), "full"), (RuntimeError("no"), "x.txt can't be written, is")):
        def half(p, error=error):
            p.write_text("ne")
            raise error
        with pytest.raises(OSError, match=message):
            atomic_write(path, half)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write(path, lambda p: p.write_text("new"), tmp_path / "previous.txt")
    assert path.read_text() == "new" and (tmp_path / "previous.txt").read_text() == "old"


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_another_program_has_open_is_replaced_a_little_later(tmp_path, monkeypatch, times):
    path, waits, replace = tmp_path / "x.txt", [], os.replace
    path.write_text("old")

    def busy(*paths):
        if len(waits) < times:
            raise PermissionError("in use")
        replace(*paths)
    monkeypatch.setattr("os.replace", busy)
    monkeypatch.setattr("time.sleep", waits.append)
    if times == 1:
        atomic_write(path, lambda p: p.write_text("new"))
    else:
        with pytest.raises(PermissionError, match="in use"):
            atomic_write(path, lambda p: p.write_text("new"))
    assert path.read_text() == ("new" if times == 1 else "old") and len(waits) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_file_names_that_are_not_utf_8(tmp_path):
    content = {os.fsdecode(b"caf\xe9 \xff"): ["\u00e9", os.fsdecode(b"\x80")]}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content and "\u00e9" in text


def test_an_existing_folder_is_never_overwritten():
    for name in ("runs/dcgan", "runs/dcgan-2", "runs/dcgan-3"):
        assert new_run_dir("", "dcgan") == Path(name)
        Path(name, "within").mkdir(parents=True)
    assert new_run_dir("runs/dcgan", "x") == Path("runs/dcgan")  # a folder without files is fine
    Path("runs/dcgan/within/notes.txt").touch()
    with pytest.raises(UserError, match="dcgan already exists.*--resume"):
        new_run_dir("runs/dcgan", "x")


# ---------------------------------------------------------------------- runs

def new_run(tmp_path, action="train", digest="digest", **changes) -> Run:
    folder = tmp_path / "r"
    cfg = Small(**dict(out=str(folder)) | changes)
    if action != "train":
        cfg = stored_config(Small, folder, SCRIPT.name, changes, list(changes))
    r = Run(cfg, SCRIPT, action, folder if action != "train" else None, RECIPES)
    torch.manual_seed(0)
    r.G = nn.Linear(2, 2)
    r.opt = torch.optim.Adam(r.G.parameters(), cfg.lr)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    r.register(Data("MNIST", "digits", "mnist", images, torch.zeros(4), (), digest), "ch 3", G=r.G, opt=r.opt)
    return r


def train(r, scores=(), until=None):
    for step in r.steps():
        r.log(d_loss=torch.tensor(float(step)), d_real=torch.tensor(0.5))
        if step % 2 == 0:
            r.log(g_loss=torch.tensor(1.0))  # another number of times
        if step in scores:
            r.log_scores(best=scores[step], accuracy=scores[step])
        if r.is_due("sample"):
            r.log_images(torch.tensor([-1, step / 10]).view(2, 1, 1, 1).expand(2, 1, 8, 8))
        if step == until:
            raise InterruptedError
    return r


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_losses_and_scores_share_rows_and_best_is_kept(tmp_path, capsys):
    r = train(new_run(tmp_path), scores={4: 0.5, 8: 0.25, 10: 0.75})
    assert [(row["step"], row.get("d_loss"), row.get("accuracy")) for row in rows_of(r.folder)] == [
        (4, None, 0.5), (5, 3, None), (8, None, 0.25), (10, 8, 0.75)]  # means of 1 … 5, 6 … 10
    assert rows_of(r.folder)[1]["g_loss"] == 1
    best, last = checkpoint(r.folder, "best"), checkpoint(r.folder)
    assert best["step"] == last["step"] == 10 and best["means"] == last["means"] == {}  # after their row
    assert "step 10/10" in capsys.readouterr().out and (r.folder / "progress.gif").exists()
    assert json.loads((r.folder / "config.json").read_text())["config"]["data"] == "mnist"  # resolved


def test_what_a_run_left_after_its_checkpoint_is_removed_on_resume_and_nothing_else(tmp_path):
    with pytest.raises(InterruptedError):
        train(new_run(tmp_path, iters=20), scores={4: 0.5, 12: 0.6}, until=14)
    folder, own = tmp_path / "r", (".env.local.bak", "samples/step_0000010 copy.png", "samples/step_best.png")
    for name in (".writing-123-last.pt", "samples/.writing-9-step_0000010.png", *own):  # SIGKILL's
        (folder / name).write_bytes(b"half")
    (folder / "samples" / "step_0000005.png").write_text("damaged")  # costs the GIF, not the run
    (folder / "scores.json").write_text("{}")  # of an earlier end
    torch.save(checkpoint(folder) | {"step": 5, "best": 0.5}, folder / "last.pt")
    r = new_run(tmp_path, "resume", iters=6)
    assert r.step == 5 and r.best == 0.5
    for _ in r.steps():
        assert not (folder / "best.pt").exists()  # that of step 12, which is no more
        r.log_scores(best=0.1, accuracy=0.1)
    assert checkpoint(folder, "best")["step"] == 6
    assert [(row["step"], row.get("accuracy")) for row in rows_of(folder)] == [(4, 0.5), (5, None), (6, 0.1)]
    left = {str(p.relative_to(folder)) for pattern in (".*", "samples/*") for p in folder.glob(pattern)}
    assert left == {*own, "samples/step_0000005.png"}
    assert not (folder / "scores.json").exists()
    assert [s["from_step"] for s in json.loads((folder / "config.json").read_text())["sittings"]] == [0, 5]


def test_precision_auto_is_bf16_where_the_hardware_has_it_and_is_kept(tmp_path, monkeypatch):
    for found, auto in (("sse amx_bf16", "bf16"), ("sse avx512_bf16", "bf16"), ("sse avx512f", "fp32")):
        monkeypatch.setattr(device, "cpuinfo", lambda _, found=found: found)
        for wanted, expected in (("auto", auto), ("fp32", "fp32"), ("bf16", "bf16")):
            assert device.pick_precision(wanted, torch.device("cpu")) == expected
    folder = train(new_run(tmp_path)).folder
    monkeypatch.setattr(device, "cpuinfo", lambda _: "avx512_bf16")
    assert stored_config(Small, folder, SCRIPT.name, {}, []).precision == "fp32"


def test_what_is_not_finite_is_not_saved_and_a_loss_ends_the_run(tmp_path):
    r = train(new_run(tmp_path, iters=5))
    before = (r.folder / "last.pt").read_bytes()
    r.G.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="G is not finite at step 5: try --resume .* with a lower"):
        r.save("last")
    assert (r.folder / "last.pt").read_bytes() == before
    for what, row in (("opt is not finite", 1.0), ("d_loss is nan", torch.nan)):
        r = new_run(tmp_path, out=what)
        with pytest.raises(NotFinite, match=f"{what} at step 5: .* lower learning rate"):
            for _ in r.steps():
                (r.G(torch.ones(1, 2)).sum() * 1e25).backward()  # Adam's second moment overflows
                r.opt.step()
                r.log(d_loss=torch.tensor(row))
        assert rows_of(r.folder)[-1]["d_loss"] == pytest.approx(row, nan_ok=True)
        assert r.G.weight.isfinite().all() and not (r.folder / "last.pt").exists()


def test_a_checkpoint_that_is_not_finite_is_not_used(tmp_path, capsys):
    """Neither weights nor Adam's moments; those are not needed for pictures."""
    r = train(new_run(tmp_path))
    r.G(torch.ones(1, 2)).sum().backward()
    r.opt.step()
    r.save("last")
    folder, state, used = r.folder, checkpoint(r.folder), []
    for key, tensor in (("G", state["G"]["weight"]), ("opt", state["opt"]["state"][0]["exp_avg"])):
        before = tensor.clone()
        tensor[0, 0] = torch.inf
        torch.save(state, folder / "last.pt")
        assert exit_status(lambda: new_run(tmp_path, "resume") and used.append(1)) == 3
        assert capsys.readouterr().err == f"error: {key} is not finite in {folder}/last.pt\n"
        tensor.copy_(before)
    state["G"]["weight"][0, 0] = torch.nan
    torch.save(state, folder / "last.pt")
    with pytest.raises(NotFinite, match="G is not finite in .*last.pt"):
        new_run(tmp_path, "sample").load("last")
    assert not used


def test_rows_of_metrics_that_are_lost_are_named(tmp_path, capsys):
    table = train(new_run(tmp_path, iters=11)).folder / "metrics.csv"
    header, five, ten, last = table.read_text().splitlines(keepends=True)
    for rows, ends_at in ((None, 0), ([header], 0), ([header, five], 5), ([header, five, ten], 10),
                          ([header, five, ten, last], None)):
        table.unlink(missing_ok=True) if rows is None else table.write_text("".join(rows))
        capsys.readouterr()
        train(new_run(tmp_path, "resume", iters=12, log_every=5))
        said = f"*** {table} ends at step {ends_at}: rows up to 11 are lost ***\n"
        output = capsys.readouterr().out
        assert ("lost" in output) == (ends_at is not None) == (said in output)
        assert rows_of(table.parent)[-1]["step"] == 12
        os.replace(table.with_name("previous.pt"), table.with_name("last.pt"))  # back to step 11
    for every in (5, 0):  # there are no rows yet, and never any
        run = new_run(tmp_path, out=f"every {every}/r", log_every=every)
        with pytest.raises(Stopped):
            for _ in run.steps():
                run.log(d_loss=torch.ones(()))
                signal.raise_signal(signal.SIGINT)
        train(new_run(Path(f"every {every}"), "resume", log_every=every and 1))
        assert "lost" not in capsys.readouterr().out


def flip_a_bit(path: Path, x: torch.Tensor) -> None:
    """Change one bit of a tensor in a file of torch.save."""
    content = bytearray(path.read_bytes())
    content[content.index(x.detach().numpy().tobytes())] ^= 64
    path.write_bytes(content)


def test_a_cache_with_a_flipped_bit_is_made_again(tmp_path):
    images, made = torch.arange(5000), []
    for times in (1, 1, 2):
        if times == 2:
            flip_a_bit(tmp_path / "cache.pt", images)
        found = cached(tmp_path / "cache.pt", "key", lambda: made.append(1) or {"images": images})
        assert len(made) == times and torch.equal(found["images"], images)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    folder = train(new_run(tmp_path), scores={4: 0.5}).folder
    whole = (folder / "last.pt").read_bytes()
    state = checkpoint(folder)
    for damage in (lambda p: p.write_bytes(whole[:500]), lambda p: p.write_bytes(b""),
                   lambda p: flip_a_bit(p, state["G"]["weight"]), lambda p: torch.save([], p),
                   lambda p: torch.save({k: state[k] for k in state if k != "rng"}, p), Path.unlink):
        (folder / "last.pt").write_bytes(whole)
        damage(folder / "last.pt")
        assert new_run(tmp_path, "resume").step == 5
        assert "resuming from previous.pt, step 5" in capsys.readouterr().out
    flip_a_bit(folder / "previous.pt", checkpoint(folder, "previous")["G"]["weight"])
    with pytest.raises(UserError, match="previous.pt can't be read.*is damaged.*a checkpoint of this run"):
        new_run(tmp_path, "resume")
    (folder / "previous.pt").unlink()
    assert new_run(tmp_path, "resume").step == 0 and "starts anew" in capsys.readouterr().out


def test_a_kept_generator_is_sampled_and_never_trained_on(tmp_path):
    """It has one checkpoint, of the weights that are sampled from "only"."""
    folder = train(new_run(tmp_path), scores={4: 0.5}).folder
    state = checkpoint(folder, "best") | {"only": ["G"]}
    for name in ("best", "last"):
        for path in folder.glob("*.pt"):
            path.unlink()
        torch.save({key: value for key, value in state.items() if key != "opt"}, folder / f"{name}.pt")
        with pytest.raises(UserError, match="kept generator|can't be read"):
            train(new_run(tmp_path, "resume", iters=20))
        r = new_run(tmp_path, "sample")
        assert r.load(name)["step"] == 4 and torch.equal(r.G.weight, state["G"]["weight"])


def test_learning_rates_are_those_of_the_config(tmp_path):
    folder = train(new_run(tmp_path, lr=0.25)).folder
    assert checkpoint(folder)["opt"]["param_groups"][0]["lr"] == 0.25
    title = "test_run on MNIST, recipe paper, lr 0.25, ch 3, seed 0"
    assert new_run(tmp_path, "sample", seed=5).title == title  # with the seed of the training
    r = new_run(tmp_path, "resume", lr=0.125, iters=11)
    assert r.opt.param_groups[0]["lr"] == 0.125
    train(r)
    assert json.loads((folder / "config.json").read_text())["config"]["lr"] == 0.125
    assert new_run(tmp_path, "resume").opt.param_groups[0]["lr"] == 0.125


def test_two_processes_never_train_in_one_folder(tmp_path):
    train(new_run(tmp_path))
    with lock(tmp_path / "r"), pytest.raises(UserError, match="r is in use: another process"):
        train(new_run(tmp_path, "resume", iters=20))
    assert train(new_run(tmp_path, "resume", iters=12)).step == 12


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", flock)
    with lock(tmp_path), lock(tmp_path):
        pass


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_saves_and_the_second_ends_at_once(tmp_path, number):
    before, r = signal.getsignal(number), new_run(tmp_path)
    with pytest.raises(Stopped) as stopped:
        for step in r.steps():
            if step == 3:
                signal.raise_signal(number)
    command = join(["python", sys.argv[0], "--resume", str(r.folder)])
    assert stopped.value.args == (f"stopped at step 3; to continue: {command}", number)
    assert checkpoint(r.folder)["step"] == 3
    assert signal.getsignal(number) == before  # outside of the loop a signal does what it did
    r = new_run(tmp_path, "resume")
    with pytest.raises(Stopped, match="^.'stopped', "):
        for _ in r.steps():
            for _ in range(2):
                signal.raise_signal(number)
    assert checkpoint(r.folder)["step"] == 3


def test_a_run_without_matplotlib_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    r = train(new_run(tmp_path))
    line, = [line for line in capsys.readouterr().out.splitlines() if "matplotlib.figure" in line]
    assert "no curves.png" in line and (r.folder / "progress.gif").exists()


def test_commands_can_be_pasted_into_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my code/test_run.py", "--out", "a'b", "--iters=9"])
    r = new_run(tmp_path, out="a'b", log_every=100)
    with pytest.raises(Stopped) as stopped:
        for _ in r.steps():
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.args[0].endswith("to continue: python 'my code/test_run.py' --resume 'a'\"'\"'b'")
    assert "curves.png" not in capsys.readouterr().out  # stopped before the first row, which is no accident
    sitting, = json.loads((r.folder / "config.json").read_text())["sittings"]
    assert split(sitting["command"]) == ["python", *sys.argv] and sitting["command"].startswith("python 'my")
    assert sitting["processes"] == 1


def test_a_run_needs_no_standard_output(tmp_path, monkeypatch):
    """As under pythonw, or with >&- in a shell."""
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda: train(new_run(tmp_path)) and None) == 0
    assert checkpoint(tmp_path / "r")["step"] == 10


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for _ in new_run(tmp_path, iters=2).steps():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint(tmp_path / "r")["step"] == 2


def test_the_status_line_fits_the_terminal_and_its_encoding(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_status(lambda: train(new_run(tmp_path)) and print("±", flush=True)) == 0
    text = terminal.buffer.getvalue().decode()
    first, last = (part for part in text.split("\r") if part.startswith("step "))
    assert "\n" not in first and "K\n" in last and text.endswith("?\n")
    assert all(len(part.split("\x1b")[0]) < 40 for part in (first, last))
