"""The worth of parts of the i-CLEVR scripts' quick presets, and of tricks of their write-ups.

    python benchmarks/ablations.py                         # two and a half hours on two cores
    python benchmarks/ablations.py --minutes 60 -- --ch 64 # wider and longer; flags of both scripts after --
    python benchmarks/ablations.py --table                 # only table and picture, of the finished runs

One change at a time, three seeds, equal minutes. Each run is a process of sngan_iclevr.py or cdcgan_iclevr.py
--quick, as in benchmarks/sweep.py. A row's pace is measured first, alone, and sets its iterations: a change
that makes an iteration slower gets fewer. After Ctrl-C the same command continues. The figures are of the
last iteration, on both test lists: means over seeds of means over draws of z. They end in --out, as
ablations.json and ablations.png, with a strip of each row.
"""
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from scipy.stats import dunnett, ttest_rel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluator  # noqa: E402
from benchmarks.sweep import DIVERGED, Job, seconds_per_iteration, train_all  # noqa: E402
from common import datasets  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import UserError, exit_status  # noqa: E402
from common.pictures import names_of, save_grid  # noqa: E402
from common.system import pick_device, write_json, write_whole  # noqa: E402


@dataclass
class Row:
    script: str
    flags: str | None  # in addition to the preset's; None: no run of its own
    beside: str  # the row it is compared with
    written: str  # what the write-up reports


SNGAN, DCGAN, NO_EMA = "SNGAN, the preset", "DCGAN, the preset", "no EMA"
NO_CLASSIFIER = "DCGAN, no classifier"
SPECTRAL, BATCH = "--gamma 0 --d-norm spectral", "--gamma 0 --d-norm batch"
# the recipes as written up, but for their widths
WRITTEN = "--aux-weight 0 --ema 0 --lr-d 1e-4 --beta1 0.5 --beta2 0.999"
SNGAN_WRITTEN = (f"{WRITTEN} {SPECTRAL} --d-net resnet --loss hinge --n-dis 4 "
                 "--label-embed linear --batch-size 64 --lr-g 3e-4")
DCGAN_WRITTEN = (f"{WRITTEN} {BATCH} --loss bce --smooth-labels --d-cond plane "
                 "--halve-every 50 --batch-size 128 --lr-g 2e-4")
ROWS = {
    SNGAN: Row("sngan_iclevr", "", "", "0.79 and 0.82, at full size, by the course's judge"),
    "linear joining": Row("sngan_iclevr", "--label-embed linear", SNGAN, "no significant difference"),
    "no noise for D": Row("sngan_iclevr", "--no-add-noise", SNGAN, "noise is best"),
    "flipped labels": Row("sngan_iclevr", "--flip-labels 0.1", SNGAN, "G collapsed to one object"),
    "4 D steps": Row("sngan_iclevr", "--n-dis 4", SNGAN, "4 used"),
    NO_EMA: Row("sngan_iclevr", None, SNGAN, "no EMA used"),
    "no auxiliary classifier": Row("sngan_iclevr", "--aux-weight 0", SNGAN, "none used"),
    "hinge loss": Row("sngan_iclevr", "--loss hinge", SNGAN, "hinge used"),
    "relativistic hinge": Row("sngan_iclevr", "--loss relativistic", "hinge loss", "worse"),
    "spectral norm for penalties": Row("sngan_iclevr", SPECTRAL, SNGAN, "used"),
    "residual D": Row("sngan_iclevr", f"{SPECTRAL} --d-net resnet", "spectral norm for penalties", "used"),
    "as written up": Row("sngan_iclevr", SNGAN_WRITTEN, SNGAN, "all of it, this narrow"),
    DCGAN: Row("cdcgan_iclevr", "", SNGAN, "0.62, at full size, by the course's judge"),
    NO_CLASSIFIER: Row("cdcgan_iclevr", "--aux-weight 0", DCGAN, "none used"),
    "DCGAN, plane of labels": Row("cdcgan_iclevr", "--d-cond plane --aux-weight 0", NO_CLASSIFIER, "used"),
    "DCGAN, batch norm for penalties": Row("cdcgan_iclevr", BATCH, DCGAN, "used"),
    "DCGAN, as written up": Row("cdcgan_iclevr", DCGAN_WRITTEN, DCGAN, "all of it, this narrow"),
}
ALWAYS = ("--quick --judge-width 64 --judge-steps 5000 --eval-every 0 --sample-every 0 --log-every 50 "
          "--save-every 200")


