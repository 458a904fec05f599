"""The tables of results say what the records say, and records keep all of a run that matters."""
import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluator
from common.datasets import to_float
from common.files import UserError
from harness import pictures
from synthetic import scenes
from tests.conftest import TINY, flags, rows_of, run_here, settings
from tools import record

GENERATORS = record.ROOT / "pretrained" / "generators"


@pytest.fixture(scope="module")
def tiny_run(workdir):
    fields = dict(iters=9, eval_every=4, save_every=4, out="runs/recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        patch.setattr("sys.argv", ["sngan_iclevr.py", *flags(TINY["sngan_iclevr"] | fields)])
        return workdir / run_here("sngan_iclevr", **fields)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder without records."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    for name in ("records", "figures"):
        (tmp_path / "results" / name).mkdir(parents=True)
    (tmp_path / "results" / "README.md").touch()
    return tmp_path / "results"


def test_the_tables_are_those_of_the_records_and_their_links_exist():
    for path, text in record.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python tools/record.py"
        targets = re.findall(r"(?:\]\(|src=\")([^)#\"]+)", text)
        missing = [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()]
        assert len(targets) > 10 and not missing
    readme = (record.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| [{script}]({script}) |" in readme for script, *_ in record.SCRIPTS)


def test_all_records_and_pictures_are_linked_to():
    text = "".join(record.pages().values())
    files = {f"{path.parent.name}/{path.name}" for path in record.RESULTS.glob("*/*.*")}
    assert len(files) > 40 and not {file for file in files if file not in text}


def test_the_results_weigh_little_on_a_clone():
    sizes = {path.name: path.stat().st_size for path in record.RESULTS.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 300_000
    assert sum(sizes.values()) < 2e6


def test_no_record_has_a_path_of_the_machine_that_made_it():
    for path in record.RESULTS.glob("records/*.json"):
        assert not re.search(r"[ \"=]/\w", path.read_text(encoding="utf-8")), path
    for start in ("", "python ", "python /home/me/gans/", "python ../"):
        found = record.short(f"{start}x.py --resume /home/me/runs/a --iters 9 --out /tmp/b")
        assert found == "x.py --resume RUN --iters 9"


def test_a_run_is_kept_with_all_that_its_scores_depend_on(tiny_run, results):
    record.record(tiny_run, "tiny", "a remark", ["new_test"])
    kept = json.loads((results / "records" / "tiny.json").read_text(encoding="utf-8"))
    assert kept["iterations"] == 9 and kept["seconds"] >= 0 and kept["config"]["recipe"] == "paper"
    assert kept["command"].startswith("sngan_iclevr.py --data synthetic")
    assert {"commit", "hardware", "torch"} <= set(kept["sittings"][0])
    heading = record.heading("tiny", kept)
    assert "--iters 9" in heading and not any(x in heading for x in ("--out", "--save-every", str(tiny_run)))
    row = record.run_table({heading: kept}).splitlines()[-1]
    mean, std = kept["scores"]["best"]["accuracy test"]
    for part in (f"at {kept['sittings'][0]['commit']}; a remark", "(records/tiny.json)",
                 "(figures/tiny.webp)", "[new_test](figures/tiny_new_test.webp)",
                 " | synthetic scenes | paper | ", "held-out accuracy", "(2 samples of z)",
                 f"accuracy test {record.number(mean, std)}, ",
                 f"| {kept['scores']['best']['step']} | 9 iterations in 0 min, "):
        assert part in row
    (results / "figures" / "tiny.webp").unlink()
    assert "tiny.webp" not in record.heading("tiny", kept)


def test_the_figures_of_both_judges_are_of_the_same_checkpoint(tiny_run, tmp_path):
    kept = record.figures(tiny_run)
    step, scores, chosen = kept["scores"]["best"]["step"], kept["scores"], kept["by_chooser"]
    row, = [row for row in rows_of(tiny_run) if row["step"] == step]
    assert chosen == {"accuracy test": row["accuracy_test"], "accuracy new_test": row["accuracy_new_test"]}
    other = kept | {"by_chooser": {}}
    table = record.judge_table({"one": kept, "some": {"runs": {"a": kept, "b": other}}, "digits": other,
                                "before": kept | {"scores": {"summary": {}}}, "speed": {}})
    one, again = table.splitlines()[2:]
    reported = ", ".join(f"{name} {record.number(*scores['summary'][name])}" for name in chosen)
    read = ", ".join(f"{name} {value:.3f}" for name, value in chosen.items())
    assert one == f"| one | {reported} | {scores['judge']} | {read} | {scores['chosen_by']} |"
    assert again == one.replace("| one |", "| some, a |")
    assert scores["judge"].startswith("VGG") and scores["chosen_by"].startswith("ResNet-18")
    shutil.copytree(tiny_run, tmp_path / "run")  # columns may come in any order
    with open(tiny_run / "metrics.csv", newline="") as f, open(tmp_path / "run" / "metrics.csv", "w") as new:
        csv.writer(new).writerows(reversed(row) for row in csv.reader(f))
    assert record.figures(tmp_path / "run") == kept


def test_a_kept_generator_is_scored_as_its_run(tiny_run, here):
    target = here / "generator"
    record.keep_generator(tiny_run, target)
    kept, run = ((folder / "best.pt").stat().st_size for folder in (target, tiny_run))
    assert kept < run / 4
    before = json.loads((tiny_run / "scores.json").read_text(encoding="utf-8"))
    run_here("sngan_iclevr", "eval", target)
    scores = json.loads((target / "scores.json").read_text(encoding="utf-8"))
    for name, (mean, _) in before["summary"].items():
        assert scores["summary"][name][0] == pytest.approx(mean, abs=0.02)
    weights = (target / "best.pt").read_bytes()
    with pytest.raises(UserError):  # it has no optimisers, nor D
        run_here("sngan_iclevr", "resume", target)
    assert (target / "best.pt").read_bytes() == weights


@pytest.mark.parametrize("name", sorted(path.name for path in GENERATORS.iterdir()))
def test_the_generators_work_after_cloning(name, tmp_path):
    folder = GENERATORS / name
    run_here(name, "sample", folder, to=str(tmp_path / "images"), n=6)
    images = [np.array(Image.open(path), int) for path in (tmp_path / "images").glob("*.png")]
    assert len(images) == 6 and np.std(images, 0).mean() > 3 and np.std(images) > 10
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


@pytest.mark.parametrize("name", sorted(path.name for path in GENERATORS.iterdir()))
def test_the_generators_have_the_scores_that_are_kept_with_them(name, tmp_path, monkeypatch, capsys):
    """By their own settings and the bundled judges, without the data set."""
    kept, stored = (json.loads((GENERATORS / name / f"{file}.json").read_text(encoding="utf-8"))
                    for file in ("scores", "config"))
    for key, field in (("draws", "eval_draws"), ("seed", "seed"), ("n_fake", "eval_images")):
        assert kept.get(key) == stored["config"].get(field), f"{name}: {field}"
    if stored["script"] == "acgan_celeba.py":
        pytest.skip("no judge of CelebA is bundled")
    folder, found = tmp_path / name, {}
    shutil.copytree(GENERATORS / name, folder)
    monkeypatch.setattr(evaluator, "train_judge", None)

    def score(run, data, scorer, sample, _, shown, more=None, **options):
        """What can be told without the held-out images."""
        cfg, scores = run.cfg, {"step": run.load(shown)["step"]}
        found[shown] = scores | (more() if more else evaluator.score(
            sample, scorer.judge, cfg.eval_images, cfg.eval_draws, cfg.seed + 1))
    if stored["script"] in record.DIGITS:
        judge = settings(judge=str(evaluator.BUNDLED / "mnist-32-digitnet.pt"))
        monkeypatch.setattr(evaluator, "get_scorer", lambda run, data: SimpleNamespace(
            judge=evaluator.get_judge(judge, data, run.device)))
        monkeypatch.setattr(evaluator, "finish", score)
        run_here(name, "sample", folder, to=str(tmp_path / "images"))
        shown, measures = "last", ["code → digit" if name == "infogan_mnist" else "TV"]
    else:
        run_here(name, "eval", folder)
        assert f"({evaluator.BUNDLED / 'i-clevr-64-vgg.pt'})" in capsys.readouterr().out
        found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        shown, measures = "best", list(kept["summary"])
        assert found["judge"] == kept["judge"]
    assert found[shown]["step"] == kept[shown]["step"]
    for measure in measures:
        assert found[shown][measure][0] == pytest.approx(kept["summary"][measure][0], abs=0.01), measure


def test_a_sweep_and_ablations_are_kept_as_one(tiny_run, results, tmp_path, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "three").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "sweep" / "three")
    (tmp_path / "sweep" / "sweep.csv").touch()
    record.record(tmp_path / "sweep", "both", "a remark", [])
    with Image.open(results / "figures" / "both.webp") as strips, Image.open(tiny_run / "test.png") as grid:
        assert strips.size == (grid.width, 2 * (64 + 13 + 20))  # with the captions
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "ablations.json").write_text(json.dumps(
        {"command": "tools/ablations.py", "commit": "0123abc", "hardware": "a CPU", "what": "a set",
         "rows": {"linear": {"seeds": {"0": {}}, "diverged": 0, "written": "worse", "test": [1, 0]}}}))
    shutil.copy(tiny_run / "test.png", tmp_path / "ablations" / "ablations.png")
    record.record(tmp_path / "ablations", "tricks", "", [])
    assert (results / "figures" / "tricks.webp").is_file()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "SCRIPTS", [("x.py", "X", "both", "--quick", "both", "0.5")])
    (tmp_path / "README.md").write_text("before\n<!-- scripts -->\nold\n<!-- end -->\nafter\n")
    (results / "README.md").write_text("<!-- tricks -->\n<!-- end -->\n")
    readme, notes, runs = (record.pages()[path] for path in (
        tmp_path / "README.md", results / "README.md", results / "runs.md"))
    for part in ("## both\n\n`python sngan_iclevr.py --data",
                 "; a remark ([record](records/both.json), [picture](figures/both.webp)):",
                 "\n| one | synthetic scenes | paper | ", "\n| three | diverged or not finished |"):
        assert part in runs
    assert runs.count("| synthetic scenes |") == 2  # a sweep has no row of its own
    tricks = ("`python tools/ablations.py` at 0123abc; a set; a CPU ([record](records/tricks.json), "
              "[picture](figures/tricks.webp)):\n\n| | test |")
    assert tricks in runs and notes.startswith(f"<!-- tricks -->\n{tricks}")
    assert readme.startswith("before\n<!-- scripts -->\n| script | method |") and "old" not in readme
    assert "| [x.py](x.py) | X | synthetic scenes, 32×32 | accuracy test " in readme
    assert "(2 seeds) | paper: `--quick` | 9 iterations in 0 min, " in readme
    assert "(best of 2 variants, 9 iterations" in readme
    assert readme.endswith(" | 0.5 |\n<!-- end -->\nafter\n")
    path = results / "records" / "both.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"chosen_by"', '"was"'), encoding="utf-8")
    remark = "(2 seeds, by the judge that chose the checkpoint) | paper"
    assert remark in record.pages()[tmp_path / "README.md"]


