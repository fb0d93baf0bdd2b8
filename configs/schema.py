"""The config: every knob, typed, with unit, range and default. Unknown keys are refused.

How a file becomes a mapping of keys, its `base` included, is in `configs.files`.
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
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from configs.files import BASE, FOLDER, find, read
from configs.yaml_text import NO_YAML, read_yaml

DEFAULT = FOLDER / "embedded.yaml"
"""The experiment that runs when no config is named: needs no network and no other file."""

MOST_TOKENS = 2**24
"""Tokens in the windows of a text: 128 MiB of ids, 8,192 windows of 2,048."""

Dtype = Literal["float32", "bfloat16", "float16"]

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _can_be_a_path(text: str) -> str:
    """Refuse what no file system takes as a path; to ask one about it is an error of its own."""
    if len(text) > 4096 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("must have at most 255 bytes between slashes, and 4096 characters")
    return text


Place = Annotated[str, AfterValidator(_can_be_a_path)]
"""The name of something, or a path to it."""

ROLES = ("calibration", "fitness", "selection", "report")
"""What the four texts of an experiment are for."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Section):
    """One kind of text in a mixture."""

    corpus: Place = Field(
        description="embedded, wikitext2, c4, ptb, or a .txt, .jsonl, .parquet file"
    )
    split: str = Field(description="split and slice, such as validation[:50%]")
    share: float = Field(default=1.0, gt=0, description="of the windows, relative")


class Text(_Section):
    """Token windows of a corpus, or of several kinds of text."""

    corpus: Place | None = Field(default=None, description="as in mix, for a single kind of text")
    split: str | None = Field(default=None, description="of the single text")
    mix: list[Part] = Field(default=[], description="several kinds of text, in place of one corpus")
    windows: Count | None = Field(
        description="how many, of at most 2^24 tokens together; null: all of each text"
    )
    length: int = Field(ge=2, le=MOST_TOKENS, description="tokens in a window")
    seed: Seed | None = Field(
        default=None, description="of random window starts; null: spread evenly"
    )
    bos: bool | None = Field(
        default=None, description="windows begin with bos; null: if the tokenizer puts one first"
    )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The kinds of text; one if there is no mixture."""
        if self.mix:
            return tuple(self.mix)
        assert self.corpus and self.split
        return (Part(corpus=self.corpus, split=self.split),)

    @model_validator(mode="after")
    def _check(self) -> "Text":
        if self.mix and (self.corpus or self.split):
            raise ValueError("mix stands in place of corpus and split, got both")
        if not self.mix and not (self.corpus and self.split):
            raise ValueError("corpus or split is missing: give both, or mix")
        if self.windows is None and self.seed is not None:
            raise ValueError(f"seed must be null where windows is null, got {self.seed}")
        if (self.windows or 1) * self.length > MOST_TOKENS:
            raise ValueError(
                f"windows x length must be at most {MOST_TOKENS} tokens, got {self.windows} x "
                f"{self.length}"
            )
        return self


GroupName = Literal[
    "row",
    "layer",
    "model",
]
"""The comparison groups of `pruning.masks.GROUPS`."""

PATTERN = r"^(unstructured|\d{1,4}:\d{1,4})$"


def implied_sparsity(pattern: str | None) -> float | None:
    """Return what an n:m pattern removes: n of m weights stay; None for any other."""
    kept, _, length = (pattern or "").partition(":")
    if not (kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length)):
        return None
    return 1 - int(kept) / int(length)


def _check_sparsity(sparsity: float, pattern: str) -> None:
    implied = implied_sparsity(pattern)
    if implied is not None and not math.isclose(sparsity, implied, abs_tol=0.001):
        raise ValueError(f"sparsity must be {implied:g} with pattern {pattern}, got {sparsity}")


class Pruning(_Section):
    """What each candidate is asked to remove."""

    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="fraction of weights removed; by n:m, 1 - n/m"
    )
    pattern: str = Field(default="unstructured", pattern=PATTERN)
    group: Literal[GroupName, "free"] = Field(
        default="row", description="comparison group; free: bred together with the metric"
    )
    propagation: Literal["one-shot"] = Field(
        default="one-shot", description="statistics of the dense model serve every candidate"
    )

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
    """One of several things that a candidate is asked to do; what is null is the experiment's."""

    model: Place | None = None
    dtype: Dtype | None = None
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: str | None = Field(default=None, pattern=PATTERN)
    weight: float = Field(default=1.0, gt=0, description="relative to the other tasks'")
    calibration: Text | None = None
    fitness: Text | None = None
    selection: Text | None = None
    report: Text | None = None


class Task(_Section):
    """A task with everything filled in."""

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
        """The task in a few words, such as `smollm2-135m 50%`."""
        removed = f"{self.sparsity:.0%}" if self.pattern == "unstructured" else self.pattern
        return f"{Path(self.model).name} {removed}"


