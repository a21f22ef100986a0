"""Draws lib's five floors from the imports: `make floors` writes _build/floors.svg."""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.engine.sources import direct_imports  # noqa: E402

FLOORS = ("claims", "reading", "evidence", "science", "engine")
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#949494")


def main(file: Path = ROOT / "_build" / "floors.svg") -> None:
    """Draw every module on its floor, and each import between floors as a line."""
    matplotlib.use("svg")
    places: dict[Path, tuple[float, float]] = {}
    figure, axes = plt.subplots(figsize=(14, 6))
    for row, floor in enumerate(FLOORS):
        modules = sorted((ROOT / "lib" / floor).glob("[a-z]*.py"))
        axes.text(-0.02, -row, floor, ha="right", va="center", weight="bold", color=COLOURS[row])
        for column, module in enumerate(modules):
            n_lines = len(module.read_text(encoding="utf-8").splitlines())
            x, y = (column + 0.5) / len(modules), -row - 0.14 * (column % 3 - 1)
            places[module] = (x, y)
            text = f"{module.stem.replace('_', ' ')} {n_lines}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, zorder=3)
    for module, (x, y) in places.items():
        colour = COLOURS[FLOORS.index(module.parent.name)]
        for other in direct_imports(module):
            if other in places and other.parent != module.parent:
                end = places[other]
                axes.plot([x, end[0]], [y, end[1]], color=colour, alpha=0.18, linewidth=0.8)
    axes.set(xlim=(-0.08, 1.02), ylim=(-len(FLOORS) + 0.4, 0.5))
    axes.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")
    figure.savefig(file.with_suffix(".png"), bbox_inches="tight", dpi=120)
    print(f"The floors are drawn in {file}")


if __name__ == "__main__":
    main()
