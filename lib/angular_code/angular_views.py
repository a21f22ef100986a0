"""What the chapter on the angular code says and shows of its results: words, tables, maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib.angular_code.angular import Windows
from lib.angular_code.depth import ANGLE, BEYOND_LENS, DepthCorrelations
from lib.angular_code.geometry import CONTEXTS, Geometry, n_components
from lib.angular_code.maps import DepthMap, Panel, depth_positions
from lib.evidence.verdicts import ClaimVerdict, criterion_of
from lib.reading.notebook import estimate_text

MAPPED = ("continents", "months-sequence", "capitals", "animals", "languages")
"""Tasks that are mapped where they are testable, in this order."""

_LATE, _EARLIER = "late_angle_correlation", "late_minus_early_angle_correlation"
_DISTANCE, _BEYOND = "late_angle_minus_distance", "late_angle_partial_correlation"
_ABOVE_TWIN = "late_angle_partial_minus_twin"


def verdict_words(overall: ClaimVerdict) -> str:
    """Return the verdict on the claim and on its parts as the end of a sentence."""
    return f"the claim as a whole is {overall.verdict} ({overall.reason})"


def prose(records: pd.DataFrame) -> dict[str, str]:
    """Return the chapter's computed words by name: numbers with intervals, and what they come to.

    Args:
        records: the records of the trained model and of its twin.
    """
    words = {
        "contexts_late": _number(records, _LATE, untrained=False),
        "contexts_beyond": _number(records, _BEYOND, untrained=False),
        "contexts_beyond_twin": _number(records, _BEYOND, untrained=True),
        "contexts_distance": _number(records, _DISTANCE, untrained=False),
        "twin_distance": _number(records, _DISTANCE, untrained=True),
        "twin_late": _number(records, _LATE, untrained=True),
    }
    trained, twin = (_row(records, _LATE, untrained=side) for side in (False, True))
    words["twin_compared"] = _compare(twin, trained, ("above", "below", "about"))
    words["contexts_finding"] = _contexts_words(records, words["twin_compared"])
    words["beyond_finding"] = _beyond_words(records)
    n_late, n_tasks = _count(records, _LATE)
    n_beyond, n_beyond_of = _count(records, _BEYOND)
    words["tasks_finding"] = (
        f"Late in depth the angle reaches the criterion on {n_late} of {n_tasks} tasks, and beyond "
        f"the lens on {n_beyond} of {n_beyond_of}."
        if n_tasks
        else "No task is testable on this model."
    )
    n_closer, n_sets = _count(records, _DISTANCE, contexts=True)
    n_learned, n_learned_of = _count(records, _ABOVE_TWIN, contexts=True)
    twice = f"Angles do better than distances on {n_closer} of {n_sets} sets"
    learned = f"say more beyond the lens than the twin's on {n_learned} of {n_learned_of}"
    words["statistics_finding"] = (
        f"{twice}, and {learned}." if n_sets else "Nothing is testable on this model."
    )
    words["distance_reading"] = _distance_words(n_closer, n_sets)
    return words


def robust_words(
    variants: Mapping[str, DepthCorrelations], windows: Windows, *, threshold: float | None = None
) -> str:
    """Return in one sentence whether the increment over the lens survives the variants."""
    limit = threshold if threshold is not None else criterion_of("angular-code", _BEYOND).threshold
    found = {}
    for name, one in variants.items():
        try:
            found[name] = one.interval(one.mean(BEYOND_LENS.name, windows.late))
        except ValueError:
            continue
    if not found:
        return "No variant is testable on this model."
    kept = [name for name, interval in found.items() if interval.low >= limit]
    lowest = min(found, key=lambda name: found[name].low)
    value = found[lowest]
    text = estimate_text(value.estimate, value.low, value.high, value.n, items="contexts")
    share = "All" if len(kept) == len(found) else f"{len(kept)} of"
    return (
        f"{share} {len(found)} variants keep the increment over the lens above the criterion; it "
        f"is lowest {_variant_words(lowest)}, at {text}."
    )


def components_words(
    variants: Mapping[str, DepthCorrelations], windows: Windows, d_model: int
) -> str:
    """Return what is left without the first principal components, and what that says."""
    one = variants.get("without components")
    try:
        if one is None:
            raise ValueError("not measured")
        plain = one.interval(one.mean(ANGLE.name, windows.late))
        beyond = one.interval(one.mean(BEYOND_LENS.name, windows.late))
    except ValueError:
        return "Without the first principal components nothing is testable on this model."
    texts = [
        estimate_text(found.estimate, found.low, found.high, found.n, items="contexts")
        for found in (plain, beyond)
    ]
    few = beyond.high < criterion_of("angular-code", _BEYOND).threshold
    place = (
        "So what angles say of predictions lies in a few leading directions of the contexts' "
        "spread, and hardly in the rest"
        if few
        else "So what angles say of predictions is not confined to a few leading directions"
    )
    return (
        f"Without the first {n_components(d_model)} principal components the late correlation is "
        f"{texts[0]}, and beyond the lens {texts[1]}. {place}."
    )


def robustness_table(
    variants: Mapping[str, DepthCorrelations],
    twins: Mapping[str, DepthCorrelations],
    windows: Windows,
    reasons: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Return the mean late correlations of each variant, trained and untrained, as text."""
    rows: list[dict[str, object]] = []
    for name, one in variants.items():
        row: dict[str, object] = {"variant": name, "n": one.n}
        for side, found in (("trained", one), ("untrained", twins.get(name))):
            for measure, title in ((ANGLE, "ρ(θ, J)"), (BEYOND_LENS, "ρ(θ, J | lens)")):
                row[f"{title}, {side}"] = _late_text(found, measure.name, windows)
        rows.append(row)
    rows += [{"variant": f"{name}: {why}", "n": 0} for name, why in (reasons or {}).items()]
    return pd.DataFrame(rows)


