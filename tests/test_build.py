import html
import io
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from claimed import number

import executable_book.freshness as freshness
import notebooks
import picture
import setup_cells
from executable_book.progress import Display, Follower, describe
from lib.engine import sources
from lib.evidence.records import pages, shown, write_records

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = setup_cells.chapters()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in read(name).splitlines()]
    return dict(line.split("==") for line in lines if line)


# One source of truth for versions


def test_every_direct_requirement_is_pinned_alike_in_the_resolved_list():
    for kind in ("", "-tests"):
        direct, resolved = pins(f"requirements{kind}.in"), pins(f"requirements{kind}.txt")
        resolved = {name.lower(): version for name, version in resolved.items()}
        for name, version in direct.items():
            assert resolved[name.lower()] == version, name


def test_resolved_lists_hold_plain_pins_and_do_not_overlap():
    book, tests = pins("requirements.txt"), pins("requirements-tests.txt")
    assert not book.keys() & tests.keys()
    for name, version in (book | tests).items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_versions_are_written_nowhere_else():
    files = ["Makefile", "environment.yml", ".ci/run", "pyproject.toml", "_config.yml"]
    files += [f".github/workflows/{file.name}" for file in (ROOT / ".github/workflows").iterdir()]
    for file in files:
        found = re.findall(r"^.*\b[\w.-]+\s*==\s*\d.*$", read(file), re.M)
        assert not found, f"{file}: {found}"


def test_conda_makefile_and_server_use_the_same_list():
    conda = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert conda[-1] == {"pip": ["-r requirements.txt"]}
    assert [entry.split()[0] for entry in conda[:-1]] == ["python", "pip"]
    makefile = read("Makefile")
    assert "install --require-hashes --requirement requirements-hashed.txt" in makefile
    assert "--require-hashes --no-deps --requirement requirements-tests-hashed.txt" in makefile
    assert "pip install" not in read(".ci/run")
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert commands == ["bash .ci/run"]


def test_python_versions_agree():
    assert '">=3.11,<3.14"' in read("pyproject.toml")
    assert "python >=3.11,<3.14" in read("environment.yml")
    assert "(3, 11) <= sys.version_info < (3, 14)" in read("Makefile")


def test_the_environment_in_use_is_the_pinned_one():
    from importlib.metadata import version

    installed = {name: version(name).split("+")[0] for name in pins("requirements.in")}
    assert installed == pins("requirements.in")


@pytest.mark.parametrize("kind", ["", "-tests"])
def test_every_pin_but_torch_has_hashes_and_the_list_names_no_address(kind):
    text = read(f"requirements{kind}-hashed.txt").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    hashed = {}
    for pin, *hashes in lines:
        name, version = pin.split("==")
        hashed[name] = version
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in hashes), pin
    expected = pins(f"requirements{kind}.txt")
    expected.pop("torch", None)
    assert hashed == expected


def test_actions_are_pinned_by_commit_and_name_their_tag():
    used = re.findall(r"uses: *(.*)", read(".github/workflows/book.yml"))
    assert len(used) == 4
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert "${{" not in "".join(
        step.get("run", "")
        for job in yaml.safe_load(read(".github/workflows/book.yml"))["jobs"].values()
        for step in job["steps"]
    )


def test_workflow_may_only_read_but_for_the_pages_step():
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}


# Makefile: installing, once and wholly


@pytest.fixture
def fake_project(tmp_path):
    """A project whose Python only notes what it is asked to do, and fails or dies if told to."""
    for file in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(file, tmp_path)
    python = tmp_path / "fake-python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> log\n[ "$2" = pip ] && [ -e FAIL ] && exit 1\n'
        '[ "$2" = pip ] && [ -e KILL ] && kill -9 $PPID\n'
        '[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\nexit 0\n'
    )
    python.chmod(0o755)

    def make(*arguments: str) -> tuple[int, list[str]]:
        (tmp_path / "log").write_text("")
        command = ["make", "--silent", "PYTHON=./fake-python", *arguments]
        code = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode
        lines = (tmp_path / "log").read_text().splitlines()
        return code, [line for line in lines if not line.startswith("-c")]

    return tmp_path, make


