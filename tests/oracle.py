"""The plain way to do it: one full forward pass per edit, with a hook, on a left-padded batch.

Shares no code with lib, so that agreement means something.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import log_softmax
from torch import Tensor


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return left-padded tokens, attention mask and position ids."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[3] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def forward(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return next-token logits of each prompt, left-padded where lengths differ."""
    tokens, mask, position_ids = padded(prompts)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
        if "position_ids" in model.forward.__code__.co_varnames:
            inputs["position_ids"] = position_ids
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1]


def kl(p_logits: ArrayLike, q_logits: ArrayLike) -> np.ndarray:
    """Return KL(p ‖ q) in nats of logits, over the last axis."""
    log_p, log_q = (
        log_softmax(np.asarray(x, dtype=np.float64), axis=-1) for x in (p_logits, q_logits)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def block_states(model: Any, blocks: Any, prompt: Sequence[int]) -> Tensor:
    """Return `[n_blocks, length, d_model]` of one prompt, one hook at a time."""
    states = []
    for block in blocks:
        seen: list[Tensor] = []

        def note(_module: Any, _inputs: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(note)
        with torch.no_grad():
            model(torch.tensor([list(prompt)]), use_cache=False)
        handle.remove()
        states.append(seen[0][0])
    return torch.stack(states)


def patched_logits(
    model: Any,
    block: Any,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Any],
    new: Sequence[Tensor],
) -> Tensor:
    """Return next-token logits with `block`'s output at each prompt's positions set to `new`."""
    longest = max(len(prompt) for prompt in prompts)

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row, (prompt, position, state) in enumerate(zip(prompts, positions, new, strict=True)):
            hidden[row, torch.as_tensor(position) % len(prompt) + longest - len(prompt)] = state
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(replace)
    logits = forward(model, prompts)
    handle.remove()
    return logits
