import numpy as np
import pytest

from lib.evidence.criteria import (
    MODEL,
    POOLED,
    TEXTS,
    Criterion,
    claim_verdict,
    criteria,
    is_held_out,
    join,
    judge,
)
from lib.science.estimate import Estimate, Untested, mean_over_units

GAINS = (
    *("second_attribute_gain", "within_answer_gain"),
    *("within_answer_beyond_twins", "subject_beyond_twins"),
)


def number(value: float, half_width: float = 0.01, units: str = "units") -> Estimate:
    """Return an estimate whose interval is about value ± half_width."""
    spread = np.linspace(-half_width, half_width, 39) if half_width else np.zeros(39)
    return Estimate(np.r_[value, value + 1.03 * spread], units, 10_000)


def criterion(relation: str, threshold: float) -> Criterion:
    return Criterion("c", "p", "s", relation, threshold, "model", "", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("relation", "low", "high", "verdict"),
    [
        (">=", 0.8, 0.9, "supported"),
        (">=", 0.5, 0.79, "refuted"),
        (">=", 0.7, 0.9, "undecided"),
        (">", 0.8, 0.9, "undecided"),
        ("<=", 0.1, 0.8, "supported"),
        ("<=", 0.81, 0.9, "refuted"),
        ("<=", 0.7, 0.9, "undecided"),
        ("within", -0.7, 0.7, "supported"),
        ("within", 0.81, 0.9, "refuted"),
        ("within", -0.9, -0.81, "refuted"),
        ("within", -0.9, 0.1, "undecided"),
        ("within", 0.1, 0.8, "undecided"),
    ],
)
def test_the_whole_interval_decides(relation, low, high, verdict):
    assert criterion(relation, 0.8).verdict(low, high) == verdict


def test_an_equivalence_is_judged_by_the_ninety_per_cent_interval():
    assert criterion("within", 0.1).level == 0.9
    assert criterion(">=", 0.1).level == 0.95


def test_a_record_shows_the_interval_of_its_criterions_level_and_is_judged_by_it():
    """Threshold 0.1, between the upper ends of the 90 % and of the 95 % interval."""
    draws = np.linspace(-1, 1, 2001)
    spread = Estimate(np.r_[0.0, draws * 0.1 / 0.925], "texts", 10_000)
    assert spread.interval(0.9).high < 0.1 < spread.interval(0.95).high
    statistics = {name: number(0.01) for name in GAINS}
    statistics |= {
        name: {TEXTS: number(0.01)} for name in ("norm_exchange_transfer", "norm_cost_ratio")
    }
    (equal,) = [one for one in criteria("norm-code") if one.statistic == "partial_given_angle"]
    scaled = spread * (equal.threshold / 0.1)
    statistics["partial_given_angle"] = {TEXTS: scaled, "capitals": number(0.0, units="a")}
    (row,) = [
        one
        for one in judge("norm-code", "m", statistics)
        if (one["statistic"], one["place"]) == ("partial_given_angle", TEXTS)
    ]
    assert row["verdict"] == "supported"
    assert row["high"] == pytest.approx(float(scaled.interval(0.9).high))
    wide = angles(beyond_reader={TEXTS: scaled})
    (row,) = [
        one for one in judge("angular-code", "m", wide) if one["statistic"] == "beyond_reader"
    ]
    assert row["high"] == pytest.approx(float(scaled.interval(0.95).high))


def test_every_criterion_of_the_registration_is_complete():
    assert {one.claim for one in criteria()} == {
        *("phase-transition", "angular-code", "norm-code", "causal-control"),
        *("inside-the-switch", "why-angles"),
    }
    assert len(criteria()) == 44
    assert not is_held_out("capitals")
    assert is_held_out("continents")
    with pytest.raises(ValueError, match="choose one of phase-transition"):
        criteria("phase")


def angles(**changed):
    """Return statistics that support the whole claim, but for those given."""
    two = {
        TEXTS: number(0.7),
        "capitals": number(0.7, units="a"),
        "animals": number(0.7, units="b"),
    }
    names = ("late_correlation", "late_minus_early", "set_in", "set_in_beyond_twins")
    found = dict.fromkeys((*names, "angle_minus_distance"), two)
    beyond = ("beyond_reader", "beyond_reader_beyond_twins")
    return {**found, **{name: {TEXTS: number(0.7)} for name in beyond}, **changed}


