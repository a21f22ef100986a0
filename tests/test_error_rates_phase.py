"""How often the phase transition's verdicts are wrong where the truth is known.

Each run draws tasks of subjects, one pair each, with a known transfer; measures them with the
functions of the chapter; and judges them as it does. At each threshold at most 5 % of the runs may
support what is false, and at most 5 % refute what is true; effects of the size seen are decided.
"""

import numpy as np
import pytest
from conftest import N_BOOKS
from scipy.stats import norm

from lib.claims import phase_transition as claim
from lib.claims.phase_transition import Arms
from lib.evidence.by_task import beyond_twins, each
from lib.evidence.content import CONTROLS
from lib.evidence.criteria import POOLED, criteria, judge
from lib.evidence.transfer import Transfer
from lib.science.estimate import Estimate, mean_over_units, ratio_of_sums, stack

N_RUNS = N_BOOKS
FEW_RUNS, MANY_RUNS = (100 if N_BOOKS <= 200 else N_BOOKS), 400
L = 30
SUBJECTS = (69, 75, 64, 66, 51, 67, 72, 61, 70, 46, 69, 60, 59, 51, 56, 12)
CRITERIA = {one.statistic: one for one in criteria(claim.CLAIM)}


def rates(statistic, one_run, n_runs=N_RUNS):
    """The shares of runs that come out supported and refuted, pooled over tasks."""
    found = [verdict(statistic, one_run(np.random.default_rng([17, run]))) for run in range(n_runs)]
    return found.count("supported") / n_runs, found.count("refuted") / n_runs


def held(told, statistic, one_run, n_runs=N_RUNS, *, seen, n_seen=40):
    """Assert that at the threshold both errors are rare, and an effect of the size seen decided."""
    supported, refuted = rates(statistic, one_run, n_runs)
    decided = max(rates(statistic, seen, n_seen))
    errors = {"false_support": supported, "false_refutation": refuted}
    told(claim.CLAIM, statistic, **errors, decided=decided)
    assert supported <= 0.05 and refuted <= 0.05
    assert decided >= 0.95


def verdict(statistic, measured):
    """The verdict on one statistic, judged as the chapter judges it."""
    filled = {name: measured if name == statistic else EMPTY[name] for name in CRITERIA}
    rows = judge(claim.CLAIM, "m", filled)
    place = POOLED if CRITERIA[statistic].places == "tasks" else "model"
    (row,) = [one for one in rows if (one["statistic"], one["place"]) == (statistic, place)]
    return row["verdict"]


ONE = mean_over_units([0.0, 1.0, 2.0], "none")
EMPTY = {
    name: {"none": ONE} if criterion.places == "tasks" else ONE
    for name, criterion in CRITERIA.items()
}


def one_task(rng, n, name, context, prediction):
    """Arms of n subjects, one pair each: T of every pair `[n_blocks, n]`, divergences drawn.

    Pairs whose donor is further away count more in T; how far is log-normal.
    """
    before = rng.lognormal(1.0, 0.5, size=n)
    transfers = {
        arm: Transfer(
            tuple(range(len(curve))),
            (1 - curve) * before,
            before,
            np.zeros(curve.shape, dtype=int),
            np.zeros(n, dtype=int),
            np.arange(n),
            f"subjects of {name}",
            n,
        )
        for arm, curve in zip(claim.ARMS, (context, prediction), strict=True)
    }
    return Arms(len(context), transfers)


# --- transfer at a threshold ----------------------------------------------------------------------


def flat_arms(rng, truth, n_blocks=L):
    """Every task's arms with the given truth for early and last sixth of each arm.

    Subjects differ by 0.15 (shared by all blocks), tasks by 0.05 about a mean that is the truth.
    """
    shifts = 0.05 * norm.ppf((np.arange(len(SUBJECTS)) + 0.5) / len(SUBJECTS))
    result = {}
    for n, shift in zip(SUBJECTS, rng.permutation(shifts), strict=True):
        name = f"task {len(result)}"
        place = np.where(np.arange(n_blocks) < 23, 0, 1)[:, None]
        arms = [
            np.where(place == 0, early, late)
            + shift
            + 0.15 * rng.standard_normal(n)
            + 0.05 * rng.standard_normal((n_blocks, n))
            for early, late in (truth[:2], truth[2:])
        ]
        result[name] = one_task(rng, n, name, *arms)
    return result


def transfers(statistic, truth):
    def one_run(rng):
        return {name: claim.plateaus(one)[statistic] for name, one in flat_arms(rng, truth).items()}

    return one_run


