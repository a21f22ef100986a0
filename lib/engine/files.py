"""Where files lie, and files that are either whole or absent."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "lib" / "data"
BUILD = ROOT / "_build"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that no reader ever sees half of it, also after a crash.

    The text goes to a new file in the same folder, which then takes the place of the old one.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
