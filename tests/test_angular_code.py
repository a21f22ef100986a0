"""The angular code's statistics against full recomputes, naive loops and planted structure."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import block_states, forward
from scipy.spatial.distance import pdist, squareform
from scipy.special import log_softmax
from scipy.stats import rankdata, spearmanr

from lib.claims.angular_code import (
    Items,
    beyond_by_rivals,
    beyond_twins,
    correlate_beyond,
    correlate_different,
    correlate_items,
    find_windows,
    items_by_template,
    learn_readers,
    measure_network,
    read_divergence,
    read_items,
    statistics,
    thin_tasks,
    unembedding_basis,
    within,
)
from lib.evidence.by_task import over_twins
from lib.evidence.criteria import criteria, judge
from lib.evidence.tasks import build_task, load_tasks, load_texts
from lib.evidence.transfer import Trial, read_tasks
from lib.science.estimate import Untested, mean_over_units
from lib.science.geometry import angles, distances
from lib.science.reader import fit_reader


def planted(n_items=40, n_blocks=8, d=6, seed=1, units="texts"):
    """States that turn towards the latent place that the divergence is read from, with depth."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n_items, d))
    noise = rng.normal(size=(n_blocks, n_items, d))
    share = np.linspace(0.2, 0.9, n_blocks)[:, None, None]
    states = share * latent + (1 - share) * noise
    return Items(torch.as_tensor(states), squareform(pdist(latent)), units)


def pairs_of(matrix):
    return np.asarray(matrix)[np.triu_indices(len(matrix), 1)]


def prompts_of(n, length, seed=2):
    return np.random.default_rng(seed).integers(3, 64, size=(n, length)).tolist()


# --- what is compared ----------------------------------------------------------------------------


def test_divergence_is_that_of_the_models_own_predictions_after_the_last_token(llama):
    prompts = [*prompts_of(3, 5), *prompts_of(3, 7)]
    found = read_items(llama, prompts, "texts").divergence
    with torch.inference_mode():
        logits = [llama.model(torch.tensor([p])).logits[0, -1].double().numpy() for p in prompts]
    log_p = log_softmax(logits, axis=1)
    for i in range(6):
        for j in range(6):
            kl = [(np.exp(p) * (p - q)).sum() for p, q in ((log_p[i], log_p[j]), log_p[[j, i]])]
            assert found[i, j] == pytest.approx(sum(kl), rel=1e-3, abs=1e-6)


def test_prompts_are_compared_within_their_template_in_the_order_of_subjects(embedded):
    (trial,) = read_tasks(embedded, load_tasks(embedded, ["months-sequence"])).values()
    assert isinstance(trial, Trial)
    parts = items_by_template(trial)
    assert len(parts) == trial.task.prompts["template"].nunique() > 1
    prompts = trial.task.prompts
    for template, part in enumerate(parts):
        assert part.units == trial.task.units
        for unit in range(trial.task.n_units):
            row = prompts.index[(prompts["template"] == template) & (prompts["unit"] == unit)][0]
            torch.testing.assert_close(part.states[:, unit], trial.states("last")[:, row])
    curves = [
        spearmanr(pairs_of(angles(part.states[20])), pairs_of(part.divergence)).statistic
        for part in parts
    ]
    found = correlate_items(parts)
    assert found.n_units == trial.task.n_units
    assert found.value[20] == pytest.approx(np.mean(curves))


def test_the_texts_that_readers_learn_from_are_none_of_those_judged(llama):
    judged, learned = load_texts()["context"], load_texts("contexts.csv")["context"]
    assert len(judged) == 400
    assert not set(judged) & set(learned)
    prompts = prompts_of(12, 6)
    with pytest.raises(ValueError, match=r"1 of the texts .* judged as well"):
        learn_readers(llama, prompts, [1], judged=prompts_of(3, 6, seed=9) + prompts[3:4])


