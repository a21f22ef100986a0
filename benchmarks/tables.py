"""The results as tables and sentences, from the JSON that the driver writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results.json"
OURS = "this book"
RECOMPUTE = "full recompute"


def read_results(file: Path = RESULTS) -> Any:
    """Return what was written there, or None if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


COLUMNS = (
    "workload", "contender", "attention", "seconds", "ratio", "logit_difference", "same_choice",
    "peak_mib", "bound", "share", "batch",
)  # fmt: skip


def comparison(results: Mapping[str, Any] | None) -> pd.DataFrame:
    """Return one row for each workload, contender and attention; none without results.

    Columns: `workload`, `contender`, `attention`, `seconds` (median of the runs), `ratio` (median
    over runs of its seconds by those of this book's faster row in the same turn),
    `logit_difference` (largest, from full recompute), `same_choice` (share of rows with the same
    largest logit), `peak_mib`, `bound` (arithmetic bound by seconds), `share` (of the work that was
    timed, the seconds being scaled), `batch` (prompts in a pass).
    """
    if results is None:
        return pd.DataFrame(columns=list(COLUMNS))
    table = pd.DataFrame(results["rows"])
    gmacs = float(np.median(results["rates_gmacs"]))
    seconds = np.array(table.pop("seconds").tolist())
    table["seconds"] = np.median(seconds, axis=1)
    ratios = np.empty_like(seconds)
    for _, rows in table.groupby("workload"):
        own = rows[rows["contender"] == OURS]
        ours = own.index.to_numpy()[own["seconds"].argmin()]
        place = rows.index.to_numpy()
        ratios[place] = seconds[place] / seconds[ours]
    table["ratio"] = np.median(ratios, axis=1)
    table["bound"] = table.pop("macs") / (gmacs * 1e9) / table["seconds"]
    return table[list(COLUMNS)]


def made_on(results: Mapping[str, Any] | None) -> str:
    """Return a sentence on where the numbers come from."""
    if results is None:
        return "No results are recorded yet; `make bench` records them."
    machine, versions = results["machine"], results["versions"]
    libraries = ", ".join(f"{name} {number}" for name, number in versions.items())
    rate = float(np.median(results["rates_gmacs"]))
    small = "Small workloads, one run: for seeing that all works, not for comparing. "
    return (
        f"{small if results['quick'] else ''}Made on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['system']}; {libraries}. Model: "
        f"{results['model']}, fp32. fp32 matrix products ran at {rate:.0f}·10⁹ "
        f"multiply–accumulates a second; {results['runs']} runs."
    )


def finding(results: Mapping[str, Any] | None) -> str:
    """Return a sentence on the distance to the fastest other contender, over all workloads."""
    if results is None:
        return "Nothing is recorded yet."
    best = best_peers(comparison(results))
    low, high = best["ratio"].min(), best["ratio"].max()
    return (
        f"The fastest other contender takes {low:.1f} to {high:.1f} times as long as this book, "
        "depending on the workload."
    )


def left_out(results: Mapping[str, Any] | None) -> str:
    """Return a sentence on who was not timed, and why."""
    refused = results["refused"] if results else []
    if not refused:
        return "No contender was left out."
    listed = "; ".join(
        f"{row['contender']} ({row['attention']}) on “{row['workload']}”: {row['reason']}"
        for row in refused
    )
    return f"Not timed: {listed}."


