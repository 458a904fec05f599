"""Loaders: what they give, what they cache, what they refuse."""
import gzip
import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageCms
from torch._subclasses.fake_tensor import FakeTensorMode

from common import datasets
from common.datasets import Batches, Data
from common.files import UserError, digest_of
from evaluator import BUNDLED
from synthetic import digits, faces, scenes
from tests.conftest import make_mnist, settings


def load_iclevr(source, image_size=32, n_scenes=24):
    return datasets.load_iclevr(settings(data=str(source), image_size=image_size, n_scenes=n_scenes))


def load_digits(source, image_size, n=60):
    return datasets.load_digits(settings(data=str(source), n_synthetic=n), image_size)


def load_faces(source, image_size, attributes="", **fields):
    fields = dict(image_size=image_size, attributes=attributes, n_synthetic=150) | fields
    return datasets.load_faces(settings(data=str(source), **fields))


# ---------------------------------------------------------------------- i-CLEVR

@pytest.mark.parametrize("folder", ["images", "iclevr", "image", "images/images", "image/image"])
def test_scenes_of_any_size_are_squeezed_and_their_sorted_ids_padded(iclevr, folder):
    (iclevr / "images").rename(iclevr / "other")
    (iclevr / folder).parent.mkdir(exist_ok=True)
    (iclevr / "other").rename(iclevr / folder)
    (iclevr / folder / "old.png").symlink_to("nowhere")  # not listed, so it does not matter
    data, train = load_iclevr(iclevr, 64), json.loads((iclevr / "train.json").read_text())
    assert data.images.shape == (18, 3, 64, 64) and data.images.dtype == torch.uint8
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


def test_the_digest_is_of_the_bytes_in_order():
    x, y = torch.arange(24).view(2, 3, 4).transpose(0, 2), torch.tensor([[True, False]])
    expected = hashlib.sha1(b"text" + x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    assert digest_of("text", x, y) == expected[:12]


def put(name, key, value):
    """A breakage: a value put into the list or dict of a JSON file."""
    def breakage(folder):
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content))
    return breakage


FIRST, THIRD = "CLEVR_train_000000_0.png", "CLEVR_train_000002_0.png"
BROKEN = {
    "empty": (lambda f: [os.remove(p) for p in f.glob("*.json")], "objects.json can't.*FileNot.*synthetic"),
    "no images": (lambda f: (f / "images").rename(f / "other"), f"images/{FIRST} is missing .18 of 18"),
    "no test list": (lambda f: (f / "new_test.json").unlink(), "new_test.json can't be read"),
    "image missing": (lambda f: (f / "images" / FIRST).unlink(), f"{FIRST} is missing .1 of 18"),
    "truncated": (lambda f: os.truncate(f / "images" / THIRD, 900), f"{THIRD} can't be read"),
    "no json": (lambda f: (f / "train.json").write_text("{"), "train.json can't be read .JSONDecodeError"),
    "a list": (lambda f: (f / "train.json").write_text("[1]"), "train.json.*not a filled dict"),
    "a key twice": (lambda f: (f / "train.json").write_text(
        (f / "train.json").read_text().replace("{", f'{{"{THIRD}": [], ', 1)), f"{THIRD} is given twice"),
    "unknown object": (put("train.json", FIRST, ["pink cube"]), "train.json.*unknown object 'pink cube'"),
    "an object twice": (put("train.json", FIRST, ["red cube"] * 2), "train.json.*0.png should name 1 to 3"),
    "no objects": (put("train.json", FIRST, []), "0.png should name"),
    "four objects": (put("test.json", 0, ["red cube"] * 4), "1 to 3 different"),
    "an id left out": (put("objects.json", "pink cube", 25), "not 0, 1"),
    "an id twice": (put("objects.json", "pink cube", 3), "not 0, 1"),
    "a list as id": (put("objects.json", "red cube", [1]), "not 0, 1"),
}


