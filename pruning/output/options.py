"""The options that decide a result, as the command line gives them or a recipe has them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pruning.json_file import JsonObject, read_object

_GO_WITH = {
    "model": ("revision",),
    "metric": ("group",),
    "pattern": ("sparsity", "group"),
    "corpus": ("split", "share"),
    "eval_corpus": ("eval_split",),
}
"""Options of a recipe that mean nothing once another one is given on the command line."""

_OF_MEASURING = (
    *("revision", "seqlen", "eval_corpus", "eval_split", "eval_windows", "bos", "dtype"),
    "zero_shot",
)
"""Options that mean something where nothing is pruned."""


@dataclass(frozen=True)
class Options:
    """What decides a result, under the command line's names; None where it was not given."""

    model: str | None = None
    revision: str | None = None
    metric: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    group: str | None = None
    propagation: str | None = None
    corpus: list[str] | None = None
    split: list[str] | None = None
    share: list[float] | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int | None = None
    eval_corpus: list[str] | None = None
    eval_split: list[str] | None = None
    eval_windows: int | None = None
    bos: bool | None = None
    zero_shot: list[str] | None = None
    dtype: str | None = None

    def over(self, recipe: "Options") -> "Options":
        """Return these options, and those of a recipe where none of these was given."""
        mine = self.to_json()
        without = {name for option in mine for name in _GO_WITH.get(option, ())}
        kept = {name: value for name, value in asdict(recipe).items() if name not in without}
        return Options(**{**kept, **mine})

    @property
    def only_measure(self) -> bool:
        """Whether nothing is said about a pruning."""
        return set(self.to_json()) <= set(_OF_MEASURING)

    def to_json(self) -> JsonObject:
        """Return the options that were given, JSON-able."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_recipe(path: Path) -> tuple[Options, Mapping[str, str]]:
    """Return the options in a `pruning_recipe.json` and the sha256 of the files that it made.

    Raises:
        ValueError: If the file is none, or an option in it is of another type.
    """
    from pydantic import TypeAdapter, ValidationError  # here, for it takes a while to import

    try:
        recipe = read_object(path)
    except OSError as error:
        raise ValueError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    if not isinstance(recipe.get("sha256"), dict):
        raise ValueError(f"recipe {str(path)!r} has no 'sha256': give a pruning_recipe.json")
    given = {field.name: recipe[field.name] for field in fields(Options) if field.name in recipe}
    try:
        options = TypeAdapter(Options).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"recipe {str(path)!r}: {place}: {first['msg']}") from error
    return options, recipe["sha256"]
