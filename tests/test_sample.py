"""--sample RUN --to FOLDER: single images of a run, which need its folder alone."""
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import acgan_celeba
import infogan_mnist
from common.blocks import EMA
from common.datasets import Data
from common.files import UserError
from harness import pictures
from synthetic import faces, scenes
from synthetic.measures import match
from tests.conftest import TINY, call, run_here


@pytest.fixture
def trained(here, monkeypatch):
    """A function: name of a script → the folder of a run of it, whose data can no longer be loaded."""
    def train(name: str, **fields) -> Path:
        def gone(*_):
            raise UserError("no such data")
        folder, module = run_here(name, iters=2, **dict(judge="none") | fields), importlib.import_module(name)
        monkeypatch.setattr(module, next(f for f in vars(module) if f.startswith("load_")), gone)
        return folder
    return train


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("name", TINY)
def test_images_and_grids_without_the_data(name, trained, tmp_path, capsys):
    folder = trained(name)
    grids = {path.name for path in folder.glob("*.png")}
    state = torch.load(folder / "last.pt", weights_only=True)
    for weight in state["vae" if name == "vae_celeba" else "ema"].values():
        if weight.ndim > 1:
            weight *= 20  # two iterations make hardly more than grey
    torch.save(state, folder / "last.pt")
    for to, seed in (("images", 0), ("again", 0), ("other", 1)):
        run_here(name, "sample", folder, to=to, n=11, seed=seed)
    assert sorted(p.name for p in Path("again").glob("*.png")) == [f"{i:02}.png" for i in range(11)]
    found = pixels(tmp_path / "again")
    assert found.shape[:3] == (11, 32, 32) and found.std((1, 2)).min() > 0
    assert np.array_equal(found, pixels(tmp_path / "images"))
    assert not np.array_equal(found, pixels(tmp_path / "other"))
    labelled = name in ("acgan_celeba", "infogan_mnist", "sngan_iclevr", "cdcgan_iclevr")
    assert Path("again", "labels.json").exists() == labelled
    assert "no such data" not in capsys.readouterr().out
    for path in grids:
        (folder / path).unlink()
    run_here(name, "sample", folder)
    assert "no such data" in capsys.readouterr().out
    of_real = {"real_beside_generated.png"} if name != "vae_celeba" else {
        "reconstructions.png", "interpolation.png", "arithmetic.png"}
    assert {path.name for path in folder.glob("*.png")} == grids - of_real - {"curves.png"}


@pytest.mark.parametrize("name", ["sngan_iclevr", "cdcgan_iclevr"])
def test_requested_objects(name, trained, tmp_path, monkeypatch):
    asked, average = [], EMA.__call__
    monkeypatch.setattr(EMA, "__call__", lambda net, z, y: (asked.append(y), average(net, z, y))[1])
    folder = trained(name)
    pair, single = ["blue sphere", "red cube"], ["gray cylinder"]
    (tmp_path / "mine.json").write_text(json.dumps([single, pair]))
    for labels, expected in (("red cube,blue sphere; gray cylinder", [pair] * 3 + [single] * 3),
                             (str(tmp_path / "mine.json"), [single] * 3 + [pair] * 3)):
        asked.clear()
        to = tmp_path / f"images of {len(labels)}"
        run_here(name, "sample", folder, to=str(to), n=3, labels=labels)  # three of each
        named = json.loads((to / "labels.json").read_text())
        assert list(named) == [f"{i}.png" for i in range(6)] == sorted(p.name for p in to.glob("*.png"))
        assert [sorted(names) for names in named.values()] == expected
        sets = [{24}.union(map(scenes.OBJECTS.index, names)) for names in expected]
        assert [{*ids} for ids in torch.cat(asked).tolist()] == sets


def test_faces_with_attributes(trained, tmp_path):
    folder = trained("acgan_celeba")
    wanted = [faces.FACE_ATTRIBUTES[0], faces.FACE_ATTRIBUTES[-1]]
    run_here("acgan_celeba", "sample", folder, to="images", n=40, with_=",".join(wanted))
    named = json.loads((tmp_path / "images" / "labels.json").read_text())
    assert all(set(wanted) < set(names) and len(names) == 4 for names in named.values())
    assert len({tuple(names) for names in named.values()}) > 4  # the other groups vary
    with pytest.raises(UserError, match="--with: a face has only one of"):
        run_here("acgan_celeba", "sample", folder, to="more", with_=",".join(faces.FACE_ATTRIBUTES[:2]))
    with pytest.raises(UserError, match="--with Hat: no Hat; the run has"):
        run_here("acgan_celeba", "sample", folder, to="more", with_="Hat")
    assert not (tmp_path / "more").exists()
    data = Data("", "faces", "", torch.zeros(9, 3, 8, 8), torch.eye(3).repeat(3, 1), ("a", "b", "c"), "")
    y = acgan_celeba.sample_attributes(data, 50, torch.Generator().manual_seed(0), [1])  # without groups
    assert y[:, 1].all() and y[:, 0].any() and not y[:, 0].all()


