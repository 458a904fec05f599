"""Device selection, precision and run provenance (commit, hardware, versions)."""
import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from common.files import UserError
from harness import dist


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The device of that name ("auto": CUDA if available, else the CPU); UserError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if deterministic:  # only kernels that give the same bits in each run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.device(name)
        if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's: a GPU for each process
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()  # which a meta tensor lacks
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error)[:80].split("\n")[0]
        raise UserError(f"--device {name} is not available ({reason}): use --device cpu") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products
        torch.backends.cudnn.benchmark = not deterministic
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """"fp32" or "bf16"; "auto" is bf16 where the hardware supports it natively."""
    on_cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else "_bf16" in cpuinfo("flags")
    return name if name != "auto" else "bf16" if fast else "fp32"


def cpuinfo(field: str) -> str:
    """A field of Linux's description of the first processor; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)", info.read_text(), re.M) if info.is_file() else None
    return found[1].strip() if found else ""


def hardware(device: torch.device) -> str:
    """Names of the GPU, if on CUDA, and of the processor; number of threads."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    n, name = torch.get_num_threads(), cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{gpu}{name}, {n} thread{'s' if n > 1 else ''}"


def provenance(device: torch.device) -> dict:
    """Commit, hardware, torch version, number of processes: scores depend on these besides the settings."""
    git, commit = "git describe --always --dirty --abbrev=10".split(), ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {"commit": commit or "unknown", "hardware": hardware(device), "torch": str(torch.__version__),
            "processes": dist.world_size()}
