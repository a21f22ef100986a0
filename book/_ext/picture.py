"""Takes the README's picture from the built book. Run by `make picture`, after `make book`."""

import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "_build" / "jupyter_execute" / "book" / "phase-transition.ipynb"
FIGURE = "fig-graded"
PICTURE = ROOT / "book" / "_static" / "main-result.png"


def figure_png(executed: Path, name: str) -> bytes:
    """Returns a figure of an executed chapter as the reader of the book sees it.

    Raises:
        FileNotFoundError: if the chapter is not built, or has no such figure with a picture.
    """
    if not executed.is_file():
        raise FileNotFoundError(f"No {executed.name} in the build. Run `make book` first.")
    for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]:
        figure = cell["metadata"].get("mystnb", {}).get("figure", {})
        for output in cell.get("outputs", []) if figure.get("name") == name else []:
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output["data"]["image/png"])
    raise FileNotFoundError(f"{executed.name} has no picture of {name}.")


def main() -> None:
    """Writes the picture."""
    try:
        PICTURE.write_bytes(figure_png(CHAPTER, FIGURE))
    except FileNotFoundError as problem:
        sys.exit(str(problem))
    print(f"The picture is at {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
