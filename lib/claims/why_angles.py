"""Why angles: what the states of small decoders tell, by the norms they were trained with.

Every number is of one network; the units of the estimates are the seeds. θ is the angle between two
residual streams at the last token, in radians, d their Euclidean distance, J the Jeffreys
divergence of the network's own predictions at the last token, r = ‖h‖₂.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import squareform
from scipy.stats import rankdata
from torch import Tensor

from lib.engine.edits import Scale, exchange, exchange_direction, exchange_norm
from lib.engine.extraction import extract_residuals, tokenize
from lib.engine.models import Decoder, load_decoder
from lib.engine.readouts import DistributionMeasure
from lib.engine.small_decoders import Material, Training
from lib.engine.sweeps import sweep_blocks
from lib.evidence import circle
from lib.evidence.transfer import ARMS
from lib.science.correlation import partial_correlation
from lib.science.estimate import Measured, Untested, generator, mean_over_units
from lib.science.geometry import angles, distances, jeffreys_divergence

CLAIM = "why-angles"
MODEL = "small decoders"
"""What the records call the networks, whichever model the other chapters run on."""

GATE = 0.01
"""Largest KL(truth ‖ model), in nats, of a network that has learned the language."""

NORMED = ("rmsnorm", "layernorm")
BARE = "none"
N_QUESTIONS = 256
DOSES = (0.25, 0.5, 0.71, 1.41, 2.0, 4.0)
"""Factors c of the edit h → c·h."""


def training_material() -> Material:
    """Return the questions that the networks are trained on, with their truths."""
    return _material(circle.all_questions(circle.TRAINED_FILLERS))


def held_out_questions() -> pd.DataFrame:
    """Return the questions that the networks are measured on, 256 with fillers not trained on."""
    every = circle.all_questions(circle.HELD_OUT_FILLERS)
    rows = generator(CLAIM, "questions").choice(len(every), N_QUESTIONS, replace=False)
    return every.iloc[rows].reset_index(drop=True)


def _material(questions: pd.DataFrame) -> Material:
    tokens = circle.make_tokenizer()(circle.texts(questions))["input_ids"]
    return Material(torch.tensor(tokens), torch.tensor(circle.truths(questions)).float())


def read_network(training: Training, moment: int | None = None) -> Decoder:
    """Return a network at a moment of its training, by default the last, as a decoder."""
    return load_decoder(training.model(moment), tokenizer=circle.make_tokenizer())


def read_states(training: Training, questions: pd.DataFrame) -> NDArray[np.float32]:
    """Return a trained network's residual streams at the last token `[n_blocks, n, d_model]`."""
    return _read(read_network(training), questions)[0].numpy()


def with_losses(table: pd.DataFrame, trainings: Sequence[Training]) -> pd.DataFrame:
    """Return a table of moments with the training loss at each, in nats, as column `kl_nats`.

    The loss is the mean over the ten steps up to the moment.
    """
    losses = {
        (one.kind, one.seed, step): one.losses[max(0, step - 10) : step].mean()
        for one in trainings
        for step in one.weights
        if step > 0
    }
    keys = zip(table["kind"], table["seed"], table["step"], strict=True)
    return table.assign(kl_nats=[losses[key] for key in keys])


def divergence_from_truth(decoder: Decoder, questions: pd.DataFrame) -> float:
    """Return the mean of KL(truth ‖ model) in nats over the questions."""
    logits = _read(decoder, questions)[1]
    truths = torch.tensor(circle.truths(questions))
    log_q = torch.log_softmax(logits.double(), -1)
    return float((-torch.special.entr(truths).sum(-1) - (truths * log_q).sum(-1)).mean())


def check_learning(trainings: Sequence[Training], questions: pd.DataFrame) -> pd.DataFrame:
    """Return how near each network came to the truth on held-out questions.

    Returns:
        A row a network: `kind`, `seed`, `n_steps`, `kl_nats`, the mean KL(truth ‖ model), infinite
        where the training diverged.
    """
    return pd.DataFrame(
        {
            "kind": one.kind,
            "seed": one.seed,
            "n_steps": len(one.losses),
            "kl_nats": math.inf
            if one.diverged
            else divergence_from_truth(read_network(one), questions),
        }
        for one in trainings
    )


def untested_kinds(learned: pd.DataFrame) -> dict[str, Untested]:
    """Return, by kind, why it says nothing: one of its networks has not learned the language."""
    untested: dict[str, Untested] = {}
    for _, row in learned[~(learned["kl_nats"] <= GATE)].iterrows():
        found = (
            f"KL to the truth {row['kl_nats']:.3f} nats, at most {GATE} is needed"
            if math.isfinite(row["kl_nats"])
            else f"its loss was not finite at step {row['n_steps'] - 1}"
        )
        reason = f"{row['kind']}, seed {row['seed']}: {found}"
        untested.setdefault(str(row["kind"]), Untested(reason))
    return untested


