"""Matplotlib's own folder, inside the build, with the list of fonts made before any chapter runs.

Where the home cannot be written, Matplotlib says so on stderr as it is imported, and on a slow
machine it says too that it lists the fonts. Either would fail the chapter that imports it. A
`matplotlibrc` in the home, which would change the figures, is not read either.
"""

import os
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path("_build", "matplotlib")


def prepare_matplotlib(app: Sphinx) -> None:
    """Names the folder to the chapters' kernels, unless one was named, and lists the fonts."""
    folder = Path(app.srcdir, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MPLCONFIGDIR", str(folder))
    import matplotlib.font_manager  # noqa: F401 (importing it lists the fonts, once a folder)


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("builder-inited", prepare_matplotlib)
