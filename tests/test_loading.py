"""Loading: on one device or several, in any dtype; what cannot be loaded is refused in one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from tiny import tiny_config
from transformers import BitsAndBytesConfig

from lib.engine import catalogue, loading, memory
from lib.engine.catalogue import preset
from lib.engine.edits import exchange
from lib.engine.extraction import extract_residuals, logit_lens
from lib.engine.memory import weight_bytes
from lib.engine.models import Decoder, load_decoder
from lib.engine.store import fingerprint
from lib.engine.sweeps import Sweep, sweep_blocks
from lib.engine.vectors import unembedding_direction

PROMPTS = [[5, 9, 4, 33, 12, 8], [8, 3, 17, 20, 6, 44], [11, 30, 22, 7]]
PAIRS = np.array([[0, 1], [1, 2], [2, 0]])
PAPER = ("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3", "Qwen/Qwen2.5-7B")


def saved(folder: Path, architecture: str = "llama") -> Path:
    tiny_model(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def swept(decoder: Decoder, positions: Any) -> Sweep:
    return sweep_blocks(
        decoder, PROMPTS, PAIRS, {"exchange": exchange}, positions=positions, read_ids=range(64)
    )


def on_disk(folder: Path) -> Decoder:
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{block}": "cpu" if block < 2 else "disk" for block in range(4)}
    return load_decoder(saved(folder), device_map={**places, "lm_head": "disk"})


def on_cpu(folder: Path) -> Decoder:
    model = accelerate.cpu_offload(tiny_model("llama"), torch.device("cpu"))
    return load_decoder(model, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("offload", [on_disk, on_cpu])
def test_offloaded_model_gives_what_the_whole_model_gives(
    offload: Callable[[Path], Decoder], tmp_path: Path, llama: Decoder
) -> None:
    split = offload(tmp_path)
    assert split.blocks[3].mlp.up_proj.weight.is_meta  # type: ignore[union-attr]
    assert split.unembedding.weight.is_meta
    here, there = (extract_residuals(d, PROMPTS, logits=True) for d in (llama, split))
    assert torch.allclose(here.states, there.states, atol=1e-5)
    assert here.logits is not None and there.logits is not None
    assert torch.allclose(here.logits, there.logits, atol=1e-5)
    lens = [logit_lens(d, here.states[2], [7, 50]) for d in (llama, split)]
    assert torch.allclose(*lens, atol=1e-5)
    directions = [
        unembedding_direction(d, here.states[2], [7] * 3, [9] * 3) for d in (llama, split)
    ]
    assert torch.allclose(*directions, atol=1e-5)
    for positions in ("last", [2, 3, 1]):
        whole, parts = swept(llama, positions), swept(split, positions)
        assert parts.path == "prefix replay"
        assert np.abs(whole.logits - parts.logits).max() < 1e-4
    assert fingerprint(split) is None  # not stored: its weights are not at hand


def test_spreading_by_itself_takes_what_there_is(tmp_path: Path, llama: Decoder) -> None:
    split = load_decoder(saved(tmp_path), device_map="auto")
    assert np.abs(swept(llama, "last").logits - swept(split, "last").logits).max() < 1e-4


def test_dtype_is_that_of_the_residual_stream(tmp_path: Path, llama: Decoder) -> None:
    half = load_decoder(saved(tmp_path), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    residuals = extract_residuals(half, PROMPTS, logits=True)
    assert residuals.states.dtype == torch.float32
    expected = extract_residuals(llama, PROMPTS).states
    assert (residuals.states - expected).abs().max() < 0.1 * expected.abs().max()
    assert swept(half, "last").path == "prefix replay"


def test_the_papers_models_are_pinned_and_loaded_in_half_precision() -> None:
    for name in PAPER:
        assert len(preset(name)["revision"]) == 40
        assert preset(name)["dtype"] == "bfloat16"
    assert preset("nobody/no-such-model") == {}


def test_what_a_call_says_goes_before_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = saved(tmp_path / "model"), tmp_path / "models.toml"
    file.write_text(f'[options."{folder}"]\ndtype = "bfloat16"\n')
    monkeypatch.setattr(catalogue, "CATALOGUE", file)
    assert load_decoder(folder).dtype == torch.bfloat16
    assert load_decoder(folder, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_parameters_are_counted_without_loading_them(architecture: str) -> None:
    config = tiny_config(architecture)
    expected = sum(parameter.numel() for parameter in tiny_model(architecture).parameters())
    assert weight_bytes(config, torch.bfloat16) == 2 * expected
    assert weight_bytes(config, torch.bfloat16, 4) == expected // 2


def refusal(*given: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as problem:
        load_decoder(*given, **options)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_model_that_does_not_fit_is_refused_with_the_sizes_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "big")
    monkeypatch.setattr(loading, "free_memory", lambda: {"cpu": 50_000})
    monkeypatch.setattr(loading, "_read_weights", None)
    n_bytes = 4 * sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    for options in ({}, {"device_map": "auto"}, {"untrained": True}):
        message = refusal(folder, **options)
        assert f"needs {n_bytes / 1e9:.3g} GB, but 5e-05 GB are free" in message


FREED = """
import torch
from lib.engine.models import load_decoder

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

