"""A training run: its command line, folder, checkpoints, metrics, pictures and how it stops.

Nothing in here touches what a method computes.
"""
import argparse
import csv
import dataclasses
import inspect
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal, get_args, get_origin

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None
try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    plt = None


class UserError(Exception):
    """What the user got wrong, told as: what, where, what to do."""


class NotFinite(Exception):
    """A loss or a weight is no longer a finite number."""


_KEPT = "last.pt keeps the last good state; try a lower learning rate"


def entry(main: Callable[[], int | None]) -> None:
    """Run a script's main and leave with its exit status: 2 for a user's error, 3 for what is not finite."""
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        status = 3
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


# ---------------------------------------------------------------------- command line

FREE_ON_RESUME = ("iters", "log_every", "sample_every", "eval_every", "save_every")
# what --sample and --eval may change
FREE_ON_USE = ("device", "precision", "judge", "seed", "eval_draws", "eval_images", "fid_weights", "pairs",
               "category")


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as UserError."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(Config: type, quick: dict, description: str, argv: list[str] | None = None,
          variants: dict[str, dict] | None = None):
    """Read the command line into (action, config, folder).

    action is "train", "resume", "sample", "eval" or "sweep"; folder is the run that the middle three name, or
    None. For "sweep" config is a list of them, one for each combination of the values given.
    Every field of Config is a flag, its trailing comment the help. `quick` holds the values that --quick
    presets; `variants` those that "--sweep variants" goes through, by name.
    Raises UserError for anything that does not fit, config.json of the run included.
    """
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    preset = ", ".join(f"{name} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a short run for two CPU cores: {preset}")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    group.add_argument("--sample", metavar="RUN", help="write pictures from the run in this folder")
    group.add_argument("--eval", metavar="RUN", help="score the run in this folder")
    also = f"; alone, or the word variants: {', '.join(variants)}" if variants else ""
    group.add_argument("--sweep", metavar="FIELD=V1,V2", nargs="*", help="a run for each combination, in "
                       f"folders below --out, and a table of their scores{also}")
    for field in dataclasses.fields(Config):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        text = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, type=type(get_args(kind)[0]), choices=get_args(kind), help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    given = vars(parser.parse_args(argv))
    use_quick = given.pop("quick", False)
    action = next((a for a in ("resume", "sample", "eval", "sweep") if a in given), "train")
    if action == "sweep":
        out = f"runs/{Path(inspect.getfile(Config)).stem}-sweep"
        given = {**(quick if use_quick else {}), "out": out, **given}
        return action, _combinations(Config, parser, given.pop("sweep"), given, variants or {}), None
    if action == "train":
        cfg = Config(**{**(quick if use_quick else {}), **given})
        _check_ranges(cfg)
        return action, cfg, None

    folder = Path(given.pop(action))
    if use_quick:
        raise UserError(f"--quick is for a new run; {folder} has its own config")
    cfg = _stored_with(Config, folder, given, FREE_ON_RESUME if action == "resume" else FREE_ON_USE)
    _check_ranges(cfg)
    return action, cfg, folder


def _stored_with(Config: type, folder: Path, given: dict, free: tuple[str, ...]):
    """The config of the run in `folder`, with the given values for the fields that are free to change."""
    cfg = _read_config(Config, folder, Path(inspect.getfile(Config)).name)
    differs = [name for name, value in given.items() if value != getattr(cfg, name) and name not in free]
    if differs:
        what = ", ".join(f"{n} is {getattr(cfg, n)!r} there and {given[n]!r} here" for n in differs)
        raise UserError(f"{folder}/config.json has another config: {what}. Leave these flags out, "
                        f"or start a new run (free to change are {', '.join(free)})")
    return dataclasses.replace(cfg, **given)


