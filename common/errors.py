"""Errors that a user sees as one line, and the exit status of a script."""
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input, in one line: what, where, what to do. Ends a script with status 2."""


class NotFinite(Exception):
    """A loss or a weight is no longer a finite number. Ends a script with status 3."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work; args: message, number of the signal. Ends a script with 128 + number."""


def exit_status(main: Callable[[], int | None]) -> int:
    """Call main; its exit status, with errors and stops as one line."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that can't, such as a notebook's
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not end a run
    # TensorBoard's thread fails before ours where a folder is deleted or a disk full
    threading.excepthook = lambda failed: print(f"*** {failed.exc_value} ***", file=sys.stderr)
    try:
        status = _call(main)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output is gone, and would be missed again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if by SIGPIPE


def _call(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except Stopped as stopped:
        print(f"\n{stopped.args[0]}")
        return 128 + stopped.args[1]
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except (UserError, NotFinite, OSError) as error:  # OSError: a full disk, a folder that is gone, …
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, NotFinite) else 2
    except (MemoryError, RuntimeError) as error:
        if "does not have a deterministic implementation" in str(error):
            print(f"error: {str(error).split('.')[0]}: leave out --deterministic", file=sys.stderr)
            return 2
        if "PYTORCH_ENABLE_MPS_FALLBACK" in str(error):
            print("error: PyTorch lacks an operation for Apple's GPUs: set PYTORCH_ENABLE_MPS_FALLBACK=1, "
                  "or use --device cpu", file=sys.stderr)
            return 2
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        reason = str(error).strip().split("\n")[0][:120]
        print(f"error: not enough memory ({reason}): use a smaller batch, width or image", file=sys.stderr)
        return 2


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
