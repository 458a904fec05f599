"""Runs of a script for all combinations of settings, each a process of its own, and one table of scores.

    python benchmarks/sweep.py dcgan_mnist.py latent_dim=16,100 hidden_dim=16,100
    python benchmarks/sweep.py acgan_celeba.py variants seed=0,1 -- --quick    # flags of the script after --

`variants` stands for the script's VARIANTS. Called again, a sweep continues where it stopped. A run that
diverges is listed in the table; the others continue. Exit status: 3 if one diverged, 130 or 143 after Ctrl-C
or SIGTERM.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.cli import FREE_ON_RESUME, Parser, flag, parse, stored_config  # noqa: E402
from common.errors import Stopped, UserError, exit_status  # noqa: E402
from common.system import free_folder, write_whole  # noqa: E402

DIVERGED = "diverged.txt"  # in the folder of a run that ended with a loss that is not finite


@dataclass
class Job:
    script: str  # "dcgan_mnist"
    folder: Path
    flags: list[str]  # without --out

    def check(self) -> None:
        """Raises UserError for flags that the script refuses, and for a folder with another run."""
        module = importlib.import_module(self.script)
        cfg = parse(module.Config, module.QUICK, "", self.flags)[1]
        if (self.folder / "config.json").exists():
            given = {k: v for k, v in vars(cfg).items() if v != "auto" and k not in ("out", "device")}
            stored_config(module.Config, self.folder, given, FREE_ON_RESUME)
        else:
            free_folder(str(self.folder), "")
        self.iters = cfg.iters

    def finished(self) -> bool:
        if (self.folder / DIVERGED).exists():
            return True
        if not (self.folder / "scores.json").exists():
            return False
        return json.loads((self.folder / "config.json").read_text())["config"]["iters"] == self.iters

    def command(self) -> list[str]:
        target = ["--out", str(self.folder), *self.flags]
        if (self.folder / "config.json").exists():
            target = ["--resume", str(self.folder), "--iters", str(self.iters)]
        return [sys.executable, str(ROOT / f"{self.script}.py"), *target]


def train_all(jobs: list[Job], at_once: int = 1) -> None:
    """Run all jobs that are not finished, `at_once` at a time.

    Raises UserError if one fails other than by diverging, and Stopped, after all have saved, for a signal.
    """
    for job in jobs:
        job.check()
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if at_once > 1 else {})
    stop, running = threading.Event(), set()

    def run(job: Job) -> None:
        if stop.is_set() or job.finished():
            return
        # in a session of its own: a Ctrl-C reaches it once, from here
        process = subprocess.Popen(job.command(), env=environment, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        running.add(process)
        if stop.is_set():  # since the check above
            process.terminate()
        output = process.communicate()[0].strip()
        running.discard(process)
        if process.returncode == 3:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / DIVERGED).write_text(output.splitlines()[-1] + "\n")
        elif process.returncode and not stop.is_set():
            stop.set()
            for other in list(running):
                other.terminate()
            raise UserError(f"{job.folder} ended with status {process.returncode}: {output[-300:]}")
        if not stop.is_set():
            print(f"{job.folder.name}: {'diverged' if process.returncode else 'done'}", flush=True)

    def stopped(number, _frame) -> None:
        raise Stopped("stopped; the same command continues", number)
    before = {s: signal.signal(s, stopped) for s in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for future in [pool.submit(run, job) for job in jobs]:
                future.result()
        except KeyboardInterrupt:
            stop.set()
            for process in list(running):
                process.terminate()
            raise
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def combinations(script: str, sweep: list[str], flags: list[str], out: Path) -> list[Job]:
    """A job for each combination of the FIELD=V1,V2,… in `sweep`; "variants" is the script's own list."""
    module = importlib.import_module(script)
    fields = module.Config.__dataclass_fields__.keys() - {"out"}
    options, swept = [], set()  # an option is {part of the folder's name: flags}
    for item in sweep:
        name, _, values = item.partition("=")
        if item == "variants" and hasattr(module, "VARIANTS"):
            names = set().union(*module.VARIANTS.values())
            options.append({variant: [f"{flag(f)}={v}" for f, v in settings.items()]
                            for variant, settings in module.VARIANTS.items()})
        elif name in fields and values:
            names, switch = {name}, {"true": flag(name), "false": f"--no-{flag(name)[2:]}"}
            if module.Config.__dataclass_fields__[name].type is not bool:
                switch = {value: f"{flag(name)}={value}" for value in values.split(",")}
            options.append({f"{name}={value}": [switch.get(value, "")] for value in values.split(",")})
        else:
            raise UserError(f"{item}: give a field of {script}.py's Config as FIELD=V1,V2"
                            + (", or the word variants" if hasattr(module, "VARIANTS") else ""))
        given = [f for f in flags if f.split("=")[0].replace("--no-", "--") in map(flag, names)]
        if names & swept or given or "" in sum(options[-1].values(), []):
            raise UserError(f"{item}: set each field once, in the sweep or after --, to values it takes")
        swept |= names
    jobs = []
    for parts in itertools.product(*options):
        chosen = [f for part, option in zip(parts, options, strict=True) for f in option[part]]
        jobs.append(Job(script, out / ",".join(parts), [*flags, *chosen]))
    return jobs


def seconds_per_iteration(table: Path) -> float:
    """Median over the rows of metrics.csv; scoring and pictures, which are rarer, do not count."""
    with open(table, newline="") as f:
        points = [(int(r["step"]), float(r["seconds"])) for r in csv.DictReader(f)]
    return median([(t - s) / (j - i) for (i, s), (j, t) in itertools.pairwise(points)] or [math.nan])


def table(jobs: list[Job]) -> list[list[str]]:
    """A header and a line for each job: its summary and speed; if seeds were swept, also means over them."""
    rows = {}
    for job in jobs:
        row = {}
        if (job.folder / DIVERGED).exists():
            row = {"": "diverged"}
        elif (job.folder / "scores.json").exists():
            row = json.loads((job.folder / "scores.json").read_text(encoding="utf-8"))["summary"]
            row["s / 1,000 its"] = 1000 * seconds_per_iteration(job.folder / "metrics.csv")
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
    lines = [[name, *(cell(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    return [["run", *columns], *lines]


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
    train_all(jobs, args.jobs)
    lines = table(jobs)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows(lines)
    write_whole(out / "sweep.csv", write)
    return 3 if any((job.folder / DIVERGED).exists() for job in jobs) else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
