"""The computed sentences of the chapter on causal control: numbers, and words that could flip."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib.causal_control.control import ExchangeOutcome, Weights
from lib.causal_control.control_tables import RIVALS, Matched, full_angle_draws, interval_of
from lib.causal_control.doses import DoseOutcome
from lib.evidence.arms import Trial
from lib.reading.notebook import estimate_text
from lib.science.stats import Interval, pair_share_bootstrap

NOT_TESTABLE = "No task is testable on this model."
_RIVALS = {"additive": "additive steering", "unembedding": "the unembedding edit"}


def pool(by_task: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> Interval | None:
    """Return the mean over tasks, with its interval over their prompts; None if no task has any.

    Tasks on which the quantity is not defined in nearly all draws are left out.

    Args:
        by_task: the estimate and then the draws of each task `[1 + n_draws]`.
        counts: prompts of each task.
    """
    defined = {task: d for task, d in by_task.items() if interval_of(d, counts[task]) is not None}
    if not defined:
        return None
    n = sum(counts[task] for task in defined)
    return interval_of(np.mean(list(defined.values()), axis=0), n)


def prompts_of(outcomes: Mapping[str, ExchangeOutcome | DoseOutcome]) -> dict[str, int]:
    """Return how many prompts take part in each task."""
    return {name: len(np.unique(outcome.pairs)) for name, outcome in outcomes.items()}


def words_of(found: Interval | None, items: str = "prompts") -> str:
    """Return an estimate with interval and n in words, or that it could not be measured."""
    if found is None:
        return "not measurable"
    return estimate_text(found.estimate, found.low, found.high, found.n, items=items)


def late_effects(
    outcomes: Mapping[str, ExchangeOutcome], weights: Weights, late: Sequence[int]
) -> dict[str, Interval | None]:
    """Return direction, norm, interaction and both, mean over late blocks and tasks."""
    draws: dict[str, dict[str, np.ndarray]] = {}
    for name, outcome in outcomes.items():
        both = np.concatenate([np.ones((1, weights[name].shape[1])), weights[name]])
        for part, values in outcome.effects(late).items():
            found = pair_share_bootstrap(values, outcome.pairs, both).mean(axis=1)
            draws.setdefault(part, {})[name] = found
    counts = prompts_of(outcomes)
    return {part: pool(by_task, counts) for part, by_task in draws.items()}


def exchange_sentence(
    own: Mapping[str, Interval | None], twin: Mapping[str, Interval | None]
) -> str:
    """Return what direction and norm flip late, and what they flip in the twin."""
    if not own:
        return NOT_TESTABLE
    text = (
        "Late, the donor's direction alone flips answers at a rate of "
        f"{words_of(own['direction'])}; its norm alone, of {words_of(own['norm'])}."
    )
    if twin:
        text += (
            f" In the untrained twin: {words_of(twin['direction'])} and {words_of(twin['norm'])}."
        )
    return text


def same_answer_sentence(
    outcomes: Mapping[str, ExchangeOutcome], weights: Weights, late: Sequence[int]
) -> str:
    """Return how often a donor of the same answer changes the answer late."""
    draws = {}
    for name, outcome in outcomes.items():
        rows = [outcome.blocks.index(block) for block in late]
        values = outcome.changed["both"][rows].astype(float)
        both = np.concatenate([np.ones((1, weights[name].shape[1])), weights[name]])
        draws[name] = pair_share_bootstrap(values, outcome.pairs, both).mean(axis=1)
    if not draws:
        return "No task has donors of the same answer."
    return (
        "Donors of the same answer and another subject change the answer in a share of "
        f"{words_of(pool(draws, prompts_of(outcomes)))} (tasks: {', '.join(draws)})."
    )


def turned_interval(
    outcomes: Mapping[str, DoseOutcome], weights: Weights, block: int, method: str
) -> Interval | None:
    """Return the flip rate of the full angle, mean over tasks."""
    draws = {
        name: full_angle_draws(outcome, weights[name], block, method)
        for name, outcome in outcomes.items()
    }
    return pool(draws, prompts_of(outcomes))


def turned_sentence(outcomes: Mapping[str, DoseOutcome], weights: Weights, block: int) -> str:
    """Return what turning onto the target, or as far in a random plane, does to the answer."""
    if not outcomes:
        return NOT_TESTABLE
    mean = np.mean([outcome.full_angles.mean() for outcome in outcomes.values()])
    rotation, random = (
        turned_interval(outcomes, weights, block, method) for method in ("rotation", "random plane")
    )
    return (
        f"Turned the whole way to the target's direction, {mean:.0f}° on average, the "
        f"answers flip at a rate of {words_of(rotation)}; turned as far in a random plane, at "
        f"{words_of(random)}."
    )


def pooled_ratio(
    matched: Mapping[str, Matched], rival: str, readout: str = "rest_kl_nats"
) -> Interval | None:
    """Return the geometric mean over tasks of the rotation's collateral over a rival's."""
    draws = {}
    for task, found in matched.items():
        if found.ratio(rival, readout) is not None:
            collateral = found.collateral[readout]
            draws[task] = np.log(collateral["rotation"] / collateral[rival])
    pooled = pool(draws, {task: matched[task].n for task in draws})
    if pooled is None:
        return None
    low, middle, high = np.exp([pooled.low, pooled.estimate, pooled.high]).tolist()
    return Interval(middle, low, high, pooled.n)


def ratio_sentence(matched: Mapping[str, Matched]) -> str:
    """Return whether rotation is more selective than its rivals, in words that follow the data."""
    sentences = []
    for rival in RIVALS:
        found = pooled_ratio(matched, rival)
        if found is None:
            sentences.append(f"Against {_RIVALS[rival]} nothing can be matched.")
            continue
        sentences.append(
            f"At a flip rate of one half, the KL of the rest under rotation over that under "
            f"{_RIVALS[rival]} is {words_of(found)}: rotation {_selective(found)}."
        )
    return " ".join(sentences)


def _selective(ratio: Interval) -> str:
    if ratio.high < 1:
        return "is the more selective of the two"
    return "is the less selective of the two" if ratio.low > 1 else "is not told apart from it"


def winner_sentence(matched: Mapping[str, Matched], methods: Sequence[str]) -> str:
    """Return which method disturbs the rest least at the matched flip rate, and on how many tasks.

    A task counts when at least two methods reach the rate.
    """
    best = []
    for found in matched.values():
        costs = {m: float(found.collateral["rest_kl_nats"][m][0]) for m in methods}
        defined = {method: cost for method, cost in costs.items() if np.isfinite(cost)}
        if len(defined) > 1:
            best.append(min(defined, key=lambda method: defined[method]))
    if not best:
        return "No task lets two methods be compared."
    counts = pd.Series(best).value_counts()
    parts = [f"{_name(method)} on {count}" for method, count in counts.items()]
    return f"Least collateral of all: {', '.join(parts)} of {len(best)} tasks."


def _name(method: object) -> str:
    return _RIVALS.get(str(method), str(method))


def loss_sentence(table: pd.DataFrame) -> str:
    """Return by how much each method raises the loss on unrelated continuations."""
    if table.empty:
        return NOT_TESTABLE
    parts = []
    for row in table.to_dict("records"):
        found = Interval(row["estimate"], row["low"], row["high"], row["n"])
        parts.append(f"{_name(row['method'])} {words_of(found, items='contexts')}")
    return f"Rise of the loss, in nats a token: {'; '.join(parts)}."


def highest_sentence(table: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return the highest mean flip rate of each method at any dose, from `dose_curves`."""
    pooled = table[(table["task"] == "all tasks") & (table["readout"] == "flipped")]
    parts = []
    for method in methods:
        one = pooled[pooled["method"] == method].sort_values("estimate", kind="stable")
        if len(one):
            top = one.to_dict("records")[-1]
            found = Interval(top["estimate"], top["low"], top["high"], int(top["n"]))
            parts.append(f"{_name(method)} {words_of(found)}, at {top['degrees']:.0f}°")
    return f"Highest flip rates: {'; '.join(parts)}." if parts else NOT_TESTABLE