def _combinations(Config: type, parser: Parser, sweep: list[str], given: dict, variants: dict) -> list:
    """A config for each combination of the FIELD=V1,V2,… in `sweep`, each to run in a folder of its own; the
    word "variants" stands for all of `variants`, {name: {field: value}}.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    ways, swept = [], {"out"}  # each way is {part of the folder's name: {field: value}}
    for item in sweep or ["variants" if variants else ""]:
        name, _, values = item.partition("=")
        if item == "variants" and variants:
            ways.append(variants)
            fields = set().union(*variants.values())
            if fields & given.keys():  # would change what the variants' names say
                flag = "--" + min(fields & given.keys()).replace("_", "-")
                raise UserError(f"{flag} with --sweep variants: the variants set it themselves; leave it out")
        elif name in kinds and values:
            flag = "--" + name.replace("_", "-")
            arguments = {value: f"{flag}={value}" for value in values.split(",")}
            if kinds[name] is bool:
                switch = {"true": flag, "false": "--no-" + flag[2:]}
                arguments = {value: switch.get(value, f"{flag}={value}") for value in arguments}
            # read as the flag is, so that what is refused there is refused here
            ways.append({f"{name}={value}": vars(parser.parse_args([text]))
                         for value, text in arguments.items()})
            fields = {name}
        else:
            fields = swept  # refused
        if fields & swept:
            raise UserError(f"--sweep {item}: give each field of the Config (a flag, with _ for -) once, as "
                            "FIELD=V1,V2" + (", or the word variants" if variants else ""))
        swept |= fields
    configs = []
    for names in itertools.product(*ways):
        chosen = dict(pair for way, name in zip(ways, names) for pair in way[name].items())
        configs.append(Config(**{**given, **chosen, "out": str(Path(given["out"]) / ",".join(names))}))
        _check_ranges(configs[-1])
    return configs


def _check_ranges(cfg) -> None:
    """Counts are at least 1 where their default is (*_every: 0 for never); no number is negative."""
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least = 1 if field.type is int and field.default > 0 and not field.name.endswith("_every") else 0
        if not math.isfinite(value) or value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")


def _read_config(Config: type, folder: Path, script: str):
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.json. Name a folder that {script} wrote")
    try:
        stored = json.loads(path.read_text())
        made_by, values = stored["script"], stored["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a run's config: damaged, or not written by these scripts") from None
    if made_by != script:
        raise UserError(f"{folder} is a run of {made_by}, not of {script}: call that script")
    known = {field.name for field in dataclasses.fields(Config)}
    if set(values) != known:
        raise UserError(
            f"{path} has other fields than this version of {script}: {sorted(set(values) ^ known)}. "
            "Use the version that wrote it"
        )
    return Config(**values)


# ---------------------------------------------------------------------- device and seeds

def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name} can't be used here: {reason}. Try --device cpu") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products
        torch.backends.cudnn.benchmark = True
    return device


def circumstances(device: str) -> dict[str, str]:
    """What a figure depends on beside the code's settings: commit, hardware, torch's version."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = pick_device(device)
    hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; {hardware}"
    return {"commit": commit, "hardware": hardware, "torch": torch.__version__}


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def set_deterministic() -> None:
    """Only kernels that give the same bits each time. Call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# ---------------------------------------------------------------------- checkpoints

def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file, sync it and rename it to `path`: that is whole, or as it was."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state; raises NotFinite, and keeps the file there is, where a network's weight is not finite."""
    for name, value in state.items():
        for key, tensor in value.items() if isinstance(value, dict) else ():
            if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                raise NotFinite(f"{name}.{key} is not finite at step {state['step']}. {_KEPT}")
    write_whole(path, lambda p: torch.save(state, p))


