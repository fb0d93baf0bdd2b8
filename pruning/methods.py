"""The methods around a metric by the names of the command line: a recipe is made of them here."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from prunevolve.pruning.allocation import resolve_allocation
from prunevolve.pruning.baselines import REFINEMENTS, UPDATES
from prunevolve.pruning.leaves import GRAM
from prunevolve.pruning.masks import NOfM, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.recipe import ZERO, Recipe, Refinement, Removal, Update
from prunevolve.pruning.reconstruct import reconstruct
from prunevolve.pruning.sparsegpt import WIDTH, choose_given, choose_lowest, choose_n_of_m, solve
from prunevolve.pruning.swaps import MOST_SWAPS, refine


def make_recipe(
    metric: Metric,
    target: Target,
    propagation: str = "one-shot",
    update: str = "none",
    allocation: str = "uniform",
    refinement: str = "none",
    own_masks: bool = False,
    seed: int = 0,
) -> Recipe:
    """Return a recipe; see the command line's options of these names.

    Args:
        own_masks: Whether SparseGPT makes the masks as it goes.
        seed: Of the order of windows in a reconstruction.

    Raises:
        ValueError: If a name is unknown, or parts do not fit each other; one line.
    """
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)}; got {update!r}")
    swaps = _swaps(refinement, target)
    if own_masks and refinement != "none":
        raise ValueError(
            f"refine must be none with metric sparsegpt, which chooses a mask column by column and "
            f"changes the weights by it at once; got {refinement!r}"
        )
    if own_masks and target.group_name not in (None, "layer"):
        raise ValueError(
            "group must be left out with metric sparsegpt, which compares weights within "
            f"{WIDTH} columns of a layer; got {target.group_name!r}"
        )
    recipe = Recipe(
        metric,
        target,
        propagation,
        resolve_allocation(allocation, target),
        swaps,
        _sparsegpt(target, own_masks) if own_masks or update == "sparsegpt" else ZERO,
        partial(reconstruct, seed=seed) if update == "reconstruct" else None,
    )
    recipe.check()
    return recipe


def _swaps(refinement: str, target: Target) -> Refinement | None:
    name, colon, number = refinement.partition(":")
    most = int(number) if number.isdecimal() else 0 if colon else MOST_SWAPS
    if name not in REFINEMENTS or most < 1 or (colon and name == "none"):
        raise ValueError(
            f"refine must be none, swaps, or swaps:N with N of 1 or more; got {refinement!r}"
        )
    if name == "none":
        return None
    length = target.group.length if isinstance(target.group, NOfM) else None

    def apply(weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return refine(weight, mask, statistics[GRAM], length, most)

    return Refinement(frozenset({GRAM}), apply)


def _sparsegpt(target: Target, chooses: bool) -> Update:
    pattern = target.group if isinstance(target.group, NOfM) else None

    def apply(weight: Tensor, removal: Removal, statistics: Mapping[str, Tensor]) -> Tensor:
        if isinstance(removal, Tensor):
            return solve(weight, statistics[GRAM], choose_given(removal))
        if pattern:
            return solve(weight, statistics[GRAM], choose_n_of_m(pattern), pattern.length)
        return solve(weight, statistics[GRAM], choose_lowest(removal))

    return Update(frozenset({GRAM}), apply, chooses)
