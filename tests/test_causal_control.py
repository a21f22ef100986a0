"""Causal control's statistics: against full recomputes, naive loops, closed forms."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from oracle import block_states, forward
from scipy.special import log_softmax
from steered import BLOCK, N_ANSWERS, WORDS, Able, bare, mean_state, recompute, states_of, unit

from lib.claims import causal_control as claim
from lib.claims.causal_control import Control
from lib.engine.models import load_decoder
from lib.evidence.criteria import claim_verdict, judge
from lib.evidence.steering import ONE_TEMPLATE, RANDOM, ROTATE, Doses, measure_doses
from lib.evidence.tasks import Pairs
from lib.evidence.transfer import Transfer, needed_prompts
from lib.reading import causal_control_figures as drawn
from lib.reading.figures import task_table
from lib.science.estimate import Estimate, Untested, mean_over_units


@pytest.fixture(scope="module")
def control(steerings):
    return claim.measure_control(steerings)["tiny"]


# --- blocks and pairs ----------------------------------------------------------------------------


def test_edits_are_made_after_the_transition_and_never_after_the_last_block():
    assert claim.control_block(30, 22.5) == 23
    assert claim.control_block(30, 22.0) == 23
    assert claim.control_block(30, 28.7) == 28
    assert claim.thinned_late_blocks(30, 22.5) == [24, 26, 28]
    assert claim.thinned_late_blocks(18, 11.5) == [12, 14, 16]


def test_pairs_that_need_few_prompts_keep_their_texts(able):
    pairs = claim.few_pairs(able, 4)
    task, (renumbered,) = needed_prompts(able.task, pairs)
    assert len(pairs) == 4 and task.n_prompts <= 8
    for before, after in zip(pairs.prompts.ravel(), renumbered.prompts.ravel(), strict=True):
        assert able.task.prompts["text"][before] == task.prompts["text"][after]


# --- parts of a state ----------------------------------------------------------------------------


def test_parts_of_a_donors_state_do_what_full_passes_say(able):
    pairs = claim.few_pairs(able)
    parts = claim.measure_parts({"tiny": able}, {"tiny": pairs}, [1, BLOCK])["tiny"]
    states = states_of(able)
    for pair, (x, y) in enumerate(pairs.prompts):
        h, given = states[x], states[y]
        edited = {
            "whole": given,
            "direction": unit(given) * np.linalg.norm(h),
            "norm": unit(h) * np.linalg.norm(given),
        }
        donor = log_softmax(able.logits[y].double().numpy())
        for name, state in edited.items():
            after = log_softmax(recompute(able, x, state).astype(float))
            kl = (np.exp(donor) * (donor - after)).sum()
            assert parts[name].after[1, pair] == pytest.approx(kl, abs=1e-4)


def transfer(after, before, unit=None):
    n = len(before)
    unit = np.arange(n) if unit is None else unit
    return Transfer(
        (5, 7), np.array(after), np.array(before), np.zeros((2, n)), np.zeros(n), unit, "u", n
    )


def test_direction_share_is_the_ratio_of_transfers_over_the_blocks():
    before = np.array([1.0, 2.0, 3.0])
    parts = {
        "whole": transfer([[0.0, 0.2, 0.4], [0, 0, 0]], before),
        "direction": transfer([[0.5, 0.5, 0.5], [0.1, 0.1, 0.4]], before),
        "norm": transfer([before, before * 1.1], before),
    }
    found = claim.direction_and_norm(parts)
    whole, direction = (0.9 + 1) / 2, (1 - 1.5 / 6 + 1 - 0.6 / 6) / 2
    assert float(found["direction_share"]) == pytest.approx(direction / whole)
    assert float(found["norm_transfer"]) == pytest.approx(-0.05)


def test_no_share_is_spoken_of_where_the_whole_state_does_nothing():
    before = np.array([1.0, 2.0, 3.0])
    parts = dict.fromkeys(("whole", "direction", "norm"), transfer([before, before], before))
    found = claim.direction_and_norm(parts)
    assert found["direction_share"] == Untested("the whole state transfers 0.00, 0.1 is needed")


# --- few dimensions ------------------------------------------------------------------------------


def test_the_basis_spans_the_other_templates_centroid_differences_and_nothing_else(able):
    task, states = able.task, able.states("last")[BLOCK]
    template = task.prompts["template"].to_numpy()
    for held_out in range(3):
        basis = claim.answer_basis(states, task.answer_index, template, held_out).numpy()
        assert basis.shape == (N_ANSWERS - 1, states.shape[1])
        means = [mean_state(able, a, held_out, right=False) for a in range(N_ANSWERS)]
        for one in means[1:]:
            difference = one - means[0]
            assert np.allclose(difference @ basis.T @ basis, difference, atol=1e-5)


def test_a_span_is_exchanged_with_the_basis_of_the_templates_that_the_pair_is_not_of(able):
    pairs = claim.few_pairs(able)
    spans = claim.measure_span({"tiny": able}, {"tiny": pairs}, BLOCK)["tiny"]
    assert list(spans) == ["span 1", "span 2", "span 3", "complement"]
    states, template = states_of(able), able.task.prompts["template"].to_numpy()
    for pair, (x, y) in enumerate(pairs.prompts):
        means = np.array([mean_state(able, a, template[x], right=False) for a in range(N_ANSWERS)])
        q, _ = np.linalg.qr((means[1:] - means[0]).T)
        inside = q @ q.T @ (states[y] - states[x])
        donor = log_softmax(able.logits[y].double().numpy())
        for name, state in (("span 3", states[x] + inside), ("complement", states[y] - inside)):
            after = log_softmax(recompute(able, x, state).astype(float))
            kl = (np.exp(donor) * (donor - after)).sum()
            assert spans[name].after[0, pair] == pytest.approx(kl, abs=1e-3)


def test_spans_are_judged_on_tasks_of_few_answers(able):
    spans = claim.measure_span({"tiny": able}, {"tiny": claim.few_pairs(able)}, BLOCK)["tiny"]
    found = claim.few_dimensions(able, spans)
    assert float(found["span_transfer"]) == float(spans["span 3"].estimate().at(0))
    assert float(found["complement_transfer"]) == float(spans["complement"].estimate().at(0))
    many = replace(able.task, answers=tuple(f"a{i}" for i in range(10)))
    wide = Able(many, able.decoder, able.last_states)
    assert "10 answers" in claim.few_dimensions(wide, spans).reason
    alone = replace(able.task, prompts=able.task.prompts[able.task.prompts["template"] == 0])
    one = Able(alone, able.decoder, able.last_states)
    found = claim.measure_span({"tiny": one}, {"tiny": claim.few_pairs(one)}, BLOCK)
    assert found["tiny"] == ONE_TEMPLATE


# --- rotations and their nulls -------------------------------------------------------------------


def test_rotations_the_whole_way_choose_what_full_passes_say(able, steering, control):
    states, template = states_of(able), able.task.prompts["template"].to_numpy()
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        for answer, found in (
            (steering.target[pair], control.rotation[pair]),
            (control.aimed[pair], control.nulls["another answer"][0, pair]),
        ):
            to = mean_state(able, answer, template[x])
            logits = recompute(able, x, unit(to) * np.linalg.norm(states[x]))
            assert found == logits[able.task.answer_ids].argmax()
    assert ((control.aimed != steering.source) & (control.aimed != steering.target)).all()
    assert control.nulls["covariance matched"].shape == (claim.N_DRAWN, len(steering.pairs))
    expected = np.mean(control.rotation == steering.target)
    assert float(control.flips()) == pytest.approx(expected)


def test_the_null_of_another_task_turns_towards_that_tasks_centroids(steerings, able, steering):
    """Of a stranger all of whose centroids are one vector the outcome of each pair is known."""
    other = steerings["other"]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(4))
    stranger = replace(other, centroids=vector.expand_as(other.centroids))
    found = claim.measure_control({"tiny": steering, "other": stranger})["tiny"]
    expected = []
    for x in steering.pairs.prompts[:, 0]:
        turned = unit(vector.double().numpy()) * np.linalg.norm(states_of(able)[x])
        expected.append(recompute(able, x, turned)[able.task.answer_ids].argmax())
    assert found.nulls["another task"].tolist() == [expected]
    for rest in (found.rotation, *found.nulls["another answer"]):
        assert rest.tolist() != expected


def test_matched_vectors_are_drawn_anew_each_time(control):
    drawn = control.nulls["covariance matched"]
    assert len(np.unique(drawn, axis=0)) > claim.N_DRAWN / 2


def test_matched_vectors_have_the_centroids_mean_and_covariance(steering):
    rows = np.flatnonzero(steering.template == 1)
    many = steering.where(np.repeat(rows[:1], 20_000))
    drawn = claim._matched(many, np.random.default_rng(1)).double().numpy()
    centroids = steering.centroids[1].double().numpy()
    covariance = np.cov(centroids.T)
    assert np.abs(drawn.mean(0) - centroids.mean(0)).max() < 0.05 * np.sqrt(covariance.max())
    assert np.abs(np.cov(drawn.T) - covariance).max() < 0.05 * covariance.max()


def test_a_stranger_has_no_answer_in_common(steerings, steering):
    own = {"tiny": steering, "twin": steering, "lost": Untested("too short")}
    assert "in common" in claim.find_stranger(steering, own).reason
    other = steerings["other"]
    assert claim.find_stranger(steering, {**own, "other": other}) is other
    assert claim.find_stranger(other, {**own, "other": other}) is steering


def test_without_a_third_answer_or_a_stranger_the_rotation_is_still_measured(steering):
    alone = claim.measure_control({"tiny": steering})["tiny"]
    assert isinstance(alone.flips(), Estimate)
    assert alone.null_flips() == Untested("no other task without an answer in common")


def test_chance_is_one_over_the_other_answers_where_all_are_as_frequent():
    source = np.repeat(np.arange(5), 4)
    target = np.array([t for s in range(5) for t in range(5) if t != s])
    own = Control(bare(source, target, 5), target, {}, np.full(20, -1))
    none = np.full(20, -1)
    assert own.beyond_chance(target, none) == pytest.approx(np.full(20, 1 - 1 / 4))
    assert own.beyond_chance(source, none) == pytest.approx(np.zeros(20))
    elsewhere = (np.arange(20) + 3) % 5
    hit = (elsewhere == target) - np.where(elsewhere != source, 1 / 4, 0)
    assert own.beyond_chance(elsewhere, none) == pytest.approx(hit)


@pytest.mark.parametrize(
    ("frequency", "strict"), [([0.25] * 4, 0.015), ([0.35, 0.3, 0.2, 0.15], 0.03)]
)
def test_edits_without_regard_to_the_target_flip_by_chance_alone(frequency, strict):
    """Where answers are unequally frequent, the rest errs to the strict side."""
    rng = np.random.default_rng(3)
    drawn = rng.choice(4, size=(12_000, 2), p=frequency)
    source, target = drawn[drawn[:, 0] != drawn[:, 1]].T
    choice = rng.choice(4, size=len(source), p=[0.7, 0.1, 0.1, 0.1])  # the usual answer, mostly
    none = np.full(len(source), -1)
    own = Control(bare(source, target, 4), choice, {}, none)
    assert np.mean(choice == target) > 0.2
    assert -0.015 < own.beyond_chance(choice, none).mean() < strict
    others = [np.setdiff1d(range(4), [s, t]) for s, t in zip(source, target, strict=True)]
    aimed = np.array([rng.choice(one) for one in others])
    assert own.beyond_chance(aimed, aimed) == pytest.approx(np.zeros(len(source)))


def test_choosing_the_answer_that_a_null_aims_at_is_no_chance_hit_of_that_null_alone():
    source, target, aimed = (np.arange(12) % 4 + k for k in (0, 1, 2))
    source, target, aimed = source % 4, target % 4, aimed % 4
    nulls = dict.fromkeys(claim.NULLS, aimed[None])
    found = Control(bare(source, target, 4), target, nulls, aimed).null_flips().value
    assert found[0] == pytest.approx(0)  # another answer: all went where it aimed
    assert found[1:] == pytest.approx([-1 / 3, -1 / 3])  # each is one of three other answers


def test_pairs_of_one_subject_count_once():
    source, target = np.arange(24) % 4, (np.arange(24) + 1) % 4
    plain = bare(source, target, 4)
    unit = np.repeat(np.arange(6), [1, 1, 1, 1, 10, 10])
    own = replace(plain, pairs=Pairs(plain.pairs.prompts, unit))
    choice = np.where(unit < 4, target, source)
    found = Control(own, choice, {}, np.full(24, -1)).flips()
    assert (float(found), found.n_units) == (pytest.approx(4 / 6), 6)


def test_nobody_flipping_has_an_exact_interval_in_place_of_certainty():
    source, target = np.arange(12) % 4, (np.arange(12) + 1) % 4
    nulls = dict.fromkeys(claim.NULLS, source[None])
    found = Control(bare(source, target, 4), target, nulls, (source + 2) % 4).null_flips()
    assert found.value == pytest.approx(np.zeros(3))
    assert found.interval().high == pytest.approx(np.full(3, 1 - 0.025 ** (1 / 12)))


def planted(n=24, seed=2):
    rng = np.random.default_rng(seed)
    own = bare(np.arange(n) % 4, (np.arange(n) + 1) % 4, 4)
    flipped = (np.array([[0.2], [0.5], [0.9]]) > rng.random(n)).astype(float)
    moved = np.array([[0.2], [0.5], [0.8]]) * rng.uniform(0.5, 1, n)
    return Doses(
        own,
        {ROTATE: flipped, RANDOM: 0 * flipped},
        {ROTATE: 0.7 * moved, RANDOM: -0.1 * moved},
        {ROTATE: moved, RANDOM: 0.5 * moved},
    )


def test_a_random_plane_is_compared_at_the_rotations_dose():
    found = claim.selectivity(planted())
    assert float(found["selective_share"]) == pytest.approx(0.7)
    assert float(found["selective_beyond_random"]) == pytest.approx(0.9)
    assert "at most 0.00 flip" in planted().share_at_half(RANDOM).reason


# --- all of them ---------------------------------------------------------------------------------


def test_all_statistics_are_judged_and_twins_only_where_no_right_answer_is_needed(
    able, control, steering
):
    pairs = claim.few_pairs(able)
    lost = Untested("too short")
    parts = claim.measure_parts({"tiny": able, "lost": lost}, {"tiny": pairs, "lost": lost}, [1, 2])
    spans = claim.measure_span({"tiny": able}, {"tiny": pairs}, BLOCK)["tiny"]
    trained = claim.statistics(
        parts,
        {"tiny": claim.few_dimensions(able, spans), "lost": lost},
        {"tiny": control, "lost": lost},
        measure_doses({"tiny": steering, "lost": lost}),
    )
    twins = claim.twin_statistics([parts] * 4)
    records = judge(claim.CLAIM, "m", trained, twins)
    assert len(records) == 2 * 8 * 3
    own = {(r["statistic"], r["place"], r["untrained"]): r for r in records}
    assert own["norm_transfer", "tiny", False]["n"] == able.task.n_units
    assert {own[name, "lost", False]["reason"] for name in trained} == {"too short"}
    assert own["rotation_flips", "tiny", True]["verdict"] == "not testable"
    assert "right answers" in own["rotation_flips", "tiny", True]["reason"]
    assert claim_verdict(records, claim.CLAIM, "m", untrained=True).verdict != "supported"


def test_each_statistic_bears_the_number_that_it_is_named_after(able, control):
    parts = claim.measure_parts({"tiny": able}, {"tiny": claim.few_pairs(able)}, [1, 2])["tiny"]
    spans = dict.fromkeys(claim.SPANS, Untested("not measured"))
    found = claim.statistics({"t": parts}, {"t": spans}, {"t": control}, {"t": planted()})
    assert set(found) == {*claim.PARTS, *claim.SPANS, *claim.CONTROL}
    flips = np.mean(control.rotation == control.steering.target)
    assert float(found["rotation_flips"]["t"]) == pytest.approx(flips)
    assert found["null_flips"]["t"].value.shape == (3,)
    assert float(found["selective_share"]["t"]) == pytest.approx(0.7)
    assert float(found["selective_beyond_random"]["t"]) == pytest.approx(0.9)
    norm = parts["norm"]
    moved = np.mean(1 - norm.after.sum(axis=1) / norm.before.sum())
    assert float(found["norm_transfer"]["t"]) == pytest.approx(moved)


def test_a_twins_numbers_are_those_of_its_own_weights(able):
    torch.manual_seed(11)
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    twin = load_decoder(model, tokenizer=tiny_tokenizer(WORDS))
    found = claim.measure_twin(twin, {"tiny": able, "lost": Untested("why")}, [1], 6)
    assert found["lost"] == Untested("why")
    own = replace(able, decoder=twin)
    for pair, (x, y) in enumerate(claim.few_pairs(able, 6).prompts):
        given = block_states(model, twin.blocks, able.task.tokens[y])[1, -1]
        logs = [forward(model, [able.task.tokens[row]])[0].double() for row in (x, y)]
        before, donor = (log_softmax(one.numpy()) for one in logs)
        after = log_softmax(recompute(own, x, given, 1).astype(float))
        for part, q in (("after", after), ("before", before)):
            kl = (np.exp(donor) * (donor - q)).sum()
            measured = np.atleast_2d(getattr(found["tiny"]["whole"], part))[0, pair]
            assert measured == pytest.approx(kl, rel=1e-3, abs=1e-4)


def test_a_twins_number_is_one_and_the_seeds_are_the_units(able):
    pairs = claim.few_pairs(able)
    by_seed = [
        claim.measure_twin(able.decoder, {"tiny": able}, [1], most) for most in (6, 8, 10, 12)
    ]
    whole = claim.measure_parts({"tiny": able}, {"tiny": pairs}, [1])["tiny"]["norm"]
    assert by_seed[-1]["tiny"]["norm"].after == pytest.approx(whole.after, abs=1e-5)
    found = claim.twin_statistics(by_seed)["norm_transfer"]["tiny"]
    each = [float(claim.direction_and_norm(one["tiny"])["norm_transfer"]) for one in by_seed]
    assert float(found) == pytest.approx(np.mean(each))
    assert found.units == "seeds" and found.n_units == 4


def test_beside_a_method_stands_in_how_many_of_the_books_tasks_it_flips_half():
    tested = mean_over_units([0.2, 0.4, 0.6], "subjects")
    some = {"a": tested, "b": tested, "own: mine": tested, "c": Untested("never flips half")}
    shown = [("rotate to centroid", some), ("add centroid", {"a": tested})]
    table = pd.concat([task_table(found).assign(method=method) for method, found in shown])
    figure = drawn.methods_at_half(table, wanted=0.5)
    names = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert names == ["rotate to centroid (2)", "add centroid (1)"]
    plt.close(figure)
