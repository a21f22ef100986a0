"""How often each kind of verdict is wrong: on nulls, and on effects of the size recorded.

Each run draws a synthetic sample with a known truth, measures it with the functions that the
chapters use, and judges it as they do. A null lies on the criterion's threshold, where a verdict
errs most often, unless its test says otherwise. Sizes of effect and sample come from the recorded
results. At most 5 % of nulls come out supported, but for one criterion, whose test says so.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from lib.causal_control.control import effect_shares
from lib.causal_control.control_tables import interval_of
from lib.evidence.results import ROOT, read_rows
from lib.evidence.verdicts import ALL_TASKS, criteria, judge
from lib.evidence.verify import RECORDED
from lib.norm_code.decoding import Decoding
from lib.norm_code.norm_edits import mean_outcome, ratio_interval
from lib.norm_code.norm_verdicts import late_excess
from lib.phase_transition.switch_verdicts import _spread
from lib.phase_transition.widths import curve_width, width_difference
from lib.science.correlations import bootstrap_correlations, partial_correlation
from lib.science.metrics import distances
from lib.science.stats import (
    bootstrap_weights,
    equivalence_test,
    pair_share_bootstrap,
    percentile_interval,
)
from lib.science.transitions import Transition, find_transition

N_RUNS = 200


@cache
def recorded(statistic: str) -> tuple[float, int]:
    """The median estimate and number of prompts of a statistic, as recorded for the model."""
    rows = [
        row
        for row in read_rows(ROOT / RECORDED)
        if row["statistic"] == statistic and not row["untrained"] and row["estimate"] is not None
    ]
    middle = [float(np.median([row[name] for row in rows])) for name in ("estimate", "n")]
    return middle[0], int(middle[1])


def rate(statistic, one_run, n_runs=N_RUNS):
    """The share of runs that come out supported; a run returns an interval, or None."""
    (criterion,) = [c for c in criteria() if c.statistic == statistic]

    def supported(seed):
        found = one_run(np.random.default_rng([11, seed]))
        if found is None:
            return False
        numbers = {"estimate": found.estimate, "low": found.low, "high": found.high}
        task = ALL_TASKS if criterion.scope == "model" else "weekdays"
        record = judge(
            criterion.claim, statistic, task=task, model="m", untrained=False, n=9, **numbers
        )
        return record["verdict"] == "supported"

    return np.mean([supported(seed) for seed in range(n_runs)])


# --- shares of pairs -----------------------------------------------------------------------------


def share(truth, n_prompts, spread=0.1):
    """Ordered pairs of prompts that flip at a rate that differs between recipients and donors."""
    pairs = np.array([(i, (i + k) % n_prompts) for i in range(n_prompts) for k in range(1, 7)])

    def one_run(rng):
        own = truth + spread * rng.uniform(-1, 1, size=(2, n_prompts)) * min(truth, 1 - truth)
        chance = own[0, pairs[:, 0]] / 2 + own[1, pairs[:, 1]] / 2
        outcome = rng.random(len(pairs)) < chance
        weights = bootstrap_weights(n_prompts, 200, rng)
        draws = pair_share_bootstrap(outcome, pairs, weights)[:, 0]
        return percentile_interval(float(outcome.mean()), draws, n=n_prompts)

    return one_run


@pytest.mark.parametrize(
    "statistic",
    [
        "rotation_flip",
        "prediction_arm_early",
        "norm_exchange_flip",
    ],
)
def test_shares_of_flipped_pairs(statistic):
    (criterion,) = [c for c in criteria() if c.statistic == statistic]
    estimate, n = recorded(statistic)
    assert rate(statistic, share(criterion.threshold, n)) <= 0.05
    assert rate(statistic, share(estimate, n), n_runs=60) >= 0.9


# --- correlations of dissimilarities -------------------------------------------------------------


def clouds(rng, n_items, *mixtures):
    """Distances of points that share parts: a row of weights of independent clouds for each."""
    parts = rng.normal(size=(len(mixtures[0]), n_items, 6))
    return [distances(np.tensordot(mixture, parts, axes=1)) for mixture in np.array(mixtures)]


def correlation(n_items, prediction, angle, compare=None, given=None):
    """Rank correlation of angle and divergence, less that of another measure, or given the lens."""
    mixtures = [angle, prediction, *([compare] if compare else []), *([given] if given else [])]

    def one_run(rng):
        weights = bootstrap_weights(n_items, 200, rng)
        estimate, draws = bootstrap_correlations(clouds(rng, n_items, *mixtures), weights)
        if given:
            estimate, draws = (
                partial_correlation(estimate),
                partial_correlation(draws, determined="nan"),
            )
        elif compare:
            estimate, draws = (r[..., 0, 1] - r[..., 2, 1] for r in (estimate, draws))
        else:
            estimate, draws = estimate[0, 1], draws[:, 0, 1]
        return percentile_interval(float(estimate), draws, n=n_items)

    return one_run


def test_strength_of_a_correlation():
    _, n = recorded("late_angle_correlation")
    null = correlation(n, [1, 0.0, 0.75], [1, 0.75, 0.0])
    assert rate("late_angle_correlation", null) <= 0.05
    strong = correlation(n, [1, 0.0, 0.45], [1, 0.45, 0.0])
    assert rate("late_angle_correlation", strong, n_runs=60) >= 0.5


def test_one_measure_above_another():
    _, n = recorded("late_angle_minus_distance")
    same = correlation(n, [1, 0, 0, 0.5], [1, 0.5, 0, 0], [1, 0, 0.5, 0])
    assert rate("late_angle_minus_distance", same) <= 0.05
    better = correlation(60, [1, 0, 0, 0.5], [1, 0.5, 0, 0], [1, 0, 2.0, 0])
    assert rate("late_angle_minus_distance", better, n_runs=60) >= 0.9


def test_an_increment_over_the_lens():
    """Angle and lens see the same part of the prediction, each with its own error."""
    _, n = recorded("late_angle_partial_correlation")
    none = correlation(n, [1, 1, 0, 0], [1, 0, 0.25, 0], given=[1, 0, 0, 0.25])
    assert rate("late_angle_partial_correlation", none) <= 0.05
    some = correlation(n, [1, 1, 0, 0], [1, 1, 0.5, 0], given=[1, 0, 0, 0.5])
    assert rate("late_angle_partial_correlation", some, n_runs=60) >= 0.5


def equivalence(n_items, shared):
    def one_run(rng):
        weights = bootstrap_weights(n_items, 200, rng)
        norm, divergence, angle = clouds(
            rng, n_items, [shared, 1, 0, 0], [shared, 0, 1, 0.3], [0, 0, 1, 0]
        )
        estimate, draws = bootstrap_correlations([norm, divergence, angle], weights)
        return equivalence_test(
            float(partial_correlation(estimate)), partial_correlation(draws), margin=0.1, n=n_items
        )

    return one_run


def test_absence_of_a_partial_correlation():
    """The null's true value is about 0.15, beyond the margin; 480 contexts suffice to show 0."""
    assert rate("norm_partial_correlation", equivalence(60, 0.9)) <= 0.05
    assert rate("norm_partial_correlation", equivalence(480, 0.0), n_runs=12) >= 0.9


