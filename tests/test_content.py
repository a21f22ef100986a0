"""What states put in do: against full recomputes, closed forms and naive loops."""

import numpy as np
import pytest
import torch
from oracle import block_states
from tiny_tasks import ANSWERS, SUBJECTS, as_sums, clean, kl, place, recompute, tiny_task

from lib.engine.edits import exchange
from lib.engine.readouts import Distributions
from lib.engine.sweeps import sweep_together
from lib.evidence import content
from lib.evidence.tasks import Pairs, exchange_pairs, load_tasks
from lib.evidence.transfer import (
    ARMS,
    choose_pairs,
    measure_transfer,
    needed_prompts,
    read_tasks,
)
from lib.science.estimate import Estimate


def choose_all(trials):
    return {name: choose_pairs(one) for name, one in trials.items()}


@pytest.fixture(scope="module")
def contents(tiny_trials):
    return content.measure_content(tiny_trials, choose_all(tiny_trials))


@pytest.mark.parametrize("arm", ARMS)
def test_states_put_in_equal_a_full_recompute(trial, pairs, arm):
    few = pairs.prompts[::7]
    third = few[::-1, 1]
    states = content.states_at(trial, arm, [1])[0][torch.as_tensor(few[:, 1])]
    toward = {"recipient": few[:, 0], "donor": few[:, 1], "third": third}
    known = Distributions.of(trial.logits)
    request = content.put_in(trial, known, toward, states, arm)
    (sweep,) = sweep_together(trial.decoder, [request], {"exchange": exchange}, blocks=[1])
    found = {name: values[0, 0] for name, values in sweep.measures.items()}
    for row, (x, y) in enumerate(few):
        edited = recompute(trial, x, place(trial, x, arm), 1, states[row])
        for name, k in (("recipient", x), ("donor", y), ("third", third[row])):
            expected = kl(clean(trial, k), edited)
            assert found[name][row] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_states_are_those_of_the_whole_prompt(trial, arm):
    found = content.states_at(trial, arm, [0, 2])
    for row in range(0, trial.task.n_prompts, 5):
        own = block_states(trial.decoder.model, trial.decoder.blocks, trial.task.tokens[row])
        assert torch.allclose(found[:, row], own[[0, 2], place(trial, row, arm)], atol=1e-4)


def test_transfer_of_the_donor_is_that_of_the_exchange(trial, contents):
    found, pairs = contents["tiny"].transfer["donor"], choose_pairs(trial)
    blocks = content.carrying_blocks(trial.decoder.n_blocks)
    for index, (arm, block) in enumerate(blocks.items()):
        expected = measure_transfer(trial, pairs, ARMS[arm]).estimate()
        assert found.value[index] == pytest.approx(float(expected.at(block)), abs=1e-4)
        assert found.units == expected.units


def test_self_donor_changes_nothing(contents, embedded):
    assert contents["tiny"].self_donor <= 1e-5
    tasks = load_tasks(embedded, ["capitals", "months-sequence"])
    few = {
        name: needed_prompts(task, exchange_pairs(task, n_donors=1).where(np.arange(4)))
        for name, task in tasks.items()
    }
    real = read_tasks(embedded, {name: task for name, (task, _) in few.items()})
    found = content.measure_content(real, {name: own for name, (_, (own,)) in few.items()})
    assert max(one.self_donor for one in found.values()) <= 1e-5


def test_nulls_are_measured_beyond_chance(tiny_trials, trial, contents):
    """By the loop: T towards the donor less, if above 0, T towards all donors of third answers."""
    small, (own, _) = content._narrow(trial, choose_pairs(trial))
    other = content._narrow(tiny_trials["other"], choose_pairs(tiny_trials["other"]))[0]
    answers, template = small.task.answer_index, small.task.prompts["template"].to_numpy()
    logs = [clean(small, row) for row in range(small.task.n_prompts)]
    for index, (arm, block) in enumerate(content.carrying_blocks(4).items()):
        states = content.states_at(small, arm, [block])[0]
        others = content.states_at(other, arm, [block])[0]
        put = content.control_states(small.task, own, states, others, arm)
        for name in content.CONTROLS:
            sums = np.zeros((2, 2))
            for row, (x, y) in enumerate(own.prompts):
                edited = recompute(small, x, place(small, x, arm), block, put[name][row])
                third = [
                    z
                    for z in range(small.task.n_prompts)
                    if template[z] == template[y] and answers[z] not in (answers[x], answers[y])
                ]
                sums[0] += kl(logs[y], edited), kl(logs[y], logs[x])
                sums[1] += np.mean(
                    [(kl(logs[z], edited), kl(logs[z], logs[x])) for z in third], axis=0
                )
            near, far = 1 - sums[:, 0] / sums[:, 1]
            found = contents["tiny"]
            assert found.transfer[name].value[index] == pytest.approx(near, abs=2e-3)
            beyond = found.beyond_chance[name].value[index]
            assert beyond == pytest.approx(near - max(far, 0), abs=4e-3)
            if name == "covariance_matched":
                margin = found.transfer["donor"].value[index] - near
                assert found.margin.value[index] == pytest.approx(margin, abs=2e-3)


