"""Every notebook as a reader in Colab runs it: alone on a bare machine, top to bottom.

Run by `make test-colab`, which makes an environment with Colab's versions. Each notebook lies by
itself in an empty folder with an empty home; what it clones is this working tree; `google.colab`
is loaded before its first cell. The executed notebooks are kept in build/colab.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lib.evidence.criteria import criteria
from lib.evidence.records import pages

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / "build" / "colab-venv" / "bin" / "python"
EXECUTED = ROOT / "build" / "colab"
NOTEBOOKS = [page for page in pages(ROOT) if (ROOT / page).with_suffix(".ipynb").is_file()]
CLAIMS = {criterion.claim for criterion in criteria()}
BROUGHT = {"gguf"}
RAW_ROLE = re.compile(r"\{[a-z:]+\}`|^:::|^```\{", re.M)

pytestmark = [
    pytest.mark.colab,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment: run `make test-colab`"),
]


def installed() -> dict[str, str]:
    listed = subprocess.run(
        [PYTHON, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    return {package["name"]: package["version"] for package in json.loads(listed.stdout)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A repository of one commit that holds the working tree."""
    folder = tmp_path_factory.mktemp("origin")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    branch = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["branch"]
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q", "-b", branch], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def run_notebook(page: str, folder: Path, origin: Path) -> dict:
    """Executes a copy of the notebook in an empty folder and returns it with its outputs."""
    content, home, stand_in = folder / "content", folder / "home", folder / "stand-in"
    startup = home / ".ipython" / "profile_default" / "startup"
    for made in (content, startup, stand_in / "google" / "colab"):
        made.mkdir(parents=True)
    (stand_in / "google" / "colab" / "__init__.py").touch()
    (startup / "colab.py").write_text("import google.colab\n")
    shutil.copy((ROOT / page).with_suffix(".ipynb"), content / "chapter.ipynb")
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
    kept = {n: v for n, v in os.environ.items() if n == "PATH" or n.startswith(("PIP_", "OMP_"))}
    environment = kept | {
        "HOME": str(home),
        "PYTHONPATH": str(stand_in),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }
    done = subprocess.run(
        [PYTHON.with_name("jupyter-execute"), "chapter.ipynb", "--output=done.ipynb"],
        cwd=content, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (content / url.rsplit("/", 1)[-1] / "lib").is_dir()
    shutil.rmtree(home)
    EXECUTED.mkdir(exist_ok=True)
    executed = EXECUTED / f"{Path(page).name}.ipynb"
    shutil.copy(content / "done.ipynb", executed)
    return json.loads(executed.read_text("utf-8"))


def shown(cell: dict) -> str:
    """Returns the text of all that a cell displays."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {"text": output.get("text", "")})
        kinds = ("text/markdown", "text/html", "text/plain", "text")
        texts += ["".join(data[kind]) for kind in kinds if kind in data]
    return "\n".join(texts)


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_notebook_runs_on_a_bare_machine_and_shows_its_findings(page, tmp_path, origin):
    subprocess.run(
        [PYTHON, "-m", "pip", "uninstall", "-q", "-y", *BROUGHT], check=True, capture_output=True
    )
    before = installed()
    assert not {"myst-nb", "jupyter-book", "jupytext"} & before.keys()

    cells = run_notebook(page, tmp_path, origin)["cells"]

    assert {n: v for n, v in installed().items() if n not in BROUGHT} == before
    for cell in cells:
        text = shown(cell) if cell["cell_type"] == "code" else "".join(cell["source"])
        assert not RAW_ROLE.search(text), text[:500]
        assert "Warning" not in text, text[:500]
        if "notebook.show_" in "".join(cell["source"]):
            assert text or cell["outputs"]
            assert "is then shown there" not in text, text
    everything = "\n".join(shown(cell) for cell in cells)
    claim = page.rsplit("/", 1)[-1]
    if claim in CLAIMS:
        assert (
            f"<caption>All records of the claim “{claim.replace('-', ' ')}”</caption>" in everything
        )
        assert "<caption>The answer on " in everything
    elif claim == "depth-explorer":
        assert 'type="range"' in everything
    else:
        assert "<caption>This book beside full recompute and the fastest library" in everything
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    figures = sum("**Figure “" in "".join(cell["source"]) for cell in cells)
    assert len(pictures) >= figures
