"""The norm chapter's measurements, on tiny models, made-up samples and closed forms."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from scipy.stats import rankdata, spearmanr

from lib.engine.models import Decoder, load_decoder
from lib.evidence.verdicts import verdict_sentence
from lib.norm_code.norm_edits import (
    average_exchanges,
    dose_table,
    exchange_in_contexts,
    mean_outcome,
    own_pairs,
    pairs_across_kinds,
    ratio_interval,
    scale_and_rotate,
    spread_contexts,
    temperature_share,
)
from lib.norm_code.norm_verdicts import (
    CLAIM,
    dose_blocks,
    find_late,
    judge_norms,
    late_excess,
    late_relations,
    shown_blocks,
)
from lib.norm_code.norm_words import (
    carried_sentences,
    dissociation_sentence,
    exchange_sentences,
    listed,
    relation_sentence,
    tasks_sentence,
    temperature_sentence,
)
from lib.norm_code.norms import Sample, decode_contexts, norm_growth
from lib.norm_code.relations import RELATIONS, Relation, relate_norms, stratified_correlations
from lib.reading.notebook import number_text as number
from lib.science.correlations import rank_matrix, weighted_correlations
from lib.science.divergences import jeffreys_of_logits
from lib.science.metrics import angles, log_norm_differences
from lib.science.stats import bootstrap_weights

RNG = np.random.default_rng
KINDS = ["letter", "list", "law"]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Twelve contexts of three kinds, read by a tiny model."""
    from lib.norm_code.norms import _read

    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    rng = RNG(0)
    tokens = [rng.integers(3, 64, size=int(rng.integers(4, 8))).tolist() for _ in range(12)]
    prompts = pd.DataFrame({"kind": np.repeat(KINDS, 4), "tokens": tokens})
    return _read("contexts", decoder, prompts)


def symmetric(n: int, seed: int) -> np.ndarray:
    values = RNG(seed).random((n, n))
    return np.triu(values, 1) + np.triu(values, 1).T


def test_one_stratum_equals_weighted_correlations() -> None:
    matrices = [symmetric(15, seed) for seed in range(3)]
    weights = bootstrap_weights(15, 50, RNG(0))
    found = stratified_correlations(matrices, np.zeros(15, dtype=int), weights)
    expected = weighted_correlations([rank_matrix(m) for m in matrices], weights)
    assert np.allclose(found, expected, equal_nan=True, atol=1e-10)


def test_pairs_across_strata_do_not_count() -> None:
    strata = np.repeat([0, 1, 2], 6)
    first, second = symmetric(18, 1), symmetric(18, 2)
    ones = np.ones((1, 18))
    found = stratified_correlations([first, second], strata, ones)[0, 0, 1]
    across = (strata[:, None] != strata[None, :]) * symmetric(18, 3) * 1e6
    shifted = stratified_correlations([first + across, second - across], strata, ones)[0, 0, 1]
    by_hand = []
    for stratum in range(3):
        rows = np.flatnonzero(strata == stratum)
        pairs = np.triu_indices(6, 1)
        by_hand.append(
            spearmanr(first[np.ix_(rows, rows)][pairs], second[np.ix_(rows, rows)][pairs])[0]
        )
    assert found == pytest.approx(np.mean(by_hand))
    assert shifted == pytest.approx(found)


def test_norm_that_sets_the_prediction_is_found_given_the_angle(sample: Sample) -> None:
    """Logits that depend on the norm alone: the partial correlation must not be near zero."""
    r = np.exp(RNG(1).normal(size=60) * 0.3)
    u = RNG(2).normal(size=(60, 32))
    states = torch.tensor(r[:, None] * u / np.linalg.norm(u, axis=1, keepdims=True)).float()
    logits = torch.stack([torch.tensor([float(np.log(one)) * 3, 0.0, 0.0]) for one in r])
    planted = replace(
        sample,
        prompts=pd.DataFrame({"kind": ["x"] * 60, "tokens": [[1, 2]] * 60}),
        usable=np.ones(60, dtype=bool),
        states=states[None],
        logits=logits,
    )
    relation = relate_norms(planted, bootstrap_weights(60, 200, RNG(0)), [0])
    assert relation is not None
    assert relation.estimate["norm given angle"][0] > 0.9
    assert not late_relations({"contexts": relation}, [0])["equivalent"].any()


