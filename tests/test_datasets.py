"""Loaders: what they give, what they cache, what they refuse."""
import gzip
import hashlib
import json
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision
from PIL import EpsImagePlugin, Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.functional import to_tensor

from common import datasets
from common.datasets import Batches, Data
from common.files import UserError, digest_of
from synthetic import digits, faces, scenes
from tests.conftest import make_mnist, settings


def load_iclevr(source, image_size=32, n_scenes=24):
    return datasets.load_iclevr(settings(data=str(source), image_size=image_size, n_scenes=n_scenes))


def load_digits(source, image_size, n=60):
    return datasets.load_digits(settings(data=str(source), n_synthetic=n), image_size)


def load_faces(source, image_size, attributes="", labelled=True, **fields):
    fields = dict(image_size=image_size, attributes=attributes, n_synthetic=150) | fields
    return datasets.load_faces(settings(data=str(source), **fields), labelled)


# ---------------------------------------------------------------------- i-CLEVR

@pytest.mark.parametrize("folder", ["images", "iclevr", "image", "images/images", "image/image"])
def test_scenes_of_any_size_are_squeezed_and_their_sorted_ids_padded(iclevr, folder):
    (iclevr / "images").rename(iclevr / "other")
    (iclevr / folder).parent.mkdir(exist_ok=True)
    (iclevr / "other").rename(iclevr / folder)
    (iclevr / folder / "old.png").symlink_to("nowhere")  # not listed, so it does not matter
    data = load_iclevr(iclevr, 64)
    assert data.images.shape == (18, 3, 64, 64) and data.images.dtype == torch.uint8
    train = json.loads((iclevr / "train.json").read_text())
    for row, name in zip(data.labels.tolist(), sorted(train), strict=True):
        expected = sorted(scenes.OBJECTS.index(o) for o in train[name])
        assert row == expected + [24] * (3 - len(expected))
    assert data.scene.tolist() == [i // 3 for i in range(18)]
    assert data.test_label_sets["test"].tolist() == [[1, 24, 24], [2, 8, 24]]
    image = Image.open(iclevr / folder / sorted(train)[4]).resize((64, 64), Image.Resampling.BILINEAR)
    assert data.images[4].permute(1, 2, 0).numpy().tobytes() == image.tobytes()


def test_the_cache_is_used_until_it_is_damaged_or_the_folder_or_the_code_changes(iclevr, monkeypatch, capsys):
    first, opened = load_iclevr(iclevr), []
    monkeypatch.setattr(datasets.Image, "open", lambda p, _open=Image.open, **k: opened.append(p) or _open(p))
    again = load_iclevr(iclevr)
    assert not opened and torch.equal(first.images, again.images) and first.digest == again.digest
    cache, = iclevr.glob(".*.cache.pt")
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(load_iclevr(iclevr).images, first.images) and len(opened) == 18
    Image.new("RGB", (32, 32), "red").save(iclevr / "images" / "CLEVR_train_000003_1.png")
    changed = load_iclevr(iclevr)
    assert len(opened) == 2 * 18 and changed.digest != first.digest
    assert changed.images[10].float().mean((1, 2)).tolist() == [255, 0, 0]
    stored = torch.load(cache, weights_only=True)
    for digest in ("../../elsewhere", "0123456789abc", "", None, 12):  # it would name another file
        torch.save(stored | {"digest": digest}, cache)
        assert load_iclevr(iclevr).digest == changed.digest
        assert torch.load(cache, weights_only=True)["digest"] == stored["digest"]
    opened.clear()
    monkeypatch.setattr(datasets.inspect, "getsource", lambda f: "other code that decodes")
    assert load_iclevr(iclevr).digest == changed.digest and len(opened) == 18

    def refuse(*_):
        raise PermissionError("read-only")
    monkeypatch.setattr("common.files.atomic_write", refuse)  # a folder that can't be written still loads
    assert len(load_iclevr(iclevr, 16).images) == 18
    assert "no cache written: read-only" in capsys.readouterr().out


def test_the_digest_is_of_the_bytes_in_order_and_needs_no_copy_of_them():
    x, y = torch.arange(24).view(2, 3, 4), torch.tensor([[True, False]])
    expected = hashlib.sha1(b"text" + x.transpose(0, 2).numpy().tobytes() + y.numpy().tobytes())
    assert digest_of("text", x.transpose(0, 2), y) == expected.hexdigest()[:12]
    large = torch.zeros(1000, 1000, dtype=torch.uint8)
    tracemalloc.start()
    digest_of("", large, large)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def put(name, *keys_and_value):
    """A breakage: a value put into a list or dict of a JSON file of the set."""
    def breakage(folder):
        content = inner = json.loads((folder / name).read_text())
        *keys, last, value = keys_and_value
        for key in keys:
            inner = inner[key]
        inner[last] = value
        (folder / name).write_text(json.dumps(content))
    return breakage


def relink(path):
    path.unlink()
    path.symlink_to("nowhere")


FIRST, THIRD = "CLEVR_train_000000_0.png", "CLEVR_train_000002_0.png"
BROKEN = {
    "empty": (lambda f: [os.remove(p) for p in f.glob("*.json")], "objects.json can't.*FileNot.*synthetic"),
    "no images": (lambda f: (f / "images").rename(f / "other"), "images can't be read"),
    "no test list": (lambda f: (f / "new_test.json").unlink(), "new_test.json can't be read"),
    "dangling link": (lambda f: relink(f / "images" / FIRST), f"{FIRST} is missing .1 of 18"),
    "image missing": (lambda f: (f / "images" / FIRST).unlink(), f"{FIRST} is missing"),
    "truncated": (lambda f: os.truncate(f / "images" / THIRD, 900), f"{THIRD} can't be read"),
    "no json": (lambda f: (f / "train.json").write_text("{"), "train.json can't be read .JSONDecodeError"),
    "a list": (lambda f: (f / "train.json").write_text("[1]"), "train.json.*not a filled dict"),
    "a key twice": (lambda f: (f / "train.json").write_text(
        (f / "train.json").read_text().replace("{", f'{{"{THIRD}": ["red cube"], ', 1)),
                    f"train.json.*{THIRD} is given twice"),
    "unknown object": (put("train.json", FIRST, ["pink cube"]), "train.json.*unknown object 'pink cube'"),
    "an object twice": (put("train.json", FIRST, ["red cube"] * 2), "train.json.*0.png should name 1 to 3 diff"),
    "no objects": (put("train.json", FIRST, []), "0.png should name"),
    "four objects": (put("test.json", 0, ["red cube"] * 4), "1 to 3 different"),
    "an id left out": (put("objects.json", "pink cube", 25), "not 0, 1"),
    "an id twice": (put("objects.json", "pink cube", 3), "not 0, 1"),
    "a list as id": (put("objects.json", "red cube", [1]), "not 0, 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_and_nothing_written(iclevr, case):
    breakage, message = BROKEN[case]
    breakage(iclevr)
    before = sorted(iclevr.rglob("*"))
    with pytest.raises(UserError, match=message):
        load_iclevr(iclevr)
    assert sorted(iclevr.rglob("*")) == before


def test_an_interrupt_does_not_wait_for_images_that_are_not_begun(iclevr, monkeypatch):
    names, begun, submit = [f"{i}.png" for i in range(200)], [], datasets.ThreadPoolExecutor.submit
    for name in names:
        (iclevr / name).touch()

    def interrupted(pool, call, i):
        if i == 150:
            raise KeyboardInterrupt  # as a signal's handler does
        return submit(pool, call, i)

    monkeypatch.setattr(datasets, "decode_image", lambda *_: begun.append(1) or time.sleep(0.03) or 1 / 0)
    monkeypatch.setattr(datasets.ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load_images(iclevr, names, 8, 0)
    assert 0 < len(begun) < 100


# ---------------------------------------------------------------------- batches

def numbered(n: int) -> Data:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return Data("x", "digits", "", images, torch.arange(n), (), "")


def test_batches_cover_an_epoch_once_and_depend_on_seed_and_number_alone():
    cpu, data = torch.device("cpu"), numbered(20)
    batches = Batches(data, 6, seed=1, device=cpu)
    epochs = [torch.cat([batches(e * 3 + i)[1] for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 18
    assert not torch.equal(*epochs)
    x, y = Batches(data, 6, seed=1, device=cpu)(4)
    assert torch.equal(y, epochs[1][6:12]) and x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), y / 127.5 - 1)  # images in [-1, 1]
    assert not torch.equal(Batches(data, 6, seed=2, device=cpu)(4)[1], y)
    shares = [Batches(data, 6, 1, cpu, rank, 3)(4) for rank in range(3)]  # of three processes
    assert torch.equal(torch.stack([share[1] for share in shares], 1).flatten(), y)
    assert torch.equal(torch.stack([share[0] for share in shares], 1).flatten(0, 1), x)
    with pytest.raises(UserError, match="--batch-size 21 is more than the 20 training images"):
        Batches(data, 21, 0, cpu)
    with pytest.raises(UserError, match="--batch-size 6 is not a multiple of 4 processes"):
        Batches(data, 6, 0, cpu, 0, 4)


def test_batches_of_a_set_on_a_gpu_stay_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    with FakeTensorMode():  # plays a GPU where there is none
        for name in ("cuda", "cuda:0"):
            images, labels = Batches(numbered(20), 6, 1, torch.device(name))(0)
            assert images.device == labels.device == torch.device("cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_of_a_set_that_does_not_fit(monkeypatch):
    device, data = torch.device("cuda"), numbered(50)
    plain = Batches(data, 8, seed=1, device=device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    host = Batches(data, 8, seed=1, device=device)
    assert plain.images.device.type == "cuda" and host.images.device.type == "cpu"
    for number in (*range(14), 3):
        for a, b in zip(host(number), plain(number), strict=True):
            assert a.device.type == "cuda" and torch.equal(a, b)


# ---------------------------------------------------------------------- synthetic sets

def test_synthetic_digits_are_those_of_the_renderer_and_at_least_two_are_for_tests():
    data = load_digits("synthetic", 28)
    images, labels, _ = digits.render(71)
    assert data.name == "synthetic digits" and torch.equal(data.images, images[:60])
    assert torch.equal(data.test_images, images[60:]) and torch.equal(data.test_labels, labels[60:])
    with pytest.raises(UserError, match="synthetic digits: 6 images are too few: 1 for scores, at least 2"):
        load_digits("synthetic", 28, 5)
    assert len(load_digits("synthetic", 28, 6).test_images) == 2


def test_synthetic_faces_come_in_groups():
    data = load_faces("synthetic", 32)
    images, labels = faces.render(150, 32)
    assert data.name == "synthetic faces" and data.classes == faces.FACE_ATTRIBUTES
    assert [len(group) for group in data.groups] == [6, 4, 3, 2]
    assert torch.equal(torch.cat([data.images, data.test_images]), images) and len(data.test_images) == 15
    assert torch.equal(torch.cat([data.labels, data.test_labels]), labels.float())
    names = faces.FACE_ATTRIBUTES[-2], faces.FACE_ATTRIBUTES[0]
    some = load_faces("synthetic", 32, ",".join(names))
    assert some.classes == names and torch.equal(some.labels, data.labels[:, [-2, 0]])
    assert some.digest != data.digest
    with pytest.raises(UserError, match="Hat; the synthetic set has"):
        load_faces("synthetic", 32, "Hat")


@pytest.mark.parametrize("renderer, load", [
    (scenes, lambda: load_iclevr("synthetic", n_scenes=6)), (digits, lambda: load_digits("synthetic", 32)),
    (faces, lambda: load_faces("synthetic", 16))])
def test_synthetic_sets_are_cached_and_named_by_their_code_since_pixels_depend_on_the_processor(
        renderer, load, monkeypatch):
    first, original = load(), renderer.render

    def elsewhere(*args, **options):
        images, *others = original(*args, **options)
        return images ^ 1, *others
    monkeypatch.setattr(renderer, "render", elsewhere)
    assert torch.equal(load().images, first.images)
    shutil.rmtree("data/cache")
    again = load()
    assert not torch.equal(first.images, again.images) and first.digest == again.digest


# ---------------------------------------------------------------------- digits

@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def test_mnist_is_found_read_as_it_lies_and_resized(tmp_path, no_network):
    make_mnist(tmp_path / "data")
    images, labels, _ = digits.render(60)
    data = load_digits("auto", 28)
    assert torch.equal(data.images, images[:40]) and torch.equal(data.test_images, images[40:])
    assert torch.equal(data.labels, labels[:40]) and torch.equal(data.test_labels, labels[40:])
    assert (data.source, data.name, data.classes) == ("mnist", "MNIST", tuple("0123456789"))
    for size in (32, 64):
        resized = load_digits(tmp_path / "data", size)
        assert resized.images.shape == (40, 1, size, size) and resized.images.dtype == torch.uint8
        expected = torch.stack([to_tensor(Image.fromarray(x[0].numpy()).resize((size, size), Image.BILINEAR))
                                for x in images[:40]])
        assert (resized.images / 255 - expected).abs().max() < 0.006  # a level or so of rounding
        assert resized.digest != data.digest
    raw = tmp_path / "data" / "MNIST" / "raw"
    for path in [*raw.iterdir()]:
        path.rename(raw / path.name.replace("-idx", ".idx"))
    assert load_digits("auto", 28).digest == data.digest and len([*raw.iterdir()]) == 4  # none downloaded


def test_without_mnist_and_network_auto_is_synthetic_and_mnist_is_refused(capsys, no_network):
    for _ in range(2):  # what the failed download leaves must not count as damaged
        assert load_digits("auto", 32).source == "synthetic"
        assert "SYNTHETIC" in capsys.readouterr().out
    with pytest.raises(UserError, match="missing|can't be read.*--data synthetic") as error:
        load_digits("mnist", 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_or_missing_mnist_files_are_refused(tmp_path, no_network, name):
    raw = make_mnist(tmp_path / "data") / "MNIST" / "raw"
    whole = (raw / name).read_bytes()
    for keep in (0, 3, 10, -5):
        (raw / name).write_bytes(whole[:keep])
        for source in (tmp_path / "data", "auto"):  # never replaced by synthetic digits
            with pytest.raises(UserError, match="raw can't be read.*MNIST's four files.*Fetch") as error:
                load_digits(source, 32)
            assert "\n" not in str(error.value)
    (raw / name).unlink()
    with pytest.raises(UserError, match="MNIST's four files"):
        load_digits(tmp_path / "data", 32)
    assert not (raw / name).exists()
    make_mnist(tmp_path / "other")
    raw = tmp_path / "other" / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(UserError, match="do not match"):
        load_digits(tmp_path / "other", 32)


@pytest.mark.parametrize("place, packed, dotted", [
    ("MNIST/raw", False, True), ("MNIST/raw", True, False), ("raw", False, False), ("raw", True, True),
    ("", False, True), ("", True, False)])
def test_mnist_is_read_as_mirrors_and_kaggle_have_it(tmp_path, no_network, place, packed, dotted):
    raw = make_mnist(tmp_path / "plain") / "MNIST" / "raw"
    expected = load_digits(tmp_path / "plain", 28)
    (tmp_path / "m" / place).mkdir(parents=True)
    for path in raw.iterdir():
        name = path.name.replace("-idx", ".idx") if dotted else path.name
        (tmp_path / "m" / place / f"._{name}").write_bytes(b"left by macOS")
        content = path.read_bytes()
        (tmp_path / "m" / place / (name + ".gz" * packed)).write_bytes(
            gzip.compress(content) if packed else content)
    before = sorted((tmp_path / "m").rglob("*"))
    data = load_digits(tmp_path / "m", 28)
    assert data.digest == expected.digest and sorted((tmp_path / "m").rglob("*")) == before
    damaged, = (tmp_path / "m").rglob("train-labels*")
    damaged.write_bytes(damaged.read_bytes()[:30])
    with pytest.raises(UserError, match="raw can't be read.*MNIST's four files"):
        load_digits(tmp_path / "m", 28)


# ---------------------------------------------------------------------- faces

def make_faces(folder, layout="list_attr_celeba.txt", n=20, size=(30, 40)):
    """A folder of CelebA's or the cartoon set's layout; image i is filled with the colour (10 i, 0, 0)."""
    pictures = folder / datasets.FACE_LAYOUTS[layout][1]
    pictures.mkdir(parents=True)
    no = "-1" if "celeba" in layout else "0"
    columns, rows = ("Big_Nose", "Hat", "Young"), []
    for i in range(n):
        Image.new("RGB", size, (10 * i, 0, 0)).save(pictures / f"{i:03}.png")
        rows.append(f"{i:03}.png " + " ".join("1" if (i >> c) % 2 else no for c in range(len(columns))))
    (folder / layout).write_text("\n".join([str(n), " ".join(columns), *rows]) + "\n")
    return folder


@pytest.mark.parametrize("layout, title", [("list_attr_celeba.txt", "CelebA"),
                                           ("cartoon_attr.txt", "cartoon faces")])
def test_faces_of_both_layouts_keep_their_own_labels(tmp_path, layout, title, monkeypatch):
    whole, cached = [], datasets.cached
    monkeypatch.setattr(datasets, "cached", lambda *a: whole.append(cached(*a)) or whole[-1])
    make_faces(tmp_path, layout)
    for _ in range(2):  # decoded, then from the cache
        data = load_faces(tmp_path, 16, "Young,Big_Nose")
        assert data.images.data_ptr() == whole[-1]["images"].data_ptr()  # without a second copy in memory
        assert data.name == title and data.classes == ("Young", "Big_Nose") and data.groups == ()
        assert data.images.shape == (18, 3, 16, 16) and data.test_images.shape == (2, 3, 16, 16)
        found = (torch.cat([data.images, data.test_images])[:, 0, 8, 8] // 10).tolist()
        assert sorted(found) == list(range(20)) and found[:18] != sorted(found[:18])
        labels = torch.cat([data.labels, data.test_labels])
        assert labels.tolist() == [[(i >> 2) % 2, i % 2] for i in found]
    other = load_faces(tmp_path, 16, "Young")
    assert other.digest != data.digest and torch.equal(other.images, data.images)
    if layout == "cartoon_attr.txt":
        assert load_faces(tmp_path, 16).classes == ("Big_Nose", "Hat", "Young")  # all there are


def test_faces_are_cut_from_the_middle(tmp_path):
    make_faces(tmp_path)
    for path in (tmp_path / "img_align_celeba").iterdir():
        image = Image.new("RGB", (30, 40), "red")
        image.paste((0, 0, 255), (0, 5, 30, 35))  # the largest square in the middle
        image.paste((0, 255, 0), (10, 15, 20, 25))  # ten in the middle of that
        image.save(path)
    whole = load_faces(tmp_path, 30, "Hat").images[0]
    assert not whole[0].any() and whole[1].bool().sum() == 100
    assert (load_faces(tmp_path, 16, "Hat", crop=10).images[:, 1] == 255).all()
    with pytest.raises(UserError, match="30×40 pixels are smaller than --crop 31.*--skip-bad-images"):
        load_faces(tmp_path, 16, "Hat", crop=31)


def test_groups_are_columns_with_one_of_each():
    labels = torch.eye(5)[[0, 1, 2, 1, 0]] + torch.eye(5)[[4, 3, 4, 4, 3]]  # hair: three, eyes: two
    assert datasets.one_of_groups(labels) == ((0, 1, 2), (3, 4))
    assert datasets.one_of_groups(labels[:, :4]) == ()  # the last column is not always on
    labels[0, 0] = 0
    assert datasets.one_of_groups(labels) == ()


def test_celeba_is_read_as_kaggle_has_it(tmp_path):
    folder = make_faces(tmp_path)
    expected = load_faces(folder, 16, "Hat,Young")
    table = (folder / "list_attr_celeba.txt").rename(folder / "list_attr_celeba.csv")
    header, *rows = [",".join(line.split()) for line in table.read_text().splitlines()[1:]]
    table.write_text("\n".join([f"image_id,{header}", *rows]))
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba" / "img_align_celeba")
    data = load_faces(folder, 16, "Hat,Young")
    assert data.digest == expected.digest and data.name == "CelebA"
    assert torch.equal(data.images, expected.images) and torch.equal(data.test_labels, expected.test_labels)
    rows[3] = rows[3].replace("-1", "2", 1)
    table.write_text("\n".join([f"image_id,{header}", *rows]))
    with pytest.raises(UserError, match="csv can't be read .ValueError: line 5: '003.png,.*2"):
        load_faces(folder, 16, "Hat")


def test_missing_and_damaged_faces_are_named_and_can_be_skipped(tmp_path, capsys):
    pictures = make_faces(tmp_path, n=25) / "img_align_celeba"
    (pictures / "more.png").write_bytes(b"")  # not in the table: not used
    (pictures / "007.png").write_bytes((pictures / "007.png").read_bytes()[:40])
    with pytest.raises(UserError, match="007.png can't be read.*it should be an image.*--skip-bad"):
        load_faces(tmp_path, 16, "Hat")
    for i in (0, 3):
        (pictures / f"{i:03}.png").unlink()
    relink(pictures / "011.png")
    with pytest.raises(UserError, match="000.png is missing .3 of 25"):
        load_faces(tmp_path, 16, "Hat")
    for _ in range(2):  # decoded, then from the cache: each face has its own label
        data = load_faces(tmp_path, 16, "Big_Nose", skip_bad_images=True)
        assert len(data.images) + len(data.test_images) == 21
        assert "left out 4 unusable images" in capsys.readouterr().out
        assert torch.equal(data.labels[:, 0], data.images[:, 0, 0, 0] // 10 % 2)
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="CelebA: 0 images are too few"):
        load_faces(tmp_path, 16, "Hat", skip_bad_images=True)


def test_a_folder_of_any_images_will_do_where_no_labels_are_needed(tmp_path):
    pictures = make_faces(tmp_path) / "img_align_celeba"
    (pictures / "notes.txt").write_text("no image")
    (pictures / "001.png").rename(pictures / "001.PNG")
    data = load_faces(pictures, 16, labelled=False)
    assert data.name == "img_align_celeba" and data.classes == data.groups == ()
    assert data.images.shape == (18, 3, 16, 16) and data.labels.shape == (18, 0)
    found = torch.cat([data.images, data.test_images])[:, 0, 8, 8] // 10
    assert sorted(found.tolist()) == list(range(20))
    with pytest.raises(UserError, match="list_attr_celeba.txt can't be read.*or cartoon_attr.txt"):
        load_faces(pictures, 16)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.replace("20\n", "21\n", 1), "21 rows announced, 20 found"),
    (lambda t: "\n".join(t.splitlines()[:9]), "20 rows announced, 7 found"),
    (lambda t: t.replace("004.png -1 -1 1", "004.png -1 1"), "line 7: '004.png -1 1"),
    (lambda t: t.replace("004.png -1 -1 1", "004.png -1 2 1"), "line 7"),
    (lambda t: t.replace("004.png", "003.png"), "line 7"),
    (lambda t: t.replace("004.png", "040.png"), "040.png is missing"),
    (lambda t: t.replace("20\n", "", 1), "can't be read .ValueError"),
    (lambda t: "", "can't be read .ValueError"),
    (lambda t: t.replace("Big_Nose Hat Young", ""), "0 different attributes"),
    (lambda t: t.replace("Hat Young", "Hat Hat"), "2 different attributes"),
])
def test_malformed_attribute_files_are_refused(tmp_path, change, message):
    table = make_faces(tmp_path) / "list_attr_celeba.txt"
    table.write_text(change(table.read_text()))
    with pytest.raises(UserError, match=message) as error:
        load_faces(tmp_path, 16, "Hat")
    assert "\n" not in str(error.value)


def test_unknown_attributes_are_refused(tmp_path):
    make_faces(tmp_path)
    for attributes, message in (("Hat,Beard", "Beard.*has Big_Nose, Hat, Young"), ("Hat,Hat", "a name twice"),
                                ("", "Bangs")):  # CelebA's default
        with pytest.raises(UserError, match=message):
            load_faces(tmp_path, 16, attributes)


# ---------------------------------------------------------------------- decoding

def decoded(image, path, **how):
    """The pixels [64, 64, 3] of an image that is saved and read again; the path's suffix is the format."""
    image.save(path, **how)
    return np.asarray(datasets.decode_image(path, 64, 0))


def test_grey_is_read_with_8_bits_and_refused_with_more(tmp_path):
    ramp = np.arange(64 * 64).reshape(64, 64) // 16
    assert (decoded(Image.fromarray(ramp.astype(np.uint8)), tmp_path / "x.png") == ramp[..., None]).all()
    for name, kind in (("png", np.uint16), ("tif", np.uint16), ("tif", np.int32), ("tif", np.float32)):
        with pytest.raises(UserError, match=f"x.{name} can't be read .ValueError: grey of 16 bits or of fl"):
            decoded(Image.fromarray(ramp.astype(kind)), tmp_path / f"x.{name}")


@pytest.mark.parametrize("mode, colour, expected, how", [
    ("RGBA", (1, 2, 3, 0), (255, 255, 255), {}), ("RGBA", (1, 2, 3, 255), (1, 2, 3), {}),
    ("RGBA", (0, 0, 255, 51), (204, 204, 255), {}), ("LA", (7, 0), (255, 255, 255), {}),
    ("P", 0, (255, 255, 255), {"transparency": 0}),
    ("RGB", (1, 2, 3), (255, 255, 255), {"transparency": (1, 2, 3)})])
def test_transparent_pixels_are_shown_over_white(tmp_path, mode, colour, expected, how):
    assert (decoded(Image.new(mode, (64, 64), colour), tmp_path / "x.png", **how) == expected).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_as_their_exif_tag_says(tmp_path, suffix):
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 32))
    image.paste((128, 128, 128), (32, 0, 64, 32))
    quarters = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = decoded(image, tmp_path / f"x.{suffix}", exif=exif)
        quarters.append("".join(str(round(read[y, x, 0] / 128)) for y in (16, 48) for x in (16, 48)))
    # EXIF 2.3, tag Orientation: on which sides the file's first row (21) and first column (20) are shown
    assert quarters == ["2100", "1200", "0012", "0021", "2010", "0201", "0102", "1020"]
    if suffix in ("png", "webp"):  # broken EXIF data are passed over
        broken = dict(exif=b"Exif\0\0no header")
        assert not decoded(Image.new("RGB", (64, 64)), tmp_path / f"x.{suffix}", **broken).any()


def test_no_file_starts_a_program_whatever_its_name(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png", format="EPS")
    with pytest.raises(UserError, match="x.png can't be read .Unidentified"):
        datasets.decode_image(tmp_path / "x.png", 64, 0)
    assert not started
