"""Ablations of the i-CLEVR scripts' --quick runs and of the tricks in their reference reports.

    python tools/ablations.py                           # two and a half hours on two cores
    python tools/ablations.py --minutes 60 -- --ch 64   # longer and wider; flags of both scripts follow --
    python tools/ablations.py --table                   # only the table and picture of finished runs

Each row changes one thing in `sngan_iclevr.py --quick` or `cdcgan_iclevr.py --quick`, whose recipe is r3gan,
and has three seeds. All runs take the same time: the speed of each row is measured first, alone, and sets its
number of iterations. After Ctrl-C the same command continues. The scores are those of the last iteration on
both test lists, as means over seeds of means over draws of z. --out gets ablations.json and ablations.png, a
strip of images per row.
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
from common.datasets import Data, load_iclevr, pick_source  # noqa: E402
from common.files import UserError, atomic_write, load_verified, write_json  # noqa: E402
from harness.cli import Parser, exit_status, stored_config  # noqa: E402
from harness.device import pick_device  # noqa: E402
from harness.pictures import names_of, save_grid  # noqa: E402
from tools.sweep import DIVERGED, Job, seconds_per_iteration, train_all  # noqa: E402


@dataclass
class Row:
    script: str
    flags: str | None  # besides --quick; None: no run of its own
    beside: str  # the row it is compared with
    report: str  # what the reference report says


SNGAN, CDCGAN, NO_EMA = "SNGAN", "cDCGAN", "no EMA"
NO_CLASSIFIER, SPECTRAL = "cDCGAN, no classifier", "spectral norm for penalties"
ROWS = {
    SNGAN: Row("sngan_iclevr", "", "", "0.79 and 0.82 at full size, by the course's judge"),
    "linear joining": Row("sngan_iclevr", "--label-embed linear", SNGAN, "finds no significant difference"),
    "no noise for D": Row("sngan_iclevr", "--no-add-noise", SNGAN, "finds noise best"),
    "flipped labels": Row("sngan_iclevr", "--flip-labels 0.1", SNGAN, "G collapsed to one object"),
    "4 D steps": Row("sngan_iclevr", "--n-dis 4", SNGAN, "uses 4"),
    NO_EMA: Row("sngan_iclevr", None, SNGAN, "uses no EMA"),
    "no auxiliary classifier": Row("sngan_iclevr", "--aux-weight 0", SNGAN, "uses none"),
    "hinge loss": Row("sngan_iclevr", "--loss hinge", SNGAN, "uses hinge"),
    "relativistic hinge": Row("sngan_iclevr", "--loss rahinge", "hinge loss", "finds it worse"),
    SPECTRAL: Row("sngan_iclevr", "--gamma 0 --d-norm spectral", SNGAN, "uses spectral norm"),
    "residual D": Row("sngan_iclevr", "--gamma 0 --d-norm spectral --d-net resnet", SPECTRAL, "uses it"),
    "residual G": Row("sngan_iclevr", "--g-net resnet", SNGAN, "uses it"),
    "no shifts": Row("sngan_iclevr", "--augment 0", SNGAN, ""),
    "constant rates": Row("sngan_iclevr", "--lr-decay-from 0", SNGAN, "uses them"),
    "paper's recipe": Row("sngan_iclevr", "--recipe paper --ema 0 --batch-size 64 --lr-g 1.2e-3 --lr-d 4e-4",
                          SNGAN, "uses all of it, at full width"),
    CDCGAN: Row("cdcgan_iclevr", "", SNGAN, "0.62 at full size, by the course's judge"),
    NO_CLASSIFIER: Row("cdcgan_iclevr", "--aux-weight 0", CDCGAN, "uses none"),
    "cDCGAN, labels joined": Row("cdcgan_iclevr", "--g-cond joint", CDCGAN, "joins them"),
    "cDCGAN, label map": Row("cdcgan_iclevr", "--d-cond plane --aux-weight 0", NO_CLASSIFIER, "uses it"),
    "cDCGAN, batch norm for penalties": Row("cdcgan_iclevr", "--gamma 0 --d-norm batch", CDCGAN,
                                            "uses batch norm"),
    "cDCGAN, paper's recipe": Row("cdcgan_iclevr", "--recipe paper --smooth-labels --batch-size 128", CDCGAN,
                                  "uses all of it, at full width"),
}
ALWAYS = ("--quick --judge-width 64 --judge-steps 5000 --eval-every 0 --sample-every 0 --log-every 50 "
          "--save-every 200")


def name(row: str, seed: int) -> str:
    """The folder of a run; "no EMA" scores G itself in the first row's runs."""
    return f"{row if row != NO_EMA else SNGAN}-{seed}".replace(", ", "-").replace(" ", "_")


