"""The passes over a model's decoder blocks that a recipe takes; `pruning.pruner` runs them.

One block is open at a time. In a pass windows of text go through the dense block, forward or, as
gradients, backward; then the block is pruned and written; then windows go through what it has
become.
"""

from dataclasses import dataclass

from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.statistics import need_backward


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
        terminals: The statistics.
        behind: Whether the blocks before it are pruned; the windows then wait until it is, too.
    """

    terminals: frozenset[str]
    behind: bool = False
    stream = "calibration"

    def __str__(self) -> str:
        where = " behind pruned blocks" if self.behind else ""
        return f"{_joined(self.terminals) or 'inputs'} of the calibration windows{where}"


@dataclass(frozen=True)
class Differentiate:
    """The calibration windows' gradients go back through the block, and are added up."""

    terminals: frozenset[str]
    stream = "calibration"

    def __str__(self) -> str:
        return f"{_joined(self.terminals)} of the calibration windows"


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
    def terminals(self) -> frozenset[str]:
        """The statistics that are added up."""
        return frozenset().union(*(x.terminals for x in self.dense if not isinstance(x, Advance)))

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
        dense.append(Collect(recipe.pruned_terminals, behind=True))
    elif inputs and not collects_first:
        dense.append(Collect(inputs))
    pruned = [Advance("pruned"), *([Advance("calibration")] if recipe.follows else [])]
    return (*passes, Pass("prune", tuple(dense), _pruning(recipe), tuple(pruned)))


def _pruning(recipe: Recipe) -> tuple[str, ...]:
    """Return what is done to a block, in words."""
    words = {
        "score": not recipe.own_masks,
        "select": True,
        "update": recipe.update,
        "train": recipe.training,
        "write": True,
    }
    return tuple(word for word, is_done in words.items() if is_done)


def _joined(terminals: frozenset[str]) -> str:
    return ", ".join(sorted(terminals))
