"""Bootstrap, correlations, Mantel and equivalence agree with references and keep their promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kstest, linregress, norm, rankdata, spearmanr
from skbio.stats.distance import mantel as skbio_mantel

from lib.science import correlations, mantel, stats


def cloud_matrix(rng, n_items, d_model=3):
    return squareform(pdist(rng.normal(size=(n_items, d_model))))


def related_matrices(seed, n_items=20, n_matrices=2, noise=1.0):
    """Distances among points that share a part, so that the matrices correlate."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n_items, 3))
    return [
        squareform(pdist(shared + noise * rng.normal(size=(n_items, 3)))) for _ in range(n_matrices)
    ]


# --- bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_weights_are_draws_with_replacement():
    weights = stats.bootstrap_weights(30, 4000, np.random.default_rng(0))
    assert weights.shape == (4000, 30)
    assert (weights.sum(axis=1) == 30).all()
    assert (weights == weights.round()).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.06)
    assert weights.var() == pytest.approx(29 / 30, rel=0.03)  # of a multinomial count
    again = stats.bootstrap_weights(30, 4000, np.random.default_rng(0))
    assert (weights == again).all()


def test_every_bootstrap_draw_has_three_different_items():
    weights = stats.bootstrap_weights(3, 500, np.random.default_rng(1))
    assert (weights == 1).all()
    with pytest.raises(ValueError, match="at least 3 items"):
        stats.bootstrap_weights(2, 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="1 draw"):
        stats.bootstrap_weights(5, 0, np.random.default_rng(0))


def test_weighted_mean_is_the_mean_of_the_repeated_items():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(8, 2, 3))
    weights = stats.bootstrap_weights(8, 5, rng)
    naive = [np.repeat(values, w.astype(int), axis=0).mean(axis=0) for w in weights]
    np.testing.assert_allclose(stats.weighted_mean(values, weights), naive, rtol=1e-12)
    with pytest.raises(ValueError, match="finite"):
        stats.weighted_mean([1.0, np.nan, 2.0], weights)
    with pytest.raises(ValueError, match=r"\[n_draws, 3\]"):
        stats.weighted_mean([1.0, 2.0, 3.0], weights)


def test_bootstrap_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(3).normal(size=400)
    weights = stats.bootstrap_weights(400, 4000, np.random.default_rng(4))
    interval = stats.bootstrap_interval(values, weights)
    error = values.std() / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (interval.n, interval.level) == (400, 0.95)


def test_bootstrap_interval_covers_the_true_mean_at_its_level():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        values = rng.exponential(size=60)
        interval = stats.bootstrap_interval(values, stats.bootstrap_weights(60, 400, rng))
        covered += interval.low <= 1 <= interval.high
    # Nominally 380; percentile intervals of a skewed mean fall a little short. 4 errors are 17.
    assert 355 <= covered <= 394


def test_percentile_interval_leaves_out_undefined_draws_up_to_one_in_twenty():
    draws = np.arange(1000.0)
    draws[:50] = np.nan
    interval = stats.percentile_interval(500, draws, n=7, level=0.9)
    expected = np.quantile(np.arange(50, 1000), [0.05, 0.95])
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    draws[50] = np.nan
    with pytest.raises(ValueError, match="51 of 1000 draws have no value"):
        stats.percentile_interval(500, draws, n=7)
    with pytest.raises(ValueError, match="0 of 0 draws"):
        stats.percentile_interval(500, [], n=7)
    with pytest.raises(ValueError, match="estimate must be finite"):
        stats.percentile_interval(np.nan, np.arange(10), n=7)


def test_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(6)
    prompt = rng.normal(size=100)
    first, second = prompt + 0.5, prompt + 0.1 * rng.normal(size=100)
    weights = stats.bootstrap_weights(100, 1000, rng)
    difference = stats.bootstrap_difference(first, second, weights)
    assert difference.low < 0.5 < difference.high
    assert difference.estimate == pytest.approx(first.mean() - second.mean())
    alone = stats.bootstrap_interval(first, weights)
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="one shape"):
        stats.bootstrap_difference(first, second[:5], weights)


