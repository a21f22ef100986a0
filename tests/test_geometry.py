import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.special import log_softmax, rel_entr, softmax

from lib.science.geometry import (
    angles,
    distances,
    jeffreys_divergence,
    log_norm_differences,
)


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(15, 8))


def test_angles_equal_arccos_of_scipys_cosines(states):
    expected = np.arccos(1 - squareform(pdist(states, "cosine")))
    assert angles(states) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 1e-3, 1.0, np.pi - 1e-6])
def test_angles_keep_their_digits_near_zero_and_pi(angle: float):
    rows = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)], [0.0, 1.0]])
    assert angles(rows)[0, 1] == pytest.approx(angle, rel=1e-7)


def test_identical_states_are_at_angle_exactly_zero(states):
    states[3] = states[7]
    assert angles(states)[3, 7] == 0.0
    assert distances(states)[3, 7] == 0.0


def test_angles_ignore_scale_and_distances_follow_it(states):
    scaled = states * np.random.default_rng(1).uniform(0.1, 10, size=(15, 1))
    assert angles(scaled) == pytest.approx(angles(states), abs=1e-9)
    assert distances(3 * states) == pytest.approx(3 * distances(states))


def test_rotation_of_the_space_changes_no_matrix(states):
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    for matrix in (angles, distances, log_norm_differences):
        assert matrix(states @ turn) == pytest.approx(matrix(states), abs=1e-9)


def test_log_norm_difference_is_the_log_of_the_ratio():
    found = log_norm_differences([[3.0, 4.0], [0.0, 10.0], [1.0, 0.0]])
    assert found[0, 1] == pytest.approx(np.log(2))


def test_matrices_are_symmetric_with_zero_diagonal(states):
    for matrix in (angles, distances, log_norm_differences, jeffreys_divergence):
        found = matrix(states)
        assert np.array_equal(found, found.T)
        assert not found.diagonal().any()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_jeffreys_divergence_is_the_sum_of_scipys_two(scale: float):
    logits = scale * np.random.default_rng(3).normal(size=(5, 40))
    p = softmax(logits, axis=1)
    expected = [[(rel_entr(x, y) + rel_entr(y, x)).sum() for x in p] for y in p]
    assert jeffreys_divergence(logits) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-12)


def test_the_jeffreys_divergence_of_two_outcomes_has_its_closed_form():
    logits = np.log([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    expected = (0.2 - 0.9) * (np.log(0.2 / 0.9) - np.log(0.8 / 0.1))
    assert jeffreys_divergence(logits)[0, 2] == pytest.approx(expected)


def test_close_predictions_keep_their_digits_and_equal_ones_are_at_exactly_zero():
    base = np.random.default_rng(4).normal(size=2000)
    shift = 1e-6 * np.random.default_rng(5).normal(size=2000)
    logits = np.stack([base, base + shift, base + 5.0, np.flip(base)])
    p = softmax(logits, axis=1)
    expected = ((p[0] - p[1]) * (log_softmax(logits[0]) - log_softmax(logits[1]))).sum()
    found = jeffreys_divergence(logits)
    assert found[0, 1] == pytest.approx(expected, rel=1e-5)
    assert found[0, 2] < 1e-12


def test_the_jeffreys_divergence_leaves_what_it_is_given_as_it_was():
    logits = torch.randn(4, 9, dtype=torch.float64)
    before = logits.clone()
    jeffreys_divergence(logits)
    assert torch.equal(logits, before)


def test_huge_logits_have_a_finite_divergence():
    assert np.isfinite(
        jeffreys_divergence(1e4 * np.random.default_rng(6).normal(size=(4, 7)))
    ).all()


@pytest.mark.parametrize("matrix", [angles, log_norm_differences])
def test_a_state_of_norm_zero_is_named(matrix, states):
    states[4] = 0.0
    with pytest.raises(ValueError, match="item 4 has norm 0"):
        matrix(states)


@pytest.mark.parametrize("matrix", [angles, distances, log_norm_differences, jeffreys_divergence])
def test_too_few_items_and_broken_values_are_one_line_errors(matrix, states):
    with pytest.raises(ValueError, match=r"at least 3|3 items or more"):
        matrix(states[:2])
    states[2, 1] = np.nan
    with pytest.raises(ValueError, match="item 2 has a NaN"):
        matrix(states)


def test_the_jeffreys_divergence_over_a_large_vocabulary_is_the_sum_over_all_of_it():
    logits = np.random.default_rng(7).normal(size=(4, 10_000)) + np.linspace(0, 5, 10_000)
    p = softmax(logits, axis=1)
    expected = [[(rel_entr(x, y) + rel_entr(y, x)).sum() for x in p] for y in p]
    assert jeffreys_divergence(logits) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-12)
    single = jeffreys_divergence(logits.astype(np.float32))
    assert single == pytest.approx(np.array(expected), rel=1e-4, abs=1e-12)


def test_many_close_states_and_predictions_keep_their_digits_pair_by_pair():
    turns = np.array([0.0, 1e-7, 3e-7, 6e-7, 1.0])
    states = np.column_stack([np.cos(turns), np.sin(turns)])
    expected = np.abs(turns[:, None] - turns[None, :])
    assert angles(states) == pytest.approx(expected, rel=1e-8)
    base, way = np.random.default_rng(8).normal(size=(2, 300))
    found = jeffreys_divergence(np.stack([base + turn * way for turn in turns]))
    p = softmax(base)
    variance = (p * way**2).sum() - (p * way).sum() ** 2  # J of a small step is its square
    assert found[:4, :4] == pytest.approx(expected[:4, :4] ** 2 * variance, rel=1e-5)


def test_errors_name_what_was_given(states):
    states[3, 0] = np.inf
    for function in (angles, distances, log_norm_differences):
        with pytest.raises(ValueError, match=r"^states: item 3"):
            function(states)
    with pytest.raises(ValueError, match=r"^states: item 1 has norm 0"):
        angles([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
