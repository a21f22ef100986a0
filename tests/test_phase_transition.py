"""The phase transition's statistics, against full recomputes, closed forms and naive loops."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from oracle import block_states
from scipy.spatial.distance import pdist
from scipy.stats import norm, spearmanr, t
from tiny_tasks import WORDS, as_sums, clean, kl, place, recompute

from lib.claims import phase_transition as claim
from lib.claims.phase_transition import Arms
from lib.engine.models import load_decoder
from lib.evidence.by_task import beyond_twins, each
from lib.evidence.content import CONTROLS, Content
from lib.evidence.criteria import claim_verdict, judge
from lib.evidence.tasks import exchange_pairs, load_tasks
from lib.evidence.transfer import ARMS, Transfer, choose_pairs, needed_prompts, read_tasks
from lib.reading import phase_transition_figures as drawn
from lib.reading.figures import task_table
from lib.science import curves
from lib.science.estimate import Estimate, Untested, mean_over_units, over_seeds


def switch(arms):
    return claim.plateaus(arms) | claim.widths(arms)


L = 30
NAMES = ("context arm", "prediction arm")


# --- made curves ----------------------------------------------------------------------------------


def made_arms(context, prediction, *, n_subjects=40, n_templates=1, noise=0.0, seed=0, name="made"):
    """Arms whose T is the curve given, `[n_blocks]`, with noise that templates share."""
    rng = np.random.default_rng(seed)
    unit = np.tile(np.arange(n_subjects), n_templates)
    before = np.tile(rng.uniform(1, 5, size=n_subjects), n_templates)
    transfers = {}
    for arm, curve in zip(NAMES, (context, prediction), strict=True):
        own = np.asarray(curve)[:, None] + noise * rng.standard_normal((len(curve), n_subjects))
        after = np.tile(1 - own, (1, n_templates)) * before
        choice = np.zeros(after.shape, dtype=int)
        target = np.zeros(len(unit), dtype=int)
        blocks = tuple(range(len(curve)))
        units = f"subjects of {name}"
        transfers[arm] = Transfer(blocks, after, before, choice, target, unit, units, n_subjects)
    return Arms(len(context), transfers)


def step(at, low=0.0, high=1.0, n_blocks=L):
    """A fall from high to low between two blocks."""
    return np.where(np.arange(n_blocks) < at, high, low)


def sharp(at=23, **options):
    return made_arms(step(at), 1 - step(at), **options)


def test_switch_of_a_step_is_known_in_closed_form():
    found = {name: float(one) for name, one in switch(sharp()).items()}
    assert found["context_early"] == pytest.approx(1)
    assert found["context_last_sixth"] == pytest.approx(0)
    assert found["prediction_early"] == pytest.approx(0)
    assert found["prediction_last_sixth"] == pytest.approx(1)
    assert found["context_fall_width"] == pytest.approx(0.8 / L)
    assert found["prediction_rise_width"] == pytest.approx(0.8 / L)
    assert float(claim.hand_over(sharp())) == pytest.approx(1)
    assert float(claim.find_transition(sharp())) == pytest.approx(22.5)


def test_the_transition_is_drawn_with_both_arms_and_untested_where_they_do_not_cross():
    noisy = made_arms(step(23), 1 - step(23), noise=0.02)
    found = claim.find_transition(noisy)
    assert float(found) == pytest.approx(22.5, abs=0.05)
    for draw in (1, 7):  # of the same subjects in both arms
        both = [noisy.curve(arm).draws[draw] for arm in NAMES]
        assert found.draws[draw] == pytest.approx(curves.crossing(*both))
    lost = claim.find_transition(made_arms(1 - step(23), step(23)))
    assert isinstance(lost, Untested) and "undefined" in lost.reason


def test_early_and_late_blocks_are_those_of_the_registration():
    curve = np.arange(L, dtype=float)
    found = switch(made_arms(-curve, curve))
    assert float(found["prediction_early"]) == pytest.approx(np.mean(range(8, 16)))
    assert float(found["context_early"]) == pytest.approx(-np.mean(range(8, 16)))
    assert float(found["prediction_last_sixth"]) == pytest.approx(np.mean([25, 26, 27, 28]))
    s = float(claim.hand_over(made_arms(-curve, curve)))
    assert s == pytest.approx(np.mean([25, 26, 27, 28]) - np.mean(range(8, 16)))


def test_the_last_block_counts_nowhere():
    bent = 1 - step(23)
    bent[-1] = 50.0
    for name, one in switch(made_arms(step(23), bent)).items():
        assert float(one) == pytest.approx(float(switch(sharp())[name]))


def test_a_slow_hand_over_has_its_width_in_shares_of_the_depth():
    ramp = np.clip((np.arange(L) - 5) / 20, 0, 1)
    found = switch(made_arms(1 - ramp, ramp))
    assert float(found["context_fall_width"]) == pytest.approx(16 / L)
    assert float(found["prediction_rise_width"]) == pytest.approx(16 / L)


def test_thin_blocks_give_the_same_places_in_blocks():
    ramp = np.clip((np.arange(L) - 4) / 18, 0, 1)
    whole = made_arms(1 - ramp, ramp)
    thin = whole.restrict(np.arange(40), claim.twin_blocks(L))
    assert thin.blocks == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert float(claim.find_transition(thin)) == pytest.approx(13)
    width = float(switch(thin)["prediction_rise_width"])
    assert width == pytest.approx(18 * 0.8 / L)
    assert claim.twin_blocks(4) == [0, 1, 2]


def test_a_curve_without_fall_is_untested_with_the_reason():
    flat = made_arms(np.full(L, 0.3), 1 - step(23))
    found = switch(flat)["context_fall_width"]
    assert isinstance(found, Untested)
    assert "undefined" in found.reason


def test_templates_are_no_units():
    """Ten copies of every subject's prompts say nothing new: the interval stays as wide."""
    one = switch(sharp(noise=0.3))["context_early"]
    ten = switch(sharp(noise=0.3, n_templates=10))["context_early"]
    assert one.n_units == ten.n_units == 40
    widths = [found.interval().high - found.interval().low for found in (one, ten)]
    assert widths[1] == pytest.approx(widths[0])