class Mutations(_Section):
    """Relative weights of the mutations; they need not add up to 1."""

    node: float = Field(default=1, ge=0)
    subtree: float = Field(default=1, ge=0)
    hoist: float = Field(default=1, ge=0)
    insert: float = Field(default=1, ge=0)
    factor: float = Field(default=0, ge=0, description="a subtree times, or over, a small new one")
    constant: float = Field(
        default=1, ge=0, description="tuning of a number; unused by primitives without numbers"
    )


class Search(_Section):
    """The evolutionary loop."""

    seed: Seed = 0
    candidates: Count = Field(default=400, description="children bred, whatever became of them")
    population: int = Field(default=50, ge=2, le=5000)
    lag: int = Field(
        default=8,
        ge=0,
        le=10**6,
        description="outcomes a child does not wait for; 0 is the paper's loop",
    )
    primitives: Literal["release", "extended"] = Field(
        default="release", description="operators and leaves that trees are drawn from"
    )
    min_initial_depth: int = Field(default=2, ge=0, description="of random trees, root at 0")
    max_initial_depth: int = Field(default=4, ge=1)
    max_depth: int = Field(default=8, ge=1, le=16, description="of bred trees, root at 0")
    max_size: int = Field(default=31, ge=3, le=200, description="nodes of a bred tree")
    seeds: list[str] = Field(
        default=[],
        description="bred first: names, texts, metric files, run folders; model:TEXT sets a group",
    )
    pool: float = Field(default=0.5, gt=0, le=1, description="fraction of the population drawn")
    parents: int = Field(
        default=10, ge=2, le=10**6, description="best of the pool that can be parents"
    )
    crossover: float = Field(default=0.7, ge=0, le=1, description="probability")
    mutation: float = Field(default=0.6, ge=0, le=1, description="probability")
    mutations: Mutations = Mutations()
    regroup: float = Field(
        default=0.1, ge=0, le=1, description="probability of another comparison group, if free"
    )
    speciation: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of places, and of children, that comparison groups have each alike",
    )
    parsimony: float = Field(
        default=0.001, ge=0, description="of fitness: within a step of it the smaller wins"
    )
    crowding: float = Field(
        default=0.002, ge=0, lt=1, description="masks that differ in less are one; 0 allows all"
    )
    brood: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="children bred for each candidate; the one of the most promising mask is it",
    )
    patience: Count | None = Field(
        default=None, description="candidates without a better best before a new population"
    )
    objective: Literal["nll", "kl"] = Field(
        default="nll", description="fitness: mean NLL, or KL divergence of dense to pruned"
    )
    aggregate: Literal["mean", "worst", "mean of the two"] = Field(
        default="mean", description="over the relative rises of several tasks and kinds of text"
    )
    simplify: bool = Field(default=True, description="bring trees to canonical form")
    fingerprint: bool = Field(default=True, description="know candidates by their mask, too")
    stages: list[Annotated[int, Field(le=10**9)]] = Field(
        default=[], description="windows after which a candidate may be stopped, ascending"
    )
    slack: float = Field(
        default=0.2,
        ge=0,
        description="a stop after n windows needs slack / sqrt(n) more rise than the threshold's",
    )
    leeway: float | None = Field(
        default=None,
        ge=1,
        description="a free place is for at most so many times the best's relative rise; null: any",
    )
    settle: bool = Field(
        default=False,
        description="who is clearly not the best is measured no further; its fitness is estimated",
    )
    hopeless: float = Field(
        default=100.0,
        gt=0,
        description="a task's rise on a kind of text that always stops, in the best named metric's",
    )
    finalists: Count = Field(default=10, description="metrics scored on the selection text")
    checkpoint_every: Count = Field(default=50, description="candidates between checkpoints")

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if self.min_initial_depth > self.max_initial_depth:
            raise ValueError(
                f"min_initial_depth must not exceed max_initial_depth, got {self.min_initial_depth}"
            )
        if self.max_initial_depth > self.max_depth:
            raise ValueError(
                f"max_initial_depth must not exceed max_depth, got {self.max_initial_depth}"
            )
        if self.brood > 1 and not self.fingerprint:
            raise ValueError(f"brood must be 1 without fingerprint, got {self.brood}")
        if self.stages != sorted(set(self.stages)) or any(stage < 1 for stage in self.stages):
            raise ValueError(f"stages must be ascending window counts, got {self.stages}")
        return self


class Memory(_Section):
    """What a worker holds, and where; the defaults are the fastest and take the most."""

    statistics: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of G and M, which are as large as the weights"
    )
    master: Literal["device", "host"] = Field(
        default="device", description="where the dense copy is that weights are restored from"
    )
    scores: Literal["keep", "recompute"] = Field(
        default="keep",
        description="keep a candidate's scores (fp32) while they are needed again, or recompute",
    )