def test_pair_shares_resample_recipient_and_donor():
    rng = np.random.default_rng(7)
    pairs = np.array([(i, j) for i in range(6) for j in range(6) if i != j])
    outcome = rng.integers(0, 2, size=(4, len(pairs)))
    weights = stats.bootstrap_weights(6, 10, rng)
    naive = [
        [np.average(row, weights=[w[i] * w[j] for i, j in pairs]) for row in outcome]
        for w in weights
    ]
    shares = stats.pair_share_bootstrap(outcome, pairs, weights)
    np.testing.assert_allclose(shares, naive, rtol=1e-12)
    alone = stats.pair_share_bootstrap(outcome, pairs[:, 0], weights)
    naive = [[np.average(row, weights=w[pairs[:, 0]]) for row in outcome] for w in weights]
    np.testing.assert_allclose(alone, naive, rtol=1e-12)
    ones = stats.pair_share_bootstrap(outcome[0], pairs, np.ones((1, 6)))
    assert ones[0, 0] == pytest.approx(outcome[0].mean())


def test_pair_shares_are_the_same_in_chunks(monkeypatch):
    rng = np.random.default_rng(8)
    pairs, outcome = rng.integers(0, 9, size=(40, 2)), rng.normal(size=(3, 40))
    weights = stats.bootstrap_weights(9, 17, rng)
    whole = stats.pair_share_bootstrap(outcome, pairs, weights)
    monkeypatch.setattr(stats, "_PAIR_WEIGHTS_AT_ONCE", 200)
    chunked = stats.pair_share_bootstrap(outcome, pairs, weights)
    np.testing.assert_allclose(chunked, whole, rtol=1e-13)


def test_a_draw_without_any_of_the_pairs_has_no_share():
    weights = np.array([[0.0, 2, 1, 1], [2, 1, 1, 0]])
    shares = stats.pair_share_bootstrap([[1, 0]], [[0, 1], [0, 2]], weights)
    assert np.isnan(shares[0]).all()
    assert shares[1] == 0.5


@pytest.mark.parametrize(
    ("outcome", "pairs", "match"),
    [
        ([[1, 0]], [[0, 1]], "do not fit"),
        ([[1]], [[0, 9]], "do not fit"),
        ([[1]], [[-1, 0]], "do not fit"),
        ([[np.nan]], [[0, 1]], "finite"),
    ],
)
def test_pair_shares_refuse_what_does_not_fit(outcome, pairs, match):
    with pytest.raises(ValueError, match=match):
        stats.pair_share_bootstrap(outcome, pairs, np.ones((2, 4)))


def test_interval_over_prompts_is_wider_than_one_that_counts_pairs_as_independent():
    rng = np.random.default_rng(9)
    n_prompts = 20
    pairs = np.array([(i, j) for i in range(n_prompts) for j in range(n_prompts) if i != j])
    prone = rng.uniform(size=n_prompts) < 0.5  # the recipient alone decides
    outcome = prone[pairs[:, 0]][None, :]
    draws = stats.pair_share_bootstrap(
        outcome, pairs, stats.bootstrap_weights(n_prompts, 2000, rng)
    )
    by_pair = np.sqrt(0.25 / len(pairs))
    assert draws.std() > 3 * by_pair
    assert draws.std() == pytest.approx(np.sqrt(prone.var() / n_prompts), rel=0.15)


# --- equivalence and Holm ------------------------------------------------------------------------

# scipy.stats has no TOST; the p-values are those of statsmodels 0.15.0,
# statsmodels.stats.weightstats.ttost_paired(SHIFTS, 0, -margin, margin), and the 90 % interval that
# of DescrStatsW(SHIFTS).tconfint_mean(alpha=0.1).
SHIFTS = [0.02, -0.05, 0.08, 0.01, -0.03, 0.06, -0.01, 0.04, 0.00, -0.02]
INNER = (-0.013665386199650149, 0.03366538619965015)


