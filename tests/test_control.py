"""Causal control: the 2 × 2 exchange, doses, selectivity at matched flip rates, its verdicts."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import block_states, forward, patched_logits

from lib.causal_control import control, control_figures, control_tables, control_words, doses
from lib.causal_control.continuations import loss_table, spread_texts, steered_losses
from lib.causal_control.control_tables import Matched, first_crossing
from lib.causal_control.selectivity import rest_measure
from lib.engine.extraction import extract_residuals
from lib.engine.models import Decoder
from lib.engine.readouts import distribution_measure
from lib.evidence.arms import Trial, prepare_trial
from lib.evidence.tasks import build_task, gate
from lib.evidence.verdicts import claim_verdict, verdict_table
from lib.science.stats import bootstrap_weights

ITEMS = pd.DataFrame(
    {
        "subject": [f"w{i}" for i in range(10, 18)],
        "answer": [f"w{40 + i % 4}" for i in range(8)],
        "group": "",
    }
)
TEMPLATES = ["w1 w2 {subject} w3", "w4 {subject} w5 w6", "w7 w8 w9 {subject} w3 w2"]
DOSES = (20.0, 60.0, 120.0)


@pytest.fixture(scope="module")
def trial(llama: Decoder) -> Trial:
    """A task whose answers are declared right, so that a random model has something to flip."""
    task = build_task("letters", ITEMS, TEMPLATES, llama)
    found = prepare_trial(llama, task, gate(llama, task))
    answers = task.prompts["answer_index"].to_numpy()
    return Trial(task, llama, answers, np.ones(len(answers), bool), False, found.clean_logits)


@pytest.fixture(scope="module")
def outcome(trial: Trial) -> doses.DoseOutcome:
    return doses.measure_doses(
        {"letters": trial}, [1, 2], DOSES, donors_per_prompt=1, full_vocabulary=True
    )["letters"]


@pytest.fixture(scope="module")
def weights(trial: Trial) -> dict[str, np.ndarray]:
    return {"letters": bootstrap_weights(trial.task.n_prompts, 60, np.random.default_rng(0))}


def test_doses_equal_patching_each_steered_state_by_hand(
    trial: Trial, outcome: doses.DoseOutcome
) -> None:
    states = extract_residuals(trial.decoder, trial.task.tokens, blocks=[1, 2]).states
    vectors = doses.steering_vectors(trial, outcome.pairs, states)
    tokens, model = trial.task.tokens, trial.decoder.model
    for place, block in enumerate(outcome.blocks):
        for pair in range(0, len(outcome.pairs), 5):
            recipient = outcome.pairs[pair, 0]
            state = block_states(model, trial.decoder.blocks, tokens[recipient])[block, -1]
            for number, method in enumerate(outcome.methods):
                for dose, degrees in enumerate((*DOSES, outcome.full_angles[place, pair])):
                    if method == "random plane":
                        continue  # drawn anew here; its norm and angle are tested as a rotation
                    new = doses.steer_states(method, state, vectors[method][place, pair], degrees)
                    logits = patched_logits(
                        model, trial.decoder.blocks[block], [tokens[recipient]], [-1], [new]
                    )
                    chosen = int(logits[0, trial.task.answer_ids.tolist()].argmax())
                    assert chosen == outcome.choice[place, number, dose, pair]


def test_targets_come_from_other_templates_alone(trial: Trial) -> None:
    pairs = control.choose_pairs(trial, 1)
    states = extract_residuals(trial.decoder, trial.task.tokens, blocks=[2]).states
    template = trial.task.prompts["template"].to_numpy()
    first = template == 0
    spoiled = states.clone()
    spoiled[:, first] += 100.0
    chosen = pairs[first[pairs[:, 0]]]
    clean, other = (doses.steering_vectors(trial, chosen, s) for s in (states, spoiled))
    assert torch.equal(clean["rotation"], other["rotation"])
    assert torch.equal(clean["additive"], other["additive"])
    assert not torch.equal(clean["radial"], other["radial"])


def test_the_full_angle_leaves_the_state_on_the_targets_direction(
    trial: Trial, outcome: doses.DoseOutcome
) -> None:
    states = extract_residuals(trial.decoder, trial.task.tokens, blocks=[1, 2]).states
    vectors = doses.steering_vectors(trial, outcome.pairs, states)
    start = states[:, outcome.pairs[:, 0]]
    full = torch.as_tensor(outcome.full_angles)[..., None]
    turned = doses.steer_states("rotation", start, vectors["rotation"], full)
    cosine = torch.cosine_similarity(turned, vectors["rotation"], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_rest_measure_equals_the_plain_readout(llama: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, edited = (4 * torch.randn(5, 64, generator=generator) for _ in range(2))
    recipients = np.array([0, 1, 2, 3, 4, 0])
    ends = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [3, 1]])
    answers = np.array([7, 9, 30, 41])
    row = torch.arange(12)  # two rows a pair: `row % n_pairs` is the pair
    logits = edited[row % 5]
    found = rest_measure(clean, recipients, ends, answers)(logits, row)
    plain = distribution_measure(clean, recipients, excluded=answers[ends])(logits, row % 6)
    torch.testing.assert_close(found["rest_kl_nats"], plain["rest_kl_nats"], rtol=1e-9, atol=1e-9)
    p, q = clean.double().softmax(-1), logits.double().softmax(-1)
    for index in range(12):
        source, target = ends[index % 6]
        others = [a for k, a in enumerate(answers) if k not in (source, target)]
        change = (q[index, others] - p[recipients[index % 6], others]).abs().sum()
        torch.testing.assert_close(found["others_change"][index], change)
        torch.testing.assert_close(found["target_probability"][index], q[index, answers[target]])


def test_rest_measure_ignores_what_happens_to_source_and_target() -> None:
    clean = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    edited = clean.clone()
    edited[0, 7] += 5
    edited[0, 9] -= 3
    measure = rest_measure(clean, np.array([0]), np.array([[0, 1]]), np.array([7, 9, 11]))
    assert float(measure(edited, torch.tensor([0]))["rest_kl_nats"]) < 1e-12
    edited[0, 20] += 1
    assert float(measure(edited, torch.tensor([0]))["rest_kl_nats"]) > 1e-3


def test_the_parts_of_an_exchange_add_up_and_equal_patching(trial: Trial) -> None:
    found = control.measure_exchange({"letters": trial}, [1, 3], donors_per_prompt=1)["letters"]
    effects = found.effects()
    total = effects["direction"] + effects["norm"] + effects["interaction"]
    np.testing.assert_array_equal(total, effects["both"])
    tokens, model, blocks = trial.task.tokens, trial.decoder.model, trial.decoder.blocks
    for index, (recipient, donor) in enumerate(found.pairs):
        own, other = (block_states(model, blocks, tokens[p])[3, -1] for p in (recipient, donor))
        mixed = {
            "both": other,
            "direction": other / other.norm() * own.norm(),
            "norm": own / own.norm() * other.norm(),
        }
        for name, state in mixed.items():
            logits = patched_logits(model, blocks[3], [tokens[recipient]], [-1], [state])
            choice = int(logits[0, trial.task.answer_ids.tolist()].argmax())
            assert found.flipped[name][1, index] == (choice == trial.target[donor])
            assert found.changed[name][1, index] == (choice != trial.target[recipient])


def test_shares_recover_a_planted_effect(trial: Trial, weights: dict[str, np.ndarray]) -> None:
    pairs = control.choose_pairs(trial, 2)
    both = np.ones((2, len(pairs)), dtype=bool)
    direction, norm = both.copy(), ~both
    direction[:, ::4] = False
    norm[0, ::2] = True
    flipped = {"both": both, "direction": direction, "norm": norm}
    planted = control.ExchangeOutcome(trial, pairs, (1, 2), flipped, flipped)
    shares = control.effect_shares(planted, weights["letters"], [1, 2])
    assert shares["direction"][0] == pytest.approx(direction.mean())
    assert shares["norm"][0] == pytest.approx(norm.mean())
    whole = shares["direction"] + shares["norm"] + shares["interaction"]
    np.testing.assert_allclose(whole, 1)
    nothing = control.ExchangeOutcome(trial, pairs, (1, 2), dict.fromkeys(flipped, ~both), flipped)
    assert np.isnan(control.effect_shares(nothing, weights["letters"], [1])["direction"]).all()


def test_first_crossing_is_linear_between_doses_and_nan_where_never() -> None:
    curves = np.array([[0, 0.25, 0.75], [0, 0.0, 0.4], [0, 0.5, 0.1], [0.6, 0.7, 0.8]])
    found = first_crossing(np.array([0.0, 10, 20]), curves, 0.5)
    np.testing.assert_allclose(found, [15, np.nan, 10, 0])


def test_matching_reads_collateral_where_half_of_the_pairs_flip(
    trial: Trial, outcome: doses.DoseOutcome, weights: dict[str, np.ndarray]
) -> None:
    """Planted: rotation flips at 60 degrees, its rival at 20, with known collateral."""
    n_pairs = len(outcome.pairs)
    choice = np.broadcast_to(trial.target[outcome.pairs[:, 0]], outcome.choice.shape).copy()
    target = trial.target[outcome.pairs[:, 1]]
    for method, first in (("rotation", 1), ("additive", 0)):
        choice[:, outcome.methods.index(method), first:] = target
    rest = np.zeros(outcome.choice.shape)
    rest[:, :, :3] = np.array([1.0, 3.0, 9.0])[:, None]
    rest[:, outcome.methods.index("additive")] *= 10
    planted = doses.DoseOutcome(
        trial,
        outcome.arm,
        outcome.pairs,
        outcome.blocks,
        outcome.methods,
        outcome.doses,
        outcome.full_angles,
        choice,
        {"rest_kl_nats": rest, "others_change": rest},
    )
    found = control_tables.match_flip_rate(planted, weights["letters"], 1)
    assert found.dose("rotation") == pytest.approx(40)
    assert found.dose("additive") == pytest.approx(10)
    assert found.collateral["rest_kl_nats"]["rotation"][0] == pytest.approx(2)
    assert found.collateral["rest_kl_nats"]["additive"][0] == pytest.approx(5)
    ratio = found.ratio("additive")
    assert ratio is not None and ratio.estimate == pytest.approx(0.4)
    assert ratio.low == pytest.approx(0.4) and ratio.high == pytest.approx(0.4)
    assert found.ratio("unembedding") is None  # never reaches the rate: no match is made up
    assert np.isnan(found.dose("unembedding")) and n_pairs > 0


def test_the_twins_pairs_cross_templates_and_differ_in_its_own_choice(llama: Decoder) -> None:
    task = build_task("letters", ITEMS, TEMPLATES, llama)
    trial = prepare_trial(llama, task, gate(llama, task))
    assert trial.own_choice
    pairs = control.choose_pairs(trial, 2)
    assert len(pairs)
    assert (trial.target[pairs[:, 0]] != trial.target[pairs[:, 1]]).all()
    states = extract_residuals(llama, task.tokens, blocks=[2]).states
    vectors = doses.steering_vectors(trial, pairs, states)
    assert torch.equal(vectors["rotation"], states[:, pairs[:, 1]])
    assert doses.OWN_ANSWER not in vectors


@pytest.mark.parametrize("path", ["prefix replay", "full recompute"])
def test_continuation_losses_equal_a_plain_forward_pass(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == "full recompute":
        import lib.causal_control.continuations as module
        from lib.engine.replay import ReplayUnsupportedError

        def refuse(*_: object) -> None:
            raise ReplayUnsupportedError("on purpose")

        monkeypatch.setattr(module, "run_prefix", refuse)
    context, ending, block = [5, 9, 12, 33], [7, 21, 40, 8], 1
    own = extract_residuals(decoder, [context], blocks=[block]).states[0, 0]
    new = torch.stack([own, torch.randn(len(own), generator=torch.Generator().manual_seed(1))])
    found = steered_losses(decoder, context, ending, new, block)
    text = [*context, *ending]
    for state, loss in zip(new, found, strict=True):
        total = 0.0
        for place in range(len(context), len(text)):
            logits = patched_logits(
                decoder.model, decoder.blocks[block], [text[:place]], [len(context) - 1], [state]
            )
            total -= float(logits[0].double().log_softmax(-1)[text[place]])
        assert float(loss) == pytest.approx(total / len(ending), rel=1e-4)
    clean = -sum(
        float(forward(decoder.model, [text[:p]])[0].double().log_softmax(-1)[text[p]])
        for p in range(len(context), len(text))
    )
    assert float(found[0]) == pytest.approx(clean / len(ending), rel=1e-4)


def test_loss_table_counts_contexts_not_rows() -> None:
    rows = [(c, t, "rotation", 0.1 * c) for c in range(8) for t in ("a", "b", "c")]
    losses = pd.DataFrame(rows, columns=["context", "task", "method", "loss_change"])
    table = loss_table(losses, n_draws=200, seed=0)
    assert table["method"].tolist() == ["rotation"]
    assert table["n"].tolist() == [8]
    assert table["low"][0] < 0.35 < table["high"][0]


def test_spread_texts_takes_as_many_of_each_kind() -> None:
    texts = pd.DataFrame({"kind": ["a", "b", "a", "b", "a"], "context": list("12345")})
    assert spread_texts(texts, 2)["context"].tolist() == ["1", "2", "3", "4"]


def test_records_are_complete_on_every_task_and_judge_nothing_untestable(
    trial: Trial, outcome: doses.DoseOutcome, weights: dict[str, np.ndarray]
) -> None:
    one = {"letters": trial}
    exchanges = control.measure_exchange(one, [1, 2], donors_per_prompt=1)
    records = control_tables.judge_control(
        trial.decoder,
        {"letters": "", "shut": "accuracy 0.10, chance 0.083"},
        exchanges,
        {"letters": outcome},
        {"letters": outcome},
        weights,
        block=1,
        late=[1, 2],
    )
    table = verdict_table(records)
    assert len(table) == 2 * len(control_tables.STATISTICS)
    shut = table[table["task"] == "shut"]
    assert set(shut["verdict"]) == {"not testable"}
    assert set(shut["reason"]) == {"accuracy 0.10, chance 0.083"}
    claim_verdict(records, control_tables.CLAIM, trial.decoder.name, False)


def test_a_model_without_a_testable_task_gets_tables_figures_and_words() -> None:
    empty = control_tables.dose_curves({}, {})
    none = pd.DataFrame(columns=["context", "task", "method", "loss_change"])
    for figure in (
        control_figures.dose_figure(empty, panel="task"),
        control_figures.pareto_figure(empty),
        control_figures.loss_figure(loss_table(none, n_draws=9, seed=0)),
    ):
        figure.savefig(io.BytesIO())
    assert control.effect_curves({}, {}).empty
    block, late = control.late_from(pd.DataFrame({"block": []}), 30)
    assert (block, late[-1]) == (23, 28)
    assert control_words.turned_sentence({}, {}, 23) == control_words.NOT_TESTABLE
    assert "cannot" in control_words.others_sentence({})


def test_words_say_less_selective_only_when_the_interval_is_above_one() -> None:
    def matched(ratio: float) -> Matched:
        spread = np.concatenate([[1.0], np.linspace(0.8, 1.25, 99)])
        costs = {"rotation": ratio * spread, "additive": np.ones(100), "unembedding": np.ones(100)}
        doses_ = dict.fromkeys(costs, np.full(100, 10.0))
        return Matched(0.5, dict.fromkeys(costs, 1.0), doses_, {"rest_kl_nats": costs}, 12)

    for ratio, words in ((2.0, "less selective"), (0.5, "more selective"), (1.0, "not told apart")):
        assert words in control_words.ratio_sentence({"task": matched(ratio)})


@pytest.mark.parametrize("method", ["rotate", ""])
def test_an_unknown_method_is_refused_with_the_names(method: str) -> None:
    with pytest.raises(ValueError, match="choose one of rotation, additive"):
        doses.steer_states(method, torch.ones(3), torch.ones(3), 10)
