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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.cli import ACTIONS, SPANS, Parser, flag, parse, stored_config  # noqa: E402
from common.errors import Stopped, UserError, exit_status  # noqa: E402
from common.system import free_folder, write_whole  # noqa: E402

DIVERGED = "diverged.txt"  # in the folder of a run that ended with a loss that is not finite
SCORES = ("accuracy", "tv", "fd")  # what the names of scores in metrics.csv begin with


@dataclass
class Job:
    script: str  # "dcgan_mnist"
    folder: Path
    flags: list[str]  # without --out

    def check(self) -> None:
        """Raises UserError for flags that the script refuses, and for a folder with another run."""
        module = importlib.import_module(self.script)
        self.cfg = cfg = parse(module.Config, module.QUICK, "", self.flags)[1]
        if not (self.folder / "config.json").exists():
            free_folder(str(self.folder), "")
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
        return scores["last"]["step"] == self.cfg.iters  # not those of --eval on a run that was stopped

    def command(self) -> list[str]:
        target = ["--out", str(self.folder), *self.flags]
        if (self.folder / "config.json").exists():
            free = [x for name in SPANS for x in (flag(name), str(getattr(self.cfg, name)))]
            target = ["--resume", str(self.folder), *free]
        return [sys.executable, str(ROOT / f"{self.script}.py"), *target]


def train_all(jobs: list[Job], at_once: int = 1, show: bool = False) -> None:
    """Run all jobs that are not finished, `at_once` at a time. show: print what they print, too.

    If one fails other than by diverging, the others save and this exits with its status. Raises Stopped,
    after all have saved, for a signal.
    """
    for job in jobs:
        job.check()
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    environment = {"OMP_NUM_THREADS": threads} if at_once > 1 else {}
    environment = environment | os.environ | {"PYTHONUNBUFFERED": "1"}
    stop, running, failed = threading.Event(), set(), []

    def run(job: Job) -> None:
        if stop.is_set() or job.finished():
            return
        # in a session of its own: a Ctrl-C reaches it once, from here
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
            failed.append(status if status > 0 else 128 - status)  # as a shell tells of signals
            stop.set()
            for other in list(running):
                other.terminate()
            print(f"error: {job.folder} ended with status {failed[0]}:\n{''.join(last).strip()}",
                  file=sys.stderr, flush=True)
        if not stop.is_set():
            print(f"{job.folder.name}: {'diverged' if status else 'done'}", flush=True)

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
    if failed:
        sys.exit(failed[0])


def combinations(script: str, sweep: list[str], flags: list[str], out: Path) -> list[Job]:
    """A job for each combination of the FIELD=V1,V2,… in `sweep`; "variants" is the script's own list."""
    module = importlib.import_module(script)
    fields = module.Config.__dataclass_fields__.keys() - {"out"}
    options, swept = [], set()  # an option is {part of the folder's name: flags}
    for own in {f.split("=")[0] for f in flags} & {f"--{name}" for name in ("out", *ACTIONS)}:
        raise UserError(f"{own} after --: the sweep sets it for each run; leave it out")
    for item in sweep:
        name, _, values = item.partition("=")
        if item == "variants" and hasattr(module, "VARIANTS"):
            names, number = set().union(*module.VARIANTS.values()), len(module.VARIANTS)
            options.append({variant: [f"{flag(f)}={v}" for f, v in settings.items()]
                            for variant, settings in module.VARIANTS.items()})
        elif name in fields and values:
            names, switch = {name}, {"true": flag(name), "false": f"--no-{flag(name)[2:]}"}
            if module.Config.__dataclass_fields__[name].type is not bool:
                switch = {value: f"{flag(name)}={value}" for value in values.split(",")}
            number = len(values.split(","))
            options.append({f"{name}={value}".replace("/", "_"): [switch.get(value, "")]
                            for value in values.split(",")})
        else:
            raise UserError(f"{item}: give a field of {script}.py's Config as FIELD=V1,V2"
                            + (", or the word variants" if hasattr(module, "VARIANTS") else ""))
        given = [f for f in flags if f.split("=")[0].replace("--no-", "--") in map(flag, names)]
        if names & swept or given or "" in sum(options[-1].values(), []) or len(options[-1]) < number:
            raise UserError(f"{item}: set each field once, in the sweep or after --, to different "
                            "values it takes")
        swept |= names
    jobs = []
    for parts in itertools.product(*options):
        chosen = [f for part, option in zip(parts, options, strict=True) for f in option[part]]
        jobs.append(Job(script, out / ",".join(parts), [*flags, *chosen]))
    return jobs


def seconds_per_iteration(table: Path) -> float:
    """Median over the rows of metrics.csv; pictures, which are rarer, do not count, nor rows with scores."""
    with open(table, newline="") as f:
        points = [(int(r["step"]), float(r["seconds"]), any(v and c.startswith(SCORES) for c, v in r.items()))
                  for r in csv.DictReader(f)]
    paces = [((t - s) / (j - i), scored) for (i, s, _), (j, t, scored) in itertools.pairwise(points)]
    return median([pace for pace, scored in paces if not scored] or [p for p, _ in paces] or [math.nan])


def table(jobs: list[Job]) -> list[list[str]]:
    """A header and a line for each job: its summary and speed; if seeds were swept, also means over them."""
    rows = {}
    for job in jobs:
        row = {}
        if (job.folder / DIVERGED).exists():
            row = {"": f"diverged: {(job.folder / DIVERGED).read_text().strip().removeprefix('error: ')}"}
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
    train_all(jobs, args.jobs, show=True)
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
