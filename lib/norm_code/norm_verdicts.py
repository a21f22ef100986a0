"""The norm chapter's late blocks and its verdicts."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib.engine.models import Decoder
from lib.evidence.verdicts import ALL_TASKS, Record, criterion_of, judge, late_blocks
from lib.norm_code.decoding import Decoding
from lib.norm_code.norm_edits import mean_outcome, ratio_interval
from lib.norm_code.relations import Relation
from lib.science.stats import bootstrap_weights, equivalence_test, percentile_interval

CLAIM = "norm-code"
PARTIAL = "norm given angle"
WITHIN = ", same answer"
UNDEFINED = "too few prompts, or the angle alone orders their predictions"
UNDEFINED_ALLOWED = 0.05
"""At most this share of bootstrap draws may be without a partial correlation."""
NO_TRANSITION = "no testable task has a transition, so late blocks are undefined"


def find_late(transitions: pd.DataFrame, n_blocks: int) -> tuple[int, ...]:
    """Return the late blocks: from ℓ*, the median over tasks, to L − 2; none without a transition.

    Args:
        transitions: from `lib.evidence.arms.transition_blocks`.
        n_blocks: L.
    """
    if transitions.empty:
        return ()
    middle = float(transitions["block"].median())
    return tuple(late_blocks(n_blocks, middle)) if 0 <= middle <= n_blocks - 2 else ()


def shown_blocks(n_blocks: int, late: Sequence[int]) -> list[int]:
    """Return the blocks that the figures show: six from 0 on, all late ones, and the last."""
    step = max(1, round(n_blocks / 6))
    return sorted({*range(0, n_blocks, step), *late, n_blocks - 1})


def dose_blocks(n_blocks: int, late: Sequence[int]) -> list[int]:
    """Return the blocks of the dose–response: two early, the first and last late, the last."""
    chosen = [late[0], late[-1]] if late else [3 * n_blocks // 4, n_blocks - 2]
    return sorted({n_blocks // 6, n_blocks // 2, *chosen, n_blocks - 1})


def margin() -> float:
    """Return the margin of equivalence of the partial correlation."""
    return criterion_of(CLAIM, "norm_partial_correlation").threshold


def late_excess(
    decodings: Mapping[str, Decoding], late: Sequence[int], *, n_draws: int, seed: int
) -> pd.DataFrame:
    """Return how far each attribute is decoded above shuffled labels, mean over late blocks.

    Columns `attribute`, `estimate`, `low`, `high`, `n`, `decoded` (lower bound above 0) and
    `null_decoded`: whether one shuffle of the labels is, by the same rule.
    """
    rows = []
    for name, decoding in decodings.items():
        if late and decoding.testable:
            weights = bootstrap_weights(decoding.n_items, n_draws, np.random.default_rng(seed))
            at = decoding.excess(weights, late)
            null = decoding.excess(weights, late, null=True)
            rows.append((name, at.estimate, at.low, at.high, at.n, at.low > 0, null.low > 0))
    columns = ["attribute", "estimate", "low", "high", "n", "decoded", "null_decoded"]
    return pd.DataFrame(rows, columns=columns)


def late_relations(relations: Mapping[str, Relation], late: Sequence[int]) -> pd.DataFrame:
    """Return each sample's late partial correlation with its equivalence test.

    Columns `task`, `estimate`, `low`, `high` (level 90 %), `n`, `p_value`, `equivalent`.
    """
    rows = []
    for name, relation in relations.items():
        if not late:
            continue
        estimate, draws = relation.mean_over(PARTIAL, late)
        if not np.isfinite(estimate) or np.isnan(draws).mean() > UNDEFINED_ALLOWED:
            continue  # too few prompts, or the angle alone orders their predictions
        test = equivalence_test(estimate, draws, margin=margin(), n=relation.n)
        rows.append((name, estimate, test.low, test.high, test.n, test.p_value, test.equivalent))
    columns = ["task", "estimate", "low", "high", "n", "p_value", "equivalent"]
    return pd.DataFrame(rows, columns=columns)


def judge_norms(
    decoder: Decoder,
    excess: pd.DataFrame,
    equivalence: pd.DataFrame,
    exchanges: Mapping[str, pd.DataFrame],
    weights: Mapping[str, np.ndarray],
    late: Sequence[int],
    *,
    skipped: Mapping[str, str],
) -> list[Record]:
    """Return the records of one model.

    Args:
        decoder: the model, or its twin.
        excess: from `late_excess`.
        equivalence: from `late_relations`.
        exchanges: by task, from `lib.norm_code.norm_edits`.
        weights: prompt weights by task `[n_draws, n_prompts]`.
        late: the late blocks.
        skipped: tasks that were not analysed, with the reason.
    """
    records = [*_judge_carried(excess, late, decoder)]
    tested = {row["task"]: row for row in equivalence.to_dict("records")}
    for task, table in exchanges.items():
        if row := tested.get(task):
            wide = (row["high"] - row["low"]) / 2 >= margin()
            remark = "interval wider than the margin: absence cannot be shown" if wide else ""
            found = (row["estimate"], row["low"], row["high"], row["n"], remark)
            records.append(_judge("norm_partial_correlation", task, decoder, *found))
        else:
            reason = UNDEFINED if late else NO_TRANSITION
            records.append(_untested("norm_partial_correlation", task, decoder, reason))
        records += _judge_exchange(task, table, weights[task], late, decoder)
    for task, reason in skipped.items():
        for statistic in (
            "norm_partial_correlation",
            "norm_exchange_flip",
            "norm_exchange_kl_ratio",
        ):
            records.append(_untested(statistic, task, decoder, reason))
    return records


def _judge_carried(excess: pd.DataFrame, late: Sequence[int], who: Decoder) -> list[Record]:
    within = excess["attribute"].str.endswith(WITHIN) if len(excess) else pd.Series(dtype=bool)
    records = []
    for statistic, part, decoded in (
        ("attributes_decoded", excess[~within], "decoded"),
        ("attributes_decoded_shuffled", excess[~within], "null_decoded"),
        ("attributes_decoded_within_answer", excess[within], "decoded"),
    ):
        if part.empty:
            reason = "nothing could be decoded" if late else NO_TRANSITION
            records.append(_untested(statistic, None, who, reason))
        else:
            names = ", ".join(part["attribute"][part[decoded]]) or "none"
            count = float(part[decoded].sum())
            records.append(_judge(statistic, None, who, count, None, None, len(part), names))
    return records


def _judge_exchange(
    task: str,
    table: pd.DataFrame,
    weights: np.ndarray,
    late: Sequence[int],
    who: Decoder,
) -> list[Record]:
    statistics = ("norm_exchange_flip", "norm_exchange_kl_ratio")
    if not late:
        return [_untested(statistic, task, who, NO_TRANSITION) for statistic in statistics]
    records = []
    able = table[table["comparable"]]
    flips = mean_outcome(able, "norm", "answer_flipped", weights, late) if len(able) else None
    if flips is None or np.isnan(flips[1]).mean() > UNDEFINED_ALLOWED:
        reason = f"{able['recipient'].nunique()} prompts have a donor with another answer: too few"
        records.append(_untested(statistics[0], task, who, reason))
    else:
        at = percentile_interval(flips[0], flips[1], n=flips[2])
        records.append(_judge(statistics[0], task, who, flips[0], at.low, at.high, at.n))
    kl = [mean_outcome(table, edit, "kl_nats", weights, late) for edit in ("norm", "direction")]
    if np.isnan(kl[1][1]).mean() > UNDEFINED_ALLOWED or kl[1][0] == 0:
        reason = f"{kl[1][2]} prompts are too few, or exchanging directions changes nothing"
        records.append(_untested(statistics[1], task, who, reason))
    else:
        at = ratio_interval(kl[0], kl[1])
        records.append(_judge(statistics[1], task, who, at.estimate, at.low, at.high, at.n))
    return records


def _judge(
    statistic: str,
    task: str | None,
    who: Decoder,
    estimate: float | None,
    low: float | None,
    high: float | None,
    n: int,
    reason: str = "",
) -> Record:
    return judge(
        CLAIM,
        statistic,
        task=task or ALL_TASKS,
        model=who.name,
        untrained=who.untrained,
        estimate=estimate,
        low=low,
        high=high,
        n=n,
        reason=reason,
    )


def _untested(statistic: str, task: str | None, who: Decoder, reason: str) -> Record:
    return _judge(statistic, task, who, None, None, None, 0, reason)
