"""Vectors: held-out centroids, random directions of a given norm, the way to a token's logit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.engine.edits import Shift
from lib.engine.extraction import extract_residuals, logit_lens
from lib.engine.models import Decoder
from lib.engine.vectors import held_out_centroids, random_directions, unembedding_direction

STATE = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)) * 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def test_random_directions_keep_norms_and_are_reproducible() -> None:
    first, second = (random_directions(STATE, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first.norm(dim=-1), STATE.norm(dim=-1), rtol=1e-6)
    assert cosine(first, STATE).abs().max() < 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_directions_have_the_precision_of_the_states(dtype: torch.dtype) -> None:
    drawn = random_directions(STATE.to(dtype), torch.Generator().manual_seed(5))
    assert drawn.dtype == dtype


def test_held_out_centroids_equal_a_naive_loop_and_never_see_the_held_out_group() -> None:
    states = drawn(2, 12, 8)
    labels, groups = np.arange(12) % 3, np.arange(12) // 4
    usable = np.ones(12, dtype=bool)
    usable[7] = False
    wanted, held_out = [0, 1, 2, 1], [0, 1, 2, 0]
    found = held_out_centroids(states, labels, groups, wanted, held_out, usable)
    for case, (label, group) in enumerate(zip(wanted, held_out, strict=True)):
        rows = [i for i in range(12) if labels[i] == label and groups[i] != group and usable[i]]
        torch.testing.assert_close(found[:, case], states[:, rows].mean(dim=1))
    poisoned = states.clone()
    poisoned[:, groups == 0] = float("nan")
    assert torch.isfinite(held_out_centroids(poisoned, labels, groups, [0, 1], [0, 0])).all()
    with pytest.raises(ValueError, match="label 5"):
        held_out_centroids(states, labels, groups, [5], [0])


def test_unembedding_direction_is_the_steepest_way_to_the_target(decoder: Decoder) -> None:
    block = decoder.n_blocks - 1
    states = extract_residuals(decoder, [[3, 4, 5], [6, 7, 8]], blocks=[block]).states[0]
    way = unembedding_direction(decoder, states, [9, 10], [11, 12])

    def difference(at: Tensor) -> Tensor:
        z = logit_lens(decoder, at).double()
        return torch.stack([z[0, 9] - z[0, 11], z[1, 10] - z[1, 12]])

    def gain(vector: Tensor) -> Tensor:
        return difference(Shift(0.2)(states, vector)) - difference(states)

    best = gain(way)
    assert (best > 0).all()
    for seed in range(5):
        assert (gain(drawn(*way.shape, seed=seed)) < best).all()
        tilted = (
            way / way.norm(dim=-1, keepdim=True)
            + 0.5 * drawn(*way.shape, seed=seed) / way.shape[-1] ** 0.5
        )
        assert (gain(tilted) < best).all()


def test_unembedding_direction_is_the_gradient_of_what_scale_and_cap_leave(llama: Decoder) -> None:
    decoder = replace(llama, logit_scale=0.5, logit_softcap=0.2)
    states = drawn(3, llama.d_model)
    free = states.clone().requires_grad_(True)
    logits = decoder.unembed(decoder.final_norm(free))
    gain = logits[0, 9] - logits[0, 11] + logits[1, 10] - logits[1, 12] + logits[2, 9]
    (expected,) = torch.autograd.grad(gain - logits[2, 10], free)
    way = unembedding_direction(decoder, states, [9, 10, 9], [11, 12, 10])
    assert torch.allclose(way, expected, rtol=1e-4, atol=1e-7)


def test_unembedding_direction_refuses_a_target_that_is_its_source(llama: Decoder) -> None:
    states = drawn(2, llama.d_model)
    with pytest.raises(ValueError, match="both target and source"):
        unembedding_direction(llama, states, [1, 2], [3, 2])
    with pytest.raises(ValueError, match="2 states, 1 targets"):
        unembedding_direction(llama, states, [1], [3, 2])