def measure_all(
    measure: Callable[[Decoder, pd.DataFrame], pd.DataFrame],
    trainings: Sequence[Training],
    questions: pd.DataFrame,
    *,
    every_moment: bool = False,
) -> pd.DataFrame:
    """Return a measurement of each network, with columns `kind`, `seed` and `step`.

    Args:
        measure: one of this module's `measure_` functions.
        trainings: of which the last moment is measured.
        questions: what the networks are asked.
        every_moment: measure all of their moments but the untrained one, in which no two
            predictions differ enough to be ranked.

    Raises:
        ValueError: no training; as `measure`.
    """
    if not trainings:
        raise ValueError("No network to measure: none has learned the language. See the losses.")
    tables = []
    for one in trainings:
        moments = sorted(one.weights)
        for moment in moments[1:] if every_moment else moments[-1:]:
            found = measure(read_network(one, moment), questions)
            tables.append(found.assign(kind=one.kind, seed=one.seed, step=moment))
    return pd.concat(tables, ignore_index=True)


def measure_geometry(decoder: Decoder, questions: pd.DataFrame) -> pd.DataFrame:
    """Return what angle, distance and norm tell after each block.

    Returns:
        A row a block, with Spearman's rank correlations over pairs of questions and the share of
        the variance of log r between confidences: `block`, `angle` ρ(θ, J), `distance` ρ(d, J),
        `angle_given_distance` ρ(θ, J given d), `distance_given_angle` ρ(d, J given θ),
        `partial_gap` their difference, `confidence_share` η².

    Raises:
        ValueError: a state of norm zero, a constant matrix.
    """
    states, logits = _read(decoder, questions)
    divergences = rankdata(squareform(jeffreys_divergence(logits)))
    confidence = questions["confidence"].to_numpy()
    rows = []
    for block, found in enumerate(states.numpy()):
        share = _share_between(np.log(np.linalg.norm(found, axis=1)), confidence)
        rows.append({"block": block, **_gaps(found, divergences), "confidence_share": share})
    return pd.DataFrame(rows)


def _gaps(states: NDArray[Any], divergences: NDArray[np.float64]) -> dict[str, float]:
    """Return the rank correlations of states `[n, d_model]` with ranked divergences of pairs."""
    ranks = [rankdata(squareform(measure(states))) for measure in (angles, distances)]
    every = np.corrcoef([ranks[0], divergences, ranks[1]])
    by_angle = float(partial_correlation(every))
    by_distance = float(partial_correlation(every[::-1, ::-1]))
    return {
        "angle": every[0, 1],
        "distance": every[2, 1],
        "angle_given_distance": by_angle,
        "distance_given_angle": by_distance,
        "partial_gap": by_angle - by_distance,
    }


def logit_code(questions: pd.DataFrame) -> float:
    """Return the partial gap of states that are the true logits themselves, a reference.

    The logits κ cos(φ − μ) are a plane's vectors κ (cos μ, sin μ): length the confidence, direction
    the answer.
    """
    truths = circle.truths(questions)[:, list(circle.ANSWER_IDS)]
    logits = np.log(truths)
    logits -= logits.mean(axis=1, keepdims=True)
    return float(_gaps(logits, rankdata(squareform(jeffreys_divergence(logits))))["partial_gap"])


def measure_exchanges(decoder: Decoder, questions: pd.DataFrame) -> pd.DataFrame:
    """Return what it costs to take another question's norm, or its direction, after each block.

    Each question meets one donor; the state is that of the last token.

    Returns:
        A row a block: `block`, `norm_kl_nats` and `direction_kl_nats`, means over pairs of
        KL(p ‖ p_edited), and `norm_cost`, the first over the second.
    """
    pairs = random_pairs(len(questions))
    sweep = sweep_blocks(
        decoder,
        tokenize(decoder, circle.texts(questions)),
        pairs,
        {"norm": exchange_norm, "direction": exchange_direction},
        positions="last",
        measure=DistributionMeasure(_read(decoder, questions)[1], pairs[:, 0]),
    )
    norm, direction = sweep.measures["kl_nats"].mean(-1)
    columns = {"block": sweep.blocks, "norm_kl_nats": norm, "direction_kl_nats": direction}
    return pd.DataFrame({**columns, "norm_cost": norm / direction})


def measure_doses(decoder: Decoder, questions: pd.DataFrame) -> pd.DataFrame:
    """Return what scaling the last token's state after the last block but one by c does.

    Args:
        decoder: the network.
        questions: what it is asked.

    Returns:
        A row a c: `block`, `factor`, `kl_nats`, the mean KL(p ‖ p_edited); `sharpening`, the mean
        of −log T in nats, T the temperature that best turns the edited prediction back into the
        unedited one (`lib.engine.readouts.DistributionMeasure`): above zero where the edit made the
        prediction more certain.
    """
    block = decoder.n_blocks - 2
    pairs = np.stack([np.arange(len(questions))] * 2, axis=1)
    logits = _read(decoder, questions)[1]
    sweep = sweep_blocks(
        decoder,
        tokenize(decoder, circle.texts(questions)),
        pairs,
        {str(factor): Scale(factor) for factor in DOSES},
        positions="last",
        blocks=[block],
        measure=DistributionMeasure(logits, pairs[:, 0], temperature=True),
    )
    columns = {"factor": DOSES, "kl_nats": sweep.measures["kl_nats"][:, 0].mean(-1)}
    columns["sharpening"] = -np.log(sweep.measures["temperature"][:, 0]).mean(-1)
    return pd.DataFrame(columns).assign(block=block)


