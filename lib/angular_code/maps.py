"""A map of representations with a slider over depth: one piece of HTML that needs nothing else.

Works from a file and in Colab: the drawing is inline SVG, the script a few lines, and nothing is
fetched. The slider, the list of tasks and the button are the browser's own, so they have names and
work from the keyboard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.science.metrics import centred

FloatArray = NDArray[np.float64]

SIZE = 360
"""Width and height of a map in the drawing's own units."""

_MARGIN = 22
_STRIP = (480, 92)  # width, height of the curve below the maps
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
# The ends and the middle of cividis, for more groups than that.
_ORDERED = ((0, 34, 78), (124, 123, 120), (254, 232, 56))
_SHAPES = (
    '<circle r="10"/>',
    '<rect x="-9" y="-9" width="18" height="18"/>',
    '<path d="M0-13 13 0 0 13-13 0Z"/>',
    '<path d="M-6-10H6L12 0 6 10H-6L-12 0Z"/>',
)
_SHAPE_NAMES = ("circles", "squares", "diamonds", "hexagons")


@dataclass(frozen=True, eq=False)
class Panel:
    """One model's map: where each item lies at each block.

    Attributes:
        title: the model.
        positions: ``[n_blocks, n_items, 2]``, in −1 … 1.
        shown: share of the directions' spread that the plane shows, ``[n_blocks]``.
        correlation: ρ(θ, J) at each block, ``[n_blocks]``.
    """

    title: str
    positions: FloatArray
    shown: FloatArray
    correlation: FloatArray


@dataclass(frozen=True, eq=False)
class DepthMap:
    """One task's map, of one or more models.

    Attributes:
        name: the task.
        labels: what each item is called.
        groups: what colours each item: its answer.
        shapes: what shapes each item: its template.
        panels: a map for each model; all have the same items and blocks.
        transition: ℓ*, or None.
    """

    name: str
    labels: Sequence[str]
    groups: Sequence[str]
    shapes: Sequence[int]
    panels: Sequence[Panel]
    transition: float | None = None


