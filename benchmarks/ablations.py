"""What each condition and trick of the i-CLEVR write-ups is worth: one thing changed at a time, three seeds.

    python benchmarks/ablations.py             # narrow, 32×32; under two hours on two cores
    python benchmarks/ablations.py --full      # both scripts at full size, on a GPU
    python benchmarks/ablations.py --table     # only table and picture, of the runs that are finished

Each run is a call of sngan_iclevr.py or cdcgan_iclevr.py. All of one script get about the same time: where a
change makes an iteration dearer, there are fewer. Narrow, so do both scripts; at full size each is as long as
its write-up's. Runs go seed by seed. On Ctrl-C those that are running save and this ends; called again, it
resumes them. The figures are those of the last iteration, on both test lists: means over seeds of means over
draws of z.
"""
import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from scipy.stats import dunnett, ttest_rel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluator  # noqa: E402
from common import run  # noqa: E402
from common.datasets import load_iclevr, pick_source  # noqa: E402


@dataclass
class Row:
    script: str
    flags: dict[str, str | None]  # by size, beside those of SIZES; None: not run, or not a run of its own
    beside: str  # the row it is compared with
    written: str  # what the write-up says of it


def both(flags: str) -> dict[str, str | None]:
    return {"narrow": flags, "full": flags}


SNGAN, DCGAN, NO_EMA = "SNGAN, projection", "DCGAN, concat", "no EMA"
ROWS = {
    SNGAN: Row("sngan_iclevr", both(""), "", "0.79 and 0.82, at full size, by the course's judge"),
    "linear joining": Row("sngan_iclevr", both("--label-embed linear"), SNGAN, "no significant difference"),
    "no noise for D": Row("sngan_iclevr", both("--no-add-noise"), SNGAN, "noise is best"),
    "flipped labels": Row("sngan_iclevr", both("--flip-labels 0.1"), SNGAN, "G collapsed to one object"),
    "relativistic": Row("sngan_iclevr", both("--relativistic"), SNGAN, "worse"),
    "decay": Row("sngan_iclevr", {"narrow": "--lr-decay-from 290", "full": "--lr-decay-from 4000"}, SNGAN,
                 "tried, not kept"),
    "1 D step": Row("sngan_iclevr", {"narrow": None, "full": "--n-dis 1 --iters 69000"}, SNGAN, "4 used"),
    "2 D steps": Row("sngan_iclevr", {"narrow": "--n-dis 2 --iters 1540",
                                      "full": "--n-dis 2 --iters 48000"}, SNGAN, "4 used"),
    "4 D steps": Row("sngan_iclevr", {"narrow": "--n-dis 4 --iters 950", "full": None}, SNGAN, "4 used"),
    NO_EMA: Row("sngan_iclevr", both(None), SNGAN, "no EMA used"),
    DCGAN: Row("cdcgan_iclevr", both(""), SNGAN, "0.62, at full size, by the course's judge"),
    "DCGAN, projection": Row("cdcgan_iclevr", both("--d-cond projection"), DCGAN, "not tried"),
    "DCGAN, smooth labels": Row("cdcgan_iclevr", both("--smooth-labels"), DCGAN, "used"),
    "DCGAN, flipped labels": Row("cdcgan_iclevr", both("--flip-labels 0.1"), DCGAN, "not told"),
}
SIZES = {  # narrow: the quick presets, with a better judge, for as long as the two hours allow
    "narrow": {"sngan_iclevr": "--quick --batch-size 16 --iters 2200",
               "cdcgan_iclevr": "--quick --iters 7500 --halve-every 0"},
    "full": {"sngan_iclevr": "--label-embed sum", "cdcgan_iclevr": "--ema 0.999"},  # as sngan_iclevr's
}
JUDGE = {"narrow": "--judge-width 24 --judge-steps 4000", "full": "--judge-width 64 --judge-steps 5000"}
DIVERGED = "diverged.txt"  # in the folder of a run that ended with losses that are not finite
KEEP = {"narrow": "--save-every 50", "full": "--save-every 1000"}


