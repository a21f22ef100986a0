"""The store gives back what an extraction or a sweep would compute, and nothing else."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from lib.engine import keys, sources, store
from lib.engine.edits import Scale, add, exchange, exchange_norm
from lib.engine.extraction import Residuals, extract_residuals
from lib.engine.generation import steer
from lib.engine.models import Decoder, load_decoder
from lib.engine.readouts import DistributionMeasure
from lib.engine.replay import Forest
from lib.engine.sites import ATTENTION
from lib.engine.store import fingerprint, recall_residuals, recall_sweep
from lib.engine.sweeps import Request, Sweep, sweep_blocks, sweep_together

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
    fresh = extract_residuals(decoder, PROMPTS)
    for _ in range(2):
        found = recall_residuals(decoder, PROMPTS)
        assert torch.equal(found.states, fresh.states)
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


def fresh_weights(decoder: Decoder) -> Decoder:
    return load_decoder(decoder.model, tokenizer=decoder.tokenizer, untrained=True)


def another_seed(decoder: Decoder) -> Decoder:
    recall_residuals(fresh_weights(decoder), PROMPTS)
    return load_decoder(decoder.model, tokenizer=decoder.tokenizer, untrained=True, seed=1)


def half_precision(decoder: Decoder) -> Decoder:
    decoder.model.to(torch.bfloat16)  # type: ignore[call-arg]
    return decoder


@pytest.mark.parametrize("change", [change_a_weight, fresh_weights, another_seed, half_precision])
def test_other_weights_are_not_mistaken_for_these(
    decoder: Decoder, change: Callable[[Decoder], Decoder]
) -> None:
    before = fingerprint(decoder)
    recall_residuals(decoder, PROMPTS)
    changed = change(decoder)
    assert fingerprint(changed) != before
    found = recall_residuals(changed, PROMPTS)
    assert torch.equal(found.states, extract_residuals(changed, PROMPTS).states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 4001])
def test_one_number_of_a_weight_is_enough_to_change_what_stands_for_it(
    dtype: torch.dtype, size: int
) -> None:
    weight = torch.randint(2, (size + 1,)).to(dtype)
    for whole in (weight[:size], weight[1:], weight.repeat(2, 1).T):
        before = store._total(whole)
        assert store._total(whole.clone()) == before
        for place in {0, len(whole) // 2, len(whole) - 1}:
            changed = whole.clone()
            changed[place] = torch.where(changed[place] == 0, 1, 0).to(dtype)
            assert store._total(changed) != before


def zero_through_data(decoder: Decoder) -> None:
    """The usual way to take a matrix out, which torch does not count as a change."""
    decoder.model.model.layers[1].mlp.down_proj.weight.data.zero_()


def one_head_through_data(decoder: Decoder) -> None:
    decoder.model.model.layers[1].self_attn.o_proj.weight.data[:, 8:16] = 0


def hooked(decoder: Decoder) -> None:
    decoder.blocks[1].mlp.register_forward_hook(lambda _module, _inputs, output: 2 * output)


class Switched(torch.nn.Linear):
    """As an adapter that lies in a layer and can be switched off."""

    on = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) * (3 if self.on else 1)


def switched_on(decoder: Decoder) -> None:
    Switched.on = True


@pytest.mark.parametrize("change", [zero_through_data, one_head_through_data, hooked, switched_on])
def test_a_model_that_was_changed_is_not_mistaken_for_what_it_was(
    change: Callable[[Decoder], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not for what it becomes again: what was measured of a steered model is not kept."""
    monkeypatch.setattr(Switched, "on", False)
    model = tiny_model("llama")
    layer = model.model.layers[2].mlp.up_proj
    if change is switched_on:
        model.model.layers[2].mlp.up_proj = Switched(32, layer.out_features, bias=False)
    decoder = load_decoder(model, tokenizer=tiny_tokenizer())
    before = recall_residuals(decoder, PROMPTS).states
    sweep_before = recall_sweep(decoder, **call())
    change(decoder)
    found, sweep = recall_residuals(decoder, PROMPTS).states, recall_sweep(decoder, **call())
    assert torch.equal(found, extract_residuals(decoder, PROMPTS).states)
    assert not torch.allclose(found, before, atol=1e-2)
    assert same(sweep, sweep_blocks(decoder, **call())) and not same(sweep, sweep_before)


