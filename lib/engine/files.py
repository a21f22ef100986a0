"""Where files lie, and files that are either whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "lib" / "data"
BUILD = ROOT / "_build"


@contextmanager
def taking_the_place_of(path: Path) -> Iterator[Path]:
    """Yield a new file in the same folder, which takes the place of `path` if no error comes.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees half of it, also after a crash.

    Raises:
        OSError: as `taking_the_place_of`.
    """
    with taking_the_place_of(path) as new:
        with new.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(new, 0o644)
