from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import count_tokens
from oracle import block_states, forward, kl, patched_logits

from lib.engine import store
from lib.engine.edits import exchange, exchange_direction
from lib.engine.extraction import extract_residuals
from lib.engine.models import Decoder
from lib.evidence import transfer
from lib.evidence.tasks import Pairs, Task, build_task, exchange_pairs
from lib.evidence.transfer import (
    Trial,
    from_donors,
    measure_sites,
    measure_transfer,
    read_tasks,
)
from lib.science.estimate import Untested


@pytest.fixture(scope="module")
def trial(reader: Decoder) -> Trial:
    """A toy task some of whose subjects are two tokens long, so that prompts differ in length."""
    subjects = [f"w{10 + k}" for k in range(12)] + ["w30 w31", "w32 w33"]
    answers = [f"w{40 + k % 3}" for k in range(14)]
    items = pd.DataFrame({"subject": subjects, "answer": answers, "group": ""})
    task = build_task("toy", items, ["of {subject} comes then", "the word {subject} has"], reader)
    found = read_tasks(reader, {"toy": task})["toy"]
    assert isinstance(found, Trial)
    return found


def by_hand(trial: Trial, pairs: Pairs, places, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p_y ‖ p_edited) of each pair and the edited logits, one hooked pass a pair."""
    model, blocks = trial.decoder.model, trial.decoder.blocks
    tokens = trial.task.tokens
    found, edited = [], []
    for x, y in pairs.prompts:
        states = block_states(model, blocks, tokens[y])[block]
        here, there = places(x), places(y)
        logits = patched_logits(model, blocks[block], [tokens[x]], [here], [states[there]])[0]
        found.append(kl(forward(model, [tokens[y]])[0].numpy(), logits.numpy()))
        edited.append(logits.numpy())
    return np.array(found), np.array(edited)


@pytest.mark.parametrize("site", ["subject", "last"])
def test_an_exchange_equals_one_hooked_pass_a_pair_for_prompts_of_any_length(
    trial: Trial, site: str
):
    pairs = exchange_pairs(trial.task)
    found = measure_transfer(trial, pairs, site)
    position = trial.task.subject_positions
    places = (
        (lambda x: [int(position[x])])
        if site == "subject"
        else (lambda x: [len(trial.task.tokens[x]) - 1])
    )
    for block in range(trial.decoder.n_blocks):
        expected, logits = by_hand(trial, pairs, places, block)
        assert found.after[block] == pytest.approx(expected, abs=2e-5)
        choice = logits[:, trial.task.answer_ids].argmax(-1)
        assert np.array_equal(found.choice[block], choice)


def test_clean_predictions_are_computed_once_for_all_sites_and_of_prompts_in_pairs_alone(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    pairs = exchange_pairs(trial.task).thin(5)
    lens, rows = transfer.logit_lens, []
    monkeypatch.setattr(
        transfer,
        "logit_lens",
        lambda model, states: rows.append(len(states)) or lens(model, states),
    )
    found = transfer.measure_sites({"toy": trial}, {"toy": pairs}, ["subject", "last"])
    assert rows == [len(np.unique(pairs.prompts))]
    clean = lens(trial.decoder, trial.last_states).numpy()
    for site in ("subject", "last"):
        expected = [kl(clean[y], clean[x]) for x, y in pairs.prompts]
        assert found[site]["toy"].before == pytest.approx(expected, abs=2e-6)


def test_prompts_that_were_read_are_not_run_again_for_exchanges(
    reader: Decoder, trial: Trial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read_and_exchange(folder: str) -> Trial:
        monkeypatch.setattr(store, "STORE", tmp_path / folder)
        own = read_tasks(reader, {"toy": trial.task, "again": trial.task})["again"]
        assert isinstance(own, Trial)
        measure_sites({"": own}, {"": exchange_pairs(own.task)}, ["subject", "last", "between"])
        return own

    read_and_exchange("compared")  # with full recompute, once
    passes = count_tokens(reader, monkeypatch)
    own = read_and_exchange("new")
    (n_read,) = passes
    assert n_read <= sum(map(len, trial.task.tokens))
    own.states("subject")
    assert passes == [n_read]


def test_an_exchange_of_several_tokens_equals_hooked_passes_where_tokens_line_up(trial: Trial):
    pairs = exchange_pairs(trial.task)
    found = measure_transfer(trial, pairs, "between")
    task = trial.task
    start, end = (task.prompts[name].to_numpy() for name in ("subject_start", "subject_position"))
    lengths = np.array([len(tokens) for tokens in task.tokens])
    x, y = pairs.prompts.T
    kept = pairs.where((end[x] - start[x] == end[y] - start[y]) & (lengths[x] == lengths[y]))
    assert 0 < len(kept) < len(pairs)
    assert np.array_equal(found.unit, kept.unit)

    def places(prompt: int) -> list[int]:
        return list(range(start[prompt], lengths[prompt] - 1))

    expected, _ = by_hand(trial, kept, places, 1)
    assert found.after[1] == pytest.approx(expected, abs=2e-5)


def test_given_donors_belong_to_their_pairs_and_their_blocks(trial: Trial):
    pairs = exchange_pairs(trial.task, n_donors=1)
    ends = [len(tokens) - 1 for tokens in trial.task.tokens]
    states = extract_residuals(
        trial.decoder, trial.task.tokens, positions=ends, blocks=[2, 3]
    ).states
    donors = states[:, pairs.prompts[:, 1]]
    own = measure_transfer(trial, pairs, "last").after[2:]
    given, turned = (
        measure_sites(
            {"": trial},
            {"": pairs},
            ["last"],
            donors={"last": {"": donors}},
            blocks=[2, 3],
            edit=edit,
        )["last"][""].after
        for edit in (exchange, exchange_direction)
    )
    assert given == pytest.approx(own, abs=1e-5)
    assert np.abs(turned - own).max() > 1e-3


def test_both_arms_together_are_what_each_is_alone_and_run_every_prompt_once(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pairs, base = exchange_pairs(trial.task, n_donors=1), trial.decoder.model.base_model
    after = [len(tokens) - 1 for tokens in trial.task.tokens] - trial.task.subject_positions
    pairs = pairs.where(after[pairs.prompts[:, 0]] == 1)  # mirrored, one token is exchanged as well
    forward, tokens = base.forward, [0]

    def counting(input_ids: torch.Tensor, **options: object) -> object:
        tokens[-1] += input_ids.numel()
        return forward(input_ids, **options)

    def sites(*names):
        monkeypatch.setattr(store, "STORE", tmp_path / "-".join(names))
        tokens.append(0)
        return measure_sites({"": replace(trial, forests=[])}, {"": pairs}, names)

    sites("subject", "last")  # compares with full recompute, once
    monkeypatch.setattr(base, "forward", counting)
    together = sites("last", "subject")
    for site in ("subject", "last"):
        alone = sites(site)[site][""]
        assert np.abs(together[site][""].after - alone.after).max() < 1e-5
        assert np.array_equal(together[site][""].choice, alone.choice)
    assert 0 < tokens[2] == max(tokens[3:])


def test_certainty_is_scipys_entropy_and_the_largest_log_probability(trial: Trial):
    p = trial.logits.double().softmax(-1).numpy()
    expected = np.stack([scipy.stats.entropy(p, axis=1), np.log(p.max(axis=1))], axis=1)
    assert trial.certainty == pytest.approx(expected, abs=1e-5)
    assert trial.certainty is trial.certainty  # read once


def test_the_divergence_is_scipys_and_of_the_donors_prediction(trial: Trial):
    logits = torch.randn(5, 64)
    edited = torch.randn(3, 64)
    measure = from_donors(logits, np.array([4, 0, 4]))
    expected = kl(logits[[4, 0, 4]].numpy(), edited.numpy())
    pair = torch.tensor([0, 1, 2])
    in_float32 = measure(edited, pair)["kl_nats"].numpy()  # as models put logits out
    assert in_float32 == pytest.approx(expected, rel=0, abs=1e-6)


def test_a_donor_that_is_the_recipient_changes_nothing_and_one_at_the_end_brings_all(trial: Trial):
    pairs = exchange_pairs(trial.task, n_donors=1)
    own = Pairs(np.repeat(pairs.prompts[:, :1], 2, axis=1), pairs.unit)
    for site in ("subject", "last"):
        assert np.abs(measure_transfer(trial, own, site).after).max() <= 1e-5
    last = measure_transfer(trial, pairs, "last").estimate()
    assert last.value[-1] == pytest.approx(1.0, abs=1e-4)
    untouched = measure_transfer(trial, pairs, "subject")
    assert untouched.estimate().value[-1] == pytest.approx(0.0, abs=1e-4)
    assert untouched.after[-1] == pytest.approx(untouched.before, abs=1e-5)


def test_transfer_is_one_less_the_ratio_of_sums_over_the_pairs_of_the_units_drawn(trial: Trial):
    found = measure_transfer(trial, exchange_pairs(trial.task), "last")
    estimate = found.estimate()
    assert estimate.value == pytest.approx(1 - found.after.sum(1) / found.before.sum())
    assert (estimate.units, estimate.n_units) == ("subjects of toy", 14)
    part = measure_transfer(trial, exchange_pairs(trial.task).where(found.unit < 5), "last")
    assert part.estimate().n_units == 5
    assert part.estimate().units != estimate.units


def test_pairs_of_one_unit_are_drawn_together(trial: Trial):
    pairs = exchange_pairs(trial.task)
    doubled = Pairs(*(np.concatenate([part, part]) for part in (pairs.prompts, pairs.unit)))
    found, twice = (measure_transfer(trial, one, "last").estimate() for one in (pairs, doubled))
    one, two = (np.ptp(np.quantile(t.at(1).draws, [0.025, 0.975])) for t in (found, twice))
    assert two == pytest.approx(one, rel=1e-6)


def test_flips_are_the_share_of_choices_that_became_the_donors_answer(trial: Trial):
    found = measure_transfer(trial, exchange_pairs(trial.task), "last")
    assert found.flip_rate().value == pytest.approx((found.choice == found.target).mean(axis=1))
    donors = exchange_pairs(trial.task).prompts[:, 1]
    answers = trial.task.prompts["answer"].iloc[donors].tolist()
    assert [trial.task.answers[one] for one in found.target] == answers


def test_predictions_that_are_all_alike_leave_nothing_to_transfer(trial: Trial):
    found = measure_transfer(trial, exchange_pairs(trial.task), "last")
    flat = replace(found, before=np.zeros_like(found.before))
    assert flat.estimate() == Untested("the predictions are all alike")


def test_a_task_that_the_model_cannot_do_says_so_and_a_group_that_it_can_is_named(trial: Trial):
    assert trial.accuracy < 0.8
    assert "0.8 is needed" in trial.gate.reason
    assert trial.able_groups == []
    right = trial.logits[:, trial.task.answer_ids].argmax(-1).numpy()
    prompts = trial.task.prompts.assign(answer_index=right)
    able = replace(trial, task=replace(trial.task, prompts=prompts))
    assert able.gate is None
    assert able.able_groups == [""]


def test_edits_of_several_tokens_other_than_an_exchange_are_refused(trial: Trial):
    pairs = exchange_pairs(trial.task)
    with pytest.raises(ValueError, match="only an exchange of the donor's own states"):
        measure_sites({"": trial}, {"": pairs}, ["between"], edit=exchange_direction)


def test_an_untested_task_stays_untested(reader: Decoder):
    assert read_tasks(reader, {"x": Untested("none")}) == {"x": Untested("none")}


def test_a_task_keeps_its_prompts(trial: Trial):
    assert isinstance(trial.task, Task)
    assert trial.states("last").shape == (4, 28, 32)
    assert torch.equal(trial.states("last")[-1], trial.last_states)
