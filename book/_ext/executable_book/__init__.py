"""Sphinx extension: what makes this book's build honest about the code that it runs.

- `freshness`: a chapter is executed again when a module that it imports, its data, the environment
  or what an earlier chapter hands on changes, and a build that warned or failed does so again until
  mended.
- `progress`: shows at the terminal how far the chapters' loops have come.
- `results`: collects the chapters' records into `_build/results/results.json`.
- `run_facts`: what the build rested on, in `_build/results/run.json` and on a page.
- `scorecard`: the answer at a glance on the landing page.
- `front_page`: what holds in a sentence a claim, and the picture of all models.
- `first_registration`: the first registration's criteria and verdicts, and why they left.
- `chapter_figure`: a chapter's figure on another page.
- `comparison`: the models' runs side by side.
- `mathjax`: puts MathJax into the book, so that pages need no network.
- `plotting`: gives Matplotlib a folder that it can write, for it complains where a home is not.
- `metadata`: previews, citation tags and the page for what is not found.
- `theme`: mends what the theme gets wrong on the pages.
"""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # lib, which the chapters import too

from executable_book import (
    chapter_figure,
    comparison,
    first_registration,
    freshness,
    front_page,
    mathjax,
    metadata,
    plotting,
    progress,
    results,
    run_facts,
    scorecard,
    theme,
)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts to the build. Reading runs in one process, in the order of the book."""
    for part in (
        *(mathjax, plotting, progress, results, freshness),
        *(run_facts, scorecard, front_page, comparison, first_registration, chapter_figure),
        *(metadata, theme),
    ):
        part.setup(app)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
