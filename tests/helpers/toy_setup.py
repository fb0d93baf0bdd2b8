"""Evaluators on the embedded model, and the tasks and criteria that tests ask of them."""

from dataclasses import replace
from typing import Any

from small_search import embedded_setup
from torch import Tensor

from evaluation.corpus import token_windows
from pruning.criterion import Criterion
from pruning.masks import NOfM
from pruning.metric import Metric
from pruning.models import load_tokenizer
from search.baseline_losses import Ask, scale_of
from search.fitness import Evaluator, Setup, Task
from search.scale import Scale

ROLES = ("calibration", "fitness", "selection", "report")
HALF = Task("half", 0, 0.5, None, 1.0)
TWO_OF_FOUR = Task("2:4", 0, 0.5, NOfM(2, 4), 3.0)


def criterion_of(text: str, group: str = "row") -> Criterion:
    """Return a criterion, also of a metric that cannot rank weights."""
    return Criterion(Metric.parse(text), group)


MAGNITUDE = criterion_of("W")
NEGATIVE = criterion_of("neg(W)")
CONSTANT = criterion_of("sub(W, W)")
WANDA = criterion_of("mul(W, sqrt(X))")
SNIP = criterion_of("mul(W, G)", "model")


def words(windows: int) -> dict[str, Tensor]:
    """Return windows of the embedded texts by role, of 32 tokens each."""
    tokenizer = load_tokenizer("embedded")
    return {
        role: token_windows(tokenizer, "embedded", role, windows, 32, None).tokens for role in ROLES
    }


def setup_of(**changes: Any) -> Setup:
    """Return a setup of four windows of each text; any of its fields may be given."""
    return replace(embedded_setup(), **({"windows": (words(4),)} | changes))


def made_of(setup: Setup) -> Evaluator:
    """Return an evaluator that has collected its statistics and uses them, and has its scale."""
    evaluator = Evaluator(setup)
    for subject in range(len(setup.subjects)):
        evaluator.use_statistics(subject, evaluator.collect_statistics(subject))
    measure_scale(evaluator)
    return evaluator


def asking(evaluator: Evaluator) -> Ask:
    """What a pool answers, from one evaluator."""
    return lambda requests: [evaluator.losses(r.task, r.role, r.criterion) for r in requests]


def measure_scale(evaluator: Evaluator) -> Scale:
    """Let an evaluator measure its own scale and use it; also return it."""
    scale = scale_of(evaluator.setup, asking(evaluator))
    evaluator.use_scale(scale)
    return scale
