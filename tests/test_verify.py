"""Verification passes when all is as recorded, and fails, saying why, in every other case."""

import pytest

from lib.evidence import verify
from lib.evidence.results import Record, read_rows, results_file, write_rows
from lib.evidence.verdicts import ALL_TASKS, criteria, criterion_of, judge, tolerance


def verdict(statistic: str = "causal_width_share", **changes: object) -> Record:
    criterion = criterion_of("phase-transition", statistic)
    return {
        "claim": "phase-transition",
        "part": criterion.part,
        "task": "capitals" if criterion.scope == "task" else ALL_TASKS,
        "model": "embedded",
        "untrained": False,
        "statistic": statistic,
        "estimate": 0.1,
        "ci_low": 0.05,
        "ci_high": 0.2,
        "criterion": criterion.text,
        "n": 96,
        "verdict": "supported",
    } | changes


STATISTICS = [c.statistic for c in criteria() if c.claim == "phase-transition"]
OTHERS = [verdict(name) for name in STATISTICS if name != "causal_width_share"]
OTHERS += [row | {"untrained": True, "verdict": "not supported"} for row in OTHERS]
TWIN = verdict(untrained=True, verdict="not supported")
EMPTY = {"estimate": None, "ci_low": None, "ci_high": None}
ALLOWED = 0.015  # A tenth of the width of `verdict()`'s interval.


@pytest.fixture
def built(tmp_path):
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nchapters:\n- file: book/phase-transition\n"
    )
    write_rows(tmp_path / verify.RECORDED, [verdict(), TWIN, *OTHERS])

    def check(*rows: Record, update: bool = False) -> int:
        write_rows(results_file(tmp_path / "_build" / "results"), [*rows, *OTHERS])
        return verify.main(["--update"] if update else [], tmp_path)

    return tmp_path, check


def test_verification_passes_when_all_is_as_recorded(built):
    _, check = built
    assert check(verdict(), TWIN) == 0
    near = {"estimate": 0.1 + 0.9 * ALLOWED, "ci_low": 0.05 - 0.9 * ALLOWED}
    assert check(verdict(**near), TWIN | near) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TWIN], "no record of causal_width_share on capitals"),
        ([TWIN], "recorded, but missing now"),
        ([verdict(), verdict(), TWIN], "Two records of causal_width_share on capitals"),
        ([verdict(verdict="not supported"), TWIN], "not supported now, supported as recorded"),
        ([verdict(verdict="not testable", **EMPTY), TWIN], "not testable now, supported as rec"),
        ([verdict(estimate=0.1 + 1.1 * ALLOWED), TWIN], "estimate 0.1165 now, 0.1 as recorded"),
        ([verdict(ci_low=0.05 - 1.1 * ALLOWED), TWIN], "ci_low 0.0335 now, 0.05 as recorded"),
        ([verdict(ci_high=0.2 + 1.1 * ALLOWED), TWIN], "ci_high 0.2165 now, 0.2 as recorded"),
        ([verdict(ci_high=None), TWIN], "ci_high – now, 0.2 as recorded"),
        ([verdict(criterion="at most 1"), TWIN], "judged by “at most 1” now"),
        ([verdict(), TWIN | {"verdict": "not testable", **EMPTY}], "not testable now, not supp"),
        ([verdict(), TWIN | {"estimate": 0.5}], "estimate 0.5 now, 0.1 as recorded"),
        ([verdict(), verdict(n=97, task="months"), TWIN], "not recorded yet"),
        ([verdict(), TWIN | {"verdict": "supported"}], "supported on the untrained twin"),
    ],
)
def test_verification_fails_and_says_why(built, capsys, rows, message):
    _, check = built
    assert check(*rows) == 1
    assert message in capsys.readouterr().out


def test_verification_fails_without_results(built, capsys):
    folder, _ = built
    assert verify.main([], folder) == 1
    assert "Run `make book`" in capsys.readouterr().out


def test_verification_fails_when_a_chapter_failed_and_left_no_records(built, capsys):
    folder, _ = built
    write_rows(results_file(folder / "_build" / "results"), [])
    assert verify.main([], folder) == 1
    printed = capsys.readouterr().out
    assert "FAILED phase-transition: no records; its chapter failed or was not built" in printed
    assert "missing" in printed


def test_recording_anew_what_should_not_be_still_fails(built, capsys):
    _, check = built
    false_positive = [verdict(), TWIN | {"verdict": "supported"}]
    assert check(*false_positive, update=True) == 1
    assert check(*false_positive) == 1
    assert "supported on the untrained twin" in capsys.readouterr().out


