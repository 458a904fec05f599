"""Keep a finished run's figures under results/, and build the tables of both READMEs from all that is kept.

    python results/record.py runs/NAME KEPT_AS [--note TEXT]   # as results/KEPT_AS.json and .png
    python results/record.py                                   # only build the tables

The kept grid is test.png or samples.png; --grids names others to keep beside it. A folder that
benchmarks/sweep.py or ablations.py filled is kept as one, with a table and a picture of its own: a strip of
each run. With --generator only the run's generator is kept, in generators/KEPT_AS: a folder for --sample and
--eval.
"""
import json
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))
from benchmarks.ablations import markdown  # noqa: E402
from benchmarks.sweep import seconds_per_iteration  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import UserError, exit_status  # noqa: E402
from common.pictures import OBJECT_SIZE  # noqa: E402
from common.system import load_checked, write_json  # noqa: E402

END = "<!-- end -->"
CAPTIONS = "black white gray red blue green brown purple cyan yellow".split()  # common/pictures.py's glyphs
DIGITS = ("dcgan_mnist.py", "infogan_mnist.py")  # their summary and pictures are of last.pt
# the README's table: script, paper, kept record, the write-up's figure
SCRIPTS = (
    ("dcgan_mnist.py", "DCGAN, Radford et al. 2016", "dcgan_quick", "FID < 60"),
    ("infogan_mnist.py", "InfoGAN, Chen et al. 2016", "infogan_quick", "pictures; the paper: 0.95"),
    ("acgan_celeba.py", "ACGAN, Odena et al. 2017", "acgan_real", "FID 44.3 to 216.2 on cartoon faces"),
    ("vae_celeba.py", "VAE, Kingma & Welling 2014", "vae_real", "pictures"),
    ("sngan_iclevr.py", "SNGAN, Miyato et al. 2018; projection, Miyato & Koyama 2018", "sngan_real",
     "accuracy 0.79 and 0.82"),
    ("cdcgan_iclevr.py", "conditional DCGAN, Mirza & Osindero 2014", "cdcgan_real", "accuracy 0.62"),
)


def figures(folder: Path) -> dict:
    """What is kept of a run: config, scores, seconds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    last_row = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    pace = seconds_per_iteration(folder / "metrics.csv")
    sittings = [sitting | {"command": short(sitting["command"])[7:]} for sitting in config["sittings"]]
    return {"script": config["script"], "command": sittings[0]["command"],
            "seconds": round(float(last_row[1])), "iterations": int(last_row[0]),
            "seconds_per_1000_iterations": round(1000 * pace, 1), "scores": scores,
            "sittings": sittings, "config": config["config"] | {"out": ""}}  # a path of this machine


def keep(image: Image.Image, path: Path) -> None:
    """Save a PNG of 256 colours, fewer if it has over 300 KB: pictures weigh on every clone.

    Most of them would be greys of a floor: captions have theirs, and k-means finds those of small objects.
    """
    image, palette = image.convert("RGB"), Image.new("P", (1, 1))
    exact = [value for name in CAPTIONS for value in ImageColor.getrgb(name)]
    for colours in (256, 128, 64):
        found = image.quantize(colours - len(CAPTIONS), kmeans=3).getpalette()
        palette.putpalette(exact + found[:3 * (colours - len(CAPTIONS))])
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= 300_000:
            break


def grid_of(folder: Path) -> Image.Image:
    return Image.open(next(p for p in (folder / "test.png", folder / "samples.png") if p.is_file()))


def record(folder: Path, name: str, note: str, grids: list[str]) -> None:
    """results/NAME.json from the run's config, scores and metrics; its grid as NAME.png, others beside."""
    if (folder / "ablations.json").is_file():
        if note or grids:
            raise UserError("--note and --grids are not for ablations")
        kept = json.loads((folder / "ablations.json").read_text(encoding="utf-8"))
        keep(Image.open(folder / "ablations.png"), RESULTS / f"{name}.png")
    elif (folder / "sweep.csv").is_file():
        runs = sorted((p.parent for p in folder.glob("*/scores.json")), key=lambda p: p.stat().st_ctime)
        unscored = sorted({p.parent.name for p in folder.glob("*/config.json")} - {run.name for run in runs})
        kept = {"note": note, "grids": grids, "runs": {run.name: figures(run) for run in runs},
                "diverged or not finished": unscored}
        first = next(iter(kept["runs"].values()))
        height = width = max(64, first["config"].get("image_size", 0))  # smaller ones are enlarged
        if "iclevr" in first["script"]:
            height += OBJECT_SIZE + 2  # the requested objects below each image
        keep(strips({run.name: grid_of(run) for run in runs}, width, height), RESULTS / f"{name}.png")
    else:
        kept = {"note": note, "grids": grids} | figures(folder)
        keep(grid_of(folder), RESULTS / f"{name}.png")
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    for grid in grids:
        keep(Image.open(folder / f"{grid}.png"), RESULTS / f"{name}_{grid}.png")


