"""The config: every setting, typed, with its unit, range and default. Unknown keys are refused.

`configs.files` reads a file and its `base` into a mapping.
"""

import copy
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from prunevolve.configs.files import (
    BASE,
    FOLDER,
    NO_YAML,
    Keys,
    find,
    read,
    read_yaml,
    without_replaced,
)

DEFAULT = FOLDER / "embedded.yaml"
"""The experiment that runs when no config is named; it needs no network and no other file."""

MOST_TOKENS = 2**24
"""Most tokens in the windows of a text: 128 MiB of ids, 8,192 windows of 2,048."""

MAX_TREE_DEPTH = 8
"""Highest depth of a bred tree; the root has depth 0. Most reach `search.max_size` before."""

Dtype = Literal["float32", "bfloat16", "float16"]

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _can_be_a_path(text: str) -> str:
    """Refuse what no file system accepts as a path, since looking it up would raise OSError."""
    if len(text) > 4096 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("must have at most 255 bytes between slashes, and 4096 characters")
    return text


Place = Annotated[str, AfterValidator(_can_be_a_path)]
"""A name or a path."""

ROLES = ("calibration", "fitness", "selection", "report")
"""The roles of an experiment's four texts."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MixEntry(_Section):
    """One kind of text in a mixture."""

    corpus: Place = Field(
        description="embedded, wikitext2, c4, ptb, or a .txt, .json, .jsonl or .parquet file"
    )
    split: str = Field(description="split and slice, such as validation[:50%]")
    share: float = Field(default=1.0, gt=0, description="relative share of the windows")


class Text(_Section):
    """Token windows of a corpus, or of several kinds of text."""

    corpus: Place | None = Field(
        default=None, description="a single kind of text; the values are those in mix"
    )
    split: str | None = Field(default=None, description="split of the single kind of text")
    mix: list[MixEntry] = Field(default=[], description="several kinds of text, instead of corpus")
    windows: Count | None = Field(
        description="number of windows, at most 2^24 tokens in all; null: all of each text"
    )
    length: int = Field(ge=2, le=MOST_TOKENS, description="tokens per window")
    seed: Seed | None = Field(
        default=None, description="seed of random window starts; null: spread evenly"
    )
    bos: bool | None = Field(
        default=None, description="start windows with bos; null: if the tokenizer does"
    )

    @property
    def parts(self) -> tuple[MixEntry, ...]:
        """The kinds of text; a single one without a mix."""
        if self.mix:
            return tuple(self.mix)
        assert self.corpus and self.split
        return (MixEntry(corpus=self.corpus, split=self.split),)

    @model_validator(mode="after")
    def _check(self) -> "Text":
        if self.mix and (self.corpus or self.split):
            raise ValueError("mix replaces corpus and split, got both")
        if not self.mix and not (self.corpus and self.split):
            raise ValueError("corpus or split is missing: give both, or mix")
        if self.windows is None and self.seed is not None:
            raise ValueError(f"seed must be null if windows is null, got {self.seed}")
        if (self.windows or 1) * self.length > MOST_TOKENS:
            most = MOST_TOKENS // self.length
            raise ValueError(
                f"windows must be at most {most} of {self.length} tokens, got {self.windows}"
            )
        return self


class Selection(Text):
    """The text on which the winner is chosen, perhaps by models that the search does not see."""

    model: Place | list[Place] = Field(
        default=[],
        description="models on which the finalists are measured, at each sparsity and pattern of "
        "the tasks, calibrated on the calibration text; none: those of the tasks",
    )

    @property
    def models(self) -> list[str]:
        """The models; none if the winner is chosen on those of the tasks."""
        return [self.model] if isinstance(self.model, str) else self.model


GroupName = Literal[
    "row",
    "layer",
    "model",
]
"""The comparison groups of `pruning.masks.GROUPS`."""

PATTERN = r"^(unstructured|\d{1,4}:\d{1,4})$"


def implied_sparsity(pattern: str | None) -> float | None:
    """Return the sparsity of an n:m pattern, which keeps n of m weights; None for any other."""
    kept, _, length = (pattern or "").partition(":")
    if not (kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length)):
        return None
    return 1 - int(kept) / int(length)


def _check_sparsity(sparsity: float, pattern: str) -> None:
    implied = implied_sparsity(pattern)
    if implied is not None and not math.isclose(sparsity, implied, abs_tol=0.001):
        raise ValueError(f"sparsity must be {implied:g} with pattern {pattern}, got {sparsity}")


class Pruning(_Section):
    """What each candidate must remove."""

    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="fraction of weights removed; for n:m, 1 - n/m"
    )
    pattern: str = Field(default="unstructured", pattern=PATTERN)
    group: GroupName = Field(default="row", description="comparison group")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "sparsity" not in raw and isinstance(raw.get("pattern"), str):
            implied = implied_sparsity(raw["pattern"])
            return raw if implied is None else {**raw, "sparsity": implied}
        return raw

    @model_validator(mode="after")
    def _check(self) -> "Pruning":
        _check_sparsity(self.sparsity, self.pattern)
        return self


class TaskEntry(_Section):
    """One of several tasks of every candidate; null fields take the experiment's values."""

    model: Place | None = None
    dtype: Dtype | None = None
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: str | None = Field(default=None, pattern=PATTERN)
    weight: float = Field(default=1.0, gt=0, description="relative weight of the task")
    calibration: Text | None = None
    fitness: Text | None = None
    selection: Text | None = None
    report: Text | None = None


