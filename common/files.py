"""What a loader needs of the world: one-line errors, atomic writes, verified reads, a cache."""
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import torch

TEMPORARY = ".writing-"  # prefix of unfinished files; nothing else is ever removed


class UserError(Exception):
    """A mistake in the user's input, in one line: what, where, what to do. Ends a script with status 2."""


@contextlib.contextmanager
def reading(path: Path | str, expected: str):
    """Turn any error while a user's file is read into a UserError: file, reason, what it should be."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers of damaged files raise all kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"{path} can't be read ({reason}): it should be {expected}") from None


def atomic_write(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Call write(temporary), fsync, rename, so that `path` is never left half-written.

    previous: where the file that `path` was until now is kept. Raises OSError if anything is impossible.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # Windows syncs only files that are open for writing
            os.fsync(f.fileno())
        if previous and path.exists():
            replace(path, previous)
        replace(temporary, path)
    except RuntimeError as error:  # torch.save's
        raise OSError(f"{path} can't be written, is the disk full? ({str(error)[:80]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def replace(path: Path, new: Path) -> None:
    """os.replace, tried again after a second: on Windows another program may have the file open meanwhile."""
    with contextlib.suppress(PermissionError):
        return os.replace(path, new)
    time.sleep(1)
    os.replace(path, new)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # names of files may be no UTF-8: such a character is written as JSON's \udcff
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def load_verified(path: Path, **options) -> dict:
    """torch.load plain values to the CPU after checking the file's sums, which torch.load leaves out."""
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def digest_of(text: str, *tensors: torch.Tensor) -> str:
    """Twelve hexadecimal digits that name a text and tensors."""
    digest = hashlib.sha1(text.encode())
    for x in tensors:
        digest.update(x.contiguous().numpy())  # its bytes, without a copy
    return digest.hexdigest()[:12]


def cached(path: Path, key, make: Callable[[], dict]) -> dict:
    """make()'s tensors with a "digest" of the images, read from `path` if it was written for the same key.

    A cache is read lazily (mmap): sets may exceed memory, and processes share their pages.
    """
    key = digest_of(repr(key))
    with contextlib.suppress(Exception):  # a missing or damaged cache is rebuilt
        stored = load_verified(path, mmap=True)
        if stored["key"] == key and re.fullmatch("[0-9a-f]{12}", stored["digest"]):  # it names a file
            print(f"read from the cache {path}")
            return stored
    made = make()
    made |= {"key": key, "digest": digest_of("", made["images"])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda p: torch.save(made, p))
    except OSError as error:  # a folder that is read-only or full
        print(f"no cache written: {error}")
    return made


@contextlib.contextmanager
def lock(folder: Path):
    """Hold the folder for this process; UserError if another has it. A system without locks goes without."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows; file systems such as Lustre
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is in use: another process is training there") from None
        yield
