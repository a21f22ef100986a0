"""What the book's own directives show of records: scorecard, models side by side, fates."""

import csv
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from claimed import invented, number
from docutils import nodes
from docutils.parsers.rst import DirectiveError

from executable_book import comparison, first_registration, front_page, metadata, results, scorecard
from lib.engine.catalogue import catalogue
from lib.evidence import records
from lib.evidence.criteria import criteria
from lib.evidence.records import shown
from lib.reading.figures import forest, over_depth
from lib.reading.phase_transition_figures import depths_by_model
from lib.reading.words import record_text, table_text
from lib.science.estimate import Untested

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = criteria("phase-transition")[0]


def test_every_criterion_of_the_first_registration_has_a_fate_and_leads_to_a_criterion_of_today():
    rows = first_registration.fates(invented("phase-transition"))
    with (first_registration.FOLDER / "fates.csv").open(encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    assert len(rows) == len(told) == 28
    today = {(one.claim, one.statistic) for one in criteria()}
    for fate in told:
        assert not fate["now"] or (fate["claim"], fate["now"]) in today, fate
        assert len(fate["reason"].split()) > 5
    assert all(len(row) == len(first_registration.HEAD) for row in rows)


def test_verdicts_of_then_and_now_stand_side_by_side():
    old = json.loads((first_registration.FOLDER / "results.json").read_text(encoding="utf-8"))
    verdicts = [
        row["verdict"]
        for row in old
        if row["statistic"] == "context_arm_early" and not row["untrained"]
    ]
    first = first_registration.fates(invented("phase-transition", met=False))[0]
    assert first[2] == f"supported: {verdicts.count('supported')}, not testable: 2"
    assert first[5:] == ["context early", "○ refuted"]
    later = next(row for row in first_registration.fates([]) if row[0] == "norm-code")
    assert later[-1] == "–"


def test_forest_draws_each_number_to_scale_and_twins_grey():
    own = [r for r in invented("phase-transition") if r["statistic"] == CONTEXT.statistic]
    html = "".join(scorecard._effect_rows(CONTEXT, "a.html", {"m": own}))
    centres = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', html)]
    low, high = scorecard.AXIS
    values = [row["estimate"] for row in own if row["place"] == "all tasks"]
    expected = [6 + 118 * (value - low) / (high - low) for value in values]
    assert centres == pytest.approx(expected, abs=0.06)
    (threshold,) = re.findall(r'class="threshold" x1="([\d.]+)"', html)
    assert float(threshold) == pytest.approx(6 + 118 * (0.8 - low) / (high - low), abs=0.06)
    assert html.count(f'stroke="{scorecard.TWIN}"') == 2  # interval and mark
    assert "● supported" in html and "○ refuted" in html and 'href="a.html"' in html


def test_a_chapters_forest_gives_lines_for_tasks_only_to_what_tasks_have():
    rows = invented("norm-code")
    of_tasks = {row["statistic"] for row in rows if row["place"] == "capitals"}
    assert of_tasks and of_tasks < {row["statistic"] for row in rows}
    figure = forest(rows)
    drawn = {}
    for axes in figure.axes:  # a line of panels shares the names of its rows, which the first has
        places = [one.get_text() for one in axes.get_yticklabels()]
        if axes.get_title(loc="left"):
            drawn[axes.get_title(loc="left").replace(" ", "_")] = places
    assert set(drawn) == {row["statistic"] for row in rows}
    for statistic, places in drawn.items():
        assert ("capitals" in places) == (statistic in of_tasks), statistic
    plt.close(figure)


def test_numbers_beyond_the_axis_are_drawn_at_its_end_and_untested_ones_not_at_all():
    rows = [r for r in invented("phase-transition") if r["statistic"] == CONTEXT.statistic]
    far = rows[0] | {"estimate": 40.0, "low": -40.0, "high": 41.0}
    html = scorecard._forest([far], CONTEXT, ["m"])
    assert 'x1="6.0" x2="124.0"' in html and '<circle cx="124.0"' in html
    gone = far | {"estimate": None, "verdict": "not testable", "reason": "no <pair>"}
    html = scorecard._forest([gone], CONTEXT, ["m"])
    assert "<circle" not in html and "no &lt;pair&gt;" in html


@pytest.mark.parametrize(
    ("verdict", "filled", "halved"),
    [("supported", True, False), ("refuted", False, False), ("undecided", False, True)],
)
def test_the_forest_tells_verdicts_by_shape(verdict, filled, halved):
    row = next(r for r in invented("phase-transition") if r["statistic"] == CONTEXT.statistic)
    html = scorecard._forest([row | {"verdict": verdict}], CONTEXT, ["m"])
    colour = scorecard.colour_of("m", ["m"])
    assert (f'r="4.5" fill="{colour}"' in html) == filled
    assert ("<path" in html) == halved


def test_an_absence_has_both_its_margins_drawn():
    absence = next(one for one in criteria("norm-code") if one.relation == "within")
    html = scorecard._forest([], absence, ["m"])
    drawn = re.findall(r'class="threshold" x1="([\d.]+)"', html)
    margins = (absence.threshold, -absence.threshold)
    assert [float(x) for x in drawn] == [scorecard._x(margin) for margin in margins]


def scorecard_of(monkeypatch, runs, *lines: str) -> BeautifulSoup:
    addresses = {one.claim: f"{one.claim}.html" for one in criteria()}
    del addresses["angular-code"]
    monkeypatch.setattr(scorecard, "collect", lambda _env: [])
    monkeypatch.setattr(scorecard, "all_records", lambda _own: runs)
    monkeypatch.setattr(scorecard, "chapter_addresses", lambda _env: addresses)
    monkeypatch.setattr(scorecard.Scorecard, "env", None)
    directive = object.__new__(scorecard.Scorecard)
    directive.content = ["", *lines]
    (made,) = directive.run()
    return BeautifulSoup(made.astext(), "html.parser")


def lines_of(cell) -> list[str]:
    return [line.get_text() for line in cell.find_all("div")]


def test_the_place_of_a_pooled_number_says_how_many_tasks_it_is_the_mean_of():
    of_tasks, whole = CONTEXT, criteria("why-angles")[0]
    rows = invented("phase-transition")  # three tasks that were measured, one that was not
    of_task = next(
        row
        for row in rows
        if row["statistic"] == of_tasks.statistic
        and row["place"] == "capitals"
        and not row["untrained"]
    )
    own = of_task | {"place": "own: mine"}
    agreed = of_task | {"place": "agreed", "estimate": None, "verdict": "not testable"}
    fewer = [row for row in rows if row is not of_task]
    places = [
        results.place_text(of_tasks, "all tasks", runs)
        for runs in (
            [rows],
            [[*rows, own]],
            [[*rows, agreed]],
            [rows, fewer, []],
            [[]],
        )
    ]
    assert places == ["3 tasks", "3 tasks", "4 tasks", "2 to 3 tasks", "all tasks"]
    assert results.place_text(of_tasks, "texts", [rows]) == "texts"
    assert results.place_text(whole, "model", [rows]) == ""


def test_the_scorecard_sets_numbers_what_is_wanted_and_verdicts_of_models_side_by_side(monkeypatch):
    gap = criteria("why-angles")[0]
    runs = {
        "one": invented("why-angles", "one") + invented("phase-transition", "one"),
        "two": invented("why-angles", "two", met=False),
        "three": invented("norm-code", "three"),
    }
    for row in runs["one"]:
        if row["claim"] == "phase-transition" and row["untrained"]:
            row |= {"estimate": None, "low": None, "high": None, "verdict": "not testable"}
    page = scorecard_of(
        monkeypatch,
        runs,
        f"why-angles | Norms do it. | {gap.statistic}#gaps, norm_cost_bare",
        f"phase-transition | Depth switches. | {CONTEXT.statistic}",
        "causal-control | It steers. |",
        "angular-code | Angles <code>. |",
    )
    head, *rows = ([*row.find_all(["th", "td"])] for row in page.find_all("tr"))
    assert [cell.get_text() for cell in (head[0], *head[2:])] == [
        *("Claim, effect", "Number [interval]", "Wanted", "Verdict")
    ]
    claim, effect, other, alone, shown_alone, empty, coming = rows
    assert lines_of(claim[1]) == ["one: ● supported", "two: ○ refuted"]
    assert [line.split(": ")[0] for line in lines_of(effect[2])] == ["one", "twins", "two", "twins"]
    assert lines_of(effect[2])[0].startswith("one: 0.80 [0.")
    assert (effect[0].get_text(), effect[3].get_text()) == (gap.text, gap.wanted)
    assert lines_of(effect[4]) == ["● supported", "○ refuted", "○ refuted", "○ refuted"]
    assert [one["class"] for one in effect[4].find_all("div", class_=True)] == [["twin"]] * 2
    assert lines_of(alone[1]) == ["● supported"]
    assert shown_alone[0].get_text() == f"{CONTEXT.text} (3 tasks)"
    (number_there,), (verdict_there,) = lines_of(shown_alone[2]), lines_of(shown_alone[4])
    assert number_there.startswith("trained: ") and verdict_there == "● supported"
    assert [empty[1].get_text(), coming[1].get_text()] == [scorecard.NO_RESULT, scorecard.COMING]
    links = [row[0].a and row[0].a["href"] for row in (claim, effect, other, coming)]
    assert links == ["why-angles.html", "why-angles.html#gaps", "why-angles.html", None]


def test_the_scorecards_legend_names_models_by_colour_and_the_four_verdicts(monkeypatch):
    runs = {model: invented("why-angles", model) for model in ("one", "two")}
    legend = scorecard_of(monkeypatch, runs, "why-angles | Norms do it. |").p
    keys = legend.select(".key")
    assert [key.get_text(strip=True) for key in keys] == ["one", "two", "untrained twins"]
    assert len({key.span["style"] for key in keys}) == 3
    assert "● supported, ○ refuted, ◐ undecided, – not testable; ⚑" in legend.get_text()


def test_no_model_has_the_colour_of_the_twins():
    models = [*catalogue(), "small decoders"]
    assert scorecard.TWIN not in {scorecard.colour_of(model, models) for model in models}


def test_only_what_is_supported_can_bear_the_flag_of_architecture():
    row = invented("why-angles")[0] | {"architecture": True}
    assert scorecard._verdict(row) == "● supported ⚑"
    assert scorecard._verdict(row | {"verdict": "refuted"}) == "○ refuted"
    assert scorecard._verdict(row | {"architecture": False}) == "● supported"


def test_a_scorecard_that_names_what_is_not_judged_stops_the_build(monkeypatch):
    for line, words in (
        ("why-angles | Norms do it. | gain", "why-angles has no statistic 'gain'"),
        ("why-angles | Norms do it.", "Expected 'claim | words | statistics'"),
    ):
        with pytest.raises(DirectiveError) as caught:
            scorecard_of(monkeypatch, {}, line)
        assert words in caught.value.msg


def test_models_of_other_runs_stand_beside_this_builds(monkeypatch):
    kept = [{"model": "m", "records": []}, {"model": "other", "records": invented("why-angles")}]
    monkeypatch.setattr(results, "read_runs", lambda: kept)
    found = results.all_records(invented("why-angles"))
    assert list(found) == ["m", "other"]
    colours = {scorecard.colour_of(model, list(found)) for model in found}
    assert len(colours) == 2


def test_recorded_models_stand_in_the_catalogues_order(monkeypatch):
    rows = invented("why-angles")
    labels = [weights.label for weights in catalogue().values()]
    kept = [{"model": one, "records": rows} for one in ("another", *sorted(labels, reverse=True))]
    monkeypatch.setattr(results, "read_runs", lambda: kept)
    assert list(results.all_records(rows)) == ["m", *labels, "another"]
    beside_small = [*labels, "small decoders"]
    assert len({scorecard.colour_of(one, beside_small) for one in beside_small}) == len(labels) + 1


def run(model: str, n_blocks: int, block: float) -> dict:
    measured = {"capitals": number(block, "subjects"), "animals": Untested("flat")}
    rows = invented("phase-transition", model)
    return {
        "model": model,
        "n_blocks": n_blocks,
        "records": rows + shown("phase-transition", model, "transition", measured),
    }


def test_depth_counts_from_the_first_block_to_the_last():
    rows = comparison.depth_rows([run("a", 31, 24.0), run("b", 11, 4.0)])
    assert [row[0] for row in rows] == ["capitals", "median"]
    assert rows[0][1].startswith("0.80 [") and rows[0][2].startswith("0.40 [")
    assert rows[1] == ["median", "0.80", "0.40"]


def test_the_picture_of_depths_has_each_models_tasks_to_scale_and_its_median():
    table = comparison.relative_depths([run("a", 31, 24.0), run("b", 11, 4.0)])
    later = table.assign(task="plurals", estimate=1.0, low=0.9, high=1.0)
    table = pd.concat([table, later[later["model"] == "a"]])
    figure = depths_by_model(table, {"a": "#000000", "b": "#777777"})
    (axes,) = figure.axes
    marks = {one.get_label(): one for one in axes.lines}
    (interval,) = axes.collections[0].get_segments()[:1]
    assert interval[:, 0] == pytest.approx([table["low"].iloc[0], table["high"].iloc[0]])
    assert list(marks["a"].get_xdata()) == pytest.approx([0.8, 1.0])
    assert list(marks["b"].get_xdata()) == pytest.approx([0.4])
    assert [round(y) for y in marks["a"].get_ydata()] == [0, 1]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["capitals", "plurals"]
    dotted = [one for one in axes.lines if one.get_linestyle() == ":"]
    assert [(one.get_xdata()[0], one.get_color()) for one in dotted] == [
        (pytest.approx(0.9), "#000000"),
        (pytest.approx(0.4), "#777777"),
    ]
    assert marks["a"].get_marker() != marks["b"].get_marker() and axes.get_xlim() == (0, 1)
    plt.close(figure)


def test_verdicts_of_models_stand_side_by_side_and_what_was_not_run_is_a_dash():
    first, second = run("a", 31, 24.0), run("b", 11, 4.0)
    second["records"] = invented("norm-code", "b", met=False)
    rows = comparison.verdict_rows([first, second])
    assert ["phase-transition", "● supported", "–"] in rows
    assert ["norm-code", "–", "○ refuted"] in rows
    assert len(rows) == 1 + 5 + 1 + 3


def test_effects_of_models_stand_side_by_side_with_interval_and_twins():
    first, second = run("a", 31, 24.0), run("b", 11, 4.0)
    rows = comparison.effect_rows([first, second])
    wanted = [one for one in criteria("phase-transition") if not one.comparative]
    assert len({row[0].split(" (")[0] for row in rows}) >= len(wanted)
    assert all(len(row) == 4 and row[2][0] in "●○◐–" for row in rows)
    cells = comparison.effect_rows([first, run("c", 31, 24.0) | {"records": []}])
    assert all(row[3] == "–" for row in cells)


def test_one_task_is_shown_on_the_models_that_master_it_and_on_no_others(monkeypatch):
    able, unable, twins_alone = run("a", 31, 24.0), run("b", 11, 4.0), run("c", 11, 4.0)
    lost = {"estimate": None, "low": None, "high": None, "verdict": "not testable", "n": 0}
    for one in (unable, twins_alone):
        for row in one["records"]:
            if row["place"] == "capitals" and not (one is twins_alone and row["untrained"]):
                row |= lost
    ungated = {"claim": "angular-code", "place": "capitals", "statistic": "late_correlation"}
    unable["records"].append(able["records"][0] | ungated | {"model": "b"})  # of any model
    runs = [able, unable, twins_alone]
    monkeypatch.setattr(comparison, "kept_runs", lambda env: (runs, ["a", "b", "c"]))
    monkeypatch.setattr(comparison.TaskComparison, "env", None)
    directive = object.__new__(comparison.TaskComparison)
    directive.arguments = ["capitals"]
    (made,) = directive.run()
    (head, *rows) = [
        [entry.astext() for entry in row.findall(nodes.entry)] for row in made.findall(nodes.row)
    ]
    assert head == ["Effect", "Wanted", "a"]
    own = {
        row["statistic"]: row
        for row in able["records"]
        if row["place"] == "capitals" and not row["untrained"] and row["criterion"]
    }
    assert [row[0] for row in rows] == [
        one.text for one in criteria("phase-transition") if one.statistic in own
    ]
    assert record_text(own[CONTEXT.statistic]) in rows[0][2]
    directive.arguments = ["animals"]
    (sentence,) = directive.run()
    assert sentence.astext() == "No model that was run masters animals."


def test_what_models_agree_on_and_differ_on_is_said():
    first, second = run("a", 31, 24.0), run("b", 11, 4.0)
    part = first["records"][0]["part"]
    (said,) = comparison.agreement([first, second])
    assert said.startswith("On all 2 models supported: phase transition: switch, ")
    without = run("c", 11, 4.0) | {"records": invented("norm-code", "c")}
    both = comparison.agreement([first, second, without])
    assert any(line.startswith("On all 2 models supported: phase transition") for line in both)
    for verdict, words in (
        ("refuted", "Supported on one, refuted on another"),
        ("undecided", "Decided on some alone"),
    ):
        changed = [
            row | ({"verdict": verdict} if row["part"] == part and row["criterion"] else {})
            for row in second["records"]
        ]
        said = comparison.agreement([first, second | {"records": changed}])
        assert f"{words}: phase transition: {part}." in said


def test_what_untrained_twins_meet_as_well_is_marked_architecture_on_the_models_page():
    met, not_met = (
        run(name, 31, 24.0) | {"records": invented("phase-transition", name, twins_met=twins)}
        for name, twins in (("a", True), ("b", False))
    )
    (said,) = comparison.agreement([met, met])
    assert "switch ⚑" in said and "learned," in said  # twins are not held against themselves
    (said,) = comparison.agreement([met, not_met])
    assert "⚑" not in said
    parts = comparison.verdict_rows([met, not_met])
    assert ["● supported ⚑", "● supported"] in [row[1:] for row in parts]
    cells = [row[2:] for row in comparison.effect_rows([met, not_met])]
    assert any("] ⚑; twins" in one and "⚑" not in other for one, other in cells)


def test_tables_of_several_kinds_say_what_a_number_alone_would_leave_out():
    (row, *_) = invented("phase-transition")
    assert table_text(row) == record_text(row)
    assert table_text(row | {"level": 0.9}) == f"{record_text(row)} (at 90 %)"
    against = row | {"verdict": "undecided", "reason": "5 of 16 tasks refute it"}
    assert table_text(against) == f"{record_text(row)}; 5 of 16 tasks refute it"
    nothing = row | {"estimate": None, "reason": "too few"}
    assert table_text(nothing) == "not testable (too few)"
    html = "".join(scorecard._effect_rows(CONTEXT, None, {"m": [against]}))
    assert "5 of 16 tasks refute it" in html
    assert "5 of 16" in str(comparison.effect_rows([run("a", 31, 24.0) | {"records": [against]}]))


def test_a_claim_of_which_a_model_only_shows_numbers_is_not_judged_on_it():
    judged, unjudged = run("a", 31, 24.0), run("b", 11, 4.0)
    unjudged["records"] = [row for row in unjudged["records"] if not row["criterion"]]
    assert comparison.agreement([judged, unjudged]) == comparison.agreement([judged])
    assert "–" in comparison.verdict_rows([judged, unjudged])[0]
    runs = {one["model"]: one["records"] for one in (judged, unjudged)}
    assert front_page.elsewhere("phase-transition", judged["records"], runs) == ""


def test_the_models_page_has_its_columns_in_the_catalogues_order(monkeypatch):
    names = {weights.label: name for name, weights in catalogue().items()}
    facts = dict.fromkeys(("source", "revision", "dtype", "device"), "x") | {"versions": {}}
    models = ["another", *sorted(names, reverse=True)]
    kept = [run(model, 11, 4.0) | facts for model in models]
    monkeypatch.setattr(results, "read_runs", lambda: kept)
    monkeypatch.setattr(comparison, "collect", lambda _env: [])
    monkeypatch.setattr(comparison.ModelComparison, "env", None)
    _, *tables = object.__new__(comparison.ModelComparison).run()
    head = next(tables[0].findall(nodes.thead))
    wanted = ["Claim, part", *names.values(), "another"]
    assert [cell.astext() for cell in head.findall(nodes.entry)] == wanted


def test_the_model_of_this_build_shows_what_its_chapters_glued(monkeypatch):
    kept = [run("a", 31, 24.0), run("b", 11, 4.0)]
    glued = invented("norm-code", "b")
    monkeypatch.setattr(results, "read_runs", lambda: kept)
    found = results.all_records(glued)
    assert found == {"b": glued, "a": kept[0]["records"]}


# The first page


def test_an_answer_quotes_numbers_by_name_and_names_what_was_not_met():
    rows = [row for row in invented("norm-code") if not row["untrained"]]
    words = "It tells {within_answer_gain@model} and moves {norm_exchange_transfer@texts}."
    said = front_page.answer("norm-code", words, rows)
    assert said == "It tells 0.30 and moves −0.25. ● Supported, 8 of 8 criteria met."
    for row in rows:
        if (row["statistic"], row["place"]) == ("norm_exchange_transfer", "texts"):
            row |= {"verdict": "refuted", "estimate": 0.35}
    said = front_page.answer("norm-code", words, rows)
    assert "moves 0.35. ○ Refuted, 7 of 8 criteria met; refuted: transfer of a norm" in said
    assert said.endswith(" (0.35, wanted ≤ 0.05).")
    both = invented("norm-code", twins_met=True)
    said = front_page.answer("norm-code", "{twins norm_cost_ratio@texts} of twins", both)
    assert said.startswith("0.20 of twins ● Supported, 8 of 8 criteria met (")
    assert " by untrained twins as well)." in said
    assert front_page.answer("norm-code", "{twins norm_cost_ratio@texts}", rows).startswith("– ")
    small = [row for row in invented("why-angles") if not row["untrained"]]
    said = front_page.answer("why-angles", "The gap is {partial_gap_normed}.", small)
    assert said.startswith("The gap is 0.80. ")
    extra = shown("why-angles", "m", "raw", {"all tasks": number(0.2, "subjects")})
    assert front_page.answer("why-angles", "", small + extra).endswith("5 of 5 criteria met.")
    assert front_page.answer("norm-code", words, []) == "no result."
    runs = {"m": rows, "other": invented("norm-code", "other", met=False), "third": []}
    assert front_page.elsewhere("norm-code", rows, runs) == " On others: other ○ refuted."
    assert front_page.elsewhere("why-angles", rows, runs) == ""
    with pytest.raises(ValueError, match="norm-code has no statistic 'gain'"):
        front_page.answer("norm-code", "{gain}", rows)


def test_the_first_picture_has_each_models_curves_and_the_papers_task(monkeypatch):
    own = {f"block {block}": number(0.9, "subjects") for block in range(3)}
    rows = shown("phase-transition", "a", "context arm", own)
    rows += shown("phase-transition", "a", "prediction arm", own, untrained=True)
    monkeypatch.setattr(front_page, "read_runs", lambda: [{"model": "a", "n_blocks": 31}])
    months = pd.DataFrame(
        {
            "model": "b",
            "curve": "context arm",
            "block": range(5),
            "estimate": 1.0,
            "low": -0.4,
            "high": 1,
        }
    )
    table = front_page.curves({"a": invented("norm-code", "a") + rows, "c": []}, months)
    assert len(table) == 6 + 5
    first, last = table.iloc[0], table.iloc[-1]
    assert (first["panel"], first["n_blocks"], first["block"]) == ("a", 31, 0)
    assert (last["panel"], last["n_blocks"], last["block"]) == ("the paper's months, b", 5, 4)
    figure = over_depth(table, ylabel="T")
    drawn, paper = figure.axes
    assert (
        drawn.get_ylim()[0] < -0.1
        and drawn.get_xlim() == (-0.5, 30.5)
        and paper.get_xlim() == (-0.5, 4.5)
    )
    named = {line.get_label() for line in drawn.lines if line.get_label()[0] != "_"}
    assert named == {"context arm", "prediction arm, untrained"}
    plt.close(figure)


def test_recorded_months_are_of_the_base_month_alone():
    months = front_page.months({"m"})
    assert set(months["panel"]) == {front_page.MONTHS}
    assert set(months["curve"]) == set(front_page.ARMS)


def test_months_of_an_earlier_build_on_another_model_are_not_shown(monkeypatch, tmp_path):
    recorded = front_page.months({"m"})
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)
    recorded.assign(model="m").to_csv(tmp_path / "recorded-months.csv", index=False)
    assert set(front_page.months({"m", "small"})["model"]) == {"m"}
    assert front_page.months({"other"})["model"].tolist() == recorded["model"].tolist()


