"""A run: its folder, checkpoints, metrics, pictures, and how it stops. Nothing here touches a method's maths.

A script's main(run) calls track (what a checkpoint holds), loops over steps, calling record, picture and
score where due, then goes through checkpoints: one path for training, --resume, --sample and --eval.
"""
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
from datetime import timedelta
from pathlib import Path

import torch
from torchvision.transforms.functional import pil_to_tensor

from common import parallel, system
from common.cli import Settings, parse
from common.datasets import Data
from common.errors import NotFinite, Stopped, UserError, exit_status, reading
from common.pictures import save_curves, save_gif, save_grid

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ZERO = 1e-3  # a loss below it is as good as zero
SAME = 0.02  # images in [-1, 1] whose pixels' mean standard deviation is below it are nearly the same
PICTURES = f"step_{'[0-9]' * 7}.png"  # others in samples/ are not ours


def launch(main: Callable[["Run"], None], Config: type[Settings], quick: dict) -> None:
    """Call main(run) as the command line says, and leave with exit_status's status."""
    script = Path(main.__code__.co_filename)  # as the module __main__ may be a profiler

    def call() -> None:
        with parallel.processes():
            action, cfg, folder = parse(Config, quick, main.__globals__["__doc__"], script=script)
            with Run(cfg, script, action, folder) as run:
                main(run)
    sys.exit(exit_status(call))


