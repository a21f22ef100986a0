"""Verification passes when all is as recorded, and fails, saying why, in every other case."""

import pytest
from claimed import invented

from lib.evidence import records, verify
from lib.evidence.criteria import Record
from lib.evidence.records import read_records

CLAIM = "why-angles"
SCORECARD = """\
claim                    verdict      untrained twins
phase-transition         ● supported  ○ refuted
  switch                 ● supported  ○ refuted
  learned                ● supported  – not testable
  content                ● supported  ○ refuted
  same place             ● supported  ○ refuted
  sharp against gradual  ● supported  ○ refuted
causal-control           ○ refuted
  direction, not norm    ○ refuted
  control                ○ refuted
  few dimensions         ○ refuted
  selective              ○ refuted
why-angles               ● supported  ○ refuted
  norms make the code    ● supported  ○ refuted
  norms free the norm    ● supported  ○ refuted"""


def changed(rows: list[Record], statistic: str, **changes: object) -> list[Record]:
    return [row | changes if row["statistic"] == statistic else row for row in rows]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Verify some rows against those of `invented`, in a book with the one chapter."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(verify, "pages", lambda: ["book/intro", f"book/{CLAIM}"])
    records.write_records(verify.recorded_file("m"), invented(CLAIM))

    def run(rows: list[Record], *arguments: str) -> int:
        records.write_records(records.results_file(), rows)
        return verify.main(list(arguments))

    return run


def test_verification_passes_when_all_is_as_recorded(check, capsys):
    rows = invented(CLAIM)
    assert check(rows) == 0
    told = capsys.readouterr().out
    assert told == f"{verify.scorecard(rows)}\n\n{len(rows)} records, 0 problems\n"


def test_numbers_may_differ_within_the_stated_tolerance(check, capsys):
    rows = invented(CLAIM)
    (row,) = [r for r in rows if r["statistic"] == "partial_gap_normed" and not r["untrained"]]
    assert verify.tolerance(row) == 0.01
    wide = {"low": 0.0, "high": 1.0}
    assert verify.tolerance(row | wide | {"claim": "norm-code"}) == pytest.approx(0.1)
    assert verify.tolerance(row | wide) == pytest.approx(0.5)  # networks that are trained here
    assert verify.tolerance(row | {"low": None, "high": None}) == 0.01
    for shift, code in ((0.0099, 0), (0.0101, 1)):
        moved = [r if r is not row else r | {"estimate": r["estimate"] + shift} for r in rows]
        assert check(moved) == code
    assert "estimate 0.8101 now, 0.8 as recorded; 0.01 is allowed" in capsys.readouterr().out


def test_a_wider_interval_allows_itself_no_more_than_the_recorded_one():
    row = invented("norm-code")[0] | {"estimate": 0.5, "low": 0.0, "high": 1.0}
    wider = {"low": -0.09, "high": 1.09}
    assert verify.difference(row | wider | {"estimate": 0.6}, row) == ""
    found = verify.difference(row | wider | {"estimate": 0.61}, row)
    assert found == "estimate 0.61 now, 0.5 as recorded; 0.1 is allowed"


def test_a_single_task_whose_numbers_moved_may_pass_to_or_from_undecided_and_nothing_else_may():
    row = invented("norm-code")[0] | {"place": "cities", "verdict": "refuted"}
    undecided = {"verdict": "undecided", "high": row["high"] + 1e-6}
    assert verify.difference(row | undecided, row) == verify.difference(row, row | undecided) == ""
    for now, before in (
        (row, row | {"verdict": "supported", "high": row["high"] + 1e-6}),
        (row | {"verdict": "undecided"}, row),
        (row | {"verdict": "not testable"}, row),
        (row | undecided | {"estimate": row["estimate"] + 1}, row),
        (row | undecided | {"place": "all tasks"}, row | {"place": "all tasks"}),
        (row | undecided | {"place": "texts"}, row | {"place": "texts"}),
        (row | undecided | {"place": "model"}, row | {"place": "model"}),
    ):
        assert verify.difference(now, before)


