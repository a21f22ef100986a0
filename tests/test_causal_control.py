"""Causal control's statistics: against full recomputes, naive loops, closed forms."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from oracle import block_states, forward, patched_logits
from scipy.special import log_softmax, softmax

from lib.claims import causal_control as claim
from lib.claims.causal_control import Control, Doses, Steering
from lib.engine.extraction import extract_residuals
from lib.engine.models import load_decoder
from lib.evidence.criteria import claim_verdict, judge
from lib.evidence.tasks import Pairs, build_task, load_texts
from lib.evidence.transfer import Transfer, Trial, needed_prompts, read_tasks
from lib.science.estimate import Estimate, Untested

N_ANSWERS, BLOCK = 4, 2
SUBJECTS = [f"s{i}" for i in range(12)]
WORDS = ["?", *SUBJECTS, *[f"a{i}" for i in range(8)], *[f"t{i}" for i in range(6)]]
TEMPLATES = ["t0 t1 {subject} t2", "t3 {subject} t4 t5", "t5 t2 {subject} t0"]


@dataclass(frozen=True, eq=False)
class Able(Trial):
    """A trial of a model that answers all prompts rightly but the first."""

    @property
    def correct(self):
        return np.arange(self.task.n_prompts) > 0


def tiny_task(decoder, name="tiny", first_answer=0, templates=TEMPLATES):
    rows = [(s, f"a{first_answer + i % N_ANSWERS}", "") for i, s in enumerate(SUBJECTS)]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    return build_task(name, items, templates, decoder)


@pytest.fixture(scope="module")
def trials():
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(WORDS))
    tasks = {"tiny": tiny_task(decoder), "other": tiny_task(decoder, "other", 4)}
    read = read_tasks(decoder, tasks)
    return {name: Able(one.task, one.decoder, one.last_states) for name, one in read.items()}


@pytest.fixture(scope="module")
def trial(trials):
    return trials["tiny"]


@pytest.fixture(scope="module")
def steering(trial):
    found = claim.prepare_steering(trial, BLOCK)
    assert isinstance(found, Steering)
    return found


@pytest.fixture(scope="module")
def control(trials, steering):
    other = claim.prepare_steering(trials["other"], BLOCK)
    return claim.measure_control({"tiny": steering, "other": other})["tiny"]


@pytest.fixture(scope="module")
def doses(steering):
    return claim.measure_doses({"tiny": steering}, list(claim.METHODS), (0.25, 0.6, 1.0))["tiny"]


def recompute(trial, prompt, state, block=BLOCK):
    """Logits after a prompt whose last state after a block is overwritten, in one full pass."""
    decoder, tokens = trial.decoder, trial.task.tokens[prompt]
    return patched_logits(
        decoder.model, decoder.blocks[block], [tokens], [[len(tokens) - 1]], [state[None]]
    )[0].numpy()


def states_of(trial, block=BLOCK):
    return trial.states("last")[block].double().numpy()


def mean_state(trial, answer, left_out, right=True):
    """The mean state of an answer's prompts in other templates, by a loop."""
    rows = [
        row
        for row, prompt in enumerate(trial.task.prompts.itertuples())
        if prompt.answer_index == answer
        and prompt.template != left_out
        and (trial.correct[row] or not right)
    ]
    return states_of(trial)[rows].mean(axis=0)


def unit(vector):
    return vector / np.linalg.norm(vector)


def as_state(vector):
    return torch.as_tensor(vector, dtype=torch.float32)


# --- blocks and pairs ----------------------------------------------------------------------------


def test_edits_are_made_after_the_transition_and_never_after_the_last_block():
    assert claim.control_block(30, 22.5) == 23
    assert claim.control_block(30, 22.0) == 23
    assert claim.control_block(30, 28.7) == 28
    assert claim.thinned_late_blocks(30, 22.5) == [24, 26, 28]
    assert claim.thinned_late_blocks(18, 11.5) == [12, 14, 16]


