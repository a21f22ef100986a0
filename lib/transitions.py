"""Where in depth a curve switches and how sharply: logistic fits, crossing, 10-90 % width.

A curve has one value a block, x = block number 0 … L − 1. All fits are least squares over blocks
and run on all bootstrap draws at once. What cannot be read off a curve (a flat one, arms that do
not cross) is `found=False` with a reason, never a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from lib.stats import Interval, bootstrap_difference, bootstrap_weights, percentile_interval

FloatArray = NDArray[np.float64]

# From 10 % to 90 % of a logistic curve in units of its scale: 2·logit(0.9).
SCALES_10_90 = float(2 * np.log(9))
# One value a block cannot show a switch narrower than this (blocks): the narrowest curve fitted.
NARROWEST = 0.5
# Below this change over the depth a curve counts as flat: it has no place where it switches.
SMALLEST_CHANGE = 0.2

_START_SCALES = 12
_STEPS = 40
_DAMPING = 1e-3
_STIFFEST = 1e3  # no step this short gained anything: at the minimum
_GAIN = 1e-9  # of the squared error: a step that gains less is the last


@dataclass(frozen=True)
class LogisticFit:
    """Logistic curves: low + (high − low)·σ(±(block − centre) / scale), arrays of one shape."""

    low: FloatArray
    high: FloatArray
    centre: FloatArray  # blocks, within 0 … L − 1
    scale: FloatArray  # blocks; width between NARROWEST and L
    falling: bool
    n_blocks: int

    @property
    def width(self) -> FloatArray:
        """Depth between 10 % and 90 % of the change, in blocks: 2·ln 9·scale."""
        return SCALES_10_90 * self.scale

    @property
    def change(self) -> FloatArray:
        """Size of the fitted change between the first and the last block, at least 0."""
        result: FloatArray = np.abs(self.at(self.n_blocks - 1) - self.at(0))
        return result

    def at(self, block: ArrayLike) -> FloatArray:
        """Return the value of each curve at ``block`` (a number, or one a curve)."""
        slope = -1 if self.falling else 1
        place = slope * (np.asarray(block, dtype=np.float64) - self.centre) / self.scale
        result: FloatArray = self.low + (self.high - self.low) * expit(place)
        return result


def fit_logistic(
    curves: ArrayLike, *, falling: bool, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> LogisticFit:
    """Return the least-squares logistic curve of each row, fitted to all rows at once.

    Starts from the best of a grid of centres and scales and goes on by Levenberg-Marquardt steps in
    the four parameters, kept inside their bounds.

    Args:
        curves: ``[n_blocks]`` or ``[n_curves, n_blocks]``, at least four blocks.
        falling: Whether the curve falls with depth.
        bounds: Range of the asymptotes ``low`` and ``high``: (0, 1) for shares, (-1, 1) for
            correlations, None if free.

    Returns:
        Arrays of shape ``[]`` or ``[n_curves]``.

    Raises:
        ValueError: Fewer than four blocks, a value that is not finite.
    """
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] < 4:
        raise ValueError(f"curves must be [n_curves, 4 blocks or more]; got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("curves must be finite at every block.")
    n_blocks = values.shape[-1]
    rows = np.atleast_2d(values)
    lowest, highest = bounds or (-np.inf, np.inf)
    narrow, wide = np.log(NARROWEST / SCALES_10_90), np.log(n_blocks / SCALES_10_90)
    below = np.array([lowest, lowest, 0.0, narrow])
    above = np.array([highest, highest, n_blocks - 1.0, wide])
    parameters = _refine(rows, _start(rows, falling, below, above), falling, below, above)
    low, high, centre, log_scale = parameters.T.reshape(4, *values.shape[:-1])
    return LogisticFit(low, high, centre, np.exp(log_scale), falling, n_blocks)


def _start(rows: FloatArray, falling: bool, below: FloatArray, above: FloatArray) -> FloatArray:
    """Return each row's best (low, high, centre, log scale) on a grid of centres and scales."""
    n_blocks = rows.shape[1]
    centres, log_scales = np.meshgrid(
        np.linspace(below[2], above[2], 2 * n_blocks - 1),
        np.linspace(below[3], above[3], _START_SCALES),
    )
    centre, log_scale = centres.ravel(), log_scales.ravel()
    slope = -1 if falling else 1
    basis = expit(slope * (np.arange(n_blocks) - centre[:, None]) / np.exp(log_scale)[:, None])
    mean = basis.mean(axis=1)
    spread = np.square(basis - mean[:, None]).sum(axis=1)
    covariance = (rows - rows.mean(axis=1, keepdims=True)) @ (basis - mean[:, None]).T
    change = np.clip(covariance / spread, 0, None)
    low = np.clip(rows.mean(axis=1, keepdims=True) - change * mean, below[0], above[0])
    squares = np.square(basis).sum(axis=1)
    product = rows @ basis.T
    change = np.clip((product - low * basis.sum(axis=1)) / squares, 0, above[1] - low)
    error = (
        n_blocks * low**2
        + change**2 * squares
        + 2 * low * change * basis.sum(axis=1)
        - 2 * low * rows.sum(axis=1, keepdims=True)
        - 2 * change * product
    )
    best = error.argmin(axis=1)
    at = np.arange(len(rows))
    low, high = low[at, best], (low + change)[at, best]
    return np.stack([low, high, centre[best], log_scale[best]], axis=1)


