"""The passes over a model's decoder blocks: which ones a recipe takes, and the walk that runs them.

One block is open at a time. In a pass windows of text go through the dense block, forward or, as
gradients, backward; then the block is pruned and written; then other windows go through what it has
become.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest

from torch import Tensor, nn

from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.reconstruct import Lesson
from prunevolve.pruning.statistics import STATISTICS, Statistics, need_backward
from prunevolve.pruning.store import Store, all_layers
from prunevolve.pruning.stream import Stream, Texts


@dataclass(frozen=True)
class Advance:
    """The windows of a stream pass the block.

    Attributes:
        stream: `dense` and `pruned` are measured at the end, `calibration` goes behind pruned
            blocks, and `targets` are its windows behind dense ones.
    """

    stream: str

    def __str__(self) -> str:
        words = {"calibration": "calibration windows move on", "targets": "targets of the training"}
        return words.get(self.stream, f"{self.stream} perplexity")


@dataclass(frozen=True)
class Collect:
    """The calibration windows enter the block, and statistics of its inputs are added up.

    Attributes:
        leaves: The statistics.
        behind: Whether the blocks before it are pruned; the windows then wait until it is, too.
    """

    leaves: frozenset[str]
    behind: bool = False
    stream = "calibration"

    def __str__(self) -> str:
        where = " behind pruned blocks" if self.behind else ""
        return f"{_joined(self.leaves) or 'inputs'} of the calibration windows{where}"


@dataclass(frozen=True)
class Differentiate:
    """The calibration windows' gradients go back through the block, and are added up."""

    leaves: frozenset[str]
    stream = "calibration"

    def __str__(self) -> str:
        return f"{_joined(self.leaves)} of the calibration windows"


Step = Advance | Collect | Differentiate


@dataclass(frozen=True)
class Pass:
    """One walk over the blocks.

    Attributes:
        name: `forward`, `backward`, `threshold`, `prune` or `measure`.
        dense: What happens at each block while it is dense.
        prunes: What then makes it pruned, in words; nothing if it stays as it is.
        pruned: What happens at the pruned block.
        keeps_inputs: Whether every block's inputs are kept, for the backward pass after it.
    """

    name: str
    dense: tuple[Step, ...] = ()
    prunes: tuple[str, ...] = ()
    pruned: tuple[Advance, ...] = ()
    keeps_inputs: bool = False

    @property
    def enters(self) -> tuple[str, ...]:
        """The streams that enter the first block; gradients come from the last."""
        steps = (*self.dense, *self.pruned)
        return tuple(dict.fromkeys(x.stream for x in steps if not isinstance(x, Differentiate)))

    @property
    def leaves(self) -> frozenset[str]:
        """The statistics that are added up."""
        return frozenset().union(*(x.leaves for x in self.dense if not isinstance(x, Advance)))

    def __str__(self) -> str:
        if self.name == "threshold":
            return "threshold: scores of all layers"
        done = [*map(str, self.dense), *self.prunes, *map(str, self.pruned)]
        return f"{self.name}: {', '.join(done)}" + ("; keeps inputs" if self.keeps_inputs else "")


def passes_of(recipe: Recipe, missing: frozenset[str]) -> tuple[Pass, ...]:
    """Return the passes that a pruning takes, in order.

    Args:
        missing: The recipe's statistics of the dense model that are not there yet.
    """
    gradients = need_backward(missing)
    inputs = missing - gradients
    waits = recipe.needs_all_scores or recipe.sequential or recipe.follows
    collects_first = bool(gradients) or (bool(inputs) and recipe.needs_all_scores | recipe.follows)
    passes = []
    if collects_first:
        dense: list[Step] = [Advance("dense"), Collect(inputs)]
        passes.append(Pass("forward", tuple(dense), keeps_inputs=bool(gradients)))
    if gradients:
        on_the_way = () if waits else _pruning(recipe)
        passes.append(Pass("backward", (Differentiate(gradients),), on_the_way))
    if recipe.needs_all_scores:
        passes.append(Pass("threshold"))
    if gradients and not waits:
        return (*passes, Pass("measure", pruned=(Advance("pruned"),)))
    dense = [] if collects_first else [Advance("dense")]
    if recipe.training:
        dense.append(Advance("targets"))
    if recipe.follows:
        dense.append(Collect(recipe.pruned_leaves, behind=True))
    elif inputs and not collects_first:
        dense.append(Collect(inputs))
    pruned = [Advance("pruned"), *([Advance("calibration")] if recipe.follows else [])]
    return (*passes, Pass("prune", tuple(dense), _pruning(recipe), tuple(pruned)))


def _pruning(recipe: Recipe) -> tuple[str, ...]:
    """Return what is done to a block, in words."""
    words = {
        "score": not recipe.own_masks,
        "select": True,
        "refine": recipe.refine,
        "update": recipe.update,
        "train": recipe.training,
        "write": True,
    }
    return tuple(word for word, is_done in words.items() if is_done)


def _joined(leaves: frozenset[str]) -> str:
    return ", ".join(sorted(leaves))


