"""Tasks: prompts with a closed answer set, and the pairs of prompts that are exchanged.

A task crosses subjects with templates. The unit of inference is the subject: templates are repeated
measures of it, and donors are drawn with it. The data lie in `lib/data`: `tasks.csv` (task,
subject, answer, group), `templates.csv` (task, template, text) and `texts.csv`; `kept-back-….csv`
hold the tasks of a criterion that had to be asked of new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.engine.extraction import tokenize
from lib.engine.files import DATA
from lib.engine.models import Decoder
from lib.science.estimate import Untested, generator

FEWEST_SUBJECTS = 10
MOST_SUBJECTS, LARGE = 24, 10**9
"""Subjects of a task on a network of at least so many parameters, where all would take hours."""
N_DONORS = 3
SUBJECT, GROUP = "{subject}", "{group}"
ITEM_COLUMNS = ("task", "subject", "answer", "group")
TEMPLATE_COLUMNS = ("task", "template", "text")
Tables = tuple[pd.DataFrame, pd.DataFrame]
"""Items (task, subject, answer, group) and templates (task, text), as they lie in files."""
BOOK = ("tasks.csv", "templates.csv")
KEPT_BACK = ("kept-back-tasks.csv", "kept-back-templates.csv")
"""Many-to-one tasks of other subjects, of which one criterion alone is asked."""


@dataclass(frozen=True, eq=False)
class Task:
    """The prompts of one task, tokenized for one decoder.

    Attributes:
        name: the task's name.
        prompts: a row per prompt: `template`, `group` ("" where the task has none), `subject`,
            `answer`, `text`, `tokens` (with the special tokens that the tokenizer adds), `unit`
            (index into `subjects`), `subject_start` and `subject_position` (the first and the last
            of the subject's tokens), `answer_index` (index into `answers`).
        subjects: the units `[n_units]`.
        answers: the closed answer set.
        answer_ids: the first token of each answer where it follows a prompt `[n_answers]`.
    """

    name: str
    prompts: pd.DataFrame
    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    answer_ids: np.ndarray

    @property
    def n_prompts(self) -> int:
        """The number of prompts, all templates together."""
        return len(self.prompts)

    @property
    def n_units(self) -> int:
        """The number of subjects."""
        return len(self.subjects)

    @property
    def units(self) -> str:
        """What the units are called in estimates."""
        return f"subjects of {self.name}"

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return self.prompts["tokens"].tolist()

    @property
    def subject_positions(self) -> np.ndarray:
        """The place of the last of each subject's tokens `[n_prompts]`."""
        return self.prompts["subject_position"].to_numpy(dtype=np.int64)

    @property
    def unit(self) -> np.ndarray:
        """The unit of each prompt `[n_prompts]`."""
        return self.prompts["unit"].to_numpy(dtype=np.int64)

    @property
    def answer_index(self) -> np.ndarray:
        """The right answer of each prompt, an index into `answers` `[n_prompts]`."""
        return self.prompts["answer_index"].to_numpy(dtype=np.int64)

    def cells(self, units: np.ndarray | None = None) -> list[np.ndarray]:
        """Return the prompts of each template and group that holds all units, in the units' order.

        Args:
            units: which units, ascending; all by default.
        """
        wanted = np.arange(self.n_units) if units is None else units
        own = self.prompts[self.prompts["unit"].isin(wanted)].sort_values("unit")
        groups = own.groupby(["template", "group"])
        return [cell.index.to_numpy(copy=True) for _, cell in groups if len(cell) == len(wanted)]


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return a table of text with the columns wanted; an empty cell is an empty string.

    Raises:
        ValueError: a column is missing (the message lists those wanted), or there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path.name}; give a CSV with {', '.join(columns)}.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    if missing := [column for column in columns if column not in table]:
        raise ValueError(
            f"{path.name} lacks the columns {', '.join(missing)}; it needs {', '.join(columns)}."
        )
    return table


def load_tasks(
    decoder: Decoder,
    names: Sequence[str] | None = None,
    *,
    own: Tables | None = None,
    files: tuple[str, str] = BOOK,
) -> dict[str, Task | Untested]:
    """Return the book's tasks, or those named, tokenized for `decoder`.

    A task that this tokenizer does not allow is `Untested`, with the reason. On a network of a
    billion parameters or more a task has 24 subjects at most, spread evenly over its answers.

    Args:
        decoder: whose tokenizer to use.
        names: which tasks, all by default.
        own: a reader's own tasks (`lib.evidence.own_tasks`), which follow the book's.
        files: of items and of templates in `lib/data`, the book's by default.

    Raises:
        ValueError: an unknown task (the known ones are listed), a column that is missing, a
            template without its placeholder.
    """
    items = read_csv(DATA / files[0], ITEM_COLUMNS)
    templates = read_csv(DATA / files[1], TEMPLATE_COLUMNS)
    if own is not None:
        items, templates = pd.concat([items, own[0]]), pd.concat([templates, own[1]])
    known = list(dict.fromkeys(items["task"]))
    for name in names or ():
        if name not in known:
            raise ValueError(f"Unknown task {name!r}; choose among {', '.join(known)}.")
    large = sum(weight.numel() for weight in decoder.model.parameters()) >= LARGE
    return {
        name: build_task(
            name,
            few_subjects(own_items) if large else own_items,
            templates.loc[templates["task"] == name, "text"].tolist(),
            decoder,
        )
        for name in names or known
        for own_items in (items[items["task"] == name],)
    }


