"""The phase transition, task by task: gate, arms, steering and controls."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib.engine.interventions import add, random_directions
from lib.engine.models import Decoder
from lib.evidence.arms import (
    ARMS,
    Arm,
    ArmOutcome,
    Site,
    Trial,
    Values,
    has_counterparts,
    prepare_trial,
    site_states,
    steering_vectors,
    sweep_site,
    transition_of,
)
from lib.evidence.tasks import gate, load_task, task_names
from lib.phase_transition.shapes import compare_shapes
from lib.science.stats import bootstrap_weights
from lib.science.transitions import Transition

CURVE_COLUMNS = ["model", "untrained", "task", "curve", "block", "estimate", "low", "high", "n"]
SELF_DONORS = 6  # prompts a task: that nothing changes is exact, no matter of sampling
CONTROLS = ("self-donor", "same answer", "random direction")
Outcomes = Mapping[str, Mapping[Arm, ArmOutcome]]


def prepare_trials(
    decoder: Decoder, names: Iterable[str] | None = None
) -> tuple[dict[str, Trial], pd.DataFrame]:
    """Return the trials of `decoder` and the gate's table for all tasks.

    A trained model has a trial for every task that it passes. The untrained twin passes none; it
    has one for every task on which it does not give all prompts the same answer, judged by its own
    choice.

    Returns:
        Trials by task; a table with `task`, `accuracy`, `chance`, `n`, `testable`, `reason`.
    """
    trials: dict[str, Trial] = {}
    rows: list[dict[Any, Any]] = []
    for name in task_names() if names is None else names:
        try:
            task = load_task(name, decoder)
        except ValueError as problem:
            rows.append({"task": name, "testable": False, "reason": str(problem)})
            continue
        result = gate(decoder, task)
        rows.extend(result.to_frame().to_dict("records"))
        if result.testable or decoder.untrained:
            trial = prepare_trial(decoder, task, result)
            if len(trial.pairs(donors_per_prompt=1)):
                trials[name] = trial
    columns = ["task", "accuracy", "chance", "n", "testable", "reason"]
    return trials, pd.DataFrame(rows, columns=columns)


def prompt_weights(trials: Mapping[str, Trial], n_draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return bootstrap weights of each task's prompts `[n_draws, n_prompts]`, fixed by `seed`."""
    return {
        name: bootstrap_weights(trial.task.n_prompts, n_draws, np.random.default_rng([seed, index]))
        for index, (name, trial) in enumerate(sorted(trials.items()))
    }


def measure_arms(
    trials: Mapping[str, Trial],
    *,
    donors_per_prompt: int | None,
    templates: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    full_vocabulary: bool = False,
) -> dict[str, dict[Arm, ArmOutcome]]:
    """Return the exchange in both arms, by task: ordered pairs of prompts.

    Args:
        trials: from `prepare_trials`.
        donors_per_prompt: donors of each recipient; None for all ordered pairs.
        templates: which templates, all by default.
        blocks: after which to edit, all by default.
        full_vocabulary: also measure probabilities over the full vocabulary.
    """
    return {
        name: {
            arm: sweep_site(
                trial,
                _choose(trial, templates, donors_per_prompt=donors_per_prompt),
                site,
                blocks=blocks,
                full_vocabulary=full_vocabulary,
                description=f"{name}: {_who(trial)}, exchange, {arm}",
            )
            for arm, site in ARMS.items()
        }
        for name, trial in trials.items()
    }


def measure_steering(
    trials: Mapping[str, Trial],
    *,
    templates: Sequence[int] = (0,),
    blocks: Sequence[int] | None = None,
) -> dict[str, dict[Arm, ArmOutcome]]:
    """Return centroid steering in both arms, fitted on other templates, one donor a prompt."""
    outcomes: dict[str, dict[Arm, ArmOutcome]] = {}
    for name, trial in trials.items():
        pairs = _choose(trial, templates, donors_per_prompt=1)
        pairs = pairs[has_counterparts(trial, pairs)]
        if len(pairs) == 0:
            continue
        outcomes[name] = {}
        for arm, site in ARMS.items():
            assert site in ("subject", "last")
            outcomes[name][arm] = sweep_site(
                trial,
                pairs,
                site,
                edit=add,
                blocks=blocks,
                donors=steering_vectors(trial, pairs, "subject" if site == "subject" else "last"),
                description=f"{name}: {_who(trial)}, steering, {arm}",
            )
    return outcomes


