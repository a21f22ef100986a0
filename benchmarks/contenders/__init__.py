"""Contenders: how each library is asked to do the workloads, one module each."""

from importlib import import_module

from benchmarks.contenders.base import Contender
from lib.engine.models import Decoder

MODULES = {
    "this book": "engine",
    "full recompute": "recompute",
    "TransformerLens": "with_transformer_lens",
    "nnsight": "with_nnsight",
    "pyvene": "with_pyvene",
}
HALF = "this book, bf16"
"""The engine with the model in bfloat16, an option: timed beside the contenders, never as one."""

EAGER_ONLY = ("TransformerLens",)
"""Contenders with an attention of their own, which no setting of the model changes."""


def make(name: str, decoder: Decoder) -> Contender:
    """Return the named contender around the model in hand; imports its library."""
    module = import_module(f"benchmarks.contenders.{(MODULES | {HALF: 'engine'})[name]}")
    return module.make(decoder)
