"""The config: every setting, typed, with its unit, range and default. Unknown keys are refused.

`configs.files` reads a file and its `base` into a mapping.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from prunevolve.configs.files import FOLDER, Keys, apply_overrides, find, read

# The experiment that runs when no config is named; it needs no network and no other file.
DEFAULT = FOLDER / "embedded.yaml"

MOST_TOKENS = 2**24  # in the windows of a text: 128 MiB of ids, 8,192 windows of 2,048
MAX_TREE_DEPTH = 8  # of a bred tree, its root at 0; most reach `search.max_size` before

Dtype = Literal["float32", "bfloat16"]  # float16 is too narrow for gradients

Count = Annotated[int, Field(ge=1, le=10**9)]
Depth = Annotated[int, Field(ge=0, le=MAX_TREE_DEPTH)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0)]
Sparsity = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, Field(pattern=r"^(unstructured|neurons|\d{1,4}:\d{1,4})$")]


def _listed(value: object) -> object:
    return value if value is None or isinstance(value, list) else [value]


# In a file each may be a single value.
Names = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Shares = Annotated[
    list[Share] | None, BeforeValidator(_listed, json_schema_input_type=Share | list[Share] | None)
]

ROLES = ("calibration", "fitness", "selection", "report")  # of an experiment's four texts


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Texts(_Section):
    """Token windows of a corpus, or of several, each with its split and share."""

    corpus: Names = Field(min_length=1)
    """Embedded, wikitext2, c4, ptb, or a .txt, .json, .jsonl or .parquet file; or several."""
    split: Names
    """Split and slice of each corpus, such as validation[:50%]."""
    share: Shares = None
    """Relative share of the windows of each corpus; null: equal shares."""
    windows: Count | None
    """Number of windows, at most 2^24 tokens in all; null: all of each text."""
    length: int = Field(ge=2, le=MOST_TOKENS)
    """Tokens per window."""
    seed: Seed | None = None
    """Seed of random window starts; null: spread evenly."""
    bos: bool | None = None
    """Start windows with bos; null: if the tokenizer does."""

    @model_validator(mode="after")
    def _check(self) -> "Texts":
        counts = [len(values) for values in (self.corpus, self.split, self.share or self.corpus)]
        if len(set(counts)) > 1:
            raise ValueError(f"corpus, split and share must have equal lengths, got {counts}")
        most = MOST_TOKENS // self.length
        if (self.windows or 1) > most:
            rule = f"at most {most} of {self.length} tokens"
            raise ValueError(f"windows must be {rule}, got {self.windows}")
        return self


class Selection(Texts):
    """The text on which the winner is chosen, perhaps by models that the search does not see."""

    model: Names = []
    """Models on which the finalists are measured, at each sparsity and pattern of the tasks,
    calibrated on the calibration text; none: those of the tasks."""


# The groups of `pruning.masks.WEIGHTS`.
GroupName = Literal["row", "layer", "model"]


class _Target(_Section):
    @model_validator(mode="before")
    @classmethod
    def _own_sparsity(cls, raw: Any) -> object:
        """Set the sparsity of an n:m pattern, which keeps n of m weights."""
        pattern = raw.get("pattern") if isinstance(raw, dict) else None
        if isinstance(pattern, int) and pattern >= 60:
            # YAML 1.1 reads 2:4 as a number to base 60.
            pattern = f"{pattern // 60}:{pattern % 60}"
        kept, _, length = str(pattern).partition(":")
        if kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length):
            return {**raw, "pattern": pattern, "sparsity": 1 - int(kept) / int(length)}
        if pattern not in (None, "unstructured", "neurons"):
            rule = "unstructured, neurons or n:m with 0 < n < m"
            raise ValueError(f"pattern must be {rule}, got {pattern!r:.40}")
        return raw


class Pruning(_Target):
    """What each candidate must remove."""

    sparsity: Sparsity = 0.5
    """Fraction of weights removed; an n:m pattern sets it to 1 - n/m."""
    pattern: Pattern = "unstructured"
    group: GroupName = "row"
    """Comparison group."""


class Task(_Target):
    """A model to prune, and its texts; in a file, a missing key is the experiment's."""

    model: str
    dtype: Dtype
    sparsity: Sparsity
    pattern: Pattern
    weight: float = Field(default=1.0, gt=0)
    """Relative weight of the task in the fitness."""
    calibration: Texts
    fitness: Texts
    selection: Texts
    report: Texts

    @property
    def texts(self) -> dict[str, Texts]:
        """The four texts by role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def name(self) -> str:
        """A short name, such as `smollm2-135m 50%`, `embedded 2:4` or `embedded neurons 20%`."""
        model, _, _ = self.model.partition("@")  # a revision would be as long as all the rest
        parts = [Path(model).name]
        parts += [self.pattern] * (self.pattern != "unstructured")
        parts += [f"{self.sparsity:.0%}"] * (":" not in self.pattern)
        return " ".join(parts)


# YAML reads `off` as false.
Units = Annotated[
    Literal["off", "required"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Search(_Section):
    """The evolutionary loop."""

    seed: Seed = 0
    candidates: Count = 64
    """Children bred, whatever their outcome."""
    hours: float | None = Field(default=None, gt=0)
    """Hours since the run began after which none is bred any more; what then is under way is
    evaluated, and the winner chosen and measured."""
    population: int = Field(default=24, ge=2, le=5000)
    lag: int = Field(default=8, ge=0, le=10**6)
    """Number of previous outcomes a child does not wait for; 0 is the paper's loop."""
    primitives: Literal["release", "extended"] = "extended"
    """Release: whole trees are varied; extended: the factors of products of powers."""
    terminals: list[str] | None = Field(default=None, min_length=1)
    """Terminals to draw from; null: W, G and X, and with the extended set V, H and M, too."""
    units: Units = "required"
    """Required: children under the group model have no units, so that scores of different layers
    and models can be compared; see docs/METRICS.md."""
    seeds: list[str] = []
    """First candidates: names, formulas, metric files or run folders."""
    initial_depth: tuple[Depth, Depth] = (1, 2)
    """Least and greatest depth of random trees, or of those in factors; the root has depth 0."""
    max_size: int = Field(default=25, ge=3, le=200)
    """Most nodes of a tree of the release's set; a product of the extended one has few factors."""
    parents: int = Field(default=5, ge=2, le=10**6)
    """How many of the best in a random half of the population can be parents."""
    crossover: float = Field(default=0.7, ge=0, le=1)
    """Probability of crossover, of trees of the release's set; products of factors have none."""
    mutation: float = Field(default=0.6, ge=0, le=1)
    """Probability of a mutation, of trees; a product's child always has one."""
    stages: list[Count] = [2, 4, 8, 16]
    """Window counts at which a candidate may be stopped, ascending; []: none is."""

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if self.initial_depth[0] > self.initial_depth[1]:
            raise ValueError(f"initial_depth must ascend, got {list(self.initial_depth)}")
        if self.stages != sorted(set(self.stages)):
            raise ValueError(f"stages must be ascending window counts, got {self.stages}")
        return self


