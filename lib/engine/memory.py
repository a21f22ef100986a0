"""Memory: what a model's weights need, what there is, and a refusal before anything is loaded."""

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

_CONTAINER = Path("/sys/fs/cgroup")
_FILES = (  # of both versions of control groups: the limit, the bytes held, and whose they are
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def weight_bytes(config: Any, dtype: torch.dtype, bits: int | None = None) -> int:
    """Return the bytes that a causal model's weights need in `dtype`, or at `bits` a weight.

    The model of the configuration is laid out without memory for its weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return n_parameters * (bits or 8 * dtype.itemsize) // 8


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library (glibc's) can.

    The holes that freed tensors leave are kept for the next ones, but weights do not fit in them.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> dict[str, int]:
    """Return the free bytes of the CPU and of each GPU, by torch's name of the device.

    For the CPU that is what can be had without swapping, within the limit of the container. Files
    that the system keeps in memory, such as a model that was just fetched, count as free.
    """
    free = {"cpu": int(psutil.virtual_memory().available)}
    for names in _FILES:
        with suppress(OSError, ValueError):  # no such container, or one without a limit
            limit, held, shares = ((_CONTAINER / name).read_text() for name in names)
            share = dict(line.split() for line in shares.splitlines())
            of = "total_" if "total_cache" in share else ""  # with the groups inside it
            files = sum(int(share.get(f"{of}{kind}_file", 0)) for kind in ("active", "inactive"))
            free["cpu"] = min(free["cpu"], int(limit) - int(held) + files)
    for index in range(torch.cuda.device_count()):
        free[f"cuda:{index}"] = torch.cuda.mem_get_info(index)[0]
    return free


def check_memory(name: str, needed: int, device: str, free: Mapping[str, int]) -> None:
    """Refuse what does not fit.

    Args:
        name: what needs the memory, as the message says it.
        needed: bytes.
        device: where, as torch names it, or `"auto"` for all devices together.
        free: from `free_memory`. A device that is not in it (MPS, say) is not judged.

    Raises:
        ValueError: `needed` is more than there is; the message gives both.
    """
    if device == "auto":
        there = sum(free.values())
    else:
        there = free.get("cuda:0" if device == "cuda" else device, needed)
    if needed > there:
        raise ValueError(
            f"{name} needs {in_gigabytes(needed)}, but {in_gigabytes(there)} are free "
            f"({device}). Take a smaller dtype (bfloat16), quantization='4bit', a smaller model, "
            "or a device_map that puts some modules on 'disk'."
        )


def in_gigabytes(n_bytes: int) -> str:
    """Return a number of bytes as text, in gigabytes (10⁹ bytes)."""
    return f"{n_bytes / 10**9:.3g} GB"