def test_pairs_that_need_few_prompts_keep_their_texts(trial):
    pairs = claim.few_pairs(trial, 4)
    task, (renumbered,) = needed_prompts(trial.task, pairs)
    assert len(pairs) == 4 and task.n_prompts <= 8
    for before, after in zip(pairs.prompts.ravel(), renumbered.prompts.ravel(), strict=True):
        assert trial.task.prompts["text"][before] == task.prompts["text"][after]


# --- parts of a state ----------------------------------------------------------------------------


def test_parts_of_a_donors_state_do_what_full_passes_say(trial):
    pairs = claim.few_pairs(trial)
    parts = claim.measure_parts({"tiny": trial}, {"tiny": pairs}, [1, BLOCK])["tiny"]
    states = states_of(trial)
    for pair, (x, y) in enumerate(pairs.prompts):
        h, given = states[x], states[y]
        edited = {
            "whole": given,
            "direction": unit(given) * np.linalg.norm(h),
            "norm": unit(h) * np.linalg.norm(given),
        }
        donor = log_softmax(trial.logits[y].double().numpy())
        for name, state in edited.items():
            after = log_softmax(recompute(trial, x, as_state(state)).astype(float))
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


def test_the_basis_spans_the_other_templates_centroid_differences_and_nothing_else(trial):
    task, states = trial.task, trial.states("last")[BLOCK]
    template = task.prompts["template"].to_numpy()
    for held_out in range(3):
        basis = claim.answer_basis(states, task.answer_index, template, held_out).numpy()
        assert basis.shape == (N_ANSWERS - 1, states.shape[1])
        means = [mean_state(trial, a, held_out, right=False) for a in range(N_ANSWERS)]
        for one in means[1:]:
            difference = one - means[0]
            assert np.allclose(difference @ basis.T @ basis, difference, atol=1e-5)


def test_a_span_is_exchanged_with_the_basis_of_the_templates_that_the_pair_is_not_of(trial):
    pairs = claim.few_pairs(trial)
    spans = claim.measure_span({"tiny": trial}, {"tiny": pairs}, BLOCK)["tiny"]
    assert list(spans) == ["span 1", "span 2", "span 3", "complement"]
    states, template = states_of(trial), trial.task.prompts["template"].to_numpy()
    for pair, (x, y) in enumerate(pairs.prompts):
        means = np.array([mean_state(trial, a, template[x], right=False) for a in range(N_ANSWERS)])
        q, _ = np.linalg.qr((means[1:] - means[0]).T)
        inside = q @ q.T @ (states[y] - states[x])
        donor = log_softmax(trial.logits[y].double().numpy())
        for name, state in (("span 3", states[x] + inside), ("complement", states[y] - inside)):
            after = log_softmax(recompute(trial, x, as_state(state)).astype(float))
            kl = (np.exp(donor) * (donor - after)).sum()
            assert spans[name].after[0, pair] == pytest.approx(kl, abs=1e-3)


def test_spans_are_judged_on_tasks_of_few_answers(trial):
    spans = claim.measure_span({"tiny": trial}, {"tiny": claim.few_pairs(trial)}, BLOCK)["tiny"]
    found = claim.few_dimensions(trial, spans)
    assert float(found["span_transfer"]) == float(spans["span 3"].estimate().at(0))
    assert float(found["complement_transfer"]) == float(spans["complement"].estimate().at(0))
    many = replace(trial.task, answers=tuple(f"a{i}" for i in range(10)))
    wide = Able(many, trial.decoder, trial.last_states)
    assert "10 answers" in claim.few_dimensions(wide, spans)["span_transfer"].reason
    alone = replace(trial.task, prompts=trial.task.prompts[trial.task.prompts["template"] == 0])
    one = Able(alone, trial.decoder, trial.last_states)
    found = claim.measure_span({"tiny": one}, {"tiny": claim.few_pairs(one)}, BLOCK)
    assert found["tiny"] == claim.ONE_TEMPLATE


