"""What is asked of a pruning, and the passes over the decoder blocks that it takes.

An update and a training change the weights that stay;
a new pruning method is a new value of one of these. `pruning.walk` runs the passes, one block
open at a time: windows go through the dense block, forward or, as gradients, backward; then it is
pruned and written; then windows go through what it has become.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from prunevolve.pruning.masks import NOfM, Target, resolve_target
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.reconstruct import Training, reconstruct
from prunevolve.pruning.run.options import Method
from prunevolve.pruning.sparsegpt import BLOCKSIZE, compensate
from prunevolve.pruning.statistics import GRAM, STATISTICS, need_backward

# A layer's mask, True where a weight goes, of a shape that expands to the weight's, or the fraction
# that goes if an update chooses.
Removal = Tensor | float

# Maps a dense weight, (out_features, in_features), what goes of it and the Gram matrix of its
# inputs behind pruned blocks to the weight that is saved, and how many times the matrix's damping
# grew; the dense weight is not written to.
Update = Callable[[Tensor, Removal, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Procedure:
    """What to remove, by which score, and what to do with the rest.

    Raises ValueError if the metric cannot rank weights, or not as the propagation needs it.
    """

    metric: Metric
    target: Target
    # Whether scores take statistics of a block's inputs from windows that passed the pruned blocks
    # before it, as the Pruner-Zero release does for X; else all are of the dense model.
    sequential: bool = False
    update: Update | None = None  # changes the weights that stay; None: they keep their bits
    own_masks: bool = False  # whether the update chooses what goes
    training: Training | None = None  # changes the weights once a whole block is pruned
    # Whether weights go only so far to those of update and training as windows held back choose.
    guarded: bool = False
    part: float | None = None  # of the way, once they chose it: what was written is only mixed

    def __post_init__(self) -> None:
        self.metric.check_scores_weights()
        if self.sequential and self.target.group.whole_model:
            why = "whose threshold needs every layer's scores before the first is pruned"
            rule = f"one-shot with group model, {why}"
            raise ValueError(f"propagation must be {rule}; got 'sequential'")

    @property
    def dense_terminals(self) -> frozenset[str]:
        """The statistics of the dense model that are needed."""
        terminals = frozenset() if self.own_masks else self.metric.terminals & STATISTICS
        if self.sequential:
            terminals = need_backward(terminals)
        return terminals

    @property
    def pruned_terminals(self) -> frozenset[str]:
        """The statistics that are needed of inputs that passed the pruned blocks before."""
        terminals = frozenset({GRAM} if self.update else ())
        if self.sequential and not self.own_masks:
            named = self.metric.terminals & STATISTICS
            terminals |= named - need_backward(named)
        return terminals

    @property
    def follows(self) -> bool:
        """Whether the calibration windows pass the pruned blocks."""
        return bool(self.pruned_terminals or self.training)

    @property
    def has_gradients(self) -> bool:
        """Whether a pass goes backward: for statistics, or to train what stays."""
        return bool(need_backward(self.dense_terminals) or self.training)

    @property
    def needs_all_scores(self) -> bool:
        """Whether no mask can be made before all layers have scores."""
        return self.target.group.whole_model

    @property
    def waits(self) -> bool:
        """Whether a block is pruned in a later pass than its statistics are complete in."""
        return self.needs_all_scores or self.sequential or self.follows


def procedure_of(method: Method, criterion: Criterion, own_masks: bool = False) -> Procedure:
    """Return how a method prunes by a metric; SparseGPT may make its own masks as it goes."""
    asked = method.pattern, method.sparsity, method.group
    target = resolve_target(*asked, criterion.group, method.multiple)
    if own_masks and target.pattern_text == "neurons":
        rule = "unstructured or n:m with metric sparsegpt, which chooses single weights"
        raise ValueError(f"pattern must be {rule}: give another metric, and update sparsegpt")
    if own_masks and target.group_name not in (None, "layer"):
        raise ValueError(
            "group must be left out with metric sparsegpt, which compares weights within "
            f"{BLOCKSIZE} columns of a layer; got {target.group_name!r}"
        )
    if method.skip and target.pattern_text == "neurons":
        rule = "left out with pattern neurons: all MLPs have one width, and all heads stay"
        raise ValueError(f"skip must be {rule}; got {method.skip!r}")
    pattern = target.group if isinstance(target.group, NOfM) else None
    updates = own_masks or method.update == "sparsegpt"
    trains = method.update == "reconstruct"
    return Procedure(
        criterion.metric,
        target,
        method.propagation == "sequential",
        update=partial(compensate, pattern=pattern) if updates else None,
        own_masks=own_masks,
        training=partial(reconstruct, seed=method.seed) if trains else None,
        guarded=(updates or trains) and not own_masks,
    )


Way = Literal["forward", "wait", "backward", "apart"]
"""How windows pass a block: their outputs enter the next one, or not before the block is pruned, or
gradients go from the outputs to the inputs, or the block has other weights than will be written."""


class Step(NamedTuple):
    """What the windows of one stream do at each block."""

    # `dense` and `pruned` are measured at the end, `calibration` makes statistics and goes behind
    # pruned blocks, `targets` are its windows behind dense ones. Those that are held back go behind
    # pruned blocks as `updated`, behind blocks without an update as `masked`, and as `half`.
    stream: str
    words: str
    terminals: frozenset[str] = frozenset()  # the statistics that are added up on the way
    way: Way = "forward"


@dataclass(frozen=True)
class Pass:
    """One walk over the blocks."""

    name: str  # `forward`, `backward`, `threshold`, `prune` or `measure`
    dense: tuple[Step, ...] = ()  # at each block while it is dense
    prunes: tuple[str, ...] = ()  # what then makes it pruned, in words
    pruned: tuple[Step, ...] = ()  # at the pruned block
    keeps_inputs: bool = False  # whether all inputs are kept, for the backward pass after it

    @property
    def enters(self) -> tuple[str, ...]:
        """The streams that enter the first block; gradients come from the last."""
        steps = (*self.dense, *self.pruned)
        return tuple(dict.fromkeys(step.stream for step in steps if step.way != "backward"))

    @property
    def terminals(self) -> frozenset[str]:
        """The statistics that are added up."""
        return frozenset().union(*(step.terminals for step in self.dense))

    def __str__(self) -> str:
        if self.name == "threshold":
            return "threshold: scores of all layers"
        before, after = ([step.words for step in steps] for steps in (self.dense, self.pruned))
        done = ", ".join([*before, *self.prunes, *after])
        return f"{self.name}: {done}" + ("; keeps inputs" if self.keeps_inputs else "")


def collecting(terminals: frozenset[str]) -> list[Pass]:
    """Return the passes that collect statistics of the dense model."""
    gradients = need_backward(terminals)
    forward = Pass("forward", (_statistics(terminals - gradients),), keeps_inputs=bool(gradients))
    backward = Pass("backward", (_statistics(gradients, "backward"),))
    return [forward, backward] if gradients else [forward]


def passes_of(procedure: Procedure, missing: frozenset[str]) -> tuple[Pass, ...]:
    """Return the passes of a pruning, in order, given the dense model's statistics it lacks."""
    gradients = need_backward(missing)
    inputs = missing - gradients
    reads_twice = procedure.needs_all_scores or procedure.follows
    collects_first = bool(gradients or (inputs and reads_twice))
    passes = []
    dense, pruned = [Step("dense", "dense perplexity")], [Step("pruned", "pruned perplexity")]
    if collects_first:
        steps = (*dense, _statistics(inputs))
        passes.append(Pass("forward", steps, keeps_inputs=bool(gradients)))
        dense = []
    if gradients:
        on_the_way = () if procedure.waits else _pruning(procedure)
        passes.append(Pass("backward", (_statistics(gradients, "backward"),), on_the_way))
    if procedure.needs_all_scores:
        passes.append(Pass("threshold"))
    if gradients and not procedure.waits:
        return (*passes, Pass("measure", pruned=tuple(pruned)))
    if procedure.training:
        dense.append(Step("targets", "targets of the training"))
    if procedure.follows:
        dense.append(_statistics(procedure.pruned_terminals, "wait"))
        pruned.append(Step("calibration", "calibration windows move on"))
        if procedure.guarded:
            pruned.append(Step("updated", "those held back, too"))
            pruned.append(Step("half", "also with half of the update", way="apart"))
            pruned.append(Step("masked", "and without it", way="apart"))
    elif inputs and not collects_first:
        dense.append(_statistics(inputs))
    return (*passes, Pass("prune", tuple(dense), _pruning(procedure), tuple(pruned)))


def _statistics(terminals: frozenset[str], way: Way = "forward") -> Step:
    where = " behind pruned blocks" if way == "wait" else ""
    words = f"{', '.join(sorted(terminals)) or 'inputs'} of the calibration windows{where}"
    return Step("calibration", words, terminals, way)


def _pruning(procedure: Procedure) -> tuple[str, ...]:
    optional = {"update": procedure.update, "train": procedure.training}
    first = ("select",) if procedure.own_masks else ("score", "select")
    return (*first, *(word for word, method in optional.items() if method), "write")
