"""The winner is left without the factors that the selection text does not miss."""

from types import SimpleNamespace

import pytest

from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.search import results
from prunevolve.search.scale import Difference

WORTH = {"W": 0.5, "G": 0.5, "power(I, 0.1)": 0.002, "exp(D)": 0.004, "sqrt(V)": 0.009}
"""What the loss rises by without a factor; its error is 0.01."""


class Scale:
    def difference(self, losses, reference):
        return Difference(losses[0][0] - reference[0][0], 0.01)


def simplified(text, together=0.0, comparable=False):
    """Two missing factors cost `together` more than each alone."""
    winner = Criterion(Metric.parse(text), "model")

    def loss(criterion):
        missing = [worth for name, worth in WORTH.items() if name not in criterion.text]
        return 1.0 + sum(missing) + together * (len(missing) > 1)

    pool = SimpleNamespace(losses=lambda wanted: [[loss(criterion)] for _, _, criterion in wanted])
    experiment = SimpleNamespace(
        tasks=[None],
        tasks_of=lambda role: [0],
        breeder=SimpleNamespace(comparable=comparable),
    )
    best, table = results._simplified(experiment, pool, Scale(), winner, [[loss(winner)]])
    return best.text, {row["factor"]: row["dropped"] for row in table}


WHOLE = "mul(mul(mul(mul(W, G), power(I, 0.1)), exp(D)), sqrt(V))"


@pytest.mark.parametrize(
    ("together", "kept"),
    [
        # All three together cost 0.015, more than the error of 0.01; half of them do not.
        (0.0, "mul(mul(exp(D), sqrt(V)), mul(W, G))"),
        (-0.01, "mul(W, G)"),
        (1.0, "mul(mul(exp(D), sqrt(V)), mul(W, G))"),
    ],
)
def test_factors_go_that_are_worth_less_than_their_error_alone_and_together(together, kept):
    best, dropped = simplified(WHOLE, together)
    assert best == kept
    assert [name for name, gone in dropped.items() if gone] == [
        name for name in ("power(I, 0.1)", "exp(D)", "sqrt(V)") if name not in kept
    ]


def test_what_gives_scores_a_unit_stays_where_layers_compete():
    whole = "mul(mul(W, G), quot(sqrt(V), rowmean(sqrt(V))))"
    best, dropped = simplified(whole, together=-1.0, comparable=True)
    assert best == whole and not any(dropped.values())
