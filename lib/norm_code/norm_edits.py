"""What acting on the norm does: norms exchanged between prompts, and states scaled up and down."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from lib.engine.interventions import (
    exchange_direction,
    exchange_norm,
    rotate_by_displacement,
    scale,
)
from lib.engine.readouts import distribution_measure
from lib.engine.store import recall_sweep
from lib.engine.sweeps import Sweep
from lib.norm_code.norms import Sample
from lib.science.stats import Interval, pair_share_bootstrap, percentile_interval

EXCHANGES = {"norm": exchange_norm, "direction": exchange_direction}
LONGEST_ROTATION = 2.0
"""A rotation that keeps the norm moves a state by at most so many of its norms."""


def exchange_in_task(
    sample: Sample, pairs: np.ndarray, blocks: Sequence[int], *, description: str | None = None
) -> pd.DataFrame:
    """Return what the donor's norm, and the donor's direction, do to each pair of a task.

    Args:
        sample: a task.
        pairs: recipient and donor `[n_pairs, 2]`.
        blocks: the blocks edited after.
        description: what a progress display calls this.

    Returns:
        A row per edit, block and pair: `task`, `edit`, `block`, `recipient`, `donor`;
        `answer_flipped` (the closed-set argmax became the donor's answer), `answer_changed` (it is
        no longer the recipient's), `argmax_kept` (the full vocabulary's argmax stayed), `kl_nats`,
        `entropy_change_nats`; `comparable`: whether recipient and donor stand for different
        answers, without which nothing can flip.
    """
    trial = sample.trial
    if trial is None:
        raise ValueError(f"{sample.task} has no closed answer set; use exchange_in_contexts.")
    sweep = _exchange(sample, pairs, blocks, trial.task.answer_ids.tolist(), description)
    frame = sweep.to_frame().assign(task=sample.task)
    source = trial.target[frame["recipient"].to_numpy()]
    target = trial.target[frame["donor"].to_numpy()]
    choice = frame.pop("choice").to_numpy()
    return frame.assign(
        answer_flipped=(choice == target) & (source != target),
        answer_changed=choice != source,
        comparable=source != target,
    )


def exchange_in_contexts(
    sample: Sample, pairs: np.ndarray, blocks: Sequence[int], *, description: str | None = None
) -> pd.DataFrame:
    """Return the same for contexts; the answer is the argmax over the full vocabulary."""
    frame = _exchange(sample, pairs, blocks, [], description).to_frame().assign(task=sample.task)
    assert sample.logits is not None
    own = sample.logits.argmax(-1).numpy()
    source, target = own[frame["recipient"].to_numpy()], own[frame["donor"].to_numpy()]
    after = frame["argmax"].to_numpy().astype(int)
    return frame.assign(
        answer_flipped=(after == target) & (source != target),
        answer_changed=after != source,
        comparable=source != target,
    )


def exchange_in_all(
    contexts: Sample,
    tasks: Mapping[str, Sample],
    context_pairs: np.ndarray,
    pairs: Mapping[str, np.ndarray],
    blocks: Sequence[int],
) -> dict[str, pd.DataFrame]:
    """Return the exchanges in the contexts and in every task that has pairs, by name."""
    found = {contexts.task: exchange_in_contexts(contexts, context_pairs, blocks)}
    for name, rows in pairs.items():
        found[name] = exchange_in_task(tasks[name], rows, blocks, description=name)
    return found


def _exchange(
    sample: Sample,
    pairs: np.ndarray,
    blocks: Sequence[int],
    read_ids: Sequence[int],
    description: str | None,
) -> Sweep:
    assert sample.logits is not None
    return recall_sweep(
        sample.decoder,
        sample.tokens,
        pairs,
        EXCHANGES,
        positions="last",
        donors=sample.states[list(blocks)],
        blocks=blocks,
        read_ids=read_ids,
        measure=distribution_measure(sample.logits, pairs[:, 0]),
        description=description,
    )


def spread_contexts(sample: Sample, per_kind: int) -> np.ndarray:
    """Return the numbers of the first contexts of each kind, one kind after the other in turn."""
    turn = sample.prompts.groupby("kind").cumcount()
    order = turn.sort_values(kind="stable").index.to_numpy()
    return order[turn.to_numpy()[order] < per_kind]


def pairs_across_kinds(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Return pairs of contexts of different kinds, each context once recipient and once donor.

    Raises:
        ValueError: neighbours in `chosen` that are of one kind.
    """
    pairs = np.stack([chosen, np.roll(chosen, -1)], axis=1)
    kinds = sample.prompts["kind"].to_numpy()[pairs]
    if (kinds[:, 0] == kinds[:, 1]).any():
        raise ValueError("Neighbouring contexts are of one kind; take them from spread_contexts.")
    return pairs


