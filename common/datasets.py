"""Data sets as one uint8 image tensor with labels, decoded once and cached; batches by index."""
import contextlib
import csv
import inspect
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress, pairwise
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torchvision.datasets import MNIST, mnist, utils
from torchvision.transforms.functional import center_crop, resize

from common.files import UserError, cached, digest_of, reading
from synthetic import digits, faces, rendering, scenes


@dataclass
class Data:
    """A labelled set of images, real or synthetic."""
    name: str  # "i-CLEVR", "synthetic digits", …: part of every title
    domain: str  # "scenes", "digits" or "faces": which judge reads it, and what the labels are
    source: str  # the resolved --data
    images: torch.Tensor  # uint8 [N, C, S, S]
    labels: torch.Tensor  # scenes: ascending ids, null-padded [N, 3]; digits [N]; faces: 0. or 1. [N, A]
    classes: tuple[str, ...]  # names of the objects, digits or attributes
    digest: str  # names the pixels and labels
    test_images: torch.Tensor | None = None  # held out, [M, C, S, S], for scores only; scenes have none
    test_labels: torch.Tensor | None = None
    groups: tuple[tuple[int, ...], ...] = ()  # faces: columns of which each face has exactly one
    scene: torch.Tensor | None = None  # scenes: [N]; frames of a scene share objects: split by this
    test_label_sets: dict[str, torch.Tensor] = field(default_factory=dict)  # scenes: [32, 3] each
    fingerprint: str = ""  # of the renderer's code, MNIST's pixels or i-CLEVR's lists; selects bundled judges

    def __post_init__(self):
        n, size = len(self.images), self.images.shape[-1]
        if not n and self.test_images is None:  # of a checkpoint
            return
        if self.test_images is not None and (m := len(self.test_images)) < 2:
            raise UserError(f"{self.name}: {n + m} images are too few: {m} for scores, at least 2 are needed")
        print(f"data: {self.name} ({self.source}), {n:,} training images of {size}×{size}")

    def metadata(self) -> dict:
        """Metadata stored in checkpoints so that sampling works without the data set; see from_metadata."""
        some = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:10_000]
        return dict(name=self.name, kind=self.domain, source=self.source, classes=self.classes,
                    digest=self.digest, groups=self.groups, tests=self.test_label_sets,
                    fingerprint=self.fingerprint, labels=self.labels[some].byte(),
                    images=self.images.new_empty(0, *self.images.shape[1:]))

    @classmethod
    def from_metadata(cls, stored: dict) -> "Data":
        """Data without images, and with at most 10,000 of the labels, from metadata()."""
        labels = stored["labels"].to(torch.float32 if stored["kind"] == "faces" else torch.int64)
        return cls(stored["name"], stored["kind"], stored["source"], stored["images"], labels,
                   stored["classes"], stored["digest"], groups=stored["groups"],
                   test_label_sets=stored["tests"], fingerprint=stored.get("fingerprint", ""))

    def random_images(self, n: int, g: torch.Generator) -> torch.Tensor:
        """n random training images in [-1, 1]."""
        return to_float(self.images[torch.randint(len(self.images), (n,), generator=g)])


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 [-1, 1], the range of every network here."""
    return images.float() / 127.5 - 1


def pick_source(data: str, real: str = "") -> str:
    """Resolve --data: "auto" is the real set's folder if it exists, else "synthetic", with a notice."""
    if data not in ("auto", "synthetic") and not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder")
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
        digest = digest_of(f"{d['key']} {size}", d["labels"])  # of code: pixels depend on the processor
        return Data("synthetic scenes", "scenes", source, d["images"], d["labels"], scenes.OBJECTS,
                    digest, scene=d["scene"], test_label_sets=tests, fingerprint=d["key"])
    folder = Path(source)
    ids, train, tests = read_iclevr_lists(folder)
    places = map(folder.joinpath, ("images", "iclevr", "image"))
    place = next(filter(os.path.isdir, places), folder / "images")
    images, pixels, names = load_images(place, sorted(train), size)
    labels = torch.tensor([train[name] for name in names])
    scene = np.unique([name.rsplit("_", 1)[0] for name in names], return_inverse=True)[1]
    return Data("i-CLEVR", "scenes", source, images, labels, tuple(sorted(ids, key=ids.get)),
                digest_of(pixels, labels, *tests.values()), scene=torch.from_numpy(scene),
                test_label_sets=tests, fingerprint=digest_of(repr(names), labels))