def depth_positions(states: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return each block's items in the plane that shows most of how their directions differ.

    The two first principal components of the centred directions h / |h|. A block's plane may be
    turned and mirrored at will, so each is turned to lie as near as it can to the next block's
    (orthogonal Procrustes), from the last block backwards; each is scaled to fill its map.

    Args:
        states: ``[n_blocks, n_items, d_model]``.

    Returns:
        Positions ``[n_blocks, n_items, 2]`` in −1 … 1, and the share of the spread that the plane
        shows, ``[n_blocks]``.

    Raises:
        ValueError: fewer than three items, a zero state, directions that are all equal.
    """
    blocks = np.asarray(states, dtype=np.float64)
    positions = np.zeros((*blocks.shape[:2], 2))
    shown = np.zeros(len(blocks))
    following: FloatArray | None = None
    for block in reversed(range(len(blocks))):
        norms = np.linalg.norm(blocks[block], axis=1, keepdims=True)
        if not norms.all():
            raise ValueError(f"block {block}: item {int(np.argmin(norms))} has norm 0.")
        left, values, _ = np.linalg.svd(centred(blocks[block] / norms), full_matrices=False)
        if values[0] < 1e-9:
            raise ValueError(f"block {block}: all directions are equal; there is nothing to map.")
        plane = left[:, :2] * values[:2]
        if following is None:
            signs = np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])
            plane = plane * np.where(signs == 0, 1, signs)
        else:
            u, _, vt = np.linalg.svd(plane.T @ following)
            plane = plane @ (u @ vt)
        following = plane / np.abs(plane).max()
        positions[block] = following
        shown[block] = np.square(values[:2]).sum() / np.square(values).sum()
    return positions, shown


def depth_map_html(maps: Sequence[DepthMap], *, title: str, start: int | None = None) -> str:
    """Return the maps as one piece of HTML with a slider over the blocks.

    Args:
        maps: one a task; a list lets the reader choose where there are several.
        title: the name of the whole, read out for it.
        start: block shown first; the last one by default.

    Raises:
        ValueError: no maps, or one whose parts differ in length.
    """
    if not maps:
        raise ValueError("There is no map to show.")
    for one in maps:
        _check(one)
    n_blocks = len(maps[0].panels[0].positions)
    first = n_blocks - 1 if start is None else min(max(start, 0), n_blocks - 1)
    name = "map-" + "".join(c if c.isalnum() else "-" for c in title.lower())[:40]
    options = "".join(
        f'<option value="{i}">{escape(one.name)}</option>' for i, one in enumerate(maps)
    )
    bodies = "".join(
        f'<div class="task"{"" if i == 0 else " hidden"}>{_task_html(one, first)}</div>'
        for i, one in enumerate(maps)
    )
    parts = {
        "NAME": name,
        "TITLE": escape(title),
        "CHOICE": "" if len(maps) > 1 else " hidden",
        "OPTIONS": options,
        "LAST": str(n_blocks - 1),
        "START": str(first),
        "BODIES": bodies,
    }
    return fill_page("map.html", [_data(one) for one in maps], parts)


def fill_page(template: str, data: list[dict[str, object]], parts: Mapping[str, str]) -> str:
    """Return a page with a slider over the blocks: template, data, and the slider's script.

    Args:
        template: name of a file in `lib/data`, with places such as [[NAME]] for the parts.
        data: what the page's script reads, one entry a task.
        parts: what stands in the template's places.
    """
    folder = files("lib") / "data"
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = (folder / "slider.js").read_text(encoding="utf-8")
    filled = {**parts, "DATA": text, "SLIDER": script}
    page = (folder / template).read_text(encoding="utf-8")
    return re.sub(r"\[\[([A-Z]+)\]\]", lambda found: filled[found[1]], page)


def _check(one: DepthMap) -> None:
    n_items = len(one.labels)
    lengths = {len(one.groups), len(one.shapes), *(p.positions.shape[1] for p in one.panels)}
    blocks = {len(part) for p in one.panels for part in (p.positions, p.shown, p.correlation)}
    if lengths != {n_items} or len(blocks) != 1:
        raise ValueError(f"Map {one.name!r}: labels, groups, shapes and panels differ in length.")
    if any(not np.isfinite(part).all() for p in one.panels for part in (p.positions, p.shown)):
        raise ValueError(f"Map {one.name!r}: a position is not finite.")


def _palette(groups: Sequence[str]) -> Mapping[str, tuple[str, str]]:
    """Return fill and text colour of each group, in order of appearance."""
    names = list(dict.fromkeys(groups))
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


def pixels(positions: FloatArray) -> NDArray[np.int64]:
    """Return positions in −1 … 1 as places in a drawing of width and height `SIZE`."""
    half = SIZE / 2
    flipped = positions * np.array([1, -1])  # y grows downwards on a screen
    return np.rint(half + flipped * (half - _MARGIN)).astype(np.int64)


def marks_svg(one: DepthMap, panel: Panel, block: int) -> str:
    """Return a mark for each item, where it lies at a block, in the order of the items.

    Colour and letters say the item's group, the shape its template; for a drawing of width and
    height `SIZE`.
    """
    palette = _palette(one.groups)
    order = _order_of_shapes(one)
    marks = []
    for (x, y), label, group, shape in zip(
        pixels(panel.positions[block]), one.labels, one.groups, one.shapes, strict=True
    ):
        fill, ink = palette[group]
        marks.append(
            f'<g class="item" style="transform:translate({x}px,{y}px)" fill="{fill}">'
            f"<title>{escape(label)} → {escape(group)}</title>{_SHAPES[order[shape]]}"
            f'<text fill="{ink}">{escape(group[:3])}</text></g>'
        )
    return "".join(marks)


def legend_html(one: DepthMap) -> str:
    """Return what the colours and shapes of `marks_svg` mean."""
    keys = "".join(
        f'<li><span class="key" style="background:{fill};color:{ink}">{escape(group[:3])}</span> '
        f"{escape(group)}</li>"
        for group, (fill, ink) in _palette(one.groups).items()
    )
    shapes = ", ".join(
        f"{_SHAPE_NAMES[place]}: template {shape}" for shape, place in _order_of_shapes(one).items()
    )
    return f'<ul class="legend" aria-label="Colours">{keys}</ul><p class="shapes">{shapes}</p>'


def _order_of_shapes(one: DepthMap) -> dict[int, int]:
    return {shape: k % len(_SHAPES) for k, shape in enumerate(dict.fromkeys(one.shapes))}


def _task_html(one: DepthMap, block: int) -> str:
    figures = []
    for panel in one.panels:
        described = f"Map of {len(one.labels)} prompts of {one.name}, {panel.title}"
        figures.append(
            f'<figure><figcaption>{escape(panel.title)}: <span class="read"></span></figcaption>'
            f'<svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{escape(described)}">'
            f"{marks_svg(one, panel, block)}</svg></figure>"
        )
    return f'<div class="maps">{"".join(figures)}</div>{_strip(one, block)}{legend_html(one)}'


def _strip(one: DepthMap, block: int) -> str:
    """Return the curves of ρ(θ, J) with a cursor at the block that is shown."""
    width, height = _STRIP
    n_blocks = len(one.panels[0].correlation)
    lowest = min(0.0, *(float(panel.correlation.min()) for panel in one.panels))

    def x_of(place: float) -> float:
        return round(28 + (width - 36) * place / max(n_blocks - 1, 1), 1)

    def y_of(value: float) -> float:
        return round(8 + (height - 26) * (1 - value) / (1 - lowest), 1)

    lines = []
    for k, panel in enumerate(one.panels):
        points = " ".join(f"{x_of(b)},{y_of(float(v))}" for b, v in enumerate(panel.correlation))
        style = 'stroke="#029e73"' if k == 0 else 'stroke="#7f7f7f" stroke-dasharray="5 3"'
        lines.append(f'<polyline points="{points}" fill="none" stroke-width="2" {style}/>')
    switch = ""
    if one.transition is not None:
        at = x_of(one.transition)
        switch = (
            f'<line x1="{at}" x2="{at}" y1="4" y2="{height - 18}" stroke="#444" '
            f'stroke-dasharray="2 3"/><text x="{at + 3}" y="{height - 22}">ℓ*</text>'
        )
    zero, one_ = y_of(0.0), y_of(1.0)
    names = " and ".join(panel.title for panel in one.panels)
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" aria-label="Rank '
        f'correlation of angle and divergence against block, {escape(names)}">'
        f'<line x1="28" x2="{width - 8}" y1="{zero}" y2="{zero}" stroke="#bbb"/>'
        f'<text x="24" y="{zero + 3}" text-anchor="end">0</text>'
        f'<text x="24" y="{one_ + 3}" text-anchor="end">1</text>'
        f'<text x="28" y="{height - 4}">ρ(θ, J) against block; dashed: untrained</text>'
        f'{switch}{"".join(lines)}<line class="cursor" x1="{x_of(block)}" x2="{x_of(block)}" '
        f'y1="4" y2="{height - 18}" stroke="#d55e00" stroke-width="2"/></svg>'
    )


def _data(one: DepthMap) -> dict[str, object]:
    n_blocks = len(one.panels[0].positions)
    width = _STRIP[0] - 36
    return {
        "x": [round(28 + width * block / max(n_blocks - 1, 1), 1) for block in range(n_blocks)],
        "panels": [
            {
                "at": pixels(panel.positions).reshape(n_blocks, -1).tolist(),
                "read": [
                    f"ρ(θ, J) = {value:.2f}; plane shows {share:.0%} of the spread".replace(
                        "-", "\N{MINUS SIGN}"
                    )
                    for value, share in zip(panel.correlation, panel.shown, strict=True)
                ],
            }
            for panel in one.panels
        ],
        "side": [
            ""
            if one.transition is None
            else (", before ℓ*" if block < one.transition else ", after ℓ*")
            for block in range(n_blocks)
        ],
    }
