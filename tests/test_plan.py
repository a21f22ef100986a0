"""Plans: counted by hand on a small model, and refused where there is too little memory."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lib.engine import plan
from lib.engine.edits import exchange, keep
from lib.engine.models import Decoder
from lib.evidence.arms import prepare_trial
from lib.evidence.tasks import build_task, gate

PROMPTS = [[5, 9, 4, 33, 12], [8, 3, 17, 20, 6]]
EDITS = {"exchange": exchange, "keep": keep}


def test_operations_are_those_of_every_token_and_block(llama: Decoder) -> None:
    m = sum(parameter.numel() for parameter in llama.blocks[0].parameters())
    made = plan.plan_sweep(llama, PROMPTS, [[0, 1]], EDITS, positions=[3, 3], blocks=[0, 2])
    assert made.n_rows == 4
    # 5 tokens once through 4 blocks; two edits of 2 tokens through 3 blocks and through 1.
    assert made.replay_operations == 5 * 4 * m + 2 * 2 * (3 + 1) * m
    assert made.recompute_operations == 4 * 5 * 4 * m
    assert made.recompute_seconds / made.seconds == pytest.approx(80 / 36)
    assert made.n_parameters == sum(p.numel() for p in llama.model.parameters())
    assert made.weight_bytes == 4 * made.n_parameters
    assert made.seconds > 0 and f"{made.n_rows} edited rows" in str(made)


def test_sweep_that_cannot_fit_is_refused_with_the_sizes(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: {"cpu": 1_000_000})
    monkeypatch.setattr(plan, "run_blocks", None)  # nothing may run before the refusal
    with pytest.raises(ValueError, match=r"needs 0\.00\d+ GB, but 0\.001 GB are free"):
        plan.plan_sweep(llama, PROMPTS, np.array([[0, 1]]), EDITS, positions="last")


def test_plan_of_a_chapter_sums_time_over_tasks_and_sites_and_not_memory(llama: Decoder) -> None:
    items = pd.DataFrame({"subject": ["w3", "w4", "w5"], "answer": ["w8", "w9", "w10"]})
    task = build_task("toy", items.assign(group=""), ["w11 w12 {subject} w13 w14"], llama)
    trial = prepare_trial(llama, task, gate(llama, task))
    trial = replace(trial, target=np.arange(3), usable=np.ones(3, bool), own_choice=False)
    one = [
        plan.plan_sweep(
            llama, task.tokens, trial.pairs(), EDITS, positions=where, n_read=len(task.answer_ids)
        )
        for where in ("last", task.subject_positions)
    ]
    made = plan.plan_exchanges({"a": trial, "b": trial}, donors_per_prompt=None, edits=EDITS)
    assert made is not None
    assert made.n_rows == 2 * sum(each.n_rows for each in one) == 2 * 2 * 2 * 4 * 6
    assert made.replay_operations == 2 * sum(each.replay_operations for each in one)
    assert made.recompute_operations == 2 * sum(each.recompute_operations for each in one)
    assert made.working_bytes == max(each.working_bytes for each in one)
    alone = plan.plan_exchanges({"a": trial}, donors_per_prompt=None, edits=EDITS, sites=["last"])
    assert alone is not None and alone.n_rows == one[0].n_rows
    assert plan.plan_exchanges({}, donors_per_prompt=2) is None
