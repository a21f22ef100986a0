"""Decoders: load one, or its untrained twin, and describe where its parts are.

The parts are found by structure and by watching one small forward pass, not by a list of model
names: the blocks are the model's stack of `num_hidden_layers` modules, the final norm is whatever
runs between the last block and the unembedding. What was found is then checked.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lib.embedded import GGUF_SHA256, MODEL_NAME, fetch_embedded_model

UNTRAINED_SEED = 20260204
EMBEDDED = "embedded"


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder-only language model with its parts named.

    Attributes:
        name: what the results call the model (never a path).
        model: the Hugging Face model, in evaluation mode, without gradients.
        tokenizer: its tokenizer.
        blocks: the transformer blocks, 0 … n_blocks − 1.
        final_stages: the modules between the last block and the unembedding, in order of execution.
        unembedding: the linear map from the final-normed residual stream to the vocabulary.
        untrained: whether the weights are freshly initialised.
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
    revision: str = "unknown"
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def n_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def d_vocab(self) -> int:
        """Number of tokens that the unembedding scores."""
        return int(self.unembedding.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids must be: the device of the embedding."""
        return _embedding_device(self.model)

    def final_norm(self, states: Tensor) -> Tensor:
        """Return the final norm of residual streams `[..., d_model]`, same shape."""
        for stage in self.final_stages:
            states = untuple(stage(states))
        return states

    def unembed(self, normed: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """Return logits `[..., d_vocab]`, or `[..., len(token_ids)]`, of final-normed states.

        Asking for a few tokens multiplies by their rows of the unembedding alone.
        """
        # A slice of a larger tensor makes the product about eight times slower than its copy.
        normed = normed.contiguous()
        if token_ids is None:
            logits = self.unembedding(normed)
        else:
            rows = torch.as_tensor(token_ids, device=self.unembedding.weight.device)
            bias = None if self.unembedding.bias is None else self.unembedding.bias[rows]
            logits = nn.functional.linear(normed, self.unembedding.weight[rows], bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


def load_decoder(
    name: str | Path | PreTrainedModel = EMBEDDED,
    *,
    untrained: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    tokenizer: Any = None,
) -> Decoder:
    """Return a decoder that is ready for extraction and sweeps.

    Args:
        name: `"embedded"`, a name on the model hub, a local folder, or a model in hand (then
            `tokenizer` must be given too).
        untrained: keep the architecture and draw fresh weights from a fixed seed: the untrained
            twin, the null model of every chapter.
        dtype: a torch dtype's name, such as `"float32"` or `"bfloat16"`.
        device: where the weights go.
        tokenizer: only with a model in hand.

    Raises:
        ValueError: no such model, a folder without one, not a decoder-only model, or parts that do
            not behave as a decoder's should; the message says which and what to do.
    """
    if isinstance(name, PreTrainedModel):
        if tokenizer is None:
            raise ValueError(
                "A model in hand needs its tokenizer: load_decoder(model, tokenizer=…)."
            )
        model, label, revision = (
            name,
            _label(name.config.name_or_path or type(name).__name__),
            "in hand",
        )
        if untrained:
            model = _fresh(name.config, dtype).to(device)  # type: ignore[arg-type]
    else:
        source, label, revision = _locate(name)
        config = _read_config(source, name)
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(source)
                if untrained:
                    model = _fresh(config, dtype)
                else:
                    model = AutoModelForCausalLM.from_pretrained(
                        source, dtype=getattr(torch, dtype), use_safetensors=True
                    )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Model {str(name)!r} cannot be loaded as a causal decoder with safetensors "
                f"weights: {_first_line(error)}"
            ) from error
        if revision == "hub":
            revision = getattr(config, "_commit_hash", None) or "hub"
        model = model.to(device)  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    return _describe(model, tokenizer, label, untrained, revision)


def untuple(output: Any) -> Tensor:
    """Return the residual stream from a block's output, which is a tensor or a tuple led by one."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the loading chatter of transformers (bars, notes), not its errors."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _locate(name: str | Path) -> tuple[str, str, str]:
    """Return (what from_pretrained takes, the model's label, its revision)."""
    if str(name) == EMBEDDED:
        return str(fetch_embedded_model()), MODEL_NAME, f"gguf sha256 {GGUF_SHA256[:12]}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"Folder {folder} holds no model: config.json is missing. Give a folder written by "
                "save_pretrained, a hub name, or 'embedded'."
            )
        return str(folder), _label(str(folder)), "local folder"
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")):
        raise ValueError(
            f"Folder {folder} does not exist. Give a local folder, a hub name, or 'embedded'."
        )
    return str(name), str(name), "hub"


def _label(path: str) -> str:
    """Return the last part of a path, so that results never name a machine's folders."""
    return Path(path).name or "model"


def _read_config(source: str, name: str | Path) -> Any:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No model {str(name)!r} was found: {_first_line(error)} Check the spelling and the "
            "network (gated models also need access and a login), give a local folder, or use "
            "'embedded'."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"Model {str(name)!r} is an encoder–decoder ({config.model_type}); this book studies "
            "decoder-only models. Choose a causal language model."
        )
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fresh(config: Any, dtype: str) -> PreTrainedModel:
    """Return a freshly initialised model from a fixed seed; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def _describe(
    model: PreTrainedModel, tokenizer: Any, name: str, untrained: bool, revision: str
) -> Decoder:
    """Find blocks, final stages and unembedding; check causality and the way to the logits."""
    config = model.config.get_text_config()
    unembedding = model.get_output_embeddings()
    if unembedding is None or not hasattr(unembedding, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no unembedding; load it with AutoModelForCausalLM."
        )
    blocks = _find_blocks(model, int(config.num_hidden_layers))
    n_tokens = min(5, int(unembedding.weight.shape[0]))
    tokens = torch.arange(n_tokens, device=_embedding_device(model))[None]
    last_state, stages, logits = _watch(model, blocks, unembedding, tokens)
    decoder = Decoder(
        name=name,
        model=model,
        tokenizer=tokenizer,
        blocks=blocks,
        final_stages=stages,
        unembedding=unembedding,
        untrained=untrained,
        revision=revision,
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )
    with torch.inference_mode():
        rebuilt = decoder.unembed(decoder.final_norm(last_state))
        changed = tokens.clone()
        changed[0, -1] = 0
        earlier = model(changed, use_cache=False).logits[:, :-1]
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    scale = float(logits.float().abs().max().clamp(min=1.0))
    if float((rebuilt - logits).float().abs().max()) > tolerance * scale:
        raise ValueError(
            f"{type(model).__name__}: final norm and unembedding of the last block's output do not "
            "give the model's logits, so its logit lens would be wrong. This architecture is not "
            "supported."
        )
    if float((earlier - logits[:, :-1]).float().abs().max()) > tolerance * scale:
        raise ValueError(
            f"{type(model).__name__} is not causal: changing the last token changes earlier logits "
            "(an encoder-only model?). Choose a decoder-only model."
        )
    return decoder


def _embedding_device(model: PreTrainedModel) -> torch.device:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


def _logit_scale(config: Any) -> float:
    """Return the factor on the logits: Cohere multiplies by one, Granite divides by one."""
    if divisor := getattr(config, "logits_scaling", None):
        return 1.0 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _find_blocks(model: nn.Module, n_blocks: int) -> tuple[nn.Module, ...]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks: list[list[nn.Module]] = [list(s) for s in lists if len(s) == n_blocks]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__}: no stack of num_hidden_layers = {n_blocks} blocks was found. "
            "This architecture is not supported."
        )
    sizes = [_n_parameters(stack) for stack in stacks]
    return tuple(stacks[sizes.index(max(sizes))])


def _n_parameters(stack: list[nn.Module]) -> int:
    return sum(parameter.numel() for block in stack for parameter in block.parameters())


def _watch(
    model: PreTrainedModel, blocks: tuple[nn.Module, ...], unembedding: nn.Module, tokens: Tensor
) -> tuple[Tensor, tuple[nn.Module, ...], Tensor]:
    """Run `tokens`; return the last block's output, the modules run after it, and the logits."""
    ran: list[nn.Module] = []
    outputs: dict[nn.Module, Tensor] = {}
    inside = {m for block in blocks for m in block.modules() if m is not block}
    watched = [module for module in model.modules() if module not in inside]

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        ran.append(module)
        if module is blocks[-1]:
            outputs[module] = untuple(output)

    handles = [module.register_forward_hook(note) for module in watched]
    try:
        with torch.inference_mode():
            logits = model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    n_runs = {block: ran.count(block) for block in blocks}
    if any(count != 1 for count in n_runs.values()) or unembedding not in ran:
        raise ValueError(
            f"{type(model).__name__}: expected each of {len(blocks)} blocks to run once and then "
            "the unembedding; it did not. This architecture is not supported."
        )
    after = ran[ran.index(blocks[-1]) + 1 : ran.index(unembedding)]
    stages = [m for m in after if blocks[-1] not in set(m.modules())]
    parts = {part for stage in stages for part in stage.modules() if part is not stage}
    return outputs[blocks[-1]], tuple(stage for stage in stages if stage not in parts), logits