def test_a_claim_is_supported_when_all_its_statistics_are_everywhere():
    records = judge("angular-code", "m", angles())
    assert claim_verdict(records, "angular-code", "m").verdict == "supported"
    pooled = [row for row in records if row["place"] == POOLED]
    assert {row["n"] for row in pooled} == {20_000}


def test_one_refuted_statistic_refutes_its_part_and_the_claim():
    records = judge("angular-code", "m", angles(beyond_reader={TEXTS: number(0.05)}))
    found = claim_verdict(records, "angular-code", "m")
    assert found.parts["beyond a fair reader"] == found.verdict == "refuted"
    assert found.parts["strength"] == "supported"


def test_an_undecided_or_untested_statistic_leaves_its_part_undecided():
    for one in (number(0.15, 0.1), Untested("no reader")):
        found = claim_verdict(
            judge("angular-code", "m", angles(beyond_reader={TEXTS: one})), "angular-code", "m"
        )
        assert found.parts["beyond a fair reader"] == found.verdict == "undecided"
    assert join(["not testable", "not testable"]) == "not testable"


def test_a_pooled_support_falls_when_more_than_a_quarter_of_the_tasks_refute_it():
    tasks = {f"task {k}": number(0.9, units=f"task {k}") for k in range(6)}
    one = {TEXTS: number(0.7), **tasks, "bad": number(0.1, units="bad")}
    two = {**one, "worse": number(0.1, units="worse"), "worst": number(0.1, units="worst")}
    for places, verdict in ((one, "supported"), (two, "undecided")):
        records = judge("angular-code", "m", angles(late_correlation=places))
        (row,) = [
            r for r in records if r["statistic"] == "late_correlation" and r["place"] == POOLED
        ]
        assert row["verdict"] == verdict
    assert row["reason"] == "3 of 9 tasks refute it"


def test_tasks_that_could_not_be_tested_do_not_outvote_those_that_refute():
    places = {TEXTS: number(0.7), "bad": number(0.1, units="bad")}
    places |= {f"task {k}": number(1.9, units=f"task {k}") for k in range(2)}
    places |= {f"lost {k}": Untested("no tokens") for k in range(5)}
    records = judge("angular-code", "m", angles(late_correlation=places))
    (row,) = [r for r in records if r["statistic"] == "late_correlation" and r["place"] == POOLED]
    assert row["estimate"] > 0.8
    assert (row["verdict"], row["reason"]) == ("undecided", "1 of 3 tasks refute it")


def test_a_number_per_block_has_to_hold_at_each_and_shows_its_worst():
    curve = Estimate(
        np.tile([0.02, -0.3, 0.05], (40, 1)) + np.linspace(-0.01, 0.01, 40)[:, None], "t", 10_000
    )
    statistics = {name: number(0.01) for name in GAINS}
    statistics |= {
        name: {TEXTS: number(0.01)} for name in ("norm_exchange_transfer", "norm_cost_ratio")
    }
    statistics["partial_given_angle"] = {TEXTS: curve, "capitals": number(0.0, units="a")}
    records = judge("norm-code", "m", statistics)
    (row,) = [r for r in records if r["statistic"] == "partial_given_angle" and r["place"] == TEXTS]
    assert (row["verdict"], round(row["estimate"], 1), row["level"]) == ("refuted", -0.3, 0.9)


def test_one_of_several_numbers_refutes_at_bonferronis_level_and_one_alone_at_its_own():
    def judged(found: Estimate) -> dict:
        given = {one.statistic: number(0.01) for one in criteria("why-angles")}
        given |= {"partial_gap_normed": found}  # at least 0.5
        rows = judge("why-angles", "m", given)
        return next(row for row in rows if row["statistic"] == "partial_gap_normed")

    draws = 0.479 + 0.01 * np.random.default_rng(0).standard_normal((1001, 2))
    draws[0] = 0.479  # 2.1 standard errors below
    draws[:, 1] += 0.4
    both = Estimate(draws, "units", 1000)
    alone, together = judged(both.at(0)), judged(both)
    assert alone["verdict"] == "refuted"
    assert alone["high"] < 0.5
    assert together["verdict"] == "undecided"
    assert (together["low"], together["high"]) == (alone["low"], alone["high"])
    assert judged(both - 0.02)["verdict"] == "refuted"
    assert judged(both + 0.1)["verdict"] == "supported"


