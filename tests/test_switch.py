"""The phase transition's analysis: planted switches are found, planted nulls are not supported."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.engine.extraction import Residuals
from lib.engine.models import Decoder
from lib.evidence.arms import ArmOutcome
from lib.evidence.verdicts import claim_verdict
from lib.phase_transition import reorganisation
from lib.phase_transition.reorganisation import Alignment, align, profile_depth
from lib.phase_transition.switch import average_curves, find_transitions, transition_table
from lib.phase_transition.switch_verdicts import judge_switch
from lib.reading import figures
from lib.science.stats import bootstrap_weights

N_BLOCKS, N_PROMPTS = 24, 24
WEIGHTS = {
    task: bootstrap_weights(N_PROMPTS, 300, np.random.default_rng(3)) for task in ("a", "b", "c")
}
PAIRS = np.array([(i, (i + k) % N_PROMPTS) for i in range(N_PROMPTS) for k in (5, 11)])


class Model:
    """Stands in for a decoder: only its name, depth and kind are read."""

    name, n_blocks, untrained = "toy", N_BLOCKS, False


def outcome(shares: np.ndarray, seed: int = 0) -> ArmOutcome:
    """Flips drawn with the given share at each block."""
    rng = np.random.default_rng(seed)
    flipped = rng.random((N_BLOCKS, len(PAIRS))) < shares[:, None]
    nothing = np.zeros(flipped.shape)
    return ArmOutcome(
        PAIRS, tuple(range(N_BLOCKS)), flipped, flipped, flipped.astype(float), nothing, nothing, 4
    )


def arms(centre: float, scale: float, seed: int) -> dict:
    rising = 1 / (1 + np.exp(-(np.arange(N_BLOCKS) - centre) / scale))
    return {
        "context arm": outcome(1 - rising, seed),
        "prediction arm": outcome(rising, seed + 1),
    }


def records(outcomes: dict, alignments: dict) -> pd.DataFrame:
    gates = pd.DataFrame({"task": list("abcd"), "reason": ["", "", "", "accuracy 0.09"]})
    none = {arm: outcome(np.zeros(N_BLOCKS)) for arm in ("context arm", "prediction arm")}
    controls = {
        name: dict.fromkeys(outcomes, none)
        for name in ("self-donor", "same answer", "random direction")
    }
    transitions = find_transitions(outcomes, WEIGHTS)
    return judge_switch(
        Model(), gates, outcomes, transitions, controls, alignments, WEIGHTS  # type: ignore[arg-type]
    )  # fmt: skip


def rising_alignment(scale: float) -> Alignment:
    blocks = np.arange(N_BLOCKS)
    curve = 0.8 / (1 + np.exp(-(blocks - 15) / scale))
    draws = curve + np.random.default_rng(1).normal(0, 0.01, (300, N_BLOCKS))
    table = pd.DataFrame(
        {"block": blocks, "curve": "prediction", "estimate": curve, "low": curve, "high": curve}
    )
    return Alignment(table.assign(n=N_PROMPTS), {"prediction": draws})


def test_planted_sharp_switch_with_gradual_geometry_is_supported() -> None:
    outcomes = {task: arms(15 + k / 2, 0.3, 10 * k) for k, task in enumerate("abc")}
    table = records(outcomes, {task: rising_alignment(2.5) for task in "abc"})
    verdict = claim_verdict(table.to_dict("records"), "phase-transition", "toy", False)
    assert verdict.verdict == "supported", verdict.reason
    found = transition_table(find_transitions(outcomes, WEIGHTS))
    assert np.allclose(found["block"], [15, 15.5, 16], atol=0.5)
    assert (found["low"] <= found["block"]).all() and (found["block"] <= found["high"]).all()


def test_gradual_hand_over_is_not_supported() -> None:
    outcomes = {task: arms(12, 4.0, 10 * k) for k, task in enumerate("abc")}
    table = records(outcomes, {task: rising_alignment(2.5) for task in "abc"})
    assert claim_verdict(table.to_dict("records"), "phase-transition", "toy", False).verdict == (
        "not supported"
    )
    wide = table[table["statistic"] == "causal_width_share"]
    assert (wide.loc[wide["task"] != "d", "verdict"] == "not supported").all()


def test_geometry_as_sharp_as_the_switch_is_not_supported() -> None:
    outcomes = {task: arms(15, 0.3, 10 * k) for k, task in enumerate("abc")}
    table = records(outcomes, {task: rising_alignment(0.12) for task in "abc"})
    difference = table[table["statistic"] == "width_difference"].set_index("task")["verdict"]
    assert (difference[list("abc")] == "not supported").all()


def test_switches_at_different_depths_are_not_at_one_place() -> None:
    outcomes = {task: arms(6 + 6 * k, 0.3, 10 * k) for k, task in enumerate("abc")}
    table = records(outcomes, {})
    spread = table[table["statistic"] == "transition_spread"].iloc[0]
    assert spread["verdict"] == "not supported"
    assert spread["estimate"] == pytest.approx(6 / N_BLOCKS, abs=0.03)


def test_task_that_fails_the_gate_is_not_testable_with_its_reason() -> None:
    table = records({task: arms(15, 0.3, 0) for task in "abc"}, {})
    failed = table[table["task"] == "d"]
    assert set(failed["verdict"]) == {"not testable"}
    assert set(failed["reason"]) == {"accuracy 0.09"}


def test_no_testable_task_gives_a_verdict_and_figures_not_an_error() -> None:
    table = records({}, {})
    verdict = claim_verdict(table.to_dict("records"), "phase-transition", "toy", False)
    assert verdict.verdict == "not testable"
    empty = average_curves({}, {}).assign(panel="", untrained=False)
    figure = figures.depth_curves(empty, names=["exchange"], panel="panel", ylabel="")
    assert figure.axes[0].texts
    assert figures.transition_forest(transition_table({}), n_blocks=4, title="").axes


def test_last_block_never_counts_in_a_control() -> None:
    outcomes = {task: arms(15, 0.3, 0) for task in "abc"}
    last_only = np.zeros(N_BLOCKS)
    last_only[-1] = 1
    by_arm = {arm: outcome(last_only) for arm in ("context arm", "prediction arm")}
    gates = pd.DataFrame({"task": list("abc"), "reason": [""] * 3})
    table = judge_switch(
        Model(), gates, outcomes, find_transitions(outcomes, WEIGHTS),  # type: ignore[arg-type]
        {"random direction": dict.fromkeys("abc", by_arm)}, {}, WEIGHTS,  # type: ignore[arg-type]
    )  # fmt: skip
    flips = table[table["statistic"] == "random_direction_flip"]
    assert (flips["estimate"] == 0).all()


def test_average_over_tasks_is_the_mean_of_their_curves() -> None:
    outcomes = {task: arms(15, 0.5, 7 * k) for k, task in enumerate("abc")}
    averaged = average_curves(outcomes, WEIGHTS)
    one = averaged[(averaged["curve"] == "context arm") & (averaged["block"] == 14)].iloc[0]
    expected = np.mean([outcomes[t]["context arm"].flipped[14].mean() for t in "abc"])
    assert one["estimate"] == pytest.approx(expected)
    assert one["low"] <= one["estimate"] <= one["high"]
    assert one["n"] == 3 * N_PROMPTS


def test_alignment_with_the_prediction_is_exact_where_states_are_predictions(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    turns = np.sort(rng.uniform(0, 0.1, 12))  # angles and divergences grow with the turn alone
    states = torch.tensor(np.stack([np.cos(turns), np.sin(turns)], axis=1))[None]
    logits = torch.tensor(np.stack([turns * 2, -turns * 2], axis=1))
    monkeypatch.setattr(
        reorganisation, "recall_residuals", lambda *_, **__: Residuals(states, (0,), logits)
    )

    task = SimpleNamespace(tokens=[[index, index + 1, 50 - index] for index in range(12)])
    trial = SimpleNamespace(task=task, usable=np.ones(12, dtype=bool), decoder=llama)
    curves = align(trial, bootstrap_weights(12, 50, rng)).curves.set_index("curve")  # type: ignore[arg-type]
    assert curves.loc["prediction", "estimate"] > 0.99
    assert abs(curves.loc["context", "estimate"]) < 0.8


def test_profile_has_a_value_for_every_block_and_quantity(llama: Decoder) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 60, size=rng.integers(4, 9)).tolist() for _ in range(60)]
    table = profile_depth(llama, prompts, rng, n_halves=3)
    counts = table.groupby("quantity")["block"].count()
    assert counts.pop("angular step (radians)") == llama.n_blocks - 1
    assert (counts == llama.n_blocks).all()
    assert np.isfinite(table[["estimate", "low", "high"]].to_numpy()).all()
