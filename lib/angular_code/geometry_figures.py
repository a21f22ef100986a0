"""Figures of the angular code: correlations over depth with their windows, and the statistics."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.reading.figures import (
    TWIN,
    WIDTH,
    depth_curves,
    mark_last_block,
    nothing_to_show,
    style_of,
    use_theme,
)


def correlation_panels(
    table: pd.DataFrame,
    *,
    names: Iterable[str],
    panel: str,
    ylabel: str,
    windows: Sequence[Sequence[int]] = (),
    transitions: Mapping[str, tuple[float, float, float]] | None = None,
    titles: Mapping[str, str] | None = None,
    columns: int = 3,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Returns `lib.reading.figures.depth_curves` with zero, the last block and the windows marked.

    Args:
        table: as for `depth_curves`; curves that stop before the last block may be among them.
        names: the curves.
        panel: column that tells the panels apart.
        ylabel: what is measured.
        windows: the early and the late blocks, drawn as bars along the bottom.
        transitions: by panel, the transition block with its interval.
        titles: what panels are called, where it differs from the column.
        columns: panels side by side.
        ylim: limits of y.
    """
    figure = depth_curves(
        table,
        names=names,
        panel=panel,
        ylabel=ylabel,
        transitions=transitions,
        columns=columns,
        ylim=ylim,
    )
    if len(table) == 0:
        return figure
    n_blocks = int(table["block"].max()) + 1
    panels = list(dict.fromkeys(table[panel]))
    for axes, name in zip(figure.axes, panels, strict=False):
        axes.set_title((titles or {}).get(name, name) if len(panels) > 1 else "", fontsize="small")
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        mark_last_block(axes, n_blocks)
        for blocks, label in zip(windows, ("early", "late"), strict=False):
            _mark_window(axes, blocks, label)
    return figure


def _mark_window(axes: Axes, blocks: Sequence[int], label: str) -> None:
    if not len(blocks):
        return
    start, stop = min(blocks) - 0.5, max(blocks) + 0.5
    place = axes.get_xaxis_transform()
    axes.plot([start, stop], [0.015, 0.015], color="#444444", linewidth=3, transform=place)
    axes.text(
        (start + stop) / 2,
        0.035,
        label,
        transform=place,
        ha="center",
        va="bottom",
        fontsize="x-small",
        color="#444444",
    )


def statistics_forest(
    records: pd.DataFrame, *, titles: Mapping[str, str], thresholds: Mapping[str, float]
) -> Figure:
    """Returns every statistic of a claim with its interval: a panel a statistic, a row a task.

    Args:
        records: columns `task`, `untrained`, `statistic`, `estimate`, `ci_low`, `ci_high`; rows
            without an estimate are left out.
        titles: the statistics, in the order of the panels, with their titles.
        thresholds: by statistic, what the lower bound has to reach: a line.
    """
    use_theme()
    shown = records.dropna(subset=["estimate"])
    if len(shown) == 0:
        return nothing_to_show()
    tasks = list(dict.fromkeys(records["task"]))
    columns = 3
    rows = -(-len(titles) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, rows * (0.27 * len(tasks) + 0.95)), sharey=True
    )
    for axes, (statistic, title) in zip(grid.flat, titles.items(), strict=False):
        for untrained in (True, False):
            chosen = shown[(shown["statistic"] == statistic) & (shown["untrained"] == untrained)]
            places = [tasks.index(task) + (0.17 if untrained else -0.17) for task in chosen["task"]]
            colour = TWIN if untrained else style_of("angle")["color"]
            axes.errorbar(
                chosen["estimate"],
                places,
                xerr=[
                    (chosen["estimate"] - chosen["ci_low"]).clip(lower=0),
                    (chosen["ci_high"] - chosen["estimate"]).clip(lower=0),
                ],
                fmt="o" if untrained else "D",
                color=colour,
                markerfacecolor="white" if untrained else colour,
                markersize=4.5,
                linewidth=1.4,
                linestyle="none",
                label="untrained twin" if untrained else "trained model",
            )
        axes.axvline(0, color="#999999", linewidth=0.8, zorder=0)
        axes.axvline(
            thresholds[statistic], color="#222222", linestyle=":", linewidth=1.4, label="criterion"
        )
        axes.set_title(title, fontsize="small")
        axes.tick_params(labelsize="small")
    first = grid.flat[0]
    first.set_yticks(range(len(tasks)), tasks)
    first.set_ylim(len(tasks) - 0.5, -0.5)
    spare = grid.flat[len(titles) :]
    for axes in spare:
        axes.set_axis_off()
    handles, labels = first.get_legend_handles_labels()
    if len(spare):
        spare[0].legend(handles, labels, loc="center")
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
