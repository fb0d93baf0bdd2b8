"""Apply a metric to a model: check a request, plan it, carry it out, and verify the result.

Everything that can be wrong is checked before the weights are read: the metric, the target, the
texts, the folder, the model's architecture, memory and disk.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from command_line import called, raise_on_signals
from evaluation.corpus import Windows, check_disjoint, special_note
from evaluation.mixture import Mixture
from evaluation.options import EVAL_WINDOWS, calibration_text, cut_all, evaluation_texts
from evaluation.perplexity import losses_of, perplexity
from evaluation.sources import HUB_CORPORA
from pruning.checkpoint import Checkpoint, open_checkpoint
from pruning.folder_store import FolderStore
from pruning.metric_file import ResolvedMetric, resolve_metric
from pruning.models import EMBEDDED, linear_layers, source_of
from pruning.names import split_revision
from pruning.progress import Progress, shown_progress, step
from pruning.pruner import check_layers, prune
from pruning.recipe import Recipe
from pruning.result.card import Dataset
from pruning.result.kept import opened_statistics
from pruning.result.options import SAMPLES, Options, read_recipe, required
from pruning.result.plan import Load, Plan, make_plan, parse_size
from pruning.result.request import (
    Subject,
    make_recipe,
    resolve_subject,
    resolve_target,
    shapes_of,
    size_of,
)
from pruning.result.save import Perplexities, save_papers
from pruning.result.verify import RECIPE, Inspector, sampled_zeros, verify_result
from pruning.result.work import REPORT, WorkFolder, check_output_folder, opened
from pruning.spool import DiskSpool, Spool
from pruning.store import all_layers
from pruning.walk import Texts

ONE_KIND = (
    "statistics from one kind of text: the model may get worse on all others. Calibrated on "
    "encyclopaedia text alone, a model went from perplexity 5.2 on documentation to 8.7 with wanda "
    "and 20.1 with snip; with half of each kind, to 7.6 and 8.1. Repeat --corpus to add kinds"
)
"""A warning; measured on a model of 1.5B parameters (docs/APPLY.md)."""

SPARSE = 0.05
"""Fraction of zeros from which a model counts as already pruned; trained weights are rarely 0."""

DATASETS = {name: Dataset(corpus.path, corpus.name) for name, corpus in HUB_CORPORA.items()}
"""Where the named corpora are on the hub, for a model card."""


@dataclass(frozen=True)
class Request:
    """A checked request; `calibration` is read only if the metric needs statistics."""

    subject: Subject
    chosen: ResolvedMetric
    recipe: Recipe
    calibration: Mixture
    evaluation: tuple[Mixture, ...]
    out: Path
    statistics: Path | None
    plan: Plan
    layers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def texts(self) -> dict[str, tuple[Mixture, ...]]:
        """The texts to read, by role; a metric of W alone needs no calibration."""
        texts = {"calibration": (self.calibration,), "evaluation": self.evaluation}
        return texts if self.recipe.leaves else {"evaluation": self.evaluation}

    @property
    def warnings(self) -> list[str]:
        """Reasons to trust the perplexities less."""
        places = {role: [p for t in texts for p in t.places] for role, texts in self.texts.items()}
        overlaps = check_disjoint(places)
        warnings = [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]
        one_kind = self.recipe.leaves and len(self.calibration.parts) == 1
        return [*warnings, ONE_KIND] if one_kind and self.subject.model != EMBEDDED else warnings

    @property
    def options(self) -> Options:
        """The options of this request, with every default filled in."""
        target, (first, *_) = self.recipe.target, self.evaluation
        calibration = self.calibration
        calibration_options: dict[str, Any] = {}
        if self.recipe.leaves:
            calibration_options = {
                "corpus": tuple(part.corpus for part in calibration.parts),
                "split": tuple(part.split for part in calibration.parts),
                "share": tuple(part.share for part in calibration.parts),
                "samples": calibration.windows,
                "seed": calibration.seed,
            }
        model, revision = split_revision(self.subject.model)
        return Options(
            model=model,
            revision=revision,
            metric=self.chosen.criterion.text,
            sparsity=target.sparsity if target.group_name else None,
            pattern=target.pattern_text,
            group=target.group_name,
            propagation=self.recipe.propagation,
            seqlen=self.subject.seqlen,
            eval_corpus=tuple(corpus for text in self.evaluation for corpus, _ in text.places),
            eval_split=tuple(split for text in self.evaluation for _, split in text.places),
            eval_windows=first.windows,
            bos=calibration.bos,
            dtype=self.subject.dtype,
            **calibration_options,
        )

    def __str__(self) -> str:
        target, subject = self.recipe.target, self.subject
        group = f" per {target.group_name}" if target.group_name else ""
        return (
            f"{subject.model} ({subject.dtype}, {subject.device}) by {self.chosen.criterion.text}: "
            f"{target.sparsity:.1%}, {target.pattern_text}{group}, {self.recipe.propagation}"
        )


def make_request(
    options: Options,
    out: Path,
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
    chosen = resolve_metric(required("metric", options.metric))
    pattern = options.pattern or "unstructured"
    target = resolve_target(pattern, options.sparsity, options.group, chosen.criterion.group)
    recipe = Recipe(chosen.criterion.metric, target, options.propagation or "one-shot")
    recipe.check()
    with step("reading the model's config and tokenizer"):
        subject = resolve_subject(options.place, options.dtype or "auto", device, options.seqlen)
    calibration = calibration_text(
        *(options.corpus or [EMBEDDED], options.split or [], options.share or []),
        SAMPLES if options.samples is None else options.samples,
        subject.seqlen,
        options.seed or 0,
        options.bos,
    )
    evaluation = evaluation_texts(
        *(options.eval_corpus or [EMBEDDED], options.eval_split or [], options.eval_windows),
        subject.seqlen,
        options.bos,
    )
    with step("reading the model's shapes"):
        shapes = shapes_of(subject)
    check_layers(shapes, recipe.target)
    load = Load(
        (calibration.windows or 0) if recipe.leaves else 0,
        sum(text.windows or EVAL_WINDOWS for text in evaluation),
        subject.seqlen,
    )
    budget = parse_size(max_memory) if max_memory else None
    plan = make_plan(shapes, recipe, load, subject, size_of(subject, shapes), budget)
    check_output_folder(out, plan.disk, resume)
    return Request(
        *(subject, chosen, recipe, calibration, evaluation, out, statistics, plan),
        tuple(linear_layers(shapes)),
        tuple(_notes(subject, options, bool(recipe.leaves))),
    )


def _notes(subject: Subject, options: Options, calibrated: bool) -> Iterator[str]:
    """Yield notes on choices that a user may not expect."""
    if subject.model == EMBEDDED:
        return
    if options.dtype in (None, "auto") and subject.dtype != subject.own_dtype:
        yield (
            f"computing in {subject.dtype}, since this CPU has no fast arithmetic for "
            f"{subject.own_dtype}; the result keeps the model's dtype"
        )
    if calibrated and options.corpus is None:
        yield (
            f"calibrating on the {EMBEDDED} text, since nothing is downloaded unasked; "
            "--corpus c4 or a file of your own suits this model better"
        )


def validate(request: Request) -> dict[str, Any]:
    """Cut the windows of local texts, and print the plan and what was not checked."""
    _say("note", request.notes)
    unchecked = []
    for texts in request.texts.values():
        for text in texts:
            if notes := text.check():
                print(*notes, sep="\n")
                unchecked += notes
            else:
                _windows(request.subject, [text])
    source = Path(source_of(request.subject.model)[0])
    sparse = _sparse(request, Checkpoint(source)) if source.is_dir() else []
    warnings = [*request.warnings, *sparse]
    _say("warning", warnings)
    plan = request.plan.lines()
    print(*plan, sep="\n")
    print(f"valid: {request}; nothing was loaded or written")
    return {
        "options": request.options.to_json(),
        "plan": plan,
        "not_checked": unchecked,
        "warnings": warnings,
    }


def apply(request: Request, resume: bool, expected: Mapping[str, str] | None) -> dict[str, Any]:
    """Measure, prune, measure again and save, in as few walks as the recipe allows.

    Args:
        expected: sha256 of the files that the result should have, by name, if known.

    Returns:
        What `--json` prints.

    Raises:
        FolderMismatchError: If a folder belongs to another request or cannot be written.
        ValueError: If a text is too short, scores make no mask, or memory runs out.
    """
    subject = request.subject
    _say("note", request.notes)
    with step("reading the texts"):
        windows = {role: _windows(subject, texts) for role, texts in request.texts.items()}
    calibration = windows.get("calibration")
    special = special_note(calibration.tokens, subject.tokenizer) if calibration else None
    papers = make_recipe(
        subject,
        request.chosen,
        request.recipe.target,
        request.recipe.propagation,
        calibration.provenance if calibration else None,
    )
    checkpoint = open_checkpoint(subject.model)
    warnings = [*request.warnings, *_sparse(request, checkpoint), *([special] if special else [])]
    _say("warning", warnings)  # now as well as at the end, which may be hours away
    identity = {
        **{key: papers[key] for key in papers if key not in ("model", "tree", "metric_source")},
        "model": checkpoint.fingerprint(),
        "evaluation": windows["evaluation"].provenance,
    }
    store = FolderStore(
        *(checkpoint, subject.config, subject.dtype, subject.device),
        shards=WorkFolder(request.out).result,
        held=request.plan.held,
    )
    inspector = Inspector(subject.config, all_layers(store), request.recipe.target)
    store.on_shard = inspector.look  # while the shard is in the system's cache
    for line in (f"pruning: {request}", *request.plan.lines()):
        print(line, file=sys.stderr)
    raise_on_signals()
    statistics = request.statistics if request.recipe.leaves else None
    with (
        _out_of_memory_in_one_line(),
        shown_progress() as progress,
        opened_statistics(statistics, identity, store) as kept,
        opened(request.out, identity, resume) as work,
    ):
        if not work.is_whole:
            _prune(request, store, windows, work, kept, progress)
            perplexities = _perplexities(work, windows["evaluation"], subject)
            save_papers(
                *(store, subject.tokenizer, work.result),
                {**papers, "options": request.options.to_json()},
                *(request.recipe.target, inspector, perplexities),
                warnings=warnings,
                datasets=DATASETS,
                on_progress=progress,
            )
        report = work.publish()
    _print_outcome(request.out, report)
    return {
        **_summary(request.out, report),
        **{key: value for key, value in report.items() if key != "layers"},
        "group": request.recipe.target.group_name,
        **_comparison(request.out, expected),
    }


def verify(folder: Path) -> dict[str, Any]:
    """Check a pruned model's folder against its report; return what `--json` prints."""
    with shown_progress() as progress:
        report = verify_result(folder, progress)
    print(f"{folder}: {_counts(report)}; counts and checksums are as reported")
    return _summary(folder, report)


