"""Inside the switch: what is chosen and tested, on networks in which one planted head reads."""

from dataclasses import replace

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from tiny_tasks import tiny_task

from lib.claims import inside_the_switch as claim
from lib.claims.inside_the_switch import Halves, Opened
from lib.engine import replay, store
from lib.engine.batches import plant_prompts
from lib.engine.files import DATA
from lib.engine.models import load_decoder
from lib.engine.parts import find_parts
from lib.evidence.by_task import over_twins
from lib.evidence.criteria import judge
from lib.evidence.tasks import Pairs, build_task
from lib.evidence.transfer import Transfer, read_tasks
from lib.science.estimate import Untested, mean_over_units

SUBJECTS, ANSWERS = [f"s{i}" for i in range(24)], [f"a{i}" for i in range(6)]
WORDS = ["?", *SUBJECTS, *ANSWERS, *[f"t{i}" for i in range(6)]]
PLANTED = (1, 2)
N_HEADS = 4


def as_trial(decoder, name="tiny", n_subjects=24):
    task = tiny_task(decoder, name, SUBJECTS[:n_subjects], ANSWERS)
    return read_tasks(decoder, {name: task})[name]


@pytest.fixture(scope="module")
def planted():
    """A network in which one head alone carries anything from token to token."""
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(WORDS))
    for block, parts in enumerate(find_parts(decoder)):
        kept = torch.zeros(N_HEADS, 8, dtype=torch.bool)
        if block == PLANTED[0]:
            kept[PLANTED[1]] = True
        parts.projection.weight.data[:, ~kept.flatten()] = 0
    return as_trial(decoder)


@pytest.fixture(scope="module")
def trial():
    return as_trial(load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(WORDS)))


@pytest.fixture(scope="module")
def opened(planted):
    return claim.open_switch(planted, claim.halve(planted))


# --- halves ---------------------------------------------------------------------------------------


def test_no_subject_is_in_both_halves_and_pairs_stay_in_theirs(trial):
    halves = claim.halve(trial)
    members = [
        set(trial.task.unit[half.prompts].ravel()) for half in (halves.choosing, halves.testing)
    ]
    assert not members[0] & members[1]
    assert len(members[0]) >= 8 and len(members[1]) >= 8
    for half in (halves.choosing, halves.testing):
        recipient, donor = half.prompts.T
        answers = trial.task.answer_index
        assert (answers[recipient] != answers[donor]).all()
        assert (half.unit == trial.task.unit[recipient]).all()


def test_halves_depend_on_the_task_s_name_alone(trial):
    again = claim.halve(trial)
    other = claim.halve(as_trial(trial.decoder, "another"))
    assert np.array_equal(claim.halve(trial).testing.prompts, again.testing.prompts)
    assert not np.array_equal(other.testing.prompts, again.testing.prompts)


def test_thinning_keeps_every_subject_while_it_can():
    unit = np.repeat(np.arange(10), 5)
    pairs = Pairs(np.stack([np.arange(50), np.arange(50)], axis=1), unit)
    kept = claim.thin(pairs, 12)
    assert len(kept) == 12 and set(kept.unit) == set(range(10))
    assert len(set(claim.thin(pairs, 6).unit)) == 6
    assert len(claim.thin(pairs, 99)) == 50


def test_too_few_subjects_are_not_halved(trial):
    small = as_trial(trial.decoder, n_subjects=10)
    few = small.task.prompts["unit"] < 4
    object.__setattr__(small.task, "prompts", small.task.prompts[few].reset_index(drop=True))
    object.__setattr__(small.task, "subjects", small.task.subjects[:4])
    assert isinstance(claim.halve(small), Untested)
    assert claim.halve(Untested("no tokens")) == Untested("no tokens")


# --- what is chosen and tested --------------------------------------------------------------------


