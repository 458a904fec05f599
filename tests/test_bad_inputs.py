"""Mistakes of users: one error line that names the file or flag, exit status 2, and nothing written."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, flags, make_iclevr, make_mnist, run_here

SMALL = {name: " ".join(flags(TINY[name] | dict(iters=2))) for name in TINY}

FLAGS = [  # command, part of the message
    ("dcgan_mnist --iters 0", "--iters 0: must be at least 1"),
    ("dcgan_mnist --iters -5", "--iters -5: must be at least 1"),
    ("dcgan_mnist --iters 1e4", "argument --iters: invalid int value"),
    ("dcgan_mnist --iters 99999999999", "at most 1,000,000,000"),
    ("dcgan_mnist --batch-size 1", "--batch-size 1: must be at least 2"),
    ("dcgan_mnist --net mlp --batch-size 1", "must be at least 2"),
    ("dcgan_mnist --lr-g -1", "--lr-g -1.0: must be at least 0 and finite\n"),
    ("dcgan_mnist --lr-g nan", "--lr-g nan"),
    ("dcgan_mnist --lr-d inf", "--lr-d inf"),
    ("dcgan_mnist --lr-d fast", "invalid float value"),
    ("dcgan_mnist --seed -1", "--seed -1: must be at least 0"),
    ("dcgan_mnist --seed 100000000000000", "at most 1,000,000,000"),
    ("dcgan_mnist --latent-dim 0", "--latent-dim 0"),
    ("dcgan_mnist --hidden-dim 0", "--hidden-dim 0"),
    ("dcgan_mnist --ema 1", "--ema 1.0: must be below 1"),
    ("dcgan_mnist --ema -0.1", "--ema -0.1"),
    ("dcgan_mnist --gamma -1", "--gamma -1.0"),
    ("infogan_mnist --noise -1", "--noise -1.0"),
    ("infogan_mnist --noise-iters 0", "--noise-iters 0"),
    ("dcgan_mnist --pairs 0", "--pairs 0"),
    ("dcgan_mnist --log-every -1", "--log-every -1: must be at least 0"),
    ("dcgan_mnist --sample-every x", "invalid int value"),
    ("dcgan_mnist --eval-images 1", "--eval-images 1: must be at least 2"),
    ("dcgan_mnist --eval-draws 0", "--eval-draws 0"),
    ("dcgan_mnist --judge-width 1", "--judge-width 1: must be at least 4"),
    ("dcgan_mnist --judge-steps 0", "--judge-steps 0"),
    ("dcgan_mnist --n-synthetic 0", "--n-synthetic 0"),
    ("dcgan_mnist --net transformer", "invalid choice"),
    ("dcgan_mnist --device gpu", "--device gpu is not available"),
    ("dcgan_mnist --device cuda:99", "--device cuda:99 is not available"),
    ("dcgan_mnist --precision fp8", "invalid choice"),
    ("dcgan_mnist --learning-rate 1", "unrecognized arguments"),
    ("dcgan_mnist --iter 5", "unrecognized arguments"),
    ("dcgan_mnist extra", "unrecognized arguments"),
    ("dcgan_mnist --iters", "expected one argument"),
    ("dcgan_mnist --resume a --sample a", "not allowed with argument"),
    ("infogan_mnist --n-categories 1", "--n-categories 1 must be at least 2"),
    ("infogan_mnist --category 10", "--category 10 below it"),
    ("infogan_mnist --category 99", "--category 99 below it"),
    ("infogan_mnist --q-weight -1", "--q-weight -1.0"),
    ("infogan_mnist --image-size 48", "invalid choice"),
    ("acgan_celeba --loss wgan-clip --d-norm spectral", "clipping does nothing"),
    ("acgan_celeba --loss wasserstein", "invalid choice"),
    ("acgan_celeba --crop -1", "--crop -1"),
    ("acgan_celeba --aux-weight -1", "--aux-weight -1.0"),
    ("acgan_celeba --beta1 1", "--beta1 1.0: must be below 1"),
    ("vae_celeba --kl-weight -1", "--kl-weight -1.0"),
    ("vae_celeba --lr-g 1", "unrecognized arguments"),
    ("sngan_iclevr --flip-labels 1.1", "--flip-labels 1.1: must be below 1"),
    ("sngan_iclevr --label-embed mean", "invalid choice"),
    ("sngan_iclevr --n-dis 0", "--n-dis 0"),
    ("sngan_iclevr --gamma -1", "--gamma -1.0"),
    ("sngan_iclevr --aux-weight -1", "--aux-weight -1.0"),
    ("cdcgan_iclevr --d-cond linear", "invalid choice"),
    ("cdcgan_iclevr --halve-every -1", "--halve-every -1"),
    ("cdcgan_iclevr --quick --smooth-labels", "are for --loss bce"),
    ("cdcgan_iclevr --quick --d-cond plane", "--d-cond plane needs --aux-weight 0"),
    ("cdcgan_iclevr --loss paired --flip-labels 0.1", "are for --loss bce"),
    # what is known only with the data, but before training
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --batch-size 61", "--batch-size 61 is more than the 60 training"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --judge nowhere.pt", "nowhere.pt can't be read"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --judge text", "text can't be read"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --fid-weights nowhere.pth", "nowhere.pth can't be read"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --fid-weights text", "its SHA-256 is"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --out text", "text already exists"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --out full", "full already exists"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --out text/run", "text is not a writable folder"),
    (f"dcgan_mnist {SMALL['dcgan_mnist']} --out {'x' * 300}", "File name too long"),
    (f"acgan_celeba {SMALL['acgan_celeba']} --n-synthetic 10", "10 images are too few"),
    (f"acgan_celeba {SMALL['acgan_celeba']} --attributes Smiling", "no Smiling"),
    (f"sngan_iclevr {SMALL['sngan_iclevr']} --n-scenes 3", "fewer than 10 scenes"),
    (f"sngan_iclevr {SMALL['sngan_iclevr']} --judge digits.pt", "24"),
]


@pytest.fixture
def files(here):
    """What some of the commands name."""
    (here / "text").write_text("not a checkpoint")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").touch()
    torch.save({"model": {"fc.0.weight": torch.zeros(10, 512)}}, here / "digits.pt")
    return here


@pytest.mark.parametrize("command, message", FLAGS)
def test_mistakes_on_the_command_line(files, refuses, command, message):
    name, *argv = command.split()
    refuses(name, *argv, message=message)


def edit_config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["config"] |= changes
        path.write_text(json.dumps(content), encoding="utf-8")
    return edit


def truncate(name: str, size: int = 100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def nothing(_folder: Path) -> None:
    pass


RUNS = [  # damage to the folder of a run, how it is used, part of the message
    (nothing, "--resume run --batch-size 9", "--batch-size is 8 there, 9 here"),
    (nothing, "--resume run --latent-dim 6", "--latent-dim is 5 there, 6 here"),
    (nothing, "--resume run --quick", "--quick is for a new run"),
    (nothing, "--resume run --iters 1", "--iters 1: run is already at 2"),
    (nothing, "--sample run --iters 9", "--iters is 2 there, 9 here"),
    (nothing, "--eval run --judge none", "--eval needs a judge"),
    (nothing, "--resume nowhere", "nowhere/config.json can't be read"),
    (nothing, "--resume run/config.json", "can't be read"),
    (nothing, "--eval run --data mnist/gone", "mnist/gone"),
    (nothing, "--resume run --n-synthetic 61", "--n-synthetic is 60 there, 61 here"),
    (lambda f: (f / "config.json").unlink(), "--resume run", "config.json can't be read (FileNotFoundError"),
    (truncate("config.json"), "--resume run", "config.json can't be read (JSONDecodeError"),
    (truncate("config.json", 0), "--sample run", "config.json can't be read"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "--eval run", "config.json can't be read"),
    (lambda f: (f / "config.json").write_text("[]"), "--resume run", "config.json can't be read (TypeError"),
    (edit_config(iters="many"), "--resume run", "--iters 'many': must be int"),
    (edit_config(lr_g=None), "--resume run", "--lr-g None: must be float"),
    (edit_config(net="vit"), "--resume run", "--net 'vit': must be"),
    (edit_config(ema=2), "--resume run", "--ema 2: must be below 1"),
    (edit_config(color=1), "--resume run", "another version of dcgan_mnist.py (fields ['color'])"),
    (edit_config(latent_dim=6), "--resume run --iters 3", "can't be read (RuntimeError"),
    (edit_config(n_synthetic=61), "--resume run --iters 3", "does not hold the images that run was tr"),
    (edit_config(n_synthetic=61), "--sample run", "does not hold the images that run was trained on"),
    (lambda f: [(f / f"{n}.pt").unlink(missing_ok=True) for n in ("last", "previous", "best")],
     "--sample run", "run has no checkpoint yet"),
    (lambda f: [truncate(p.name)(f) for p in f.glob("*.pt")], "--resume run", "can't be read (BadZipFile"),
    (lambda f: [truncate(p.name)(f) for p in f.glob("*.pt")], "--eval run", "can't be read (BadZipFile"),
    (lambda f: [torch.save({"G": {}}, p) for p in f.glob("*.pt")], "--resume run", "can't be read"),
    (lambda f: [torch.save([1], p) for p in f.glob("*.pt")], "--sample run", "can't be read (AttributeError"),
    (lambda f: [p.write_bytes(b"PK\x03\x04" + b"x" * 99) for p in f.glob("*.pt")], "--eval run",
     "can't be read"),
    (lambda f: (f / "metrics.csv").write_text("step,seconds\nx,\0\n"), "--resume run --iters 3",
     "metrics.csv can't be read"),
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
    ("sngan_iclevr", lambda f: shutil.rmtree(f), "set/objects.json can't be read (FileNotFoundError"),
    ("sngan_iclevr", lambda f: (f / "test.json").unlink(), "set/test.json can't be read"),
    ("sngan_iclevr", lambda f: (f / "train.json").write_text("{"), "train.json can't be read (JSONDeco"),
    ("sngan_iclevr", lambda f: (f / "train.json").write_text('{"a.png": []}'), "1 to 3 different objects"),
    ("sngan_iclevr", lambda f: (f / "test.json").write_text('[["red pyramid"]]'), "unknown object"),
    ("sngan_iclevr", lambda f: (f / "objects.json").write_text('{"red cube": 7}'), "ids are not 0, 1, 2"),
    ("cdcgan_iclevr", lambda f: shutil.rmtree(f / "images"), "images"),
    ("cdcgan_iclevr", lambda f: next((f / "images").iterdir()).unlink(), "is missing (1 of 18 images are)"),
    ("cdcgan_iclevr", lambda f: next((f / "images").iterdir()).write_bytes(b"x"), "it should be an image"),
    ("dcgan_mnist", lambda f: shutil.rmtree(f / "MNIST"), "MNIST's four files"),
    ("dcgan_mnist", lambda f: truncate("MNIST/raw/train-images-idx3-ubyte")(f), "MNIST's four"),
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
