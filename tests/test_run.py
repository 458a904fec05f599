"""The command line, the run folder and the checkpoints, without a method."""
import json
import math
import signal
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from common import run, system
from common.cli import Settings, parse, stored_config
from common.datasets import Data
from common.errors import NotFinite, Stopped, UserError, exit_status, reading
from tests.conftest import rows_of

SCRIPT = Path(__file__)


@dataclass
class Small(Settings):
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


def call(*argv, quick=None):
    return parse(Small, quick or {}, "text", list(argv))


# ---------------------------------------------------------------------- command line

def test_flags_are_the_fields_and_help_their_comments(capsys):
    action, cfg, folder = call("--iters", "3", "--no-trick", "--loss", "b")
    assert (action, folder) == ("train", None) and cfg == Small(iters=3, trick=False, loss="b")
    with pytest.raises(SystemExit) as left:
        call("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and text.index("--lr") < text.index("--seed")  # the script's own flags first
    for part in ("how long (default: 10)", "which one (default: a)", "50% more", "--no-trick", "of weights"):
        assert part in text
    assert call("--quick", "--lr", "2", quick=dict(iters=4, lr=1.0))[1] == Small(iters=4, lr=2.0)


@pytest.mark.parametrize("argv, message", [
    (["--iters", "0"], "--iters 0: must be at least 1"), (["--iters", "-3"], "at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"), (["--lr", "nan"], "--lr nan"),
    (["--lr", "x"], "invalid float"), (["--loss", "c"], "invalid choice"),
    (["--nothing", "1"], "unrecognized"), (["--log-every", "-1"], "at least 0"),
    (["--ite", "3"], "unrecognized"), (["--ema", "1"], "must be below 1"), (["--seed", "-1"], "--seed -1"),
])
def test_values_out_of_range_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        call(*argv)


def stored(folder, script=SCRIPT.name, **changes):
    folder.mkdir()
    values = vars(Small()) | changes
    (folder / "config.json").write_text(json.dumps({"script": script, "config": values}))
    return str(folder)


def test_resume_takes_the_stored_config_and_longer_iters(tmp_path):
    folder = stored(tmp_path / "a", lr=0.25)
    action, cfg, where = call("--resume", folder, "--iters", "20", "--log-every", "1", "--lr", "0.25")
    assert action == "resume" and str(where) == folder and cfg == Small(iters=20, lr=0.25, log_every=1)
    cfg = call("--sample", folder, "--seed", "5", "--judge", "none")[1]
    assert cfg == Small(lr=0.25, seed=5, judge="none")


@pytest.mark.parametrize("argv, message", [
    (["--resume", "a", "--ema", "0.5"], "--ema is 0.0 there, 0.5 here.*only --iters, .*may change"),
    (["--resume", "a", "--no-trick", "--loss", "b"], "--trick is True there.*--loss is 'a' there"),
    (["--eval", "a", "--iters", "11"], "--iters is 10 there"), (["--resume", "a", "--quick"], "a new run"),
    (["--resume", "a", "--iters", "0"], "--iters 0"), (["--eval", "a", "--judge", "none"], "needs a judge"),
    (["--resume", "."], "in the folder of a run"), (["--sample", "b"], "is a run of vae_celeba.py"),
    (["--eval", "c"], r"another version of test_run.py \(fields \['more'\]\)"),
    (["--resume", "d"], "d/config.json can't be read .JSONDecodeError"),
    (["--resume", "e"], "e/config.json can't be read .KeyError"),
    (["--resume", "a", "--sample", "a"], "not allowed with"),
])
def test_refused_uses_of_a_run(tmp_path, argv, message):
    for name, changes in (("a", dict(lr=0.25)), ("b", dict(script="vae_celeba.py")), ("c", dict(more=1))):
        stored(tmp_path / name, **changes)
    for name, text in (("d", "{"), ("e", "{}")):
        stored(tmp_path / name)
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        call(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [("iters", "10"), ("iters", None), ("lr", "a"), ("loss", "c"),
                                          ("trick", 1), ("ema", 10**9), ("judge", 3)])
def test_an_edited_config_is_checked_as_flags_are(tmp_path, field, value):
    with pytest.raises(UserError, match=f"--{field} .*: must be"):
        call("--resume", stored(tmp_path / "a", **{field: value}))


# ---------------------------------------------------------------------- errors and files

@pytest.mark.parametrize("raised, status, text", [
    (UserError("what, where"), 2, "error: what, where\n"), (NotFinite("g is nan"), 3, "error: g is nan\n"),
    (Stopped("stopped", signal.SIGTERM), 143, "\nstopped\n"), (KeyboardInterrupt(), 130, ""), (None, 0, ""),
    (OSError(28, "No space left on device", "r/metrics.csv"), 2,
     "error: [Errno 28] No space left on device: 'r/metrics.csv'\n"),
    (NotImplementedError("… 'aten::x' … MPS … set PYTORCH_ENABLE_MPS_FALLBACK=1 …"), 2,
     "error: PyTorch lacks an operation for Apple's GPUs: set PYTORCH_ENABLE_MPS_FALLBACK=1, "
     "or use --device cpu\n"),
    (RuntimeError("CUDA out of memory. Tried\n x"), 2,
     "error: not enough memory (CUDA out of memory. Tried): use a smaller batch, width or image\n"),
    (RuntimeError("x_cuda does not have a deterministic implementation, but …. You can"), 2,
     "error: x_cuda does not have a deterministic implementation, but …: leave out --deterministic\n"),
])
def test_exit_status(capsys, raised, status, text):
    def main():
        if raised:
            raise raised
    assert exit_status(main) == status
    out, err = capsys.readouterr()
    assert out + err == text and bool(err) == (status in (2, 3))


def test_a_failing_thread_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", None)  # restored afterwards
    assert exit_status(lambda: 0) == 0
    thread = threading.Thread(target=lambda: Path("not_there/file").touch())
    thread.start()
    thread.join()
    assert capsys.readouterr().err == "*** [Errno 2] No such file or directory: 'not_there/file' ***\n"


def test_any_error_while_a_file_is_read_names_the_file():
    with pytest.raises(UserError, match="^x.pt can't be read .KeyError: 'G'.: it should be a checkpoint$"):
        with reading("x.pt", "a checkpoint"):
            {}["G"]
    with pytest.raises(UserError, match="^as it is$"), reading("x.pt", "a checkpoint"):
        raise UserError("as it is")
    with pytest.raises(Stopped), reading("x.pt", "a checkpoint"):  # a signal is not a damaged file
        raise Stopped("stopped", signal.SIGINT)


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "x.txt"
    system.write_whole(path, lambda p: p.write_text("old"))

    def half(p):
        p.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        system.write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def full(_):
        raise RuntimeError("PytorchStreamWriter failed")
    with pytest.raises(OSError, match="x.txt can't be written, is the disk full. .PytorchStreamWriter"):
        system.write_whole(path, full)
    system.write_whole(path, lambda p: p.write_text("new"), tmp_path / "previous.txt")
    assert path.read_text() == "new" and (tmp_path / "previous.txt").read_text() == "old"


def test_an_existing_folder_is_never_overwritten(tmp_path):
    names = []
    for _ in range(3):
        names.append(system.free_folder("", "dcgan").name)
        (tmp_path / "runs" / names[-1]).mkdir(parents=True)
    assert names == ["dcgan", "dcgan-2", "dcgan-3"]
    (tmp_path / "empty" / "within").mkdir(parents=True)
    assert system.free_folder("empty", "x") == Path("empty")  # a folder without files is fine
    (tmp_path / "empty" / "within" / "notes.txt").touch()
    with pytest.raises(UserError, match="empty already exists.*--resume"):
        system.free_folder("empty", "x")
    with pytest.raises(UserError, match="can't be created: .*notes.txt is not a writable folder"):
        system.free_folder("empty/within/notes.txt/run", "x")


# ---------------------------------------------------------------------- runs

def new_run(tmp_path, action="train", digest="digest", **changes) -> run.Run:
    folder = tmp_path / "r"
    cfg = Small(**dict(out=str(folder)) | changes)
    if action != "train":
        cfg = stored_config(Small, folder, SCRIPT.name, changes, tuple(changes))
    r = run.Run(cfg, SCRIPT, action, folder if action != "train" else None)
    torch.manual_seed(0)
    r.G = nn.Linear(2, 2)
    r.opt = torch.optim.Adam(r.G.parameters(), cfg.lr)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    r.track(Data("MNIST", "digits", "mnist", images, torch.zeros(4), (), digest), G=r.G, opt=r.opt)
    return r


def train(r, scores=(), until=None):
    for step in r.steps():
        r.record(d_loss=torch.tensor(float(step)), d_real=torch.tensor(0.5))
        if step % 2 == 0:
            r.record(g_loss=torch.tensor(1.0))  # another number of times
        if step in scores:
            r.score(best=scores[step], accuracy=scores[step])
        if r.due("sample"):
            r.picture(torch.tensor([-1, step / 10]).view(2, 1, 1, 1).expand(2, 1, 8, 8), r.title(r.data))
        if step == until:
            raise InterruptedError
    return r


def test_losses_and_scores_share_rows_and_best_is_kept(tmp_path, capsys):
    r = train(new_run(tmp_path), scores={4: 0.5, 8: 0.25, 10: 0.75})
    header, rows = (r.folder / "metrics.csv").read_text().split("\n")[0], rows_of(r.folder)
    assert header == "step,seconds,accuracy,d_loss,d_real,g_loss"
    assert [(row["step"], row.get("d_loss"), row.get("accuracy")) for row in rows] == [
        (4, None, 0.5), (5, 3, None), (8, None, 0.25), (10, 8, 0.75)]  # means of 1 … 5, 6 … 10
    assert rows[1]["g_loss"] == 1 and [n for n, _ in r.checkpoints("last", "best")] == ["last", "best"]
    assert torch.load(r.folder / "best.pt", weights_only=True)["step"] == 10
    assert "step 10/10" in capsys.readouterr().out and (r.folder / "progress.gif").exists()
    assert json.loads((r.folder / "config.json").read_text())["config"]["data"] == "mnist"  # resolved


def test_rows_and_pictures_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    with pytest.raises(InterruptedError):
        train(new_run(tmp_path, iters=20), scores={4: 0.5, 12: 0.6}, until=14)
    folder = tmp_path / "r"
    for name in (".writing-123-last.pt", "samples/.writing-9-step_0000010.png"):  # what SIGKILL leaves
        (folder / name).write_bytes(b"half")
    (folder / "scores.json").write_text("{}")  # of an earlier end
    with open(folder / "metrics.csv", "a") as table:
        table.write("1")  # of a row that a full disk cut off
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"step": 5, "best": 0.5}, folder / "last.pt")
    r = new_run(tmp_path, "resume", iters=6)
    assert r.step == 5 and r.best == 0.5
    train(r, scores={6: 0.1})
    assert torch.load(folder / "best.pt", weights_only=True)["step"] == 6  # not 12, which is no more
    assert [(row["step"], row.get("accuracy")) for row in rows_of(folder)] == [(4, 0.5), (5, None), (6, 0.1)]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step_0000005.png", "step_0000006.png"]
    assert not list(folder.rglob(".*")) and not (folder / "scores.json").exists()
    assert [s["from_step"] for s in json.loads((folder / "config.json").read_text())["sittings"]] == [0, 5]


