"""Arms: outcomes read off the logits, judged against an independent recomputation."""

from dataclasses import replace

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from scipy.special import softmax

from lib.engine.models import Decoder, load_decoder
from lib.evidence import arms
from lib.evidence.arms import (
    ArmOutcome,
    Trial,
    has_counterparts,
    prepare_trial,
    steering_vectors,
    sweep_site,
)
from lib.evidence.tasks import build_task, gate
from lib.phase_transition.switch import measure_control, measure_routing
from lib.science.stats import bootstrap_weights


@pytest.fixture(scope="module")
def trial() -> Trial:
    """A task on a tiny random model, judged by the model's own choice."""
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    items = pd.DataFrame(
        {"subject": ["w3", "w4", "w5", "w6", "w7"], "answer": ["w8", "w9", "w10", "w8", "w9"]}
    ).assign(group="")
    texts = ["w11 w12 {subject} w13", "w14 {subject} w15 w16", "w17 w18 w19 {subject} w20 w21"]
    task = build_task("toy", items, texts, decoder)
    found = prepare_trial(decoder, task, gate(decoder, task))
    return replace(found, target=np.arange(15) % 3, usable=np.ones(15, bool), own_choice=True)


PAIRS = np.array([[0, 1], [6, 5], [12, 14], [2, 4], [9, 8]])


def expected_logits(trial: Trial, block: int, pair: np.ndarray, positions: list[int]) -> np.ndarray:
    prompts = [trial.task.tokens[index] for index in pair]
    model, blocks = trial.decoder.model, trial.decoder.blocks
    donor = oracle.block_states(model, blocks, prompts[1])[block, positions]
    logits = oracle.patched_logits(model, blocks[block], prompts[:1], [positions], [donor])
    return logits[0, trial.task.answer_ids.tolist()].numpy()


@pytest.mark.parametrize(
    ("site", "positions"),
    [
        ("subject", [[2], [1], [3], [2], [1]]),
        ("last", [[3], [3], [5], [3], [3]]),
        ("subject to second last", [[2], [1, 2], [3, 4], [2], [1, 2]]),
        ("subject to last", [[2, 3], [1, 2, 3], [3, 4, 5], [2, 3], [1, 2, 3]]),
    ],
)
def test_each_site_edits_its_positions_and_no_other(
    trial: Trial, site: arms.Site, positions: list[list[int]]
) -> None:
    outcome = sweep_site(trial, PAIRS, site)
    for block in range(trial.decoder.n_blocks):
        for column, pair in enumerate(PAIRS):
            logits = expected_logits(trial, block, pair, positions[column])
            source, target = trial.target[pair]
            assert outcome.flipped[block, column] == (logits.argmax() == target)
            assert outcome.changed[block, column] == (logits.argmax() != source)
            clean = trial.clean_logits[pair[0]]
            shift = np.abs(softmax(logits) - softmax(clean)).max()
            assert np.isclose(outcome.largest_shift[block, column], shift, atol=1e-5)
            if source != target:
                gap = [values[target] - values[source] for values in
                       (clean, logits, trial.clean_logits[pair[1]])]  # fmt: skip
                expected = (gap[1] - gap[0]) / (gap[2] - gap[0])
                assert np.isclose(outcome.recovered[block, column], expected, atol=1e-3)


def test_across_templates_each_prompt_has_its_own_position(trial: Trial) -> None:
    pairs = np.array([[0, 6], [11, 4]])
    outcome = sweep_site(trial, pairs, "subject")
    model, blocks = trial.decoder.model, trial.decoder.blocks
    at = trial.task.subject_positions
    assert at[0] != at[6] and at[11] != at[4]
    for column, (recipient, donor) in enumerate(pairs.tolist()):
        states = oracle.block_states(model, blocks, trial.task.tokens[donor])[:, [at[donor]]]
        for block in range(trial.decoder.n_blocks):
            logits = oracle.patched_logits(
                model, blocks[block], [trial.task.tokens[recipient]], [[at[recipient]]],
                [states[block]],
            )[0, trial.task.answer_ids.tolist()].numpy()  # fmt: skip
            shift = np.abs(softmax(logits) - softmax(trial.clean_logits[recipient])).max()
            assert np.isclose(outcome.largest_shift[block, column], shift, atol=1e-5)


def test_edits_after_some_blocks_are_those_of_all_blocks(trial: Trial) -> None:
    for site in ("subject", "last", "subject to last"):
        whole = sweep_site(trial, PAIRS, site)
        some = sweep_site(trial, PAIRS, site, blocks=[1, 3])
        assert some.blocks == (1, 3)
        assert np.allclose(some.largest_shift, whole.largest_shift[[1, 3]], atol=1e-6)
        assert some.curve(np.ones((3, 15)))[0]["block"].tolist() == [1, 3]


def test_pairs_judged_by_own_choice_are_formed_across_templates(trial: Trial) -> None:
    pairs = trial.pairs(donors_per_prompt=4)
    template = trial.task.prompts["template"].to_numpy()
    assert (template[pairs[:, 0]] != template[pairs[:, 1]]).any()
    assert (trial.target[pairs[:, 0]] != trial.target[pairs[:, 1]]).all()
    within = replace(trial, own_choice=False).pairs(donors_per_prompt=4)
    assert (template[within[:, 0]] == template[within[:, 1]]).all()