class Task(_Section):
    """A task with every field filled in."""

    model: str
    dtype: Dtype
    sparsity: float
    pattern: str
    weight: float = 1.0
    calibration: Text
    fitness: Text
    selection: Text
    report: Text

    @property
    def texts(self) -> dict[str, Text]:
        """The four texts by role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def name(self) -> str:
        """A short name, such as `smollm2-135m 50%`."""
        model, _, _ = self.model.partition("@")  # a revision would be as long as all the rest
        return f"{Path(model).name} {self.removed}"

    @property
    def removed(self) -> str:
        """The sparsity, such as `60%`, or the pattern."""
        return f"{self.sparsity:.0%}" if self.pattern == "unstructured" else self.pattern


Mutation = Literal["node", "factor", "constant"]


def _off_of_yaml(value: Any) -> Any:
    """Return YAML's `off`, which it reads as false, as the word."""
    return "off" if value is False else value


class Search(_Section):
    """The evolutionary loop."""

    seed: Seed = 0
    candidates: Count = Field(default=600, description="children bred, whatever their outcome")
    population: int = Field(default=24, ge=2, le=5000)
    lag: int = Field(
        default=8,
        ge=0,
        le=10**6,
        description="number of previous outcomes a child does not wait for; 0 is the paper's loop",
    )
    primitives: Literal["release", "extended"] = Field(
        default="extended", description="set of operators and leaves that trees are drawn from"
    )
    units: Annotated[Literal["off", "required"], BeforeValidator(_off_of_yaml)] = Field(
        default="required",
        description="required: children under the group model have no units, so that scores of "
        "different layers and models can be compared; see docs/METRICS.md",
    )
    seeds: list[str] = Field(
        default=[],
        description="first candidates: names, formulas, metric files or run folders",
    )
    initial_depth: tuple[int, int] = Field(
        default=(1, 2), description="least and greatest depth of random trees; the root has depth 0"
    )
    max_size: int = Field(default=25, ge=3, le=200, description="most nodes of a tree")
    parents: int = Field(
        default=5,
        ge=2,
        le=10**6,
        description="how many of the best in a random half of the population can be parents",
    )
    crossover: float = Field(default=0.7, ge=0, le=1, description="probability of crossover")
    mutation: float = Field(default=0.6, ge=0, le=1, description="probability of a mutation")
    mutations: list[Mutation] = Field(
        default=["factor", "constant"], min_length=1, description="kinds of mutation"
    )
    crowding: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="masks that differ in a smaller fraction of weights count as one; 0: none do",
    )
    brood: int = Field(
        default=16,
        ge=1,
        le=1000,
        description="children bred per candidate; the one with the most promising mask is kept",
    )
    stages: list[Annotated[int, Field(ge=1, le=10**9)]] = Field(
        default=[2, 4, 8, 16],
        description="window counts at which a candidate may be stopped, ascending; []: none is",
    )

    @model_validator(mode="after")
    def _check(self) -> "Search":
        least, greatest = self.initial_depth
        if not 0 <= least <= greatest <= MAX_TREE_DEPTH:
            raise ValueError(
                "initial_depth must be two numbers in ascending order, from 0 to "
                f"{MAX_TREE_DEPTH}, got {list(self.initial_depth)}"
            )
        if set(self.mutations) == {"constant"} and self.primitives == "release":
            raise ValueError(
                "mutations must have node or factor with primitives release, which has no numbers "
                f"to change, got {self.mutations}"
            )
        if self.stages != sorted(set(self.stages)):
            raise ValueError(f"stages must be ascending window counts, got {self.stages}")
        return self


