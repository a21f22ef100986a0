"""The driver: keeps one process for each contender, compares, then times them in turn.

    python -m benchmarks           everything; writes benchmarks/results.json after each workload,
                                   and goes on where an unfinished run of the same kind ended
    python -m benchmarks --quick   small workloads, one run; writes build/bench-quick.json

Threads: OMP_NUM_THREADS, 2 unless set.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bound import Shape, minimum_macs
from benchmarks.contenders import EAGER_ONLY, HALF, MODULES
from benchmarks.tables import OURS, RECOMPUTE, RESULTS, comparison, summary
from benchmarks.workloads import LOADS, shrink
from lib.engine.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
"""Largest difference of a logit from full recompute with which a contender is timed."""

N_RUNS = 5
ATTENTIONS = ("eager", "sdpa")


class Process:
    """A worker, asked over pipes."""

    def __init__(self, name: str) -> None:
        self.name = name
        threads = os.environ.setdefault("OMP_NUM_THREADS", "2")
        quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name],
            cwd=ROOT,
            env={**os.environ, **quiet, "MKL_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.described = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Return the worker's answer.

        Raises:
            RuntimeError: the worker has died.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of {self.name} ended with {self.process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Run the workloads asked for and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small workloads, one run")
    parser.add_argument("--only", metavar="TEXT", default="", help="workloads whose name has TEXT")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    given = parser.parse_args()
    names = [name for name in LOADS if given.only in name]
    if not names:
        parser.error(f"no workload has {given.only!r} in its name; there are: {'; '.join(LOADS)}")
    partial = given.quick or len(names) < len(LOADS)
    output = given.output or (ROOT / "build" / "bench-quick.json" if partial else RESULTS)
    rate = Process("rate")
    say("loading the model into a process for each contender")
    processes = {name: Process(name) for name in MODULES}
    half = Process(HALF) if multiplies_bf16() else None
    results: dict[str, Any] = {
        "finished": False,
        "quick": given.quick,
        "runs": 1 if given.quick else N_RUNS,
        "machine": machine(),
        "versions": rate.described["versions"],
        "model": processes[OURS].described["model"],
        "rates_gmacs": [],
        "rows": [],
        "half": [],
        "refused": [],
    }
    results = resumed(output, results)
    for name in names:
        if name in {row["workload"] for row in results["rows"]}:
            say(f"{name}: measured before this run was resumed")
            continue
        measure(name, given.quick, processes, half, rate, results)
        results["finished"] = name == names[-1]
        write_atomically(output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for process in (rate, *processes.values(), *([half] if half else [])):
        process.close()
    print(summary(comparison(results)).to_string(index=False))
    print(f"Written to {output}")


def resumed(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Return what an unfinished run left in `file`, if it was made as this one is; else `fresh`."""
    if not file.is_file():
        return fresh
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    measured = ("rates_gmacs", "rows", "half", "refused")
    alike = all(found.get(key) == value for key, value in fresh.items() if key not in measured)
    return found if alike else fresh


def machine() -> dict[str, Any]:
    """Return what the numbers depend on, and nothing that names the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "2")),
        "system": platform.system(),
    }


def multiplies_bf16() -> bool:
    """Say whether the processor has instructions for bf16 products, without which they are slow."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(
    name: str,
    quick: bool,
    processes: dict[str, Process],
    half: Process | None,
    rate: Process,
    results: dict[str, Any],
) -> None:
    """Compare and time all contenders on one workload; add rows to `results`.

    The comparison, which runs the same code on the same prompts, is the warm-up too.
    """
    load = shrink(LOADS[name]) if quick else LOADS[name]
    macs = minimum_macs(Shape(**processes[OURS].described["shape"]), load)
    request = {"load": name, "quick": quick}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "answer.npy")
        rows = admit(processes, request, folder, results)
        halved = compare_half(half, request, folder) if half else {}
        timed: list[dict[str, Any]] = [{"seconds": [], "peak_mib": 0.0} for _ in rows]
        for _ in range(results["runs"]):
            results["rates_gmacs"].append(rate.ask("run")["gmacs"])
            reference: dict[str, np.ndarray] = {}
            for row, times in zip(rows, timed, strict=True):
                answer = processes[row["contender"]].ask(
                    "run", attention=row["attention"], file=file, **request
                )
                if "error" in answer:
                    raise RuntimeError(f"{row['contender']}: {answer['error']}")
                digest = np.load(file)
                compare_digests(digest, reference.setdefault(row["attention"], digest), row)
                say(f"{name}: {row['contender']}, {row['attention']}: {answer['seconds']:.2f} s")
                row["share"] = answer["share"]
                times["seconds"].append(answer["seconds"])
                times["peak_mib"] = max(times["peak_mib"], answer["peak_mib"])
            if half:
                answer = half.ask("run", attention=ATTENTIONS[-1], file=file, **request)
                say(f"{name}: {HALF}: {answer['seconds']:.2f} s")
                halved["seconds"].append(answer["seconds"])
    if half:
        results["half"].append({"workload": name, **halved})
    for row, times in zip(rows, timed, strict=True):
        results["rows"].append({"workload": name, **row, "macs": macs, **times})