@pytest.mark.parametrize(
    ("margin", "p_value", "equivalent"),
    [
        (0.1, 3.2640637045402946e-05, True),
        (0.03, 0.07787232123888722, False),
        (0.01, 0.49999999999999994, False),
    ],
)
def test_tost_of_a_mean_equals_statsmodels(margin, p_value, equivalent):
    result = stats.equivalence_test_mean(SHIFTS, margin=margin)
    assert result.p_value == pytest.approx(p_value, rel=1e-9)
    assert (result.low, result.high) == pytest.approx(INNER, rel=1e-9)
    assert result.equivalent is equivalent
    assert (result.p_value < 0.05) is equivalent
    mirrored = stats.equivalence_test_mean([-x for x in SHIFTS], margin=margin)
    assert mirrored.p_value == pytest.approx(p_value, rel=1e-9)


def test_tost_from_draws_agrees_with_the_normal_closed_form():
    draws = np.random.default_rng(10).normal(0.04, 0.02, size=200_000)
    result = stats.equivalence_test(0.04, draws, margin=0.1, n=50)
    assert result.low == pytest.approx(0.04 - 1.645 * 0.02, abs=5e-4)
    assert result.high == pytest.approx(0.04 + 1.645 * 0.02, abs=5e-4)
    assert result.p_value == pytest.approx(norm.sf(3), rel=0.15)
    assert result.equivalent
    assert not stats.equivalence_test(0.08, draws + 0.04, margin=0.1, n=50).equivalent
    assert not stats.equivalence_test(-0.08, -draws - 0.04, margin=0.1, n=50).equivalent
    mirrored = stats.equivalence_test(-0.04, -draws, margin=0.1, n=50)
    assert mirrored.p_value == result.p_value
    exact = stats.equivalence_test(0, np.r_[np.zeros(95), np.full(5, np.nan)], margin=0.1, n=5)
    assert (exact.p_value, exact.low, exact.high) == (1 / 96, 0, 0)


def test_tost_holds_its_level_on_the_margin_and_is_powerful_inside():
    rng = np.random.default_rng(11)
    at_margin = rng.normal(0.1, 0.2, size=(600, 40))
    inside = rng.normal(0.0, 0.2, size=(200, 40))
    false = np.mean([stats.equivalence_test_mean(x, margin=0.1).equivalent for x in at_margin])
    power = np.mean([stats.equivalence_test_mean(x, margin=0.1).equivalent for x in inside])
    assert 0.02 <= false <= 0.08  # 5 % of 600: standard error 0.9 %
    assert power > 0.75  # 0.81 by the normal approximation


def test_tost_refuses_what_it_cannot_judge():
    for margin in (0, -0.1, np.nan):
        with pytest.raises(ValueError, match="margin must be positive"):
            stats.equivalence_test(0, np.zeros(10), margin=margin, n=3)
        with pytest.raises(ValueError, match="margin must be positive"):
            stats.equivalence_test_mean(SHIFTS, margin=margin)
    with pytest.raises(ValueError, match="3 finite"):
        stats.equivalence_test_mean([0.1, 0.2], margin=1)
    with pytest.raises(ValueError, match="3 finite"):
        stats.equivalence_test_mean([0.1, 0.2, np.inf], margin=1)
    with pytest.raises(ValueError, match="all equal"):
        stats.equivalence_test_mean([0.5, 0.5, 0.5], margin=1)


def test_holm_equals_statsmodels():
    # statsmodels 0.15.0, multipletests(p, method="holm")
    adjusted = stats.holm([0.01, 0.04, 0.03, 0.005, 0.6, 0.9, 0.04])
    np.testing.assert_allclose(adjusted, [0.06, 0.16, 0.15, 0.035, 1.0, 1.0, 0.16], rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_a_p_value_and_never_exceeds_bonferroni(p_values):
    p, adjusted = np.array(p_values), stats.holm(p_values)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(len(p) * p, 1) + 1e-15).all()
    assert (
        np.argsort(adjusted[np.argsort(p, kind="stable")], kind="stable") == range(len(p))
    ).all()


@pytest.mark.parametrize("bad", [[], [0.1, 1.1], [-0.1], [np.nan], [[0.1, 0.2]]])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        stats.holm(bad)