def test_torch_is_installed_first_and_from_the_extra_index_if_one_is_named(fake_project):
    _, make = fake_project
    code, (venv, torch, rest) = make(".venv/book.stamp", "TORCH_INDEX_URL=https://example.org/cpu")
    assert code == 0
    assert venv == "-m venv .venv"
    assert (
        f"--extra-index-url https://example.org/cpu torch=={pins('requirements.in')['torch']}"
        in torch
    )
    assert "--require-hashes --requirement requirements-hashed.txt" in rest
    assert "example.org" not in rest


def test_finished_installation_is_not_repeated(fake_project):
    _, make = fake_project
    assert make(".venv/tests.stamp")[0] == 0
    assert make(".venv/tests.stamp") == (0, [])
    assert make(".venv/book.stamp") == (0, [])


def test_interrupted_installation_is_redone_from_nothing(fake_project):
    folder, make = fake_project
    (folder / "FAIL").touch()
    assert make(".venv/book.stamp")[0] != 0
    (folder / ".venv" / "half-installed").touch()
    (folder / "FAIL").unlink()
    code, log = make(".venv/book.stamp")
    assert (code, len(log)) == (0, 3)
    assert not (folder / ".venv" / "half-installed").exists()


def test_tests_that_cannot_be_installed_leave_the_book_installed(fake_project):
    folder, make = fake_project
    assert make(".venv/book.stamp")[0] == 0
    (folder / "FAIL").touch()
    assert make(".venv/tests.stamp")[0] != 0
    assert make(".venv/book.stamp") == (0, [])


def test_installation_of_the_tests_cut_off_halfway_is_redone_from_nothing(fake_project):
    folder, make = fake_project
    assert make(".venv/book.stamp")[0] == 0
    (folder / "KILL").touch()
    assert make(".venv/tests.stamp")[0] != 0
    (folder / "KILL").unlink()
    code, log = make(".venv/tests.stamp")
    assert code == 0
    assert log[0] == "-m venv .venv"


@pytest.mark.parametrize("command", ["pdf", "summary", "picture"])
def test_what_is_printed_is_the_book_that_was_built_last(fake_project, command):
    """Of whatever model and tasks: a build without them would put another in its place."""
    _, make = fake_project
    code, log = make(command)
    script = "picture.py" if command == "picture" else "pdf.py"
    assert code == 0 and f"book/_ext/{script}" in log[-1]
    assert not any("lib.engine.weights" in line or "jupyter-book" in line for line in log)


def test_changed_requirements_are_installed(fake_project):
    folder, make = fake_project
    assert make(".venv/book.stamp")[0] == 0
    later = (folder / ".venv" / "book.stamp").stat().st_mtime + 5
    os.utime(folder / "requirements-hashed.txt", (later, later))
    assert len(make(".venv/book.stamp")[1]) == 3


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_wrong_python_is_named_with_what_to_do(tmp_path, python):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-hashed.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "book", f"PYTHON={python}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"Python 3.11 to 3.13 is needed; '{python}' is not." in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_help_lists_every_command():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in (
        "book",
        "test",
        "test-reading",
        "test-colab",
        "picture",
        "pdf",
        "verify",
        "lint",
        "audit",
        "mutate",
        "bench",
        "model",
        "notebooks",
        "lock",
        "clean",
    ):
        assert f"make {command} " in listed.stdout


# The repository's address and the chapters' notebooks


def test_all_files_name_the_same_repository():
    address = yaml.safe_load(read("_config.yml"))["repository"]["url"]
    owner, name = address.split("/")[-2:]
    link = re.compile(rf"(?:github\.com|/github)/([\w.-]+)/{re.escape(name)}\b")
    chapters = [f"book/{file.name}" for file in CHAPTERS]
    for file in (*setup_cells.FILES_WITH_ADDRESS, *chapters):
        owners = set(link.findall(read(file))) if (ROOT / file).is_file() else set()
        assert owners <= {owner}, f"{file}: {owners}"
    assert f"repository-code: {address}\n" in read("CITATION.cff")


