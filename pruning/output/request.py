"""A pruning request: its options, checked and planned before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from prunevolve.evaluation.windows import Provenance, Text, check_disjoint, share_windows
from prunevolve.evaluation.zero_shot import check_tasks
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import resolve_target
from prunevolve.pruning.methods import make_recipe
from prunevolve.pruning.metric_file import SCHEMA, ResolvedMetric, resolve_metric
from prunevolve.pruning.models import EMBEDDED, hub_id
from prunevolve.pruning.output.folder import check_output_folder
from prunevolve.pruning.output.options import METHODS, Options
from prunevolve.pruning.progress import on_stderr
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.sizes import (
    Plan,
    Work,
    parse_size,
    plan_pruning,
    sizes_of,
    values_of,
    with_whole_model,
)
from prunevolve.pruning.unloaded import UnloadedModel, resolve_model

SAMPLES, EVAL_WINDOWS = 128, 32
"""Calibration windows, and most windows of each text for perplexity, where nothing else is said."""

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
class Request:
    """A checked request.

    Attributes:
        options: As they were given, and with what their names stand for: a hub model's commit, the
            metric's formula and group, the dtype.
        texts: The texts to read, by role: `calibration`, unless the metric needs none, and those of
            `evaluation`.
        statistics: Where statistics are kept; None for nowhere.
        max_memory: The limit, as it was given.
        notes: On choices that a user may not expect.
    """

    options: Options
    model: UnloadedModel
    metric: ResolvedMetric
    recipe: Recipe
    texts: Mapping[str, tuple[Text, ...]]
    out: Path
    statistics: Path | None
    max_memory: str | None
    plan: Plan
    notes: tuple[str, ...]

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
        found_on = self.metric.found_on
        more = [f"plan: the metric was found on {found_on}"] if found_on else []
        return [*self.plan.lines(), *more]

    def asked(self, expected: Mapping[str, str] | None) -> JsonObject:
        """Return what `read_unfinished` reads."""
        statistics = self.statistics and str(self.statistics.absolute())
        return {
            "options": self.options.to_json(),
            "device": self.model.device,
            "max_memory": self.max_memory,
            "statistics": statistics,
            "sha256": expected,
        }

    def papers(self, calibration: Provenance | None) -> JsonObject:
        """Return what `pruning_recipe.json` says before there is a result.

        Args:
            calibration: Where the calibration windows come from; None if there are none.
        """
        # SparseGPT is no formula alone.
        tree = {"tree": self.recipe.metric.to_release_json()}
        return {
            "schema": SCHEMA,
            **self.options.to_json(),
            "group": self.recipe.target.group_name,
            **({} if self.recipe.update.chooses else tree),
            "metric_source": self.metric.source,
            "calibration": dict(calibration) if calibration else None,
            "device": self.model.device,
        }

    def __str__(self) -> str:
        target, options = self.recipe.target, self.options
        parts = [
            f"{target.sparsity:.1%}",
            target.pattern_text + (f" per {target.group_name}" if target.group_name else ""),
            self.recipe.propagation,
        ]
        given = [(name, value) for name, value in options.methods.items() if value != METHODS[name]]
        parts += [f"{name} {value}" for name, value in given]
        model = f"{self.model.name} ({self.model.dtype}, {self.model.device})"
        return f"{model} by {options.metric}: {', '.join(parts)}"


def make_request(
    options: Options,
    out: Path | None,
    device: str | None,
    max_memory: str | None,
    statistics: Path | None,
    resume: bool,
) -> Request:
    """Check a request and plan it without reading any weight.

    Raises:
        ValueError: If an option breaks its rule, or options contradict each other.
        FolderMismatchError: If the result cannot be written to `out`.
    """
    transformers_logging.disable_progress_bar()  # this program shows its own progress
    asked, options = options, options.spelled_out()
    model_name = _given("model", options.model)
    folder = Path(_given("out", str(out or "")))
    metric = resolve_metric(_given("metric", options.metric))
    recipe = _recipe(options, metric)
    with on_stderr().status("reading the model's config and tokenizer"):
        model = resolve_model(
            model_name, options.dtype or "auto", device, options.seqlen, options.revision
        )
    check_layers(model.shapes, recipe.target)
    texts = _texts(options, model.seqlen)
    if not recipe.calibrated:
        del texts["calibration"]
    plan = _plan(model, recipe, texts, max_memory, whole=bool(options.zero_shot))
    check_output_folder(folder, plan.disk, resume)
    with on_stderr().status("reading the list of zero-shot tasks"):
        check_tasks(options.zero_shot or [])
    return Request(
        options=_resolved(asked, model, recipe),
        model=model,
        metric=metric,
        recipe=recipe,
        texts=texts,
        out=folder,
        statistics=statistics if recipe.dense_leaves else None,
        max_memory=max_memory,
        plan=plan,
        notes=tuple(_notes(model, options, calibrated=recipe.calibrated)),
    )


def _recipe(options: Options, metric: ResolvedMetric) -> Recipe:
    pattern, group = options.pattern or "unstructured", metric.criterion.group
    methods = options.methods
    return make_recipe(
        metric.criterion.metric,
        resolve_target(pattern, options.sparsity, options.group, group),
        options.propagation or "one-shot",
        methods["update"],
        methods["allocation"],
        methods["refine"],
        own_masks=options.metric == SPARSEGPT,
        seed=options.seed or 0,
    )


def _given(name: str, value: str | None) -> str:
    if not value:
        raise ValueError(
            f"--{name} is required: give --model, --metric and --out, --recipe and --out, or "
            "--verify or --evaluate"
        )
    return value


def _texts(options: Options, seqlen: int) -> dict[str, tuple[Text, ...]]:
    """Return the texts for the statistics and to measure perplexity on, checked, by role."""
    samples = SAMPLES if options.samples is None else options.samples
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    seed, by_document = options.seed or 0, bool(options.protocol)
    texts = [
        Text(corpus, split, samples, seqlen, seed, options.bos, by_document)
        for corpus, split in _places("", options.corpus, options.split, options.share)
    ]
    calibration = share_windows(texts, options.share or [1.0] * len(texts))
    for text in calibration:
        text.check()
    return {"calibration": calibration, "evaluation": evaluation_texts(options, seqlen)}


def evaluation_texts(options: Options, seqlen: int) -> tuple[Text, ...]:
    """Return the texts to measure perplexity on, checked.

    Args:
        seqlen: Tokens in a window.

    Raises:
        ValueError: If an option breaks its rule.
    """
    windows = None if options.eval_windows == "all" else options.eval_windows
    if windows is not None and windows < 1:
        raise ValueError(f"eval-windows must be all, or at least 1; got {windows}")
    most = None if options.protocol or options.eval_windows == "all" else EVAL_WINDOWS
    texts = tuple(
        Text(*place, windows, seqlen, None, options.bos, most=most)
        for place in _places("eval-", options.eval_corpus, options.eval_split)
    )
    for text in texts:
        text.check()
    return texts


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
    if bad := [share for share in shares or [] if share <= 0]:
        raise ValueError(f"--share must be above 0, got {bad[0]:g}")
    defaults = [SPLITS[corpus][bool(prefix)] if corpus in SPLITS else "all" for corpus in corpora]
    return list(zip(corpora, splits or defaults, strict=True))


def _plan(
    model: UnloadedModel,
    recipe: Recipe,
    texts: Mapping[str, tuple[Text, ...]],
    max_memory: str | None,
    whole: bool,
) -> Plan:
    calibrated = sum(text.windows or 0 for text in texts.get("calibration", ()))
    all_windows = TEST_TOKENS // model.seqlen
    evaluated = sum(text.windows or text.most or all_windows for text in texts["evaluation"])
    work = Work(
        model.dtype,
        model.own_dtype,
        recipe.leaves,
        calibration=(calibrated, model.seqlen),
        evaluation=(evaluated, model.seqlen),
        values=values_of(recipe.metric),
        trains=recipe.training is not None,
    )
    sizes = sizes_of(model.shapes, work)
    budget = parse_size(max_memory) if max_memory else None
    plan = plan_pruning(sizes, recipe, model.file_size, model.device, budget)
    return with_whole_model(plan, sizes) if whole else plan


def _resolved(options: Options, model: UnloadedModel, recipe: Recipe) -> Options:
    """Return options that mean the same on another machine, later; a protocol stays a name."""
    name, revision = hub_id(model.name) or (model.name, None)
    target = recipe.target
    return replace(
        options,
        model=name,
        revision=revision,
        metric=SPARSEGPT if recipe.update.chooses else recipe.metric.text,
        sparsity=target.sparsity,
        pattern=target.pattern_text,
        group=target.group_name,
        propagation=recipe.propagation,
        **options.methods,
        seqlen=None if options.protocol else model.seqlen,
        dtype=model.dtype,
    )


def _notes(model: UnloadedModel, options: Options, calibrated: bool) -> list[str]:
    """Return notes on choices that a user may not expect."""
    notes: list[str] = []
    if model.name == EMBEDDED:
        return notes
    if options.dtype in (None, "auto") and model.dtype != model.own_dtype:
        notes.append(
            f"computing in {model.dtype}, since this CPU has no fast arithmetic for "
            f"{model.own_dtype}; the result keeps the model's dtype"
        )
    if calibrated and options.corpus is None:
        notes.append(
            f"calibrating on the {EMBEDDED} text, which needs no download; --corpus c4 or a file "
            "of your own suits this model better"
        )
    return notes