def keep_generator(folder: Path, target: Path) -> None:
    """A run in `target` that holds the generator alone, in half precision: the one that the summary is of."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = "last" if config["script"] in DIGITS else "best"
    state = load_checked(folder / f"{name}.pt")
    weights = {key: x.half() if x.is_floating_point() else x for key, x in state["ema"].items()}
    kept = {key: state[key] for key in ("step", "best", "data")} | {"means": {}, "rng": []}
    settings = config["config"] | {"out": "", "precision": "auto"}
    target.mkdir(parents=True, exist_ok=True)
    torch.save(kept | {"ema": weights, "only": ["ema"]}, target / f"{name}.pt")
    write_json(target / "config.json", config | {"config": settings, "sittings": []})
    shutil.copy(folder / "scores.json", target)


def strips(grids: dict[str, Image.Image], width: int = 64, height: int = 64) -> Image.Image:
    """The last eight images of each grid (its last line, if that has fewer) in a row with its name.

    width, height: of an image with its caption, in pixels. In a sweep of one seed the rows have the same z.
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
    """The mean to the first digit of its spread, four decimals at most; one draw has no spread."""
    if not std:
        return f"{mean:.4g}"
    decimals = min(4, max(0, -math.floor(math.log10(std))))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def short(command: str) -> str:
    """A command without the flags that change no score, and without folders of this machine."""
    command = re.sub(r"--resume \S+", "--resume RUN", command)
    return "python " + re.sub(r" --(log-every|sample-every|save-every|out) \S+", "", command)


def summary_step(kept: dict) -> int:
    """The iteration of the checkpoint that the summary is of: the last one for digits, else the best."""
    last = kept["script"] in DIGITS or "best" not in kept["scores"]
    return kept["scores"]["last" if last else "best"]["step"]


def data_of(kept: dict) -> str:
    return kept["scores"]["data"].replace("drawn", "synthetic")  # the earlier name, in kept records


def hardware(kept: dict) -> str:
    known = kept["hardware"] if "hardware" in kept else kept["sittings"][0]["hardware"]
    return known.replace(" 1 threads", " 1 thread")


def minutes(kept: dict) -> str:
    return f"{kept['iterations']:,} in {kept['seconds'] / 60:.0f} min"


def blocks() -> dict[Path, dict[str, str]]:
    """{README: {marker: what stands between it and END}}."""
    kept = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))}
    sweeps = [sweep_table(name, k) for name, k in kept.items() if "runs" in k]
    found = {"<!-- runs -->": "\n".join(run_rows(kept)), "<!-- sweeps -->": "\n\n".join(sweeps)}
    for name, k in kept.items():
        if "rows" in k:
            links = f"[a strip of each]({name}.png), [all figures]({name}.json)"
            found[f"<!-- {name} -->"] = (f"`python {k['command']}` on {k['what']}; {hardware(k)} a run "
                                         f"({links}):\n\n{markdown(k['rows'])}")
        if "scripts" in k:
            about = f"`python {k['command']}` ({hardware(k)}; [figures]({name}.json))"
            found[f"<!-- {name} -->"] = f"{about}:\n\n{speed(k['scripts'])}"
    return {ROOT / "README.md": {"<!-- scripts -->": "\n".join(script_rows(kept))},
            RESULTS / "README.md": found}


