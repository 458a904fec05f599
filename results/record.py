"""Keep a finished run's figures under results/, and build the README's table from all that is kept.

    python results/record.py runs/NAME KEPT_AS [--note TEXT]   # results/KEPT_AS.json and .png, then the table
    python results/record.py                                   # the table alone
"""
import argparse
import json
import sys
from pathlib import Path

from PIL import Image

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
START, END = "<!-- results: built by results/record.py -->", "<!-- end of results -->"


def record(folder: Path, name: str, note: str) -> None:
    """results/NAME.json from the run's config, scores and metrics; its test grid as results/NAME.png."""
    config = json.loads((folder / "config.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    last_row = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    kept = {"script": config["script"], "command": config["sittings"][0]["command"], "note": note,
            "seconds": round(float(last_row[1])), "iterations": int(last_row[0]), "scores": scores,
            "sittings": config["sittings"], "config": config["config"]}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    Image.open(folder / "test.png").save(RESULTS / f"{name}.png", optimize=True)


def rows() -> list[str]:
    """One line of Markdown for each JSON that is a run's."""
    lines = ["| run | data | accuracy: test / new_test | judge | iterations, time, hardware | grid |",
             "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.json")):
        kept = json.loads(path.read_text())
        if "scores" not in kept:
            continue
        scores = kept["scores"]
        best = scores["best"]
        accuracy = ["{:.3f} ± {:.3f}".format(*best[test]["accuracy"]) for test in ("test", "new_test")]
        hardware = kept["sittings"][0]["hardware"]
        cells = [f"`python {kept['command']}`" + (f"<br>{kept['note']}" if kept["note"] else ""),
                 scores["data"], f"{' / '.join(accuracy)} ({scores['draws']} draws)", scores["judge"],
                 f"{kept['iterations']:,} in {kept['seconds'] / 60:.0f} min on {hardware}",
                 f"[grid](results/{path.stem}.png), [all figures](results/{path.name})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, nargs="?", help="the run")
    parser.add_argument("name", nargs="?", help="what to keep it as")
    parser.add_argument("--note", default="", help="a remark for the table")
    args = parser.parse_args()
    if args.folder and not (args.name and (args.folder / "scores.json").is_file()):
        print(f"error: {args.folder}: give a run with scores.json (see --eval) and a name", file=sys.stderr)
        return 2
    if args.folder:
        record(args.folder, args.name, args.note)
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(before + START + "\n" + "\n".join(rows()) + "\n" + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