def mantel_summary(tables: Sequence[pd.DataFrame], windows: Windows) -> pd.DataFrame:
    """Return at how many late blocks Mantel's test rejects chance after Holm's correction."""
    rows = []
    for table in tables:
        late = table[table["block"].isin(list(windows.late))]
        for (task, untrained), group in late.groupby(["task", "untrained"], sort=False):
            row = {"items": task, "weights": "untrained" if untrained else "trained"}
            for curve, part in group.groupby("curve", sort=False):
                rejected = int((part["p_holm"] < 0.05).sum())
                row[str(curve)] = f"{rejected} of {len(part)}"
                row[f"{curve}: largest p"] = f"{part['p_holm'].max():.3f}"
            rows.append(row)
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["items", "weights"])


def neighbours_table(
    trained: Mapping[str, Geometry], twins: Mapping[str, Geometry], windows: Windows
) -> pd.DataFrame:
    """Return how often a prompt's nearest neighbour by angle shares its template, or its answer.

    Over all prompts of a task, mean over the early and over the late blocks.
    """
    rows = []
    for name in [name for name in trained if name != CONTEXTS and name in twins]:
        for geometry in (trained[name], twins[name]):
            items = geometry.items
            row: dict[str, object] = {
                "task": name,
                "weights": "untrained" if geometry.untrained else "trained",
            }
            for title, labels in (
                ("same template", items.strata),
                ("same answer", np.array(items.answers)),
            ):
                for when, blocks in (("early", windows.early), ("late", windows.late)):
                    if len(blocks):
                        shares = [_neighbours_alike(geometry.angle[b], labels) for b in blocks]
                        row[f"{title}, {when}"] = float(np.mean(shares))
            rows.append(row)
    return pd.DataFrame(rows)


def depth_maps(
    trained: Mapping[str, Geometry],
    twins: Mapping[str, Geometry],
    correlations: Mapping[str, DepthCorrelations],
    twin_correlations: Mapping[str, DepthCorrelations],
    windows: Windows,
) -> list[DepthMap]:
    """Return the maps of the tasks in `MAPPED` that were measured, or else of some contexts."""
    maps = []
    for name in [n for n in MAPPED if n in trained] or [CONTEXTS]:
        panels = []
        for title, sets, found in (
            ("trained", trained, correlations),
            ("untrained twin", twins, twin_correlations),
        ):
            if name not in sets or name not in found:
                continue
            positions, shown = depth_positions(sets[name].states)
            panels.append(Panel(title, positions, shown, found[name].values[ANGLE.name][0]))
        if panels:
            items = trained[name].items
            transition = windows.transition[0] if windows.transition else None
            maps.append(
                DepthMap(
                    name, items.labels, items.answers, items.strata.tolist(), panels, transition
                )
            )
    return maps


