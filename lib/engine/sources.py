"""Sources: which of lib's files a piece of code runs, found without importing any of it.

What was computed is valid as long as the code that computed it stays as it is: that code, with all
that it imports from lib, and nothing else of lib.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.engine.files import ROOT

PACKAGE = "lib"


def imported_files(*code: Path | str) -> frozenset[Path]:
    """Return the files of lib that some code imports, and those that they import in turn.

    Imports are read from the syntax, those inside functions included; what a module's name is put
    together from at run time is not seen. A name that `lib` re-exports leads to the module which
    defines it, not to all that `lib` re-exports.

    Args:
        *code: modules by their paths, which then are part of the result, or source text.

    Raises:
        ValueError: code that is no Python, or an import from lib of what is not there.
    """
    found = {path.resolve() for path in code if isinstance(path, Path)}
    waiting: list[Path | str] = [*found, *(text for text in code if isinstance(text, str))]
    while waiting:
        new = direct_imports(waiting.pop()) - found
        found |= new
        waiting += new
    return frozenset(found)


def direct_imports(code: Path | str) -> frozenset[Path]:
    """Return the files of lib that a module, or source text, itself imports.

    Raises:
        ValueError: as `imported_files`.
    """
    return frozenset(path for names in _imports(code) for path in _resolve(*names))


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of some files under the repository's root."""
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for path in paths}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


def _imports(code: Path | str) -> Iterator[tuple[str, str | None]]:
    """Yield the module, and the name taken from it if any, of each import of lib in some code."""
    for node in ast.walk(_parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(code, node)
            yield from ((module, alias.name) for alias in node.names if _is_ours(module))


def _parse(code: Path | str) -> ast.Module:
    where = code.name if isinstance(code, Path) else "the code"
    try:
        return ast.parse(code.read_text(encoding="utf-8") if isinstance(code, Path) else code)
    except SyntaxError as error:
        raise ValueError(f"Line {error.lineno} of {where} is no Python: {error.msg}.") from error


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def _absolute(code: Path | str, node: ast.ImportFrom) -> str:
    """Return the full name of the module from which a statement imports."""
    if not node.level or isinstance(code, str):
        return node.module or ""
    package = code.resolve().relative_to(ROOT).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _resolve(module: str, name: str | None) -> Iterator[Path]:
    """Yield the files behind one import: a module, or the one behind what a package passes on."""
    path = ROOT.joinpath(*module.split("."))
    package = path / "__init__.py"
    if path.with_suffix(".py").is_file():
        yield path.with_suffix(".py")
    elif name is not None and ((path / name).is_dir() or (path / f"{name}.py").is_file()):
        yield from _resolve(f"{module}.{name}", None)
    elif package.is_file():
        yield from _behind(package, name) or [package]
    elif name is not None or not path.is_dir():
        what = module if name is None else f"{module}.{name}"
        raise ValueError(f"{what} is imported, but there is no such module in {PACKAGE}.")


def _behind(package: Path, name: str | None) -> list[Path]:
    """Return the files from which a package imports a name; none if it does not."""
    return [
        path
        for node in ast.walk(_parse(package))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if name == (alias.asname or alias.name)
        for path in _resolve(_absolute(package, node), alias.name)
    ]
