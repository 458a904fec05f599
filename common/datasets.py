"""Data sets as one uint8 image tensor with labels, decoded once and cached; batches by index."""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import MNIST
from torchvision.transforms.functional import center_crop, resize

from common.errors import UserError, reading
from common.system import cached, digest_of
from synthetic import digits, faces, rendering, scenes


@dataclass
class Data:
    """A labelled set of images, real or synthetic."""
    name: str  # "i-CLEVR", "synthetic digits", …: part of every title
    kind: str  # "scenes", "digits" or "faces": which judge reads it, and what the labels are
    source: str  # the resolved --data
    images: torch.Tensor  # uint8 [N, C, S, S]
    labels: torch.Tensor  # scenes: ascending ids, null-padded [N, 3]; digits [N]; faces: 0. or 1. [N, A]
    classes: tuple[str, ...]  # names of the objects, digits or attributes
    digest: str  # names the pixels and labels
    test_images: torch.Tensor | None = None  # [M, C, S, S], for scores only; scenes have none
    test_labels: torch.Tensor | None = None
    groups: tuple[tuple[int, ...], ...] = ()  # faces: columns of which each face has exactly one
    scene: torch.Tensor | None = None  # scenes: [N]; frames of a scene share objects: split by this
    tests: dict[str, torch.Tensor] = field(default_factory=dict)  # scenes: label sets [32, 3] to generate
    test_factors: dict[str, torch.Tensor] = field(default_factory=dict)  # synthetic digits: slant … [M]
    origin: str = ""  # names the code that renders such images, or MNIST's pixels: for a shipped judge

    def __post_init__(self):
        size = self.images.shape[-1]
        print(f"data: {self.name} ({self.source}), {len(self.images):,} training images of {size}×{size}")

    def split(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A judge's training images and labels, and those held out from it: of scenes a fixed tenth."""
        if self.scene is None:
            return self.images, self.labels, self.test_images, self.test_labels
        numbers = self.scene.unique()
        if len(numbers) < 10:
            raise UserError(f"{self.name} has fewer than 10 scenes, too few for a judge: use --judge none")
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
        test = torch.isin(self.scene, numbers[order[:round(len(numbers) / 10)]])
        return self.images[~test], self.labels[~test], self.images[test], self.labels[test]

    def validation_images(self) -> torch.Tensor:
        """As many training images as there are test images: best.pt is chosen by the distance to these."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        return self.images[order[:len(self.test_images)]]

    def validation_sets(self, n: int = 96) -> torch.Tensor:
        """Label sets [n, 3] of training scenes, a third each of 1, 2, 3 objects, to choose best.pt by."""
        g = torch.Generator().manual_seed(0)
        count = (self.labels < len(self.classes)).sum(1)
        return torch.cat([s[torch.randperm(len(s), generator=g)[:n // 3]] for s in
                          (self.labels[count == k].unique(dim=0) for k in (1, 2, 3))])

    def training_sample(self, n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """n random training images in [-1, 1] with their labels: the scale for generated ones."""
        index = torch.randint(len(self.images), (n,), generator=g)
        return to_float(self.images[index]), self.labels[index]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 [-1, 1], the range of every network here."""
    return images.float() / 127.5 - 1


def pick_source(data: str, real: str) -> str:
    """Resolve --data: "auto" is the real set's folder if it exists, else "synthetic", with a notice."""
    if data != "auto" or Path(real).is_dir():
        return real if data == "auto" else data
    print(f"*** {real} does not exist: using SYNTHETIC images instead (--data PATH names the real set) ***")
    return "synthetic"


# ---------------------------------------------------------------------- i-CLEVR

def load_iclevr(cfg) -> Data:
    """i-CLEVR from the folder cfg.data, or cfg.n_scenes synthetic scenes, at cfg.image_size.

    The folder holds images/ (or iclevr/, image/) with PNGs of any size, train.json, test.json, new_test.json
    and objects.json. Images are squeezed into a square, not cropped, as the course does. Raises UserError.
    """
    source, size = pick_source(cfg.data, "data/iclevr"), cfg.image_size
    if source == "synthetic":
        d = cached(*rendering(scenes, cfg.n_scenes, size, ("images", "labels", "scene")))
        ids = {name: i for i, name in enumerate(scenes.OBJECTS)}
        lists = json.loads(Path(scenes.__file__).with_name("iclevr_tests.json").read_text())
        tests = {name: torch.tensor([pad_ids(s, ids, name) for s in sets]) for name, sets in lists.items()}
        return Data("synthetic scenes", "scenes", source, d["images"], d["labels"], scenes.OBJECTS,
                    d["digest"], scene=d["scene"], tests=tests, origin=d["key"])
    folder = Path(source)
    ids, train, tests = read_iclevr_lists(folder)
    places = [folder / name for name in ("images", "iclevr", "image")]
    pictures = next((place for place in places if place.is_dir()), places[0])
    names = sorted(train)
    images, pixels, _ = load_images(pictures, names, size)
    labels = torch.tensor([train[name] for name in names])
    scene = np.unique([name.rsplit("_", 1)[0] for name in names], return_inverse=True)[1]
    return Data("i-CLEVR", "scenes", source, images, labels, tuple(sorted(ids, key=ids.get)),
                digest_of(pixels, labels), scene=torch.from_numpy(scene), tests=tests)


def read_iclevr_lists(folder: Path) -> tuple[dict, dict, dict]:
    """{object: id}, {file name of train.json: three ids} and the two test lists."""
    def read(name: str, kind: type, example: str):
        with reading(folder / name, f"such as {example}. i-CLEVR is a folder with images/, train.json, "
                     "test.json, new_test.json and objects.json; --data synthetic needs none"):
            content = json.loads((folder / name).read_text())
            if not isinstance(content, kind) or not content:
                raise ValueError(f"not a filled {kind.__name__}")
            if name == "objects.json":
                if sorted(map(repr, content.values())) != sorted(map(repr, range(len(content)))):
                    raise ValueError("the ids are not 0, 1, 2 …")
                return content
            if kind is dict:
                return {key: pad_ids(objects, ids, key) for key, objects in content.items()}
            return torch.tensor([pad_ids(objects, ids, f"set {i}") for i, objects in enumerate(content)])

    ids = read("objects.json", dict, '{"gray cube": 0, …}')
    tests = {name: read(f"{name}.json", list, '[["red cube"], …]') for name in ("test", "new_test")}
    return ids, read("train.json", dict, '{"file.png": ["red cube", …], …}'), tests


def pad_ids(objects: list[str], ids: dict[str, int], where: str) -> list[int]:
    """The sorted ids of one to three objects, padded to three with the null id, len(ids)."""
    if not isinstance(objects, list) or not 1 <= len(objects) <= 3:
        raise ValueError(f"{where} should name 1 to 3 objects, has {objects}")
    if unknown := [o for o in objects if not isinstance(o, str) or o not in ids]:
        raise ValueError(f"{where} has an unknown object {unknown[0]!r}")
    return sorted(ids[o] for o in objects) + [len(ids)] * (3 - len(objects))


# ---------------------------------------------------------------------- digits

def load_digits(cfg, image_size: int) -> Data:
    """MNIST, or cfg.n_synthetic synthetic digits and a sixth as many for tests; resized from 28×28.

    cfg.data: "mnist" (data/MNIST, downloaded if missing), the folder that holds MNIST/raw, "synthetic", or
    "auto". Raises UserError for what is missing, damaged or can't be downloaded.
    """
    source, n, factors, origin = cfg.data, cfg.n_synthetic, {}, ""
    if source == "auto":
        try:
            read_mnist(Path("data"), False, download=True)
            source = "mnist"
        except UserError as error:
            if any(Path("data/MNIST/raw").glob("*-ubyte")):  # damaged files must not be replaced silently
                raise
            print(f"*** {error} ***\n*** using SYNTHETIC digits instead of MNIST ***")
            source = "synthetic"
    if source == "synthetic":
        d = cached(*rendering(digits, n + n // 6 + 1, 28, ("images", "labels", "factors")))
        sets = [(d["images"][part], d["labels"][part]) for part in (slice(n), slice(n, None))]
        factors, origin = {name: value[n:] for name, value in d["factors"].items()}, d["key"]
    else:
        root = Path("data" if source == "mnist" else source)
        sets = [read_mnist(root, train, download=source == "mnist") for train in (True, False)]
    digest = digest_of("", *(x for pair in sets for x in pair))
    train, test = ((resize(images, [image_size, image_size]), labels) for images, labels in sets)
    return Data("synthetic digits" if source == "synthetic" else "MNIST", "digits", source, *train,
                tuple("0123456789"), f"{digest}-{image_size}", *test, test_factors=factors,
                origin=origin or digest)


def read_mnist(root: Path, train: bool, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 1, 28, 28] and int64 [N] of MNIST's training or test set, by torchvision."""
    with reading(root / "MNIST" / "raw", "MNIST's four files train-images-idx3-ubyte, …. Fetch them again, "
                 "or use --data mnist (downloads them to data/) or --data synthetic"):
        mnist = MNIST(root, train=train, download=download)
        images, labels = mnist.data, mnist.targets
        if images.shape != (len(labels), 28, 28) or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not match")
    return images[:, None], labels


# ---------------------------------------------------------------------- faces

FACE_LAYOUTS = {  # attribute table: name of the set, folder of the images beside it
    "list_attr_celeba.txt": ("CelebA", "img_align_celeba"), "cartoon_attr.txt": ("cartoon faces", "images"),
}
# eight of CelebA's forty that are easy to see
CELEBA_ATTRIBUTES = "Bangs,Black_Hair,Blond_Hair,Brown_Hair,Eyeglasses,Male,Smiling,Young"


def load_faces(cfg) -> Data:
    """Faces from the folder cfg.data (one of FACE_LAYOUTS), or cfg.n_synthetic synthetic ones.

    cfg.attributes: columns of the table, joined by commas; "": eight of CelebA's, all of another set's.
    cfg.crop: side of the square cut out of the middle of each image; 0: the largest. cfg.skip_bad_images:
    leave out, and count, images that can't be read. A fixed tenth is held out for tests.
    Raises UserError for what is missing or malformed.
    """
    source, size, origin = pick_source(cfg.data, "data/celeba"), cfg.image_size, ""
    if source == "synthetic":
        d = cached(*rendering(faces, cfg.n_synthetic, size, ("images", "labels")))
        name, known, images, pixels = "synthetic faces", faces.FACE_ATTRIBUTES, d["images"], d["digest"]
        columns = pick_columns(cfg.attributes, known, "the synthetic set")
        labels, origin = d["labels"][:, columns], d["key"]
    else:
        tables = [Path(source) / name for name in FACE_LAYOUTS]
        table = next((table for table in tables if table.is_file()), tables[0])
        name, folder = FACE_LAYOUTS[table.name]
        known, rows = read_attributes(table)
        columns = pick_columns(cfg.attributes or CELEBA_ATTRIBUTES * (name == "CelebA"), known, str(table))
        names = sorted(rows)
        images, pixels, kept = load_images(table.parent / folder, names, size, cfg.crop, cfg.skip_bad_images)
        labels = torch.tensor([rows[name] for name in names])[kept][:, columns]
        if len(kept) < len(names):
            print(f"*** {folder}: left out {len(names) - len(kept)} unusable images ***")
    classes = tuple(known[i] for i in columns)
    if len(images) < 20:
        raise UserError(f"{name}: {len(images)} images are too few; a tenth of at least 20 is held out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = (part.sort().values for part in order.tensor_split([len(order) // 10]))
    y = labels.float()
    digest = digest_of(pixels + repr(classes), labels)
    return Data(name, "faces", source, images[train], y[train], classes, digest, images[test], y[test],
                one_of_groups(labels), origin=origin)


def pick_columns(attributes: str, known: tuple[str, ...], where: str) -> list[int]:
    """The columns of the names in `attributes`, joined by commas; all if it is empty."""
    names = attributes.split(",") if attributes else known
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--attributes {attributes}: {f'no {unknown[0]}' if unknown else 'a name twice'}; "
                        f"{where} has {', '.join(known)}")
    return [known.index(name) for name in names]


def one_of_groups(labels: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Split columns of 0/1 labels [N, A] into groups of neighbours with one 1 per row; () if impossible."""
    count = labels.cumsum(1)  # group k ends where every row has first counted to k
    ends = [int((count == k).all(0).int().argmax()) + 1 for k in range(1, int(count.max()) + 1)]
    groups = tuple(tuple(range(start, end)) for start, end in pairwise([0, *ends]))
    return groups if all(len(g) > 1 for g in groups) and ends[-1:] == [labels.shape[1]] else ()


def read_attributes(table: Path) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Attribute names, and {file name: 0 or 1 each}."""
    with reading(table, "CelebA's table (or cartoon_attr.txt): the number of rows, a line of attributes, "
                 "and rows of a file name (used once) and 0 or 1 (or -1 and 1) for each attribute"):
        lines = table.read_text().rstrip().splitlines()
        n, known, rows, values = int(lines[0]), tuple(lines[1].split()), {}, {"0": 0, "1": 1, "-1": 0}
        if not known or n != len(lines) - 2:
            raise ValueError(f"{n} rows announced, {len(lines) - 2} found; {len(known)} attributes")
        for number, line in enumerate(lines[2:], 3):
            name, *row = line.split() or [""]
            if len(row) != len(known) or not set(row) <= values.keys() or name in rows:
                raise ValueError(f"line {number}: {line[:60]!r}")
            rows[name] = [values[value] for value in row]
    return known, rows


# ---------------------------------------------------------------------- decoding and caching

def load_images(folder: Path, names: list[str], size: int, crop: int | None = None,
                skip_bad: bool = False) -> tuple[torch.Tensor, str, torch.Tensor]:
    """The named images as RGB squares: uint8 [K, 3, size, size], a digest of the pixels, which names [K].

    crop: side of the square to cut out of the middle first; 0: the largest; None: squeeze the whole image.
    Decoded once and cached beside the folder until a file in it changes. Raises UserError for a missing
    image, and, unless skip_bad, for one that is unreadable or smaller than the crop.
    """
    with reading(folder, "the folder of the images"):
        stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
    if missing := [name for name in names if name not in stats]:
        raise UserError(f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} images are): "
                        "unpack the set again, or remove them from the list that names them")
    state = [(name, stats[name].st_size, stats[name].st_mtime_ns) for name in names]

    def decode() -> dict:
        print(f"decoding {len(names):,} images of {folder} …", flush=True)
        pixels, skipped = np.empty((len(names), size, size, 3), np.uint8), UserError if skip_bad else ()

        def one(i: int) -> bool:
            try:
                pixels[i] = decode_image(folder / names[i], size, crop)
                return True
            except skipped:
                return False

        with ThreadPoolExecutor() as pool:
            kept = torch.tensor(list(pool.map(one, range(len(names))))).nonzero()[:, 0]
        return {"images": torch.from_numpy(pixels).permute(0, 3, 1, 2)[kept].contiguous(), "kept": kept}

    suffix = f"{size}" if crop is None else f"{size}-crop{crop}"
    d = cached(folder.parent / f".{folder.name}-{suffix}.cache.pt", (state, crop, skip_bad), decode)
    return d["images"], d["digest"], d["kept"]


def decode_image(path: Path, size: int, crop: int | None) -> Image.Image:
    """One image as load_images has it; raises UserError if that is impossible."""
    hint = "" if crop is None else f" of at least {crop or 1} pixels; leave such out with --skip-bad-images"
    with reading(path, f"an image{hint}"), Image.open(path) as opened:
        image = opened.convert("RGB")
        if crop and min(image.size) < crop:
            raise ValueError(f"{image.width}×{image.height} pixels are smaller than --crop {crop}")
    if crop is not None:
        image = center_crop(image, [crop or min(image.size)])
    return image.resize((size, size), Image.Resampling.BILINEAR)


class Batches:
    """Shuffled batches, without replacement within an epoch, as a pure function of seed and number.

    The images live on `device` if they take at most half of its free memory, else in the host's.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, device: torch.device):
        self.images, self.labels, self.batch_size, self.seed = data.images, data.labels, batch_size, seed
        self.device, self.epoch, self.per_epoch = device, -1, len(data.images) // batch_size
        if not self.per_epoch:
            raise UserError(f"--batch-size {batch_size} is more than the {len(data.images)} training images")
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `number` = 0, 1, … on the device: images [B, C, S, S] in [-1, 1], labels as Data has them."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.images), generator=g).to(self.images.device)
            self.epoch = epoch
        index = self.order[at * self.batch_size:(at + 1) * self.batch_size]
        images, labels = self.images[index], self.labels[index]
        if images.device.type != self.device.type:  # "cuda" and "cuda:0" are not equal, but alike
            images, labels = (x.pin_memory().to(self.device, non_blocking=True) for x in (images, labels))
        return to_float(images), labels
