"""Print how each architecture of the tests is swept: `PYTHONPATH=. python tests/architectures.py`.

One row each: the path that `sweep_blocks` takes, and the largest difference of any logit from a
full recompute, for edits of the last token and of an earlier one, on ragged prompts. Arguments
choose some by name.
"""

import sys

import numpy as np
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from test_sweeps import PROMPTS, by_full_recompute, full

from lib.engine.models import load_decoder

EARLIER = [3, 2, 3, 2, 1]


def main() -> None:
    print("| architecture | path | last token | earlier token | largest logit |")
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or ARCHITECTURES:
        decoder = load_decoder(tiny_model(name), tokenizer=tiny_tokenizer())
        last = by_full_recompute(decoder, [[len(prompt) - 1] for prompt in PROMPTS]).numpy()
        earlier = by_full_recompute(decoder, [[position] for position in EARLIER]).numpy()
        sweep, logits = full(decoder, "last")
        _, moved = full(decoder, EARLIER)
        cells = [np.abs(logits - last).max(), np.abs(moved - earlier).max(), np.abs(last).max()]
        text = f"{cells[0]:.1e} | {cells[1]:.1e} | {cells[2]:.1f}"
        print(f"| {name} | {sweep.path} | {text} |", flush=True)


if __name__ == "__main__":
    main()
