"""Mistakes of users: one error line that names the file or flag, exit status 2, and nothing written."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, flags, make_iclevr, make_mnist, run_here

INT, REAL, COUNT = "must be int, at least 0", "must be float, at least 0", "must be int, at least 1 and below 1e+09"
FLAGS = {  # script: flags → part of the message
    "dcgan_mnist": {
        "--iters 0": f"--iters 0: {COUNT}", "--iters 1e4": "argument --iters: invalid int value",
        "--iters 99999999999": COUNT, "--batch-size 1": "--batch-size 1: must be int, at least 2",
        "--lr-g -1": f"--lr-g -1.0: {REAL}", "--lr-g nan": f"--lr-g nan: {REAL}", "--lr-d inf": "--lr-d inf",
        "--seed -1": f"--seed -1: {INT}", "--latent-dim 0": f"--latent-dim 0: {COUNT}",
        "--ema 1": "--ema 1.0: must be float, at least 0 and below 1\n", "--log-every -1": f"every -1: {INT}",
        "--eval-images 1": "--eval-images 1: must be", "--judge-width 1": "--judge-width 1: must be",
        "--net transformer": "--net: invalid choice: 'transformer'", "--device gpu": "--device gpu",
        "--device cuda:99": "--device cuda:99", "--learning-rate 1": "unrecognized arguments",
        "--iter 5": "unrecognized arguments", "extra": "unrecognized arguments", "--iters": "expected one",
        "--resume a --sample a": "not allowed with argument", "--quick --resume a": "--quick is for a new",
        "--recipe R3GAN": "--recipe: invalid choice: 'R3GAN'", "--recipe": "--recipe: expected one argument",
        "--quick --recipe robust": "--recipe: invalid choice: 'robust' (choose from", "--n 5": "--n is for"},
    "infogan_mnist": {
        "--n-categories 1": "--n-categories 1: must be int, at least 2", "--image-size 48": "invalid choice",
        "--category 10": "--category 10 must be below --n-categories 10", "--noise -1": f"--noise -1.0: {REAL}",
        "--recipe r3gan": "--recipe: invalid choice: 'r3gan'"},
    "acgan_celeba": {
        "--loss wgan-clip --d-norm spectral": "clipping does nothing", "--loss wasserstein": "invalid choice",
        "--crop -1": f"--crop -1: {INT}", "--beta1 1": "--beta1 1.0: must be"},
    "vae_celeba": {"--kl-weight -1": "--kl-weight -1.0", "--lr-g 1": "unrecognized arguments"},
    "sngan_iclevr": {"--flip-labels 1.1": "--flip-labels 1.1: must be", "--loss paired": "invalid choice"},
    "cdcgan_iclevr": {
        "--quick --smooth-labels": "are for --loss bce", "--recipe r3gan --flip-labels 0.1": "for --loss bce",
        "--recipe r3gan --d-cond plane": "--d-cond plane needs --aux-weight 0"},
}
WITH_DATA = {  # what is known only with the data, but before training
    "dcgan_mnist": {
        "--batch-size 61": "--batch-size 61 is more than the 60", "--judge text": "text can't be read",
        "--judge nowhere.pt": "nowhere.pt can't be read", "--fid-weights text": "its SHA-256 is",
        "--fid-weights nowhere.pth": "nowhere.pth can't be read", "--out text": "text already exists",
        "--out full": "full already exists", "--out text/run": "text is not a writable folder",
        f"--out {'x' * 300}": "File name too long"},
    "acgan_celeba": {"--n-synthetic 10": "10 images are too few", "--attributes Smiling": "no Smiling"},
    "sngan_iclevr": {"--n-scenes 3": "fewer than 10 scenes", "--judge digits.pt": "24"},
}


@pytest.fixture
def files(here):
    """What some of the commands name."""
    (here / "text").write_text("not a checkpoint")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").touch()
    torch.save({"model": {"fc.0.weight": torch.zeros(10, 512)}}, here / "digits.pt")
    return here


@pytest.mark.parametrize("name, argv", [(name, argv) for name in FLAGS for argv in FLAGS[name]])
def test_mistakes_on_the_command_line(refuses, name, argv):
    refuses(name, *argv.split(), message=FLAGS[name][argv])


@pytest.mark.parametrize("name, argv", [(name, argv) for name in WITH_DATA for argv in WITH_DATA[name]])
def test_mistakes_that_only_the_data_show(files, refuses, name, argv):
    refuses(name, *flags(TINY[name] | dict(iters=2)), *argv.split(), message=WITH_DATA[name][argv])


def config(drop: str = "", sittings: list | None = None, **changes):
    """A function that edits the config.json of a run."""
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content["config"] |= changes
        content["config"].pop(drop, None)
        content |= {} if sittings is None else {"sittings": sittings}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return edit


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name: str, size: int = 100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def checkpoints(damage):
    return lambda folder: [damage(path) for path in folder.glob("*.pt")]


def nothing(_folder: Path) -> None:
    pass


cut = checkpoints(lambda path: truncate(path.name)(path.parent))
OLDER = config("recipe", [{"commit": "0ldc0ffee0"}, {"commit": "451a362b7f"}], loss="paired")
OLDER_MESSAGE = ("run was made by another version of dcgan_mnist.py (fields ['recipe'] differ): check out "
                 "its commit, 451a362b7f, to use it\n")
RUNS = [  # damage to the folder of a run, how it is used, part of the message
    (nothing, "--resume run --batch-size 9", "--batch-size is 8 there, 9 here"),
    (nothing, "--resume run --recipe r3gan", "--recipe is 'paper' there, 'r3gan' here"),
    (nothing, "--resume run --iters 1", "--iters 1: run is already at 2"),
    (nothing, "--sample run --iters 9", "--iters is 2 there, 9 here"),
    (nothing, "--eval run --judge none", "--eval needs a judge"),
    (nothing, "--resume nowhere", "nowhere/config.json can't be read"),
    (nothing, "--resume run/config.json", "can't be read"),
    (nothing, "--eval run --data mnist/gone", "mnist/gone"),
    *((OLDER, f"{action} run", OLDER_MESSAGE) for action in ("--resume", "--sample", "--eval")),
    (config("recipe", []), "--resume run", "check out its commit, unknown, to use it"),
    (config(color=1), "--resume run", "another version of dcgan_mnist.py (fields ['color'] differ)"),
    (lambda f: (f / "config.json").unlink(), "--resume run", "config.json can't be read (FileNotFoundError"),
    (truncate("config.json"), "--resume run", "config.json can't be read (JSONDecodeError"),
    (write("config.json", b"\xff\xfe\x00"), "--eval run", "config.json can't be read"),
    (write("config.json", b"[]"), "--resume run", "config.json can't be read (TypeError"),
    (config(iters="many"), "--resume run", "--iters 'many': must be int"),
    (config(lr_g=None), "--resume run", "--lr-g None: must be float"),
    (config(net="vit"), "--resume run", "--net 'vit': must be"),
    (config(recipe="best"), "--sample run", "--recipe 'best': must be ('paper', 'r3gan')"),
    (config(latent_dim=6), "--resume run --iters 3", "can't be read (RuntimeError"),
    (config(n_synthetic=61), "--resume run --iters 3", "does not hold the images that run was trained on"),
    (config(n_synthetic=61), "--sample run", "does not hold the images that run was trained on"),
    (checkpoints(Path.unlink), "--sample run", "run has no checkpoint yet"),
    (cut, "--resume run", "can't be read (BadZipFile"), (cut, "--eval run", "can't be read (BadZipFile"),
    (checkpoints(lambda p: torch.save({"G": {}}, p)), "--resume run", "can't be read"),
    (checkpoints(lambda p: torch.save([1], p)), "--sample run", "can't be read (AttributeError"),
    (checkpoints(lambda p: p.write_bytes(b"PK\x03\x04" + b"x" * 99)), "--eval run", "can't be read"),
    (write("metrics.csv", b"step,seconds\nx,\0\n"), "--resume run --iters 3", "metrics.csv can't be read"),
]


@pytest.fixture(scope="module")
def trained(workdir, tmp_path_factory) -> Path:
    """The folder of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        return run_here("dcgan_mnist", iters=2, save_every=1, out=str(tmp_path_factory.mktemp("t") / "run"))


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_mistakes_with_runs(here, refuses, trained, number):
    damage, command, message = RUNS[number]
    shutil.copytree(trained, here / "run")
    damage(here / "run")
    refuses("dcgan_mnist", *command.split(), message=message)


