"""Mistakes of users: one error line that names the file or flag, exit status 2, and nothing written."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluator import ResNet18
from tests.conftest import TINY, call, flags, make_iclevr, make_mnist, run_here

FLAGS = {  # script: flags → part of the message
    "dcgan_mnist": {
        "--iters 0": "--iters 0: must be int, at least 1 and below 1e+09\n", "--iters 1e4": "invalid int",
        "--iters 99999999999": "must be int", "--batch-size 1": "--batch-size 1: must be int, at least 2",
        "--lr-g -1": "--lr-g -1.0: must be float", "--lr-g nan": "-g nan", "--lr-d inf": "-d inf",
        "--seed -1": "--seed -1: must be int, at least 0", "--log-every -1": "--log-every -1: must be int",
        "--ema 1": "--ema 1.0: must be float, at least 0 and below 1\n", "--latent-dim 0": "--latent-dim 0",
        "--net transformer": "--net: invalid choice: 'transformer'", "--device cuda:99": "--device cuda:99",
        "--device gpu": "--device gpu", "--learning-rate 1": "unrecognized", "--iter 5": "unrecognized",
        "extra": "unrecognized arguments", "--iters": "expected one", "--n 5": "--n is for --sample",
        "--resume a --sample a": "not allowed with argument", "--quick --resume a": "--resume a: there is no",
        "--sample text": "--sample text: there is no such folder\n", "--continue": "--continue needs --out",
        "--continue --out full": "full already exists", "--continue --eval full": "not allowed with argument",
        "--data nowhere": "--data nowhere: there is no such folder\n", "--data text": "--data text: there is",
        "--device meta": "--device meta is not available (Tensor.item() cannot be called on meta tensors): ",
        "--device hpu": "--device hpu is not available (", "--device xla": "--device xla is not available (",
        "--recipe R3GAN": "--recipe: invalid choice: 'R3GAN' (choose from", "--recipe": "expected one",
        "--quick --recipe robust": "--recipe: invalid choice: 'robust'",
        # what is known only with the data, but before training
        "--batch-size 61": "--batch-size 61 is more than the 60", "--judge text": "text can't be read",
        "--judge nowhere.pt": "nowhere.pt can't be read", "--fid-weights text": "its SHA-256 is",
        "--fid-weights nowhere.pth": "nowhere.pth can't be read", "--out text": "text already exists",
        "--out full": "full already exists", "--out text/run": "text is not a writable folder",
        f"--out {'x' * 300}": "File name too long"},
    "infogan_mnist": {
        "--n-categories 1": "--n-categories 1: must be int, at least 2", "--image-size 48": "invalid choice",
        "--category 10": "--category 10 must be below --n-categories 10", "--recipe r3gan": "choose from"},
    "acgan_celeba": {
        "--loss wgan-clip --d-norm spectral": "clipping does nothing", "--beta1 1": "--beta1 1.0: must be",
        "--n-synthetic 10": "10 images are too few", "--attributes Smiling": "no Smiling"},
    "vae_celeba": {"--kl-weight -1": "--kl-weight -1.0", "--lr-g 1": "unrecognized arguments"},
    "sngan_iclevr": {
        "--flip-labels 1.1": "--flip-labels 1.1: must be", "--loss paired": "invalid choice: 'paired'",
        "--n-scenes 3": "fewer than 10 scenes", "--judge digits.pt": "10 classes, the data has 24"},
    "cdcgan_iclevr": {
        "--quick --smooth-labels": "are for --loss bce",
        "--recipe r3gan --flip-labels 0.1": "for --loss bce"},
}


@pytest.mark.parametrize("name, argv", [(name, argv) for name in FLAGS for argv in FLAGS[name]])
def test_mistakes_on_the_command_line(here, refuses, name, argv):
    (here / "text").write_text("not a checkpoint")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").touch()
    torch.save({"model": {"fc.0.weight": torch.zeros(10, 512)}}, here / "digits.pt")
    refuses(name, *flags(TINY[name] | dict(iters=2)), *argv.split(), message=FLAGS[name][argv])


def config(drop: str = "", sittings: list | None = None, **changes):
    """A function that edits the config.json of a run."""
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content["config"] |= changes
        content["config"].pop(drop, None)
        content |= {} if sittings is None else {"sittings": sittings}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return edit


def write(name: str, content: bytes | None = None):
    """A function that writes this to a file, or cuts the file off."""
    return lambda folder: (folder / name).write_bytes(content or (folder / name).read_bytes()[:100])


def checkpoints(damage):
    return lambda folder: [damage(path) for path in folder.glob("*.pt")]


def nothing(_folder: Path) -> None:
    pass


cut = checkpoints(lambda path: write(path.name)(path.parent))
older = ("run was made by another version of dcgan_mnist.py (fields ['recipe'] differ): check out its "
         "commit, {}, to use it\n")
SITTINGS = [{"commit": "0ldc0ffee0"}, {"commit": "451a362b7f"}]
RUNS = [  # damage to the folder of a run, how it is used, part of the message
    (nothing, "--resume run --batch-size 9", "--batch-size is 8 there, 9 here"),
    (nothing, "--resume run --recipe r3gan", "--recipe is 'paper' there, 'r3gan' here"),
    (nothing, "--resume run --iters 1", "--iters 1: run is already at 2"),
    (nothing, "--sample run --iters 9", "--iters is 2 there, 9 here"),
    (nothing, "--eval run --judge none", "--eval needs a judge"),
    (nothing, "--resume run --quick", "--recipe is 'paper' there, 'r3gan' here"),
    (nothing, "--continue --out run --batch-size 9", "--batch-size is 8 there, 9 here"),
    (nothing, "--resume nowhere", "--resume nowhere: there is no such folder"),
    (nothing, "--eval run/config.json", "--eval run/config.json: there is no such folder"),
    (nothing, "--eval run --data x/gone", "--data x/gone: there is no such folder"),
    *((config("recipe", SITTINGS, loss="paired"), f"{action} run", older.format("451a362b7f"))
      for action in ("--resume", "--sample", "--eval")),  # a run from before recipes had names
    (config("recipe", []), "--resume run", older.format("unknown")),
    (config(color=1), "--resume run", "another version of dcgan_mnist.py (fields ['color'] differ)"),
    (write("config.json"), "--resume run", "config.json can't be read (JSONDecodeError"),
    (write("config.json", b"\xff\xfe\x00"), "--eval run", "config.json can't be read"),
    (write("config.json", b"[]"), "--resume run", "config.json can't be read (TypeError"),
    (write("config.json", b"{}"), "--resume run", "config.json can't be read (KeyError"),
    (config(iters="many"), "--resume run", "--iters 'many': must be int"),
    (config(lr_g=None), "--resume run", "--lr-g None: must be float"),
    (config(deterministic=1), "--resume run", "--deterministic 1: must be bool"),
    (config(recipe="best"), "--sample run", "--recipe 'best': must be ('paper', 'r3gan')"),
    (config(latent_dim=6), "--resume run --iters 3", "can't be read (RuntimeError"),
    *((config(latent_dim=6), f"{action} run", "If a network in dcgan_mnist.py was changed since, start a new")
      for action in ("--resume", "--sample", "--eval")),
    (lambda folder: (folder / "config.json").unlink(), "--resume run", "config.json can't be read (FileNotF"),
    (config(n_synthetic=61), "--resume run --iters 3", "does not hold the images that run was trained on"),
    (config(n_synthetic=61), "--sample run", "does not hold the images that run was trained on"),
    (config(n_synthetic=61), "--eval run", "does not hold the images that run was trained on"),
    (checkpoints(Path.unlink), "--sample run", "run has no checkpoint yet"),
    (cut, "--resume run", "can't be read (BadZipFile"), (cut, "--eval run", "can't be read (BadZipFile"),
    (checkpoints(lambda p: torch.save({"G": {}}, p)), "--resume run", "can't be read"),
    (checkpoints(lambda p: torch.save([1], p)), "--sample run", "can't be read (AttributeError"),
    (write("metrics.csv", b"step,seconds\nx,\0\n"), "--resume run --iters 3", "metrics.csv can't be read"),
]


@pytest.fixture(scope="module")
def trained(workdir, tmp_path_factory) -> Path:
    """The folder of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        return run_here("dcgan_mnist", iters=2, save_every=1, out=str(tmp_path_factory.mktemp("t") / "run"))