class Ray(_Section):
    """Where evaluations run."""

    address: str = Field(default="local", description="local, auto, or a cluster's address")
    workers: int | None = Field(
        default=None,
        ge=0,
        le=10**5,
        description="number of workers; null: one per GPU or core; 0: evaluate in this process",
    )
    cpus_per_worker: int = Field(
        default=1, ge=1, le=1024, description="cores per worker, and its torch threads"
    )
    gpus_per_worker: float = Field(default=0, ge=0)
    wait_seconds: float = Field(
        default=300, gt=0, description="how long to wait without any worker before exit 3"
    )
    start_seconds: float = Field(
        default=600, gt=0, description="how long a worker may take to start"
    )


class Config(_Section):
    """One experiment."""

    model: Place = Field(description="embedded, a Hugging Face folder, or a hub id[@revision]")
    dtype: Dtype = "float32"
    calibration: Text
    fitness: Text
    selection: Selection
    report: Text
    allow_test_selection: bool = Field(
        default=False,
        description="allow the report text to overlap another, which biases the result",
    )
    pruning: Pruning = Pruning()
    tasks: list[TaskEntry] = Field(
        default=[],
        description="tasks that make up the fitness, measured in this order, so what is cheap or "
        "tells most first; empty: one task, of model and pruning",
    )
    search: Search = Search()
    low_memory: bool = Field(
        default=False,
        description="hold less beside the model: G and M, which are as large as its weights, in "
        "bfloat16, and no scores, which are then computed again for each task and threshold",
    )
    ray: Ray = Ray()
    tensorboard: bool = Field(
        default=False, description="write event files into the run's folder tensorboard"
    )

    @property
    def all_tasks(self) -> list[Task]:
        """The tasks with every field filled in; the report leads with the first.

        Those on the models of `selection`, which only choose the winner, come last, with weight 0.
        """
        defaults = {
            "model": self.model,
            "dtype": self.dtype,
            "sparsity": self.pruning.sparsity,
            "pattern": self.pruning.pattern,
            **{role: getattr(self, role) for role in ROLES},
        }
        entries = [{k: v for k, v in dict(entry).items() if v is not None} for entry in self.tasks]
        for entry in entries:
            if "sparsity" not in entry and (implied := implied_sparsity(entry.get("pattern"))):
                entry["sparsity"] = implied
        tasks = [Task(**{**defaults, **entry}) for entry in entries or [{}]]
        targets = dict.fromkeys((task.sparsity, task.pattern) for task in tasks)
        return tasks + [
            Task(**{**defaults, "model": model, "sparsity": sparsity, "pattern": pattern}, weight=0)
            for model in self.selection.models
            for sparsity, pattern in targets
        ]

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for number, entry in enumerate(self.tasks):
            if entry.sparsity is not None:
                try:
                    _check_sparsity(entry.sparsity, entry.pattern or self.pruning.pattern)
                except ValueError as error:
                    raise ValueError(f"tasks.{number}.{error}") from error
        return self


