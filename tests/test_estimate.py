import math

import numpy as np
import pytest
from scipy.stats import beta, norm
from scipy.stats import t as student_t

from lib.science.estimate import (
    Estimate,
    Untested,
    generator,
    independent_difference,
    mean_over_units,
    means_by_unit,
    pool,
    ratio_of_sums,
    stack,
    sums_by_unit,
    unit_weights,
)


def test_the_first_draw_is_the_value_and_the_others_are_draws_with_replacement():
    weights = unit_weights("subjects", 40)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 40).all()
    assert weights[1:].var(axis=0).mean() == pytest.approx(1 - 1 / 40, abs=0.02)


def test_draws_follow_from_the_units_name_and_never_from_its_place():
    assert np.array_equal(unit_weights("a", 20), unit_weights("a", 20))
    assert not np.array_equal(unit_weights("a", 20), unit_weights("b", 20))
    assert generator("x", "y").random() == generator("x", "y").random()
    assert generator("x", "y").random() != generator("xy").random()


def test_the_mean_equals_numpys_and_each_draw_the_mean_of_the_repeated_units():
    values = np.random.default_rng(0).normal(size=(25, 3))
    found = mean_over_units(values, "texts")
    assert np.allclose(found.value, values.mean(axis=0), rtol=1e-12)
    drawn = np.repeat(values, unit_weights("texts", 25)[7].astype(int), axis=0)
    assert np.allclose(found.draws[7], drawn.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("n", [3, 5, 12, 40])
def test_the_interval_of_a_mean_covers_the_truth_at_its_level(n: int):
    rng = np.random.default_rng(n)
    hits = 0
    for number in range(400):
        found = mean_over_units(rng.normal(size=n), f"units {number} of {n}").interval()
        hits += bool(found.low <= 0 <= found.high)
    assert 0.91 <= hits / 400 <= 0.98


def test_a_large_samples_interval_is_students_and_a_small_ones_is_expanded():
    values = np.random.default_rng(1).normal(size=12)
    found = mean_over_units(values, "twelve")
    plain = np.quantile(found.draws, [0.025, 0.975])
    expanded = found.interval()
    assert expanded.low < plain[0] < plain[1] < expanded.high
    tail = norm.cdf(math.sqrt(12 / 11) * student_t.ppf(0.025, 11))
    assert expanded.low == pytest.approx(np.quantile(found.draws, tail))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_units_agree_the_interval_of_a_share_is_clopper_and_pearsons(value: float):
    found = mean_over_units(np.full(20, value), "twenty", share=True)
    interval = found.interval()
    exact = beta.ppf(0.025, 20, 1)
    assert (interval.low, interval.high) == pytest.approx(
        (exact, 1.0) if value else (0.0, 1 - exact)
    )
    assert not found.unanimous


def test_a_number_that_all_units_agree_on_is_known_to_have_no_interval():
    assert mean_over_units(np.full(20, 0.3), "twenty").unanimous
    assert not mean_over_units(np.arange(20.0), "twenty").unanimous


def test_numbers_of_equal_units_are_paired_draw_by_draw():
    rng = np.random.default_rng(2)
    common = rng.normal(size=30)
    first = mean_over_units(common + 0.01 * rng.normal(size=30), "thirty")
    second = mean_over_units(common, "thirty")
    width = np.ptp([getattr((first - second).interval(), end) for end in ("low", "high")])
    assert width < 0.05 * np.ptp([first.interval().low, first.interval().high])
    assert np.allclose(stack(first, second).draws[:, 1], second.draws)


def test_numbers_of_other_units_are_refused_with_both_names():
    first, second = (mean_over_units(np.arange(9.0), name) for name in ("apples", "pears"))
    with pytest.raises(ValueError, match=r"9 apples and over 9 pears"):
        first - second
    with pytest.raises(ValueError, match="paired"):
        independent_difference(first, first)


def test_the_difference_of_independent_numbers_covers_the_truth():
    rng = np.random.default_rng(3)
    hits = 0
    for number in range(400):
        subjects = mean_over_units(rng.normal(size=50), f"subjects {number}")
        seeds = mean_over_units(0.2 * rng.normal(size=5), f"seeds {number}")
        found = independent_difference(subjects, seeds).interval()
        hits += bool(found.low <= 0 <= found.high)
    assert 0.92 <= hits / 400 <= 0.99


def test_a_ratio_of_sums_equals_the_plain_one_in_each_draw():
    rng = np.random.default_rng(4)
    above, below = rng.random(15), rng.random(15) + 0.1
    found = ratio_of_sums(above, below, "fifteen")
    weights = unit_weights("fifteen", 15)[3]
    assert found.draws[3] == pytest.approx((weights @ above) / (weights @ below), rel=1e-12)
    assert isinstance(ratio_of_sums(above, np.zeros(15), "fifteen"), Untested)


def test_sums_and_means_go_to_the_unit_of_each_pair():
    values, unit = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], [7, 3, 7]
    assert sums_by_unit(values, unit).tolist() == [[2.0, 16.0], [5.0, 40.0]]
    assert means_by_unit(values, unit).tolist() == [[2.0, 16.0], [2.5, 20.0]]


def test_a_pooled_number_is_the_mean_of_tasks_and_its_draws_the_mean_of_theirs():
    rng = np.random.default_rng(5)
    tasks = {name: mean_over_units(rng.normal(size=n), name) for name, n in (("a", 12), ("b", 40))}
    found = pool({**tasks, "c": Untested("too few")})
    assert float(found) == pytest.approx((float(tasks["a"]) + float(tasks["b"])) / 2)
    assert np.allclose(found.draws, (tasks["a"].draws + tasks["b"].draws) / 2)
    assert (found.n_units, found.n_least) == (52, 12)
    assert pool({"c": Untested("too few")}) == Untested("c: too few")