load_decoder({folder!r}, untrained=True)
before = held()
large, small = [], []
for _ in range(100):
    large.append(torch.ones(500_000))
    small.append(torch.ones(50))
grown = held()
del large
freed = held()
load_decoder({folder!r}, untrained=True)
print(grown - before, freed - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_was_freed_is_handed_back_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    """As in the build, where the C library keeps what is freed for the next tensors."""
    kept = {f"MALLOC_{name}_THRESHOLD_": "1000000000" for name in ("MMAP", "TRIM")}
    ran = subprocess.run(
        [sys.executable, "-c", FREED.format(folder=str(saved(tmp_path)))],
        env={**os.environ, **kept},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, freed, after = map(int, ran.stdout.split()[-3:])
    assert min(grown, freed) > 190_000  # kilobytes: nothing is handed back by itself
    assert after < 20_000


@pytest.mark.parametrize(
    ("limit", "held", "of", "unlimited"),
    [
        ("memory.max", "memory.current", "", "max"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", str(2**63 - 4096)),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_memory_within_the_containers_limit(
    limit: str, held: str, of: str, unlimited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files kept in memory, which the system drops when memory is wanted, count as free."""
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    everything = memory.free_memory()["cpu"]
    (folder := tmp_path / "memory" if of else tmp_path).mkdir(exist_ok=True)
    own = "cache 20\ninactive_file 7\nactive_file 9\n" if of else "anon 900\n"  # its groups' apart
    shares = f"{own}{of}cache 1100\n{of}inactive_file 600\n{of}active_file 400\n"
    (folder / limit).write_text("5000\n")
    (folder / held).write_text("2000\n")
    (folder / "memory.stat").write_text(shares)
    assert memory.free_memory()["cpu"] == 4000 < everything
    (folder / limit).write_text(f"{unlimited}\n")
    assert memory.free_memory()["cpu"] > 4000


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("bitsandbytes", {"quantization": "8bit"}),
        ("accelerate", {"quantization": "4bit"}),
        ("accelerate", {"device_map": "auto"}),
        ("accelerate", {"quantization": BitsAndBytesConfig(load_in_8bit=True)}),
    ],
)
def test_missing_package_is_named(
    missing: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == missing else object())
    assert f"needs {missing}: pip install {missing}" in refusal(saved(tmp_path), **options)


def test_unknown_dtype_and_quantisation_are_refused(tmp_path: Path) -> None:
    assert "float32, bfloat16" in refusal(saved(tmp_path), dtype="int8")
    assert "float32, bfloat16" in refusal(tmp_path, dtype="half-precision")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_may_be_torchs_own(tmp_path: Path, dtype: Any) -> None:
    assert load_decoder(saved(tmp_path), dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_read_config", None)
    assert f"Device '{device}' cannot be used" in refusal("somebody/model", device=device)
    given = {"tokenizer": tiny_tokenizer(), "untrained": True, "device": device}
    assert "Take 'cpu', or one that torch finds here." in refusal(tiny_model("llama"), **given)


def test_unknown_quantisation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _name: object())
    assert "'4bit' or '8bit'" in refusal(saved(tmp_path), quantization="3bit")


@pytest.mark.parametrize(("status", "gated"), [(401, True), (403, True), (404, False)])
def test_gated_model_says_how_to_get_access(
    status: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HubError(OSError):
        response = SimpleNamespace(status_code=status)

    def refuse(*_given: Any, **_options: Any) -> None:
        try:
            raise HubError("Access to model is restricted.")
        except HubError as error:
            raise OSError("You are trying to access a gated repo.\nMore lines.") from error

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    message = refusal("somebody/gated")
    assert ("accept its licence at https://huggingface.co/somebody/gated" in message) == gated
    assert ("HF_TOKEN" in message) == gated


def test_revision_reaches_every_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[type, Any] = {}
    for part in (loading.AutoConfig, loading.AutoTokenizer, loading.AutoModelForCausalLM):
        real = part.from_pretrained

        def read(source: str, part: Any = part, real: Any = real, **options: Any) -> Any:
            asked.setdefault(part, options.pop("revision", None))  # later ones are its own calls
            return real(source, **{**options, "revision": None})

        monkeypatch.setattr(part, "from_pretrained", read)
    load_decoder(saved(tmp_path), revision="a1b2c3")
    assert list(asked.values()) == ["a1b2c3"] * 3


def test_tokenizer_of_a_larger_vocabulary_is_refused() -> None:
    words = [f"w{index}" for index in range(65)]
    message = refusal(tiny_model("llama"), tokenizer=tiny_tokenizer(words))
    assert "65 tokens" in message and "scores 64" in message


def test_tokenizer_without_padding_token_will_do(llama: Decoder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    decoder = load_decoder(tiny_model("llama"), tokenizer=tokenizer)
    assert np.abs(swept(decoder, "last").logits - swept(llama, "last").logits).max() < 1e-5


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([5] * 65, "65 tokens, but .* reads at most 64"), ([5, 64, 7], "token 64, but .* 0 to 63")],
)
def test_prompt_that_the_model_cannot_read_is_named(
    llama: Decoder, prompt: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=f"Prompt 1 .*{words}"):
        extract_residuals(llama, [[5, 6], prompt])
    with pytest.raises(ValueError, match=f"Prompt 1 .*{words}"):
        sweep_blocks(llama, [[5, 6], prompt], [[0, 1]], {"x": exchange}, positions="last")


def test_twins_share_their_models_tokenizer_until_its_files_change(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    trained = load_decoder(folder)
    assert load_decoder(folder, untrained=True).tokenizer is trained.tokenizer
    changed = tiny_tokenizer()
    changed.add_tokens(["novel"])
    changed.save_pretrained(folder)
    os.utime(folder / "tokenizer.json", ns=(1, 1))  # whatever the file system's clock makes of it
    assert len(load_decoder(folder).tokenizer) == len(trained.tokenizer) + 1


def test_notes_of_the_hub_and_of_transformers_are_held_back_and_come_again() -> None:
    """A note on a chapter's error stream, such as that no token was sent, would end a build."""
    loggers = [
        logging.getLogger(f"{name}.anything") for name in ("huggingface_hub", "transformers")
    ]
    before = [logger.isEnabledFor(logging.WARNING) for logger in loggers]
    with loading.quiet():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    assert [logger.isEnabledFor(logging.WARNING) for logger in loggers] == before == [True, True]
