"""Tasks: prompts with a closed answer set, the accuracy gate, pairs of prompts, and the contexts.

A task is a list of items (subject, answer, group) crossed with templates. The data lie in
`lib/data`: `tasks.csv`, `templates.csv` and `contexts.csv`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.store import recall_residuals

DATA = Path(__file__).parents[1] / "data"
GATE_THRESHOLD = 0.8
SUBJECT, GROUP = "{subject}", "{group}"
ITEM_COLUMNS = ("subject", "answer", "group")
PROMPT_COLUMNS = ("template", *ITEM_COLUMNS, "text", "tokens", "subject_position", "answer_index")


@dataclass(frozen=True, eq=False)
class Task:
    """The prompts of one task, tokenized for one decoder.

    Attributes:
        name: the task's name.
        prompts: a row per prompt: `template`, `subject`, `answer`, `group` (empty where the task
            has none), `text`, `tokens` (token ids, with the special tokens that the tokenizer
            adds by default), `subject_position` (index into `tokens`), `answer_index` (into
            `answers`). Within a template, all rows have the same length and subject position.
        answers: the closed answer set, in order of appearance; at least two.
        answer_ids: the token of each answer where it follows a prompt, `[n_answers]`.
    """

    name: str
    prompts: pd.DataFrame
    answers: tuple[str, ...]
    answer_ids: np.ndarray

    def __post_init__(self) -> None:
        """Check that prompts can be paired, answers told apart and positions lined up."""
        name, n_subjects = f"Task {self.name!r}", self.prompts["subject"].nunique()
        if min(n_subjects, len(self.answers)) <= 1:
            raise ValueError(
                f"{name} has {n_subjects} subject(s) and {len(self.answers)} answer(s); recipient "
                "and donor need two of each. Add items."
            )
        if len(set(self.answer_ids.tolist())) != len(self.answers):
            raise ValueError(f"{name}: two answers are the same token. Drop one of them.")
        if (twice := self.prompts["text"].duplicated()).any():
            text = self.prompts["text"][twice].iloc[0]
            raise ValueError(f"{name}: the prompt {text!r} stands twice. Drop one.")
        for template, rows in self.prompts.groupby("template"):
            _check_alignment(f"{name}, template {template}", rows)

    @property
    def n_prompts(self) -> int:
        """The number of prompts, all templates together."""
        return len(self.prompts)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return self.prompts["tokens"].tolist()

    @property
    def subject_positions(self) -> np.ndarray:
        """The position of each prompt's subject, `[n_prompts]`."""
        return self.prompts["subject_position"].to_numpy(dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Gate:
    """Whether a model does a task well enough to be studied on it.

    Attributes:
        task: the task's name.
        accuracy: share of prompts whose closed-set argmax is the answer.
        chance: accuracy of always giving the most frequent answer; 1 / n_answers when all answers
            are equally frequent.
        n: number of prompts.
        correct: which prompts are answered correctly, bool `[n_prompts]`.
        logits: the answers' logits after the last token, `[n_prompts, n_answers]`.
        testable: whether the accuracy reaches the threshold.
        reason: accuracy and chance in words, such as "accuracy 0.09, chance 0.083".
    """

    task: str
    accuracy: float
    chance: float
    n: int
    correct: np.ndarray
    logits: np.ndarray
    testable: bool
    reason: str

    @property
    def predicted(self) -> np.ndarray:
        """The closed-set argmax, index into the task's answers, `[n_prompts]`."""
        choice: np.ndarray = self.logits.argmax(axis=1)
        return choice

    def to_frame(self) -> pd.DataFrame:
        """Return one row: task, accuracy, chance, n, testable, reason."""
        columns = ("task", "accuracy", "chance", "n", "testable", "reason")
        return pd.DataFrame([{column: getattr(self, column) for column in columns}])


def task_names() -> list[str]:
    """Return the names of the book's tasks, in the order of the data file."""
    return list(dict.fromkeys(_read("tasks.csv")["task"].tolist()))


def load_task(name: str, decoder: Decoder, *, drop_multi_token: bool = False) -> Task:
    """Return one of the book's tasks, tokenized for `decoder`; see `build_task`.

    Raises:
        ValueError: no task of that name (the message lists the names), or `build_task` refuses.
    """
    items, templates = _read("tasks.csv"), _read("templates.csv")
    if name not in set(items["task"]):
        raise ValueError(f"Unknown task {name!r}; choose one of: {', '.join(task_names())}.")
    texts = templates.loc[templates["task"] == name, "text"].tolist()
    chosen = items.loc[items["task"] == name, list(ITEM_COLUMNS)]
    return build_task(name, chosen, texts, decoder, drop_multi_token=drop_multi_token)


def build_task(
    name: str,
    items: pd.DataFrame,
    templates: list[str],
    decoder: Decoder,
    *,
    drop_multi_token: bool = False,
) -> Task:
    """Return the task that crosses items with templates, tokenized for `decoder`.

    Tokens are counted where they stand in a prompt, since some tokenizers split a word with a
    leading space differently on its own. Nothing but the tokenizer of `decoder` is used.

    Args:
        name: the task's name.
        items: columns `subject`, `answer` and `group` (an empty string where there is none).
        templates: texts with `{subject}` after a space, `{group}` where items have one, and no
            space at the end: the answer follows after a space.
        decoder: whose tokenizer to use.
        drop_multi_token: leave out items whose subject or answer is not one token, rather than
            refuse them. The answer set shrinks with them.

    Raises:
        ValueError: a template without its placeholder, a subject or answer of several tokens,
            prompts of unequal length in a template, or fewer than two subjects or answers.
    """
    items = items[list(ITEM_COLUMNS)].reset_index(drop=True)
    if items.empty or not templates:
        raise ValueError(f"Task {name!r} needs items and templates; one of them is empty.")
    for number, template in enumerate(templates):
        _check_template(f"Task {name!r}, template {number}", template, items)
    prompts = pd.concat(
        [items.assign(template=number, pattern=text) for number, text in enumerate(templates)],
        ignore_index=True,
    )
    filled = [
        t.replace(GROUP, g) for t, g in zip(prompts["pattern"], prompts["group"], strict=True)
    ]
    prefixes = [text.split(f" {SUBJECT}")[0] for text in filled]
    texts = [text.replace(SUBJECT, s) for text, s in zip(filled, prompts["subject"], strict=True)]
    before, tokens = tokenize(decoder, prefixes), tokenize(decoder, texts)
    subjects = _following(decoder, prefixes, prompts["subject"].tolist(), before)
    answers = _following(decoder, texts, prompts["answer"].tolist(), tokens)
    kept = np.ones(len(prompts), dtype=bool)
    for role, pieces in (("subject", subjects), ("answer", answers)):
        for row in np.flatnonzero([len(piece) != 1 for piece in pieces]):
            if not drop_multi_token:
                raise ValueError(_multi_token(name, role, prompts[role][row], pieces[row], decoder))
            kept &= (prompts[role] != prompts[role][row]).to_numpy()
    prompts = prompts.drop(columns="pattern").assign(
        text=texts, tokens=pd.Series(tokens), subject_position=[len(ids) for ids in before]
    )[kept]
    answer_ids: dict[str, int] = {}
    for answer, row in zip(prompts["answer"], np.flatnonzero(kept), strict=True):
        if answer_ids.setdefault(answer, answers[row][0]) != answers[row][0]:
            raise ValueError(
                f"Task {name!r}: answer {' ' + answer!r} is another token after {texts[row]!r} "
                "than after other prompts. Reword the template."
            )
    order = {answer: index for index, answer in enumerate(answer_ids)}
    prompts = prompts.assign(answer_index=prompts["answer"].map(order))
    return Task(
        name=name,
        prompts=prompts[list(PROMPT_COLUMNS)].reset_index(drop=True),
        answers=tuple(answer_ids),
        answer_ids=np.array(list(answer_ids.values()), dtype=np.int64),
    )


def gate(
    decoder: Decoder,
    task: Task,
    threshold: float = GATE_THRESHOLD,
    *,
    logits: Tensor | None = None,
) -> Gate:
    """Return how often the model's closed-set argmax after the last token is the answer.

    The accuracy is pooled over all templates. Below `threshold` the task is not testable on this
    model, which is a state with its reason, not an error. With `logits`, the prompts' next-token
    logits `[n_prompts, d_vocab]` from an extraction made anyway, the model is not run again.

    Raises:
        ValueError: the model's logits are not finite.
    """
    if logits is None:
        logits = recall_residuals(decoder, task.tokens, logits=True).logits
    assert logits is not None
    closed = logits[:, task.answer_ids.tolist()].numpy()
    if not np.isfinite(closed).all():
        raise ValueError(
            f"{decoder.name}: logits on task {task.name!r} are not finite. Load it in float32."
        )
    predicted = closed.argmax(axis=1)
    truth = task.prompts["answer_index"].to_numpy()
    correct = predicted == truth
    accuracy, chance = float(correct.mean()), float(np.bincount(truth).max() / len(truth))
    return Gate(
        task=task.name,
        accuracy=accuracy,
        chance=chance,
        n=len(truth),
        correct=correct,
        logits=closed,
        testable=accuracy >= threshold,
        reason=f"accuracy {accuracy:.2f}, chance {chance:.3f}",
    )


def ordered_pairs(
    prompts: Task | pd.DataFrame,
    *,
    donors_per_prompt: int | None = None,
    same_answer: bool = False,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Return pairs (recipient, donor) of prompt indices, int `[n_pairs, 2]`, sorted.

    Both prompts share template and group and differ in subject; their answers differ, or agree
    with `same_answer`. With `donors_per_prompt` the choice is deterministic: prompts are laid in
    a circle by answer and each takes the donors at the same distances, spread over the circle.
    A distance at which no prompt meets its own answer makes every prompt a donor once, so up to
    the number of such distances recipients and donors are exactly balanced.

    Args:
        prompts: a task, or a table with `template`, `group`, `subject` and `answer`; indices
            count its rows from 0.
        donors_per_prompt: at most so many donors for a recipient; all if None.
        same_answer: donors of the same answer and another subject, the null of an exchange.
        mask: which prompts may take part, bool `[n_prompts]`; all if None.

    Raises:
        ValueError: `donors_per_prompt` below 1, or a mask of another length.
    """
    table = prompts.prompts if isinstance(prompts, Task) else prompts
    allowed = np.ones(len(table), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if allowed.shape != (len(table),):
        raise ValueError(
            f"The mask has shape {allowed.shape}; {len(table)} prompts need one flag each."
        )
    if donors_per_prompt is not None and donors_per_prompt < 1:
        raise ValueError(
            f"donors_per_prompt is {donors_per_prompt}; give at least 1, or None for all."
        )
    subjects = table["subject"].to_numpy()
    answers = pd.factorize(table["answer"])[0]
    rows_of = table.assign(row=np.arange(len(table)), rank=answers)[allowed].sort_values(
        ["rank", "row"], kind="stable"
    )
    cells = ["template", "group", *(["rank"] if same_answer else [])]
    pairs: list[tuple[int, int]] = []
    for _, cell in rows_of.groupby(cells):
        rows = cell["row"].to_numpy()
        largest = 1 if same_answer else int(np.bincount(answers[rows]).max())
        n_donors = np.zeros(len(rows), dtype=int)
        for distance in _distances(len(rows), largest, donors_per_prompt):
            for index, recipient in enumerate(rows):
                donor = rows[(index + distance) % len(rows)]
                fits = (answers[recipient] == answers[donor]) == same_answer
                full = donors_per_prompt is not None and n_donors[index] >= donors_per_prompt
                if fits and not full and subjects[recipient] != subjects[donor]:
                    pairs.append((int(recipient), int(donor)))
                    n_donors[index] += 1
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def load_contexts(n: int | None = None) -> pd.DataFrame:
    """Return the book's contexts: columns `kind`, `context` and `continuation`.

    With `n` so many of them, the kinds of text in equal parts and each kind spread evenly, since
    its contexts are laid down by their endings. Fewer are always the first of more.

    Raises:
        ValueError: fewer than one asked for, or more than there are.
    """
    table = _read("contexts.csv")
    if n is None:
        return table
    if not 1 <= n <= len(table):
        raise ValueError(f"There are {len(table)} contexts; {n} were asked for.")
    # The place of each context within its kind, halved again and again: any first part is even.
    turn = table.groupby("kind").cumcount().map(lambda place: int(f"{place:012b}"[::-1], 2))
    order = turn.sort_values(kind="stable").index
    return table.loc[order[:n]].reset_index(drop=True)


def _read(file: str) -> pd.DataFrame:
    """Return a data file with every cell a string; an empty cell is an empty string."""
    return pd.read_csv(DATA / file, dtype=str, keep_default_na=False, encoding="utf-8")


def _check_template(where: str, text: str, items: pd.DataFrame) -> None:
    if text.count(f" {SUBJECT}") != 1 or text.count(SUBJECT) != 1:
        raise ValueError(f"{where}: {text!r} needs {SUBJECT} once, after a space. Add it.")
    if (GROUP in text) != bool((items["group"] != "").all()):
        raise ValueError(
            f"{where}: {GROUP} belongs in {text!r} exactly when every item has a group."
        )
    if text != text.strip() or text.endswith(SUBJECT):
        raise ValueError(
            f"{where}: {text!r} may neither start or end with a space nor end with {SUBJECT}; "
            "the subject's token and the last token must differ. Reword it."
        )


def _check_alignment(where: str, rows: pd.DataFrame) -> None:
    lengths = rows["tokens"].map(len)
    for what, values in (
        ("tokens", lengths),
        ("tokens before the subject", rows["subject_position"]),
    ):
        if (odd := (values != values.iloc[0])).any():
            raise ValueError(
                f"{where}: {rows['text'].iloc[0]!r} has {values.iloc[0]} {what}, "
                f"{rows['text'][odd].iloc[0]!r} has {values[odd].iloc[0]}; positions must line up. "
                "Reword the template or drop the item."
            )
    if not 0 < rows["subject_position"].iloc[0] < lengths.iloc[0] - 1:
        raise ValueError(
            f"{where}: the subject is the first or the last token. Reword the template."
        )


def _following(
    decoder: Decoder, starts: list[str], words: list[str], tokens: list[list[int]]
) -> list[list[int]]:
    """Return the tokens that a space and each word add to its start, tokenized in `tokens`."""
    longer = tokenize(
        decoder, [f"{start} {word}" for start, word in zip(starts, words, strict=True)]
    )
    for start, ids, all_ids in zip(starts, tokens, longer, strict=True):
        if all_ids[: len(ids)] != ids:
            raise ValueError(
                f"The tokens of {start!r} change when a word follows, so positions are unknown; "
                "use a tokenizer that neither appends special tokens nor merges across spaces."
            )
    return [all_ids[len(ids) :] for ids, all_ids in zip(tokens, longer, strict=True)]


def _multi_token(name: str, role: str, word: str, ids: list[int], decoder: Decoder) -> str:
    pieces = ", ".join(repr(decoder.tokenizer.decode([token])) for token in ids)
    return (
        f"Task {name!r}: {role} {' ' + word!r} is {len(ids)} tokens with this tokenizer "
        f"({pieces}); {role}s must be 1. Drop it (drop_multi_token=True does) or choose another."
    )


def _distances(n: int, largest: int, n_wanted: int | None) -> list[int]:
    """Return the distances on a circle of `n` in order of preference.

    From `largest` to n - `largest`, the size of the most frequent answer, no row meets its own
    answer; `n_wanted` of these come first, evenly spread, then the rest.
    """
    clean = list(range(largest, n - largest + 1))
    n_first = len(clean) if n_wanted is None else min(n_wanted, len(clean))
    first = [clean[int((index + 0.5) * len(clean) / n_first)] for index in range(n_first)]
    return first + [distance for distance in range(1, n) if distance not in first]