def test_excess_is_zero_on_average_for_answers_that_ignore_the_donor() -> None:
    rng = np.random.default_rng(8)
    n_answers, n_pairs = 5, 20_000
    source, target = rng.integers(0, n_answers, (2, n_pairs))
    choice = rng.integers(0, n_answers, n_pairs)
    kept = source != target
    flipped, changed = (choice == target)[kept][None], (choice != source)[kept][None]
    nothing = np.zeros(flipped.shape)
    pairs = np.stack([source, target], axis=1)[kept]
    outcome = ArmOutcome(pairs, (0,), flipped, changed, nothing, nothing, nothing, n_answers)
    assert abs(outcome.excess.mean()) < 0.01
    assert flipped.mean() > 0.15


def test_exchange_at_the_last_block_recovers_the_donors_logits(trial: Trial) -> None:
    outcome = sweep_site(trial, PAIRS, "last")
    assert np.allclose(outcome.recovered[-1], 1, atol=1e-3)
    assert np.allclose(sweep_site(trial, PAIRS, "subject").recovered[-1], 0, atol=1e-3)


def test_probability_change_is_over_the_full_vocabulary(trial: Trial) -> None:
    outcome = sweep_site(trial, PAIRS, "last", full_vocabulary=True)
    for column, (recipient, donor) in enumerate(PAIRS):
        prompts = [trial.task.tokens[index] for index in (recipient, donor)]
        both = [oracle.forward(trial.decoder.model, [p]).double().softmax(-1)[0] for p in prompts]
        token = int(trial.task.answer_ids[trial.target[donor]])
        expected = float(both[1][token] - both[0][token])
        assert np.isclose(outcome.probability_change[-1, column], expected, atol=1e-5)


def test_self_donor_shifts_no_logit(trial: Trial) -> None:
    for outcome in measure_control({"toy": trial}, "self-donor", templates=(0, 1, 2))[
        "toy"
    ].values():
        assert outcome.largest_shift.max() < 1e-5


def test_same_answer_control_has_donors_of_the_same_target_only(trial: Trial) -> None:
    for outcome in measure_control({"toy": trial}, "same answer", templates=(0, 1, 2))[
        "toy"
    ].values():
        recipients, donors = outcome.pairs.T
        assert (trial.target[recipients] == trial.target[donors]).all()
        assert (recipients != donors).all()


def test_unknown_control_is_named(trial: Trial) -> None:
    with pytest.raises(ValueError, match="Unknown control 'nonsense'"):
        measure_control({"toy": trial}, "nonsense")


def test_routing_reaches_the_last_token_only_where_it_says_so(trial: Trial) -> None:
    alone = {"toy": {"context arm": sweep_site(trial, PAIRS, "subject")}}
    sites = measure_routing({"toy": trial}, alone, templates=(1,))["toy"]
    assert len(sites["subject"].pairs) == len(sites["subject to last"].pairs)
    assert (trial.task.prompts["template"].to_numpy()[sites["subject"].pairs] == 1).all()
    assert sites["subject to second last"].largest_shift[-1].max() < 1e-5
    assert sites["subject to last"].largest_shift[-1].max() > 1e-3


def test_steering_vector_is_the_centroid_difference_of_other_templates(trial: Trial) -> None:
    vectors = steering_vectors(trial, PAIRS[:1], "last")
    model, blocks = trial.decoder.model, trial.decoder.blocks
    templates = trial.task.prompts["template"].to_numpy()
    for block in range(trial.decoder.n_blocks):
        means = []
        for prompt in PAIRS[0]:
            alike = np.flatnonzero((trial.target == trial.target[prompt]) & (templates != 0))
            states = [
                oracle.block_states(model, blocks, trial.task.tokens[i])[block, -1] for i in alike
            ]
            means.append(torch.stack(states).mean(0))
        assert torch.allclose(vectors[block, 0], means[1] - means[0], atol=1e-4)


def test_pair_without_counterpart_is_named_and_can_be_found_beforehand(trial: Trial) -> None:
    alone = replace(trial, usable=trial.task.prompts["template"].to_numpy() == 0)
    assert not has_counterparts(alone, PAIRS[:1]).any()
    assert has_counterparts(trial, PAIRS).all()
    with pytest.raises(ValueError, match="no counterpart"):
        steering_vectors(alone, PAIRS[:1], "last")


def test_curve_averages_pairs_and_resamples_prompts(trial: Trial) -> None:
    outcome = sweep_site(trial, PAIRS, "last")
    weights = bootstrap_weights(15, 200, np.random.default_rng(1))
    curve, draws = outcome.curve(weights, "recovered")
    assert np.allclose(curve["estimate"], outcome.recovered.mean(axis=1))
    assert draws.shape == (200, trial.decoder.n_blocks)
    assert (curve["n"] == len(np.unique(PAIRS))).all()


def test_stored_transitions_serve_their_own_model_only(
    trial: Trial, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "TRANSITIONS", tmp_path / "transitions.json")
    monkeypatch.setattr("lib.evidence.runs.RUNS", tmp_path / "runs")
    found = arms.Transition(
        found=True, reason="", n_blocks=4, n_prompts=12, block=2.5, low=2.0, high=3.0,
        width=1.0, width_low=0.5, width_high=1.5,
    )  # fmt: skip
    arms.store_transitions(trial.decoder, {"toy": found})
    table = arms.transition_blocks(trial.decoder)
    assert table.to_dict("records") == [
        {"task": "toy", "block": 2.5, "low": 2.0, "high": 3.0, "n": 12}
    ]
    twin: Decoder = load_decoder(tiny_model("llama"), untrained=True, tokenizer=tiny_tokenizer())
    assert arms._key(twin) != arms._key(trial.decoder)
