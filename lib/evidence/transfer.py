"""Transfer: how much of the donor's prediction an edit of the recipient brings through.

T = 1 − Σ KL(p_y ‖ p_edited) / Σ KL(p_y ‖ p_x), sums over the pairs of the units drawn, p over the
full vocabulary at the last token. 0: nothing happened; 1: the donor's prediction came through
whole; below 0: further from it than before. It needs no right answer and no gate, so a model and
its untrained twins are measured on the same pairs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lib.engine.edits import Edit, exchange
from lib.engine.extraction import Positions, check_blocks, logit_lens
from lib.engine.models import Decoder
from lib.engine.readouts import ROWS_AT_ONCE, Distributions, Divergences
from lib.engine.replay import Forest
from lib.engine.store import recall_residuals, recall_sweeps
from lib.engine.sweeps import Request
from lib.evidence.tasks import Pairs, Task, exchange_pairs
from lib.science.estimate import (
    FEWEST_UNITS,
    Measured,
    Untested,
    mean_over_units,
    means_by_unit,
    ratio_of_sums,
    sums_by_unit,
)

Site = Literal["subject", "last", "between"]
Arm = Literal["context arm", "prediction arm"]
ARMS: Mapping[Arm, Site] = {"context arm": "subject", "prediction arm": "last"}
GATE = 0.8
STATES_AT_ONCE = 256
LEAST_DIVERGENCE = 1e-9
"""Nats; below it donor and recipient predict the same, and nothing can be transferred."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A task as one model reads it.

    Attributes:
        task: the task.
        decoder: the model.
        last_states: residual streams after the last block at the last token `[n_prompts, d_model]`.
        forests: prompts, its own among them, that were run and are not to be run again.
    """

    task: Task
    decoder: Decoder
    last_states: Tensor
    forests: list[Forest] = field(default_factory=list)

    @property
    def logits(self) -> Tensor:
        """Next-token logits after each prompt `[n_prompts, d_vocab]`, computed at each call."""
        return logit_lens(self.decoder, self.last_states)

    def logits_after(self, rows: np.ndarray) -> Tensor:
        """Return next-token logits after some of the prompts `[n_rows, d_vocab]`."""
        return logit_lens(self.decoder, self.last_states[torch.as_tensor(rows)])

    @cached_property
    def certainty(self) -> np.ndarray:
        """Entropy (nats) and top-1 log-probability of each prediction `[n_prompts, 2]`."""
        parts = self.last_states.split(STATES_AT_ONCE)
        return np.concatenate([certainty(logit_lens(self.decoder, part)) for part in parts])

    @property
    def choice(self) -> np.ndarray:
        """Which answer of the closed set has the largest logit `[n_prompts]`."""
        closed = logit_lens(self.decoder, self.last_states, self.task.answer_ids.tolist())
        return closed.numpy().argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the choice is the right answer `[n_prompts]`."""
        right: np.ndarray = self.choice == self.task.answer_index
        return right

    @property
    def accuracy(self) -> float:
        """The share of prompts that are answered rightly."""
        return float(self.correct.mean())

    @property
    def able_groups(self) -> list[str]:
        """The task's groups whose accuracy is at least 0.8; [""] or [] where there are none."""
        share = self.task.prompts.assign(correct=self.correct).groupby("group")["correct"].mean()
        return [str(group) for group, value in share.items() if value >= GATE]

    @property
    def gate(self) -> Untested | None:
        """Why nothing can be said of right answers; None where the model is able to do the task."""
        if self.able_groups:
            return None
        return Untested(f"accuracy {self.accuracy:.2f}, {GATE} is needed")

    def states(self, site: Literal["subject", "last"]) -> Tensor:
        """Return the residual streams at one site `[n_blocks, n_prompts, d_model]`."""
        where: Positions = self.task.subject_positions if site == "subject" else "last"
        return recall_residuals(
            self.decoder, self.task.tokens, positions=where, forests=self.forests
        ).states


