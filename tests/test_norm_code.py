from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import count_tokens
from oracle import block_states, forward, kl, patched_logits
from scipy.special import softmax
from scipy.stats import rankdata
from scipy.stats import t as student_t

from lib.claims import norm_code
from lib.engine import store
from lib.engine.models import Decoder
from lib.evidence.by_task import over_twins
from lib.evidence.criteria import claim_verdict, judge
from lib.evidence.tasks import KEPT_BACK, build_task
from lib.evidence.transfer import Trial, read_tasks
from lib.science.correlation import correlate
from lib.science.decoding import decoding_gain
from lib.science.estimate import (
    FEWEST_DRAWS,
    Estimate,
    Untested,
    generator,
    mean_over_units,
    unit_weights,
)
from lib.science.geometry import angles, jeffreys_divergence, log_norm_differences

LATE = [1, 2]


@pytest.fixture(scope="module")
def reading(reader: Decoder) -> norm_code.Reading:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{k}" for k in rng.integers(1, 56, size=4 + n % 5)) for n in range(45)]
    return norm_code.read_texts(reader, texts, [f"kind {n % 3}" for n in range(45)])


@pytest.fixture(scope="module")
def trial(reader: Decoder) -> Trial:
    return made_trial(reader, 14)


@pytest.fixture(scope="module")
def large_trial(reader: Decoder) -> Trial:
    return made_trial(reader, 30)


def made_trial(reader: Decoder, n_subjects: int) -> Trial:
    subjects = [f"w{10 + k}" for k in range(n_subjects)]
    answers = [f"w{40 + k % 3}" for k in range(n_subjects)]
    items = pd.DataFrame({"subject": subjects, "answer": answers, "group": ""})
    templates = ["of {subject} comes then", "the word {subject} has", "has {subject} comes then"]
    return read_tasks(reader, {"toy": build_task("toy", items, templates, reader)})["toy"]


def test_an_exchange_of_norms_equals_one_hooked_pass_a_pair(reading: norm_code.Reading):
    found = norm_code.exchange_norms(reading, LATE, [1])
    pairs = norm_code.outer_pairs(norm_code.log_norms(reading.states, LATE).mean(axis=1))
    model, block = reading.decoder.model, reading.decoder.blocks[1]
    sums = np.zeros((45, 4))  # by recipient, the unit
    for x, y in pairs:
        tokens = [reading.tokens[x], reading.tokens[y]]
        own, other = (block_states(model, [block], one)[0, -1] for one in tokens)
        before, donor = (forward(model, [one])[0].numpy() for one in tokens)
        new = own / own.norm() * other.norm()
        edited = patched_logits(model, block, tokens[:1], [-1], [new])[0].numpy()
        plane = other - (other @ own) * own / (own @ own)
        phi = 2 * torch.asin((other.norm() - own.norm()).abs() / (2 * own.norm()))
        turned = torch.cos(phi) * own + torch.sin(phi) * own.norm() * plane / plane.norm()
        assert (turned - own).norm() == pytest.approx(float((new - own).norm()), rel=1e-4)
        turned = patched_logits(model, block, tokens[:1], [-1], [turned])[0].numpy()
        sums[x] += [kl(donor, edited), kl(donor, before), kl(before, edited), kl(before, turned)]
    drawn = unit_weights("texts", 45) @ sums
    assert found.transfer.draws[:, 0] == pytest.approx(1 - drawn[:, 0] / drawn[:, 1], abs=1e-3)
    assert found.cost_ratio.draws[:, 0] == pytest.approx(drawn[:, 2] / drawn[:, 3], rel=1e-3)
    assert (found.transfer.units, found.transfer.n_units) == ("texts", 45)


