"""The arithmetic bound: multiply–accumulates that no exact method can do without.

Divided by the rate of fp32 matrix products on the same machine they give the seconds below which
nothing exact can go. Counted are linear maps, the unembedding, and attention's two products;
norms, rotary angles, softmax and all traffic of memory are not. What is shared is counted once:
each prompt runs once, an edited row runs through the blocks after its edit only, the last block
runs for the token that is read alone (the others owe it keys and values), and no map is applied to
an input that it has already seen.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.workloads import ExtractLoad, Load, SweepLoad


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder with gated MLPs (Llama and its kin).

    Attributes:
        n_blocks: L.
        d_model: width of the residual stream.
        d_query: width of all queries together (heads × width of a head).
        d_key: width of all keys together, the same as that of the values.
        d_mlp: width of the MLP.
        d_vocab: number of tokens.
    """

    n_blocks: int
    d_model: int
    d_query: int
    d_key: int
    d_mlp: int
    d_vocab: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Return the shape that a transformers configuration describes."""
        d_head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return cls(
            n_blocks=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_query=config.num_attention_heads * d_head,
            d_key=config.num_key_value_heads * d_head,
            d_mlp=config.intermediate_size,
            d_vocab=config.vocab_size,
        )

    @property
    def queries(self) -> int:
        """Multiply–accumulates of one token's queries in one block."""
        return self.d_model * self.d_query

    @property
    def keys_values(self) -> int:
        """Of its keys and values."""
        return 2 * self.d_model * self.d_key

    @property
    def rest(self) -> int:
        """Of its attention output and MLP."""
        return self.d_query * self.d_model + 3 * self.d_model * self.d_mlp

    def attend(self, first: int, end: int) -> int:
        """Of the attention of tokens `first` … `end` − 1, each over itself and all before it."""
        n_keys = (end * (end + 1) - first * (first + 1)) // 2
        return 2 * self.d_query * n_keys


def minimum_macs(shape: Shape, load: Load) -> int:
    """Return the multiply–accumulates that the workload cannot do without."""
    if isinstance(load, ExtractLoad):
        return sum(_prompt(shape, length, length) for length in load.lengths)
    recipients = {recipient for recipient, _ in load.pairs}
    donors = {donor for _, donor in load.pairs} - recipients
    edited = load.position + 1
    total = len(recipients) * _prompt(shape, load.length, edited)
    total += len(donors) * _prompt(shape, edited, edited)
    rows = sum(_row(shape, load, block) for block in range(shape.n_blocks))
    return total + len(load.pairs) * len(load.edits) * rows


def _prompt(shape: Shape, length: int, edited: int) -> int:
    """Run `length` tokens, the last block for the first `edited` alone, of which one is read."""
    whole = shape.queries + shape.keys_values + shape.rest
    through = length * whole + shape.attend(0, length)
    last = (
        edited * shape.keys_values + shape.queries + shape.rest + shape.attend(edited - 1, edited)
    )
    return (shape.n_blocks - 1) * through + last


def _row(shape: Shape, load: SweepLoad, block: int) -> int:
    """Run one edited row from after `block` to the logits of its last token."""
    n_later = shape.n_blocks - 1 - block
    n_tokens = load.length - load.position
    unembedding = shape.d_model * shape.d_vocab
    if n_later == 0:  # no block is left that could read an earlier token
        return unembedding if n_tokens == 1 else 0
    whole = n_tokens * (shape.queries + shape.keys_values + shape.rest)
    whole += shape.attend(load.position, load.length)
    last = n_tokens * shape.keys_values + shape.queries + shape.rest
    last += shape.attend(load.length - 1, load.length)
    # In the first of these blocks the tokens after the edited one are still what they were.
    seen = (n_tokens - 1) * shape.keys_values
    seen += (n_tokens - 1 if n_later > 1 else min(1, n_tokens - 1)) * shape.queries
    return (n_later - 1) * whole + last - seen + unembedding
