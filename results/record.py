"""Keep a finished run's figures under results/, and build the README's tables from all that is kept.

    python results/record.py runs/NAME KEPT_AS [--note TEXT]   # as results/KEPT_AS.json and .png
    python results/record.py                                   # only build the tables

The grid kept is the first that is there of test.png and samples.png; --grids names others to keep beside it.
A folder that --sweep filled is kept as one, with a table and a picture of its own: a strip from each run.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
sys.path.insert(0, str(RESULTS.parent))
from benchmarks.ablations import markdown  # noqa: E402
from common.run import seconds_per_iteration  # noqa: E402
OVERVIEW = {  # of kept grids, the README's first picture
    "dcgan_mnist.py": "dcgan_latent16_hidden100", "infogan_mnist.py": "infogan_ch16_seed0",
    "acgan_celeba.py": "acgan_celeba_variants_attributes", "vae_celeba.py": "vae_celeba_arithmetic",
    "sngan_iclevr.py": "sngan_real_ch16", "cdcgan_iclevr.py": "cdcgan_narrow_projection",
}
START, END = "<!-- results: built by results/record.py -->", "<!-- end of results -->"


def figures(folder: Path) -> dict:
    """What is kept of a run: config, scores, seconds."""
    config = json.loads((folder / "config.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    last_row = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    pace = seconds_per_iteration(folder / "metrics.csv")
    return {"script": config["script"], "command": config["sittings"][0]["command"],
            "seconds": round(float(last_row[1])), "iterations": int(last_row[0]),
            "seconds_per_1000_iterations": round(1000 * pace, 1), "scores": scores,
            "sittings": config["sittings"], "config": config["config"]}


def keep(image: Image.Image, path: Path) -> None:
    """As a PNG, of 256 colours where it would be more than 300 KB: pictures weigh on every clone."""
    image.save(path, optimize=True)
    if path.stat().st_size > 300_000:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def grid_of(folder: Path) -> Image.Image:
    return Image.open(next(p for p in (folder / "test.png", folder / "samples.png") if p.is_file()))


def record(folder: Path, name: str, note: str, grids: list[str]) -> None:
    """results/NAME.json from the run's config, scores and metrics; its grid as NAME.png, others beside."""
    if (folder / "sweep.csv").is_file():
        runs = sorted((p.parent for p in folder.glob("*/scores.json")), key=lambda p: p.stat().st_ctime)
        unscored = sorted({p.parent.name for p in folder.glob("*/config.json")} - {run.name for run in runs})
        kept = {"note": note, "grids": grids, "runs": {run.name: figures(run) for run in runs},
                "diverged or not finished": unscored}
        first = next(iter(kept["runs"].values()))
        size = max(64, first["config"].get("image_size", 0))  # smaller images are shown as 64×64
        keep(strips({run.name: grid_of(run) for run in runs}, size), RESULTS / f"{name}.png")
    else:
        kept = {"note": note, "grids": grids} | figures(folder)
        keep(grid_of(folder), RESULTS / f"{name}.png")
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    for grid in grids:
        keep(Image.open(folder / f"{grid}.png"), RESULTS / f"{name}_{grid}.png")


def strips(grids: dict[str, Image.Image], size: int = 64) -> Image.Image:
    """The last eight images of each grid, or its last row where that has fewer, named, a row each: in a sweep
    of one seed they have the same z. size: of the images, in pixels of the grids.
    """
    tile = size + 2
    widths = [min(8 * tile + 2, grid.width) for grid in grids.values()]
    canvas = Image.new("RGB", (max(widths), len(grids) * (tile + 18)), "white")
    for i, ((name, grid), width) in enumerate(zip(grids.items(), widths)):
        y = i * (tile + 18)
        ImageDraw.Draw(canvas).text((3, y + 1), name, fill="black", font=ImageFont.load_default(size=11))
        last = grid.width - width, grid.height - tile - 2, grid.width, grid.height
        canvas.paste(grid.convert("RGB").crop(last), (0, y + 15))
    return canvas


def said(mean: float, std: float) -> str:
    return f"{mean:.4g}" + (f" ± {std:.2g}" if std else "")  # no draws, no spread


def shown(command: str) -> str:
    """A command without what changes no score; the JSON has it whole."""
    return "python " + re.sub(r" --(log-every|sample-every|save-every|out) \S+", "", command)


def scored(kept: dict) -> dict:
    """The scores of the checkpoint that a row is of: with digits the last one, else the best."""
    digits = kept["script"] in ("dcgan_mnist.py", "infogan_mnist.py")
    return kept["scores"]["last" if digits or "best" not in kept["scores"] else "best"]


