"""Records are checked, kept whole or not at all, and read back as they were written."""

import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from claimed import invented, number
from conftest import tiny_model

from lib.evidence import records
from lib.evidence.criteria import claim_verdict, judged
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
    assert second == dict.fromkeys(records.FIELDS) | {
        "claim": "norm-code",
        "part": "",
        "statistic": "gain",
        "criterion": "",
        "place": "b",
        "model": "m",
        "untrained": False,
        "held_out": True,
        "level": 0.95,
        "n": 0,
        "verdict": "not testable",
        "architecture": False,
        "reason": "too few",
    }
    assert first["low"] < first["estimate"] < first["high"] and first["n"] == 40
    assert first["estimate"] == pytest.approx(2.0)


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


def test_recorded_text_is_for_people_to_compare_and_holds_no_nan():
    rows = [{"claim": "a", "criterion": "≥ 0.5"}, {"claim": "b"}]
    told = ["[", " {", '  "claim": "a",', '  "criterion": "≥ 0.5"', " },", " {", '  "claim": "b"']
    assert records.to_json(rows).splitlines() == [*told, " }", "]"]
    with pytest.raises(ValueError, match="nan"):
        records.to_json([{"estimate": float("nan")}])


def test_numbers_of_numpy_are_plain_in_records():
    rows = invented("why-angles")
    rows[0] = rows[0] | {"estimate": np.float64(0.8), "architecture": np.bool_(False)}
    (one, *_) = check(rows)
    assert (type(one["estimate"]), type(one["architecture"])) == (float, bool)


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


@pytest.mark.parametrize(
    "facts", ['{"model": "b", "n_blocks": ', '{"model": "b"}', '{"model": "b", "n_blocks": null}']
)
def test_half_a_run_is_left_out(llama, facts):
    records.keep_run(llama)
    broken = records.RUNS / "b" / "run.json"
    broken.parent.mkdir()
    broken.write_text(facts)
    assert [run["model"] for run in records.read_runs()] == [llama.name]


def test_a_run_cut_short_does_not_hide_what_was_recorded(llama):
    rows = invented("why-angles", llama.name)
    records.keep_run(llama)
    records.record_run(llama.name, rows)
    (run,) = records.read_runs()
    assert run["source"].startswith("recorded on ") and run["records"] == rows
    again = [row | {"n": 7} for row in rows]
    records.keep_records(again)
    (run,) = records.read_runs()
    assert run["source"] == "computed here" and run["records"] == again


def test_a_claim_is_left_out_of_a_run_that_was_before_one_of_its_criteria(llama):
    old, other = invented("norm-code", llama.name), invented("why-angles", llama.name)
    records.keep_run(llama)
    records.record_run(llama.name, [*old, *other])
    (run,) = records.read_runs()
    assert run["records"] == [*old, *other]
    names = ("within_answer_gain", "partial_given_angle")
    twins_alone, task_alone = (
        [row for row in old if row["statistic"] != name or row["untrained"] or not judged(row)]
        for name in names
    )
    task_alone.append(old[0] | {"statistic": names[1], "place": "cities"})
    assert {*names} <= {row["statistic"] for row in (*twins_alone, *task_alone)}
    never = [row for row in old if row["statistic"] != "within_answer_beyond_twins"]
    for before in (never, twins_alone, task_alone):
        records.record_run(llama.name, [*before, *other])
        (run,) = records.read_runs()
        assert run["records"] == other


def test_a_recorded_run_names_its_commit_and_keeps_what_the_explorer_shows(llama, monkeypatch):
    rows = invented("why-angles", llama.name)
    explored = '{"subject": "Zürich"}'
    records.keep_run(llama)
    (records.run_folder(llama.name) / "explorer.json").write_text(explored, encoding="utf-8")
    asked = ["git", "rev-parse", "--short", "HEAD"]
    said = subprocess.run(asked, cwd=records.ROOT, capture_output=True, text=True, check=False)
    for root, commit in ((records.ROOT, said.stdout.strip() or "unknown"), (None, "unknown")):
        monkeypatch.setattr(records, "ROOT", root or records.RUNS)
        records.record_run(llama.name, rows)
        name = records.recorded_file(llama.name).stem
        run = json.loads((records.RECORDED / f"{name}.run.json").read_text())
        assert (run["commit"], run["n_blocks"]) == (commit, 4)
        assert run["recorded"] == f"{datetime.now(UTC):%Y-%m-%d}"
    kept = records.RECORDED / f"{name}.explorer.json"
    assert kept.read_text(encoding="utf-8") == explored
    assert read_records(records.recorded_file(llama.name)) == rows


def test_weights_that_lie_elsewhere_are_told_as_offloaded(llama):
    spread = replace(llama, model=tiny_model("llama"))
    spread.model.model.layers[1].to("meta")
    assert records.model_facts(spread)["device"] == "cpu, offloaded"


def test_facts_of_a_build_name_the_model_by_its_hash(monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    facts = records.run_facts()
    assert len(str(facts["model_sha256"])) == 64
    own = ["built", "model", "model_sha256", "threads", "processors", "platform"]
    assert list(facts)[:6] == own and facts["model"] == "smollm2-135m"
    assert list(facts)[6:8] == ["version_of_python", "version_of_torch"]
    assert (facts["processors"], facts["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert facts["version_of_torch"] == torch.__version__
    monkeypatch.setenv("MODEL", "some/model")
    assert records.run_facts()["model_sha256"] == "not recorded"
    json.dumps(facts)
