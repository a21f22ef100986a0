"""The store gives back what an extraction would compute, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from lib import store
from lib.extraction import Residuals, extract_residuals
from lib.models import Decoder, load_decoder
from lib.store import fingerprint, recall_residuals

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 4], [8, 9, 1]]


@pytest.fixture
def decoder() -> Decoder:
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[list[int]]]:
    """An empty store, and the prompts of each extraction that was not saved."""
    calls: list[list[list[int]]] = []

    def watched(decoder: Decoder, prompts: list[list[int]], **options: object) -> Residuals:
        calls.append([list(prompt) for prompt in prompts])
        return extract_residuals(decoder, prompts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "STORE", tmp_path / "states")
    monkeypatch.setattr(store, "extract_residuals", watched)
    return calls


def files() -> list[Path]:
    return sorted(store.STORE.rglob("*.safetensors"))


def test_what_is_recalled_is_what_was_extracted(
    decoder: Decoder, computed: list[list[list[int]]]
) -> None:
    fresh = extract_residuals(decoder, PROMPTS, logits=True)
    for _ in range(2):
        found = recall_residuals(decoder, PROMPTS, logits=True)
        assert torch.equal(found.states, fresh.states)
        assert found.logits is not None and fresh.logits is not None
        assert torch.allclose(found.logits, fresh.logits, atol=1e-5)
        assert found.blocks == fresh.blocks
    assert len(computed) == 1


def test_only_prompts_that_are_new_are_computed(
    decoder: Decoder, computed: list[list[list[int]]]
) -> None:
    recall_residuals(decoder, PROMPTS[:2])
    found = recall_residuals(decoder, [PROMPTS[3], PROMPTS[1], PROMPTS[2], PROMPTS[3]])
    assert computed[1:] == [[PROMPTS[3], PROMPTS[2], PROMPTS[3]]]
    expected = extract_residuals(decoder, [PROMPTS[3], PROMPTS[1], PROMPTS[2], PROMPTS[3]])
    assert torch.allclose(found.states, expected.states, atol=1e-5)


def test_positions_are_kept_apart(decoder: Decoder) -> None:
    for positions in ([1, 1, 1, 1], [2, 2, 2, 2]):
        found = recall_residuals(decoder, PROMPTS, positions=positions)
        assert torch.equal(
            found.states, extract_residuals(decoder, PROMPTS, positions=positions).states
        )


def test_the_last_position_has_one_name(decoder: Decoder, computed: list[list[list[int]]]) -> None:
    recall_residuals(decoder, PROMPTS)
    recall_residuals(decoder, PROMPTS, positions=[2, 3, 3, -1])
    assert len(computed) == 1


def change_a_weight(decoder: Decoder) -> Decoder:
    with torch.no_grad():
        weight = next(decoder.blocks[1].parameters())
        weight.view(-1)[7] += 0.5
    return decoder


def another_seed(decoder: Decoder) -> Decoder:
    return load_decoder(decoder.model, tokenizer=decoder.tokenizer, untrained=True)


def half_precision(decoder: Decoder) -> Decoder:
    decoder.model.to(torch.bfloat16)  # type: ignore[call-arg]
    return decoder


@pytest.mark.parametrize("change", [change_a_weight, another_seed, half_precision])
def test_other_weights_are_not_mistaken_for_these(
    decoder: Decoder, change: Callable[[Decoder], Decoder]
) -> None:
    before = fingerprint(decoder)
    recall_residuals(decoder, PROMPTS)
    changed = change(decoder)
    assert fingerprint(changed) != before
    found = recall_residuals(changed, PROMPTS)
    assert torch.equal(found.states, extract_residuals(changed, PROMPTS).states)


def test_other_code_is_not_trusted(
    decoder: Decoder, computed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recall_residuals(decoder, PROMPTS)
    monkeypatch.setattr(store, "_code", lambda _threads: "edited")
    recall_residuals(decoder, PROMPTS)
    assert len(computed) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"states": torch.zeros(2, 2, 2)}, path)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, foreign])
def test_a_damaged_file_is_noticed_and_made_anew(
    decoder: Decoder, computed: list[list[list[int]]], damage: Callable[[Path], None]
) -> None:
    expected = recall_residuals(decoder, PROMPTS).states
    damage(files()[0])
    assert torch.equal(recall_residuals(decoder, PROMPTS).states, expected)
    assert len(computed) == 2
    assert torch.equal(recall_residuals(decoder, PROMPTS).states, expected)
    assert len(computed) == 2


def test_a_full_disk_costs_time_and_nothing_else(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: object, path: str, **_options: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    found = recall_residuals(decoder, PROMPTS)
    assert torch.equal(found.states, extract_residuals(decoder, PROMPTS).states)
    assert [path for path in store.STORE.rglob("*") if path.is_file()] == []


def test_few_models_are_kept(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_FOLDERS", 2)
    for number in range(4):
        monkeypatch.setattr(store, "_code", lambda _threads, number=number: str(number))
        recall_residuals(decoder, PROMPTS)
    assert len(list(store.STORE.iterdir())) == 2
    assert len(files()) == 2


def test_logits_are_the_last_tokens_alone(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match='positions="last"'):
        recall_residuals(decoder, PROMPTS, positions=[1, 1, 1, 1], logits=True)
