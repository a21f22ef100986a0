"""Models where they are kept: found, weighed against the memory there is, and read."""

import contextlib
import functools
import logging
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lib.engine.catalogue import DEFAULT, find_weights, unknown_name
from lib.engine.memory import check_memory, free_memory, give_back, weight_bytes
from lib.engine.weights import fetch_weights

UNTRAINED_SEED = 20260204


def read_model(
    name: str | Path, options: Mapping[str, Any], *, untrained: bool = False, seed: int = 0
) -> tuple[PreTrainedModel, Any, str, str]:
    """Return a model, its tokenizer, its name in results, and its revision as exactly as known.

    Arguments and errors are those of `load_decoder`; `options` holds the ones given.
    """
    source, label, origin = _locate(name)
    config = _read_config(source, name, options.get("revision"))
    dtype = dtype_of(options.get("dtype", "float32"))
    placement = _placement(options, dtype, untrained)
    spread = placement.get("device_map")
    bits = {"4bit": 4, "8bit": 8}.get(str(options.get("quantization")))
    with _in_one_line(name):
        written = (path.stat().st_mtime_ns for path in sorted(Path(source).glob("*.json")))
        tokenizer = _read_tokenizer(source, options.get("revision"), *written)
        needed = weight_bytes(config, dtype, None if untrained else bits)
    give_back()
    if spread is None or isinstance(spread, str):  # a mapping is its writer's own choice
        where = "auto" if isinstance(spread, str) else options.get("device", "cpu")
        check_memory(f"{label} in {str(dtype)[6:]}", needed, where, free_memory())
    with _in_one_line(name):
        if untrained:
            model = fresh_model(config, dtype, seed).to(options.get("device", "cpu"))
        else:
            model = _read_weights(source, options, dtype, placement)
    if origin == "hub":
        origin = getattr(config, "_commit_hash", None) or options.get("revision") or "hub"
    return model, tokenizer, label, origin


@functools.cache
def _read_tokenizer(source: str, revision: str | None, *_written: int) -> Any:
    """Return a tokenizer, read once while its files stay as they are: a model's twins share it."""
    return AutoTokenizer.from_pretrained(source, revision=revision)


@contextlib.contextmanager
def _in_one_line(name: str | Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"Model {str(name)!r} cannot be loaded as a causal decoder with safetensors "
            f"weights: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the loading chatter of transformers and of the hub (bars, notes), not errors."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    hub = hub_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub)
        if bars:
            transformers_logging.enable_progress_bar()


def _locate(name: str | Path) -> tuple[str, str, str]:
    """Return (what from_pretrained takes, the model's label, its revision)."""
    if isinstance(name, str) and (weights := find_weights(name)):
        folder = fetch_weights(weights.name)
        return str(folder), weights.label, f"gguf sha256 {weights.sha256[:12]}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"Folder {folder} holds no model: config.json is missing. Give a folder written by "
                "save_pretrained, or a model's name."
            )
        return str(folder), label_of(str(folder)), "local folder"
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise ValueError(
            f"Folder {folder} does not exist. Give a folder that does, or a model's name."
        )
    if "/" not in name:
        raise ValueError(unknown_name(name))
    return name, name, "hub"


def label_of(path: str) -> str:
    """Return the last part of a path, so that results never name a machine's folders."""
    return Path(path).name or "model"


def _read_config(source: str, name: str | Path, revision: str | None) -> Any:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        if _is_gated(error):
            raise ValueError(
                f"Model {str(name)!r} is gated: accept its licence at "
                f"https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN "
                "to a token that may read it."
            ) from error
        raise ValueError(
            f"No model {str(name)!r} was found: {_first_line(error)} Check the spelling and the "
            "network, give a local folder, or take "
            f"{DEFAULT!r}, which needs no hub."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"Model {str(name)!r} is an encoder–decoder ({config.model_type}); this book studies "
            "decoder-only models. Choose a causal language model."
        )
    return config


def _is_gated(error: BaseException | None) -> bool:
    """Return whether an error, or what led to it, is the hub's refusal for want of access."""
    while error is not None:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return type(error).__name__ != "RepositoryNotFoundError"  # the hub says 401 there too
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_device(device: Any) -> None:
    """Refuse a device that torch does not know or does not find."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"Device {str(device)!r} cannot be used: {_first_line(error).rstrip('.')}. Take 'cpu', "
            "or one that torch finds here."
        ) from error


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of weights by its name; ValueError if there is none."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name!r} is no dtype for weights; take float32, bfloat16 or float16.")
    return found


def _placement(options: Mapping[str, Any], dtype: torch.dtype, untrained: bool) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that say where weights go and how."""
    wanted, device_map = options.get("quantization"), options.get("device_map")
    packages = ["bitsandbytes"] if isinstance(wanted, str) else []
    packages += ["accelerate"] if wanted is not None or device_map is not None else []
    for package in packages:
        if find_spec(package) is None and not untrained:
            kind = wanted if isinstance(wanted, str) else type(wanted).__name__
            what = "A device_map" if wanted is None else f"Quantisation ({kind})"
            raise ValueError(f"{what} needs {package}: pip install {package}.")
    if untrained or not packages:
        return {}
    if device_map is None:
        device_map = {"": options.get("device", "cpu")}  # quantised weights cannot be moved later
    device_map = dict(device_map) if isinstance(device_map, Mapping) else device_map
    if not isinstance(wanted, str):
        return {"device_map": device_map, "quantization_config": wanted}
    kinds = {
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }
    if wanted not in kinds:
        raise ValueError(f"Quantisation {wanted!r} is not known; take '4bit' or '8bit'.")
    return {"device_map": device_map, "quantization_config": kinds[wanted]}


def _read_weights(
    source: str, options: Mapping[str, Any], dtype: torch.dtype, placement: Mapping[str, Any]
) -> PreTrainedModel:
    """Return the model on its device or devices; what goes to disk goes when the model does."""
    folder = tempfile.TemporaryDirectory(prefix="offloaded-")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        revision=options.get("revision"),
        dtype=dtype,
        use_safetensors=True,
        offload_folder=folder.name,
        **placement,
    )
    weakref.finalize(model, folder.cleanup)
    return model if placement else model.to(options.get("device", "cpu"))


def fresh_model(config: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Return a freshly initialised model, of each seed 0, 1, … always the same.

    The caller's random state is kept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED + seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
