"""Tiny tasks as a tiny random network reads them; what it predicts, by the oracle's full passes."""

import pandas as pd
import torch
from oracle import forward, patched_logits

from lib.evidence.tasks import build_task
from lib.evidence.transfer import read_tasks

SUBJECTS, ANSWERS = [f"s{i}" for i in range(12)], [f"a{i}" for i in range(4)]
WORDS = ["?", *SUBJECTS, *ANSWERS, *[f"t{i}" for i in range(6)]]
TEMPLATES = ["t0 t1 {subject} t2", "t3 {subject} t4 t5", "t5 t2 {subject} t0"]


def tiny_task(decoder, name="tiny", subjects=SUBJECTS, answers=ANSWERS, templates=TEMPLATES):
    rows = [(s, answers[i % len(answers)], "") for i, s in enumerate(subjects)]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    return build_task(name, items, templates, decoder)


def as_sums(decoder):
    """A task of three groups, read by a tiny network."""
    rows = [(f"s{i}", ANSWERS[(i + k) % 4], f"t{k}") for i in range(12) for k in (0, 1, 2)]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    task = build_task("sums", items, ["t1 t4 {group} t3 {subject} t5"], decoder)
    return read_tasks(decoder, {"sums": task})["sums"]


def recompute(trial, row, position, block, state):
    """Log-probabilities after a prompt whose state after a block is overwritten."""
    tokens, decoder = trial.task.tokens[row], trial.decoder
    found = patched_logits(decoder.model, decoder.blocks[block], [tokens], [position], [state])
    return torch.log_softmax(found[0].double(), -1)


def clean(trial, row):
    found = forward(trial.decoder.model, [trial.task.tokens[row]])
    return torch.log_softmax(found[0].double(), -1)


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


def place(trial, row, arm):
    if arm == "context arm":
        return int(trial.task.subject_positions[row])
    return len(trial.task.tokens[row]) - 1