def _refine(
    rows: FloatArray, start: FloatArray, falling: bool, below: FloatArray, above: FloatArray
) -> FloatArray:
    """Return the parameters after damped Gauss-Newton steps within the bounds, row by row.

    A row is finished when a step gains it next to nothing, or no step gains it anything.
    """
    blocks = np.arange(rows.shape[1])
    slope = -1 if falling else 1
    result = start.copy()
    active = np.arange(len(rows))
    values, parameters = rows, start.copy()
    damping = np.full(len(rows), _DAMPING)

    def curve(p: FloatArray) -> tuple[FloatArray, FloatArray]:
        place = slope * (blocks - p[:, 2:3]) * np.exp(-p[:, 3:4])
        return p[:, :1] + (p[:, 1:2] - p[:, :1]) * expit(place), place

    fitted, place = curve(parameters)
    error = np.square(values - fitted).sum(axis=1)
    for _ in range(_STEPS):
        share = expit(place)
        steep = (parameters[:, 1:2] - parameters[:, :1]) * share * (1 - share)
        jacobian = np.stack(
            [1 - share, share, -slope * steep * np.exp(-parameters[:, 3:4]), -steep * place], axis=2
        )
        gradient = ((values - fitted)[:, None, :] @ jacobian)[:, 0]
        # A parameter that its bound holds back is left out of the step.
        held = ((parameters <= below) & (gradient < 0)) | ((parameters >= above) & (gradient > 0))
        jacobian *= ~held[:, None, :]
        gradient *= ~held
        normal = jacobian.swapaxes(1, 2) @ jacobian
        diagonal = np.einsum("rpp->rp", normal)
        diagonal += damping[:, None] * (diagonal + 1e-9) + 1e-12 + held
        step = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        trial = np.clip(parameters + step, below, above)
        trial[:, 1] = np.maximum(trial[:, 0], trial[:, 1])
        trial_fitted, trial_place = curve(trial)
        trial_error = np.square(values - trial_fitted).sum(axis=1)
        better = trial_error < error
        finished = np.where(better, error - trial_error <= _GAIN * error, damping >= _STIFFEST)
        parameters[better] = trial[better]
        fitted[better], place[better] = trial_fitted[better], trial_place[better]
        error[better] = trial_error[better]
        damping = np.where(better, damping / 5, damping * 4)
        result[active] = parameters
        going = ~finished
        if not going.any():
            break
        active, values, parameters = active[going], values[going], parameters[going]
        fitted, place, error = fitted[going], place[going], error[going]
        damping = damping[going]
    return result


# --- transition of the two causal arms -----------------------------------------------------------