def test_address_is_replaced_in_links_of_every_kind():
    text = "https://github.com/a/b, https://example.org/github/a/b/blob/main/x.ipynb"
    assert setup_cells.with_address(text, "https://github.com/a/b", "https://github.com/c/d/") == (
        "https://github.com/c/d, https://example.org/github/c/d/blob/main/x.ipynb"
    )


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda file: file.stem)
def test_chapter_begins_with_the_setup_cell(chapter):
    text = chapter.read_text(encoding="utf-8")
    assert setup_cells.with_setup_cell(text, setup_cells.setup_cell()) == text
    assert text.index("{code-cell}") < text.index(setup_cells.FIRST_LINE)
    assert text.count("{code-cell}", 0, text.index(setup_cells.FIRST_LINE)) == 1


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda file: file.stem)
def test_notebook_beside_the_chapter_says_the_same_and_holds_no_output(chapter):
    import jupytext

    written = chapter.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert notebooks.notebook_text(chapter, setup_cells.FIRST_LINE) == written, "make notebooks"
    cells = json.loads(written)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    made = ("# Text with the values", "# What is computed further down")
    own = [source for source in code if not "".join(source).startswith(made)]
    told = [cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    assert ["".join(source) for source in own] == told
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_chapter_without_setup_cell_is_reported():
    with pytest.raises(ValueError, match="No setup cell"):
        setup_cells.with_setup_cell("# A chapter\n", "cell\n")


def test_setup_cell_takes_the_place_of_the_word_or_of_its_predecessor():
    chapter = "# A\n\n```{code-cell}\n\nSETUP\n```\n\nText.\n"
    filled = setup_cells.with_setup_cell(chapter, "cell\n")
    assert filled == chapter.replace("SETUP", "cell")
    older = chapter.replace("SETUP", setup_cells.FIRST_LINE + "\nold = 1")
    assert setup_cells.with_setup_cell(older, "cell\n") == filled


# README


def test_every_command_stands_in_the_readme():
    listed = re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.M)
    missing = [
        name for name in listed if name != "help" and f"`make {name}`" not in read("README.md")
    ]
    assert not missing


TEXTS = ["README.md", *sorted(f"book/{page.name}" for page in (ROOT / "book").glob("*.md"))]


@pytest.mark.parametrize("text", TEXTS)
def test_modules_and_files_that_a_text_names_are_there(text):
    """A module, a name in it, and a file of the repository."""
    for named in set(re.findall(r"\blib(?:\.\w+)+", read(text))):
        assert pkgutil.resolve_name(named), named
    named = set(re.findall(r"`((?:lib|book|tests|benchmarks|workflow)/[\w./-]+)`", read(text)))
    assert [file for file in sorted(named) if "<" not in file and not (ROOT / file).exists()] == []


def test_the_readmes_picture_says_its_finding_is_small_and_shows_on_dark_pages():
    from PIL import Image

    ((alt, file),) = re.findall(r"!\[([^]]*)\]\(([^)]*)\)", read("README.md"))
    assert len(alt.split()) > 20
    assert (ROOT / file).stat().st_size < 200_000
    with Image.open(ROOT / file) as picture:
        colours = picture.convert("RGBA")
    assert colours.getchannel("A").getextrema() == (255, 255)
    width, height = colours.size
    corners = [colours.getpixel((x, y)) for x in (0, width - 1) for y in (0, height - 1)]
    assert set(corners) == {(255, 255, 255, 255)}


def test_the_picture_is_the_figure_that_the_chapter_glued(tmp_path):
    glued = tmp_path / "one.glue.json"
    with pytest.raises(FileNotFoundError, match="make book"):
        picture.figure_png(glued, "main")
    text = {"data": {"text/plain": "'a'"}}
    glued.write_text(json.dumps({"main": {"data": {"image/png": "AAEC"}}, "word": text}))
    assert picture.figure_png(glued, "main") == bytes([0, 1, 2])
    for name in ("word", "gone"):
        with pytest.raises(FileNotFoundError, match=f"no picture of {name}"):
            picture.figure_png(glued, name)