def test_transfer_of_a_control_is_drawn_over_subjects(trial):
    """Ten prompts of every subject with the same outcome say no more than one."""
    rng = np.random.default_rng(4)
    after, before, unit = rng.exponential(size=12), rng.exponential(2, size=12), np.arange(12)
    one = content._transfer(trial.task, after, before, unit)
    ten = content._transfer(trial.task, *(np.tile(values, 10) for values in (after, before, unit)))
    assert float(one) == pytest.approx(1 - after.sum() / before.sum())
    assert ten.n_units == 12
    assert ten.draws == pytest.approx(one.draws)


def test_donors_of_the_same_answer_have_it(trial, pairs):
    alike = content.same_answer_pairs(trial.task, pairs)
    prompts = trial.task.prompts
    for (x, y), unit in zip(alike.prompts, alike.unit, strict=True):
        assert prompts["answer"][x] == prompts["answer"][y]
        assert prompts["template"][x] == prompts["template"][y]
        assert prompts["unit"][x] == unit != prompts["unit"][y]


def test_groups_are_kept_apart_in_controls_third_answers_and_donors_of_the_same_answer(tiny_trials):
    """What stands beside a donor shares its group (the offset), as its template."""
    sums = as_sums(tiny_trials["tiny"].decoder)
    pairs = exchange_pairs(sums.task, n_donors=1)
    group, answer = sums.task.prompts["group"].to_numpy(), sums.task.answer_index
    alike = content.same_answer_pairs(sums.task, pairs)
    assert len(alike) == len(pairs)
    assert (group[alike.prompts[:, 0]] == group[alike.prompts[:, 1]]).all()
    log_p, _ = content.third_answers(sums.task, pairs, sums.logits)
    x, y = pairs.prompts[0]
    rows = np.flatnonzero((group == group[y]) & (answer != answer[x]) & (answer != answer[y]))
    mean = torch.stack([clean(sums, row).exp() for row in rows]).mean(0)
    assert torch.allclose(log_p[0].double().exp(), mean, atol=1e-4)
    marked = torch.as_tensor(np.unique(group, return_inverse=True)[1])[:, None].float() * 10
    own = content.states_at(sums, "prediction arm", [1])[0]
    states = torch.cat([own, marked.expand(-1, 1)], dim=1)
    drawn = content.control_states(sums.task, pairs, states, states, "prediction arm")
    matched = drawn["covariance_matched"][:, -1]
    assert torch.allclose(matched, states[torch.as_tensor(pairs.prompts[:, 1]), -1], atol=1e-3)


def test_disturbance_ratio_is_one_of_sums_over_subjects(trial):
    rng = np.random.default_rng(2)
    alike_unit, unit = rng.integers(0, 12, 30), np.repeat(np.arange(10), 3)
    alike, other = rng.exponential(size=30), rng.exponential(size=30)
    found = content.disturbance_ratio(trial.task, alike, alike_unit, other, unit)
    both = sorted(set(alike_unit) & set(unit))
    sums = [
        sum(values[own == one].mean() for one in both)
        for values, own in ((alike, alike_unit), (other, unit))
    ]
    assert float(found) == pytest.approx(sums[0] / sums[1])
    assert found.n_units == len(both)


def test_disturbance_by_the_same_answer_is_over_that_by_the_donor_from_the_recipient(
    trial, contents
):
    """By the loop: KL(p_x ‖ p_edited) of donors of the same answer over that of the donors."""
    small, (own, alike) = content._narrow(trial, choose_pairs(trial))
    for index, (arm, block) in enumerate(content.carrying_blocks(4).items()):
        states = content.states_at(small, arm, [block])[0]
        sums = [
            sum(
                kl(clean(small, x), recompute(small, x, place(small, x, arm), block, states[y]))
                for x, y in pairs.prompts
            )
            for pairs in (alike, own)
        ]
        assert set(alike.unit) == set(own.unit)  # one pair a subject of either kind
        found = contents["tiny"].same_answer.value[index]
        assert found == pytest.approx(sums[0] / sums[1], rel=2e-3)


