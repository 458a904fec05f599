"""Synthetic stand-ins with known factors; nothing to download."""
from collections.abc import Callable
from pathlib import Path

import torch


def rendering(renderer, n: int, size: int, keys: tuple[str, ...]) -> tuple[Path, str, Callable[[], dict]]:
    """What common.files.cached takes: a file, the renderer's code, and a function that renders, by key."""
    code = Path(renderer.__file__)

    def render() -> dict:
        print(f"rendering {n:,} synthetic {code.stem} at {size}×{size} …", flush=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return dict(zip(keys, renderer.render(n, size, device=device), strict=True))
    return Path(f"data/cache/{code.stem}-{size}-{n}.pt"), code.read_text(encoding="utf-8"), render
