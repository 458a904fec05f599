"""The effect of each condition and trick of the i-CLEVR write-ups: one change at a time, three seeds.

    python benchmarks/ablations.py             # narrow, 32×32; under two hours on two cores
    python benchmarks/ablations.py --full      # both scripts at full size, on a GPU
    python benchmarks/ablations.py --table     # only table and picture, of the finished runs

Each run is a process of sngan_iclevr.py or cdcgan_iclevr.py, as in benchmarks/sweep.py. All of one script get
about the same time: a change that makes iterations slower gets fewer. Narrow, both scripts get the same time;
at full size each trains as long as its write-up's. After Ctrl-C the same command continues. The figures are
of the last iteration, on both test lists: means over seeds of means over draws of z.
"""
import importlib
import json
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
from benchmarks.sweep import DIVERGED, Job, train_all  # noqa: E402
from common import datasets  # noqa: E402
from common.cli import Parser, parse  # noqa: E402
from common.errors import UserError, exit_status  # noqa: E402
from common.pictures import names_of, save_grid  # noqa: E402
from common.system import pick_device, write_json, write_whole  # noqa: E402


@dataclass
class Row:
    script: str
    flags: dict[str, str | None]  # by size, in addition to those of SIZES; None: no run of its own
    beside: str  # the row it is compared with
    written: str  # what the write-up reports


def both(flags: str) -> dict[str, str | None]:
    return {"narrow": flags, "full": flags}


SNGAN, DCGAN, NO_EMA = "SNGAN, projection", "DCGAN, concat", "no EMA"
ROWS = {
    SNGAN: Row("sngan_iclevr", both(""), "", "0.79 and 0.82, at full size, by the course's judge"),
    "linear joining": Row("sngan_iclevr", both("--label-embed linear"), SNGAN, "no significant difference"),
    "no noise for D": Row("sngan_iclevr", both("--no-add-noise"), SNGAN, "noise is best"),
    "flipped labels": Row("sngan_iclevr", both("--flip-labels 0.1"), SNGAN, "G collapsed to one object"),
    "relativistic": Row("sngan_iclevr", both("--loss relativistic"), SNGAN, "worse"),
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
    "DCGAN, flipped labels": Row("cdcgan_iclevr", both("--flip-labels 0.1"), DCGAN, "not given"),
}
NARROW = "--image-size 32 --ch 16 --n-scenes 2000 --ema 0.99"
SIZES = {  # narrow: as long as the two hours allow
    "narrow": {"sngan_iclevr": f"{NARROW} --batch-size 16 --iters 2200 --lr-g 1.2e-3 --lr-d 6e-4 --n-dis 1 "
                               "--label-embed sum",
               "cdcgan_iclevr": f"{NARROW} --batch-size 32 --iters 7500 --lr-g 1e-3 --lr-d 5e-4 "
                                "--halve-every 0"},
    "full": {"sngan_iclevr": "--label-embed sum", "cdcgan_iclevr": "--ema 0.999"},  # as sngan_iclevr's
}
JUDGE = {"narrow": "--judge-width 24 --judge-steps 4000", "full": "--judge-width 64 --judge-steps 5000"}
KEEP = {"narrow": "--save-every 50", "full": "--save-every 1000"}


def name(row: str, seed: int) -> str:
    """The folder of a run; "no EMA" is G itself of the first row's runs."""
    return f"{(row if row != NO_EMA else SNGAN).replace(', ', '-').replace(' ', '_')}-{seed}"


def flags_of(args, size: str, row: str, seed: int) -> list[str]:
    what = ROWS[row]
    text = f"{SIZES[size][what.script]} {what.flags[size]} {JUDGE[size]} {KEEP[size]} --eval-every 0 " \
           f"--sample-every 0 --log-every 50 --seed {seed}"
    return [*text.split(), "--data", args.data, "--device", args.device]


def jobs_of(args, size: str) -> list[Job]:
    """Every run, seed by seed."""
    return [Job(what.script, args.out / name(row, seed), flags_of(args, size, row, seed))
            for seed in range(args.seeds) for row, what in ROWS.items() if what.flags[size] is not None]


