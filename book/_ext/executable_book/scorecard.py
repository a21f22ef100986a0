"""The landing page's answer at a glance: each claim's verdict and the forest of its effects."""

from collections.abc import Sequence
from html import escape

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.displays import chapter_addresses
from executable_book.results import all_records, collect, place_text
from lib.engine.catalogue import catalogue
from lib.evidence.criteria import Criterion, Record, claim_verdict, criteria, judged
from lib.evidence.records import SIGNS
from lib.reading.words import record_text, signed

COMING = "chapter to come"
NO_RESULT = "no result"
MODEL_COLOURS, TWIN = ("#0173b2", "#d55e00", "#029e73", "#cc78bc", "#a56e28"), "#7f7f7f"
"""As many as the catalogue has models, and one for the small networks."""
AXIS = (-0.25, 1.25)
"""Ends of the forest's axis; a number beyond them is drawn at the end that it passes."""
_WIDTH, _LINE = 130, 16


class Scorecard(SphinxDirective):
    """Show the verdict on each claim, and the effects that it rests on, with all models kept.

    Each line of the content names a claim, which is also the name of its chapter, says it in words,
    and names the statistics that stand for it, with the section to link to where there is one::

        ```{scorecard}
        phase-transition | Depth switches sharply. | context_early#controls, prediction_last_sixth
        ```

    The verdicts come from the records that the chapters glued, so the page with the scorecard has
    to be read after all chapters.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        runs = all_records(collect(self.env))
        addresses = chapter_addresses(self.env)
        rows = []
        for line in filter(str.strip, self.content):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3:
                raise self.error(f"Expected 'claim | words | statistics', got {line!r}.")
            claim, words, statistics = parts
            href = addresses.get(claim)
            rows.append(_claim_row(claim, words, href, runs))
            known = {one.statistic: one for one in criteria(claim)}
            for name in filter(None, map(str.strip, statistics.split(","))):
                statistic, _, section = name.partition("#")
                if statistic not in known:
                    raise self.error(f"{claim} has no statistic {statistic!r} in its criteria.")
                link = f"{href}#{section}" if href and section else href
                rows += _effect_rows(known[statistic], link, runs)
        html = (
            '<div class="table-scroll" role="region" tabindex="0" aria-label="The answer at a '
            'glance"><table class="scorecard"><thead><tr><th scope="col">Claim, effect</th>'
            f'<th scope="col">{_scale()}</th><th scope="col">Number [interval]</th>'
            '<th scope="col" class="wanted">Wanted</th><th scope="col">Verdict</th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        return [nodes.raw("", _legend(list(runs)) + html, format="html")]


def _claim_row(claim: str, words: str, href: str | None, runs: dict[str, list[Record]]) -> str:
    lines = []
    models = [
        model
        for model, rows in runs.items()
        if any((row["claim"], row["model"]) == (claim, model) for row in rows)
    ]
    for model in models:
        verdict = claim_verdict(runs[model], claim, model).verdict
        named = f"{escape(short_name(model))}: " if len(models) > 1 else ""
        lines.append(f"<div{_told(model, signed(verdict))}>{named}{signed(verdict)}</div>")
    shown = "".join(lines) or (NO_RESULT if href else COMING)
    words = escape(words)
    head = f'<a href="{href}">{words}</a>' if href else words
    return (
        f'<tr class="claim"><th scope="row" colspan="2">{head}</th>'
        f'<td colspan="3">{shown}</td></tr>'
    )


def _effect_rows(
    criterion: Criterion, href: str | None, runs: dict[str, list[Record]]
) -> list[str]:
    found = {
        (row["place"], row["untrained"], model): row
        for model, rows in runs.items()
        for row in rows
        if (row["claim"], row["statistic"]) == (criterion.claim, criterion.statistic)
        and judged(row)
    }
    n_models = len({model for _, _, model in found})
    result = []
    for place in dict.fromkeys(place for place, _, _ in found):
        own = [
            row
            for (where, untrained, _), row in found.items()
            if where == place and not (untrained and row["estimate"] is None)
        ]
        at = place_text(criterion, place, runs.values())
        text = escape(f"{criterion.text}{_notes(criterion, at, own)}")
        head = f'<a href="{href}">{text}</a>' if href else text
        numbers, verdicts = [], []
        for row in own:
            trained = "trained" if n_models == 1 else short_name(row["model"])
            who, shade = ("twins", ' class="twin"') if row["untrained"] else (trained, "")
            number = "–" if row["estimate"] is None else record_text(row)
            told = f"{'twins: ' if shade else ''}{number} {SIGNS[row['verdict']]}"
            told = _told(row["model"], told)
            numbers.append(f"<div{shade}{told}>{escape(f'{who}: {number}')}</div>")
            verdicts.append(f"<div{shade}>{_verdict(row)}</div>")
        result.append(
            f'<tr><th scope="row">{head}</th><td>{_forest(own, criterion, list(runs))}</td>'
            f'<td>{"".join(numbers)}</td><td class="wanted">{escape(criterion.wanted)}</td>'
            f"<td>{''.join(verdicts)}</td></tr>"
        )
    return result


def _notes(criterion: Criterion, place: str, rows: Sequence[Record]) -> str:
    """Return the place, the intervals' level unless 95 %, and where tasks overrule the pooled."""
    level = "" if criterion.level == 0.95 else f"{100 * criterion.level:.0f} % intervals"
    against = [
        f"{short_name(row['model'])}: {row['reason']}"
        for row in rows
        if row["reason"] and row["estimate"] is not None and not row["untrained"]
    ]
    notes = list(filter(None, [place, level, *against]))
    return f" ({'; '.join(notes)})" if notes else ""