# --- the place ------------------------------------------------------------------------------------


def test_spread_is_the_largest_distance_from_the_median():
    places = {"a": 20, "b": 22, "c": 23, "d": 27}
    found = {
        name: claim.find_transition(sharp(at, noise=0.02, name=name)) for name, at in places.items()
    }
    spread = claim.transition_spread(found, L)
    values = np.array([float(one) for one in found.values()])
    assert float(spread) == pytest.approx(np.abs(values - np.median(values)).max() / L)
    assert spread.n_units == 160


def test_interval_of_the_largest_distance_is_bonferronis_below_and_the_draws_above():
    """Above the middle what was drawn; below it one task's draws, spread for four tasks."""
    places = {"a": 20, "b": 22, "c": 23, "d": 27}
    found = {
        name: claim.find_transition(sharp(at, noise=0.3, name=name)) for name, at in places.items()
    }
    spread = claim.transition_spread(found, L)
    draws = np.stack([one.draws for one in found.values()])
    distances = np.abs(draws - np.median(draws, axis=0)) / L
    assert distances[3, 0] == distances[:, 0].max()
    one, several = distances[3, 1:], distances[:, 1:].max(axis=0)
    assert np.quantile(spread.draws[1:], 0.975) == pytest.approx(np.quantile(several, 0.975))
    below = (distances[3, 0] - np.quantile(one, 0.025)) * norm.ppf(1 - 0.025 / 4) / norm.ppf(0.975)
    assert np.quantile(spread.draws[1:], 0.025) == pytest.approx(distances[3, 0] - below, abs=1e-4)


