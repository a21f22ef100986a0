"""Decoders: a language model with its parts named, ready for extraction and sweeps."""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.engine.catalogue import DEFAULT, preset
from lib.engine.loading import check_device, dtype_of, fresh_model, label_of, read_model
from lib.engine.structure import (
    check_parts,
    compute_dtype,
    device_of,
    evaluating,
    find_blocks,
    one_line,
    untuple,
    unwrap,
    watch,
    weights_of,
)

COLUMNS_AT_ONCE = 1024
SAMPLED = 64  # values of each weight by which a change of it is noticed
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder-only language model with its parts named.

    Attributes:
        name: what the results call the model (never a path).
        model: the Hugging Face model; one in hand keeps its mode and gradients, and is measured in
            evaluation mode.
        tokenizer: its tokenizer.
        blocks: the transformer blocks, 0 … n_blocks − 1.
        final_stages: the modules between the last block and the unembedding, in order of execution.
        unembedding: the linear map from the final-normed residual stream to the vocabulary.
        untrained: whether the weights are freshly initialised.
        seed: from which seed they are, where they are.
        revision: where the weights come from, as exactly as known.
        logit_scale: what the unembedding's output is multiplied by.
        logit_softcap: the bound c of the soft cap c·tanh(logit / c), or None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    blocks: tuple[nn.Module, ...]
    final_stages: tuple[nn.Module, ...]
    unembedding: nn.Linear
    untrained: bool = False
    seed: int = 0
    revision: str = "unknown"
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def text_config(self) -> Any:
        """The configuration of the part that writes text."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def d_vocab(self) -> int:
        """Number of tokens that the unembedding scores."""
        return int(self.unembedding.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids must be: the device of the embedding."""
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return compute_dtype(self.model)

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt; None where the model sets no limit (ALiBi, state-space)."""
        found = getattr(self.text_config, "max_position_embeddings", None)
        return int(found) if found else None

    def final_norm(self, states: Tensor) -> Tensor:
        """Return the final norm of residual streams `[..., d_model]`, same shape."""
        states = states.to(device_of(self.unembedding))
        with _mode_of(states):
            for stage in self.final_stages:
                states = untuple(stage(states))
        return states

    def check_tokens(self, token_ids: Sequence[int]) -> list[int]:
        """Return tokens whose logits are read; ValueError names one that is not scored."""
        chosen = whole_numbers("Token ids", token_ids)
        if wrong := [token for token in chosen if not 0 <= token < self.d_vocab]:
            raise ValueError(
                f"Token {wrong[0]} cannot be read: {self.name} scores tokens 0 to "
                f"{self.d_vocab - 1}."
            )
        return chosen

    def unembed(self, normed: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """Return logits `[..., d_vocab]`, or `[..., len(token_ids)]`, of final-normed states.

        Asking for a few tokens multiplies by their rows of the unembedding alone.
        """
        # A slice of a larger tensor makes the product about eight times slower than its copy.
        normed = normed.to(device_of(self.unembedding)).contiguous()
        with _mode_of(normed):
            if token_ids is None:
                logits = _map_by_columns(self.unembedding, normed)
            elif not _is_plain(self.unembedding):  # an adapter or a hook on it: no row says it all
                logits = self.unembedding(normed)[..., self.check_tokens(token_ids)]
            else:
                logits = nn.functional.linear(normed, *self.unembedding_rows(token_ids))
            if self.logit_scale != 1.0:
                logits = logits * self.logit_scale
            if self.logit_softcap is not None:
                logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def unembedding_rows(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return the unembedding's weights `[n, d_model]` and biases `[n]` of a few tokens.

        Raises:
            ValueError: as `check_tokens`.
        """
        chosen = self.check_tokens(token_ids)
        with weights_of(self.unembedding):
            weight, bias = self.unembedding.weight, self.unembedding.bias
            rows = torch.tensor(chosen, dtype=torch.long, device=weight.device)
            return weight[rows], None if bias is None else bias[rows]