def few_subjects(items: pd.DataFrame) -> pd.DataFrame:
    """Return the items of at most 24 subjects, every so-many-th in the order of their answers."""
    subjects = items.sort_values("answer", kind="stable")["subject"].unique()
    return items[items["subject"].isin(subjects[spread(len(subjects), MOST_SUBJECTS)])]


def build_task(
    name: str, items: pd.DataFrame, templates: Sequence[str], decoder: Decoder
) -> Task | Untested:
    """Return the task that crosses items with templates, tokenized for `decoder`.

    Subjects and answers may be several tokens; answers are told apart by their first one. A subject
    takes part if its tokens can be found in every template.

    Args:
        name: the task's name.
        items: columns `subject`, `answer` and `group` (an empty string where there is none).
        templates: texts with `{subject}` after a space, `{group}` where items have one, and no
            space at the end: the answer follows after a space.
        decoder: whose tokenizer to use; nothing else of it is used.

    Raises:
        ValueError: no items or templates, a template without its placeholder.
    """
    if items.empty or not len(templates):
        raise ValueError(f"Task {name!r} needs items and templates; one of them is empty.")
    for text in templates:
        check_template(name, text, items)
    items = items[["subject", "answer", "group"]].drop_duplicates()
    rows = pd.concat(
        [items.assign(template=n, pattern=text) for n, text in enumerate(templates)],
        ignore_index=True,
    )
    filled = [t.replace(GROUP, g) for t, g in zip(rows["pattern"], rows["group"], strict=True)]
    before = [text.split(f" {SUBJECT}")[0] for text in filled]
    upto = [f"{text} {s}" for text, s in zip(before, rows["subject"], strict=True)]
    texts = [text.replace(SUBJECT, s) for text, s in zip(filled, rows["subject"], strict=True)]
    whole = [f"{text} {answer}" for text, answer in zip(texts, rows["answer"], strict=True)]
    starts, ends, tokens, answered = (
        tokenize(decoder, part) for part in (before, upto, texts, whole)
    )
    found = [
        len(start) < len(end) < len(prompt) < len(full)
        and end[: len(start)] == start
        and prompt[: len(end)] == end
        and full[: len(prompt)] == prompt
        for start, end, prompt, full in zip(starts, ends, tokens, answered, strict=True)
    ]
    rows = rows.drop(columns="pattern").assign(
        text=texts,
        tokens=pd.Series(tokens),
        subject_start=[len(start) for start in starts],
        subject_position=[len(end) - 1 for end in ends],
        first=[
            full[len(prompt)] if ok else -1
            for full, prompt, ok in zip(answered, tokens, found, strict=True)
        ],
    )
    lost = set(rows["subject"][~np.array(found)])
    rows = rows[~rows["subject"].isin(lost)].reset_index(drop=True)
    n_left = rows["subject"].nunique()
    if n_left < FEWEST_SUBJECTS:
        gone = f"; of {len(lost)} the tokens were not found" if lost else ""
        return Untested(f"{n_left} usable subjects, {FEWEST_SUBJECTS} are needed{gone}")
    ids = rows.groupby("answer", sort=False)["first"].agg(lambda found: sorted(set(found)))
    if len(ids) < 2:
        return Untested(f"every subject has the answer {ids.index[0]!r}")
    taken: dict[int, str] = {}
    for answer, firsts in ids.items():
        if len(firsts) > 1:
            return Untested(f"the answer {answer!r} begins with another token after some prompts")
        if firsts[0] in taken:
            return Untested(
                f"the answers {taken[firsts[0]]!r} and {answer!r} share their first token"
            )
        taken[firsts[0]] = str(answer)
    subjects = tuple(dict.fromkeys(rows["subject"]))
    answers = tuple(taken.values())
    rows = rows.drop(columns="first").assign(
        unit=rows["subject"].map({s: i for i, s in enumerate(subjects)}),
        answer_index=rows["answer"].map({a: i for i, a in enumerate(answers)}),
    )
    return Task(name, rows, subjects, answers, np.array(list(taken), dtype=np.int64))


