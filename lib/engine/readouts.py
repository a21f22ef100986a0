"""Readouts: what an edit did to the whole next-token distribution, as measures for a sweep.

A measure (`lib.engine.sweeps.Measure`) sees the edited logits of a bounded chunk of rows and
returns one number a row, so that no sweep has to keep logits over the full vocabulary. Like an edit
it is a frozen dataclass, whose fields are its key in the store, with this module's code alone: so
nothing of lib is imported here. Divergences are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE, TERMS_AT_ONCE = 16, 8
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
_NEWTON_STEPS = 40
_NEWTON_TOLERANCE = 1e-8


def sum_tokens(terms: Tensor) -> Tensor:
    """Return sums over a vocabulary `[n_rows]`, float64, of float32 terms `[n_rows, d_vocab]`.

    Of eight terms at a time in float32, of their sums in float64: little less exact than float64
    throughout, since the terms are rounded themselves, and twice as fast.
    """
    whole = terms.shape[-1] // TERMS_AT_ONCE * TERMS_AT_ONCE
    parts = terms[:, :whole].reshape(len(terms), TERMS_AT_ONCE, -1).sum(1)
    rest = terms[:, whole:].sum(-1, dtype=torch.float64)
    return parts.sum(-1, dtype=torch.float64) + rest


@dataclass(frozen=True, eq=False)
class Distributions:
    """Next-token distributions that others are compared with.

    Attributes:
        p: probabilities `[n, d_vocab]`, float32.
        negative_entropy: Σ p log p in nats `[n]`, float64.
    """

    p: Tensor
    negative_entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Distributions":
        """Return the softmax of logits, or of log-probabilities, `[n, d_vocab]`."""
        p, total = torch.empty(logits.shape), torch.empty(len(logits), dtype=torch.float64)
        for rows in torch.arange(len(logits)).split(ROWS_AT_ONCE):
            log_p = torch.log_softmax(logits[rows].cpu().double(), -1)
            own = log_p.exp()
            p[rows], total[rows] = own.float(), (own * log_p).sum(-1)
        return cls(p, total)


@dataclass(frozen=True, eq=False)
class Divergences:
    """The measure of a sweep: KL(p_k ‖ q) for one or several distributions k.

    Attributes:
        distributions: all p_k.
        rows: by name, which of them each pair is compared with `[n_pairs]`.
    """

    distributions: Distributions
    rows: Mapping[str, np.ndarray]

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        """Return nats by name `[n_rows]`, to 10⁻⁶ for float32 logits `[n_rows, d_vocab]`."""
        parts = zip(logits.split(ROWS_AT_ONCE), pair.split(ROWS_AT_ONCE), strict=True)
        found = [self._divergences(part.cpu(), own.cpu().numpy()) for part, own in parts]
        return {name: torch.cat([one[name] for one in found]) for name in self.rows}

    def where(self, pairs: np.ndarray) -> "Divergences":
        """Return the measure of some of the pairs, by index."""
        return replace(self, rows={name: rows[pairs] for name, rows in self.rows.items()})

    def _divergences(self, logits: Tensor, pair: np.ndarray) -> dict[str, Tensor]:
        z = logits - logits.amax(-1, keepdim=True)
        p, negative_entropy = self.distributions.p, self.distributions.negative_entropy
        found = {}
        for name, rows in self.rows.items():
            own = torch.as_tensor(rows[pair])
            found[name] = negative_entropy[own] - sum_tokens(p[own].mul_(z))
        normaliser = sum_tokens(z.exp_()).log()
        return {name: (rest + normaliser).clamp(min=0) for name, rest in found.items()}


@dataclass(frozen=True, eq=False)
class WithChoice:
    """KL(p_y ‖ q) in nats, and the closed set's choice."""

    divergences: Divergences
    answer_ids: np.ndarray

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        """Return nats, and `choice`, the closed set's largest logit's place in it `[n_rows]`."""
        answers = logits[:, torch.as_tensor(self.answer_ids, device=logits.device)]
        return {**self.divergences(logits, pair), "choice": answers.argmax(-1)}


