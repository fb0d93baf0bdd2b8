"""Prune a model with a metric, or check a model that was pruned so.

Everything that can be wrong is looked at before the weights are read: the metric, the target, the
texts, the folder, the model's architecture, memory and disk. Exit codes: 0 done, 2 a mistake in the
request, 3 interrupted and resumable, 4 the folder does not fit the request.
"""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.utils import logging as transformers_logging
from typer import Option

from evaluation.corpus import (
    Windows,
    check_available,
    check_disjoint,
    check_layout,
    token_windows,
)
from evaluation.perplexity import losses_of, perplexity
from pruning.checkpoint import open_checkpoint
from pruning.folder_store import FolderStore
from pruning.memory import keep_freed_memory
from pruning.metric_file import ResolvedMetric, resolve_metric
from pruning.models import EMBEDDED
from pruning.progress import shown_progress
from pruning.pruner import check_layers, prune
from pruning.recipe import Recipe
from pruning.result.kept import open_statistics
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
from pruning.result.verify import Inspector, verify_result
from pruning.result.work import FolderMismatchError, WorkFolder, check_output_folder, opened
from pruning.spool import DiskSpool, Spool
from pruning.store import all_layers
from pruning.walk import Progress, Texts

EVAL_WINDOWS = 32

SPLITS = {
    EMBEDDED: ("calibration", "report"),
    "wikitext2": ("train", "test"),
    "c4": ("train", "validation"),
    "ptb": ("train", "test"),
}
"""Splits for calibration and for evaluation; a local file has one, which is `all` of it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Text:
    """Windows to cut from a corpus: None of them means as many as there are, up to a limit."""

    corpus: str
    split: str
    windows: int | None
    length: int
    seed: int | None


@dataclass(frozen=True)
class Request:
    """A request whose parts were checked; `calibration` is read only if the metric asks for it."""

    subject: Subject
    chosen: ResolvedMetric
    recipe: Recipe
    calibration: Text
    evaluation: Text
    out: Path
    statistics: Path | None
    plan: Plan

    @property
    def texts(self) -> dict[str, Text]:
        """The texts that are read, by role: no calibration for a metric of W alone."""
        texts = {"calibration": self.calibration, "evaluation": self.evaluation}
        return texts if self.recipe.leaves else {"evaluation": self.evaluation}

    @property
    def warnings(self) -> list[str]:
        """What makes the perplexity say less than it seems to."""
        overlaps = check_disjoint({r: (text.corpus, text.split) for r, text in self.texts.items()})
        return [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]


@app.command()
def prune_model(
    model: Annotated[str | None, Option(help="Hub id, folder, or embedded.")] = None,
    metric: Annotated[str | None, Option(help="Baseline's name, file, or formula.")] = None,
    out: Annotated[Path | None, Option(help="New or empty folder for the result.")] = None,
    sparsity: Annotated[float | None, Option(help="Fraction to remove; default 0.5.")] = None,
    pattern: Annotated[str, Option(help="unstructured, or n:m such as 2:4.")] = "unstructured",
    group: Annotated[str | None, Option(help="row, layer, model; default the metric's.")] = None,
    propagation: Annotated[str, Option(help="one-shot or sequential.")] = "one-shot",
    corpus: Annotated[str | None, Option(help="Calibration text; default embedded.")] = None,
    split: Annotated[str | None, Option(help="Its split, with or without a slice.")] = None,
    samples: Annotated[int, Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int | None, Option(help="Tokens per window; default 512.")] = None,
    seed: Annotated[int, Option(help="Draws the calibration windows.")] = 0,
    eval_corpus: Annotated[str, Option(help="Text that perplexity is measured on.")] = EMBEDDED,
    eval_split: Annotated[str | None, Option(help="Its split.")] = None,
    eval_windows: Annotated[int | None, Option(help="Default: 32, or all.")] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16; auto: the model's.")] = "auto",
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default cuda or cpu.")] = None,
    max_memory: Annotated[str | None, Option(help="Such as 6GiB; default what is free.")] = None,
    statistics: Annotated[
        Path | None, Option(help="Folder to keep statistics in and reuse; or a .pth file of G.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with an unfinished folder.")] = False,
    validate: Annotated[bool, Option("--validate", help="Check and plan; read nothing.")] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
) -> None:
    """Prune a model with a metric and save it, or --verify a folder that was saved so."""
    with _exit_codes(out):
        if verify:
            _verify(verify, model or metric or out)
            return
        chosen = resolve_metric(_required("metric", metric))
        target = resolve_target(pattern, sparsity, group, chosen.criterion.group)
        recipe = Recipe(chosen.criterion.metric, target, propagation)
        recipe.check()
        folder = Path(_required("out", str(out or "")))
        subject = resolve_subject(_required("model", model), dtype, device, seqlen)
        text = _text(corpus or EMBEDDED, split, 0, samples, subject.seqlen, seed)
        eval_text = _text(eval_corpus, eval_split, 1, eval_windows, subject.seqlen, None)
        plan = _plan(subject, recipe, text, eval_text, max_memory)
        check_output_folder(folder, plan.disk, resume)
        request = Request(subject, chosen, recipe, text, eval_text, folder, statistics, plan)
        _say_notes(request, corpus, dtype)
        if validate:
            _validate(request)
        else:
            _apply(request, resume)


def main() -> None:
    """Console entry: runs the command, and says a mistake in its options in one line too."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()  # one progress is enough, ours
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what clusters send before they kill
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        _say_error(error.format_message())
        sys.exit(2)