def test_texts_run_once_for_states_and_exchange_and_are_then_let_go(
    reading: norm_code.Reading, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    texts = [reading.decoder.tokenizer.decode(tokens) for tokens in reading.tokens]
    monkeypatch.setattr(store, "STORE", tmp_path / "compared")
    again = norm_code.read_texts(reading.decoder, texts, reading.kinds.tolist())
    norm_code.exchange_norms(again, LATE, [1])  # compares with full recompute, once
    monkeypatch.setattr(store, "STORE", tmp_path / "new")
    passes = count_tokens(reading.decoder, monkeypatch)
    again = norm_code.read_texts(reading.decoder, texts, reading.kinds.tolist())
    read = sum(passes)
    assert read > 0
    assert again.forests
    norm_code.exchange_norms(again, LATE, [1])
    assert sum(passes) == read
    assert again.forests == []


def test_donors_are_of_the_outer_tenths_and_never_the_text_itself():
    log_norm = np.random.default_rng(1).normal(size=60)
    pairs = norm_code.outer_pairs(log_norm)
    assert pairs.shape == (120, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    order = np.argsort(log_norm)
    assert set(pairs[:60, 1]) <= set(order[:6])
    assert set(pairs[60:, 1]) <= set(order[-6:])
    assert np.bincount(pairs[:, 0]).tolist() == [2] * 60


def test_the_partial_correlation_is_of_the_blocks_own_norms_and_angles(reading: norm_code.Reading):
    found = norm_code.partial_on_texts(reading, LATE)
    for place, block in enumerate(LATE):
        states = reading.states[block].double().numpy()
        one = correlate(
            [log_norm_differences(states)],
            jeffreys_divergence(reading.logits),
            "texts",
            given=[angles(states)],
        )
        assert found.value[place] == pytest.approx(one.value[0])


def test_a_twins_correlation_is_a_number_and_is_drawn_as_little_as_can_be(
    reading: norm_code.Reading, trial: Trial
):
    twin = replace(reading.decoder, untrained=True)
    for whole, few in (
        (
            norm_code.partial_on_texts(one, LATE)
            for one in (reading, replace(reading, decoder=twin))
        ),
        (norm_code.partial_on_task(one, LATE) for one in (trial, replace(trial, decoder=twin))),
    ):
        assert few.value == pytest.approx(whole.value)
        assert len(few.draws) == 1 + FEWEST_DRAWS < len(whole.draws)


def test_on_tasks_prompts_are_compared_within_a_template_and_subjects_are_drawn(trial: Trial):
    found = norm_code.partial_on_task(trial, [2])
    states, logits = trial.states("last")[2].double().numpy(), trial.logits
    values = []
    for rows in trial.task.prompts.groupby("template").indices.values():
        one = correlate(
            [log_norm_differences(states[rows])],
            jeffreys_divergence(logits[rows]),
            "x",
            given=[angles(states[rows])],
        )
        values.append(one.value[0])
    assert found.value[0] == pytest.approx(np.mean(values))
    assert (found.units, found.n_units) == ("subjects of toy", 14)


def test_a_planted_template_is_told_from_the_norm_also_within_an_answer(trial: Trial):
    template = torch.as_tensor(trial.task.prompts["template"].to_numpy())
    planted = _with_norms(trial, 1 + 0.5 * template)
    for apart in (False, True):
        gain = norm_code.task_attribute(planted, LATE, "template", within_answer=apart)
        assert gain.interval().low > 0.2
        assert gain.n_units == 14


def test_a_last_token_is_not_told_as_the_template(reader: Decoder, trial: Trial):
    """Norms that follow the last token alone tell no template; with one each there is none."""
    ends = torch.as_tensor(trial.task.prompts["template"].to_numpy()) == 1
    for apart in (False, True):
        planted = _with_norms(trial, 1 + 0.5 * ends)
        gain = norm_code.task_attribute(planted, LATE, "template", within_answer=apart)
        assert gain.interval().low < 0.1
    table = trial.task.prompts[["subject", "answer"]].drop_duplicates().assign(group="")
    task = build_task("toy", table, ["of {subject} comes", "the {subject} has"], reader)
    found = norm_code.task_attribute(replace(trial, task=task), LATE, "template")
    assert isinstance(found, Untested) and "ends in a token of its own" in found.reason


def test_a_planted_answer_is_no_context_within_the_answer(trial: Trial):
    answer = torch.as_tensor(trial.task.answer_index)
    planted = _with_norms(trial, 1 + 1.0 * answer)
    told = norm_code.task_attribute(planted, LATE, "subject")
    within = norm_code.task_attribute(planted, LATE, "subject", within_answer=True)
    assert told.interval().low > 0.1
    assert float(within) < float(told) - 0.1


def test_a_planted_subject_is_told_across_templates(trial: Trial):
    planted = _with_norms(trial, 1 + 0.2 * torch.as_tensor(trial.task.unit))
    assert norm_code.task_attribute(planted, LATE, "subject").interval().low > 0.2


def test_what_an_answer_does_in_one_wording_is_not_told_as_the_subject(large_trial: Trial):
    """Relative to an answer's mean over wordings it stands reversed in the others."""
    answer, template = large_trial.task.answer_index, large_trial.task.prompts["template"]
    together = np.array([[0.5, -0.25, -0.25], [-0.5, 0.25, 0.25], [0.0, 0.5, -0.5]])
    planted = _with_norms(large_trial, 1 + 0.4 * torch.as_tensor(together[answer, template]))
    assert norm_code.task_attribute(planted, LATE, "subject").interval().low > 0.1
    within = norm_code.task_attribute(planted, LATE, "subject", within_answer=True)
    assert within.interval().low < 0 and float(within) < 0.1


def test_the_models_own_choice_is_no_context_within_the_right_answer(large_trial: Trial):
    choice = np.random.default_rng(4).integers(0, 3, 30)[large_trial.task.unit]
    norms = 1 + 0.5 * torch.as_tensor(choice)
    for chosen, told in ((large_trial.task.answer_index, True), (choice, False)):
        planted = _with_norms(large_trial, norms, chosen)
        within = norm_code.task_attribute(planted, LATE, "subject", within_answer=True)
        assert (within.interval().low > 0.1) == told
        assert told or float(within) < 0.1


def test_a_planted_subject_is_told_within_its_answer(large_trial: Trial):
    norms = 1 + 0.2 * torch.as_tensor(large_trial.task.unit)
    planted = _with_norms(large_trial, norms, large_trial.task.answer_index)
    within = norm_code.task_attribute(planted, LATE, "subject", within_answer=True)
    assert within.interval().low > 0.1


def _with_norms(trial: Trial, norms: torch.Tensor, choice: np.ndarray | None = None) -> Trial:
    """Return the trial with states of planted norms and predictions that say nothing of them.

    Or that are known, `choice`.
    """
    states = torch.randn(4, trial.task.n_prompts, 32, generator=torch.Generator().manual_seed(0))
    noise = 1 + 0.02 * torch.randn(trial.task.n_prompts, generator=torch.Generator().manual_seed(1))
    states = states / states.norm(dim=-1, keepdim=True) * (norms * noise)[None, :, None]

    class Planted(Trial):
        def states(self, _site):
            return states

        @property
        def choice(self):
            return super().choice if choice is None else choice

    return Planted(trial.task, trial.decoder, trial.last_states)


def left_over(states: torch.Tensor, columns: np.ndarray) -> np.ndarray:
    """Return what least squares on an intercept and columns leaves of log r `[n, n_blocks]`."""
    logs = np.log(np.linalg.norm(states[LATE].double().numpy(), axis=-1)).T
    design = np.column_stack([np.ones(len(columns)), columns])
    return logs - design @ np.linalg.lstsq(design, logs, rcond=None)[0]


def certainty(logits: torch.Tensor) -> np.ndarray:
    p = softmax(logits.double().numpy(), axis=1)
    return np.column_stack([-(p * np.log(p)).sum(axis=1), np.log(p.max(axis=1))])


def in_thirds(values: np.ndarray) -> np.ndarray:
    return (rankdata(values).astype(int) - 1) * 3 // len(values)


def test_attributes_of_texts_are_told_from_what_the_prediction_leaves_of_the_norm(
    reading: norm_code.Reading,
):
    last = np.array([tokens[-1] for tokens in reading.tokens])
    common = [token for token in sorted(set(last)) if (last == token).sum() >= 3]
    ends = (last[:, None] == common).astype(float)
    left = left_over(reading.states, np.column_stack([certainty(reading.logits), ends]))
    order = np.argsort(np.argsort(last, kind="stable"), kind="stable")
    longest = np.argsort(np.argsort([len(t) for t in reading.tokens], kind="stable"), kind="stable")
    found = norm_code.text_attributes(reading, LATE)
    for name, label in (
        ("kind of text", reading.kinds),
        ("position", longest // 15),
        ("token frequency", order // 15),
    ):
        rng = generator("decoding", name)
        expected = decoding_gain(left, label, np.arange(45), "texts", rng)
        assert float(found[name]) == pytest.approx(float(expected), abs=1e-9), name
        assert (found[name].units, found[name].n_units) == ("texts", 45)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("attribute", ["template", "subject"])
def test_attributes_of_prompts_are_told_by_subjects_and_in_other_templates_alone(
    trial: Trial, attribute: str, apart: bool
):
    """By the loop: what of log r is regressed out, who shares a fold, what a subject's label is."""
    prompts = trial.task.prompts
    last = np.array([tokens[-1] for tokens in trial.task.tokens])
    ends = (last[:, None] == sorted(set(last))).astype(float)  # two, of which one ends two wordings
    columns = np.column_stack([certainty(trial.logits), ends])
    table = pd.DataFrame(left_over(trial.states("last"), columns))
    template, unit = prompts["template"].to_numpy(), prompts["unit"].to_numpy()
    chosen = trial.logits[:, trial.task.answer_ids].argmax(-1).numpy()
    told = [f"{a} {c}" for a, c in zip(prompts["answer"], chosen, strict=True)]
    label, strata = template, unit
    if attribute == "template" and apart:
        table = table - table.groupby(told).transform("mean")
    if attribute == "subject":
        strata = np.array(
            [f"{t} {one if apart else ''}" for t, one in zip(template, told, strict=True)]
        )
        table = table - table.groupby(strata).transform("mean")
        mean, label = table.mean(axis=1).to_numpy(), np.empty(42, dtype=int)
        for one in range(3):
            rows = np.flatnonzero(template == one)
            label[rows] = in_thirds(
                np.array([mean[(unit == unit[r]) & (template != one)].mean() for r in rows])
            )
    rng = generator("decoding", attribute, "toy", str(apart))
    expected = decoding_gain(table.to_numpy(), label, unit, "subjects", rng, strata=strata)
    found = norm_code.task_attribute(trial, LATE, attribute, within_answer=apart)
    assert float(found) == pytest.approx(float(expected), abs=1e-9)


def test_gains_are_those_of_each_task_with_and_without_the_answers_means(
    reading: norm_code.Reading, trial: Trial
):
    planted = _with_norms(trial, 1 + 1.0 * torch.as_tensor(trial.task.answer_index))
    found = norm_code.measure_norm_code(reading, {"toy": planted}, LATE)
    for attribute in ("template", "subject"):
        for gain, apart in (
            (found.gains[attribute], False),
            (found.within[attribute]["toy"], True),
        ):
            one = norm_code.task_attribute(planted, LATE, attribute, within_answer=apart)
            assert float(gain) == pytest.approx(float(one))
    assert float(found.gains["subject"]) > float(found.within["subject"]["toy"]) + 0.1
    assert set(found.gains) - set(found.within) == {"kind of text", "position", "token frequency"}


def number(value: float, units: str = "subjects", n: int = 30) -> Estimate:
    """A gain whose units are spread about it, so that it has an interval."""
    values = np.linspace(value - 0.1, value + 0.1, n)
    found = mean_over_units(values, units)
    assert isinstance(found, Estimate)
    return found


def code(within: norm_code.ByTask, gains: dict | None = None) -> norm_code.NormCode:
    """What a network's norms tell, with nothing else measured."""
    nothing = norm_code.NormExchange(*[Untested("not measured")] * 3)
    return norm_code.NormCode(gains or {}, within, {}, nothing, ())


def test_the_second_attribute_and_the_best_one_within_an_answer_are_what_is_judged():
    gains = {name: number(k) for k, name in enumerate("abc")}
    within = {
        "template": {"x": number(0.1, "x"), "y": Untested("one template alone")},
        "subject": {"x": number(0.0, "x"), "y": number(0.4, "y")},
    }
    found = code(within, gains).statistics()
    assert float(found["second_attribute_gain"]["model"]) == pytest.approx(1)
    assert float(found["within_answer_gain"]["model"]) == pytest.approx(0.2)


def test_twins_are_subtracted_on_the_same_tasks_each_network_by_its_own_best_attribute():
    """A task that one of the networks lacks counts for none of them."""
    trained = code(
        {
            "template": {"x": number(0.5, "x"), "y": number(0.3, "y"), "z": number(0.9, "z")},
            "subject": {"x": number(0.1, "x"), "y": number(0.1, "y"), "z": number(0.9, "z")},
        }
    )
    twins = [
        code(
            {
                "template": {"x": number(0.1, "x"), "y": Untested("a feature is the same")},
                "subject": {"x": number(0.3 + k, "x"), "y": number(0.2 + k, "y")},
            }
        )
        for k in (-0.05, 0.0, 0.05)
    ]
    found = norm_code.beyond_twins(trained, twins)
    assert isinstance(found, Estimate)
    assert float(found) == pytest.approx(0.5 - 0.25)  # template on x; the twins' subject on x, y
    width = found.interval().high - found.interval().low  # the twins', by Student's t of three
    assert width == pytest.approx(2 * student_t.ppf(0.975, 2) * 0.05 / np.sqrt(3), rel=0.1)
    lost = [*twins, code({"template": {}, "subject": {}})]
    assert isinstance(norm_code.beyond_twins(trained, lost), Untested)


def test_on_the_tasks_kept_back_the_subject_is_decoded_among_prompts_of_one_answer(
    monkeypatch: pytest.MonkeyPatch, trial: Trial
):
    asked: list[dict[str, object]] = []

    def loaded(*_args: object, **told: object) -> dict[str, object]:
        asked.append(told)
        return {"toy": trial.task, "gone": Untested("no")}

    monkeypatch.setattr(norm_code, "load_tasks", loaded)
    monkeypatch.setattr(norm_code, "read_tasks", lambda _, tasks: tasks | {"toy": trial})
    found = norm_code.kept_back_gains(trial.decoder, LATE)
    assert asked == [{"files": KEPT_BACK}]
    assert found["gone"] == Untested("no")
    expected = norm_code.task_attribute(trial, LATE, "subject", within_answer=True)
    assert isinstance(expected, Estimate)
    np.testing.assert_array_equal(found["toy"].draws, expected.draws)  # type: ignore[union-attr]


def test_groups_are_compared_apart_and_the_order_of_prompts_does_not_matter(reader: Decoder):
    rows = [(f"w{1 + i}", f"w{40 + i % 3}", f"w{50 + g}") for g in (0, 1) for i in range(12)]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    task = build_task("sums", items, ["{group} of {subject} comes"], reader)
    whole = read_tasks(reader, {"sums": task})["sums"]
    found = norm_code.partial_on_task(whole, [2])
    states, logits = whole.states("last")[2].double().numpy(), whole.logits
    values = [
        correlate(
            [log_norm_differences(states[rows])],
            jeffreys_divergence(logits[rows]),
            "x",
            given=[angles(states[rows])],
        ).value[0]
        for rows in task.prompts.groupby("group").indices.values()
    ]
    assert len(values) == 2
    assert found.value[0] == pytest.approx(np.mean(values))
    order = np.random.default_rng(0).permutation(24)
    turned = replace(task, prompts=task.prompts.iloc[order].reset_index(drop=True))
    again = norm_code.partial_on_task(read_tasks(reader, {"sums": turned})["sums"], [2])
    assert again.draws == pytest.approx(found.draws, abs=1e-4)


def test_what_the_prediction_says_is_regressed_out(reading: norm_code.Reading):
    columns = norm_code.nuisances(
        norm_code.certainty(reading.logits), [tokens[-1] for tokens in reading.tokens]
    )
    p = softmax(reading.logits.double().numpy(), axis=1)
    assert columns[:, 0] == pytest.approx(-(p * np.log(p)).sum(axis=1))
    assert columns[:, 1] == pytest.approx(np.log(p.max(axis=1)))
    assert set(np.unique(columns[:, 2:])) <= {0.0, 1.0}


def test_the_gains_are_ranked_and_untested_ones_stand_nowhere():
    one, two = (mean_over_units(np.arange(9.0) + k, f"u{k}") for k in (0, 5))
    gains = {"a": one, "b": Untested("none"), "c": two}
    assert norm_code.ranked(gains, 0) is two
    assert norm_code.ranked(gains, 1) is one
    assert norm_code.ranked(gains, 2) == Untested("2 attributes could be decoded")


def test_all_statistics_of_the_claim_are_measured_and_judged_with_twins(
    reading: norm_code.Reading, trial: Trial
):
    found = norm_code.measure_norm_code(reading, {"toy": trial, "gone": Untested("x")}, [0, 1, 2])
    records = judge(
        "norm-code",
        "m",
        found.statistics()
        | dict.fromkeys(("within_answer_beyond_twins", "subject_beyond_twins"), number(0.1)),
        over_twins([found.of_seed()] * 4),
    )
    assert claim_verdict(records, "norm-code", "m").parts.keys() == {
        "carries context",
        "learned",
        "does not determine",
    }
    twins = claim_verdict(records, "norm-code", "m", untrained=True)
    assert twins.parts["learned"] == "not testable"
    (row,) = [r for r in records if r["place"] == "gone" and not r["untrained"]]
    assert row["verdict"] == "not testable"
    seeds = [r for r in records if r["untrained"] and r["estimate"] is not None]
    assert {row["n"] for row in seeds} <= {4}


def scaled_logits(decoder, tokens: torch.Tensor, block: int, factor: float) -> torch.Tensor:
    """The last token's logits `[d_vocab]` with its state after a block scaled."""

    def scale(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        states[:, -1] *= factor
        return output

    handle = decoder.blocks[block].register_forward_hook(scale)
    try:
        return decoder.model(tokens).logits[0, -1]
    finally:
        handle.remove()


def test_doses_of_one_change_nothing_and_others_amount_to_a_temperature(reading: norm_code.Reading):
    table = norm_code.scale_norms(reading, 2, (0.5, 1.0, 2.0))
    assert table["kl_nats"][1] < 1e-6
    assert table["temperature"][1] == pytest.approx(1.0, abs=1e-3)
    assert (table["kl_left_nats"] <= table["kl_nats"] + 1e-9).all()
    with torch.inference_mode():  # by hand: after block 2 there is one more
        tokens = [torch.tensor([ids]) for ids in reading.tokens[::4]]
        halved = [scaled_logits(reading.decoder, one, 2, 0.5) for one in tokens]
    kept = reading.logits[::4].double().log_softmax(-1)
    left = kept - torch.stack(halved).double().log_softmax(-1)
    expected = float((kept.exp() * left).sum(-1).mean())
    assert table["kl_nats"][0] == pytest.approx(expected, rel=1e-4)


def test_texts_that_are_all_alike_are_untested(reading: norm_code.Reading):
    flat = replace(reading, states=torch.ones_like(reading.states), logits=torch.zeros(45, 64))
    assert isinstance(norm_code.partial_on_texts(flat, LATE), Untested)
    gains = norm_code.text_attributes(flat, LATE)
    assert all(isinstance(one, Untested) for one in gains.values())


def test_a_twins_number_on_tasks_is_pooled_over_them_and_texts_stand_apart():
    def twin(more: float) -> norm_code.NormCode:
        numbers = {"texts": 0.9, "a": 0.1 + more, "b": 0.3 + more}
        partials = {
            place: mean_over_units(np.full((9, 2), k), place) for place, k in numbers.items()
        }
        nothing = norm_code.NormExchange(*[Untested("not measured")] * 3)
        return norm_code.NormCode({}, {}, {**partials, "c": Untested("why")}, nothing, ())

    found = over_twins([twin(more).of_seed() for more in (0.0, 0.1, 0.2, 0.3)])
    assert found["partial_given_angle"]["twins"].value == pytest.approx([0.35, 0.35])
    assert found["partial_given_angle"]["texts"].value == pytest.approx([0.9, 0.9])


def test_units_of_twins_are_seeds(reading: norm_code.Reading, trial: Trial):
    found = norm_code.measure_norm_code(reading, {"toy": trial}, [0, 1, 2])
    pooled = over_twins([found.of_seed()] * 4)
    one = pooled["norm_exchange_transfer"]["texts"]
    assert isinstance(one, Estimate)
    assert (one.units, one.n_units) == ("seeds", 4)