@pytest.mark.parametrize(("lost", "tested"), [(1, True), (2, False)])
def test_the_place_is_untested_where_over_a_quarter_of_the_tasks_have_none(lost, tested):
    found = {
        f"task {i}": Untested("no crossing")
        if i < lost
        else claim.find_transition(sharp(noise=0.02))
        for i in range(5)
    }
    spread = claim.transition_spread(found, L)
    assert isinstance(spread, Estimate) == tested
    if not tested:
        assert spread.reason == "no transition in 2 of 5 tasks"


def test_one_task_has_no_spread():
    spread = claim.transition_spread({"a": claim.find_transition(sharp(noise=0.02))}, L)
    assert spread.reason == "a transition in 1 of 1 tasks; 2 are needed"


def test_a_curve_is_recorded_by_block_as_the_mean_over_the_books_tasks():
    arms = {"a": sharp(20, name="a"), "b": sharp(23, name="b"), "own: c": sharp(3, name="c")}
    arms["d"] = Untested("accuracy 0.1")
    twins = [{"a": sharp(at, name="a"), "b": Untested("flat")} for at in (5, 6, 7)]
    rows = claim.curve_records("m", arms, twins)
    blocks = [f"block {block}" for block in range(L - 1)]  # the last counts nowhere
    for number, arm in enumerate(ARMS):
        own, untrained = rows[2 * number * (L - 1) :][: L - 1], rows[(2 * number + 1) * (L - 1) :]
        assert {row["statistic"] for row in own} == {arm}
        assert [row["place"] for row in own] == blocks
        both = [arms[name].curve(arm).value for name in "ab"]
        assert [row["estimate"] for row in own] == pytest.approx(np.mean(both, axis=0))
        seeds = [twin["a"].curve(arm).value for twin in twins]
        found = [row["estimate"] for row in untrained[: L - 1]]
        assert found == pytest.approx(np.mean(seeds, axis=0))
        assert untrained[0]["untrained"] and untrained[0]["n"] == 3
    assert claim.curve_records("m", {"d": arms["d"]}, [{"d": arms["d"]}] * 3) == []


# --- twins ----------------------------------------------------------------------------------------


def smooth(seed, name="made"):
    climb = np.linspace(0.1, 0.6 + seed / 20, L)
    return made_arms(0.45 * (1 - climb), climb, noise=0.05, seed=seed, name=name)


def hand_over_beyond_twins(trained, twins):
    return beyond_twins(
        each(trained, claim.hand_over), [each(twin, claim.hand_over) for twin in twins]
    )


def test_hand_over_beyond_twins_is_a_difference_with_seeds_as_units():
    trained = {"a": sharp(noise=0.05, name="a"), "b": sharp(20, noise=0.05, name="b")}
    twins = [{"a": smooth(seed), "b": smooth(seed + 5)} for seed in range(5)]
    found = hand_over_beyond_twins(trained, twins)
    own = np.mean([float(claim.hand_over(one)) for one in trained.values()])
    theirs = [np.mean([float(claim.hand_over(one)) for one in twin.values()]) for twin in twins]
    assert float(found) == pytest.approx(own - np.mean(theirs))
    interval = found.interval()
    half = t.ppf(0.975, 4) * np.std(theirs, ddof=1) / np.sqrt(5)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.35)


def test_a_task_that_a_twin_cannot_be_measured_on_is_left_out_of_both():
    trained = {"a": sharp(noise=0.05, name="a"), "b": smooth(0)}
    twins = [
        {"a": smooth(seed), "b": Untested("the predictions are all alike")} for seed in range(5)
    ]
    found = hand_over_beyond_twins(trained, twins)
    own = float(claim.hand_over(trained["a"]))
    theirs = np.mean([float(claim.hand_over(twin["a"])) for twin in twins])
    assert float(found) == pytest.approx(own - theirs)


def test_over_seeds_names_the_reason_of_a_lost_seed():
    lost = over_seeds([mean_over_units([1, 2, 3.0], "u"), Untested("flat")])
    assert lost.reason == "1 of 2 networks: flat"