@pytest.mark.parametrize(
    ("statistic", "truth", "seen"),
    [
        ("context_early", (0.8, 0, 0, 1), (0.93, 0, 0, 1)),
        ("context_last_sixth", (1, 0.1, 0, 1), (1, 0.0, 0, 1)),
        ("prediction_early", (1, 0, 0.1, 1), (1, 0, 0.02, 1)),
        ("prediction_last_sixth", (1, 0, 0, 0.8), (1, 0, 0, 0.95)),
    ],
)
def test_transfer_of_an_arm(statistic, truth, seen, told):
    held(told, statistic, transfers(statistic, truth), seen=transfers(statistic, seen))


# --- widths and places ----------------------------------------------------------------------------


def waves(rng, n, middle, sigma):
    """T of n subjects whose own switch lies about the middle: their mean climbs as a normal cdf."""
    own = middle + sigma * rng.standard_normal(n)
    climb = norm.cdf((np.arange(L)[:, None] - own) / 0.3)
    return climb + 0.05 * rng.standard_normal((L, n))


def wave_width(sigma, middle=18.0):
    """The width of the mean of endlessly many subjects, by the chapter's own rule."""
    climb = norm.cdf((np.arange(L - 1) - middle) / np.hypot(sigma, 0.3))
    return claim.curves.width(climb, rising=True)


def spread_for(width):
    """The spread of the subjects' switches that gives a width, by bisection."""
    low, high = 0.0, 8.0
    for _ in range(60):
        low, high = (low, half) if wave_width(half := (low + high) / 2) > width else (half, high)
    return low


def widths(statistic, width, tasks=SUBJECTS):
    sigma = spread_for(width * L)

    def one_run(rng):
        result = {}
        for n in tasks:
            name = f"task {len(result)}"
            climb = waves(rng, n, 18.0, sigma)
            arms = one_task(rng, n, name, 1 - climb, climb)
            result[name] = claim.widths(arms)[statistic]
        return result

    return one_run


@pytest.mark.parametrize("statistic", ["context_fall_width", "prediction_rise_width"])
def test_width_of_an_arm(statistic, told):
    seen = widths(statistic, 0.06)
    held(told, statistic, widths(statistic, 0.15), FEW_RUNS, seen=seen, n_seen=20)
    assert rates(statistic, widths(statistic, 0.3), 20)[1] == 1


def spread(distances):
    """Tasks whose ℓ* lie at given distances from their median, in shares of L."""

    def one_run(rng):
        found = {}
        for n, distance in zip(SUBJECTS, distances, strict=True):
            name = f"task {len(found)}"
            climb = waves(rng, n, 18 + distance * L, 1.0)
            found[name] = claim.find_transition(one_task(rng, n, name, 1 - climb, climb))
        return claim.transition_spread(found, L)

    return one_run


NEAR = np.linspace(-0.01, 0.01, len(SUBJECTS) - 2)


@pytest.mark.parametrize("off", [[0.1, 0.0], [-0.1, 0.1]])
def test_spread_of_the_places_at_the_threshold(off, told):
    """One task is off by 0.1 L, or one on each side; the others lie close."""
    seen = spread([0.03, -0.03, *NEAR])
    held(told, "transition_spread", spread([*off, *NEAR]), FEW_RUNS, seen=seen, n_seen=20)


def test_spread_of_the_places_is_decided_away_from_the_threshold():
    assert rates("transition_spread", spread([0.2, 0.0, *NEAR]), 20)[1] == 1


# --- twins ----------------------------------------------------------------------------------------


def beyond(trained, twin):
    """S of trained tasks and of five twins, on twelve pairs a task at the twins' blocks."""

    def small(rng, mean, name, is_seed):
        ends = np.where(np.arange(10) < 7, 0.0, mean)[:, None] + 0.15 * rng.standard_normal(12)
        whole = np.zeros((L, 12))
        whole[claim.twin_blocks(L)] = ends
        arms = one_task(rng, 12, name, 1 - whole, whole).restrict(
            np.arange(12), claim.twin_blocks(L)
        )
        return claim.replace(arms, is_seed=is_seed)

    def one_run(rng):
        names = [f"task {i}" for i in range(len(SUBJECTS))]
        own = {name: small(rng, trained, name, False) for name in names}
        seeds = twin + 0.05 * rng.standard_normal(5)
        theirs = [{name: small(rng, mean, name, True) for name in names} for mean in seeds]
        return beyond_twins(each(own, claim.hand_over), [each(t, claim.hand_over) for t in theirs])

    return one_run


def test_hand_over_beyond_twins(told):
    at, seen = beyond(0.95, 0.45), beyond(0.95, 0.3)
    held(told, "hand_over_beyond_twins", at, MANY_RUNS, seen=seen, n_seen=20)


