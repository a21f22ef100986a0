import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kstest, rankdata, spearmanr
from skbio.stats.distance import mantel

from lib.science.correlation import (
    correlate,
    mantel_tests,
    partial_correlation,
    rank_matrix,
    weighted_correlations,
)
from lib.science.estimate import Untested, unit_weights


def cloud(seed: int, n: int = 12, d: int = 4) -> np.ndarray:
    return squareform(pdist(np.random.default_rng(seed).normal(size=(n, d))))


def upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]


def test_the_correlation_is_scipys_over_pairs_at_each_block():
    firsts, second = [cloud(0), cloud(1)], cloud(2)
    found = correlate(firsts, second, "twelve")
    expected = [spearmanr(upper(first), upper(second))[0] for first in firsts]
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_a_draw_counts_a_pair_as_often_as_both_its_items_are_drawn():
    first, second = rank_matrix(cloud(4)), rank_matrix(cloud(5))
    weights = unit_weights("twelve", 12)[9]
    i, j = np.triu_indices(12, 1)
    count = weights[i] * weights[j]
    x, y = (upper(matrix) - np.average(upper(matrix), weights=count) for matrix in (first, second))
    expected = (count * x * y).sum() / np.sqrt((count * x**2).sum() * (count * y**2).sum())
    found = correlate([cloud(4)], cloud(5), "twelve")
    assert found.draws[9, 0] == pytest.approx(expected, rel=1e-9)


def test_the_value_is_the_same_with_few_draws():
    firsts, second, given = [cloud(0), cloud(1)], cloud(2), [cloud(3), cloud(4)]
    few, many = (correlate(firsts, second, "twelve", given=given, n_draws=n) for n in (2, 1000))
    assert (len(few.draws), len(many.draws)) == (3, 1001)
    np.testing.assert_allclose(few.value, many.value, rtol=1e-12)


def test_the_partial_correlation_is_that_of_rank_residuals():
    first, second, given = cloud(0), cloud(1), cloud(2) + cloud(0)
    design = np.column_stack([np.ones(66), rankdata(upper(given))])
    residuals = []
    for matrix in (first, second):
        ranks = rankdata(upper(matrix))
        residuals.append(ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0])
    found = correlate([first], second, "twelve", given=[given])
    assert found.value[0] == pytest.approx(np.corrcoef(residuals)[0, 1], abs=1e-9)


def test_given_matrices_of_each_block_are_taken_out_at_their_block():
    firsts, second, given = [cloud(0), cloud(1)], cloud(2), [cloud(3), cloud(4)]
    both = correlate(firsts, second, "twelve", given=given)
    alone = [
        correlate([f], second, "twelve", given=[g]).value[0]
        for f, g in zip(firsts, given, strict=True)
    ]
    assert both.value == pytest.approx(alone)


def test_the_interval_over_items_covers_the_true_correlation():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(1500, 3))
    noisy = whole + 0.7 * rng.normal(size=whole.shape)
    truth = spearmanr(pdist(whole), pdist(noisy))[0]
    hits = 0
    for number in range(150):
        rows = rng.choice(1500, 40, replace=False)
        firsts, second = [squareform(pdist(whole[rows]))], squareform(pdist(noisy[rows]))
        found = correlate(firsts, second, f"forty {number}").interval()
        hits += bool(found.low[0] <= truth <= found.high[0])
    assert hits / 150 >= 0.88  # binomial noise of 150 and the pairs' finite sample


def test_what_cannot_be_correlated_is_untested_with_the_reason():
    flat = np.ones((12, 12)) - np.eye(12)
    assert (
        "equally far from each other at block 1"
        in correlate([cloud(0), flat], cloud(1), "texts").reason
    )
    assert correlate([cloud(0, n=2)], cloud(1, n=2), "texts") == Untested(
        "2 texts, at least 3 are needed"
    )
    assert "undefined" in correlate([cloud(0)], cloud(1), "texts", given=[cloud(0)]).reason


def test_matrices_that_are_no_dissimilarities_are_refused():
    with pytest.raises(ValueError, match="finite and symmetric"):
        correlate([np.triu(cloud(0))], cloud(1), "texts")
    with pytest.raises(ValueError, match="one number of items"):
        correlate([cloud(0)], cloud(1, n=13), "texts")
    with pytest.raises(ValueError, match="constant"):
        mantel_tests(
            [np.zeros((4, 4))], cloud(0, n=4), n_permutations=3, rng=np.random.default_rng(0)
        )


def test_a_matrix_constant_within_a_draw_has_no_correlation_there():
    block = np.ones((6, 6)) - np.eye(6)
    block[5, :5] = block[:5, 5] = 2.0
    matrices = [rank_matrix(block), rank_matrix(cloud(0, n=6))]
    found = weighted_correlations(matrices, np.array([[2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1.0]]))
    assert np.isnan(found[0, 0, 1])
    assert np.isfinite(found[1, 0, 1])


