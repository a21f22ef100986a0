"""Decoding: what a state's norm alone tells about its context, cross-validated, above chance.

A classifier sees one number per item, log r, and names the item's class (its template, its kind of
text, …). It is fitted on some groups of items and judged on others. The null is the same procedure
with shuffled labels, on the same items and folds, so that neither unequal classes nor the
procedure itself can pass for information.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from lib.science.stats import Interval, percentile_interval, weighted_mean

FloatArray = NDArray[np.float64]

N_SHUFFLES = 20
N_FOLDS = 5


@dataclass(frozen=True)
class Decoding:
    """How well an attribute of each item is read off its norm, by block.

    Attributes:
        attribute: what was decoded.
        blocks: the blocks, in the order of the rows below.
        correct: whether each item was classified correctly `[n_blocks, n_items]`.
        shuffled: share of the shuffles in which it was, its label then being a shuffled one
            `[n_blocks, n_items]`.
        null: whether it was with the first shuffle `[n_blocks, n_items]`: a null that is decoded
            and judged as the labels are.
        items: numbers of the items, by which bootstrap weights are looked up `[n_items]`.
        reason: why nothing could be decoded; empty where it could.
    """

    attribute: str
    blocks: tuple[int, ...]
    correct: FloatArray
    shuffled: FloatArray
    null: FloatArray
    items: NDArray[np.int64]
    reason: str = field(default="")

    @property
    def testable(self) -> bool:
        """Whether anything could be decoded."""
        return not self.reason

    @property
    def n_items(self) -> int:
        """Number of items classified."""
        return self.correct.shape[1]

    def accuracy(self) -> FloatArray:
        """Return the share of items classified correctly `[n_blocks]`."""
        result: FloatArray = self.correct.mean(axis=1)
        return result

    def excess(
        self, weights: FloatArray, blocks: Sequence[int] | None = None, *, null: bool = False
    ) -> Interval:
        """Return accuracy less that of shuffled labels, mean over `blocks`, all by default.

        The interval is over items, whose excess in all blocks is drawn together.

        Args:
            weights: `[n_draws, n_all_items]` of `bootstrap_weights`; the columns are `items`.
            blocks: the blocks to average over.
            null: take `null` for the labels. It is one of the shuffles that it is compared with,
                so its excess is too small by a factor of 1 - 1 / n_shuffles; the sign is right.

        Raises:
            ValueError: nothing was decoded, or a block was not.
        """
        if not self.testable:
            raise ValueError(f"{self.attribute} was not decoded: {self.reason}.")
        chosen = self.blocks if blocks is None else tuple(blocks)
        if not chosen or not set(chosen) <= set(self.blocks):
            raise ValueError(f"Blocks {chosen} were not all decoded; decoded: {self.blocks}.")
        rows = [self.blocks.index(block) for block in chosen]
        gain = ((self.null if null else self.correct) - self.shuffled)[rows].mean(axis=0)
        own = weights[:, self.items]
        own = own[own.sum(axis=1) > 0]
        return percentile_interval(float(gain.mean()), weighted_mean(gain, own), n=len(gain))

    def curve(self, weights: FloatArray) -> pd.DataFrame:
        """Return `excess` at each block: `attribute`, `block`, `estimate`, `low`, `high`, `n`."""
        rows = []
        for block in self.blocks if self.testable else ():
            at = self.excess(weights, [block])
            rows.append((self.attribute, block, at.estimate, at.low, at.high, at.n))
        columns = ["attribute", "block", "estimate", "low", "high", "n"]
        return pd.DataFrame(rows, columns=columns)


def decode_attribute(
    attribute: str,
    log_norms: ArrayLike,
    labels: Sequence[object] | np.ndarray,
    groups: Sequence[object] | np.ndarray,
    *,
    rng: np.random.Generator,
    blocks: Sequence[int] | None = None,
    strata: Sequence[object] | np.ndarray | None = None,
    centre: bool = False,
    n_shuffles: int = N_SHUFFLES,
    n_folds: int = N_FOLDS,
) -> Decoding:
    """Return how well `labels` are decoded from log r alone, across groups, at each block.

    A least-squares classifier (ridge regression of the class indicators on a cubic spline basis of
    log r with five knots, the largest value wins) is fitted on all folds but one and judged on
    that one. A group is never split between folds. Labels that differ within groups are shuffled
    within them, others between groups; everything else stays the same.

    Args:
        attribute: name of what is decoded.
        log_norms: log r `[n_blocks, n_items]`.
        labels: class of each item `[n_items]`.
        groups: items that must not straddle folds share a group `[n_items]`.
        rng: source of folds and shuffles.
        blocks: numbers of the blocks, 0 … n_blocks − 1 by default.
        strata: if given, each stratum (the prompts of one answer, say) is decoded on its own, and
            what differs between strata cannot help.
        centre: take log r relative to its mean over the group (without the labels). For groups
            such as templates that shift all norms alike.
        n_shuffles: shuffles behind the null.
        n_folds: most folds; fewer where there are fewer groups.

    Returns:
        Items of the usable strata. Where there are none (one class, fewer than two groups, fewer
        items than folds or than twice the classes, equal norms) `reason` says why.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, fewer than two folds.
    """
    values = np.atleast_2d(np.asarray(log_norms, dtype=np.float64))
    names, member = np.asarray(labels), np.asarray(groups)
    stratum = np.zeros(len(names), dtype=int) if strata is None else np.asarray(strata)
    numbers = tuple(range(len(values))) if blocks is None else tuple(int(b) for b in blocks)
    _check(values, names, member, stratum, numbers, n_folds, n_shuffles)
    kept, correct, shuffled, null, reasons = [], [], [], [], []
    for value in pd.unique(stratum):
        items = np.flatnonzero(stratum == value)
        y, g = (pd.factorize(each[items])[0] for each in (names, member))
        x = _centred(values[:, items], g) if centre else values[:, items]
        if reason := _untestable(x, y, g, n_folds):
            reasons.append(reason)
            continue
        score = _cross_validate(x, _shuffles(y, g, n_shuffles, rng), g, n_folds, rng)
        kept.append(items)
        correct.append(score[:, 0])
        shuffled.append(score[:, 1:].mean(axis=1))
        null.append(score[:, 1])
    if not kept:
        empty = np.empty((len(numbers), 0))
        return Decoding(attribute, numbers, empty, empty, empty, np.empty(0, np.int64), reasons[0])
    return Decoding(
        attribute,
        numbers,
        np.concatenate(correct, axis=1),
        np.concatenate(shuffled, axis=1),
        np.concatenate(null, axis=1),
        np.concatenate(kept),
    )


def pool_decodings(attribute: str, decodings: Sequence[Decoding]) -> tuple[Decoding, int]:
    """Return the decodings of several samples as one, over all their items, and how many items.

    The items of the k-th sample are numbered after those of the samples before it, so weights of
    `bootstrap_weights` for the returned number serve all. Samples without result are left out.

    Raises:
        ValueError: no decodings, or blocks that differ.
    """
    if not decodings or len({decoding.blocks for decoding in decodings}) != 1:
        raise ValueError("Pooled decodings must be at least one, all of the same blocks.")
    usable = [decoding for decoding in decodings if decoding.testable]
    if not usable:
        return decodings[0], 0
    pooled = Decoding(
        attribute,
        usable[0].blocks,
        np.concatenate([decoding.correct for decoding in usable], axis=1),
        np.concatenate([decoding.shuffled for decoding in usable], axis=1),
        np.concatenate([decoding.null for decoding in usable], axis=1),
        np.arange(sum(decoding.n_items for decoding in usable)),
    )
    return pooled, pooled.n_items


def thirds(values: ArrayLike) -> NDArray[np.int64]:
    """Return 0, 1 or 2 for each value: the lower, middle or upper third of the sample.

    A quantity that is decoded (position, token frequency) thereby becomes an attribute with three
    classes; equal values share a class.
    """
    ordered = np.asarray(values, dtype=np.float64)
    edges = np.quantile(ordered, [1 / 3, 2 / 3])
    return np.searchsorted(edges, ordered, side="left").astype(np.int64)


def _cross_validate(
    x: FloatArray,
    labellings: NDArray[np.int64],
    groups: NDArray[np.int64],
    n_folds: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Return which items each labelling `[n_labellings, n_items]` gets right, by block."""
    n_classes = int(labellings.max()) + 1
    indicators = np.eye(n_classes)[labellings].transpose(1, 0, 2)
    targets = indicators.reshape(len(groups), -1)
    order = rng.permutation(int(groups.max()) + 1)[groups]
    splits = GroupKFold(n_splits=min(n_folds, len(np.unique(groups))))
    result = np.empty((len(x), *labellings.shape))
    for train, test in splits.split(x[0][:, None], groups=order):
        for block, row in enumerate(x):
            if np.ptp(row[train]) == 0:
                raise ValueError("Norms are equal in all items of a training fold.")
            model = make_pipeline(SplineTransformer(n_knots=5, knots="quantile"), Ridge(alpha=1.0))
            scores = model.fit(row[train, None], targets[train]).predict(row[test, None])
            guess = scores.reshape(len(test), -1, n_classes).argmax(axis=2)
            result[block][:, test] = (labellings[:, test] == guess.T).astype(np.float64)
    return result


