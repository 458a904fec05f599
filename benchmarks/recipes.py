"""What each part of a quick preset is worth: one change at a time, for equal minutes, on synthetic scenes.

    python benchmarks/recipes.py                                   # of sngan_iclevr.py, 4 minutes a run
    python benchmarks/recipes.py cdcgan_iclevr --seeds 3           # the other one; three seeds a row

A row's pace is measured first, alone, and sets its iterations: a change that makes an iteration slower gets
fewer. Runs have one thread each, --jobs at a time. "val" is the accuracy on label sets of training scenes, by
which presets are chosen; the test lists beside it choose nothing. After Ctrl-C the same command continues.
The table has every run that --out holds: --rows and --seeds 3 in a second call add seeds to rows that matter.
"""
import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.sweep import DIVERGED, Job, seconds_per_iteration, train_all  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import UserError, exit_status  # noqa: E402
from common.system import write_json  # noqa: E402

ROWS = {
    "sngan_iclevr": {
        "the preset": "",
        "no auxiliary classifier": "--aux-weight 0",
        "no penalty": "--gamma 0",
        "hinge loss": "--loss hinge",
        "spectral norm, no penalty": "--d-norm spectral --gamma 0",
        "spectral norm, hinge, no penalty": "--d-norm spectral --loss hinge --gamma 0",
        "write-up's D and loss, classifier": "--d-norm spectral --loss hinge --gamma 0 --d-net resnet",
        "write-up's D and loss": "--d-norm spectral --loss hinge --gamma 0 --d-net resnet --aux-weight 0",
        "Adam (0.5, 0.999)": "--beta1 0.5 --beta2 0.999",
        "width 8": "--ch 8",
        "32×32": "--image-size 32",
    },
    "cdcgan_iclevr": {
        "the preset": "",
        "no auxiliary classifier": "--aux-weight 0",
        "no penalty": "--gamma 0",
        "batch norm in D": "--d-norm batch --gamma 0",
        "batch norm, BCE": "--d-norm batch --gamma 0 --loss bce",
        "write-up's D and loss": "--d-norm batch --gamma 0 --loss bce --d-cond plane --aux-weight 0",
        "Adam (0.5, 0.999)": "--beta1 0.5 --beta2 0.999",
        "width 16": "--ch 16",
    },
}
MOST_SEEDS = 10
ALL = "--quick --data synthetic --log-every 20 --sample-every 0 --save-every 200"


def job_of(script: str, row: str, seed: int, iters: int, out: Path) -> Job:
    """A run of `iters` iterations, scored at its end."""
    flags = f"{ALL} {ROWS[script][row]} --seed {seed} --iters {iters} --eval-every {iters}"
    return Job(script, out / f"{row}-{seed}".replace(" ", "_"), flags.split())


def pace(script: str, row: str, out: Path) -> float:
    """Seconds an iteration takes with one thread and nothing beside it."""
    job = job_of(script, row, 0, 100, out)
    job = replace(job, folder=job.folder.with_name(f"pace of {row}"), flags=[*job.flags, "--judge", "none"])
    if not (job.folder / "metrics.csv").exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(job.command(), check=True, env=environment, stdout=subprocess.DEVNULL)
    return seconds_per_iteration(job.folder / "metrics.csv")


def scores(folder: Path) -> dict[str, float] | None:
    """{"val": accuracy, "test": …, "new_test": …, "minutes": …} of a finished run; None if it is not."""
    if (folder / DIVERGED).exists() or not (folder / "scores.json").exists():
        return None
    with open(folder / "metrics.csv", newline="") as f:
        last = [row for row in csv.DictReader(f) if row["accuracy_val"]][-1]
    found = {name: float(last[f"accuracy_{name}"]) for name in ("val", "test", "new_test")}
    return found | {"minutes": float(last["seconds"]) / 60, "iterations": int(last["step"])}


def markdown(rows: dict[str, list[dict]]) -> str:
    """A line for each row of runs, one a seed, the best by "val" first."""
    lines = ["| | val | test | new_test | iterations | minutes | seeds |", "| --- " * 7 + "|"]
    for row, runs in sorted(rows.items(), key=lambda item: -mean(run["val"] for run in item[1])):
        cells = [row]
        for name in ("val", "test", "new_test"):
            values = [run[name] for run in runs]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        minutes = mean(run["minutes"] for run in runs)
        cells += [f"{runs[0]['iterations']:,}", f"{minutes:.1f}", str(len(runs))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("script", nargs="?", default="sngan_iclevr", choices=list(ROWS))
    parser.add_argument("--rows", nargs="*", help="only these (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds a row (default: 1)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of a run, with one thread (default: 4)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/recipes-SCRIPT)")
    parser.add_argument("--keep", type=Path, help="the table's JSON (default: in --out)")
    args = parser.parse_args()
    args.rows = args.rows or list(ROWS[args.script])
    if unknown := set(args.rows) - ROWS[args.script].keys():
        raise UserError(f"--rows {min(unknown)!r}: {args.script} has {', '.join(ROWS[args.script])}")
    if not 1 <= args.seeds <= MOST_SEEDS or args.jobs < 1 or not args.minutes > 0:
        raise UserError(f"--seeds takes 1 to {MOST_SEEDS}; --jobs at least 1; --minutes more than 0")
    out = args.out or Path("runs") / f"recipes-{args.script}"
    iters = {row: max(10, round(60 * args.minutes / pace(args.script, row, out))) for row in args.rows}
    jobs = [job_of(args.script, row, seed, iters[row], out)
            for seed in range(args.seeds) for row in args.rows]
    train_all(jobs, args.jobs)
    rows = {row: [] for row in ROWS[args.script]}
    for row, seed in itertools.product(rows, range(MOST_SEEDS)):
        if found := scores(job_of(args.script, row, seed, 0, out).folder):
            rows[row].append(found)
    rows = {row: runs for row, runs in rows.items() if runs}
    print(markdown(rows))
    sitting = json.loads((jobs[0].folder / "config.json").read_text(encoding="utf-8"))["sittings"][0]
    command = f"benchmarks/recipes.py {args.script} --minutes {args.minutes:g}"
    content = {"command": command, "recipes": rows,
               **{k: sitting[k] for k in ("commit", "hardware", "torch")}}
    keep = args.keep or out / "recipes.json"
    write_json(keep, content)


if __name__ == "__main__":
    sys.exit(exit_status(main))