def name(row: str, seed: int) -> str:
    """The folder of a run; "no EMA" is G itself of the first row's."""
    return f"{(row if row != NO_EMA else SNGAN).replace(', ', '-').replace(' ', '_')}-{seed}"


def flags_of(args: argparse.Namespace, size: str, row: str, seed: int) -> list[str]:
    what = ROWS[row]
    text = f"{SIZES[size][what.script]} {what.flags[size]} {JUDGE[size]} {KEEP[size]} --eval-every 0 " \
           f"--sample-every 0 --log-every 50 --seed {seed}"
    out = args.out / name(row, seed)
    return [*text.split(), "--data", args.data, "--device", args.device, "--out", str(out)]


def config_of(args: argparse.Namespace, size: str, row: str, seed: int):
    script = importlib.import_module(ROWS[row].script)
    return run.parse(script.Config, script.QUICK, "", flags_of(args, size, row, seed))[1]


def runs_of(args: argparse.Namespace, size: str) -> list[tuple[str, int]]:
    """(row, seed) of every run, in order."""
    return [(row, seed) for seed in range(args.seeds) for row in ROWS if ROWS[row].flags[size] is not None]


def check(args: argparse.Namespace, size: str) -> None:
    """Raises UserError for a folder whose run is not what its row says today."""
    for row, seed in runs_of(args, size):
        path = args.out / name(row, seed) / "config.json"
        if path.exists():
            stored, wanted = json.loads(path.read_text())["config"], vars(config_of(args, size, row, seed))
            differs = [f for f in wanted if f not in ("out", "device") and stored.get(f) != wanted[f]]
            if differs:
                raise run.UserError(f"{path.parent} was run with another {' and '.join(differs)}: delete it, "
                                    "or name another --out")


def train_all(args: argparse.Namespace, size: str) -> int:
    """Make every run that is not finished, args.jobs at a time; returns the exit status."""
    cfg = config_of(args, size, SNGAN, 0)  # the judge first, before several runs would train the same one
    evaluator.get_judge(cfg.judge, load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes), cfg.judge_width,
                        cfg.judge_steps, run.pick_device(cfg.device))
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    stop, running = threading.Event(), set()

    def one(row: str, seed: int) -> int:
        folder = args.out / name(row, seed)
        if stop.is_set() or (folder / "scores.json").exists() or (folder / DIVERGED).exists():
            return 0
        flags = flags_of(args, size, row, seed)
        if (folder / "config.json").exists():
            flags = ["--resume", str(folder)]
        # in a session of its own: a Ctrl-C reaches it once, from here
        process = subprocess.Popen([sys.executable, str(ROOT / f"{ROWS[row].script}.py"), *flags],
                                   env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        running.add(process)
        if stop.is_set():  # since this was asked above
            process.terminate()
        said = process.communicate()[0].strip()
        running.remove(process)
        status = process.returncode
        if status == 3:  # not finite: that is the row's result
            (folder / DIVERGED).write_text(said[-300:] + "\n")
        if not stop.is_set():
            print(f"{folder.name}: " + (f"status {status}: {said[-300:]}" if status else "done"), flush=True)
        return 0 if status == 3 else status

    def end(*_) -> None:
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, end)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            jobs = [pool.submit(one, row, seed) for row, seed in runs_of(args, size)]
            return max(abs(job.result()) for job in jobs)
        except KeyboardInterrupt:
            stop.set()
            for process in list(running):
                process.terminate()
            print("stopped; call again to go on, with --table for what is finished", flush=True)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)


@torch.no_grad()
def averaged_or_not(folder: Path, key: str) -> tuple[torch.nn.Module, object]:
    """Of a run's last checkpoint its averaged G ("ema") or G itself ("G"), for evaluation; and its config."""
    stored = json.loads((folder / "config.json").read_text())
    script = importlib.import_module(stored["script"][:-3])
    cfg, device = script.Config(**stored["config"]), torch.device("cpu")
    data = load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes)
    G = script.build(cfg, len(data.classes), device)[2]
    G.load_state_dict(run.load_checkpoint(folder / "last.pt", device)[key])
    return G, cfg


