"""The table of results is what the kept figures say."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures
from common.datasets import to_float
from common.errors import UserError
from results import record
from synthetic import scenes
from tests.conftest import TINY, flags, run_here, script

GENERATORS = record.ROOT / "generators"


@pytest.fixture(scope="module")
def tiny_run(workdir):
    args = flags(TINY["sngan_iclevr"] | dict(iters=9, eval_every=4, save_every=4, out="runs/recorded"))
    script("sngan_iclevr", *args, cwd=workdir)
    return workdir / "runs" / "recorded"


def test_the_readme_s_tables_are_built_from_the_kept_results():
    for path, parts in record.blocks().items():
        text = path.read_text(encoding="utf-8")
        for marker, block in parts.items():
            assert text.split(marker)[1].split(record.END)[0].strip() == block, marker


def test_the_readmes_links_exist():
    for path in record.blocks():
        targets = re.findall(r"(?:\]\(|src=\")([^)#\"]+)", path.read_text(encoding="utf-8"))
        missing = [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()]
        assert len(targets) > 10 and not missing


def test_the_results_weigh_little_on_a_clone():
    sizes = {path.name: path.stat().st_size for path in record.RESULTS.rglob("*") if path.is_file()
             and "__pycache__" not in path.parts}
    assert not [name for name, size in sizes.items() if size > 300_000 and name.endswith(".png")]
    assert sum(sizes.values()) < 6e6


def test_no_record_has_a_path_of_the_machine_that_made_it():
    for path in record.RESULTS.glob("*.json"):
        assert not re.search(r"[ \"=]/\w", path.read_text(encoding="utf-8")), path
    found = record.short("x.py --resume /home/me/runs/a --iters 9 --out /tmp/b")
    assert found == "python x.py --resume RUN --iters 9"


def test_a_run_is_kept_with_all_that_its_figures_depend_on(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.record(tiny_run, "tiny", "a remark", ["interpolation"])
    kept = json.loads((tmp_path / "tiny.json").read_text())
    assert kept["iterations"] == 9 and kept["seconds"] >= 0
    assert kept["command"].startswith("sngan_iclevr.py --data synthetic")
    assert {"commit", "hardware", "torch"} <= set(kept["sittings"][0])
    assert (tmp_path / "tiny.png").exists() and (tmp_path / "tiny_interpolation.png").exists()
    row = record.run_rows({"tiny": kept})[-1]
    assert "--iters 9" in row and not any(flag in row for flag in ("--out", "--save-every", str(tiny_run)))
    mean, std = kept["scores"]["best"]["accuracy test"]
    for part in ("synthetic scenes", f"accuracy test {record.number(mean, std)}", "held-out accuracy",
                 "a remark", f"after {kept['scores']['best']['step']} |", "9 in 0 min", "(tiny.png)",
                 "[interpolation](tiny_interpolation.png)"):
        assert part in row


def test_a_kept_generator_is_scored_as_its_run(tiny_run, tmp_path, workdir):
    target = tmp_path / "generator"
    record.keep_generator(tiny_run, target)
    kept, run = ((folder / "best.pt").stat().st_size for folder in (target, tiny_run))
    assert kept < run / 4
    before = json.loads((tiny_run / "scores.json").read_text(encoding="utf-8"))
    script("sngan_iclevr", "--eval", str(target), cwd=workdir)
    scores = json.loads((target / "scores.json").read_text(encoding="utf-8"))
    for name, (mean, _) in before["summary"].items():
        assert scores["summary"][name][0] == pytest.approx(mean, abs=0.02)
    with pytest.raises(AssertionError, match="best.pt can't be read"):  # there is nothing to train on
        script("sngan_iclevr", "--resume", str(target), cwd=workdir)


@pytest.mark.parametrize("name", sorted(path.name for path in GENERATORS.iterdir()))
def test_the_generators_work_after_cloning(name, tmp_path):
    folder = GENERATORS / name
    run_here(name, "sample", folder, to=str(tmp_path / "images"), n=6)
    images = [np.array(Image.open(path), int) for path in (tmp_path / "images").glob("*.png")]
    assert len(images) == 6 and np.std(images, 0).mean() > 3 and np.std(images) > 10
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


def test_a_sweep_is_kept_as_one(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "three").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "sweep" / "three")
    (tmp_path / "sweep" / "sweep.csv").touch()
    record.record(tmp_path / "sweep", "both", "a remark", [])
    kept = json.loads((tmp_path / "results" / "both.json").read_text())
    assert sorted(kept["runs"]) == ["one", "two"] and kept["runs"]["one"]["iterations"] == 9
    with Image.open(tmp_path / "results" / "both.png") as strips, Image.open(tiny_run / "test.png") as grid:
        assert strips.size == (grid.width, 2 * (64 + 13 + 20))  # with the captions
    assert len(record.run_rows({"both": kept})) == 2  # no row of its own, but a table
    table = record.sweep_table("both", kept)
    for part in ("a remark", "(both.png)", "| one | ", " | 9 in 0 min |", "| three | diverged or not f",
                 "| accuracy test | accuracy new_"):
        assert part in table
    # a folder of ablations has its table and picture already
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "ablations.json").write_text('{"rows": {}}')
    shutil.copy(tiny_run / "test.png", tmp_path / "ablations" / "ablations.png")
    with pytest.raises(UserError, match="--note"):
        record.record(tmp_path / "ablations", "tricks", "a remark", [])
    record.record(tmp_path / "ablations", "tricks", "", [])
    assert json.loads((tmp_path / "results" / "tricks.json").read_text()) == {"rows": {}}
    assert (tmp_path / "results" / "tricks.png").is_file()
    assert record.number(0.25, 0.0) == "0.25" and record.number(0.25, 0.01) == "0.25 ± 0.01"


def test_kept_pictures_keep_the_colours_of_objects_and_captions(tmp_path):
    images, labels, _ = scenes.render(32, 64)
    captions = pictures.names_of(labels, scenes.OBJECTS)
    grid = pictures.save_grid(tmp_path / "grid.png", to_float(images), "a title", captions=captions)
    record.keep(grid, tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as kept:
        before, after = np.array(grid, int), np.array(kept.convert("RGB"), int)
    error = abs(before - after).max(-1)[before.max(-1) - before.min(-1) > 60]  # of what isn't grey
    assert len(error) > 5000 and error.mean() < 8 and error.max() < 40


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
