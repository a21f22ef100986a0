"""Transition fits find planted switches, match SciPy's optimiser and admit when there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.special import expit

from lib.phase_transition.shapes import compare_shapes
from lib.phase_transition.widths import CurveWidth, curve_width, width_difference
from lib.science.logistic import NARROWEST, SCALES_10_90, fit_logistic
from lib.science.stats import bootstrap_weights, pair_share_bootstrap
from lib.science.transitions import Transition, find_transition

N_BLOCKS = 30
BLOCKS = np.arange(N_BLOCKS)


def logistic(centre, scale, low=0.0, high=1.0, *, falling=False, blocks=BLOCKS):
    return low + (high - low) * expit((-1 if falling else 1) * (blocks - centre) / scale)


def noisy(curve, n_draws, sd=0.05, seed=0):
    return curve + sd * np.random.default_rng(seed).normal(size=(n_draws, len(curve)))


# --- fits ----------------------------------------------------------------------------------------


def test_the_width_runs_from_a_tenth_to_nine_tenths_of_the_change():
    fit = fit_logistic(logistic(14.0, 2.0, 0.1, 0.7), falling=False)
    ends = fit.centre + np.array([-0.5, 0.5]) * fit.width
    np.testing.assert_allclose((fit.at(ends) - 0.1) / 0.6, [0.1, 0.9], atol=1e-4)
    assert fit.width == pytest.approx(2 * np.log(9) * 2.0, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(4, 25), st.floats(0.3, 3), st.floats(0, 0.3), st.floats(0.6, 1), st.booleans())
def test_a_planted_curve_is_recovered_exactly(centre, scale, low, high, falling):
    curve = logistic(centre, scale, low, high, falling=falling)
    fit = fit_logistic(curve, falling=falling)
    np.testing.assert_allclose(fit.at(BLOCKS), curve, atol=2e-4)
    assert fit.centre == pytest.approx(centre, abs=0.02)
    # A sharp switch between two blocks leaves few digits of its scale.
    assert fit.scale == pytest.approx(scale, rel=0.05)
    assert fit.change == pytest.approx(abs(curve[-1] - curve[0]), abs=1e-3)


def scipy_error(curve, falling, bounds=(0.0, 1.0)):
    """Smallest squared error that SciPy's bounded optimiser finds from twelve starts."""
    below = [bounds[0], bounds[0], 0, np.log(NARROWEST / SCALES_10_90)]
    above = [bounds[1], bounds[1], N_BLOCKS - 1, np.log(N_BLOCKS / SCALES_10_90)]

    def residuals(p):
        return logistic(p[2], np.exp(p[3]), p[0], p[1], falling=falling) - curve

    errors = []
    for centre in (3, 10, 17, 24):
        for scale in (0.3, 1, 4):
            inside = np.clip([curve.min(), curve.max()], bounds[0] + 1e-3, bounds[1] - 1e-3)
            found = least_squares(
                residuals, [*inside, centre, np.log(scale)], bounds=(below, above), xtol=1e-12
            )
            if found.x[0] <= found.x[1]:
                errors.append(2 * found.cost)
    return min(errors)


@pytest.mark.parametrize(
    ("centre", "scale", "low", "high", "falling"),
    [
        (15.3, 2.0, 0.1, 0.9, False),
        (22.5, 0.05, 0.0, 1.0, True),
        (20.0, 5.0, 0.0, 0.6, True),
        (28.0, 2.0, 0.1, 0.9, False),  # cut off by the last block
        (2.0, 1.0, 0.2, 1.0, True),
    ],
)
def test_fits_are_as_good_as_scipys_optimiser(centre, scale, low, high, falling):
    curves = noisy(logistic(centre, scale, low, high, falling=falling), 4)
    fit = fit_logistic(curves, falling=falling)
    for k, curve in enumerate(curves):
        error = sum((fit.at(block)[k] - curve[block]) ** 2 for block in BLOCKS)
        assert error <= scipy_error(curve, falling) * (1 + 1e-5)