def name(row: str, seed: int) -> str:
    """The folder of a run; "no EMA" is G itself of the first row's runs."""
    return f"{row if row != NO_EMA else SNGAN}-{seed}".replace(", ", "-").replace(" ", "_")


def job_of(args, row: str, seed: int, iters: int) -> Job:
    what = ROWS[row]
    text = f"{ALWAYS} {what.flags} --seed {seed} --iters {iters}"
    flags = [*text.split(), "--data", args.data, "--device", args.device, *args.more]
    return Job(what.script, args.out / name(row, seed), flags)


def paces(args) -> dict[str, float]:
    """Seconds an iteration of each row takes with nothing beside it, by runs of 100."""
    jobs = {row: job_of(args, row, 0, 100) for row, what in ROWS.items() if what.flags is not None}
    for row, job in jobs.items():
        job.folder = args.out / f"pace-{name(row, 0)}"
        job.flags += ["--judge", "none", "--log-every", "20"]
        job.check()
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))  # as train_all's
    for job in jobs.values():
        table = job.folder / "metrics.csv"
        if not (table.exists() and "\n100," in table.read_text()):  # or it was stopped
            subprocess.run(job.command(), check=True, env={"OMP_NUM_THREADS": threads} | os.environ,
                           stdout=subprocess.DEVNULL)
    return {row: seconds_per_iteration(job.folder / "metrics.csv") for row, job in jobs.items()}


