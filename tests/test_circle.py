"""The clock's language: exact distributions, held-out fillers, one token a word."""

import numpy as np
import pytest
from scipy.special import i0, i1
from scipy.stats import vonmises

from lib.evidence import circle


def test_truth_is_a_von_mises_density_around_the_turned_hour():
    questions = circle.all_questions(circle.HELD_OUT_FILLERS[:1]).sample(40, random_state=1)
    hours = np.arange(circle.N_HOURS)
    for question, truth in zip(questions.itertuples(), circle.truths(questions), strict=True):
        turned = (int(question.hour[:2]) + int(question.turn[1:-1])) % 24
        kappa = {"maybe": 1, "probably": 2, "surely": 4, "certainly": 8}[question.confidence]
        density = vonmises.pdf(hours * np.pi / 12, kappa, loc=turned * np.pi / 12)
        answers = [circle.VOCABULARY.index(f"{hour:02d}h") for hour in hours]
        np.testing.assert_allclose(truth[answers], density / density.sum(), atol=1e-12)
        assert truth.sum() == pytest.approx(1) and np.delete(truth, answers).max() == 0


def test_no_held_out_pair_of_fillers_is_trained():
    assert not set(circle.HELD_OUT_FILLERS) & set(circle.TRAINED_FILLERS)
    trained = set(circle.texts(circle.all_questions(circle.TRAINED_FILLERS)))
    held_out = set(circle.texts(circle.all_questions(circle.HELD_OUT_FILLERS)))
    assert not trained & held_out
    assert len(held_out) == 16 * 24 * 8 * 4 and len(trained) == 3 * len(held_out)


def test_each_filler_is_trained_at_each_place():
    for place in (0, 1):
        assert {pair[place] for pair in circle.TRAINED_FILLERS} == {
            pair[place] for pair in circle.HELD_OUT_FILLERS
        }


def test_fillers_mean_nothing():
    one, other = (circle.all_questions([pair]) for pair in (("well", "well"), ("oh", "so")))
    np.testing.assert_array_equal(circle.truths(one), circle.truths(other))


def test_guessing_costs_what_a_von_mises_density_holds_over_a_uniform_one():
    """In the limit of many hours κ I₁(κ)/I₀(κ) − log I₀(κ); 24 are many at these κ."""
    kappas = np.array([1.0, 2.0, 4.0, 8.0])
    expected = (kappas * i1(kappas) / i0(kappas) - np.log(i0(kappas))).mean()
    questions = circle.all_questions([("so", "so")])
    assert circle.guessing(questions) == pytest.approx(expected, abs=1e-6)


def test_each_word_is_one_token_at_its_place():
    questions = circle.all_questions(circle.HELD_OUT_FILLERS[:2])
    tokens = np.array(circle.make_tokenizer()(circle.texts(questions))["input_ids"])
    assert tokens.shape == (len(questions), 6)
    for column in ("hour", "turn", "confidence"):
        words = [circle.VOCABULARY[token] for token in tokens[:, circle.PLACES[column]]]
        assert words == list(questions[column])
    assert {circle.VOCABULARY[token] for token in tokens[:, circle.PLACES["last"]]} == {"is"}


def test_a_word_of_another_language_is_refused():
    with pytest.raises(Exception, match=r"Missing .UNK."):
        circle.make_tokenizer()(["well surely 03:00 then +5h is"])
    with pytest.raises(ValueError, match="pairs of fillers among well, so"):
        circle.all_questions([("well", "hm")])