# --- steering to an answer -----------------------------------------------------------------------


def test_vectors_come_from_rightly_answered_prompts_of_other_templates_alone(trial, steering):
    template = trial.task.prompts["template"].to_numpy()
    for pair, (x, y) in enumerate(steering.pairs.prompts):
        answer = trial.task.answer_index[y]
        expected = mean_state(trial, answer, template[x])
        found = steering.centroid(steering.target)[pair].numpy()
        assert found == pytest.approx(expected, abs=1e-5)


def test_recipients_are_answered_rightly_and_their_targets_are_other_answers(trial, steering):
    assert trial.correct[steering.pairs.prompts[:, 0]].all()
    assert (steering.source != steering.target).all()
    assert len(np.unique(steering.pairs.unit)) == len(steering.pairs)


def test_what_the_right_answer_holds_is_its_probability_before_any_edit(trial, steering):
    tokens = trial.task.answer_ids[steering.source]
    logits = trial.logits.double().numpy()
    p = [
        softmax(logits[x])[token]
        for x, token in zip(steering.pairs.prompts[:, 0], tokens, strict=True)
    ]
    assert float(steering.held()) == pytest.approx(np.mean(p))


def test_a_task_below_the_gate_is_untested_with_its_accuracy(trial):
    plain = Trial(trial.task, trial.decoder, trial.last_states)
    assert "0.8 is needed" in claim.prepare_steering(plain, BLOCK).reason


def test_rotations_the_whole_way_choose_what_full_passes_say(trial, steering, control):
    states, template = states_of(trial), trial.task.prompts["template"].to_numpy()
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        for answer, found in (
            (steering.target[pair], control.rotation[pair]),
            (control.aimed[pair], control.nulls["another answer"][0, pair]),
        ):
            to = mean_state(trial, answer, template[x])
            logits = recompute(trial, x, as_state(unit(to) * np.linalg.norm(states[x])))
            assert found == logits[trial.task.answer_ids].argmax()
    assert ((control.aimed != steering.source) & (control.aimed != steering.target)).all()
    assert control.nulls["covariance matched"].shape == (claim.N_DRAWN, len(steering.pairs))
    expected = np.mean(control.rotation == steering.target)
    assert float(control.flips()) == pytest.approx(expected)


def test_the_null_of_another_task_turns_towards_that_tasks_centroids(trials, trial, steering):
    """Of a stranger all of whose centroids are one vector the outcome of each pair is known."""
    other = claim.prepare_steering(trials["other"], BLOCK)
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(4))
    stranger = replace(other, centroids=vector.expand_as(other.centroids))
    found = claim.measure_control({"tiny": steering, "other": stranger})["tiny"]
    expected = []
    for x in steering.pairs.prompts[:, 0]:
        turned = unit(vector.double().numpy()) * np.linalg.norm(states_of(trial)[x])
        expected.append(recompute(trial, x, as_state(turned))[trial.task.answer_ids].argmax())
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


def test_a_stranger_has_no_answer_in_common(trials, steering):
    own = {"tiny": steering, "twin": steering, "lost": Untested("too short")}
    assert "in common" in claim.find_stranger(steering, own).reason
    other = claim.prepare_steering(trials["other"], BLOCK)
    assert claim.find_stranger(steering, {**own, "other": other}) is other
    assert claim.find_stranger(other, {**own, "other": other}) is steering


def test_without_a_third_answer_or_a_stranger_the_rotation_is_still_measured(steering):
    alone = claim.measure_control({"tiny": steering})["tiny"]
    assert isinstance(alone.flips(), Estimate)
    assert alone.null_flips() == Untested("no other task without an answer in common")


