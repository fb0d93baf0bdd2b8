"""All that can be asked of a pruning: each option once, with its type, default, help and rule.

The command line of `run_prune.py`, recipes and `prunevolve.prune` are made of these classes: a new
option is a new field. None of this imports torch, which takes seconds.
"""

import difflib
import re
import shutil
from collections.abc import Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import typer
import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from prunevolve.command_line import FolderError
from prunevolve.evaluation.text import CORPORA, EMBEDDED, find
from prunevolve.pruning.baselines import find_metric
from prunevolve.pruning.json_file import JsonObject, read_object, read_text
from prunevolve.pruning.model_name import hub_id

_RECIPES = Path(__file__).parent / "recipes"
RECIPES = tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))  # files of options

UNFINISHED = ".unfinished"  # the folder in a result's that holds it until its end

# Options of a recipe that mean nothing once one of these others is given.
_GO_WITH = {
    "revision": {"model"},
    "sparsity": {"pattern"},
    "group": {"metric", "pattern"},
    "split": {"corpus"},
    "share": {"corpus"},
    "by_document": {"corpus"},
    "eval_split": {"eval_corpus"},
}


class Options(BaseModel):
    """Options that are checked; what stands below each is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Method(Options):
    """What is removed, and what becomes of the rest: also arguments of `prunevolve.prune`."""

    sparsity: float | None = Field(None, ge=0, lt=1)
    """Fraction to remove; default 0.5, of neurons 0.2."""
    pattern: str = "unstructured"
    """unstructured, n:m such as 2:4, or neurons."""
    group: str | None = None
    """row, layer or model; default the metric's."""
    skip: str | None = None
    """Leave layers as they are in whose names this regular expression is found."""
    multiple: int = Field(32, ge=1)
    """Of neurons: the new width of an MLP is a multiple of this."""
    propagation: Literal["one-shot", "sequential"] = "one-shot"
    """Statistics of the dense model, or behind pruned blocks."""
    update: Literal["none", "sparsegpt", "reconstruct"] = "none"
    """How the kept weights are updated."""
    seed: int = Field(0, ge=0)
    """Draws the calibration windows."""

    @field_validator("skip")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return pattern


class MethodArguments(TypedDict, total=False):
    """The fields of `Method` as keywords that mypy and editors know; a test compares the two."""

    sparsity: float | None
    pattern: str
    group: str | None
    skip: str | None
    multiple: int
    propagation: Literal["one-shot", "sequential"]
    update: Literal["none", "sparsegpt", "reconstruct"]
    seed: int


class Measurement(Options):
    """What is measured of a model, and how: the options that `--evaluate` takes."""

    model: str | None = None
    """Hub id, folder, or embedded."""
    revision: str | None = None
    """Branch, tag or commit of a hub's model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to compute in; auto is the model's."""
    device: str | None = None
    """cpu, cuda, cuda:1; default cuda or cpu."""
    seqlen: int | None = None
    """Tokens per window; default 512, or 256 for embedded."""
    bos: bool | None = None
    """Start windows with bos; default as the tokenizer does."""
    eval_corpus: list[str] | None = None
    """Text to measure on, default embedded; repeat for others."""
    eval_split: list[str] | None = None
    """Its split; one per corpus."""
    eval_windows: Annotated[int, Field(ge=1, strict=False)] | Literal["all"] | None = None
    """Windows of each text, or all; default 32 at most."""
    zero_shot: list[str] | None = None
    """Tasks of lm-eval, such as rte,arc_easy, or task files."""

    @property
    def tasks(self) -> list[str]:
        """The zero-shot tasks."""
        return [name.strip() for names in self.zero_shot or [] for name in names.split(",")]


class Request(Measurement, Method):
    """A pruning as it is asked for."""

    metric: str | None = None
    """A named metric, a file, a run folder, or a formula."""
    corpus: list[str] | None = None
    """Calibration text, default embedded; repeat for other kinds."""
    split: list[str] | None = None
    """Its split, with or without a slice; one per corpus."""
    share: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Its share of the windows; one per corpus."""
    by_document: bool = False
    """Draw each window from a single document of a hub's corpus."""
    samples: int = Field(128, ge=1, le=100_000)
    """Calibration windows."""
    out: str | None = None
    """New or empty folder for the result."""
    max_memory: ByteSize | None = None
    """Memory limit, such as 6GiB or 800MB; default all that is free."""
    statistics: str | None = None
    """Folder to keep and reuse statistics in; or a .pth file of G."""

    def deciding(self) -> JsonObject:
        """Return the options that decide a result, by name, JSON-able; None is left out."""
        return self.model_dump(exclude=set(MACHINE), exclude_none=True)


Kind = TypeVar("Kind", bound=Options)

MACHINE = ("out", "device", "max_memory", "statistics")  # do not decide a result