# --- correlations of dissimilarity matrices ------------------------------------------------------


def test_rank_matrix_holds_scipys_average_ranks():
    matrix = cloud_matrix(np.random.default_rng(12), 9).round(1)  # rounding makes ties
    ranked = correlations.rank_matrix(matrix)
    upper = np.triu_indices(9, 1)
    np.testing.assert_array_equal(ranked[upper], rankdata(matrix[upper]))
    assert (ranked == ranked.T).all()
    assert (np.diag(ranked) == 0).all()
    assert len(np.unique(ranked[upper])) < 36


def test_spearman_of_matrices_equals_scipys_over_pairs():
    first, second = related_matrices(13)
    expected = spearmanr(squareform(first), squareform(second)).statistic
    assert correlations.spearman(first, second) == pytest.approx(expected, abs=1e-12)
    assert correlations.spearman(first, -second) == pytest.approx(-expected, abs=1e-12)
    assert correlations.spearman(first, first**3) == pytest.approx(1, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 1000))
def test_spearman_ignores_the_order_of_the_items(order, seed):
    first, second = related_matrices(seed, n_items=8)
    shuffle = np.ix_(order, order)
    assert correlations.spearman(first[shuffle], second[shuffle]) == pytest.approx(
        correlations.spearman(first, second), abs=1e-12
    )
    assert correlations.spearman(second, first) == pytest.approx(
        correlations.spearman(first, second), abs=1e-12
    )


def naive_weighted_correlation(first, second, weights):
    pairs = [(i, j) for i in range(len(first)) for j in range(len(first)) if i != j]
    share = np.array([weights[i] * weights[j] for i, j in pairs])
    a, b = (np.array([m[i, j] for i, j in pairs]) for m in (first, second))
    return np.cov(a, b, aweights=share)[0, 1] / np.sqrt(
        np.cov(a, aweights=share) * np.cov(b, aweights=share)
    )


def test_weighted_correlation_equals_a_loop_over_pairs():
    first, second = (correlations.rank_matrix(m) for m in related_matrices(14, n_items=12))
    weights = stats.bootstrap_weights(12, 20, np.random.default_rng(15))
    naive = [naive_weighted_correlation(first, second, w) for w in weights]
    measured = correlations.weighted_pair_correlation(first, second, weights)
    np.testing.assert_allclose(measured, naive, atol=1e-12)
    # The diagonal is no pair, whatever it holds.
    filled = first + np.diag(np.arange(12.0) * 1e3)
    np.testing.assert_allclose(
        correlations.weighted_pair_correlation(filled, second, weights), naive, atol=1e-12
    )


def test_estimate_and_draws_come_from_the_same_ranks():
    matrices = related_matrices(16, n_items=15, n_matrices=3)
    weights = stats.bootstrap_weights(15, 6, np.random.default_rng(17))
    estimate, draws = correlations.bootstrap_correlations(matrices, weights)
    expected = spearmanr(np.stack([squareform(m) for m in matrices], axis=1)).statistic
    np.testing.assert_allclose(estimate, expected, atol=1e-12)
    assert draws.shape == (6, 3, 3)
    ranked = [correlations.rank_matrix(m) for m in matrices]
    np.testing.assert_allclose(
        draws[:, 0, 2],
        correlations.weighted_pair_correlation(ranked[0], ranked[2], weights),
        atol=1e-12,
    )
    np.testing.assert_allclose(draws, draws.swapaxes(1, 2))
    np.testing.assert_allclose(np.einsum("dii->di", draws), 1)


def test_a_matrix_constant_within_a_draw_gives_no_correlation_there():
    labels = np.array([0, 0, 0, 1, 1])
    same = (labels[:, None] != labels[None, :]).astype(float)
    other = cloud_matrix(np.random.default_rng(18), 5)
    weights = np.array([[2.0, 2, 1, 0, 0], [1, 1, 1, 1, 1]])
    draws = correlations.weighted_pair_correlation(same, other, weights)
    assert np.isnan(draws[0])
    assert np.isfinite(draws[1])