def bare(source, target, n_answers):
    """A steering of which only answers matter; each pair is of its own subject."""
    trial = SimpleNamespace(
        task=SimpleNamespace(
            answers=range(n_answers),
            answer_index=np.concatenate([source, target]),
            units="subjects",
        )
    )
    n = len(source)
    pairs = Pairs(np.stack([np.arange(n), n + np.arange(n)], axis=1), np.arange(n))
    none = torch.zeros(n, 1)
    return Steering(trial, 0, pairs, none, none[None], np.ones((1, n_answers)), np.zeros(n, int))


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


# --- doses ---------------------------------------------------------------------------------------


def test_each_method_at_each_dose_does_what_full_passes_say(trial, steering, doses):
    states, template = states_of(trial), trial.task.prompts["template"].to_numpy()
    ids = trial.task.answer_ids
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        h, length = states[x], np.linalg.norm(states[x])
        to = mean_state(trial, steering.target[pair], template[x])
        away = mean_state(trial, steering.source[pair], template[x])
        whole = np.arccos(unit(h) @ unit(to))
        before = softmax(trial.logits[x].double().numpy())
        for number, dose in enumerate((0.25, 0.6, 1.0)):
            angle = dose * whole
            edited = {
                "add centroid": h + 2 * length * np.sin(angle / 2) * unit(to),
                "add difference": h + 2 * length * np.sin(angle / 2) * unit(to - away),
            }
            for name, towards in (("rotate to centroid", to), ("rotate by difference", to - away)):
                side = unit(towards - (towards @ unit(h)) * unit(h))
                edited[name] = length * (np.cos(angle) * unit(h) + np.sin(angle) * side)
            for name, state in edited.items():
                logits = recompute(trial, x, as_state(state)).astype(float)
                change = softmax(logits) - before
                source, target = ids[steering.source[pair]], ids[steering.target[pair]]
                passed = min(change[target], -change[source])
                assert doses.passed[name][number, pair] == pytest.approx(passed, abs=1e-5)
                moved = np.abs(change).sum() / 2
                assert doses.moved[name][number, pair] == pytest.approx(moved, abs=1e-5)
                chosen = logits[ids].argmax() == steering.target[pair]
                assert doses.flipped[name][number, pair] == chosen


def test_the_logit_edit_raises_the_targets_logit_on_the_sources(trial, steering):
    small = claim.measure_doses({"tiny": steering}, ["logit edit"], (0.02,))["tiny"]
    assert (small.passed["logit edit"] > 0).mean() > 0.8


def test_the_random_plane_is_turned_by_the_same_angle(steering):
    vector = claim.METHODS[claim.RANDOM][1](steering)
    turned = claim.Rotate(30.0)(steering.own, vector)
    found = claim.angle_degrees(steering.own, turned)
    assert found.numpy() == pytest.approx(np.full(len(vector), 30.0), abs=1e-3)
    to = claim.angle_degrees(steering.own, steering.centroid(steering.target))
    assert (claim.angle_degrees(vector, steering.centroid(steering.target)) > to).all()


def test_probability_that_only_changes_places_is_selective_and_rescaling_is_not():
    p = np.array([0.6, 0.1, 0.2, 0.1])
    swapped, spread = np.array([0.2, 0.5, 0.2, 0.1]), np.array([0.2, 0.2, 0.4, 0.2])
    zero = np.zeros(2, dtype=int)
    measure = claim.ProbabilityMoved(torch.log(torch.tensor(p))[None], zero, zero, zero + 1)
    found = measure(torch.log(torch.tensor(np.stack([swapped, spread]))), torch.arange(2))
    shares = torch.minimum(found["gained"], found["lost"]) / found["moved"]
    assert shares.numpy() == pytest.approx([1.0, 0.25])


