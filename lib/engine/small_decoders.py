"""Small decoders trained from scratch, equal but for their norms.

Llama's architecture with the norm modules replaced, in two sizes. At one seed all kinds start from
the same weights and read the same prompts in the same order. What was trained before is read from
disk; what was interrupted goes on from its last moment.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lib.engine.files import BUILD, taking_the_place_of
from lib.engine.keys import key_of
from lib.engine.progress import track

KEPT = BUILD / "decoders"
BATCH = 64
N_HEADS = 4


@dataclass(frozen=True)
class Size:
    """How large a decoder is, and how it is trained.

    Rate and initial scale were chosen by the loss of a few networks that are not reported: with
    both of them every kind learns.

    Attributes:
        width: of the residual stream; the MLP's is twice that.
        n_blocks: how many blocks.
        learning_rate: of Adam, at its peak: a linear rise, then half a cosine down to zero.
        initial_std: standard deviation of the initial weights, embeddings included.
        moments: training steps at which the weights are kept; the last one ends the training.
    """

    width: int = 64
    n_blocks: int = 6
    learning_rate: float = 5e-3
    initial_std: float = 0.12
    moments: tuple[int, ...] = (0, 60, 120, 180, 240, 300, 420, 720)

    def __post_init__(self) -> None:
        ascending = sorted(set(self.moments))
        if not ascending or list(self.moments) != ascending or ascending[0] < 0:
            raise ValueError(f"Moments must ascend from 0 or later; got {self.moments}.")


SMALL = Size()
LARGE = Size(128, 8, 2.5e-3, 0.085, (0, 120, 240, 360, 480, 600, 840, 1440))

_drawing = Lock()  # torch's random state is one for all threads
_WARM_UP = 0.1  # share of the steps
_CLIPPED = 1.0  # largest norm of a gradient


KINDS = ("rmsnorm", "layernorm", "no-final-norm", "none")
"""Kinds of decoders by their norms: in the blocks and before the unembedding RMSNorm, or LayerNorm;
RMSNorm in the blocks alone; none at all."""


@dataclass(frozen=True, eq=False)
class Material:
    """What a decoder is trained on: prompts of one length and the truth about their next token.

    Attributes:
        tokens: token ids `[n_prompts, length]`, int64.
        truths: next-token probabilities `[n_prompts, d_vocab]`, float32.
    """

    tokens: Tensor
    truths: Tensor

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.truths.dim() != 2 or len(self.tokens) != len(self.truths):
            raise ValueError(
                f"Expected tokens [n, length] and truths [n, d_vocab] of the same n; got shapes "
                f"{tuple(self.tokens.shape)} and {tuple(self.truths.shape)}."
            )
        if not bool(((self.truths.sum(-1) - 1).abs() < 1e-4).all()):
            raise ValueError("Truths must be probabilities: each row sums to 1.")


@dataclass(frozen=True, eq=False)
class Training:
    """A decoder's course of training.

    Attributes:
        kind: of `KINDS`.
        seed: of the initial weights and of the prompts' order.
        size: of the decoder.
        losses: KL(truth ‖ model) in nats of each step's batch, before the step `[n_steps]`. A
            training that diverged ends with the first loss that is not finite.
        weights: by moment, in steps, the model's tensors.
    """

    kind: str
    seed: int
    size: Size
    losses: NDArray[np.float64]
    weights: Mapping[int, Mapping[str, Tensor]]

    @property
    def diverged(self) -> bool:
        """Whether the training ended early, at a loss that was not finite."""
        return len(self.losses) > 0 and not bool(np.isfinite(self.losses[-1]))

    def model(self, moment: int | None = None) -> LlamaForCausalLM:
        """Return the decoder at a moment, by default the last, in evaluation mode.

        Raises:
            ValueError: no weights were kept at that moment.
        """
        moment = max(self.weights, default=0) if moment is None else moment
        if moment not in self.weights:
            kept = ", ".join(map(str, self.weights)) or "none"
            raise ValueError(f"No weights were kept at step {moment}; there are: {kept}.")
        embedded = self.weights[moment]["model.embed_tokens.weight"]
        model = new_model(self.kind, self.seed, self.size, d_vocab=len(embedded))
        model.load_state_dict(self.weights[moment])
        return model.eval()


def new_model(kind: str, seed: int, size: Size = SMALL, *, d_vocab: int) -> LlamaForCausalLM:
    """Return an untrained decoder of a kind; matrices are normal, norms start as the identity.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of norm {kind!r}; known are: {', '.join(KINDS)}.")
    named: dict[str, Any] = {"name_or_path": f"{kind}, seed {seed}"}
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.n_blocks,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        **named,
    )
    with _drawing, torch.random.fork_rng(devices=[]):  # Llama draws weights, which are replaced
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, size.initial_std, generator=generator)
    for block in model.model.layers:
        block.input_layernorm = _norm(kind, block.input_layernorm)
        block.post_attention_layernorm = _norm(kind, block.post_attention_layernorm)
    model.model.norm = nn.Identity() if kind == "no-final-norm" else _norm(kind, model.model.norm)
    return model


