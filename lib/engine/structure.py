"""The parts of a decoder, found by structure and by watching small passes, and their self-test.

The blocks are the model's stack of `num_hidden_layers` modules, the final norm is whatever runs
between the last block and the unembedding. No list of model names is needed, and what is found is
checked: a model on which it does not hold is refused with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def untuple(output: Any) -> Tensor:
    """Return the residual stream from a block's output, which is a tensor or a tuple led by one."""
    return output[0] if isinstance(output, tuple) else output


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes, which for offloaded weights is not where they lie."""
    hook = getattr(module, "_hf_hook", None)
    for part in [hook, *getattr(hook, "hooks", ())]:
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


def weights_of(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a module's own weights can be read, offloaded or not."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        return align_module_device(module)
    return nullcontext()


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the residual stream: that of the embedding."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.dtype


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model inside what wraps one, its adapters included.

    `torch.compile` and PEFT (LoRA and other adapters that lie in the layers) wrap a model, and so
    do torch's parallel modules. The model inside is run as it is, not compiled.

    Raises:
        ValueError: nothing of the kind, or a wrapper without which the model computes otherwise.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
                raise ValueError(
                    f"{type(inner).__name__} puts learned tokens before each prompt, which the "
                    "model inside does not have; adapters in the layers (LoRA) can be measured."
                )
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise ValueError(
                f"{type(model).__name__} is no model of transformers and holds none; pass one from "
                "AutoModelForCausalLM, a hub name or a folder."
            )
    if any(module._compiled_call_impl is not None for module in inner.modules()):
        raise ValueError(
            f"{type(inner).__name__} was compiled in place by .compile(), after which hooks may "
            "not run; pass the model uncompiled, or torch.compile(model)."
        )
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, without dropout, while the context lasts."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def one_line(kind: str, what: str) -> Iterator[None]:
    """Turn what goes wrong inside into one line; what names the model's class already is one."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError) as e:
        if isinstance(e, ValueError) and str(e).startswith(kind):
            raise
        bare = isinstance(e, KeyError)  # its text is the key alone
        said = f"{type(e).__name__} {e}" if bare else str(e)
        reason = (said.strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise ValueError(f"{kind} {what}: {reason}. This architecture is not supported.") from e


def find_blocks(model: PreTrainedModel, n_blocks: int) -> tuple[nn.Module, ...]:
    """Return the stack of `n_blocks` modules, in the part that writes text if one lies there.

    Of several it is the one with most parameters.

    Raises:
        ValueError: there is none.
    """
    stacks: list[list[nn.Module]] = []
    for part in (model.get_decoder(), model):  # an image tower may be as deep, and larger
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        stacks = stacks or [list(s) for s in lists if len(s) == n_blocks]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__}: no stack of num_hidden_layers = {n_blocks} blocks was found. "
            "This architecture is not supported."
        )
    sizes = [_n_parameters(stack) for stack in stacks]
    return tuple(stacks[sizes.index(max(sizes))])


def _n_parameters(stack: list[nn.Module]) -> int:
    return sum(parameter.numel() for block in stack for parameter in block.parameters())


def watch(
    model: PreTrainedModel, blocks: tuple[nn.Module, ...], unembedding: nn.Module, tokens: Tensor
) -> tuple[Tensor, tuple[nn.Module, ...], Tensor]:
    """Run `tokens`; return the last block's output, the modules run after it, and the logits.

    Raises:
        ValueError: the blocks do not each run once before the unembedding.
    """
    ran: list[nn.Module] = []
    outputs: dict[nn.Module, Tensor] = {}
    inside = {m for block in blocks for m in block.modules() if m is not block}
    watched = [module for module in model.modules() if module not in inside]

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        ran.append(module)
        if module is blocks[-1]:
            outputs[module] = untuple(output)

    with _hooked(watched, note):
        logits = _logits(model, tokens)
    in_order = [module for module in ran if module in set(blocks)]
    if in_order != list(blocks) or unembedding not in ran:
        raise ValueError(
            f"{type(model).__name__}: expected each of {len(blocks)} blocks to run once and then "
            "the unembedding; it did not. This architecture is not supported."
        )
    after = ran[ran.index(blocks[-1]) + 1 : ran.index(unembedding)]
    stages = [m for m in after if blocks[-1] not in set(m.modules())]
    parts = {part for stage in stages for part in stage.modules() if part is not stage}
    return outputs[blocks[-1]], tuple(stage for stage in stages if stage not in parts), logits


def check_parts(
    model: PreTrainedModel,
    blocks: tuple[nn.Module, ...],
    tokens: Tensor,
    logits: Tensor,
    rebuilt: Tensor,
) -> None:
    """Check that what was found behaves as a decoder's parts do.

    Args:
        model: the model.
        blocks: its blocks.
        tokens: a few tokens `[1, length]`.
        logits: the model's logits of them `[1, length, d_vocab]`.
        rebuilt: the logit lens at the last block, which must be the same.

    Raises:
        ValueError: logits that cannot be compared or are not what the parts give; blocks that do
            not carry the residual stream; a model that is not causal.
    """
    name = type(model).__name__
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"{name}: its logits are not finite in {str(logits.dtype)[6:]}; choose another dtype, "
            "such as float32 or bfloat16."
        )
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    tolerance *= float(logits.float().abs().max().clamp(min=1.0))

    def differ(one: Tensor, other: Tensor) -> bool:
        return float((one.float() - other.to(one.device).float()).abs().max()) > tolerance

    if differ(rebuilt, logits):
        raise ValueError(
            f"{name}: final norm and unembedding of the last block's output do not give the "
            "model's logits, so its logit lens would be wrong. This architecture is not supported."
        )
    changed = tokens.clone()
    changed[0, -1] = 0
    if differ(_logits(model, changed)[:, :-1], logits[:, :-1]):
        raise ValueError(
            f"{name} is not causal: changing the last token changes earlier logits (an "
            "encoder-only model?). Choose a decoder-only model."
        )
    with _hooked(blocks, _replace(lambda states: states.clone())):
        same = _logits(model, tokens)
    with _hooked(blocks[:1], _replace(_disturb_last)):
        other = _logits(model, tokens)
    if differ(same, logits) or differ(other[:, :-1], logits[:, :-1]):
        raise ValueError(
            f"{name}: an edit after its blocks does not act on the edited token alone. This "
            "architecture is not supported."
        )
    if torch.equal(other[:, -1], logits[:, -1]):
        raise ValueError(
            f"{name}: an edit after its first block does not reach the logits, so the residual "
            "stream is not what its blocks return. This architecture is not supported."
        )


def _disturb_last(states: Tensor) -> Tensor:
    disturbed = states.clone()
    disturbed[:, -1] = disturbed[:, -1].flip(-1)
    return disturbed


def _replace(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = edit(untuple(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield
