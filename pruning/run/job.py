"""A request, resolved once: checked and planned before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunevolve.evaluation.windows import Text, check_disjoint, share_windows
from prunevolve.evaluation.zero_shot import check_tasks
from prunevolve.pruning import models
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.masks import Target
from prunevolve.pruning.memory import Plan, plan_pruning
from prunevolve.pruning.model_name import EMBEDDED, hub_id
from prunevolve.pruning.models import UnloadedModel
from prunevolve.pruning.parse import resolve_metric
from prunevolve.pruning.passes import Procedure, procedure_of
from prunevolve.pruning.progress import on_stderr
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.reconstruct import FEW_WINDOWS
from prunevolve.pruning.run.card import way_of
from prunevolve.pruning.run.options import Measurement, Request, check_output_folder, sources
from prunevolve.pruning.run.verify import RECIPE

EVAL_WINDOWS = 32  # most windows of each text that are measured where nothing else is said
# Tokens of WikiText-2's test text that a plan reckons with: LLaMA makes fewer than 344,064 of it,
# SmolLM2 301,948.
TEST_TOKENS = 350_000

# Windows by which an update is judged: half as many as those of the calibration, within these.
LEAST_HELD_BACK, MOST_HELD_BACK = 8, 32

ONE_KIND = (
    "statistics from one kind of text, {}: the model may get worse on all others "
    "(docs/APPLY.md); repeat --corpus to add kinds"
)


# `evaluation`, `calibration` if statistics are needed, `held_back` for the guard of an update.
Texts = Mapping[str, tuple[Text, ...]]


@dataclass(frozen=True)
class Job:
    """A request that can be carried out."""

    # With what its names stand for: a hub model's commit, the metric's formula and group, the
    # dtype, the window's length.
    request: Request
    model: UnloadedModel
    procedure: Procedure
    texts: Texts
    out: Path
    plan: Plan
    plan_lines: list[str]  # the plan in words, and what the metric was found on if its file says so
    warnings: list[str]  # reasons to trust the perplexities less

    def __str__(self) -> str:
        target, request = self.procedure.target, self.request
        group = f" per {target.group_name}" if target.group_name else ""
        way = way_of(request.model_dump())
        parts = [f"{target.sparsity:.1%}", f"{target.pattern_text}{group}", way]
        model = f"{self.model.name} ({self.model.dtype}, {self.model.device})"
        return f"{model} by {request.metric}: {', '.join(parts)}"


def make_job(request: Request, resume: bool) -> Job:
    """Check a request, which needs no `out` for that, and plan it without reading any weight."""
    kept = Path(request.statistics or "")
    if kept.is_file() != (kept.suffix == ".pth"):
        rule = "a folder to keep them in, or a .pth file that is there"
        raise ValueError(f"statistics must be {rule}; got {str(kept)!r}")
    criterion, found_on = resolve_metric(str(request.metric))
    procedure = procedure_of(request, criterion, own_masks=request.metric == SPARSEGPT)
    model = resolve(request, procedure.has_gradients)
    models.skip(model.shapes, request.skip)
    check_layers(model.shapes, procedure.target)
    calibration = calibration_texts(request, model.seqlen)
    evaluation = evaluation_texts(request, model.seqlen)
    for text in calibration + evaluation:
        text.check()
    texts = {"calibration": calibration, "evaluation": evaluation}
    if not (procedure.dense_terminals or procedure.follows):
        del texts["calibration"]
    if procedure.guarded:
        others = {"samples": held_back_count(request.samples), "seed": request.seed + 1}
        texts["held_back"] = calibration_texts(request.model_copy(update=others), model.seqlen)
    plan = plan_pruning(
        model,
        procedure,
        request.samples if "calibration" in texts else 0,
        held_back_count(request.samples) * procedure.guarded,
        sum(x.windows or x.most or TEST_TOKENS // model.seqlen for x in evaluation),
        request.max_memory,
        loads=bool(request.tasks),
    )
    out = Path(request.out or "")
    if request.out:
        check_output_folder(out, plan.disk, resume)
    with on_stderr().status("reading the list of zero-shot tasks"):
        check_tasks(request.tasks)
    lines = _lines(plan, model, procedure.target, found_on)
    warnings = _warnings(model, request, procedure, texts)
    resolved = _resolved(request, model, procedure)
    return Job(resolved, model, procedure, texts, out, plan, lines, warnings)


def _lines(plan: Plan, model: UnloadedModel, target: Target, found_on: str) -> list[str]:
    """Return a plan in words, with what is particular about the model, the target or the metric."""
    lines, shapes = plan.lines(), models.shapes_of(model.shapes)
    if width := target.group.width(shapes, target.sparsity):
        config = models.narrowed_config(model.config, width[1])
        narrow = models.skeleton(config, models.DTYPES[model.dtype])
        gone = 1 - narrow.num_parameters() / model.shapes.num_parameters()
        stay = f"{width[1]} of {width[0]} neurons of each MLP stay, and all heads"
        lines.append(f"plan: {stay}; {gone:.1%} of all parameters go")
    if target.group_name == "row":
        gone = sum(out * int(width * target.sparsity) for out, width in shapes.values())
        share = gone / sum(out * width for out, width in shapes.values())
        if round(share, 4) < round(target.sparsity, 4):
            rule = f"{target.sparsity:.2%} of each row, in whole weights"
            lines.append(f"plan: {share:.2%} of the weights go: {rule}")
    if found_on:
        lines.append(f"plan: the metric was found on {found_on}")
    if model.why_dtype:
        lines.append(
            f"plan: computing in {model.dtype}, since {model.why_dtype}; files keep theirs"
        )
    if (Path(model.name) / RECIPE).is_file():
        result = "a result of pruning: its zeros stay, and count among those asked"
        lines.append(f"plan: the model is {result}")
    return lines


def resolve(request: Measurement, gradients: bool = False) -> UnloadedModel:
    """Return the model that a request names; raises as `resolve_model`."""
    options = request.dtype, request.device, request.seqlen, request.revision
    with on_stderr().status("reading the model's config and tokenizer"):
        return models.resolve_model(str(request.model), *options, gradients)


def calibration_texts(request: Request, seqlen: int) -> tuple[Text, ...]:
    """Return the texts for the statistics."""
    samples, seed, bos = request.samples, request.seed, request.bos
    texts = [
        Text(corpus, split, samples, seqlen, seed, bos, request.by_document)
        for corpus, split in sources("", request.corpus, request.split, request.share)
    ]
    return share_windows(texts, request.share or [1.0] * len(texts))


def held_back_count(samples: int) -> int:
    """Return how many windows an update is judged by, given the number of calibration windows."""
    return min(MOST_HELD_BACK, max(LEAST_HELD_BACK, samples // 2))


def evaluation_texts(request: Measurement, seqlen: int) -> tuple[Text, ...]:
    """Return the texts to measure perplexity on, in windows of `seqlen` tokens."""
    asked, bos = request.eval_windows, request.bos
    windows, most = (None, None) if asked == "all" else (asked, EVAL_WINDOWS)
    return tuple(
        Text(corpus, split, windows, seqlen, bos=bos, most=most)
        for corpus, split in sources("eval-", request.eval_corpus, request.eval_split)
    )


def _resolved(request: Request, model: UnloadedModel, procedure: Procedure) -> Request:
    """Return a request that means the same on another machine, later."""
    name, revision = hub_id(model.name) or (model.name, None)
    return request.model_copy(
        update={
            "model": name,
            "revision": revision,
            "metric": SPARSEGPT if procedure.own_masks else procedure.metric.text,
            "sparsity": procedure.target.sparsity,
            "pattern": procedure.target.pattern_text,
            "group": procedure.target.group_name,
            "seqlen": model.seqlen,
            "dtype": model.dtype,
        }
    )


def _warnings(
    model: UnloadedModel, request: Request, procedure: Procedure, texts: Texts
) -> list[str]:
    kinds = texts.get("calibration", ())
    overlaps = check_disjoint({"calibration": kinds, "evaluation": texts["evaluation"]})
    warnings = [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]
    if len(kinds) == 1 and model.name != EMBEDDED:
        warnings.append(ONE_KIND.format(kinds[0].corpus))
    if request.update == "reconstruct" and request.samples < FEW_WINDOWS:
        few = f"{request.samples} calibration windows are few for a reconstruction"
        warnings.append(f"{few}: it brings more with --samples 128")
    if procedure.has_gradients and model.dtype == "float16":
        warnings.append("small gradients are lost in float16: give --dtype bfloat16 or float32")
    return warnings