def load_decoder(
    name: str | Path | nn.Module = DEFAULT,
    *,
    untrained: bool = False,
    seed: int = 0,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Any = None,
    tokenizer: Any = None,
) -> Decoder:
    """Return a decoder that is ready for extraction and sweeps.

    What is not given is taken from the options in `lib/data/models.toml` if it lists the model,
    which it does for those of the paper; else the weights are float32 on the CPU.

    Args:
        name: a name of the catalogue (`"smollm2-135m"`, `"gemma-3-270m"`, `"qwen2.5-coder-0.5b"`,
            `"qwen2.5-coder-1.5b"`), fetched on first use; owner/model on the model hub; a local
            folder; or a model in hand (then `tokenizer` must be given too).
        untrained: keep the architecture and draw fresh weights: the untrained twin, the null model
            of every chapter. It lies on one device and is not quantised.
        seed: which twin, 0, 1, …; the same weights each time.
        revision: a commit, branch or tag on the hub.
        dtype: a torch dtype or its name, such as `"float32"` or `"bfloat16"`.
        device: where the weights go.
        device_map: instead of `device`: `"auto"` spreads the weights over the GPUs, then the CPU;
            a mapping says which module goes where, `"disk"` included. Needs accelerate.
        quantization: `"4bit"` or `"8bit"` (needs bitsandbytes), or one of transformers'
            quantisation configurations.
        tokenizer: only with a model in hand.

    Raises:
        ValueError: no such model or device, a folder without one, no access, too little memory,
            options of loading for a model in hand (its twin takes dtype and device), a tokenizer
            for a named one, a package that is missing, not a decoder-only model, or parts that do
            not behave as a decoder's should; the message says which and what to do.
        RuntimeError: a model of the catalogue cannot be fetched; see `fetch_weights`.
    """
    if seed < 0 or (seed and not untrained):
        raise ValueError(f"Seed {seed}: untrained twins have seeds 0, 1, …; trained models none.")
    if device is not None:
        check_device(device)
    options = ("revision", "dtype", "device", "device_map", "quantization")
    values = (revision, dtype, device, device_map, quantization)
    given = {option: one for option, one in zip(options, values, strict=True) if one is not None}
    if not isinstance(name, str | Path):
        if unused := sorted(set(given) - ({"dtype", "device"} if untrained else set())):
            raise ValueError(
                f"A model in hand is taken as it is, so {', '.join(unused)} cannot be given: "
                "change the model itself, model.to(…) say, or name it to have it loaded."
            )
        model = unwrap(name)
        if tokenizer is None:
            raise ValueError(
                "A model in hand needs its tokenizer: load_decoder(model, tokenizer=…)."
            )
        label = label_of(model.config.name_or_path or type(model).__name__)
        if untrained:
            kind = compute_dtype(model) if dtype is None else dtype_of(dtype)
            config = copy.deepcopy(model.config)  # the twin's to change
            model = fresh_model(config, kind, seed).to(device or "cpu")  # type: ignore[arg-type]
            model.eval().requires_grad_(False)
        return _describe(model, tokenizer, label, untrained, seed, "in hand")
    if tokenizer is not None:
        raise ValueError(
            f"Model {str(name)!r} brings its tokenizer; give one with a model in hand."
        )
    chosen = preset(str(name)) | given
    if device is not None and device_map is None:
        chosen.pop("device_map", None)
    model, tokenizer, label, revision = read_model(name, chosen, untrained=untrained, seed=seed)
    model.eval().requires_grad_(False)
    return _describe(model, tokenizer, label, untrained, seed, revision)


def _describe(
    model: PreTrainedModel, tokenizer: Any, name: str, untrained: bool, seed: int, revision: str
) -> Decoder:
    """Find blocks, final stages and unembedding; check that they behave as a decoder's."""
    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    unembedding = model.get_output_embeddings()
    if unembedding is None or not hasattr(unembedding, "weight"):
        raise ValueError(f"{kind} has no unembedding; load it with AutoModelForCausalLM.")
    if not getattr(config, "num_hidden_layers", None) or not getattr(config, "hidden_size", None):
        raise ValueError(
            f"{kind}: its configuration names no number of blocks and no width. This architecture "
            "is not supported."
        )
    _check_vocabulary(tokenizer, name, int(unembedding.weight.shape[0]))
    blocks = find_blocks(model, int(config.num_hidden_layers))
    n_tokens = min(5, int(unembedding.weight.shape[0]))
    tokens = torch.arange(n_tokens, device=device_of(model.get_input_embeddings()))[None]
    with evaluating(model), one_line(kind, "cannot be run on a few tokens alone"):
        last_state, stages, logits = watch(model, blocks, unembedding, tokens)
        if tuple(last_state.shape) != (*tokens.shape, config.hidden_size):
            raise ValueError(
                f"{kind}: for {n_tokens} tokens its blocks return {list(last_state.shape)}, not a "
                f"residual stream [1, {n_tokens}, {config.hidden_size}]. This architecture is not "
                "supported."
            )
        decoder = Decoder(
            name=name,
            model=model,
            tokenizer=tokenizer,
            blocks=blocks,
            final_stages=stages,
            unembedding=unembedding,
            untrained=untrained,
            seed=seed,
            revision=revision,
            logit_scale=_logit_scale(config),
            logit_softcap=_logit_softcap(config),
        )
        with torch.inference_mode():
            rebuilt = decoder.unembed(decoder.final_norm(last_state))
        check_parts(model, blocks, tokens, logits, rebuilt)
    return decoder