def twin_sentence(twins: Mapping[str, Trial]) -> str:
    """Return on which tasks the untrained twin's own choice differs between prompts."""
    if not twins:
        return "On no task does its choice differ between prompts, so nothing can be flipped."
    return f"Its choice differs between prompts on {len(twins)} tasks: {', '.join(twins)}."


def place_sentence(places: pd.DataFrame) -> str:
    """Return the rotation's highest flip rate by arm and block, from `dose_curves`."""
    parts = []
    rotation = places[places["method"] == "rotation"]
    for (arm, block), one in rotation.groupby(["arm", "block"], sort=False):
        top = one.sort_values("estimate", kind="stable").to_dict("records")[-1]
        found = Interval(top["estimate"], top["low"], top["high"], int(top["n"]))
        parts.append(f"{arm}, block {block}: {words_of(found)}")
    return f"Highest flip rate of rotation: {'; '.join(parts)}." if parts else NOT_TESTABLE


def others_sentence(matched: Mapping[str, Matched]) -> str:
    """Return what the methods do to the other answers of the closed set, at the matched rate."""
    parts = [
        f"over {_RIVALS[rival]} {words_of(found)}"
        for rival in RIVALS
        if (found := pooled_ratio(matched, rival, "others_change"))
    ]
    if not parts:
        return "The other answers of the closed set cannot be compared."
    return (
        "The probability that moves on or off the other answers of the closed set, rotation's "
        f"over its rival's at the matched flip rate: {'; '.join(parts)}."
    )


def own_answer_sentence(
    outcomes: Mapping[str, DoseOutcome], weights: Weights, block: int, method: str
) -> str:
    """Return how often a rotation to the prompt's own answer, by the full angle, loses it."""
    draws = {}
    for name, outcome in outcomes.items():
        values = outcome.values("changed", block, method)[-1].astype(float)
        both = np.concatenate([np.ones((1, weights[name].shape[1])), weights[name]])
        draws[name] = pair_share_bootstrap(values, outcome.pairs, both)[:, 0]
    if not draws:
        return NOT_TESTABLE
    return (
        "Turned towards the centroid of its own answer, by the angle that leads to the target, a "
        f"prompt loses its answer in a share of {words_of(pool(draws, prompts_of(outcomes)))}."
    )