def test_what_a_steered_model_says_is_not_kept_as_the_models(decoder: Decoder) -> None:
    prompts = [prompt[:3] for prompt in PROMPTS]
    with steer(decoder, 0, add, torch.ones(32) * 5, positions=[1] * 4):
        recall_residuals(decoder, prompts)
    found = recall_residuals(decoder, prompts).states
    assert torch.equal(found, extract_residuals(decoder, prompts).states)


def test_forests_are_not_used_after_a_change_that_torch_does_not_count(decoder: Decoder) -> None:
    forests: list[Forest] = []
    arguments: dict[str, Any] = {"positions": [1, 2, 2, 1], "forests": forests}
    pairs = np.array([[0, 3]])
    sweep_blocks(decoder, PROMPTS, pairs, {"exchange": exchange}, **arguments)
    zero_through_data(decoder)
    with pytest.raises(ValueError, match="weights"):
        sweep_blocks(decoder, PROMPTS, pairs, {"exchange": exchange}, **arguments)


def test_other_code_is_not_trusted(
    decoder: Decoder, computed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recall_residuals(decoder, PROMPTS)
    monkeypatch.setattr(store, "_code", lambda *_: "edited")
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


def test_a_file_is_checked_once_and_again_when_it_has_changed(
    decoder: Decoder, computed: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, n_digests = store._digest, 0

    def counted(*given: Any) -> str:
        nonlocal n_digests
        n_digests += 1
        return digest(*given)

    expected = recall_residuals(decoder, PROMPTS).states
    monkeypatch.setattr(store, "_digest", counted)
    for _ in range(3):
        assert torch.equal(recall_residuals(decoder, PROMPTS).states, expected)
    assert n_digests == 1
    flip_a_bit(files()[0])
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
        monkeypatch.setattr(store, "_code", lambda *_, number=number: str(number))
        recall_residuals(decoder, PROMPTS)
    assert len(list(store.STORE.iterdir())) == 2
    assert len(files()) == 2


def test_states_sweeps_and_sites_of_two_models_and_their_twins_are_kept() -> None:
    networks, kinds = 2 * (1 + 5), 3
    for number in range(networks * kinds):
        path = store.STORE / str(number) / "states.safetensors"
        store._write(path, {"states": torch.zeros(1)}, {})
    assert len(files()) == networks * kinds


# Sweeps


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each sweep that was measured."""
    calls: list[int] = []

    def watched(*args: Any, **options: Any) -> Sweep:
        calls.append(1)
        return sweep_blocks(*args, **options)

    monkeypatch.setattr(store, "sweep_blocks", watched)
    return calls


DONORS = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))
CLEAN = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))


def call(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a sweep, all but the model."""
    return {
        "prompts": PROMPTS,
        "pairs": np.array([[0, 1], [3, 2]]),
        "edits": {"exchange": exchange, "half": Scale(0.5)},
        "positions": [1, 2, 3, 1],
        "donors": DONORS,
        "blocks": [0, 2],
        "read_ids": [5, 6, 7],
        "measure": DistributionMeasure(CLEAN, [0, 3]),
        **changes,
    }


def same(one: Sweep, other: Sweep) -> bool:
    return (
        (one.edits, one.blocks, one.path) == (other.edits, other.blocks, other.path)
        and one.to_frame().equals(other.to_frame())
        and list(one.measures) == list(other.measures)
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            and getattr(one, name).dtype == getattr(other, name).dtype
            for name in ("pairs", "logits", "clean_logits")
        )
    )


@pytest.mark.parametrize("changes", [{}, {"measure": None}, {"read_ids": []}, {"donors": None}])
def test_a_recalled_sweep_is_the_measured_one_to_the_last_bit(
    decoder: Decoder, swept: list[int], changes: dict[str, Any]
) -> None:
    fresh = sweep_blocks(decoder, **call(**changes))
    for _ in range(3):
        assert same(recall_sweep(decoder, **call(**changes)), fresh)
    assert len(swept) == 1


def test_requests_are_kept_each_by_itself_and_only_the_missing_ones_are_measured(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    run = store.sweep_together

    def counted(decoder: Decoder, requests: Any, *given: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return run(decoder, requests, *given, **options) if requests else []

    monkeypatch.setattr(store, "sweep_together", counted)
    one, two = (
        Request(PROMPTS, np.array([pair]), "last", read_ids=[5]) for pair in ([0, 1], [3, 2])
    )
    edits = {"exchange": exchange}
    first = store.recall_sweeps(decoder, {"one": one}, edits, blocks=[1])
    both = store.recall_sweeps(decoder, {"two": two, "one": one}, edits, blocks=[1])
    again = store.recall_sweeps(decoder, {"one": one, "two": two}, edits, blocks=[1])
    assert asked == [1, 1, 0] and list(both) == ["two", "one"]
    assert same(both["one"], first["one"]) and same(again["two"], both["two"])
    other = store.recall_sweeps(decoder, {"one": one}, edits, blocks=[2])
    assert asked[-1] == 1 and not same(other["one"], first["one"])
    halved = store.recall_sweeps(decoder, {"one": one}, {"half": Scale(0.5)}, blocks=[1])
    assert asked[-1] == 1 and halved["one"].edits == ("half",)


REQUEST = Request(PROMPTS, np.array([[0, 1]]), "last", read_ids=[5])


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [*PROMPTS[:3], [8, 9, 2]]},
        {"pairs": np.array([[1, 0]])},
        {"positions": [1, 1, 1, 1]},
        {"donors": torch.zeros(4, 2, 32)},
        {"read_ids": [6]},
        {"measure": DistributionMeasure(CLEAN, [0, 3])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_request_of_other_arguments_is_measured(
    decoder: Decoder, changes: dict[str, Any]
) -> None:
    edits, other = {"exchange": exchange}, replace(REQUEST, **changes)
    store.recall_sweeps(decoder, {"one": REQUEST}, edits)
    (fresh,) = sweep_together(decoder, [other], edits)
    assert same(store.recall_sweeps(decoder, {"one": other}, edits)["one"], fresh)
    assert len(files()) == 2


def test_what_several_calls_computed_is_all_kept(
    decoder: Decoder, computed: list[list[list[int]]]
) -> None:
    for prompts in (PROMPTS[:2], PROMPTS[2:], PROMPTS):
        recall_residuals(decoder, prompts)
    assert computed == [PROMPTS[:2], PROMPTS[2:]]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, foreign])
def test_a_damaged_file_costs_the_others_nothing(
    decoder: Decoder, computed: list[list[list[int]]], damage: Callable[[Path], None]
) -> None:
    """Whichever comes first among the files: of four, each but the last has one after it."""
    for prompt in PROMPTS:
        recall_residuals(decoder, [prompt])
    for path in files()[:2]:
        damage(path)
    recall_residuals(decoder, PROMPTS)
    assert [len(prompts) for prompts in computed] == [1, 1, 1, 1, 2]


def test_runs_that_others_can_begin_from_are_handed_on(decoder: Decoder) -> None:
    """What is computed takes the forests that are given, and leaves those that it ran."""
    forests: list[Forest] = []
    recall_residuals(decoder, PROMPTS, forests=forests)
    ran = len(forests)
    assert ran > 0
    store.recall_sweeps(decoder, {"one": REQUEST}, {"exchange": exchange}, forests=forests)
    assert len(forests) == ran
    others: list[Forest] = []
    store.recall_sweeps(decoder, {"one": REQUEST}, {"half": Scale(0.5)}, forests=others)
    assert len(others) > 0


def test_everything_is_kept_under_the_code_of_the_module_that_computes_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(store, "_code", lambda module, _n: asked.append(module) or module)
    pairs, request = np.array([[0, 1]]), Request(PROMPTS, np.array([[0, 1]]), "last")
    recall_residuals(decoder, PROMPTS)
    recall_sweep(decoder, PROMPTS, pairs, {"exchange": exchange}, positions="last")
    store.recall_sweeps(decoder, {"one": request}, {"exchange": exchange})
    recall_sweep(decoder, PROMPTS, pairs, {"attention": ATTENTION})
    assert asked == ["extraction", "sweeps", "sweeps", "sites"]


def another_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1).view(torch.int32)[5] ^= 1
    return changed


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [*PROMPTS[:3], [8, 9, 2]]},
        {"pairs": np.array([[0, 1], [3, 1]])},
        {"edits": {"exchange": exchange, "half": Scale(0.25)}},
        {"edits": {"exchange": exchange_norm, "half": Scale(0.5)}},
        {"edits": {"half": Scale(0.5), "exchange": exchange}},
        {"positions": [1, 2, 2, 2]},
        {"donors": another_bit(DONORS)},
        {"blocks": [1, 2]},
        {"read_ids": [5, 6, 8]},
        {"measure": DistributionMeasure(another_bit(CLEAN), [0, 3])},
        {"measure": DistributionMeasure(CLEAN, [0, 2])},
        {"measure": DistributionMeasure(CLEAN, [0, 3], temperature=True)},
        {"measure": None},
    ],
)
def test_a_sweep_of_other_arguments_is_measured(
    decoder: Decoder, swept: list[int], changes: dict[str, Any]
) -> None:
    recall_sweep(decoder, **call())
    assert same(recall_sweep(decoder, **call(**changes)), sweep_blocks(decoder, **call(**changes)))
    assert len(swept) == 2


