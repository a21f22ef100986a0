"""The table of architectures: nothing fails, nothing is inexact, and CI tries one of each kind."""

import pandas as pd
import pytest
from architectures import examine
from conftest import ARCHITECTURES

from lib.engine.files import DATA

TABLE = pd.read_csv(DATA / "architectures.csv").set_index("architecture")
NOT_BUILT = {"gemma4_assistant", "qwen4_exp_text"}  # whose configurations nothing small satisfies


def test_every_architecture_is_exact_or_refused_with_a_reason() -> None:
    tried = TABLE[TABLE["outcome"] != "not built"]
    assert set(TABLE.index) - set(tried.index) <= NOT_BUILT
    assert set(tried["outcome"]) <= {"exact", "refused", "see text part"}
    assert tried.loc[tried["outcome"] != "exact", "reason"].str.len().gt(0).all()
    exact = tried[tried["outcome"] == "exact"]
    assert exact[["extraction", "lens", "last", "earlier"]].max().max() < 1e-4
    assert len(exact) > 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_says_what_is_found(architecture: str) -> None:
    found = examine(architecture)
    for column in ("outcome", "last_path", "earlier_path"):
        assert TABLE.loc[architecture, column] == found[column]