class Run:
    """One call of a script. `wants_scores` and `wants_pictures` say what it should end with."""

    def __init__(self, cfg: Settings, script: Path, action: str = "train", folder: Path | None = None):
        self.cfg, self.script, self.action, self.folder = cfg, script, action, folder
        self.trains = action in ("train", "resume")
        self.first = parallel.rank() == 0  # of torchrun's processes, if there are several
        self.wants_pictures = action != "eval" and self.first
        self.wants_scores = action != "sample" and self.first
        self.step, self.best, self.means, self.row, self.writer = 0, -math.inf, {}, {}, None
        self.looping, self.signal, self.warned, self.idle = False, 0, set(), 0
        self.started = time.monotonic()
        if not self.trains and parallel.world() > 1:
            raise UserError(f"--{action} needs one process only: call it without torchrun")
        if target := cfg.to or cfg.out * (action == "train"):
            system.free_folder(target, "")  # an error now, not after the judge's training
        self.trained_seed, self.sittings = cfg.seed, []
        if folder:
            with reading(folder / "config.json", "the settings of a run"):
                stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                self.trained_seed, self.sittings = stored["config"]["seed"], list(stored["sittings"])
        self.device = system.pick_device(cfg.device, cfg.deterministic)
        cfg.precision = system.pick_precision(cfg.precision, self.device)
        print(f"device: {self.device} ({system.hardware(self.device)}), {cfg.precision}")

    def title(self, data: Data, *parts: str) -> str:
        """What every picture of the run says: script, data, `parts`, the seed of the training."""
        return ", ".join([f"{self.script.stem} on {data.name}", *parts, f"seed {self.trained_seed}"])

    def autocast(self) -> torch.autocast:
        """bf16 within, if --precision says so; else as without. Losses and penalties stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def get_data(self, load: Callable[..., Data], *args) -> Data:
        """load(cfg, …); for --sample without the images, what the checkpoint knows of them."""
        try:
            if not self.cfg.to:
                if not self.first:  # it finds the cache that the first has written
                    parallel.largest(0)
                data = load(self.cfg, *args)
                if self.first:
                    parallel.largest(0)
                return data
        except UserError as error:
            if self.action != "sample":
                raise
            print(f"*** {error} ***\n*** so there will be no real images in the pictures ***")
        name = next((n for n in ("best", "last") if (self.folder / f"{n}.pt").exists()), "last")
        return Data.known(self._read(name)["data"])

    # ------------------------------------------------------------------ checkpoints

    def track(self, data: Data, **tracked) -> None:
        """Say what a checkpoint holds: things with a state_dict. When resuming, load the newest into them.

        A damaged last.pt is passed over for the one before it. Without any, training starts anew.
        """
        self.data, self.tracked, self.cfg.data = data, tracked, data.source
        if parallel.world() > 1:
            for thing in tracked.values():
                if isinstance(thing, torch.optim.Optimizer):
                    thing.register_step_pre_hook(parallel.average_gradients)
        if not self.first:  # weights are equal, what is random from now on is not
            torch.manual_seed(self.cfg.seed + parallel.rank() * 1_000_003)
        if self.action != "resume":
            return
        names = [name for name in ("last", "previous", "best") if (self.folder / f"{name}.pt").exists()]
        if not names:
            print(f"*** {self.folder} has no checkpoint yet: training starts anew ***")
            return
        for name in names:
            try:
                state = self.load(name, everything=True)
                break
            except UserError as error:
                if name == names[-1]:
                    raise
                print(f"*** {error} ***")
        if name != "last":
            print(f"*** no good last.pt: resuming from {name}.pt, at iteration {state['step']} ***")
        if state["step"] > self.cfg.iters:
            raise UserError(f"--iters {self.cfg.iters}: {self.folder} is already at {state['step']}")
        self.step, self.best, self.means = state["step"], state["best"], state["means"]
        if parallel.rank() < len(state["rng"]):  # else it was saved by fewer processes
            rng = state["rng"][parallel.rank()]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)

    def save(self, name: str) -> None:
        """Write NAME.pt; raises NotFinite, and keeps the old file, if a value in it is not finite."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        rng = parallel.gather(rng) if name == "last" else [rng]
        if not self.first:
            return
        state = {key: thing.state_dict() for key, thing in self.tracked.items()}
        for key, values in state.items():
            for path, x in tensors(values):
                if not x.isfinite().all():
                    raise NotFinite(f"{key}{path} is not finite at step {self.step}. {self._kept()}")
        state |= dict(step=self.step, best=self.best, means=self.means, data=self.data.about(), rng=rng,
                      config=vars(self.cfg))
        previous = self.folder / "previous.pt" if name == "last" else None
        system.write_whole(self.folder / f"{name}.pt", lambda p: torch.save(state, p), previous)

    def _read(self, name: str) -> dict:
        """The content of NAME.pt; UserError if it is damaged."""
        path = self.folder / f"{name}.pt"
        with reading(path, "a checkpoint of this run"):
            state = system.load_checked(path)
            if missing := {*"step best means rng data".split()} - state.keys():
                raise ValueError(f"it lacks {sorted(missing)}")
        return state

    def load(self, name: str, everything: bool = False) -> dict:
        """Put the state in NAME.pt back into everything tracked, except learning rates; returns all of it.

        A generator kept in generators/ has "only" what is sampled from, which is enough unless `everything`.
        """
        state = self._read(name)
        keys = self.tracked if everything else state.get("only", self.tracked)
        with reading(self.folder / f"{name}.pt", "a checkpoint of this run"):
            for key in keys:
                thing = self.tracked[key]
                rates = [group["lr"] for group in getattr(thing, "param_groups", ())]
                thing.load_state_dict(state[key])
                for group, rate in zip(getattr(thing, "param_groups", ()), rates, strict=True):
                    group["lr"] = rate  # as config.json has it now
            digest = state["data"]["digest"]
        if digest != self.data.digest:
            raise UserError(f"{self.cfg.data} does not hold the images that {self.folder} was trained on: "
                            "restore them, or name their new place with --data")
        return state

    def checkpoints(self, *names: str) -> Iterator[tuple[str, int]]:
        """Load those of the named checkpoints that exist, one by one, and yield name and step.

        The last one stays loaded: pictures are of it, and scores.json's summary. Without scores, only that.
        """
        if not self.first:
            return
        names = [name for name in names if (self.folder / f"{name}.pt").exists()]
        if not names:
            raise UserError(f"{self.folder} has no checkpoint yet: continue it with --resume")
        for name in names if self.wants_scores else names[-1:]:
            yield name, self.load(name)["step"]

    # ------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """The numbers of the iterations to make, none for --sample and --eval; logs and saves where due.

        Raises Stopped after a signal, and NotFinite for a loss that is not finite.
        """
        if not self.trains:
            return
        with contextlib.ExitStack() as stack:
            if self.first:
                name = self.script.stem + ("-synthetic" if self.data.source == "synthetic" else "")
                self.folder = self.folder or system.free_folder(self.cfg.out, name)
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(system.locked(self.folder))
                self._open()
            self.looping = True
            for step in range(self.step + 1, self.cfg.iters + 1):
                self.step, self.is_best = step, False
                yield step
                stop = parallel.largest(self.signal)  # a signal to any process stops all
                self.signal = self.signal or stop  # one may have come meanwhile
                if self.row or self.due("log"):
                    self._log()
                if self.is_best:
                    self.save("best")
                if stop or self.due("save") or self.step == self.cfg.iters:
                    self.save("last")
                if stop:
                    break
            self.looping = False
            if self.first:
                self._finish_pictures()
        if self.signal:
            command = f"{self.script.name} --resume {self.folder}"
            raise Stopped(f"stopped at step {self.step}; to continue: {command}", self.signal)
        print(f"{self.folder}: {self.step} iterations, {time.monotonic() - self.started:.0f} s")

    def due(self, what: str) -> bool:
        """Is it time to "log", "sample", "eval" or "save"? After the last iteration too, unless never."""
        every = getattr(self.cfg, f"{what}_every") * (self.first or what == "save")
        return bool(every) and (self.step % every == 0 or self.step == self.cfg.iters)

    def record(self, **values: torch.Tensor) -> None:
        """Add to the means of the next row of metrics.csv; until then nothing is read from the GPU."""
        for name, value in values.items():
            total, n = self.means.get(name, (0.0, 0))
            self.means[name] = total + value.detach(), n + 1

    def score(self, best: float, **columns: float) -> None:
        """Add scores to this step's row of metrics.csv, and save best.pt if `best` is the highest so far."""
        self.row |= columns
        self.is_best = best > self.best
        self.best = max(self.best, best)

    def picture(self, images: torch.Tensor, title: str, **grid) -> None:
        """Write samples/step_0000500.png, with images and grid as save_grid takes them."""
        if len(images) > 1 and images.std(0).mean() < SAME:
            self._warn("the generated images hardly differ from one another: G may have collapsed")
        path = self.folder / "samples" / f"step_{self.step:07}.png"
        picture = save_grid(path, images, f"{title}, step {self.step}", **grid)
        if self.writer:
            self.writer.add_image("samples", pil_to_tensor(picture), self.step)

    def write_scores(self, scores: dict) -> None:
        """Write scores.json, the mark of a finished run."""
        system.write_json(self.folder / "scores.json", scores)

    # ------------------------------------------------------------------ the folder

    def _open(self) -> None:
        """Fill the new folder, or cut an existing one back to the step resumed from; write config.json."""
        (self.folder / "samples").mkdir(exist_ok=True)
        if (self.folder / "best.pt").exists() and self._read("best")["step"] > self.step:
            (self.folder / "best.pt").unlink()
            self.best = -math.inf
        self.table, self.rows = self.folder / "metrics.csv", []
        if self.table.exists():
            with reading(self.table, "the table of this run: repair it"), open(self.table, newline="") as f:
                complete = (row for row in csv.DictReader(f) if None not in row.values())
                self.rows = [row for row in complete if int(row["step"]) <= self.step]
        (self.folder / "scores.json").unlink(missing_ok=True)
        for path in self.folder.rglob(f"{system.TEMPORARY}*"):  # half written when a run was killed
            path.unlink()
        for path in (self.folder / "samples").glob(PICTURES):
            if int(path.stem[5:]) > self.step:
                path.unlink()
        self._write_table()
        self.sittings.append({"from_step": self.step, "command": " ".join([self.script.name, *sys.argv[1:]]),
                              **system.circumstances(self.device)})
        content = {"script": self.script.name, "config": vars(self.cfg), "sittings": self.sittings}
        system.write_json(self.folder / "config.json", content)
        with contextlib.suppress(Exception):  # TensorBoard is optional, and may be broken in any way
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step)
        print(f"run: {self.folder}")
        before = float(self.rows[-1]["seconds"]) if self.rows else 0.0  # trained in earlier sittings
        self.mark, self.started = (time.monotonic(), self.step), time.monotonic() - before

    def _write_table(self) -> None:
        """Write all of metrics.csv, with the columns that the rows have by now."""
        self.columns = list(dict.fromkeys(["step", "seconds", *(name for row in self.rows for name in row)]))

        def write(path: Path) -> None:
            with open(path, "w", newline="") as f:
                table = csv.DictWriter(f, self.columns)
                table.writeheader()
                table.writerows(self.rows)
        system.write_whole(self.table, write)

    def _log(self) -> None:
        """One row of metrics.csv: this step's scores and, if due, the losses' means. The status line, too."""
        means = {}
        if self.means and self.due("log"):
            values = torch.stack([total / n for total, n in self.means.values()]).tolist()
            means, self.means = dict(zip(self.means, values, strict=True)), {}
            self._status(means)
            self.idle = self.idle + 1 if abs(means.get("d_loss", 1)) < ZERO else 0
            if self.idle == 10:
                self._warn("D's loss has been zero for ten rows of metrics.csv: G may no longer learn")
        found, self.row = means | self.row, {}
        row = {"step": self.step, "seconds": round(time.monotonic() - self.started, 3)}
        row |= {name: f"{value:.6g}" for name, value in found.items()}
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            with open(self.table, "a", newline="") as f:
                csv.DictWriter(f, self.columns).writerow(row)
        else:  # the first scores: the table gets new columns
            self._write_table()
        for name, value in found.items():
            if self.writer:
                self.writer.add_scalar(name, value, self.step)
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value} at step {self.step}. {self._kept()}")

    def _status(self, means: dict[str, float]) -> None:
        """One status line: rewritten in place on a terminal, a line of its own elsewhere."""
        now, (then, since), iters = time.monotonic(), self.mark, self.cfg.iters
        rate, self.mark = (self.step - since) / max(now - then, 1e-9), (now, self.step)
        left = timedelta(seconds=int((iters - self.step) / rate))
        values = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        line = f"step {self.step}/{iters}  {rate:.2f} it/s  {left} left  {values}"  # a terminal's width of it
        terminal = sys.stdout.isatty()
        if terminal:
            line = f"\r{line[:shutil.get_terminal_size().columns - 1]}\x1b[K"
        self._say(line, "" if terminal and left else "\n")

    def _say(self, line: str, end: str = "\n") -> None:
        """Print within the loop, where a closed pipe must stop the run only after its state is saved."""
        try:
            print(line, end=end, flush=True)
        except BrokenPipeError:
            self.signal = self.signal or 13  # SIGPIPE

    def _warn(self, what: str) -> None:
        """Print a warning, once."""
        if what not in self.warned:
            self.warned.add(what)
            self._say(f"\n*** step {self.step}: {what} ***")

    def _kept(self) -> str:
        """What to do about values that are not finite."""
        if (self.folder / "last.pt").exists():
            return f"last.pt keeps the last good state: try --resume {self.folder} with a lower learning rate"
        return "There is no checkpoint yet: try a lower learning rate"

    def _finish_pictures(self) -> None:
        """The GIF and the curves; whatever is wrong with a picture or with matplotlib ends no run."""
        try:
            save_gif(self.folder / "progress.gif", sorted((self.folder / "samples").glob(PICTURES)))
            save_curves(self.rows, self.folder / "curves.png", self.title(self.data))
        except Exception as error:
            print(f"no progress.gif or no curves.png: {type(error).__name__}: {error}")

    def __enter__(self):
        """A signal stops the loop after its iteration; a second one, or one outside of the loop, at once."""
        def stop(signum, _frame):
            if self.signal or not self.looping:
                raise Stopped("stopped", signum)
            self.signal = signum
            with contextlib.suppress(OSError):  # not print, which may be what was interrupted
                os.write(2, b"\nsaving after this step; once more to stop at once\n")
        self.old_handlers = {s: signal.signal(s, stop) for s in SIGNALS}
        return self

    def __exit__(self, *_):
        for s, handler in self.old_handlers.items():
            signal.signal(s, handler)


def tensors(values, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors within nested dicts and lists, each with its path, such as ".state.0.exp_avg"."""
    if isinstance(values, torch.Tensor):
        yield path, values
    elif isinstance(values, (dict, list)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from tensors(value, f"{path}.{key}")
