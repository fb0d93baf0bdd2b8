"""Any metric of the language, for properties that hold of all, and terminals to score it with."""

import torch
from hypothesis import strategies as st

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import TERMINALS


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


def random_terminals(rows, columns, dtype=torch.float32):
    """Return positive terminals of a matrix of that shape, by name."""
    generator, values = torch.Generator().manual_seed(0), {}
    for name, terminal in TERMINALS.items():
        by_row, by_column = terminal.shape
        size = (rows if by_row else 1, columns if by_column else 1)
        values[name] = (torch.rand(size, generator=generator) + 0.1).to(dtype)
    return values
