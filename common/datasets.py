"""Data sets as one uint8 image tensor with labels, loaded whole and cached; batches by index."""
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import MNIST

from common import worlds
from common.run import UserError, write_whole

CACHE = Path("data") / "cache"  # of drawn sets; a real set's cache lies beside its folder
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
               "t10k-labels-idx1-ubyte")


@dataclass
class LabelledScenes:
    """i-CLEVR, or the drawn scenes that stand in for it."""
    name: str  # "i-CLEVR" or "drawn scenes": part of every title
    images: torch.Tensor  # uint8 [N, 3, H, W]
    labels: torch.Tensor  # int64 [N, 3], object ids in ascending order, padded with len(classes)
    scene: torch.Tensor  # int64 [N]; the frames of a scene share objects: split by this, never by image
    classes: tuple[str, ...]  # "gray cube", …: 8·shape + colour
    tests: dict[str, torch.Tensor]  # "test", "new_test": int64 [32, 3]
    digest: str  # names the pixels and labels
    kind = "scenes"

    def held_out(self, share: float = 0.1) -> torch.Tensor:
        """bool [N]: True for the images of a fixed tenth of the scenes, which no judge is trained on."""
        scenes = self.scene.unique()
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
        return torch.isin(self.scene, scenes[order[: max(1, round(share * len(scenes)))]])

    def choice_sets(self, n: int = 96) -> torch.Tensor:
        """n label sets [n, 3] of training images, a third each of one, two and three objects.

        best.pt is chosen by them: choosing it by the test lists would tune to those.
        """
        g = torch.Generator().manual_seed(0)
        count = (self.labels < len(self.classes)).sum(1)
        return torch.cat([s[torch.randperm(len(s), generator=g)[: n // 3]] for s in
                          (self.labels[count == k].unique(dim=0) for k in (1, 2, 3))])


def load_iclevr(source: str, image_size: int = 64, n_scenes: int = 6003) -> LabelledScenes:
    """i-CLEVR from the folder `source`, or n_scenes drawn scenes where it is "drawn".

    The folder holds images/ (or iclevr/, image/) with PNGs of any size, train.json, test.json, new_test.json
    and objects.json. Images are resized to a square as the course does, not cropped. Raises UserError for
    what is missing or malformed.
    """
    if source == "drawn":
        return _drawn_scenes(image_size, n_scenes)
    folder = Path(source)
    objects, train, tests = _read_iclevr_lists(folder)
    pictures = next((folder / d for d in ("images", "iclevr", "image") if (folder / d).is_dir()), None)
    if pictures is None:
        raise UserError(f"{folder} has no images/ (or iclevr/, image/) with the PNGs that train.json names")
    names = sorted(train)
    images, pixels, _ = load_images(pictures, names, image_size)
    labels = torch.tensor([train[name] for name in names])
    numbers = {key: i for i, key in enumerate(dict.fromkeys(name.rsplit("_", 1)[0] for name in names))}
    scene = torch.tensor([numbers[name.rsplit("_", 1)[0]] for name in names])
    digest = hashlib.sha1(pixels.encode() + labels.numpy().tobytes()).hexdigest()[:12]
    return LabelledScenes("i-CLEVR", images, labels, scene, tuple(objects), tests, digest)


def pick_source(data: str, real: str) -> str:
    """Resolve --data: "auto" is the real set's folder where it exists, else "drawn", said aloud."""
    if data != "auto":
        return data
    if Path(real).is_dir():
        return real
    print(f"*** {real} is not there: using DRAWN stand-ins (--data PATH names the real set) ***")
    return "drawn"


def _read_iclevr_lists(folder: Path) -> tuple[list[str], dict[str, list[int]], dict[str, torch.Tensor]]:
    """Class names by id, {file name: three ids} of train.json, and the two test lists."""
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: there is no such folder. It should hold images/, train.json, test.json, "
            "new_test.json and objects.json; --data drawn needs none"
        )

    def read(name: str):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is not there: i-CLEVR is images/, train.json, test.json, new_test.json "
                            "and objects.json in one folder")
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None

    ids = read("objects.json")
    expected = sorted(map(repr, range(len(worlds.OBJECTS))))
    if not isinstance(ids, dict) or sorted(map(repr, ids.values())) != expected:
        raise UserError(f"{folder}/objects.json should give {len(worlds.OBJECTS)} object names the ids 0 to "
                        f"{len(worlds.OBJECTS) - 1}, as {{\"gray cube\": 0, …}}")
    train = read("train.json")
    if not isinstance(train, dict) or not train:
        raise UserError(f"{folder}/train.json should be a filled {{\"file.png\": [\"red cube\", …]}}")
    tests = {}
    for name in ("test", "new_test"):
        sets = read(f"{name}.json")
        if not isinstance(sets, list) or not sets:
            raise UserError(f'{folder}/{name}.json should be a filled list of sets, as [["red cube"], …]')
        where = f"{folder}/{name}.json, set"
        tests[name] = torch.tensor([_pad_ids(s, ids, f"{where} {i}") for i, s in enumerate(sets)])
    train = {name: _pad_ids(objects, ids, f"{folder}/train.json, {name}") for name, objects in train.items()}
    return sorted(ids, key=ids.get), train, tests


