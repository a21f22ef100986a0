"""Geometry against predictions over depth: measured right, compared right, judged right."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from lib.angular_code import angular, angular_views, depth, geometry
from lib.angular_code.geometry import Geometry, Items, items_of_texts, measure_geometry, task_items
from lib.engine.extraction import extract_residuals
from lib.engine.models import Decoder
from lib.evidence.tasks import PROMPT_COLUMNS, Task, load_contexts
from lib.evidence.verdicts import claim_verdict
from lib.science import divergences, metrics
from lib.science.divergences import jeffreys_of_logits, lens_divergences
from lib.science.mantel import mantel_test
from lib.science.stats import bootstrap_weights

N_BLOCKS = 6
UPPER = np.triu_indices


def make_items(n: int, n_strata: int = 1, task: str = "planted") -> Items:
    names = [f"{s}/{u}" for s in range(n_strata) for u in range(n)]
    return Items(
        task=task,
        texts=tuple(names),
        tokens=tuple((k, 1, 2 + k % 2) for k in range(len(names))),
        strata=np.repeat(np.arange(n_strata), n),
        units=np.tile(np.arange(n), n_strata),
        labels=tuple(names),
    )


def make_geometry(
    rng: np.random.Generator, n: int = 20, *, n_strata: int = 1, untrained: bool = False
) -> Geometry:
    """Random states, and a random J that has nothing to do with them."""
    items = make_items(n, n_strata)
    states = rng.normal(size=(N_BLOCKS, items.n_items, 12)).astype(np.float32)
    random = [metrics.distances(rng.normal(size=(items.n_items, 4))) for _ in range(N_BLOCKS + 1)]
    return Geometry(
        items=items,
        model="planted",
        untrained=untrained,
        states=states,
        angle=np.stack([metrics.angles(block) for block in states]),
        distance=np.stack([metrics.distances(block) for block in states]),
        norm=np.stack([metrics.log_norm_differences(block) for block in states]),
        lens=np.stack([*random[1:-1], random[0], random[0]]),
        prediction=random[0],
        predicted=np.arange(items.n_items),
    )


def correlate(found: Geometry, n_draws: int = 50, **options: object) -> depth.DepthCorrelations:
    weights = bootstrap_weights(found.items.n_units, n_draws, np.random.default_rng(3))
    return depth.correlate_with_predictions(found, weights, **options)  # type: ignore[arg-type]


def noisy(rng: np.random.Generator, matrix: np.ndarray, amount: float) -> np.ndarray:
    noise = rng.normal(size=matrix.shape) * amount * matrix[matrix > 0].std()
    result = np.abs(matrix + (noise + noise.T))
    np.fill_diagonal(result, 0)
    return result


# --- divergence ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 3.0, 40.0]))
def test_jeffreys_of_logits_equals_that_of_log_probabilities(seed: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(5, 9001)) * scale
    expected = metrics.jeffreys_divergence(metrics.log_probabilities(logits))
    np.testing.assert_allclose(jeffreys_of_logits(logits), expected, rtol=1e-9, atol=1e-9)


def test_jeffreys_of_logits_has_the_closed_form_of_two_outcomes() -> None:
    p, q, r = 0.7, 0.2, 0.5
    found = jeffreys_of_logits(np.log([[p, 1 - p], [q, 1 - q], [r, 1 - r]]))
    closed = (p - q) * (np.log(p / q) - np.log((1 - p) / (1 - q)))
    assert found[0, 1] == pytest.approx(closed, rel=1e-12)
    assert (found == found.T).all()


def test_jeffreys_of_equal_predictions_is_exactly_zero_whatever_their_logits_sum_to() -> None:
    row = np.random.default_rng(0).normal(size=50_000).astype(np.float32) * 30
    found = jeffreys_of_logits(np.stack([row, row, -row]))
    assert found[0, 1] == 0.0
    shifted = np.stack([row[:100], row[:100] + 2.0, -row[:100]]).astype(np.float64)
    assert jeffreys_of_logits(shifted)[0, 1] == pytest.approx(0, abs=1e-9)


def test_jeffreys_of_huge_logits_is_finite() -> None:
    found = jeffreys_of_logits(np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]]))
    assert np.isfinite(found).all()
    assert found[0, 1] == pytest.approx(4e4)


def test_jeffreys_of_close_predictions_keeps_its_digits_between_any_two_rows() -> None:
    """To second order J is the variance under p of the change of the logits."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=300) * 5 + 30
    shifts = 1e-7 * rng.normal(size=(3, 300))
    found = jeffreys_of_logits(logits + shifts)
    p = np.exp(metrics.log_probabilities(logits[None]))[0]
    for i, j in itertools.combinations(range(3), 2):
        shift = shifts[i] - shifts[j]
        variance = (p * shift**2).sum() - (p * shift).sum() ** 2
        assert found[i, j] == found[j, i] == pytest.approx(variance, rel=1e-3, abs=0)


