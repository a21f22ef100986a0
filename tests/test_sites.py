"""Sites inside a block: equal to a full recompute with hooks, for every architecture and site."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import WithoutFloat64, count_tokens, tiny_model, tiny_tokenizer
from tiny import tiny_config
from torch import Tensor, nn
from transformers import BambaForCausalLM

from lib.engine import sites
from lib.engine.models import Decoder, load_decoder
from lib.engine.parts import Parts, find_parts
from lib.engine.replay import Forest, Prefix
from lib.engine.sites import (
    ATTENTION,
    MLP,
    Site,
    each_head,
    head_outputs,
    patch_heads,
    sweep_sites,
)

PROMPTS = [
    [5, 9, 4, 33, 12, 8, 51],
    [5, 9, 17, 20, 6, 44, 9],
    [5, 9, 12, 40, 2, 9, 30],
    [11, 30, 22, 7, 35],
]
PAIRS = np.array([[0, 1], [0, 3], [2, 0], [3, 2]])
SAME = PAIRS[:, [0, 0]]
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
ARCHITECTURES = (
    "llama",
    "mistral",  # a window shorter than the prompts
    "qwen2",  # biases
    "qwen3",  # normed queries
    "gemma2",  # norms behind attention and MLP, soft caps
    "gemma3_text",
    "phi3",  # one projection for queries, keys and values
    "gpt2",  # fused, transposed
    "gpt_neox",  # attention and MLP side by side
    "gptj",
    "opt",  # no module for the MLP
    "bloom",  # biases in place of positions
    "falcon",  # one key for all heads
    "olmo2",
    "stablelm",
    "smollm3",
    "granite",  # a residual multiplier
    "cohere",
    "mixtral",  # experts
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",  # latent attention
)


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


def exchange_hook(
    decoder: Decoder, site: Site, block: int, pair: Sequence[int]
) -> tuple[nn.Module, Callable, str]:
    """Return the hook that puts the donor's output of a site into the recipient's pass."""
    projection, mlp = named(decoder, block)
    recipient, donor = pair
    heads, written = (part[-1] for part in own_outputs(decoder, block, PROMPTS[donor]))

    def put_heads(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new = args[0].clone()
        row = new.reshape(len(PROMPTS[recipient]), N_HEADS, -1)
        chosen = range(N_HEADS) if site.heads is None else site.heads
        for head in chosen:
            row[-1, head] = heads.reshape(N_HEADS, -1)[head]
        return (row.reshape(args[0].shape), *args[1:])

    def put_mlp(_module: Any, _args: Any, output: Any) -> Any:
        new = first(output).clone()
        new.view(-1, new.shape[-1])[-1] = written
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return (mlp, put_mlp, "output") if site.part == "mlp" else (projection, put_heads, "input")


def with_exchange(decoder: Decoder, site: Site, block: int, pair: Sequence[int]) -> Tensor:
    """Return the recipient's logits with the donor's output of a site, from one plain pass."""
    hook = exchange_hook(decoder, site, block, pair)
    return run_hooked(decoder, PROMPTS[pair[0]], [hook])


def with_tokens_hidden(
    decoder: Decoder,
    heads: dict[int, list[int]],
    prompt: int,
    hidden: Sequence[Sequence[int]] = HIDDEN,
) -> Tensor:
    """Return a prompt's logits where heads, by block, cannot see tokens: from a mask per head."""
    length = len(PROMPTS[prompt])

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**kwargs, **dict(zip(names, args, strict=False))}
        given = kwargs.get("attention_mask")
        if given is None:
            given = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        new = given.expand(-1, N_HEADS, -1, -1).clone()
        nothing = torch.finfo(new.dtype).min if new.is_floating_point() else False
        for head, key in product(heads[decoder.blocks.index(module)], hidden[prompt]):
            new[:, head, -1, key] = nothing
        return (), {**kwargs, "attention_mask": new}

    hooks = [(decoder.blocks[block], mask, "keywords") for block in heads]
    return run_hooked(decoder, PROMPTS[prompt], hooks)


