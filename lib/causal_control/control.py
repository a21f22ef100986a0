"""Causal control: cases, and what a donor's direction and norm do to the answer.

Every case is a pair of prompts: the recipient, whose answer is the source, and the donor, whose
answer is the target. A model that passes a task's gate is judged by the right answers and steered
with centroids of the *other* templates. The untrained twin passes none; it is judged by its own
choices, across templates, and steered with the donor's own state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.engine.interventions import exchange, exchange_direction, exchange_norm
from lib.engine.models import Decoder
from lib.engine.store import recall_sweep
from lib.evidence.arms import Trial, has_counterparts, prepare_trial, site_states
from lib.evidence.tasks import gate, load_task
from lib.evidence.verdicts import late_blocks
from lib.science.stats import pair_share_bootstrap

EXCHANGES = {"both": exchange, "direction": exchange_direction, "norm": exchange_norm}
CURVE_COLUMNS = ["model", "untrained", "task", "curve", "block", "estimate", "low", "high", "n"]
Weights = Mapping[str, np.ndarray]


def twin_trials(twin: Decoder, names: Iterable[str]) -> dict[str, Trial]:
    """Return the twin's trials: tasks on which its own choice differs between any two prompts."""
    trials = {}
    for name in names:
        task = load_task(name, twin)
        trial = prepare_trial(twin, task, gate(twin, task))
        if len(choose_pairs(trial, 1)):
            trials[name] = trial
    return trials


def choose_pairs(
    trial: Trial, donors_per_prompt: int, templates: Sequence[int] | None = None
) -> np.ndarray:
    """Return pairs (recipient, donor) `[n_pairs, 2]` of different answers.

    Those of `Trial.pairs`, of which source and target are known from another template, but for a
    model that is judged by its own choice.
    """
    pairs = trial.pairs(donors_per_prompt=donors_per_prompt)
    if len(pairs) and not trial.own_choice:
        pairs = pairs[has_counterparts(trial, pairs)]
    if templates is None:
        return pairs
    template = trial.task.prompts["template"].to_numpy()[pairs[:, 0]]
    return pairs[np.isin(template, list(templates))]


def late_from(transitions: pd.DataFrame, n_blocks: int) -> tuple[int, range]:
    """Return the transition block and the late blocks, from the median transition over tasks.

    Both begin at ℓ* rounded up. A model without a transition is shown from three quarters of its
    depth on, for want of a better place.

    Args:
        transitions: column `block`, one row a task; may be empty.
        n_blocks: depth of the model.
    """
    median = transitions["block"].median() if len(transitions) else 0.75 * n_blocks
    late = late_blocks(n_blocks, float(np.clip(median, 0, n_blocks - 2)))
    return late[0], late