def _pad_ids(objects: list[str], ids: dict[str, int], where: str) -> list[int]:
    """Sorted ids of the objects named, padded with the null id to three."""
    if not isinstance(objects, list) or not 1 <= len(objects) <= worlds.MAX_OBJECTS:
        raise UserError(f"{where}: should name 1 to {worlds.MAX_OBJECTS} objects, has {objects}")
    unknown = [o for o in objects if not isinstance(o, str) or o not in ids]
    if unknown:
        raise UserError(f"{where}: unknown object {unknown[0]!r}; objects.json has {list(ids)[:3]} and more")
    return sorted(ids[o] for o in objects) + [worlds.NULL] * (worlds.MAX_OBJECTS - len(objects))


def _drawn_scenes(image_size: int, n_scenes: int) -> LabelledScenes:
    # drawn anew when the renderer changes
    code = hashlib.sha1(Path(worlds.__file__).read_bytes()).hexdigest()

    def draw() -> dict:
        print(f"drawing {n_scenes} scenes of 3 frames at {image_size}×{image_size} …", flush=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        images, labels, scene = worlds.scenes(n_scenes, image_size, seed=0, device=device)
        return {"images": images, "labels": labels, "scene": scene}

    d = cached(CACHE / f"scenes-{image_size}-{n_scenes}.pt", code, draw)
    lists = json.loads(Path(__file__).with_name("iclevr_tests.json").read_text())
    ids = {name: i for i, name in enumerate(worlds.OBJECTS)}
    tests = {name: torch.tensor([_pad_ids(s, ids, name) for s in sets]) for name, sets in lists.items()}
    drawn = d["images"], d["labels"], d["scene"]
    return LabelledScenes("drawn scenes", *drawn, worlds.OBJECTS, tests, d["digest"])


# ---------------------------------------------------------------------- digits

@dataclass
class Digits:
    """MNIST, or the drawn digits that stand in for it."""
    name: str  # "MNIST" or "drawn digits": part of every title
    images: torch.Tensor  # uint8 [N, 1, S, S]
    labels: torch.Tensor  # int64 [N], 0 to 9
    test_images: torch.Tensor  # uint8 [M, 1, S, S]: neither GAN nor judge is trained on these
    test_labels: torch.Tensor  # int64 [M]
    test_factors: dict[str, torch.Tensor]  # true slant, width, … float [M], of drawn digits; else empty
    digest: str  # names the pixels, at this size, and the labels
    classes = tuple("0123456789")
    kind = "digits"


def load_digits(source: str, image_size: int, n_drawn: int = 60_000) -> Digits:
    """MNIST ("mnist": data/MNIST, downloaded where it is missing; or the folder that holds MNIST/raw), or
    n_drawn drawn digits and a sixth as many for tests ("drawn"). Images are resized from 28×28.

    Raises UserError for what is missing, can't be downloaded or is damaged.
    """
    if source == "drawn":
        d = _drawn_digits(n_drawn)
        sets = [(d["images"][part], d["labels"][part]) for part in (slice(n_drawn), slice(n_drawn, None))]
        factors = {name: value[n_drawn:] for name, value in d["factors"].items()}
    else:
        root = Path("data") if source == "mnist" else Path(source)
        sets, factors = [_read_mnist(root, train, download=source == "mnist") for train in (True, False)], {}
    digest = hashlib.sha1(b"".join(x.numpy().tobytes() for pair in sets for x in pair)).hexdigest()[:12]
    digest += f"-{image_size}"
    (images, labels), (test_images, test_labels) = ((_resize(x, image_size), y) for x, y in sets)
    name = "drawn digits" if source == "drawn" else "MNIST"
    return Digits(name, images, labels, test_images, test_labels, factors, digest)


def pick_digits(data: str) -> str:
    """Resolve --data: "auto" is "mnist" where that is under data/ or can be had, else "drawn", said aloud."""
    if data != "auto":
        return data
    try:
        _read_mnist(Path("data"), False, download=True)
        return "mnist"
    except UserError as error:
        if (Path("data") / "MNIST").exists():  # there, but damaged: not to be passed over
            raise
        print(f"*** {error} ***\n*** using DRAWN digits instead of MNIST ***")
        return "drawn"


def _read_mnist(root: Path, train: bool, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 1, 28, 28] and int64 [N] of MNIST's training or test set, by torchvision."""
    raw, part = root / "MNIST" / "raw", "train" if train else "t10k"
    missing = not all((raw / name).is_file() for name in MNIST_FILES)
    if missing and not download:
        raise UserError(f"--data {root}: {raw} should hold MNIST's four files {MNIST_FILES[0]}, …; "
                        "--data mnist downloads them to data/, --data drawn needs none")
    new = [folder for folder in (raw, raw.parent, root) if not folder.exists()]
    try:
        mnist = MNIST(root, train=train, download=missing)
        images, labels = mnist.data, mnist.targets
        assert images.shape == (len(labels), 28, 28) and 0 <= labels.min() <= labels.max() <= 9
    except Exception as error:  # torchvision raises many kinds for damaged files
        reason = " ".join(str(error).split()).rsplit("got: ")[-1][:100]
        if not missing:
            what = f"damaged, or not MNIST's ({type(error).__name__} {reason})"
            raise UserError(f"{raw}/{part}-*-ubyte: {what}: delete them and fetch them again") from None
        for folder in new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(f"MNIST is not in {raw} and can't be downloaded ({reason}): put its four files "
                        f"{MNIST_FILES[0]}, … there, or use --data drawn") from None
    return images[:, None], labels


def _drawn_digits(n: int) -> dict:
    code = hashlib.sha1(Path(worlds.__file__).read_bytes()).hexdigest()

    def draw() -> dict:
        print(f"drawing {n} digits and {n // 6 + 1} for tests …", flush=True)
        images, labels, factors = worlds.digits(n + n // 6 + 1)
        return {"images": images, "labels": labels, "factors": factors}

    return cached(CACHE / f"digits-{n}.pt", code, draw)


def _resize(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] → uint8 [N, C, image_size, image_size], bilinear."""
    size = (image_size, image_size)
    if images.shape[2:] == size:
        return images
    return torch.cat([F.interpolate(part.float(), size, mode="bilinear", antialias=True).round().byte()
                      for part in images.split(4096)])


# ---------------------------------------------------------------------- faces

@dataclass
class Faces:
    """Faces with attributes that are there or not: CelebA, a set of cartoon faces, or drawn ones."""
    name: str  # "CelebA", …: part of every title
    images: torch.Tensor  # uint8 [N, 3, S, S]
    labels: torch.Tensor  # int64 [N, A], 0 or 1
    test_images: torch.Tensor  # uint8 [M, 3, S, S], a tenth: neither GAN nor judge is trained on these
    test_labels: torch.Tensor  # int64 [M, A]
    classes: tuple[str, ...]  # the attributes' names
    groups: tuple[tuple[int, ...], ...]  # columns of which each face has exactly one; () without such
    digest: str  # names the pixels, attributes and labels
    kind = "faces"


FACE_LAYOUTS = {  # attribute file: title, folder of the images beside it
    "list_attr_celeba.txt": ("CelebA", "img_align_celeba"), "cartoon_attr.txt": ("cartoon faces", "images"),
}
# of CelebA's forty, eight that are plain to see
CELEBA_ATTRIBUTES = "Bangs,Black_Hair,Blond_Hair,Brown_Hair,Eyeglasses,Male,Smiling,Young"


def load_faces(source: str, image_size: int, attributes: str = "", crop: int = 0, skip_bad: bool = False,
               n_drawn: int = 10_000) -> Faces:
    """Faces from a folder of list_attr_celeba.txt and img_align_celeba/, or of cartoon_attr.txt and images/;
    or n_drawn drawn ones, where source is "drawn".

    attributes: names of columns, joined by commas; "": eight of CelebA's, all of another set's. crop: side of
    the square cut out of the middle of each image before it is resized; 0: the largest. skip_bad: leave out,
    and count, images that can't be read and those without a row. Raises UserError for what is missing or
    malformed.
    """
    if source == "drawn":
        d = _drawn_faces(image_size, n_drawn)
        columns = _pick_attributes(attributes, list(worlds.FACE_ATTRIBUTES), "the drawn set")
        chosen = tuple(worlds.FACE_ATTRIBUTES[i] for i in columns)
        digest = hashlib.sha1((d["digest"] + repr(chosen)).encode()).hexdigest()[:12]
        return _split_faces("drawn faces", d["images"], d["labels"][:, columns], chosen, digest)
    folder = Path(source)
    table = next((folder / name for name in FACE_LAYOUTS if (folder / name).is_file()), None)
    if table is None:
        raise UserError(f"--data {folder}: there is no {' or '.join(FACE_LAYOUTS)} in it, with the images in "
                        f"{' or '.join(d for _, d in FACE_LAYOUTS.values())} beside it")
    title, pictures = FACE_LAYOUTS[table.name]
    known, rows = _read_attributes(table)
    if title == "CelebA" and not attributes:
        attributes = CELEBA_ATTRIBUTES
    columns = _pick_attributes(attributes, known, str(table))
    chosen = tuple(known[i] for i in columns)
    if not (folder / pictures).is_dir():
        raise UserError(f"{folder / pictures} is not there: it should hold the images of {table.name}")
    without = sorted({entry.name for entry in os.scandir(folder / pictures) if entry.is_file()} - rows.keys())
    if without and not skip_bad:
        raise UserError(f"{folder / pictures / without[0]} has no row in {table.name} ({len(without)} such "
                        "files): take them away, or leave them out with --skip-bad-images")
    names = sorted(rows)
    images, digest, kept = load_images(folder / pictures, names, image_size, crop, skip_bad)
    if without or len(kept) < len(names):
        print(f"*** {folder}: left out {len(names) - len(kept)} images that can't be used and {len(without)} "
              "files without a row ***")
    table_of = torch.tensor([rows[name] for name in names])[kept]
    labels = table_of[:, columns]
    digest = hashlib.sha1(digest.encode() + labels.numpy().tobytes() + repr(chosen).encode()).hexdigest()[:12]
    return _split_faces(title, images, labels, chosen, digest)


def _pick_attributes(attributes: str, known: list[str], where: str) -> list[int]:
    """The columns of the names in `attributes`, joined by commas; all where it is empty."""
    names = attributes.split(",") if attributes else known
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--attributes {attributes}: {f'no {unknown[0]}' if unknown else 'a name twice'}; "
                        f"{where} has {', '.join(known)}")
    return [known.index(name) for name in names]


def _drawn_faces(image_size: int, n: int) -> dict:
    code = hashlib.sha1(Path(worlds.__file__).read_bytes()).hexdigest()

    def draw() -> dict:
        print(f"drawing {n} faces at {image_size}×{image_size} …", flush=True)
        images, labels = worlds.faces(n, image_size)
        return {"images": images, "labels": labels}

    return cached(CACHE / f"faces-{image_size}-{n}.pt", code, draw)


def _split_faces(title: str, images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...],
                 digest: str) -> Faces:
    """A fixed tenth of the faces is held out."""
    if len(images) < 20:
        raise UserError(f"{title}: {len(images)} images are too few; of at least 20 a tenth is held out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[len(order) // 10:].sort().values, order[:len(order) // 10].sort().values
    return Faces(title, images[train], labels[train], images[test], labels[test], classes,
                 one_of_groups(labels), digest)


def one_of_groups(labels: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Neighbouring columns of 0/1 labels [N, A] of which each row has one 1; () unless all are in such."""
    groups, start = [], 0
    while start < labels.shape[1]:
        ends = (labels[:, start:].cumsum(1) == 1).all(0).nonzero()[:, 0]
        if not len(ends) or ends[0] == 0:
            return ()
        groups.append(tuple(range(start, start + int(ends[0]) + 1)))
        start = groups[-1][-1] + 1
    return tuple(groups)


def _read_attributes(table: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Attribute names, and {file name: 0 or 1 each}, of a file whose first line is the number of rows, whose
    second the names, then a row for each image: its name and 0 or 1 (or -1 and 1) for each attribute.
    """
    lines = table.read_text().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) < 3 or not lines[0].strip().isdigit() or not lines[1].strip():
        raise UserError(f"{table}: should begin with the number of rows and a line of attributes' names")
    known, rows, values = lines[1].split(), {}, {"0": 0, "1": 1, "-1": 0}
    if int(lines[0]) != len(lines) - 2:
        raise UserError(f"{table}: its first line announces {int(lines[0])} rows, {len(lines) - 2} follow: "
                        "it is cut off, or the count is wrong")
    for number, line in enumerate(lines[2:], 3):
        name, *row = line.split() or [""]
        if len(row) != len(known) or not set(row) <= values.keys() or name in rows:
            what = f"a file name, once, and {len(known)} values of 0 or 1 (or -1 and 1)"
            raise UserError(f"{table}, line {number}: should be {what}, is {line[:60]!r}")
        rows[name] = [values[value] for value in row]
    return known, rows


# ---------------------------------------------------------------------- decoding and caching

def load_images(folder: Path, names: Iterable[str], image_size: int, crop: int | None = None,
                skip_bad: bool = False) -> tuple[torch.Tensor, str, torch.Tensor]:
    """The named images as RGB squares: uint8 [K, 3, size, size], a digest of the pixels, and which names [K].

    crop: side of the square to cut out of the middle first; 0: the largest there is; None: squeeze the whole
    image. Decoded once and cached beside the folder, until a file in it changes. Raises UserError for a
    missing image, and for one that can't be read or is smaller than the crop, unless those are skipped.
    """
    names = list(names)
    stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
    missing = [name for name in names if name not in stats]
    if missing:
        raise UserError(
            f"{folder / missing[0]} is not there ({len(missing)} of {len(names)} images are missing): "
            "unpack the set again, or take them out of the list that names them"
        )
    state = [(name, stats[name].st_size, stats[name].st_mtime_ns) for name in names]
    key = hashlib.sha1(repr((state, crop, skip_bad)).encode()).hexdigest()

    def decode() -> dict:
        print(f"decoding {len(names)} images of {folder} …", flush=True)
        pixels = np.empty((len(names), image_size, image_size, 3), np.uint8)
        good = torch.ones(len(names), dtype=torch.bool)

        def one(i: int) -> None:
            bad = None
            try:
                with Image.open(folder / names[i]) as image:
                    image = image.convert("RGB")
                if crop and min(image.size) < crop:
                    bad = f"has {image.width}×{image.height} pixels, smaller than --crop {crop}"
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
                bad = f"can't be read as an image ({error})"
            if bad:
                if not skip_bad:
                    also = "" if crop is None else ", or leave such images out with --skip-bad-images"
                    raise UserError(f"{folder / names[i]} {bad}: replace it{also}")
                good[i] = False
                return
            if crop is not None:
                image = _cut(image, crop)
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            pixels[i] = image

        with ThreadPoolExecutor() as pool:
            list(pool.map(one, range(len(names))))
        kept = good.nonzero()[:, 0]
        return {"images": torch.from_numpy(pixels).permute(0, 3, 1, 2)[kept].contiguous(), "kept": kept}

    size = f"{image_size}" if crop is None else f"{image_size}-crop{crop}"
    d = cached(folder.parent / f".{folder.name}-{size}.cache.pt", key, decode)
    if not len(d["kept"]):
        raise UserError(f"{folder}: none of the {len(names)} images can be read")
    return d["images"], d["digest"], d["kept"]


def _cut(image: Image.Image, crop: int) -> Image.Image:
    """The square of side `crop` (0: the largest) in the middle of an image."""
    side = crop or min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def cached(path: Path, key: str, make: Callable[[], dict]) -> dict:
    """make()'s tensors with a "digest" of the images, from `path` where it holds them for the same key."""
    if path.is_file():
        try:
            stored = torch.load(path, weights_only=True)
            if stored["key"] == key:
                return stored
        except Exception:  # a damaged cache is only rebuilt
            pass
    made = make()
    made |= {"key": key, "digest": hashlib.sha1(made["images"].numpy().tobytes()).hexdigest()[:12]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda p: torch.save(made, p))
    except OSError as error:
        print(f"no cache written: {error}")
    return made


class Batches:
    """Shuffled batches, without replacement within an epoch, as a pure function of seed and number.

    The tensors live on `device` where they take at most half of its free memory, else in pinned memory: then
    the next batch in order is on its way while one is in use.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int, device: torch.device
    ):
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.per_epoch = len(images) // batch_size
        if not self.per_epoch:
            raise UserError(f"--batch-size {batch_size} is more than the {len(images)} training images")
        self.images, self.labels, self.epoch, self.ahead = images, labels, -1, {}
        self.stream = None  # that batches are copied on, where the set does not fit
        if device.type == "cuda":
            fits = images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
            self.images, self.labels = (x.to(device) if fits else x.pin_memory() for x in (images, labels))
            self.stream = None if fits else torch.cuda.Stream(device)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `number` (0, 1, …): images uint8 [B, 3, H, W] and labels int64 [B, …], on the device."""
        if self.stream is None:
            return self._gather(number)
        batch, copied = self.ahead.pop(number, None) or self._send(number)
        now = torch.cuda.current_stream(self.device)
        now.wait_event(copied)
        for tensor in batch:
            tensor.record_stream(now)  # its memory is not to be used again before this stream is done with it
        self.ahead = {number + 1: self._send(number + 1)}
        return batch

    def _gather(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.images), generator=g).to(self.images.device)
            self.epoch = epoch
        index = self.order[at * self.batch_size:(at + 1) * self.batch_size]
        return self.images[index], self.labels[index]

    def _send(self, number: int) -> tuple[tuple[torch.Tensor, ...], torch.cuda.Event]:
        """Start copying batch `number` beside what the device does; also the event of its arrival."""
        with torch.cuda.stream(self.stream):
            batch = tuple(x.pin_memory().to(self.device, non_blocking=True) for x in self._gather(number))
            return batch, self.stream.record_event()