def load(folder: Path, key: str) -> tuple:
    """G of a run's last checkpoint, averaged ("ema") or not ("G"); its config and data."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    script = importlib.import_module(stored["script"][:-3])
    cfg = script.Config(**stored["config"])
    data = datasets.load_iclevr(cfg)
    G = script.Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size)
    G.load_state_dict(torch.load(folder / "last.pt", map_location="cpu", weights_only=True)[key])
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
            device, (G, cfg, data) = pick_device(args.device), load(folder, "G")
            G, judge = G.to(device), evaluator.get_judge(cfg, data, device)

            def sample(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return G(z.to(device), y.to(device))
            found = evaluator.score_sets(sample, cfg.z_dim, judge, data.tests, cfg.eval_draws, cfg.seed + 1)
            write_json(path, found)
        kept = json.loads(path.read_text())
    return {test: kept[f"accuracy {test}"][0] for test in ("test", "new_test")}


def minutes_trained(folder: Path) -> float:
    return float((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1]) / 60


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
            found[row]["minutes"] = mean(minutes_trained(args.out / name(row, seed)) for seed in by_seed)
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
    lines = ["| | test | new_test | seeds, minutes each | beside | here | write-up |",
             "| --- " * 7 + "|"]
    for row, r in found.items():
        cells = ["–" if test not in r else f"{r[test][0]:.3f}" if r[test][1] is None else
                 f"{r[test][0]:.3f} ± {r[test][1]:.3f}" for test in ("test", "new_test")]
        runs = f"{len(r['seeds'])}" + (f", {r['minutes']:.1f}" if "minutes" in r else "")
        lines.append(f"| {' | '.join([row, *cells, runs, r.get('beside', ''), verdict(r), r['written']])} |")
    return "\n".join(lines)


def save_strips(args, found: dict[str, dict], path: Path) -> None:
    """A strip for each row, of seed 0: the same twelve sets of test.json and, within a script, the same z."""
    strips = []
    for row in found:
        if 0 not in found[row]["seeds"]:
            continue
        G, cfg, data = load(args.out / name(row, 0), "G" if row == NO_EMA else "ema")
        z = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))[:, :cfg.z_dim]
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
    parser = Parser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="full width and length, for a GPU")
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds a row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", default="auto", help="i-CLEVR's folder, auto, or synthetic")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablations-SIZE)")
    parser.add_argument("--keep", type=Path, help="where to: FILE.json and FILE.png (default: in --out)")
    args = parser.parse_args()
    size, args.data = "full" if args.full else "narrow", datasets.pick_source(args.data, "data/iclevr")
    args.out = args.out or Path("runs") / (f"ablations-{size}" + "-synthetic" * (args.data == "synthetic"))
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    jobs = jobs_of(args, size)
    for job in jobs:
        job.check()
    if not args.table:  # the judge first, before several runs would train the same one
        module = importlib.import_module(jobs[0].script)
        cfg = parse(module.Config, module.QUICK, "", jobs[0].flags)[1]
        evaluator.get_judge(cfg, datasets.load_iclevr(cfg), pick_device(cfg.device))
        train_all(jobs, args.jobs)
    found = table(args)
    finished = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*/scores.json")]
    if not finished:
        print(f"{args.out}: no run is finished yet")
        return 0
    what = {f"{s['data']}, {size}; judge: {s['judge']}; {s['draws']} draws of z a seed" for s in finished}
    if len(what) > 1:
        raise UserError(f"{args.out} holds scores that can't be compared: {' and '.join(sorted(what))}")
    what = what.pop()
    print(f"\n{what}:\n\n{markdown(found)}")
    keep = args.keep or args.out / "ablations"
    sittings = [sitting for path in args.out.glob("*/config.json")
                for sitting in json.loads(path.read_text(encoding="utf-8"))["sittings"]]
    circumstances = {k: ", ".join(sorted({sitting[k] for sitting in sittings}))
                     for k in ("commit", "hardware", "torch")}
    command = f"benchmarks/ablations.py{' --full' * args.full} --data {args.data} --seeds {args.seeds}"
    content = {"command": command, "what": what, **circumstances, "rows": found}
    write_json(keep.with_suffix(".json"), content)
    save_strips(args, found, keep.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
