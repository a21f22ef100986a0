"""ℓ* comes from the records where the chapter ran on this model, else from few pairs."""

import pytest
import torch
from claimed import number
from conftest import tiny_model, tiny_tokenizer

from lib.engine.models import load_decoder
from lib.evidence import records, transition
from lib.evidence.records import shown, write_records
from lib.science.estimate import Untested


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())


def keep(model: str, **blocks: float) -> None:
    measured = {task: number(block, f"subjects of {task}") for task, block in blocks.items()}
    rows = shown(transition.CLAIM, model, transition.STATISTIC, measured | {"z": Untested("flat")})
    twins = {"a": number(0.5, "seeds")}
    rows += shown(transition.CLAIM, model, transition.STATISTIC, twins, untrained=True)
    rows += shown(transition.CLAIM, model, "another", {"a": number(9.0, "texts")})
    write_records(records.claim_file(transition.CLAIM), rows)


def test_recorded_transitions_are_read_back_and_their_median_is_the_models(decoder):
    keep(decoder.name, a=2.0, b=2.5, c=1.0)
    found = transition.task_transitions(decoder)
    assert found == pytest.approx({"a": 2.0, "b": 2.5, "c": 1.0})
    assert transition.transition_block(decoder) == pytest.approx(2.0)


def test_those_of_another_model_do_not_count(decoder, monkeypatch):
    keep("another", a=2.0)
    monkeypatch.setattr(transition, "_measure", lambda decoder: {"a": 1.25})
    assert transition.transition_block(decoder) == 1.25


def test_a_model_without_usable_task_has_no_transition(decoder):
    found = transition.transition_block(decoder)  # its tokenizer knows none of the words
    assert isinstance(found, Untested)
    assert decoder.name in found.reason


def test_what_is_measured_is_where_the_two_curves_of_few_pairs_cross(decoder, monkeypatch):
    import pandas as pd

    from lib.evidence.tasks import build_task, exchange_pairs
    from lib.evidence.transfer import measure_transfer, read_tasks

    items = pd.DataFrame(
        {
            "subject": [f"w{k}" for k in range(20, 44)],
            "answer": [f"w{k % 4 + 8}" for k in range(24)],
        }
    ).assign(group="")
    task = build_task("toy", items, ["w11 w12 {subject} w13", "w14 {subject} w15 w16"], decoder)
    monkeypatch.setattr(transition, "load_tasks", lambda decoder: {"toy": task, "x": Untested("-")})
    trial = read_tasks(decoder, {"toy": task})["toy"]
    pairs = exchange_pairs(task, n_donors=1)
    few = pairs.where(torch.arange(transition.QUICK_PAIRS).numpy())
    assert len(few) < len(pairs)
    curves = [measure_transfer(trial, few, site).estimate().value for site in ("subject", "last")]
    assert transition.task_transitions(decoder) == {}  # random weights: the curves do not cross
    monkeypatch.setattr(transition, "crossing", lambda one, other: float((one - 2 * other).sum()))
    expected = {"toy": float((curves[0] - 2 * curves[1])[:-1].sum())}  # without the last block
    assert transition.task_transitions(decoder) == pytest.approx(expected)