def test_a_digit_is_that_of_the_matched_category(trained, tmp_path, monkeypatch):
    """labels.json has the category, the digit it is matched with, and the codes of each image."""
    folder, asked, join = trained("infogan_mnist", judge="auto"), [], infogan_mnist.join
    digits, _ = match(torch.tensor(json.loads((folder / "scores.json").read_text())["last"]["shares"][0]))
    monkeypatch.setattr(infogan_mnist, "join", lambda z, *rest: (asked.append(rest), join(z, *rest))[1])

    def sample(to: str, **fields) -> list[dict]:
        asked.clear()
        run_here("infogan_mnist", "sample", folder, to=to, n=7, **fields)
        named = json.loads((tmp_path / to / "labels.json").read_text())
        assert list(named) == [f"{i}.png" for i in range(7)] and len(pixels(tmp_path / to)) == 7
        (categories, codes, *_), = asked
        assert [row["category"] for row in named.values()] == categories.tolist()
        assert [row["codes"] for row in named.values()] == codes.tolist()
        return list(named.values())
    assert {(row["category"], row["digit"]) for row in sample("images", digit="4")} == {(digits.index(4), 4)}
    some = sample("any")
    assert all(row["digit"] == digits[row["category"]] for row in some)
    assert len({row["digit"] for row in some}) > 2
    (folder / "scores.json").unlink()
    assert {row["digit"] for row in sample("unknown")} == {-1}
    with pytest.raises(UserError, match="scores.json can't be read.*which --eval writes"):
        run_here("infogan_mnist", "sample", folder, to="more", digit="4")


def test_a_category_of_no_digit_is_said(trained):
    folder = trained("infogan_mnist", n_categories=3)
    shares = torch.eye(10)[[7, 0, 1]].tolist()
    (folder / "scores.json").write_text(json.dumps({"last": {"shares": [shares]}}))
    with pytest.raises(UserError, match="--digit 4: no category of .* is this digit"):
        run_here("infogan_mnist", "sample", folder, to="more", digit="4")


def test_a_run_that_takes_no_pictures_is_sampled_elsewhere(here, monkeypatch):
    """Such as one of another user, or on a medium that can only be read."""
    folder, write = run_here("dcgan_mnist", iters=1, judge="none"), pictures.atomic_write

    def read_only(path: Path, *rest) -> None:
        if folder in path.parents:
            raise OSError(30, "Read-only file system", str(path))
        write(path, *rest)
    monkeypatch.setattr(pictures, "atomic_write", read_only)
    status, _, error = call("dcgan_mnist", "--sample", folder)
    assert status == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {folder} takes no pictures (") and error.endswith(": use --to FOLDER\n")
    assert call("dcgan_mnist", "--sample", folder, "--to", "images")[0] == 0
    assert len(list(Path("images").glob("*.png"))) == 100


def test_mistakes_are_refused_before_anything_is_written(here, refuses):
    folder = run_here("sngan_iclevr", iters=2, judge="none")
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "mine.json").write_text('[["red cube"], ["red cube", "hat"]]')
    for labels, message in (("red cubes", "set 1 has an unknown object 'red cubes'"),
                            ("mine.json", "set 2 has an unknown object 'hat'"),
                            ("none.json", "FileNotFoundError"),
                            ("red cube;red cube,red cube", "set 2 should name 1 to 3 different objects")):
        refuses("sngan_iclevr", "--sample", folder, "--to", "x", "--labels", labels, message=message)
    for argv, message in (("--to x --n 0", "--n 0: must be"), ("--to full", "full already exists"),
                          ("--labels cube", "--labels is for --sample RUN --to FOLDER")):
        refuses("sngan_iclevr", "--sample", folder, *argv.split(), message=message)
    refuses("sngan_iclevr", "--resume", folder, "--to", "x", message="--to is for --sample")