def measure_arms(decoder: Decoder, questions: pd.DataFrame) -> pd.DataFrame:
    """Return the transfer T of an exchange with a donor that differs in its hour alone.

    Returns:
        A row an arm and block: `arm`, `block`, `transfer`.
    """
    donors = questions.copy()
    drawn = generator(CLAIM, "hours").integers(1, circle.N_HOURS, len(questions))
    hours = (questions["hour"].map(circle.HOURS.index).to_numpy() + drawn) % circle.N_HOURS
    donors["hour"] = np.array(circle.HOURS)[hours]
    both = pd.concat([questions, donors], ignore_index=True)
    prompts, logits = tokenize(decoder, circle.texts(both)), _read(decoder, both)[1]
    n = len(questions)
    pairs = np.stack([np.arange(n), np.arange(n, 2 * n)], axis=1)
    from_donor = DistributionMeasure(logits, pairs[:, 1])
    before = float(from_donor(logits[pairs[:, 0]], torch.arange(n))["kl_nats"].sum())
    rows = []
    for arm, site in ARMS.items():
        place = circle.PLACES["hour" if site == "subject" else "last"]
        sweep = sweep_blocks(
            decoder,
            prompts,
            pairs,
            {"exchange": exchange},
            positions=[place] * len(prompts),
            measure=from_donor,
        )
        after = sweep.measures["kl_nats"][0].sum(-1)
        rows += [
            {"arm": arm, "block": block, "transfer": 1 - left / before}
            for block, left in zip(sweep.blocks, after, strict=True)
        ]
    return pd.DataFrame(rows)


def statistics(
    geometry: pd.DataFrame, exchanges: pd.DataFrame, untested: Mapping[str, Untested]
) -> dict[str, Measured]:
    """Return the numbers that the claim's criteria name, at the block before the last.

    Those with norms are two, of RMSNorm and of LayerNorm: both have to hold.

    Args:
        geometry: `measure_geometry` of every network, with columns `kind` and `seed`.
        exchanges: `measure_exchanges`, likewise.
        untested: by kind, why it says nothing.
    """
    gaps = _by_seed(geometry, "partial_gap", untested)
    costs = _by_seed(exchanges, "norm_cost", untested)
    return {
        "partial_gap_normed": gaps["normed"],
        "partial_gap_bare": gaps["bare"],
        "partial_gap_difference": gaps["difference"],
        "norm_cost_normed": costs["normed"],
        "norm_cost_bare": costs["bare"],
    }


def by_kind(table: pd.DataFrame, column: str, kind: str) -> Measured:
    """Return a number of a kind at every block `[n_blocks]`, the mean over its seeds."""
    values = table[table["kind"] == kind].pivot(index="seed", columns="block", values=column)
    return mean_over_units(values.to_numpy(), "seeds")


def _by_seed(
    table: pd.DataFrame, column: str, untested: Mapping[str, Untested]
) -> dict[str, Measured]:
    """Return a column at the block before the last, with norms `[2]`, without `[1]`, and less."""
    last = table["block"].max() - 1
    by_kind = table[table["block"] == last].pivot(index="seed", columns="kind", values=column)

    def mean(kinds: Sequence[str], less: str | None = None) -> Measured:
        used = [*kinds, *([less] if less else [])]
        for kind in used:
            if kind in untested:
                return untested[kind]
        values = by_kind[list(kinds)].to_numpy()
        if less:
            values = values - by_kind[[less]].to_numpy()
        return mean_over_units(values, "seeds")

    return {"normed": mean(NORMED), "bare": mean([BARE]), "difference": mean(NORMED, BARE)}


def random_pairs(n: int) -> NDArray[np.int64]:
    """Return a donor for each of n questions, `[n, 2]`: one random cycle through all of them."""
    order = generator(CLAIM, "donors").permutation(n)
    return np.array(sorted([*pairwise(order), (order[-1], order[0])]))


def _share_between(values: NDArray[np.float64], groups: NDArray[np.object_]) -> float:
    """Return η², the share of the variance that lies between the groups' means."""
    means = pd.Series(values).groupby(groups).transform("mean")
    return float(means.var(ddof=0) / values.var())


def _read(decoder: Decoder, questions: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Return last-token states `[n_blocks, n, d_model]` and logits `[n, d_vocab]`."""
    prompts = tokenize(decoder, circle.texts(questions))
    found = extract_residuals(decoder, prompts, logits=True)
    assert found.logits is not None
    return found.states, found.logits