def average_exchanges(
    exchanges: Mapping[str, pd.DataFrame], weights: Mapping[str, np.ndarray], value: str
) -> pd.DataFrame:
    """Return the mean of an outcome over tasks by edit and block, with intervals over prompts.

    For `answer_flipped` pairs in which nothing can flip are left out, and tasks without others.
    Columns `edit`, `block`, `estimate`, `low`, `high`, `n` (prompts of all tasks).
    """
    means, all_draws, n_prompts = [], [], 0
    index: pd.Index | None = None
    for task, table in exchanges.items():
        chosen = table[table["comparable"]] if value == "answer_flipped" else table
        if chosen.empty:
            continue
        wide = chosen.pivot(
            index=["edit", "block"], columns=["recipient", "donor"], values=value
        ).astype(float)
        pairs = np.array(wide.columns.tolist())
        index = wide.index
        means.append(wide.to_numpy().mean(axis=1))
        all_draws.append(pair_share_bootstrap(wide.to_numpy(), pairs, weights[task]))
        n_prompts += len(np.unique(pairs))
    columns = ["edit", "block", "estimate", "low", "high", "n"]
    if index is None:
        return pd.DataFrame({column: np.empty(0) for column in columns})
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(np.nanmean(all_draws, axis=0), [0.025, 0.975], axis=0)
    table = index.to_frame(index=False)
    table = table.assign(estimate=np.mean(means, axis=0), low=low, high=high, n=n_prompts)
    return table[columns]


def mean_outcome(
    table: pd.DataFrame, edit: str, value: str, weights: np.ndarray, blocks: Sequence[int]
) -> tuple[float, np.ndarray, int]:
    """Return an outcome's mean over blocks and pairs, its draws, and the number of prompts."""
    part = table[(table["edit"] == edit) & table["block"].isin(blocks)]
    means = part.groupby(["recipient", "donor"])[value].mean()
    pairs = np.array(means.index.tolist())
    outcome = means.to_numpy(dtype=float)
    draws = pair_share_bootstrap(outcome, pairs, weights)[:, 0]
    return float(outcome.mean()), draws, len(np.unique(pairs))


def ratio_interval(
    first: tuple[float, np.ndarray, int], second: tuple[float, np.ndarray, int]
) -> Interval:
    """Return the ratio of two means, paired by draw, with its interval.

    Raises:
        ValueError: a second mean of 0.
    """
    if second[0] == 0:
        raise ValueError("The ratio's denominator is 0: that edit changes nothing.")
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = first[1] / second[1]
    return percentile_interval(first[0] / second[0], draws, n=first[2])