def test_the_planted_head_is_found_and_carries_everything(opened):
    assert opened.block == PLANTED[0]
    assert opened.best(1) == [PLANTED]
    assert opened.heads[PLANTED] == pytest.approx(1, abs=1e-6)
    tested = claim.transfer_on_testing_half(opened, [PLANTED, (0, 0), (2, 3)])
    for name in ("attention", "best 1", "best 3", "elsewhere"):
        assert float(tested[name]) == pytest.approx(1, abs=1e-6)
    assert float(tested["random 3"]) == pytest.approx(0, abs=1e-6)


def test_a_tasks_prompts_run_once_however_full_the_list_of_all_tasks_is(
    trial, monkeypatch, tmp_path
):
    halves = claim.halve(trial)
    claim.open_switch(trial, halves)  # what is compared once for a model has been
    others = [list(range(k, k + 30)) for k in range(1, 25)]
    (full,) = [
        replay.run_forest(trial.decoder, one) for one in plant_prompts(others, range(24), 9999)
    ]
    monkeypatch.setattr(replay, "KEPT_BYTES", full.n_bytes)
    monkeypatch.setattr(store, "STORE", tmp_path)
    run, runs = replay.run_forest, []
    monkeypatch.setattr(replay, "run_forest", lambda *args: runs.append(1) or run(*args))
    crowded = replace(trial, forests=[full])
    claim.open_switch(crowded, halves)
    assert len(runs) == 1
    assert crowded.forests == [full]


def test_prompts_that_were_read_before_are_not_run_again_for_either_half(
    trial, monkeypatch, tmp_path
):
    halves, tokens = claim.halve(trial), trial.task.tokens
    (read,) = [
        replay.run_forest(trial.decoder, one)
        for one in plant_prompts(tokens, range(len(tokens)), 99999)
    ]
    claim.open_switch(trial, halves)  # what is compared once for a model has been
    monkeypatch.setattr(store, "STORE", tmp_path)
    run, runs = replay.run_forest, []
    monkeypatch.setattr(replay, "run_forest", lambda *args: runs.append(1) or run(*args))
    opened = claim.open_switch(replace(trial, forests=[read]), halves)
    claim.transfer_on_testing_half(opened, Untested("no seen task"))
    claim.knock_out(opened.trial, halves.testing, {"all": opened.best(3)})
    assert runs == []


def test_what_was_exchanged_is_recorded_with_its_place_and_its_interval(opened):
    tested = claim.transfer_on_testing_half(opened, Untested("no seen task"))
    table = claim.as_table(opened, tested).set_index("exchanged")
    assert set(table.index) == {"attention", "random 3", *(f"best {n}" for n in claim.COUNTS)}
    assert table.loc["attention", "where"] == str(PLANTED[0])
    assert table.loc["best 1", "where"] == f"{PLANTED[0]}.{PLANTED[1]}"
    assert (table["n"] == tested["best 1"].n_units).all()
    for name, row in table.iterrows():
        assert row["estimate"] == float(tested[name])
        assert row["low"] <= row["estimate"] <= row["high"]
    kept = pd.read_csv(DATA / "recorded-months-heads.csv", keep_default_na=False)
    assert list(kept.columns) == list(claim.as_table(opened, tested).columns)
    assert set(kept["exchanged"]) == set(table.index) and kept["model"].nunique() == 1


def test_the_map_of_heads_has_one_bright_cell(opened):
    table = claim.map_heads(opened.trial, opened.halves.choosing)
    expected = np.zeros((N_HEADS, 4))
    expected[PLANTED[::-1]] = 1
    assert np.abs(table - expected).max() < 1e-6


def test_transfer_of_heads_equals_a_recompute_by_hooks(trial):
    pairs = claim.halve(trial).testing
    groups = {"a": [(1, 0), (3, 2)], "b": [(2, 1)]}
    found = claim.exchange_heads(trial, pairs, groups)
    for name, group in groups.items():
        assert float(found[name]) == pytest.approx(by_hooks(trial, group, pairs), abs=1e-5)


