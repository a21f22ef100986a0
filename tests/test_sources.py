"""Sources: the files that code imports, as importing it would find them."""

import subprocess
import sys
from pathlib import Path

import pytest

from lib.engine import sources
from lib.engine.sources import ROOT, digest_of_files, direct_imports, imported_files

ENGINE = ROOT / "lib" / "engine"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small lib: `top` imports `middle`, which imports `deep` inside a function."""
    files = {
        "lib/__init__.py": "from lib.engine.deep import answer\n"
        "from lib.other import aside as by\n",
        "lib/engine/deep.py": "import json\nanswer = 42\n",
        "lib/engine/middle.py": "def late():\n    from lib.engine import deep\n    return deep\n",
        "lib/top.py": "from .engine import middle\n",
        "lib/other.py": "import lib.engine.deep as deep\naside = deep\n",
        "lib/loop.py": "import lib.loop\nfrom lib.engine.middle import late\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import json, numpy", set()),
        ("import lib.top", {"top", "middle", "deep"}),
        ("from lib import top", {"top", "middle", "deep"}),
        ("from lib import answer", {"deep"}),
        ("from lib import by", {"other", "deep"}),
        ("from lib.engine.middle import late", {"middle", "deep"}),
        ("if True:\n    import lib.loop", {"loop", "middle", "deep"}),
        ("import lib", {"__init__", "deep", "other"}),
        ("from lib import *", {"__init__", "deep", "other"}),
        ("import library, libs", set()),
    ],
)
def test_every_way_of_importing_leads_to_the_files(
    tree: Path, text: str, expected: set[str]
) -> None:
    assert {path.stem for path in imported_files(text)} == expected


def test_a_module_given_by_its_path_is_part_of_the_result(tree: Path) -> None:
    found = imported_files(tree / "lib" / "top.py", "import lib.other")
    assert {path.stem for path in found} == {"top", "middle", "deep", "other"}
    assert {path.stem for path in direct_imports(tree / "lib" / "top.py")} == {"middle"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import lib.nothing", "lib.nothing is imported, but there is no such module"),
        ("from lib.engine import nothing", "lib.engine.nothing is imported"),
        ("x = = 1", "Line 1 of the code is no Python"),
    ],
)
def test_code_that_could_not_run_is_refused_in_one_line(tree: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        imported_files(text)
    assert "\n" not in str(raised.value)


def test_a_digest_follows_names_and_contents_and_nothing_else(tree: Path) -> None:
    top, other = tree / "lib" / "top.py", tree / "lib" / "other.py"
    before = digest_of_files([top, other])
    assert digest_of_files([other, top, top]) == before
    top.write_text(top.read_text() + "#")
    changed = digest_of_files([top, other])
    assert len({before, changed, digest_of_files([top]), digest_of_files([])}) == 4


def test_a_digest_tells_contents_of_one_length_and_files_of_one_content_apart(tree: Path) -> None:
    deep, renamed = tree / "lib" / "engine" / "deep.py", tree / "lib" / "engine" / "peed.py"
    before = digest_of_files([deep])
    deep.write_text(deep.read_text().replace("42", "43"))
    changed = digest_of_files([deep])
    deep.rename(renamed)
    assert len({before, changed, digest_of_files([renamed])}) == 3


def test_what_is_found_is_what_python_loads() -> None:
    """Each module of the engine alone, in a process of its own."""
    for name in ("extraction", "generation", "store"):
        code = f"import sys, lib.engine.{name}; print(*[m for m in sys.modules if m[:4] == 'lib.'])"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        loaded = {ROOT.joinpath(*module.split(".")).with_suffix(".py")
                  for module in done.stdout.split()} - {ROOT / "lib" / "engine.py"}  # fmt: skip
        assert loaded <= imported_files(ENGINE / f"{name}.py")
        found = imported_files(ENGINE / f"{name}.py")
        assert found <= loaded
