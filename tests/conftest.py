"""Everything here is offline and runs in a temporary folder: scripts keep data/ and runs/ in the working
directory."""
import csv
import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: two workers on two cores, a thread each,
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the scripts that they start
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    return os.environ | {"PYTHONUNBUFFERED": "1"}


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


@pytest.fixture(autouse=True)
def _not_deterministic():
    """--deterministic is for a whole process, but not for the tests after one that sets it."""
    yield
    torch.use_deterministic_algorithms(False)


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


def make_mnist(root: Path, n_train: int = 40, n_test: int = 20) -> Path:
    """root/MNIST/raw with the four idx files, of drawn digits."""
    from common import worlds
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels, _ = worlds.digits(n_train + n_test)
    for part, rows in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        for kind, dims, x in (("images-idx3", 3, images[rows, 0]), ("labels-idx1", 1, labels[rows].byte())):
            header = bytes([0, 0, 8, dims]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + x.numpy().tobytes())
    return root


def same(a, b, path="") -> None:
    """Two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def same_runs(a, b) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = (torch.load(f / name, weights_only=True) for f in (a, b))
        one["config"].pop("out"), other["config"].pop("out")
        same(one, other, name)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(f / "metrics.csv"))]
        for f in (a, b)
    ]
    assert rows[0] == rows[1]
    pictures = [{p.name: p.read_bytes() for p in (f / "samples").iterdir()} for f in (a, b)]
    assert pictures[0] == pictures[1]


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not come that far")


def main(module, *argv: str) -> None:
    """Call a script's main in this process, in the working directory there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [Path(module.__file__).name, *argv])
        assert not module.main()


def cut_off_and_resumed(module, at: int, **fields) -> None:
    """Trains in the working directory, once whole and once cut off after the row logged at step `at`, then
    resumed; expects the same bits. (test_sngan.py does so to processes, with signals.)
    """
    from common.run import Run

    class Cut(Exception):
        pass

    def log(self, step, **scalars):
        original(self, step, **scalars)
        if step >= at:
            raise Cut
    assert module.train(module.Config(out="whole", **fields)) == 0
    original = Run.log
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Run, "log", log)
        module.train(module.Config(out="cut", **fields))
    assert 0 < torch.load("cut/last.pt", weights_only=True)["step"] < at
    assert module.train(module.Config(out="cut", **fields), Path("cut")) == 0
    same_runs(Path("cut"), Path("whole"))


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refuses(tmp_path, monkeypatch, capsys, request):
    """Runs main of the test module's SCRIPT; expects status 2, one line, and an untouched folder."""
    from common import run

    def files() -> dict:
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "cache" not in str(p)}

    def check(*argv, message):
        script = request.module.SCRIPT
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [Path(script.__file__).name, *argv])
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run.entry(script.main)
        error = capsys.readouterr().err
        assert left.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert files() == before

    return check
