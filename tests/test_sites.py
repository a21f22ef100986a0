"""Sites inside a block: equal to a full recompute with hooks, for every architecture and site."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from lib.engine.models import Decoder, load_decoder
from lib.engine.sites import ATTENTION, MLP, Site, each_head, find_parts, sweep_sites

PROMPTS = [
    [5, 9, 4, 33, 12, 8, 51],
    [5, 9, 17, 20, 6, 44, 9],
    [5, 9, 12, 40, 2, 9, 30],
    [11, 30, 22, 7, 35],
]
PAIRS = np.array([[0, 1], [0, 3], [2, 0], [3, 2]])
EARLIER = [3, 2, 3, 1]
HIDDEN = [[2, 3], [1], [3, 4], [1, 2]]
ALL = list(range(64))
N_HEADS = 4
SITES = {
    "attention": ATTENTION,
    "mlp": MLP,
    **{str(head): Site("attention", (head,)) for head in range(N_HEADS)},
    "3 and 1": Site("attention", (3, 1)),
}
NAMES = {  # of the output projection and of the MLP, written down by hand
    "gpt2": ("attn.c_proj", "mlp"),
    "gpt_neox": ("attention.dense", "mlp"),
    "gptj": ("attn.out_proj", "mlp"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp"),
    "bamba": ("self_attn.o_proj", "feed_forward"),
}
NO_PARTS = {"mamba", "bamba"}


def named(decoder: Decoder, block: int) -> tuple[nn.Module, nn.Module]:
    """Return a block's output projection and MLP by their names."""
    projection, mlp = NAMES.get(decoder.model.config.model_type, ("self_attn.o_proj", "mlp"))
    module = decoder.blocks[block]
    return module.get_submodule(projection), module.get_submodule(mlp)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def run_hooked(
    decoder: Decoder, prompt: Sequence[int], hooks: Sequence[tuple[nn.Module, Callable, str]]
) -> Tensor:
    """Return the next-token logits of a prompt under hooks."""
    handles = [
        module.register_forward_hook(hook)
        if kind == "output"
        else module.register_forward_pre_hook(hook, with_kwargs=kind == "keywords")
        for module, hook, kind in hooks
    ]
    try:
        return oracle.forward(decoder.model, [prompt])[0]
    finally:
        for handle in handles:
            handle.remove()


