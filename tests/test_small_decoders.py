"""Small decoders: norms replaced as named, training that learns, resumes and repeats its bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lib.engine import small_decoders
from lib.engine.extraction import extract_residuals
from lib.engine.models import load_decoder
from lib.engine.small_decoders import (
    KINDS,
    LARGE,
    SMALL,
    Material,
    Size,
    new_model,
    train,
    train_all,
)
from tests.conftest import tiny_tokenizer

D_VOCAB = 12
TINY = Size(moments=(0, 4, 8, 12))


@pytest.fixture(scope="module")
def material() -> Material:
    """Copy the second token: one certain answer."""
    tokens = torch.cartesian_prod(*[torch.arange(D_VOCAB)] * 3)
    return Material(tokens, nn.functional.one_hot(tokens[:, 1], D_VOCAB).float())


def same(one: small_decoders.Training, other: small_decoders.Training) -> bool:
    return (
        np.array_equal(one.losses, other.losses)
        and list(one.weights) == list(other.weights)
        and all(
            torch.equal(tensor, other.weights[moment][name])
            for moment, kept in one.weights.items()
            for name, tensor in kept.items()
        )
    )


@pytest.mark.parametrize(
    ("kind", "in_blocks", "final"),
    [
        ("rmsnorm", LlamaRMSNorm, LlamaRMSNorm),
        ("layernorm", nn.LayerNorm, nn.LayerNorm),
        ("no-final-norm", LlamaRMSNorm, nn.Identity),
        ("none", nn.Identity, nn.Identity),
    ],
)
def test_a_kind_has_the_norms_that_it_is_named_after(kind, in_blocks, final):
    model = new_model(kind, 1, d_vocab=D_VOCAB)
    norms = [
        norm
        for block in model.model.layers
        for norm in (block.input_layernorm, block.post_attention_layernorm)
    ]
    assert len(norms) == 12 and {type(norm) for norm in norms} == {in_blocks}
    assert type(model.model.norm) is final


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_decoder_is_as_large_as_its_size_says(size):
    model = new_model("layernorm", 1, size, d_vocab=D_VOCAB)
    config, weights = model.config, model.model.embed_tokens.weight
    assert (config.num_hidden_layers, weights.shape[1]) == (size.n_blocks, size.width)
    assert model.model.norm.normalized_shape == (size.width,)
    assert weights.std().item() == pytest.approx(size.initial_std, rel=0.1)
    moments = replace(size, moments=(0, 1))
    trained = train(
        "none", 1, Material(torch.zeros(2, 3).long(), torch.eye(D_VOCAB)[:2]), size=moments
    )
    assert trained.model().config.hidden_size == size.width


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_the_residual_stream_is_divided_out_where_a_final_norm_stands(kind):
    """What the norms do, by behaviour: the logits of h and of 3h."""
    decoder = load_decoder(new_model(kind, 1, d_vocab=D_VOCAB), tokenizer=tiny_tokenizer(["a"]))
    states = 10 * torch.randn(5, decoder.d_model)
    with torch.inference_mode():
        logits = [decoder.unembed(decoder.final_norm(c * states)) for c in (1.0, 3.0)]
        first = decoder.blocks[0].input_layernorm
        entered = [first(c * states) for c in (1.0, 3.0)]
    factor = 1.0 if kind in ("rmsnorm", "layernorm") else 3.0
    torch.testing.assert_close(logits[1], factor * logits[0], rtol=1e-4, atol=1e-5)
    factor = 3.0 if kind == "none" else 1.0
    torch.testing.assert_close(entered[1], factor * entered[0], rtol=1e-4, atol=1e-5)


def test_kinds_differ_in_nothing_but_norms():
    models = [new_model(kind, 5, d_vocab=D_VOCAB) for kind in KINDS]
    matrices = [{n: p for n, p in one.named_parameters() if p.dim() > 1} for one in models]
    for one in matrices[1:]:
        assert set(one) == set(matrices[0])
        assert all(torch.equal(one[name], matrices[0][name]) for name in one)


def test_all_kinds_read_the_same_prompts_in_the_same_order_at_one_seed(material, monkeypatch):
    def prompts(kind, seed):
        read = []

        def watched(*args, **options):
            model = new_model(*args, **options)
            model.register_forward_pre_hook(lambda _module, given: read.append(given[0].clone()))
            return model

        monkeypatch.setattr(small_decoders, "new_model", watched)
        train(kind, seed, material, size=Size(moments=(0, 3)))
        return torch.stack(read)

    first, *others = [prompts(kind, 5) for kind in KINDS]
    assert len(first) == 3 and not torch.equal(first[0], first[1])
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, prompts(KINDS[0], 6))


def test_seeds_differ_and_the_callers_random_state_stays():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, other = (new_model("none", seed, d_vocab=D_VOCAB) for seed in (1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_an_unknown_kind_lists_the_known_ones(material):
    with pytest.raises(ValueError, match="'batchnorm'; known are: rmsnorm, layernorm, no-final"):
        train("batchnorm", 1, material, size=TINY)


def test_training_lowers_the_divergence_from_the_truth(material):
    trained = train("rmsnorm", 1, material, size=Size(moments=(0, 150)))
    assert trained.losses[0] == pytest.approx(np.log(D_VOCAB), abs=0.6)  # uniform guessing
    assert trained.losses[-1] < 0.05
    with torch.inference_mode():
        predicted = trained.model()(material.tokens).logits[:, -1].argmax(-1)
    assert (predicted == material.tokens[:, 1]).float().mean() > 0.95


def test_losses_are_kl_to_the_truth(material):
    """Against a truth that is the untrained model's own prediction the first loss is zero."""
    model = new_model("rmsnorm", 1, d_vocab=D_VOCAB)
    with torch.inference_mode():
        own = torch.softmax(model(material.tokens).logits[:, -1], -1)
    itself = train("rmsnorm", 1, Material(material.tokens, own.clone()), size=Size(moments=(0, 1)))
    assert abs(itself.losses[0]) < 1e-5