@pytest.mark.parametrize("failed", [[], ["book/norm-code"]])
def test_a_build_in_which_a_chapter_failed_is_kept_as_no_run(monkeypatch, tmp_path, failed):
    rows = invented("why-angles")
    for name in ("RESULTS", "RUNS"):
        monkeypatch.setattr(records, name, tmp_path / name)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS")
    monkeypatch.setattr(results, "collect", lambda _env: rows)
    monkeypatch.setattr(results, "failed_pages", lambda _env: failed)
    results.write_results(SimpleNamespace(env="there"), None)
    assert records.read_records(records.results_file()) == rows
    kept = records.run_folder("m") / "results.json"
    assert kept.is_file() == (not failed)


def test_without_a_run_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    monkeypatch.setattr(records, "RECORDED", tmp_path)
    monkeypatch.setattr(comparison, "collect", lambda _env: [])
    monkeypatch.setattr(comparison.ModelComparison, "env", None)
    directive = object.__new__(comparison.ModelComparison)
    (paragraph,) = directive.run()
    assert "no run yet" in paragraph.astext()


# What other programs read


def tags_of(title: str, summary: str) -> dict[str, str]:
    citation = {"authors": [{"family-names": "Li", "given-names": "Bo"}, {"name": "Group"}]}
    text = metadata.head_tags(
        title,
        summary,
        book="Book",
        site="https://a.github.io/b",
        page="book/one",
        citation=citation | {"year": "2026"},
    )
    found = BeautifulSoup(text, "html.parser").find_all("meta")
    return {str(tag.get("property") or tag["name"]): str(tag["content"]) for tag in found}