@contextmanager
def _out_of_memory_in_one_line() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory: use a smaller --seqlen, or --device cpu ({error})"
        ) from error


def _say(kind: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr)


def _sparse(request: Request, checkpoint: Checkpoint) -> list[str]:
    """Return a warning if the model was pruned before."""
    zeros = sampled_zeros(checkpoint, request.subject.config, request.layers)
    if zeros < SPARSE:
        return []
    return [
        f"model {request.subject.model!r} is sparse already: about {zeros:.0%} of the weights in "
        "its layers are zero, and count as removed; 'dense' is the model as it is"
    ]


def _windows(subject: Subject, texts: Sequence[Mixture]) -> Windows:
    """Cut texts into windows, whose tokens must be in the model's vocabulary."""
    return cut_all(texts, subject.tokenizer, subject.config.get_text_config().vocab_size)


def _prune(
    request: Request,
    store: FolderStore,
    windows: Mapping[str, Windows],
    work: WorkFolder,
    statistics: Spool | None,
    progress: Progress,
) -> None:
    """Walk the blocks, and save each text's losses as soon as they are known."""
    tokens = windows["evaluation"].tokens
    known_losses = work.losses()

    def measure(
        name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
    ) -> None:
        stage, total = f"{name} perplexity", len(tokens)
        losses = losses_of(states, logits, tokens, lambda done: progress(stage, done, total))
        work.keep_losses(name, losses.tolist())

    texts = Texts(
        windows["calibration"].tokens if "calibration" in windows else tokens[:0],
        {name: tokens for name in ("dense", "pruned") if name not in known_losses},
        measure,
    )
    if statistics is None and request.plan.statistics_on_disk:
        statistics = DiskSpool(work.statistics)
    states: Spool = DiskSpool(work.states, fresh=True) if request.plan.states_on_disk else {}
    prune(store, request.recipe, texts, states, statistics, progress)
    work.forget_work()