def best_peers(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each workload: the fastest row that is not this book's.

    Columns: those of `comparison`, and `ours_bound`, this book's share of the bound.
    """
    order = table["workload"].unique()
    fastest = table.sort_values("seconds", kind="stable")
    peers = fastest[fastest["contender"] != OURS].groupby("workload").first()
    ours = fastest[fastest["contender"] == OURS].groupby("workload").first()
    return peers.assign(ours_bound=ours["bound"]).loc[order].reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a workload, numbers as text: this book, full recompute, fastest library.

    Of each the faster row counts; memory is that of the whole process.
    """
    fastest = table.sort_values("seconds", kind="stable")
    rows = []
    for workload in table["workload"].unique():
        here = fastest[fastest["workload"] == workload].drop_duplicates("contender")
        here = here.set_index("contender")
        libraries = here.index.drop([OURS, RECOMPUTE], errors="ignore")
        ours, best = here.loc[OURS], here.loc[libraries[:1]]
        ratio = [f"{row['ratio']:.2f} ({name})" for name, row in best.iterrows()]
        rows.append(
            {
                "workload": workload,
                "seconds": f"{ours['seconds']:.2f}",
                "share of the bound": f"{ours['bound']:.0%}",
                "full recompute, by ours": f"{here.loc[RECOMPUTE, 'ratio']:.2f}",
                "fastest library, by ours": "".join(ratio),
                "memory (MiB)": f"{ours['peak_mib']:.0f}",
                "its memory": "".join(map("{:.0f}".format, best["peak_mib"])),
            }
        )
    return pd.DataFrame(rows)


def half_precision(results: Mapping[str, Any] | None) -> pd.DataFrame:
    """Return what the engine gains and loses in bfloat16, one row a workload.

    Columns, ready for the page: seconds, speed-up (median over runs of the seconds in fp32 with
    SDPA by those in bfloat16), largest logit difference from full recompute in fp32, and the share
    of rows with the same largest logit.
    """
    rows = results.get("half", []) if results else []
    exact = {
        row["workload"]: np.array(row["seconds"])
        for row in (results["rows"] if results else [])
        if row["contender"] == OURS and row["attention"] == "sdpa"
    }
    return pd.DataFrame(
        [
            (
                row["workload"],
                f"{np.median(row['seconds']):.2f}",
                f"{np.median(exact[row['workload']] / np.array(row['seconds'])):.2f}",
                f"{row['logit_difference']:.2f}",
                f"{row['same_choice']:.1%}",
            )
            for row in rows
        ],
        columns=["workload", "seconds", "speed-up", "largest logit difference", "same argmax"],
    )


def chapters(rows: Sequence[Mapping[str, Any]] | None) -> pd.DataFrame:
    """Return what `benchmarks.chapters` recorded, a row a chapter and one for all, for the page.

    Columns: seconds, the share of each kind of work, and the rate at which networks multiplied by
    that of large matrix products (the last row: by the median of the chapters' rates).
    """
    if not rows:
        return pd.DataFrame()
    seconds = pd.DataFrame([one["by_kind"] for one in rows], [one["chapter"] for one in rows])
    seconds["rest"] += seconds.pop("imports")
    macs = pd.Series([one["macs"] for one in rows], seconds.index, dtype=float)
    rate = pd.Series([one["rate"] for one in rows], seconds.index, dtype=float)
    seconds.loc["all"], macs["all"], rate["all"] = seconds.sum(), macs.sum(), rate.median()
    whole = seconds.sum(axis=1)
    reached = (macs / rate / seconds["networks"]).where(seconds["networks"] > 0.01 * whole)
    shares = seconds.div(whole, axis=0).map("{:.0%}".format)
    shares = shares[["networks", *shares.columns.drop("networks")]]
    shares.insert(0, "seconds", whole.map("{:.0f}".format))
    of_rate = reached.map("{:.0%}".format, na_action="ignore").fillna("–")
    shares.insert(2, "their rate", of_rate)
    return shares.rename_axis("chapter").reset_index()


def where_time_goes(table: pd.DataFrame) -> str:
    """Return a sentence on the row of `chapters` that sums over them."""
    if not len(table):
        return "Nothing is recorded yet; `make profile` records it."
    row = table.set_index("chapter").loc["all"]
    return (
        f"Of {row['seconds']} seconds of the chapters, {row['networks']} pass in networks, at "
        f"{row['their rate']} of the machine's rate; {row['training']} go to training small "
        f"ones, {row['statistics']} to statistics, {row['edits, measures, checks']} to the rest of "
        f"the engine, and {row['figures']} to figures."
    )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return `comparison`'s table with numbers as text and headings for the page."""
    return pd.DataFrame(
        {
            "workload": table["workload"],
            "contender": table["contender"],
            "attention": table["attention"],
            "seconds": table["seconds"].map("{:.2f}".format),
            "ratio to ours": table["ratio"].map("{:.2f}".format),
            "largest logit difference": table["logit_difference"].map("{:.0e}".format),
            "peak memory (MiB)": table["peak_mib"].map("{:.0f}".format),
            "share of the bound": table["bound"].map("{:.0%}".format),
            "timed share": table["share"].map("{:.0%}".format),
        }
    )
