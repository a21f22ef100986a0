"""TransformerLens: a bridge around the model in hand, `run_with_hooks` and `run_with_cache`."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.contenders.base import Contender, WholePrompts, padding_inputs
from lib.engine.edits import Edit
from lib.engine.models import Decoder

HOOK = "hook_resid_post"
OPTIONS = {"use_cache": False, "logits_to_keep": 1}
ARCHITECTURE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # names the adapter; nothing is fetched


class TransformerLens(WholePrompts):
    """Raw weights, nothing folded or centred; a bridge always uses eager attention."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.bridge = TransformerBridge.boot_transformers(
            ARCHITECTURE, hf_model=decoder.model, tokenizer=decoder.tokenizer, device="cpu"
        )

    def states(self, tokens: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """Cache the residual stream after every block."""
        with torch.inference_mode():
            _, cache = self.bridge.run_with_cache(
                tokens,
                names_filter=lambda name: name.endswith(HOOK),
                **OPTIONS,
                **padding_inputs(mask),
            )
        blocks = range(self.decoder.n_blocks)
        return torch.stack([cache[f"blocks.{block}.{HOOK}"][:, position] for block in blocks])

    def patched(
        self, tokens: Tensor, block: int, position: int, edit: Edit, donors: Tensor
    ) -> Tensor:
        """Patch in a hook on the residual stream."""

        def patch(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (called with this name)
            value[:, position] = edit(value[:, position], donors)
            return value

        with torch.inference_mode():
            logits = self.bridge.run_with_hooks(
                tokens, fwd_hooks=[(f"blocks.{block}.{HOOK}", patch)], **OPTIONS
            )
        return logits[:, -1]


def make(decoder: Decoder) -> Contender:
    """Return the bridge around a decoder's model."""
    return TransformerLens(decoder)
