"""The transition ℓ*: where each task's two arms cross, from this build's records or measured."""

import math
import statistics

import numpy as np

from lib.engine.models import Decoder
from lib.evidence.records import claim_file, read_records
from lib.evidence.tasks import Task, exchange_pairs, load_tasks
from lib.evidence.transfer import ARMS, Trial, measure_transfer, read_tasks
from lib.science.curves import crossing
from lib.science.estimate import Estimate, Untested, is_own

CLAIM, STATISTIC = "phase-transition", "transition"
QUICK_TASKS, QUICK_PAIRS = 3, 16


def task_transitions(decoder: Decoder) -> dict[str, float]:
    """Return each task's ℓ* in blocks, as the phase-transition chapter recorded it for this model.

    Where that chapter has not run on this model, it is measured with 16 pairs on each of the first
    three tasks. A task whose arms do not cross is left out, and so are a reader's own.
    """
    rows = read_records(claim_file(CLAIM))
    found = {
        row["place"]: float(row["estimate"])
        for row in rows
        if (row["statistic"], row["model"], row["untrained"]) == (STATISTIC, decoder.name, False)
        and row["estimate"] is not None
        and not is_own(row["place"])
    }
    return found or _measure(decoder)


def transition_block(decoder: Decoder) -> float | Untested:
    """Return ℓ*, the median of the tasks' transitions, in blocks; Untested where there is none."""
    found = task_transitions(decoder)
    if not found:
        return Untested(f"no task's arms cross on {decoder.name}")
    return statistics.median(found.values())


def _measure(decoder: Decoder) -> dict[str, float]:
    found = {}
    tasks = {name: one for name, one in load_tasks(decoder).items() if isinstance(one, Task)}
    trials = read_tasks(decoder, dict(list(tasks.items())[:QUICK_TASKS]))
    for trial in trials.values():
        assert isinstance(trial, Trial)
        pairs = exchange_pairs(trial.task, n_donors=1)
        pairs = pairs.where(np.arange(min(QUICK_PAIRS, len(pairs))))
        curves = [measure_transfer(trial, pairs, site).estimate() for site in ARMS.values()]
        if all(isinstance(curve, Estimate) for curve in curves):
            # The last block counts nowhere.
            context, prediction = (one.value[:-1] for one in curves if isinstance(one, Estimate))
            if not math.isnan(block := crossing(context, prediction)):
                found[trial.task.name] = block
    return found