class Ray(_Section):
    """Where evaluations run."""

    address: str = Field(default="local", pattern=r"^(local|auto|.+:\d+)$")
    """Local, auto, or a cluster's host:port."""
    workers: int | None = Field(default=None, ge=0, le=10**5)
    """Number of workers; null: one per GPU or core; 0: evaluate in this process."""
    cpus_per_worker: int = Field(default=1, ge=1, le=1024)
    """Cores per worker, and its torch threads."""
    gpus_per_worker: float = Field(default=0, ge=0)
    wait_seconds: float = Field(default=300, gt=0)
    """How long to wait without any worker before exit 3."""
    start_seconds: float = Field(default=600, gt=0)
    """How long a worker may take to start."""


class Config(_Section):
    """One experiment."""

    model: str
    """Embedded, a Hugging Face folder, or a hub id[@revision]."""
    dtype: Dtype = "float32"
    calibration: Texts
    fitness: Texts
    selection: Selection
    report: Texts
    allow_test_selection: bool = False
    """Allow the report text to overlap another, which biases the result."""
    pruning: Pruning = Pruning()
    tasks: list[Task] = []
    """What makes up the fitness, measured in this order, so what is cheap or tells most first; the
    report leads with the first. None: one task, of model and pruning."""
    search: Search = Search()
    low_memory: bool = False
    """Hold less beside the model: G and M, which are as large as its weights, in bfloat16, and no
    scores, which are then computed again for each task and threshold."""
    ray: Ray = Ray()
    tensorboard: bool = False
    """Write event files into the run's folder tensorboard."""

    @model_validator(mode="before")
    @classmethod
    def _complete_tasks(cls, raw: object) -> object:
        """Give each task what it lacks, so that `tasks` is complete, and never empty."""
        if not isinstance(raw, dict) or not isinstance(tasks := raw.get("tasks") or [{}], list):
            return raw
        shared = _shared(raw)
        return {**raw, "tasks": [shared | t if isinstance(t, dict) else t for t in tasks]}


