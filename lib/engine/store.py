"""What was computed before, residual streams and sweeps: kept on disk, shared by the chapters.

A folder is named after what its files depend on: the weights, the code that computes with all that
it imports, the versions of torch and transformers, the threads; a file's name says the rest. A file
holds what one call computed, and what does not read back whole is computed again. So an interrupted
run goes on at the sweep that it had reached.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.engine.edits import Edit
from lib.engine.extraction import (
    Positions,
    Prompts,
    Residuals,
    check_positions,
    check_prompts,
    extract_residuals,
)
from lib.engine.files import BUILD, taking_the_place_of
from lib.engine.keys import NoKeyError, Read, key_of
from lib.engine.models import Decoder, sample, weight_versions
from lib.engine.passes import has_hooks
from lib.engine.replay import Forest
from lib.engine.sites import Site, sweep_sites
from lib.engine.sources import digest_of_files, imported_files
from lib.engine.sweeps import Request, Sweep, sweep_blocks, sweep_together

Name = TypeVar("Name")
STORE = BUILD / "states"
KEPT_FOLDERS = 36  # states, sweeps and sites of two models and their twins; the oldest go
KNOWN_PACKAGES = {"torch", "transformers", "accelerate", "bitsandbytes"}  # of a model's modules
_fingerprints: WeakKeyDictionary[Decoder, tuple[object, str | None]] = WeakKeyDictionary()


def recall_residuals(
    decoder: Decoder,
    prompts: Prompts,
    *,
    positions: Positions = "last",
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> Residuals:
    """Return `extract_residuals` after all blocks, computing only prompts not computed before.

    For prompts that several chapters read: everything computed is kept on disk, of the last
    few models and their twins (`KEPT_FOLDERS`). Where nothing can be written (a full disk, a
    read-only folder) the result is returned all the same.

    Args:
        decoder: the model; one whose weights cannot be read (offloaded to disk), or on which hooks
            or modules of other packages lie, is not stored.
        prompts: token ids; lengths may differ.
        positions: as `extract_residuals`.
        forests: as `extract_residuals`.
        description: what a progress display calls this; None shows none.

    Raises:
        ValueError: as `extract_residuals`.
    """
    prompts = check_prompts(decoder, prompts)
    where = check_positions(prompts, positions)
    folder = _folder(decoder, "extraction")
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
            forests=forests,
            description=description,
        ).states
        states[:, rows] = computed
        if folder:
            kept_as = " ".join(names[row] for row in rows)
            name = hashlib.sha256(kept_as.encode()).hexdigest()[:24]
            _write(folder / f"{name}.safetensors", {"states": computed}, {"names": kept_as})
    return Residuals(states, tuple(range(decoder.n_blocks)))


def recall_sweep(
    decoder: Decoder,
    prompts: Prompts,
    pairs: np.ndarray,
    edits: Mapping[str, Edit] | Mapping[str, Site],
    **options: Any,
) -> Sweep:
    """Return `sweep_blocks` of edits, or `sweep_sites` of sites, unless it was computed before.

    The result is kept on disk under a key of everything that it depends on (`lib.engine.keys`), and
    is the same to the last bit when it is read back. With edits or measures that are no frozen
    dataclasses of lib it is computed every time. Where nothing can be written the result is
    returned all the same. Arguments and errors are theirs; of which models nothing is stored: see
    `recall_residuals`.
    """
    of_sites = any(isinstance(one, Site) for one in edits.values())
    compute: Callable[..., Sweep] = sweep_sites if of_sites else sweep_blocks
    folder = _folder(decoder, "sites" if of_sites else "sweeps")
    path = _sweep_path(folder, decoder, prompts, pairs, edits, options)
    if path is not None and (kept := _read_sweep(path)) is not None:
        return kept
    sweep = compute(decoder, prompts, pairs, edits, **options)
    if path is not None:
        _write_sweep(path, sweep)
    return sweep


def recall_sweeps(
    decoder: Decoder,
    requests: Mapping[Name, Request],
    edits: Mapping[str, Edit],
    *,
    blocks: Sequence[int] | None = None,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> dict[Name, Sweep]:
    """Return `sweep_together` of requests by name; each is kept by itself, as `recall_sweep` does.

    Arguments and errors are those of `sweep_together`.
    """
    folder = _folder(decoder, "sweeps")
    paths, read = {}, Read()
    for name, one in requests.items():
        others = {k: v for k, v in vars(one).items() if k not in ("prompts", "pairs")}
        told = {**others, "blocks": blocks}
        paths[name] = _sweep_path(folder, decoder, one.prompts, one.pairs, edits, told, read)
    kept = {name: _read_sweep(path) for name, path in paths.items() if path is not None}
    found = {name: sweep for name, sweep in kept.items() if sweep is not None}
    missing = [name for name in requests if name not in found]
    asked = [requests[name] for name in missing]
    swept = sweep_together(
        decoder, asked, edits, blocks=blocks, forests=forests, description=description
    )
    for name, sweep in zip(missing, swept, strict=True):
        found[name] = sweep
        if (path := paths[name]) is not None:
            _write_sweep(path, sweep)
    return {name: found[name] for name in requests}


def fingerprint(decoder: Decoder) -> str | None:
    """Return a digest of a decoder's weights and configuration; None if they cannot be read.

    Of each weight tensor its sum and some of its values enter. Read once for as long as the weights
    stay as they are.
    """
    state = weight_versions(decoder)
    known = _fingerprints.get(decoder)
    if known is None or known[0] != state:
        tensors = decoder.model.state_dict()
        if any(weight.is_meta for weight in tensors.values()):
            return None
        known = _fingerprints[decoder] = (state, _fingerprint(decoder, tensors))
    return known[1]


def _fingerprint(decoder: Decoder, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(decoder.model.config.to_json_string().encode())
    for name, weight in tensors.items():
        told = f"{name} {weight.dtype} {tuple(weight.shape)} {_total(weight)}"
        digest.update(told.encode())
        digest.update(sample(weight).numpy().tobytes())
    return digest.hexdigest()


def _total(weight: Tensor) -> int:
    """Return the sum of a tensor's bytes, eight at a time as one whole number.

    Ten times as fast as a sum in float64, and no change of a single weight escapes it.
    """
    here = weight.cpu() if weight.device.type == "mps" else weight  # which may not sum such numbers
    raw = here.detach().contiguous().flatten().view(torch.uint8)
    whole = len(raw) // 8 * 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


@cache
def _code(module: str, n_threads: int) -> str:
    """Return a digest of the code that a module of the engine runs, and of what it runs with."""
    here = Path(__file__)
    code = digest_of_files({here, *imported_files(here.with_name(f"{module}.py"))})
    told = f"{torch.__version__} {transformers.__version__} {n_threads} {code}"
    return hashlib.sha256(told.encode()).hexdigest()


def _folder(decoder: Decoder, module: str) -> Path | None:
    weights, code = fingerprint(decoder), _code(module, torch.get_num_threads())
    if weights is None or has_hooks(decoder) or _is_foreign(decoder):
        return None
    return STORE / hashlib.sha256(f"{weights} {code}".encode()).hexdigest()[:16]


def _is_foreign(decoder: Decoder) -> bool:
    """Say whether modules are of other packages (adapters, say), whose switches no key knows."""
    packages = {type(module).__module__.split(".")[0] for module in decoder.model.modules()}
    return not packages <= KNOWN_PACKAGES


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
            written = path.stat()
            if wanted.isdisjoint(kept) or not _is_sound(path, written.st_ino, written.st_mtime_ns):
                continue
            states = load_file(path)["states"]
        except (OSError, safetensors.SafetensorError, KeyError):
            continue  # half a file, or another's: computed again
        with suppress(OSError):  # a folder that only others may write
            os.utime(folder)
        yield kept, states


@cache
def _is_sound(path: Path, *_written: int) -> bool:
    """Say whether a file of states is as its digest says; read once while it stays as it is."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    named = len(about["names"].split())
    return about["sha256"] == _digest(tensors, about) and tensors["states"].shape[1] == named


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return a digest of all that a file holds but for the digest itself."""
    told = sorted((name, text) for name, text in about.items() if name != "sha256")
    return key_of(told, sorted(tensors.items()))


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a file that is either whole or absent; leave it if the disk does not take it."""
    told = {**about, "sha256": _digest(tensors, about)}
    with suppress(OSError, safetensors.SafetensorError), taking_the_place_of(path) as new:
        _prune(path.parent)
        save_file(dict(tensors), new, metadata=told)