def test_an_untested_number_stays_so_through_all_operations():
    nothing, number = Untested("no rise"), mean_over_units(np.arange(9.0), "nine")
    for found in (nothing - number, number - nothing, nothing.over([0]), nothing.map(np.mean)):
        assert found == nothing
    assert independent_difference(number, nothing) == nothing
    assert stack(number, nothing) == nothing


def test_a_function_that_is_undefined_in_a_draw_makes_the_number_untested():
    number = mean_over_units(np.r_[np.zeros(9), 1.0], "ten")
    found = number.map(lambda value: math.nan if value == 0 else 1 / value)
    assert isinstance(found, Untested)
    assert "undefined in" in found.reason
    assert float(number.map(lambda value: 2 * value)) == pytest.approx(0.2)


def test_too_few_units_and_too_few_draws_and_nan_are_told():
    assert mean_over_units([1.0, 2.0], "twins") == Untested("2 twins, at least 3 are needed")
    with pytest.raises(ValueError, match=r"over twins needs its value and two draws"):
        Estimate(np.zeros(2), "twins", 2)
    with pytest.raises(ValueError, match=r"over twins holds 1 values that are NaN"):
        Estimate(np.array([0.0, np.nan, 1.0]), "twins", 2)
    with pytest.raises(ValueError, match="3 or more"):
        unit_weights("twins", 2)


def test_a_frame_has_a_row_a_block_with_the_interval_around_the_estimate():
    frame = mean_over_units(np.random.default_rng(6).normal(size=(30, 4)), "thirty").to_frame()
    assert list(frame) == ["block", "estimate", "low", "high", "n"]
    assert ((frame["low"] < frame["estimate"]) & (frame["estimate"] < frame["high"])).all()


def test_blocks_are_averaged_within_each_draw():
    values = np.random.default_rng(7).normal(size=(30, 6))
    found = mean_over_units(values, "thirty").over(range(2, 4))
    assert float(found) == pytest.approx(values[:, 2:4].mean())
    assert isinstance(mean_over_units(values, "thirty").over([]), Untested)


def test_what_is_made_of_shares_is_no_share():
    share = mean_over_units(np.arange(12) % 2, "dozen", share=True)
    made = (share - share, share - 0.5, share.map(lambda value: value), stack(share, share))
    assert share.share and not any(one.share is not False for one in made)
    assert pool({"a": share, "b": mean_over_units(np.arange(9) % 2, "nine", share=True)}).share
    assert not pool({"a": share, "b": mean_over_units(np.arange(9.0), "nine")}).share


def test_reasons_say_what_is_missing():
    number = mean_over_units(np.r_[np.zeros(9), 1.0], "ten")
    assert (number / number).reason == "the number to divide by is zero in some draws"
    assert number.over([]).reason == "no block to take the mean over"
    n_lost = int((number.draws == 0).sum())
    both = number.map(lambda value: np.array([1.0, math.nan if value == 0 else 1 / value]))
    assert both.reason == f"undefined in {n_lost} of {len(number.draws)} draws over ten"
    assert pool({}).reason == "no task"
    assert pool({"a": Untested("x"), "b": Untested("x")}).reason == "x"
    assert pool({"a": Untested("x"), "b": Untested("y")}).reason == "a: x; b: y"


def test_a_pooled_number_names_the_units_of_all_its_tasks():
    tasks = {name: mean_over_units(np.arange(9.0), name) for name in ("b", "a")}
    assert pool(tasks).units == "a + b"


def test_the_difference_of_independent_numbers_is_that_of_their_values_and_spread_draws():
    first = mean_over_units(np.random.default_rng(1).normal(size=30), "subjects")
    second = mean_over_units(np.random.default_rng(2).normal(size=5), "seeds")
    found = independent_difference(first, second)
    assert float(found) == pytest.approx(float(first) - float(second))
    assert (found.units, found.n_units) == ("subjects against seeds", 35)

    def spread(n):
        return math.sqrt(n / (n - 1)) * student_t.ppf(0.975, n - 1) / norm.ppf(0.975)

    one = first.value + (first.draws - first.value) * spread(30)
    other = second.value + (second.draws - second.value)  # five units are spread when drawn
    assert np.allclose(found.draws[1:], (one - other)[1:], rtol=1e-4, atol=1e-5)
    level = found.interval()
    plain = np.quantile(found.draws, [0.025, 0.975])
    assert [level.low, level.high] == pytest.approx(plain, rel=1e-3)


def test_sums_over_pairs_keep_the_axes_before_them():
    values = np.random.default_rng(3).normal(size=(2, 3, 5))
    unit = np.array([0, 1, 0, 1, 1])
    found = sums_by_unit(values, unit)
    assert found.shape == (2, 2, 3)
    assert np.allclose(found[1], values[:, :, unit == 1].sum(axis=-1))
    assert np.array_equal(sums_by_unit([1, 2], [0, 0]), [3.0])


def test_numbers_are_reckoned_with_draw_by_draw():
    number = mean_over_units(np.random.default_rng(9).normal(size=20), "twenty")
    for found, expected in (
        (number - 2, number.draws - 2),
        (number + 2, number.draws + 2),
        (number * 2, number.draws * 2),
        (number / 2, number.draws / 2),
        (number * number, number.draws**2),
    ):
        assert np.allclose(found.draws, expected)
    assert number.to_frame()["n"].tolist() == [20]