def test_a_number_that_is_gone_or_new_is_a_difference():
    row = invented(CLAIM)[0] | {"verdict": "not testable"}
    gone = row | dict.fromkeys(verify.NUMBERS)
    assert verify.difference(gone, row).startswith("estimate – now, 0.8 as recorded")
    assert verify.difference(row, gone).startswith("estimate 0.8 now, – as recorded")
    assert verify.difference(gone, gone) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "refuted"}, "refuted now, supported as recorded"),
        ({"criterion": "≥ 0.4"}, "'≥ 0.4' is wanted now, '≥ 0.5' as recorded"),
        ({"low": 0.5}, "low 0.5 now"),
        ({"high": 0.9}, "high 0.9 now"),
        (
            {"verdict": "not testable", "estimate": None, "low": None, "high": None},
            "not testable now, supported as recorded",
        ),
    ],
)
def test_what_differs_fails_and_is_named(check, capsys, changes, message):
    rows = [
        row | changes if row["statistic"] == "partial_gap_normed" and not row["untrained"] else row
        for row in invented(CLAIM)
    ]
    assert check(rows) == 1
    assert f"why-angles / partial_gap_normed / model (trained): {message}" in (
        capsys.readouterr().out
    )


def test_a_record_that_is_missing_or_new_fails(check, capsys):
    rows = invented(CLAIM)
    assert check([row for row in rows if row["statistic"] != "norm_cost_bare"]) == 1
    printed = capsys.readouterr().out
    assert "norm_cost_bare / model (trained): recorded, but missing now" in printed
    assert "no record of norm_cost_bare" in printed
    assert check([*rows, rows[0] | {"place": "capitals"}]) == 1
    assert "partial_gap_normed / capitals (trained): not recorded yet" in capsys.readouterr().out


def test_twins_that_support_a_claim_fail_even_when_recorded(check, capsys):
    rows = invented(CLAIM, twins_met=True)
    assert check(rows, "--update") == 1
    assert check(rows) == 1
    assert "its untrained twins support it" in capsys.readouterr().out


def test_twins_that_miss_one_part_are_no_evidence_against(check):
    rows = changed(invented(CLAIM, twins_met=True), "norm_cost_bare", verdict="undecided")
    assert check(rows, "--update") == 0


def test_update_records_anew_and_says_what_changed(check, capsys):
    rows = invented(CLAIM)
    rows[0] = rows[0] | {"verdict": "undecided"}
    assert check(rows, "--update") == 0
    printed = capsys.readouterr().out
    assert "~ why-angles / partial_gap_normed / model (trained): 0.8 [" in printed
    assert "supported -> 0.8 [" in printed and printed.count("~") == 1
    assert check(rows) == 0
    assert check(rows, "--update") == 0
    assert "Nothing changed." in capsys.readouterr().out


def test_what_is_new_and_what_is_gone_is_told_with_its_numbers():
    rows = invented(CLAIM)
    new, gone = rows[0] | {"place": "a"}, rows[1] | {"place": "b", "untrained": True}
    signs = zip(("+", "-"), (new, gone), ("trained", "untrained"), strict=True)
    assert verify.changes([new, *rows], [gone, *rows]) == [
        f"{sign} {CLAIM} / {row['statistic']} / {row['place']} ({weights}): "
        f"{row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}], {row['verdict']}"
        for sign, row, weights in signs
    ]


def test_every_claim_that_lacks_a_record_is_named():
    rows = [*invented("norm-code")[1:], *invented(CLAIM)[1:]]
    problems = verify.verify(rows, rows, [])
    assert [problem.split(":")[0] for problem in problems] == ["norm-code", CLAIM]


