"""CONTRIBUTING.md walked through in a copy of the project: what it says to write does work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.engine.files import ROOT

STEP = re.compile(r"(At the end of|In a new file) `([^`]+)`:\n\n```\w+\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which every block of the page was put where the page says."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "lib", copy / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    steps = STEP.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(steps) == 6
    for how, name, block in steps:
        path = copy / name
        assert path.is_file() == (how == "At the end of"), name
        path.write_text(
            (path.read_text(encoding="utf-8") if path.is_file() else "") + block, "utf-8"
        )
    return copy


def run(code: str, where: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_task_is_a_csv_of_subjects_and_one_of_wordings(followed: Path):
    code = """
from lib.engine.models import load_decoder
from lib.evidence.tasks import exchange_pairs, load_tasks
task = load_tasks(load_decoder(), ["seasons"])["seasons"]
print(task.n_units, len(task.answers), task.n_prompts, len(exchange_pairs(task)))
"""
    assert run(code, followed) == "12 4 24 36"


def test_a_metric_is_a_function_a_statistic_and_a_call(followed: Path):
    code = """
import numpy as np, torch
from lib.claims.angular_code import Items, dot_product_correlation
from lib.science.geometry import dot_products
states = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
divergence = -dot_products(states[1].numpy())
np.fill_diagonal(divergence, 0)
found = dot_product_correlation(Items(states, divergence, "texts"))
print(found.value.round(6)[1], abs(found.value[0]) < 0.5)
"""
    assert run(code, followed) == "1.0 True"


def test_a_claim_is_criteria_statistics_and_one_call_that_judges(followed: Path):
    code = """
import torch
from lib.claims.long_states import norm_ratio
from lib.evidence.criteria import claim_verdict, judge
states = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(0))
states[2] *= 3
records = judge("long-states", "m", {"norm_ratio": {"texts": norm_ratio(states)}})
print(claim_verdict(records, "long-states", "m").verdict, records[0]["n"])
"""
    assert run(code, followed) == "supported 20"


def test_what_the_page_says_of_the_floors_is_what_the_tests_hold():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\| `lib/(\w+)/`", page, re.M)
    from test_floors import FLOORS

    assert tuple(reversed(floors)) == FLOORS