def load_checkpoint(path: Path, device: torch.device | str) -> dict:
    """The state in `path`, tensors on `device`; raises UserError where there is none or it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not there: the run has saved no checkpoint yet")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged file
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path} can't be read as a checkpoint ({type(error).__name__}: {reason})") from None


# ---------------------------------------------------------------------- the run

class Run:
    """The folder of a training run: config.json, metrics.csv, samples/, curves.png, progress.gif, *.pt."""

    def __init__(self, cfg, script: str, name: str, resume: Path | None, step: int, columns: list[str]):
        """Make the folder (cfg.out, or runs/NAME with a number), or go on in `resume` after `step`.

        An existing folder is never written over: UserError. Call when all of the user's input is checked.
        """
        self.iters, self.started, self.columns = cfg.iters, time.monotonic(), ["step", "seconds", *columns]
        self.folder, self.seconds_before, self.signal = resume or free_folder(cfg.out, name), 0.0, None
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "scores.json").unlink(missing_ok=True)  # what has one is finished
        earlier = json.loads((resume / "config.json").read_text()).get("sittings", []) if resume else []
        command = " ".join([script, *sys.argv[1:]])
        sitting = {"from_step": step, "command": command, **circumstances(cfg.device)}
        content = {"script": script, "config": dataclasses.asdict(cfg), "sittings": [*earlier, sitting]}
        write_whole(self.folder / "config.json", lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
        self._cut_to(step)
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step) if SummaryWriter else None
        optional = {"tensorboard": SummaryWriter, "matplotlib (for curves.png)": plt}
        missing = [name for name, module in optional.items() if module is None]
        print(f"run: {self.folder}" + (f"; not installed: {', '.join(missing)}" if missing else ""))
        self._mark = (time.monotonic(), step)

    def _cut_to(self, step: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, or had not written to the end."""
        path = self.folder / "metrics.csv"
        rows = []
        if path.is_file():
            with open(path, newline="") as f:
                rows = [r for r in csv.DictReader(f) if None not in r.values() and int(r["step"]) <= step]
        if rows:
            self.seconds_before = float(rows[-1]["seconds"])

        def write(p: Path) -> None:
            with open(p, "w", newline="") as f:
                out = csv.DictWriter(f, self.columns, extrasaction="ignore")
                out.writeheader()
                out.writerows(rows)
        write_whole(path, write)
        for picture in (self.folder / "samples").glob("step_*.png"):
            if int(picture.stem[5:]) > step:
                picture.unlink()
        for half_written in self.folder.rglob(".*.*.*"):  # by write_whole, when it was killed
            half_written.unlink()

    @property
    def seconds(self) -> float:
        """Time trained so far, earlier sittings included."""
        return self.seconds_before + time.monotonic() - self.started

    def __enter__(self):
        """Ctrl-C and SIGTERM ask the loop to stop; a second one stops at once."""
        def ask(signum, _frame):
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signum
        self._old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self._old.items():
            signal.signal(s, handler)
        if self.writer:
            self.writer.close()

    def log(self, step: int, **scalars: float) -> None:
        """One row of metrics.csv and the same to TensorBoard; raises NotFinite for what is not finite."""
        with open(self.folder / "metrics.csv", "a", newline="") as f:
            row = {name: f"{value:.6g}" for name, value in scalars.items()}
            row |= {"step": step, "seconds": round(self.seconds, 3)}
            csv.DictWriter(f, self.columns).writerow(row)
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        for name, value in scalars.items():
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value} at step {step}. {_KEPT}")

    def status(self, step: int, **shown: float) -> None:
        """One status line: rewritten in place on a terminal, a line of its own elsewhere."""
        now, (then, since) = time.monotonic(), self._mark
        rate = (step - since) / max(now - then, 1e-9)
        self._mark = (now, step)
        left = int((self.iters - step) / max(rate, 1e-9))
        values = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        line = f"step {step}/{self.iters}  {values}  {rate:.2f} it/s  " \
               f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        if sys.stdout.isatty():
            print(f"\r{line}\x1b[K", end="\n" if step == self.iters else "", flush=True)
        else:
            print(line, flush=True)

    def picture(self, step: int, images: torch.Tensor, title: str, **grid) -> None:
        """samples/step_*.png and TensorBoard; images as save_grid takes them."""
        save_grid(self.folder / "samples" / f"step_{step:07}.png", images, title, **grid)
        if self.writer:
            self.writer.add_image("samples", make_grid(images.detach().cpu().float() / 2 + 0.5, **grid), step)

    def draw_progress(self, title: str, frames: int = 60) -> None:
        """progress.gif from at most `frames` of the pictures so far, curves.png from metrics.csv."""
        pictures = sorted((self.folder / "samples").glob("step_*.png"))
        if pictures:
            n = min(frames, len(pictures))  # the first, the last, and evenly between
            save_gif(self.folder / "progress.gif",
                     [pictures[round(i * (len(pictures) - 1) / max(1, n - 1))] for i in range(n)])
        if plt:
            draw_curves(self.folder / "metrics.csv", self.folder / "curves.png", title)


def free_folder(out: str, name: str) -> Path:
    """`out`, which must hold no file; where it is empty, the first free one of runs/NAME, runs/NAME-2, …

    Raises UserError, also where it could not be made.
    """
    if out:
        folder = Path(out)
        if folder.is_file() or any(p.is_file() for p in folder.rglob("[!.]*")):
            raise UserError(f"--out {out} exists already: a run is never written over. "
                            "Choose another folder, or go on with it by --resume")
    else:
        number = 1
        while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{folder} can't be made: {there} is not a folder that can be written to")
    return folder


# ---------------------------------------------------------------------- several runs

