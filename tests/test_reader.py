"""The affine reader against independent solutions of the same regression."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lib.science.reader import HELD_OUT, fit_reader


def data(n_texts=40, per_text=6, d=8, noise=0.3, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_texts * per_text, d)) * np.linspace(0.2, 3, d) + rng.normal(size=d)
    weights, offset = rng.normal(size=(d, d)), rng.normal(size=d)
    y = x @ weights + offset + noise * rng.normal(size=x.shape)
    return x, y, np.repeat(np.arange(n_texts), per_text), weights, offset


def test_a_reader_is_the_ridge_regression_that_sklearn_solves():
    x, y, texts, *_ = data()
    for penalty in (1e-6, 0.1, 30.0):
        reader = fit_reader(x, y, texts, penalties=[penalty])
        scale = x.var(axis=0).mean()
        ridge = Ridge(alpha=penalty * scale * len(x), solver="svd").fit(x, y)
        np.testing.assert_allclose(reader.weights, ridge.coef_.T, atol=1e-8)
        np.testing.assert_allclose(reader(x), ridge.predict(x), atol=1e-8)


def test_the_penalty_is_the_best_on_texts_held_out_whole():
    x, y, texts, *_ = data(n_texts=10, per_text=2, noise=4.0)
    grid = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    held_out = texts % HELD_OUT == 0
    errors = []
    for penalty in grid:
        alpha = penalty * x[~held_out].var(axis=0).mean() * (~held_out).sum()
        ridge = Ridge(alpha=alpha, solver="svd").fit(x[~held_out], y[~held_out])
        errors.append(np.square(ridge.predict(x[held_out]) - y[held_out]).sum())
    reader = fit_reader(x, y, texts, penalties=grid)
    assert reader.penalty == grid[int(np.argmin(errors))]
    total = np.square(y[held_out] - y[~held_out].mean(axis=0)).sum()
    assert reader.explained == pytest.approx(1 - min(errors) / total)


def test_a_text_that_repeats_its_states_does_not_flatter_the_reader():
    """Each text has one state, twelve times, and a target of its own: nothing can be learned."""
    rng = np.random.default_rng(5)
    states, targets = rng.normal(size=(2, 30, 20))
    texts = np.repeat(np.arange(30), 12)
    reader = fit_reader(states[texts], targets[texts], texts)
    assert reader.explained < 0.05
    assert reader.penalty >= 1.0


def test_an_affine_map_without_noise_is_found_as_it_is():
    x, y, texts, weights, offset = data(noise=0.0)
    reader = fit_reader(x, y, texts)
    assert reader.explained == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(reader.weights, weights, atol=1e-4)
    np.testing.assert_allclose(reader.offset, offset, atol=1e-4)


def test_what_cannot_be_fitted_is_refused_in_one_line():
    x, y, texts, *_ = data()
    with pytest.raises(ValueError, match="5 texts or more"):
        fit_reader(x[:24], y[:24], texts[:24])
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_reader(np.where(x > 5, np.nan, x) * np.inf, y, texts)
    with pytest.raises(ValueError, match="all alike"):
        fit_reader(np.ones_like(x), y, texts)
    with pytest.raises(ValueError, match="a text for each"):
        fit_reader(x, y[:-1], texts)
