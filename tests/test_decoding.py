"""Decoding from norms: finds what is there, and nothing where there is nothing."""

import numpy as np
import pytest

from lib.norm_code.decoding import Decoding, decode_attribute, pool_decodings, thirds
from lib.science.stats import bootstrap_weights

N = 120
RNG = np.random.default_rng


def decode(shift: float, seed: int = 0, n: int = N, **options: object) -> Decoding:
    rng = RNG(seed)
    labels = np.arange(n) % 3
    log_norms = rng.normal(size=(2, n)) + shift * labels
    options = {"groups": np.arange(n), "rng": rng, **options}
    return decode_attribute("kind", log_norms, labels, **options)  # type: ignore[arg-type]


def test_known_signal_is_decoded_as_well_as_it_can_be() -> None:
    """Three unit normals 3 apart: the best classifier is right in 0.911 of the cases."""
    accuracy = decode(3.0, n=900).accuracy()
    assert np.abs(accuracy - 0.911).max() < 0.03


def test_signal_that_is_not_monotone_is_decoded_too() -> None:
    rng = RNG(0)
    labels = np.arange(300) % 2
    log_norms = np.where(labels, rng.choice([-4.0, 4.0], 300), 0.0) + rng.normal(size=300) * 0.5
    decoding = decode_attribute("x", log_norms, labels, np.arange(300), rng=rng)
    assert decoding.accuracy()[0] > 0.95


def test_no_signal_is_significant_in_at_most_one_seed_in_twenty() -> None:
    weights = bootstrap_weights(60, 400, RNG(1))
    lows = [decode(0.0, seed, n=60).excess(weights, [0]).low for seed in range(200)]
    assert sum(low > 0 for low in lows) <= 10


def test_no_signal_in_grouped_prompts_is_significant_in_at_most_one_seed_in_twenty() -> None:
    """Twelve subjects in three templates that shift all norms: nothing to decode."""
    subjects, templates = np.tile(np.arange(12), 3), np.repeat(np.arange(3), 12)
    weights = bootstrap_weights(36, 400, RNG(1))
    found = 0
    for seed in range(200):
        rng = RNG(seed)
        log_norms = rng.normal(size=36) + 5.0 * templates
        decoding = decode_attribute("s", log_norms, subjects, templates, rng=rng, centre=True)
        found += decoding.excess(weights).low > 0
    assert found <= 10


def test_shuffled_labels_are_right_about_as_often_as_chance() -> None:
    """A little less often: what a fold has too many of, the other folds have too few of."""
    decoding = decode(3.0, n=900, n_shuffles=40)
    assert 1 / 3 - 0.03 < decoding.shuffled.mean() < 1 / 3 + 0.01


def test_one_shuffle_is_judged_as_the_labels_are_and_not_decoded() -> None:
    decoding = decode(3.0)
    weights = bootstrap_weights(N, 400, RNG(1))
    assert decoding.excess(weights).low > 0.2
    null = decoding.excess(weights, null=True)
    assert null.low < 0 < null.high
    assert null.estimate == pytest.approx((decoding.null - decoding.shuffled).mean())
    assert set(np.unique(decoding.null)) == {0, 1}
    alone = decode(3.0, n_shuffles=1)
    assert np.array_equal(alone.null, alone.shuffled)
    pooled, n_items = pool_decodings("both", [decoding, decode(0.0, seed=1)])
    assert pooled.null.shape == (2, n_items)
    assert np.array_equal(pooled.null[:, :N], decoding.null)


def test_difference_between_groups_alone_is_not_decoded() -> None:
    """Each group has its own norm and one class: only its own items could give it away."""
    rng = RNG(3)
    groups = np.repeat(np.arange(24), 10)
    labels = (groups % 2).astype(int)
    log_norms = rng.normal(size=24)[groups] + rng.normal(size=240) * 0.01
    apart = decode_attribute("k", log_norms, labels, groups, rng=RNG(0))
    leaky = decode_attribute("k", log_norms, labels, np.arange(240), rng=RNG(0))
    assert leaky.accuracy()[0] > 0.75
    assert apart.accuracy()[0] < 0.65