def test_rows_fitted_together_are_the_rows_fitted_alone():
    curves = noisy(logistic(18.0, 1.0), 6, seed=1)
    together = fit_logistic(curves, falling=False)
    assert together.width.shape == (6,)
    for k, curve in enumerate(curves):
        alone = fit_logistic(curve, falling=False)
        assert alone.width.shape == ()
        for name in ("low", "high", "centre", "scale"):
            assert getattr(together, name)[k] == pytest.approx(getattr(alone, name), rel=1e-6)


def test_a_step_between_two_blocks_lies_half_way_and_is_as_narrow_as_blocks_can_show():
    step = (BLOCKS > 22).astype(float)
    for falling, curve in ((False, step), (True, 1 - step)):
        fit = fit_logistic(curve, falling=falling)
        assert fit.centre == pytest.approx(22.5, abs=1e-3)
        assert fit.width == pytest.approx(NARROWEST)


def test_depth_reversed_mirrors_the_fit():
    curve = noisy(logistic(9.0, 1.5), 1, seed=2)[0]
    rising, falling = fit_logistic(curve, falling=False), fit_logistic(curve[::-1], falling=True)
    assert falling.centre == pytest.approx(N_BLOCKS - 1 - rising.centre, abs=1e-4)
    assert falling.width == pytest.approx(rising.width, rel=1e-4)


def test_asymptotes_stay_within_their_bounds_and_are_free_without_them():
    curve = logistic(15, 2, -0.5, 1.5)
    bounded = fit_logistic(curve, falling=False)
    assert bounded.low >= 0
    assert bounded.high <= 1
    free = fit_logistic(curve, falling=False, bounds=None)
    assert (free.low, free.high) == pytest.approx((-0.5, 1.5), abs=1e-3)


def test_a_curve_against_the_direction_asked_for_is_flat():
    fit = fit_logistic(logistic(15, 2), falling=True)
    assert fit.change < 0.05
    assert fit_logistic(np.full(N_BLOCKS, 0.4), falling=False).change == pytest.approx(0, abs=1e-6)


def test_a_straight_line_is_as_wide_as_the_depth():
    fit = fit_logistic(np.linspace(0, 1, N_BLOCKS), falling=False, bounds=None)
    assert fit.width == pytest.approx(N_BLOCKS)


@pytest.mark.parametrize(
    ("curve", "match"),
    [
        ([0, 1, 1], "4 blocks or more"),
        (np.zeros((2, 2, 9)), "4 blocks or more"),
        ([0, np.nan, 1, 1], "finite"),
    ],
)
def test_curves_that_cannot_be_fitted_are_refused(curve, match):
    with pytest.raises(ValueError, match=match):
        fit_logistic(curve, falling=False)


# --- the transition ------------------------------------------------------------------------------