@pytest.mark.parametrize("other", [1, 2, 3])
def test_jeffreys_of_two_close_predictions_among_others_keeps_its_digits(other: int) -> None:
    rng = np.random.default_rng(21)
    logits = rng.normal(size=(4, 300)) * 3
    logits[other] = logits[0] + 1e-9 * rng.normal(size=300)
    log_p = metrics.log_probabilities(logits)
    expected = ((np.exp(log_p[0]) - np.exp(log_p[other])) * (log_p[0] - log_p[other])).sum()
    found = jeffreys_of_logits(logits)
    assert found[0, other] == found[other, 0] == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_jeffreys_of_logits_leaves_what_it_is_given_as_it_was(kind: type) -> None:
    logits = np.random.default_rng(2).normal(size=(4, 50)).astype(kind)
    before = logits.copy()
    jeffreys_of_logits(logits)
    assert np.array_equal(logits, before)


def test_jeffreys_of_logits_needs_no_second_look_where_rows_share_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What all rows share cancels; the matrix product alone is exact where it is taken out."""
    rng = np.random.default_rng(2)
    logits = rng.uniform(-40, 0, size=9000) + 1e-4 * rng.normal(size=(4, 9000))
    expected = metrics.jeffreys_divergence(metrics.log_probabilities(logits))
    monkeypatch.setattr(divergences, "_CANCELLED", 0.0)
    np.testing.assert_allclose(jeffreys_of_logits(logits), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((2, 5)), "3 items or more"),
        (np.array([[0.0, 1], [np.nan, 1], [2, 1]]), "item 1 has a NaN"),
        (np.array([[0.0, 1], [1, 1], [np.inf, 1]]), "item 2 has a NaN or infinite"),
    ],
)
def test_bad_logits_are_refused_by_item(logits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jeffreys_of_logits(logits)


# --- measuring -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(5)
    return [" ".join(f"w{k}" for k in rng.integers(3, 60, size=length)) for length in (3, 5, 4) * 4]


def naive_states(decoder: Decoder, tokens: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """One prompt at a time, by a hook on each block that keeps the last token's state."""
    kept: list[np.ndarray] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor | tuple) -> None:
        state = output[0] if isinstance(output, tuple) else output
        kept.append(state[0, -1].double().numpy())

    handles = [block.register_forward_hook(keep) for block in decoder.blocks]
    with torch.inference_mode():
        logits = decoder.model(torch.tensor([list(tokens)])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return kept, logits.double().numpy()


def test_every_matrix_equals_a_plain_recompute_pair_by_pair(
    llama: Decoder, texts: list[str]
) -> None:
    items = items_of_texts(llama, texts, labels=texts)
    found = measure_geometry(llama, items)
    runs = [naive_states(llama, tokens) for tokens in items.tokens]
    assert found.angle.shape == (llama.n_blocks, len(texts), len(texts))
    for block, i, j in itertools.product(range(llama.n_blocks), (0, 4), (1, 7)):
        x, y = runs[i][0][block], runs[j][0][block]
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        # float32 states: about six digits.
        assert found.angle[block, i, j] == pytest.approx(np.arccos(cosine), abs=1e-4)
        assert found.distance[block, i, j] == pytest.approx(np.linalg.norm(x - y), rel=1e-4)
        ratio = abs(np.log(np.linalg.norm(x) / np.linalg.norm(y)))
        assert found.norm[block, i, j] == pytest.approx(ratio, abs=1e-4)
    p, q = (metrics.log_probabilities(runs[k][1][None])[0] for k in (0, 1))
    jeffreys = ((np.exp(p) - np.exp(q)) * (p - q)).sum()
    assert found.prediction[0, 1] == pytest.approx(jeffreys, rel=1e-4)
    assert found.predicted.tolist() == [int(run[1].argmax()) for run in runs]


def test_the_lens_of_the_last_block_is_the_prediction_and_no_other_blocks_is(
    decoder: Decoder, texts: list[str]
) -> None:
    found = measure_geometry(decoder, items_of_texts(decoder, texts, labels=texts))
    np.testing.assert_allclose(found.lens[-1], found.prediction, rtol=1e-3, atol=1e-5)
    for block in range(found.n_blocks - 1):
        assert not np.allclose(found.lens[block], found.prediction, rtol=0.01)


def test_the_lens_is_computed_block_by_block_in_order(llama: Decoder, texts: list[str]) -> None:
    items = items_of_texts(llama, texts, labels=texts)
    states = extract_residuals(llama, items.tokens).states
    reverse = lens_divergences(llama, list(states.flip(0)))
    np.testing.assert_array_equal(reverse[::-1], lens_divergences(llama, list(states)))


def test_a_described_lens_shows_its_progress_and_finds_the_same(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = torch.randn(3, 4, llama.d_model, generator=torch.Generator().manual_seed(1))
    shown = []

    def track(parts: Sequence[object], description: str) -> Sequence[object]:
        shown.append((len(parts), description))
        return parts

    monkeypatch.setattr(divergences, "track", track)
    quiet = lens_divergences(llama, list(states))
    assert shown == []
    told = lens_divergences(llama, list(states), description="logit lens")
    assert shown == [(1, "logit lens")]
    np.testing.assert_array_equal(quiet, told)


def test_too_few_and_too_short_texts_are_refused(llama: Decoder) -> None:
    with pytest.raises(ValueError, match="2 items; three at least"):
        measure_geometry(llama, items_of_texts(llama, ["w1 w2", "w3 w4"], labels="ab"))
    with pytest.raises(ValueError, match="'w3' is one token; position 0"):
        measure_geometry(llama, items_of_texts(llama, ["w1 w2", "w3", "w4 w5"], labels="abc"))


def test_contexts_that_are_all_alike_are_not_testable_and_give_no_number(llama: Decoder) -> None:
    items = items_of_texts(llama, ["w1 w2 w3"] * 4, labels="abcd")
    found = {"contexts": measure_geometry(llama, items)}
    assert not found["contexts"].angle.any()  # Identical states: θ = 0, not NaN.
    correlations, reasons = angular.correlate_sets(found, n_draws=10, seed=0)
    assert not correlations
    assert "constant" in reasons["contexts"]


# --- items ---------------------------------------------------------------------------------------


def make_task() -> Task:
    rows = [
        (template, f"s{k}", f"a{k}", "", f"t{template} s{k} is", [9, k, 8 + template], 1, k)
        for template in range(3)
        for k in range(7)
    ]
    prompts = pd.DataFrame(rows, columns=list(PROMPT_COLUMNS))
    return Task("seven", prompts, tuple(f"a{k}" for k in range(7)), np.arange(7))


def test_only_correct_prompts_of_templates_with_enough_of_them_are_compared() -> None:
    correct = np.ones(21, dtype=bool)
    correct[[0, 7, 8, 9]] = False  # One wrong in template 0, three in template 1: four are left.
    items = task_items(make_task(), correct)
    assert items.n_items == 6 + 7
    assert np.unique(items.strata).tolist() == [0, 2]
    assert "t0 s0 is" not in items.texts


def test_prompts_of_one_subject_are_one_unit() -> None:
    items = task_items(make_task(), np.ones(21, dtype=bool))
    assert items.n_units == 7
    for unit in range(7):
        assert len({items.labels[k] for k in np.flatnonzero(items.units == unit)}) == 1


def test_a_task_with_too_few_prompts_says_so() -> None:
    with pytest.raises(ValueError, match="fewer than 5 correctly answered"):
        task_items(make_task(), np.arange(21) < 4)


def test_contexts_take_equal_parts_of_every_kind(llama: Decoder) -> None:
    items = geometry.context_items(llama, 24)
    assert set(pd.Series(items.labels).value_counts()) == {2}
    assert geometry.context_items(llama).n_items == len(load_contexts())
    places = load_contexts().groupby("kind")["context"].agg(list)
    chosen = [
        places[kind].index(text) for kind, text in zip(items.labels, items.texts, strict=True)
    ]
    assert max(chosen) >= len(places.iloc[0]) / 3  # Not the first ones alone.
    with pytest.raises(ValueError, match="There are 480 contexts; 100000 were asked for"):
        geometry.context_items(llama, 100_000)


def test_selecting_items_keeps_every_matrix_in_step() -> None:
    found = make_geometry(np.random.default_rng(0), 8, n_strata=2)
    kept = np.arange(16) % 3 != 0
    part = found.select(kept)
    np.testing.assert_array_equal(part.angle[2], found.angle[2][kept][:, kept])
    np.testing.assert_array_equal(part.prediction, found.prediction[kept][:, kept])
    np.testing.assert_array_equal(part.states, found.states[:, kept])
    assert part.items.labels == tuple(np.array(found.items.labels)[kept])


# --- correlations --------------------------------------------------------------------------------


def test_the_estimate_is_the_mean_of_scipys_spearman_over_templates() -> None:
    found = make_geometry(np.random.default_rng(1), 9, n_strata=3)
    result = correlate(found)
    for name, matrix in (("angle", found.angle), ("distance", found.distance)):
        for block in (0, 3, 5):
            expected = []
            for stratum in range(3):
                rows = np.flatnonzero(found.items.strata == stratum)
                pairs = (rows[UPPER(9, 1)[0]], rows[UPPER(9, 1)[1]])
                expected.append(spearmanr(matrix[block][pairs], found.prediction[pairs])[0])
            assert result.values[name][0, block] == pytest.approx(np.mean(expected), abs=1e-12)


def test_pairs_of_different_templates_never_count() -> None:
    rng = np.random.default_rng(2)
    found = make_geometry(rng, 8, n_strata=2)
    across = found.items.strata[:, None] != found.items.strata[None, :]
    changed = np.where(across, noisy(rng, found.prediction, 3.0) + 50, found.prediction)
    before, after = correlate(found), correlate(dataclasses.replace(found, prediction=changed))
    for name in before.values:
        np.testing.assert_array_equal(before.values[name], after.values[name])


def test_the_increment_is_the_correlation_of_rank_residuals() -> None:
    rng = np.random.default_rng(3)
    found = make_geometry(rng, 15)
    found = dataclasses.replace(found, prediction=noisy(rng, found.angle[2] + found.lens[2], 0.3))
    theta, lens, j = (
        rankdata(matrix[UPPER(15, 1)])
        for matrix in (found.angle[2], found.lens[2], found.prediction)
    )
    design = np.stack([np.ones_like(lens), lens]).T
    residuals = [y - design @ np.linalg.lstsq(design, y, rcond=None)[0] for y in (theta, j)]
    expected = np.corrcoef(*residuals)[0, 1]
    result = correlate(found).values["angle beyond the lens"][0, 2]
    assert result == pytest.approx(expected, abs=1e-10)


def test_a_draw_weighs_all_prompts_of_a_unit_together() -> None:
    found = make_geometry(np.random.default_rng(4), 10, n_strata=2)
    without = np.array([[0.0, *[1.0] * 9], [1.0] * 10])
    result = depth.correlate_with_predictions(found, without)
    expected = []
    for stratum in range(2):
        rows = np.flatnonzero(found.items.strata == stratum)
        square = np.ix_(rows, rows)
        ranks = [np.zeros((10, 10)), np.zeros((10, 10))]
        for rank, matrix in zip(ranks, (found.angle[1], found.prediction), strict=True):
            rank[UPPER(10, 1)] = rankdata(matrix[square][UPPER(10, 1)])
        inner = [rank[1:, 1:][UPPER(9, 1)] for rank in ranks]
        expected.append(np.corrcoef(*inner)[0, 1])
    assert result.values["angle"][1, 1] == pytest.approx(np.mean(expected), abs=1e-10)
    assert result.values["angle"][2] == pytest.approx(result.values["angle"][0])


def test_the_order_of_items_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    found = make_geometry(rng, 12)
    order = rng.permutation(12)
    square = np.ix_(order, order)
    shuffled = dataclasses.replace(
        found,
        angle=np.stack([block[square] for block in found.angle]),
        prediction=found.prediction[square],
    )
    np.testing.assert_allclose(
        correlate(found).values["angle"][0], correlate(shuffled).values["angle"][0], atol=1e-12
    )


def test_given_the_lens_the_last_block_is_undefined_and_no_table_shows_a_nan() -> None:
    result = correlate(make_geometry(np.random.default_rng(6)))
    frame = result.to_frame()
    assert frame.notna().all().all()
    blocks = frame[frame["curve"] == "angle beyond the lens"]["block"]
    assert blocks.tolist() == list(range(N_BLOCKS - 1))
    assert (frame["low"] <= frame["high"]).all()
    with pytest.raises(ValueError, match="undefined at one of the blocks"):
        result.mean("angle beyond the lens", [N_BLOCKS - 2, N_BLOCKS - 1])


def test_planted_code_is_beyond_the_lens_and_what_the_lens_says_is_not() -> None:
    rng = np.random.default_rng(7)
    found = make_geometry(rng, 40)
    learned = dataclasses.replace(found, prediction=noisy(rng, found.angle[2], 0.4))
    lens = found.lens.copy()
    lens[2] = noisy(rng, found.angle[2], 0.05)
    given_away = dataclasses.replace(found, lens=lens, prediction=noisy(rng, lens[2], 0.4))
    for one, low, high in ((learned, 0.5, 1.0), (given_away, -0.2, 0.2)):
        values = correlate(one).values
        assert values["angle"][0, 2] > 0.5
        assert low < values["angle beyond the lens"][0, 2] < high


def test_a_constant_matrix_is_refused_with_its_name_and_block() -> None:
    found = make_geometry(np.random.default_rng(8))
    norm = found.norm.copy()
    norm[3] = 0
    with pytest.raises(ValueError, match=r"planted: norm at block 3: .*constant"):
        correlate(dataclasses.replace(found, norm=norm))


def test_weights_for_other_units_are_refused() -> None:
    found = make_geometry(np.random.default_rng(8), 6, n_strata=2)
    with pytest.raises(ValueError, match=r"\[n_draws, 6\]; got \(4, 12\)"):
        depth.correlate_with_predictions(found, np.ones((4, 12)))


def test_intervals_cover_the_truth_at_about_their_level() -> None:
    """Items drawn from a population whose ρ is known from a large sample."""
    rng = np.random.default_rng(9)

    def sample(n: int) -> Geometry:
        hidden = rng.normal(size=(n, 3))
        states = np.concatenate([hidden, 0.8 * rng.normal(size=(n, 3))], axis=1)
        base = make_geometry(rng, n)
        return dataclasses.replace(
            base,
            distance=np.stack([metrics.distances(states)] * N_BLOCKS),
            prediction=metrics.distances(hidden),
        )

    measures = (depth.Measure("distance", "distance"),)
    truth = correlate(sample(500), 1, measures=measures).values["distance"][0, 0]
    inside = []
    for _ in range(40):
        result = correlate(sample(40), 200, measures=measures)
        interval = result.interval(result.values["distance"][:, 0])
        inside.append(interval.low <= truth <= interval.high)
    assert sum(inside) >= 33  # 95 % of 40 is 38; below 33 has probability under 0.2 %.


# --- permutation and robustness ------------------------------------------------------------------


def test_mantel_over_depth_equals_the_plain_test_and_leaves_out_the_last_block() -> None:
    rng = np.random.default_rng(10)
    found = make_geometry(rng, 15)
    angle = found.angle.copy()
    angle[2] = noisy(rng, found.prediction, 0.2)
    found = dataclasses.replace(found, angle=angle)
    table = depth.mantel_by_depth(found, n_permutations=400, rng=rng)
    assert table["block"].max() == N_BLOCKS - 2
    chosen = table[table["curve"] == "angle"].set_index("block")
    plain = mantel_test(angle[2], found.prediction, n_permutations=400, rng=rng)
    assert chosen.loc[2, "estimate"] == pytest.approx(plain.correlation)
    assert chosen.loc[2, "p_value"] == pytest.approx(1 / 401)
    assert chosen.loc[2, "p_holm"] == pytest.approx((N_BLOCKS - 1) / 401)
    assert (chosen.drop(index=2)["p_holm"] > 0.05).all()
    assert chosen.loc[2, "null_low"] == pytest.approx(plain.null_low, abs=0.08)


def test_templates_of_the_same_subjects_do_not_narrow_the_permutation_null() -> None:
    """Three copies of one template say no more than one, since units are permuted as wholes."""
    rng = np.random.default_rng(11)
    one = make_geometry(rng, 12)
    wide = make_geometry(rng, 12, n_strata=3)
    copies = {
        name: np.tile(getattr(one, name), (1, 3, 3)) for name in ("angle", "distance", "lens")
    }
    wide = dataclasses.replace(wide, prediction=np.tile(one.prediction, (3, 3)), **copies)
    tables = [
        depth.mantel_by_depth(g, n_permutations=200, rng=np.random.default_rng(0))
        for g in (one, wide)
    ]
    pd.testing.assert_series_equal(tables[0]["null_high"], tables[1]["null_high"])
    pd.testing.assert_series_equal(tables[0]["p_value"], tables[1]["p_value"])


def test_robustness_measures_what_it_can_and_gives_reasons_for_the_rest() -> None:
    found = make_geometry(np.random.default_rng(12), 30)
    variants, reasons = depth.robustness(found, n_draws=30, rng=np.random.default_rng(0))
    assert not reasons
    assert set(variants) == {
        "centred",
        "without components",
        "without outliers",
        "same last token",
        "given word overlap",
    }
    assert variants["same last token"].n == 15
    centred = metrics.angles(metrics.centred(found.states[1]))[UPPER(30, 1)]
    expected = spearmanr(centred, found.prediction[UPPER(30, 1)])[0]
    assert variants["centred"].values["angle"][0, 1] == pytest.approx(expected)
    alone = dataclasses.replace(
        found.items, tokens=tuple((1, 2 + k) for k in range(found.items.n_items))
    )
    _, reasons = depth.robustness(
        dataclasses.replace(found, items=alone), n_draws=5, rng=np.random.default_rng(0)
    )
    assert set(reasons) == {"same last token", "given word overlap"}


def test_draws_of_too_few_units_have_no_increment_and_few_units_no_interval() -> None:
    """Three items are three pairs: given one matrix, their partial correlation is 1 or -1."""
    found = make_geometry(np.random.default_rng(16), 6)
    weights = np.array([[2.0, 2, 2, 0, 0, 0], [3, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    values = depth.correlate_with_predictions(found, weights).values
    assert np.isfinite(values["angle"][:, 0]).all()
    assert np.isfinite(values["angle beyond the lens"][:, 0]).tolist() == [True, False, True, True]
    curves = correlate(found, 200).to_frame()["curve"].unique()
    assert "angle" in curves
    assert "angle beyond the lens" not in curves


# --- verdicts ------------------------------------------------------------------------------------


def judged(
    transitions: pd.DataFrame, llama: Decoder, *, missing: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    rng = np.random.default_rng(13)
    trained = make_geometry(rng, 30)
    angle = trained.angle.copy()
    angle[3:5] = [noisy(rng, trained.prediction, 0.2) for _ in range(2)]
    trained = dataclasses.replace(trained, angle=angle)
    twin = make_geometry(rng, 30, untrained=True)
    sets = [angular.correlate_sets({"contexts": g}, n_draws=60, seed=1)[0] for g in (trained, twin)]
    windows = angular.find_windows(N_BLOCKS, transitions)
    names = ["contexts", "absent"] if missing else ["contexts"]
    reasons = {"absent": "accuracy 0.09, chance 0.083"}
    tables = [
        angular.judge_sets(llama, sets[0], windows, reasons, names=names, twins=sets[1]),
        angular.judge_sets(
            dataclasses.replace(llama, untrained=True), sets[1], windows, reasons, names=names
        ),
    ]
    return pd.concat(tables), names


def test_a_planted_code_is_supported_and_its_twin_is_not(llama: Decoder) -> None:
    records, _ = judged(pd.DataFrame({"block": [2.2, 2.6, 3.0]}), llama)
    rows = records.to_dict("records")
    assert claim_verdict(rows, angular.CLAIM, llama.name, False).verdict == "supported"
    assert claim_verdict(rows, angular.CLAIM, llama.name, True).verdict == "not supported"


def test_late_starts_after_the_median_transition_and_ends_before_the_last_block() -> None:
    windows = angular.find_windows(30, pd.DataFrame({"block": [21.0, 22.5, 24.0]}))
    assert list(windows.late) == [23, 24, 25, 26, 27, 28]
    assert list(windows.early) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert windows.transition == (22.5, 21.0, 24.0)


@pytest.mark.parametrize("blocks", [[], [29.5]])
def test_without_a_late_block_everything_is_not_testable(
    blocks: list[float], llama: Decoder
) -> None:
    records, _ = judged(pd.DataFrame({"block": blocks}), llama)
    assert set(records["verdict"]) == {"not testable"}
    assert records["reason"].str.len().min() > 10
    assert records["estimate"].isna().all()


def test_a_set_that_was_not_measured_has_its_records_and_its_reason(llama: Decoder) -> None:
    records, names = judged(pd.DataFrame({"block": [2.5]}), llama, missing=True)
    absent = records[records["task"] == "absent"]
    assert len(absent) == 2 * len(angular.STATISTICS)
    assert set(absent["verdict"]) == {"not testable"}
    assert set(absent["reason"]) == {"accuracy 0.09, chance 0.083"}
    assert len(records) == 2 * len(names) * len(angular.STATISTICS)


def test_the_statistics_are_means_and_differences_over_the_windows() -> None:
    found = correlate(make_geometry(np.random.default_rng(14)))
    twin = correlate(make_geometry(np.random.default_rng(15), untrained=True))
    windows = angular.Windows([1, 2], [3, 4], (2.5, 2.5, 2.5))
    values = angular.late_statistics(found, windows, twin)
    angle, distance, beyond = (
        found.values[name][0] for name in ("angle", "distance", "angle beyond the lens")
    )
    assert values["late_angle_correlation"][0] == pytest.approx(angle[3:5].mean())
    difference = values["late_minus_early_angle_correlation"][0]
    assert difference == pytest.approx(angle[3:5].mean() - angle[1:3].mean())
    difference = values["late_angle_minus_distance"][0]
    assert difference == pytest.approx((angle - distance)[3:5].mean())
    twins = twin.values["angle beyond the lens"][0]
    difference = values["late_angle_partial_minus_twin"][0]
    assert difference == pytest.approx((beyond - twins)[3:5].mean())


# --- what the chapter says -----------------------------------------------------------------------


def test_words_follow_the_numbers_and_change_with_them(llama: Decoder) -> None:
    records, _ = judged(pd.DataFrame({"block": [2.5]}), llama)
    words = angular_views.prose(records)
    assert (
        "better late in depth than early; in the untrained twin less closely"
        in (words["contexts_finding"])
    )
    assert "nothing that could be told from zero" in words["beyond_finding"]
    turned = records.assign(untrained=~records["untrained"].astype(bool))
    words = angular_views.prose(turned)
    assert "more closely still" in words["contexts_finding"]
    assert words["beyond_finding"].startswith("Beyond the logit lens, angles tell little")


def test_words_and_tables_survive_a_model_on_which_nothing_is_testable(llama: Decoder) -> None:
    records, _ = judged(pd.DataFrame({"block": []}), llama)
    words = angular_views.prose(records)
    assert words["contexts_late"].startswith("not testable (no task has a transition")
    assert not any("nan" in text.lower() for text in words.values())
    windows = angular.find_windows(N_BLOCKS, pd.DataFrame({"block": []}))
    found = {"centred": correlate(make_geometry(np.random.default_rng(0)))}
    assert "No variant is testable" in angular_views.robust_words(found, windows)
    assert "nothing is testable" in angular_views.components_words({}, windows, 576)
    table = angular_views.robustness_table(found, {}, windows)
    assert set(table.iloc[0, 2:]) == {"not testable"}
    assert (
        len(
            angular_views.mantel_summary(
                [angular.mantel_sets({}, n_permutations=9, seed=0)], windows
            )
        )
        == 0
    )
    assert len(angular_views.neighbours_table({}, {}, windows)) == 0


def test_nearest_neighbours_show_whether_template_or_answer_rules() -> None:
    rng = np.random.default_rng(17)
    base = make_geometry(rng, 6, n_strata=2)
    answers = tuple(str(k % 3) for k in range(12))
    items = dataclasses.replace(base.items, answers=answers)
    spread = 1 + rng.uniform(size=(12, 12))
    spread = spread + spread.T
    by_template = spread + 10 * (items.strata[:, None] != items.strata[None, :])
    by_answer = spread + 10 * (np.array(answers)[:, None] != np.array(answers)[None, :])
    angle = np.stack([by_template] * 3 + [by_answer] * 3)
    found = {"planted": dataclasses.replace(base, items=items, angle=angle)}
    windows = angular.Windows([0, 1], [3, 4], (2.5, 2.5, 2.5))
    row = angular_views.neighbours_table(found, found, windows).iloc[0]
    assert row["same template, early"] == 1.0
    assert row["same answer, late"] == 1.0
    assert row["same answer, early"] < 1.0


def test_maps_are_made_of_mapped_tasks_and_else_of_contexts() -> None:
    found = make_geometry(np.random.default_rng(18), 6, n_strata=2)
    curve = correlate(found)
    windows = angular.Windows([1], [3, 4], (2.5, 2.0, 3.0))
    for name in ("continents", "contexts"):
        maps = angular_views.depth_maps(
            {name: found, "other": found}, {name: found}, {name: curve}, {name: curve}, windows
        )
        assert [one.name for one in maps] == [name]
        assert [panel.title for panel in maps[0].panels] == ["trained", "untrained twin"]
        assert maps[0].transition == 2.5
