"""Everything here is offline and runs in a temporary folder: scripts keep data/ and runs/ in the working
directory."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

# a run of seconds: drawn data, narrow networks, a judge that has hardly learnt
TINY = [
    "--data",
    "drawn",
    "--n-scenes",
    "24",
    "--image-size",
    "32",
    "--ch",
    "2",
    "--batch-size",
    "8",
    "--n-dis",
    "2",
    "--z-dim",
    "8",
    "--judge-width",
    "8",
    "--judge-steps",
    "4",
    "--eval-draws",
    "2",
    "--log-every",
    "2",
    "--device",
    "cpu",
]


def script(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does."""
    return subprocess.run(
        command(name, *args), cwd=cwd, capture_output=True, text=True, timeout=200, env=environment()
    )


def command(name: str, *args: str) -> list[str]:
    return [sys.executable, str(ROOT / name), *args]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """Shared by the runs of one session, so that data are drawn and the judge is trained once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def tiny_run(workdir) -> Path:
    """A finished run of nine iterations."""
    done = script(
        "sngan_iclevr.py",
        *TINY,
        "--iters",
        "9",
        "--out",
        "runs/tiny",
        "--sample-every",
        "3",
        "--eval-every",
        "4",
        "--save-every",
        "4",
        cwd=workdir,
    )
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "tiny"


def make_iclevr(folder: Path, n_scenes: int = 6) -> Path:
    """A folder of i-CLEVR's layout with small pictures of noise, 40×30."""
    from common import worlds
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    train = {}
    for scene in range(n_scenes):
        objects = [str(o) for o in rng.permutation(worlds.OBJECTS)[:3]]
        for frame in range(3):
            name = f"CLEVR_train_{scene:06}_{frame}.png"
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / "images" / name)
            train[name] = objects[: frame + 1]
    ids = {name: i for i, name in enumerate(worlds.OBJECTS)}
    for name, content in (
        ("train", train),
        ("objects", ids),
        ("test", [["red cube"], ["gray sphere", "blue cube"]]),
        ("new_test", [["cyan cylinder"]]),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def iclevr(tmp_path) -> Path:
    return make_iclevr(tmp_path / "iclevr")
