"""Keep a finished run's figures under results/, and build the README's table from all that is kept.

    python results/record.py runs/NAME KEPT_AS [--note TEXT]   # results/KEPT_AS.json and .png, then the table
    python results/record.py                                   # the table alone

The grid kept is the first that is there of test.png and samples.png; --grids names others to keep beside it.
"""
import argparse
import json
import sys
from pathlib import Path

from PIL import Image

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
sys.path.insert(0, str(RESULTS.parent))
from common.run import seconds_per_iteration  # noqa: E402
START, END = "<!-- results: built by results/record.py -->", "<!-- end of results -->"


def record(folder: Path, name: str, note: str, grids: list[str]) -> None:
    """results/NAME.json from the run's config, scores and metrics; its grid as NAME.png, others beside."""
    config = json.loads((folder / "config.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    last_row = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    pace = seconds_per_iteration(folder / "metrics.csv")
    kept = {"script": config["script"], "command": config["sittings"][0]["command"], "note": note,
            "seconds": round(float(last_row[1])), "iterations": int(last_row[0]),
            "seconds_per_1000_iterations": round(1000 * pace, 1), "grids": grids, "scores": scores,
            "sittings": config["sittings"], "config": config["config"]}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    first = next(p for p in (folder / "test.png", folder / "samples.png") if p.is_file())
    Image.open(first).save(RESULTS / f"{name}.png", optimize=True)
    for grid in grids:
        Image.open(folder / f"{grid}.png").save(RESULTS / f"{name}_{grid}.png", optimize=True)


def rows() -> list[str]:
    """One line of Markdown for each JSON that is a run's."""
    lines = ["| run | data | scores | judge | iterations, time, hardware | pictures |",
             "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.json")):
        kept = json.loads(path.read_text())
        if "scores" not in kept:
            continue
        scores = kept["scores"]
        values = [f"{name} {mean:.4g} ± {std:.2g}" for name, (mean, std) in scores["summary"].items()]
        time = f"{kept['iterations']:,} in {kept['seconds'] / 60:.0f} min"
        if "seconds_per_1000_iterations" in kept:
            time += f" ({kept['seconds_per_1000_iterations']:.3g} s per 1,000)"
        pictures = {"grid": f"{path.stem}.png"} | {g: f"{path.stem}_{g}.png" for g in kept.get("grids", [])}
        pictures["all figures"] = path.name
        cells = [f"`python {kept['command']}`" + (f"<br>{kept['note']}" if kept["note"] else ""),
                 scores["data"], f"{', '.join(values)} ({scores['draws']} draws)", scores["judge"],
                 f"{time} on {kept['sittings'][0]['hardware']}",
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
    if args.folder and not (args.name and (args.folder / "scores.json").is_file()):
        print(f"error: {args.folder}: give a run with scores.json (see --eval) and a name", file=sys.stderr)
        return 2
    if args.folder:
        record(args.folder, args.name, args.note, args.grids)
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(before + START + "\n" + "\n".join(rows()) + "\n" + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