def _shared(raw: Keys) -> Keys:
    """Return what the tasks of a config, as a file has it, take from the experiment."""
    pruning, selection = raw.get("pruning"), raw.get("selection")
    target = Pruning().model_dump() | (pruning if isinstance(pruning, dict) else {})
    shared = {"dtype": "float32"} | target | raw
    if isinstance(selection, dict):
        shared["selection"] = {key: value for key, value in selection.items() if key != "model"}
    return {key: shared[key] for key in Task.model_fields if key in shared}


def load(config: Path | str | None, overrides: Sequence[str]) -> Config:
    """Load a YAML file, a shipped experiment by its name, or the default for None.

    Overrides, `key.path=value` with a value read as YAML, go over it and its `base` in order.
    Raises ValueError, one line that names key, value and rule.
    """
    source = DEFAULT if config is None else find(Path(config))
    named = f"{source} with --set" if overrides else str(source)
    try:
        return Config.model_validate(apply_overrides(read(source), overrides))
    except ValidationError as error:
        raise ValueError(f"config {named}: {_first_problem(error)}") from error


@contextmanager
def naming(role: str) -> Iterator[None]:
    """Let an error inside the context name a text's role."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, in the schema's order; `load` can read it.

    Tasks have only what is not the experiment's, so that an override of that reaches them.
    """
    raw = config.model_dump(mode="json")
    shared = _shared(raw).items()
    tasks = [dict(x for x in task.items() if x not in shared) for task in raw["tasks"]]
    return yaml.safe_dump({**raw, "tasks": tasks}, sort_keys=False, allow_unicode=True)


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    # An unknown key first: what is missing may stand there under an old or wrong name.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        sections = (Config, Selection, Pruning, Task, Search, Ray)
        keys = {key for section in sections for key in section.model_fields}
        if problem["loc"][0] == "tasks" and problem["loc"][-1] in ("pruning", "search", "ray"):
            return f"{path} is an unknown key: a task takes {', '.join(Task.model_fields)} directly"
        near = difflib.get_close_matches(str(problem["loc"][-1]), keys, n=1)
        way_out = f"did you mean {near[0]}?" if near else "configs/schema.json lists the known ones"
        return f"{path} is an unknown key; {way_out}"
    if problem["type"] == "missing":
        return f"{path} is missing: it has no default"
    rule = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # ours, which name key and value
        return f"{path}: {rule}"
    return f"{path or 'the config'} = {str(problem['input'])[:60]!r}: {rule}"
