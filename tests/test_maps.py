"""The map with its slider: true positions, and a page that needs nothing else."""

import json
import re

import numpy as np
import pytest

from lib.angular_code.maps import DepthMap, Panel, depth_map_html, depth_positions
from lib.science import metrics


def make_map(n_items: int = 48, n_blocks: int = 30, name: str = "capitals") -> DepthMap:
    rng = np.random.default_rng(0)
    panels = [
        Panel(title, rng.uniform(-1, 1, (n_blocks, n_items, 2)), *rng.uniform(0, 1, (2, n_blocks)))
        for title in ("trained", "untrained twin")
    ]
    labels = [f"subject {k}" for k in range(n_items)]
    groups = [f"answer {k % 5}" for k in range(n_items)]
    return DepthMap(name, labels, groups, [k % 3 for k in range(n_items)], panels, 22.5)


def test_directions_that_lie_in_a_plane_keep_their_distances() -> None:
    rng = np.random.default_rng(1)
    flat = rng.uniform(-0.3, 0.3, size=(4, 10, 2))
    heights = np.sqrt(1 - np.square(flat).sum(axis=2, keepdims=True))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    # Unit vectors on a small cap; norms differ and must not matter.
    states = np.concatenate([flat, heights], axis=2) @ turn * rng.uniform(1, 9, size=(4, 10, 1))
    positions, shown = depth_positions(states)
    assert (shown > 0.98).all()
    for block in range(4):
        found, true = metrics.distances(positions[block]), metrics.distances(flat[block])
        ratio = found[np.triu_indices(10, 1)] / true[np.triu_indices(10, 1)]
        assert ratio.std() / ratio.mean() < 0.05
    assert np.abs(positions).max() == pytest.approx(1)


def test_a_cloud_that_only_turns_stays_where_it_is_on_the_map() -> None:
    rng = np.random.default_rng(2)
    cloud = rng.normal(size=(12, 6))
    states = np.stack([cloud @ np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(5)])
    positions, _ = depth_positions(states)
    for block in range(4):
        np.testing.assert_allclose(positions[block], positions[-1], atol=1e-9)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (np.zeros((1, 4, 3)), "item 0 has norm 0"),
        (np.ones((2, 4, 3)), "block 1: all directions are equal"),
        (np.ones((1, 2, 3)), "at least 3"),
    ],
)
def test_states_without_a_map_are_refused(states: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth_positions(states)


def test_the_map_fetches_nothing_and_is_small() -> None:
    html = depth_map_html([make_map(name=f"task {k}") for k in range(8)], title="A map")
    assert not re.search(r"https?:|src=|@import|url\(|<link", html)
    assert len(html) < 1_000_000
    assert not re.search(r"\[\[[A-Z]", html)


def test_the_slider_covers_all_blocks_and_has_a_name() -> None:
    html = depth_map_html([make_map()], title="A map", start=24)
    assert re.search(r'<label class="reach">Block <input type="range" min="0" max="29"', html)
    assert 'value="24"' in html
    assert html.count('role="img"') == 3
    assert all(re.findall(r'role="img" aria-label="[^"]{10,}"', html))
    assert "<label hidden>Task" in html  # Nothing to choose among one task.


def test_the_data_are_the_positions_at_every_block() -> None:
    one = make_map()
    html = depth_map_html([one], title="A map")
    data = json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1])
    at = np.array(data[0]["panels"][0]["at"]).reshape(30, 48, 2)
    width = at.max() - at.min()
    assert width > 300
    # Right is right, up is up (y grows downwards), for every item and block.
    flat, found = one.panels[0].positions.reshape(-1, 2), at.reshape(-1, 2)
    assert np.corrcoef(flat[:, 0], found[:, 0])[0, 1] > 0.9999
    assert np.corrcoef(flat[:, 1], found[:, 1])[0, 1] < -0.9999
    shown_first = re.findall(r"translate\((\d+)px,(\d+)px\)", html)[:48]
    assert np.array(shown_first, dtype=int).tolist() == at[29].tolist()


def test_text_of_tasks_cannot_break_the_page() -> None:
    one = make_map(4)
    nasty = '</script><b>&"'
    html = depth_map_html(
        [DepthMap(nasty, [nasty] * 4, [nasty] * 4, one.shapes, one.panels)], title=nasty
    )
    assert nasty not in html
    assert html.count("</script>") == 2


def test_many_answers_have_as_many_colours() -> None:
    one = make_map(12)
    months = DepthMap("months", one.labels, [f"m{k}" for k in range(12)], one.shapes, one.panels)
    html = depth_map_html([months], title="A map")
    assert len(set(re.findall(r'class="key" style="background:(#\w{6})', html))) == 12


def test_the_same_map_is_the_same_text() -> None:
    assert depth_map_html([make_map()], title="A") == depth_map_html([make_map()], title="A")


def test_maps_that_do_not_fit_together_are_refused() -> None:
    one = make_map(6)
    with pytest.raises(ValueError, match="differ in length"):
        depth_map_html(
            [DepthMap("x", one.labels[:5], one.groups, one.shapes, one.panels)], title=""
        )
    with pytest.raises(ValueError, match="no map to show"):
        depth_map_html([], title="")
    broken = Panel("x", np.full((3, 6, 2), np.nan), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        depth_map_html([DepthMap("x", one.labels, one.groups, one.shapes, [broken])], title="")