def read_iclevr_lists(folder: Path) -> tuple[dict, dict, dict]:
    """{object: id}, {file name of train.json: three ids} and the two test lists."""
    def once(pairs: list[tuple]) -> dict:  # json silently keeps the last of duplicate keys
        if twice := [a for a, b in pairwise(sorted(key for key, _ in pairs)) if a == b]:
            raise ValueError(f"{twice[0]} is given twice")
        return dict(pairs)

    def read(name: str, kind: type, example: str):
        with reading(folder / name, f"such as {example}. i-CLEVR is a folder with images/, train.json, "
                     "test.json, new_test.json and objects.json; --data synthetic needs none"):
            content = json.loads((folder / name).read_bytes(), object_pairs_hook=once)
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
    if not isinstance(objects, list) or not 1 <= len(objects) == len({*map(repr, objects)}) <= 3:
        raise ValueError(f"{where} should name 1 to 3 different objects, has {objects}")
    if unknown := [o for o in objects if not isinstance(o, str) or o not in ids]:
        raise ValueError(f"{where} has an unknown object {unknown[0]!r}")
    return sorted(ids[o] for o in objects) + [len(ids)] * (3 - len(objects))


def label_sets(text: str, data: Data, n: int) -> torch.Tensor:
    """Padded class ids [N, 3] of images to generate: n of each set in `text`, such as "red cube, blue sphere;
    gray cylinder", or in the file it names, such as test.json; n of training images if it is empty.
    """
    if not text:
        return data.labels[torch.arange(n) % len(data.labels)]
    ids = {name: i for i, name in enumerate(data.classes)}
    with reading(f"--labels {text!r}", "sets of objects, such as 'red cube, blue sphere; gray cylinder', or "
                 "a file like test.json"):
        sets = [[name.strip() for name in objects.split(",")] for objects in text.split(";")]
        if text.endswith(".json"):
            sets = json.loads(Path(text).read_bytes())
        if not sets:
            raise ValueError("it is empty")
        sets = [pad_ids(objects, ids, f"set {i}") for i, objects in enumerate(sets, 1)]
        return torch.tensor(sets).repeat_interleave(n, 0)


# ---------------------------------------------------------------------- digits

MNIST_DIGEST = "cee072405a73"  # of its images and labels


def load_digits(cfg, image_size: int) -> Data:
    """MNIST, or cfg.n_synthetic synthetic digits and a sixth as many for tests; resized from 28×28.

    cfg.data: "mnist" (data/MNIST, downloaded if missing), a folder with MNIST/raw, raw or the four files,
    perhaps .gz or ….idx3-ubyte, "synthetic", or "auto". UserError: missing, damaged, too few, no download.
    """
    source, n, name = cfg.data, cfg.n_synthetic, "synthetic digits"
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
        fingerprint, digest = d["key"], digest_of(d["key"], d["labels"])
    else:
        root = Path("data" if source == "mnist" else pick_source(source))
        sets = [read_mnist(root, train, download=source == "mnist") for train in (True, False)]
        fingerprint = digest = digest_of("", *(x for pair in sets for x in pair))
        name = "MNIST" if digest == MNIST_DIGEST else root.resolve().name  # FashionMNIST has the same layout
    train, test = ((resize(images, [image_size, image_size]), labels) for images, labels in sets)
    return Data(name, "digits", source, *train, tuple("0123456789"), f"{digest}-{image_size}", *test,
                fingerprint=fingerprint)


