"""Writes how often verdicts err in simulation to `lib/data/error-rates.csv`; by `make error-rates`.

The rates are those of the tests `test_error_rates_*.py`, which hold each of them to 5 %, on 400
simulated books, where the tests make do with fewer.
"""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "lib" / "data" / "error-rates.csv"
RATES = {
    "false_support": "falsely supported",
    "false_refutation": "falsely refuted",
    "decided": "decided at a clear effect",
}


def rates(report: Path) -> pd.DataFrame:
    """Return what the tests told, a row a statistic and place."""
    rows = [
        dict(zip(("claim", "statistic", "place"), one.attrib["name"].split(", "), strict=True))
        | json.loads(one.attrib["value"])
        for one in ElementTree.parse(report).iter("property")
    ]
    found = pd.DataFrame(rows).groupby(["claim", "statistic", "place"], sort=False)[list(RATES)]
    table = found.agg({"false_support": "max", "false_refutation": "max", "decided": "min"})
    named = table.round(3).reset_index().rename(columns=RATES)
    names = ["claim", "statistic"]
    return named.assign(**named[names].replace("[-_]", " ", regex=True))


if __name__ == "__main__":
    report = TESTS.parent / "build" / "error-rates.xml"
    files = sorted(str(file) for file in TESTS.glob("test_error_rates_*.py"))
    os.environ["N_BOOKS"] = "400"
    code = pytest.main([*files, "-q", "-p", "no:randomly", f"--junitxml={report}"])
    if code == 0:
        rates(report).to_csv(TABLE, index=False)
    sys.exit(code)
