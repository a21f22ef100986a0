"""Words for numbers: how an estimate, a record and a verdict read in prose and in tables."""

import numpy as np

from lib.evidence.criteria import Record
from lib.evidence.records import SIGNS
from lib.science.estimate import Measured, Untested, is_own, share_limits

RECORDS_KEY = "records"
"""Name under which `conclude` glues a chapter's records; the build collects them by it."""


def number_text(value: float, decimals: int = 2) -> str:
    """Return a number with a true minus sign; small ones with one significant digit."""
    tiny = value != 0 and abs(value) < 0.5 * 10**-decimals
    text = (
        np.format_float_positional(value, precision=1, fractional=False)
        if tiny
        else f"{value:.{decimals}f}"
    )
    return text.replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: float, low: float, high: float) -> str:
    """Return a number with the ends of its interval."""
    return f"{number_text(estimate)} [{number_text(low)}, {number_text(high)}]"


def estimate_text(one: Measured) -> str:
    """Return an estimate of one number in words, as prose quotes it.

    Raises:
        ValueError: an estimate of several numbers.
    """
    if isinstance(one, Untested):
        return f"not testable ({one.reason})"
    if one.value.ndim:
        raise ValueError(
            f"An estimate over {one.units} holds {one.value.size} numbers; reduce it to one, with "
            "`.at` or `.over`."
        )
    return interval_text(float(one), *map(float, one.interval()))


def record_text(row: Record) -> str:
    """Return a record's number with its interval, or why there is none."""
    if row["estimate"] is None:
        return f"not testable ({row['reason']})"
    return interval_text(row["estimate"], row["low"], row["high"])


def table_text(row: Record) -> str:
    """Return `record_text` with what a table of records of several kinds has to tell beside it.

    The interval's level where that is not 95 %, and why the verdict is not what the interval says.
    """
    if row["estimate"] is None:
        return record_text(row)
    level = "" if row["level"] == 0.95 else f" (at {100 * row['level']:.0f} %)"
    return f"{record_text(row)}{level}" + (f"; {row['reason']}" if row["reason"] else "")


def signed(verdict: str) -> str:
    """Return a verdict as shape and word, "● supported" say."""
    return f"{SIGNS[verdict]} {verdict}"


def verdict_text(row: Record) -> str:
    """Return a record's verdict, "● supported, architecture" say."""
    mark = ", architecture" if row["architecture"] and row["verdict"] == "supported" else ""
    return f"{signed(row['verdict'])}{mark}"


def size_text(name: str, n_subjects: int) -> str:
    """Return a task's number of subjects, for a reader's own with what so many can tell."""
    if not is_own(name):
        return str(n_subjects)
    half, least = (number_text(limit) for limit in share_limits(n_subjects))
    return f"{n_subjects} (a share of them: ±{half} at one half, {least} or more if all agree)"