# --- ratios of effects ---------------------------------------------------------------------------


def kl_ratio(truth, n_prompts):
    pairs = [(i, (i + k) % n_prompts) for i in range(n_prompts) for k in range(1, 7)]
    table = pd.DataFrame(pairs, columns=["recipient", "donor"]).assign(block=0)

    def one_run(rng):
        weights = bootstrap_weights(n_prompts, 200, rng)
        size = rng.gamma(4, 1 / 4, size=n_prompts)[table["recipient"]]
        both = [
            table.assign(edit=edit, kl_nats=mean * size * rng.gamma(2, 1 / 2, size=len(table)))
            for edit, mean in (("norm", truth), ("direction", 1.0))
        ]
        rows = pd.concat(both, ignore_index=True)
        return ratio_interval(
            *(mean_outcome(rows, edit, "kl_nats", weights, [0]) for edit in ("norm", "direction"))
        )

    return one_run


@pytest.mark.parametrize("statistic", ["norm_exchange_kl_ratio", "rest_kl_ratio_additive"])
def test_ratios_of_divergences(statistic):
    """The rivals' ratios are recorded above 1: what counts is that half of a rival's is found."""
    (criterion,) = [c for c in criteria() if c.statistic == statistic]
    estimate, n = recorded(statistic)
    assert rate(statistic, kl_ratio(criterion.threshold, n)) <= 0.05
    effect = min(estimate, 0.5 * criterion.threshold)
    assert rate(statistic, kl_ratio(effect, n), n_runs=60) >= 0.9


class Effects:
    """Effects of an exchange and its parts on pairs, as `effect_shares` reads them."""

    def __init__(self, rng, n_prompts, norm_share):
        self.pairs = np.array(
            [(i, (i + k) % n_prompts) for i in range(n_prompts) for k in (1, 2, 3)]
        )
        whole = rng.gamma(4, 1 / 4, size=(1, len(self.pairs)))
        moved = norm_share * rng.gamma(2, 1 / 2, size=whole.shape)
        self.parts = {
            "both": whole,
            "norm": moved,
            "direction": whole - moved,
            "interaction": 0 * whole,
        }

    def effects(self, late):
        return self.parts


@pytest.mark.parametrize("statistic", ["direction_share", "norm_share"])
def test_shares_of_an_effect(statistic):
    (criterion,) = [c for c in criteria() if c.statistic == statistic]
    estimate, n = recorded(statistic)

    def run(norm_share):
        def one_run(rng):
            weights = bootstrap_weights(n, 200, rng)
            draws = effect_shares(Effects(rng, n, norm_share), weights, [0])
            return interval_of(draws[statistic.removesuffix("_share")], n)

        return one_run

    on_threshold = abs(criterion.threshold - (statistic == "direction_share"))
    assert rate(statistic, run(on_threshold)) <= 0.05
    assert rate(statistic, run(abs(estimate - (statistic == "direction_share"))), 60) >= 0.9


# --- curves over depth ---------------------------------------------------------------------------