def test_difference_between_strata_alone_is_not_decoded() -> None:
    rng = RNG(4)
    strata = np.repeat(np.arange(4), 30)
    labels = np.where(rng.random(120) < 0.8, strata % 2, 1 - strata % 2)
    log_norms = 3.0 * (strata % 2) + rng.normal(size=120) * 0.3
    weights = bootstrap_weights(120, 300, RNG(0))
    pooled = decode_attribute("a", log_norms, labels, np.arange(120), rng=RNG(0))
    within = decode_attribute("a", log_norms, labels, np.arange(120), rng=RNG(0), strata=strata)
    assert pooled.excess(weights).low > 0.1
    assert within.excess(weights).low < 0.02


def test_shift_of_a_whole_template_is_taken_out_by_centring() -> None:
    subjects, templates = np.tile(np.arange(6), 4), np.repeat(np.arange(4), 6)
    log_norms = subjects + 50.0 * templates + RNG(0).normal(size=24) * 0.05
    options = {"rng": RNG(0), "n_folds": 4}
    plain = decode_attribute("s", log_norms, subjects, templates, **options)
    centred = decode_attribute("s", log_norms, subjects, templates, centre=True, **options)
    assert centred.accuracy()[0] > 0.6 > plain.accuracy()[0]


def test_interval_holds_the_estimate_and_mean_over_blocks_is_the_mean() -> None:
    decoding = decode(1.0)
    weights = bootstrap_weights(N, 500, RNG(1))
    curve = decoding.curve(weights)
    assert (curve["low"] <= curve["estimate"]).all() and (curve["estimate"] <= curve["high"]).all()
    assert decoding.excess(weights).estimate == pytest.approx(curve["estimate"].mean())
    assert (curve["n"] == N).all()


def test_same_generator_gives_the_same_decoding() -> None:
    first, second = decode(1.0), decode(1.0)
    assert np.array_equal(first.correct, second.correct)
    assert np.array_equal(first.shuffled, second.shuffled)


def test_pooled_decoding_averages_over_all_items_and_skips_the_untestable() -> None:
    parts = [decode(2.0, n=60), decode(0.0, n=90), decode(1.0, groups=np.zeros(N))]
    pooled, n_items = pool_decodings("kind", parts)
    assert n_items == 150 == pooled.n_items
    expected = (parts[0].correct.sum(axis=1) + parts[1].correct.sum(axis=1)) / 150
    assert np.allclose(pooled.accuracy(), expected)


def test_thirds_are_thirds() -> None:
    values = RNG(0).permutation(90)
    assert np.bincount(thirds(values)).tolist() == [30, 30, 30]
    assert thirds([5.0, 5.0, 5.0, 5.0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "groups", "log_norms", "words"),
    [
        (np.zeros(9), np.arange(9), np.arange(9.0), "one class"),
        (np.arange(9) % 3, np.zeros(9), np.arange(9.0), "one group"),
        (np.arange(4) % 2, np.arange(4), np.arange(4.0), "too few"),
        (np.arange(9), np.arange(9), np.arange(9.0), "too few"),
        (np.arange(9) % 3, np.arange(9), np.full(9, 2.7), "norms are equal"),
    ],
)
def test_what_cannot_be_decoded_is_not_testable_with_a_reason(
    labels: np.ndarray, groups: np.ndarray, log_norms: np.ndarray, words: str
) -> None:
    decoding = decode_attribute("x", log_norms, labels, groups, rng=RNG(0))
    assert not decoding.testable
    assert words in decoding.reason
    weights = bootstrap_weights(9, 20, RNG(0))
    assert decoding.curve(weights).empty
    with pytest.raises(ValueError, match="not decoded"):
        decoding.excess(weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": np.arange(N - 1)}, "one entry an item"),
        ({"strata": np.arange(3)}, "one entry an item"),
        ({"blocks": [1]}, "1 blocks are named for 2 rows"),
        ({"n_folds": 1}, "2 folds"),
        ({"n_shuffles": 0}, "1 shuffle"),
    ],
)
def test_bad_input_is_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(1.0, **options)


def test_norm_of_zero_is_named() -> None:
    with pytest.raises(ValueError, match="item 1 has a value that is not finite"):
        decode_attribute("x", [0.0, -np.inf, 1.0], [0, 1, 0], [0, 1, 2], rng=RNG(0))


def test_block_that_was_not_decoded_is_named() -> None:
    with pytest.raises(ValueError, match="not all decoded"):
        decode(1.0).excess(bootstrap_weights(N, 20, RNG(0)), [7])