def certainty(logits: Tensor) -> np.ndarray:
    """Return entropy (nats) and top-1 log-probability `[n, 2]` of logits `[n, d_vocab]`.

    A few rows at a time: in float64 a large vocabulary would take most of the memory.
    """
    found = []
    for part in logits.split(ROWS_AT_ONCE):
        log_p = torch.log_softmax(part.double(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        found.append(torch.stack([entropy, log_p.amax(-1)], dim=1).numpy())
    return np.concatenate(found)


def read_tasks(
    decoder: Decoder, tasks: Mapping[str, Task | Untested]
) -> dict[str, Trial | Untested]:
    """Return each task as the model reads it, in passes of all; what was untested stays so."""
    tokens = [ids for task in tasks.values() if isinstance(task, Task) for ids in task.tokens]
    last, forests = None, list[Forest]()
    if tokens:
        read = recall_residuals(decoder, tokens, forests=forests, description="prompts")
        last = read.states[-1]
    result: dict[str, Trial | Untested] = {}
    first = 0
    for name, task in tasks.items():
        if isinstance(task, Untested):
            result[name] = task
            continue
        assert last is not None
        own = last[first : first + task.n_prompts].clone()
        result[name] = Trial(task, decoder, own, forests)
        first += task.n_prompts
    return result


def choose_pairs(trial: Trial | Untested, *, n_donors: int = 1) -> Pairs | Untested:
    """Return the task's pairs, of all prompts, or of the groups that pass the gate.

    Transfer needs no right answers. But a task with groups (the offsets of month arithmetic) is
    measured on those that the model masters, and not at all without one.
    """
    if isinstance(trial, Untested):
        return trial
    grouped = bool((trial.task.prompts["group"] != "").any())
    if grouped and trial.gate is not None:
        return trial.gate
    groups = trial.able_groups if grouped else None
    pairs = exchange_pairs(trial.task, n_donors=n_donors, groups=groups)
    if (n_units := len(np.unique(pairs.unit))) < FEWEST_UNITS:
        return Untested(f"donors of another answer for {n_units} subjects")
    return pairs


def needed_rows(*pairs: Pairs) -> np.ndarray:
    """Return the prompts of the pairs, each once, ascending."""
    return np.unique(np.concatenate([own.prompts for own in pairs]))


def needed_prompts(task: Task, *pairs: Pairs) -> tuple[Task, list[Pairs]]:
    """Return the task with only the prompts that the pairs need, and the pairs numbered in it."""
    rows = needed_rows(*pairs)
    prompts = task.prompts.iloc[rows].reset_index(drop=True)
    return replace(task, prompts=prompts), [
        replace(own, prompts=np.searchsorted(rows, own.prompts)) for own in pairs
    ]


@dataclass(frozen=True, eq=False)
class Transfer:
    """What an edit did to every pair, by block.

    Attributes:
        blocks: after which the edit was made.
        after: KL(p_y ‖ p_edited) in nats `[n_blocks, n_pairs]`.
        before: KL(p_y ‖ p_x) in nats `[n_pairs]`.
        choice: the closed set's largest logit after the edit, an answer `[n_blocks, n_pairs]`.
        target: the donor's right answer `[n_pairs]`.
        unit: the recipient's subject `[n_pairs]`.
        units: what the units are called.
        n_units: how many there are.
    """

    blocks: tuple[int, ...]
    after: np.ndarray
    before: np.ndarray
    choice: np.ndarray
    target: np.ndarray
    unit: np.ndarray
    units: str
    n_units: int

    def estimate(self) -> Measured:
        """Return T at each block, drawn over units."""
        units = np.unique(self.unit)
        below = sums_by_unit(self.before, self.unit)
        if len(units) < 3:
            return Untested(f"pairs of {len(units)} subjects")
        if below.sum() < LEAST_DIVERGENCE * len(self.before):
            return Untested("the predictions are all alike")
        above = sums_by_unit(self.after, self.unit)
        both = np.broadcast_to(below[:, None], above.shape)
        return ratio_of_sums(both - above, both, name_units(self, units))

    def where(self, pairs: np.ndarray | slice, blocks: Sequence[int] | None = None) -> "Transfer":
        """Return the transfer of some of the pairs, at some of the blocks; all by default."""
        chosen = self.blocks if blocks is None else tuple(blocks)
        rows = [self.blocks.index(block) for block in chosen]
        return replace(
            self,
            blocks=chosen,
            after=self.after[rows][:, pairs],
            before=self.before[pairs],
            choice=self.choice[rows][:, pairs],
            target=self.target[pairs],
            unit=self.unit[pairs],
        )

    def flip_rate(self) -> Measured:
        """Return the share of pairs whose choice became the donor's answer, a mean over units."""
        flipped = means_by_unit(self.choice == self.target, self.unit)
        return mean_over_units(flipped, name_units(self, np.unique(self.unit)), share=True)


def name_units(whole: Task | Transfer, units: np.ndarray) -> str:
    """Return what units are called; a part of them is told from the whole, and from other parts."""
    if len(units) == whole.n_units:
        return whole.units
    return f"{whole.units} ({hashlib.sha256(units.tobytes()).hexdigest()[:8]})"


def measure_transfer(trial: Trial, pairs: Pairs, site: Site) -> Transfer:
    """Return what an exchange at `site` does to every pair, after each block."""
    return measure_transfers({"": trial}, {"": pairs}, site)[""]


def measure_transfers(
    trials: Mapping[str, Trial],
    pairs: Mapping[str, Pairs],
    site: Site,
    *,
    donors: Mapping[str, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
) -> dict[str, Transfer]:
    """Return by task what an exchange at `site` does to every pair: `measure_sites` of one site."""
    given = None if donors is None else {site: donors}
    return measure_sites(trials, pairs, [site], donors=given, blocks=blocks)[site]


def measure_sites(
    trials: Mapping[str, Trial],
    pairs: Mapping[str, Pairs],
    sites: Sequence[Site],
    *,
    edit: Edit = exchange,
    donors: Mapping[Site, Mapping[str, Tensor]] | None = None,
    blocks: Sequence[int] | None = None,
    description: str | None = None,
) -> dict[Site, dict[str, Transfer]]:
    """Return by site and task what an edit there does to every pair, after each block.

    Sites with as many tokens a prompt share a sweep: their prompts are run once.

    Args:
        trials: tasks as one model reads them.
        pairs: recipients and donors, by task.
        sites: `"last"`: the last token; `"subject"`: the last of the subject's tokens; `"between"`:
            from the subject to the last token but one, of the pairs whose tokens line up.
        edit: what is done there.
        donors: what the edit takes, one a pair `[n_blocks, n_pairs, d_model]` in the order of
            `blocks`, by site and task; by default the donor prompt's own state at the site.
        blocks: after which to edit, all by default.
        description: what a progress display calls this.

    Raises:
        ValueError: as `lib.engine.sweeps.sweep_blocks`.
    """
    if not pairs:
        return {site: {} for site in sites}
    decoder = trials[next(iter(pairs))].decoder
    wanted = check_blocks(decoder, blocks)
    planned: dict[tuple[Site, str], tuple[Pairs, np.ndarray, list[np.ndarray]]] = {}
    requests: dict[tuple[Site, str, int], Request] = {}
    for name, own in pairs.items():
        task, used = trials[name].task, np.unique(own.prompts)
        logits = trials[name].logits_after(used)
        donating = np.unique(own.prompts[:, 1])
        known = Distributions.of(logits[torch.as_tensor(np.searchsorted(used, donating))])
        for site in sites:
            mirror = edit == exchange and donors is None
            kept, found = _classes(task, own, site, mirror)
            toward = np.searchsorted(donating, kept.prompts[:, 1])
            measure = Divergences(known, {"kl_nats": toward})
            recipients = np.searchsorted(used, kept.prompts[:, 0])
            clean = divergence_before(measure, logits, recipients)
            planned[site, name] = kept, clean, [rows for _, rows, _ in found]
            for number, (positions, rows, mirrored) in enumerate(found):
                asked = kept.prompts[rows]
                swept, states = asked[:, ::-1] if mirrored else asked, None
                if donors is not None:
                    swept = np.stack([asked[:, 0], np.arange(len(asked))], axis=1)
                    states = donors[site][name][:, torch.as_tensor(rows)]
                requests[site, name, number] = Request(
                    task.tokens,
                    swept,
                    positions,
                    states,
                    task.answer_ids.tolist(),
                    measure.where(rows),
                )
    sweeps = recall_sweeps(
        decoder,
        requests,
        {"edit": edit},
        blocks=wanted,
        forests=trials[next(iter(pairs))].forests,
        description=description,
    )
    result: dict[Site, dict[str, Transfer]] = {site: {} for site in sites}
    for (site, name), (own, clean, parts) in planned.items():
        task = trials[name].task
        after = np.empty((len(wanted), len(own)))
        choice = np.empty((len(wanted), len(own)), dtype=np.int64)
        for number, rows in enumerate(parts):
            sweep = sweeps[site, name, number]
            after[:, rows] = sweep.measures["kl_nats"][0]
            choice[:, rows] = sweep.logits[0].argmax(-1)
        target = task.answer_index[own.prompts[:, 1]]
        result[site][name] = Transfer(
            wanted, after, clean, choice, target, own.unit, task.units, task.n_units
        )
    return result


def divergence_before(measure: Divergences, logits: Tensor, recipients: np.ndarray) -> np.ndarray:
    """Return `kl_nats` of all pairs before any edit, from rows of logits `[n_pairs]`."""
    rows = torch.arange(len(recipients)).split(ROWS_AT_ONCE)
    parts = [measure(logits[recipients[part.numpy()]], part)["kl_nats"] for part in rows]
    return torch.cat(parts).numpy()


def from_donors(logits: Tensor, donors: np.ndarray) -> Divergences:
    """Return the measure `kl_nats` from pairs' donors `[n_pairs]`, rows of logits."""
    unique, place = np.unique(donors, return_inverse=True)
    return Divergences(Distributions.of(logits[torch.as_tensor(unique)]), {"kl_nats": place})


def _classes(
    task: Task, pairs: Pairs, site: Site, mirror: bool
) -> tuple[Pairs, list[tuple[np.ndarray, np.ndarray, bool]]]:
    """Return the pairs that line up, and classes of them: positions, rows, whether mirrored.

    An exchange that ends before the last token is mirrored where donor and recipient begin alike:
    the recipient with the donor's states up to token t *is* the donor's prompt with the recipient's
    states from t + 1 on. That leaves fewer tokens to run.
    """
    tokens, end = task.tokens, task.subject_positions
    start = task.prompts["subject_start"].to_numpy()
    last = np.array([len(prompt) - 1 for prompt in tokens])
    if site == "last":
        return pairs, [(last[:, None], np.arange(len(pairs)), False)]
    x, y = pairs.prompts.T
    alike = [tokens[i][: start[i]] == tokens[j][: start[j]] for i, j in pairs.prompts]
    in_line = np.array(alike) & (end[x] == end[y]) & (last[x] == last[y])
    if site == "subject":
        mirrored = in_line & (start[x] == end[x]) & mirror
    elif mirror:
        pairs = pairs.where(in_line)
        x, mirrored = pairs.prompts[:, 0], np.ones(len(pairs), dtype=bool)
    else:
        raise ValueError(f"At {site!r} only an exchange of the donor's own states is measured.")
    rest = last[x] - (last[x] - 1 if site == "between" else end[x])  # tokens left of the recipient
    classes = [
        (
            np.maximum(last[:, None] - np.arange(n)[::-1], 1),
            np.flatnonzero(mirrored & (rest == n)),
            True,
        )
        for n in np.unique(rest[mirrored])
    ]
    if not mirrored.all():
        classes.append((end[:, None], np.flatnonzero(~mirrored), False))
    return pairs, classes