def _told(model: str, text: str) -> str:
    """Return, as attributes of a line, what the summary shows of it in a model's column."""
    return f' data-model="{escape(short_name(model))}" data-told="{escape(text)}"'


def _verdict(row: Record) -> str:
    """Return a verdict as shape and word, with the mark of architecture."""
    mark = " ⚑" if row["architecture"] and row["verdict"] == "supported" else ""
    return f"{signed(row['verdict'])}{mark}"


def _forest(rows: Sequence[Record], criterion: Criterion, models: Sequence[str]) -> str:
    """Return intervals on one axis as an inline drawing, a line each."""
    height = _LINE * len(rows)
    parts = [f'<line class="zero" x1="{_x(0)}" x2="{_x(0)}" y1="0" y2="{height}"/>']
    ends = [criterion.threshold]
    if criterion.relation == "within":
        ends.append(-criterion.threshold)
    for at in map(_x, ends):
        parts.append(f'<line class="threshold" x1="{at}" x2="{at}" y1="0" y2="{height}"/>')
    for place, row in enumerate(rows):
        if row["estimate"] is None:
            continue
        y = _LINE * (place + 0.5)
        colour = TWIN if row["untrained"] else colour_of(row["model"], models)
        fill = colour if row["verdict"] == "supported" else "var(--pst-color-background, #fff)"
        low, high, at = (_x(row[field]) for field in ("low", "high", "estimate"))
        parts.append(
            f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{at}" cy="{y}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
        )
        if row["verdict"] == "undecided":
            parts.append(
                f'<path d="M{at} {y - 4.5}a4.5 4.5 0 0 0 0 9Z" fill="{colour}" stroke="none"/>'
            )
    said = "; ".join(
        f"{'untrained twins' if row['untrained'] else row['model']}: {record_text(row)}"
        for row in rows
    )
    label = escape(f"Estimates with intervals on an axis from {AXIS[0]} to {AXIS[1]}: {said}")
    return (
        f'<svg class="forest" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _scale() -> str:
    marks = "".join(
        f'<text x="{_x(value)}" y="12" text-anchor="middle">{value:g}</text>'
        for value in (0, 0.5, 1)
    )
    return (
        f'<svg class="forest" viewBox="0 0 {_WIDTH} 16" width="{_WIDTH}" height="16" role="img" '
        f'aria-label="Axis from {AXIS[0]} to {AXIS[1]}">{marks}</svg>'
    )


def _legend(models: Sequence[str]) -> str:
    keys = [(short_name(model), colour_of(model, models)) for model in models]
    keys.append(("untrained twins", TWIN))
    entries = "".join(
        f'<span class="key"><span aria-hidden="true" style="background:{colour}"></span> '
        f"{escape(name)}</span>"
        for name, colour in keys
    )
    signs = ", ".join(map(signed, list(SIGNS)[:4]))
    return (
        f'<p class="scorecard-legend">{entries} {signs}; ⚑ architecture: the untrained twins meet '
        "it too. Dashed: what is wanted.</p>"
    )


def short_name(model: str) -> str:
    """Return the catalogue's name of a model, or the model's own."""
    names = {weights.label: name for name, weights in catalogue().items()}
    return names.get(model, model)


def colour_of(model: str, models: Sequence[str]) -> str:
    """Return a model's colour; the same on all rows."""
    return MODEL_COLOURS[list(models).index(model) % len(MODEL_COLOURS)]


def _x(value: float) -> float:
    low, high = AXIS
    inside = min(max(value, low), high)
    return round(6 + (_WIDTH - 12) * (inside - low) / (high - low), 1)


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("scorecard", Scorecard)