SETS = [  # script, damage to the set in data/, part of the message
    ("sngan_iclevr", shutil.rmtree, "set/objects.json can't be read (FileNotFoundError"),
    ("sngan_iclevr", lambda f: (f / "test.json").unlink(), "set/test.json can't be read"),
    ("sngan_iclevr", write("train.json", b"{"), "train.json can't be read (JSONDeco"),
    ("sngan_iclevr", write("train.json", b'{"a.png": []}'), "1 to 3 different objects"),
    ("sngan_iclevr", write("test.json", b'[["red pyramid"]]'), "unknown object"),
    ("sngan_iclevr", write("objects.json", b'{"red cube": 7}'), "ids are not 0, 1, 2"),
    ("cdcgan_iclevr", lambda f: shutil.rmtree(f / "images"), "images"),
    ("cdcgan_iclevr", lambda f: next((f / "images").iterdir()).unlink(), "is missing (1 of 18 images are)"),
    ("cdcgan_iclevr", lambda f: next((f / "images").iterdir()).write_bytes(b"x"), "it should be an image"),
    ("dcgan_mnist", lambda f: shutil.rmtree(f / "MNIST"), "MNIST's four files"),
    ("dcgan_mnist", truncate("MNIST/raw/train-images-idx3-ubyte"), "MNIST's four"),
    ("infogan_mnist", lambda f: (f / "MNIST/raw/t10k-labels-idx1-ubyte").unlink(), "MNIST's four files"),
    ("vae_celeba", nothing, "set/list_attr_celeba.txt can't be read"),
]


@pytest.mark.parametrize("number", range(len(SETS)))
def test_mistakes_with_data(here, refuses, number):
    name, damage, message = SETS[number]
    (make_iclevr if "iclevr" in name else make_mnist)(here / "set")
    damage(here / "set")
    argv = flags(TINY[name] | dict(iters=2, judge="none", data=str(here / "set")))
    refuses(name, *argv, message=message)