@dataclass
class Walk:
    """Runs passes, one block after the other.

    Attributes:
        store: Opens the blocks.
        states: Where hidden states and gradients are put aside.
        missing: Returns the statistics of the dense model that a block still needs.
        keep: Gets a block's statistics as soon as they are complete, and whether they are of inputs
            behind pruned blocks.
        select: Called before blocks are pruned, with their names in order: decides what goes.
        is_done: Whether nothing is left to score, select or write of a block.
        prune: Called with each open block that is not done, and what it is trained on, if it is.
    """

    store: Store
    texts: Texts
    states: Offload
    missing: Callable[[str], frozenset[str]]
    keep: Callable[[Statistics, bool], None]
    on_progress: Progress = unwatched
    select: Callable[[list[str]], None] = lambda blocks: None
    is_done: Callable[[str], bool] = lambda block: False
    prune: Callable[[str, nn.Module, Lesson | None], None] = lambda block, module, lesson: None
    _streams: dict[str, Stream] = field(default_factory=dict)

    def run(self, passes: tuple[Pass, ...]) -> None:
        """Run passes in order."""
        selected = False
        with _frozen(self.store.model):
            for one in passes:
                order = [*self.store.blocks]
                if one.name == "backward":
                    order.reverse()
                if (one.prunes and not selected) or one.name == "threshold":
                    self.select(order)
                    selected = True
                if one.name != "threshold":
                    self._run(one, order)

    def _run(self, one: Pass, order: list[str]) -> None:
        self.on_progress(one.name, 0, len(order))
        self._enter(one)
        dense = [step for step in one.dense if step.stream in self._streams]
        pruned = [self._streams[step.stream] for step in one.pruned if step.stream in self._streams]
        for done, (block, then) in enumerate(zip_longest(order, order[1:]), 1):
            i = self.store.blocks.index(block)
            to_prune = bool(one.prunes) and not self.is_done(block)
            is_new = to_prune and block not in self.store.written
            if dense or to_prune:
                with self.store.open_dense(block, then) as module:
                    for step in dense:
                        self._do(step, i, block, module)
                    if to_prune:
                        self.prune(block, module, self._lesson(i))
                    for stream in pruned if is_new else []:
                        stream.advance(i, module)
            if pruned and not is_new:
                with self.store.open(block) as module:
                    for stream in pruned:
                        stream.advance(i, module)
            self.on_progress(one.name, done, len(order))
        self._leave(one)

    def _enter(self, one: Pass) -> None:
        names = [name for name in one.enters if len(self.texts.by_stream(name))]
        with self.store.outside() if names else nullcontext():
            for name in names:
                kept = one.keeps_inputs and name == "calibration"
                self._streams[name] = Stream.enter(self.store, name, self.texts, self.states, kept)

    def _leave(self, one: Pass) -> None:
        """Measure, differentiate or delete what has left the last block, or gradients the first."""
        with self.store.outside() if self._streams else nullcontext():
            for name, stream in list(self._streams.items()):
                if name in self.texts.evaluations:
                    stream.end(self.store, self.texts.measure)
                elif one.keeps_inputs:
                    stream.enter_gradients(self.store)
                    continue
                else:
                    stream.drop(0 if one.name == "backward" else len(self.store.blocks))
                del self._streams[name]

    def _do(self, step: Step, i: int, block: str, module: nn.Module) -> None:
        stream = self._streams[step.stream]
        match step:
            case Advance():
                stream.advance(i, module)
            case Collect(leaves, behind=True):
                if block not in self.store.written:
                    self.keep(stream.collect(i, block, module, leaves, moves=False), True)
            case Collect(leaves):
                wanted = leaves & self.missing(block)
                self.keep(stream.collect(i, block, module, wanted, moves=True), False)
            case Differentiate(leaves):
                wanted = leaves & self.missing(block)
                self.keep(stream.collect_back(i, block, module, wanted), False)

    def _lesson(self, i: int) -> Lesson | None:
        targets = self._streams.get("targets")
        return self._streams["calibration"].lesson(i, targets) if targets else None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, only watched parameters take part in a backward pass."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def collect(
    store: Store,
    windows: Tensor,
    leaves: frozenset[str],
    on_progress: Progress = unwatched,
    keep: Callable[[Statistics], dict[str, Tensor]] = Statistics.to_tensors,
) -> Statistics:
    """Collect statistics of the dense model; its weights are not changed.

    Args:
        windows: Token ids, (N, T); one forward pass each, and a backward pass if a leaf needs it.
        leaves: The statistics to collect; leaves that need no calibration are ignored.
        keep: Maps each block's statistics, once complete, to what is kept of them.
    """
    leaves &= STATISTICS
    collected: dict[str, Tensor] = {}
    gradients = need_backward(leaves)
    passes = [Pass("forward", (Collect(leaves - gradients),), keeps_inputs=bool(gradients))]
    if gradients:
        passes.append(Pass("backward", (Differentiate(gradients),)))
    walk = Walk(
        store,
        Texts(windows),
        {},
        missing=lambda block: leaves,
        keep=lambda statistics, behind: collected.update(keep(statistics)),
        on_progress=on_progress,
    )
    if leaves:
        walk.run(tuple(passes))
    order = [f"{leaf}/{name}" for leaf in sorted(leaves) for name in all_layers(store)]
    return Statistics.from_tensors({key: collected[key] for key in order if key in collected})