def test_the_share_is_read_where_the_flip_curve_reaches_one_half():
    flips = [0.1, 0.3, 0.8]  # one half two fifths of the way from the second dose to the third
    passed, moved = [0.1, 0.2, 0.7], [0.4, 0.5, 1.0]
    never = [0.1, 0.2, 0.3]
    at_once = [0.8, 0.2, 0.9]  # reached between dose 0 and the first
    draws = np.array([[flips, passed, moved], [never, passed, moved], [at_once, passed, moved]])
    expected = [(0.2 + 0.4 * 0.5) / (0.5 + 0.4 * 0.5), 0.7, 0.1 / 0.4]
    assert claim.share_at_half(draws) == pytest.approx(expected)


def planted(n=24, seed=2):
    rng = np.random.default_rng(seed)
    own = bare(np.arange(n) % 4, (np.arange(n) + 1) % 4, 4)
    flipped = (np.array([[0.2], [0.5], [0.9]]) > rng.random(n)).astype(float)
    moved = np.array([[0.2], [0.5], [0.8]]) * rng.uniform(0.5, 1, n)
    return Doses(
        own,
        {claim.ROTATE: flipped, claim.RANDOM: 0 * flipped},
        {claim.ROTATE: 0.7 * moved, claim.RANDOM: -0.1 * moved},
        {claim.ROTATE: moved, claim.RANDOM: 0.5 * moved},
    )


def test_a_random_plane_is_compared_at_the_rotations_dose():
    found = claim.selectivity(planted())
    assert float(found["selective_share"]) == pytest.approx(0.7)
    assert float(found["selective_beyond_random"]) == pytest.approx(0.9)
    assert "at most 0.00 flip" in planted().share_at_half(claim.RANDOM).reason


def test_an_unknown_method_is_named_with_the_known_ones(steering):
    with pytest.raises(ValueError, match="Unknown method 'push'; choose among rotate to centroid"):
        claim.measure_doses({"tiny": steering}, ["push"])


def test_rotation_to_the_donor_ends_at_its_direction(trial, steering):
    found = claim.measure_doses({"tiny": steering}, ["rotate to donor"], (0.5,))["tiny"]
    states = states_of(trial)
    for pair, (x, y) in enumerate(steering.pairs.prompts):
        to = mean_state(trial, steering.target[pair], trial.task.prompts["template"][x])
        u, v = unit(states[x]), unit(states[y])
        angle, side = np.arccos(u @ unit(to)) / 2, unit(v - (u @ v) * u)
        state = np.linalg.norm(states[x]) * (np.cos(angle) * u + np.sin(angle) * side)
        chosen = recompute(trial, x, as_state(state))[trial.task.answer_ids].argmax()
        assert found.flipped["rotate to donor"][0, pair] == (chosen == steering.target[pair])


def test_behind_text_the_same_vectors_steer_the_last_token(trial, steering):
    found = claim.measure_behind({"tiny": steering}, ["t1 t2 s3"] * len(steering.pairs))["tiny"]
    template, flips, right = trial.task.prompts["template"], [], []
    decoder = trial.decoder
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        text = f"t1 t2 s3\n\n{trial.task.prompts['text'][x]}"
        (tokens,) = claim.tokenize(decoder, [text])
        state = extract_residuals(decoder, [tokens]).states[BLOCK, 0].double().numpy()
        to = mean_state(trial, steering.target[pair], template[x])
        logits = patched_logits(
            decoder.model,
            decoder.blocks[BLOCK],
            [tokens],
            [[len(tokens) - 1]],
            [as_state(unit(to) * np.linalg.norm(state))[None]],
        )[0].numpy()
        flips.append(logits[trial.task.answer_ids].argmax() == steering.target[pair])
        plain = forward(decoder.model, [tokens])[0][trial.task.answer_ids]
        right.append(int(plain.argmax()) == steering.source[pair])
    assert found["flipped"] == pytest.approx(np.array(flips, dtype=float))
    assert found["right unedited"] == pytest.approx(np.array(right, dtype=float))
    assert flips != right


