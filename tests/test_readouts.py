"""Readouts: each equals its definition, computed another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WithoutFloat64
from oracle import kl
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, rel_entr, softmax

from lib.engine import readouts
from lib.engine.edits import add, exchange
from lib.engine.models import Decoder
from lib.engine.readouts import (
    DistributionMeasure,
    Distributions,
    Divergences,
    ProbabilityMoved,
    sum_tokens,
)
from lib.engine.sources import imported_files
from lib.engine.sweeps import sweep_blocks

GENERATOR = torch.Generator().manual_seed(3)
CLEAN = torch.randn(5, 200, generator=GENERATOR) * 4
EDITED = torch.randn(70, 200, generator=GENERATOR) * 3
RECIPIENTS = np.arange(70) % 5
EVERY = torch.arange(70)


def read(**options: object) -> dict[str, torch.Tensor]:
    measure = DistributionMeasure(CLEAN, RECIPIENTS, **options)  # type: ignore[arg-type]
    return dict(measure(EDITED, EVERY))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = log_softmax(logits.astype(np.float64), axis=-1)
    return result


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    result: np.ndarray = rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=-1)
    return result


def test_the_divergence_equals_that_of_scipy() -> None:
    log_p, log_q = log_probabilities(CLEAN.numpy()), log_probabilities(EDITED.numpy())
    result = read()
    expected = kl_divergence(log_p[RECIPIENTS], log_q)
    assert np.abs(result["kl_nats"].numpy() - expected).max() < 1e-10


def test_no_float64_is_needed_where_logits_are() -> None:
    clean, edited = (one.as_subclass(WithoutFloat64) for one in (CLEAN, EDITED))
    found = DistributionMeasure(clean, RECIPIENTS)(edited, EVERY)
    assert torch.equal(found["kl_nats"], read()["kl_nats"])


def test_unedited_logits_are_at_divergence_zero() -> None:
    measure = DistributionMeasure(CLEAN, np.arange(5), temperature=True)
    result = measure(CLEAN + 7.0, torch.arange(5))  # a constant on all logits changes nothing
    assert result["kl_nats"].max() < 1e-6
    assert (result["temperature"] - 1).abs().max() < 1e-3


def test_temperature_of_tempered_logits_is_found_and_leaves_nothing() -> None:
    temperatures = torch.tensor([0.1, 0.5, 1.0, 2.0, 20.0], dtype=torch.float64)
    measure = DistributionMeasure(CLEAN, np.arange(5), temperature=True)
    result = measure(CLEAN.double() / temperatures[:, None], torch.arange(5))
    assert (result["temperature"] / temperatures - 1).abs().max() < 1e-6
    assert result["kl_left_nats"].max() < 1e-9


def test_fitted_temperature_equals_a_search() -> None:
    p = torch.softmax(CLEAN.double(), -1)
    measure = DistributionMeasure(CLEAN, np.arange(5), temperature=True)
    found = measure(EDITED[:5], torch.arange(5))
    fitted, left = found["temperature"], found["kl_left_nats"]
    for row in range(5):

        def divergence(log_t: float, row: int = row) -> float:
            log_q = torch.log_softmax(np.exp(log_t) * EDITED[row].double(), -1)
            return float((p[row] * (p[row].log() - log_q)).sum())

        best = minimize_scalar(
            divergence, bounds=(np.log(0.01), np.log(100)), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        assert left[row].item() == pytest.approx(best.fun, abs=1e-8)
        assert fitted[row].item() == pytest.approx(np.exp(best.x), rel=1e-3)


def test_what_a_temperature_leaves_is_never_more_than_the_divergence() -> None:
    result = read(temperature=True)
    assert (result["kl_left_nats"] <= result["kl_nats"] + 1e-12).all()
    assert (result["kl_left_nats"] < 0.9 * result["kl_nats"]).any()


def test_opposed_logits_stop_at_the_lowest_temperature() -> None:
    measure = DistributionMeasure(CLEAN, np.arange(len(CLEAN)), temperature=True)
    found = measure(-CLEAN, torch.arange(len(CLEAN)))
    assert (found["temperature"] >= 0.01).all() and (found["temperature"] < 0.02).all()
    assert torch.isfinite(found["kl_left_nats"]).all()


def test_result_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(temperature=True)
    monkeypatch.setattr("lib.engine.readouts.ROWS_AT_ONCE", 3)
    for name, values in read(temperature=True).items():
        assert (values - whole[name]).abs().max() < 1e-7, name


def test_sweep_with_self_donor_reads_no_divergence(llama: Decoder) -> None:
    from lib.engine.extraction import extract_residuals

    prompts = [[5, 9, 4, 33, 12], [8, 3, 17, 20, 6], [6, 40, 2]]
    clean = extract_residuals(llama, prompts, blocks=(), logits=True).logits
    assert clean is not None
    pairs = np.array([[0, 0], [1, 1], [2, 2]])
    sweep = sweep_blocks(
        llama, prompts, pairs, {"exchange": exchange, "add": add}, positions="last",
        measure=DistributionMeasure(clean, pairs[:, 0], temperature=True),
    )  # fmt: skip
    assert sweep.measures["kl_nats"][0].max() < 1e-6
    assert sweep.measures["kl_nats"][1, :-1].max() > 1e-6


@pytest.mark.parametrize(
    ("clean", "recipients", "words"),
    [
        (CLEAN[0], [0], r"\[n_prompts, d_vocab\]"),
        (CLEAN * torch.nan, [0], "finite"),
        (CLEAN, [0, 5], "up to 5, but there are 5 prompts"),
        (CLEAN, [], "indices"),
    ],
)
def test_bad_input_is_named(clean: torch.Tensor, recipients: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistributionMeasure(clean, recipients)


def test_divergences_from_several_distributions_are_exact_over_a_large_vocabulary() -> None:
    given = 4 * torch.randn(20, 50_000) + 10
    edited = (given + given.flip(0)) / 2 + 0.5 * torch.randn(20, 50_000)
    rows = {"recipient": np.arange(20), "donor": np.array([3, 17] * 10)}
    pair = torch.arange(19, -1, -1)
    found = Divergences(Distributions.of(given), rows)(edited[pair], pair)
    for name, chosen in rows.items():
        expected = kl(given[chosen].double().numpy(), edited.double().numpy())[::-1]
        assert found[name].numpy() == pytest.approx(expected, rel=0, abs=2e-6)


def test_divergences_of_float64_logits_are_as_exact_and_leave_them_as_they_were() -> None:
    given, edited = 4 * torch.randn(3, 64), 4 * torch.randn(3, 64).double()
    before, pair = edited.clone(), torch.arange(3)
    found = Divergences(Distributions.of(given), {"x": np.arange(3)})(edited, pair)["x"]
    expected = kl(given.double().numpy(), edited.numpy())
    assert found.numpy() == pytest.approx(expected, rel=0, abs=1e-6)
    assert torch.equal(edited, before)


def test_distributions_need_no_float64_where_logits_are() -> None:
    logits = torch.randn(20, 64)
    found, plain = (Distributions.of(one) for one in (logits.as_subclass(WithoutFloat64), logits))
    assert torch.equal(found.p, plain.p)


def test_distributions_of_log_probabilities_are_the_probabilities_themselves() -> None:
    p = torch.softmax(torch.randn(40, 64).double(), -1)
    found = Distributions.of(p.log())
    assert torch.allclose(found.p.double(), p, atol=1e-7)
    assert torch.allclose(-found.negative_entropy, torch.special.entr(p).sum(-1), atol=1e-6)


def test_probability_that_only_changes_places_is_selective_and_rescaling_is_not() -> None:
    p = np.array([0.6, 0.1, 0.2, 0.1])
    swapped, spread = np.array([0.2, 0.5, 0.2, 0.1]), np.array([0.2, 0.2, 0.4, 0.2])
    zero = np.zeros(2, dtype=int)
    measure = ProbabilityMoved(torch.tensor(p)[None], zero, zero, zero + 1)
    found = measure(torch.log(torch.tensor(np.stack([swapped, spread]))), torch.arange(2))
    shares = torch.minimum(found["gained"], found["lost"]) / found["moved"]
    assert shares.numpy() == pytest.approx([1.0, 0.25])


def test_probability_moved_is_exact_over_a_large_vocabulary() -> None:
    before, after = 4 * torch.randn(2, 30, 50_000)
    source, target = np.arange(30), np.arange(30) + 100
    known = Distributions.of(before).p
    found = ProbabilityMoved(known, np.arange(30), source, target)(after, torch.arange(30))
    p, q = (softmax(one.double().numpy(), axis=1) for one in (before, after))
    row = np.arange(30)
    expected = {
        "gained": (q - p)[row, target],
        "lost": (p - q)[row, source],
        "moved": np.abs(p - q).sum(axis=1) / 2,
    }
    for name, values in expected.items():
        assert found[name].numpy() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 13, 50_257])
def test_sums_over_a_vocabulary_of_any_size_are_numpys_in_float64(n_tokens: int) -> None:
    terms = torch.randn(3, n_tokens).exp()
    expected = terms.numpy().astype(np.float64).sum(axis=1)
    assert sum_tokens(terms).numpy() == pytest.approx(expected, rel=1e-7)


def test_a_measures_key_is_of_this_module_alone() -> None:
    assert imported_files(Path(readouts.__file__)) <= {Path(readouts.__file__)}