def _perplexities(work: WorkFolder, evaluation: Windows, subject: Subject) -> Perplexities:
    losses = {name: torch.tensor(values).double() for name, values in work.losses().items()}
    kinds = torch.tensor(evaluation.kinds)
    return Perplexities(
        perplexity(losses["dense"]),
        perplexity(losses["pruned"]),
        {**evaluation.provenance, "dtype": subject.dtype},
        [
            {
                "corpus": part["corpus"],
                "split": part["split"],
                **{name: perplexity(values[kinds == kind]) for name, values in losses.items()},
            }
            for kind, part in enumerate(evaluation.parts)
        ],
    )


def _counts(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _print_outcome(out: Path, report: Mapping[str, Any]) -> None:
    source = "{corpus}, split {split}, {windows} windows of {length} = {tokens} tokens, {dtype}"
    source = source.format(**report["perplexity_of"])
    _say("warning", report["warnings"])
    for name in ("dense", "pruned"):
        print(f"{name + ' perplexity':17} {_number(report[f'{name}_perplexity'])} ({source})")
    for text in report["by_text"] if len(report["by_text"]) > 1 else []:
        both = ", ".join(f"{name} {_number(text[name])}" for name in ("dense", "pruned"))
        print(f"  of {text['corpus']}, split {text['split']}: {both}")
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: {called('run_prune')} --verify {shlex.quote(str(out))}")


def _summary(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pruned model's paths and counts."""
    layers = report["layers"]
    return {
        "out": str(folder),
        "report": str(folder / REPORT),
        "recipe": str(folder / RECIPE),
        "pattern": report["pattern"],
        "layers": len(layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "weights": sum(layer["size"] for layer in layers),
    }


def _comparison(folder: Path, expected: Mapping[str, str] | None) -> dict[str, Any]:
    """Print whether a result has the files that its recipe names; return that for `--json`."""
    if expected is None:
        return {}
    _, sums = read_recipe(folder / RECIPE)
    differing = sorted(name for name in {*sums, *expected} if sums.get(name) != expected.get(name))
    if differing:
        _say(
            "warning",
            [
                f"{len(differing)} of {len(sums)} files differ from the recipe's, {differing[0]} "
                "first: the model, the texts, the options or the versions are not the same"
            ],
        )
    else:
        print("repeated: all files match the recipe's, byte for byte")
    return {"repeated": not differing}
