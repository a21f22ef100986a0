"""Keys: digests of everything that a result depends on, under which it is kept and found again.

An edit or a measure is known by its class, the code of that class's module with what it imports,
and its fields, arrays by their bytes. What can be known by none of these (a lambda, a function of a
notebook) has no key.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.engine.sources import PACKAGE, digest_of_files, imported_files


class NoKeyError(Exception):
    """A value that cannot be told apart safely from others."""


Read = dict[int, tuple[Tensor | np.ndarray, bytes]]
"""Arrays that were read, by `id`, and their digests; held, so that no other array gets their id."""


def key_of(*values: Any, read: Read | None = None) -> str:
    """Return a digest of values: numbers, text, arrays, dataclasses of lib, and nests of them.

    Args:
        values: what the digest stands for.
        read: arrays that need not be read again, to which others are added; for several keys of
            values that share arrays and do not change meanwhile.

    Raises:
        NoKeyError: a value of another kind, which no digest would stand for.
    """
    digest = hashlib.sha256()
    _update(digest, values, {} if read is None else read)
    return digest.hexdigest()


def _update(digest: Any, value: Any, read: Read) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Tensor | np.ndarray):
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise NoKeyError("an array of objects")
        digest.update(f"{type(value).__name__} {value.dtype} {tuple(value.shape)};".encode())
        if id(value) not in read:
            read[id(value)] = value, hashlib.sha256(_bytes(value)).digest()
        digest.update(read[id(value)][1])
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key, held in value.items():  # in their order, for a sweep's edits are numbered
            _update(digest, key, read)
            _update(digest, held, read)
    elif isinstance(value, Sequence):
        digest.update(f"sequence {len(value)};".encode())
        for held in value:
            _update(digest, held, read)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        digest.update(f"{_class_key(type(value))};".encode())
        _update(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, read)
    else:
        raise NoKeyError(f"{value!r} is no dataclass")


def _bytes(array: Tensor | np.ndarray) -> Any:
    if isinstance(array, Tensor):
        flat = array.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data  # numpy knows no bfloat16
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@cache
def _class_key(kind: type) -> str:
    """Return the name of a frozen dataclass of lib, with a digest of the code that defines it."""
    home = sys.modules.get(kind.__module__)
    found = getattr(home, kind.__qualname__, None) is kind
    if not (found and kind.__module__.split(".")[0] == PACKAGE):
        raise NoKeyError(f"{kind.__qualname__} is no class of {PACKAGE}'s modules")
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise NoKeyError(f"{kind.__qualname__} can change")
    code = digest_of_files(imported_files(Path(str(home.__file__))))  # type: ignore[union-attr]
    return f"{kind.__module__}.{kind.__qualname__} {code}"