def test_bootstrap_over_items_covers_the_true_rank_correlation():
    rng = np.random.default_rng(19)

    def sample(n_items):
        shared = rng.normal(size=(n_items, 2))
        return [squareform(pdist(shared + rng.normal(size=shared.shape))) for _ in range(2)]

    truth = correlations.spearman(*sample(1500))
    covered = pairs_as_units = 0
    for _ in range(200):
        first, second = sample(60)
        weights = stats.bootstrap_weights(60, 300, rng)
        estimate, draws = correlations.bootstrap_correlations([first, second], weights)
        interval = stats.percentile_interval(estimate[0, 1], draws[:, 0, 1], n=60)
        covered += interval.low <= truth <= interval.high
        reach = 1.96 * np.sqrt((1 - estimate[0, 1] ** 2) / (60 * 59 / 2))
        pairs_as_units += abs(estimate[0, 1] - truth) <= reach
    assert 180 <= covered <= 199  # nominally 190, standard error 3
    assert pairs_as_units < 160  # what pairs counted as independent would give


def test_partial_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(20)
    given_ones = rng.normal(size=(500, 2))
    x, y = (given_ones @ rng.normal(size=2) + rng.normal(size=500) for _ in range(2))
    design = np.column_stack([np.ones(500), given_ones])
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    expected = np.corrcoef(*residuals)[0, 1]
    matrix = np.corrcoef([x, y, *given_ones.T])
    assert correlations.partial_correlation(matrix) == pytest.approx(expected, abs=1e-12)
    # With one given variable, the textbook formula.
    one = matrix[:3, :3]
    r, a, b = one[0, 1], one[0, 2], one[1, 2]
    assert correlations.partial_correlation(one) == pytest.approx(
        (r - a * b) / np.sqrt((1 - a**2) * (1 - b**2)), abs=1e-12
    )
    slope = linregress(design[:, 1], x)
    alone = x - slope.intercept - slope.slope * design[:, 1]
    assert np.corrcoef(alone, design[:, 1])[0, 1] == pytest.approx(0, abs=1e-12)
    assert correlations.partial_correlation(matrix[:2, :2]) == pytest.approx(matrix[0, 1])


def test_partial_correlation_works_over_draws_and_keeps_undefined_ones_apart():
    stack = np.tile(np.eye(3), (4, 2, 1, 1))
    stack[..., 0, 1] = stack[..., 1, 0] = 0.5
    stack[2, 1] = np.nan
    result = correlations.partial_correlation(stack)
    assert result.shape == (4, 2)
    assert np.isnan(result[2, 1])
    assert (result[~np.isnan(result)] == 0.5).all()


def test_partial_correlation_given_a_copy_is_refused():
    first, second = related_matrices(21)
    estimate, _ = correlations.bootstrap_correlations([first, second, second], np.ones((1, 20)))
    with pytest.raises(ValueError, match="determined by the given ones"):
        correlations.partial_correlation(estimate)


def test_draws_whose_partial_correlation_is_undefined_can_be_left_out():
    independent = np.eye(3)
    copied = np.array([[1.0, 0.5, 0.5], [0.5, 1, 1], [0.5, 1, 1]])
    stack = np.stack([independent, copied])
    assert np.isnan(correlations.partial_correlation(stack, determined="nan")).tolist() == [
        False,
        True,
    ]
    with pytest.raises(ValueError, match="determined by the given ones"):
        correlations.partial_correlation(stack)


def test_chosen_pairs_of_matrices_are_entries_of_the_whole_table():
    ranked = [correlations.rank_matrix(m) for m in related_matrices(35, n_matrices=4)]
    weights = stats.bootstrap_weights(20, 7, np.random.default_rng(36))
    whole = correlations.weighted_correlations(ranked, weights)
    chosen = correlations.correlations_of_pairs(ranked, [(3, 1), (0, 2), (2, 2)], weights)
    np.testing.assert_allclose(chosen[:, 0], whole[:, 3, 1], atol=1e-12)
    np.testing.assert_allclose(chosen[:, 1], whole[:, 0, 2], atol=1e-12)
    np.testing.assert_allclose(chosen[:, 2], 1)


