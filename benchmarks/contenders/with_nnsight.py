"""nnsight: a `TransformersModel` around the model in hand, one trace for each batch."""

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor

from benchmarks.contenders.base import Contender, WholePrompts, padding_inputs
from lib.engine.edits import Edit
from lib.engine.models import Decoder


class NNsight(WholePrompts):
    """Traces over tensors of token ids; the batch is one invocation."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.traced = TransformersModel(
            decoder.model, tokenizer=decoder.tokenizer, task="text-generation"
        )

    def states(self, tokens: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """Save one position of each block's output."""
        model, inputs = self.traced, padding_inputs(mask)
        with torch.inference_mode():
            with model.trace(input_ids=tokens, use_cache=False, logits_to_keep=1, **inputs):
                kept = nnsight.save([])
                for layer in model.model.layers:
                    kept.append(layer.output[:, position].clone())
            return torch.stack(kept)

    def patched(
        self, tokens: Tensor, block: int, position: int, edit: Edit, donors: Tensor
    ) -> Tensor:
        """Edit one block's output in the trace."""
        model = self.traced
        with torch.inference_mode():
            with model.trace(input_ids=tokens, use_cache=False, logits_to_keep=1):
                layer = model.model.layers[block]
                layer.output[:, position] = edit(layer.output[:, position], donors)
                logits = model.output.logits[:, -1].save()
            return logits  # noqa: RET504 (a trace hands back what it saved under a name)


def make(decoder: Decoder) -> Contender:
    """Return nnsight around a decoder's model."""
    return NNsight(decoder)
