"""The metrics agree with SciPy, scikit-learn, scikit-dimension and closed forms."""

import numpy as np
import pytest
import skdim
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy as scipy_entropy
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors

from lib.science import metrics

MATRICES = [metrics.angles, metrics.distances, metrics.log_norm_differences]
STATE_FUNCTIONS = [
    *MATRICES,
    metrics.mean_cosine,
    metrics.effective_rank,
    metrics.intrinsic_dimension,
    metrics.centred,
    metrics.outlier_dimensions,
]


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(size=(40, 7)) + 0.5


def clouds(n_items=6, d_model=4):
    """States with entries of at least 0.01 in size, so that none is a zero vector."""
    numbers = st.floats(0.01, 100) | st.floats(-100, -0.01)
    return arrays(np.float64, (n_items, d_model), elements=numbers)


def test_angles_equal_arccos_of_scikit_learn_cosines(states):
    expected = np.arccos(np.clip(1 - cosine_distances(states), -1, 1))
    np.testing.assert_allclose(metrics.angles(states), expected, atol=1e-7)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-7, 1e-4, 1e-3, 0.002, 1.0, 3.0])
@pytest.mark.parametrize("supplement", [False, True])
def test_angles_keep_their_digits_near_zero_and_pi(angle, supplement):
    sign = -1 if supplement else 1
    plane = np.array([[1.0, 0.0], [sign * np.cos(angle), np.sin(angle)], [0.0, 5.0]])
    measured = metrics.angles(plane)[0, 1]
    measured = np.pi - measured if supplement else measured
    # Next to pi the distance from it is itself rounded to 4e-16.
    assert measured == pytest.approx(angle, rel=1e-8, abs=1e-15)


def test_angles_refines_every_pair_when_there_are_many():
    rng = np.random.default_rng(1)
    near = np.array([1.0, 0, 0]) + 1e-9 * rng.normal(size=(80, 3))  # 3160 pairs: two chunks
    measured = metrics.angles(near)
    across = near[:, 1:] / near[:, :1]
    np.testing.assert_allclose(measured, cdist(across, across), rtol=1e-6)


def test_identical_states_are_at_angle_and_distance_exactly_zero(states):
    twice = np.concatenate([states, states])
    for matrix in (metrics.angles(twice), metrics.distances(twice)):
        assert (np.diag(matrix, len(states)) == 0).all()
    assert (np.diag(metrics.angles(np.concatenate([states, -states])), 40) == np.pi).all()


def test_distances_equal_scipy(states):
    np.testing.assert_allclose(metrics.distances(states), squareform(pdist(states)), rtol=1e-12)


def test_log_norm_difference_is_the_log_of_the_ratio():
    rows = np.array([[3.0, 4.0], [0.0, 10.0], [1.0, 0.0]])
    expected = np.log([[1, 2, 5], [2, 1, 10], [5, 10, 1]])
    np.testing.assert_allclose(metrics.log_norm_differences(rows), expected, atol=1e-15)


@settings(max_examples=50, deadline=None)
@given(clouds(), st.floats(1e-3, 1e3))
def test_angles_ignore_scale_and_distances_follow_it(cloud, factor):
    np.testing.assert_allclose(metrics.angles(factor * cloud), metrics.angles(cloud), atol=1e-12)
    np.testing.assert_allclose(
        metrics.distances(factor * cloud), factor * metrics.distances(cloud), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        metrics.log_norm_differences(factor * cloud),
        metrics.log_norm_differences(cloud),
        atol=1e-12,
    )


@settings(max_examples=50, deadline=None)
@given(clouds(), st.permutations(range(6)))
def test_matrices_are_dissimilarities_whose_items_can_be_reordered(cloud, order):
    for measure in MATRICES:
        matrix = measure(cloud)
        assert (matrix == matrix.T).all()
        assert (np.diag(matrix) == 0).all()
        assert (matrix >= 0).all()
        np.testing.assert_allclose(
            measure(cloud[list(order)]), matrix[np.ix_(order, order)], atol=1e-12
        )
        direct = matrix[:, None, :]
        detour = matrix[:, :, None] + matrix[None, :, :]
        assert (direct <= detour + 1e-9).all()  # the triangle inequality