def test_an_interrupted_training_goes_on_to_the_same_bits(material, tmp_path, monkeypatch):
    whole = train("layernorm", 2, material, size=TINY, folder=None)
    schedule, steps = small_decoders._schedule, []

    def stop_at_ten(step, n_steps):
        steps.append(step)
        if step == 10 and len(steps) <= 11:
            raise KeyboardInterrupt
        return schedule(step, n_steps)

    monkeypatch.setattr(small_decoders, "_schedule", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        train("layernorm", 2, material, size=TINY, folder=tmp_path)
    resumed = train("layernorm", 2, material, size=TINY, folder=tmp_path)
    assert steps[11:] == [8, 9, 10, 11]  # from the last moment, not from the first
    assert same(whole, resumed)


def test_what_was_trained_is_read_and_is_the_same(material, tmp_path, monkeypatch):
    first = train("none", 3, material, size=TINY, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(small_decoders, "_schedule", None)  # a single step would fail
    assert same(first, train("none", 3, material, size=TINY, folder=tmp_path))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TypeError):  # half a file counts for nothing: it trains
        train("none", 3, material, size=TINY, folder=tmp_path)


def test_a_key_tells_apart_all_that_a_training_depends_on(material):
    def key(kind="none", seed=3, material=material, size=TINY):
        return small_decoders._key(kind, seed, material, size)

    keys = {key(), key(kind="rmsnorm"), key(seed=4), key(size=Size(moments=(0, 12)))}
    keys.add(key(material=Material(material.tokens, material.truths.flip(0))))
    keys |= {key(size=replace(TINY, width=32)), key(size=replace(TINY, learning_rate=1e-3))}
    assert len(keys) == 7


def test_a_folder_that_cannot_be_written_changes_nothing(material, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    kept = train("none", 3, material, size=TINY, folder=blocked / "inside")
    assert same(kept, train("none", 3, material, size=TINY))


def test_side_by_side_is_as_one_by_one(material, tmp_path):
    threads = torch.get_num_threads()
    together = train_all(["rmsnorm", "none"], [1, 2], material, size=TINY, folder=tmp_path)
    assert [(t.kind, t.seed) for t in together] == [
        ("rmsnorm", 1),
        ("rmsnorm", 2),
        ("none", 1),
        ("none", 2),
    ]
    for training in together:
        assert same(training, train(training.kind, training.seed, material, size=TINY))
    assert torch.get_num_threads() == threads


def test_a_training_that_diverges_says_so_and_is_not_run_again(material, tmp_path, monkeypatch):
    wild = replace(TINY, learning_rate=1e25)
    lost = train("none", 1, material, size=wild, folder=tmp_path)
    assert lost.diverged and len(lost.losses) < 12 and list(lost.weights) == [0]
    monkeypatch.setattr(small_decoders, "_schedule", None)
    assert np.array_equal(
        lost.losses,
        train("none", 1, material, size=wild, folder=tmp_path).losses,
        equal_nan=True,
    )


def test_a_training_that_diverged_before_its_first_moment_is_read_back(material, tmp_path):
    wild = replace(TINY, learning_rate=1e25, moments=(11,))
    lost, again = (train("none", 1, material, size=wild, folder=tmp_path) for _ in range(2))
    assert lost.diverged and len(lost.losses) < 11
    assert np.array_equal(lost.losses, again.losses, equal_nan=True)
    with pytest.raises(ValueError, match="at step 0; there are: none"):
        again.model()


def test_bad_moments_and_bad_truths_are_refused(material):
    with pytest.raises(ValueError, match="ascend from 0"):
        Size(moments=(4, 2))
    with pytest.raises(ValueError, match="each row sums to 1"):
        Material(material.tokens, material.truths * 2)
    with pytest.raises(ValueError, match="of the same n"):
        Material(material.tokens[:3], material.truths)
    trained = train("none", 1, material, size=Size(moments=(0, 1)))
    with pytest.raises(ValueError, match="at step 7; there are: 0, 1"):
        trained.model(7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_reads_a_small_decoder_as_any_other(kind, material):
    trained = train(kind, 1, material, size=Size(moments=(0, 5)))
    decoder = load_decoder(trained.model(), tokenizer=tiny_tokenizer(["a"]))
    tokens = material.tokens[-7:]  # without the tokenizer's padding
    prompts = tokens.tolist()
    found = extract_residuals(decoder, prompts, logits=True)
    with torch.inference_mode():
        expected = trained.model()(tokens).logits[:, -1]
    assert decoder.n_blocks == 6
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