def measure_control(
    trials: Mapping[str, Trial],
    control: str,
    *,
    templates: Sequence[int] = (0,),
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, dict[Arm, ArmOutcome]]:
    """Return one control of the exchange in both arms, one donor for each prompt.

    Args:
        trials: from `prepare_trials`.
        control: `"self-donor"`; `"same answer"` (another subject, the same answer: tasks without
            such donors are left out); `"random direction"` (the donor's norm, any direction).
        templates: which templates.
        blocks: after which to edit, all by default.
        seed: of the random directions.

    Raises:
        ValueError: no such control.
    """
    outcomes: dict[str, dict[Arm, ArmOutcome]] = {}
    for name, trial in trials.items():
        if control == "self-donor":
            chosen = _choose(trial, templates, donors_per_prompt=1)[:SELF_DONORS, [0, 0]]
        elif control in ("same answer", "random direction"):
            same = control == "same answer"
            chosen = _choose(trial, templates, donors_per_prompt=1, same_answer=same)
        else:
            raise ValueError(f"Unknown control {control!r}; choose one of {', '.join(CONTROLS)}.")
        if len(chosen) == 0:
            continue
        outcomes[name] = {
            arm: sweep_site(
                trial,
                chosen,
                site,
                donors=_random_donors(trial, chosen, site, seed) if "random" in control else None,
                blocks=blocks,
                description=f"{name}: {_who(trial)}, {control}, {arm}",
            )
            for arm, site in ARMS.items()
        }
    return outcomes


def measure_controls(
    trials: Mapping[str, Trial], *, blocks: Sequence[int] | None = None, seed: int = 0
) -> dict[str, dict[str, dict[Arm, ArmOutcome]]]:
    """Return all controls of `measure_control` by name."""
    return {name: measure_control(trials, name, blocks=blocks, seed=seed) for name in CONTROLS}


def measure_routing(
    trials: Mapping[str, Trial], outcomes: Outcomes, *, templates: Sequence[int] = (0,)
) -> dict[str, dict[Site, ArmOutcome]]:
    """Return the exchange at the subject together with later tokens, one donor for each prompt.

    The context arm could fall only because the subject has been copied to later tokens. Editing
    the subject and all tokens up to the second last, or all of them, tells.

    Args:
        trials: from `prepare_trials`.
        outcomes: from `measure_arms`: the exchange at the subject alone, on these templates.
        templates: which templates.
    """
    further: tuple[Site, ...] = ("subject to second last", "subject to last")
    found: dict[str, dict[Site, ArmOutcome]] = {}
    for name, trial in trials.items():
        alone = outcomes[name]["context arm"]
        template = trial.task.prompts["template"].to_numpy()[alone.pairs[:, 0]]
        first = np.isin(
            np.arange(len(alone.pairs)), np.unique(alone.pairs[:, 0], return_index=True)[1]
        )
        found[name] = {"subject": alone.select(first & np.isin(template, templates))}
        for site in further:
            found[name][site] = sweep_site(
                trial,
                found[name]["subject"].pairs,
                site,
                description=f"{name}: {_who(trial)}, exchange, {site}",
            )
    return found


def curves_of(
    trials: Mapping[str, Trial],
    outcomes: Mapping[str, Mapping[str, ArmOutcome]],
    weights: Mapping[str, np.ndarray],
    values: Values = "flipped",
) -> pd.DataFrame:
    """Return one row per task, curve and block: `CURVE_COLUMNS`."""
    tables = [
        outcome.curve(weights[name], values)[0].assign(
            model=trials[name].decoder.name,
            untrained=trials[name].decoder.untrained,
            task=name,
            curve=curve,
        )
        for name, by_curve in outcomes.items()
        for curve, outcome in by_curve.items()
    ]
    if not tables:
        return pd.DataFrame(columns=CURVE_COLUMNS)
    return pd.concat(tables, ignore_index=True)[CURVE_COLUMNS]