def test_twins_are_measured_on_pairs_of_the_trained_model(trial, pairs):
    """The same network in the twin's place gives what the trained model's own pairs give."""
    found = claim.measure_twin(trial.decoder, {"tiny": trial}, {"tiny": pairs})["tiny"]
    expected = claim.as_twins(claim.measure_arms({"tiny": trial}, {"tiny": pairs})["tiny"], pairs)
    assert found.blocks == expected.blocks == [0, 1, 2]
    for arm in NAMES:
        one, other = found.transfers[arm], expected.transfers[arm]
        assert len(one.unit) == claim.TWIN_PAIRS
        assert (one.unit == other.unit).all()
        assert one.before == pytest.approx(other.before, rel=1e-3, abs=1e-6)
        assert one.after == pytest.approx(other.after, rel=1e-3, abs=1e-5)
        assert found.curve(arm).units == expected.curve(arm).units


def test_a_twins_numbers_are_those_of_its_own_weights(trial, pairs):
    torch.manual_seed(11)
    other = tiny_model("llama")
    for parameter in other.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    twin = load_decoder(other, tokenizer=tiny_tokenizer(WORDS))
    found = claim.measure_twin(twin, {"tiny": trial}, {"tiny": pairs})["tiny"]
    few = pairs.thin(claim.TWIN_PAIRS)
    own = replace(trial, decoder=twin)
    for arm in NAMES:
        for index, (x, y) in enumerate(few.prompts[:3]):
            given = block_states(twin.model, twin.blocks, trial.task.tokens[y])[1]
            edited = recompute(own, x, place(trial, x, arm), 1, given[place(trial, y, arm)])
            after = kl(clean(own, y), edited)
            assert found.transfers[arm].after[1, index] == pytest.approx(after, rel=1e-3, abs=1e-5)
            before = kl(clean(own, y), clean(own, x))
            assert before != pytest.approx(kl(clean(trial, y), clean(trial, x)), rel=0.1)


def test_only_the_prompts_that_pairs_need_are_kept(trial, pairs):
    few = pairs.thin(5)
    task, (own,) = needed_prompts(trial.task, few)
    assert task.n_prompts == len(np.unique(few.prompts))
    for kept, whole in zip(own.prompts.ravel(), few.prompts.ravel(), strict=True):
        assert task.tokens[kept] == trial.task.tokens[whole]


# --- steering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", NAMES)
def test_steering_adds_differences_of_centroids_of_the_other_templates(trial, pairs, arm):
    few = pairs.where(np.arange(0, len(pairs), 5))
    transfer = claim.measure_steering({"": trial}, {"": few}, [1])[arm][""]
    prompts = trial.task.prompts
    states = trial.states("subject" if arm == "context arm" else "last")[1]
    label = "unit" if arm == "context arm" else "answer"
    for index, (x, y) in enumerate(few.prompts):
        centroids = []
        for row in (y, x):
            alike = [
                states[other]
                for other in range(len(prompts))
                if prompts[label][other] == prompts[label][row]
                and prompts["template"][other] != prompts["template"][x]
            ]
            centroids.append(torch.stack(alike).mean(0))
        steered = states[x] + centroids[0] - centroids[1]
        edited = recompute(trial, x, place(trial, x, arm), 1, steered)
        expected = kl(clean(trial, y), edited)
        assert transfer.after[0, index] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert transfer.before[index] == pytest.approx(
            kl(clean(trial, y), clean(trial, x)), rel=1e-3
        )


# --- the geometry ---------------------------------------------------------------------------------


