"""The DEAP primitive set, made from the operator table, and the way between trees and metrics."""

from typing import Any

from deap import gp

from pruning.metric import Metric
from pruning.operators import LEAF_SETS, SETS


def primitive_set(name: str) -> Any:
    """Return DEAP's `PrimitiveSet` of an operator set in `pruning.operators.SETS`."""
    primitives = gp.PrimitiveSet("metric", 0)
    for operator_name, operator in SETS[name].items():
        primitives.addPrimitive(operator.function, operator.arity, name=operator_name)
    for leaf in LEAF_SETS[name]:
        primitives.addTerminal(None, name=leaf)
    return primitives


def to_tree(metric: Metric, primitives: Any) -> Any:
    """Return a metric as DEAP's tree: its nodes in prefix order. No text is evaluated."""
    return gp.PrimitiveTree([primitives.mapping[node.name] for node in metric.nodes()])


def to_metric(tree: Any) -> Metric:
    """Return DEAP's tree as a metric, node for node."""
    return Metric.parse(str(tree))