def test_one_given_variable_has_the_closed_form():
    r = np.array([[1, 0.5, 0.3], [0.5, 1, 0.2], [0.3, 0.2, 1]])
    expected = (0.5 - 0.3 * 0.2) / np.sqrt((1 - 0.09) * (1 - 0.04))
    assert partial_correlation(r) == pytest.approx(expected)


def test_mantels_test_agrees_with_scikit_bio():
    first, second = cloud(0), cloud(0) + 0.5 * cloud(1)
    _, p, _ = mantel(first, second, method="spearman", permutations=4999, seed=1)
    (found,) = mantel_tests([first], second, n_permutations=4999, rng=np.random.default_rng(0))
    assert found == pytest.approx(p, abs=0.02)


def test_mantels_p_is_uniform_under_the_null():
    rng = np.random.default_rng(2)
    p = [
        mantel_tests([cloud(2 * k, n=9)], cloud(2 * k + 1, n=9), n_permutations=99, rng=rng)[0]
        for k in range(200)
    ]
    assert kstest(p, "uniform").pvalue > 0.01


def test_mantels_p_counts_both_sides_and_the_observed_among_the_permutations():
    first, second = cloud(3), cloud(4)
    found, same = mantel_tests(
        [first, second], second, n_permutations=40, rng=np.random.default_rng(5)
    )
    rng = np.random.default_rng(5)
    upper = np.triu_indices(12, 1)
    null = []
    for _ in range(40):
        order = rng.permutation(12)
        null.append(spearmanr(first[upper], second[np.ix_(order, order)][upper]).statistic)
    observed = spearmanr(first[upper], second[upper]).statistic
    beyond = np.sum(np.abs(null) >= abs(observed) - 1e-12)
    assert beyond > 0 and (np.array(null) < 0).any()
    assert found == pytest.approx((1 + beyond) / 41)
    assert same == pytest.approx(1 / 41)


@pytest.mark.parametrize("broken", [np.zeros(9), np.zeros((3, 4)), np.zeros((2, 2))])
def test_what_is_no_square_of_three_is_refused_with_its_shape(broken):
    with pytest.raises(ValueError, match="n of at least 3; got"):
        rank_matrix(broken)


def test_three_items_are_ranked_and_two_that_agree_are_not_all():
    matrix = squareform([1.0, 1.0, 2.0])
    assert rank_matrix(matrix)[0] == pytest.approx([0.0, -np.sqrt(0.5), -np.sqrt(0.5)])
    assert rank_matrix(squareform([1.0, 2.0, 2.0])) is not None
    assert rank_matrix(squareform([1.0, 1.0, 1.0])) is None


def test_ranks_are_standardised_over_the_pairs_that_count_and_zero_elsewhere():
    off = ~np.eye(12, dtype=bool)
    found = rank_matrix(0.01 * cloud(0))
    assert (found[off].mean(), found[off].std()) == pytest.approx((0, 1))
    among = np.arange(12)[:, None] % 5 != np.arange(12) % 5
    found = rank_matrix(cloud(0), among)
    assert (found[among].mean(), found[among].std()) == pytest.approx((0, 1))
    assert not found[~among].any()
    assert rank_matrix(cloud(0), np.zeros((12, 12), dtype=bool)) is None
    for wrong in (off[:11, :11], np.triu(off), ~np.zeros((12, 12), dtype=bool)):
        with pytest.raises(ValueError, match="symmetric, of different items"):
            rank_matrix(cloud(0), wrong)


def test_the_pairs_that_count_are_weighted_in_each_draw():
    among = np.arange(12)[:, None] % 5 != np.arange(12) % 5
    found = correlate([cloud(0)], cloud(1), "twelve", among=among)
    pairs = np.triu_indices(12, 1)
    kept = among[pairs]
    ranks = [rankdata(upper(cloud(seed))[kept]) for seed in (0, 1)]
    i, j = (side[kept] for side in pairs)
    for draw in (0, 9):
        weights = unit_weights("twelve", 12)[draw]
        covariance = np.cov(ranks, aweights=weights[i] * weights[j])
        expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert found.draws[draw, 0] == pytest.approx(expected, rel=1e-9)


def test_the_correlation_over_items_names_its_units():
    reason = correlate([cloud(0, n=3)], cloud(1, n=3), "three").reason
    assert reason == "a correlation at block 0 is undefined in some draws of three"
    found = correlate([cloud(0)], cloud(1), "twelve")
    assert (found.units, found.n_units) == ("twelve", 12)


def test_what_blocks_share_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[str] = []
    einsum = np.einsum
    monkeypatch.setattr(np, "einsum", lambda *given: sums.append(given[0]) or einsum(*given))
    firsts, shared = [cloud(0), cloud(1), cloud(2)], cloud(3)
    found = correlate(firsts, shared, "twelve")
    assert len(sums) == 3 + 1 + 3 + 1 + 3  # means, squares and products
    alone = [correlate([one], shared, "twelve").draws[:, 0] for one in firsts]
    assert np.array_equal(found.draws, np.stack(alone, axis=1))
