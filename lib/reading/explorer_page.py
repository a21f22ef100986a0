"""The depth explorer's page: one slider that moves all that `lib.reading.explorer` found, together.

One piece of HTML that needs nothing else: inline SVG, the browser's own controls, a short script,
and all data inside. What is shown stands in the address, so that a view can be linked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib.engine.files import DATA
from lib.evidence.transfer import ARMS
from lib.reading.explorer import ANGLE, TWIN, Exploration
from lib.reading.figures import style_of

SIZE = 360
"""Width and height of a map in the drawing's own units."""

_MARGIN = 22
LOWEST = -0.5
"""Where the axis of curves ends at the latest; what lies below is drawn there."""
# Okabe and Ito's colours, told apart with any colour vision, and the text colour to write on each.
_COLOURS = (
    ("#0072b2", "#fff"),
    ("#e69f00", "#000"),
    ("#009e73", "#000"),
    ("#cc79a7", "#000"),
    ("#d55e00", "#000"),
    ("#56b4e9", "#000"),
    ("#f0e442", "#000"),
    ("#333333", "#fff"),
)
# The ends and the middle of cividis, for more answers than that.
_ORDERED = ((0, 34, 78), (124, 123, 120), (254, 232, 56))
# Size of a plot of curves and its margins: left, right, top, bottom, in the drawing's own units.
_PLOT, _MARGINS = (360, 150), (30, 10, 10, 26)
_BESIDE = (
    '<label>Beside <select class="beside"><option value="">nothing</option>{options}</select>'
    "</label>"
)
# Each curve's mark: the same shapes as in the book's other figures.
_MARKS = {
    "o": ("●", '<circle r="5"/>'),
    "s": ("■", '<rect x="-4.5" y="-4.5" width="9" height="9"/>'),
    "D": ("◆", '<path d="M0-6 6 0 0 6-6 0Z"/>'),
}


def explorer_html(explorations: Sequence[Exploration]) -> str:
    """Return the explorer as one piece of HTML, which begins at the first block after ℓ*.

    Args:
        explorations: one a task; a list lets the reader choose, and of several models two can
            stand side by side. Without any it says so.

    Raises:
        ValueError: parts of one that differ in length, or a curve without a value at a block.
    """
    if not explorations:
        return "<p>No task is testable on this model, so there is nothing to explore.</p>"
    data = [_data(one) for one in explorations]
    n_blocks = len(explorations[0].top_tokens)
    place = explorations[0].transition
    start = n_blocks - 1 if place is None else min(int(np.ceil(place)), n_blocks - 1)
    options, several = _options_html(explorations), len({one.model for one in explorations}) > 1
    parts = {
        "OPTIONS": options,
        "BESIDE": _BESIDE.format(options=options) if several else "",
        "LAST": str(n_blocks - 1),
        "START": str(start),
        "BODIES": "".join(
            _task_html(one, k, min(start, len(one.top_tokens) - 1))
            for k, one in enumerate(explorations)
        ),
    }
    for name, curve in (("CONTEXT", "context arm"), ("PREDICTION", "prediction arm")):
        parts[name] = style_of(curve)["color"]
    parts["ANGLE"] = style_of(ANGLE)["color"]
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts["DATA"] = text
    page = (DATA / "explorer.html").read_text(encoding="utf-8")
    return re.sub(r"\[\[([A-Z]+)\]\]", lambda found: parts[found[1]], page)


def _options_html(explorations: Sequence[Exploration]) -> str:
    """Return the choices, a group a model where there are several."""
    by_model: dict[str, list[str]] = {}
    for k, one in enumerate(explorations):
        option = f'<option value="{k}">{escape(one.name)}</option>'
        by_model.setdefault(one.model, []).append(option)
    if len(by_model) == 1:
        return "".join(*by_model.values())
    return "".join(
        f'<optgroup label="{escape(model)}">{"".join(options)}</optgroup>'
        for model, options in by_model.items()
    )


