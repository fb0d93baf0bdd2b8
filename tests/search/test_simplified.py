"""Finalists lose the factors that the selection text does not miss, and then the best is chosen."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from rich.console import Console

from prunevolve.search import results
from prunevolve.search.scale import Difference
from tests.helpers.toy_records import record_of

WORTH = {"W": 0.5, "G": 0.5, "power(I, 0.1)": 0.002, "exp(D)": 0.004, "sqrt(V)": 0.009}
"""What the loss rises by without a factor; its error is 0.01."""


class Scale:
    def difference(self, losses, reference):
        return Difference(losses[0][0] - reference[0][0], 0.01)

    def fitness(self, losses):
        return losses[0][0]


def selection(worth, together=0.0, comparable=False):
    """An experiment and a pool, in which two missing factors cost `together` more than each."""

    def loss(criterion):
        missing = [value for name, value in worth.items() if name not in criterion.text]
        return 1.0 + sum(missing) + together * (len(missing) > 1)

    def losses(wanted):
        return [[loss(criterion)] for _, _, criterion in wanted]

    pool = SimpleNamespace(losses=losses, counting=lambda count: nullcontext())
    breeder = SimpleNamespace(comparable=comparable)
    return SimpleNamespace(tasks=[None], tasks_of=lambda role: [0], breeder=breeder), pool


def simplified(text, together=0.0, comparable=False):
    record = record_of(0, text, 1.0, "model")
    experiment, pool = selection(WORTH, together, comparable)
    (losses,) = results._losses(experiment, pool, "selection", [record.criterion])
    whole = results._Finalist(1.0, 0, record, losses)
    best = results._simplified(experiment, pool, Scale(), Scale(), whole, Console(quiet=True))
    return best.record.criterion.text, {row["factor"]: row["dropped"] for row in best.factors}


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


def test_the_winner_is_the_best_without_a_factor_that_does_harm(monkeypatch):
    finalists = [
        record_of(0, "mul(W, G)", 0.8, "model"),
        record_of(1, "mul(mul(exp(H), sqrt(X)), mul(W, G))", 0.7, "model"),
        record_of(2, "W", 0.9, "model"),
    ]
    experiment, pool = selection({"W": 0.5, "G": 0.5, "sqrt(X)": 0.1, "exp(H)": -0.3})
    criteria = [record.criterion for record in finalists]
    losses = [one[0][0] for one in results._losses(experiment, pool, "selection", criteria)]
    assert losses == pytest.approx([0.8, 1.0, 1.3])
    monkeypatch.setattr(results, "scale_of", lambda *_: Scale())
    monkeypatch.setattr(results, "read_scale", lambda folder: Scale())
    winner, standings, factors = results._choose(
        None, experiment, pool, finalists, Console(quiet=True)
    )
    assert winner.criterion.text == "mul(sqrt(X), mul(W, G))"
    assert [(one["index"], one["metric"]) for one in standings] == [
        (1, winner.criterion.text),
        (0, "mul(W, G)"),
        (2, "W"),
    ]
    assert winner.fitness == standings[0]["fitness"] == standings[0]["selection_loss"]
    assert [one["difference"] for one in standings] == pytest.approx([0.0, 0.1, 0.6])
    assert [one["factor"] for one in factors if one["dropped"]] == ["exp(H)"]