@pytest.mark.parametrize("change", [change_a_weight, fresh_weights, half_precision])
def test_a_sweep_of_other_weights_is_measured(
    decoder: Decoder, swept: list[int], change: Callable[[Decoder], Decoder]
) -> None:
    recall_sweep(decoder, **call())
    changed = change(decoder)
    assert same(recall_sweep(changed, **call()), sweep_blocks(changed, **call()))
    assert len(swept) == 2


def test_a_sweep_of_other_code_is_measured(
    decoder: Decoder, swept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recall_sweep(decoder, **call())
    monkeypatch.setattr(store, "_code", lambda *_: "edited")
    recall_sweep(decoder, **call())
    assert len(swept) == 2


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of lib, whose files the keys then speak of."""
    shutil.copytree(sources.ROOT / "lib", tmp_path / "lib")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(store, "__file__", str(tmp_path / "lib" / "engine" / "store.py"))
    return tmp_path / "lib"


def stale_after(path: Path) -> list[str]:
    """Return which of a state's and a sweep's key a changed file changes."""
    found = []
    before = {module: store._code.__wrapped__(module, 1) for module in ("extraction", "sweeps")}
    text = path.read_text()
    path.write_text(text + "# changed\n")
    for module, key in before.items():
        if store._code.__wrapped__(module, 1) != key:
            found.append(module)
    path.write_text(text)
    return found


COMPUTE_STATES = [
    "batches", "catalogue", "extraction", "loading", "memory", "models", "passes", "progress",
    "replay", "store", "structure", "weights",
]  # fmt: skip
COMPUTE_SWEEPS = ["edits", "sweeps"]


@pytest.mark.parametrize("name", COMPUTE_STATES)
def test_a_changed_module_that_computes_states_makes_them_stale(copied: Path, name: str) -> None:
    assert stale_after(copied / "engine" / f"{name}.py") == ["extraction", "sweeps"]


@pytest.mark.parametrize("name", COMPUTE_SWEEPS)
def test_a_changed_module_that_computes_sweeps_makes_them_stale(copied: Path, name: str) -> None:
    assert stale_after(copied / "engine" / f"{name}.py") == ["sweeps"]


def test_what_computes_neither_makes_nothing_stale(copied: Path) -> None:
    named = {copied / "engine" / f"{name}.py" for name in COMPUTE_STATES + COMPUTE_SWEEPS}
    (copied / "claims").mkdir(exist_ok=True)
    (copied / "claims" / "a_claim.py").write_text('"""A claim."""\n')
    others = set(copied.rglob("*.py")) - named
    assert copied / "reading" / "figures.py" in others
    assert copied / "claims" / "a_claim.py" in others
    assert copied / "__init__.py" in others
    assert not [path.name for path in others if stale_after(path)]


def test_the_code_of_an_edit_or_measure_is_part_of_a_sweeps_key(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in ((Scale, "edits"), (DistributionMeasure, "readouts")):
        path = copied / "engine" / f"{name}.py"
        monkeypatch.setattr(sys.modules[kind.__module__], "__file__", str(path))
        before = keys._class_key.__wrapped__(kind)
        path.write_text(path.read_text() + "# changed\n")
        assert keys._class_key.__wrapped__(kind) != before


def test_how_a_sweep_is_announced_or_where_it_begins_makes_no_difference(
    decoder: Decoder, swept: list[int]
) -> None:
    recall_sweep(decoder, **call(), description="one")
    recall_sweep(decoder, **call(), description="other", forests=[])
    assert len(swept) == 1


def test_an_edit_that_cannot_be_told_apart_is_measured_every_time(
    decoder: Decoder, swept: list[int]
) -> None:
    for factor in (2.0, 3.0):
        edits = {"mine": lambda state, _donor, factor=factor: state * factor}
        found = recall_sweep(decoder, **call(edits=edits))
        assert same(found, sweep_blocks(decoder, **call(edits={"mine": Scale(factor)})))
    assert len(swept) == 2
    assert files() == []


def spoil_the_heading(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"prefix replay") == 1
    path.write_bytes(content.replace(b"prefix replay", b"prefix_replay"))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, foreign, spoil_the_heading])
def test_a_damaged_sweep_is_noticed_and_made_anew(
    decoder: Decoder, swept: list[int], damage: Callable[[Path], None]
) -> None:
    expected = recall_sweep(decoder, **call())
    damage(files()[0])
    for _ in range(2):
        assert same(recall_sweep(decoder, **call()), expected)
        assert len(swept) == 2


def test_another_sweeps_file_is_not_taken_for_this_one(decoder: Decoder, swept: list[int]) -> None:
    recall_sweep(decoder, **call())
    (first,) = files()
    expected = recall_sweep(decoder, **call(edits={"kept": Scale(1.0)}))
    (second,) = set(files()) - {first}
    shutil.copy(first, second)
    assert same(recall_sweep(decoder, **call(edits={"kept": Scale(1.0)})), expected)
    assert len(swept) == 3


def full_disk(_tensors: object, path: str, **_options: object) -> None:
    Path(path).write_bytes(b"half a file")
    raise OSError(28, "No space left on device")


def test_a_sweep_is_returned_where_nothing_can_be_kept(
    decoder: Decoder, swept: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = sweep_blocks(decoder, **call())
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full_disk)
        assert same(recall_sweep(decoder, **call()), expected)
    assert [path for path in store.STORE.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setattr(store, "STORE", tmp_path / "file" / "states")
    assert same(recall_sweep(decoder, **call()), expected)
    assert len(swept) == 2


def test_what_is_kept_serves_where_the_store_may_only_be_read(
    decoder: Decoder,
    swept: list[int],
    computed: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(*_given: object, **_options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    expected = recall_sweep(decoder, **call()), recall_residuals(decoder, PROMPTS).states
    monkeypatch.setattr(store.os, "utime", denied)
    assert same(recall_sweep(decoder, **call()), expected[0])
    assert torch.equal(recall_residuals(decoder, PROMPTS).states, expected[1])
    assert len(swept) == len(computed) == 1


class InterruptedRunError(Exception):
    pass


def passes(model: Decoder, sweeps: list[dict[str, Any]], stop_after: int = 10**9) -> int:
    """Return the passes through the last block that some sweeps take; stop them after so many."""
    count, run = 0, model.blocks[-1].forward

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        if count == stop_after:
            raise InterruptedRunError
        count += 1
        return run(*given, **named)

    model.blocks[-1].forward = counted  # a hook would keep anything from being stored
    try:
        for sweep in sweeps:
            recall_sweep(model, **sweep)
    except InterruptedRunError:
        pass
    finally:
        model.blocks[-1].forward = run
    return count


def test_an_interrupted_run_goes_on_at_the_sweep_that_it_had_reached(tmp_path: Path) -> None:
    def fresh() -> Decoder:  # as a new process has it
        made = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
        sweep_blocks(made, **call())  # its self-check, which each process makes anew
        return made

    sweeps = [call(edits={"edit": edit}, measure=None) for edit in (exchange, Scale(1.0), add)]
    each = [passes(fresh(), [sweep]) for sweep in sweeps]
    assert min(each) > 1
    shutil.rmtree(store.STORE)
    assert passes(fresh(), sweeps, stop_after=each[0] + 1) == each[0] + 1
    assert passes(fresh(), sweeps) == each[1] + each[2]
    assert passes(fresh(), sweeps) == 0
