"""How the geometry of the residual stream reorganises over depth: from context to prediction.

Representational similarity analysis (Kriegeskorte et al. 2008): the angles between the residual
streams of a task's prompts are compared, block by block, with how little the prompts share of their
words (context) and with how much their next-token distributions differ (prediction).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.engine.models import Decoder
from lib.engine.progress import track
from lib.engine.store import recall_residuals
from lib.evidence.arms import Trial
from lib.phase_transition.widths import CurveWidth, curve_width
from lib.science.correlations import rank_matrix, weighted_correlations
from lib.science.divergences import jeffreys_of_logits
from lib.science.metrics import (
    angles,
    angular_step,
    effective_rank,
    intrinsic_dimension,
    mean_cosine,
    neighbourhood_overlap,
    token_set_distances,
)

N_NEIGHBOURS = 10


@dataclass(frozen=True, eq=False)
class Alignment:
    """Rank correlations of a task's angles with context and with prediction, over depth.

    Attributes:
        curves: columns `block`, `curve` (context or prediction), `estimate`, `low`, `high`, `n`.
        draws: bootstrap draws of each curve `[n_draws, n_blocks]`.
    """

    curves: pd.DataFrame
    draws: Mapping[str, np.ndarray]

    def width(self) -> CurveWidth:
        """Return the 10–90 % width of the rise towards the prediction, the last block left out.

        The last block is near-tautological: there the prediction is a function of the state.
        """
        rising = self.curves[self.curves["curve"] == "prediction"].sort_values("block")
        return curve_width(
            rising["estimate"].to_numpy()[:-1],
            self.draws["prediction"][:, :-1],
            falling=False,
            n_items=int(rising["n"].iloc[0]),
        )


def align(trial: Trial, weights: np.ndarray) -> Alignment:
    """Return how far a task's geometry is that of its contexts and that of its predictions.

    Args:
        trial: a task, best many-to-one, so that prompts with different subjects share a prediction.
        weights: prompt weights `[n_draws, n_prompts]`, the same as for the arms.
    """
    usable = np.flatnonzero(trial.usable)
    tokens = [trial.task.tokens[index] for index in usable]
    residuals = recall_residuals(trial.decoder, trial.task.tokens, logits=True)
    assert residuals.logits is not None
    references = {
        "context": rank_matrix(token_set_distances(tokens)),
        "prediction": rank_matrix(jeffreys_of_logits(residuals.logits[usable])),
    }
    weighted = np.concatenate([np.ones((1, len(usable))), weights[:, usable]])
    found = np.array(
        [
            weighted_correlations([rank_matrix(angles(states)), *references.values()], weighted)
            for states in residuals.states[:, usable].numpy()
        ]
    )
    draws = {name: found[:, 1:, 0, index + 1].T for index, name in enumerate(references)}
    rows = []
    for index, name in enumerate(references):
        low, high = np.nanquantile(draws[name], [0.025, 0.975], axis=0)
        for block, estimate in enumerate(found[:, 0, 0, index + 1]):
            rows.append((block, name, estimate, low[block], high[block], len(usable)))
    columns = ["block", "curve", "estimate", "low", "high", "n"]
    return Alignment(pd.DataFrame(rows, columns=columns), draws)


def align_tasks(
    trials: Mapping[str, Trial], weights: Mapping[str, np.ndarray]
) -> dict[str, Alignment]:
    """Return the alignment of every many-to-one task, with the arms' prompt weights.

    Many-to-one: some prompts of one template share their target and differ in subject.
    """
    return {
        name: align(trial, weights[name])
        for name, trial in trials.items()
        if len(trial.pairs(donors_per_prompt=1, same_answer=True))
    }


def alignment_table(
    alignments: Mapping[str, Alignment], twin_alignments: Mapping[str, Alignment]
) -> pd.DataFrame:
    """Return the curves of model and twin for a figure: `task`, `curve`, `untrained`, …."""
    tables = [
        alignment.curves.assign(
            task=name, untrained=untrained, curve="angles against " + alignment.curves["curve"]
        )
        for untrained, found in ((False, alignments), (True, twin_alignments))
        for name, alignment in found.items()
    ]
    columns = ["task", "untrained", "curve", "block", "estimate", "low", "high", "n"]
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )


def profile_depth(
    decoder: Decoder,
    prompts: list[list[int]],
    rng: np.random.Generator,
    *,
    n_halves: int = 5,
) -> pd.DataFrame:
    """Return measures of the whole cloud of residual streams over depth, at the last token.

    Args:
        decoder: the model.
        prompts: token ids of at least 40 texts.
        rng: draws the halves.
        n_halves: random halves of the texts whose spread is the band. Resampling with replacement
            would repeat items, which breaks neighbour-based measures.

    Returns:
        Columns `block`, `quantity`, `estimate`, `low`, `high` (mean, smallest and largest over the
        halves: several of these measures grow with the number of texts), `n` (texts in a half).
        All three are NaN where a measure is not defined: two texts with equal states, say.
    """
    residuals = recall_residuals(decoder, prompts, logits=True)
    assert residuals.logits is not None
    divergence = jeffreys_of_logits(residuals.logits)
    states = residuals.states.numpy()
    halves = [rng.permutation(len(prompts))[: len(prompts) // 2] for _ in range(n_halves)]

    def overlap(block: int, items: np.ndarray) -> float:
        geometry = angles(states[block, items])
        shared = neighbourhood_overlap(geometry, divergence[np.ix_(items, items)], k=N_NEIGHBOURS)
        return float(shared.mean())

    def step(block: int, items: np.ndarray) -> float:
        before = max(block - 1, 0)
        return float(angular_step(states[before, items], states[block, items]).mean())

    quantities: dict[str, Callable[[int, np.ndarray], float]] = {
        "intrinsic dimension (TwoNN)": lambda b, i: intrinsic_dimension(states[b, i]),
        "effective rank": lambda b, i: effective_rank(states[b, i]),
        "mean cosine": lambda b, i: mean_cosine(states[b, i]),
        "angular step (radians)": step,
        "neighbours shared with the prediction": overlap,
    }
    rows = []
    for block in track(range(decoder.n_blocks), "geometry of the contexts"):
        for name, measure in quantities.items():
            if measure is step and block == 0:
                continue  # nothing to compare the first block with
            try:
                spread = [measure(block, items) for items in halves]
            except ValueError:
                spread = [float("nan")]
            mean = float(np.mean(spread))
            rows.append((block, name, mean, min(spread), max(spread), len(halves[0])))
    return pd.DataFrame(rows, columns=["block", "quantity", "estimate", "low", "high", "n"])


def gaps_sentence(profile: pd.DataFrame) -> str:
    """Return where a table of `profile_depth`, of one or more models, has gaps; empty if nowhere.

    Args:
        profile: its columns, and `untrained`.
    """
    gaps = profile[profile["estimate"].isna()]
    parts = [
        f"{quantity}{', untrained' if untrained else ''}, at {len(part)} of the blocks"
        for (quantity, untrained), part in gaps.groupby(["quantity", "untrained"], sort=False)
    ]
    return f"Not defined, since states coincide: {'; '.join(parts)}." if parts else ""
