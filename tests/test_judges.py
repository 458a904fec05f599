"""The judges that come with the project, and the command that trains judges."""
import hashlib
from pathlib import Path

import pytest
import torch

import evaluator
from benchmarks import judges
from common.datasets import load_faces, load_iclevr
from common.errors import UserError
from tests.conftest import get_judge, settings


def test_every_shipped_judge_is_of_todays_renderer_small_and_good():
    files = sorted(evaluator.SHIPPED.glob("*.pt"))
    assert [path.stem for path in files] == sorted(judges.SHIPPED)
    assert sum(path.stat().st_size for path in files) < 3e6
    for path in files:
        content, renderer = torch.load(path, weights_only=True), judges.SHIPPED[path.stem].renderer
        assert content["held_out"]["accuracy"] >= (0.97 if "scenes" in path.stem else 0.99)
        assert path.stem in content["command"]
        if renderer:
            code = repr(Path(renderer.__file__).read_text()).encode()
            assert content["origin"] == hashlib.sha1(code).hexdigest()[:12], f"train {path.stem} anew"


def test_a_shipped_judge_reads_fresh_images_as_its_file_says(capsys):
    recipe = judges.SHIPPED["synthetic-scenes-64"]
    data = load_iclevr(settings(n_scenes=10, image_size=64))
    judge = get_judge(data)
    assert "synthetic-scenes-64.pt" in capsys.readouterr().out and "held-out accuracy 0.9" in judge.title
    images, labels, _ = recipe.renderer.render(60, 64, seed=3)
    assert evaluator.count_objects(judge(images / 127.5 - 1), labels)["accuracy"] > 0.95


def test_other_sizes_classes_and_renderers_get_a_judge_of_their_own(capsys):
    for data in (load_iclevr(settings(n_scenes=10, image_size=32)),
                 load_faces(settings(n_synthetic=40, image_size=64, attributes="blue eyes"))):
        get_judge(data)
        assert "training a judge" in capsys.readouterr().out
    data = load_iclevr(settings(n_scenes=10, image_size=64))
    data.origin = "other code"
    get_judge(data)
    assert "training a judge" in capsys.readouterr().out


def test_a_damaged_shipped_judge_is_one_error(tmp_path, monkeypatch):
    data = load_iclevr(settings(n_scenes=10, image_size=64))
    whole = (evaluator.SHIPPED / "synthetic-scenes-64.pt").read_bytes()
    (tmp_path / "synthetic-scenes-64.pt").write_bytes(whole[:len(whole) // 2])
    monkeypatch.setattr(evaluator, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match="synthetic-scenes-64.pt can't be read.*git checkout") as error:
        get_judge(data)
    assert "\n" not in str(error.value)


def call(monkeypatch, arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["judges.py", *arguments.split(), "--device", "cpu"])
    judges.main()


def test_the_command_trains_a_judge_and_tests_it_on_others(monkeypatch, capsys):
    monkeypatch.setattr(judges, "load", lambda *args, load=judges.load: load(*args, n=60))
    call(monkeypatch, "digits --data synthetic --judge-width 8 --judge-steps 2 --also synthetic")
    assert "11 test images of synthetic digits: accuracy 0." in capsys.readouterr().out
    for arguments, message in (("scenes --also mnist", "--also is for digits"),
                               ("digits --judge-steps 0", "at least 1"), ("mnist-31", "invalid choice")):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, arguments)


@pytest.mark.parametrize("name", ["synthetic-scenes-64", "synthetic-digits-32", "synthetic-faces-64"])
def test_the_command_ships_a_judge_of_half_precision(name, tmp_path, monkeypatch):
    recipe = judges.replace(judges.SHIPPED[name], n=100, width=8, steps=2)
    monkeypatch.setitem(judges.SHIPPED, name, recipe)
    monkeypatch.setattr(evaluator, "SHIPPED", tmp_path / "judges")
    call(monkeypatch, name)
    content = torch.load(tmp_path / "judges" / f"{name}.pt", weights_only=True)
    assert {x.dtype for x in content["model"].values()} == {torch.float16, torch.int64}
    kind = next(kind for kind in evaluator.KINDS if kind in name)
    judge = get_judge(judges.load(kind, "synthetic", recipe.size, n=40))
    assert judge.held_out == content["held_out"]
