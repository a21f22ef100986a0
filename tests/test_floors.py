"""Floors: imports run down only, so that each part can be read with what lies below it alone."""

from pathlib import Path

import pytest

from lib.engine.sources import ROOT, direct_imports

LIB = ROOT / "lib"
FLOORS = ("engine", "science", "evidence", "reading", "claims")
MODULES = sorted(
    path for path in LIB.rglob("*.py") if path.parent.name in FLOORS and path.stem != "__init__"
)


def floor_of(path: Path) -> int:
    name = path.relative_to(LIB).parts[0]
    return FLOORS.index(name) if name in FLOORS else len(FLOORS)


def breaches(module: Path) -> list[str]:
    """Return what a module may not import but does."""
    own = floor_of(module)
    found = []
    for path in direct_imports(module):
        if path == LIB / "__init__.py":
            found.append("lib")  # its names lead anywhere
        elif floor_of(path) > own:
            found.append(path.name)
        elif FLOORS[own] == "science" and FLOORS[floor_of(path)] == "engine":
            found.append(path.name)  # arrays in, numbers out: no model
        elif FLOORS[own] == "claims" and floor_of(path) == own and path != module:
            found.append(path.name)
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(LIB).as_posix())
def test_imports_run_down_only(module: Path) -> None:
    assert breaches(module) == []


def test_every_floor_is_there() -> None:
    assert {path.relative_to(LIB).parts[0] for path in MODULES} == set(FLOORS)