def _sweep_path(
    folder: Path | None,
    decoder: Decoder,
    prompts: Prompts,
    pairs: np.ndarray,
    what: Mapping[str, Any],
    options: Mapping[str, Any],
    read: Read | None = None,
) -> Path | None:
    """Return where in a folder a sweep is kept; None if it has no safe name."""
    if folder is None:
        return None
    told = {
        name: value for name, value in options.items() if name not in ("description", "forests")
    }
    try:
        name = key_of(check_prompts(decoder, prompts), np.asarray(pairs), what, told, read=read)
    except NoKeyError:
        return None
    return folder / f"sweep-{name[:24]}.safetensors"


def _write_sweep(path: Path, sweep: Sweep) -> None:
    tensors = {"logits": sweep.logits, "clean_logits": sweep.clean_logits, "pairs": sweep.pairs}
    tensors |= {f"measure {name}": values for name, values in sweep.measures.items()}
    about = {
        "edits": json.dumps(sweep.edits),
        "blocks": json.dumps(sweep.blocks),
        "measures": json.dumps(list(sweep.measures)),
        "path": sweep.path,
        "name": path.name,
    }
    _write(
        path,
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in tensors.items()},
        about,
    )


def _read_sweep(path: Path) -> Sweep | None:
    """Return a sweep that was kept; None if it was not, or does not read back whole."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        tensors = load_file(path)
        if (about["sha256"], about["name"]) != (_digest(tensors, about), path.name):
            return None
        with suppress(OSError):
            os.utime(path.parent)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return Sweep(
            edits=tuple(json.loads(about["edits"])),
            blocks=tuple(json.loads(about["blocks"])),
            pairs=arrays["pairs"],
            logits=arrays["logits"],
            clean_logits=arrays["clean_logits"],
            measures={name: arrays[f"measure {name}"] for name in json.loads(about["measures"])},
            path=about["path"],
        )
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None  # absent, half a file, or another's: computed again


def _prune(latest: Path) -> None:
    """Remove the folders of the models that were used least recently."""
    folders = sorted(STORE.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in [folder for folder in folders if folder != latest][KEPT_FOLDERS - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