def _task_html(one: Exploration, number: int, block: int) -> str:
    name = escape(one.name)
    options = "".join(
        f'<option value="{k}">{escape(text)} …</option>' for k, text in enumerate(one.texts)
    )
    return (
        f'<div class="task"{" hidden" if number else ""}><p class="where" hidden></p>'
        f'<div class="panels"><figure class="map">'
        f"<figcaption>Prompts by the direction of their state, "
        f'<span class="read"></span></figcaption><svg viewBox="0 0 {SIZE} {SIZE}" role="img" '
        f'aria-label="Map of the {len(one.texts)} prompts of {name}; those that lie close have '
        f'states of similar direction.">{_marks_svg(one, block)}'
        f'<circle class="ring" r="14"/></svg></figure><div class="plots">'
        f"{''.join(_plot_html(one, plot) for plot in _plots(one))}"
        '</div><div class="predictions"><label>Prompt '
        f'<select class="prompt">{options}</select></label><p>Next tokens that the logit lens '
        'reads there; ✓: the right answer</p><ol class="top" role="list">'
        + '<li><span class="word"></span><span class="bar"><i></i></span>'
        '<span class="share"></span></li>'
        * one.top_tokens.shape[2]
        + f"</ol></div></div>{_legend_html(one)}</div>"
    )


class _Plot(NamedTuple):
    title: str
    quantity: str
    names: Sequence[str]
    lowest: float  # of the axis; the highest is 1


def _plots(one: Exploration) -> list[_Plot]:
    plots = []
    for title, quantity, names in (
        ("Transfer of an exchange, T", "transfer", tuple(ARMS)),
        ("Angle and prediction, ρ(θ, J)", "rank correlation", (ANGLE, TWIN)),
    ):
        chosen = one.curves[one.curves["curve"].isin(names)]
        there = [name for name in names if (chosen["curve"] == name).any()]
        plots.append(
            _Plot(title, quantity, there, max(LOWEST, min(0.0, float(chosen["low"].min()))))
        )
    return plots


def _curve(one: Exploration, name: str) -> pd.DataFrame:
    rows = one.curves[one.curves["curve"] == name].sort_values("block")
    whole = rows["block"].tolist() == list(range(len(one.top_tokens)))
    if not whole or rows[["estimate", "low", "high"]].isna().any(axis=None):
        raise ValueError(f"{one.name}: {name} needs one value at each block.")
    return rows


