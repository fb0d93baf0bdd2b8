"""The options that decide a result, as the command line gives them or a recipe has them."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import yaml

from prunevolve.pruning.baselines import ALLOCATIONS
from prunevolve.pruning.json_file import JsonObject, read_object, read_text

_PUBLISHED: JsonObject = {
    "corpus": ["c4"],
    "split": ["train"],
    "samples": 128,
    "seed": 0,
    "eval_corpus": ["wikitext2"],
    "eval_split": ["test"],
    "bos": False,
}
"""Calibration and evaluation in the code of SparseGPT (arXiv:2301.00774) and Wanda
(arXiv:2306.11695), and in most tables since."""

PROTOCOLS: Mapping[str, JsonObject] = {
    "wanda-2048": {**_PUBLISHED, "seqlen": 2048},  # the context of LLaMA-1
    "wanda-4096": {**_PUBLISHED, "seqlen": 4096},  # the context of LLaMA-2
}
"""What each `--protocol` sets. It also has calibration windows drawn from single documents, and
measures all windows."""

SET_BY_PROTOCOL = (*PROTOCOLS["wanda-2048"], "share", "eval_windows")

_GO_WITH = {
    "protocol": SET_BY_PROTOCOL,
    "model": ("revision",),
    "metric": ("group",),
    "pattern": ("sparsity", "group", "allocation"),
    "corpus": ("split", "share"),
    "eval_corpus": ("eval_split",),
}
"""Options of a recipe that mean nothing once another one is given on the command line."""

METHODS: JsonObject = {"allocation": "uniform", "refine": "none", "update": "none"}
"""The methods around a metric, and what they are where nothing else is said."""

RECIPES: Mapping[str, tuple[JsonObject, JsonObject]] = {
    "fast": (
        {"metric": "directed-snip-wanda", "update": "sparsegpt"},
        {"metric": "sparsegpt"},
    ),
    "best": (
        {"metric": "directed-snip-wanda", "update": "reconstruct"},
        {"metric": "sparsegpt", "update": "reconstruct"},
    ),
}
"""What each named recipe stands for, without a pattern and with n:m, by the measurements in
docs/LOG.md."""

WHY_FAST = "never behind SparseGPT or Wanda where it was measured; --recipe best takes longer"

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
    update: str | None = None
    allocation: str | None = None
    refine: str | None = None
    protocol: str | None = None
    corpus: list[str] | None = None
    split: list[str] | None = None
    share: list[float] | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int | None = None
    eval_corpus: list[str] | None = None
    eval_split: list[str] | None = None
    eval_windows: int | Literal["all"] | None = None
    bos: bool | None = None
    zero_shot: list[str] | None = None
    dtype: str | None = None

    def over(self, recipe: "Options") -> "Options":
        """Return these options, and those of a recipe where none of these was given."""
        mine = self.to_json()
        without = {name for option in mine for name in _GO_WITH.get(option, ())}
        kept = {name: value for name, value in asdict(recipe).items() if name not in without}
        return Options(**{**kept, **mine})

    def spelled_out(self) -> "Options":
        """Return these options, and those that the protocol sets.

        Raises:
            ValueError: If there is no such protocol, or an option that it sets is given.
        """
        if self.protocol is None:
            return self
        if self.protocol not in PROTOCOLS:
            names = ", ".join(PROTOCOLS)
            raise ValueError(f"protocol must be one of {names}; got {self.protocol!r}")
        given = [name for name in SET_BY_PROTOCOL if getattr(self, name) is not None]
        if given:
            option = given[0].replace("_", "-")
            raise ValueError(
                f"--{option} is set by --protocol {self.protocol}: leave out one of the two"
            )
        return replace(self, **PROTOCOLS[self.protocol])

    @property
    def methods(self) -> JsonObject:
        """The methods around the metric, with what they are where nothing is said."""
        return METHODS | {name: value for name, value in self.to_json().items() if name in METHODS}

    @property
    def only_measure(self) -> bool:
        """Whether nothing is said about a pruning."""
        return set(self.to_json()) <= set(_OF_MEASURING)

    def to_json(self) -> JsonObject:
        """Return the options that were given, JSON-able."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_recipe(
    argument: str, pattern: str | None = None
) -> tuple[Options, Mapping[str, str] | None]:
    """Return the options of a recipe, and the sha256 of the files that it made, if it made some.

    Args:
        argument: One of `RECIPES`, a `pruning_recipe.json`, or a YAML file of options.
        pattern: The one that is asked for, which a named recipe goes by.

    Raises:
        ValueError: If it is neither, or an option in it is unknown or of another type.
    """
    if argument in RECIPES:
        has_pattern = pattern not in (None, "unstructured")
        return Options(**RECIPES[argument][has_pattern]), None
    path = Path(argument)
    known = f"give {', '.join(RECIPES)}, a pruning_recipe.json or a YAML file of options"
    try:
        if path.suffix in (".yaml", ".yml"):
            return _validated(path, _read_yaml(path)), None
        recipe = read_object(path)
    except OSError as error:
        raise ValueError(
            f"recipe {argument!r} cannot be read: {error.strerror}; {known}"
        ) from error
    if not isinstance(recipe.get("sha256"), dict):
        raise ValueError(f"recipe {argument!r} has no 'sha256': {known}")
    given = {field.name: recipe[field.name] for field in fields(Options) if field.name in recipe}
    if given.get("allocation", "uniform") not in ALLOCATIONS:
        given["allocation"] = argument  # its shares stand in the recipe itself
    return _validated(path, given), recipe["sha256"]


def read_unfinished(asked: Path) -> tuple[Options, JsonObject]:
    """Return the options that an unfinished run was given, and what else it was told.

    Args:
        asked: The file in its folder.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        told = read_object(asked)
    except OSError as error:
        out = str(asked.parent.parent)
        raise ValueError(f"{out!r} has no unfinished pruning: {error.strerror}") from error
    return _validated(asked, told.pop("options", {})), told


def _read_yaml(path: Path) -> JsonObject:
    """Return what is in a YAML file of options, its keys checked."""
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"recipe {str(path)!r} is no YAML: {error}") from error
    names = [field.name for field in fields(Options)]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"recipe {str(path)!r} must hold options, such as metric: wanda")
    if unknown := [key for key in content if key not in names]:
        near = difflib.get_close_matches(str(unknown[0]), names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"recipe {str(path)!r} has an unknown option {unknown[0]!r:.40}: {guess}options are "
            f"{', '.join(names)}"
        )
    return content


def _validated(path: Path, given: JsonObject) -> Options:
    from pydantic import TypeAdapter, ValidationError  # here, for it takes a while to import

    try:
        text = json.dumps(given, default=str)
        return TypeAdapter(Options).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"recipe {str(path)!r}: {place}: {first['msg']}") from error