def test_numbers_are_rounded_to_their_spread():
    assert record.number(0.25, 0.0) == "0.25" and record.number(0.25, 0.01) == "0.25 ± 0.01"
    assert record.number(101.8, 1.55) == "102 ± 2"


def test_kept_pictures_look_as_they_did_and_take_little_room(tmp_path):
    images, labels, _ = scenes.render(32, 64)
    captions = pictures.names_of(labels, scenes.OBJECTS)
    grid = pictures.save_grid(tmp_path / "grid.png", to_float(images), "a title", captions=captions)
    digits = Image.fromarray(np.array(grid.convert("L")) // 128 * 255)  # two greys, as most pixels of digits
    for picture in (grid, digits):
        record.keep(picture, tmp_path / "kept.webp")
        picture.save(tmp_path / "whole.png", optimize=True)
        assert (tmp_path / "kept.webp").stat().st_size < 0.8 * (tmp_path / "whole.png").stat().st_size
        with Image.open(tmp_path / "kept.webp") as kept:
            error = abs(np.array(picture.convert("RGB"), int) - np.array(kept.convert("RGB"), int))
        assert error.mean() < (3 if picture is grid else 1e-9)  # digits lose nothing


@pytest.mark.parametrize("size,shown,columns", [(32, 64, 10), (64, 64, 4), (128, 128, 8)])
def test_strips_are_the_last_images_of_grids_of_any_size(tmp_path, size, shown, columns):
    images = torch.rand(2 * columns, 3, size, size) * 2 - 1
    pictures.save_grid(tmp_path / "grid.png", images, "a title", nrow=columns)
    strip = record.strips({"one": Image.open(tmp_path / "grid.png")}, shown, shown)
    n, tile = min(8, columns), shown + 2
    assert strip.size == (n * tile + 2, tile + 18)
    for i in range(n):  # each image whole, in its place
        found = strip.crop((i * tile + 2, 17, i * tile + 2 + shown, 17 + shown)).resize((size, size), 0)
        wanted = (images[i - n] / 2 + 0.5) * 255
        assert (torch.tensor(np.array(found)).permute(2, 0, 1) - wanted).abs().max() <= 0.51
