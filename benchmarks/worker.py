"""One contender in a process of its own: answers requests, a line of JSON each, over pipes.

Started by the driver as `python -m benchmarks.worker NAME`. Everything that a library prints goes
to standard error, so that replies stand alone on standard output.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.bound import Shape
from benchmarks.contenders.base import Contender, WholePrompts
from benchmarks.workloads import LOADS, ExtractLoad, Load, SweepLoad, shrink
from lib.engine.extraction import logit_lens
from lib.engine.loading import quiet
from lib.engine.models import load_decoder

N_LENS_PROMPTS = 64
RATE_SIZE = 2048
RATE_REPEATS = 5


class Worker:
    """Holds a contender; every method answers one kind of request."""

    def __init__(self, name: str) -> None:
        self.decoder = load_decoder(dtype="bfloat16" if name == contenders.HALF else None)
        with quiet():
            self.contender: Contender = contenders.make(name, self.decoder)
        self.tuned: dict[tuple[type, int, str], int | None] = {}

    def describe(self) -> dict[str, Any]:
        """Return the model's name and shape."""
        return {"model": self.decoder.name, "shape": asdict(Shape.of(self.decoder.model.config))}

    def tune(self, load: Load, attention: str) -> dict[str, Any]:
        """Choose the batch size, once for prompts of one length and one attention."""
        key = self._attend(load, attention)
        if key not in self.tuned:
            self.tuned[key] = self.contender.tune(load)
        return {"batch": self.tuned[key]}

    def check(self, load: Load, attention: str, file: str) -> dict[str, Any]:
        """Write what is compared before anything is timed: the share's full logits.

        For a sweep `[n_edits, n_blocks, n_pairs, d_vocab]`; for an extraction the logit lens of the
        last states of some prompts, `[n_prompts, d_vocab]`.
        """
        self._attend(load, attention)
        if isinstance(load, ExtractLoad):
            _, prompts, states = self.contender.extract(load)
            shared = load.shared_prompts()[:N_LENS_PROMPTS]
            chosen = torch.from_numpy(np.searchsorted(prompts, shared))
            np.save(file, logit_lens(self.decoder, states[-1, chosen]).numpy())
            return {}
        blocks = load.shared_blocks(self.decoder.n_blocks)
        shape = (len(load.edits), len(blocks), len(load.pairs), self.decoder.d_vocab)
        logits = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        filled = np.zeros(shape[:3], dtype=bool)

        def keep(edit: int, block: int, pairs: np.ndarray, values: Tensor) -> None:
            logits[edit, blocks.index(block), pairs] = values.numpy()
            filled[edit, blocks.index(block), pairs] = True

        self.contender.sweep(load, keep, blocks)
        if not filled.all():
            raise RuntimeError(f"{(~filled).sum()} of {filled.size} rows were not computed.")
        logits.flush()
        return {}

    def run(self, load: Load, attention: str, file: str) -> dict[str, Any]:
        """Time one run; write a number for each row, NaN where the share leaves it out.

        For a sweep the largest logit `[n_edits, n_blocks, n_pairs]`; for an extraction the norms of
        the states `[n_blocks, n_prompts]`.
        """
        self._attend(load, attention)
        reset_peak_memory()
        if isinstance(load, SweepLoad):
            shape = (len(load.edits), self.decoder.n_blocks, len(load.pairs))
            digest = np.full(shape, np.nan, dtype=np.float32)

            def note(edit: int, block: int, pairs: np.ndarray, values: Tensor) -> None:
                digest[edit, block, pairs] = values.amax(-1).numpy()

            timing = self.contender.sweep(load, note, None)
        else:
            digest = np.full((self.decoder.n_blocks, len(load.lengths)), np.nan, dtype=np.float32)
            timing, prompts, states = self.contender.extract(load)
            digest[:, prompts] = states.norm(dim=-1).numpy()
        peak = peak_memory_mib()
        np.save(file, digest)
        return {"seconds": timing.seconds, "share": timing.share, "peak_mib": peak}

    def _attend(self, load: Load, attention: str) -> tuple[type, int, str]:
        """Set the attention and the batch size tuned for it, and return what that depends on."""
        self.decoder.model.set_attn_implementation(attention)
        longest = max(load.lengths) if isinstance(load, ExtractLoad) else load.length
        key = (type(load), longest, attention)
        if isinstance(self.contender, WholePrompts) and self.tuned.get(key):
            self.contender.batch = self.tuned[key] or self.contender.batch
        return key


class Rate:
    """Measures the rate of fp32 matrix products; holds no model."""

    def run(self) -> dict[str, Any]:
        """Return 10⁹ multiply–accumulates a second, the best of some products."""
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, RATE_SIZE, RATE_SIZE, generator=generator)
        seconds = []
        for _ in range(RATE_REPEATS + 1):
            started = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - started)
        return {"gmacs": RATE_SIZE**3 / min(seconds[1:]) / 1e9}

    def describe(self) -> dict[str, Any]:
        """Return the versions in this environment."""
        names = ("torch", "transformers", "transformer-lens", "nnsight", "pyvene", "numpy")
        return {"versions": {"python": sys.version.split()[0]} | {n: version(n) for n in names}}


def reset_peak_memory() -> None:
    """Hand back what earlier runs left free and forget their peak, where the system can (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def peak_memory_mib() -> float:
    """Return the largest resident memory of this process, since the last reset where it can be."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def serve(name: str, lines: Any, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more; an error is the answer to the one that raised it."""
    worker: Any = Rate() if name == "rate" else Worker(name)
    reply(worker.describe())
    for line in lines:
        request = json.loads(line)
        if "load" in request:
            load = LOADS[request["load"]]
            request["load"] = shrink(load) if request.pop("quick") else load
        try:
            reply(getattr(worker, request.pop("do"))(**request))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def main() -> None:
    """Serve the contender named on the command line."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def reply(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")

    serve(sys.argv[1], sys.stdin, reply)


if __name__ == "__main__":
    main()
