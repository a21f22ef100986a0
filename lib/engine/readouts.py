"""Readouts: what an edit did to the whole next-token distribution, as measures for a sweep.

A measure (`lib.engine.sweeps.Measure`) sees the edited logits of a bounded chunk of rows and
returns one number a row, so that no sweep has to keep logits over the full vocabulary. Like an edit
it is a frozen dataclass, whose fields are its key in the store. p is the unedited distribution, q
the edited one; everything is computed in float64, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 32
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
_NEWTON_STEPS = 40
_NEWTON_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class DistributionMeasure:
    """A measure of how far, and in what way, edited predictions lie from given ones.

    Called with logits `[n_rows, d_vocab]` and the rows' pairs `[n_rows]`. p is the unedited
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
