"""Train a script with every combination of settings, each in a process of its own; end in a table of scores.

    python tools/sweep.py dcgan_mnist.py latent_dim=16,100 hidden_dim=16,100
    python tools/sweep.py sngan_iclevr.py recipe=paper,r3gan -- --quick    # flags of the script follow --
    python tools/sweep.py acgan_celeba.py variants                         # the script's VARIANTS

The same command continues a sweep that was stopped. A run that diverges is listed in the table, and the
others continue. The exit status is 3 if a run diverged, and 130 or 143 after Ctrl-C or SIGTERM.
"""
import csv
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import UserError, atomic_write  # noqa: E402
from harness.cli import ACTIONS, SPANS, Parser, Stopped, exit_status, flag, parse, stored_config  # noqa: E402
from harness.run import new_run_dir  # noqa: E402

DIVERGED = "diverged.txt"  # in the folder of a run that ended with a loss that is not finite
SCORES = ("accuracy", "tv", "fd")  # columns of metrics.csv that begin so hold scores


@dataclass
class Job:
    """One run of a script."""
    script: str  # "dcgan_mnist"
    folder: Path
    flags: list[str]  # without --out

    def check(self) -> None:
        """Set cfg. Raises UserError for flags that the script refuses, and for a folder with another run."""
        module = importlib.import_module(self.script)
        self.cfg = cfg = parse(module.Config, module.RECIPES, module.QUICK, "", self.flags)[1]
        if not (self.folder / "config.json").exists():
            new_run_dir(str(self.folder))
            return
        given = {k: v for k, v in vars(cfg).items() if k not in ("out", "device", "iters") and v != "auto"}
        stored = stored_config(module.Config, self.folder, f"{self.script}.py", given, SPANS)
        if cfg.iters < stored.iters:
            raise UserError(f"{self.folder} was made with --iters {stored.iters}: fewer need another --out")

    def finished(self) -> bool:
        if (self.folder / DIVERGED).exists():
            return True
        if not (self.folder / "scores.json").exists():
            return False
        scores = json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))
        return scores["last"]["step"] == self.cfg.iters  # fewer: --eval scored a run that was stopped

    def command(self) -> list[str]:
        target = ["--out", str(self.folder), *self.flags]
        if (self.folder / "config.json").exists():
            free = [x for name in SPANS for x in (flag(name), str(getattr(self.cfg, name)))]
            target = ["--resume", str(self.folder), *free]
        return [sys.executable, str(ROOT / f"{self.script}.py"), *target]