def test_the_fingerprint_is_of_names_and_labels(iclevr):
    """It selects a bundled judge, whichever version of Pillow has decoded the images."""
    first = load_iclevr(iclevr)
    Image.new("RGB", (40, 30), "red").save(iclevr / "images" / FIRST)
    changed = load_iclevr(iclevr)
    assert changed.digest != first.digest and changed.fingerprint == first.fingerprint
    put("train.json", FIRST, ["red cube", "blue cube"])(iclevr)
    relabelled = load_iclevr(iclevr)
    table = (iclevr / "train.json").read_text()
    (iclevr / "train.json").write_text(table.replace(FIRST, "A_0.png"))
    (iclevr / "images" / FIRST).rename(iclevr / "images" / "A_0.png")
    renamed = load_iclevr(iclevr)
    assert torch.equal(renamed.labels, relabelled.labels)
    assert len({data.fingerprint for data in (first, relabelled, renamed)}) == 3


def test_sets_of_labels_are_text_or_a_list_in_a_file(tmp_path):
    data = Data("", "scenes", "", torch.zeros(2, 3, 8, 8), torch.tensor([[0, 24, 24], [1, 2, 24]]),
                scenes.OBJECTS, "")
    sets = [["blue sphere", "red cube"], ["gray cylinder"]]
    for encoding in ("utf-8", "utf-16"):  # the latter is that of Windows's editors
        (tmp_path / "x.json").write_text(json.dumps(sets), encoding=encoding)
        found = datasets.label_sets(str(tmp_path / "x.json"), data, 2)
        assert torch.equal(found, datasets.label_sets("red cube,blue sphere; gray cylinder", data, 2))
    ids = [sorted(map(scenes.OBJECTS.index, objects)) for objects in sets]
    assert found.tolist() == [i + [24] * (3 - len(i)) for i in ids for _ in range(2)]
    assert datasets.label_sets("", data, 3).tolist() == [[0, 24, 24], [1, 2, 24], [0, 24, 24]]
    for content in ("[]", "{}", "3", "[3]", '[["red"]]', "{"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="--labels '.*x.json' can't be read.*a file like test.json"):
            datasets.label_sets(str(tmp_path / "x.json"), data, 2)
    with pytest.raises(UserError, match="gone.json' can't be read .FileNotFound"):
        datasets.label_sets("gone.json", data, 2)


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_and_nothing_written(iclevr, case):
    breakage, message = BROKEN[case]
    breakage(iclevr)
    before = sorted(iclevr.rglob("*"))
    with pytest.raises(UserError, match=message):
        load_iclevr(iclevr)
    assert sorted(iclevr.rglob("*")) == before


def test_an_interrupt_does_not_wait_for_images_that_are_not_begun(tmp_path, monkeypatch):
    begun, names = [], [f"{i}.png" for i in range(200)]

    def decode(path, *_):
        begun.append(path)
        time.sleep(0.03)
        raise KeyboardInterrupt  # as a signal's handler does

    monkeypatch.setattr(datasets, "decode_image", decode)
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(KeyboardInterrupt):
        datasets.load_images(tmp_path, names, 8)
    assert 0 < len(begun) < 100


# ---------------------------------------------------------------------- batches

def numbered(n: int) -> Data:
    return Data("x", "digits", "", torch.arange(n).byte().view(n, 1, 1, 1), torch.arange(n), (), "")


def test_batches_cover_an_epoch_once_and_depend_on_seed_and_number_alone():
    cpu, data = torch.device("cpu"), numbered(20)
    batches = Batches(data, 6, seed=1, device=cpu)
    epochs = [torch.cat([batches(e * 3 + i)[1] for i in range(3)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 18 for epoch in epochs) and not torch.equal(*epochs)
    x, y = Batches(data, 6, seed=1, device=cpu)(4)
    assert torch.equal(y, epochs[1][6:12]) and x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), y / 127.5 - 1)  # images in [-1, 1]
    assert not torch.equal(Batches(data, 6, seed=2, device=cpu)(4)[1], y)
    for rank in range(3):  # its share, of three processes
        ours = Batches(data, 6, 1, cpu, rank, 3)(4)
        assert torch.equal(ours[0], x[rank::3]) and torch.equal(ours[1], y[rank::3])
    with pytest.raises(UserError, match="--batch-size 21 is more than the 20 training images"):
        Batches(data, 21, 0, cpu)