def read_mnist(root: Path, train: bool, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 1, 28, 28] and int64 [N] of MNIST's training or test set, by torchvision."""
    raw, parts = root / "MNIST" / "raw", []
    with reading(raw, "MNIST's four files, train-images-idx3-ubyte … or .gz. Fetch them again, or use --data "
                 "mnist (downloads them to data/) or --data synthetic"), TemporaryDirectory() as unpacked:
        if download and len(list(raw.glob("*[-.]idx?-ubyte"))) < 4:
            MNIST(root, download=True)
        for kind, read in (("images", mnist.read_image_file), ("labels", mnist.read_label_file)):
            pattern = f"{'train' if train else 't10k'}-{kind}[-.]idx?-ubyte*"
            paths = (path for place in (raw, root / "raw", root) for path in sorted(place.glob(pattern)))
            path = next(filter(Path.is_file, paths), raw / pattern)
            parts.append(read(utils.extract_archive(path, unpacked) if path.suffix == ".gz" else path))
        images, labels = parts
        if images.shape != (len(labels), 28, 28) or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not match")
    return images[:, None], labels


# ---------------------------------------------------------------------- faces

FACE_LAYOUTS = {  # attribute table: name of the set, folder of the images beside it
    "list_attr_celeba.txt": ("CelebA", "img_align_celeba"), "cartoon_attr.txt": ("cartoon faces", "images"),
    "list_attr_celeba.csv": ("CelebA", "img_align_celeba"),  # Kaggle's
    "CelebAMask-HQ-attribute-anno.txt": ("CelebA-HQ", "CelebA-HQ-img"),
}
CELEBA_ATTRIBUTES = "Bangs,Black_Hair,Blond_Hair,Brown_Hair,Eyeglasses,Male,Smiling,Young"  # easy to see


def load_faces(cfg, labelled: bool = True) -> Data:
    """Faces from the folder cfg.data (one of FACE_LAYOUTS), or cfg.n_synthetic synthetic ones.

    A folder without a table may hold images of anything: with `labelled`, those of each class in a subfolder,
    so that the attributes are the classes; else anywhere, without attributes. cfg.attributes: columns of the
    table, joined by commas; "": eight of CelebA's, all of another set's. cfg.crop: side of the square cut out
    of the middle of each image; 0: the largest. cfg.skip_bad_images: leave out, and count, missing and
    unusable ones, else UserError. A fixed tenth is held out for tests.
    """
    source, size, fingerprint = pick_source(cfg.data, "data/celeba"), cfg.image_size, ""
    if source == "synthetic":
        d = cached(*rendering(faces, cfg.n_synthetic, size, ("images", "labels")))
        name, known, images = "synthetic faces", faces.FACE_ATTRIBUTES, d["images"]
        columns = pick_columns(cfg.attributes, known, "the synthetic set")
        labels, fingerprint, pixels = d["labels"][:, columns], d["key"], f"{d['key']} {size}"
    else:
        tables = [Path(source) / name for name in FACE_LAYOUTS]
        table = next(filter(os.path.isfile, tables), tables[0])
        name, folder = FACE_LAYOUTS[table.name][0], table.parent / FACE_LAYOUTS[table.name][1]
        paths = [] if table.is_file() else image_names(table.parent)
        known = tuple(sorted({path.split("/")[0] for path in paths if "/" in path})) if labelled else ()
        if len(known) > 1 or paths and not labelled:
            folder, rows = table.parent, dict.fromkeys(paths, [])
            name = folder.resolve().name
        else:
            known, rows = read_attributes(table)
        default = CELEBA_ATTRIBUTES * (not paths and name.startswith("CelebA"))
        columns = pick_columns(cfg.attributes or default, known, source)
        if paths and labelled:  # the images of the chosen classes
            one_hot = {known[i]: [int(i == k) for k in range(len(known))] for i in columns}
            rows = {path: one_hot[kind] for path in paths if (kind := path.split("/")[0]) in one_hot}
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        files = sorted(rows)
        images, pixels, kept = load_images(folder, [files[i] for i in order], size, cfg.crop,
                                           cfg.skip_bad_images)
        labels = [[rows[file][i] for i in columns] for file in kept]
        labels = torch.tensor(labels).view(len(kept), len(columns))
        if len(kept) < len(rows):
            print(f"*** {folder}: left out {len(rows) - len(kept)} unusable images ***")
    classes = tuple(known[i] for i in columns)
    y, n = labels.float(), len(images) - len(images) // 10  # in random order, so without copies
    return Data(name, "faces", source, images[:n], y[:n], classes, digest_of(pixels + repr(classes), labels),
                images[n:], y[n:], one_of_groups(labels), fingerprint=fingerprint)


