"""Where the time of the book's chapters goes: `make profile` writes `benchmarks/chapters.json`.

Each chapter that measures is executed on the default model as in the book: in its order, in a
kernel of its own, from an empty store that they share. Fifty times a second it is looked at where
the kernel's main thread stands, and the multiply–accumulates of all linear maps are counted; their
number by the seconds spent in networks is compared with the rate of large fp32 matrix products,
measured in the same kernel before and after.
"""

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from lib.engine import models

ROOT = Path(__file__).resolve().parent.parent
RECORDED = Path(__file__).resolve().parent / "chapters.json"
INTERVAL = 0.02
KINDS = {
    "figures": ("/matplotlib/", "/seaborn/", "/lib/reading/"),
    "training": ("/lib/engine/small_decoders.py",),
    "loading": ("/lib/engine/loading.py", "/lib/engine/weights.py", "/lib/engine/structure.py"),
    "networks": ("/torch/nn/modules/", "/transformers/models/", "models.py:_map_by_columns"),
    "edits, measures, checks": ("/lib/engine/",),
    "imports": ("<frozen importlib._bootstrap>",),
    "statistics": ("/lib/science/", "/lib/evidence/", "/lib/claims/", "/scipy/", "/sklearn/"),
}
"""A moment is of the first kind that one of its frames, a file and a function, belongs to."""

REST = "rest"


def kind_of(frames: Sequence[str]) -> str:
    """Return what is being done while these frames (`file:function`) stand on the stack."""
    paths = [frame.replace("\\", "/") for frame in frames]
    for kind, parts in KINDS.items():
        if any(part in path for part in parts for path in paths):
            return kind
    return REST


class Watch:
    """Looks at the main thread, and counts linear maps that keep no gradient, until it reports."""

    def __init__(self) -> None:
        self.moments: Counter[str] = Counter()
        self.macs = 0
        self.rate = rate()
        self.over = threading.Event()
        self.hook = register_module_forward_hook(self._count)
        self.unembed = models._map_by_columns
        models._map_by_columns = self._count_columns
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.started = time.perf_counter()
        self.thread.start()

    def report(self) -> dict[str, Any]:
        """Return seconds, in all and by kind, multiply–accumulates, and the machine's rate."""
        seconds = time.perf_counter() - self.started
        self.over.set()
        self.thread.join()
        self.hook.remove()
        models._map_by_columns = self.unembed
        share = seconds / max(self.moments.total(), 1)
        by_kind = {kind: self.moments[kind] * share for kind in [*KINDS, REST]}
        best = max(self.rate, rate())
        return {"seconds": seconds, "by_kind": by_kind, "macs": self.macs, "rate": best}

    def _count(self, module: torch.nn.Module, given: Any, _: Any) -> None:
        if isinstance(module, torch.nn.Linear) and not torch.is_grad_enabled():
            self.macs += given[0].numel() * module.out_features

    def _count_columns(self, layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        """Count an unembedding that goes by columns, and so past its module."""
        before = self.macs
        result = self.unembed(layer, states)
        if self.macs == before and not torch.is_grad_enabled():
            self.macs += states.numel() * layer.out_features
        return result

    def _look(self) -> None:
        main = threading.main_thread().ident or 0
        while not self.over.wait(INTERVAL):
            frame, frames = sys._current_frames().get(main), []
            while frame is not None:
                frames.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
                frame = frame.f_back
            self.moments[kind_of(frames)] += 1


def rate(size: int = 2048) -> float:
    """Return multiply–accumulates a second of a large fp32 matrix product, the best of some."""
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return size**3 / min(seconds[1:])


def run(page: Path, store: Path) -> dict[str, Any]:
    """Execute a page with what is stored in a folder, and return its watch's report.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    import jupytext
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    # The store's folder is put in its place before anything else of lib takes it from there.
    first = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from lib.engine import files
        files.BUILD = Path({str(store)!r})
        from benchmarks.chapters import Watch
        _watch = Watch()
    """
    last = "import json; print(json.dumps(_watch.report()))"
    book = jupytext.read(page)
    lines = "\n".join(line.strip() for line in first.splitlines())
    book.cells = [new_code_cell(lines), *book.cells, new_code_cell(last)]
    where = {"metadata": {"path": str(page.parent)}}
    NotebookClient(book, timeout=None, kernel_name="python3", resources=where).execute()
    told: dict[str, Any] = json.loads(book.cells[-1].outputs[0]["text"])
    return {"chapter": page.stem, **told}


def main(output: Path = RECORDED) -> None:
    """Execute all chapters and write what they took."""
    from lib.engine.files import write_atomically
    from lib.evidence.criteria import criteria
    from lib.evidence.records import pages

    claims = {one.claim for one in criteria()}
    rows = []
    with tempfile.TemporaryDirectory() as store:
        for chapter in (one for one in pages(ROOT) if Path(one).name in claims):
            rows.append(run(ROOT / f"{chapter}.md", Path(store)))
            print(f"{chapter}: {rows[-1]['seconds']:.0f} s", flush=True)
    write_atomically(output, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