@dataclass(frozen=True, eq=False)
class ProbabilityMoved:
    """The measure of a sweep: what happened to the next token's probabilities.

    Attributes:
        before: unedited next-token probabilities `[n_recipients, d_vocab]`, float32.
        recipient: index into them of each row `[n_rows]`.
        source: the token of the recipient's answer `[n_rows]`.
        target: the token of the target's `[n_rows]`.
    """

    before: Tensor
    recipient: np.ndarray
    source: np.ndarray
    target: np.ndarray

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        """Return `gained` Δp_target, `lost` −Δp_source and `moved`, the total variation.

        Each `[n_rows]`, float64, to 10⁻⁶, of edited logits `[n_rows, d_vocab]`.
        """
        parts = zip(logits.split(ROWS_AT_ONCE), pair.split(ROWS_AT_ONCE), strict=True)
        found = [self._moved(part, own.cpu().numpy()) for part, own in parts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _moved(self, logits: Tensor, row: np.ndarray) -> dict[str, Tensor]:
        logits = logits.cpu()
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        change = weights.div_(sum_tokens(weights).float()[:, None])
        change -= self.before[torch.as_tensor(self.recipient[row])]
        at = torch.arange(len(row))
        return {
            "gained": change[at, torch.as_tensor(self.target[row])].double(),
            "lost": -change[at, torch.as_tensor(self.source[row])].double(),
            "moved": sum_tokens(change.abs_()) / 2,
        }


@dataclass(frozen=True, eq=False)
class DistributionMeasure:
    """The measure of a sweep: how far, and in what way, edited predictions lie from given ones.

    In float64 throughout, where `Divergences` is to 10⁻⁶ nats and much faster. p is the unedited
    distribution of the pair's reference: its recipient, to see what the edit did, or its donor, to
    see what is missing of the donor's prediction. It returns, by name:

    - `kl_nats`: KL(p‖q), at least 0.
    - with `temperature`, `temperature`, the T by which the edit divided the logits, as near as one
      number tells, and `kl_left_nats`, how much of the KL no T accounts for; at most `kl_nats`.

    Attributes:
        clean_logits: the prompts' unedited logits `[n_prompts, d_vocab]`, as
            `extract_residuals(..., logits=True)` returns them.
        references: index of each pair's reference among the prompts `[n_pairs]`, such as
            `pairs[:, 0]`, the recipients.
        temperature: also fit a temperature, which costs several times the rest.

    Raises:
        ValueError: shapes that do not fit, or logits that are not finite.
    """

    clean_logits: Tensor
    references: Sequence[int] | np.ndarray
    temperature: bool = False

    def __post_init__(self) -> None:
        _check(self.clean_logits, self._rows)

    def __call__(self, logits: Tensor, pair: Tensor) -> Mapping[str, Tensor]:
        """Return the named numbers `[n_rows]`, float64, on the CPU."""
        parts = [
            self._read(logits[part], pair[part].cpu())
            for part in torch.arange(len(pair)).split(ROWS_AT_ONCE)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @property
    def _rows(self) -> Tensor:
        return torch.as_tensor(np.asarray(self.references, dtype=np.int64))

    def _read(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        reference, index = torch.unique(self._rows[pair], return_inverse=True)
        log_p = torch.log_softmax(self.clean_logits[reference].cpu().double(), dim=-1)
        p = log_p.exp()
        entropy_p = -(p * log_p).sum(-1)[index]
        z = logits.cpu().double()
        z = z - z.amax(-1, keepdim=True)
        mean_p = z.new_empty(len(z))  # of z, under p: one matrix-vector product a reference
        for number in range(len(reference)):
            own = index == number
            mean_p[own] = z[own] @ p[number]
        result = {"kl_nats": (z.logsumexp(-1) - mean_p - entropy_p).clamp(min=0)}
        if self.temperature:
            fitted, left = _fit_temperature(z, mean_p, entropy_p)
            result |= {"temperature": fitted, "kl_left_nats": left}
        return result


def _fit_temperature(z: Tensor, wanted: Tensor, entropy_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the temperature that an edit amounts to, and the KL that it leaves unexplained.

    If the edited logits are z/T, z those of p, then softmax(T · edited logits) is p again. The
    temperature is the T that minimises KL(p‖softmax(T · logits)), a convex problem: the T at which
    the mean logit under softmax(T · logits) is that under p. Above 1 the edit flattened the
    distribution, below 1 it sharpened it. At T = 1 the KL is that of the edit, so what is left is
    never more. T is kept within [0.01, 100].

    Args:
        z: the edited logits less each row's largest `[n, d_vocab]`, float64.
        wanted: their mean under p, the unedited prediction `[n]`.
        entropy_p: the entropy of p `[n]`.

    Returns:
        Temperatures `[n]` and the KL left over `[n]` in nats, float64.
    """
    fitted, left = torch.empty_like(wanted), torch.empty_like(wanted)
    for row, goal in enumerate(wanted.tolist()):  # rows differ in the number of steps they need
        fitted[row] = _fit_row(z[row], goal)
        left[row] = torch.logsumexp(fitted[row] * z[row], 0) - fitted[row] * goal
    return fitted, (left - entropy_p).clamp(min=0)


def _fit_row(z: Tensor, wanted: float) -> float:
    """Return the T at which the mean of z `[d_vocab]` under softmax(T · z) is the one wanted."""
    powers = torch.stack([torch.ones_like(z), z, z * z])
    low, high, fitted = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, 1.0
    for _ in range(_NEWTON_STEPS):
        total, first, second = (powers @ (fitted * z).exp_()).tolist()
        mean = first / total
        slope, curvature = mean - wanted, second / total - mean**2
        if slope == 0:
            break
        low, high = (fitted, high) if slope < 0 else (low, fitted)
        step = fitted - slope / curvature if curvature > 0 else fitted
        # Outside the bracket Newton's step is replaced by a bisection of its logarithm.
        step = step if low < step < high else (low * high) ** 0.5
        moved, fitted = abs(step - fitted) / fitted, step
        if moved < _NEWTON_TOLERANCE:
            break
    return fitted


def _check(clean_logits: Tensor, rows: Tensor) -> None:
    if clean_logits.dim() != 2 or not bool(torch.isfinite(clean_logits).all()):
        raise ValueError(
            f"Clean logits must be finite, [n_prompts, d_vocab]; got {tuple(clean_logits.shape)}."
        )
    if rows.dim() != 1 or len(rows) == 0 or int(rows.min()) < 0:
        raise ValueError(f"References must be indices [n_pairs]; got shape {tuple(rows.shape)}.")
    if int(rows.max()) >= len(clean_logits):
        raise ValueError(
            f"References go up to {int(rows.max())}, but there are {len(clean_logits)} prompts."
        )