def test_random_images_are_in_the_networks_range():
    images = numbered(20).random_images(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, 1, 1, 1) and images.unique().tolist() == pytest.approx(
        [i / 127.5 - 1 for i in range(20)])


@pytest.mark.parametrize("free, place", [(10**9, "cuda"), (30, "cpu")])
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_images_stay_on_the_gpu_if_they_fit_and_batches_are_there(monkeypatch, free, place, name):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)  # of pinned memory there is little on some systems
    with FakeTensorMode():  # plays a GPU where there is none
        batches = Batches(numbered(20), 6, 1, torch.device(name))
        assert batches.images.device.type == batches.labels.device.type == place
        assert [x.device for x in batches(0)] == [torch.device("cuda:0")] * 2


# ---------------------------------------------------------------------- synthetic sets

def test_synthetic_digits_are_those_of_the_renderer_and_at_least_two_are_for_tests():
    data, (images, labels, _) = load_digits("synthetic", 28), digits.render(71)
    assert data.name == "synthetic digits" and torch.equal(data.images, images[:60])
    assert torch.equal(data.test_images, images[60:]) and torch.equal(data.test_labels, labels[60:])
    with pytest.raises(UserError, match="synthetic digits: 6 images are too few: 1 for scores, at least 2"):
        load_digits("synthetic", 28, 5)
    assert len(load_digits("synthetic", 28, 6).test_images) == 2


def test_synthetic_faces_come_in_groups():
    data, (images, labels) = load_faces("synthetic", 32), faces.render(150, 32)
    assert data.name == "synthetic faces" and data.classes == faces.FACE_ATTRIBUTES
    assert [len(group) for group in data.groups] == [6, 4, 3, 2]
    assert torch.equal(torch.cat([data.images, data.test_images]), images) and len(data.test_images) == 15
    assert torch.equal(torch.cat([data.labels, data.test_labels]), labels.float())
    some = load_faces("synthetic", 32, f"{data.classes[-2]},{data.classes[0]}")
    assert torch.equal(some.labels, data.labels[:, [-2, 0]]) and some.digest != data.digest
    assert datasets.one_of_groups(labels[:, :-1]) == ()  # the last column is not always on
    labels[0] = 0
    assert datasets.one_of_groups(labels) == ()


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
    (images, labels, _), data = digits.render(60), load_digits("auto", 28)
    assert torch.equal(data.images, images[:40]) and torch.equal(data.test_images, images[40:])
    assert torch.equal(data.labels, labels[:40]) and torch.equal(data.test_labels, labels[40:])
    assert (data.source, data.name, data.classes) == ("mnist", "data", tuple("0123456789"))
    resized, raw = load_digits(tmp_path / "data", 64), tmp_path / "data" / "MNIST" / "raw"
    assert resized.images.dtype == torch.uint8 and resized.digest != data.digest
    expected = [Image.fromarray(x[0].numpy()).resize((64, 64), Image.BILINEAR) for x in images[:40]]
    assert np.abs(resized.images[:, 0].numpy() - np.stack(expected).astype(int)).max() < 2  # rounding
    for path in [*raw.iterdir()]:
        path.rename(raw / path.name.replace("-idx", ".idx"))
    assert load_digits("auto", 28).digest == data.digest and len([*raw.iterdir()]) == 4  # none downloaded


