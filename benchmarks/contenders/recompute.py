"""Full recompute: plain hooks on a transformers model, in batches; the reference."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, WholePrompts, padding_inputs
from lib.engine.edits import Edit
from lib.engine.models import Decoder
from lib.engine.structure import untuple


class FullRecompute(WholePrompts):
    """Every edit runs its whole prompt; the unembedding runs for the last token alone."""

    sort_by_length = True

    def states(self, tokens: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """Keep one position of each block's output."""
        kept: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            kept.append(untuple(output)[:, position].clone())

        handles = [block.register_forward_hook(keep) for block in self.decoder.blocks]
        with torch.inference_mode():
            self.decoder.model.base_model(tokens, use_cache=False, **padding_inputs(mask))
        for handle in handles:
            handle.remove()
        return torch.stack(kept)

    def patched(
        self, tokens: Tensor, block: int, position: int, edit: Edit, donors: Tensor
    ) -> Tensor:
        """Edit one block's output in place."""

        def patch(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = untuple(output)
            hidden[:, position] = edit(hidden[:, position], donors)

        handle = self.decoder.blocks[block].register_forward_hook(patch)
        with torch.inference_mode():
            states = self.decoder.model.base_model(tokens, use_cache=False).last_hidden_state
            logits = self.decoder.unembed(states[:, -1])
        handle.remove()
        return logits


def make(decoder: Decoder) -> Contender:
    """Return the reference around a decoder."""
    return FullRecompute(decoder)
