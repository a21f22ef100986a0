"""Tables of causal control: dose and response, matched flip rates, verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.causal_control.control import ExchangeOutcome, Weights, effect_shares
from lib.causal_control.doses import METHODS, OWN_ANSWER, DoseOutcome
from lib.engine.models import Decoder
from lib.evidence.verdicts import Record, judge
from lib.science.stats import Interval, pair_share_bootstrap, percentile_interval

CLAIM = "causal-control"
MATCHED_RATE = 0.5
RIVALS = ("additive", "unembedding")
FULL_ANGLE = {"rotation_flip": "rotation", "random_rotation_flip": "random plane"}
STATISTICS = (
    *("direction_share", "norm_share", *FULL_ANGLE),
    *(f"rest_kl_ratio_{rival}" for rival in RIVALS),
)
_TOO_FEW = "too few prompts with another answer for an interval"
READOUTS = ("rest_kl_nats", "others_change")
_DOSE_COLUMNS = [
    *("model", "untrained", "task", "arm", "block", "method", "degrees", "readout"),
    *("estimate", "low", "high", "n"),
]


def dose_curves(
    outcomes: Mapping[str, DoseOutcome], weights: Weights, readouts: Sequence[str] = ("flipped",)
) -> pd.DataFrame:
    """Return each readout by task, block, method and dose, and the mean over tasks.

    The mean stands under the task `"all tasks"`. The null `own answer` is read by `"changed"` where
    the others are read by `"flipped"`: what counts against it is that the answer is lost. Dose 0 is
    the unedited prompt.

    Returns:
        Columns `model`, `untrained`, `task`, `arm`, `block`, `method`, `degrees`, `readout`,
        `estimate`, `low`, `high`, `n` (prompts).
    """
    tables = []
    pooled: dict[tuple[int, str, str], list[tuple[np.ndarray, int]]] = {}
    for name, outcome in outcomes.items():
        n = len(np.unique(outcome.pairs))
        for block in outcome.blocks:
            for method in outcome.methods:
                for readout in readouts:
                    draws = _dose_draws(outcome, weights[name], block, method, readout)
                    pooled.setdefault((block, method, readout), []).append((draws, n))
                    tables.append(_dose_table(outcome, name, block, method, readout, draws, n))
    for (block, method, readout), found in pooled.items():
        mean = np.mean([draws for draws, _ in found], axis=0)
        total = sum(n for _, n in found)
        tables.append(_dose_table(outcome, "all tasks", block, method, readout, mean, total))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_DOSE_COLUMNS)


def _dose_draws(
    outcome: DoseOutcome, weights: np.ndarray, block: int, method: str, readout: str
) -> np.ndarray:
    """Return the estimate, then the draws, by dose from 0 on `[1 + n_draws, 1 + n_doses]`."""
    read = "changed" if (method, readout) == (OWN_ANSWER, "flipped") else readout
    values = outcome.values(read, block, method)[: len(outcome.doses)].astype(float)
    values = np.concatenate([np.zeros((1, values.shape[1])), values])
    return pair_share_bootstrap(values, outcome.pairs, _with_ones(weights))


def _with_ones(weights: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((1, weights.shape[1])), weights])


def _dose_table(
    outcome: DoseOutcome,
    task: str,
    block: int,
    method: str,
    readout: str,
    draws: np.ndarray,
    n: int,
) -> pd.DataFrame:
    low, high = np.nanquantile(draws[1:], [0.025, 0.975], axis=0)
    decoder = outcome.trial.decoder
    table = pd.DataFrame(
        {"degrees": [0.0, *outcome.doses], "estimate": draws[0], "low": low, "high": high}
    )
    return table.assign(
        model=decoder.name,
        untrained=decoder.untrained,
        task=task,
        arm=outcome.arm,
        block=block,
        method=method,
        readout=readout,
        n=n,
    )[_DOSE_COLUMNS]


# --- matched flip rate ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Matched:
    """The dose at which a method flips half of the pairs, and its collateral there.

    Attributes:
        rate: the flip rate that is matched.
        highest: the highest flip rate at any dose, by method.
        degrees: the matched dose by method `[1 + n_draws]`: the estimate, then the draws, linear
            between doses; NaN where the rate is not reached.
        collateral: by readout and method, its mean over pairs at that dose `[1 + n_draws]`.
        n: prompts.
    """

    rate: float
    highest: Mapping[str, float]
    degrees: Mapping[str, np.ndarray]
    collateral: Mapping[str, Mapping[str, np.ndarray]]
    n: int

    def dose(self, method: str) -> float:
        """Return the matched dose in degrees; NaN where it is not reached."""
        return float(self.degrees[method][0])

    def interval(self, draws: np.ndarray) -> Interval | None:
        """Return an estimate and its draws as an interval; None where it is not defined."""
        return interval_of(draws, self.n)

    def ratio(self, rival: str, readout: str = "rest_kl_nats") -> Interval | None:
        """Return the rotation's collateral over a rival's; None where either is undefined."""
        found = self.collateral[readout]
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.interval(found["rotation"] / found[rival])


def match_flip_rate(
    outcome: DoseOutcome, weights: np.ndarray, block: int, *, rate: float = MATCHED_RATE
) -> Matched:
    """Return each method's dose at a flip rate, and its collateral there, with bootstrap draws.

    Along the doses the flip rate is joined by straight lines; the first crossing of `rate` is the
    matched dose, and the mean collateral is read off at it, joined by straight lines too. Each draw
    of prompts does all of this anew, with the same prompts for all methods.
    """
    doses = np.array([0.0, *outcome.doses])
    methods = [method for method in outcome.methods if method != OWN_ANSWER]
    highest, degrees = {}, {}
    collateral: dict[str, dict[str, np.ndarray]] = {readout: {} for readout in READOUTS}
    for method in methods:
        flips = _dose_draws(outcome, weights, block, method, "flipped")
        degrees[method] = first_crossing(doses, flips, rate)
        highest[method] = float(flips[0].max())
        for readout in READOUTS:
            curves = _dose_draws(outcome, weights, block, method, readout)
            collateral[readout][method] = np.array(
                [
                    np.interp(dose, doses, curve) if np.isfinite(dose) else np.nan
                    for dose, curve in zip(degrees[method], curves, strict=True)
                ]
            )
    return Matched(rate, highest, degrees, collateral, len(np.unique(outcome.pairs)))


def first_crossing(x: np.ndarray, curves: np.ndarray, level: float) -> np.ndarray:
    """Return where each curve `[n_curves, n_x]`, linear between points, first reaches a level.

    NaN for a curve that never does.
    """
    reached = curves >= level
    after = reached.argmax(axis=1)
    before = np.maximum(after - 1, 0)
    row = np.arange(len(curves))
    rise = curves[row, after] - curves[row, before]
    share = np.divide(level - curves[row, before], rise, out=np.zeros(len(row)), where=rise > 0)
    crossing = x[before] + share * (x[after] - x[before])
    return np.where(reached.any(axis=1), crossing, np.nan)


def matched_table(matched: Mapping[str, Matched], decoder: Decoder) -> pd.DataFrame:
    """Return the rotation's collateral over each rival's at the matched flip rate, by task.

    Columns `model`, `untrained`, `task`, `rival`, `readout`, `estimate`, `low`, `high`, `n`; a
    ratio that is not defined is left out.
    """
    rows = []
    for task, found in matched.items():
        for readout in READOUTS:
            for rival in RIVALS:
                ratio = found.ratio(rival, readout)
                if ratio is not None:
                    bounds = (ratio.estimate, ratio.low, ratio.high, ratio.n)
                    rows.append((decoder.name, decoder.untrained, task, rival, readout, *bounds))
    columns = ["model", "untrained", "task", "rival", "readout", "estimate", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def pareto_table(matched: Mapping[str, Matched]) -> pd.DataFrame:
    """Return matched dose and collateral by task and method, as text would quote them.

    Columns `task`, `method`, `highest flip rate`, `dose (degrees)`, `rest KL (nats)`,
    `other answers (probability)`; empty where the rate is not reached.
    """
    rows = [
        {
            "task": task,
            "method": method,
            "highest flip rate": found.highest[method],
            "dose (degrees)": found.dose(method),
            "rest KL (nats)": float(found.collateral["rest_kl_nats"][method][0]),
            "other answers (probability)": float(found.collateral["others_change"][method][0]),
        }
        for task, found in matched.items()
        for method in METHODS
    ]
    columns = ["task", "method", "highest flip rate", "dose (degrees)", "rest KL (nats)"]
    return pd.DataFrame(rows, columns=[*columns, "other answers (probability)"])


# --- verdicts ------------------------------------------------------------------------------------


def interval_of(draws: np.ndarray, n: int) -> Interval | None:
    """Return an estimate, followed by its draws, as an interval.

    None where the estimate, or more than one draw in twenty, is not defined.
    """
    if not np.isfinite(draws[0]) or np.isfinite(draws[1:]).mean() < 0.95:
        return None
    return percentile_interval(float(draws[0]), draws[1:], n=n)


def full_angle_draws(
    outcome: DoseOutcome, weights: np.ndarray, block: int, method: str
) -> np.ndarray:
    """Return the flip rate of a turn by the full angle: estimate and draws `[1 + n_draws]`."""
    values = outcome.values("flipped", block, method)[-1].astype(float)
    return pair_share_bootstrap(values, outcome.pairs, _with_ones(weights))[:, 0]


def judge_control(
    decoder: Decoder,
    reasons: Mapping[str, str],
    exchanges: Mapping[str, ExchangeOutcome],
    whole_way: Mapping[str, DoseOutcome],
    outcomes: Mapping[str, DoseOutcome],
    weights: Weights,
    *,
    block: int,
    late: Sequence[int],
) -> list[Record]:
    """Return the records of the claim, each statistic on each task.

    Args:
        decoder: the model.
        reasons: the tasks to judge, each with the reason why it is not testable, if it is not.
        exchanges: from `measure_exchange`.
        whole_way: from `measure_doses`, for rotation and random plane by the full angle.
        outcomes: from `measure_doses` in the prediction arm, with the full vocabulary.
        weights: by task.
        block: the transition block.
        late: the late blocks.
    """
    records: list[Record] = []
    for task, reason in reasons.items():
        found: dict[str, Interval | None] = {}
        unmatched = dict.fromkeys(RIVALS, reason)
        if task in exchanges and task in outcomes:
            shares = effect_shares(exchanges[task], weights[task], late)
            n = len(np.unique(exchanges[task].pairs))
            for part in ("direction", "norm"):
                found[f"{part}_share"] = interval_of(shares[part], n)
            for statistic, method in FULL_ANGLE.items():
                turned = full_angle_draws(whole_way[task], weights[task], block, method)
                found[statistic] = interval_of(turned, n)
            matched = match_flip_rate(outcomes[task], weights[task], block)
            for rival in RIVALS:
                found[f"rest_kl_ratio_{rival}"] = matched.ratio(rival)
                unmatched[rival] = _why_unmatched(matched, rival)
        for statistic in STATISTICS:
            interval = found.get(statistic)
            missing = unmatched.get(statistic.rsplit("_", 1)[-1]) or reason or _TOO_FEW
            remark = "judged by its own choices" if decoder.untrained else ""
            records.append(
                judge(
                    CLAIM,
                    statistic,
                    task=task,
                    model=decoder.name,
                    untrained=decoder.untrained,
                    estimate=interval.estimate if interval else None,
                    low=interval.low if interval else None,
                    high=interval.high if interval else None,
                    n=interval.n if interval else 0,
                    reason=remark if interval else missing,
                )
            )
    return records


def _why_unmatched(matched: Matched, rival: str) -> str:
    """Return which of the two does not reliably reach the matched flip rate."""
    short = [
        f"{method} reaches {matched.highest[method]:.2f}"
        for method in ("rotation", rival)
        if matched.interval(matched.degrees[method]) is None
    ]
    return f"a flip rate of {matched.rate} is not reached in all draws: {', '.join(short)}"
