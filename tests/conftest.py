"""Everything here is offline and runs in temporary folders: scripts keep data/ and runs/ in the working
directory."""
import csv
import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a thread for each of the two workers
    os.environ["OMP_NUM_THREADS"] = "1"
import importlib
import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path

# started by nohup or a shell's &, this process ignores them, and scripts would, too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# settings of runs that take seconds: synthetic data, narrow networks, a judge of four steps
COMMON = dict(data="synthetic", batch_size=8, judge_width=8, judge_steps=4, eval_draws=2, log_every=2,
              device="cpu")
DIGITS = COMMON | dict(n_synthetic=60, eval_images=40)
FACES = COMMON | dict(n_synthetic=300, image_size=32, ch=1, z_dim=4, eval_images=20)
SCENES = COMMON | dict(n_scenes=24, image_size=32, ch=2, z_dim=9)
TINY = {
    "dcgan_mnist": DIGITS | dict(latent_dim=5, hidden_dim=3),
    "infogan_mnist": DIGITS | dict(ch=2, image_size=32),
    "acgan_celeba": FACES | dict(n_dis=2),
    "vae_celeba": FACES,
    "sngan_iclevr": SCENES | dict(n_dis=2),
    "cdcgan_iclevr": SCENES,
}


def flags(fields: dict) -> list[str]:
    """Settings as a command line."""
    text = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        switch = f"--{'' if value else 'no-'}{flag}"
        text += [switch] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return text


def process(name: str, *args: str, cwd: Path) -> dict:
    """The process of a script of the project, as a user starts it."""
    return dict(args=[sys.executable, str(ROOT / f"{name}.py"), *args], cwd=cwd, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def script(name: str, *args: str, cwd: Path) -> str:
    """Run a script to its end; returns its output."""
    done = subprocess.run(**process(name, *args, cwd=cwd), timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(name: str, action: str = "train", folder: str | Path | None = None, **fields) -> Path:
    """Call a script's main in this process and the working directory there is; returns the run's folder."""
    from harness.cli import FREE_ON_RESUME, FREE_ON_USE, stored_config
    from harness.run import Run
    module = importlib.import_module(name)
    if action == "train":
        fields = TINY[name] | fields
        cfg = module.Config(**module.RECIPES[fields.get("recipe", "paper")] | fields)
    else:
        free = FREE_ON_RESUME if action == "resume" else FREE_ON_USE
        cfg = stored_config(module.Config, Path(folder), f"{name}.py", fields, free)
    run = Run(cfg, Path(module.__file__), action, Path(folder) if folder else None, module.RECIPES)
    module.main(run)
    return run.folder


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_random_kills_lose_nothing kills")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """Shared by the runs of one session, so that data are rendered and judges trained once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def here(workdir, tmp_path) -> Path:
    """The test's working directory, with the session's data/."""
    (workdir / "data").mkdir(exist_ok=True)
    (tmp_path / "data").symlink_to(workdir / "data")
    return tmp_path


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """A working directory for each test; --deterministic, which is for a process, ends with the test."""
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


def make_iclevr(folder: Path, n_scenes: int = 6) -> Path:
    """A folder of i-CLEVR's layout with small pictures of noise, 40×30."""
    from synthetic import scenes
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    train = {}
    for scene in range(n_scenes):
        objects = [str(o) for o in rng.permutation(scenes.OBJECTS)[:3]]
        for frame in range(3):
            name = f"CLEVR_train_{scene:06}_{frame}.png"
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / "images" / name)
            train[name] = objects[:frame + 1]
    lists = {"train": train, "objects": {name: i for i, name in enumerate(scenes.OBJECTS)},
             "test": [["red cube"], ["gray sphere", "blue cube"]], "new_test": [["cyan cylinder"]]}
    for name, content in lists.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def iclevr(tmp_path) -> Path:
    return make_iclevr(tmp_path / "iclevr")


def make_mnist(root: Path, n_train: int = 40, n_test: int = 20) -> Path:
    """root/MNIST/raw with the four idx files, of synthetic digits."""
    from synthetic import digits
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels, _ = digits.render(n_train + n_test)
    for part, rows in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        for kind, dims, x in (("images-idx3", 3, images[rows, 0]), ("labels-idx1", 1, labels[rows].byte())):
            header = bytes([0, 0, 8, dims]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + x.numpy().tobytes())
    return root


def settings(**fields) -> SimpleNamespace:
    """What the loaders read of a config."""
    return SimpleNamespace(**dict(data="synthetic", image_size=32, n_scenes=24, n_synthetic=60, attributes="",
                                  crop=0, skip_bad_images=False) | fields)


def same(a, b) -> None:
    """Two checkpoints hold the same bits."""
    (ours, structure), (theirs, other) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    assert structure == other
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, keystr(path)


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells and without seconds."""
    with open(folder / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(f)]


def same_runs(a: Path, b: Path) -> None:
    assert (a / "best.pt").exists() == (b / "best.pt").exists()
    for name in ("last.pt", "best.pt") if (a / "best.pt").exists() else ("last.pt",):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        one["config"].pop("out"), other["config"].pop("out")
        same(one, other)
    assert rows_of(a) == rows_of(b)
    pictures = [{p.name: p.read_bytes() for p in (folder / "samples").iterdir()} for folder in (a, b)]
    assert pictures[0] == pictures[1]


class Reader(nn.Module):
    """A judge's network that reads probabilities and features off an image by two functions. It takes images
    of `size`, where that is set.
    """

    def __init__(self, probabilities, features=lambda x: x[:, 0, 0, :2]):
        super().__init__()
        self.fc, self.weight = nn.Identity(), nn.Parameter(torch.zeros(1))
        self.probabilities, self.features = probabilities, features

    def forward(self, x):
        self.fc(self.features(x).double())
        return self.probabilities(x)


def judge_of(kind: str, net: nn.Module):
    """That network as the judge of a kind of data."""
    import evaluator
    kind = evaluator.KINDS[kind]
    kind = replace(kind, size=getattr(net, "size", kind.size))
    return evaluator.Judge(net.requires_grad_(False), kind, "", None)


def get_judge(data, width: int = 8, steps: int = 1, judge: str | Path = "auto"):
    """A script's judge of these data, narrow and hardly trained if it has to be trained."""
    import evaluator
    cfg = settings(judge=str(judge), judge_width=width, judge_steps=steps)
    return evaluator.get_judge(cfg, data, torch.device("cpu"))


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.reads += 1
        return func(*args, **(kwargs or {}))


def call(name: str, *argv) -> tuple[int, str, str]:
    """Call a script in this process with a command line; its exit status, output and errors."""
    from harness.run import launch
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", [f"{name}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            launch(module.main, module.Config, module.RECIPES, module.QUICK)
    return left.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def refuses(tmp_path):
    """Calls a script with a command line; expects status 2, one error line, and an untouched folder."""
    def files() -> dict:
        found = (path for path in tmp_path.rglob("*") if "cache" not in str(path))
        return {path: path.is_file() and path.stat().st_mtime_ns for path in found}

    def check(name, *argv, message):
        before = files()
        status, _, error = call(name, *argv)
        assert status == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert files() == before

    return check