def test_only_mnist_is_called_so(tmp_path, no_network, monkeypatch):
    """Other sets, such as FashionMNIST, come in the same files."""
    data = load_digits(make_mnist(tmp_path / "Fashion"), 28)
    assert data.name == "Fashion" and data.fingerprint == data.digest[:12]
    judge = torch.load(BUNDLED / "mnist-32-digitnet.pt", weights_only=True)
    assert judge["origin"] == datasets.MNIST_DIGEST  # the real one's
    monkeypatch.setattr(datasets, "MNIST_DIGEST", data.fingerprint)
    assert load_digits(tmp_path / "Fashion", 28).name == "MNIST"


@pytest.mark.parametrize("place, packed, dotted", [
    ("MNIST/raw", True, False), ("raw", False, False), ("raw", True, True), ("", False, True)])
def test_mnist_is_read_as_mirrors_and_kaggle_have_it(tmp_path, no_network, place, packed, dotted):
    raw, folder = make_mnist(tmp_path / "plain") / "MNIST" / "raw", tmp_path / "m" / place
    folder.mkdir(parents=True)
    for path in raw.iterdir():
        name = path.name.replace("-idx", ".idx") if dotted else path.name
        (folder / f"._{name}").write_bytes(b"left by macOS")
        content = path.read_bytes()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    before = sorted(folder.iterdir())
    assert load_digits(tmp_path / "m", 28).digest == load_digits(tmp_path / "plain", 28).digest
    assert sorted(folder.iterdir()) == before
    damaged, = folder.glob("train-labels*")
    damaged.write_bytes(damaged.read_bytes()[:30])
    with pytest.raises(UserError, match="raw can't be read.*MNIST's four files"):
        load_digits(tmp_path / "m", 28)


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
    (raw / name).write_bytes((raw / name.replace("train", "t10k").replace("t10k-l", "train-l")).read_bytes())
    with pytest.raises(UserError, match="do not match"):  # images and labels
        load_digits(tmp_path / "data", 32)


# ---------------------------------------------------------------------- faces