def hardware(kept: dict) -> str:
    told = kept["hardware"] if "rows" in kept else kept["sittings"][0]["hardware"]
    return told.replace(" 1 threads", " 1 thread")


def blocks() -> dict[str, str]:
    """What stands in the README from each marker to the next END."""
    everything = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    parts = ["\n".join(rows()), *(sweep_table(p, kept) for p, kept in everything.items() if "runs" in kept)]
    found = {START: "\n\n".join(parts)}
    for path, kept in everything.items():
        if "rows" in kept:
            links = f"[a strip of each](results/{path.stem}.png), [all figures](results/{path.name})"
            found[f"<!-- {path.name}: built by results/record.py -->"] = (
                f"`python {kept['command']}` on {kept['what']}; {hardware(kept)} a run ({links}):\n\n"
                f"{markdown(kept['rows'])}")
    return found


def sweep_table(path: Path, kept: dict) -> str:
    """What a sweep was, and a line of Markdown for each of its runs."""
    first = next(iter(kept["runs"].values()))
    pictures = {"a strip of each": f"{path.stem}.png"} | {g: f"{path.stem}_{g}.png" for g in kept["grids"]}
    pictures["all figures"] = path.name
    links = ", ".join(f"[{text}](results/{file})" for text, file in pictures.items())
    scores = first["scores"]
    note = f"; {kept['note']}" if kept["note"] else ""
    columns = scores["summary"]
    lines = [f"`{shown(first['command'])}` on {scores['data']}, {scores['draws']} draws; judge: "
             f"{scores['judge']}; {hardware(first)}{note} ({links}):", "",
             f"| run | {' | '.join(columns)} | after | iterations, time |",
             "| --- " * (3 + len(columns)) + "|"]
    for name, run in kept["runs"].items():
        values = [said(*value) for value in run["scores"]["summary"].values()]
        lines.append(f"| {name} | {' | '.join(values)} | {scored(run)['step']:,} | {run['iterations']:,} in "
                     f"{run['seconds'] / 60:.0f} min |")
    lines += [f"| {name} | diverged or not finished |" for name in kept.get("diverged or not finished", [])]
    return "\n".join(lines)


def rows() -> list[str]:
    """One line of Markdown for each JSON that is a run's."""
    lines = ["| run | data | scores, after … iterations | judge | iterations, time, hardware | pictures |",
             "| --- | --- | --- | --- | --- | --- |"]
    kept_runs = {path: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    kept_runs = {path: kept for path, kept in kept_runs.items() if "scores" in kept}
    for path, kept in sorted(kept_runs.items(), key=lambda r: (r[1]["script"], r[1]["iterations"], r[0])):
        scores = kept["scores"]
        values = [f"{name} {said(*value)}" for name, value in scores["summary"].items()]
        time = f"{kept['iterations']:,} in {kept['seconds'] / 60:.0f} min"
        if "seconds_per_1000_iterations" in kept:
            time += f" ({kept['seconds_per_1000_iterations']:,.0f} s per 1,000)"
        pictures = {"grid": f"{path.stem}.png"} | {g: f"{path.stem}_{g}.png" for g in kept.get("grids", [])}
        pictures["all figures"] = path.name
        cells = [f"`{shown(kept['command'])}`" + (f"<br>{kept['note']}" if kept["note"] else ""),
                 scores["data"], f"{', '.join(values)} ({scores['draws']} draws), after "
                 f"{scored(kept)['step']:,}", scores["judge"], f"{time} on {hardware(kept)}",
                 ", ".join(f"[{text}](results/{file})" for text, file in pictures.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, nargs="?", help="the run")
    parser.add_argument("name", nargs="?", help="what to keep it as")
    parser.add_argument("--note", default="", help="a remark for the table")
    parser.add_argument("--grids", nargs="*", default=[], help="pictures to keep beside it: interpolation …")
    args = parser.parse_args()
    finished = args.folder and any((args.folder / f).is_file() for f in ("scores.json", "sweep.csv"))
    if args.folder and not (args.name and finished):
        print(f"error: {args.folder}: give a run with scores.json (see --eval), or a sweep, and a name",
              file=sys.stderr)
        return 2
    if args.folder:
        record(args.folder, args.name, args.note, args.grids)
    keep(strips({n: Image.open(RESULTS / f"{f}.png") for n, f in OVERVIEW.items()}), RESULTS / "overview.png")
    text = README.read_text()
    for marker, block in blocks().items():
        before, rest = text.split(marker)
        text = before + marker + "\n" + block + "\n" + END + rest.split(END, 1)[1]
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