@pytest.mark.parametrize(
    ("relation", "worst"), [(">=", -0.3), (">", -0.3), ("<=", 0.2), ("<", 0.2), ("within", -0.3)]
)
def test_the_worst_block_is_the_one_furthest_from_the_criterion(relation, worst):
    curve = np.array([0.02, -0.3, 0.2])
    assert curve[criterion(relation, 0.1).worst(curve)] == worst


def test_a_models_verdict_and_its_twins_do_not_enter_each_other():
    twins = {name: value for name, value in angles().items() if "beyond_twins" not in name}
    low = {TEXTS: number(-0.7), "capitals": number(-0.7, units="a")}
    records = judge("angular-code", "m", angles(), {**twins, "late_correlation": low})
    assert claim_verdict(records, "angular-code", "m").verdict == "supported"
    assert claim_verdict(records, "angular-code", "m", untrained=True).verdict == "refuted"
    records = judge("angular-code", "m", angles(late_correlation=low), twins)
    assert claim_verdict(records, "angular-code", "m").verdict == "refuted"
    assert claim_verdict(records, "angular-code", "m", untrained=True).verdict != "refuted"


def test_what_the_twins_meet_as_well_is_marked_as_architecture():
    twins = {name: value for name, value in angles().items() if "beyond_twins" not in name}
    twins["set_in"] = {TEXTS: number(0.0), "capitals": number(0.0)}
    records = judge("angular-code", "m", angles(), twins)
    marked = {row["statistic"] for row in records if row["architecture"] and not row["untrained"]}
    assert "late_correlation" in marked
    assert "set_in" not in marked
    found = claim_verdict(records, "angular-code", "m", untrained=True)
    assert found.parts["sets in at the switch"] == "refuted"
    assert found.verdict != "supported"


def test_architecture_is_marked_at_the_place_at_which_the_twins_meet_it():
    twins = {name: value for name, value in angles().items() if "beyond_twins" not in name}
    twins["set_in"] = {TEXTS: number(0.7), "capitals": number(0.0), "animals": number(0.0)}
    records = judge("angular-code", "m", angles(), twins)
    marked = {
        row["place"]: row["architecture"]
        for row in records
        if row["statistic"] == "set_in" and not row["untrained"]
    }
    assert marked == {TEXTS: True, POOLED: False, "capitals": False, "animals": False}


def test_twins_support_no_claim_that_compares_with_them():
    twins = {name: value for name, value in angles().items() if "beyond_twins" not in name}
    records = judge("angular-code", "m", angles(), twins)
    assert claim_verdict(records, "angular-code", "m", untrained=True).verdict == "undecided"


def test_gaps_and_strangers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"missing: set_in; in no criterion: none"):
        judge("angular-code", "m", {k: v for k, v in angles().items() if k != "set_in"})
    with pytest.raises(ValueError, match=r"in no criterion: charm"):
        judge("angular-code", "m", angles(charm=number(1.0)))
    with pytest.raises(ValueError, match=r"beyond_reader: expected texts, got model"):
        judge("angular-code", "m", angles(beyond_reader=number(1.0)))
    records = judge("angular-code", "m", angles())
    with pytest.raises(ValueError, match="no record of set_in"):
        claim_verdict([r for r in records if r["statistic"] != "set_in"], "angular-code", "m")


def test_units_that_all_agree_are_not_taken_for_certainty():
    flat = {TEXTS: mean_over_units(np.full(20, 0.9), "texts")}
    records = judge("angular-code", "m", angles(beyond_reader=flat))
    (row,) = [r for r in records if r["statistic"] == "beyond_reader"]
    assert row["verdict"] == "not testable"
    assert "all 20 texts agree" in row["reason"]


