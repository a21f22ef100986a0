"""Tables that directives show."""

from docutils import nodes


def table(head: list[str], rows: list[list[list[nodes.Node]]], name: str) -> nodes.Node:
    """Returns a table that scrolls sideways on a narrow screen; `name` is its class."""

    def row_node(cells: list[list[nodes.Node]]) -> nodes.row:
        entries = [nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells]
        return nodes.row("", *entries)

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row_node([[nodes.Text(text)] for text in head]))
    group += nodes.tbody("", *(row_node(row) for row in rows))
    made = nodes.table("", group, classes=[name])
    return nodes.container("", made, classes=["table-scroll"])
