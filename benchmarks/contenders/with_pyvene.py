"""pyvene: an `IntervenableModel` for each block, with the donors' states handed over.

Handing over `source_representations` spares the donors' pass that `sources` would repeat for every
block.
"""

from functools import cache
from typing import Any

import pyvene
import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, WholePrompts, padding_inputs
from lib.engine.edits import Edit, exchange
from lib.engine.models import Decoder

OPTIONS: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}


class Pyvene(WholePrompts):
    """`VanillaIntervention` for the exchange, an intervention of one's own for the other edits."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        blocks = range(decoder.n_blocks)
        self.collecting = self._wrap(pyvene.CollectIntervention, *blocks)
        self.patching = cache(self._patching)

    def _wrap(self, intervention: type, *blocks: int) -> Any:
        places = [pyvene.RepresentationConfig(block, "block_output", "pos", 1) for block in blocks]
        config = pyvene.IntervenableConfig(places, intervention)
        return pyvene.IntervenableModel(config, model=self.decoder.model)

    def _patching(self, block: int, edit: Edit) -> Any:
        if edit is exchange:
            return self._wrap(pyvene.VanillaIntervention, block)

        class Edited(pyvene.SourcelessIntervention):  # type: ignore[misc, unused-ignore]
            def __init__(self, **options: Any) -> None:
                super().__init__(**options)
                self.is_source_constant = False

            def forward(self, base: Tensor, source: Tensor, _subspaces: Any = None) -> Tensor:
                return edit(base, source)

        return self._wrap(Edited, block)

    def states(self, tokens: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """Collect one position of each block's output."""
        base = {"input_ids": tokens, **OPTIONS, **padding_inputs(mask)}
        where = [[[position]] * len(tokens)] * self.decoder.n_blocks
        with torch.inference_mode():
            (_, kept), _ = self.collecting(base, unit_locations={"sources->base": (None, where)})
        return torch.stack([state[:, 0] for state in kept])

    def patched(
        self, tokens: Tensor, block: int, position: int, edit: Edit, donors: Tensor
    ) -> Tensor:
        """Intervene on one block's output."""
        model = self.patching(block, edit)
        where = [[[position]] * len(tokens)]
        with torch.inference_mode():
            _, output = model(
                {"input_ids": tokens, **OPTIONS},
                source_representations={model.sorted_keys[0]: donors[:, None]},
                unit_locations={"sources->base": (None, where)},
            )
        return output.logits[:, -1]


def make(decoder: Decoder) -> Contender:
    """Return pyvene around a decoder's model."""
    return Pyvene(decoder)