def by_hooks(trial, group, pairs):
    """Return T of heads exchanged together, a plain pass a pair."""
    above = below = 0.0
    for recipient, donor in pairs.prompts.tolist():
        edited = patched(trial, group, recipient, donor)
        clean, target = (log_p(trial, row) for row in (recipient, donor))
        above += float((target.exp() * (target - edited)).sum())
        below += float((target.exp() * (target - clean)).sum())
    return 1 - above / below


def all_of(block):
    return [(block, head) for head in range(N_HEADS)]


def test_parts_are_chosen_on_one_half_and_tested_on_the_other(trial):
    halves = claim.halve(trial)
    opened = claim.open_switch(trial, halves)
    chosen = opened
    by_block = {block: by_hooks(trial, all_of(block), halves.choosing) for block in range(3)}
    assert chosen.block == max(by_block, key=lambda block: by_block[block])
    assert set(chosen.heads) == {head for block in range(3) for head in all_of(block)}
    assert list(chosen.heads.values()) == sorted(chosen.heads.values(), reverse=True)
    for head in [*chosen.best(3), (0, 1), (1, 3)]:
        alone = by_hooks(trial, [head], halves.choosing)
        assert chosen.heads[head] == pytest.approx(alone, abs=1e-4)
    others = [(0, 0), (2, 1), (1, 3)]
    found = claim.transfer_on_testing_half(opened, others)
    groups = {"attention": all_of(chosen.block), "best 3": chosen.best(3), "elsewhere": others}
    for name, group in groups.items():
        tested = by_hooks(trial, group, halves.testing)
        assert float(found[name]) == pytest.approx(tested, abs=1e-4)
        assert abs(tested - by_hooks(trial, group, halves.choosing)) > 1e-3  # halves differ
    lost = claim.transfer_on_testing_half(opened, Untested("no seen task"))
    assert lost["elsewhere"] == Untested("no seen task")


def test_heads_are_looked_for_where_attention_carries_most(trial, monkeypatch):
    monkeypatch.setattr(claim, "N_BLOCKS", 1)
    chosen = claim.open_switch(trial, claim.halve(trial))
    assert {block for block, _ in chosen.heads} == {chosen.block}


def test_flips_are_counted_towards_the_donors_answer(trial):
    pairs = claim.halve(trial).testing
    found = claim.exchange_sites(trial, pairs, claim.PARTS)["attention"]
    answers = trial.task.prompts["answer"].iloc[pairs.prompts[:, 1]].tolist()
    assert [trial.task.answers[one] for one in found.target] == answers
    for block in (0, 2):
        for index, (recipient, donor) in enumerate(pairs.prompts[:6].tolist()):
            edited = patched(trial, all_of(block), recipient, donor)
            assert found.choice[block, index] == edited[trial.task.answer_ids].argmax()


def test_halves_hold_only_groups_that_the_model_masters(trial, monkeypatch):
    rows = [(s, ANSWERS[(i + k) % 6], f"t{k}") for i, s in enumerate(SUBJECTS) for k in (0, 1)]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    task = build_task("sums", items, ["t2 {group} t3 {subject} t5"], trial.decoder)
    sums = read_tasks(trial.decoder, {"sums": task})["sums"]
    assert "accuracy" in claim.halve(sums).reason
    monkeypatch.setattr(type(sums), "able_groups", property(lambda _self: ["t1"]))
    halves = claim.halve(sums)
    rows = np.concatenate([halves.choosing.prompts, halves.testing.prompts]).ravel()
    assert set(task.prompts["group"].iloc[rows]) == {"t1"}


def log_p(trial, row):
    logits = oracle.forward(trial.decoder.model, [trial.task.tokens[row]])[0]
    return torch.log_softmax(logits.double(), -1)