def test_partial_correlation_is_that_of_the_residuals(sample: Sample) -> None:
    relation = relate_norms(sample, bootstrap_weights(12, 20, RNG(0)), [2])
    assert relation is not None and sample.logits is not None
    states = sample.states[2].numpy()
    prediction = jeffreys_of_logits(sample.logits.numpy())
    norm, angle, j = (
        rankdata(matrix[np.triu_indices(12, 1)])
        for matrix in (log_norm_differences(states), angles(states), prediction)
    )
    left = [one - np.polyval(np.polyfit(angle, one, 1), angle) for one in (norm, j)]
    expected = np.corrcoef(*left)[0, 1]
    assert relation.estimate["norm given angle"][0] == pytest.approx(expected)
    assert relation.estimate["angle"][0] == pytest.approx(np.corrcoef(angle, j)[0, 1])


def test_relation_without_value_in_many_draws_is_left_out() -> None:
    draws = np.full((100, 1), 0.01)
    draws[:20] = np.nan
    values = dict.fromkeys(RELATIONS, np.zeros(1))
    relation = Relation("a", (0,), values, dict.fromkeys(RELATIONS, draws), 9)
    assert late_relations({"a": relation}, [0]).empty


def test_equal_norms_are_not_related_and_not_an_error(sample: Sample) -> None:
    states = sample.states / sample.states.norm(dim=-1, keepdim=True)
    flat = replace(sample, states=torch.ones_like(states))
    assert relate_norms(flat, bootstrap_weights(12, 20, RNG(0)), [0]) is None


def test_growth_is_the_geometric_mean_and_its_range(sample: Sample) -> None:
    factors = torch.tensor(np.exp(np.linspace(-1, 1, 12))).float()[:, None]
    states = torch.nn.functional.normalize(torch.ones(2, 12, 32), dim=-1) * factors
    states[1] *= 10
    table = norm_growth(replace(sample, states=states), bootstrap_weights(12, 200, RNG(0)))
    assert table["estimate"].tolist() == pytest.approx([1.0, 10.0], rel=1e-4)
    assert np.allclose(table["range_low"], np.exp(np.quantile(np.linspace(-1, 1, 12), 0.025)))


def test_norm_exchange_leaves_the_last_block_alone_and_direction_exchange_does_not(
    sample: Sample,
) -> None:
    pairs = pairs_across_kinds(sample, spread_contexts(sample, 2))
    table = exchange_in_contexts(sample, pairs, [1, sample.decoder.n_blocks - 1])
    kl = table.groupby(["edit", "block"])["kl_nats"].mean()
    assert kl["norm", 3] < 1e-8
    assert kl["direction", 3] > 1e-3
    at_last = table[(table["edit"] == "direction") & (table["block"] == 3)]
    assert (at_last["answer_flipped"] == at_last["comparable"]).all()


def test_scaling_is_null_at_the_last_block_and_the_rotation_is_not(sample: Sample) -> None:
    table = scale_and_rotate(sample, np.arange(4), [0.5, 1, 2, 4], [1, 3], seed=1)
    kl = table.groupby(["edit", "factor", "block"])["kl_nats"].mean()
    assert max(kl["scaling", factor, 3] for factor in (0.5, 2, 4)) < 1e-8
    assert min(kl["rotation", factor, 3] for factor in (0.5, 2)) > 1e-4
    assert ("rotation", 4.0, 1) not in kl.index  # no rotation moves a state by three of its norms
    assert 1.0 not in table["factor"].unique()


def test_dose_of_one_changes_nothing_and_the_others_are_means(sample: Sample) -> None:
    items = np.arange(4)
    table = scale_and_rotate(sample, items, [0.5, 2], [1], seed=1)
    doses = dose_table(table, "argmax_kept", bootstrap_weights(4, 20, RNG(0)), items)
    scaling = doses[doses["edit"] == "scaling"].set_index("factor")["estimate"]
    assert scaling[1.0] == 1.0
    own = table[(table["edit"] == "scaling") & (table["factor"] == 2)]
    assert scaling[2.0] == pytest.approx(own["argmax_kept"].mean())


def test_random_rotation_does_not_depend_on_the_batch(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"chosen": np.arange(6), "factors": [0.5], "blocks": [1], "seed": 3}
    whole = scale_and_rotate(sample, **options)
    monkeypatch.setattr("lib.engine.sweeps.MAX_ROW_TOKENS", 2)
    parts = scale_and_rotate(sample, **options)
    assert np.allclose(whole["kl_nats"], parts["kl_nats"], atol=1e-5)