def load(folder: Path, key: str) -> tuple:
    """G of a run's last checkpoint, averaged ("ema") or not ("G"); its config and data, without images."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    script = importlib.import_module(stored["script"][:-3])
    cfg = script.Config(**stored["config"])
    state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    data = datasets.Data.known(state["data"])
    G = script.Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size)
    G.load_state_dict(state[key])
    return G.eval().requires_grad_(False), cfg, data


def scores(args, row: str, seed: int) -> dict[str, float] | None:
    """{"test": accuracy, "new_test": accuracy} of a finished run, else None."""
    folder = args.out / name(row, seed)
    if not (folder / "scores.json").exists():
        return None
    kept = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["last"]
    if row == NO_EMA:
        path = folder / "scores_without_ema.json"
        if not path.exists() or path.stat().st_mtime < (folder / "scores.json").stat().st_mtime:
            device, (G, cfg, _) = pick_device(args.device), load(folder, "G")
            data = datasets.load_iclevr(cfg)
            G, judge = G.to(device), evaluator.get_judge(cfg, data, device)

            def sample(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return G(z.to(device), y.to(device))
            found = evaluator.score_sets(sample, cfg.z_dim, judge, data.tests, cfg.eval_draws, cfg.seed + 1)
            write_json(path, found)
        kept = json.loads(path.read_text())
    return {test: kept[f"accuracy {test}"][0] for test in ("test", "new_test")}


def trained(folder: Path) -> tuple[int, float]:
    """Iterations, minutes."""
    step, seconds, *_ = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    return int(step), float(seconds) / 60


def table(args) -> dict[str, dict]:
    """{row: its scores by seed, their mean and standard deviation, and how it compares}."""
    found = {}
    for row, what in ROWS.items():
        by_seed = {seed: scores(args, row, seed) for seed in range(args.seeds)}
        by_seed = {seed: s for seed, s in by_seed.items() if s}
        diverged = sum((args.out / name(row, seed) / DIVERGED).exists() for seed in range(args.seeds))
        if not by_seed and not diverged:
            continue
        found[row] = {"seeds": by_seed, "diverged": diverged, "written": what.written}
        if by_seed:
            runs = [trained(args.out / name(row, seed)) for seed in by_seed]
            found[row]["iterations"], found[row]["minutes"] = map(mean, zip(*runs, strict=True))
            for test in ("test", "new_test"):
                values = [s[test] for s in by_seed.values()]
                found[row][test] = [mean(values), stdev(values) if len(values) > 1 else None]
    compare(found)
    return found


def compare(found: dict[str, dict]) -> None:
    """Compare each row's accuracy, the mean of both lists, with that of the row it is beside.

    Simultaneous 95 % intervals (Dunnett 1955): they hold for all rows beside the same one together, and the
    spread over seeds is pooled over these rows. "no EMA" is scored on the runs it is beside; its interval is
    of the differences within them.
    """
    values = {row: [mean(s.values()) for s in r["seeds"].values()] for row, r in found.items()
              if r["seeds"] and not r["diverged"]}  # the rest of a diverged row would look too good
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
            for row, low, high in zip(rows, interval.low, interval.high, strict=True):
                found[row]["interval"] = [float(low), float(high)]


def verdict(result: dict) -> str:
    """Better or worse if the interval of the difference excludes zero."""
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
    lines = ["| | test | new_test | seeds, iterations, minutes | beside | here | write-up |",
             "| --- " * 7 + "|"]
    for row, r in found.items():
        cells = ["–" if test not in r else f"{r[test][0]:.3f}" if r[test][1] is None else
                 f"{r[test][0]:.3f} ± {r[test][1]:.3f}" for test in ("test", "new_test")]
        runs = f"{len(r['seeds'])}"
        if "minutes" in r:
            runs += f", {r['iterations']:,.0f}, {r['minutes']:.1f}"
        lines.append(f"| {' | '.join([row, *cells, runs, r.get('beside', ''), verdict(r), r['written']])} |")
    return "\n".join(lines)


def save_strips(args, found: dict[str, dict], path: Path) -> None:
    """A strip for each row, of seed 0: the same twelve sets of test.json and, within a script, the same z."""
    strips = []
    for row in found:
        if 0 not in found[row]["seeds"]:
            continue
        G, cfg, data = load(args.out / name(row, 0), "G" if row == NO_EMA else "ema")
        z = torch.randn(12, cfg.z_dim, generator=torch.Generator().manual_seed(0))
        sets = data.tests["test"]
        count = (sets < len(data.classes)).sum(1)
        chosen = sets[torch.cat([(count == k).nonzero()[:4, 0] for k in (1, 2, 3)])]
        strip = args.out / f"{row}.png"
        save_grid(strip, G(z[:len(chosen)], chosen), f"{row}: four sets each of one, two, three objects", 12,
                  captions=names_of(chosen, data.classes))
        strips.append(Image.open(strip))
    if strips:
        canvas = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
        for i, strip in enumerate(strips):
            canvas.paste(strip, (0, sum(above.height for above in strips[:i])))
        write_whole(path, lambda p: canvas.save(p, optimize=True))


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a run (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds a row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", default="auto", help="i-CLEVR's folder, auto, or synthetic")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablations)")
    args = parser.parse_args(argv[:cut])
    args.more, args.data = argv[cut + 1:], datasets.pick_source(args.data, "data/iclevr")
    args.out = args.out or Path("runs/ablations" + "-synthetic" * (args.data == "synthetic"))
    if min(args.seeds, args.jobs) < 1 or not args.minutes > 0:
        raise UserError("--seeds and --jobs must be at least 1, --minutes more than 0")
    if not args.table:
        iters = {row: max(10, round(60 * args.minutes / pace)) for row, pace in paces(args).items()}
        jobs = [job_of(args, row, seed, n) for seed in range(args.seeds) for row, n in iters.items()]
        for job in jobs:
            job.check()
        # the judge first, before several runs would train the same one
        evaluator.get_judge(jobs[0].cfg, datasets.load_iclevr(jobs[0].cfg), pick_device(args.device))
        train_all(jobs, args.jobs)
    found = table(args)
    finished = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*/scores.json")]
    if not finished:
        print(f"{args.out}: no run is finished yet")
        return 0
    what = {f"{s['data']}; judge: {s['judge']}; {s['draws']} draws of z a seed" for s in finished}
    if len(what) > 1:
        raise UserError(f"{args.out} holds scores that can't be compared: {' and '.join(sorted(what))}")
    what = what.pop()
    sittings = [sitting for path in args.out.glob("*/config.json")
                for sitting in json.loads(path.read_text(encoding="utf-8"))["sittings"]]
    circumstances = {k: ", ".join(sorted({sitting[k] for sitting in sittings}))
                     for k in ("commit", "hardware", "torch")}
    command = " ".join(["benchmarks/ablations.py --data", args.data, f"--minutes {args.minutes:g}",
                        f"--seeds {args.seeds}", *(["--", *args.more] if args.more else [])])
    content = {"command": command, "what": what, **circumstances, "rows": found}
    write_json(args.out / "ablations.json", content)
    save_strips(args, found, args.out / "ablations.png")
    print(f"\n{what}:\n\n{markdown(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