def spread(n: int, most: int) -> np.ndarray:
    """Return which of n to keep where `most` have to do, first and last among them `[n_kept]`."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Recipients and donors of a task, the same for every model.

    Attributes:
        prompts: recipient and donor of each pair `[n_pairs, 2]`, indices of the task's prompts.
        unit: the recipient's subject `[n_pairs]`.
    """

    prompts: np.ndarray
    unit: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def where(self, kept: np.ndarray) -> "Pairs":
        """Return the pairs that are kept, bool or indices `[n_pairs]`."""
        return Pairs(self.prompts[kept], self.unit[kept])

    def spread(self, most: int) -> np.ndarray:
        """Return which pairs are kept where `most` have to do, spread evenly `[n_kept]`."""
        return spread(len(self), most)

    def thin(self, most: int) -> "Pairs":
        """Return at most so many pairs, spread evenly."""
        return self.where(self.spread(most))


def exchange_pairs(
    task: Task,
    *,
    n_donors: int = N_DONORS,
    groups: Sequence[str] | None = None,
) -> Pairs:
    """Return pairs in which every subject has `n_donors` donors, spread over templates and groups.

    Recipient and donor share template and group and differ in subject and answer. Subjects are laid
    in a circle by answer, in an order drawn from the task's name, and each takes the subjects at
    the same distances: so every subject is a donor as often as a recipient. A subject whose donor
    at some distance does not fit goes without it.

    Args:
        task: the task.
        n_donors: donors of a subject.
        groups: only prompts of these groups.
    """
    rng = generator("pairs", task.name, "")
    prompts = task.prompts
    kept = sorted(set(prompts["group"]) if groups is None else set(groups) & set(prompts["group"]))
    templates = sorted(set(prompts["template"]))
    keys = zip(prompts["template"], prompts["group"], task.unit.tolist(), strict=True)
    place = {key: row for row, key in enumerate(keys)}
    answer_of = {key[1:]: int(task.answer_index[row]) for key, row in place.items()}
    order = rng.permutation(task.n_units)
    pairs: list[tuple[int, int]] = []
    for group in kept:
        circle = [unit for unit in order.tolist() if (group, unit) in answer_of]
        circle.sort(key=lambda unit: answer_of[group, unit])
        answers = [answer_of[group, unit] for unit in circle]
        for number, distance in enumerate(_distances(answers, n_donors)):
            for index, unit in enumerate(circle):
                donor = (index + distance) % len(circle)
                if answers[donor] != answers[index]:
                    template = templates[(index + number) % len(templates)]
                    x, y = (place[template, group, one] for one in (unit, circle[donor]))
                    pairs.append((x, y))
    if len(kept) > 1:  # as many pairs a subject as without groups, spread over them
        pairs = _thin(pairs, task.unit, n_donors)
    chosen = np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)
    return Pairs(chosen, task.unit[chosen[:, 0]])


def _distances(answers: Sequence[int], n_donors: int) -> list[int]:
    """Return how far along a circle of subjects, given by their answers, each donor stands."""
    widest = int(np.bincount(answers).max())
    first, last = widest, len(answers) - widest  # there no subject meets its own answer
    if first > last:
        first, last = 1, len(answers) - 1
    return [first + round((k + 1) * (last - first) / (n_donors + 1)) for k in range(n_donors)]


def _thin(pairs: list[tuple[int, int]], unit: np.ndarray, n_donors: int) -> list[tuple[int, int]]:
    by_unit: dict[int, list[tuple[int, int]]] = {}
    for pair in sorted(pairs):
        by_unit.setdefault(int(unit[pair[0]]), []).append(pair)
    result = []
    for own in by_unit.values():
        result += [own[place] for place in spread(len(own), n_donors)]
    return result


def load_texts(file: str = "texts.csv") -> pd.DataFrame:
    """Return texts: columns `kind`, `context` (what the model reads) and `continuation`.

    `texts.csv` holds the 400 that verdicts rest on; `contexts.csv` those that readers learn from.
    """
    return read_csv(DATA / file, ("kind", "context", "continuation"))


def check_template(name: str, text: str, items: pd.DataFrame) -> None:
    """Raise a ValueError for a template that the prompts of some items cannot be made of."""
    where = f"Task {name!r}: the template {text!r}"
    if text.count(f" {SUBJECT}") != 1 or text.count(SUBJECT) != 1:
        raise ValueError(f"{where} needs {SUBJECT} once, after a space. Add it.")
    if (GROUP in text) != bool((items["group"] != "").all()):
        raise ValueError(f"{where}: {GROUP} belongs in it exactly when every item has a group.")
    if text != text.strip() or text.endswith(SUBJECT):
        raise ValueError(
            f"{where} may neither start or end with a space nor end with {SUBJECT}: the subject's "
            "token and the last token must differ. Reword it."
        )