def scale_and_rotate(
    sample: Sample,
    chosen: np.ndarray,
    factors: Sequence[float],
    blocks: Sequence[int],
    *,
    seed: int,
    description: str | None = None,
) -> pd.DataFrame:
    """Return what h → c·h does, beside a random rotation that moves h equally far.

    The rotation keeps the norm and turns h in the plane of itself and a random direction, one per
    prompt, the same at all blocks and factors. For |c − 1| > 2 no rotation moves that far, and
    there is none.

    Args:
        sample: the prompts.
        chosen: which of them, by number.
        factors: c, all positive; 1 changes nothing and is not run.
        blocks: the blocks edited after.
        seed: source of the random directions.
        description: what a progress display calls this.

    Returns:
        A row per edit (`scaling`, `rotation`), factor, block and prompt: `edit`, `factor`,
        `displacement` (in norms of h), `block`, `recipient`, `donor` (the same), and the measures
        of `lib.engine.readouts.distribution_measure`, the fitted temperature included.
    """
    assert sample.logits is not None
    wanted = [factor for factor in factors if factor != 1]
    edits = {f"scaling {factor!r}": scale(factor) for factor in wanted}
    for factor in wanted:
        if abs(factor - 1) <= LONGEST_ROTATION:
            edits[f"rotation {factor!r}"] = rotate_by_displacement(abs(factor - 1))
    drawn = np.random.default_rng(seed).standard_normal((len(chosen), sample.decoder.d_model))
    donors = torch.from_numpy(drawn).float()[None].expand(len(blocks), -1, -1)
    tokens = sample.tokens
    pairs = np.stack([np.arange(len(chosen))] * 2, axis=1)
    frame = recall_sweep(
        sample.decoder,
        [tokens[index] for index in chosen],
        pairs,
        edits,
        positions="last",
        donors=donors,
        blocks=blocks,
        measure=distribution_measure(sample.logits[chosen], pairs[:, 0], temperature=True),
        description=description,
    ).to_frame()
    parts = frame["edit"].str.split(" ", expand=True)
    doses = parts[1].astype(float)
    return frame.assign(
        edit=parts[0],
        factor=doses,
        displacement=(doses - 1).abs(),
        recipient=chosen[frame["recipient"]],
        donor=chosen[frame["donor"]],
    )


def temperature_share(table: pd.DataFrame, weights: np.ndarray, items: np.ndarray) -> pd.DataFrame:
    """Return how much of the KL a temperature accounts for, 1 − Σ KL left / Σ KL, blocks pooled.

    Columns `edit`, `factor`, `estimate`, `low`, `high`, `n`, and the median fitted `temperature`.

    Args:
        table: rows of `scale_and_rotate`, of the blocks to be pooled.
        weights: `[n_draws, n_items]`.
        items: the prompts' numbers, in the order of the columns of `weights`.
    """
    rows = []
    for (edit, factor), part in table.groupby(["edit", "factor"], sort=False):
        sums = part.groupby("recipient")[["kl_nats", "kl_left_nats"]].sum().loc[items]
        whole, left = sums["kl_nats"].to_numpy(), sums["kl_left_nats"].to_numpy()
        draws = 1 - (weights @ left) / (weights @ whole)
        share = percentile_interval(1 - left.sum() / whole.sum(), draws, n=len(items))
        middle = float(np.median(part["temperature"]))
        rows.append((edit, factor, share.estimate, share.low, share.high, share.n, middle))
    columns = ["edit", "factor", "estimate", "low", "high", "n", "temperature"]
    return pd.DataFrame(rows, columns=columns)


def dose_table(
    table: pd.DataFrame, value: str, weights: np.ndarray, items: np.ndarray
) -> pd.DataFrame:
    """Return the mean of one outcome by edit, factor and block, with intervals over prompts.

    With c = 1 added, which changes nothing: the argmax is kept, KL and change of entropy are 0.
    """
    rows: list[tuple[object, ...]] = []
    unchanged = 1.0 if value == "argmax_kept" else 0.0
    for edit, block in table[["edit", "block"]].drop_duplicates().itertuples(index=False):
        rows.append((edit, 1.0, block, unchanged, unchanged, unchanged, len(items)))
    for (edit, factor, block), part in table.groupby(["edit", "factor", "block"], sort=False):
        values = part.set_index("recipient").loc[items][value].to_numpy(dtype=float)
        draws = (weights @ values) / weights.sum(axis=1)
        mean = percentile_interval(float(values.mean()), draws, n=len(values))
        rows.append((edit, factor, block, mean.estimate, mean.low, mean.high, mean.n))
    columns = ["edit", "factor", "block", "estimate", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def own_pairs(
    samples: Mapping[str, Sample], *, first_template_only: bool = False
) -> dict[str, np.ndarray]:
    """Return one donor for each usable prompt of each task: pairs that differ in answer."""
    found = {}
    for name, sample in samples.items():
        assert sample.trial is not None
        pairs = sample.trial.pairs(donors_per_prompt=1)
        template = sample.prompts["template"].to_numpy()[pairs[:, 0]]
        if first_template_only and len(pairs):
            pairs = pairs[template == template.min()]
        if len(pairs):
            found[name] = pairs
    return found