def test_given_matrices_may_repeat_each_other():
    first, second, third = related_matrices(22, n_matrices=3)
    ones = np.ones((1, 20))
    single, _ = correlations.bootstrap_correlations([first, second, third], ones)
    double, _ = correlations.bootstrap_correlations([first, second, third, third], ones)
    assert correlations.partial_correlation(double) == pytest.approx(
        correlations.partial_correlation(single), abs=1e-9
    )


# --- Mantel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spearman", "pearson"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_mantel_equals_scikit_bio(method, alternative):
    first, second = related_matrices(23, n_items=15, noise=2.5)
    expected, p_value, n_items = skbio_mantel(
        first, second, method=method, permutations=4999, alternative=alternative, seed=1
    )
    result = mantel.mantel_test(
        first,
        second,
        n_permutations=4999,
        rng=np.random.default_rng(24),
        method=method,
        alternative=alternative,
    )
    assert result.correlation == pytest.approx(expected, abs=1e-12)
    assert result.n_items == n_items
    # Two random sets of permutations: four standard errors of the difference of two shares.
    assert result.p_value == pytest.approx(p_value, abs=4 * np.sqrt(0.5 * 0.5 / 2500) + 1e-3)


def test_mantel_null_equals_a_naive_loop_on_the_same_permutations():
    first, second, third = related_matrices(25, n_items=10, n_matrices=3)
    rng = np.random.default_rng(26)
    null, null_partial = [], []
    for _ in range(50):
        order = rng.permutation(10)
        shuffled = squareform(second[np.ix_(order, order)], checks=False)
        matrix = spearmanr(
            np.stack([squareform(first), shuffled, squareform(third)], axis=1)
        ).statistic
        null.append(matrix[0, 1])
        null_partial.append(correlations.partial_correlation(matrix))
    plain = mantel.mantel_test(first, second, n_permutations=50, rng=np.random.default_rng(26))
    partial = mantel.mantel_test(
        first, second, n_permutations=50, rng=np.random.default_rng(26), given=third
    )
    for result, values in ((plain, null), (partial, null_partial)):
        assert (result.null_low, result.null_high) == pytest.approx(
            tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12
        )
        b = np.sum(np.abs(values) >= abs(result.correlation))
        assert result.p_value == (1 + b) / 51


def test_partial_mantel_estimates_the_partial_rank_correlation():
    matrices = related_matrices(27, n_matrices=3)
    estimate, _ = correlations.bootstrap_correlations(matrices, np.ones((1, 20)))
    result = mantel.mantel_test(
        *matrices[:2], n_permutations=9, rng=np.random.default_rng(0), given=matrices[2]
    )
    assert result.correlation == pytest.approx(
        float(correlations.partial_correlation(estimate)), abs=1e-12
    )


def test_many_mantel_tests_are_each_the_single_one():
    second, *firsts = related_matrices(28, n_matrices=4)
    for given_ones in (None, firsts[::-1]):
        if given_ones is not None:
            given_ones[1] = second**0.5 + firsts[0]  # the middle one would be its own given
        together = mantel.mantel_tests(
            firsts, second, n_permutations=40, rng=np.random.default_rng(29), given=given_ones
        )
        for k, first in enumerate(firsts):
            alone = mantel.mantel_test(
                first,
                second,
                n_permutations=40,
                rng=np.random.default_rng(29),
                given=None if given_ones is None else given_ones[k],
            )
            assert together[k].p_value == alone.p_value
            assert together[k].correlation == pytest.approx(alone.correlation, abs=1e-12)


@pytest.mark.parametrize("partial", [False, True])
def test_mantel_p_is_uniform_under_the_null(partial):
    rng = np.random.default_rng(30)
    p_values = []
    for _ in range(300):
        first, second, third = (cloud_matrix(rng, 12) for _ in range(3))
        # Under the partial null both follow the third matrix and nothing else joins them.
        first, second = (first + third, second + third) if partial else (first, second)
        result = mantel.mantel_test(
            first, second, n_permutations=99, rng=rng, given=third if partial else None
        )
        p_values.append(result.p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) <= 0.09  # standard error 1.3 %