def test_rotation_of_the_space_changes_no_matrix(states):
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))[0]
    for measure in MATRICES:
        np.testing.assert_allclose(measure(states @ rotation), measure(states), atol=1e-12)


def test_categories_and_token_sets_have_the_closed_form():
    assert metrics.category_differences(["a", "b", "a"]).tolist() == [
        [0, 1, 0],
        [1, 0, 1],
        [0, 1, 0],
    ]
    overlap = metrics.token_set_distances([[1, 2, 2], [2, 3, 4], [9]])
    np.testing.assert_allclose(overlap, [[0, 3 / 4, 1], [3 / 4, 0, 1], [1, 1, 0]])


def test_log_probabilities_equal_scipy_and_stay_finite_at_extreme_logits():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, 50)) * np.array([[1], [10], [100], [1e4], [0]])
    logits[3, :2] = [1e4, -1e4]
    result = metrics.log_probabilities(logits.astype(np.float32))
    assert np.isfinite(result).all()
    np.testing.assert_allclose(
        result, log_softmax(logits.astype(np.float32).astype(float), axis=1), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(np.exp(result).sum(axis=1), 1, rtol=1e-12)


def test_jeffreys_divergence_of_two_categoricals_has_the_closed_form():
    p, q = 0.8, 0.3
    rows = np.log([[p, 1 - p], [q, 1 - q], [0.5, 0.5]])
    expected = (p - q) * np.log(p / q) + (q - p) * np.log((1 - p) / (1 - q))
    measured = metrics.jeffreys_divergence(rows)
    assert measured[0, 1] == pytest.approx(expected, rel=1e-12)
    # J of the Bernoulli(1 / (1 + e)) and Bernoulli(1/2): (p - 1/2)·logit(p).
    rows = metrics.log_probabilities([[0.0, 1.0], [0.0, 0.0], [5.0, 0.0]])
    closed = 1 / (1 + np.exp(-1)) - 0.5
    assert metrics.jeffreys_divergence(rows)[0, 1] == pytest.approx(closed, rel=1e-12)


def test_jeffreys_divergence_is_the_sum_of_scipys_two_divergences():
    # More columns than one chunk, so that the sum over chunks is exercised.
    logits = np.random.default_rng(4).normal(size=(6, 20_000)) * 3
    log_p = metrics.log_probabilities(logits)
    p = np.exp(log_p)
    both = [[(rel_entr(a, b) + rel_entr(b, a)).sum() for b in p] for a in p]
    np.testing.assert_allclose(metrics.jeffreys_divergence(log_p), both, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (5, 7), elements=st.floats(-1e4, 1e4)))
def test_jeffreys_divergence_is_a_symmetric_nonnegative_matrix_at_any_logits(logits):
    matrix = metrics.jeffreys_divergence(metrics.log_probabilities(logits))
    assert np.isfinite(matrix).all()
    assert (matrix >= 0).all()
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 0).all()


def test_equal_predictions_have_divergence_exactly_zero_and_close_ones_keep_their_digits():
    logits = np.random.default_rng(5).normal(size=(4, 300)) * 5
    shift = 1e-7 * np.random.default_rng(6).normal(size=(4, 300))
    log_p = metrics.log_probabilities(np.concatenate([logits, logits, logits + shift]))
    matrix = metrics.jeffreys_divergence(log_p)
    assert (np.diag(matrix, 4)[:4] == 0).all()
    # To second order J is the variance of the change of the logits under p.
    p = np.exp(log_p[:4])
    variance = (p * shift**2).sum(axis=1) - (p * shift).sum(axis=1) ** 2
    np.testing.assert_allclose(np.diag(matrix, 8)[:4], variance, rtol=1e-3)