def both_arms(centre=20.3, scale=0.8, n_prompts=30, seed=3, n_draws=200):
    """Flips of every ordered pair in both arms, with a switch of each recipient's own."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(n_prompts) for j in range(n_prompts) if i != j])
    threshold = centre + scale * rng.logistic(size=n_prompts)[pairs[:, 0]]
    prediction = BLOCKS[:, None] > threshold[None, :]
    weights = bootstrap_weights(n_prompts, n_draws, rng)
    curves = [(~prediction).mean(axis=1), prediction.mean(axis=1)]
    draws = [pair_share_bootstrap(o, pairs, weights) for o in (~prediction, prediction)]
    return curves, draws


def test_the_transition_is_where_the_arms_cross():
    context, prediction = logistic(20, 1, falling=True), logistic(22, 1)
    found = find_transition(
        context, prediction, np.tile(context, (5, 1)), np.tile(prediction, (5, 1)), n_prompts=9
    )
    assert found.found
    assert found.block == pytest.approx(21, abs=1e-3)  # by symmetry
    assert (found.low, found.high) == pytest.approx((21, 21), abs=1e-3)
    uneven = logistic(20, 1, 0.0, 0.8, falling=True)
    moved = find_transition(
        uneven, prediction, np.tile(uneven, (5, 1)), np.tile(prediction, (5, 1)), n_prompts=9
    )
    at = moved.block
    assert logistic(20, 1, 0, 0.8, falling=True, blocks=at) == pytest.approx(
        logistic(22, 1, blocks=at), abs=1e-3
    )


def test_the_width_is_that_of_the_wider_arm():
    context, prediction = logistic(20, 0.5, falling=True), logistic(20, 1.5)
    found = find_transition(
        context, prediction, np.tile(context, (5, 1)), np.tile(prediction, (5, 1)), n_prompts=9
    )
    assert found.width_context == pytest.approx(SCALES_10_90 * 0.5, rel=0.01)
    assert found.width_prediction == pytest.approx(SCALES_10_90 * 1.5, rel=0.01)
    assert found.width == found.width_prediction
    assert found.width_low == found.width_high == pytest.approx(found.width)
    swapped = find_transition(
        1 - prediction,
        1 - context,
        *(np.tile(1 - c, (5, 1)) for c in (prediction, context)),
        n_prompts=9,
    )
    assert swapped.width == swapped.width_context == pytest.approx(found.width)
    assert swapped.width_low == pytest.approx(found.width)
    share = found.width_share
    assert share.estimate == pytest.approx(found.width / N_BLOCKS)
    assert (share.low, share.high) == (found.width_low / N_BLOCKS, found.width_high / N_BLOCKS)
    assert share.n == found.n_prompts == 9


def test_a_planted_transition_is_found_with_its_interval():
    curves, draws = both_arms()
    found = find_transition(*curves, *draws, n_prompts=30)
    assert found.low < 20.3 < found.high
    assert found.low < found.block < found.high
    assert 0.3 < found.high - found.low < 2
    assert found.width_low < found.width < found.width_high
    assert found.width_low < SCALES_10_90 * 0.8 < found.width_high
    assert len(found.block_draws) == len(found.width_draws) == 200
    narrower = find_transition(*curves, *draws, n_prompts=30, level=0.5)
    assert narrower.high - narrower.low < found.high - found.low


def test_intervals_of_the_transition_cover_the_planted_block():
    covered = 0
    for seed in range(60):
        curves, draws = both_arms(seed=seed, n_draws=100)
        found = find_transition(*curves, *draws, n_prompts=30)
        covered += found.low <= 20.3 <= found.high
    assert covered >= 50  # nominally 57, standard error 1.7


def test_what_has_no_transition_says_why():
    falling, rising = logistic(20, 1, falling=True), logistic(20, 1)
    flat = np.full(N_BLOCKS, 0.5)
    low = logistic(20, 1, 0.0, 0.3)
    cases = [
        (flat, rising, "context arm changes by 0.00"),
        (falling, flat, "prediction arm changes by 0.00"),
        (0.2 + 0.8 * falling, low, None),
        (0.5 + 0.5 * falling, low, "do not cross"),
        (rising, falling, "context arm changes by"),
    ]
    for context, prediction, reason in cases:
        found = find_transition(
            context, prediction, np.tile(context, (3, 1)), np.tile(prediction, (3, 1)), n_prompts=9
        )
        if reason is None:
            assert found.found
            continue
        assert not found.found
        assert reason in found.reason
        assert found.block is None
        assert found.width is None
        assert found.width_share is None
        assert (found.n_blocks, found.n_prompts) == (N_BLOCKS, 9)


def test_a_crossing_that_most_draws_lack_is_not_found():
    falling, rising = logistic(20, 1, falling=True), logistic(20, 1)
    apart = np.tile(rising, (100, 1))
    apart[:6] = 0.0  # in 6 of 100 draws the prediction arm never rises
    found = find_transition(falling, rising, np.tile(falling, (100, 1)), apart, n_prompts=9)
    assert not found.found
    assert "94%" in found.reason
    apart[0] = rising
    apart[1] = np.nan  # a draw with none of the pairs counts as one without a crossing
    found = find_transition(falling, rising, np.tile(falling, (100, 1)), apart, n_prompts=9)
    assert found.found
    assert np.isnan(found.block_draws[1:6]).all()
    assert np.isnan(found.width_draws[1:6]).all()
    assert np.isfinite(found.block_draws[6:]).all()


def test_arms_of_different_size_and_impossible_transitions_are_refused():
    curve, draws = logistic(20, 1), np.tile(logistic(20, 1), (3, 1))
    with pytest.raises(ValueError, match="of one size"):
        find_transition(curve, curve[:-1], draws, draws, n_prompts=9)
    with pytest.raises(ValueError, match="of one size"):
        find_transition(curve, curve, draws, draws[:2], n_prompts=9)
    with pytest.raises(ValueError, match="block or a reason"):
        Transition(found=True, reason="", n_blocks=30, n_prompts=9)
    with pytest.raises(ValueError, match="block or a reason"):
        Transition(found=False, reason="", n_blocks=30, n_prompts=9)
    with pytest.raises(ValueError, match="block or a reason"):
        Transition(found=True, reason="odd", n_blocks=30, n_prompts=9, block=3.0)
    with pytest.raises(ValueError, match="width or a reason"):
        CurveWidth(found=False, reason="", n_blocks=30, n_items=9)
    with pytest.raises(ValueError, match="width or a reason"):
        CurveWidth(found=True, reason="odd", n_blocks=30, n_items=9, width=3.0)


# --- sharp against gradual -----------------------------------------------------------------------


def test_the_width_of_a_correlation_needs_not_reach_zero_or_one():
    curve = logistic(14, 2.5, -0.1, 0.45)
    found = curve_width(curve, noisy(curve, 300, 0.01, seed=4), falling=False, n_items=50)
    assert found.width == pytest.approx(SCALES_10_90 * 2.5, rel=0.01)
    assert found.low < found.width < found.high
    assert found.centre_low < 14 < found.centre_high
    assert (found.n_blocks, found.n_items, len(found.draws)) == (N_BLOCKS, 50, 300)


def test_a_curve_that_barely_changes_has_no_width():
    curve = logistic(14, 2.5, 0.3, 0.45)
    found = curve_width(curve, noisy(curve, 9, 0.01), falling=False, n_items=50)
    assert not found.found
    assert found.reason == "the curve rises by 0.15 over the depth, less than 0.2"
    assert found.width is None
    smaller = curve_width(
        curve, noisy(curve, 9, 0.01), falling=False, n_items=50, smallest_change=0.1
    )
    assert smaller.found
    against = curve_width(curve, noisy(curve, 9, 0.01), falling=True, n_items=50)
    assert "falls by" in against.reason


def test_gradual_geometry_is_wider_and_equal_widths_are_not_told_apart():
    curves, draws = both_arms(seed=5)
    causal = find_transition(*curves, *draws, n_prompts=30)
    geometry = logistic(16, 4)
    gradual = curve_width(geometry, noisy(geometry, 200, 0.03), falling=False, n_items=30)
    difference = width_difference(gradual, causal)
    assert difference.estimate == pytest.approx(gradual.width - causal.width)
    assert difference.low > 0
    assert difference.n == 30
    same = curve_width(curves[1], draws[1], falling=False, n_items=30, bounds=(0.0, 1.0))
    assert width_difference(same, causal).low <= 0 <= width_difference(same, causal).high
    by_draw = np.quantile(gradual.draws - causal.width_draws, [0.025, 0.975])
    assert (difference.low, difference.high) == pytest.approx(tuple(by_draw))


def test_width_difference_needs_two_widths_from_the_same_draws():
    curves, draws = both_arms(n_draws=50)
    causal = find_transition(*curves, *draws, n_prompts=30)
    geometry = logistic(16, 4)
    wide = curve_width(geometry, noisy(geometry, 40, 0.03), falling=False, n_items=30)
    with pytest.raises(ValueError, match="same draws; got 40 and 50"):
        width_difference(wide, causal)
    flat = curve_width(geometry * 0.1, noisy(geometry, 40), falling=False, n_items=30)
    with pytest.raises(ValueError, match=r"the curve rises by 0\.09"):
        width_difference(flat, causal)
    none = Transition(found=False, reason="no arms", n_blocks=30, n_prompts=9)
    with pytest.raises(ValueError, match="no arms"):
        width_difference(wide, none)


# --- logistic, line or step ----------------------------------------------------------------------


def flips(rates, n_prompts=30, seed=6, donors=3):
    rng = np.random.default_rng(seed)
    recipients = np.repeat(np.arange(n_prompts), donors)
    pairs = np.stack(
        [recipients, (recipients + np.tile(np.arange(1, donors + 1), n_prompts)) % n_prompts],
        axis=1,
    )
    return (rng.uniform(size=(len(pairs), len(rates))) < rates).T, pairs


def test_the_shape_that_made_the_data_predicts_best():
    line = np.linspace(0.02, 0.98, N_BLOCKS)
    step = np.where(BLOCKS > 14, 0.95, 0.05)
    curved = logistic(15, 1.5, 0.02, 0.98)
    results = {}
    for name, rates in (("line", line), ("step", step), ("logistic", curved)):
        outcome, pairs = flips(rates, n_prompts=60)
        results[name] = compare_shapes(
            outcome, pairs, falling=False, rng=np.random.default_rng(7), n_draws=200
        )
    assert results["logistic"].logistic_over_line.low > 0
    assert results["logistic"].logistic_over_step.low > 0
    assert results["line"].line > results["line"].step
    assert results["line"].logistic_over_step.low > 0
    assert results["step"].step > results["step"].line
    assert results["step"].logistic_over_line.low > 0
    # A logistic curve can be nearly a step; it loses next to nothing.
    assert abs(results["step"].logistic_over_step.estimate) < 0.01
    falling = compare_shapes(
        flips(curved[::-1], n_prompts=60)[0],
        pairs,
        falling=True,
        rng=np.random.default_rng(7),
        n_draws=200,
    )
    assert falling.logistic_over_line.low > 0


def test_held_out_likelihood_equals_a_naive_loop():
    outcome, pairs = flips(logistic(15, 2, 0.1, 0.9), n_prompts=12, donors=2)
    result = compare_shapes(
        outcome, pairs, falling=False, rng=np.random.default_rng(8), n_folds=3, n_draws=10
    )
    fold_of = np.random.default_rng(8).permutation(np.arange(12) % 3)
    per_prompt = {}
    for recipient in range(12):
        fold = fold_of[recipient]
        fitted = [k for k, pair in enumerate(pairs) if fold not in fold_of[pair]]
        curve = outcome[:, fitted].mean(axis=1)
        n_fitted = len(set(pairs[fitted].ravel()))
        slope, constant = np.polyfit(BLOCKS, curve, 1)
        share = np.clip(constant + slope * BLOCKS, 0, 1)
        chance = (share * n_fitted + 1) / (n_fitted + 2)
        own = outcome[:, pairs[:, 0] == recipient]
        per_prompt[recipient] = np.mean(np.log(np.where(own, chance[:, None], 1 - chance[:, None])))
    assert result.line == pytest.approx(np.mean(list(per_prompt.values())), rel=1e-9)
    assert result.logistic_over_line.estimate == pytest.approx(result.logistic - result.line)
    assert result.logistic_over_step.estimate == pytest.approx(result.logistic - result.step)
    assert (result.n_prompts, result.n_folds) == (12, 3)


def test_no_shape_is_certain_so_that_one_odd_pair_costs_a_finite_amount():
    outcome, pairs = flips((BLOCKS > 14).astype(float), n_prompts=20)
    outcome[3, 5] = True
    result = compare_shapes(outcome, pairs, falling=False, rng=np.random.default_rng(9), n_draws=10)
    assert np.isfinite([result.logistic, result.line, result.step]).all()


def test_recipients_alone_can_be_compared_too():
    outcome, pairs = flips(logistic(15, 1.5), n_prompts=20, donors=1)
    result = compare_shapes(
        outcome, pairs[:, 0] + 100, falling=False, rng=np.random.default_rng(10), n_draws=10
    )
    assert result.n_prompts == 20
    assert result.logistic > result.line


def test_outcomes_that_cannot_be_compared_are_refused():
    outcome, pairs = flips(logistic(15, 1.5), n_prompts=20)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="outcome must be 0 or 1"):
        compare_shapes(outcome * 0.5, pairs, falling=False, rng=rng)
    with pytest.raises(ValueError, match="outcome must be 0 or 1"):
        compare_shapes(outcome[:, 1:], pairs, falling=False, rng=rng)
    with pytest.raises(ValueError, match="40 prompts or more; got 20"):
        compare_shapes(outcome, pairs, falling=False, rng=rng, n_folds=20)
    star = np.stack([np.arange(20), np.zeros(20, dtype=int)], axis=1)
    star[0, 1] = 1
    with pytest.raises(ValueError, match="No pair is left to fit on"):
        compare_shapes(outcome[:, :20], star, falling=False, rng=rng, n_folds=2)
