"""All that can be asked of a pruning: each option once, with its type, default, help and rule.

The command line of `run_prune.py`, recipes and `prunevolve.prune` are made of `Request`: a new
option is a new field. None of this imports torch, which takes seconds.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import typer
import yaml

from prunevolve.evaluation.sources import EMBEDDED, HUB_CORPORA
from prunevolve.pruning.baselines import (
    ALLOCATIONS,
    NAMED,
    PROPAGATIONS,
    REFINEMENTS,
    SPARSEGPT,
    UPDATES,
)
from prunevolve.pruning.json_file import JsonObject, read_object, read_text

_RECIPES = Path(__file__).parent / "recipes"

RECIPES = tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))
"""Names of the recipes that are shipped: files of options."""

WHY_FAST = "never behind SparseGPT or Wanda where it was measured; --recipe best takes longer"

DTYPES = ("auto", "float32", "bfloat16", "float16")

_METRICS = [*NAMED, SPARSEGPT]

Part = Literal["model", "method", "calibration", "measuring", "machine"]
"""What an option is about. Those about the machine do not decide a result."""


class Rule(NamedTuple):
    """What a value must be, in words that follow `must be`, and as a test."""

    text: str
    holds: Callable[[Any], bool]


def _one_of(names: Iterable[str]) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


def _at_least(least: int) -> Rule:
    return Rule(f"at least {least}", lambda value: value >= least)


class Option(NamedTuple):
    """What an option is, beside its type and its default.

    Attributes:
        values: Those that a shell offers.
        goes_with: Options: where one of them is given, this one of a recipe means nothing.
    """

    part: Part
    help: str
    values: Iterable[str] = ()
    rule: Rule | None = None
    goes_with: tuple[str, ...] = ()


_TEXTS = [EMBEDDED, *HUB_CORPORA]
_ROUNDS = Rule("all, or at least 1", lambda value: value == "all" or value >= 1)
_FRACTION = Rule("in [0, 1)", lambda value: 0 <= value < 1)
_POSITIVE = Rule("above 0", lambda shares: min(shares) > 0)


@dataclass(frozen=True)
class Request:
    """A pruning as it is asked for.

    Raises:
        ValueError: If a value breaks its rule.
    """

    model: Annotated[str | None, Option("model", "Hub id, folder, or embedded.", [EMBEDDED])] = None
    revision: Annotated[
        str | None,
        Option("model", "Branch, tag or commit of a hub's model.", goes_with=("model",)),
    ] = None
    dtype: Annotated[
        str, Option("model", "Dtype to compute in; auto is the model's.", DTYPES, _one_of(DTYPES))
    ] = "auto"
    metric: Annotated[
        str | None,
        Option("method", "A named metric, a file, a run folder, or a formula.", _METRICS),
    ] = None
    sparsity: Annotated[
        float | None,
        Option("method", "Fraction to remove; default 0.5.", (), _FRACTION, ("pattern",)),
    ] = None
    pattern: Annotated[
        str, Option("method", "unstructured, or n:m such as 2:4.", ["unstructured", "2:4", "4:8"])
    ] = "unstructured"
    group: Annotated[
        str | None,
        Option(
            "method",
            "row, layer or model; default the metric's.",
            ["row", "layer", "model"],
            goes_with=("metric", "pattern"),
        ),
    ] = None
    propagation: Annotated[
        str,
        Option(
            "method",
            "Statistics of the dense model (one-shot), or behind pruned blocks (sequential).",
            PROPAGATIONS,
            _one_of(PROPAGATIONS),
        ),
    ] = "one-shot"
    update: Annotated[
        str,
        Option("method", "Change what stays: sparsegpt or reconstruct.", UPDATES, _one_of(UPDATES)),
    ] = "none"
    allocation: Annotated[
        str,
        Option(
            "method", "Who loses: uniform, owl or a JSON file.", ALLOCATIONS, None, ("pattern",)
        ),
    ] = "uniform"
    refine: Annotated[
        str,
        Option("method", "Make masks better: swaps, or swaps:N for N in a row.", REFINEMENTS),
    ] = "none"
    corpus: Annotated[
        list[str] | None,
        Option("calibration", "Calibration text, default embedded; repeat for others.", _TEXTS),
    ] = None
    split: Annotated[
        list[str] | None,
        Option(
            "calibration",
            "Its split, with or without a slice; one per corpus.",
            goes_with=("corpus",),
        ),
    ] = None
    share: Annotated[
        list[float] | None,
        Option(
            "calibration",
            "Its share of the windows; one per corpus.",
            rule=_POSITIVE,
            goes_with=("corpus",),
        ),
    ] = None
    by_document: Annotated[
        bool,
        Option(
            "calibration",
            "Draw each window from a single document of a hub's corpus.",
            goes_with=("corpus",),
        ),
    ] = False
    samples: Annotated[int, Option("calibration", "Calibration windows.", (), _at_least(1))] = 128
    seed: Annotated[int, Option("calibration", "Draws the windows.", (), _at_least(0))] = 0
    seqlen: Annotated[
        int | None, Option("measuring", "Tokens per window; default 512, or 256 for embedded.")
    ] = None
    bos: Annotated[
        bool | None, Option("measuring", "Start windows with bos; default as the tokenizer does.")
    ] = None
    eval_corpus: Annotated[
        list[str] | None,
        Option("measuring", "Text to measure on, default embedded; repeat for others.", _TEXTS),
    ] = None
    eval_split: Annotated[
        list[str] | None,
        Option("measuring", "Its split; one per corpus.", goes_with=("eval_corpus",)),
    ] = None
    eval_windows: Annotated[
        int | Literal["all"] | None,
        Option("measuring", "Windows of each text, or all; default 32 at most.", (), _ROUNDS),
    ] = None
    zero_shot: Annotated[
        list[str] | None,
        Option("measuring", "Tasks of lm-eval, such as rte,arc_easy, or task files, by commas."),
    ] = None
    out: Annotated[str | None, Option("machine", "New or empty folder for the result.")] = None
    device: Annotated[str | None, Option("machine", "cpu, cuda, cuda:1; default cuda or cpu.")] = (
        None
    )
    max_memory: Annotated[
        str | None, Option("machine", "Memory limit, such as 6GiB; default all that is free.")
    ] = None
    statistics: Annotated[
        str | None, Option("machine", "Folder to keep and reuse statistics in; or a .pth of G.")
    ] = None

    def __post_init__(self) -> None:
        for name, about in OPTIONS.items():
            value = getattr(self, name)
            if value is not None and about.rule and not about.rule.holds(value):
                raise ValueError(
                    f"{name.replace('_', '-')} must be {about.rule.text}; got {value!r}"
                )

    @property
    def tasks(self) -> list[str]:
        """The zero-shot tasks."""
        return [name.strip() for names in self.zero_shot or [] for name in names.split(",")]

    def deciding(self) -> JsonObject:
        """Return the options that decide a result, by name, JSON-able; None is left out."""
        values = {name: getattr(self, name) for name in DECIDING}
        return {name: value for name, value in values.items() if value is not None}


_TYPES = {name: get_args(hint) for name, hint in get_type_hints(Request, None, None, True).items()}

OPTIONS: dict[str, Option] = {name: about for name, (_, about) in _TYPES.items()}
"""All options by name."""

DECIDING = tuple(name for name, about in OPTIONS.items() if about.part != "machine")
"""The options that decide a result."""


def of_part(*parts: Part) -> tuple[str, ...]:
    """Return the names of the options about these parts."""
    return tuple(name for name, about in OPTIONS.items() if about.part in parts)


def checked(given: Mapping[str, object], source: str, names: Iterable[str]) -> JsonObject:
    """Return options whose names and types were checked.

    Args:
        source: Where they are from, for an error.
        names: Those that there are.

    Raises:
        ValueError: If one is unknown or has another type.
    """
    from pydantic import TypeAdapter, ValidationError  # here, for it takes a while to import

    names = list(names)
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"{source} has an unknown option {name!r:.40}: {guess}options are "
                f"{', '.join(names)}"
            )
        try:
            TypeAdapter(_TYPES[name][0]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{source}: {name}: {error.errors()[0]['msg']}") from error
    return dict(given)


def over(given: JsonObject, recipe: JsonObject) -> JsonObject:
    """Return options, and those of a recipe where none is given that takes their meaning away."""
    kept = {
        name: recipe[name]
        for name, about in OPTIONS.items()
        if name in recipe and not given.keys() & set(about.goes_with)
    }
    return kept | given


def read_recipe(argument: str, pattern: str | None) -> tuple[JsonObject, Mapping[str, str] | None]:
    """Return the options of a recipe, and the sha256 of the files that it made, if it made some.

    Args:
        argument: One of `RECIPES`, a `pruning_recipe.json`, or a YAML file of options, in which
            those below `n_of_m` go over the others under an n:m pattern.
        pattern: The one that is asked for; None if the recipe says.

    Raises:
        ValueError: If it is neither, or an option in it is unknown or of another type.
    """
    path = _RECIPES / f"{argument}.yaml" if argument in RECIPES else Path(argument)
    known = f"give {', '.join(RECIPES)}, a pruning_recipe.json or a YAML file of options"
    source = f"recipe {argument!r}"
    try:
        if path.suffix in (".yaml", ".yml"):
            content = _read_yaml(path, source)
            n_of_m = content.pop("n_of_m", {})
            if (pattern or content.get("pattern", "unstructured")) != "unstructured":
                content |= n_of_m
            return checked(content, source, DECIDING), None
        recipe = read_object(path)
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}; {known}") from error
    if not isinstance(recipe.get("sha256"), dict):
        raise ValueError(f"{source} has no 'sha256': {known}")
    given = checked({name: recipe[name] for name in DECIDING if name in recipe}, source, DECIDING)
    if given.get("allocation", "uniform") not in ALLOCATIONS:
        given["allocation"] = argument  # its shares stand in the recipe itself
    return given, recipe["sha256"]


def _read_yaml(path: Path, source: str) -> JsonObject:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source} is no YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{source} must hold options, such as metric: wanda")
    return content


def parameters() -> list[inspect.Parameter]:
    """Return the options as parameters of a Typer command, each None where it is not given."""
    listed = []
    for one in fields(Request):
        kind, about = _TYPES[one.name]
        help, parser = about.help, None
        if isinstance(one.default, str | int) and not isinstance(one.default, bool):
            help = f"{help.removesuffix('.')}; default {one.default}."
        if one.name == "eval_windows":
            kind, parser = str, _all_or_number
        option = typer.Option(help=help, parser=parser, autocompletion=_offers(about.values))
        annotation = Annotated[kind | None, option]
        parameter = inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        listed.append(parameter.replace(annotation=annotation))
    return listed


def _offers(values: Iterable[str]) -> Callable[[], list[str]]:
    return lambda: list(values)


def _all_or_number(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.removeprefix("-").isdecimal():
        raise typer.BadParameter(f"must be all or a number, got {text!r}")
    return int(text)