# When chapters are executed again


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    """A lib of three modules and two tables, and a chapter that imports one of them."""
    (tmp_path / "lib" / "data").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    files = {
        "lib/used.py": "from lib.below import a\n",
        "lib/below.py": "a = 'read.csv'\n",
        "lib/other.py": "b = 1\n",
        "lib/data/read.csv": "x\n",
        "lib/data/unread.csv": "x\n",
        "book/a.md": "---\njupytext: {text_representation: {extension: .md, format_name: myst}}\n"
        "kernelspec: {display_name: Python 3, language: python, name: python3}\n---\n\n# A\n\n"
        "```{code-cell} ipython3\n---\nmystnb: {figure: {caption: Old.}}\n---\n"
        "from lib.used import a\n```\n",
        "_toc.yml": "format: jb-book\nroot: book/intro\nparts:\n- chapters:\n  - file: book/b\n"
        "    sections:\n    - file: book/a\n- chapters:\n  - file: book/c\n",
    }
    files |= dict.fromkeys(freshness.ENVIRONMENT_FILES, "torch\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for module in (freshness, sources):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(freshness, "DATA", tmp_path / "lib" / "data")
    monkeypatch.setattr(freshness, "claim_file", lambda claim: tmp_path / f"{claim}.json")
    return tmp_path


@pytest.mark.parametrize(
    "file", ["lib/used.py", "lib/below.py", "lib/data/read.csv", "requirements.txt"]
)
def test_a_change_of_what_a_chapter_uses_makes_it_run_again(small_project, file):
    before = freshness.chapter_digest("book/a")
    with (small_project / file).open("a") as text:
        text.write("# changed\n")
    assert freshness.chapter_digest("book/a") != before


@pytest.mark.parametrize("file", ["lib/other.py", "lib/data/unread.csv"])
def test_a_change_of_what_it_does_not_use_runs_nothing(small_project, file):
    before = freshness.chapter_digest("book/a")
    (small_project / file).write_text("# changed\n")
    assert freshness.chapter_digest("book/a") == before


def test_what_is_recorded_of_other_models_is_read_by_the_explorer_alone(small_project):
    recorded = small_project / "tests" / "recorded" / "m.explorer.json"
    recorded.parent.mkdir(parents=True)
    before = freshness.chapter_digest("book/a")
    recorded.write_text("[]")
    assert freshness.chapter_digest("book/a") == before
    (small_project / "lib" / "reading").mkdir()
    (small_project / "lib" / "reading" / "explorer.py").write_text("")
    (small_project / "lib" / "used.py").write_text("import lib.reading.explorer\n")
    before = freshness.chapter_digest("book/a")
    recorded.write_text("[1]")
    assert freshness.chapter_digest("book/a") != before


def test_a_reworded_caption_runs_nothing(small_project):
    before = freshness.chapter_digest("book/a")
    chapter = small_project / "book" / "a.md"
    chapter.write_text(chapter.read_text().replace("Old.", "A new caption."))
    assert freshness.chapter_digest("book/a") == before


def test_an_import_of_what_is_not_there_names_the_chapter(small_project):
    chapter = small_project / "book" / "a.md"
    chapter.write_text(chapter.read_text().replace("lib.used", "lib.gone"))
    with pytest.raises(ValueError, match=r"book/a: lib\.gone\S* is imported"):
        freshness.chapter_digest("book/a")


def test_another_model_makes_chapters_run_again(small_project, monkeypatch):
    monkeypatch.setenv("MODEL", "embedded")
    before = freshness.chapter_digest("book/a")
    monkeypatch.delenv("MODEL")
    assert freshness.chapter_digest("book/a") == before
    monkeypatch.setenv("MODEL", "other")
    assert freshness.chapter_digest("book/a") != before


@pytest.mark.parametrize("folder", ["mine", "/elsewhere"])
def test_other_weights_in_a_models_folder_make_chapters_run_again(
    small_project, monkeypatch, folder
):
    place = small_project / folder.strip("/")
    monkeypatch.setenv("MODEL", str(place) if folder.startswith("/") else folder)
    place.mkdir()
    for file in ("config.json", "model.safetensors"):
        (place / file).write_text("1")
    before = freshness.chapter_digest("book/a")
    assert freshness.chapter_digest("book/a") == before
    (place / "model.safetensors").write_text("23")
    assert freshness.chapter_digest("book/a") != before


def test_other_transitions_make_run_again_what_reads_them_alone(small_project, monkeypatch):
    (small_project / "lib" / "below.py").write_text("a = 1\n")
    reader = small_project / "lib" / "transition.py"
    reader.write_text("")
    monkeypatch.setattr(freshness.transition, "__file__", str(reader))
    before = freshness.chapter_digest("book/a")
    rows = shown("phase-transition", "m", "transition", {"capitals": number(22.5, "subjects")})
    write_records(small_project / "phase-transition.json", rows)
    assert freshness.chapter_digest("book/a") == before
    (small_project / "lib" / "below.py").write_text("import lib.transition\n")
    first = freshness.chapter_digest("book/a")
    rows = shown("phase-transition", "m", "transition", {"capitals": number(21.5, "subjects")})
    write_records(small_project / "phase-transition.json", rows)
    assert freshness.chapter_digest("book/a") != first


def test_pages_are_read_in_the_order_of_the_book_and_the_landing_page_last(small_project):
    assert pages(small_project) == ["book/intro", "book/b", "book/a", "book/c"]
    app = SimpleNamespace(srcdir=small_project)
    env = SimpleNamespace(found_docs={"book/intro", "book/a", "book/b", "book/c", "extra"})
    docnames = ["book/a", "book/intro", "extra"]
    freshness.order_pages(app, env, docnames)  # type: ignore[arg-type]
    assert docnames == ["extra", "book/a", "book/c", "book/intro"]
    docnames = ["book/intro"]
    freshness.order_pages(app, env, docnames)  # type: ignore[arg-type]
    assert docnames == ["book/intro"]


# Progress at the terminal

LINE = {"chapter": "norm-code", "what": "sweep", "done": 3, "total": 12, "seconds": 4.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_names_chapter_work_and_extent():
    assert describe(LINE) == "norm-code: sweep 3/12 (25 %), 4 s"
    assert describe(LINE | {"total": None}) == "norm-code: sweep 3, 4 s"


def test_progress_rewrites_one_line_at_a_terminal_and_leaves_it_empty():
    display = Display(Terminal())
    display.show(LINE)
    display.show(LINE | {"done": 4})
    display.end()
    assert "\n" not in display.stream.getvalue()  # type: ignore[attr-defined]
    assert display.stream.getvalue().endswith("\r\x1b[K")  # type: ignore[attr-defined]


def test_progress_is_sparse_in_a_log_but_shows_begin_and_end():
    display = Display(io.StringIO())
    for done in range(13):
        display.show(LINE | {"done": done})
    display.show(LINE | {"what": "bootstrap"})
    shown = display.stream.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [re.findall(r"\w+ \d+/", line)[0] for line in shown] == [
        "sweep 0/",
        "sweep 12/",
        "bootstrap 3/",
    ]


def test_half_written_lines_wait_until_they_are_whole(tmp_path):
    stream = io.StringIO()
    follower = Follower(tmp_path / "progress", Display(stream))
    follower.file.write_text(json.dumps(LINE)[:20])
    follower.look()
    assert stream.getvalue() == ""
    follower.file.write_text(json.dumps(LINE) + "\n")
    follower.look()
    assert stream.getvalue().count("\n") == 1


# A small book, built for real

CHAPTER = """\
---
jupytext:
  text_representation: {{extension: .md, format_name: myst}}
kernelspec: {{display_name: Python 3, language: python, name: python3}}
---

# {claim}

Symbol $\\theta$ and value {{glue:text}}`words`.

```{{code-cell}} ipython3
{setup}
```

```{{code-cell}} ipython3
---
mystnb:
  image: {{alt: Line that rises.}}
  figure: {{caption: "It rises, {{glue:text}}`words`.", name: figure-{claim}}}
---
import matplotlib.pyplot as plt
from lib.engine.progress import track

with open("runs-{claim}", "a") as runs:
    runs.write("x")
steps = [step for step in track(range(3), "counting the steps")]
plt.plot(steps);
```

```{{code-cell}} ipython3
from lib.evidence.criteria import judge
from lib.evidence.records import shown
from lib.science.estimate import mean_over_units
{reads}

value = {estimate} + seen
spread = [value - 0.01, value, value + 0.01] * 10
estimate = mean_over_units(spread, "texts")
notebook.glue_estimates({{"words": estimate}})
notebook.glue_figure("main", plt.figure())
twins = {{"s": mean_over_units([0.0, 0.1, -0.1], "seeds")}}
records = judge("{claim}", "small", {{"s": estimate}}, twins)
records += shown("{claim}", "small", "transition", {{"t": estimate}})
notebook.conclude(records)
```
"""
READS = {
    "phase-transition": "seen = 0.0",
    "angular-code": "from lib.evidence.records import claim_file, read_records\n"
    "from lib.evidence.transition import CLAIM\n"
    "seen = read_records(claim_file(CLAIM))[-1]['estimate']",
}
CRITERION = """
[[criterion]]
claim = "{claim}"
part = "p"
statistic = "s"
relation = ">="
threshold = 0.3
places = "model"
unit = "T"
text = "the one number"
"""
INTRO = """\
# Intro

The claims {cite}`haim2026depthwise`, {glue:text}`phase-transition.md::words:s`.

```{chapter-figure} phase-transition main
:alt: An empty figure.

What *it* shows.
```

```{hand-over}
:alt: None, as no curve is recorded.

Nothing.
```

```{answers}
phase-transition | It is {s@model}.
```

```{scorecard}
phase-transition | Depth switches. | s
angular-code | Angles code. | s#angular-code
```

```{bibliography}
```
"""


FOLDERS = ("PROGRESS_FILE", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


class SmallBook:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("_config.yml", "CITATION.cff", "requirements.txt", "environment.yml"):
            shutil.copy(ROOT / name, folder)
        for name in ("book/_ext", "book/_static"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "book/references.bib", folder / "book")
        ignored = shutil.ignore_patterns("__pycache__", "first-registration")
        shutil.copytree(ROOT / "lib", folder / "lib", ignore=ignored)
        (folder / "lib" / "data" / "criteria.toml").write_text(
            "[material]\nseen_tasks = []\n"
            + CRITERION.format(claim="phase-transition")
            + CRITERION.format(claim="angular-code")
        )
        (folder / "_toc.yml").write_text(
            "format: jb-book\nroot: book/intro\nchapters:\n"
            "- file: book/phase-transition\n- file: book/angular-code\n- file: book/how-computed\n"
            "- file: book/glossary\n"
        )
        for page in ("how-computed", "glossary"):
            shutil.copy(ROOT / "book" / f"{page}.md", folder / "book")
        (folder / "book" / "intro.md").write_text(INTRO)
        for claim in ("phase-transition", "angular-code"):
            self.write(claim, "0.5")

    def write(self, claim: str, estimate: str) -> None:
        setup = setup_cells.setup_cell()
        text = CHAPTER.format(claim=claim, estimate=estimate, setup=setup, reads=READS[claim])
        (self.folder / "book" / f"{claim}.md").write_text(text)

    def build(self, *, strict: bool = True) -> subprocess.CompletedProcess[str]:
        command = [
            str(Path(sys.executable).with_name("jupyter-book")),
            "build",
            ".",
            "-W",
            "--keep-going",
        ]
        passed_on = {name: value for name, value in os.environ.items() if name not in FOLDERS}
        # A home that cannot be written, not even by root.
        environment = passed_on | {"HOME": os.devnull}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def runs(self) -> tuple[int, int]:
        files = [self.folder / "book" / f"runs-{c}" for c in ("phase-transition", "angular-code")]
        first, second = (len(file.read_text()) for file in files)
        return first, second

    def results(self) -> list[tuple[str, float]]:
        rows = json.loads((self.folder / "_build" / "results" / "results.json").read_text())
        own = [row for row in rows if row["statistic"] == "s" and not row["untrained"]]
        return [(row["claim"], round(row["estimate"], 6)) for row in own]

    def page(self, name: str) -> str:
        return (self.folder / "_build" / "html" / "book" / f"{name}.html").read_text()


def test_a_small_book_lives_through_builds_failures_and_changes(tmp_path):
    book = SmallBook(tmp_path)

    # From nothing: chapters in order, records collected, progress shown but not in the pages.
    done = book.build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert book.runs() == (1, 1)
    expected = [("phase-transition", 0.5), ("angular-code", 1.0)]
    assert book.results() == expected
    assert "phase-transition: counting the steps 3/3 (100 %)" in done.stderr
    for name in ("intro", "phase-transition", "angular-code"):
        page = book.page(name)
        assert "counting the steps 3/3" not in page
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*"', page)
        assert not re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//[^"]*"', page)
        assert "_static/tex-svg-full.js" in page
        assert page.count('<meta property="og:title"') == page.count('"citation_title"') == 1
    assert (tmp_path / "_build/html/_static/tex-svg-full.js").stat().st_size > 1_000_000
    assert 'alt="Line that rises."' in book.page("angular-code")
    assert '<span class="pasted-text">0.50 [0.50, 0.50]</span>.' in book.page("intro")
    summary = 'property="og:description" content="Symbol \\theta and value 0.50 [0.50, 0.50]."'
    assert summary in book.page("phase-transition")
    assert "no page here" in (tmp_path / "_build/html/404.html").read_text()
    assert not (tmp_path / "_build/html/sitemap.xml").exists()
    card = re.sub(r"<[^>]+>", " ", book.page("intro"))
    assert re.search(r"Depth switches\.\s+● supported\s+the one number\s+trained: 0\.50 \[", card)
    assert "○ refuted" in card  # the twins
    assert re.search(r"Phase transition\s+: It is 0\.50\. ● Supported, 1 of 1 criteria met\.", card)
    assert 'href="angular-code.html#angular-code"' in book.page("intro")
    assert 'alt="An empty figure."' in book.page("intro")
    written = (tmp_path / "_build" / "results" / "scorecard.txt").read_text()
    assert re.search(r"phase-transition +● supported +○ refuted\n", written)

    facts = json.loads((tmp_path / "_build/results/run.json").read_text())
    assert facts["version_of_python"] == platform.python_version()
    assert facts["version_of_torch"].split("+")[0] == pins("requirements.in")["torch"]
    assert len(facts["model_sha256"]) == 64
    told = html.unescape(re.sub(r"<[^>]+>", " ", book.page("how-computed")))
    assert all(str(value) in told for value in facts.values())

    # Nothing changed: nothing is executed, the results are written all the same.
    shutil.rmtree(tmp_path / "_build" / "results")
    assert book.build().returncode == 0
    assert book.runs() == (1, 1)
    assert book.results() == expected

    # A module that no chapter imports changes: nothing is executed.
    with (tmp_path / "lib" / "reading" / "explorer.py").open("a") as file:
        file.write("# changed\n")
    assert book.build().returncode == 0
    assert book.runs() == (1, 1)

    # One that they do changes, a later chapter breaks: the earlier one is executed again, the build
    # fails every time, and the broken chapter's old records are gone.
    with (tmp_path / "lib" / "engine" / "files.py").open("a") as file:
        file.write("# changed\n")
    book.write("angular-code", "1 / 0")
    for strict in (True, False):
        done = book.build(strict=strict)
        assert done.returncode != 0
        assert "ZeroDivisionError" in done.stdout + done.stderr
        assert book.results() == expected[:1]
        assert "no result" in book.page("intro")
    assert book.runs() == (2, 3)

    # It is mended, but with a dead link, and the records of the chapter before it change: both
    # are executed, and the warning fails the build every time, although nothing is run again.
    book.write("phase-transition", "0.25")
    book.write("angular-code", "0.5")
    with (tmp_path / "book" / "angular-code.md").open("a") as chapter:
        chapter.write("\n[nowhere](missing.md)\n")
    for _ in range(2):
        done = book.build()
        assert done.returncode != 0
        assert "missing.md" in done.stdout + done.stderr
        assert [estimate for _, estimate in book.results()] == [0.25, 0.75]
    assert book.runs() == (3, 4)