# --- units ---------------------------------------------------------------------------------------


def test_an_interval_covers_what_other_texts_would_give_and_pairs_as_units_would_not():
    """The spread over samples of texts, against the spread of the draws of one sample."""
    over_samples, over_draws = [], []
    for seed in range(40):
        found = correlate_items([planted(n_items=30, n_blocks=4, seed=seed)]).at(2)
        over_samples.append(float(found))
        over_draws.append(found.draws[1:].std())
    truth, drawn = np.std(over_samples), np.mean(over_draws)
    of_pairs = math.sqrt(1 / 435)
    assert of_pairs < 0.75 * truth
    assert 0.8 * truth < drawn < 1.5 * truth


# --- the reader ----------------------------------------------------------------------------------


def test_readers_learn_at_every_token_but_the_first(llama):
    prompts = [*prompts_of(30, 7), *prompts_of(30, 4, seed=4)]
    (reader,) = learn_readers(llama, prompts, [1], judged=[]).values()
    states, target, text = [], [], []
    for number, prompt in enumerate(prompts):
        found = block_states(llama.model, llama.blocks, prompt)[:, 1:].double().numpy()
        states.append(found[1])
        target.append(found[3])
        text += [number] * (len(prompt) - 1)

    expected = fit_reader(np.concatenate(states), np.concatenate(target), text)
    assert reader.penalty == expected.penalty
    fresh = np.concatenate(states)[:20]
    np.testing.assert_allclose(reader(fresh), expected(fresh), atol=1e-3)


def test_the_readers_prediction_of_the_last_block_is_the_models_own(llama):
    prompts = prompts_of(40, 9)
    items = read_items(llama, prompts_of(6, 9, seed=8), "texts")
    (reader,) = learn_readers(llama, prompts, [3], judged=[]).values()
    assert reader.explained == pytest.approx(1, abs=1e-6)
    lens = read_divergence(llama, items.states[3])
    np.testing.assert_allclose(lens, items.divergence, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        read_divergence(llama, items.states[3], reader), items.divergence, rtol=1e-2, atol=1e-4
    )


def test_a_partial_correlation_is_given_what_is_read_at_its_own_block():
    items = planted()
    rng = np.random.default_rng(6)
    read = {
        b: squareform(pdist(items.states[b].numpy() + 0.4 * rng.normal(size=(40, 6))))
        for b in (5, 6)
    }
    expected = []
    for block in (5, 6):
        a, b, c = (
            rankdata(pairs_of(m))
            for m in (angles(items.states[block]), items.divergence, read[block])
        )
        rest = [v - np.polyval(np.polyfit(c, v, 1), c) for v in (a, b)]
        expected.append(np.corrcoef(*rest)[0, 1])
    assert abs(expected[0] - expected[1]) > 0.02  # a swap of blocks would be seen
    found = correlate_beyond(items, read, [5, 6])
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-9)


