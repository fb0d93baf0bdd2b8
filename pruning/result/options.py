"""The options of `run_prune.py` as they were given, or as a recipe has them.

Checked here as far as words alone tell: nothing that takes long is imported.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from plain_files import read_object
from pruning.names import check_hub_model, comes_from_hub, metric_file, with_revision

SAMPLES = 128
"""Calibration windows where nothing else is said."""

RECIPE_BYTES = 2_000_000
"""Longest recipe that is read."""

_GO_WITH = {
    "model": ("revision",),
    "metric": ("group",),
    "pattern": ("sparsity", "group"),
    "corpus": ("split", "share"),
    "eval_corpus": ("eval_split",),
}
"""Options of a recipe that mean nothing once another one is given on the command line."""


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
    corpus: tuple[str, ...] | None = None
    split: tuple[str, ...] | None = None
    share: tuple[float, ...] | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int | None = None
    eval_corpus: tuple[str, ...] | None = None
    eval_split: tuple[str, ...] | None = None
    eval_windows: int | None = None
    bos: bool | None = None
    dtype: str | None = None

    def over(self, recipe: "Options") -> "Options":
        """Return these options, and those of a recipe where none of these was given."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        without = {name for option in mine for name in _GO_WITH.get(option, ())}
        kept = {name: value for name, value in asdict(recipe).items() if name not in without}
        return Options(**{**kept, **mine})

    def check(self) -> None:
        """Check what needs no file and no library, and whether the hub answers if it must.

        Raises:
            ValueError: If model or metric is missing or can be none, or the sparsity is beyond its
                range.
        """
        required("model", self.model)
        metric_file(required("metric", self.metric))
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            percent = 1 < self.sparsity < 100
            guess = f": did you mean {self.sparsity / 100:g}?" if percent else ""
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}{guess}")
        model = required("model", self.model)
        if comes_from_hub(model):
            if self.revision is not None and "@" in model:
                raise ValueError(
                    f"revision must be left out for {model!r}, which names one; "
                    f"got {self.revision!r}"
                )
            check_hub_model(model)
        elif self.revision is not None:
            raise ValueError(
                f"revision must be left out for {self.model!r}, which is not from the hub; "
                f"got {self.revision!r}"
            )

    @property
    def place(self) -> str:
        """The model with its revision, in one name."""
        return with_revision(required("model", self.model), self.revision)

    def to_json(self) -> dict[str, Any]:
        """Return the options that were given, JSON-able."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def required(name: str, value: str | None) -> str:
    """Return an option's value; raises ValueError if it was not given."""
    if not value:
        raise ValueError(
            f"--{name} is required: give --model, --metric and --out, --recipe and --out, or "
            "--verify alone"
        )
    return value


def read_recipe(path: Path) -> tuple[Options, Mapping[str, str]]:
    """Return the options of a `pruning_recipe.json` and the sha256 of the files that it made.

    Raises:
        ValueError: If the file is none, or was altered.
    """
    try:
        recipe = read_object(path, RECIPE_BYTES)
    except OSError as error:
        raise ValueError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    given, sums = recipe.get("options"), recipe.get("sha256")
    if not isinstance(given, dict) or not isinstance(sums, dict):
        raise ValueError(
            f"recipe {str(path)!r} has no 'options' or 'sha256': give a pruning_recipe.json of "
            "this version"
        )
    if unknown := sorted(set(given) - {field.name for field in fields(Options)}):
        raise ValueError(f"recipe {str(path)!r} has the unknown option {unknown[0]!r:.40}")
    return _typed(given, path), sums


def _typed(given: Mapping[str, Any], path: Path) -> Options:
    """Return options from JSON; raises ValueError where one is of another type."""
    from pydantic import TypeAdapter, ValidationError  # here, for it takes a while to import

    try:
        return TypeAdapter(Options).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"recipe {str(path)!r}: {place}: {first['msg']}") from error