def _norm(kind: str, given: nn.Module) -> nn.Module:
    if kind == "layernorm":
        return nn.LayerNorm(given.weight.shape, eps=1e-6)
    return nn.Identity() if kind == "none" else given


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def train(
    kind: str,
    seed: int,
    material: Material,
    *,
    size: Size = SMALL,
    folder: Path | None = None,
) -> Training:
    """Return a trained decoder, reading from `folder` what was trained before.

    On one thread, so that the bits do not depend on how many there are. In a folder that cannot be
    written nothing is kept, and the result is returned all the same.

    Args:
        kind: of `KINDS`.
        seed: of the initial weights and of the prompts' order.
        material: prompts and truths.
        size: of the decoder, and how it is trained.
        folder: where trainings are kept; None keeps nothing.

    Raises:
        ValueError: an unknown kind.
    """
    model = new_model(kind, seed, size, d_vocab=material.truths.shape[1])
    path = None if folder is None else folder / f"{_key(kind, seed, material, size)}.safetensors"
    moments = size.moments
    adam = torch.optim.Adam(model.parameters(), lr=size.learning_rate, fused=True)
    losses, weights = ([], {}) if path is None else _read(path, model, adam)
    entropies = torch.special.entr(material.truths).sum(-1)
    while not losses or np.isfinite(losses[-1]):
        step = len(losses)
        if step in moments and step not in weights:
            weights[step] = {name: value.clone() for name, value in model.state_dict().items()}
            _write(path, losses, weights, adam if step < moments[-1] else None)
        if step >= moments[-1]:
            break
        rows = np.random.default_rng([seed, step]).integers(len(material.tokens), size=BATCH)
        answers = model(material.tokens[rows], use_cache=False, logits_to_keep=1).logits[:, -1]
        scored = (material.truths[rows] * torch.log_softmax(answers, -1)).sum(-1)
        loss = (-scored - entropies[rows]).mean()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            _write(path, losses, weights, None)
            break
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIPPED)
        for group in adam.param_groups:
            group["lr"] = size.learning_rate * _schedule(step, moments[-1])
        adam.step()
    return Training(kind, seed, size, np.array(losses, dtype=np.float64), weights)


def train_all(
    kinds: Sequence[str],
    seeds: Sequence[int],
    material: Material,
    *,
    size: Size = SMALL,
    folder: Path | None = KEPT,
    description: str | None = None,
) -> list[Training]:
    """Return `train` of each kind at each seed, kinds first, two trainings side by side.

    Arguments and errors are those of `train`; `description` is what a progress display calls this,
    None shows none.
    """
    wanted = [(kind, seed) for kind in kinds for seed in seeds]
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {
            pool.submit(train, *which, material, size=size, folder=folder): which
            for which in wanted
        }
        ended = as_completed(started)
        shown = track(ended, description, total=len(wanted)) if description else ended
        found = {started[future]: future.result() for future in shown}
    return [found[which] for which in wanted]


def _schedule(step: int, n_steps: int) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine to zero."""
    rise = max(1, round(_WARM_UP * n_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))


def _key(kind: str, seed: int, material: Material, size: Size) -> str:
    """Return a name of all that a training depends on; the code of this module is part of it."""
    versions = [torch.__version__, transformers.__version__]
    return key_of(kind, seed, material, size, versions)[:24]


def _write(
    path: Path | None,
    losses: list[float],
    weights: Mapping[int, Mapping[str, Tensor]],
    adam: torch.optim.Adam | None,
) -> None:
    """Write all that a training has come to, whole or not at all; Adam's state if it goes on."""
    if path is None:
        return
    tensors = {f"{step}/{name}": w for step, kept in weights.items() for name, w in kept.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    if adam is not None:
        for index, state in enumerate(adam.state.values()):
            tensors |= {f"adam/{index}/{name}": value for name, value in state.items()}
    with suppress(OSError, SafetensorError), taking_the_place_of(path) as new:
        save_file(tensors, new)


def _read(
    path: Path, model: LlamaForCausalLM, adam: torch.optim.Adam
) -> tuple[list[float], dict[int, dict[str, Tensor]]]:
    """Return the losses and weights so far, and put model and Adam where they were left."""
    try:
        tensors = load_file(path)
        losses = tensors.pop("losses").tolist()
    except (OSError, SafetensorError, KeyError):
        return [], {}  # absent, half a file, or another's: trained again
    weights: dict[int, dict[str, Tensor]] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        at, rest = name.removeprefix("adam/").split("/", 1)
        (states if name.startswith("adam/") else weights).setdefault(int(at), {})[rest] = tensor
    weights = dict(sorted(weights.items()))
    if weights:  # there are none of a training that diverged before its first moment
        model.load_state_dict(weights[max(weights)])
    for index, parameter in enumerate(model.parameters()):
        if index in states:
            adam.state[parameter] = states[index]
    return losses, weights
