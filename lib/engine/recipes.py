"""Recipes: functions told apart by what they do, so that what they gave can be kept on disk.

A function of lib is known by its name, since a digest of lib's code stands beside it in every key;
a partial of one, or what a factory made, by its arguments as well, arrays by their bytes. What can
be known by neither (a lambda, a function of a notebook) has no recipe.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


class NoRecipeError(Exception):
    """A value that cannot be told apart safely from others."""


def by_recipe(factory: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark the functions that `factory` makes by its name and arguments.

    For factories of lib whose result depends on their arguments alone.
    """

    @functools.wraps(factory)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        made = factory(*args, **kwargs)
        made.recipe = functools.partial(make, *args, **kwargs)  # type: ignore[attr-defined]
        return made

    return make


def digest_of(*values: Any) -> str:
    """Return a digest of values: numbers, text, arrays, functions with a recipe, and nests of them.

    Raises:
        NoRecipeError: a value of another kind, which no digest would stand for.
    """
    digest = hashlib.sha256()
    _update(digest, values)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Tensor | np.ndarray):
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise NoRecipeError("an array of objects")
        digest.update(f"{type(value).__name__} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key, held in value.items():  # in their order, for a sweep's edits are numbered
            _update(digest, key)
            _update(digest, held)
    elif isinstance(value, Sequence):
        digest.update(f"sequence {len(value)};".encode())
        for held in value:
            _update(digest, held)
    elif isinstance(value, functools.partial):
        digest.update(b"partial;")
        for held in (value.func, value.args, value.keywords):
            _update(digest, held)
    elif hasattr(value, "recipe"):
        _update(digest, value.recipe)
    else:
        digest.update(f"function {_name(value)};".encode())


def _bytes(array: Tensor | np.ndarray) -> Any:
    if isinstance(array, Tensor):
        flat = array.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data  # numpy knows no bfloat16
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _name(function: Any) -> str:
    """Return the full name of a function of lib's modules, by which it can be found again."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    home = sys.modules.get(str(module)) if str(module).split(".")[0] == "lib" else None
    if home is not None and getattr(home, str(name), None) is function:
        return f"{module}.{name}"
    raise NoRecipeError(f"{function!r} is no function of lib's modules")