def test_update_records_anew_and_says_what_changed(built, capsys):
    folder, check = built
    changed = [verdict(verdict="not supported", n=95), TWIN]
    added = [row | {"task": "months"} for row in (verdict(), *OTHERS) if row["part"] == "switch"]
    changed += [row for row in added if not row["untrained"]]
    assert check(*changed, update=True) == 0
    printed = capsys.readouterr().out
    name = "phase-transition / switch / capitals / causal_width_share (trained)"
    assert (
        f"~ {name}: 0.1 [0.05, 0.2], supported -> 0.1 [0.05, 0.2], not supported "
        "(also changed: n)" in printed
    )
    assert "+ phase-transition / switch / months / causal_width_share (trained)" in printed
    assert read_rows(folder / verify.RECORDED) == [*changed, *OTHERS]
    assert check(*changed) == 0
    assert check(*changed, update=True) == 0
    assert "Nothing changed." in capsys.readouterr().out


def test_verification_shows_criterion_numbers_and_what_was_recorded(built, capsys):
    _, check = built
    check(verdict(estimate=0.19, verdict="not supported"), TWIN)
    printed = capsys.readouterr().out
    criterion = criterion_of("phase-transition", "causal_width_share")
    assert f"phase-transition / switch / causal_width_share\n{criterion.text}\n" in printed
    (line,) = [
        line for line in printed.splitlines() if "0.19 [0.05, 0.2]" in line and " no" in line
    ]
    found = line.split()
    assert found[:2] == ["capitals", "embedded"]
    shown = " ".join(found[2:])
    assert shown == "0.19 [0.05, 0.2] not supported 0.1 [0.05, 0.2] supported no"


def test_the_comparison_says_of_every_record_whether_it_is_as_recorded():
    new = verdict(task="months")
    gone = verdict(task="weekdays")
    table = verify.comparison([verdict(), TWIN | {"estimate": 0.9}, new], [verdict(), TWIN, gone])
    assert table["as recorded"].tolist() == ["yes", "no", "new", "missing"]
    assert table["task"].tolist() == ["capitals", "capitals", "months", "weekdays"]
    assert table["model"].tolist() == ["embedded", "embedded, untrained", "embedded", "embedded"]
    assert table.loc[3, ["estimate", "verdict"]].tolist() == ["–", "–"]
    assert table.loc[2, ["recorded", "recorded verdict"]].tolist() == ["–", "–"]


def test_the_tolerance_is_stated_with_the_criteria():
    assert tolerance(None, None) == 0.01
    assert tolerance(0.5, 0.52) == 0.01
    assert tolerance(0.0, 0.5) == 0.05


def test_controls_that_any_network_meets_do_not_fail_the_twin():
    control = verdict("self_donor_change", untrained=True)
    assert not verify.false_positives([control])
    assert verify.false_positives([verdict(untrained=True)])


def test_a_twin_that_meets_a_criterion_on_few_of_its_tasks_is_no_false_positive():
    met = verdict(untrained=True)
    missed = [met | {"task": task, "verdict": "not supported"} for task in ("a", "b")]
    assert not verify.false_positives([met, *missed])
    assert verify.false_positives([met, *(row | {"verdict": "supported"} for row in missed)])


@pytest.mark.parametrize("untrained", [False, True])
def test_random_donors_that_do_what_the_donor_does_fail(untrained):
    def null(low):
        return verdict(
            "random_direction_flip", estimate=0.9, ci_low=low, untrained=untrained, verdict="-"
        )

    (problem,) = verify.false_positives([null(0.8)])
    assert "a null that meets the criterion of prediction_arm_last_sixth" in problem
    assert not verify.false_positives([null(0.79)])
    assert not verify.false_positives([null(None) | EMPTY])


def test_shuffled_labels_that_are_decoded_fail():
    def shuffled(count):
        return judge(
            "norm-code",
            "attributes_decoded_shuffled",
            model="embedded",
            untrained=False,
            estimate=count,
            n=5,
        )

    (problem,) = verify.false_positives([shuffled(2)])
    assert "a null that meets the criterion of attributes_decoded" in problem
    assert not verify.false_positives([shuffled(1)])


def test_chapter_without_records_is_named():
    (problem,) = verify.verify([], [], ["norm-code"])
    assert problem == "norm-code: no records; its chapter failed or was not built"