# --- direction and norm --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExchangeOutcome:
    """Direction, norm or both from a donor at the last token.

    Attributes:
        trial: task and model.
        pairs: recipient and donor `[n_pairs, 2]`.
        blocks: after which the exchange was made.
        flipped: by edit (`"both"`, `"direction"`, `"norm"`), whether the closed-set argmax became
            the donor's answer `[n_blocks, n_pairs]`.
        changed: by edit, whether it is no longer the recipient's `[n_blocks, n_pairs]`.
    """

    trial: Trial
    pairs: np.ndarray
    blocks: tuple[int, ...]
    flipped: Mapping[str, np.ndarray]
    changed: Mapping[str, np.ndarray]

    def effects(self, blocks: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return the parts of the effect `[n_blocks, n_pairs]`, over `blocks` if given.

        With y₀₀ = 0 the unedited prompt, the effect of the whole exchange is the sum of three:
        direction y₁₀, norm y₀₁ and interaction y₁₁ − y₁₀ − y₀₁.
        """
        rows = [self.blocks.index(b) for b in (self.blocks if blocks is None else blocks)]
        both, direction, norm = (self.flipped[name][rows].astype(float) for name in EXCHANGES)
        return {
            "both": both,
            "direction": direction,
            "norm": norm,
            "interaction": both - direction - norm,
        }


def measure_exchange(
    trials: Mapping[str, Trial],
    blocks: Sequence[int],
    *,
    donors_per_prompt: int = 2,
    templates: Sequence[int] | None = None,
    same_answer: bool = False,
) -> dict[str, ExchangeOutcome]:
    """Return the 2 × 2 exchange at the last token, by task.

    Args:
        trials: by task.
        blocks: after which to exchange.
        donors_per_prompt: donors of each recipient.
        templates: of the recipients, all by default; not for donors of the same answer.
        same_answer: donors of the same answer and another subject: the null. Tasks that have none
            are left out.
    """
    outcomes = {}
    for name, trial in trials.items():
        if same_answer:
            pairs = trial.pairs(donors_per_prompt=donors_per_prompt, same_answer=True)
        else:
            pairs = choose_pairs(trial, donors_per_prompt, templates)
        if len(pairs) == 0:
            continue
        sweep = recall_sweep(
            trial.decoder,
            trial.task.tokens,
            pairs,
            EXCHANGES,
            positions="last",
            donors=site_states(trial, "last")[list(blocks)],
            blocks=blocks,
            read_ids=trial.task.answer_ids.tolist(),
            description=f"{name}: exchange{', same answer' if same_answer else ''}",
        )
        choice = sweep.logits.argmax(-1)
        source, target = trial.target[pairs].T
        outcomes[name] = ExchangeOutcome(
            trial,
            pairs,
            sweep.blocks,
            {edit: choice[index] == target for index, edit in enumerate(EXCHANGES)},
            {edit: choice[index] != source for index, edit in enumerate(EXCHANGES)},
        )
    return outcomes


def effect_curves(outcomes: Mapping[str, ExchangeOutcome], weights: Weights) -> pd.DataFrame:
    """Return the parts of the effect by task and block, and their mean over tasks (`"all tasks"`).

    Columns `model`, `untrained`, `task`, `curve`, `block`, `estimate`, `low`, `high`, `n`.
    """
    tables = []
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {}
    for name, outcome in outcomes.items():
        n = len(np.unique(outcome.pairs))
        for part, values in outcome.effects().items():
            draws = pair_share_bootstrap(values, outcome.pairs, weights[name])
            pooled.setdefault(part, []).append((values.mean(axis=1), draws, n))
            tables.append(_curve(outcome, name, part, values.mean(axis=1), draws, n))
    for part, found in pooled.items():
        mean = np.mean([estimate for estimate, _, _ in found], axis=0)
        all_draws = np.mean([draws for _, draws, _ in found], axis=0)
        total = sum(n for _, _, n in found)
        tables.append(_curve(outcome, "all tasks", part, mean, all_draws, total))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=CURVE_COLUMNS)


def _curve(
    outcome: ExchangeOutcome, task: str, part: str, mean: np.ndarray, draws: np.ndarray, n: int
) -> pd.DataFrame:
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    table = pd.DataFrame({"block": outcome.blocks, "estimate": mean, "low": low, "high": high})
    decoder = outcome.trial.decoder
    table = table.assign(
        model=decoder.name, untrained=decoder.untrained, task=task, curve=part, n=n
    )
    return table[CURVE_COLUMNS]


def effect_shares(
    outcome: ExchangeOutcome, weights: np.ndarray, late: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return each part's share of the late effect: the estimate, then the draws `[1 + n_draws]`.

    The effects are averaged over the late blocks and divided by that of the whole exchange. NaN in
    a draw in which the whole exchange does nothing.
    """
    effects = outcome.effects(late)
    both_first = np.concatenate([np.ones((1, weights.shape[1])), weights])
    means = {
        part: pair_share_bootstrap(values, outcome.pairs, both_first).mean(axis=1)
        for part, values in effects.items()
    }
    whole = np.where(means["both"] > 0, means["both"], np.nan)
    return {part: means[part] / whole for part in ("direction", "norm", "interaction")}