def load(config: Path | str | None, overrides: Sequence[str]) -> Config:
    """Load a config and apply `key.path=value` overrides, values read as YAML.

    Args:
        config: A YAML file or the name of a shipped experiment; None for the default.
        overrides: Applied after the config's `base`; of two for one key, the last counts.

    Raises:
        ValueError: If there is no such config, a file is malformed, or a key or value breaks its
            rule. One line names the key, the value and the rule.
    """
    source = DEFAULT if config is None else find(Path(config))
    raw = read(source, inherited=tuple(TaskEntry.model_fields))
    return parse(apply_overrides(raw, overrides), str(source))


def parse(raw: Keys, source: str) -> Config:
    """Validate a mapping as a config; raises ValueError as `load` does."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"config {source}: {_first_problem(error)}") from error


def apply_overrides(raw: Keys, overrides: Sequence[str]) -> Keys:
    """Return a copy of a mapping with `key.path=value` texts applied.

    What the mapping has and an override makes meaningless is dropped; see `files.without_replaced`.

    Raises:
        ValueError: If a text has no `=`, its value is not YAML, or its path leads through a value.
    """
    result = copy.deepcopy(raw)
    paths = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set takes key.path=value, got {override!r}")
        try:
            parsed = read_yaml(value)
        except NO_YAML as error:
            raise ValueError(f"--set {path}: {value[:60]!r} is not a YAML value") from error
        *parents, last = path.split(".")
        section: Any = result
        for above, key in zip(("", *parents), parents, strict=False):
            step = _step(section, key, above, override)
            if isinstance(section, dict):
                section.setdefault(key, {})
            section = section[step]
        if isinstance(section, dict):
            for key in section.keys() - without_replaced(section, {last: parsed}).keys():
                if ".".join([*parents, key]) not in paths:
                    del section[key]
        section[_step(section, last, (parents or [""])[-1], override)] = parsed
    return result


def _step(section: object, key: str, above: str, override: str) -> str | int:
    """Return a part of a path as a key of a mapping, or as an index of a list.

    Raises:
        ValueError: If the value of `above` is neither, or the list has no such index.
    """
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise ValueError(f"--set {override}: {above} is a value and has no keys below it")
    if not key.isdigit() or int(key) >= len(section):
        last = len(section) - 1
        raise ValueError(f"--set {override}: {above} has indices 0 to {last}, not {key}")
    return int(key)


def json_schema() -> Keys:
    """Return the JSON schema of a config file, with which editors complete and check keys.

    It requires no key, since a `base` may have it; `parse` reports missing ones.
    """
    schema = Config.model_json_schema()
    definitions: Keys = schema["$defs"]
    base = {"type": "string", "description": "a config from which missing keys are taken"}
    for section in (schema, *definitions.values()):
        section.pop("required", None)
    for section in (schema, definitions["TaskEntry"]):
        section["properties"] = {BASE: base, **section["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, in the schema's order; `load` can read it."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if path == BASE:  # a file's own base has been resolved and removed
        return "base cannot be given with --set: name the config itself"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
        return f"{path} is an unknown key; {way_out}"
    if problem["type"] == "missing":
        return f"{path} is missing: it has no default"
    rule = problem["msg"].removeprefix("Value error, ")
    return f"{path or 'the config'} = {str(problem['input'])[:60]!r}: {rule}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for key in (key for key in location if isinstance(key, str)):
        annotation = model.model_fields[key].annotation
        # A section is annotated alone, in a list, or with None.
        types = (annotation, *get_args(annotation))
        model = next(t for t in types if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)