# --- parts ---------------------------------------------------------------------------------------


def _row(records: pd.DataFrame, statistic: str, *, untrained: bool) -> pd.Series:
    chosen = records[
        (records["task"] == CONTEXTS)
        & (records["statistic"] == statistic)
        & (records["untrained"] == untrained)
    ]
    return chosen.iloc[0]


def _number(records: pd.DataFrame, statistic: str, *, untrained: bool) -> str:
    row = _row(records, statistic, untrained=untrained)
    if row["verdict"] == "not testable":
        return f"not testable ({row['reason']})"
    return estimate_text(
        row["estimate"], row["ci_low"], row["ci_high"], int(row["n"]), items="contexts"
    )


def _compare(one: pd.Series, other: pd.Series, words: tuple[str, str, str]) -> str:
    """Return the first word if one's interval is above the other's, the second if below it."""
    if "not testable" in (one["verdict"], other["verdict"]):
        return "not to be compared with"
    if one["ci_low"] > other["ci_high"]:
        return words[0]
    return words[1] if one["ci_high"] < other["ci_low"] else words[2]


def _contexts_words(records: pd.DataFrame, twin_compared: str) -> str:
    late, rise = (_row(records, name, untrained=False) for name in (_LATE, _EARLIER))
    if "not testable" in (late["verdict"], rise["verdict"]):
        return "On this model no block is early or late."
    level = "" if late["verdict"] == "supported" else " less than the criterion asks"
    more = "better late in depth than early" if rise["ci_low"] > 0 else "no better late than early"
    twin = {
        "above": "more closely still",
        "below": "less closely",
        "about": "about as closely",
    }[twin_compared]
    return f"Angles order contexts by prediction{level}, {more}; in the untrained twin {twin}."


def _beyond_words(records: pd.DataFrame) -> str:
    trained, twin = (_row(records, _BEYOND, untrained=side) for side in (False, True))
    if "not testable" in (trained["verdict"], twin["verdict"]):
        return "On this model the increment over the lens is not testable."
    own = {True: "Beyond the logit lens, angles tell predictions apart in the trained network"}
    text = own.get(
        trained["verdict"] == "supported",
        "Beyond the logit lens, angles tell little of the predictions in the trained network",
    )
    if twin["ci_low"] <= 0 <= twin["ci_high"]:
        return f"{text}, and nothing that could be told from zero in the untrained one."
    clause = "too" if _compare(twin, trained, ("", "", "x")) == "x" else "to another degree"
    return f"{text}; in the untrained one {clause}."


def _count(records: pd.DataFrame, statistic: str, *, contexts: bool = False) -> tuple[int, int]:
    """Return on how many tasks the trained model meets a criterion, of how many testable."""
    chosen = records[
        (records["statistic"] == statistic)
        & ~records["untrained"].astype(bool)
        & (records["verdict"] != "not testable")
    ]
    if not contexts:
        chosen = chosen[chosen["task"] != CONTEXTS]
    return int((chosen["verdict"] == "supported").sum()), len(chosen)


def _distance_words(n_closer: int, n_sets: int) -> str:
    if n_sets == 0:
        return "it could not be compared"
    if n_closer >= 0.75 * n_sets:
        return "the angle does better than the distance on most sets"
    if n_closer == 0:
        return "the distance does as well as the angle on every set"
    return "the distance does as well as the angle on most sets, as far as the intervals can tell"


def _variant_words(name: str) -> str:
    return {
        "centred": "with centred states",
        "same last token": "on contexts that end in the same token",
    }.get(name, name)


def _late_text(found: DepthCorrelations | None, measure: str, windows: Windows) -> str:
    if found is None:
        return "not testable"
    try:
        interval = found.interval(found.mean(measure, windows.late))
    except ValueError:
        return "not testable"
    text = estimate_text(interval.estimate, interval.low, interval.high, interval.n)
    return text.split(",  n")[0].split(", n =")[0]


def _neighbours_alike(angle: np.ndarray, labels: np.ndarray) -> float:
    others = angle + np.diag(np.full(len(angle), np.inf))
    return float((labels[others.argmin(axis=1)] == labels).mean())