@dataclass(frozen=True)
class Transition:
    """The switch ℓ* from context to prediction: its block and its 10-90 % width, with intervals.

    Numbers are in blocks and None when no switch was found; ``reason`` then says why.
    """

    found: bool
    reason: str
    n_blocks: int
    n_prompts: int
    block: float | None = None  # where the fitted arms cross
    low: float | None = None
    high: float | None = None
    width: float | None = None  # of the wider of the two arms
    width_low: float | None = None
    width_high: float | None = None
    width_context: float | None = None
    width_prediction: float | None = None
    block_draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)  # [n_draws]
    width_draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)

    def __post_init__(self) -> None:
        if self.found == (self.block is None) or self.found == bool(self.reason):
            raise ValueError("A transition has either a block or a reason why it has none.")

    @property
    def width_share(self) -> Interval | None:
        """The width as a share of the depth L, with its interval; None when not found."""
        if self.width is None or self.width_low is None or self.width_high is None:
            return None
        shares = (self.width / self.n_blocks, self.width_low / self.n_blocks)
        return Interval(*shares, self.width_high / self.n_blocks, self.n_prompts)


def find_transition(
    context: ArrayLike,
    prediction: ArrayLike,
    context_draws: ArrayLike,
    prediction_draws: ArrayLike,
    *,
    n_prompts: int,
    level: float = 0.95,
) -> Transition:
    """Return the block ℓ* where the falling context arm and the rising prediction arm cross.

    A logistic curve is fitted to each arm, with asymptotes within [0, 1]; ℓ* solves
    context(ℓ*) = prediction(ℓ*). Its width is that of the wider arm. Both have percentile intervals
    over the draws, which must come from the same weights for the two arms.

    Args:
        context: ``[n_blocks]`` share of pairs that follow the donor, context arm.
        prediction: ``[n_blocks]``, prediction arm.
        context_draws: ``[n_draws, n_blocks]`` of `pair_share_bootstrap`.
        prediction_draws: The same draws of the prediction arm.
        n_prompts: Prompts behind the curves.
        level: Level of the intervals.

    Returns:
        ``found`` is False, with the reason, when an arm changes by less than `SMALLEST_CHANGE`, the
        arms do not cross, or they do not in more than one draw in twenty.

    Raises:
        ValueError: As `fit_logistic`; draws of the two arms that differ in shape.
    """
    curves = [np.asarray(context, dtype=np.float64), np.asarray(prediction, dtype=np.float64)]
    draws = [np.asarray(d, dtype=np.float64) for d in (context_draws, prediction_draws)]
    n_blocks = len(curves[0])
    expected = (len(draws[0]), n_blocks)
    if curves[1].shape != (n_blocks,) or any(d.shape != expected for d in draws):
        raise ValueError(
            f"Expected curves [n_blocks] and draws [n_draws, n_blocks] of one size; got "
            f"{[a.shape for a in (*curves, *draws)]}."
        )

    def none(reason: str) -> Transition:
        return Transition(found=False, reason=reason, n_blocks=n_blocks, n_prompts=n_prompts)

    falling, rising = fit_logistic(curves[0], falling=True), fit_logistic(curves[1], falling=False)
    for arm, fit in (("context", falling), ("prediction", rising)):
        if fit.change < SMALLEST_CHANGE:
            return none(
                f"the {arm} arm changes by {float(fit.change):.2f} over the depth, "
                f"less than {SMALLEST_CHANGE}"
            )
    block = float(_crossing(falling, rising))
    if np.isnan(block):
        return none("the two arms do not cross")
    defined = np.isfinite(draws[0]).all(axis=1) & np.isfinite(draws[1]).all(axis=1)
    blocks, widths = np.full((2, len(draws[0])), np.nan)
    fits = [
        fit_logistic(draws[0][defined], falling=True),
        fit_logistic(draws[1][defined], falling=False),
    ]
    blocks[defined] = _crossing(*fits)
    widths[defined] = np.maximum(fits[0].width, fits[1].width)
    widths[np.isnan(blocks)] = np.nan
    width = float(max(falling.width, rising.width))
    try:
        place = percentile_interval(block, blocks, n=n_prompts, level=level)
        extent = percentile_interval(width, widths, n=n_prompts, level=level)
    except ValueError:
        share = float(np.isfinite(blocks).mean())
        return none(f"the two arms cross in only {share:.0%} of the bootstrap draws")
    return Transition(
        found=True,
        reason="",
        n_blocks=n_blocks,
        n_prompts=n_prompts,
        block=block,
        low=place.low,
        high=place.high,
        width=width,
        width_low=extent.low,
        width_high=extent.high,
        width_context=float(falling.width),
        width_prediction=float(rising.width),
        block_draws=blocks,
        width_draws=widths,
    )