def own_outputs(decoder: Decoder, block: int, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a prompt's heads `[length, d]` and MLP output `[length, d_model]` in a block."""
    projection, mlp = named(decoder, block)
    seen: list[Tensor] = []
    keep_heads = (projection, lambda _m, args: seen.append(args[0].clone()), "input")
    keep_mlp = (mlp, lambda _m, _a, output: seen.append(first(output).clone()), "output")
    run_hooked(decoder, prompt, [keep_heads, keep_mlp])
    heads, written = seen if len(seen) == 2 else [seen[0], seen[-1]]
    return heads.reshape(len(prompt), -1), written.reshape(len(prompt), -1)


def with_exchange(
    decoder: Decoder, site: Site, block: int, pair: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Return the recipient's logits with the donor's output of a site, from one plain pass."""
    projection, mlp = named(decoder, block)
    recipient, donor = pair
    at, source = positions[recipient], positions[donor]
    heads, written = (part[source] for part in own_outputs(decoder, block, PROMPTS[donor]))

    def put_heads(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new = args[0].clone()
        row = new.reshape(len(PROMPTS[recipient]), N_HEADS, -1)
        chosen = range(N_HEADS) if site.heads is None else site.heads
        for head in chosen:
            row[at, head] = heads.reshape(N_HEADS, -1)[head]
        return (row.reshape(args[0].shape), *args[1:])

    def put_mlp(_module: Any, _args: Any, output: Any) -> Any:
        new = first(output).clone()
        new.view(-1, new.shape[-1])[at] = written
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hook = (mlp, put_mlp, "output") if site.part == "mlp" else (projection, put_heads, "input")
    return run_hooked(decoder, PROMPTS[recipient], [hook])


def with_tokens_hidden(
    decoder: Decoder, head: int | None, block: int, prompt: int, query: int
) -> Tensor:
    """Return a prompt's logits where heads of a block cannot see tokens, from a mask per head."""
    length = len(PROMPTS[prompt])

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**kwargs, **dict(zip(names, args, strict=False))}
        given = kwargs.get("attention_mask")
        if given is None:
            given = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        new = given.expand(-1, N_HEADS, -1, -1).clone()
        nothing = torch.finfo(new.dtype).min if new.is_floating_point() else False
        for one in range(N_HEADS) if head is None else [head]:
            for key in HIDDEN[prompt]:
                new[:, one, query, key] = nothing
        return (), {**kwargs, "attention_mask": new}

    return run_hooked(decoder, PROMPTS[prompt], [(decoder.blocks[block], mask, "keywords")])


@pytest.fixture
def parted(decoder: Decoder) -> Decoder:
    """A tiny decoder of an architecture whose blocks have parts."""
    if decoder.model.config.model_type in NO_PARTS:
        pytest.skip("its blocks have no attention and MLP")
    return decoder


@pytest.mark.parametrize("positions", ["last", EARLIER])
def test_exchange_at_a_site_equals_full_recompute(parted: Decoder, positions: Any) -> None:
    sweep = sweep_sites(parted, PROMPTS, PAIRS, SITES, positions=positions, read_ids=ALL)
    where = [len(p) - 1 for p in PROMPTS] if positions == "last" else positions
    assert sweep.edits == tuple(SITES)
    for number, site in enumerate(SITES.values()):
        for block in range(parted.n_blocks):
            for row, pair in enumerate(PAIRS.tolist()):
                expected = with_exchange(parted, site, block, pair, where).numpy()
                assert np.abs(sweep.logits[number, block, row] - expected).max() < 1e-4


def test_hiding_tokens_from_a_head_equals_a_mask_for_that_head(parted: Decoder) -> None:
    sites = {"all": ATTENTION, **each_head(parted)}
    same = np.array([[0, 0], [1, 1], [3, 3]])
    sweep = sweep_sites(parted, PROMPTS, same, sites, hidden=HIDDEN, read_ids=ALL)
    for number, site in enumerate(sites.values()):
        for block in range(parted.n_blocks):
            for row, prompt in enumerate(same[:, 0]):
                head = site.heads and site.heads[0]
                query = len(PROMPTS[prompt]) - 1
                expected = with_tokens_hidden(parted, head, block, prompt, query).numpy()
                assert np.abs(sweep.logits[number, block, row] - expected).max() < 1e-4


def test_attention_and_mlp_add_up_to_the_step_and_heads_to_the_attention(parted: Decoder) -> None:
    states = oracle.block_states(parted.model, parted.blocks, PROMPTS[0])
    for block, parts in list(enumerate(find_parts(parted)))[1:]:
        seen: dict[str, Tensor] = {}
        hooks = [
            (parts.attention, lambda _m, _a, out: seen.update(a=first(out).clone()), "output"),
            (parts.mlp, lambda _m, _a, out: seen.update(m=first(out).clone()), "output"),
            (parts.projection, lambda _m, args: seen.update(z=args[0].clone()), "input"),
            (parts.projection, lambda _m, _a, out: seen.update(o=out.clone()), "output"),
        ]
        run_hooked(parted, PROMPTS[0], hooks)
        total = parts.multiplier * (seen["a"] + seen["m"].view_as(seen["a"]))
        step = states[block] - states[block - 1]
        assert (total.view_as(step) - step).abs().max() < 1e-4
        nothing = parts.projection(torch.zeros_like(seen["z"]))
        summed = nothing.clone()
        for head in range(parts.n_heads):
            one = torch.zeros_like(seen["z"]).unflatten(-1, (parts.n_heads, -1))
            one[..., head, :] = seen["z"].unflatten(-1, (parts.n_heads, -1))[..., head, :]
            summed += parts.projection(one.flatten(-2)) - nothing
        assert (summed - seen["o"]).abs().max() < 1e-4


def test_parts_are_those_that_their_names_say(parted: Decoder) -> None:
    for block, parts in enumerate(find_parts(parted)):
        assert parts.projection is named(parted, block)[0]
        assert parts.multiplier == pytest.approx(
            getattr(parted.model.config, "residual_multiplier", 1.0), rel=1e-5
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba", "Block 0 of .* has no attention .* MambaBlock holds MambaRMSNorm, MambaMixer"),
        ("bamba", "BambaMixer.* Blocks that have: 1, 3"),
    ],
)
def test_a_block_without_parts_is_refused_with_what_it_holds(name: str, words: str) -> None:
    decoder = load_decoder(tiny_model(name), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=words):
        sweep_sites(decoder, PROMPTS, PAIRS, SITES, read_ids=ALL)


def test_a_hybrid_is_swept_in_its_blocks_that_attend() -> None:
    decoder = load_decoder(tiny_model("bamba"), tokenizer=tiny_tokenizer())
    sweep = sweep_sites(decoder, PROMPTS, PAIRS, SITES, blocks=[3, 1], read_ids=ALL)
    where = [len(prompt) - 1 for prompt in PROMPTS]
    for number, site in enumerate(SITES.values()):
        for index, block in enumerate([3, 1]):
            expected = with_exchange(decoder, site, block, [0, 3], where).numpy()
            assert np.abs(sweep.logits[number, index, 1] - expected).max() < 1e-4
