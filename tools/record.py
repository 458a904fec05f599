"""Keep a finished run under results/, and build results/runs.md and the tables of both READMEs.

    python tools/record.py runs/NAME KEPT_AS [--note TEXT]   # keep it as results/records/KEPT_AS.json
    python tools/record.py                                   # only build the tables

The sample grid is kept as results/figures/KEPT_AS.webp; --grids names more of the run's pictures to keep. A
folder of tools/sweep.py or tools/ablations.py is kept as one record, with one picture: a strip of each run.
With --generator only the generator is kept, in pretrained/generators/KEPT_AS, for --sample and --eval.
"""
import csv
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import UserError, load_verified, write_json  # noqa: E402
from harness.cli import Parser, exit_status  # noqa: E402
from harness.pictures import OBJECT_SIZE  # noqa: E402
from tools.ablations import markdown  # noqa: E402
from tools.sweep import seconds_per_iteration  # noqa: E402

RESULTS = ROOT / "results"
END = "<!-- end -->"
DIGITS = ("dcgan_mnist.py", "infogan_mnist.py")  # last.pt is what their summary and pictures show
# README's table: script, method, record, flags for such a run today, record of the paper's recipe, report
SCRIPTS = (
    ("dcgan_mnist.py", "DCGAN, Radford et al. 2016", "dcgan_quick", "--quick", "dcgan_paper", "FID below 60"),
    ("infogan_mnist.py", "InfoGAN, Chen et al. 2016", "infogan_quick", "--quick", "infogan_paper",
     "pictures; InfoGAN's paper: 0.95"),
    ("acgan_celeba.py", "ACGAN, Odena et al. 2017", "acgan_real", "--recipe r3gan --ch 16 --image-size 64 "
     "--aux-weight 0.05 --lr-decay-from 0.5 --iters 20000", "acgan_celeba_variants",
     "FID 44.3 to 216.2 on cartoon faces"),
    ("vae_celeba.py", "VAE, Kingma & Welling 2014", "vae_real", "--recipe beta --ch 32 --image-size 64 "
     "--iters 5500", "vae_paper", "pictures"),
    ("sngan_iclevr.py", "SNGAN, Miyato et al. 2018; projection, Miyato & Koyama 2018", "sngan_real",
     "--recipe r3gan --ch 20 --batch-size 16 --iters 12000", "sngan_written", "accuracy 0.79 and 0.82"),
    ("cdcgan_iclevr.py", "conditional DCGAN, Mirza & Osindero 2014", "cdcgan_real",
     "--recipe r3gan --ch 24 --batch-size 16 --iters 6500", "cdcgan_written", "accuracy 0.62"),
)
ABOUT = """# All runs

`python tools/record.py` writes this page from [records](records); [README.md](README.md) explains the scores.
Commands are quoted as they were run at the commit that follows; some of their flags have since been renamed.
Scores are means ± standard deviations over samples of z.
"""


def figures(folder: Path) -> dict:
    """What is kept of a run: config, scores, seconds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    with open(folder / "metrics.csv", newline="") as f:
        rows = {int(row["step"]): row for row in csv.DictReader(f)}
    last_row, shown = rows[max(rows)], rows.get(scores.get("best", scores["last"])["step"], {})
    pace = seconds_per_iteration(folder / "metrics.csv")
    sessions = [session | {"command": short(session["command"])} for session in config["sittings"]]
    return {"script": config["script"], "command": sessions[0]["command"],
            "seconds": round(float(last_row["seconds"])), "iterations": max(rows),
            "seconds_per_1000_iterations": round(1000 * pace, 1), "scores": scores,
            "by_chooser": {name.replace("_", " ", 1): float(value) for name, value in shown.items()
                           if name in ("accuracy_test", "accuracy_new_test", "accuracy") and value},
            "sittings": sessions, "config": config["config"] | {"out": ""}}  # a path of this machine


def keep(image: Image.Image, path: Path) -> None:
    """Save a WebP file, lossless where that is smaller (digits, curves), since every clone downloads it."""
    found = []
    for options in (dict(lossless=True, quality=100), dict(quality=75, use_sharp_yuv=True)):
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", method=6, **options)
        found.append(file.getvalue())
    path.write_bytes(min(found, key=len))


def grid_of(folder: Path) -> Image.Image:
    files = (folder / f"{name}.png" for name in ("ablations", "test", "samples"))
    return Image.open(next(file for file in files if file.is_file()))


def record(folder: Path, name: str, note: str, grids: list[str]) -> None:
    """Write a run, a sweep or ablations as records/NAME.json, and the pictures as figures/NAME*.webp."""
    if (folder / "ablations.json").is_file():
        kept, picture = json.loads((folder / "ablations.json").read_text(encoding="utf-8")), grid_of(folder)
    elif (folder / "sweep.csv").is_file():
        runs = sorted((p.parent for p in folder.glob("*/scores.json")), key=lambda p: p.stat().st_ctime)
        unscored = sorted({p.parent.name for p in folder.glob("*/config.json")} - {run.name for run in runs})
        kept = {"runs": {run.name: figures(run) for run in runs}, "diverged or not finished": unscored}
        first = kept["runs"][runs[0].name]
        width = max(64, first["config"].get("image_size", 0))  # smaller images are enlarged
        below = OBJECT_SIZE + 2 if "iclevr" in first["script"] else 0  # the objects requested in each image
        picture = strips({run.name: grid_of(run) for run in runs}, width, width + below)
    else:
        kept, picture = figures(folder), grid_of(folder)
    write_json(RESULTS / "records" / f"{name}.json", {"note": note, "grids": grids} | kept)
    keep(picture, RESULTS / "figures" / f"{name}.webp")
    for grid in grids:
        keep(Image.open(folder / f"{grid}.png"), RESULTS / "figures" / f"{name}_{grid}.webp")


def keep_generator(folder: Path, target: Path) -> None:
    """Write a run folder with only the generator that the summary scores, in half precision."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = "last" if config["script"] in DIGITS else "best"
    state = load_verified(folder / f"{name}.pt")
    weights = {key: x.half() if x.is_floating_point() else x for key, x in state["ema"].items()}
    kept = {key: state[key] for key in ("step", "best", "data")} | {"means": {}, "rng": []}
    settings = config["config"] | {"out": "", "precision": "auto"}
    target.mkdir(parents=True, exist_ok=True)
    torch.save(kept | {"ema": weights, "only": ["ema"]}, target / f"{name}.pt")
    write_json(target / "config.json", config | {"config": settings, "sittings": []})
    shutil.copy(folder / "scores.json", target)