def make(kind: type[Kind], given: JsonObject, source: str) -> Kind:
    """Return options of a kind; raises ValueError, which names their source, if one is wrong."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"{source} has an unknown option {name!r:.40}: {guess}options are "
                f"{', '.join(kind.model_fields)}"
            ) from error
        option, value = name.replace("_", "-"), problem["input"]
        rule = problem["msg"].removeprefix("Value error, ")
        help = str(kind.model_fields[name].description).removesuffix(".")
        raise ValueError(f"{source}: {option} = {value!r:.60}: {rule} ({help})") from error


def over(given: JsonObject, recipe: JsonObject) -> JsonObject:
    """Return options, and those of a recipe where none is given that takes their meaning away."""
    return {
        name: value for name, value in recipe.items() if not given.keys() & _GO_WITH.get(name, ())
    } | given


def read_recipe(argument: str, pattern: str | None) -> JsonObject:
    """Return the options of a recipe.

    It is one of `RECIPES`, a `pruning_recipe.json`, or a YAML file of options, in which those below
    `n_of_m` go over the others under an n:m pattern, the one asked for or the file's.
    """
    path = _RECIPES / f"{argument}.yaml" if argument in RECIPES else Path(argument)
    forms = f"give {', '.join(RECIPES)}, a pruning_recipe.json or a YAML file of options"
    source, is_saved = f"recipe {argument!r}", path.suffix == ".json"
    try:
        given = read_object(path) if is_saved else _read_yaml(path, source, pattern)
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}; {forms}") from error
    if is_saved:
        if not isinstance(given.get("sha256"), dict):
            raise ValueError(f"{source} has no 'sha256': {forms}")
        if given.get("allocation", "uniform") != "uniform":
            raise ValueError(f"{source} has an allocation, which is no longer an option")
        given = {x: given[x] for x in Request.model_fields if x in given and x not in MACHINE}
    make(Request, given, source)
    return given


def _read_yaml(path: Path, source: str, pattern: str | None) -> JsonObject:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source} is no YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{source} must hold options, such as metric: wanda")
    n_of_m = content.pop("n_of_m", {})
    if not isinstance(n_of_m, dict):
        raise ValueError(f"{source}: n_of_m must hold options, got {n_of_m!r:.40}")
    is_n_of_m = ":" in str(pattern or content.get("pattern"))
    return content | (n_of_m if is_n_of_m else {})


def sources(
    prefix: str,
    corpora: Sequence[str] | None,
    splits: Sequence[str] | None,
    shares: Sequence[float] | None = None,
) -> list[tuple[str, str]]:
    """Return corpus and split of each kind of text of the options that begin with a prefix."""
    corpora = corpora or [EMBEDDED]
    for name, given in (("split", splits), ("share", shares)):
        if given and len(given) != len(corpora):
            raise ValueError(
                f"--{prefix}{name} must be given once for each --{prefix}corpus, or not at all: "
                f"got {len(given)} for {len(corpora)}"
            )
    # A local file has a single split.
    defaults = [CORPORA[x].splits[bool(prefix)] if x in CORPORA else "all" for x in corpora]
    return list(zip(corpora, splits or defaults, strict=True))


def check_names(given: Measurement) -> None:
    """Refuse a model, metric or text that is not there, before torch is imported."""
    if given.model:
        hub_id(given.model)
    if isinstance(given, Request):
        if given.metric:
            find_metric(given.metric)
        for corpus, split in sources("", given.corpus, given.split, given.share):
            find(corpus, split)
    for corpus, split in sources("eval-", given.eval_corpus, given.eval_split):
        find(corpus, split)


def check_output_folder(folder: Path, size: int = 0, resume: bool = False) -> None:
    """Check that a folder is empty or can be made, and `size` bytes fit on its disk.

    With `resume` it may be unfinished. It is not made.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    work = folder / UNFINISHED
    disk = shutil.disk_usage(parent)
    free = disk.free + sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    problem = ""
    if folder.is_symlink() and not folder.exists():
        problem = " is a broken link: name a new folder"
    elif not parent.is_dir():
        problem = f": {parent} is a file; name a new folder"
    elif work.is_dir() and not resume:
        problem = f" is unfinished: go on with --resume {folder}, or name a new folder"
    elif not work.is_dir() and parent == folder and any(folder.iterdir()):
        problem = " is not empty: name a new folder"
    elif not disk.total:
        problem = " is on no disk: name a folder on one"
    elif size > free:
        needed, left = (ByteSize(x).human_readable(separator=" ") for x in (size, free))
        problem = f" needs {needed}, and its disk has {left} left: name a folder on another disk"
    if problem:
        raise FolderError(f"out {str(folder)!r}{problem}")


def parameters() -> list[Parameter]:
    """Return the options as parameters of a Typer command, each None where it is not given."""
    listed = []
    for name, field in Request.model_fields.items():
        help = str(field.description)
        if field.default not in (None, False):
            help = f"{help.removesuffix('.')}; default {field.default}."
        # Typer knows no rules, no sizes, and no union of a number and a word.
        plain = {"eval_windows": str, "share": list[float], "max_memory": str}
        kind: Any = plain.get(name, field.annotation)
        shown = "" if field.annotation in (bool, bool | None) else None  # no type for a flag
        option = Annotated[kind | None, typer.Option(help=help, metavar=shown)]
        listed.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option))
    return listed