def test_alignment_is_spearmans_within_templates(trial, pairs):
    arms = claim.measure_arms({"tiny": trial}, {"tiny": pairs}, [1])["tiny"]
    found = claim.alignment(trial, arms.transfers["prediction arm"])
    template = trial.task.prompts["template"].to_numpy()
    expected = []
    for block in range(trial.decoder.n_blocks - 1):
        by_template = []
        for own in range(3):
            rows = np.flatnonzero(template == own)
            theta = np.arccos(1 - pdist(trial.states("last")[block][rows].double(), "cosine"))
            logs = [clean(trial, row) for row in rows]
            j = [
                kl(logs[a], logs[b]) + kl(logs[b], logs[a])
                for a in range(12)
                for b in range(a + 1, 12)
            ]
            by_template.append(spearmanr(theta, j).statistic)
        expected.append(np.mean(by_template))
    assert found.value == pytest.approx(np.array(expected), abs=2e-3)
    assert found.n_units == 12
    assert found.units == arms.curve("prediction arm").units


def test_width_gap_is_positive_where_the_geometry_rises_more_slowly():
    ramp = np.clip((np.arange(L - 1) - 8) / 10, 0, 1)
    arms = sharp(noise=0.01)
    rng = np.random.default_rng(1)
    rho = mean_over_units(
        ramp + 0.001 * rng.standard_normal((40, L - 1)), arms.curve(NAMES[0]).units
    )
    gap = claim.width_gap(rho, arms)
    assert float(gap) == pytest.approx(8 - 0.8, abs=0.1)
    assert gap.interval().low > 0


def test_groups_are_aligned_apart(tiny_trials):
    """In month arithmetic: prompts of one template and one offset, and the mean over these."""
    sums = as_sums(tiny_trials["tiny"].decoder)
    pairs = exchange_pairs(sums.task, n_donors=3)
    arms = claim.measure_arms({"": sums}, {"": pairs}, [1])[""]
    found = claim.alignment(sums, arms.transfers["prediction arm"])
    logs = [clean(sums, row) for row in range(sums.task.n_prompts)]
    expected = []
    for _, rows in sums.task.prompts.groupby("group").indices.items():
        theta = pdist(sums.states("last")[1][rows].double(), "cosine")  # ranks of the angles
        j = [
            kl(logs[a], logs[b]) + kl(logs[b], logs[a])
            for index, a in enumerate(rows)
            for b in rows[index + 1 :]
        ]
        expected.append(spearmanr(theta, j).statistic)
    assert len(expected) == 3
    assert found.value[1] == pytest.approx(np.mean(expected), abs=2e-3)
    order = np.random.default_rng(0).permutation(sums.task.n_prompts)
    prompts = sums.task.prompts.iloc[order].reset_index(drop=True)
    turned = read_tasks(sums.decoder, {"sums": replace(sums.task, prompts=prompts)})["sums"]
    again = claim.alignment(turned, arms.transfers["prediction arm"])
    assert again.draws == pytest.approx(found.draws, abs=1e-3)  # subjects are drawn, not rows


def test_width_gap_is_measured_from_the_prediction_arm_not_from_the_context_arm():
    slow = 1 - np.clip((np.arange(L) - 4) / 20, 0, 1)
    arms = made_arms(slow, 1 - step(23), noise=0.01)
    ramp = np.clip((np.arange(L - 1) - 8) / 10, 0, 1)
    noise = 0.001 * np.random.default_rng(1).standard_normal((40, L - 1))
    rho = mean_over_units(ramp + noise, arms.curve(NAMES[0]).units)
    assert float(claim.width_gap(rho, arms)) == pytest.approx(8 - 0.8, abs=0.1)


# --- gates and verdicts ---------------------------------------------------------------------------


def test_a_task_with_groups_needs_one_that_passes_the_gate(trial, monkeypatch):
    grouped = replace(trial.task, prompts=trial.task.prompts.assign(group="two"))
    failing = replace(trial, task=grouped)
    assert "accuracy" in choose_pairs(failing).reason
    monkeypatch.setattr(type(trial), "able_groups", property(lambda _self: ["two"]))
    assert len(choose_pairs(failing)) == len(choose_pairs(trial))