def test_share_of_a_pure_temperature_is_one() -> None:
    table = pd.DataFrame(
        {"edit": "scaling", "factor": 2.0, "block": [0, 1] * 3, "recipient": [0, 0, 1, 1, 2, 2],
         "kl_nats": [1.0, 2.0] * 3, "kl_left_nats": 0.0, "temperature": 2.0}
    )  # fmt: skip
    weights = bootstrap_weights(3, 30, RNG(0))
    share = temperature_share(table, weights, np.arange(3))
    assert share["estimate"].item() == share["low"].item() == 1.0
    half = temperature_share(table.assign(kl_left_nats=[0.5, 1.0] * 3), weights, np.arange(3))
    assert half["estimate"].item() == pytest.approx(0.5)


def outcomes(flips: list[bool], comparable: bool = True) -> pd.DataFrame:
    n = len(flips)
    one = pd.DataFrame(
        {"task": "contexts", "block": 0, "edit": "norm",
         "recipient": np.arange(n), "donor": (np.arange(n) + 1) % n,
         "answer_flipped": flips, "kl_nats": 0.01, "argmax_kept": 1.0, "comparable": comparable}
    )  # fmt: skip
    other = one.assign(edit="direction", answer_flipped=True, kl_nats=1.0)
    return pd.concat([one, other])


def test_averages_over_tasks_are_means_of_the_tasks_means() -> None:
    tables = {"a": outcomes([True] * 4), "b": outcomes([False] * 12)}
    weights = {name: bootstrap_weights(12, 100, RNG(0)) for name in tables}
    found = average_exchanges(tables, weights, "answer_flipped").set_index("edit")
    assert found["estimate"]["norm"] == 0.5
    assert found["n"]["norm"] == 16
    silent = {"a": outcomes([False] * 4, comparable=False)}
    assert average_exchanges(silent, weights, "answer_flipped").empty


def test_ratio_of_divergences_is_paired() -> None:
    table = outcomes([False] * 8)
    weights = bootstrap_weights(8, 100, RNG(0))
    kl = [mean_outcome(table, edit, "kl_nats", weights, [0]) for edit in ("norm", "direction")]
    ratio = ratio_interval(kl[0], kl[1])
    assert (ratio.low, ratio.high) == pytest.approx((0.01, 0.01))


def test_contexts_are_spread_over_kinds_and_paired_across_them(sample: Sample) -> None:
    chosen = spread_contexts(sample, 2)
    kinds = sample.prompts["kind"].to_numpy()
    assert kinds[chosen].tolist() == KINDS * 2
    pairs = pairs_across_kinds(sample, chosen)
    assert (kinds[pairs[:, 0]] != kinds[pairs[:, 1]]).all()
    assert sorted(pairs[:, 0]) == sorted(pairs[:, 1])
    with pytest.raises(ValueError, match="one kind"):
        pairs_across_kinds(sample, np.arange(12))


def test_late_blocks_run_from_the_median_transition_to_the_last_but_one() -> None:
    transitions = pd.DataFrame({"block": [21.0, 22.4, 25.0]})
    assert find_late(transitions, 30) == (23, 24, 25, 26, 27, 28)
    assert find_late(transitions.iloc[:0], 30) == ()
    assert find_late(pd.DataFrame({"block": [28.9]}), 30) == ()
    assert shown_blocks(30, (23, 24)) == [0, 5, 10, 15, 20, 23, 24, 25, 29]
    assert dose_blocks(30, (23, 28)) == [5, 15, 23, 28, 29]
    assert dose_blocks(2, ()) == [0, 1]


def judged(decoder: Decoder, **options: object) -> list[dict]:
    excess = pd.DataFrame(
        {"attribute": ["kind of text", "position", "subject, same answer"],
         "estimate": 0.1, "low": [0.05, 0.02, 0.01], "high": 0.2, "n": 50, "decoded": True,
         "null_decoded": [False, True, False]}
    )  # fmt: skip
    equivalence = pd.DataFrame(
        {"task": ["contexts"], "estimate": 0.02, "low": -0.01, "high": 0.05, "n": 50,
         "p_value": 0.001, "equivalent": True}
    )  # fmt: skip
    given = {
        "excess": excess,
        "equivalence": equivalence,
        "exchanges": {"contexts": outcomes([False] * 8)},
        "weights": {"contexts": bootstrap_weights(8, 50, RNG(0))},
        "late": (0,),
        "skipped": {"capitals": "accuracy 0.10"},
        **options,
    }
    return judge_norms(decoder, **given)  # type: ignore[arg-type]