@pytest.mark.parametrize("damage, command, message", RUNS, ids=[f"{i}" for i in range(len(RUNS))])
def test_mistakes_with_runs(here, refuses, trained, damage, command, message):
    shutil.copytree(trained, here / "run")
    damage(here / "run")
    refuses("dcgan_mnist", *command.split(), message=message)


@pytest.mark.parametrize("name, damage, message", [  # damage to the set's folder; test_datasets.py has more
    ("sngan_iclevr", shutil.rmtree, "set: there is no such folder\n"),
    ("sngan_iclevr", lambda f: (f / "objects.json").unlink(), "objects.json can't be read (FileNotF"),
    ("sngan_iclevr", write("test.json", b'[["red pyramid"]]'), "unknown object"),
    ("cdcgan_iclevr", lambda f: next((f / "images").iterdir()).write_bytes(b"x"), "it should be an image"),
    ("dcgan_mnist", write("MNIST/raw/train-images-idx3-ubyte"), "MNIST's four"),
    ("vae_celeba", nothing, "set/list_attr_celeba.txt can't be read")])
def test_mistakes_with_data(here, refuses, name, damage, message):
    (make_iclevr if "iclevr" in name else make_mnist)(here / "set")
    damage(here / "set")
    refuses(name, *flags(TINY[name] | dict(iters=2, judge="none", data=str(here / "set"))), message=message)


def test_without_the_images_a_run_is_scored_by_a_judge_that_is_there(here, refuses):
    fields = TINY["sngan_iclevr"] | dict(iters=2, data=str(make_iclevr(here / "set", 12)), judge="none")
    folder = run_here("sngan_iclevr", **fields)
    shutil.rmtree(here / "set")
    torch.save({"model": ResNet18(24, 8).state_dict()}, here / "judge.pt")
    refuses("sngan_iclevr", "--eval", folder, "--judge", "auto", message="there is no judge of i-CLEVR")
    status, output, error = call("sngan_iclevr", "--eval", folder, "--judge", here / "judge.pt")
    assert (status, error) == (0, "") and "going on without the images" in output
    assert (folder / "scores.json").exists()


@pytest.mark.parametrize("name", [b"caf\xe9 \xff", b"line\nbreak"])
def test_any_name_of_a_folder_will_do(here, name):
    folder = here / os.fsdecode(name) / os.fsdecode(name)
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (20 + i, 30), (10 * i, 0, 0)).save(folder / os.fsdecode(b"%d" % i + name + b".png"))
    fields = TINY["vae_celeba"] | dict(iters=2, data=str(folder.parent), out="run")
    for argv in (["--continue", *flags(fields)], ["--continue", *flags(fields | dict(iters=4))],
                 ["--sample", "run"]):
        assert call("vae_celeba", *argv)[::2] == (0, "")
    assert torch.load("run/last.pt", weights_only=True)["step"] == 4
    stored = json.loads(Path("run", "config.json").read_text(encoding="utf-8"))
    assert stored["config"]["data"] == str(folder.parent)
    shutil.rmtree(folder)
    status, _, error = call("vae_celeba", "--resume", "run")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