def average_curves(
    outcomes: Mapping[str, Mapping[str, ArmOutcome]],
    weights: Mapping[str, np.ndarray],
    values: Values = "flipped",
) -> pd.DataFrame:
    """Return the mean over tasks of each curve, with its interval over the tasks' prompts.

    Columns `curve`, `block`, `estimate`, `low`, `high`, `n` (prompts of all tasks).
    """
    found: dict[str, list[tuple[pd.DataFrame, np.ndarray]]] = {}
    for name, by_curve in outcomes.items():
        for curve, outcome in by_curve.items():
            both = outcome.curve(weights[name], values)
            found.setdefault(curve, []).append(both)
    tables = []
    for curve, parts in found.items():
        draws = np.mean([draws for _, draws in parts], axis=0)
        low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
        table = parts[0][0].assign(curve=curve, low=low, high=high)
        table["estimate"] = np.mean([part["estimate"] for part, _ in parts], axis=0)
        table["n"] = sum(int(part["n"].iloc[0]) for part, _ in parts)
        tables.append(table)
    columns = ["curve", "block", "estimate", "low", "high", "n"]
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )


def find_transitions(
    outcomes: Outcomes, weights: Mapping[str, np.ndarray]
) -> dict[str, Transition]:
    """Return each task's transition from context arm to prediction arm."""
    return {
        name: transition_of(arms["context arm"], arms["prediction arm"], weights[name])
        for name, arms in outcomes.items()
    }


def transition_table(transitions: Mapping[str, Transition]) -> pd.DataFrame:
    """Return one row per task: ℓ*, its interval, and the width as a share of the depth."""
    rows = []
    for name, found in transitions.items():
        share = found.width_share
        rows.append(
            {
                "task": name,
                "block": found.block,
                "low": found.low,
                "high": found.high,
                "width_share": share.estimate if share else None,
                "width_low": share.low if share else None,
                "width_high": share.high if share else None,
                "n": found.n_prompts,
                "reason": found.reason,
            }
        )
    columns = ["task", "block", "low", "high", "width_share", "width_low", "width_high"]
    return pd.DataFrame(rows, columns=[*columns, "n", "reason"])


def compare_arm_shapes(outcomes: Outcomes, *, seed: int) -> pd.DataFrame:
    """Return how much better a logistic curve predicts held-out prompts than a line and a step.

    One row per task and arm: differences of the held-out log-likelihood with 95 % intervals.
    """
    rows = []
    for name, arms in outcomes.items():
        for arm, outcome in arms.items():
            found = compare_shapes(
                outcome.flipped,
                outcome.pairs,
                falling=arm == "context arm",
                rng=np.random.default_rng(seed),
            )
            row: dict[str, object] = {"task": name, "arm": arm}
            for shape in ("line", "step"):
                interval = getattr(found, f"logistic_over_{shape}")
                row[f"over {shape}"] = interval.estimate
                row[f"over {shape}, low"] = interval.low
                row[f"over {shape}, high"] = interval.high
            rows.append({**row, "n": found.n_prompts})
    columns = ["over line", "over line, low", "over line, high"]
    columns += [column.replace("line", "step") for column in columns]
    return pd.DataFrame(rows, columns=["task", "arm", *columns, "n"])


def _who(trial: Trial) -> str:
    return "untrained twin" if trial.decoder.untrained else "trained"


def _choose(
    trial: Trial,
    templates: Sequence[int] | None,
    *,
    donors_per_prompt: int | None,
    same_answer: bool = False,
) -> np.ndarray:
    pairs = trial.pairs(donors_per_prompt=donors_per_prompt, same_answer=same_answer)
    if templates is None or len(pairs) == 0:
        return pairs
    return pairs[np.isin(trial.task.prompts["template"].to_numpy()[pairs[:, 0]], templates)]


def _random_donors(trial: Trial, pairs: np.ndarray, site: Site, seed: int) -> torch.Tensor:
    assert site in ("subject", "last")
    states = site_states(trial, "subject" if site == "subject" else "last")
    return random_directions(states[:, pairs[:, 1]], torch.Generator().manual_seed(seed))
