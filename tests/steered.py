"""Tasks that a tiny model is able to do, and what single full passes say of them."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from oracle import patched_logits
from tiny_tasks import SUBJECTS, tiny_task

from lib.evidence.steering import Steering
from lib.evidence.tasks import Pairs
from lib.evidence.transfer import Trial, read_tasks

N_ANSWERS, BLOCK = 4, 2
WORDS = ["?", *SUBJECTS, *[f"a{i}" for i in range(8)], *[f"t{i}" for i in range(6)]]


@dataclass(frozen=True, eq=False)
class Able(Trial):
    """A trial of a model that answers all prompts rightly but the first."""

    @property
    def correct(self):
        return np.arange(self.task.n_prompts) > 0


def able_trials(decoder):
    """Two tasks without an answer in common."""
    tasks = {
        name: tiny_task(decoder, name, answers=[f"a{first + k}" for k in range(N_ANSWERS)])
        for name, first in (("tiny", 0), ("other", 4))
    }
    read = read_tasks(decoder, tasks)
    return {name: Able(one.task, one.decoder, one.last_states) for name, one in read.items()}


def recompute(trial, prompt, state, block=BLOCK):
    """Logits after a prompt whose last state after a block is overwritten, in one full pass."""
    return recompute_tokens(trial.decoder, trial.task.tokens[prompt], state, block)


def recompute_tokens(decoder, tokens, state, block=BLOCK):
    new = torch.as_tensor(state, dtype=torch.float32)[None]
    model, own = decoder.model, decoder.blocks[block]
    return patched_logits(model, own, [tokens], [[len(tokens) - 1]], [new])[0].numpy()


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
