"""The device, what a figure depends on, and files that are written whole."""
import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import torch

from common.errors import UserError


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The device of that name ("auto": CUDA if available, else the CPU); UserError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if deterministic:  # only kernels that give the same bits in each run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name} is not available ({reason}): use --device cpu") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products
        torch.backends.cudnn.benchmark = not deterministic
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """"fp32" or "bf16", for autocast; "auto" is bf16 where the hardware has it and need not emulate it."""
    on_cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else "_bf16" in cpuinfo("flags")
    if name == "bf16" and not fast:
        print(f"*** --precision bf16 is slow on this {device.type} device, which only emulates it ***")
    return ("bf16" if fast else "fp32") if name == "auto" else name


def cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" elsewhere."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(rf"^{field}\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].strip()
    return ""


def hardware(device: torch.device) -> str:
    """The names of the GPU, if on CUDA, and the processor; and the number of threads."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    n, name = torch.get_num_threads(), cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{gpu}{name}, {n} thread{'s' if n > 1 else ''}"


def circumstances(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the settings: commit, hardware, torch version."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": commit, "hardware": hardware(device), "torch": str(torch.__version__)}


TEMPORARY = ".writing-"  # how the names of unfinished files begin: no others are ever removed


def write_whole(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Have `write` fill a temporary file, sync it, rename it: `path` is either complete or unchanged.

    previous: where the file that `path` was until now is kept. Raises OSError if anything is impossible.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # Windows syncs only files that are open for writing
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's
        raise OSError(f"{path} can't be written, is the disk full? ({str(error)[:80]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(folder: Path):
    """Within, the folder is this process's own; UserError if it is another's. Windows lacks such locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is in use: another process is training there") from None
        yield


def free_folder(out: str, name: str) -> Path:
    """The folder `out`, else the first free one of runs/NAME, runs/NAME-2, …; UserError if it holds files."""
    numbered = (Path(f"runs/{name}-{n}" if n > 1 else f"runs/{name}") for n in itertools.count(1))
    folder = Path(out) if out else next(path for path in numbered if not path.exists())
    if out and (folder.is_file() or any(p.is_file() for p in folder.rglob("[!.]*"))):
        raise UserError(f"{out} already exists, and its files are never overwritten: choose another folder, "
                        "or continue a run with --resume")
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{folder} can't be created: {there} is not a writable folder")
    return folder


def digest_of(text: str, *tensors: torch.Tensor) -> str:
    """Twelve hexadecimal digits that name a text and tensors."""
    digest = hashlib.sha1(text.encode())
    for x in tensors:
        digest.update(x.contiguous().numpy())  # its bytes where they lie
    return digest.hexdigest()[:12]


def load_checked(path: Path, **options) -> dict:
    """torch.load of plain values to the CPU, after a check of the file's sums, which torch leaves out."""
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def cached(path: Path, key, make: Callable[[], dict]) -> dict:
    """make()'s tensors with a "digest" of the images, read from `path` if it was written for the same key.

    What is read stays in the file until it is used (mmap): sets may exceed memory, and processes share them.
    """
    key = digest_of(repr(key))
    with contextlib.suppress(Exception):  # none, or a damaged one, which is rebuilt
        stored = load_checked(path, mmap=True)
        if stored["key"] == key and re.fullmatch("[0-9a-f]{12}", stored["digest"]):  # it names a file
            print(f"read from the cache {path}")
            return stored
    made = make()
    made |= {"key": key, "digest": digest_of("", made["images"])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda p: torch.save(made, p))
    except OSError as error:  # a folder that is read-only or full
        print(f"no cache written: {error}")
    return made