def _crossing(falling: LogisticFit, rising: LogisticFit) -> FloatArray:
    """Return where the curves meet, by bisection; NaN where they do not between the end blocks."""
    left = np.zeros_like(falling.centre)
    right = np.full_like(left, falling.n_blocks - 1)
    meet = (falling.at(left) > rising.at(left)) & (falling.at(right) < rising.at(right))
    for _ in range(50):
        middle = (left + right) / 2
        before = falling.at(middle) > rising.at(middle)
        left, right = np.where(before, middle, left), np.where(before, right, middle)
    return np.where(meet, (left + right) / 2, np.nan)


# --- width of a single curve, sharp against gradual ----------------------------------------------


@dataclass(frozen=True)
class CurveWidth:
    """The 10-90 % width and the centre of one curve over depth (blocks), with intervals.

    Numbers are None when the curve has no such change; ``reason`` then says why.
    """

    found: bool
    reason: str
    n_blocks: int
    n_items: int
    width: float | None = None
    low: float | None = None
    high: float | None = None
    centre: float | None = None
    centre_low: float | None = None
    centre_high: float | None = None
    draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)  # widths [n_draws]

    def __post_init__(self) -> None:
        if self.found == (self.width is None) or self.found == bool(self.reason):
            raise ValueError("A curve has either a width or a reason why it has none.")


def curve_width(
    curve: ArrayLike,
    draws: ArrayLike,
    *,
    falling: bool,
    n_items: int,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    smallest_change: float = SMALLEST_CHANGE,
    level: float = 0.95,
) -> CurveWidth:
    """Return the 10-90 % width of one curve, a correlation over depth say, from its logistic fit.

    The width is that of the fitted change, whichever asymptotes it runs between. It is at most L: a
    straight line, which has no bend to fit, comes out as wide as the depth.

    Args:
        curve: ``[n_blocks]``.
        draws: ``[n_draws, n_blocks]``, bootstrap over items.
        falling: Whether the curve falls with depth.
        n_items: Items behind the curve.
        bounds: Range of the asymptotes, None if free.
        smallest_change: A curve that changes by less has no width.
        level: Level of the intervals.

    Raises:
        ValueError: As `fit_logistic`.
    """
    fit = fit_logistic(curve, falling=falling, bounds=bounds)
    if fit.change < smallest_change:
        reason = (
            f"the curve {'falls' if falling else 'rises'} by {float(fit.change):.2f} over the "
            f"depth, less than {smallest_change}"
        )
        return CurveWidth(False, reason, fit.n_blocks, n_items)
    samples = np.asarray(draws, dtype=np.float64)
    defined = np.isfinite(samples).all(axis=1)
    fits = fit_logistic(samples[defined], falling=falling, bounds=bounds)
    widths, centres = np.full((2, len(samples)), np.nan)
    widths[defined], centres[defined] = fits.width, fits.centre
    extent = percentile_interval(float(fit.width), widths, n=n_items, level=level)
    place = percentile_interval(float(fit.centre), centres, n=n_items, level=level)
    return CurveWidth(
        found=True,
        reason="",
        n_blocks=fit.n_blocks,
        n_items=n_items,
        width=extent.estimate,
        low=extent.low,
        high=extent.high,
        centre=place.estimate,
        centre_low=place.low,
        centre_high=place.high,
        draws=widths,
    )


def width_difference(geometry: CurveWidth, causal: Transition, *, level: float = 0.95) -> Interval:
    """Return width(geometry) − width(causal) in blocks; above 0: geometry changes more gradually.

    Paired: draw k of both must come from the same item weights.

    Raises:
        ValueError: One of the two was not found, numbers of draws that differ.
    """
    if geometry.width is None or causal.width is None:
        raise ValueError(f"No width to compare: {geometry.reason or causal.reason}.")
    if geometry.draws.shape != causal.width_draws.shape:
        raise ValueError(
            f"Both need the same draws; got {len(geometry.draws)} and {len(causal.width_draws)}."
        )
    return percentile_interval(
        geometry.width - causal.width,
        geometry.draws - causal.width_draws,
        n=causal.n_prompts,
        level=level,
    )


