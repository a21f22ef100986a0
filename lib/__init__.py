"""Prediction-centric geometry in language models: what a reader needs, under one name.

    >>> from lib import Rotate, extract_residuals, generate, load_decoder, steer, tokenize

The names are loaded when they are first asked for, so that a part of lib costs its own imports
alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib.engine.edits import Rotate, Scale, exchange, exchange_direction, exchange_norm
    from lib.engine.extraction import extract_residuals, logit_lens, tokenize
    from lib.engine.generation import generate, steer
    from lib.engine.models import load_decoder
    from lib.engine.sweeps import sweep_blocks

_HOMES = {
    "edits": ("Rotate", "Scale", "exchange", "exchange_direction", "exchange_norm"),
    "extraction": ("extract_residuals", "logit_lens", "tokenize"),
    "generation": ("generate", "steer"),
    "models": ("load_decoder",),
    "sweeps": ("sweep_blocks",),
}

__all__ = [
    "Rotate",
    "Scale",
    "exchange",
    "exchange_direction",
    "exchange_norm",
    "extract_residuals",
    "generate",
    "load_decoder",
    "logit_lens",
    "steer",
    "sweep_blocks",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lib.engine.{module}"), name)
    raise AttributeError(f"module 'lib' has no attribute {name!r}")