def test_mantel_finds_a_relation_that_is_there():
    rng = np.random.default_rng(31)
    found = [
        mantel.mantel_test(*related_matrices(seed, noise=0.4), n_permutations=99, rng=rng).p_value
        for seed in range(20)
    ]
    assert np.mean(np.array(found) <= 0.05) > 0.9


def test_mantel_counts_ties_with_the_observed_value_against_it():
    labels = np.array([0, 0, 1, 1])
    same = (labels[:, None] != labels[None, :]).astype(float)
    result = mantel.mantel_test(same, same, n_permutations=3000, rng=np.random.default_rng(32))
    assert result.correlation == pytest.approx(1)
    assert result.p_value == pytest.approx(1 / 3, abs=0.04)  # 8 of 24 orders keep the classes


def test_matrices_that_cannot_be_correlated_are_named():
    good = cloud_matrix(np.random.default_rng(33), 6)
    rng = np.random.default_rng(0)
    bad = {
        "constant": np.ones((6, 6)) - np.eye(6),
        "finite and symmetric": np.arange(36.0).reshape(6, 6),
        "of at least 3": np.zeros((2, 2)),
        "got \\(4, 6\\)": good[:4],
    }
    for match, matrix in bad.items():
        with pytest.raises(ValueError, match=match):
            correlations.rank_matrix(matrix)
        for pair in ((matrix, good), (good, matrix)):
            with pytest.raises(ValueError, match=match):
                mantel.mantel_test(*pair, n_permutations=9, rng=rng)
    with pytest.raises(ValueError, match="finite"):
        correlations.rank_matrix(np.where(np.eye(6), 0, np.nan))
    with pytest.raises(ValueError, match="one size"):
        correlations.spearman(good, good[:5, :5])
    with pytest.raises(ValueError, match="one size"):
        mantel.mantel_test(good, good[:5, :5], n_permutations=9, rng=rng)
    with pytest.raises(ValueError, match="square"):
        correlations.weighted_correlations([good[:4]], np.ones((1, 6)))
    with pytest.raises(ValueError, match="constant off its diagonal"):
        correlations.weighted_correlations([np.eye(6)], np.ones((1, 6)))
    with pytest.raises(ValueError, match=r"\[n_draws, 6\]"):
        correlations.weighted_correlations([good], np.ones((1, 5)))