def test_kl_divergence_and_entropy_equal_scipy():
    rng = np.random.default_rng(7)
    p, q = (metrics.log_probabilities(rng.normal(size=(4, 30)) * 2) for _ in range(2))
    np.testing.assert_allclose(
        metrics.kl_divergence(p, q), scipy_entropy(np.exp(p), np.exp(q), axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(metrics.entropy(p), scipy_entropy(np.exp(p), axis=1), rtol=1e-12)
    assert (metrics.kl_divergence(p, p) == 0).all()
    with pytest.raises(ValueError, match="one shape"):
        metrics.kl_divergence(p, q[:2])


def test_entropy_is_log_n_when_uniform_and_zero_when_certain():
    rows = metrics.log_probabilities([[0.0] * 8, [1e4] + [0.0] * 7])
    np.testing.assert_allclose(metrics.entropy(rows), [np.log(8), 0], atol=1e-15)
    assert (metrics.entropy(rows) >= 0).all()


def test_upper_triangle_orders_pairs_as_scipy_does(states):
    np.testing.assert_array_equal(metrics.upper_triangle(metrics.distances(states)), pdist(states))
    with pytest.raises(ValueError, match="square"):
        metrics.upper_triangle(np.zeros((2, 3)))


def test_mean_cosine_is_the_mean_over_pairs(states):
    expected = 1 - squareform(cosine_distances(states), checks=False).mean()
    assert metrics.mean_cosine(states) == pytest.approx(expected, rel=1e-12)
    assert metrics.mean_cosine(np.ones((5, 3)) * [[1], [2], [3], [4], [5]]) == pytest.approx(1)


def test_angular_step_is_the_planted_turn_of_each_item():
    turns = np.array([0.0, 0.3, np.pi / 2, 3.0])
    before = np.tile([[2.0, 0.0, 0.0]], (4, 1))
    after = 7 * np.stack([np.cos(turns), np.sin(turns), np.zeros(4)], axis=1)
    np.testing.assert_allclose(metrics.angular_step(before, after), turns, rtol=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        metrics.angular_step(before, after[:2])


def test_effective_rank_counts_equal_directions_and_ignores_the_mean():
    # Centred, the vertices of a cross spread evenly over all their axes.
    cross = np.concatenate([np.eye(5), -np.eye(5)]) + 100
    assert metrics.effective_rank(cross) == pytest.approx(5, rel=1e-9)
    line = np.outer(np.arange(6.0), np.ones(4))
    assert metrics.effective_rank(line) == pytest.approx(1, rel=1e-9)
    values = np.array([3.0, 1.0])  # singular values of the cloud below, shares 3/4 and 1/4
    cloud = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) * values
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert metrics.effective_rank(cloud) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_finds_a_planted_dimension(dimension):
    rng = np.random.default_rng(dimension)
    surface = rng.uniform(size=(1500, dimension)) @ rng.normal(size=(dimension, 30))
    # TwoNN's standard error is about d/√n, 2.6 %; on five dimensions the edge biases it downwards.
    assert metrics.intrinsic_dimension(surface) == pytest.approx(dimension, rel=0.12)


def test_intrinsic_dimension_equals_scikit_dimension(states):
    for cloud in (states, np.random.default_rng(8).normal(size=(100, 40))):
        expected = skdim.id.TwoNN().fit(cloud).dimension_
        assert metrics.intrinsic_dimension(cloud) == pytest.approx(expected, rel=1e-9)


def test_neighbourhood_overlap_equals_scikit_learn_neighbours(states):
    other = states + np.random.default_rng(9).normal(size=states.shape)
    near = [
        NearestNeighbors(n_neighbors=5).fit(cloud).kneighbors(return_distance=False)
        for cloud in (states, other)
    ]
    expected = [len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)]
    measured = metrics.neighbourhood_overlap(
        metrics.distances(states), metrics.distances(other), k=5
    )
    np.testing.assert_allclose(measured, expected)
    assert 0 < measured.mean() < 1


def test_neighbourhood_overlap_is_one_with_itself_and_at_chance_with_noise():
    rng = np.random.default_rng(10)
    first, second = (metrics.distances(rng.normal(size=(200, 50))) for _ in range(2))
    assert (metrics.neighbourhood_overlap(first, first, k=7) == 1).all()
    assert metrics.neighbourhood_overlap(first, second, k=20).mean() == pytest.approx(
        20 / 199, abs=0.02
    )


def test_centred_states_have_mean_zero_and_keep_distances(states):
    np.testing.assert_allclose(metrics.centred(states).mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(
        metrics.distances(metrics.centred(states)), metrics.distances(states), atol=1e-12
    )


def test_without_components_leaves_what_scikit_learns_pca_leaves(states):
    pca = PCA(n_components=2).fit(states)
    expected = states - pca.inverse_transform(pca.transform(states))
    np.testing.assert_allclose(metrics.without_components(states, 2), expected, atol=1e-10)
    np.testing.assert_allclose(metrics.without_components(states, 0), metrics.centred(states))
    with pytest.raises(ValueError, match="from 0 to 6"):
        metrics.without_components(states, 7)
    with pytest.raises(ValueError, match="all equal"):
        metrics.without_components(np.ones((4, 3)), 1)


def test_outlier_dimensions_are_the_planted_ones_even_when_one_dwarfs_the_other(states):
    wide = np.random.default_rng(11).normal(size=(60, 30))
    assert metrics.outlier_dimensions(wide).tolist() == []
    wide[:, 4] += 1000
    wide[:, 17] *= 20
    assert metrics.outlier_dimensions(wide).tolist() == [4, 17]
    np.testing.assert_array_equal(
        metrics.without_outlier_dimensions(wide), np.delete(wide, [4, 17], axis=1)
    )
    assert metrics.outlier_dimensions(wide, factor=500).tolist() == [4]


@pytest.mark.parametrize("function", STATE_FUNCTIONS)
def test_too_few_items_and_broken_values_are_one_line_errors(function, states):
    with pytest.raises(ValueError, match="at least 3 items; got 2") as caught:
        function(states[:2])
    assert "\n" not in str(caught.value)
    for bad in (np.nan, np.inf):
        broken = states.copy()
        broken[5, 2] = bad
        with pytest.raises(ValueError, match="item 5 has a NaN"):
            function(broken)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        function([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "function", [metrics.angles, metrics.log_norm_differences, metrics.mean_cosine]
)
def test_a_zero_state_is_named(function, states):
    states[3] = 0
    with pytest.raises(ValueError, match=r"^states: item 3 has norm 0"):
        function(states)


def test_equal_states_have_no_intrinsic_dimension_and_no_effective_rank(states):
    states[9] = states[4]
    with pytest.raises(ValueError, match="items 4 and 9 are equal"):
        metrics.intrinsic_dimension(states)
    with pytest.raises(ValueError, match="all equal"):
        metrics.effective_rank(np.ones((4, 3)))
    with pytest.raises(ValueError, match="equally far"):
        metrics.intrinsic_dimension(np.eye(8))
    with pytest.raises(ValueError, match="leave out 1 or more of the 5"):
        metrics.intrinsic_dimension(np.random.default_rng(0).normal(size=(5, 2)), discard=0)


def test_bad_items_and_matrices_are_named():
    with pytest.raises(ValueError, match="at least 3 items"):
        metrics.category_differences(["a", "b"])
    with pytest.raises(ValueError, match="at least 3 items"):
        metrics.token_set_distances([[1], [2]])
    with pytest.raises(ValueError, match="item 1 has no token"):
        metrics.token_set_distances([[1], [], [2]])
    with pytest.raises(ValueError, match="logits: item 1"):
        metrics.log_probabilities([[0.0, 1.0], [0.0, -np.inf]])
    with pytest.raises(ValueError, match="at least 3 items"):
        metrics.jeffreys_divergence(np.log([[0.5, 0.5], [0.5, 0.5]]))
    square = np.ones((5, 5)) - np.eye(5)
    with pytest.raises(ValueError, match="from 1 to n_items - 2 = 3; got 4"):
        metrics.neighbourhood_overlap(square, square, k=4)
    with pytest.raises(ValueError, match="one size"):
        metrics.neighbourhood_overlap(square, square[:4, :4], k=1)


BROKEN = np.array([[1.0, 2.0], [np.nan, 1.0], [2.0, 1.0]])
WHOLE = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("states", function) for function in STATE_FUNCTIONS),
        ("states", metrics.without_outlier_dimensions),
        ("log_p", metrics.jeffreys_divergence),
        ("log_p", metrics.entropy),
        ("log_p", lambda bad: metrics.kl_divergence(bad, WHOLE)),
        ("log_q", lambda bad: metrics.kl_divergence(WHOLE, bad)),
        ("states", lambda bad: metrics.angular_step(bad, WHOLE)),
        ("next_states", lambda bad: metrics.angular_step(WHOLE, bad)),
        ("first", lambda bad: metrics.neighbourhood_overlap(bad, WHOLE, k=1)),
        ("second", lambda bad: metrics.neighbourhood_overlap(WHOLE, bad, k=1)),
    ],
)
def test_an_error_names_the_argument_at_fault(name, call):
    with pytest.raises(ValueError, match=f"^{name}: item 1 has a NaN"):
        call(BROKEN)