def script_rows(kept: dict[str, dict]) -> list[str]:
    """The README's table: a row for each script."""
    lines = ["| script | paper | data | score | iterations, time | write-up |", "| --- " * 6 + "|"]
    for script, paper, name, write_up in SCRIPTS:
        runs = list(kept[name].get("runs", {"": kept[name]}).values())
        k, summaries = runs[0], [run["scores"]["summary"] for run in runs]
        scores = {c: [summary[c][0] for summary in summaries] for c in list(summaries[0])[:3]}
        text = ", ".join(f"{c} {number(mean(v), stdev(v) if v[1:] else summaries[0][c][1])}"
                         for c, v in scores.items())
        size = k["config"].get("image_size", 32)
        cells = [f"[{script}]({script})", paper, f"{data_of(k)}, {size}×{size}",
                 f"{text} ({f'{len(runs)} seeds' if runs[1:] else 'one seed'})",
                 f"{minutes(k)}, {hardware(k)}", write_up]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed(scripts: dict[str, dict[str, float]]) -> str:
    """Seconds an iteration takes, and ratios: a line for each script."""
    columns = list(next(iter(scripts.values())))
    lines = [f"| seconds an iteration | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{value:.3g}' for value in row.values())} |"
              for name, row in scripts.items()]
    return "\n".join(lines)


def sweep_table(name: str, kept: dict) -> str:
    """A sweep's command, judge and hardware, and a line for each of its runs."""
    first = next(iter(kept["runs"].values()))
    pictures = {"a strip of each": f"{name}.png"} | {g: f"{name}_{g}.png" for g in kept["grids"]}
    pictures["all figures"] = f"{name}.json"
    links = ", ".join(f"[{text}]({file})" for text, file in pictures.items())
    scores, note = first["scores"], f"; {kept['note']}" if kept["note"] else ""
    lines = [f"`{short(first['command'])}` on {data_of(first)}, {scores['draws']} draws; judge: "
             f"{scores['judge']}; {hardware(first)}{note} ({links}):", "",
             f"| run | {' | '.join(scores['summary'])} | after | iterations, time |",
             "| --- " * (3 + len(scores["summary"])) + "|"]
    for run, k in kept["runs"].items():
        values = [number(*value) for value in k["scores"]["summary"].values()]
        lines.append(f"| {run} | {' | '.join(values)} | {summary_step(k):,} | {minutes(k)} |")
    lines += [f"| {run} | diverged or not finished |" for run in kept.get("diverged or not finished", [])]
    return "\n".join(lines)


def run_rows(kept: dict[str, dict]) -> list[str]:
    """One line for each kept run."""
    lines = ["| run | data | scores, after … iterations | judge | iterations, time, hardware | pictures |",
             "| --- " * 6 + "|"]
    runs = [(k["script"], k["iterations"], name) for name, k in kept.items() if "scores" in k]
    for *_, name in sorted(runs):
        k = kept[name]
        scores = ", ".join(f"{c} {number(*v)}" for c, v in k["scores"]["summary"].items())
        pace = f" ({k['seconds_per_1000_iterations']:,.0f} s per 1,000)" if k.get(
            "seconds_per_1000_iterations") else ""
        pictures = {"grid": f"{name}.png"} | {g: f"{name}_{g}.png" for g in k.get("grids", [])}
        pictures["all figures"] = f"{name}.json"
        cells = [f"`{short(k['command'])}`" + (f"<br>{k['note']}" if k["note"] else ""), data_of(k),
                 f"{scores} ({k['scores']['draws']} draws), after {summary_step(k):,}", k["scores"]["judge"],
                 f"{minutes(k)}{pace} on {hardware(k)}",
                 ", ".join(f"[{text}]({file})" for text, file in pictures.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of a run, a sweep or ablations")
    parser.add_argument("name", nargs="?", help="what to keep it as")
    parser.add_argument("--note", default="", help="a remark for the table")
    parser.add_argument("--grids", nargs="*", default=[], help="pictures to keep beside it: interpolation …")
    parser.add_argument("--generator", action="store_true", help="keep only the generator")
    args = parser.parse_args()
    files = "scores.json", "sweep.csv", "ablations.json"
    finished = args.folder and any((args.folder / file).is_file() for file in files)
    if args.folder and not (args.name and finished):
        raise UserError(f"{args.folder}: give a folder with {' or '.join(files)} (see --eval), and a name")
    if args.folder:
        if args.generator:
            keep_generator(args.folder, ROOT / "generators" / args.name)
        else:
            record(args.folder, args.name, args.note, args.grids)
    for path, parts in blocks().items():
        text = path.read_text(encoding="utf-8")
        for marker, block in parts.items():
            before, rest = text.split(marker)
            text = before + marker + "\n" + block + "\n" + END + rest.split(END, 1)[1]
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_status(main))