# --- controls -------------------------------------------------------------------------------------


def controls(*truth):
    """T of states without content in both arms; subjects differ by 0.4, tasks by 0.05."""

    def one_run(rng):
        found = {}
        for n in SUBJECTS:
            name = f"subjects of task {len(found)}"
            before = rng.lognormal(1.0, 0.5, size=(n, 1))
            both = np.array(truth) + 0.4 * rng.standard_normal((n, len(truth)))
            found[name] = ratio_of_sums(both * before, before * np.ones(len(truth)), name)
        return found

    return one_run


@pytest.mark.parametrize("statistic", CONTROLS)
@pytest.mark.parametrize("truth", [(0.1, -0.5), (0.1, 0.1)])
def test_states_without_content(statistic, truth, told):
    supported, refuted = rates(statistic, controls(*truth))
    decided = rates(statistic, controls(0.0, 0.0), 60)[0]
    errors = {"false_support": supported, "false_refutation": refuted}
    told(claim.CLAIM, statistic, **errors, decided=decided)
    assert supported <= 0.05
    assert refuted <= (0.05 if truth[1] < 0 else 0.075)  # two numbers may each be refuted
    assert decided >= 0.95


def test_margin_of_the_donor(told):
    held(told, "content_margin", controls(0.5, 0.9), seen=controls(0.65, 0.65), n_seen=60)


def disturbance(truth):
    """Ratios of disturbances by donors of the same answer and of another, log-normal each."""

    def one_run(rng):
        found = {}
        for n in SUBJECTS[1:9]:
            name = f"subjects of task {len(found)}"
            ratios = [
                ratio_of_sums(
                    share * rng.lognormal(0, 0.8, size=n), rng.lognormal(0, 0.5, size=n), name
                )
                for share in np.array(truth) * np.exp(0.5**2 / 2 - 0.8**2 / 2)
            ]
            found[name] = stack(*ratios)
        return found

    return one_run


def test_disturbance_by_the_same_answer(told):
    at, seen = disturbance((0.2, 0.05)), disturbance((0.05, 0.05))
    held(told, "same_answer_disturbance", at, seen=seen, n_seen=60)


# --- the geometry ---------------------------------------------------------------------------------


def gaps(geometry, causal, n_blocks=15, n=40, n_tasks=4):
    """Tasks whose ρ and T climb as normal cdfs of the given spreads, in blocks."""

    def one_run(rng):
        found = {}
        for index in range(n_tasks):
            name = f"task {index}"
            prediction = rng.standard_normal((n, 8))
            context = rng.standard_normal((n, 8))
            weight = norm.cdf((np.arange(n_blocks) - 7) / geometry)
            own = 7 + causal * rng.standard_normal(n)
            climb = norm.cdf((np.arange(n_blocks)[:, None] - own) / 0.3)
            climb = climb + 0.05 * rng.standard_normal((n_blocks, n))
            arms = one_task(rng, n, name, 1 - climb, climb)
            mixed = [np.sqrt(w) * prediction + np.sqrt(1 - w) * context for w in weight[:-1]]
            rho = claim.correlate(
                [claim.angles(one) for one in mixed],
                claim.angles(prediction),
                f"subjects of {name}",
            )
            assert isinstance(rho, Estimate)
            found[name] = claim.width_gap(rho, arms)
        return found

    return one_run


def true_gap(geometry, causal, n_blocks=15):
    """The gap of endlessly many items: ρ of mixed clouds, simulated once with many."""
    rng = np.random.default_rng(5)
    prediction, context = rng.standard_normal((2, 400, 8))
    weight = norm.cdf((np.arange(n_blocks - 1) - 7) / geometry)
    upper = np.triu_indices(400, 1)
    target = claim.angles(prediction)[upper].argsort().argsort()
    rho = [
        np.corrcoef(
            claim.angles(np.sqrt(w) * prediction + np.sqrt(1 - w) * context)[upper]
            .argsort()
            .argsort(),
            target,
        )[0, 1]
        for w in weight
    ]
    climb = norm.cdf((np.arange(n_blocks - 1) - 7) / np.hypot(causal, 0.3))
    return claim.curves.width(rho, rising=True) - claim.curves.width(climb, rising=True)


def test_width_of_the_geometry_against_the_causal_one(told):
    """No gap: the spread of the causal switch is chosen so that both widths are one."""
    low, high = 0.05, 4.0
    for _ in range(12):
        half = (low + high) / 2
        low, high = (half, high) if true_gap(1.5, half) > 0 else (low, half)
    held(told, "width_gap", gaps(1.5, half), FEW_RUNS, seen=gaps(2.0, 0.1), n_seen=20)