def test_a_zero_state_is_sought_in_both_blocks_of_a_step():
    zero = WHOLE * [[1], [1], [0]]
    with pytest.raises(ValueError, match=r"^states: item 2 has norm 0"):
        metrics.angular_step(zero, WHOLE)
    with pytest.raises(ValueError, match=r"^next_states: item 2 has norm 0"):
        metrics.angular_step(WHOLE, zero)


@pytest.mark.parametrize("shift", [1e-4, 0.5])
def test_jeffreys_divergence_needs_no_second_look_at_pairs_to_keep_its_digits(monkeypatch, shift):
    """What all items share cancels; the matrix product alone is exact where it is taken out."""
    monkeypatch.setattr(metrics, "_CANCELLED", 0.0)
    rng = np.random.default_rng(12)
    logits = rng.uniform(-40, 0, size=9000) + shift * rng.normal(size=(4, 9000))
    log_p = metrics.log_probabilities(logits)
    p = np.exp(log_p)
    naive = [[((p[i] - p[j]) * (log_p[i] - log_p[j])).sum() for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(metrics.jeffreys_divergence(log_p), naive, rtol=1e-9)


def test_neighbouring_rows_that_are_close_keep_their_digits_as_all_others_do():
    logits = np.random.default_rng(13).normal(size=300) * 5
    shift = 1e-7 * np.random.default_rng(14).normal(size=300)
    log_p = metrics.log_probabilities([logits, logits + shift, logits[::-1]])
    p = np.exp(log_p[0])
    variance = (p * shift**2).sum() - (p * shift).sum() ** 2
    assert metrics.jeffreys_divergence(log_p)[0, 1] == pytest.approx(variance, rel=1e-3, abs=0)


@pytest.mark.parametrize("other", [1, 2, 3])
def test_jeffreys_divergence_of_almost_equal_items_keeps_its_digits_wherever_they_stand(other):
    rng = np.random.default_rng(21)
    log_p = metrics.log_probabilities(rng.normal(size=(4, 300)) * 3)
    log_p[other] = log_p[0] + 1e-9 * rng.normal(size=300)
    expected = ((np.exp(log_p[0]) - np.exp(log_p[other])) * (log_p[0] - log_p[other])).sum()
    assert 0 < expected < 1e-15
    measured = metrics.jeffreys_divergence(log_p)
    assert measured[0, other] == pytest.approx(expected, rel=1e-9, abs=0)
    assert measured[other, 0] == measured[0, other]


def test_rounding_makes_no_divergence_and_no_entropy_negative():
    log_p = metrics.log_probabilities(np.random.default_rng(15).normal(size=(200, 30)))
    near = log_p + 1e-16 * np.random.default_rng(16).integers(-2, 3, size=log_p.shape)
    raw = (np.exp(log_p) * (log_p - near)).sum(axis=1)
    assert (raw < 0).any()  # so that there is something to guard against
    assert (metrics.kl_divergence(log_p, near) >= 0).all()
    assert metrics.entropy([[2e-16, -1e3]]).tolist() == [0.0]  # a probability above 1 by rounding


def test_upper_triangle_of_whole_numbers_is_in_floating_point():
    found = metrics.upper_triangle([[0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert found.dtype == np.float64
    assert found.tolist() == [1, 2, 3]


def test_states_on_a_line_have_effective_rank_one_in_one_dimension_too():
    assert metrics.effective_rank([[0.0], [1.0], [3.0]]) == pytest.approx(1)
    assert metrics.effective_rank([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]) == pytest.approx(1)


def test_intrinsic_dimension_of_three_points_has_the_closed_form():
    """At 0, 1 and 3 the ratios are 3, 2 and 3/2; the largest is left out."""
    x = np.log([1.5, 2.0])
    heights = np.log([3 / 2, 3])  # -log(1 - 1/3), -log(1 - 2/3)
    expected = (x * heights).sum() / (x**2).sum()
    measured = metrics.intrinsic_dimension([[0.0], [1.0], [3.0]])
    assert measured == pytest.approx(expected, rel=1e-12)


def test_neighbourhood_overlap_takes_the_fewest_items_and_the_most_neighbours():
    line = metrics.distances([[0.0], [1.0], [3.0]])  # nearest: 1, 0, 1
    other = metrics.distances([[0.0], [2.0], [3.0]])  # nearest: 1, 2, 1
    assert metrics.neighbourhood_overlap(line, other, k=1).tolist() == [1, 0, 1]
    four = metrics.distances([[0.0], [1.0], [3.0], [7.0]])
    assert metrics.neighbourhood_overlap(four, four, k=2).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"^first must have at least 3 items"):
        metrics.neighbourhood_overlap(line[:2, :2], line, k=1)
    with pytest.raises(ValueError, match=r"^second must have at least 3 items"):
        metrics.neighbourhood_overlap(line, line[:2, :2], k=1)
    with pytest.raises(ValueError, match="from 1 to n_items - 2 = 2; got 0"):
        metrics.neighbourhood_overlap(four, four, k=0)


def test_of_neighbours_equally_far_the_first_count():
    n_items, k = 200, 7
    tied = np.ones((n_items, n_items)) - np.eye(n_items)
    by_place = np.abs(np.arange(n_items)[:, None] - np.arange(n_items)) * 0.0
    by_place += np.arange(n_items)  # each column as far as its place
    overlap = metrics.neighbourhood_overlap(tied, by_place, k=k)
    assert (overlap == 1).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_components_that_are_rounding_errors_do_not_count(rank):
    rng = np.random.default_rng(rank)
    flat = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 50))
    with pytest.raises(ValueError, match=f"from 0 to {rank - 1}, the rank"):
        metrics.without_components(flat, rank)
    assert np.abs(metrics.without_components(flat, rank - 1)).max() > 0.01


def test_an_outlier_is_more_than_five_times_the_median_dimension_at_any_scale():
    sizes = np.array([0.5, 1.0, 1.0, 5.0, 5.5])
    signs = np.array([[1.0], [-1.0], [1.0]])
    for scale in (1.0, 16.0, 1 / 16):
        rows = scale * signs * sizes
        assert metrics.outlier_dimensions(rows).tolist() == [4]
        np.testing.assert_array_equal(metrics.without_outlier_dimensions(rows), rows[:, :4])
        assert metrics.outlier_dimensions(rows, factor=4).tolist() == [3, 4]
        np.testing.assert_array_equal(
            metrics.without_outlier_dimensions(rows, factor=4), rows[:, :3]
        )