def job_of(args, row: str, seed: int, iters: int) -> Job:
    text = f"{ALWAYS} {ROWS[row].flags} --seed {seed} --iters {iters}"
    flags = [*text.split(), "--data", args.data, "--device", args.device, *args.more]
    return Job(ROWS[row].script, args.out / name(row, seed), flags)


def paces(args) -> dict[str, float]:
    """Seconds per iteration of each row, by runs of 100 iterations with nothing beside them."""
    jobs = {row: job_of(args, row, 0, 100) for row, what in ROWS.items() if what.flags is not None}
    for row, job in jobs.items():
        job.folder = args.out / f"pace-{name(row, 0)}"
        job.flags += ["--judge", "none", "--log-every", "20"]
        job.check()
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}  # as in train_all
    for job in jobs.values():
        table = job.folder / "metrics.csv"
        if not (table.exists() and "\n100," in table.read_text()):  # not yet measured, or stopped
            done = subprocess.run(job.command(), env=threads | os.environ, stdout=subprocess.DEVNULL)
            if done.returncode:  # the run has said why
                sys.exit(done.returncode)
    return {row: seconds_per_iteration(job.folder / "metrics.csv") for row, job in jobs.items()}


def load(args, row: str, seed: int) -> tuple[torch.nn.Module, object, Data]:
    """G of a run's last checkpoint, averaged except for "no EMA"; its config; its data, without images."""
    folder, script = args.out / name(row, seed), importlib.import_module(ROWS[row].script)
    cfg = stored_config(script.Config, folder, f"{ROWS[row].script}.py", {}, [])
    state = load_verified(folder / "last.pt")
    data = Data.from_metadata(state["data"])
    kind = cfg.g_net if hasattr(cfg, "g_net") else cfg.g_cond
    G = script.Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size, kind)
    G.load_state_dict(state["G" if row == NO_EMA else "ema"])
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
            device, (G, cfg, _) = pick_device(args.device), load(args, row, seed)
            G, data = G.to(device), load_iclevr(cfg)

            def sample(n: int, g: torch.Generator, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return G(torch.randn(n, cfg.z_dim, generator=g).to(device), y.to(device)), y
            judge = evaluator.get_judge(cfg, data, device)
            write_json(path, evaluator.Scorer(cfg, data, judge, None, None).test(sample))
        kept = json.loads(path.read_text(encoding="utf-8"))
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
        found[row] = {"seeds": by_seed, "diverged": diverged, "written": what.report}
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

    The 95 % intervals are simultaneous (Dunnett 1955): they hold together for all rows beside the same one,
    and the spread over seeds is pooled over these rows. "no EMA" scores the same runs as the row it is
    beside, so its interval is that of a paired t-test.
    """
    values = {row: [mean(s.values()) for s in r["seeds"].values()] for row, r in found.items()
              if r["seeds"] and not r["diverged"]}  # the seeds that did not diverge would look too good
    for control in {ROWS[row].beside for row in values} & values.keys():
        rows = [row for row in values if ROWS[row].beside == control]
        for row in rows:
            found[row] |= {"beside": control, "difference": mean(values[row]) - mean(values[control])}
        if NO_EMA in rows:
            rows.remove(NO_EMA)
            if len(values[control]) > 1:
                interval = ttest_rel(values[NO_EMA], values[control]).confidence_interval(0.95)
                found[NO_EMA]["interval"] = [float(interval.low), float(interval.high)]
        if rows and sum(len(values[row]) for row in [control, *rows]) > len(rows) + 1:
            interval = dunnett(*(values[row] for row in rows), control=values[control],
                               random_state=0).confidence_interval(0.95)
            for row, low, high in zip(rows, interval.low, interval.high, strict=True):
                found[row]["interval"] = [float(low), float(high)]


def verdict(result: dict) -> str:
    """"better" or "worse" if the interval of the difference excludes zero."""
    if result["diverged"]:
        return f"diverged in {result['diverged']} of {result['diverged'] + len(result['seeds'])} runs"
    if "difference" not in result:
        return ""
    if "interval" not in result:
        return f"{result['difference']:+.3f} (single seeds)"
    low, high = result["interval"]
    word = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return f"{word}: {result['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def markdown(found: dict[str, dict]) -> str:
    lines = ["| | test | new_test | seeds, iterations, minutes | beside | here | report |",
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
    """Draw a strip per row: seed 0, the same six sets of test.json and, for one script, the same z."""
    strips = []
    for row in found:
        if 0 not in found[row]["seeds"]:
            continue
        G, cfg, data = load(args, row, 0)
        z = torch.randn(6, cfg.z_dim, generator=torch.Generator().manual_seed(0))
        sets = data.test_label_sets["test"]
        count = (sets < len(data.classes)).sum(1)
        chosen = sets[torch.cat([(count == k).nonzero()[:2, 0] for k in (1, 2, 3)])]
        title = f"{row}: two sets each of one, two and three objects"
        strips.append(save_grid(args.out / f"{row}.png", G(z[:len(chosen)], chosen), title, 6,
                                captions=names_of(chosen, data.classes)))
    if strips:
        canvas = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
        for i, strip in enumerate(strips):
            canvas.paste(strip, (0, sum(above.height for above in strips[:i])))
        atomic_write(path, lambda p: canvas.save(p, optimize=True))


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="time of a run (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds per row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", default="auto", help="i-CLEVR's folder, auto, or synthetic")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablations)")
    args = parser.parse_args(argv[:cut])
    args.more, args.data = argv[cut + 1:], pick_source(args.data, "data/iclevr")
    args.out = args.out or Path("runs/ablations" + "-synthetic" * (args.data == "synthetic"))
    if min(args.seeds, args.jobs) < 1 or not args.minutes > 0:
        raise UserError("--seeds and --jobs must be at least 1, --minutes more than 0")
    if not args.table:
        iters = {row: max(10, round(60 * args.minutes / pace)) for row, pace in paces(args).items()}
        jobs = [job_of(args, row, seed, n) for seed in range(args.seeds) for row, n in iters.items()]
        for job in jobs:
            job.check()
        # train the judge first, or several runs would each train the same one
        evaluator.get_judge(jobs[0].cfg, load_iclevr(jobs[0].cfg), pick_device(args.device))
        train_all(jobs, args.jobs)
    found = table(args)
    finished = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*/scores.json")]
    if not finished:
        print(f"{args.out}: no run is finished yet")
        return 0
    what = {f"{s['data']}; judge: {s['judge']}; {s['draws']} draws of z per seed" for s in finished}
    if len(what) > 1:
        raise UserError(f"{args.out} holds scores that can't be compared: {' and '.join(sorted(what))}")
    what = what.pop()
    sessions = [session for path in args.out.glob("*/config.json")
                for session in json.loads(path.read_text(encoding="utf-8"))["sittings"]]
    provenance = {key: ", ".join(sorted({session[key] for session in sessions}))
                  for key in ("commit", "hardware", "torch")}
    command = " ".join(["tools/ablations.py --data", args.data, f"--minutes {args.minutes:g}",
                        f"--seeds {args.seeds}", *(["--", *args.more] if args.more else [])])
    write_json(args.out / "ablations.json", {"command": command, "what": what, **provenance, "rows": found})
    save_strips(args, found, args.out / "ablations.png")
    print(f"\n{what}:\n\n{markdown(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
