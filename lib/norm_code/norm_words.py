"""The norm chapter's sentences: the words that depend on a number are chosen here, by it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from lib.evidence.verdicts import Record, claim_verdict
from lib.norm_code.norm_verdicts import CLAIM, WITHIN, margin
from lib.reading.notebook import number_text as number

HALF, DOUBLE = 0.5, 2.0
NEARLY_ALL, MOST, FEW = 0.9, 0.5, 0.1


def listed(names: Sequence[str]) -> str:
    """Return names as prose lists them; "nothing" for no names."""
    if len(names) < 2:
        return names[0] if names else "nothing"
    return " and ".join([", ".join(names[:-1]), names[-1]])


def by_hand_sentence(table: pd.DataFrame) -> str:
    """Return which of the edits of one prompt leave its next token as it is.

    Args:
        table: columns `edit` (the first one unedited) and `argmax`.
    """
    same = table["argmax"] == table["argmax"].iloc[0]
    kept = [f"“{edit}”" for edit in table["edit"][same].iloc[1:]]
    changed = [f"“{edit}”" for edit in table["edit"][~same]]
    return f"The next token is left as it is by {listed(kept)}; it is changed by {listed(changed)}."


def carried_sentences(excess: pd.DataFrame, twin_excess: pd.DataFrame) -> tuple[str, str]:
    """Return what is decoded late, and what the twin has to do with it.

    Args:
        excess: from `norm_verdicts.late_excess`, of the model.
        twin_excess: the same of its twin.
    """
    if excess.empty:
        return "Late blocks are not defined on this model.", ""
    own, own_within, n_tried = _decoded(excess)
    twin, twin_within, _ = _decoded(twin_excess)
    first = (
        f"Late, {len(own)} of {n_tried} attributes can be read off the norm: {listed(own)}; among "
        f"prompts of the same answer, {listed(own_within)}."
    )
    second = (
        f"The untrained twin's norm gives away {listed(twin)}, and among prompts of the same "
        f"answer {listed(twin_within)}. "
    )
    if len(twin) >= 2:
        second += (
            "That a norm carries context is therefore no achievement of training: in any network "
            "last words, lengths and sentence frames leave their mark on it."
        )
    only = [name for name in own if name not in twin]
    if only:
        second += f" Above shuffled labels in the trained model only: {listed(only)}."
    return first, second


def _decoded(excess: pd.DataFrame) -> tuple[list[str], list[str], int]:
    within = excess["attribute"].str.endswith(WITHIN)
    names = excess["attribute"][excess["decoded"]]
    plain = [name for name in names if not name.endswith(WITHIN)]
    return (
        plain,
        [name.removesuffix(WITHIN) for name in names if name.endswith(WITHIN)],
        int((~within).sum()),
    )


def relation_sentence(equivalence: pd.DataFrame) -> str:
    """Return the late partial correlation on the contexts in words.

    Args:
        equivalence: from `norm_verdicts.late_relations`.
    """
    table = equivalence[equivalence["task"] == "contexts"]
    if table.empty:
        return "not testable"
    row = table.iloc[0]
    return (
        f"{number(row['estimate'])}, 90 % interval [{number(row['low'])}, {number(row['high'])}], "
        f"n = {row['n']} contexts: {'inside' if row['equivalent'] else 'not inside'} the margin"
    )


def tasks_sentence(equivalence: pd.DataFrame) -> str:
    """Return what the equivalence test says on the tasks."""
    small = equivalence[equivalence["task"] != "contexts"]
    if small.empty:
        return "No task could be tested."
    wide = (small["high"] - small["low"]) / 2 >= margin()
    text = (
        f"On the tasks the interval is inside the margin on {int(small['equivalent'].sum())} of "
        f"{len(small)}."
    )
    if wide.any():
        text += (
            f" On {int(wide.sum())} it is so wide, with at most {int(small['n'][wide].max())} "
            "prompts, that no estimate could have passed: there absence is neither shown nor "
            "refuted. The criterion was set beforehand, so it counts as not supported."
        )
    return text


def exchange_sentences(
    exchanges: Mapping[str, pd.DataFrame], late: Sequence[int]
) -> tuple[str, str]:
    """Return what exchanging norms and directions does late, and how sure a count can be."""
    every = pd.concat(exchanges.values(), ignore_index=True)
    every = every[every["block"].isin(late)]
    if every.empty:
        return "Late blocks, or pairs to exchange, are missing on this model.", ""
    by_task = every.groupby(["edit", "task"])[["kl_nats", "argmax_kept"]].mean()
    able = every[every["comparable"]].groupby(["edit", "task"])["answer_flipped"].mean()
    flips = able.groupby("edit").mean()
    kl = by_task["kl_nats"].groupby("edit").mean()
    first = (
        f"A swapped norm brings the donor's answer in {number(flips['norm'])} of the pairs late in "
        f"depth, a swapped direction in {number(flips['direction'])}; the KL of the one is "
        f"{number(kl['norm'] / kl['direction'])} of the other's."
    )
    norms = every[(every["edit"] == "norm") & every["comparable"]]
    ever = norms.groupby(["task", "recipient"])["answer_flipped"].any()
    bound = binomtest(int(ever.sum()), len(ever)).proportion_ci(0.95, "exact").high
    kept = by_task["argmax_kept"].loc["norm"]
    second = (
        f"Of {len(ever)} prompts and contexts, {int(ever.sum())} took over the donor's answer with "
        f"its norm at any late block; the exact 95 % upper bound on that share is "
        f"{number(bound, 3)}. Among all tokens of the vocabulary the most probable one stayed in "
        f"{number(kept.min())} of the cases or more (lowest: {kept.idxmin()})."
    )
    return first, second


def dose_sentences(response: pd.DataFrame, blocks: Sequence[int]) -> tuple[str, str]:
    """Return what scaling does late: its headline, and its comparison with rotation.

    Args:
        response: `norm_edits.dose_table` with `outcome` and `untrained`.
        blocks: blocks to average over, the last block not among them.
    """
    chosen = response[response["block"].isin(blocks) & ~response["untrained"]]
    at = chosen.groupby(["outcome", "edit", "factor"])["estimate"].mean()
    kept = [at["argmax_kept", "scaling", factor] for factor in (HALF, DOUBLE)]
    change = [at["entropy_change_nats", "scaling", factor] for factor in (HALF, DOUBLE)]
    headline = (
        f"Outside its range the norm {'matters little' if min(kept) >= NEARLY_ALL else 'matters'}: "
        f"at half and at twice its size, late, {number(kept[0])} and {number(kept[1])} of the "
        f"contexts keep their most probable token, and entropy changes by {number(change[0])} and "
        f"{number(change[1])} nats."
    )
    rotated = [at["argmax_kept", "rotation", factor] for factor in (HALF, DOUBLE)]
    kl = [
        at["kl_nats", "scaling", factor] / at["kl_nats", "rotation", factor]
        for factor in (HALF, DOUBLE)
    ]
    if max(kl) < FEW:
        strength = "does almost nothing beside"
    elif max(kl) < 1:
        strength = "does less than"
    else:
        strength = "is not always the weaker push beside"
    gain = "a gain on confidence: a larger norm, a more certain prediction"
    text = (
        f"Scaling {strength} a random rotation that moves the state as far: the rotation matched "
        f"to c = ½ keeps the most probable token in {number(rotated[0])}, that to c = 2 in "
        f"{number(rotated[1])} of the contexts, and the KL of scaling is {number(kl[0])} and "
        f"{number(kl[1])} of the rotation's. "
    )
    if change[0] > 0 > change[1]:
        text += f"The direction of the change in entropy is that of {gain}. "
    else:
        text += f"Entropy does not change as it would under {gain}. "
    if min(kept) < NEARLY_ALL:
        text += (
            "But it is more than that: so large a change of the norm also changes which token is "
            "the most probable. That norms do not decide predictions holds inside their natural "
            "range; it is not a property of the norm at any size."
        )
    return headline, text


def temperature_sentence(shares: pd.DataFrame) -> str:
    """Return how much of a scaling is a temperature.

    Args:
        shares: `norm_edits.temperature_share` with `untrained`.
    """
    own = shares[~shares["untrained"] & (shares["edit"] == "scaling")].set_index("factor")
    if own.empty:
        return "No scaling was measured."
    half, double = (
        {name: float(own[name][factor]) for name in ("estimate", "low", "high")}
        for factor in (HALF, DOUBLE)
    )
    largest = float(own["estimate"].max())
    verdict = (
        "is little but a temperature"
        if np.mean([half["estimate"], double["estimate"]]) >= NEARLY_ALL
        else "is mostly a temperature"
        if min(half["estimate"], double["estimate"]) >= MOST
        else "is not a temperature in the main"
    )
    return (
        f"Scaling {verdict}: the best-fitting one accounts for {number(half['estimate'])} "
        f"[{number(half['low'])}, {number(half['high'])}] of the KL at c = ½ and "
        f"{number(double['estimate'])} [{number(double['low'])}, {number(double['high'])}] at "
        f"c = 2, at no dose for more than {number(largest)}."
    )


def dissociation_sentence(records: Sequence[Record], model: str) -> str:
    """Return the figure's finding from the verdicts on the parts."""
    parts = claim_verdict(records, CLAIM, model, False).parts
    judged = pd.DataFrame(list(records))
    judged = judged[~judged["untrained"] & (judged["part"] == "does not determine")]
    counts = []
    for statistic, words in (
        ("norm_exchange_flip", "swapped norms move no answers"),
        ("norm_partial_correlation", "the norm adds nothing to the angle"),
    ):
        own = judged[(judged["statistic"] == statistic) & (judged["verdict"] != "not testable")]
        n_met = int((own["verdict"] == "supported").sum())
        counts.append(f"that {words} is shown on {n_met} of {len(own)} samples")
    carries = parts["carries context"]
    return f"That the norm carries context is {carries}; {listed(counts)}."