def test_a_model_is_verified_by_name_after_another_was_built(check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    other = invented(CLAIM, "other/model")
    records.keep_records(other)
    assert check(invented(CLAIM)) == 0
    monkeypatch.setenv("MODEL", "other/model")
    assert verify.main([]) == 1
    told = capsys.readouterr().out
    assert "FAILED other/model: nothing to compare with; UPDATE=1 records these results" in told
    assert told.endswith(f"{len(other)} records, 1 problems\n")
    assert verify.main(["--update"]) == 0
    assert read_records(records.recorded_file("other/model")) == other
    assert read_records(records.recorded_file("m")) == invented(CLAIM)
    moved = [row | {"verdict": "undecided"} for row in other]
    records.write_records(records.recorded_file("other/model"), moved)
    assert verify.main([]) == 1
    monkeypatch.setenv("MODEL", "a/third")
    assert verify.main([]) == 1
    assert capsys.readouterr().out.endswith(
        "No results of a/third: run `make book MODEL=a/third`.\n"
    )
    monkeypatch.setenv("MODEL", "embedded")
    assert verify.main([]) == 0  # of the last build
    assert f"{len(other)} records, 0 problems" in capsys.readouterr().out


def test_verification_fails_without_results(check, capsys):
    assert verify.main([]) == 1
    assert "Run `make book`" in capsys.readouterr().out


def test_a_chapter_that_left_no_records_is_named(check, capsys):
    assert check([]) == 1
    assert "the build left no records" in capsys.readouterr().out
    (problem,) = verify.verify([], [], ["norm-code"])
    assert problem == "norm-code: no records; its chapter failed or was not built"


def test_a_chapter_that_trains_models_of_its_own_owes_nothing_for_the_other_chapters(
    check, monkeypatch, capsys
):
    monkeypatch.setattr(verify, "pages", lambda: ["book/causal-control", f"book/{CLAIM}"])
    control = [row | {"model": "another"} for row in invented("causal-control")]
    records.write_records(verify.recorded_file("another"), control)
    assert check([*control, *invented(CLAIM)]) == 0
    assert check(control) == 1
    assert f"{CLAIM}: no records; its chapter failed" in capsys.readouterr().out


def test_scorecard_names_each_claim_and_part_with_shape_and_word_and_the_twins_beside():
    """In the order of the criteria; a claim that lacks a record is told among the problems."""
    alone = [row for row in invented("causal-control", met=False) if not row["untrained"]]
    rows = [*invented(CLAIM), *alone, *invented("norm-code")[1:], *invented("phase-transition")]
    assert verify.scorecard(rows) == SCORECARD
    assert verify.scorecard([]) == "No claim has been judged."


def test_a_record_of_another_model_has_to_agree_with_the_criteria_as_they_stand(check, capsys):
    rows = invented(CLAIM, "other")
    other = records.recorded_file("other")
    records.write_records(other, rows)
    assert check(invented(CLAIM)) == 0
    statistic = rows[0]["statistic"]
    for changes, words in (
        ({"criterion": "≥ 0.123"}, f"other: {CLAIM} / {statistic} / model (trained): "),
        ({"criterion": "≥ 0.123"}, "'≥ 0.123' then"),
        ({"verdict": "refuted"}, "refuted as recorded, its interval says supported"),
        ({"low": -9.0, "high": 9.0}, "supported as recorded, its interval says undecided"),
    ):
        records.write_records(other, changed(rows, statistic, **changes))
        assert check(invented(CLAIM)) == 1
        assert words in capsys.readouterr().out
    records.write_records(other, [row for row in rows if row["statistic"] != statistic])
    assert check(invented(CLAIM)) == 1
    told = f"other: {CLAIM} / {statistic}: no record of this criterion; run the model again"
    assert told in capsys.readouterr().out
    records.write_records(other, [rows[0] | {"statistic": "gone"}, *rows[1:]])
    assert check(invented(CLAIM)) == 1
    assert "no criterion names it now" in capsys.readouterr().out


def test_what_is_recorded_can_be_shown_beside_what_is_computed(check, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    facts = '{"model": "m", "n_blocks": 4, "revision": "r"}'
    records.write_atomically(records.run_folder("m") / "run.json", facts)
    assert check(invented(CLAIM), "--update") == 0
    records.keep_records(invented(CLAIM))
    (run,) = records.read_runs()
    assert run["source"] == "computed here" and run["records"] == invented(CLAIM)
    (records.run_folder("m") / "run.json").unlink()
    (run,) = records.read_runs()
    assert run["source"].startswith("recorded on 20") and run["revision"] == "r"
    assert run["records"] == invented(CLAIM)
    assert [file.name for file in records.recorded_files()] == ["m.json"]