def scores(args: argparse.Namespace, row: str, seed: int, device: torch.device) -> dict[str, float] | None:
    """{"test": accuracy, "new_test": accuracy} of a finished run; None where it is not finished."""
    folder = args.out / name(row, seed)
    if not (folder / "scores.json").exists():
        return None
    kept = json.loads((folder / "scores.json").read_text())["last"]
    if row == NO_EMA:
        path = folder / "scores_without_ema.json"
        if not path.exists() or path.stat().st_mtime < (folder / "scores.json").stat().st_mtime:
            G, cfg = averaged_or_not(folder, "G")
            data = load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes)
            judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)
            found = evaluator.score_sets(G.to(device), cfg.z_dim, judge, data.tests, cfg.eval_draws,
                                         cfg.seed + 1, device)
            run.write_whole(path, lambda p: p.write_text(json.dumps(found)))
        kept = json.loads(path.read_text())
    return {test: kept[test]["accuracy"][0] for test in ("test", "new_test")}


def minutes_trained(folder: Path) -> float:
    return float((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1]) / 60


def table(args: argparse.Namespace, size: str) -> dict[str, dict]:
    """{row: its scores by seed, their mean and standard deviation, and how it compares}."""
    device, found = run.pick_device(args.device), {}
    for row, what in ROWS.items():
        by_seed = {seed: scores(args, row, seed, device) for seed in range(args.seeds)}
        by_seed = {seed: s for seed, s in by_seed.items() if s}
        diverged = sum((args.out / name(row, seed) / DIVERGED).exists() for seed in range(args.seeds))
        if not by_seed and not diverged:
            continue
        found[row] = {"seeds": by_seed, "diverged": diverged, "written": what.written}
        if by_seed:
            found[row]["minutes"] = mean(minutes_trained(args.out / name(row, seed)) for seed in by_seed)
            for test in ("test", "new_test"):
                values = [s[test] for s in by_seed.values()]
                found[row][test] = [mean(values), stdev(values) if len(values) > 1 else None]
    compare(found)
    return found


def compare(found: dict[str, dict]) -> None:
    """Tell each row how far its accuracy, the mean of both lists, is from that of the row it is beside.

    The 95 % intervals are Dunnett's (1955): the spread over seeds is that of all rows beside the same one
    together, since three seeds alone hardly tell it, and the intervals hold for all those rows at once. "no
    EMA" is scored on the very runs it is beside: its interval is that of the differences within them.
    """
    values = {row: [mean(s.values()) for s in r["seeds"].values()] for row, r in found.items()
              if r["seeds"] and not r["diverged"]}  # what is left of a row that diverged would flatter it
    for control in dict.fromkeys(ROWS[row].beside for row in values):
        rows = [row for row in values if ROWS[row].beside == control]
        if control not in values:
            continue
        for row in rows:
            found[row] |= {"beside": control, "difference": mean(values[row]) - mean(values[control])}
        if NO_EMA in rows:
            rows.remove(NO_EMA)
            if len(values[control]) > 1:
                interval = ttest_rel(values[NO_EMA], values[control]).confidence_interval(0.95)
                found[NO_EMA]["interval"] = [float(interval.low), float(interval.high)]
        if rows and sum(map(len, (values[row] for row in [control, *rows]))) > len(rows) + 1:
            interval = dunnett(*(values[row] for row in rows), control=values[control],
                               random_state=0).confidence_interval(0.95)
            for row, low, high in zip(rows, interval.low, interval.high):
                found[row]["interval"] = [float(low), float(high)]