@contextmanager
def _exit_codes(out: Path | None) -> Iterator[None]:
    """Turn what can go wrong into one line and an exit code."""
    try:
        yield
    except FolderMismatchError as error:
        _say_error(str(error))
        raise typer.Exit(4) from error
    except torch.OutOfMemoryError as error:
        _say_error(f"out of memory: use a smaller --seqlen, or --device cpu ({error})")
        raise typer.Exit(2) from error
    except ValueError as error:
        _say_error(str(error))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        begun = out is not None and out.is_dir() and any(out.iterdir())
        what = f"{str(out)!r} is not finished; " if out else ""
        how = " with --resume" if begun else ""
        print(f"interrupted: {what}run the same command again{how}", file=sys.stderr)
        raise typer.Exit(3) from error


def _say_error(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _required(name: str, value: str | None) -> str:
    if not value:
        raise ValueError(
            f"--{name} is required: give --model, --metric and --out, or --verify alone"
        )
    return value


def _text(
    corpus: str, split: str | None, role: int, windows: int | None, length: int, seed: int | None
) -> Text:
    """Return the windows of a role (0 calibration, 1 evaluation), its corpus and split checked."""
    if windows is not None and windows < 1:
        raise ValueError(f"{('samples', 'eval-windows')[role]} must be at least 1, got {windows}")
    default = SPLITS[corpus][role] if corpus in SPLITS else "all"
    text = Text(corpus, split or default, windows, length, seed)
    check_layout(windows, length, seed)
    check_available(text.corpus, text.split)
    return text


def _plan(
    subject: Subject, recipe: Recipe, text: Text, eval_text: Text, max_memory: str | None
) -> Plan:
    """Return the plan of a request, after a look at the model's shapes."""
    shapes = shapes_of(subject)
    check_layers(shapes, recipe.target)
    calibration = (text.windows or 0) if recipe.leaves else 0
    load = Load(calibration, eval_text.windows or EVAL_WINDOWS, subject.seqlen)
    budget = parse_size(max_memory) if max_memory else None
    return make_plan(shapes, recipe, load, subject, size_of(subject, shapes), budget)


def _say_notes(request: Request, corpus: str | None, dtype: str) -> None:
    """Say what a user may not expect; `corpus` is None where the default was taken."""
    if dtype == "auto" and request.subject.dtype != request.subject.own_dtype:
        print(
            f"note: passes in {request.subject.dtype}, since this CPU has no fast arithmetic for "
            f"{request.subject.own_dtype}; the result keeps the model's dtype",
            file=sys.stderr,
        )
    if "calibration" in request.texts and corpus is None and request.subject.model != EMBEDDED:
        print(
            f"note: calibrating on the {EMBEDDED} text, since the network is never reached "
            "unasked; --corpus c4 or a file of your own suits this model better",
            file=sys.stderr,
        )
    for warning in request.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _validate(request: Request) -> None:
    """Cut the windows that need no hub, and say the plan and what was not checked."""
    for text in request.texts.values():
        if note := check_available(text.corpus, text.split):
            print(note)
        else:
            _windows(request.subject, text)
    for line in request.plan.lines():
        print(line)
    print(f"valid: {_summary(request)}; nothing was loaded or written")


def _apply(request: Request, resume: bool) -> None:
    """Measure, prune, measure again and save, in the walks that the recipe takes."""
    subject = request.subject
    windows = {role: _windows(subject, text) for role, text in request.texts.items()}
    calibration = windows.get("calibration")
    papers = make_recipe(
        subject,
        request.chosen,
        request.recipe.target,
        request.recipe.propagation,
        calibration.provenance if calibration else None,
    )
    checkpoint = open_checkpoint(subject.model, papers["revision"])
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
    store.on_shard = inspector.look  # while it is in the system's cache
    statistics: Spool | None = None
    if request.statistics and request.recipe.leaves:
        statistics = open_statistics(request.statistics, identity, store)
    for line in (f"pruning: {_summary(request)}", *request.plan.lines()):
        print(line, file=sys.stderr)
    with shown_progress() as progress, opened(request.out, identity, resume) as work:
        if not work.is_whole:
            _prune(request, store, windows, work, statistics, progress)
            perplexities = _perplexities(work, windows["evaluation"], subject)
            save_papers(
                *(store, subject.tokenizer, work.result, papers, request.recipe.target),
                *(inspector, perplexities, request.warnings),
            )
            progress("save", 1, 1)
        report = work.publish()
    _print_outcome(request.out, report)


def _prune(
    request: Request,
    store: FolderStore,
    windows: Mapping[str, Windows],
    work: WorkFolder,
    statistics: Spool | None,
    progress: Progress,
) -> None:
    """Walk the blocks; each text's losses are put aside as soon as they are known."""
    tokens = windows["evaluation"].tokens
    known = work.losses()

    def measure(
        name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
    ) -> None:
        stage, total = f"{name} perplexity", len(tokens)
        losses = losses_of(states, logits, tokens, lambda done: progress(stage, done, total))
        work.keep_losses(name, losses.tolist())

    texts = Texts(
        windows["calibration"].tokens if "calibration" in windows else tokens[:0],
        {name: tokens for name in ("dense", "pruned") if name not in known},
        measure,
    )
    if statistics is None and request.plan.statistics_on_disk:
        statistics = DiskSpool(work.statistics)
    states: Spool = DiskSpool(work.states, fresh=True) if request.plan.states_on_disk else {}
    prune(store, request.recipe, texts, states, statistics, progress)
    work.forget_work()


def _perplexities(work: WorkFolder, evaluation: Windows, subject: Subject) -> Perplexities:
    losses = {name: torch.tensor(values).double() for name, values in work.losses().items()}
    return Perplexities(
        perplexity(losses["dense"]),
        perplexity(losses["pruned"]),
        {**evaluation.provenance, "dtype": subject.dtype},
    )


def _verify(folder: Path, other: object) -> None:
    if other:
        raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
    print(f"{folder}: {_counts(verify_result(folder))}; counts and checksums are as reported")


def _windows(subject: Subject, text: Text) -> Windows:
    """Cut a text into windows of tokens that the model knows."""
    arguments = (text.length, text.seed, subject.config.get_text_config().vocab_size)
    cut = token_windows(subject.tokenizer, text.corpus, text.split, text.windows, *arguments)
    if text.windows is None and len(cut.tokens) > EVAL_WINDOWS:
        cut = token_windows(subject.tokenizer, text.corpus, text.split, EVAL_WINDOWS, *arguments)
    return cut


def _summary(request: Request) -> str:
    target, subject = request.recipe.target, request.subject
    group = f" per {target.group_name}" if target.group_name else ""
    return (
        f"{subject.model} ({subject.dtype}, {subject.device}) by {request.chosen.criterion.text}: "
        f"{target.sparsity:.1%}, {target.pattern_text}{group}, {request.recipe.propagation}"
    )


def _counts(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _print_outcome(out: Path, report: Mapping[str, Any]) -> None:
    place = "{corpus}, split {split}, {windows} windows of {length} = {tokens} tokens, {dtype}"
    place = place.format(**report["perplexity_of"])
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    for name in ("dense", "pruned"):
        value = report[f"{name}_perplexity"]
        shown = "not finite" if value is None else f"{value:.4f}"
        print(f"{name + ' perplexity':17} {shown} ({place})")
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: prunevolve-prune --verify {shlex.quote(str(out))}")


if __name__ == "__main__":
    main()