def test_an_angle_that_a_reader_reads_whole_says_nothing_beyond_it():
    """J is the divergence of what is read, up to noise that the angle does not know."""
    items = planted(n_items=60)
    rng = np.random.default_rng(0)
    angle = angles(items.states[6])
    noise = squareform(rng.normal(size=60 * 59 // 2)) * angle.std()
    own = Items(items.states, angle + noise - noise.min() * (angle > 0), "texts")
    found = correlate_beyond(own, {6: angle + 0.01 * squareform(rng.random(60 * 59 // 2))}, [6])
    assert abs(float(found)) < 0.1


# --- one network ---------------------------------------------------------------------------------


def toy_task(decoder, n_subjects=12):
    """A task of two templates and two groups, each of which holds every subject."""
    rows = [
        (f"w{i + 1}", f"w{50 + i % 3}", f"w{58 + g}") for g in (0, 1) for i in range(n_subjects)
    ]
    items = pd.DataFrame(rows, columns=["subject", "answer", "group"])
    return build_task("toy", items, ["{group} w61 {subject} w62", "w63 {subject} {group}"], decoder)


def naive(decoder, prompts):
    """States after each block at the last token, and J, from one plain pass a prompt."""
    states = [block_states(decoder.model, decoder.blocks, one)[:, -1].double() for one in prompts]
    log_p = log_softmax([forward(decoder.model, [one])[0].double() for one in prompts], axis=1)
    return torch.stack(states, dim=1).numpy(), jeffreys(log_p)


def jeffreys(log_p):
    return np.array([[((np.exp(p) - np.exp(q)) * (p - q)).sum() for q in log_p] for p in log_p])


def angle_between(states):
    return np.arccos(np.clip(1 - squareform(pdist(states, "cosine")), -1, 1))


def partial(first, second, given):
    a, b, c = (rankdata(pairs_of(matrix)) for matrix in (first, second, given))
    rest = [values - np.polyval(np.polyfit(c, values, 1), c) for values in (a, b)]
    return np.corrcoef(*rest)[0, 1]


@pytest.fixture(scope="module")
def read_network(llama):
    """What is measured of a tiny network, and what it was given."""
    texts, learn = prompts_of(16, 6, seed=3), prompts_of(40, 6, seed=4)
    tasks = {"toy": toy_task(llama), "lost": Untested("no tokens")}
    return measure_network(llama, texts, tasks, learn=learn, reader_blocks=[1, 2]), texts, learn


def test_a_networks_curves_are_of_its_own_angles_and_distances(llama, read_network):
    network, texts, _ = read_network
    task = toy_task(llama)
    cells = task.prompts.groupby(["template", "group"])["tokens"]
    assert cells.ngroups == 4
    for place, sets in (("texts", [texts]), ("toy", [cell.tolist() for _, cell in cells])):
        read = [naive(llama, prompts) for prompts in sets]
        for found, measure in (
            (network.angle[place], angle_between),
            (network.distance[place], lambda states: squareform(pdist(states))),
        ):
            for block in range(3):
                rho = [
                    spearmanr(pairs_of(measure(states[block])), pairs_of(divergence)).statistic
                    for states, divergence in read
                ]
                assert found.value[block] == pytest.approx(np.mean(rho), abs=5e-3)
    assert network.angle["lost"] == network.distance["lost"] == Untested("no tokens")


def test_items_are_subjects_in_one_order_whatever_the_order_of_prompts(llama):
    task = toy_task(llama)
    order = np.random.default_rng(0).permutation(task.n_prompts)
    turned = replace(task, prompts=task.prompts.iloc[order].reset_index(drop=True))
    one, other = (
        correlate_items(items_by_template(read_tasks(llama, {"toy": each})["toy"]))
        for each in (task, turned)
    )
    np.testing.assert_allclose(one.draws, other.draws, atol=1e-3)


def test_a_template_that_lacks_a_subject_is_left_out(llama):
    task = toy_task(llama)
    own = task.prompts["template"] == task.prompts["template"].iloc[0]
    whole, lost = task.prompts[~own], task.prompts[own & (task.prompts["unit"] > 0)]
    found = {}
    for name, rows in (("lost", pd.concat([whole, lost])), ("whole", whole), ("none", lost)):
        prompts = rows.reset_index(drop=True)
        (found[name],) = read_tasks(llama, {"toy": replace(task, prompts=prompts)}).values()
    items = {name: items_by_template(trial) for name, trial in found.items()}
    assert [len(one.divergence) for one in items["lost"]] == [task.n_units] * len(items["whole"])
    assert items["none"] == Untested("no template holds every subject")


def test_a_networks_readers_learn_from_other_texts_and_the_lens_from_none(llama, read_network):
    network, texts, learn = read_network
    states, _ = naive(llama, texts)
    whole = [block_states(llama.model, llama.blocks, one)[:, 1:].double().numpy() for one in learn]
    given, target = (np.concatenate([one[block] for one in whole]) for block in (1, 3))
    expected = fit_reader(given, target, np.repeat(np.arange(40), 5))

    def divergence(read):
        with torch.no_grad():
            last = llama.final_norm(torch.as_tensor(read, dtype=torch.float32))
            return jeffreys(log_softmax(llama.unembed(last).double().numpy(), axis=1))

    assert network.readers[1].penalty == expected.penalty
    read, lens = divergence(expected(states[1])), divergence(states[1])
    assert spearmanr(pairs_of(read), pairs_of(lens)).statistic < 0.95  # a swap would be seen
    np.testing.assert_allclose(network.read[1], read, rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(network.lens[1], lens, rtol=1e-3, atol=1e-4)


def test_rivals_of_the_angle_are_what_their_names_say_given_the_reader(llama, read_network):
    network, texts, _ = read_network
    states, divergence = naive(llama, texts)
    rows = llama.unembedding.weight.detach().double().numpy()
    first = np.linalg.svd(rows - rows.mean(axis=0))[2].T[:, :8]
    found = beyond_by_rivals(llama, network, [1, 2], 8)
    expected = {
        "angle": angle_between,
        "distance": lambda h: squareform(pdist(h)),
        "angle, top 8 of the unembedding": lambda h: angle_between(h @ first),
        "angle, all other directions": lambda h: angle_between(h - h @ first @ first.T),
    }
    for name, measure in expected.items():
        by_block = [partial(measure(states[b]), divergence, network.read[b]) for b in (1, 2)]
        assert float(found[name]) == pytest.approx(np.mean(by_block), abs=1e-2), name
    assert set(found) == {*expected, "angle, 8 random directions"}


def test_twins_read_one_template_and_each_subject_keeps_its_prompt(llama):
    task = toy_task(llama, n_subjects=48)
    found = thin_tasks({"toy": task, "lost": Untested("no tokens")})
    assert found["lost"] == Untested("no tokens")
    few = found["toy"]
    assert few.n_prompts == few.n_units == 24
    assert len(set(few.prompts["template"])) == len(set(few.prompts["group"])) == 1
    assert set(few.prompts["text"]) <= set(task.prompts["text"])
    for row in few.prompts.itertuples():
        assert few.subjects[row.unit] == row.subject
        assert llama.tokenizer(row.text)["input_ids"] == row.tokens


# --- statistics ----------------------------------------------------------------------------------


def test_windows_lie_around_the_transition_and_leave_out_the_last_block():
    found = find_windows(30, 22.5)
    assert (found.early, found.late) == (range(8, 16), range(23, 29))
    assert (found.before, found.after) == (range(20, 23), range(23, 26))
    assert find_windows(30, 26).after == range(26, 29)
    for place in (2.0, 26.5, 28.0):
        assert "fewer than 3 blocks" in find_windows(30, place).reason
    assert find_windows(30, Untested("no curve falls")).reason == "no curve falls"


def test_statistics_are_the_differences_that_their_names_say():
    items = planted(n_blocks=16)
    angle, distance = correlate_items([items]), correlate_items([items], distances)
    windows = find_windows(16, 10.2)
    found = statistics(
        {"texts": angle}, {"texts": distance}, mean_over_units([0.3] * 3, "texts"), windows
    )
    a, d = angle.value, distance.value
    expected = {
        "late_correlation": a[11:15].mean(),
        "late_minus_early": a[11:15].mean() - a[4:9].mean(),
        "set_in": a[11:14].mean() - a[8:11].mean(),
        "angle_minus_distance": a[11:15].mean() - d[11:15].mean(),
        "beyond_reader": 0.3,
    }
    assert {name: float(value["texts"]) for name, value in found.items()} == pytest.approx(expected)


def network(seed, n_blocks=16, transition=10.2):
    """The statistics of one network, on texts and on two tasks of two templates."""
    texts = planted(n_blocks=n_blocks, seed=seed)
    tasks = {
        name: [planted(15, n_blocks, seed=seed + t, units=f"subjects of {name}") for t in (1, 2)]
        for name in ("capitals", "animals")
    }
    sets = {"texts": [texts], **tasks}
    angle = {name: correlate_items(parts) for name, parts in sets.items()}
    distance = {name: correlate_items(parts, distances) for name, parts in sets.items()}
    windows = find_windows(n_blocks, transition)
    read = {b: distances(texts.states[b]) for b in windows.late}
    return statistics(angle, distance, correlate_beyond(texts, read, windows.late), windows)


def test_trained_and_twins_give_a_record_for_every_criterion_and_place():
    trained = network(0)
    twins = over_twins([network(seed) for seed in (10, 20, 30, 40, 50)])
    assert twins["set_in"]["capitals"].n_units == 5
    records = judge("angular-code", "m", {**trained, **beyond_twins(trained, twins)}, twins=twins)
    for criterion in criteria("angular-code"):
        places = {
            r["place"]
            for r in records
            if r["statistic"] == criterion.statistic and not r["untrained"]
        }
        wanted = {"texts"} | (
            {"capitals", "animals", "all tasks"} if "tasks" in criterion.places else set()
        )
        assert places == wanted
    gap = {r["place"]: r for r in records if r["statistic"] == "set_in_beyond_twins"}
    expected = float(trained["set_in"]["texts"]) - float(twins["set_in"]["texts"])
    assert gap["texts"]["estimate"] == pytest.approx(expected)


def test_what_cannot_be_measured_is_not_testable_with_its_reason():
    lost = Untested("no curve falls")
    items = planted(n_blocks=8)
    curve = correlate_items([items])
    found = statistics(
        {"texts": curve, "capitals": curve}, {"texts": curve, "capitals": curve}, lost, lost
    )
    records = judge("angular-code", "m", {**found, **beyond_twins(found, over_twins([found] * 5))})
    assert {record["verdict"] for record in records} == {"not testable"}
    assert all("no curve falls" in record["reason"] for record in records)
    same = Items(items.states, np.zeros((40, 40)), "texts")
    assert "equally far" in correlate_items([same]).reason


# --- shown beside --------------------------------------------------------------------------------


def test_pairs_of_different_answers_alone_are_what_a_naive_loop_correlates():
    items = planted(n_items=18)
    labels = np.arange(18) % 5
    found = correlate_different(items, labels)
    i, j = np.triu_indices(18, 1)
    kept = labels[i] != labels[j]
    for block in range(8):
        a, b = angles(items.states[block])[i, j][kept], items.divergence[i, j][kept]
        assert found.value[block] == pytest.approx(spearmanr(a, b).statistic)
    all_different = correlate_different(items, np.arange(18))
    np.testing.assert_allclose(all_different.draws, correlate_items([items]).draws, atol=1e-9)
    assert isinstance(correlate_different(items, np.zeros(18)), Untested)


def test_the_unembeddings_first_directions_carry_most_of_the_logits_differences(llama, monkeypatch):
    monkeypatch.setattr("lib.claims.angular_code.ROWS_AT_ONCE", 10)  # the last ones are fewer
    basis = unembedding_basis(llama)
    np.testing.assert_allclose(basis.T @ basis, np.eye(32), atol=1e-9)
    rows = llama.unembedding.weight.detach().double().numpy()
    singular = np.linalg.svd(rows - rows.mean(axis=0))[1]
    spread = np.linalg.norm((rows - rows.mean(axis=0)) @ basis, axis=0)
    np.testing.assert_allclose(spread, singular, rtol=1e-6)
    states = np.random.default_rng(0).normal(size=(5, 32))
    np.testing.assert_allclose(within(basis)(states), angles(states), atol=1e-9)
