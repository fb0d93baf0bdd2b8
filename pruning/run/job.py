"""A request, resolved once: checked and planned before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunevolve.evaluation.windows import Provenance, Text, check_disjoint, share_windows
from prunevolve.evaluation.zero_shot import check_tasks
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import resolve_target
from prunevolve.pruning.memory import Plan, Work, plan_pruning
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import EMBEDDED, UnloadedModel, hub_id, resolve_model
from prunevolve.pruning.parse import SCHEMA, resolve_metric
from prunevolve.pruning.progress import on_stderr
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.recipe import Recipe, make_recipe
from prunevolve.pruning.run.options import Measurement, Method, Request
from prunevolve.pruning.run.result import check_output_folder

EVAL_WINDOWS = 32
"""Most windows of each text that are measured where nothing else is said."""

TEST_TOKENS = 350_000
"""Tokens of WikiText-2's test text that a plan reckons with: LLaMA makes fewer than 344,064 of it,
SmolLM2 301,948."""

SPLITS = {
    EMBEDDED: ("calibration", "report"),
    "wikitext2": ("train", "test"),
    "c4": ("train", "validation"),
    "ptb": ("train", "test"),
}
"""Splits for calibration and for evaluation; a local file has a single split, `all`."""

ONE_KIND = (
    "statistics from one kind of text: the model may get worse on all others. Calibrated on "
    "encyclopaedia text alone, a model went from perplexity 5.2 on documentation to 8.7 with wanda "
    "and 20.1 with snip; with half of each kind, to 7.6 and 8.1. Repeat --corpus to add kinds"
)
"""A warning; measured on a model of 1.5B parameters (docs/APPLY.md)."""


@dataclass(frozen=True)
class Job:
    """A request that can be carried out.

    Attributes:
        request: With what its names stand for: a hub model's commit, the metric's formula and
            group, the dtype, the window's length.
        texts: The texts to read, by role: `calibration`, unless the metric needs none, and those of
            `evaluation`.
        notes: On choices that a user may not expect.
        found_on: What a search found the metric on; empty if its file does not say.
    """

    request: Request
    model: UnloadedModel
    recipe: Recipe
    texts: Mapping[str, tuple[Text, ...]]
    out: Path
    plan: Plan
    notes: tuple[str, ...]
    found_on: str

    @property
    def warnings(self) -> list[str]:
        """Reasons to trust the perplexities less."""
        overlaps = check_disjoint(self.texts)
        warnings = [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]
        one_kind = len(self.texts.get("calibration", ())) == 1
        warnings += [ONE_KIND] if one_kind and self.model.name != EMBEDDED else []
        return warnings

    @property
    def plan_lines(self) -> list[str]:
        """The plan in words, and what the metric was found on if its file says so."""
        more = [f"plan: the metric was found on {self.found_on}"] if self.found_on else []
        return [*self.plan.lines(), *more]

    def papers(self, calibration: Provenance | None) -> JsonObject:
        """Return what `pruning_recipe.json` says before there is a result.

        Args:
            calibration: Where the calibration windows come from; None if there are none.
        """
        # SparseGPT is no formula alone.
        tree = {"tree": self.recipe.metric.to_release_json()}
        return {
            "schema": SCHEMA,
            **self.request.deciding(),
            "group": self.recipe.target.group_name,
            **({} if self.recipe.own_masks else tree),
            "calibration": dict(calibration) if calibration else None,
            "device": self.model.device,
        }

    def __str__(self) -> str:
        target, request = self.recipe.target, self.request
        parts = [
            f"{target.sparsity:.1%}",
            target.pattern_text + (f" per {target.group_name}" if target.group_name else ""),
            request.propagation,
        ]
        methods = {name: getattr(request, name) for name in ("update", "allocation", "refine")}
        parts += [f"{name} {x}" for name, x in methods.items() if x not in ("none", "uniform")]
        model = f"{self.model.name} ({self.model.dtype}, {self.model.device})"
        return f"{model} by {request.metric}: {', '.join(parts)}"


def make_job(request: Request, resume: bool) -> Job:
    """Check a request and plan it without reading any weight.

    Raises:
        ValueError: If an option breaks its rule, or options contradict each other.
        FolderMismatchError: If the result cannot be written to `out`.
    """
    for name in ("model", "out", "metric"):
        if not getattr(request, name):
            raise ValueError(
                f"--{name} is required: give --model, --metric and --out, --recipe and --out, or "
                "--verify or --evaluate"
            )
    metric = resolve_metric(str(request.metric))
    recipe = recipe_of(request, metric.criterion, own_masks=request.metric == SPARSEGPT)
    with on_stderr().status("reading the model's config and tokenizer"):
        model = resolve_model(
            str(request.model), request.dtype, request.device, request.seqlen, request.revision
        )
    check_layers(model.shapes, recipe.target)
    texts = {
        "calibration": calibration_texts(request, model.seqlen),
        "evaluation": evaluation_texts(request, model.seqlen),
    }
    for text in (text for of_role in texts.values() for text in of_role):
        text.check()
    if not (recipe.dense_leaves or recipe.follows):
        del texts["calibration"]
    evaluated = [x.windows or x.most or TEST_TOKENS // model.seqlen for x in texts["evaluation"]]
    work = Work(
        model.shapes,
        recipe,
        model.dtype,
        model.own_dtype,
        calibration=(request.samples if "calibration" in texts else 0, model.seqlen),
        evaluation=(sum(evaluated), model.seqlen),
    )
    whole = bool(request.tasks)
    plan = plan_pruning(work, model.file_size, model.device, request.max_memory, whole)
    out = Path(str(request.out))
    check_output_folder(out, plan.disk, resume)
    with on_stderr().status("reading the list of zero-shot tasks"):
        check_tasks(request.tasks)
    notes = tuple(_notes(model, request, "calibration" in texts))
    resolved = _resolved(request, model, recipe)
    return Job(resolved, model, recipe, texts, out, plan, notes, metric.found_on)


def recipe_of(method: Method, criterion: Criterion, own_masks: bool) -> Recipe:
    """Return the recipe of a method with a metric; raises as `make_recipe`."""
    return make_recipe(
        criterion.metric,
        resolve_target(method.pattern, method.sparsity, method.group, criterion.group),
        method.propagation,
        method.update,
        method.allocation,
        method.refine,
        own_masks=own_masks,
        seed=method.seed,
    )


def calibration_texts(request: Request, seqlen: int) -> tuple[Text, ...]:
    """Return the texts for the statistics."""
    samples, seed, bos = request.samples, request.seed, request.bos
    texts = [
        Text(corpus, split, samples, seqlen, seed, bos, request.by_document)
        for corpus, split in _places("", request.corpus, request.split, request.share)
    ]
    return share_windows(texts, request.share or [1.0] * len(texts))


def evaluation_texts(request: Measurement, seqlen: int) -> tuple[Text, ...]:
    """Return the texts to measure perplexity on, in windows of `seqlen` tokens."""
    windows = None if request.eval_windows == "all" else request.eval_windows
    most = None if request.eval_windows == "all" else EVAL_WINDOWS
    return tuple(
        Text(corpus, split, windows, seqlen, bos=request.bos, most=most)
        for corpus, split in _places("eval-", request.eval_corpus, request.eval_split)
    )


def _places(
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
    defaults = [SPLITS[corpus][bool(prefix)] if corpus in SPLITS else "all" for corpus in corpora]
    return list(zip(corpora, splits or defaults, strict=True))


def _resolved(request: Request, model: UnloadedModel, recipe: Recipe) -> Request:
    """Return a request that means the same on another machine, later."""
    name, revision = hub_id(model.name) or (model.name, None)
    target = recipe.target
    return request.model_copy(
        update={
            "model": name,
            "revision": revision,
            "metric": SPARSEGPT if recipe.own_masks else recipe.metric.text,
            "sparsity": target.sparsity,
            "pattern": target.pattern_text,
            "group": target.group_name,
            "seqlen": model.seqlen,
            "dtype": model.dtype,
            "device": model.device,
        }
    )


def _notes(model: UnloadedModel, request: Request, calibrated: bool) -> list[str]:
    """Return notes on choices that a user may not expect."""
    notes: list[str] = []
    if model.name == EMBEDDED:
        return notes
    if request.dtype == "auto" and model.dtype != model.own_dtype:
        notes.append(
            f"computing in {model.dtype}, since this CPU has no fast arithmetic for "
            f"{model.own_dtype}; the result keeps the model's dtype"
        )
    if calibrated and request.corpus is None:
        notes.append(
            f"calibrating on the {EMBEDDED} text, which needs no download; --corpus c4 or a file "
            "of your own suits this model better"
        )
    return notes
