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
from common.datasets import Data, label_sets
from common.files import UserError
from synthetic import faces, scenes
from synthetic.measures import match
from tests.conftest import TINY, run_here


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
    labelled = name in ("acgan_celeba", "sngan_iclevr", "cdcgan_iclevr")
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
    asked, call = [], EMA.__call__
    monkeypatch.setattr(EMA, "__call__", lambda net, z, y: (asked.append(y), call(net, z, y))[1])
    folder = trained(name)
    asked.clear()
    run_here(name, "sample", folder, to="images", n=5, labels="red cube,blue sphere; gray cylinder")
    pair, single = ["red cube", "blue sphere"], ["gray cylinder"]
    named = json.loads((tmp_path / "images" / "labels.json").read_text())
    assert {file: set(names) for file, names in named.items()} == {
        f"{i}.png": set((pair, single)[i % 2]) for i in range(5)}
    sets, (ids,) = label_sets("red cube, blue sphere;gray cylinder", scenes.OBJECTS), asked
    assert torch.equal(ids, sets[[0, 1, 0, 1, 0]])


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
    folder = trained("infogan_mnist", judge="auto")
    digits, _ = match(torch.tensor(json.loads((folder / "scores.json").read_text())["last"]["shares"][0]))
    asked, join = [], infogan_mnist.join
    monkeypatch.setattr(infogan_mnist, "join", lambda z, k, *rest: (asked.append(k), join(z, k, *rest))[1])
    run_here("infogan_mnist", "sample", folder, to="images", n=7, digit="4")
    assert torch.cat(asked).tolist() == [digits.index(4)] * 7 and len(pixels(tmp_path / "images")) == 7
    (folder / "scores.json").unlink()
    with pytest.raises(UserError, match="scores.json can't be read.*which --eval writes"):
        run_here("infogan_mnist", "sample", folder, to="more", digit="4")


def test_mistakes_are_refused_before_anything_is_written(here, refuses):
    folder = run_here("sngan_iclevr", iters=2, judge="none")
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    for labels, message in (("red cubes", "set 1 has an unknown object 'red cubes'"),
                            ("red cube;red cube,red cube", "set 2 should name 1 to 3 different objects")):
        refuses("sngan_iclevr", "--sample", folder, "--to", "x", "--labels", labels, message=message)
    for argv, message in (("--to x --n 0", "--n 0: must be"), ("--to full", "full already exists"),
                          ("--labels cube", "--labels is for --sample RUN --to FOLDER")):
        refuses("sngan_iclevr", "--sample", folder, *argv.split(), message=message)
    refuses("sngan_iclevr", "--resume", folder, "--to", "x", message="--to is for --sample")