def test_a_model_wide_number_has_the_models_place():
    found = judge(
        "why-angles", "small", {one.statistic: number(0.6) for one in criteria("why-angles")}
    )
    assert {row["place"] for row in found} == {MODEL}


@pytest.mark.parametrize(
    ("relation", "below", "at_low", "at_high", "above"),
    [
        (">=", "refuted", "undecided", "supported", "supported"),
        (">", "refuted", "refuted", "undecided", "supported"),
        ("<=", "supported", "supported", "undecided", "refuted"),
        ("<", "supported", "undecided", "refuted", "refuted"),
    ],
)
def test_an_interval_that_ends_at_the_threshold_is_judged_by_the_relation(
    relation, below, at_low, at_high, above
):
    one = Criterion("c", "p", "s", relation, 0.5, "model", "T", "it")
    assert one.verdict(0.1, 0.4) == below
    assert one.verdict(0.1, 0.5) == at_low
    assert one.verdict(0.5, 0.9) == at_high
    assert one.verdict(0.6, 0.9) == above
    assert one.verdict(0.4, 0.6) == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.09, 0.09, "supported"),
        (-0.1, 0.0, "undecided"),
        (0.0, 0.1, "undecided"),
        (0.1, 0.2, "refuted"),
        (-0.2, -0.1, "refuted"),
        (-0.2, 0.2, "undecided"),
    ],
)
def test_an_equivalence_has_its_whole_interval_inside_the_margin(low, high, expected):
    assert (
        Criterion("c", "p", "s", "within", 0.1, "model", "T", "it").verdict(low, high) == expected
    )


def test_a_pooled_support_stands_with_a_quarter_of_the_tasks_against_it_and_falls_with_more():
    (first, *others) = criteria("phase-transition")
    assert (first.relation, first.places) == (">=", "tasks")

    def pooled(n_against):
        tasks = {
            f"task {k}": mean_over_units(
                (0.5 if k < n_against else 1.0) + 0.001 * np.arange(40), f"subjects of {k}"
            )
            for k in range(8)
        }
        rest = {one.statistic: mean_over_units(np.arange(9.0), "x") for one in others}
        rest = {
            one.statistic: {"a": rest[one.statistic]}
            if one.places == "tasks"
            else rest[one.statistic]
            for one in others
        }
        rows = judge("phase-transition", "m", {first.statistic: tasks, **rest})
        (row,) = [r for r in rows if (r["statistic"], r["place"]) == (first.statistic, "all tasks")]
        return row["verdict"]

    assert [pooled(n) for n in (0, 2, 3)] == ["supported", "supported", "undecided"]


def test_a_record_says_of_whom_it_is_and_what_was_lost():
    (first, *others) = criteria("phase-transition")
    number = mean_over_units(np.arange(40.0), "forty")
    tasks = {"capitals": number, "antonyms": Untested("no pair")}
    rest = {one.statistic: {"a": number} if one.places == "tasks" else number for one in others}
    twins = {one.statistic: number for one in others if one.places != "tasks"}
    twins |= {one.statistic: {"a": number} for one in others if one.places == "tasks"}
    twins = {name: twins[name] for name in twins if not _compares(name)} | {first.statistic: tasks}
    rows = judge("phase-transition", "m", {first.statistic: tasks, **rest}, twins)
    assert {row["claim"] for row in rows} == {"phase-transition"}
    assert {row["model"] for row in rows} == {"m"}
    own = {
        (row["place"], row["untrained"]): row for row in rows if row["statistic"] == first.statistic
    }
    seen, lost = own["capitals", False], own["antonyms", False]
    assert (seen["n"], seen["reason"], seen["held_out"]) == (40, "", False)
    assert (lost["n"], lost["reason"], lost["held_out"]) == (0, "no pair", True)
    assert lost["estimate"] is None and not lost["architecture"]
    assert own["capitals", True]["untrained"]
    found = claim_verdict(rows, "phase-transition", "m", untrained=True)
    assert (found.claim, found.model, found.untrained) == ("phase-transition", "m", True)
    assert (
        found.parts["learned"] == "not testable"
    )  # it compares with twins, and holds nothing else


def _compares(statistic: str) -> bool:
    return next(
        one for one in criteria("phase-transition") if one.statistic == statistic
    ).comparative