def _plot_html(one: Exploration, plot: _Plot) -> str:
    """Return curves over the blocks as a figure; the caption names them and holds their values."""
    width, height = _PLOT
    left, right, top, bottom = _MARGINS
    n_blocks, floor = len(one.top_tokens), height - bottom
    parts, keys, points = [], [], []
    for value in (0, 1):
        y = _y(value, plot.lowest)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{value}</text>')
    for at, text in (
        (_x(0, n_blocks), "0"),
        ((left + width - right) / 2, "block"),
        (_x(n_blocks - 1, n_blocks), str(n_blocks - 1)),
    ):
        parts.append(f'<text x="{at}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    for name in plot.names:
        curve = _curve(one, name)
        line, low, high = (
            [
                f"{_x(block, n_blocks)},{_y(value, plot.lowest)}"
                for block, value in enumerate(curve[column])
            ]
            for column in ("estimate", "low", "high")
        )
        kind = "twin" if name == TWIN else name.split(" ")[0]
        glyph, mark = _MARKS[style_of(name.split(",")[0])["marker"]]
        glyph, shown = ("◇", "untrained") if name == TWIN else (glyph, name)
        parts.append(f'<polygon class="band {kind}" points="{" ".join(low + high[::-1])}"/>')
        parts.append(f'<polyline class="line {kind}" points="{" ".join(line)}"/>')
        points.append(f'<g class="point {kind}">{mark}</g>')
        keys.append(
            f'<span class="entry"><span class="glyph {kind}" aria-hidden="true">{glyph}</span> '
            f'{shown} <b class="value"></b></span>'
        )
    if one.transition is not None:
        at = _x(one.transition, n_blocks)
        parts.append(
            f'<line class="switch" x1="{at}" x2="{at}" y1="{top}" y2="{floor}"/>'
            f'<text x="{at - 4}" y="{(top + floor) / 2}" text-anchor="end">ℓ*</text>'
        )
    described = f"{plot.quantity} against block: {', '.join(plot.names)}".capitalize()
    return (
        f'<figure><figcaption>{plot.title}: {" ".join(keys)}</figcaption><svg viewBox="0 0 {width} '
        f'{height}" role="img" aria-label="{escape(described)}">{"".join(parts)}'
        f'<line class="cursor" y1="{top}" y2="{floor}"/>{"".join(points)}</svg></figure>'
    )


def _data(one: Exploration) -> dict[str, object]:
    n_blocks, n_items, n_top = one.top_tokens.shape
    transition = one.transition
    if one.positions.shape[:2] != (n_blocks, n_items) or len(one.texts) != n_items:
        raise ValueError(f"{one.name}: map and predictions differ in length.")
    curves = [
        {
            "name": name,
            "y": [_y(value, plot.lowest) for value in values],
            "value": [f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in values],
        }
        for plot in _plots(one)
        for name in plot.names
        for values in [_curve(one, name)["estimate"]]
    ]
    tokens = sorted({*one.top_tokens.ravel().tolist(), *one.right_tokens.tolist()})
    place = {token: k for k, token in enumerate(tokens)}
    best = np.vectorize(place.__getitem__)(one.top_tokens)
    return {
        "title": f"{one.model}, {one.name}",
        "at": _pixels(one.positions).reshape(n_blocks, -1).tolist(),
        "shown": [f"{share:.0%} of their spread shown" for share in one.shown],
        "x": [_x(block, n_blocks) for block in range(n_blocks)],
        "curves": curves,
        "side": [
            "" if transition is None else ", before ℓ*" if block < transition else ", after ℓ*"
            for block in range(n_blocks)
        ],
        "words": [one.words[token] for token in tokens],
        "answers": [place[token] for token in one.right_tokens.tolist()],
        "top": best.transpose(1, 0, 2).reshape(n_items, -1).tolist(),
        "permille": np.rint(1000 * one.top_probabilities.transpose(1, 0, 2))
        .astype(int)
        .reshape(n_items, -1)
        .tolist(),
        "n": n_top,
    }


def _x(block: float, n_blocks: int) -> float:
    left, right = _MARGINS[:2]
    return round(left + (_PLOT[0] - left - right) * block / max(n_blocks - 1, 1), 1)


def _y(value: float, lowest: float) -> float:
    top, bottom = _MARGINS[2:]
    return round(top + (_PLOT[1] - top - bottom) * (1 - max(value, lowest)) / (1 - lowest), 1)


def _palette(answers: Sequence[str]) -> Mapping[str, tuple[str, str]]:
    """Return fill and text colour of each answer, in order of appearance."""
    names = list(dict.fromkeys(answers))
    if len(names) <= len(_COLOURS):
        return dict(zip(names, _COLOURS, strict=False))
    places = np.linspace(0, 2, len(names))
    mixed = np.stack(
        [np.interp(places, [0, 1, 2], channel) for channel in zip(*_ORDERED, strict=True)]
    ).T
    return {
        name: ("#{:02x}{:02x}{:02x}".format(*map(int, rgb)), "#fff" if place < 0.9 else "#000")
        for name, rgb, place in zip(names, mixed, places, strict=True)
    }


def _pixels(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return positions in −1 … 1 as places in a drawing of width and height `SIZE`."""
    half = SIZE / 2
    flipped = positions * np.array([1, -1])  # y grows downwards on a screen
    return np.rint(half + flipped * (half - _MARGIN)).astype(np.int64)


def _marks_svg(one: Exploration, block: int) -> str:
    """Return a mark for each prompt where it lies at a block, coloured and lettered by answer."""
    palette = _palette(one.answers)
    marks = []
    for (x, y), text, answer in zip(
        _pixels(one.positions[block]), one.texts, one.answers, strict=True
    ):
        fill, ink = palette[answer]
        marks.append(
            f'<g class="item" style="transform:translate({x}px,{y}px)" fill="{fill}">'
            f'<title>{escape(text)} → {escape(answer)}</title><circle r="10"/>'
            f'<text fill="{ink}">{escape(answer[:3])}</text></g>'
        )
    return "".join(marks)


def _legend_html(one: Exploration) -> str:
    keys = "".join(
        f'<li><span class="key" style="background:{fill};color:{ink}">{escape(answer[:3])}</span> '
        f"{escape(answer)}</li>"
        for answer, (fill, ink) in _palette(one.answers).items()
    )
    return f'<ul class="legend" aria-label="Colours">{keys}</ul>'
