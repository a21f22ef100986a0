"""Verdicts on the phase transition, from the arms, their controls and the geometry beside them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from lib.engine.models import Decoder
from lib.evidence.arms import Arm, ArmOutcome, Values
from lib.evidence.verdicts import Record, early_blocks, judge, last_sixth, verdict_table
from lib.phase_transition.reorganisation import Alignment
from lib.phase_transition.switch import Outcomes
from lib.phase_transition.widths import width_difference
from lib.science.stats import Interval, percentile_interval
from lib.science.transitions import Transition

CLAIM = "phase-transition"
TOO_FEW = "too few pairs of prompts for an interval"
NOT_RUN = "controls are run on the trained model alone"
Controls = Mapping[str, Outcomes]


def judge_switch(
    decoder: Decoder,
    gates: pd.DataFrame,
    outcomes: Outcomes,
    transitions: Mapping[str, Transition],
    controls: Controls,
    alignments: Mapping[str, Alignment],
    weights: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """Return the verdict table of the phase transition for one model.

    Args:
        decoder: the model, or its untrained twin.
        gates: table of `prepare_trials`: what is not among the outcomes is not testable, and why.
        outcomes: from `measure_arms`.
        transitions: from `find_transitions`.
        controls: outcomes of `measure_control` by the control's name.
        alignments: from `align_tasks`.
        weights: prompt weights by task.
    """
    records: list[Record] = []

    def add(
        statistic: str, task: str | None, found: Interval | None, reason: str = "", n: int = 0
    ) -> None:
        place = {} if task is None else {"task": task}
        reason = reason or ("" if found else TOO_FEW)
        records.append(
            judge(
                CLAIM,
                statistic,
                **place,
                model=decoder.name,
                untrained=decoder.untrained,
                estimate=found.estimate if found else None,
                low=found.low if found else None,
                high=found.high if found else None,
                n=found.n if found else n,
                reason=reason or None,
            )
        )

    for task, gate_reason in zip(gates["task"], gates["reason"], strict=True):
        arms = outcomes.get(task)
        closed = "" if arms else str(gate_reason) or "no pairs of prompts"
        for arm in ("context arm", "prediction arm"):
            for span, blocks in (
                ("early", early_blocks(decoder.n_blocks)),
                ("last_sixth", last_sixth(decoder.n_blocks)),
            ):
                found = _mean_over(arms[arm], weights[task], blocks) if arms else None
                add(f"{arm.replace(' ', '_')}_{span}", task, found, closed)
        transition = transitions.get(task)
        share = transition.width_share if transition else None
        add("causal_width_share", task, share, closed or (transition.reason if transition else ""))
        shift = controls.get("self-donor", {}).get(task)
        found = _largest_shift(shift) if shift else None
        add("self_donor_change", task, found, closed or ("" if shift else NOT_RUN))
        absent = "no donor of the same answer"
        kinds: tuple[tuple[str, str, Values], ...] = (
            ("same_answer_flip", "same answer", "changed"),
            ("random_direction_flip", "random direction", "flipped"),
        )
        for statistic, control, values in kinds:
            by_arm = controls.get(control, {}).get(task)
            worst = (
                _largest_over(by_arm, weights[task], values, decoder.n_blocks) if by_arm else None
            )
            reason = closed or ("" if by_arm else absent if controls else NOT_RUN)
            add(statistic, task, worst, reason)
        by_arm = controls.get("random direction", {}).get(task)
        beyond = _mean_excess(by_arm, weights[task], decoder.n_blocks) if by_arm else None
        add("random_direction_excess", task, beyond, closed or ("" if by_arm else NOT_RUN))
        add("width_difference", task, *_width_difference(task, closed, transition, alignments))
    add("transition_spread", None, *_spread(transitions, decoder.n_blocks))
    return verdict_table(records)


def _interval(estimate: float, draws: np.ndarray, n: int) -> Interval | None:
    """Return the interval, or None where too few pairs leave many draws without any."""
    if np.isnan(draws).mean() > 0.05:
        return None
    found = percentile_interval(estimate, draws, n=n)
    # A maximum over blocks is larger in resamples than in the sample: keep the estimate inside.
    return replace(found, low=min(found.low, estimate), high=max(found.high, estimate))


def _mean_over(outcome: ArmOutcome, weights: np.ndarray, blocks: range) -> Interval | None:
    curve, draws = outcome.curve(weights)
    chosen = list(blocks)
    estimate = float(curve["estimate"].to_numpy()[chosen].mean())
    return _interval(estimate, draws[:, chosen].mean(axis=1), n=int(curve["n"].iloc[0]))


def _largest_over(
    by_arm: Mapping[Arm, ArmOutcome], weights: np.ndarray, values: Values, n_blocks: int
) -> Interval | None:
    """Return the largest share over arms and blocks, the last block left out, with its interval."""
    curves = [outcome.curve(weights, values) for outcome in by_arm.values()]
    counted = _counted(by_arm, n_blocks)
    largest = max(float(curve["estimate"].to_numpy()[counted].max()) for curve, _ in curves)
    draws = np.concatenate([draws[:, counted] for _, draws in curves], axis=1).max(axis=1)
    return _interval(largest, draws, n=int(curves[0][0]["n"].iloc[0]))


def _counted(by_arm: Mapping[Arm, ArmOutcome], n_blocks: int) -> np.ndarray:
    """Return which blocks count: all that were edited after but the model's last."""
    return np.array(next(iter(by_arm.values())).blocks) < n_blocks - 1


def _mean_excess(
    by_arm: Mapping[Arm, ArmOutcome], weights: np.ndarray, n_blocks: int
) -> Interval | None:
    """Return the mean excess over arms and blocks, the last block left out, with its interval."""
    curves = [outcome.curve(weights, "excess") for outcome in by_arm.values()]
    counted = _counted(by_arm, n_blocks)
    estimate = float(np.mean([curve["estimate"].to_numpy()[counted].mean() for curve, _ in curves]))
    draws = np.mean([draws[:, counted].mean(axis=1) for _, draws in curves], axis=0)
    return _interval(estimate, draws, n=int(curves[0][0]["n"].iloc[0]))


def _largest_shift(by_arm: Mapping[Arm, ArmOutcome]) -> Interval:
    """Return the largest change over everything; a maximum over all prompts has no interval."""
    largest = max(float(outcome.largest_shift.max()) for outcome in by_arm.values())
    n = len(np.unique(next(iter(by_arm.values())).pairs))
    return Interval(largest, largest, largest, n)


def _width_difference(
    task: str,
    closed: str,
    transition: Transition | None,
    alignments: Mapping[str, Alignment],
) -> tuple[Interval | None, str]:
    if closed:
        return None, closed
    if task not in alignments:
        return None, "every subject has an answer of its own: context and prediction do not part"
    if transition is None or not transition.found:
        return None, transition.reason if transition else "no transition"
    geometry = alignments[task].width()
    if not geometry.found:
        return None, geometry.reason
    return width_difference(geometry, transition), ""


def _spread(
    transitions: Mapping[str, Transition], n_blocks: int
) -> tuple[Interval | None, str, int]:
    blocks = [t.block for t in transitions.values() if t.block is not None]
    if len(blocks) < 2:
        return None, f"{len(blocks)} task(s) with a transition; two are needed", len(blocks)
    spread = float(np.abs(np.array(blocks) - np.median(blocks)).max()) / n_blocks
    return Interval(spread, spread, spread, len(blocks)), "", len(blocks)