def widths(rng, geometry_scale, causal_scale, n_items=48, n_blocks=30):
    """Curves of a causal and a geometric change, each item with a centre of its own."""
    blocks = np.arange(n_blocks)
    weights = bootstrap_weights(n_items, 100, rng)
    both = np.concatenate([np.ones((1, n_items)), weights]) / n_items
    means = []
    for scale in (geometry_scale, causal_scale):
        centre = 20 + 0.5 * rng.normal(size=(n_items, 1))
        noise = 0.1 * rng.normal(size=(n_items, n_blocks))
        means.append(both @ np.clip(expit((blocks - centre) / scale) + noise, 0, 1))
    geometry, causal = means
    found = find_transition(1 - causal[0], causal[0], 1 - causal[1:], causal[1:], n_prompts=n_items)
    width = curve_width(geometry[0], geometry[1:], falling=False, n_items=n_items)
    return width_difference(width, found) if found.found and width.found else None


def test_width_of_one_change_above_anothers():
    assert rate("width_difference", lambda rng: widths(rng, 0.6, 0.6), n_runs=N_RUNS) <= 0.05
    difference, _ = recorded("width_difference")
    wider = 0.6 + difference / (2 * np.log(9))  # 10-90 % of a logistic curve is 2·log 9 scales
    assert rate("width_difference", lambda rng: widths(rng, wider, 0.6), n_runs=30) >= 0.9


def test_transitions_at_one_place():
    """The null: each task has its switch anywhere in the depth."""
    spread, n_tasks = recorded("transition_spread")

    def run(low, high):
        def one_run(rng):
            places = rng.uniform(low, high, size=n_tasks)
            found = {str(i): Transition(True, "", 30, 36, block=b) for i, b in enumerate(places)}
            return _spread(found, 30)[0]

        return one_run

    assert rate("transition_spread", run(0, 29)) <= 0.05
    assert rate("transition_spread", run(22 - 60 * spread, 22 + 60 * spread), 60) >= 0.9


# --- attributes read off norms -------------------------------------------------------------------


def decoded(excess, n_attributes, statistic, n_items=120, n_shuffles=20):
    """Attributes of three classes, right in a third of the items and `excess` more."""

    def one_run(rng):
        decodings = {}
        for k in range(n_attributes):
            right = rng.random((1 + n_shuffles, 1, n_items)) < 1 / 3
            correct = (rng.random((1, n_items)) < 1 / 3 + excess).astype(float)
            decodings[str(k)] = Decoding(
                str(k),
                (0,),
                correct,
                right.mean(axis=0),
                right[0].astype(float),
                np.arange(n_items),
            )
        table = late_excess(decodings, [0], n_draws=200, seed=3)
        column = "null_decoded" if statistic.endswith("shuffled") else "decoded"
        count = float(table[column].sum())
        return percentile_interval(count, [count] * 2, n=n_attributes)

    return one_run


def test_counts_of_decoded_attributes():
    _, n = recorded("attributes_decoded")
    assert rate("attributes_decoded", decoded(0.0, n, "")) <= 0.05
    assert rate("attributes_decoded", decoded(0.2, n, ""), 60) >= 0.9


def test_one_of_two_attributes_within_an_answer_is_met_by_chance_more_often_than_five_percent():
    """Either suffices, each wrong in one case of forty: 5 % nominally, 6.5 % seen.

    So it stands in criteria.toml. The part asks for two of the five attributes as well.
    """
    _, n = recorded("attributes_decoded_within_answer")
    assert n == 2
    assert 0.05 < rate("attributes_decoded_within_answer", decoded(0.0, n, "")) <= 0.08
    assert rate("attributes_decoded_within_answer", decoded(0.2, n, ""), 60) >= 0.9


def test_labels_that_say_nothing_pass_as_shuffled_ones():
    assert rate("attributes_decoded_shuffled", decoded(0.3, 5, "shuffled"), 60) >= 0.95


# --- what has no sampling error ------------------------------------------------------------------


def test_every_criterion_is_simulated_or_is_judged_without_a_sample():
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {
        "causal_width_share": "tests/test_verdicts.py, with both arms",
        "context_arm_early": "as rotation_flip: a lower bound of 0.8 on a share",
        "prediction_arm_last_sixth": "as rotation_flip",
        "context_arm_last_sixth": "as prediction_arm_early: an upper bound of 0.1 on a share",
        "random_rotation_flip": "as prediction_arm_early",
        "same_answer_flip": "as norm_exchange_flip: an upper bound of 0.05 on a share",
        "random_direction_flip": "a maximum over blocks, whose bound is above the share's",
        "random_direction_excess": "as norm_exchange_flip",
        "late_minus_early_angle_correlation": "as late_angle_minus_distance",
        "late_angle_partial_minus_twin": "as late_angle_minus_distance",
        "rest_kl_ratio_unembedding": "as rest_kl_ratio_additive",
        "self_donor_change": "a rounding error, no sample",
    }
    assert {c.statistic for c in criteria()} >= set(elsewhere)
    for criterion in criteria():
        assert criterion.statistic in elsewhere or f'"{criterion.statistic}"' in here
