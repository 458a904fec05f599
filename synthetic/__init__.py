"""Synthetic stand-ins with known factors; nothing to download."""
from pathlib import Path

import torch

from common.system import cached


def rendered(renderer, n: int, size: int, keys: tuple[str, ...]) -> dict:
    """What renderer.render returns for n and size, by key; cached until the renderer's code changes."""
    code = Path(renderer.__file__)

    def render() -> dict:
        print(f"rendering {n:,} synthetic {code.stem} at {size}×{size} …", flush=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return dict(zip(keys, renderer.render(n, size, device=device), strict=True))
    return cached(Path(f"data/cache/{code.stem}-{size}-{n}.pt"), code.read_text(), render)
