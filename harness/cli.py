"""The command line: every field of a script's Config is a flag, and its trailing comment the help text."""
import argparse
import dataclasses
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch

from common.files import UserError, reading

ACTIONS = {"resume": "continue", "sample": "save pictures of", "eval": "score"}
CONTINUE = "resume the run in --out, or start it where there is none: for jobs that are requeued"
SPANS = "iters log_every sample_every eval_every save_every".split()
ON_DEMAND = "to n labels with_ digit".split()  # for --sample RUN --to FOLDER only
FREE_ON_RESUME = [*SPANS, *"lr lr_g lr_d device precision deterministic data".split()]
FREE_ON_USE = [*ON_DEMAND, *"device precision data judge judge_width judge_steps seed".split(),
               *"eval_draws eval_images fid_weights pairs category".split()]
LEAST = dict(batch_size=2, eval_images=2, judge_width=4, n_categories=2)  # minimum values other than 1
BELOW = dict(ema=1, beta1=1, beta2=1, flip_labels=1)
LARGEST = {int: 10**9, float: math.inf}  # a seed of 10¹³ would overflow


class NotFinite(Exception):
    """A loss, a weight or an image is not finite. Ends a script with status 3."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work; args: message, number of the signal. Ends a script with 128 + number."""


@dataclasses.dataclass
class Settings:
    """The flags that every script has; a script's Config inherits them and adds its own."""
    out: str = ""  # folder of the run; empty: runs/SCRIPT
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # autocast to bf16 (auto: where the hardware has it)
    deterministic: bool = False  # give the same bits in each CUDA run, a little slower
    log_every: int = 100  # iterations between rows of losses in metrics.csv
    sample_every: int = 500  # iterations between sample grids; 0: never
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt; 0: never
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # classifier that scores: auto (trained once and cached), none, or a checkpoint
    judge_width: int = 64  # width of the judge that auto trains; for scenes and faces 64 is ResNet-18
    judge_steps: int = 5000  # its training steps
    to: str = ""  # with --sample: a new folder for single images, instead of grids
    n: int = 100  # with --to: number of images

    def __post_init__(self):
        """Check types (a config.json may have been edited) and ranges; UserError names the flag."""
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            good = value in choices if choices else isinstance(value, f.type)
            what = choices or f.type.__name__
            if f.type in (int, float):
                count = f.type is int and f.default > 0 and not f.name.endswith("_every")
                least, below = LEAST.get(f.name, int(count)), BELOW.get(f.name, LARGEST[f.type])
                good = isinstance(value, (int, f.type)) and least <= value < below
                what = f"{f.type.__name__}, at least {least} and below {below:g}"
            if not good:
                raise UserError(f"{flag(f.name)} {value!r}: must be {what}")


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for a wrong command line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # the field is with_ because `with` is a keyword


def parse(Config: type[Settings], recipes: dict[str, dict], quick: dict, description: str,
          argv: list[str] | None = None, script: Path | None = None):
    """Parse the command line into (action, config, folder of the run or None); UserError if it does not fit.

    action is "train", "resume", "sample" or "eval". A value comes from the flags given, else --quick, else
    the recipe, else the field's default. script: the file with Config, if Python can't tell.
    """
    script = script or Path(inspect.getfile(Config))
    source = "".join(path.read_text(encoding="utf-8") for path in (script, Path(__file__)))
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=f"a short run for two CPU cores: {quick}")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--continue", action="store_true", help=CONTINUE)
    for action, text in ACTIONS.items():
        group.add_argument(f"--{action}", metavar="RUN", help=f"{text} the run in this folder")
    for field in sorted(dataclasses.fields(Config), key=lambda f: f.name not in Config.__annotations__):
        options = dict(type=field.type, metavar=getattr(field.type, "__name__", "").upper())
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif choices := get_args(field.type):  # of a Literal
            options = dict(type=type(choices[0]), choices=choices)
        text = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        parser.add_argument(flag(field.name), dest=field.name, help=text, **options)
    given = vars(parser.parse_args(argv))
    given = (quick if given.pop("quick", False) else {}) | given
    if given.pop("continue", False):
        if not given.get("out"):
            raise UserError("--continue needs --out FOLDER, the run to start or to resume")
        if (Path(given["out"]) / "config.json").exists():
            given["resume"] = given.pop("out")
    action = next((action for action in ACTIONS if action in given), "train")
    odd = [name for name in ON_DEMAND if name in given]
    if odd and not (action == "sample" and given.get("to")):
        raise UserError(f"{flag(odd[0])} is for --sample RUN --to FOLDER, single images of a run")
    if action == "train":
        return action, Config(**recipes[given.get("recipe", "paper")] | given), None
    folder = Path(given.pop(action))
    if not folder.is_dir():
        raise UserError(f"--{action} {folder}: there is no such folder")
    free = FREE_ON_RESUME if action == "resume" else FREE_ON_USE
    cfg = stored_config(Config, folder, script.name, given, free)
    if action == "eval" and cfg.judge == "none":
        raise UserError("--eval needs a judge: use --judge auto, or name a checkpoint")
    return action, cfg, folder


def stored_config(Config: type[Settings], folder: Path, script: str, given: dict, free: list[str]):
    """The config of the run in `folder` with the given values, which may differ only in the `free` fields."""
    with reading(folder / "config.json", f"in the folder of a run, written by {script}"):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        made_by, values, sessions = content["script"], dict(content["config"]), content["sittings"]
        commit = sessions[-1]["commit"] if sessions else "unknown"
    if made_by != script:
        raise UserError(f"{folder} is a run of {made_by}, not of {script}: call that script")
    if odd := set(values) ^ {field.name for field in dataclasses.fields(Config)}:
        raise UserError(f"{folder} was made by another version of {script} (fields {sorted(odd)} differ): "
                        f"check out its commit, {commit}, to use it")
    differs = [name for name, value in given.items() if value != values[name] and name not in free]
    if differs:
        what = ", ".join(f"{flag(name)} is {values[name]!r} there, {given[name]!r} here" for name in differs)
        raise UserError(f"{folder} was made with other settings: {what}. Leave these flags out, or start a "
                        f"new run (only {', '.join(map(flag, free))} may change)")
    return Config(**values | given)


def exit_status(main: Callable[[], int | None]) -> int:
    """Call main; its exit status, with errors and stops as one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's can't
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not end a run
    try:
        return main() or 0
    except Stopped as stopped:
        print(f"\n{stopped.args[0]}", file=sys.stderr)
        return 128 + stopped.args[1]
    except KeyboardInterrupt:
        return 130
    except (UserError, NotFinite, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        return 3 if isinstance(error, NotFinite) else 2