class Ray(_Section):
    """Where evaluations run."""

    address: str = Field(default="local", description="local, auto, or a cluster's address")
    workers: int | None = Field(
        default=None,
        ge=0,
        le=10**5,
        description="null: one for each GPU or core; 0: in this process",
    )
    cpus_per_worker: int = Field(default=1, ge=1, le=1024, description="also its torch threads")
    gpus_per_worker: float = Field(default=0, ge=0)
    wait_seconds: float = Field(
        default=300, gt=0, description="how long to go on without any worker, then exit 3"
    )
    start_seconds: float = Field(default=600, gt=0, description="what a worker may take to start")
    ship_model: bool = Field(
        default=False, description="workers get the model from the driver, not from its path"
    )
    gpu_memory: float | None = Field(
        default=None, gt=0, description="GiB that a GPU has, where that cannot be looked up"
    )


class Config(_Section):
    """One experiment."""

    model: Place = Field(description="embedded, a Hugging Face folder or a hub id")
    dtype: Dtype = "float32"
    calibration: Text
    fitness: Text
    selection: Text
    report: Text
    allow_test_selection: bool = Field(
        default=False, description="let the report text overlap another: no honest result then"
    )
    pruning: Pruning = Pruning()
    tasks: list[TaskEntry] = Field(
        default=[], description="several as one fitness; none: model and pruning above are it"
    )
    search: Search = Search()
    memory: Memory = Memory()
    ray: Ray = Ray()
    trackers: list[Literal["tensorboard", "mlflow"]] = Field(
        default=[], description="where progress is shown beside the run folder"
    )

    @property
    def all_tasks(self) -> list[Task]:
        """The tasks with everything filled in; the first is what the report leads with."""
        whole = {
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
        return [Task(**{**whole, **entry}) for entry in entries or [{}]]

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
        overrides: Put in after what the config's `base` says, the last of two counts.

    Raises:
        ValueError: If there is no such config, a file is no regular one, too long or malformed, or
            a key or value breaks its rule. One line that names the key, the value and the rule.
    """
    source = DEFAULT if config is None else find(Path(config))
    raw = read(source, inherited=tuple(TaskEntry.model_fields))
    return parse(_without_replaced(apply_overrides(raw, overrides), overrides), str(source))


def parse(raw: dict[str, Any], source: str) -> Config:
    """Validate a mapping as a config; raises ValueError as `load` does."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"config {source}: {_first_problem(error)}") from error


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a mapping with `key.path=value` texts put in.

    Raises:
        ValueError: If a text has no `=`, its value is not YAML, or its path leads through a value.
    """
    result = copy.deepcopy(raw)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set takes key.path=value, got {override!r}")
        try:
            found = read_yaml(value)
        except NO_YAML as error:
            raise ValueError(f"--set {path}: {value[:60]!r} is not a YAML value") from error
        *parents, last = path.split(".")
        section: Any = result
        for above, key in zip(("", *parents), parents, strict=False):
            place = _place(section, key, above, override)
            if isinstance(section, dict):
                section.setdefault(key, {})
            section = section[place]
        section[_place(section, last, (parents or [""])[-1], override)] = found
    return result


def _without_replaced(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Leave out a file's sparsity where an override gives an n:m pattern, which has its own."""
    keys = {override.partition("=")[0] for override in overrides}
    pruning = raw.get("pruning")
    if "pruning.pattern" not in keys or "pruning.sparsity" in keys or not isinstance(pruning, dict):
        return raw
    if implied_sparsity(str(pruning.get("pattern"))) is None:
        return raw
    return {**raw, "pruning": {k: v for k, v in pruning.items() if k != "sparsity"}}


def _place(section: object, key: str, above: str, override: str) -> str | int:
    """Return what a part of a path means: a key of a mapping, or a place in a list.

    Raises:
        ValueError: If what stands `above` is neither, or the list has no such place.
    """
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise ValueError(f"--set {override}: {above} is a value and has no keys below it")
    if not key.isdigit() or int(key) >= len(section):
        raise ValueError(f"--set {override}: {above} has places 0 to {len(section) - 1}, not {key}")
    return int(key)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, by which editors complete and check keys.

    No key is required there, since a `base` may have it; `parse` says what is missing.
    """
    schema = Config.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    base = {"type": "string", "description": "a config that holds where this says nothing"}
    for section in (schema, *definitions.values()):
        section.pop("required", None)
    for section in (schema, definitions["TaskEntry"]):
        section["properties"] = {BASE: base, **section["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, in the order of the schema; `load` reads it back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if path == BASE:  # the file's own is resolved by now
        return "base is read from the file, before --set: name the config itself"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
        return f"{path} is an unknown key; {way_out}"
    if problem["type"] == "missing":
        return f"{path} is missing: it has no default"
    rule = problem["msg"].removeprefix("Value error, ")
    return f"{path or 'the whole'} = {str(problem['input'])[:60]!r}: {rule}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for key in (key for key in location if isinstance(key, str)):
        annotation = model.model_fields[key].annotation
        # A section is named alone, in a list, or with None.
        inside = (annotation, *get_args(annotation))
        model = next(t for t in inside if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)