# --- logistic, line or step ----------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeComparison:
    """Held-out log-likelihood (nats per pair and block) of three shapes, differences by prompt."""

    logistic: float
    line: float
    step: float
    logistic_over_line: Interval
    logistic_over_step: Interval
    n_folds: int
    n_prompts: int


def compare_shapes(
    outcome: ArrayLike,
    pairs: ArrayLike,
    *,
    falling: bool,
    rng: np.random.Generator,
    n_folds: int = 5,
    n_draws: int = 1000,
) -> ShapeComparison:
    """Return how well a logistic curve, a straight line and a step predict prompts held out.

    Prompts are dealt into folds. Each shape is fitted by least squares to the shares among pairs
    that have no prompt in the fold, and judged by the binomial log-likelihood of the pairs whose
    recipient is in it. Predicted shares s become (n·s + 1) / (n + 2), n the prompts fitted on, for
    all three alike: no shape may be certain.

    Args:
        outcome: ``[n_blocks, n_pairs]``, 0 or 1.
        pairs: ``[n_pairs, 2]`` prompts: recipient, donor; or ``[n_pairs]``, recipients alone.
        falling: Whether the arm falls with depth.
        rng: Deals the folds and draws the bootstrap.
        n_folds: Folds over prompts.
        n_draws: Bootstrap draws over recipients for the intervals.

    Raises:
        ValueError: Shapes that do not fit, outcomes other than 0 and 1, too few prompts.
    """
    flips = np.asarray(outcome, dtype=np.float64)
    members = np.asarray(pairs, dtype=np.int64).reshape(len(np.asarray(pairs)), -1)
    if flips.ndim != 2 or flips.shape[1] != len(members) or not np.isin(flips, (0, 1)).all():
        raise ValueError(f"outcome must be 0 or 1, [n_blocks, {len(members)}]; got {flips.shape}.")
    prompts, codes = np.unique(members, return_inverse=True)
    codes = codes.reshape(members.shape)
    if len(prompts) < 2 * n_folds:
        raise ValueError(f"{n_folds} folds need {2 * n_folds} prompts or more; got {len(prompts)}.")
    fold_of = rng.permutation(np.arange(len(prompts)) % n_folds)
    score = np.full((3, len(members)), np.nan)
    for fold in range(n_folds):
        inside = fold_of[codes] == fold
        train, test = ~inside.any(axis=1), inside[:, 0]
        if not train.any():
            raise ValueError(f"No pair is left to fit on without fold {fold}; use more folds.")
        n_fitted = len(np.unique(codes[train]))
        shapes = np.clip(_shapes(flips[:, train].mean(axis=1), falling), 0, 1)
        chance = (n_fitted * shapes + 1) / (n_fitted + 2)
        hits = flips[:, test]
        score[:, test] = (np.log(chance) @ hits + np.log1p(-chance) @ (1 - hits)) / len(flips)
    recipients, rows = np.unique(codes[:, 0], return_inverse=True)
    means = np.stack([np.bincount(rows, weights=s) / np.bincount(rows) for s in score])
    weights = bootstrap_weights(len(recipients), n_draws, rng)
    return ShapeComparison(
        logistic=float(means[0].mean()),
        line=float(means[1].mean()),
        step=float(means[2].mean()),
        logistic_over_line=bootstrap_difference(means[0], means[1], weights),
        logistic_over_step=bootstrap_difference(means[0], means[2], weights),
        n_folds=n_folds,
        n_prompts=len(prompts),
    )


def _shapes(curve: FloatArray, falling: bool) -> FloatArray:
    """Return the least-squares logistic curve, line and step of a curve, ``[3, n_blocks]``."""
    n_blocks = len(curve)
    blocks = np.arange(n_blocks)
    fit = fit_logistic(curve, falling=falling)
    line = np.polyval(np.polyfit(blocks, curve, 1), blocks)
    steps = [
        np.where(blocks < cut, curve[:cut].mean(), curve[cut:].mean()) for cut in range(1, n_blocks)
    ]
    step = min(steps, key=lambda candidate: float(np.square(curve - candidate).sum()))
    return np.stack([fit.at(blocks), line, step])