def test_precision_auto_is_bf16_where_the_hardware_has_it_and_is_kept(tmp_path, monkeypatch, capsys):
    cpu = torch.device("cpu")
    for flags, expected in (("sse amx_bf16", "bf16"), ("sse avx512_bf16", "bf16"), ("sse avx512f", "fp32")):
        monkeypatch.setattr(system, "cpuinfo", lambda _, flags=flags: flags)
        assert system.pick_precision("auto", cpu) == expected and system.pick_precision("fp32", cpu) == "fp32"
    assert not capsys.readouterr().out
    assert system.pick_precision("bf16", cpu) == "bf16" and "only emulates it" in capsys.readouterr().out
    r = train(new_run(tmp_path))
    monkeypatch.setattr(system, "cpuinfo", lambda _: "avx512_bf16")
    assert stored_config(Small, r.folder, SCRIPT.name, {}, ()).precision == "fp32"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    r = train(new_run(tmp_path, iters=5))
    before = (r.folder / "last.pt").read_bytes()
    with torch.no_grad():
        r.G.weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="G.weight is not finite at step 5. last.pt keeps"):
        r.save("last")
    assert (r.folder / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_its_row_says_so(tmp_path):
    r = new_run(tmp_path)
    with pytest.raises(NotFinite, match="d_loss is nan at step 5"):
        for _ in r.steps():
            r.record(d_loss=torch.tensor(torch.nan))
    assert math.isnan(rows_of(r.folder)[-1]["d_loss"]) and not (r.folder / "last.pt").exists()


def flip_a_bit(path: Path) -> None:
    """Change one bit of the largest tensor in a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda i: i.file_size * ("/data/" in i.filename))
    content = bytearray(path.read_bytes())
    lengths = [int.from_bytes(content[largest.header_offset + k:][:2], "little") for k in (26, 28)]
    content[largest.header_offset + 30 + sum(lengths)] ^= 64
    path.write_bytes(content)


def test_a_cache_with_a_flipped_bit_is_made_again(tmp_path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"images": torch.arange(5000)}
    for times, damage in ((1, None), (1, None), (2, flip_a_bit)):
        if damage:
            damage(tmp_path / "cache.pt")
        found = system.cached(tmp_path / "cache.pt", "key", make)
        assert len(made) == times and torch.equal(found["images"], torch.arange(5000))


def take_its_random_state(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["rng"]
    torch.save(state, path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    folder = train(new_run(tmp_path), scores={4: 0.5}).folder
    whole = (folder / "last.pt").read_bytes()
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:500]), lambda p: p.write_bytes(b""), flip_a_bit,
                   take_its_random_state, lambda p: torch.save({"G": 1}, p), lambda p: torch.save([], p),
                   Path.unlink):
        (folder / "last.pt").write_bytes(whole)
        damage(folder / "last.pt")
        assert new_run(tmp_path, "resume").step == 5  # that of previous.pt
        assert "no good last.pt: resuming from previous.pt, at iteration 5" in capsys.readouterr().out
    flip_a_bit(folder / "previous.pt")
    assert new_run(tmp_path, "resume").step == 4  # best.pt
    flip_a_bit(folder / "best.pt")
    with pytest.raises(UserError, match="best.pt can't be read.*is damaged.*a checkpoint of this run"):
        new_run(tmp_path, "resume")
    for name in ("previous", "best"):
        (folder / f"{name}.pt").unlink()
    assert new_run(tmp_path, "resume").step == 0 and "starts anew" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no checkpoint yet"):
        list(new_run(tmp_path, "eval").checkpoints("best", "last"))


def test_best_pt_is_written_after_the_row_it_belongs_to(tmp_path):
    r = train(new_run(tmp_path), scores={5: 0.5})
    best, previous = (torch.load(r.folder / f"{n}.pt", weights_only=True) for n in ("best", "previous"))
    assert best["step"] == previous["step"] == 5 and best["means"] == previous["means"] == {}


def test_a_state_of_an_optimiser_that_is_not_finite_is_not_saved(tmp_path):
    r = new_run(tmp_path)
    with pytest.raises(NotFinite, match=r"opt.state.0.exp_avg_sq is not finite at step 5. There is no chec"):
        for _ in r.steps():
            (r.G(torch.ones(1, 2)).sum() * 1e25).backward()
            r.opt.step()
    assert not (r.folder / "last.pt").exists()


def test_learning_rates_are_those_of_the_config(tmp_path):
    folder = train(new_run(tmp_path, lr=0.25)).folder
    assert torch.load(folder / "last.pt", weights_only=True)["opt"]["param_groups"][0]["lr"] == 0.25
    r = new_run(tmp_path, "resume", lr=0.125, iters=11)
    assert r.opt.param_groups[0]["lr"] == 0.125
    train(r)
    sitting = json.loads((folder / "config.json").read_text())
    assert sitting["config"]["lr"] == 0.125 and new_run(tmp_path, "resume").opt.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("changes, digest, message", [
    (dict(iters=9), "digest", "--iters 9: .*r is already at 10"),
    ({}, "other", "does not hold the images that .*r was trained on"),
])
def test_what_does_not_fit_the_checkpoint_is_refused(tmp_path, changes, digest, message):
    folder = train(new_run(tmp_path)).folder
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message):
        new_run(tmp_path, "resume", digest=digest, **changes)
    if digest == "other":  # neither sampled nor scored
        with pytest.raises(UserError, match=message):
            list(new_run(tmp_path, "eval", digest=digest).checkpoints("last"))
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_never_train_in_one_folder(tmp_path):
    train(new_run(tmp_path))
    with system.locked(tmp_path / "r"), pytest.raises(UserError, match="r is in use: another process"):
        train(new_run(tmp_path, "resume", iters=20))
    assert train(new_run(tmp_path, "resume", iters=12)).step == 12


def test_only_files_of_the_project_are_removed(tmp_path):
    own = tmp_path / "r" / ".env.local.bak"
    own.parent.mkdir()
    own.write_text("mine")
    folder = train(new_run(tmp_path)).folder
    for name in ("step_0000010 copy.png", "step_best.png"):
        (folder / "samples" / name).write_text("mine")
    (folder / "samples" / "step_0000005.png").write_text("damaged")  # costs the GIF, not the run
    train(new_run(tmp_path, "resume", iters=11))
    assert own.read_text() == "mine" and (folder / "samples" / "step_best.png").read_text() == "mine"


def test_a_damaged_table_is_refused_before_anything_changes(tmp_path):
    folder = train(new_run(tmp_path)).folder
    (folder / "scores.json").write_text("{}")
    (folder / "metrics.csv").write_text("step,seconds\nx,y\n")
    with pytest.raises(UserError, match="metrics.csv can't be read .ValueError.*repair it"):
        train(new_run(tmp_path, "resume", iters=12))
    assert (folder / "scores.json").exists()


def test_dead_training_is_noticed_once(tmp_path, capsys):
    r = new_run(tmp_path, iters=30, log_every=1)
    for step in r.steps():
        r.record(d_loss=torch.tensor(0.0 if step > 5 else 1.0))
        if r.due("sample"):
            r.picture(torch.full((2, 1, 8, 8), step / 40), "")
    text = capsys.readouterr().out
    assert text.count("step 15: D's loss has been zero for ten rows") == 1 == text.count("D's loss")
    assert text.count("step 5: the generated images hardly differ") == 1 == text.count("hardly differ")


def test_one_path_for_training_sampling_and_scoring(tmp_path):
    train(new_run(tmp_path), scores={4: 0.5})
    for action, pictures, scores in (("resume", True, True), ("sample", True, False), ("eval", False, True)):
        r = new_run(tmp_path, action)
        assert (r.wants_pictures, r.wants_scores) == (pictures, scores)
        assert not list(r.steps())
        expected = [("last", 10), ("best", 4)] if scores else [("best", 4)]
        assert list(r.checkpoints("last", "best")) == expected
    assert new_run(tmp_path, "sample", seed=5).title(r.data, "ch 3") == "test_run on MNIST, ch 3, seed 0"


def test_the_first_signal_saves_and_outside_of_the_loop_it_ends_at_once(tmp_path):
    r = new_run(tmp_path)
    with r, pytest.raises(Stopped, match="^.'stopped', "):
        signal.raise_signal(signal.SIGTERM)
    with r, pytest.raises(Stopped, match="stopped at step 3; to continue: test_run.py --resume"):
        for step in r.steps():
            if step == 3:
                signal.raise_signal(signal.SIGINT)
    assert torch.load(r.folder / "last.pt", weights_only=True)["step"] == 3
    r = new_run(tmp_path, "resume")
    with r, pytest.raises(Stopped, match="^.'stopped', "):
        for _ in r.steps():
            for _ in range(2):  # the second ends at once
                signal.raise_signal(signal.SIGTERM)
    assert torch.load(r.folder / "last.pt", weights_only=True)["step"] == 3