def _shuffles(
    y: NDArray[np.int64], groups: NDArray[np.int64], n_shuffles: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the labels, followed by their shuffles `[1 + n_shuffles, n_items]`."""
    result = np.tile(y, (1 + n_shuffles, 1))
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    if any(len(np.unique(y[rows])) > 1 for rows in members):
        for shuffle in result[1:]:
            for rows in members:
                shuffle[rows] = rng.permutation(shuffle[rows])
    else:
        of_group = np.array([y[rows[0]] for rows in members])
        for shuffle in result[1:]:
            shuffle[:] = rng.permutation(of_group)[groups]
    return result


def _centred(x: FloatArray, groups: NDArray[np.int64]) -> FloatArray:
    """Return log r relative to the mean of its group."""
    counts = np.bincount(groups)
    means = np.stack([np.bincount(groups, row) / counts for row in x])
    result: FloatArray = x - means[:, groups]
    return result


def _untestable(
    x: FloatArray, y: NDArray[np.int64], groups: NDArray[np.int64], n_folds: int
) -> str:
    """Return why this stratum cannot be decoded, or an empty string."""
    n_classes, n_groups = int(y.max()) + 1, int(groups.max()) + 1
    if n_classes < 2:
        return "all items are of one class"
    if n_groups < 2:
        return "all items are in one group, so none can be held out"
    if len(y) < max(n_folds, 2 * n_classes):
        return f"{len(y)} items are too few for {n_classes} classes in {n_folds} folds"
    spread = np.ptp(x, axis=1)
    if (spread <= 1e-5).any():
        return "the norms are equal in all items, as after a normalisation"
    return ""


def _check(
    values: FloatArray,
    labels: np.ndarray,
    groups: np.ndarray,
    strata: np.ndarray,
    blocks: tuple[int, ...],
    n_folds: int,
    n_shuffles: int,
) -> None:
    n_items = values.shape[1]
    if n_items == 0 or any(each.shape != (n_items,) for each in (labels, groups, strata)):
        raise ValueError(
            f"log_norms are [n_blocks, n_items] = {values.shape}; labels, groups and strata need "
            f"one entry an item, got {labels.shape}, {groups.shape}, {strata.shape}."
        )
    if not np.isfinite(values).all():
        item = int(np.argmin(np.isfinite(values).all(axis=0)))
        raise ValueError(f"log_norms: item {item} has a value that is not finite (norm 0?).")
    if len(blocks) != len(values):
        raise ValueError(f"{len(blocks)} blocks are named for {len(values)} rows of log_norms.")
    if n_folds < 2 or n_shuffles < 1:
        raise ValueError(f"Need 2 folds and 1 shuffle at least; got {n_folds} and {n_shuffles}.")
