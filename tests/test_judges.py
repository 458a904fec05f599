"""The judges that come with the project, and the command that trains judges."""
import hashlib
from pathlib import Path

import pytest
import torch

import evaluator
from common.datasets import load_faces, load_iclevr
from common.files import UserError
from tests.conftest import get_judge, settings
from tools import train_judge


def test_every_bundled_judge_is_of_todays_renderer_small_and_good():
    files = sorted(evaluator.BUNDLED.glob("*.pt"))
    assert [path.stem for path in files] == sorted(train_judge.BUNDLED)
    assert sum(path.stat().st_size for path in files) < 3e6
    for path in files:
        content, renderer = torch.load(path, weights_only=True), train_judge.BUNDLED[path.stem].renderer
        assert content["held_out"]["accuracy"] >= (0.97 if "scenes" in path.stem else 0.99)
        assert path.stem in content["command"]
        if renderer:
            code = repr(Path(renderer.__file__).read_text()).encode()
            assert content["origin"] == hashlib.sha1(code).hexdigest()[:12], f"train {path.stem} anew"


def test_a_bundled_judge_reads_its_own_set_and_others_get_their_own(tmp_path, monkeypatch, capsys):
    data = load_iclevr(settings(n_scenes=10, image_size=64))
    judge = get_judge(data)
    assert "synthetic-scenes-64.pt" in capsys.readouterr().out and "held-out accuracy 0.9" in judge.title
    images, labels, _ = train_judge.BUNDLED["synthetic-scenes-64"].renderer.render(30, 64, seed=3)
    assert evaluator.count_objects(judge(images / 127.5 - 1), labels)["accuracy"] > 0.95
    for other in (load_iclevr(settings(n_scenes=10, image_size=32)),
                  load_faces(settings(n_synthetic=40, image_size=64, attributes="blue eyes")),
                  evaluator.Data(**vars(data) | {"fingerprint": "other code"})):
        get_judge(other)
        assert "training a judge" in capsys.readouterr().out
    whole = (evaluator.BUNDLED / "synthetic-scenes-64.pt").read_bytes()
    (tmp_path / "synthetic-scenes-64.pt").write_bytes(whole[:len(whole) // 2])
    monkeypatch.setattr(evaluator, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match="synthetic-scenes-64.pt can't be read.*git checkout") as error:
        get_judge(data)
    assert "\n" not in str(error.value)


def call(monkeypatch, arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["train_judge.py", *arguments.split(), "--device", "cpu"])
    train_judge.main()


def test_the_command_trains_a_judge_and_tests_it_on_others(monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "load", lambda *args, load=train_judge.load: load(*args, n=60))
    call(monkeypatch, "digits --data synthetic --judge-width 8 --judge-steps 2 --also synthetic")
    assert "11 test images of synthetic digits: accuracy 0." in capsys.readouterr().out
    for arguments, message in (("scenes --also mnist", "--also is for digits"),
                               ("digits --judge-steps 0", "at least 1"), ("mnist-31", "invalid choice")):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, arguments)


@pytest.mark.parametrize("name", ["synthetic-scenes-64", "synthetic-digits-32", "synthetic-faces-64"])
def test_the_command_bundles_a_judge_of_half_precision(name, tmp_path, monkeypatch):
    spec = train_judge.replace(train_judge.BUNDLED[name], n=40, width=8, steps=2)
    monkeypatch.setitem(train_judge.BUNDLED, name, spec)
    monkeypatch.setattr(evaluator, "BUNDLED", tmp_path / "judges")
    call(monkeypatch, name)
    content = torch.load(tmp_path / "judges" / f"{name}.pt", weights_only=True)
    assert {x.dtype for x in content["model"].values()} == {torch.float16, torch.int64}
    domain = next(domain for domain in evaluator.KINDS if domain in name)
    judge = get_judge(train_judge.load(domain, "synthetic", spec.size, n=40))
    assert judge.held_out == content["held_out"]