def test_only_groups_that_the_model_masters_are_exchanged(tiny_trials, monkeypatch):
    sums = as_sums(tiny_trials["tiny"].decoder)
    monkeypatch.setattr(type(sums), "able_groups", property(lambda _self: ["t1"]))
    pairs = choose_pairs(sums)
    assert len(pairs) == 12
    assert set(sums.task.prompts["group"].iloc[pairs.prompts.ravel()]) == {"t1"}


def test_a_task_without_groups_needs_no_right_answer(trial):
    assert trial.gate is not None
    assert len(choose_pairs(trial)) == 12


def test_the_second_operand_is_exchanged_at_its_own_token(tiny_trials):
    decoder = tiny_trials["tiny"].decoder
    sums = as_sums(decoder)
    task = sums.task
    pairs = exchange_pairs(task, n_donors=3)
    other, own = claim.second_operand(sums, pairs)
    prompts = task.prompts
    for (x, y), unit in zip(own.prompts, own.unit, strict=True):
        assert prompts["subject"][x] == prompts["subject"][y]
        assert prompts["group"][x] != prompts["group"][y]
        assert unit == prompts["unit"][x]
        assert task.tokens[x][2] == WORDS.index(prompts["group"][x])
    assert (other.task.subject_positions == 2).all()
    arms = claim.measure_arms({"": other}, {"": own.where(np.arange(6))}, [1])[""]
    states = [block_states(decoder.model, decoder.blocks, tokens)[1, 2] for tokens in task.tokens]
    for index, (x, y) in enumerate(own.prompts[:6]):
        edited = recompute(sums, x, 2, 1, states[y])
        found = arms.transfers["context arm"].after[0, index]
        assert found == pytest.approx(kl(clean(sums, y), edited), rel=1e-3, abs=1e-6)


def test_every_recipient_gets_the_next_offset_in_its_own_template_and_month(tiny_trials):
    sums = as_sums(tiny_trials["tiny"].decoder)
    pairs = exchange_pairs(sums.task, n_donors=3)
    _, own = claim.second_operand(sums, pairs)
    assert set(own.prompts[:, 0]) == set(pairs.prompts[:, 0])
    group = sums.task.prompts["group"].to_numpy()
    after = {"t0": "t1", "t1": "t2", "t2": "t0"}
    assert [after[group[x]] for x in own.prompts[:, 0]] == list(group[own.prompts[:, 1]])


def every_statistic(arms, twins):
    """The claim's statistics where controls carry nothing and the geometry is slow."""
    ramp = np.clip((np.arange(L - 1) - 8) / 10, 0, 1)
    rng = np.random.default_rng(3)

    def about(value, name, size=()):
        noise = 0.02 * rng.standard_normal((40, *np.shape(value)))
        return mean_over_units(value + noise, f"subjects of {name}")

    ready = [name for name, one in arms.items() if isinstance(one, Arms)]
    return claim.statistics(
        L,
        arms,
        {
            name: Content(
                {
                    "donor": about(np.ones(2), name),
                    "covariance_matched": about(np.full(2, 0.3), name),
                },
                {c: about(np.zeros(2), name) for c in CONTROLS},
                about(np.full(2, 0.1), name),
                0.0,
            )
            for name in ready
        },
        {name: about(ramp, name) for name in ready},
        {name: arms[name].restrict(np.arange(40), claim.twin_blocks(L)) for name in ready},
        twins,
    )


def smooth_twins(names):
    return [
        {
            name: replace(smooth(seed), is_seed=True).restrict(np.arange(40), claim.twin_blocks(L))
            for name in names
        }
        for seed in range(5)
    ]