def test_previews_get_title_summary_and_an_absolute_picture_that_exists():
    tags = tags_of('A "title" & more', "The claim. Angles\n matter.")
    assert tags["og:title"] == 'A "title" & more'
    assert tags["description"] == tags["og:description"] == "Angles matter."
    assert tags["og:url"] == "https://a.github.io/b/book/one.html"
    picture = tags["og:image"].removeprefix("https://a.github.io/b/")
    assert (ROOT / "book" / picture).is_file()
    assert (tags["citation_title"], tags["citation_publication_date"]) == ("Book", "2026")
    assert tags["citation_author"] == "Group"  # the last of them; the first is a person
    assert metadata.author_name({"family-names": "Li", "given-names": "Bo"}) == "Li, Bo"


def test_long_summaries_are_cut_at_a_word():
    text = metadata.shortened("word " * 60)
    assert len(text) <= metadata.LONGEST and text.endswith(" word…")
    assert metadata.shortened("short") == "short"


def test_the_book_is_cited_by_one_title():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert config["title"] == citation["title"]


def test_the_page_for_what_is_not_found_needs_no_other_file():
    text = metadata.NOT_FOUND.format(title="Book", site="https://a.github.io/b")
    page = BeautifulSoup(text, "html.parser")
    assert not page.find_all(["script", "link", "img"])
    links = [link["href"] for link in page.find_all("a")]
    assert links == ["https://a.github.io/b/", "https://a.github.io/b/search.html"]


def test_the_first_page_names_each_model_of_the_catalogue_with_its_command():
    page = (ROOT / "book" / "intro.md").read_text("utf-8")
    models = tomllib.loads((ROOT / "lib/data/models.toml").read_text("utf-8"))["weights"]
    default, *others = models
    assert all(f"`make book MODEL={name}`" in page for name in others)
    assert "| `make book` | SmolLM2-135M" in page and default.startswith("smollm2-135m")
    order = ["{hand-over}", "{answers}", "{scorecard}", "make book"]
    assert order == sorted(order, key=page.index)


def test_the_phase_transition_leads_to_the_explorer():
    assert "](depth-explorer.md)" in (ROOT / "book" / "phase-transition.md").read_text("utf-8")
