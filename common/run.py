"""A run: its folder, checkpoints, metrics, pictures, and how it stops. Nothing here touches a method's maths.

A script's main(run) calls track (what a checkpoint holds), loops over steps, calling record, picture and
score where due, then goes through checkpoints: one path for training, --resume, --sample and --eval.
"""
import contextlib
import csv
import inspect
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torchvision.transforms.functional import pil_to_tensor

from common.cli import Settings, parse
from common.datasets import Data
from common.errors import NotFinite, Stopped, UserError, exit_status, reading
from common.pictures import save_curves, save_gif, save_grid
from common.system import circumstances, free_folder, hardware, pick_device, pick_precision, write_whole

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEPT = "last.pt keeps the last good state; try a lower learning rate"


def launch(main: Callable[["Run"], None], Config: type[Settings], quick: dict) -> None:
    """Call main(run) as the command line says, and leave with exit_status's status."""
    def call() -> None:
        action, cfg, folder = parse(Config, quick, inspect.getmodule(main).__doc__)
        with Run(cfg, Path(inspect.getfile(Config)), action, folder) as run:
            main(run)
    sys.exit(exit_status(call))


class Run:
    """One call of a script. `wants_scores` and `wants_pictures` say what it should end with."""

    def __init__(self, cfg: Settings, script: Path, action: str = "train", folder: Path | None = None):
        self.cfg, self.script, self.action, self.folder = cfg, script, action, folder
        self.trains = action in ("train", "resume")
        self.wants_pictures, self.wants_scores = action != "eval", action != "sample"
        self.step, self.best, self.means, self.row, self.writer = 0, -math.inf, {}, {}, None
        self.looping, self.signal = False, None
        if action == "train" and cfg.out:
            free_folder(cfg.out, "")  # an error now, not after the judge's training
        stored = json.loads((folder / "config.json").read_text()) if folder else {"config": vars(cfg)}
        self.trained_seed, self.sittings = stored["config"]["seed"], stored.get("sittings", [])
        self.device = pick_device(cfg.device, cfg.deterministic)
        cfg.precision = pick_precision(cfg.precision, self.device)
        print(f"device: {self.device} ({hardware(self.device)}), {cfg.precision}")

    def title(self, data: Data, *parts: str) -> str:
        """What every picture of the run says: script, data, `parts`, the seed of the training."""
        return ", ".join([f"{self.script.stem} on {data.name}", *parts, f"seed {self.trained_seed}"])

    def autocast(self) -> torch.autocast:
        """bf16 within, if --precision says so; else as without. Losses and penalties stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    # ------------------------------------------------------------------ checkpoints

    def track(self, data: Data, **tracked) -> None:
        """Say what a checkpoint holds: things with a state_dict. When resuming, load last.pt into them."""
        self.data, self.tracked, self.cfg.data = data, tracked, data.source
        if self.action == "resume" and (self.folder / "last.pt").exists():
            state = self.load("last")
            if state["data"] != data.digest:
                raise UserError(f"{self.cfg.data} no longer holds the images of {self.folder}: restore them")
            self.step, self.best, self.means = state["step"], state["best"], state["means"]
            torch.set_rng_state(state["rng"]["cpu"].cpu())
            if "cuda" in state["rng"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)

    def save(self, name: str) -> None:
        """Write NAME.pt; raises NotFinite, and keeps the old file, if a weight is not finite."""
        state = {key: thing.state_dict() for key, thing in self.tracked.items()}
        for key, values in state.items():
            for weight, x in values.items():
                if isinstance(x, torch.Tensor) and not x.isfinite().all():
                    raise NotFinite(f"{key}.{weight} is not finite at step {self.step}. {KEPT}")
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state |= dict(step=self.step, best=self.best, means=self.means, data=self.data.digest, rng=rng,
                      config=vars(self.cfg))
        write_whole(self.folder / f"{name}.pt", lambda p: torch.save(state, p))

    def load(self, name: str) -> dict:
        """Put the state in NAME.pt back into everything tracked; returns all of it."""
        path = self.folder / f"{name}.pt"
        with reading(path, "a checkpoint of this run"):
            state = torch.load(path, map_location=self.device, weights_only=True)
            for key, thing in self.tracked.items():
                thing.load_state_dict(state[key])
        return state

    def checkpoints(self, *names: str) -> Iterator[tuple[str, int]]:
        """Load those of the named checkpoints that exist, one by one, and yield name and step.

        The last one stays loaded: pictures are of it, and scores.json's summary. Without scores, only that.
        """
        names = [name for name in names if (self.folder / f"{name}.pt").exists()]
        if not names:
            raise UserError(f"{self.folder} has no checkpoint yet: continue it with --resume")
        for name in names if self.wants_scores else names[-1:]:
            yield name, self.load(name)["step"]

    # ------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """The numbers of the iterations to make, none for --sample and --eval; logs and saves where due.

        Raises Stopped after Ctrl-C or SIGTERM, and NotFinite for a loss that is not finite.
        """
        if not self.trains:
            return
        self._open()
        self.looping = True
        for step in range(self.step + 1, self.cfg.iters + 1):
            self.step = step
            yield step
            stop = self.signal is not None
            if self.row or self.due("log"):
                self._log()
            if stop or self.due("save") or self.step == self.cfg.iters:
                self.save("last")
            if stop:
                break
        self.looping = False
        save_gif(self.folder / "progress.gif", sorted((self.folder / "samples").glob("step_*.png")))
        save_curves(self.rows, self.folder / "curves.png", self.title(self.data))
        if self.signal is not None:
            command = f"{self.script.name} --resume {self.folder}"
            raise Stopped(f"stopped at step {self.step}; to continue: {command}", self.signal)
        print(f"{self.folder}: {self.step} iterations, {time.monotonic() - self.started:.0f} s")

    def due(self, what: str) -> bool:
        """Is it time to "log", "sample", "eval" or "save"? After the last iteration too, unless never."""
        every = getattr(self.cfg, f"{what}_every")
        return bool(every) and (self.step % every == 0 or self.step == self.cfg.iters)

    def record(self, **values: torch.Tensor) -> None:
        """Add to the means of the next row of metrics.csv; until then nothing is read from the GPU."""
        for name, value in values.items():
            total, n = self.means.get(name, (0.0, 0))
            self.means[name] = total + value.detach(), n + 1

    def score(self, best: float, **columns: float) -> None:
        """Add scores to this step's row of metrics.csv; save best.pt if `best` is the highest so far."""
        self.row |= columns
        if best > self.best:
            self.best = best
            self.save("best")

    def picture(self, images: torch.Tensor, title: str, **grid) -> None:
        """Write samples/step_0000500.png, with images and grid as save_grid takes them."""
        path = self.folder / "samples" / f"step_{self.step:07}.png"
        picture = save_grid(path, images, f"{title}, step {self.step}", **grid)
        if self.writer:
            self.writer.add_image("samples", pil_to_tensor(picture), self.step)

    def write_scores(self, scores: dict) -> None:
        """Write scores.json, the mark of a finished run."""
        text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / "scores.json", lambda p: p.write_text(text, encoding="utf-8"))

    # ------------------------------------------------------------------ the folder

    def _open(self) -> None:
        """Make the folder, or cut an existing one back to the step resumed from; write config.json."""
        name = self.script.stem + ("-synthetic" if self.data.source == "synthetic" else "")
        self.folder = self.folder or free_folder(self.cfg.out, name)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "scores.json").unlink(missing_ok=True)
        for path in self.folder.rglob(".*.*.*"):  # half written when a run was killed
            path.unlink()
        for path in (self.folder / "samples").glob("step_*.png"):
            if int(path.stem[5:]) > self.step:
                path.unlink()
        self.table, self.rows = self.folder / "metrics.csv", []
        if self.table.exists():
            with open(self.table, newline="") as f:
                complete = (row for row in csv.DictReader(f) if None not in row.values())
                self.rows = [row for row in complete if int(row["step"]) <= self.step]
        self._write_table()
        self.sittings.append({"from_step": self.step, "command": " ".join([self.script.name, *sys.argv[1:]]),
                              **circumstances(self.device)})
        content = {"script": self.script.name, "config": vars(self.cfg), "sittings": self.sittings}
        write_whole(self.folder / "config.json", lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
        with contextlib.suppress(ImportError):  # TensorBoard is optional
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
        write_whole(self.table, write)

    def _log(self) -> None:
        """One row of metrics.csv: this step's scores and, if due, the losses' means. The status line, too."""
        means = {}
        if self.means and self.due("log"):
            values = torch.stack([total / n for total, n in self.means.values()]).tolist()
            means, self.means = dict(zip(self.means, values, strict=True)), {}
            self._status(means)
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
                raise NotFinite(f"{name} is {value} at step {self.step}. {KEPT}")

    def _status(self, means: dict[str, float]) -> None:
        """One status line: rewritten in place on a terminal, a line of its own elsewhere."""
        now, (then, since), iters = time.monotonic(), self.mark, self.cfg.iters
        rate, self.mark = (self.step - since) / max(now - then, 1e-9), (now, self.step)
        left = timedelta(seconds=int((iters - self.step) / rate))
        values = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        line = f"step {self.step}/{iters}  {values}  {rate:.2f} it/s  {left} left"
        terminal = sys.stdout.isatty()
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and left else "\n", flush=True)

    def __enter__(self):
        """Ctrl-C and SIGTERM stop the loop after its iteration; a second one, or outside of it, at once."""
        def stop(signum, _frame):
            if self.signal is not None or not self.looping:
                raise Stopped("stopped", signum)
            self.signal = signum
        self.old_handlers = {s: signal.signal(s, stop) for s in SIGNALS}
        return self

    def __exit__(self, *_):
        for s, handler in self.old_handlers.items():
            signal.signal(s, handler)