def train_all(jobs: list[Job], at_once: int = 1, show: bool = False) -> None:
    """Run all jobs that are not finished, `at_once` at a time. show: also print what they print.

    If a job fails other than by diverging, the others save and this exits with its status. After a signal,
    all save and this raises Stopped.
    """
    for job in jobs:
        job.check()
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
    environment = threads | os.environ | {"PYTHONUNBUFFERED": "1"}
    stop, running, failed = threading.Event(), set(), []

    def run(job: Job) -> None:
        if stop.is_set() or job.finished():
            return
        # in a session of its own, so that a Ctrl-C reaches it only once, from here
        process = subprocess.Popen(job.command(), env=environment, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        running.add(process)
        if stop.is_set():  # since the check above
            process.terminate()
        last = deque([""], maxlen=10)
        for line in process.stdout:
            last.append(line)
            if show:
                print(f"{job.folder.name}: {line}", end="", flush=True)
        status = process.wait()
        running.discard(process)
        if status == 3 and (job.folder / "config.json").exists():
            (job.folder / DIVERGED).write_text(last[-1])
        elif status and not stop.is_set():
            failed.append(status if status > 0 else 128 - status)  # a shell's status after a signal
            stop_all()
            print(f"error: {job.folder} ended with status {failed[0]}:\n{''.join(last).strip()}",
                  file=sys.stderr, flush=True)
        if not stop.is_set():
            print(f"{job.folder.name}: {'diverged' if status else 'done'}", flush=True)

    def stop_all() -> None:
        stop.set()
        for process in list(running):
            process.terminate()

    def stopped(number, _frame) -> None:
        raise Stopped("stopped; the same command continues", number)
    before = {s: signal.signal(s, stopped) for s in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for future in [pool.submit(run, job) for job in jobs]:
                future.result()
        except KeyboardInterrupt:
            stop_all()
            raise
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
    if failed:
        sys.exit(failed[0])


def combinations(script: str, sweep: list[str], flags: list[str], out: Path) -> list[Job]:
    """A job for each combination of the FIELD=V1,V2,… in `sweep`; "variants" is the script's own list."""
    module = importlib.import_module(script)
    fields = {name: field.type for name, field in module.Config.__dataclass_fields__.items() if name != "out"}
    variants = getattr(module, "VARIANTS", {})
    options, swept = [], set()  # an option is {part of the folder's name: flags}
    for own in {f.split("=")[0] for f in flags} & {f"--{name}" for name in ("out", "continue", *ACTIONS)}:
        raise UserError(f"{own} after --: the sweep sets it for each run; leave it out")
    for item in sweep:
        name, _, values = item.partition("=")
        if item == "variants" and variants:
            names = set().union(*variants.values())
            option = [(variant, [f"{flag(field)}={value}" for field, value in settings.items()])
                      for variant, settings in variants.items()]
        elif name in fields and values:
            names, switch = {name}, {"true": flag(name), "false": f"--no-{flag(name)[2:]}"}
            option = [(f"{name}={value}".replace("/", "_"),
                       [switch.get(value, "") if fields[name] is bool else f"{flag(name)}={value}"])
                      for value in values.split(",")]
        else:
            raise UserError(f"{item}: give a field of {script}.py's Config as FIELD=V1,V2"
                            + (", or the word variants" if variants else ""))
        given = [f for f in flags if f.split("=")[0].replace("--no-", "--") in map(flag, names)]
        if names & swept or given or any("" in x for _, x in option) or len(dict(option)) < len(option):
            raise UserError(f"{item}: set each field once, in the sweep or after --, to different "
                            "values it takes")
        swept |= names
        options.append(option)
    return [Job(script, out / ",".join(part for part, _ in chosen), sum((x for _, x in chosen), [*flags]))
            for chosen in itertools.product(*options)]


def seconds_per_iteration(table: Path) -> float:
    """Median over the rows of metrics.csv, without those whose time includes scoring.

    The time that sample grids take does not count either, because they are rarer than rows.
    """
    with open(table, newline="") as f:
        points = [(int(r["step"]), float(r["seconds"]), any(v and c.startswith(SCORES) for c, v in r.items()))
                  for r in csv.DictReader(f)]
    paces = [((t - s) / (j - i), scored) for (i, s, _), (j, t, scored) in itertools.pairwise(points)]
    return median([pace for pace, scored in paces if not scored] or [p for p, _ in paces] or [math.nan])


def table(jobs: list[Job]) -> list[list[str]]:
    """A header and a row per job with its summary and speed; if seeds were swept, also means over them."""
    rows = {}
    for job in jobs:
        row = {}
        if (job.folder / DIVERGED).exists():
            row = {"": f"diverged: {(job.folder / DIVERGED).read_text().strip().removeprefix('error: ')}"}
        elif (job.folder / "scores.json").exists():
            row = json.loads((job.folder / "scores.json").read_text(encoding="utf-8"))["summary"]
            pace = 1000 * seconds_per_iteration(job.folder / "metrics.csv")
            row |= {"s / 1,000 its": pace} if math.isfinite(pace) else {}  # a single row has none
        rows[job.folder.name] = row
    groups = {}
    for name, row in rows.items():
        key = ",".join(part for part in name.split(",") if not part.startswith("seed="))
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        if len(group) > 1 and all("" not in row and row for row in group):
            means = {c: [row[c][0] if isinstance(row[c], list) else row[c] for row in group]
                     for c in group[0] if all(c in row for row in group)}
            rows[f"{key or 'all'}: {len(group)} seeds"] = {c: [mean(v), stdev(v)] for c, v in means.items()}

    def cell(value) -> str:
        if isinstance(value, list):  # mean and standard deviation
            return f"{value[0]:.4g} ± {value[1]:.2g}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[name, *(cell(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    return [["run", *columns], *cells]


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__)
    parser.add_argument("script", help="dcgan_mnist.py, …")
    parser.add_argument("sweep", nargs="+", metavar="FIELD=V1,V2", help="or the word variants")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/SCRIPT-sweep)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = parser.parse_args(argv[:cut])
    script = Path(args.script).stem
    if not (ROOT / f"{script}.py").is_file() or "_" not in script:
        raise UserError(f"{args.script} is not a script of this collection: name dcgan_mnist.py, …")
    if args.jobs < 1:
        raise UserError("--jobs must be at least 1")
    out = args.out or Path("runs") / f"{script}-sweep"
    jobs = combinations(script, args.sweep, argv[cut + 1:], out)
    train_all(jobs, args.jobs, show=True)
    rows = table(jobs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows(rows)
    atomic_write(out / "sweep.csv", write)
    return 3 if any((job.folder / DIVERGED).exists() for job in jobs) else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