def patched(trial, group, recipient, donor):
    """Return log-probabilities after the recipient with the donor's heads, from one plain pass."""
    modules = {b: trial.decoder.blocks[b].self_attn.o_proj for b, _ in group}
    given = {}

    def keep(block):
        return modules[block].register_forward_pre_hook(
            lambda _m, args: given.__setitem__(block, args[0][0, -1].clone())
        )

    def put(block, heads):
        def hook(_module, args):
            new = args[0].clone()
            for head in heads:
                new[0, -1, 8 * head : 8 * head + 8] = given[block][8 * head : 8 * head + 8]
            return (new,)

        return modules[block].register_forward_pre_hook(hook)

    handles = [keep(block) for block in modules]
    log_p(trial, donor)
    for handle in handles:
        handle.remove()
    handles = [put(block, [h for b, h in group if b == block]) for block in modules]
    result = log_p(trial, recipient)
    for handle in handles:
        handle.remove()
    return result


def curve(after, before=1.0, n_blocks=4):
    """Return a transfer whose T is 1 − after by block, of one pair."""
    after = np.asarray(after, dtype=float)[:, None]
    zero = np.zeros(1, dtype=int)
    return Transfer(tuple(range(n_blocks)), after, np.array([before]), zero, zero, zero, "s", 1)


def test_the_last_block_is_never_chosen():
    assert claim.rank_blocks([claim.total(curve([0.9, 0.2, 0.5, 0.0]))]) == [1, 2, 0]


def test_random_heads_are_others_of_the_same_blocks(opened):
    drawn = claim.random_heads(opened, 3)
    assert len(set(drawn)) == 3 and not set(drawn) & set(opened.best(3))
    assert {block for block, _ in drawn} <= {block for block, _ in opened.heads}


def test_twins_are_measured_on_seen_tasks_and_one_held_out_in_any_order():
    names = ["antonyms", "capitals", "animals", "plurals", "months-sequence"]
    chosen = claim.twin_tasks(names)
    assert {"capitals", "months-sequence"} < set(chosen) and len(chosen) == 3
    assert set(claim.twin_tasks(names[::-1])) == set(chosen)


def fake(name, trial, heads):
    ordered = {head: heads[head] for head in sorted(heads, key=lambda head: -heads[head])}
    return Opened(trial, Halves(None, None), {"attention": curve([1, 0, 1, 1])}, 1, ordered)


def test_heads_for_held_out_tasks_come_from_the_seen_ones_alone(trial, monkeypatch):
    tables = {
        "capitals": {(1, 0): 0.9, (1, 1): 0.1, (2, 0): 0.3, (2, 1): 0.0},
        "months-sequence": {(1, 0): 0.1, (1, 1): 0.8, (2, 0): 0.4, (2, 1): 0.0},
        "antonyms": {(1, 0): 0.0, (1, 1): 0.0, (2, 0): 0.0, (2, 1): 9.0},
    }
    opened = {name: fake(name, name, table) for name, table in tables.items()}
    monkeypatch.setattr(
        claim,
        "transfer_by_head",
        lambda trial, _pairs, blocks: {h: t for h, t in tables[trial].items() if h[0] in blocks},
    )
    assert claim.heads_of_seen_tasks(opened) == [(1, 0), (1, 1), (2, 0)]
    assert isinstance(claim.heads_of_seen_tasks({"antonyms": opened["antonyms"]}), Untested)


def test_statistics_are_judged_and_seen_tasks_are_no_held_out_ones():
    rng = np.random.default_rng(0)
    tested = {
        name: {
            kind: mean_over_units(rng.normal(0.9, 0.05, 30), f"subjects of {name}")
            for kind in ("attention", "best 3", "elsewhere")
        }
        for name in ("capitals", "antonyms", "animals")
    }
    tested["plurals"] = Untested("why")
    found = claim.statistics(tested)
    assert set(found["three_heads_held_out"]) == {"antonyms", "animals", "plurals"}
    records = judge(claim.CLAIM, "m", found, claim.statistics(tested))
    verdicts = {row["verdict"] for row in records if row["place"] != "plurals"}
    assert verdicts == {"supported"}


