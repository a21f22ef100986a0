"""Records are checked, kept whole or not at all, and read back as they were written."""

import json

import numpy as np
import pytest
import torch
from claimed import invented, number

from lib.evidence import records
from lib.evidence.criteria import claim_verdict
from lib.evidence.records import check, read_records, shown, write_records
from lib.science.estimate import Untested


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(records, "RECORDED", tmp_path / "recorded")


def test_records_come_back_as_they_were_written():
    rows = invented("phase-transition", twins_met=True)
    write_records(records.claim_file("phase-transition"), rows)
    back = read_records(records.claim_file("phase-transition"))
    assert back == rows
    assert claim_verdict(back, "phase-transition", "m").verdict == "supported"


def test_a_claim_that_has_not_run_has_no_records():
    assert read_records(records.claim_file("norm-code")) == []


def test_a_file_that_says_the_same_is_left_alone():
    file = records.claim_file("why-angles")
    write_records(file, invented("why-angles"))
    time = file.stat().st_mtime_ns
    write_records(file, invented("why-angles"))
    assert file.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "proved"}, "'proved' is no verdict; choose among supported, refuted"),
        ({"estimate": float("nan")}, "NaN or infinite"),
        ({"high": np.float64("inf")}, "NaN or infinite"),
        ({"estimate": None}, "'supported' needs an estimate with its interval"),
        ({"low": None}, "needs an estimate with its interval"),
    ],
)
def test_a_record_that_means_nothing_is_refused_in_one_line(changes, message):
    rows = invented("why-angles")
    rows[0] = rows[0] | changes
    with pytest.raises(ValueError, match=message) as caught:
        check(rows)
    assert "why-angles, partial_gap_normed, model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_key_has_one_record():
    rows = invented("why-angles")
    with pytest.raises(ValueError, match="recorded twice"):
        check([*rows, rows[0]])
    check([*rows, rows[0] | {"place": "elsewhere"}])
    with pytest.raises(ValueError, match="lacks n, reason"):
        check([{key: rows[0][key] for key in rows[0] if key not in ("n", "reason")}])


def test_a_file_of_something_else_is_named(tmp_path):
    for text in ('{"a": 1}', "[1]", "[{}]", "half a fi"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json does not hold records"):
            read_records(tmp_path / "x.json")


def test_a_shown_number_has_its_interval_and_no_verdict():
    rows = shown("norm-code", "m", "gain", {"a": number(2.0, "texts"), "b": Untested("too few")})
    assert [row["verdict"] for row in check(rows)] == ["shown", "not testable"]
    first, second = rows
    assert first["low"] < first["estimate"] < first["high"] and first["n"] == 40
    assert first["estimate"] == pytest.approx(2.0)
    assert (second["estimate"], second["reason"]) == (None, "too few")


def test_a_record_says_whether_its_task_was_held_out_when_criteria_were_chosen():
    places = {"capitals": number(2.0, "a"), "antonyms": Untested("too few")}
    rows = shown("norm-code", "m", "gain", places)
    assert [row["held_out"] for row in rows] == [False, True]


def test_shown_numbers_change_no_verdict():
    rows = invented("why-angles")
    more = shown("why-angles", "m", "gain", {"model": number(2.0, "texts")})
    assert claim_verdict([*rows, *more], "why-angles", "m") == claim_verdict(
        rows, "why-angles", "m"
    )


def test_records_of_each_model_lie_in_its_folder():
    first, second = invented("why-angles", "a/b"), invented("why-angles", "c")
    records.keep_records([*first, *second])
    assert read_records(records.run_folder("a/b") / "results.json") == first
    assert records.run_folder("a/b").name == "a--b"
    assert read_records(records.run_folder("c") / "results.json") == second


def test_facts_of_a_run_name_weights_precision_machine_and_versions(llama):
    records.keep_run(llama)
    (kept,) = records.read_runs()
    assert (kept["model"], kept["revision"]) == (llama.name, "in hand")
    assert (kept["dtype"], kept["device"], kept["n_blocks"]) == ("float32", "cpu", 4)
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["records"] == []


def test_half_a_run_is_left_out(llama):
    records.keep_run(llama)
    broken = records.RUNS / "b" / "run.json"
    broken.parent.mkdir()
    broken.write_text('{"model": "b", "n_blocks": ')
    assert [run["model"] for run in records.read_runs()] == [llama.name]


def test_facts_of_a_build_name_the_model_by_its_hash(monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    facts = records.run_facts()
    assert len(str(facts["model_sha256"])) == 64
    assert facts["version_of_torch"] == torch.__version__
    monkeypatch.setenv("MODEL", "some/model")
    assert records.run_facts()["model_sha256"] == "not recorded"
    json.dumps(facts)