def sweep(configs: list, train: Callable) -> int:
    """Train each config that is not finished, one by one; print and write a table of all scores.

    Called again with the same values, it goes on where it was cut off. A run that diverges is told of in the
    table and ends no other. The table is also sweep.csv above the runs' folders: what scores.json has as
    "summary", and the seconds that 1,000 iterations took; where seeds were swept, also mean and standard
    deviation over them. Returns the exit status.
    """
    rows, worst = {}, 0
    for number, cfg in enumerate(configs, 1):
        folder = Path(cfg.out)
        print(f"\n--- run {number} of {len(configs)}: {folder.name}", flush=True)
        try:
            if not folder.exists():
                status = train(cfg)
            else:  # "auto" may have been resolved since
                given = {k: v for k, v in vars(cfg).items() if k != "out" and v != "auto"}
                stored = _stored_with(type(cfg), folder, given, FREE_ON_RESUME)
                before = _stored_with(type(cfg), folder, {}, ()).iters
                finished = (folder / "scores.json").exists() and before == cfg.iters
                status = 0 if finished else train(stored, folder)
            if status:
                return status
            row = {}
            if (folder / "scores.json").exists():
                row = json.loads((folder / "scores.json").read_text())["summary"]
            rows[folder.name] = row | {"s / 1,000 its": 1000 * seconds_per_iteration(folder / "metrics.csv")}
        except NotFinite as error:
            print(f"error: {error}", file=sys.stderr)
            rows[folder.name], worst = {"": f"diverged: {error}"}, 3

    same_but_seed = {}
    for name, row in rows.items():
        key = ",".join(part for part in name.split(",") if not part.startswith("seed="))
        same_but_seed.setdefault(key, []).append(row)
    for key, group in same_but_seed.items():
        if len(group) > 1 and not any("" in row for row in group):  # none diverged
            means = {c: [row[c][0] if isinstance(row[c], list) else row[c] for row in group]
                     for c in group[0] if all(c in row for row in group)}
            over = f"{key}: {len(group)} seeds" if key else f"{len(group)} seeds"
            rows[over] = {c: [mean(values), stdev(values)] for c, values in means.items()}

    def cell(value) -> str:
        if isinstance(value, list):  # mean and standard deviation
            return f"{value[0]:.4g} ± {value[1]:.2g}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["run", *columns]]
    lines += [[name, *(cell(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())

    def write(path: Path) -> None:
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows(lines)
    write_whole(Path(configs[0].out).parent / "sweep.csv", write)
    return worst


def seconds_per_iteration(table: Path) -> float:
    """Median over the rows of losses in metrics.csv: what else is done in between does not count."""
    with open(table, newline="") as f:
        rows = [r for r in csv.reader(f)][1:]
    points = [(int(r[0]), float(r[1])) for r in rows if r[2]]  # rows of scores have no losses
    return median([(t - s) / (j - i) for (i, s), (j, t) in zip(points, points[1:]) if j > i] or [math.nan])


# ---------------------------------------------------------------------- pictures

def save_grid(path: Path, images: torch.Tensor, title: str, nrow: int = 8) -> None:
    """Write images [N, 1 or 3, H, W] in [-1, 1] as one PNG, nrow a line, the title above."""
    images = images.detach().cpu().float()
    scale = max(1, math.ceil(64 / images.shape[-1]))  # small images are shown larger, pixel by pixel
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(images.clamp(-1, 1) / 2 + 0.5, nrow=nrow, padding=2, pad_value=1.0)
    pixels = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    font = ImageFont.load_default(size=11)
    lines, words = [""], title.split()
    for word in words:  # wrapped to the picture's width
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= pixels.width - 6 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    top = 14 * len(lines) + 2
    canvas = Image.new("RGB", (pixels.width, pixels.height + top), "white")
    canvas.paste(pixels, (0, top))
    ImageDraw.Draw(canvas).multiline_text((3, 0), "\n".join(lines), fill="black", font=font, spacing=2)
    write_whole(path, lambda p: canvas.save(p))


def save_gif(path: Path, pictures: list[Path], milliseconds: int = 250) -> None:
    """An endless GIF of these PNGs, the last one shown longer."""
    frames = [Image.open(p).convert("RGB") for p in pictures]
    frames = [f.resize(frames[-1].size) if f.size != frames[-1].size else f for f in frames]
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    options = dict(save_all=True, append_images=frames[1:], loop=0, duration=durations)
    write_whole(path, lambda p: frames[0].save(p, **options))


SCORES = ("accuracy", "fd", "tv")  # what the names of columns that are scores begin with


def draw_curves(table: Path, path: Path, title: str) -> None:
    """The columns of metrics.csv over the step: losses above, what D says in the middle, scores below."""
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    names = [n for n in (rows[0] if rows else {}) if n not in ("step", "seconds")]
    figure, panels = plt.subplots(3, 1, figsize=(8, 9), sharex=True)
    for name in names:
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        panel = 2 if name.startswith(SCORES) else 1 if name.startswith(("d_real", "d_fake")) else 0
        if points:
            panels[panel].plot(*zip(*points), marker="." if panel == 2 else None, linewidth=1, label=name)
    for ax in panels:
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    if any(name.startswith("fd") for name in names):  # a distance falls by powers of ten
        panels[2].set_yscale("log")
    panels[0].set_title(title, fontsize=9)
    panels[2].set_xlabel("iteration")
    figure.tight_layout()
    write_whole(path, lambda p: figure.savefig(p, dpi=110))
    plt.close(figure)
