"""How the book was computed: a file beside the results, and the table that a page shows of it."""

import json

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.displays import table
from lib.engine.files import write_atomically
from lib.evidence.records import run_facts, run_file


class RunFacts(SphinxDirective):
    """Show what `lib.evidence.records.run_facts` says of this build, a row for each fact."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        facts = json.loads(run_file().read_text(encoding="utf-8"))
        rows = [[name.replace("_", " "), str(value)] for name, value in facts.items()]
        return [table(["What", "Value"], rows, "run-facts")]


def write_facts(app: Sphinx) -> None:
    """Write the facts before any page is read."""
    text = json.dumps(run_facts(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(run_file(), text)


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("run-facts", RunFacts)
    app.connect("builder-inited", write_facts)