def test_a_sharp_switch_is_supported_and_its_twins_are_not():
    names = ["a", "b", "c"]
    arms = {name: sharp(noise=0.05, seed=i, name=name) for i, name in enumerate(names)}
    own, theirs = every_statistic(
        {**arms, "d": Untested("accuracy 0.08, 0.8 is needed")}, smooth_twins(names)
    )
    records = judge(claim.CLAIM, "m", own, theirs)
    verdict = claim_verdict(records, claim.CLAIM, "m")
    assert verdict.verdict == "supported", verdict
    assert claim_verdict(records, claim.CLAIM, "m", untrained=True).verdict == "refuted"
    lost = [row for row in records if row["place"] == "d" and not row["untrained"]]
    assert {row["verdict"] for row in lost} == {"not testable"}
    assert {row["reason"] for row in lost} == {"accuracy 0.08, 0.8 is needed"}


def test_a_slow_hand_over_is_refuted():
    names = ["a", "b", "c"]
    arms = {name: smooth(i, name) for i, name in enumerate(names)}
    own, theirs = every_statistic(arms, smooth_twins(names))
    records = judge(claim.CLAIM, "m", own, theirs)
    assert claim_verdict(records, claim.CLAIM, "m").verdict == "refuted"


def test_arms_that_are_exchanged_refute_the_claim():
    names = ["a", "b", "c"]
    arms = {
        name: made_arms(1 - step(23), step(23), noise=0.05, seed=i, name=name)
        for i, name in enumerate(names)
    }
    found = {name: switch(one) for name, one in arms.items()}
    assert float(claim.hand_over(arms["a"])) == pytest.approx(-1, abs=0.05)
    assert isinstance(found["a"]["context_fall_width"], Untested)


# --- the real model -------------------------------------------------------------------------------


def test_the_default_model_hands_over_from_subject_to_last_token(embedded):
    whole = load_tasks(embedded, ["capitals"])["capitals"]
    pairs = exchange_pairs(whole, n_donors=1)
    task, (few,) = needed_prompts(whole, pairs.thin(6))
    real = read_tasks(embedded, {"capitals": task})["capitals"]
    arms = claim.measure_arms({"": real}, {"": few}, [12, 26])[""]
    assert arms.curve("context arm").value == pytest.approx([1, 0], abs=0.2)
    assert arms.curve("prediction arm").value == pytest.approx([0, 1], abs=0.2)


def test_a_table_of_nothing_measured_keeps_its_numbers_types_beside_others():
    nothing = task_table({"a": Untested("accuracy 0.1")}, range(4))
    beside = pd.concat([task_table({"a": mean_over_units(np.eye(4), "u")}, range(4)), nothing])
    assert len(nothing) == 0
    assert all(beside[name].dtype.kind in "if" for name in ("block", "estimate", "low", "high"))


def put_in(panel, *estimates):
    rows = [
        (panel, "other task", "prediction arm", f"task {n}", x) for n, x in enumerate(estimates)
    ]
    return pd.DataFrame(rows, columns=["panel", "donor", "arm", "task", "estimate"])


def drawn_at(axes, marker, size):
    """Places of a marker on x: small ones are tasks, large ones means."""
    lines = [one for one in axes.lines if one.get_marker() == marker]
    chosen = [one for one in lines if (one.get_markersize() == 8) == (size == "large")]
    return [float(x) for one in chosen for x in one.get_xdata()]


def test_what_lies_far_left_is_an_arrowhead_at_the_edge_and_the_rest_keeps_its_place():
    table = pd.concat([put_in("far", 0.5, -0.25, -39.0), put_in("near", 0.5, -0.25)])
    figure = drawn.content(table, {"near": 0.1})
    far, near = figure.axes
    assert drawn_at(far, "s", "small") == [0.5, -0.25]
    assert drawn_at(far, "<", "small") == drawn_at(far, "<", "large") == [drawn.LEAST]
    assert drawn_at(far, "D", "large") == []
    assert far.get_xlim()[0] == drawn.LEAST and far.get_xlim()[1] > 0.5
    assert drawn_at(near, "<", "small") == drawn_at(near, "<", "large") == []
    assert drawn_at(near, "D", "large") == [0.125] and near.get_xlim()[0] > -0.5
    plt.close(figure)
