"""What norms and angles at the last token tell of the prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from lib.engine.progress import track
from lib.norm_code.norms import CONTEXTS, Sample
from lib.science.divergences import jeffreys_of_logits
from lib.science.metrics import angles, log_norm_differences

FloatArray = NDArray[np.float64]

RELATIONS = ("norm", "angle", "norm given angle")
MINIMUM_ITEMS = 4


@dataclass(frozen=True, eq=False)
class Relation:
    """Rank correlations with the divergence J of predictions: of norm, angle, norm given angle.

    Attributes:
        task: the sample's name.
        blocks: the blocks.
        estimate: by name of `RELATIONS` `[n_blocks]`.
        draws: bootstrap draws by name `[n_draws, n_blocks]`; NaN where a draw has no value.
        n: prompts compared.
    """

    task: str
    blocks: tuple[int, ...]
    estimate: Mapping[str, FloatArray]
    draws: Mapping[str, FloatArray]
    n: int

    def to_frame(self) -> pd.DataFrame:
        """Return `task`, `curve`, `block`, `estimate`, `low`, `high`, `n`."""
        tables = []
        for name in RELATIONS:
            low, high = np.nanquantile(self.draws[name], [0.025, 0.975], axis=0)
            tables.append(
                pd.DataFrame(
                    {
                        "task": self.task,
                        "curve": name,
                        "block": self.blocks,
                        "estimate": self.estimate[name],
                        "low": low,
                        "high": high,
                        "n": self.n,
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def mean_over(self, name: str, blocks: Sequence[int]) -> tuple[float, FloatArray]:
        """Return the mean over blocks and its draws."""
        rows = [self.blocks.index(block) for block in blocks]
        return float(self.estimate[name][rows].mean()), self.draws[name][:, rows].mean(axis=1)


def relate_norms(
    sample: Sample, weights: FloatArray, blocks: Sequence[int], *, description: str | None = None
) -> Relation | None:
    """Return how |Δ log r| and θ go with J over the pairs of prompts, at each block.

    Prompts of a task are compared within their template only; contexts all with each other. Ranks
    are taken within the template, once; see `stratified_correlations`.

    Args:
        sample: the prompts.
        weights: `[n_draws, n_usable]`.
        blocks: the blocks.
        description: what a progress display calls this.

    Returns:
        None where too few prompts, equal norms or equal predictions leave nothing to correlate.
    """
    strata = (
        sample.prompts["template"].to_numpy()[sample.usable]
        if "template" in sample.prompts
        else np.zeros(int(sample.usable.sum()), dtype=int)
    )
    names, counts = np.unique(strata, return_counts=True)
    large = names[counts >= MINIMUM_ITEMS]
    kept = np.isin(strata, large)
    if not kept.any():
        return None
    strata, weights = strata[kept], weights[:, kept]
    rows = np.flatnonzero(sample.usable)[kept]
    assert sample.logits is not None
    prediction = jeffreys_of_logits(sample.logits[rows])
    states = sample.states[list(blocks)][:, rows].numpy()
    weights = np.concatenate([np.ones((1, len(rows))), weights])
    found = []
    try:
        for block in track(states, description) if description else states:
            matrices = [log_norm_differences(block), prediction, angles(block)]
            found.append(stratified_correlations(matrices, strata, weights))
    except ValueError:
        return None
    r = np.stack(found, axis=1)
    norm, angle, between = r[..., 0, 1], r[..., 1, 2], r[..., 0, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        partial = (norm - between * angle) / np.sqrt((1 - between**2) * (1 - angle**2))
    values = dict(zip(RELATIONS, (norm, angle, partial), strict=True))
    return Relation(
        sample.task,
        tuple(blocks),
        {name: value[0] for name, value in values.items()},
        {name: value[1:] for name, value in values.items()},
        len(rows),
    )


def relate_samples(
    contexts: Sample,
    tasks: Mapping[str, Sample],
    weights: Mapping[str, FloatArray],
    blocks: Sequence[int],
) -> dict[str, Relation]:
    """Return `relate_norms` of the contexts and of every task where it exists, by name."""
    found = {
        name: relate_norms(
            sample, weights[name][:, sample.usable], blocks, description=f"{name}: relation"
        )
        for name, sample in {CONTEXTS: contexts, **tasks}.items()
    }
    return {name: relation for name, relation in found.items() if relation is not None}


def stratified_correlations(
    matrices: Sequence[FloatArray], strata: np.ndarray, weights: FloatArray
) -> FloatArray:
    """Return rank correlations over the pairs within strata `[n_draws, n_matrices, n_matrices]`.

    Each matrix is ranked and standardised within each stratum, so that no difference between
    strata counts; a pair (i, j) counts w_i·w_j times. With one stratum equal to
    `lib.science.correlations.weighted_correlations` of `rank_matrix`. NaN in a draw without value.

    Args:
        matrices: symmetric `[n_items, n_items]`.
        strata: `[n_items]`.
        weights: `[n_draws, n_items]`; a row of ones gives the estimate.

    Raises:
        ValueError: a matrix that is constant within a stratum.
    """
    within = strata[:, None] == strata[None, :]
    np.fill_diagonal(within, False)
    ranked = [_rank_within(matrix, strata) for matrix in matrices]

    def pair_sum(matrix: FloatArray) -> FloatArray:
        total: FloatArray = np.einsum("di,di->d", weights @ matrix, weights)
        return total

    with np.errstate(divide="ignore", invalid="ignore"):
        n_pairs = pair_sum(within.astype(np.float64))
        means = [pair_sum(matrix) / n_pairs for matrix in ranked]
        products = np.empty((len(weights), len(ranked), len(ranked)))
        for i, first in enumerate(ranked):
            for j, second in enumerate(ranked[: i + 1]):
                covariance = pair_sum(first * second) / n_pairs - means[i] * means[j]
                products[:, i, j] = products[:, j, i] = covariance
        variances = np.einsum("dii->di", products).copy()
        variances[variances < 1e-12] = np.nan
        scales = np.sqrt(variances)
        result: FloatArray = np.clip(products / (scales[:, :, None] * scales[:, None, :]), -1, 1)
    return result


def _rank_within(matrix: FloatArray, strata: np.ndarray) -> FloatArray:
    result = np.zeros_like(matrix)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        rows, columns = np.triu_indices(len(members), 1)
        i, j = members[rows], members[columns]
        ranks = rankdata(matrix[i, j])
        if np.ptp(ranks) == 0:
            raise ValueError("A dissimilarity matrix is constant within a stratum.")
        ranks = (ranks - ranks.mean()) / ranks.std()
        result[i, j] = result[j, i] = ranks
    return result
