"""The pictures that several chapters share, by what is drawn in them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.reading import figures
from lib.science.estimate import Untested, mean_over_units

BLOCKS = 6


def curve(values, units="subjects"):
    noise = np.linspace(-0.05, 0.05, 20)[:, None]
    return mean_over_units(np.asarray(values) + noise, units)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def named(axes):
    """Labelled lines by label."""
    return {one.get_label(): one for one in axes.lines if one.get_label()[0] != "_"}


def made(panel="T", n_blocks=BLOCKS, untrained=False):
    by_task = {"a": curve(np.linspace(1, 0, BLOCKS), "a"), "b": curve(np.ones(BLOCKS), "b")}
    table = figures.task_table({**by_task, "c": Untested("accuracy 0.1")})
    return table.assign(panel=panel, curve="context arm", untrained=untrained, n_blocks=n_blocks)


def test_over_depth_the_mean_over_tasks_is_thick_and_named_and_tasks_are_thin():
    (axes,) = figures.over_depth(made(), ylabel="transfer T").axes
    lines = named(axes)
    assert list(lines) == ["context arm"]
    assert lines["context arm"].get_ydata() == pytest.approx(1 - np.arange(BLOCKS) / 10)
    thin = [one for one in axes.lines if one.get_alpha() == 0.22]
    assert sorted(one.get_ydata()[-1] for one in thin) == pytest.approx([0, 1])
    assert axes.get_ylabel() == "transfer T" and axes.get_title(loc="left") == "T"


def test_over_depth_each_panel_ends_at_its_own_models_last_block_which_is_hatched():
    table = pd.concat([made("small"), made("large", n_blocks=12)])
    small, large = figures.over_depth(table, ylabel="").axes
    assert (small.get_xlim(), large.get_xlim()) == ((-0.5, 5.5), (-0.5, 11.5))
    for axes, first in ((small, 4.5), (large, 10.5)):
        (hatched,) = [one for one in axes.patches if one.get_hatch()]
        assert hatched.get_x() == pytest.approx(first)


def test_over_depth_twins_are_drawn_in_grey_and_the_transition_in_every_panel():
    table = pd.concat([made("one"), made("two"), made("two", untrained=True)])
    one, two = figures.over_depth(table, ylabel="", transition=(2.5, 2.0, 3.0)).axes
    assert set(named(one)) == {"context arm"}
    assert set(named(two)) == {"context arm", "context arm, untrained"}
    assert named(two)["context arm, untrained"].get_color() == figures.TWIN
    for axes in (one, two):
        assert 2.5 in [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]


def test_a_table_of_twins_has_their_mean_and_the_lowest_and_highest_seed():
    seeds = [{"angle": curve([k, 2.0 * k]), "norm": Untested("no")} for k in (0, 1, 5)]
    lost = {"angle": Untested("no transition"), "norm": Untested("no")}
    table = figures.twin_table([*seeds, lost], [3, 7])
    assert table["curve"].unique().tolist() == ["angle"] and table["untrained"].all()
    assert table["block"].tolist() == [3, 7]
    assert table[["estimate", "low", "high"]].to_numpy() == pytest.approx(
        np.array([[2, 0, 5], [4, 0, 10]])
    )
    assert len(figures.twin_table([lost], [3, 7])) == 0


def test_beside_twins_a_row_a_name_and_the_threshold_of_each_panel():
    numbers = pd.DataFrame(
        [
            ("T", "animals", False, 0.9, 0.8, 1.0),
            ("T", "animals", True, 0.1, 0.0, 0.2),
            ("T", "plurals", False, 0.7, 0.6, 0.8),
        ],
        columns=["panel", "name", "untrained", "estimate", "low", "high"],
    )
    (axes,) = figures.beside_twins(numbers, {"T": 0.8}).axes
    lines = named(axes)
    assert lines["trained"].get_xdata().tolist() == [0.9, 0.7]
    assert lines["untrained twins"].get_xdata().tolist() == [0.1]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["animals", "plurals"]
    assert 0.8 in [one.get_xdata()[0] for one in axes.lines]
    assert lines["untrained twins"].get_color() == figures.TWIN


def test_a_table_by_task_ends_with_the_mean_over_the_books_tasks():
    found = {"a": curve([1, 0], "a"), "own: mine": curve([5, 5], "m"), "c": Untested("few")}
    table = figures.task_table({**found, "b": curve([0, 1], "b")})
    assert table["task"].unique().tolist() == ["a", "own: mine", "b", "all tasks"]
    pooled = table[table["task"] == "all tasks"]
    assert pooled["estimate"].tolist() == pytest.approx([0.5, 0.5])
    alone = figures.task_table(found, [4, 9], each=False)
    assert alone["task"].unique().tolist() == ["all tasks"]
    assert alone["block"].tolist() == [4, 9]