@pytest.mark.parametrize("method", ["spearman", "pearson"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_mantel_s_result_says_how_it_was_made_and_one_permutation_will_do(method, alternative):
    rng = np.random.default_rng(30)
    pair = [squareform(pdist(rng.normal(size=(7, 2)))) for _ in range(2)]
    result = mantel.mantel_test(
        *pair, n_permutations=1, rng=rng, method=method, alternative=alternative
    )
    assert (result.n_permutations, result.n_items) == (1, 7)
    assert (result.method, result.alternative) == (method, alternative)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_a_permutation_that_ties_up_to_rounding_counts_against_the_observed_value(alternative):
    null = np.array([0.25 + 1e-15, 0.25 - 1e-15, 0.25])
    assert mantel.permutation_p_value(0.25, null, alternative) == 1.0


def test_three_items_are_enough_to_be_ranked():
    matrix = np.array([[0, 1, 3], [1, 0, 2], [3, 2, 0]], dtype=float)
    ranked = correlations.rank_matrix(matrix)
    assert np.array_equal(np.argsort(ranked[np.triu_indices(3, 1)]), [0, 2, 1])


def test_unknown_options_of_mantel_list_the_valid_ones():
    good = cloud_matrix(np.random.default_rng(34), 6)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'spearman' or 'pearson'; got 'kendall'"):
        mantel.mantel_test(good, good, n_permutations=9, rng=rng, method="kendall")
    with pytest.raises(ValueError, match="'greater' or 'less'; got 'more'"):
        mantel.mantel_test(good, good, n_permutations=9, rng=rng, alternative="more")
    with pytest.raises(ValueError, match="at least 1 permutation"):
        mantel.mantel_test(good, good, n_permutations=0, rng=rng)
    with pytest.raises(ValueError, match="given matrix for each"):
        mantel.mantel_tests([good, good], good, n_permutations=9, rng=rng, given=[good])


# --- what mutants showed missing -----------------------------------------------------------------


ROWS = np.ones((1, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: stats.weighted_mean(bad, ROWS),
        lambda bad: stats.bootstrap_interval(bad, ROWS),
        lambda bad: stats.bootstrap_difference(bad, [1.0, 2, 3, 4], ROWS),
        lambda bad: stats.bootstrap_difference([1.0, 2, 3, 4], bad, ROWS),
        lambda bad: stats.pair_share_bootstrap([bad], [0, 1, 2, 3], ROWS),
        lambda bad: stats.equivalence_test_mean(bad, margin=1),
        lambda bad: stats.holm(bad),
    ],
)
def test_a_missing_value_is_refused_as_one_that_is_not_finite(call):
    for missing in (None, np.nan):
        with pytest.raises(ValueError, match=r"finite|\[0, 1\]"):
            call([0.5, 0.25, missing, 0.1])


def test_the_mean_of_float32_values_is_taken_in_float64():
    values = np.float32(1e6) + np.random.default_rng(0).normal(size=5000).astype(np.float32)
    interval = stats.bootstrap_interval(values, np.ones((1, 5000)))
    assert interval.estimate == values.astype(np.float64).mean()


def test_intervals_are_of_the_level_that_was_asked_for():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 50))
    weights = stats.bootstrap_weights(50, 500, rng)
    means = (weights @ (first - second)) / 50
    for found in (
        stats.bootstrap_difference(first, second, weights, level=0.5),
        stats.bootstrap_interval(first - second, weights, level=0.5),
    ):
        assert found.level == 0.5
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.25, 0.75])))


def test_pairs_of_items_that_do_not_exist_are_refused_and_numbers_may_be_floats():
    weights = np.array([[1.0, 1.0, 2.0]])
    assert stats.pair_share_bootstrap([1.0, 0.0], [[0.0, 1.0], [1.0, 2.0]], weights)[0, 0] == (
        pytest.approx(1 / 3)
    )
    for outside in (3, -1):
        with pytest.raises(ValueError, match="do not fit"):
            stats.pair_share_bootstrap([1.0, 0.0], [[0, 1], [1, outside]], weights)


def test_a_draw_of_a_single_pair_has_a_share_and_one_of_none_has_none():
    shares = stats.pair_share_bootstrap([1.0], [[0, 1]], np.array([[1.0, 1, 2], [2.0, 0, 2]]))
    assert shares[0, 0] == 1
    assert np.isnan(shares[1, 0])


def test_tost_says_what_it_was_asked_and_on_the_margin_nothing_is_equivalent():
    draws = [*np.linspace(-1, 1, 99), None]
    found = stats.equivalence_test(0.25, draws, margin=1.5, n=12, alpha=0.1)
    assert (found.estimate, found.margin, found.alpha, found.n) == (0.25, 1.5, 0.1, 12)
    assert found.equivalent
    assert found.p_value == 1 / 100
    for side in (-0.5, 0.5):
        on_margin = stats.equivalence_test(0.0, [side] * 9, margin=0.5, n=12)
        assert not on_margin.equivalent
        assert on_margin.p_value == 1


def test_t_tost_says_what_it_was_asked_and_on_the_margin_nothing_is_equivalent():
    values = np.random.default_rng(2).normal(size=20) + 0.5
    found = stats.equivalence_test_mean(values, margin=3, alpha=0.1)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.margin, found.alpha, found.n) == (3, 0.1, 20)
    assert found.equivalent
    for sign in (1, -1):  # the mean is on either side of 0; the outer end is on the margin
        sided = stats.equivalence_test_mean(sign * values, margin=3)
        outer = max(-sided.low, sided.high)
        assert not stats.equivalence_test_mean(sign * values, margin=outer).equivalent
        between = (outer + abs(sided.estimate)) / 2  # past the mean, short of the outer end
        assert not stats.equivalence_test_mean(sign * values, margin=between).equivalent