def _map_by_columns(layer: nn.Linear, states: Tensor) -> Tensor:
    """Return `layer(states)`, a thousand columns at a time where that is a plain product on a CPU.

    Of a vocabulary's many columns that is up to a third faster: a part of the weights stays in the
    processor's cache while all rows pass.
    """
    here = "forward" not in vars(layer) and states.device.type == "cpu"
    if not here or not _is_plain(layer) or torch.is_grad_enabled():
        return layer(states)
    rows = states.reshape(-1, states.shape[-1])
    result = rows.new_empty(len(rows), len(layer.weight))
    for columns, weight in zip(
        result.split(COLUMNS_AT_ONCE, dim=1), layer.weight.split(COLUMNS_AT_ONCE), strict=True
    ):
        torch.mm(rows, weight.T, out=columns)
    if layer.bias is not None:
        result += layer.bias
    return result.view(*states.shape[:-1], len(layer.weight))


def _is_plain(layer: nn.Linear) -> bool:
    """Say whether a layer's weights alone make its product, wherever accelerate has put them."""
    own = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    return type(layer) is nn.Linear and not (
        own or layer._forward_hooks or layer._forward_pre_hooks
    )


def _mode_of(states: Tensor) -> AbstractContextManager[Any]:
    """Return inference mode for states from it, which no weight with gradients may meet else."""
    return torch.inference_mode() if states.is_inference() else nullcontext()


def whole_numbers(what: str, values: Any) -> list[int]:
    """Return a list of whole numbers; ValueError for anything else, called `what`."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        shown = " ".join(str(values).split())
        raise ValueError(f"{what} are whole numbers, got {shown}; give a list of them.") from None


def evaluated(
    function: Callable[Concatenate[Decoder, _P], _R],
) -> Callable[Concatenate[Decoder, _P], _R]:
    """Make a function of a decoder run it in evaluation mode, and put the mode back afterwards."""

    @functools.wraps(function)
    def run(decoder: Decoder, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with evaluating(decoder.model):
            return function(decoder, *args, **kwargs)

    return run


def _check_vocabulary(tokenizer: Any, name: str, d_vocab: int) -> None:
    """Refuse another model's tokenizer; single tokens added to a vocabulary may lie beyond it."""
    known = int(getattr(tokenizer, "vocab_size", 0))
    if known > d_vocab:
        raise ValueError(
            f"The tokenizer knows {known} tokens, but the unembedding of {name} scores {d_vocab}; "
            "give the tokenizer that belongs to the model."
        )


def _logit_scale(config: Any) -> float:
    """Return the factor on the logits: Cohere multiplies by one, Granite divides by one."""
    if divisor := getattr(config, "logits_scaling", None):
        return 1.0 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _logit_softcap(config: Any) -> float | None:
    """Return the bound of the logits' soft cap, as Gemma, RecurrentGemma and xLSTM name it."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    found = next((cap for name in names if (cap := getattr(config, name, None))), None)
    return None if found is None else float(found)


def weight_versions(decoder: Decoder) -> tuple[tuple[int, int, bytes], ...]:
    """Return where a model's weights lie, how often each was changed in place, and some values.

    The values tell changes that are not counted: those made through `.data`, or to tensors of
    inference mode.
    """
    return tuple(
        (one.data_ptr(), 0 if one.is_inference() else one._version, sample(one).numpy().tobytes())
        for one in decoder.model.state_dict().values()
    )


def sample(weight: Tensor) -> Tensor:
    """Return some values of a weight, on the CPU in float32; none of one that lies elsewhere."""
    if weight.is_meta:
        return torch.empty(0)
    flat = weight.detach().reshape(-1)
    return flat[_spread(len(flat)).to(flat.device)].float().cpu()


@functools.cache
def _spread(n: int) -> Tensor:
    """Return places all over `n`, so that no row or column of a matrix repeats among them."""
    return (torch.arange(min(SAMPLED, n), dtype=torch.float64) * 0.618033988749895 % 1 * n).long()
