"""Plans: counted by hand on a small model, and refused where there is too little memory."""

import numpy as np
import pytest

from lib.engine import plan
from lib.engine.edits import exchange, keep
from lib.engine.models import Decoder

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
