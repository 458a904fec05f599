"""The command line: every field of a script's Config is a flag, and its trailing comment the help text."""
import argparse
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError, reading

ACTIONS = {"resume": "continue", "sample": "save pictures of", "eval": "score"}
# the fields that --resume may change, and those that --sample and --eval may
SPANS = "iters log_every sample_every eval_every save_every".split()
FREE_ON_RESUME = [*SPANS, *"lr lr_g lr_d device precision deterministic data".split()]
ON_DEMAND = "to n labels with_ digit".split()  # those of --sample RUN --to FOLDER alone
FREE_ON_USE = [*"device precision data judge seed eval_draws eval_images fid_weights pairs category".split(),
               *ON_DEMAND]
LEAST = dict(batch_size=2, eval_images=2, judge_width=4)  # counts whose least is not 1
LARGEST = 10**9  # nothing needs more, and a seed of 10¹³ would overflow


@dataclasses.dataclass
class Settings:
    """The flags that every script has; a script's Config inherits them and adds its own."""
    out: str = ""  # folder of the run; empty: runs/SCRIPT
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 (auto: where the hardware has it): autocast
    deterministic: bool = False  # the same bits in each CUDA run, a little slower
    log_every: int = 100  # iterations between rows of losses in metrics.csv
    sample_every: int = 500  # iterations between pictures; 0: never
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt; 0: never
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # auto (trained once and cached), none, or a checkpoint of a classifier
    judge_width: int = 64  # width of the judge that auto trains; for scenes and faces 64 is ResNet-18
    judge_steps: int = 5000  # its training steps
    to: str = ""  # with --sample: the new folder for single images, instead of grids
    n: int = 100  # with --to: how many images

    def __post_init__(self):
        """Check types and ranges: counts are at least 1 or as LEAST says (*_every: 0), other numbers 0."""
        for name, kind, default in ((f.name, f.type, f.default) for f in dataclasses.fields(self)):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices if choices else not isinstance(value, (int, kind)[kind is not float:]):
                raise UserError(f"{flag(name)} {value!r}: must be {choices or kind.__name__}")
            least = LEAST.get(name, int(kind is int and default > 0 and not name.endswith("_every")))
            most = LARGEST if kind is int else sys.float_info.max
            if kind in (int, float) and not least <= value <= most:
                limit = f"at most {LARGEST:,}" if kind is int else "finite"
                raise UserError(f"{flag(name)} {value}: must be at least {least} and {limit}")
            if name in ("ema", "beta1", "beta2", "flip_labels") and value >= 1:
                raise UserError(f"{flag(name)} {value}: must be below 1")


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for a wrong command line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # with_ has its name because "with" is Python's


def parse(Config: type[Settings], quick: dict, description: str, argv: list[str] | None = None,
          script: Path | None = None):
    """Read the command line into (action, config, folder); raises UserError for anything that does not fit.

    action is "train", "resume", "sample" or "eval"; folder is the run that the last three name, else None.
    quick: the values that --quick presets. script: the file with Config, if Python can't tell.
    """
    script = script or Path(inspect.getfile(Config))
    source = "".join(path.read_text(encoding="utf-8") for path in (script, Path(__file__)))
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    preset = ", ".join(f"{name} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a short run for two CPU cores: {preset}")
    group = parser.add_mutually_exclusive_group()
    for action, text in ACTIONS.items():
        group.add_argument(f"--{action}", metavar="RUN", help=f"{text} the run in this folder")
    for field in sorted(dataclasses.fields(Config), key=lambda f: f.name not in Config.__annotations__):
        kind = field.type
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif choices := get_args(kind):  # of a Literal
            options = dict(type=type(choices[0]), choices=choices)
        else:
            options = dict(type=kind, metavar=kind.__name__.upper())
        text = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        parser.add_argument(flag(field.name), dest=field.name, help=text, **options)
    given = vars(parser.parse_args(argv))
    use_quick = given.pop("quick", False)
    action = next((action for action in ACTIONS if action in given), "train")
    odd = [name for name in ON_DEMAND if name in given]
    if odd and not (action == "sample" and given.get("to")):
        raise UserError(f"{flag(odd[0])} is for --sample RUN --to FOLDER, single images of a run")
    if action == "train":
        return action, Config(**(quick if use_quick else {}) | given), None
    folder = Path(given.pop(action))
    if use_quick:
        raise UserError(f"--quick is for a new run; {folder} has its own settings")
    free = FREE_ON_RESUME if action == "resume" else FREE_ON_USE
    cfg = stored_config(Config, folder, script.name, given, free)
    if action == "eval" and cfg.judge == "none":
        raise UserError("--eval needs a judge: use --judge auto, or name a checkpoint")
    return action, cfg, folder


def stored_config(Config: type[Settings], folder: Path, script: str, given: dict, free: list[str]):
    """The config of the run in `folder` with the given values, which may differ only in the `free` fields."""
    path = folder / "config.json"
    with reading(path, f"in the folder of a run, written by {script}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by, values = content["script"], dict(content["config"])
    if made_by != script:
        raise UserError(f"{folder} is a run of {made_by}, not of {script}: call that script")
    if odd := set(values) ^ {field.name for field in dataclasses.fields(Config)}:
        raise UserError(f"{path} is from another version of {script} (fields {sorted(odd)}): use that one")
    differs = [name for name, value in given.items() if value != values[name] and name not in free]
    if differs:
        what = ", ".join(f"{flag(name)} is {values[name]!r} there, {given[name]!r} here" for name in differs)
        raise UserError(f"{folder} was made with other settings: {what}. Leave these flags out, or start a "
                        f"new run (only {', '.join(map(flag, free))} may change)")
    return Config(**values | given)