def strips(grids: dict[str, Image.Image], width: int = 64, height: int = 64) -> Image.Image:
    """The last eight images of each grid, or its last row if that is shorter, under the run's name.

    width and height are those of an image with its caption, in pixels. Runs of one seed show the same z.
    """
    widths = [min(8 * (width + 2) + 2, grid.width) for grid in grids.values()]
    canvas = Image.new("RGB", (max(widths), len(grids) * (height + 20)), "white")
    for i, ((name, grid), wide) in enumerate(zip(grids.items(), widths, strict=True)):
        y = i * (height + 20)
        ImageDraw.Draw(canvas).text((3, y + 1), name, fill="black", font=ImageFont.load_default(size=11))
        last = grid.width - wide, grid.height - height - 4, grid.width, grid.height
        canvas.paste(grid.convert("RGB").crop(last), (0, y + 15))
    return canvas


# ---------------------------------------------------------------------- the tables

def number(mean: float, std: float) -> str:
    """The mean to the first digit of its spread, at most four decimals; four digits if there is no spread."""
    decimals = min(4, max(0, -math.floor(math.log10(std)))) if std else 0
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}" if std else f"{mean:.4g}"


def short(command: str) -> str:
    """A command without folders of this machine and without flags that change no score."""
    command = re.sub(r"^python ('[^']*/|\S*/)?(\w+\.py)'?", r"\2", command)
    command = re.sub(r"--resume \S+", "--resume RUN", command)
    return re.sub(r" --(log-every|sample-every|save-every|out) \S+", "", command)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def scores_of(summary: dict[str, list], most: int | None = None) -> str:
    return ", ".join(f"{column} {number(*value)}" for column, value in list(summary.items())[:most])


def time_of(run: dict) -> str:
    hardware = run["sittings"][0]["hardware"]
    return (f"{run['iterations']:,} iterations in {run['seconds'] / 60:.0f} min, {hardware}, "
            f"{run['config']['precision']}")


def heading(name: str, kept: dict) -> str:
    """A record's command and commit, remarks, and links to it and to those of its pictures that exist."""
    run = next(iter(kept.get("runs", {"": kept}).values()))
    command = f"`python {short(run['command'])}` at {run.get('sittings', [run])[0]['commit']}"
    files = {"record": f"records/{name}.json", "picture": f"figures/{name}.webp",
             **{grid: f"figures/{name}_{grid}.webp" for grid in kept.get("grids", [])}}
    links = ", ".join(f"[{text}]({file})" for text, file in files.items() if (RESULTS / file).is_file())
    return "; ".join(filter(None, [command, *map(kept.get, ("what", "hardware", "note"))])) + f" ({links})"


def run_table(runs: dict[str, dict]) -> str:
    """A row for each run {its first cell: run}."""
    rows = []
    for name, run in runs.items():
        scores, last = run["scores"], run["script"] in DIGITS or "best" not in run["scores"]
        rows.append([name, scores["data"], run["config"]["recipe"], scores["judge"],
                     f"{scores_of(scores['summary'])} ({scores['draws']} samples of z)",
                     f"{scores['last' if last else 'best']['step']:,}", time_of(run)])
    return table("run, data, recipe, judge, scores, of iteration, time and hardware".split(", "), rows)


