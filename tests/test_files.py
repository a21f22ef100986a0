"""Files are whole or absent."""

import os
from pathlib import Path

import pytest

from lib.engine.files import write_atomically


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "results.json"
    write_atomically(file, "old")

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text(encoding="utf-8") == "old"


def test_a_write_makes_the_folder_and_replaces_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    for text in ("ä\n", "b\n"):
        write_atomically(file, text)
        assert file.read_bytes() == text.encode()
