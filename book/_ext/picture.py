"""Take the README's picture from the built book. Run by `make picture`, after `make book`."""

import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "_build" / "jupyter_execute" / "book" / "phase-transition.glue.json"
FIGURE = "main"
PICTURE = ROOT / "book" / "_static" / "main-result.png"


def figure_png(glued: Path, name: str) -> bytes:
    """Return a figure that a chapter glued, from the file of what it glued.

    Raises:
        FileNotFoundError: the chapter is not built, or glued no such figure.
    """
    if not glued.is_file():
        raise FileNotFoundError(f"No {glued.name} in the build. Run `make book` first.")
    data = json.loads(glued.read_text(encoding="utf-8")).get(name, {}).get("data", {})
    if "image/png" not in data:
        raise FileNotFoundError(f"{glued.name} has no picture of {name}.")
    return base64.b64decode(data["image/png"])


def main() -> None:
    """Write the picture."""
    try:
        PICTURE.write_bytes(figure_png(CHAPTER, FIGURE))
    except FileNotFoundError as problem:
        sys.exit(str(problem))
    print(f"The picture is at {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
