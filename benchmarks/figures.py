"""The figure of the results, for the page; the benchmarks' own environment draws none."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib.reading.figures import WIDTH, use_theme

MARKS = {"full recompute": "o", "TransformerLens": "s", "nnsight": "^", "pyvene": "D"}


def ratio_figure(table: pd.DataFrame) -> Figure:
    """Return the ratios to this book's time, one line a workload, on a logarithmic axis.

    Each contender has a marker; of its rows the fastest is drawn.
    """
    workloads = list(table["workload"].unique())
    use_theme()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.45 * len(workloads) + 1.4))
    fastest = table.groupby(["contender", "workload"])["ratio"].min()
    for contender, mark in MARKS.items():
        if contender not in fastest.index.get_level_values(0):
            continue
        ratios = fastest[contender].reindex(workloads)
        axes.plot(ratios, range(len(workloads)), mark, label=contender, markersize=6)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.set_xlabel("seconds, by those of this book (logarithmic; right of 1 is slower)")
    axes.grid(axis="x", which="both", linewidth=0.3)
    if len(fastest):
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=4)
    return figure