def admit(
    processes: dict[str, Process], request: dict[str, Any], folder: str, results: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each contender and attention whose logits are those of full recompute.

    The reference comes first; who is refused, and why, is noted in `results`.
    """
    rows = []
    ordered = [RECOMPUTE, *(name for name in processes if name != RECOMPUTE)]
    for attention in ATTENTIONS:
        truth = None
        for contender in ordered:
            if contender in EAGER_ONLY and attention != "eager":
                continue
            file = Path(folder) / ("reference.npy" if contender == RECOMPUTE else "check.npy")
            tuned = {"batch": None}
            if not request["quick"]:
                tuned = processes[contender].ask("tune", attention=attention, **request)
            answer = (
                {}
                if "error" in tuned
                else processes[contender].ask(
                    "check", attention=attention, file=str(file), **request
                )
            )
            row: dict[str, Any] = {
                "contender": contender,
                "attention": attention,
                "batch": tuned.get("batch"),
            }
            problem = tuned.get("error") or answer.get("error")
            if problem is None:
                logits = np.load(file, mmap_mode="r")
                truth = logits if contender == RECOMPUTE else truth
                row["logit_difference"], row["same_choice"] = difference(logits, truth)
                if row["logit_difference"] > TOLERANCE:
                    problem = f"differs by {row['logit_difference']:.1e} in a logit"
            if problem is None:
                rows.append(row)
                continue
            say(f"{request['load']}: {contender}, {attention} is not timed: {problem}")
            if contender in (RECOMPUTE, OURS):
                raise RuntimeError(f"{contender}: {problem}")
            results["refused"].append({"workload": request["load"], **row, "reason": problem})
    return rows


def compare_half(half: Process, request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return how far bfloat16 is from the full recompute that `admit` left in `folder`."""
    file = Path(folder) / "half.npy"
    answer = half.ask("check", attention=ATTENTIONS[-1], file=str(file), **request)
    if "error" in answer:
        raise RuntimeError(f"{HALF}: {answer['error']}")
    truth = np.load(Path(folder) / "reference.npy", mmap_mode="r")
    gap, same = difference(np.load(file, mmap_mode="r"), truth)
    file.unlink()
    return {"logit_difference": gap, "same_choice": same, "seconds": []}


def difference(logits: np.ndarray, truth: np.ndarray | None) -> tuple[float, float]:
    """Return the largest difference of a logit, and the share of rows with the same argmax.

    NaN in either counts as an infinite difference.
    """
    assert truth is not None
    if logits.shape != truth.shape:
        return float("inf"), 0.0
    flat, expected = (array.reshape(-1, array.shape[-1]) for array in (logits, truth))
    largest, same = 0.0, 0
    for row, other in zip(flat, expected, strict=True):
        gap = float(np.abs(row - other).max())
        largest = max(largest, gap if gap == gap else float("inf"))
        same += int(row.argmax() == other.argmax())
    return largest, same / len(flat)


def compare_digests(digest: np.ndarray, expected: np.ndarray, row: dict[str, Any]) -> None:
    """Check a timed run's numbers where reference and contender both have one.

    Raises:
        RuntimeError: they differ, so what was timed is not what was compared.
    """
    both = ~np.isnan(digest) & ~np.isnan(expected)
    gaps, scale = np.abs(digest[both] - expected[both]), np.abs(expected[both])
    if not both.any() or gaps.max() > TOLERANCE * scale.max():
        raise RuntimeError(f"{row['contender']}, {row['attention']}: a timed run went astray.")


def say(text: str) -> None:
    """Write a line on how far the run has come."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
