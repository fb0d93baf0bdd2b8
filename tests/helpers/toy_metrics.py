"""Any metric of the language, for properties that hold of all."""

from hypothesis import strategies as st

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import OPERATORS


def trees(ends, max_leaves, without=()):
    """Return a strategy of metrics that end in what another strategy draws."""
    names = st.sampled_from([name for name in OPERATORS if name not in without])

    def grown(children):
        return names.flatmap(
            lambda name: st.tuples(*[children] * OPERATORS[name].arity).map(
                lambda operands: Metric(name, operands)
            )
        )

    return st.recursive(ends, grown, max_leaves=max_leaves)