def outputs_of(decoder: Decoder, parts: Parts) -> dict[str, Tensor]:
    """Return what the parts of a block put out on a prompt, and what entered the projection."""
    seen: dict[str, Tensor] = {}
    hooks = [
        (parts.attention, lambda _m, _a, out: seen.update(a=first(out).clone()), "output"),
        (parts.mlp, lambda _m, _a, out: seen.update(m=first(out).clone()), "output"),
        (parts.projection, lambda _m, args: seen.update(z=args[0].clone()), "input"),
        (parts.projection, lambda _m, _a, out: seen.update(o=out.clone()), "output"),
    ]
    run_hooked(decoder, PROMPTS[0], hooks)
    return seen


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parted(request: pytest.FixtureRequest) -> Decoder:
    """A tiny decoder of an architecture whose blocks have parts."""
    return load_decoder(tiny_model(request.param), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def hybrid() -> Decoder:
    """A tiny decoder whose blocks are state-space and attention in turn."""
    config = tiny_config("bamba")
    config.attn_layer_indices = [1, 3]
    torch.manual_seed(7)
    return load_decoder(BambaForCausalLM(config), tokenizer=tiny_tokenizer())


def test_exchange_at_a_site_equals_full_recompute(parted: Decoder) -> None:
    sweep = sweep_sites(parted, PROMPTS, PAIRS, SITES, read_ids=ALL)
    assert sweep.edits == tuple(SITES)
    for number, site in enumerate(SITES.values()):
        for block in range(parted.n_blocks):
            for row, pair in enumerate(PAIRS.tolist()):
                expected = with_exchange(parted, site, block, pair).numpy()
                assert np.abs(sweep.logits[number, block, row] - expected).max() < 1e-4


GROUPS = {
    "one": [(2, 1)],
    "across blocks": [(3, 0), (1, 2), (3, 3), (0, 1)],
    "none": [],
    "late": [(3, 2), (3, 1)],
    "early": [(1, 0), (2, 3)],
}


def logits_of_tokens(logits: Tensor, _pair: Tensor) -> dict[str, Tensor]:
    return {str(token): logits[:, token] for token in ALL}


def by_block(group: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    return {block: [head for own, head in group if own == block] for block, _ in group}


def check_groups(decoder: Decoder, groups: dict[str, list[tuple[int, int]]]) -> None:
    """Compare `patch_heads` with one plain pass a group and pair."""
    read = patch_heads(decoder, PROMPTS, PAIRS, groups, measure=logits_of_tokens)
    logits = np.stack([read[str(token)] for token in ALL], axis=-1)
    for number, group in enumerate(groups.values()):
        for row, pair in enumerate(PAIRS.tolist()):
            hooks = [
                exchange_hook(decoder, Site("attention", tuple(heads)), block, pair)
                for block, heads in by_block(group).items()
            ]
            expected = run_hooked(decoder, PROMPTS[pair[0]], hooks).numpy()
            assert np.abs(logits[number, row] - expected).max() < 1e-4


def check_blinded_groups(decoder: Decoder, groups: dict[str, list[tuple[int, int]]]) -> None:
    """Compare `patch_heads` of hidden tokens with one plain pass under masks a group and pair.

    Every second group loses sight of the first token instead.
    """
    same = np.array([[0, 0], [1, 1], [3, 3]])
    first = [[0]] * len(PROMPTS)
    hidden = {name: (HIDDEN, first)[number % 2] for number, name in enumerate(groups)}
    read = patch_heads(decoder, PROMPTS, same, groups, hidden=hidden, measure=logits_of_tokens)
    logits = np.stack([read[str(token)] for token in ALL], axis=-1)
    for number, (name, group) in enumerate(groups.items()):
        for row, prompt in enumerate(same[:, 0]):
            heads = by_block(group)
            expected = with_tokens_hidden(decoder, heads, prompt, hidden[name]).numpy()
            assert np.abs(logits[number, row] - expected).max() < 1e-4


def test_heads_of_several_blocks_together_equal_full_recompute(parted: Decoder) -> None:
    check_groups(parted, GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_from_its_first_block_on_equals_full_recompute(parted: Decoder, name: str) -> None:
    check_groups(parted, {name: GROUPS[name]})
    check_blinded_groups(parted, {name: GROUPS[name]})


def test_hiding_tokens_from_a_head_equals_a_mask_for_that_head(parted: Decoder) -> None:
    heads = list(product(range(parted.n_blocks), range(N_HEADS)))
    alone = {f"{block}.{head}": [(block, head)] for block, head in heads}
    whole = {str(block): [own for own in heads if own[0] == block] for block, _ in heads}
    check_blinded_groups(parted, {**alone, **whole})


def test_hiding_tokens_from_heads_of_several_blocks_equals_a_mask(parted: Decoder) -> None:
    check_blinded_groups(parted, GROUPS)


def test_groups_and_pairs_in_several_passes_equal_full_recompute(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "MAX_ROW_TOKENS", 2)
    monkeypatch.setattr(sites, "UNEMBEDDING_ROWS", 4)
    check_groups(llama, GROUPS)
    check_blinded_groups(llama, GROUPS)


def count_tokens_and_blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return a list that grows by each pass of heads: the tokens of a row, and its first block."""
    passes: list[tuple[int, list[int]]] = []
    run = sites._run_last

    def counted(decoder: Decoder, given: Any, firsts: Sequence[int] = (0,)) -> Tensor:
        alone = isinstance(given, Prefix)
        n_tokens = len(given.tokens) if alone else given.numel()
        passes.append((n_tokens, list(firsts) if alone else [0]))
        return run(decoder, given, firsts)

    monkeypatch.setattr(sites, "_run_last", counted)
    return passes


def test_heads_are_exchanged_in_a_pass_over_the_last_tokens_from_the_first_block_edited(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups side by side, those from the very first block on among them."""
    check_groups(llama, GROUPS)  # compares, once
    passes = count_tokens_and_blocks(monkeypatch)
    check_groups(llama, GROUPS)
    for name in GROUPS:
        check_groups(llama, {name: GROUPS[name]})
    n = len(PAIRS)
    together = [(n, [0, 1, 2, 3, llama.n_blocks])]
    assert passes == together + [(n, [first]) for first in (2, 0, llama.n_blocks, 3, 1)]


@pytest.mark.parametrize("what", ["mask", "keys", "states"])
def test_last_tokens_that_come_out_wrong_alone_are_run_with_their_prompts(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    alone = sites._last_token

    def damaged(*given: Any) -> Prefix:
        prefix = alone(*given)
        if what == "states":
            return replace(prefix, states=prefix.states + 1)
        if what == "mask":
            masked = torch.full_like(prefix.block_inputs[0]["attention_mask"], -1e9)
            inputs = tuple({**own, "attention_mask": masked} for own in prefix.block_inputs)
            return replace(prefix, block_inputs=inputs)
        for layer in prefix.cache.layers:
            layer.keys = layer.keys * 2
        return prefix

    monkeypatch.setattr(sites, "_last_token", damaged)
    check_groups(decoder, GROUPS)
    passes = count_tokens_and_blocks(monkeypatch)
    check_groups(decoder, GROUPS)
    lengths = [len(PROMPTS[recipient]) for recipient, _ in PAIRS]
    assert sum(n_tokens for n_tokens, _ in passes) == len(GROUPS) * sum(lengths)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "cohere"])
def test_last_tokens_run_after_their_prompts_from_the_first_block_on(architecture: str) -> None:
    """Also where what enters the first block depends on the token's place."""
    decoder = load_decoder(tiny_model(architecture), tokenizer=tiny_tokenizer())
    assert sites._last_tokens_are_exact(decoder, PROMPTS, np.arange(len(PROMPTS)))


def test_attention_and_mlp_add_up_to_the_step_and_heads_to_the_attention(parted: Decoder) -> None:
    states = oracle.block_states(parted.model, parted.blocks, PROMPTS[0])
    for block, parts in list(enumerate(find_parts(parted)))[1:]:
        seen = outputs_of(parted, parts)
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


def test_what_heads_add_sums_to_what_the_attention_adds_less_its_bias(parted: Decoder) -> None:
    cells = [(2, head) for head in range(N_HEADS)]
    written = head_outputs(parted, PROMPTS, cells)
    parts = find_parts(parted)[2]
    seen = outputs_of(parted, parts)
    if parts.attention is parts.projection:
        nothing = parts.projection(torch.zeros_like(seen["z"]))
        expected = parts.multiplier * (seen["o"] - nothing)[0, -1]
        assert (written[:, 0].sum(0) - expected).abs().max() < 1e-4
    else:  # a norm behind the projection: each head's part is what is lost without it
        lost = seen["z"].clone().unflatten(-1, (N_HEADS, -1))
        lost[..., 1, :] = 0
        without = parts.attention(parts.projection(lost.flatten(-2)))
        expected = parts.multiplier * (seen["a"] - without)[0, -1]
        assert (written[1, 0] - expected).abs().max() < 1e-4


def test_each_head_is_a_site_by_its_number(parted: Decoder) -> None:
    assert each_head(parted) == {str(head): SITES[str(head)] for head in range(N_HEADS)}


def test_parts_are_those_that_their_names_say(parted: Decoder) -> None:
    for block, parts in enumerate(find_parts(parted)):
        assert parts.projection is named(parted, block)[0]
        assert parts.multiplier == pytest.approx(
            getattr(parted.model.config, "residual_multiplier", 1.0), rel=1e-5
        )


def test_a_head_that_looks_at_its_own_token_alone_is_a_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As some of Qwen2.5's do in the first block: hiding all other tokens changes nothing."""
    decoder = load_decoder(tiny_model("qwen2"), tokenizer=tiny_tokenizer())
    attention = decoder.blocks[0].self_attn
    width = attention.head_dim
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight[:width] *= 0
            part.bias[:width] = 0
            part.bias[0] = 300  # in the plane of the fastest rotation
    (parts,) = find_parts(decoder, [0])
    assert parts.n_heads == N_HEADS


def test_a_block_without_parts_is_refused_with_what_it_holds(hybrid: Decoder) -> None:
    mamba = load_decoder(tiny_model("mamba"), tokenizer=tiny_tokenizer())
    for decoder, words in (
        (mamba, "Block 0 of .* has no attention .* MambaBlock holds MambaRMSNorm, MambaMixer"),
        (hybrid, "BambaMixer.* Blocks that have: 1, 3"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep_sites(decoder, PROMPTS, PAIRS, SITES, read_ids=ALL)


def test_a_hybrid_is_swept_in_its_blocks_that_attend(hybrid: Decoder) -> None:
    sweep = sweep_sites(hybrid, PROMPTS, PAIRS, SITES, blocks=[3, 1], read_ids=ALL)
    for number, site in enumerate(SITES.values()):
        for index, block in enumerate([3, 1]):
            expected = with_exchange(hybrid, site, block, [0, 3]).numpy()
            assert np.abs(sweep.logits[number, index, 1] - expected).max() < 1e-4
    group = {"across blocks": [(1, 2), (3, 0), (3, 3)]}
    check_groups(hybrid, group)  # from whole prompts: a state-space cache is not shared
    check_blinded_groups(hybrid, group)


def test_an_exchange_with_oneself_changes_nothing(llama: Decoder) -> None:
    same = np.array([[0, 0], [3, 3]])
    sweep = sweep_sites(llama, PROMPTS, same, SITES, read_ids=ALL)
    assert np.abs(sweep.logits - sweep.clean_logits).max() < 1e-5 * np.abs(sweep.logits).max()


def test_a_measure_sees_each_pair_by_its_own_index(llama: Decoder) -> None:
    def measure(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"pair": pair.float(), "token": logits[:, 40]}

    sweep = sweep_sites(llama, PROMPTS, PAIRS, SITES, read_ids=[9, 40], measure=measure)
    assert (sweep.measures["pair"] == np.arange(len(PAIRS))).all()
    assert np.abs(sweep.measures["token"] - sweep.logits[..., 1]).max() < 1e-5
    frame = sweep.to_frame()
    row = frame[(frame.edit == "2") & (frame.block == 3) & (frame.recipient == 2)]
    assert row.token.item() == sweep.measures["token"][4, 3, 2]


def test_sites_leave_the_model_as_it_was(llama: Decoder) -> None:
    def fail(_logits: Tensor, _pair: Tensor) -> dict[str, Tensor]:
        raise ZeroDivisionError

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]

    hooked, before = hooks(), oracle.forward(llama.model, PROMPTS[:3])
    for run in (
        lambda: sweep_sites(llama, PROMPTS, PAIRS, SITES, measure=fail),
        lambda: patch_heads(llama, PROMPTS, PAIRS, GROUPS, measure=fail),
        lambda: patch_heads(
            llama,
            PROMPTS,
            SAME,
            GROUPS,
            hidden=dict.fromkeys(GROUPS, HIDDEN),
            measure=fail,
        ),
    ):
        with pytest.raises(ZeroDivisionError):
            run()
    assert torch.equal(oracle.forward(llama.model, PROMPTS[:3]), before)
    assert hooks() == hooked


@pytest.mark.parametrize(
    ("sites", "pairs", "options", "words"),
    [
        ({"x": Site("attention", (4,))}, PAIRS, {}, "'x': head 4 does not exist; .* 0 to 3"),
        ({"x": Site("attention", (-1,))}, PAIRS, {}, "head -1 does not exist"),
        ({"x": Site("norm")}, PAIRS, {}, "'norm' is neither 'attention' nor 'mlp'"),  # type: ignore[arg-type]
        ({"x": Site("mlp", (0,))}, PAIRS, {}, "an MLP has no heads"),
        ({}, PAIRS, {}, "No sites were given"),
        (SITES, PAIRS, {"blocks": [4]}, "Block 4 does not exist"),
        (SITES, PAIRS, {"blocks": []}, "No sites were given, or no blocks"),
        (SITES, PAIRS, {"read_ids": [64]}, "Token 64 cannot be read"),
        (SITES, PAIRS.astype(float), {}, "Pairs are indices of prompts, whole numbers"),
        (SITES, np.array([[0, 4]]), {}, "up to 4, but there are 4 prompts"),
        (SITES, np.array([0, 1]), {}, r"shape \[n_pairs, 2\]"),
    ],
)
def test_bad_input_is_named_before_any_pass(
    llama: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    sites: dict[str, Site],
    pairs: np.ndarray,
    options: dict,
    words: str,
) -> None:
    find_parts(llama)  # compares, once
    passes = count_tokens(llama, monkeypatch)
    with pytest.raises(ValueError, match=words):
        sweep_sites(llama, PROMPTS, pairs, sites, **{"read_ids": ALL, **options})
    assert passes == []


@pytest.mark.parametrize(
    ("pairs", "hidden", "words"),
    [
        (PAIRS, HIDDEN, "name one prompt twice"),
        (SAME, HIDDEN[:2], "for 2 prompts of 4"),
        (SAME, [[5], [5], [5], [4]], "^Prompt 3: position 4 cannot be hidden .* 4; .* 0 to 3"),
        (SAME, [[-1]] * 4, "^Prompt 0: position -1 cannot"),
    ],
)
def test_tokens_that_cannot_be_hidden_are_named_before_any_pass(
    llama: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    pairs: np.ndarray,
    hidden: list[list[int]],
    words: str,
) -> None:
    find_parts(llama)  # compares, once
    passes = count_tokens(llama, monkeypatch)
    with pytest.raises(ValueError, match=words):
        patch_heads(
            llama,
            PROMPTS,
            pairs,
            {"g": [(1, 0)]},
            hidden={"g": hidden},
            measure=logits_of_tokens,
        )
    assert passes == []


def test_a_prompt_of_one_token_is_refused_before_any_pass(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_parts(llama)  # compares, once
    passes, prompts = count_tokens(llama, monkeypatch), [*PROMPTS[:3], [11]]
    for run in (
        lambda: sweep_sites(llama, prompts, PAIRS, SITES, read_ids=ALL),
        lambda: patch_heads(llama, prompts, PAIRS, GROUPS, measure=logits_of_tokens),
        lambda: head_outputs(llama, prompts, [(2, 1)]),
    ):
        with pytest.raises(ValueError, match=r"^Prompt 3 would be edited at position 0"):
            run()
    assert passes == []


def test_pairs_may_be_read_backwards(llama: Decoder) -> None:
    sites, back = {"x": ATTENTION}, PAIRS[:, ::-1]
    found = [
        sweep_sites(llama, PROMPTS, pairs, sites, blocks=[1], read_ids=ALL).logits
        for pairs in (back, back.copy())
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (
            lambda logits, pair: {"size": torch.where(pair == 2, torch.nan, logits.amax(-1))},
            r"^Measure 'size' is nan for group 'g', pair 2 \(recipient 2, donor 0\)",
        ),
        (lambda logits, _: {"size": logits.amax().reshape(1)}, r"^Measure 'size' is \(1,\); exp"),
    ],
)
def test_a_measure_of_heads_that_gives_no_number_a_row_is_named(
    llama: Decoder, measure: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        patch_heads(llama, PROMPTS, PAIRS, {"none": [], "g": [(1, 0)]}, measure=measure)


def test_measures_of_heads_need_no_float64_where_they_are(llama: Decoder) -> None:
    groups = {"g": [(1, 0)]}
    plain, other = (
        patch_heads(
            llama, PROMPTS, PAIRS, groups,
            measure=lambda logits, _, kind=kind: {"size": logits[:, 4].clone().as_subclass(kind)},
        )
        for kind in (Tensor, WithoutFloat64)
    )  # fmt: skip
    assert np.array_equal(plain["size"], other["size"])


def test_a_model_that_puts_out_no_number_is_named_with_group_and_pair() -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[4, 3] = torch.nan

    def choice(logits: Tensor, _pair: Tensor) -> dict[str, Tensor]:
        return {"choice": logits.argmax(-1).double()}

    with pytest.raises(ValueError, match=r"^Last state of group 'g', pair 1 \(recipient 0, don"):
        patch_heads(decoder, PROMPTS, np.array([[2, 2], [0, 3]]), {"g": []}, measure=choice)


def test_no_heads_are_refused(llama: Decoder) -> None:
    with pytest.raises(ValueError, match="No heads were given"):
        head_outputs(llama, PROMPTS, [])


def test_a_group_names_a_head_or_block_that_does_not_exist(llama: Decoder) -> None:
    for group, words in (([(1, 4)], "'g': head 4"), ([(9, 0)], "Block 9 does not exist")):
        with pytest.raises(ValueError, match=words):
            patch_heads(llama, PROMPTS, PAIRS, {"g": group}, measure=logits_of_tokens)
    with pytest.raises(ValueError, match="No groups of heads"):
        patch_heads(llama, PROMPTS, PAIRS, {}, measure=logits_of_tokens)
    hidden = {"other": HIDDEN}
    with pytest.raises(ValueError, match="'g' has no hidden positions"):
        patch_heads(llama, PROMPTS, SAME, {"g": [(1, 0)]}, hidden=hidden, measure=logits_of_tokens)


def test_what_was_run_once_serves_sites_heads_and_outputs(parted: Decoder) -> None:
    same = np.array([[0, 0], [2, 2], [3, 3]])
    hidden = dict.fromkeys(GROUPS, HIDDEN)
    cells, rows = [(2, 1), (0, 3)], np.array([3, 0])
    forests: list[Forest] = []

    def everything(**given: Any) -> list[np.ndarray]:
        options = {"read_ids": ALL, **given}
        found = [
            sweep_sites(parted, PROMPTS, PAIRS, SITES, **options).logits,
            sweep_sites(parted, PROMPTS, PAIRS[:2], SITES, **options).logits,
            *patch_heads(
                parted, PROMPTS, PAIRS, GROUPS, measure=logits_of_tokens, **given
            ).values(),
            *patch_heads(
                parted, PROMPTS, same, GROUPS, hidden=hidden, measure=logits_of_tokens, **given
            ).values(),
        ]
        return [*found, head_outputs(parted, PROMPTS, cells, rows=rows, **given).numpy()]

    alone = everything()
    for found in (everything(forests=forests), everything(forests=forests)):
        for one, other in zip(alone, found, strict=True):
            assert np.abs(one - other).max() < 1e-4
    chosen = head_outputs(parted, [PROMPTS[row] for row in rows], cells).numpy()
    assert np.abs(alone[-1] - chosen).max() < 1e-5


def test_of_prompts_that_were_run_the_last_tokens_alone_are_run_again(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those from the first block on of which something is read."""
    sweep_sites(llama, PROMPTS, PAIRS, SITES, read_ids=ALL)  # compares, once
    passes, forests = count_tokens(llama, monkeypatch), []
    beginnings = {tuple(prompt[: n + 1]) for prompt in PROMPTS for n in range(len(prompt))}
    ran = dict.fromkeys(range(llama.n_blocks), 0)
    for index, block in enumerate(llama.blocks):

        def counting(hidden: torch.Tensor, *, index=index, own=block.forward, **told):
            ran[index] += hidden.shape[0] * hidden.shape[1]
            return own(hidden, **told)

        monkeypatch.setattr(block, "forward", counting)
    edited = {"one": [(2, 1)]}
    for n_tokens in (len(beginnings), 0):  # rows call blocks, not the model
        ran.update(dict.fromkeys(ran, 0))
        patch_heads(llama, PROMPTS, PAIRS, edited, measure=logits_of_tokens, forests=forests)
        assert sum(passes) == n_tokens
        passes.clear()
    n_edited = len(PAIRS)
    none = patch_heads(llama, PROMPTS, PAIRS, {"": []}, measure=logits_of_tokens, forests=forests)
    assert np.isfinite(none["0"]).all() and not passes
    assert ran == {0: 0, 1: 0, 2: len(PROMPTS) + n_edited, 3: len(PROMPTS) + n_edited}
    sweep_sites(llama, PROMPTS, PAIRS, SITES, read_ids=ALL, forests=forests)
    assert passes == [len(PROMPTS)]


def test_forests_of_other_prompts_serve_inside_a_block_where_they_are_shared(
    llama: Decoder,
) -> None:
    forests: list[Forest] = []
    others = [PROMPTS[3], PROMPTS[0][:-1], PROMPTS[1]]
    head_outputs(llama, others, [(2, 1)], forests=forests)
    for read in (
        lambda **given: sweep_sites(llama, PROMPTS, PAIRS, SITES, read_ids=ALL, **given).logits,
        lambda **given: np.stack(
            list(
                patch_heads(
                    llama, PROMPTS, PAIRS, GROUPS, measure=logits_of_tokens, **given
                ).values()
            )
        ),
        lambda **given: head_outputs(llama, PROMPTS, [(2, 1)], **given).numpy(),
    ):
        assert np.abs(read(forests=list(forests)) - read()).max() < 1e-5