def judge_table(kept: dict[str, dict]) -> str:
    """What the judge that reports and the one that chose best.pt read of the same checkpoint."""
    runs = {name: k for name, k in kept.items() if "scores" in k}
    runs |= {f"{name}, {key}": run for name, k in kept.items() for key, run in k.get("runs", {}).items()}
    rows = []
    for name, run in runs.items():
        scores, chosen = run["scores"], run.get("by_chooser", {})
        if "chosen_by" in scores and chosen:
            reported = {key: value for key, value in scores["summary"].items() if key in chosen}
            values = ", ".join(f"{key} {value:.3f}" for key, value in chosen.items())
            rows.append([name, scores_of(reported), scores["judge"], values, scores["chosen_by"]])
    return table(["run", "reported", "by the judge", "the chooser's figure", "by the judge"], rows)


def script_table(kept: dict[str, dict]) -> str:
    """README's table: a row for each script."""
    rows = []
    for script, method, name, flags, paper, report in SCRIPTS:
        runs = list(kept[name].get("runs", {"": kept[name]}).values())
        run, seeds = runs[0], f"{len(runs)} seeds" if runs[1:] else "one seed"
        if script not in DIGITS and "chosen_by" not in run["scores"]:
            seeds += ", by the judge that chose the checkpoint"
        size, summary = run["config"].get("image_size", 32), run["scores"]["summary"]
        if runs[1:]:
            values = {column: [k["scores"]["summary"][column][0] for k in runs] for column in summary}
            summary = {column: [mean(v), stdev(v)] for column, v in values.items()}
        variants = kept[paper].get("runs", {"": kept[paper]}).values()
        best = min(variants, key=lambda k: k["scores"]["summary"].get("FD (judge)", [0]))
        remarks = [f"best of {len(variants)} variants"] * (len(variants) > 1) + [time_of(best)]
        remarks += ["another judge"] * (best["scores"]["judge"] != run["scores"]["judge"])
        here = f"{scores_of(best['scores']['summary'], 2)} ({', '.join(remarks)})"
        rows.append([f"[{script}]({script})", method, f"{run['scores']['data']}, {size}×{size}",
                     f"{scores_of(summary, 4)} ({seeds})", f"{run['config']['recipe']}: `{flags}`",
                     time_of(run), here, report])
    return table(["script", "method", "data", "result", "recipe", "time and hardware",
                  "the paper's recipe, here", "reference report"], rows)


def pages() -> dict[Path, str]:
    """{file: its text with the tables of today's records}: runs.md, and the READMEs with their markers."""
    files = sorted((RESULTS / "records").glob("*.json"))
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    single = sorted((k["script"], k["iterations"], name) for name, k in kept.items() if "scores" in k)
    found = {"Two judges": judge_table(kept),
             "Runs": run_table({f"{n}: {heading(n, kept[n])}": kept[n] for *_, n in single})}
    for name, k in kept.items():
        if "runs" in k:
            lost = [f"\n| {run} | diverged or not finished |" for run in k["diverged or not finished"]]
            text = "".join([run_table(k["runs"]), *lost])
        elif "rows" in k:
            text = markdown(k["rows"])
        elif "scripts" in k:
            rows = [[script, *(f"{x:.3g}" for x in row.values())] for script, row in k["scripts"].items()]
            text = table(["seconds per iteration", *next(iter(k["scripts"].values()))], rows)
        else:
            continue
        found[name] = f"{heading(name, k)}:\n\n{text}"
    texts = {RESULTS / "runs.md": ABOUT + "".join(f"\n## {name}\n\n{text}\n" for name, text in found.items())}
    for path in (ROOT / "README.md", RESULTS / "README.md"):
        texts[path] = path.read_text(encoding="utf-8")
        for name, text in (found | {"scripts": script_table(kept)}).items():
            before, marker, rest = texts[path].partition(f"<!-- {name} -->\n")
            if marker:
                texts[path] = before + marker + text + "\n" + END + rest.split(END, 1)[1]
    return texts


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of a run, a sweep or ablations")
    parser.add_argument("name", nargs="?", help="what to keep it as")
    parser.add_argument("--note", default="", help="a remark for the table")
    parser.add_argument("--grids", nargs="*", default=[], help="further pictures to keep: interpolation …")
    parser.add_argument("--generator", action="store_true", help="keep only the generator")
    args = parser.parse_args()
    files = "scores.json", "sweep.csv", "ablations.json"
    if args.folder and not (args.name and any((args.folder / file).is_file() for file in files)):
        raise UserError(f"{args.folder}: give a folder with {' or '.join(files)} (see --eval), and a name")
    if args.folder and args.generator:
        keep_generator(args.folder, ROOT / "pretrained" / "generators" / args.name)
    elif args.folder:
        record(args.folder, args.name, args.note, args.grids)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_status(main))