def test_passages_are_as_long_as_asked_and_none_of_the_texts_judged(embedded):
    found = claim.passages(embedded, 50, 3)
    assert all(len(ids) >= 50 for ids in claim.tokenize(embedded, found))
    judged = load_texts()["context"]
    assert not any(text in passage for passage in found for text in judged)
    assert claim.passages(embedded, 0, 2) == ["", ""]


# --- all of them ---------------------------------------------------------------------------------


def test_all_statistics_are_judged_and_twins_only_where_no_right_answer_is_needed(
    trial, control, doses
):
    pairs = claim.few_pairs(trial)
    lost = Untested("too short")
    parts = claim.measure_parts(
        {"tiny": trial, "lost": lost}, {"tiny": pairs, "lost": lost}, [1, 2]
    )
    spans = claim.measure_span({"tiny": trial}, {"tiny": pairs}, BLOCK)["tiny"]
    lost = dict.fromkeys(claim.SPANS, Untested("too short"))
    trained = claim.statistics(
        parts,
        {"tiny": claim.few_dimensions(trial, spans), "lost": lost},
        {"tiny": control, "lost": Untested("too short")},
        {"tiny": doses, "lost": Untested("too short")},
    )
    twins = claim.twin_statistics([parts] * 4)
    records = judge(claim.CLAIM, "m", trained, twins)
    assert len(records) == 2 * 8 * 3
    own = {(r["statistic"], r["place"], r["untrained"]): r for r in records}
    assert own["norm_transfer", "tiny", False]["n"] == trial.task.n_units
    assert own["norm_transfer", "lost", False]["reason"] == "too short"
    assert own["rotation_flips", "tiny", True]["verdict"] == "not testable"
    assert "right answers" in own["rotation_flips", "tiny", True]["reason"]
    assert claim_verdict(records, claim.CLAIM, "m", untrained=True).verdict != "supported"


def test_each_statistic_bears_the_number_that_it_is_named_after(trial, control):
    parts = claim.measure_parts({"tiny": trial}, {"tiny": claim.few_pairs(trial)}, [1, 2])["tiny"]
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


def test_a_twins_numbers_are_those_of_its_own_weights(trial):
    torch.manual_seed(11)
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    twin = load_decoder(model, tokenizer=tiny_tokenizer(WORDS))
    found = claim.measure_twin(twin, {"tiny": trial, "lost": Untested("why")}, [1], 6)
    assert found["lost"] == Untested("why")
    own = replace(trial, decoder=twin)
    for pair, (x, y) in enumerate(claim.few_pairs(trial, 6).prompts):
        given = block_states(model, twin.blocks, trial.task.tokens[y])[1, -1]
        logs = [forward(model, [trial.task.tokens[row]])[0].double() for row in (x, y)]
        before, donor = (log_softmax(one.numpy()) for one in logs)
        after = log_softmax(recompute(own, x, given, 1).astype(float))
        for part, q in (("after", after), ("before", before)):
            kl = (np.exp(donor) * (donor - q)).sum()
            measured = np.atleast_2d(getattr(found["tiny"]["whole"], part))[0, pair]
            assert measured == pytest.approx(kl, rel=1e-3, abs=1e-4)


def test_a_twins_number_is_one_and_the_seeds_are_the_units(trial):
    pairs = claim.few_pairs(trial)
    by_seed = [
        claim.measure_twin(trial.decoder, {"tiny": trial}, [1], most) for most in (6, 8, 10, 12)
    ]
    whole = claim.measure_parts({"tiny": trial}, {"tiny": pairs}, [1])["tiny"]["norm"]
    assert by_seed[-1]["tiny"]["norm"].after == pytest.approx(whole.after, abs=1e-5)
    found = claim.twin_statistics(by_seed)["norm_transfer"]["tiny"]
    each = [float(claim.direction_and_norm(one["tiny"])["norm_transfer"]) for one in by_seed]
    assert float(found) == pytest.approx(np.mean(each))
    assert found.units == "seeds" and found.n_units == 4