def pick_columns(attributes: str, known: tuple[str, ...], where: str, flag="--attributes") -> list[int]:
    """The columns of the names in `attributes`, joined by commas; all if it is empty."""
    names = [name.strip() for name in attributes.split(",")] if attributes else known
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"{flag} {attributes}: {f'no {unknown[0]}' if unknown else 'a name twice'}; "
                        f"{where} has {', '.join(known)}")
    return [known.index(name) for name in names]


def one_of_groups(labels: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Split columns of 0/1 labels [N, A] into groups of neighbours with one 1 per row; () if impossible."""
    count = labels.cumsum(1)  # group k ends where every row has first counted to k
    ends = [int((count == k).all(0).int().argmax()) + 1 for k in range(1, int(labels[:1].sum()) + 1)]
    groups = tuple(tuple(range(start, end)) for start, end in pairwise([0, *ends]))
    return groups if all(len(g) > 1 for g in groups) and ends[-1:] == [labels.shape[1]] else ()


def read_attributes(table: Path) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Attribute names, and {file name: 0 or 1 each}."""
    with reading(table, "CelebA's table (or .csv, or cartoon_attr.txt): the number of rows, a line of names, "
                 "and rows of a file name (used once) and 0 or 1 (or -1 and 1) for each attribute. Without a "
                 "table, each class of images needs a folder of its own in the --data folder"):
        text, rows, values = table.read_bytes(), {}, {"0": 0, "1": 1, "-1": 0}
        lines = text.decode(json.detect_encoding(text)).rstrip().splitlines()
        kaggle = table.suffix == ".csv"  # has no row-count line, but a header for the file-name column
        (n, *_), known, *cells = [[len(lines) - 1], *csv.reader(lines)] if kaggle else map(str.split, lines)
        known = tuple(known[kaggle:])
        if not known or int(n) != len(cells) or len({*known}) < len(known):
            raise ValueError(f"{n} rows announced, {len(cells)} found; {len({*known})} different attributes")
        for number, (name, *row) in enumerate((x or [""] for x in cells), 3 - kaggle):
            if len(row) != len(known) or not set(row) <= values.keys() or name in rows:
                raise ValueError(f"line {number}: {lines[number - 1][:60]!r}")
            rows[name] = [values[value] for value in row]
    return known, rows


# ---------------------------------------------------------------------- decoding and caching

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's reader of EPS starts a program


def files_in(folder: Path) -> dict[str, Path]:
    """{name: path} of the files in a folder and its subfolders; names are relative to it, and in NFC."""
    paths = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return {normalize("NFC", path.relative_to(folder).as_posix()): path for path in paths}


def image_names(folder: Path) -> list[str]:
    """The images in a folder and its subfolders; those of kinds that can't be read here are counted."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = {name: path.suffix.lower() for name, path in files_in(folder).items() if "/." not in f"/{name}"}
    others = [x for x in found.values() if x not in endings and "image/" in str(guess_type(f"a{x}", False))]
    if others:
        kinds = ", ".join(sorted({*others}))
        print(f"*** {folder}: left out {len(others)} images of kinds that can't be read: {kinds} ***")
    return [name for name, ending in found.items() if ending in endings]


def load_images(folder: Path, names: list[str], size: int, crop: int | None = None,
                skip_bad: bool = False) -> tuple[torch.Tensor, str, list[str]]:
    """The named images as RGB: uint8 [K, 3, size, size], a digest of the pixels, and their names.

    crop: side of the square to cut out of the middle first; 0: the largest; None: squeeze the whole image.
    skip_bad: leave out what is missing, unreadable or smaller than the crop, otherwise a UserError.
    Decoded once and cached beside the folder until a file in it changes.
    """
    inner = folder / Path(os.path.abspath(folder)).name  # zips may be unpacked to a folder of their own
    found = files_in(inner) | files_in(folder)
    paths = {name: path for name in names
             if (path := found.get(normalize("NFC", name))) and path.is_file()}  # a link may lead nowhere
    if not skip_bad and (missing := set(names) - paths.keys()):
        raise UserError(f"{folder / min(missing)} is missing ({len(missing)} of {len(names)} images are): "
                        "unpack the set again, or remove them from the list that names them")
    names = list(paths)
    state = [(name, (s := path.stat()).st_size, s.st_mtime_ns) for name, path in paths.items()]

    def decode() -> dict:
        print(f"decoding {len(names):,} images of {folder} …", flush=True)
        pixels, kept = np.empty((len(names), 3, size, size), np.uint8), np.zeros(len(names), bool)

        def one(i: int) -> None:
            with contextlib.suppress(*[UserError] * skip_bad):
                pixels[i] = np.moveaxis(np.asarray(decode_image(paths[names[i]], size, crop)), 2, 0)
                kept[i] = True

        with ThreadPoolExecutor() as pool:
            list(pool.map(one, range(len(names))))  # an error or Ctrl-C cancels what is pending
        return {"images": torch.from_numpy(pixels if kept.all() else pixels[kept]),
                "names": list(compress(names, kept))}

    suffix, code = f"{size}" if crop is None else f"{size}-crop{crop}", inspect.getsource(decode_image)
    d = cached(folder.parent / f".{folder.name}-{suffix}.cache.pt", (state, crop, skip_bad, code), decode)
    return d["images"], d["digest"], d["names"]


def decode_image(path: Path, size: int, crop: int | None) -> Image.Image:
    """Decode like an image viewer: apply EXIF orientation and colour profile, composite alpha over white;
    raises UserError.
    """
    hint = "" if crop is None else f" of at least {crop or 1} pixels; leave such out with --skip-bad-images"
    with reading(path, f"an image{hint}"), Image.open(path, formats=FORMATS) as image:
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF data, which viewers ignore
            ImageOps.exif_transpose(image, in_place=True)
        profile = io.BytesIO(image.info.get("icc_profile", b""))
        if image.mode[0] in "IF":
            raise ValueError("grey of 16 bits or of floats: convert it to 8 bits")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        with contextlib.suppress(Exception):  # no or a broken colour profile
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"),
                                              outputMode="RGB" if image.mode == "CMYK" else None)
        image = image.convert("RGB")
        if crop and min(image.size) < crop:
            raise ValueError(f"{image.width}×{image.height} pixels are smaller than --crop {crop}")
    if crop is not None:
        image = center_crop(image, [crop or min(image.size)])
    return image.resize((size, size), Image.Resampling.BILINEAR)


class Batches:
    """Shuffled batches, without replacement within an epoch, as a pure function of seed and number. Process
    `rank` of `world_size` gets its share of each. The images live on `device` if they take at most half of
    its free memory, else in the host's.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, device: torch.device, rank: int = 0,
                 world_size: int = 1):
        self.images, self.labels, self.batch_size, self.seed = data.images, data.labels, batch_size, seed
        self.device, self.epoch, self.per_epoch = device, -1, len(data.images) // batch_size
        self.share = slice(rank, None, world_size)
        if batch_size % world_size:
            raise UserError(f"--batch-size {batch_size} is not a multiple of {world_size} processes")
        if not self.per_epoch and len(data.images):
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
        index = self.order[at * self.batch_size:(at + 1) * self.batch_size][self.share]
        return to_float(self.images[index].to(self.device)), self.labels[index].to(self.device)
