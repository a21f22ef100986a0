"""Residual streams that were computed before: kept on disk, shared by the chapters.

A folder is named after all that states depend on beside the prompt: the weights, the code that
computes, the version and threads of torch. A file in it holds what one call computed. What does not
read back whole is computed again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.extraction import Positions, Residuals, check_positions, extract_residuals, logit_lens
from lib.models import Decoder
from lib.results import RESULTS

STORE = RESULTS.parent / "states"
KEPT_FOLDERS = 8  # the least recently used go
SAMPLED = 64  # values of each weight tensor in the fingerprint, beside its sum
_fingerprints: WeakKeyDictionary[Decoder, tuple[object, str | None]] = WeakKeyDictionary()


def recall_residuals(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    positions: Positions = "last",
    logits: bool = False,
    description: str | None = None,
) -> Residuals:
    """Return `extract_residuals` after all blocks, computing only prompts not computed before.

    For prompts that several chapters read: everything computed is kept on disk, up to
    `KEPT_FOLDERS` models. Logits are read from the states of the last block and not kept. Where
    nothing can be written (a full disk, a read-only folder) the result is returned all the same.

    Args:
        decoder: the model; one whose weights cannot be read (offloaded to disk) is not stored.
        prompts: token ids; lengths may differ.
        positions: as `extract_residuals`.
        logits: also return the next-token logits of the last token; needs positions `"last"`.
        description: what a progress display calls this; None shows none.

    Raises:
        ValueError: as `extract_residuals`; logits asked for at other positions.
    """
    if logits and not isinstance(positions, str):
        raise ValueError('Logits are read at the last token; ask for positions="last".')
    where = check_positions(prompts, positions)
    folder = _folder(decoder)
    names = [_name(prompt, at) for prompt, at in zip(prompts, where, strict=True)]
    states = torch.empty(decoder.n_blocks, len(prompts), decoder.d_model)
    missing = set(range(len(prompts)))
    for kept, found in _files(folder, set(names)) if folder else ():
        rows = [row for row in sorted(missing) if names[row] in kept]
        states[:, rows] = found[:, [kept[names[row]] for row in rows]]
        missing -= set(rows)
    if missing:
        rows = sorted(missing)
        computed = extract_residuals(
            decoder,
            [prompts[row] for row in rows],
            positions=[where[row] for row in rows],
            description=description,
        ).states
        states[:, rows] = computed
        if folder:
            _write(folder, [names[row] for row in rows], computed)
    read = logit_lens(decoder, states[-1]) if logits else None
    return Residuals(states, tuple(range(decoder.n_blocks)), read)


def fingerprint(decoder: Decoder) -> str | None:
    """Return a digest of a decoder's weights and configuration; None if they cannot be read.

    Of each weight tensor its sum and some of its values enter. Read once for as long as the weights
    stay as they are.
    """
    tensors = decoder.model.state_dict()
    if any(weight.is_meta for weight in tensors.values()):
        return None
    state = [(weight.data_ptr(), weight._version) for weight in tensors.values()]
    known = _fingerprints.get(decoder)
    if known is None or known[0] != state:
        known = _fingerprints[decoder] = (state, _fingerprint(decoder, tensors))
    return known[1]


def _fingerprint(decoder: Decoder, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(decoder.model.config.to_json_string().encode())
    for name, weight in tensors.items():
        flat = weight.reshape(-1)
        total = float(flat.sum(dtype=torch.float64))
        picked = torch.linspace(0, len(flat) - 1, SAMPLED, dtype=torch.float64).round().long()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {total!r}".encode())
        digest.update(flat[picked.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


@cache
def _code(n_threads: int) -> str:
    """Return a digest of the modules that compute states, and of what they compute with."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {n_threads}".encode())
    for name in ("extraction.py", "loading.py", "models.py", "structure.py", "store.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _folder(decoder: Decoder) -> Path | None:
    weights = fingerprint(decoder)
    if weights is None:
        return None
    code = _code(torch.get_num_threads())
    return STORE / hashlib.sha256(f"{weights} {code}".encode()).hexdigest()[:16]


def _name(prompt: Sequence[int], position: int) -> str:
    text = json.dumps([[int(token) for token in prompt], position])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _files(folder: Path, wanted: set[str]) -> Iterator[tuple[dict[str, int], Tensor]]:
    """Yield the files that hold any of `wanted`: names with their places, and the states."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
            kept = {name: place for place, name in enumerate(about["names"].split())}
            if wanted.isdisjoint(kept):
                continue
            states = load_file(path)["states"]
        except (OSError, safetensors.SafetensorError, KeyError):
            continue  # half a file, or another's: computed again
        if about.get("sha256") == _digest(states) and states.shape[1] == len(kept):
            os.utime(folder)
            yield kept, states


def _digest(states: Tensor) -> str:
    data: np.ndarray = states.numpy()
    return hashlib.sha256(data.data).hexdigest()


def _write(folder: Path, names: list[str], states: Tensor) -> None:
    """Write a file that is either whole or absent; leave it if the disk does not take it."""
    about = {"names": " ".join(names), "sha256": _digest(states)}
    part = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        save_file({"states": states}, part, metadata=about)
        os.replace(
            part, folder / f"{hashlib.sha256(about['names'].encode()).hexdigest()[:24]}.safetensors"
        )
    except (OSError, safetensors.SafetensorError):
        if part:
            Path(part).unlink(missing_ok=True)


def _prune(latest: Path) -> None:
    """Remove the folders of the models that were used least recently."""
    folders = sorted(STORE.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in [folder for folder in folders if folder != latest][KEPT_FOLDERS - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
