import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from lib.science import decoding
from lib.science.decoding import decoding_gain, no_surer, residuals, thirds
from lib.science.estimate import Untested, mean_over_units


def planted(signal: float, n: int = 240, n_classes: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    label = rng.integers(n_classes, size=n)
    return (signal * label + rng.normal(size=n))[:, None], label


def test_a_planted_label_is_decoded_and_noise_is_not():
    rng = np.random.default_rng(1)
    features, label = planted(2.0)
    assert float(decoding_gain(features, label, np.arange(240), "items", rng)) > 0.25
    gains = []
    for seed in range(20):
        features, label = planted(0.0, seed=seed)
        gains.append(float(decoding_gain(features, label, np.arange(240), "items", rng)))
    assert abs(np.mean(gains)) < 3 * np.std(gains) / np.sqrt(20)


def test_a_label_that_is_curved_in_the_feature_is_decoded_too():
    rng = np.random.default_rng(2)
    feature = rng.normal(size=300)
    label = (np.abs(feature) > 0.7).astype(int)
    assert float(decoding_gain(feature[:, None], label, np.arange(300), "items", rng)) > 0.2


def test_unequal_classes_are_no_information():
    rng = np.random.default_rng(3)
    label = (np.arange(400) % 10 == 0).astype(int)
    gain = decoding_gain(rng.normal(size=(400, 2)), label, np.arange(400), "items", rng)
    assert abs(float(gain)) < 0.03


def test_a_group_is_never_split_so_what_marks_the_group_does_not_help():
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(40), 5)
    mark, label = rng.normal(size=40)[group], rng.integers(2, size=40)[group]
    features = (mark + 0.01 * rng.normal(size=200))[:, None]
    apart = float(decoding_gain(features, label, group, "items", rng, strata=None))
    leaked = float(decoding_gain(features, label, np.arange(200), "items", rng))
    assert leaked > 0.1
    assert apart < 0.1


def test_labels_are_shuffled_within_strata_alone():
    rng = np.random.default_rng(5)
    stratum = np.repeat([0, 1], 150)
    label = np.where(rng.random(300) < 0.9, stratum, 1 - stratum)
    features = (stratum + 0.1 * rng.normal(size=300))[:, None]
    assert float(decoding_gain(features, label, np.arange(300), "items", rng)) > 0.3
    within = decoding_gain(features, label, np.arange(300), "items", rng, strata=stratum)
    assert abs(float(within)) < 0.05


@pytest.mark.parametrize(
    ("features", "label", "group", "reason"),
    [
        (np.ones((40, 1)), np.arange(40) % 2, np.arange(40), "the same for all items"),
        (np.arange(40.0)[:, None], np.zeros(40), np.arange(40), "one class alone"),
        (np.arange(40.0)[:, None], np.arange(40) % 5, np.arange(40), "ten a class are needed"),
        (np.arange(40.0)[:, None], np.arange(40) % 2, np.arange(40) % 4, "4 units, 5 are needed"),
    ],
)
def test_what_cannot_be_decoded_is_untested_with_the_reason(features, label, group, reason):
    found = decoding_gain(features, label, group, "items", np.random.default_rng(0))
    assert isinstance(found, Untested)
    assert reason in found.reason


def test_residuals_are_those_of_a_least_squares_fit_with_intercept():
    rng = np.random.default_rng(6)
    nuisance, values = rng.normal(size=(50, 2)), rng.normal(size=(50, 3))
    left = residuals(values, nuisance)
    assert np.abs(left.T @ np.column_stack([np.ones(50), nuisance])).max() < 1e-9
    expected = values - LinearRegression().fit(nuisance, values).predict(nuisance)
    assert left == pytest.approx(expected)


def test_thirds_are_equal_and_ordered():
    found = thirds([5.0, 1.0, 9.0, 3.0, 7.0, 2.0])
    assert found.tolist() == [1, 0, 2, 1, 2, 0]


def test_the_interval_of_a_gain_is_no_narrower_than_shuffled_labels_are_spread(monkeypatch):
    rng = np.random.default_rng(7)
    unit, label = np.repeat(np.arange(40), 3), np.tile(np.arange(3), 40)
    spread = []
    monkeypatch.setattr(decoding, "no_surer", lambda one, null: (spread.append(null), one)[1])
    features = rng.normal(size=(120, 2))
    narrow = decoding_gain(features, label, unit, "forty", np.random.default_rng(8), strata=unit)
    monkeypatch.undo()
    found = decoding_gain(features, label, unit, "forty", np.random.default_rng(8), strata=unit)
    assert found.draws.std() == pytest.approx(max(spread[0], narrow.draws.std()))
    assert found.n_units == 40


def test_draws_are_spread_to_the_nulls_where_they_are_narrower():
    plain = mean_over_units(np.random.default_rng(5).normal(0.2, 1, size=20), "twenty")
    sure = no_surer(plain, 0.0)
    assert np.allclose(sure.draws, plain.draws)
    assert (sure.units, sure.n_units, sure.n_least) == ("twenty", 20, 20)
    wide = no_surer(plain, 3 * plain.draws.std())
    assert np.allclose(wide.draws - wide.value, 3 * (plain.draws - plain.value))
    same = no_surer(mean_over_units(np.full(20, 0.25), "twenty"), 0.1)
    assert np.allclose(same.draws, 0.25)  # nothing to spread
    untested = Untested("why")
    assert no_surer(untested, 0.1) is untested


def test_the_gain_is_over_units_not_items():
    rng = np.random.default_rng(12)
    unit = np.repeat(np.arange(40), [1] * 20 + [9] * 20)
    label = rng.integers(2, size=200)
    told = np.where(unit < 20, 0, label)  # the many prompts of few units tell their label, few not
    features = (told + 0.1 * rng.normal(size=200))[:, None]
    items = decoding_gain(features, label, np.arange(200), "items", np.random.default_rng(1))
    units = decoding_gain(features, label, unit, "units", np.random.default_rng(1))
    assert units.n_units == 40 and float(units) < float(items) - 0.1


def test_one_class_and_a_constant_feature_are_named():
    rng = np.random.default_rng(6)
    feature, label = planted(1.0, n=60)
    assert decoding_gain(feature, np.zeros(60), np.arange(60), "items", rng) == Untested(
        "one class alone"
    )
    two = np.column_stack([feature[:, 0], np.ones(60)])
    same = decoding_gain(two, label, np.arange(60), "items", rng)
    assert same == Untested("a feature is the same for all items")
