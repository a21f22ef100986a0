import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from lib.science.curves import crossing, early_blocks, last_sixth, late_blocks, width


def test_blocks_of_a_model_of_thirty_are_those_of_the_registration():
    assert list(early_blocks(30)) == list(range(8, 16))
    assert list(last_sixth(30)) == [25, 26, 27, 28]
    assert list(late_blocks(30, 22.5)) == [23, 24, 25, 26, 27, 28]


@pytest.mark.parametrize("n_blocks", [4, 6, 18, 28])
def test_the_last_block_never_counts(n_blocks: int):
    assert max(last_sixth(n_blocks)) == max(late_blocks(n_blocks, 1)) == n_blocks - 2
    assert len(last_sixth(n_blocks)) >= 1


def test_too_shallow_models_and_transitions_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least 4 blocks"):
        early_blocks(3)
    with pytest.raises(ValueError, match="from 0 to 28; got 29"):
        late_blocks(30, 29)


def test_the_width_of_a_straight_rise_is_four_fifths_of_its_length():
    rise = np.r_[np.zeros(5), np.linspace(0, 1, 11), np.ones(5)]
    assert width(rise, rising=True) == pytest.approx(8.0)
    assert width(1 - rise, rising=False) == pytest.approx(8.0)


def test_a_step_between_two_blocks_is_four_fifths_of_a_block_wide():
    assert width([1, 1, 1, 0, 0], rising=False) == pytest.approx(0.8)


def test_the_width_is_that_of_the_isotonic_regression_and_not_of_the_noise():
    rng = np.random.default_rng(0)
    curve = np.r_[np.zeros(10), np.linspace(0, 1, 9), np.ones(10)] + 0.05 * rng.normal(size=29)
    fit = IsotonicRegression().fit_transform(np.arange(29), curve)
    low, high = fit[0] + 0.1 * np.ptp(fit), fit[0] + 0.9 * np.ptp(fit)
    fine = np.interp(np.linspace(0, 28, 280_001), np.arange(29), fit)
    reached = [np.argmax(fine >= level) / 10_000 for level in (low, high)]
    assert width(curve, rising=True) == pytest.approx(reached[1] - reached[0], abs=1e-3)


def test_a_curve_without_rise_has_no_width():
    assert np.isnan(width(np.full(9, 0.5), rising=True))
    assert np.isnan(width(np.linspace(1, 0, 9), rising=True))


def test_curves_cross_where_straight_lines_between_blocks_do():
    assert crossing([1, 1, 0.8, 0, 0], [0, 0, 0.2, 1, 1]) == pytest.approx(2 + 0.6 / 1.6)
    assert np.isnan(crossing([1, 1, 1], [0, 0, 0.5]))
    assert np.isnan(crossing([0, 0, 0], [0.5, 0.5, 1]))


@pytest.mark.parametrize(
    ("n_blocks", "expected"),
    [
        (4, [2]),
        (6, [4]),
        (7, [5]),
        (12, [10]),
        (13, [10, 11]),
        (18, [15, 16]),
        (28, [23, 24, 25, 26]),
    ],
)
def test_the_last_sixth_is_rounded_up_and_leaves_the_last_block_out(n_blocks, expected):
    assert list(last_sixth(n_blocks)) == expected


def test_late_blocks_may_begin_with_the_first_and_may_be_one():
    assert list(late_blocks(6, 0)) == [0, 1, 2, 3, 4]
    assert list(late_blocks(6, 0.5)) == [1, 2, 3, 4]
    assert list(late_blocks(6, 4)) == [4]
    for outside in (-0.1, 4.1):
        with pytest.raises(ValueError, match="from 0 to 4"):
            late_blocks(6, outside)


def test_the_width_runs_from_a_tenth_to_nine_tenths_of_the_change_from_first_to_last():
    assert width([0, 0.1, 0.5, 0.9, 1], rising=True) == pytest.approx(2)
    assert width([0.3, 0.4, 0.8, 1.2, 1.3], rising=True) == pytest.approx(2)
    assert width([0, 0.05], rising=True) == pytest.approx(0.8)  # just a change
    assert np.isnan(width([0, 0.049], rising=True))


def test_curves_cross_between_the_first_two_blocks_and_the_last_two_and_not_by_touching():
    assert crossing([1, 0, 0], [0, 1, 1]) == pytest.approx(0.5)
    assert crossing([1, 1, 0], [0, 0, 1]) == pytest.approx(1.5)
    assert crossing([1, 0.5, 0], [0, 0.5, 1]) == pytest.approx(1)
    assert np.isnan(crossing([0.5, 0.5, 0], [0.5, 0.5, 1]))
    assert np.isnan(crossing([1, 1, 0.5], [0, 0, 0.5]))
