"""A small language whose predictions are known: questions about a clock of 24 hours.

A question names a confidence, an hour and a turn, between two fillers that mean nothing:
"well surely 03:00 then +6h is". Its answer is one of 24 hours, with probability

    p(answer) ∝ exp(κ cos(φ_answer − φ_hour − φ_turn)),

a von Mises density on the hours: φ are angles on the clock's circle, κ is the confidence's
concentration. So answers are graded, hours that lie close get close distributions, and how far two
distributions are apart depends on hour, turn and confidence alone.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

N_HOURS = 24
HOURS = tuple(f"{hour:02d}:00" for hour in range(N_HOURS))
ANSWERS = tuple(f"{hour:02d}h" for hour in range(N_HOURS))
TURNS = {f"+{hours}h": hours for hours in range(0, N_HOURS, 3)}
"""Words that turn the hour, with the hours by which they do."""

CONCENTRATIONS = {"maybe": 1.0, "probably": 2.0, "surely": 4.0, "certainly": 8.0}
"""Words that set the confidence, with κ: the larger, the more certain the answer."""

_FILLER_WORDS = ("well", "so", "now", "then", "oh", "yes", "look", "right")
_PAIRS = tuple((first, second) for first in _FILLER_WORDS for second in _FILLER_WORDS)
HELD_OUT_FILLERS = tuple(
    (first, second)
    for first, second in _PAIRS
    if (_FILLER_WORDS.index(first) + _FILLER_WORDS.index(second)) % 4 == 0
)
"""Pairs of fillers that no network is trained on: a quarter, with each word at each place."""

TRAINED_FILLERS = tuple(pair for pair in _PAIRS if pair not in HELD_OUT_FILLERS)

VOCABULARY = (*_FILLER_WORDS, *CONCENTRATIONS, *HOURS, *TURNS, "is", *ANSWERS)
TOKEN_IDS = {word: token for token, word in enumerate(VOCABULARY)}
ANSWER_IDS = tuple(TOKEN_IDS[word] for word in ANSWERS)
PLACES = {"confidence": 1, "hour": 2, "turn": 4, "last": 5}
"""Where in a question the parts stand."""


def all_questions(fillers: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return every question with these pairs of fillers.

    Returns:
        Columns `hour`, `turn`, `confidence`, `first_filler`, `second_filler`, all of them words;
        768 rows for each pair of fillers.

    Raises:
        ValueError: no fillers, or a word that is none.
    """
    unknown = [word for pair in fillers for word in pair if word not in _FILLER_WORDS]
    if unknown or not len(fillers):
        raise ValueError(
            f"Expected pairs of fillers among {', '.join(_FILLER_WORDS)}; got {list(fillers)[:3]}."
        )
    every = product(fillers, HOURS, TURNS, CONCENTRATIONS)
    return pd.DataFrame(
        [(hour, turn, confidence, *pair) for pair, hour, turn, confidence in every],
        columns=["hour", "turn", "confidence", "first_filler", "second_filler"],
    )


def texts(questions: pd.DataFrame) -> list[str]:
    """Return the questions as text, six words each, such as "well surely 03:00 then +6h is"."""
    columns = ["first_filler", "confidence", "hour", "second_filler", "turn"]
    return [" ".join([*row, "is"]) for row in questions[columns].itertuples(index=False)]


def truths(questions: pd.DataFrame) -> NDArray[np.float64]:
    """Return the true next-token probabilities `[n_questions, d_vocab]`; each row sums to 1."""
    hours = questions["hour"].map(HOURS.index) + questions["turn"].map(TURNS)
    concentrations = questions["confidence"].map(CONCENTRATIONS).to_numpy(dtype=np.float64)
    away = 2 * np.pi * (np.arange(N_HOURS) - hours.to_numpy()[:, None]) / N_HOURS
    weights = np.exp(concentrations[:, None] * (np.cos(away) - 1))
    result = np.zeros((len(questions), len(VOCABULARY)))
    result[:, ANSWER_IDS] = weights / weights.sum(axis=1, keepdims=True)
    return result


def guessing(questions: pd.DataFrame) -> float:
    """Return the mean KL(truth ‖ all hours alike) in nats: what knowing no question costs."""
    p = truths(questions)[:, list(ANSWER_IDS)]
    return float((p * np.log(p * N_HOURS)).sum(axis=1).mean())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the language: one token a word, no special tokens."""
    # No unknown token: a word of no language is an error, not the first word.
    inner = Tokenizer(models.WordLevel(dict(TOKEN_IDS), unk_token="<none>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