def test_one_subject_an_answer_cannot_be_tested_for_the_same_answer(trial):
    decoder = trial.decoder
    answers = [f"t{i}" for i in range(6)] + ANSWERS
    templates = ["a0 {subject} a1", "a2 {subject} a0"]
    task = tiny_task(decoder, "single", SUBJECTS[:10], answers, templates)
    both = {**read_tasks(decoder, {"single": task}), "tiny": trial}
    found = content.measure_content(both, choose_all(both))
    assert found["single"].same_answer.reason == "donors of the same answer for 0 subjects"
    assert isinstance(found["tiny"].same_answer, Estimate)


def test_two_answers_leave_no_third(trial):
    task = tiny_task(trial.decoder, "two", answers=ANSWERS[:2])
    both = {**read_tasks(trial.decoder, {"two": task}), "tiny": trial}
    found = content.measure_content(both, choose_all(both))
    reasons = {one.reason for one in found["two"].beyond_chance.values()}
    assert reasons == {"2 answers leave no third one for some pairs"}


def test_what_third_answers_transfer_is_the_mean_over_each_of_them_by_hand(trial, pairs):
    task, logits = trial.task, 3 * trial.logits  # so that their entropies differ
    means, constants = content.third_answers(task, pairs, logits)
    log_p, log_q = (torch.log_softmax(one.double(), -1) for one in (logits, -logits[0]))
    template, answer = task.prompts["template"].to_numpy(), task.answer_index
    for pair, (x, y) in enumerate(pairs.prompts):
        each = [
            kl(log_p[z], log_q)
            for z in range(task.n_prompts)
            if template[z] == template[y] and answer[z] not in (answer[x], answer[y])
        ]
        found = kl(means[pair].double(), log_q) + constants[pair]
        assert found == pytest.approx(np.mean(each), abs=1e-5)


def test_third_answers_of_which_some_tokens_have_no_probability_are_numbers(trial, pairs):
    logits = trial.logits.double()
    logits[:, 0] = -1000.0  # e⁻¹⁰⁰⁰ is 0 in float64
    means, constants = content.third_answers(trial.task, pairs, logits)
    assert torch.isfinite(means).all() and np.isfinite(constants).all()
    assert (means[:, 0] < -700).all()
    without, expected = content.third_answers(trial.task, pairs, logits[:, 1:])
    assert torch.allclose(means[:, 1:], without) and constants == pytest.approx(expected)


@pytest.mark.parametrize("arm", ARMS)
def test_control_states_are_what_they_are_called(tiny_trials, trial, pairs, arm):
    many = Pairs(np.repeat(pairs.prompts[:1], 4000, axis=0), np.repeat(pairs.unit[:1], 4000))
    own = content.states_at(trial, arm, [2])[0]
    others = content.states_at(tiny_trials["other"], arm, [2])[0]
    found = content.control_states(trial.task, many, own, others, arm)
    donor = own[pairs.prompts[0, 1]]
    norms = found["random_direction"].norm(dim=-1)
    assert torch.allclose(norms, donor.norm().expand_as(norms), rtol=1e-4)
    assert float((found["random_direction"] / norms[:, None]).mean(0).norm()) < 0.05
    template = trial.task.prompts["template"].to_numpy()
    cell = own[torch.as_tensor(np.flatnonzero(template == template[pairs.prompts[0, 1]]))].numpy()
    drawn = found["covariance_matched"].numpy()
    assert np.abs(drawn.mean(0) - cell.mean(0)).max() < 0.1 * cell.std(0).max()
    error = np.linalg.norm(np.cov(drawn.T) - np.cov(cell.T))
    assert error < 0.1 * np.linalg.norm(np.cov(cell.T))
    gap = torch.cdist(found["other_task"].double(), others.double()).min(dim=1).values
    assert float(gap.max()) < 1e-6


def test_the_other_task_does_not_depend_on_the_order_of_tasks():
    names = ["a", "b", "c", "d"]
    for name in names:
        assert content.other_task(name, names) == content.other_task(name, names[::-1]) != name
    assert content.carrying_blocks(30) == {"context arm": 12, "prediction arm": 25}