def make_faces(folder, layout="list_attr_celeba.txt", n=20, size=(30, 40)):
    """A folder of CelebA's or the cartoon set's layout; image i is filled with the colour (10 i, 0, 0)."""
    pictures, no = folder / datasets.FACE_LAYOUTS[layout][1], "0" if "cartoon" in layout else "-1"
    pictures.mkdir(parents=True)
    rows = [f"{i:03}.png " + " ".join("1" if (i >> c) % 2 else no for c in range(3)) for i in range(n)]
    (folder / layout).write_text("\n".join([str(n), "Big_Nose Hat Young", *rows]) + "\n")
    for i in range(n):
        Image.new("RGB", size, (10 * i, 0, 0)).save(pictures / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("layout, name", [("list_attr_celeba.txt", "CelebA"), (
    "cartoon_attr.txt", "cartoon faces"), ("CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ")])
def test_faces_of_all_layouts_keep_their_own_labels(tmp_path, layout, name, monkeypatch):
    whole, cached = [], datasets.cached
    monkeypatch.setattr(datasets, "cached", lambda *a: whole.append(cached(*a)) or whole[-1])
    make_faces(tmp_path, layout)
    for _ in range(2):  # decoded, then from the cache
        data = load_faces(tmp_path, 16, "Young, Big_Nose ")
        assert data.images.data_ptr() == whole[-1]["images"].data_ptr()  # without a second copy in memory
        assert (data.name, data.classes, data.groups) == (name, ("Young", "Big_Nose"), ())
        assert data.images.shape == (18, 3, 16, 16) and data.test_images.shape == (2, 3, 16, 16)
        found = (torch.cat([data.images, data.test_images])[:, 0, 8, 8] // 10).tolist()
        assert sorted(found) == list(range(20)) and found[:18] != sorted(found[:18])
        labels = torch.cat([data.labels, data.test_labels])
        assert labels.tolist() == [[(i >> 2) % 2, i % 2] for i in found]
    other = load_faces(tmp_path, 16, "Young")
    assert other.digest != data.digest and torch.equal(other.images, data.images)
    if layout == "cartoon_attr.txt":
        assert load_faces(tmp_path, 16).classes == ("Big_Nose", "Hat", "Young")  # all there are
    else:
        with pytest.raises(UserError, match="no Bangs"):  # the first of those of CelebA that are the default
            load_faces(tmp_path, 16)


def test_celeba_is_read_as_kaggle_has_it(tmp_path):
    expected = load_faces(make_faces(tmp_path), 16, "Hat,Young")
    table = (tmp_path / "list_attr_celeba.txt").rename(tmp_path / "list_attr_celeba.csv")
    header, *rows = [",".join(line.split()) for line in table.read_text().splitlines()[1:]]
    table.write_text("\n".join([f"image_id,{header}", *rows]))
    (tmp_path / "img_align_celeba").rename(tmp_path / "inner")
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "inner").rename(tmp_path / "img_align_celeba" / "img_align_celeba")
    data = load_faces(tmp_path, 16, "Hat,Young")
    assert data.digest == expected.digest and data.name == "CelebA"
    assert torch.equal(data.images, expected.images) and torch.equal(data.test_labels, expected.test_labels)
    table.write_text(table.read_text().replace("003.png,1,1,-1", "003.png,1,1,2"))
    with pytest.raises(UserError, match="csv can't be read .ValueError: line 5: '003.png,.*2"):
        load_faces(tmp_path, 16, "Hat")


def test_names_in_the_table_are_found_in_subfolders_and_however_unicode_writes_them(tmp_path):
    """macOS composes the characters of file names in another way than Linux and Windows."""
    pictures, e = make_faces(tmp_path) / "img_align_celeba", "\N{LATIN SMALL LETTER E WITH ACUTE}"
    table = tmp_path / "list_attr_celeba.txt"
    text = table.read_text()
    (pictures / "a" / "b").mkdir(parents=True)
    for i, (row, file) in enumerate([(f"{e}.png", "e\N{COMBINING ACUTE ACCENT}.png"), (
            "e\N{COMBINING ACUTE ACCENT}2.png", f"{e}2.png"), ("a/0.png", "a/0.png"), ("a/b/0.png",) * 2]):
        (pictures / f"{i:03}.png").rename(pictures / file)
        text = text.replace(f"{i:03}.png", row)
    table.write_text(text, encoding="utf-8")
    data = load_faces(tmp_path, 16, "Big_Nose, Hat")
    numbers = torch.cat([data.images, data.test_images])[:, 0, 8, 8] // 10
    assert sorted(numbers.tolist()) == [*range(20)]
    labels = torch.cat([data.labels, data.test_labels])
    assert torch.equal(labels, torch.stack([numbers % 2, numbers // 2 % 2], 1).float())


def make_classes(folder, kinds=("ant", "bee", "cat"), n=10):
    """A folder of images for each class, of several sizes and formats; those of class k have red 100 k."""
    for k, kind in enumerate(kinds):
        (folder / kind / "more").mkdir(parents=True)
        for i in range(n):
            name = f"{'more/' * (i % 2)}{i}.{('png', 'jpg', 'webp', 'JPEG')[i % 4]}"
            Image.new("RGB", (20 + i, 25), (100 * k % 256, 0, 0)).save(folder / kind / name)
    return folder


@pytest.mark.parametrize("name", ["pets", "CelebA-HQ"])  # which is not the one with a table
def test_folders_of_classes_are_one_group_of_attributes(tmp_path, name):
    folder = make_classes(tmp_path / name)
    (folder / "bee" / "._0.png").write_bytes(b"left by macOS")
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (9, 9)).save(folder / ".thumbnails" / "0.png")
    for _ in range(2):  # decoded, then from the cache
        for attributes, classes, reds in (("", ("ant", "bee", "cat"), [0, 100, 200]),
                                          ("cat, ant", ("cat", "ant"), [200, 0])):
            data = load_faces(folder, 16, attributes)
            assert (data.name, data.classes) == (name, classes)
            assert data.groups == (tuple(range(len(classes))),) and len(data.images) == 9 * len(classes)
            red = torch.cat([data.images, data.test_images])[:, 0, 8, 8]
            expected = [[abs(r - x) < 9 for x in reds] for r in red.tolist()]  # as JPEG has losses
            assert torch.cat([data.labels, data.test_labels]).tolist() == expected
    data = datasets.load_faces(settings(data=str(folder)), labelled=False)
    assert (data.name, data.classes, data.groups) == (name, (), ()) and len(data.images) == 27
    with pytest.raises(UserError, match=f"--attributes dog: no dog; .*{name} has ant, bee, cat"):
        load_faces(folder, 16, "dog")
    with pytest.raises(UserError, match=f"{name}: 10 images are too few"):
        load_faces(folder, 16, "ant")


def test_there_may_be_many_classes(tmp_path):
    kinds = [f"{k:03}" for k in range(200)]
    data = load_faces(make_classes(tmp_path / "x", kinds, n=1), 16)
    assert data.classes == tuple(kinds) and data.groups == (tuple(range(200)),)
    assert torch.cat([data.labels, data.test_labels]).sum(0).eq(1).all()


@pytest.mark.parametrize("kinds", [("ant",), ("",)])
def test_labels_need_a_folder_for_each_class(tmp_path, kinds):
    folder = make_classes(tmp_path / "x", kinds, n=20)
    if kinds == ("",):
        for path in (folder / "more").iterdir():
            path.rename(folder / path.name)
    with pytest.raises(UserError, match="each class of images needs a folder of its own") as error:
        load_faces(folder, 16)
    assert "\n" not in str(error.value)
    assert len(datasets.load_faces(settings(data=str(folder)), labelled=False).images) == 18


def test_images_of_kinds_that_cannot_be_read_are_counted(tmp_path, capsys):
    folder = make_classes(tmp_path / "x")
    for name in ("a.heic", "b.HEIC", "c.svg", "._d.svg", "notes.txt", "none"):
        (folder / "ant" / name).write_bytes(b"")
    load_faces(folder, 16)
    assert "x: left out 3 images of kinds that can't be read: .heic, .svg ***" in capsys.readouterr().out


def test_faces_are_cut_from_the_middle(tmp_path):
    image = Image.new("RGB", (30, 40), "red")
    image.paste((0, 0, 255), (0, 5, 30, 35))  # the largest square in the middle
    image.paste((0, 255, 0), (10, 15, 20, 25))  # ten in the middle of that
    for path in (make_faces(tmp_path) / "img_align_celeba").iterdir():
        image.save(path)
    whole = load_faces(tmp_path, 30, "Hat").images[0]
    assert not whole[0].any() and whole[1].bool().sum() == 100
    assert (load_faces(tmp_path, 16, "Hat", crop=10).images[:, 1] == 255).all()
    for crop, attributes, message in ((31, "Hat", "30×40 pixels are smaller than --crop 31.*--skip-bad-im"),
                                      (0, "Hat, Hat", "a name twice")):
        with pytest.raises(UserError, match=message):
            load_faces(tmp_path, 16, attributes, crop=crop)


def test_missing_and_damaged_faces_are_named_and_can_be_skipped(tmp_path, capsys):
    pictures = make_faces(tmp_path, n=25) / "img_align_celeba"
    (pictures / "more.png").write_bytes(b"")  # not in the table: not used
    (pictures / "007.png").write_bytes((pictures / "007.png").read_bytes()[:40])
    with pytest.raises(UserError, match="007.png can't be read.*it should be an image.*--skip-bad"):
        load_faces(tmp_path, 16, "Hat")
    (pictures / "000.png").unlink()
    (pictures / "011.png").unlink()
    (pictures / "011.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="000.png is missing .2 of 25"):
        load_faces(tmp_path, 16, "Hat")
    for _ in range(2):  # decoded, then from the cache: each face has its own label
        data = load_faces(tmp_path, 16, "Big_Nose", skip_bad_images=True)
        assert len(data.images) + len(data.test_images) == 22
        assert "left out 3 unusable images" in capsys.readouterr().out
        assert torch.equal(data.labels[:, 0], data.images[:, 0, 0, 0] // 10 % 2)
    shutil.rmtree(pictures)
    pictures.mkdir()
    with pytest.raises(UserError, match="CelebA: 0 images are too few"):
        load_faces(tmp_path, 16, "Hat", skip_bad_images=True)


@pytest.mark.parametrize("old, new, message", [
    ("20\n", "21\n", "21 rows announced, 20 found"), ("20\n", "", "can't be read .ValueError"),
    ("004.png -1 -1 1", "004.png -1 1", "line 7: '004.png -1 1"), ("004.png -1 -1", "004.png -1 2", "line 7"),
    ("004.png", "003.png", "line 7"), ("004.png", "040.png", "040.png is missing"),
    ("Big_Nose Hat Young", "", "0 different attributes"), ("Hat Young", "Hat Hat", "2 different attributes"),
    ("Hat", "Cap", "--attributes Hat: no Hat; .* has Big_Nose, Cap, Young")])
def test_malformed_attribute_files_are_refused(tmp_path, old, new, message):
    table = make_faces(tmp_path) / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message) as error:
        load_faces(tmp_path, 16, "Hat")
    assert "\n" not in str(error.value)


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
    image, quarters, exif = Image.new("RGB", (64, 64), "black"), [], Image.Exif()
    image.paste("white", (0, 0, 32, 32))
    image.paste((128, 128, 128), (32, 0, 64, 32))
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        read = decoded(image, tmp_path / f"x.{suffix}", exif=exif)
        quarters.append("".join(str(round(read[y, x, 0] / 128)) for y in (16, 48) for x in (16, 48)))
    # EXIF 2.3, tag Orientation: on which sides the file's first row (21) and first column (20) are shown
    assert quarters == ["2100", "1200", "0012", "0021", "2010", "0201", "0102", "1020"]
    if suffix in ("png", "webp"):  # broken EXIF data are passed over
        exif = b"Exif\0\0no header"
        assert not decoded(Image.new("RGB", (9, 9)), tmp_path / f"x.{suffix}", exif=exif).any()


def test_colours_are_those_of_the_profile(tmp_path):
    """A profile whose primaries red and green are exchanged stands for all those that are not sRGB's."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    assert swapped != srgb
    for mode, suffix, colour, expected in (
            ("RGB", "png", (255, 0, 0), (0, 255, 0)), ("RGB", "jpg", (255, 0, 0), (0, 255, 0)),
            ("RGB", "webp", (0, 255, 0), (255, 0, 0)), ("RGBA", "png", (255, 0, 0, 0), (255, 255, 255)),
            ("RGBA", "png", (255, 0, 0, 255), (0, 255, 0))):
        image, path = Image.new(mode, (64, 64), colour), tmp_path / f"x.{suffix}"
        read = decoded(image, path, icc_profile=swapped).astype(int)
        assert np.abs(read - expected).max() < 6, (mode, suffix)
        for profile in (srgb, b"no profile", swapped[:200]):  # a broken one is passed over, as viewers do
            without = decoded(image, path).astype(int)
            assert np.abs(decoded(image, path, icc_profile=profile) - without).max() < 3
    hole = dict(transparency=(9, 9, 9), icc_profile=srgb)
    assert (decoded(Image.new("RGB", (64, 64), (9, 9, 9)), tmp_path / "x.png", **hole) > 253).all()
    grey = decoded(Image.new("L", (64, 64), 77), tmp_path / "x.png", icc_profile=swapped)
    assert (grey == 77).all()  # a profile of colours does not fit


def test_no_file_starts_a_program_whatever_its_name(tmp_path):
    with pytest.raises(UserError, match="x.png can't be read .Unidentified"):  # Pillow starts Ghostscript
        decoded(Image.new("RGB", (64, 64)), tmp_path / "x.png", format="EPS")
