"""Steering: vectors, doses and text before a prompt, against full recomputes and closed forms."""

import numpy as np
import pytest
from oracle import forward
from scipy.special import softmax
from steered import BLOCK, mean_state, recompute, recompute_tokens, states_of, unit

from lib.engine.edits import Rotate, angle_degrees
from lib.engine.extraction import extract_residuals, tokenize
from lib.evidence import steering as module
from lib.evidence.tasks import load_texts
from lib.evidence.transfer import Trial

# --- steering to an answer -----------------------------------------------------------------------


def test_vectors_come_from_rightly_answered_prompts_of_other_templates_alone(able, steering):
    template = able.task.prompts["template"].to_numpy()
    for pair, (x, y) in enumerate(steering.pairs.prompts):
        answer = able.task.answer_index[y]
        expected = mean_state(able, answer, template[x])
        found = steering.centroid(steering.target)[pair].numpy()
        assert found == pytest.approx(expected, abs=1e-5)


def test_recipients_are_answered_rightly_and_their_targets_are_other_answers(able, steering):
    assert able.correct[steering.pairs.prompts[:, 0]].all()
    assert (steering.source != steering.target).all()
    assert len(np.unique(steering.pairs.unit)) == len(steering.pairs)


def test_what_the_right_answer_holds_is_its_probability_before_any_edit(able, steering):
    tokens = able.task.answer_ids[steering.source]
    logits = able.logits.double().numpy()
    p = [
        softmax(logits[x])[token]
        for x, token in zip(steering.pairs.prompts[:, 0], tokens, strict=True)
    ]
    assert float(steering.held()) == pytest.approx(np.mean(p))


def test_a_task_below_the_gate_is_untested_with_its_accuracy(able):
    plain = Trial(able.task, able.decoder, able.last_states)
    assert "0.8 is needed" in module.prepare_steering(plain, BLOCK).reason


# --- doses ---------------------------------------------------------------------------------------


def test_each_method_at_each_dose_does_what_full_passes_say(able, steering):
    doses = module.measure_doses({"tiny": steering}, list(module.METHODS), (0.25, 0.6, 1.0))["tiny"]
    states, template = states_of(able), able.task.prompts["template"].to_numpy()
    ids = able.task.answer_ids
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        h, length = states[x], np.linalg.norm(states[x])
        to = mean_state(able, steering.target[pair], template[x])
        away = mean_state(able, steering.source[pair], template[x])
        whole = np.arccos(unit(h) @ unit(to))
        before = softmax(able.logits[x].double().numpy())
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
                logits = recompute(able, x, state).astype(float)
                change = softmax(logits) - before
                source, target = ids[steering.source[pair]], ids[steering.target[pair]]
                passed = min(change[target], -change[source])
                assert doses.passed[name][number, pair] == pytest.approx(passed, abs=1e-5)
                moved = np.abs(change).sum() / 2
                assert doses.moved[name][number, pair] == pytest.approx(moved, abs=1e-5)
                chosen = logits[ids].argmax() == steering.target[pair]
                assert doses.flipped[name][number, pair] == chosen


def test_the_logit_edit_raises_the_targets_logit_on_the_sources(able, steering):
    small = module.measure_doses({"tiny": steering}, ["logit edit"], (0.02,))["tiny"]
    assert (small.passed["logit edit"] > 0).mean() > 0.8


def test_the_random_plane_is_turned_by_the_same_angle(steering):
    vector = module.METHODS[module.RANDOM][1](steering)
    turned = Rotate(30.0)(steering.own, vector)
    found = angle_degrees(steering.own, turned)
    assert found.numpy() == pytest.approx(np.full(len(vector), 30.0), abs=1e-3)
    to = angle_degrees(steering.own, steering.centroid(steering.target))
    assert (angle_degrees(vector, steering.centroid(steering.target)) > to).all()


def test_the_share_is_read_where_the_flip_curve_reaches_one_half():
    flips = [0.1, 0.3, 0.8]  # one half two fifths of the way from the second dose to the third
    passed, moved = [0.1, 0.2, 0.7], [0.4, 0.5, 1.0]
    never = [0.1, 0.2, 0.3]
    at_once = [0.8, 0.2, 0.9]  # reached between dose 0 and the first
    draws = np.array([[flips, passed, moved], [never, passed, moved], [at_once, passed, moved]])
    expected = [(0.2 + 0.4 * 0.5) / (0.5 + 0.4 * 0.5), 0.7, 0.1 / 0.4]
    assert module.share_at_half(draws) == pytest.approx(expected)


def test_an_unknown_method_is_named_with_the_known_ones(steering):
    with pytest.raises(ValueError, match="Unknown method 'push'; choose among rotate to centroid"):
        module.measure_doses({"tiny": steering}, ["push"])


def test_rotation_to_the_donor_ends_at_its_direction(able, steering):
    found = module.measure_doses({"tiny": steering}, ["rotate to donor"], (0.5,))["tiny"]
    states = states_of(able)
    for pair, (x, y) in enumerate(steering.pairs.prompts):
        to = mean_state(able, steering.target[pair], able.task.prompts["template"][x])
        u, v = unit(states[x]), unit(states[y])
        angle, side = np.arccos(u @ unit(to)) / 2, unit(v - (u @ v) * u)
        state = np.linalg.norm(states[x]) * (np.cos(angle) * u + np.sin(angle) * side)
        chosen = recompute(able, x, state)[able.task.answer_ids].argmax()
        assert found.flipped["rotate to donor"][0, pair] == (chosen == steering.target[pair])


# --- behind ordinary text ------------------------------------------------------------------------


def test_behind_text_the_same_vectors_steer_the_last_token(able, steering):
    found = module.measure_behind({"tiny": steering}, ["t1 t2 s3"] * len(steering.pairs))["tiny"]
    template, flips, right = able.task.prompts["template"], [], []
    decoder = able.decoder
    for pair, x in enumerate(steering.pairs.prompts[:, 0]):
        text = f"t1 t2 s3\n\n{able.task.prompts['text'][x]}"
        (tokens,) = tokenize(decoder, [text])
        state = extract_residuals(decoder, [tokens]).states[BLOCK, 0].double().numpy()
        to = mean_state(able, steering.target[pair], template[x])
        turned = unit(to) * np.linalg.norm(state)
        logits = recompute_tokens(decoder, tokens, turned)
        flips.append(logits[able.task.answer_ids].argmax() == steering.target[pair])
        plain = forward(decoder.model, [tokens])[0][able.task.answer_ids]
        right.append(int(plain.argmax()) == steering.source[pair])
    assert found["flipped"] == pytest.approx(np.array(flips, dtype=float))
    assert found["right unedited"] == pytest.approx(np.array(right, dtype=float))
    assert flips != right


def test_passages_are_as_long_as_asked_and_none_of_the_texts_judged(embedded):
    found = module.passages(embedded, 50, 3)
    assert all(len(ids) >= 50 for ids in tokenize(embedded, found))
    judged = load_texts()["context"]
    assert not any(text in passage for passage in found for text in judged)
    assert module.passages(embedded, 0, 2) == ["", ""]