def test_records_are_complete_and_verdicts_follow_the_criteria(llama: Decoder) -> None:
    rows = pd.DataFrame(judged(llama)).set_index(["statistic", "task"])["verdict"]
    assert rows["attributes_decoded"].item() == "supported"
    assert rows["attributes_decoded_shuffled"].item() == "supported"
    assert rows["norm_partial_correlation", "contexts"] == "supported"
    assert rows["norm_exchange_flip", "contexts"] == "supported"
    assert rows["norm_exchange_kl_ratio", "capitals"] == "not testable"
    (shuffled,) = [
        row for row in judged(llama) if row["statistic"] == "attributes_decoded_shuffled"
    ]
    assert (shuffled["estimate"], shuffled["reason"], shuffled["n"]) == (1, "position", 2)
    flipping = judged(llama, exchanges={"contexts": outcomes([True] * 8)})
    verdicts = {row["statistic"]: row["verdict"] for row in flipping if row["task"] == "contexts"}
    assert verdicts["norm_exchange_flip"] == "not supported"


def test_too_few_pairs_that_could_flip_are_not_testable(llama: Decoder) -> None:
    for n_able in (0, 1):
        table = outcomes([False] * 8).assign(
            comparable=lambda rows, n=n_able: rows["recipient"] < n
        )
        rows = judged(llama, exchanges={"contexts": table})
        found = [row for row in rows if row["statistic"] == "norm_exchange_flip"]
        assert {row["verdict"] for row in found} == {"not testable"}
        assert f"{n_able} prompts" in found[0]["reason"]


def test_pairs_that_most_draws_miss_are_not_testable(llama: Decoder) -> None:
    weights = {"contexts": bootstrap_weights(40, 200, RNG(0))}
    rows = judged(llama, exchanges={"contexts": outcomes([False] * 3)}, weights=weights)
    found = {row["statistic"]: row["verdict"] for row in rows if row["task"] == "contexts"}
    assert found["norm_exchange_flip"] == found["norm_exchange_kl_ratio"] == "not testable"


def test_model_without_late_blocks_is_not_testable_throughout(llama: Decoder) -> None:
    nothing = late_excess({}, (), n_draws=10, seed=0)
    rows = judged(llama, excess=nothing, equivalence=late_relations({}, ()), late=())
    assert {row["verdict"] for row in rows} == {"not testable"}
    assert all(row["reason"] for row in rows)


def test_sentences_follow_the_numbers(llama: Decoder) -> None:
    twin = replace(llama, untrained=True)
    records = [*judged(llama), *judged(twin)]
    assert "as a whole is supported" in verdict_sentence(records, CLAIM, llama.name)
    assert "supported; that swapped" in dissociation_sentence(records, llama.name)
    first, second = exchange_sentences({"contexts": outcomes([False] * 8)}, [0])
    assert "in 0.00 of the pairs" in first and "Of 8 prompts and contexts, 0" in second
    assert "0.369" in second  # 1 − 0.025^(1/8), Clopper and Pearson's bound for none of eight
    equivalence = pd.DataFrame(
        {"task": ["contexts", "a"], "estimate": -0.2, "low": -0.4, "high": 0.1, "n": 20,
         "equivalent": False}
    )  # fmt: skip
    assert "not inside the margin" in relation_sentence(equivalence)
    assert "−0.20" in relation_sentence(equivalence)
    assert "no estimate could have passed" in tasks_sentence(equivalence)
    assert listed(["a", "b", "c"]) == "a, b and c" and listed([]) == "nothing"
    assert number(0.0002) == "0.0002" and number(-1) == "−1.00"


def test_sentences_survive_a_model_without_results() -> None:
    nothing = late_excess({}, (), n_draws=10, seed=0)
    assert carried_sentences(nothing, nothing)[1] == ""
    assert relation_sentence(late_relations({}, ())) == "not testable"
    assert "No task" in tasks_sentence(late_relations({}, ()))
    assert "missing" in exchange_sentences({"a": outcomes([False])}, [])[0]
    empty = pd.DataFrame({"edit": [], "factor": [], "untrained": np.array([], dtype=bool)})
    assert "No scaling" in temperature_sentence(empty)


def test_attributes_of_contexts_are_decoded_from_their_own_sample(sample: Sample) -> None:
    found = decode_contexts(sample, sample, [0, 3], seed=0)
    assert list(found) == ["kind of text", "position", "token frequency"]
    assert all(decoding.blocks == (0, 3) for decoding in found.values() if decoding.testable)
    assert own_pairs({}) == {}
