"""A run: its folder, checkpoints, metrics and sample grids, and how it stops."""
import contextlib
import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import join

import torch
from torchvision.transforms.functional import pil_to_tensor

from common.datasets import Data
from common.files import TEMPORARY, UserError, atomic_write, load_verified, lock, reading, write_json
from harness import dist
from harness.cli import NotFinite, Settings, Stopped, exit_status, parse
from harness.device import hardware, pick_device, pick_precision, provenance
from harness.pictures import save_curves, save_gif, save_grid

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
SAMPLES = f"step_{'[0-9]' * 7}.png"  # other files in samples/ are not ours


def launch(main: Callable[["Run"], None], Config: type[Settings], recipes: dict, quick: dict) -> None:
    """Call main(run) as the command line says, and leave with exit_status's status."""
    script = Path(main.__code__.co_filename)  # the module __main__ may be a profiler

    def call() -> None:
        with dist.process_group():
            action, cfg, folder = parse(Config, recipes, quick, main.__globals__["__doc__"], script=script)
            main(Run(cfg, script, action, folder, recipes))
    sys.exit(exit_status(call))


class Run:
    """One invocation of a script: train, resume, sample or eval."""

    def __init__(self, cfg: Settings, script: Path, action: str = "train", folder: Path | None = None,
                 recipes: dict[str, dict] | None = None):
        self.cfg, self.script, self.action, self.folder = cfg, script, action, folder
        self.is_main = dist.rank() == 0
        self.step, self.best, self.means, self.row, self.rows = 0, -math.inf, {}, {}, []
        self.signal, self.writer = 0, None
        self.started = time.monotonic()
        if action in ("sample", "eval") and dist.world_size() > 1:
            raise UserError(f"--{action} needs one process only: call it without torchrun")
        if target := cfg.to or cfg.out * (action == "train"):
            new_run_dir(target)  # an error now, not after the judge's training
        self.recipe = recipe_of(cfg, recipes or {})
        self.trained_seed, self.sessions = cfg.seed, []
        if folder:
            with reading(folder / "config.json", "the settings of a run"):
                stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                self.trained_seed, self.sessions = stored["config"]["seed"], list(stored["sittings"])
        self.device = pick_device(cfg.device, cfg.deterministic)
        cfg.precision = pick_precision(cfg.precision, self.device)
        print(f"device: {self.device} ({hardware(self.device)}), {cfg.precision}")

    def get_data(self, load: Callable[..., Data], *args) -> Data:
        """load(cfg, …); for --sample, and to score scenes, the metadata in the checkpoint will do."""
        if self.action not in ("sample", "eval"):
            data = load(self.cfg, *args) if self.is_main else None
            dist.all_reduce_max(0)  # the others read the cache that rank 0 has written
            return data or load(self.cfg, *args)
        names = [name for name in ("best", "last") if (self.folder / f"{name}.pt").exists()]
        if not names:
            raise UserError(f"{self.folder} has no checkpoint yet: continue it with --resume")
        known = Data.from_metadata(self._read(names[0])["data"])
        try:
            return known if self.cfg.to else load(self.cfg, *args)
        except UserError as error:
            if self.action == "eval" and known.domain != "scenes":
                raise
            print(f"*** {error} ***\n*** going on without the images ***")
            return known

    def register(self, data: Data, *parts: str, **tracked) -> None:
        """Name what a checkpoint holds: objects with a state_dict. When resuming, load the newest into them,
        or previous.pt if last.pt is damaged. parts: settings for the titles of pictures.
        """
        self.data, self.tracked, self.cfg.data = data, tracked, data.source
        about = [data.name, self.recipe, *parts, f"seed {self.trained_seed}"]
        self.title = f"{self.script.stem} on {', '.join(about)}"
        if not self.is_main:  # all ranks start from the same weights; from here each draws its own noise
            torch.manual_seed(self.cfg.seed + dist.rank() * 1_000_003)
        if self.action != "resume":
            return
        names = [name for name in ("last", "previous") if (self.folder / f"{name}.pt").exists()]
        if not names:
            if (self.folder / "best.pt").exists() and "only" in self._read("best"):
                raise UserError(f"{self.folder} is a kept generator, for --sample and --eval only")
            print(f"*** {self.folder} has no checkpoint yet: training starts anew ***")
            return
        try:
            state = self.load(names[0], everything=True)
        except UserError as error:
            if len(names) == 1:
                raise
            print(f"*** {error} ***")
            names.remove("last")
            state = self.load("previous", everything=True)
        print(f"resuming from {names[0]}.pt, step {state['step']}")
        if state["step"] > self.cfg.iters:
            raise UserError(f"--iters {self.cfg.iters}: {self.folder} is already at {state['step']}")
        self.step, self.best, self.means = state["step"], state["best"], state["means"]
        if dist.rank() < len(state["rng"]):  # else it was saved by fewer processes
            rng = state["rng"][dist.rank()]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)

    def save(self, name: str) -> None:
        """Write NAME.pt; raises NotFinite, and keeps the old file, if a value in it is not finite."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        rng = dist.all_gather(rng) if name == "last" else [rng]
        if not self.is_main:
            return
        state = {key: thing.state_dict() for key, thing in self.tracked.items()}
        check_finite(state, f"at step {self.step}: try --resume {self.folder} with a lower learning rate")
        state |= dict(step=self.step, best=self.best, means=self.means, data=self.data.metadata(), rng=rng,
                      config=vars(self.cfg))
        previous = self.folder / "previous.pt" if name == "last" else None
        atomic_write(self.folder / f"{name}.pt", lambda p: torch.save(state, p), previous)

    def _read(self, name: str) -> dict:
        """The content of NAME.pt; UserError if it is damaged."""
        path = self.folder / f"{name}.pt"
        with reading(path, "a checkpoint of this run"):
            state = load_verified(path)
            if missing := {*"step best means rng data".split()} - state.keys():
                raise ValueError(f"it lacks {sorted(missing)}")
        return state

    def load(self, name: str, everything: bool = False) -> dict:
        """Load NAME.pt into all registered objects (learning rates excepted) and return its contents. A kept
        generator has "only" what is sampled from, which is enough unless `everything` is needed.
        """
        state, path = self._read(name), self.folder / f"{name}.pt"
        keys = self.tracked if everything else state.get("only", self.tracked)
        check_finite({key: state.get(key, {}) for key in keys}, f"in {path}")
        with reading(path, f"a checkpoint of this run. If a network in {self.script.name} was changed since, "
                     "start a new run"):
            for key in keys:
                thing = self.tracked[key]
                if isinstance(thing, torch.optim.Optimizer):  # learning rates as config.json has them now
                    state[key]["param_groups"] = thing.state_dict()["param_groups"]
                thing.load_state_dict(state[key])
            digest = state["data"]["digest"]
        if digest != self.data.digest:
            raise UserError(f"{self.cfg.data} does not hold the images that {self.folder} was trained on: "
                            "restore them, or name their new place with --data")
        return state

    def steps(self) -> Iterator[int]:
        """Yield the remaining step numbers (none for --sample/--eval); log and save after each when due."""
        if self.action in ("sample", "eval"):
            return
        with contextlib.ExitStack() as stack:
            if self.is_main:
                self._open(stack)
            for number in SIGNALS:
                if (before := signal.getsignal(number)) != signal.SIG_IGN:  # nohup's stays ignored
                    stack.callback(signal.signal, number, before)
                    signal.signal(number, self._stop)
            for step in range(self.step + 1, self.cfg.iters + 1):
                self.step, self.is_best = step, False
                yield step
                stop = dist.all_reduce_max(self.signal)  # a signal to any process stops all
                self.signal = self.signal or stop  # one may have come meanwhile
                if self.row or self.is_due("log"):
                    self._log()
                if self.is_best:
                    self.save("best")
                if stop or self.is_due("save") or self.step == self.cfg.iters:
                    self.save("last")
                if stop:
                    break
            if self.is_main:
                try:
                    if pictures := sorted((self.folder / "samples").glob(SAMPLES)):
                        save_gif(self.folder / "progress.gif", pictures)
                    if self.rows:  # none where the run was stopped before the first
                        save_curves(self.rows, self.folder / "curves.png", self.title)
                except Exception as error:  # whatever is wrong with a picture or with matplotlib ends no run
                    print(f"no curves.png or progress.gif: {type(error).__name__}: {str(error)[:80]!r}")
        if self.signal:
            command = join(["python", sys.argv[0], "--resume", str(self.folder)])
            raise Stopped(f"stopped at step {self.step}; to continue: {command}", self.signal)
        print(f"{self.folder}: {self.step} iterations, {time.monotonic() - self.started:.0f} s")

    def is_due(self, what: str) -> bool:
        """True every `<what>_every` steps and at the last step; never if that is 0. what: log, sample, …"""
        every = getattr(self.cfg, f"{what}_every") * (self.is_main or what == "save")
        return bool(every) and (self.step % every == 0 or self.step == self.cfg.iters)

    def log(self, **values: torch.Tensor) -> None:
        """Add to the means of the next row of metrics.csv; until then nothing is read from the GPU."""
        for name, value in values.items():
            total, n = self.means.get(name, (0.0, 0))
            self.means[name] = total + value.detach(), n + 1

    def log_scores(self, best: float, **columns: float) -> None:
        """Add scores to this step's row of metrics.csv, and save best.pt if `best` is the highest so far."""
        self.row |= columns
        self.is_best = best > self.best
        self.best = max(self.best, best)

    def log_images(self, images: torch.Tensor, what: str = "", **grid) -> None:
        """Write samples/step_0000500.png of what save_grid takes; `what` ends its title."""
        path = self.folder / "samples" / f"step_{self.step:07}.png"
        picture = save_grid(path, images, f"{self.title}, step {self.step}{what}", **grid)
        if self.writer:
            self.writer.add_image("samples", pil_to_tensor(picture), self.step)

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Create and lock the run folder, or roll it back to the resumed step; write config.json."""
        parts = [self.script.stem, self.cfg.recipe.replace("paper", ""),
                 "synthetic" * (self.data.source == "synthetic")]
        self.folder = self.folder or new_run_dir(self.cfg.out, "-".join(filter(None, parts)))
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(self.folder))
        self.table = self.folder / "metrics.csv"
        if self.table.exists():
            with reading(self.table, "the table of this run: repair it"), open(self.table, newline="") as f:
                complete = (row for row in csv.DictReader(f) if None not in row.values())
                self.rows = [row for row in complete if int(row["step"]) <= self.step]
        last = self.rows[-1] if self.rows else {"step": 0, "seconds": 0}
        expected = self.step - min((n for _, n in self.means.values()), default=0)
        if int(last["step"]) < expected:
            print(f"*** {self.table} ends at step {last['step']}: rows up to {expected} are lost ***")
        if (self.folder / "best.pt").exists() and self._read("best")["step"] > self.step:
            (self.folder / "best.pt").unlink()
            self.best = -math.inf
        (self.folder / "scores.json").unlink(missing_ok=True)
        for path in self.folder.rglob(f"{TEMPORARY}*"):  # half written when a run was killed
            path.unlink()
        for path in (self.folder / "samples").glob(SAMPLES):
            if int(path.stem[5:]) > self.step:
                path.unlink()
        self.sessions.append({"from_step": self.step, "command": join(["python", *sys.argv]),
                              **provenance(self.device)})
        content = {"script": self.script.name, "config": vars(self.cfg), "sittings": self.sessions}
        write_json(self.folder / "config.json", content)
        with contextlib.suppress(Exception):  # TensorBoard is optional, and may be broken in any way
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step)
        print(f"run: {self.folder}")
        self.mark, self.started = (time.monotonic(), self.step), time.monotonic() - float(last["seconds"])

    def _log(self) -> None:
        """Add this step's scores and, if due, the losses' means to metrics.csv; print a status line."""
        means = {}
        if self.means and self.is_due("log"):
            values = torch.stack([total / n for total, n in self.means.values()]).tolist()
            means, self.means = dict(zip(self.means, values, strict=True)), {}
            now, (then, since) = time.monotonic(), self.mark
            rate, self.mark = (self.step - since) / max(now - then, 1e-9), (now, self.step)
            left = round((self.cfg.iters - self.step) / rate)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            pace = f"{rate:.2f} it/s  {left // 60}:{left % 60:02} left"
            self._say(f"step {self.step}/{self.cfg.iters}  {pace}  {shown}")
        found, self.row = means | self.row, {}
        self.rows.append({"step": self.step, "seconds": round(time.monotonic() - self.started, 3)}
                         | {name: f"{value:.6g}" for name, value in found.items()})

        def write(path: Path) -> None:
            with open(path, "w", newline="") as f:
                table = csv.DictWriter(f, dict.fromkeys(name for row in self.rows for name in row))
                table.writeheader()
                table.writerows(self.rows)
        atomic_write(self.table, write)
        for name, value in found.items():
            if self.writer:
                self.writer.add_scalar(name, value, self.step)
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value} at step {self.step}: try --resume {self.folder} with a "
                                "lower learning rate")

    def _say(self, line: str) -> None:
        """Print the status line; on a terminal it is cut to the width and rewritten in place."""
        end = "\n"
        if sys.stdout and sys.stdout.isatty():
            line = f"\r{line[:shutil.get_terminal_size().columns - 1]}\x1b[K"
            end = "" if self.step < self.cfg.iters else "\n"
        try:
            print(line, end=end, flush=True)
        except BrokenPipeError:  # stdout's reader has exited: stop, but only after the state is saved
            self.signal = self.signal or 13  # SIGPIPE

    def _stop(self, number: int, _frame) -> None:
        """Stop the loop after its step; a second signal stops at once."""
        if self.signal:
            raise Stopped("stopped", number)
        self.signal = number
        with contextlib.suppress(OSError):  # not print, which may be what was interrupted
            os.write(2, b"\nsaving after this step; once more to stop at once\n")


def check_finite(state: dict[str, dict], where: str) -> None:
    """Raise NotFinite if a weight, or one of Adam's moments, in these state_dicts is not a finite number."""
    for key, values in state.items():
        moments = [x for weight in values.get("state", {}).values() for x in weight.values()]
        if not all(x.isfinite().all() for x in moments or values.values() if isinstance(x, torch.Tensor)):
            raise NotFinite(f"{key} is not finite {where}")


def recipe_of(cfg: Settings, recipes: dict[str, dict]) -> str:
    """The recipe's name and its fields that are set to other values: "recipe r3gan, loss hinge"."""
    expected = vars(type(cfg)()) | recipes.get(cfg.recipe, {})
    fields = dict.fromkeys(name for recipe in recipes.values() for name in recipe)
    changed = [f", {name} {getattr(cfg, name)}" for name in fields if getattr(cfg, name) != expected[name]]
    return f"recipe {cfg.recipe}{''.join(changed)}"


def new_run_dir(out: str, name: str = "") -> Path:
    """The folder `out`, else the first free one of runs/NAME, runs/NAME-2, …; UserError if it holds files."""
    folder, n = Path(out or f"runs/{name}"), 1
    while not out and folder.exists():
        folder, n = Path(f"runs/{name}-{n + 1}"), n + 1
    if out and (folder.is_file() or any(p.is_file() for p in folder.rglob("[!.]*"))):
        raise UserError(f"{out} already exists, and its files are never overwritten: choose another folder, "
                        "or continue a run with --resume")
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{folder} can't be created: {there} is not a writable folder")
    return folder
