"""MathJax from an installed package, so that formulas are set without a network."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "tex-svg-full.js"  # all of TeX's extensions and glyphs in one file: it loads no other


def add_script(app: Sphinx, config: Config) -> None:
    """Copies MathJax to where Sphinx takes static files from and names it in the configuration."""
    source = distribution(PACKAGE).locate_file(f"{PACKAGE}/static/mathjax/{SCRIPT}")
    folder = Path(app.outdir).parent / "mathjax"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(source), folder / SCRIPT)
    config.html_static_path = [*config.html_static_path, str(folder)]
    config.mathjax_path = SCRIPT


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("config-inited", add_script)