def test_twins_are_averaged_over_seeds(planted, opened):
    tasks, halves = {"capitals": planted.task}, {"capitals": opened.halves}
    own = claim.measure_twin(planted.decoder, halves, tasks)
    assert float(own["attention_transfer"]["capitals"]) == pytest.approx(1, abs=1e-6)
    assert own["three_heads_held_out"] == {}
    mean = over_twins([own, own, own])["three_heads"]["capitals"]
    assert float(mean) == pytest.approx(1, abs=1e-6) and mean.n_units == 3
    lost = {"three_heads": {"capitals": Untested("why")}}
    untested = over_twins([lost, lost, lost])["three_heads"]["capitals"]
    assert untested == Untested("3 of 3 networks: why")


# --- what is lost, read, written ------------------------------------------------------------------


def test_blinding_the_planted_head_loses_the_subject_and_blinding_others_nothing(opened):
    trial, pairs = opened.trial, opened.halves.testing
    others = [head for head in claim.every_head(trial.decoder, range(4)) if head != PLANTED]
    groups = {"planted": [PLANTED], "others": others, "all": [*others, PLANTED]}
    found = claim.knock_out(trial, pairs, groups)
    assert float(found.share("planted", "all")) == pytest.approx(1, abs=1e-6)
    assert float(found.share("others", "all")) == pytest.approx(0, abs=1e-6)
    assert (found.lost[0] > 1e-4).all()
    prompts = np.unique(pairs.prompts[:, 0])
    right = trial.correct[prompts]
    assert np.array_equal(found.correct[1], right)
    assert float(found.accuracy("others")) == pytest.approx(
        pd.Series(right).groupby(trial.task.unit[prompts]).mean().mean()
    )


def test_a_blind_prompt_predicts_what_a_mask_in_every_head_makes_of_it(trial):
    pairs = claim.halve(trial).testing
    everything = {"all": claim.every_head(trial.decoder, range(4))}
    row = int(np.unique(pairs.prompts[:, 0])[0])
    tokens = trial.task.tokens[row]
    start, end = trial.task.prompts.loc[row, ["subject_start", "subject_position"]]
    found = claim.knock_out(trial, pairs, everything, others={"rest": everything["all"]})
    assert found.groups == ("all", "rest")
    for number, others in enumerate((False, True)):
        hidden = [p for p in range(len(tokens) - 1) if (start <= p <= end) != others]
        mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        mask[-1, hidden] = False
        with torch.no_grad():
            logits = trial.decoder.model(
                torch.tensor([tokens]), attention_mask=mask[None, None], use_cache=False
            ).logits[0, -1]
        blind, clean = torch.log_softmax(logits.double(), -1), log_p(trial, row)
        assert found.lost[number, 0] == pytest.approx(
            float((clean.exp() * (clean - blind)).sum()), abs=1e-5
        )


def entering(trial, module, row):
    """Return what enters a module when a prompt is read."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    trial.decoder.model(torch.tensor([trial.task.tokens[row]]), use_cache=False)
    handle.remove()
    return seen[0]


def test_what_a_head_writes_is_what_the_last_state_loses_without_it(planted, opened):
    trial = opened.trial
    found = claim.writes_answer(trial, opened.halves.testing, [PLANTED, (0, 0)])
    rows = np.unique(opened.halves.testing.prompts[:, 0])
    part = find_parts(trial.decoder)[PLANTED[0]]
    direct = []
    for row in rows:
        slot = slice(8 * PLANTED[1], 8 * PLANTED[1] + 8)
        entered = entering(trial, part.projection, row)
        output = part.projection.weight[:, slot] @ entered[0, -1, slot]
        with torch.no_grad():
            norm, head = trial.decoder.model.model.norm, trial.decoder.unembedding
            last = trial.last_states[row]
            direct.append((head(norm(last)) - head(norm(last - output)))[trial.task.answer_ids])
    direct = torch.stack(direct).double()
    choice = (direct - direct.mean(0)).argmax(-1).numpy()
    right = pd.Series(choice == trial.task.answer_index[rows]).groupby(trial.task.unit[rows])
    assert float(found[PLANTED]) == pytest.approx(right.mean().mean())