def verdict(result: dict) -> str:
    """In words: better or worse where the interval of the difference leaves zero out."""
    if result["diverged"]:
        return f"diverged in {result['diverged']} of {result['diverged'] + len(result['seeds'])} runs"
    if "difference" not in result:
        return ""
    if "interval" not in result:
        return f"{result['difference']:+.3f}, of single seeds"
    low, high = result["interval"]
    word = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return f"{word}: {result['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def markdown(found: dict[str, dict]) -> str:
    lines = ["| | test | new_test | seeds, minutes each | beside | here | write-up |",
             "| --- " * 7 + "|"]
    for row, r in found.items():
        cells = ["–" if test not in r else f"{r[test][0]:.3f}" if r[test][1] is None else
                 f"{r[test][0]:.3f} ± {r[test][1]:.3f}" for test in ("test", "new_test")]
        runs = f"{len(r['seeds'])}" + (f", {r['minutes']:.1f}" if "minutes" in r else "")
        lines.append(f"| {' | '.join([row, *cells, runs, r.get('beside', ''), verdict(r), r['written']])} |")
    return "\n".join(lines)


@torch.no_grad()
def draw(args: argparse.Namespace, found: dict[str, dict], path: Path) -> None:
    """A strip for each row, of seed 0: the same twelve sets of test.json and, within a script, the same z."""
    strips = []
    for row in found:
        if 0 not in found[row]["seeds"]:
            continue
        folder = args.out / name(row, 0)
        G, cfg = averaged_or_not(folder, "G" if row == NO_EMA else "ema")
        data = load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes)
        z = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))[:, :cfg.z_dim]
        sets = data.tests["test"]
        count = (sets < len(data.classes)).sum(1)
        chosen = torch.cat([(count == k).nonzero()[:4, 0] for k in (1, 2, 3)])
        strip = args.out / f"{row}.png"
        run.save_grid(strip, G(z[:len(chosen)], sets[chosen]),
                      f"{row}: four sets each of one, two, three objects", nrow=12)
        strips.append(Image.open(strip))
    if strips:
        canvas = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
        for i, strip in enumerate(strips):
            canvas.paste(strip, (0, sum(above.height for above in strips[:i])))
        run.write_whole(path, lambda p: canvas.save(p, optimize=True))


def main() -> int:
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="full width and length, for a GPU")
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds a row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", default="auto", help="i-CLEVR's folder, auto, or drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablations-SIZE)")
    parser.add_argument("--keep", type=Path, help="where to: FILE.json and FILE.png (default: in --out)")
    args = parser.parse_args()
    size, args.data = "full" if args.full else "narrow", pick_source(args.data, "data/iclevr")
    out = f"ablations-{size}" + ("-drawn" if args.data == "drawn" else "")
    args.out = args.out or Path("runs") / out
    if min(args.seeds, args.jobs) < 1:
        raise run.UserError("--seeds and --jobs must be at least 1")
    check(args, size)
    status = 0 if args.table else train_all(args, size)
    if status == 130:
        return status
    found = table(args, size)
    finished = [json.loads(path.read_text()) for path in args.out.glob("*/scores.json")]
    if not finished:
        print(f"{args.out}: no run is finished yet")
        return status
    told = {f"{s['data']}, {size}; judge: {s['judge']}; {s['draws']} draws of z a seed" for s in finished}
    if len(told) > 1:
        raise run.UserError(f"{args.out} holds scores that don't compare: {' beside '.join(sorted(told))}")
    told = told.pop()
    print(f"\n{told}:\n\n{markdown(found)}")
    keep = args.keep if args.keep and not status else args.out / "ablations"
    sittings = [sitting for path in args.out.glob("*/config.json")
                for sitting in json.loads(path.read_text())["sittings"]]
    circumstances = {k: ", ".join(sorted({sitting[k] for sitting in sittings}))
                     for k in ("commit", "hardware", "torch")}
    command = f"benchmarks/ablations.py{' --full' * args.full} --data {args.data} --seeds {args.seeds}"
    content = {"command": command, "what": told, **circumstances, "rows": found}
    run.write_whole(keep.with_suffix(".json"), lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
    draw(args, found, keep.with_suffix(".png"))
    return status


if __name__ == "__main__":
    run.entry(main)
