"""Finalists lose the factors that the selection text does not miss, and then the best is chosen."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from prunevolve.pruning.metric import Metric
from prunevolve.search import finalists
from prunevolve.search.finalists import choose, factors_of, without, without_each
from prunevolve.search.scale import Difference
from tests.helpers.toy_records import record_of

WORTH = {"W": 0.5, "G": 0.5, "power(I, 0.1)": 0.002, "exp(D)": 0.004, "sqrt(V)": 0.009}
"""What the loss rises by without a factor; its error is 0.01."""


class Scale:
    def difference(self, losses, reference):
        return Difference(losses[0][0] - reference[0][0], 0.01)

    def fitness(self, losses):
        return losses[0][0]


def selection(worth, together=0.0, comparable=False, unfit=()):
    """An experiment and a pool, in which two missing factors cost `together` more than each.

    On the fitness texts nothing can prune without one of `unfit`.
    """

    def loss(criterion):
        missing = [value for name, value in worth.items() if name not in criterion.text]
        return 1.0 + sum(missing) + together * (len(missing) > 1)

    def losses(wanted):
        return [
            None
            if role == "fitness" and any(name not in criterion.text for name in unfit)
            else [loss(criterion)]
            for _, role, criterion in wanted
        ]

    pool = SimpleNamespace(losses=losses, counting=lambda count: nullcontext())
    breeder = SimpleNamespace(comparable=comparable)
    return SimpleNamespace(tasks=[None], tasks_of=lambda role: [0], breeder=breeder), pool


def simplified(text, **how):
    record = record_of(0, text, 1.0, "model")
    experiment, pool = selection(WORTH, **how)
    (losses,) = finalists._losses(experiment, pool, "selection", [record.criterion])
    whole = finalists._Finalist(1.0, 0, record, losses)
    best = finalists._simplified(experiment, pool, Scale(), Scale(), whole, Console(quiet=True))
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
    best, dropped = simplified(WHOLE, together=together)
    assert best == kept
    assert [name for name, gone in dropped.items() if gone] == [
        name for name in ("power(I, 0.1)", "exp(D)", "sqrt(V)") if name not in kept
    ]


def test_what_the_models_of_the_search_cannot_be_pruned_without_stays():
    best, dropped = simplified(WHOLE, together=-0.01, unfit=["exp(D)"])
    assert best == "mul(mul(exp(D), sqrt(V)), mul(W, G))"
    assert dropped["power(I, 0.1)"] and not dropped["exp(D)"]


def test_what_gives_scores_a_unit_stays_where_layers_compete():
    whole = "mul(mul(W, G), quot(sqrt(V), rowmean(sqrt(V))))"
    best, dropped = simplified(whole, together=-1.0, comparable=True)
    assert best == whole and not any(dropped.values())


def test_the_winner_is_the_best_without_a_factor_that_does_harm(monkeypatch):
    found = [
        record_of(0, "mul(W, G)", 0.8, "model"),
        record_of(1, "mul(mul(exp(H), sqrt(X)), mul(W, G))", 0.7, "model"),
        record_of(2, "W", 0.9, "model"),
    ]
    experiment, pool = selection({"W": 0.5, "G": 0.5, "sqrt(X)": 0.1, "exp(H)": -0.3})
    criteria = [record.criterion for record in found]
    losses = [one[0][0] for one in finalists._losses(experiment, pool, "selection", criteria)]
    assert losses == pytest.approx([0.8, 1.0, 1.3])
    monkeypatch.setattr(finalists, "scale_of", lambda *_: Scale())
    monkeypatch.setattr(finalists, "read_scale", lambda folder: Scale())
    winner, standings, factors = choose(None, experiment, pool, found, Console(quiet=True))
    assert winner.criterion.text == "mul(sqrt(X), mul(W, G))"
    assert [(one["index"], one["metric"]) for one in standings] == [
        (1, winner.criterion.text),
        (0, "mul(W, G)"),
        (2, "W"),
    ]
    assert winner.fitness == standings[0]["fitness"] == standings[0]["selection_loss"]
    assert [one["difference"] for one in standings] == pytest.approx([0.0, 0.1, 0.6])
    assert [one["factor"] for one in factors if one["dropped"]] == ["exp(H)"]


# The factors of a formula


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("mul(mul(W, G), exp(X))", ["W", "G", "exp(X)"]),
        ("quot(mul(W, G), quot(rowmean(W), V))", ["W", "G", "quot(1, rowmean(W))", "V"]),
        ("quot(1, mul(W, G))", ["quot(1, W)", "quot(1, G)"]),
        ("add(W, mul(W, G))", ["add(W, mul(W, G))"]),
        # A score whose layers compete has no units, and none without a mean's power either.
        (
            "quot(mul(power(W, 1.4), G), power(rowmean(W), 0.4))",
            ["W", "G", "quot(power(W, 0.4), power(rowmean(W), 0.4))"],
        ),
    ],
)
def test_factors_of_are_those_of_a_product(text, factors):
    assert [factor.text for factor in factors_of(Metric.parse(text))] == factors


def test_without_each_is_the_metric_divided_by_the_factor():
    metric = Metric.parse("quot(mul(mul(W, G), exp(V)), quot(rowmean(W), sqrt(X)))")
    generator = torch.Generator().manual_seed(0)
    sizes = {"W": (3, 4), "G": (3, 4), "V": (1, 4), "X": (1, 4)}
    terminals = {name: torch.rand(*size, generator=generator) + 0.1 for name, size in sizes.items()}
    rests = without_each(metric)
    assert list(rests) == ["W", "G", "exp(V)", "quot(1, rowmean(W))", "sqrt(X)"]
    for factor, rest in rests.items():
        product = rest.score(**terminals) * Metric.parse(factor).score(**terminals)
        assert torch.allclose(product, metric.score(**terminals), rtol=1e-5)


def test_without_each_leaves_out_what_it_cannot_rank_without():
    assert list(without_each(Metric.parse("mul(W, sqrt(X))"))) == ["sqrt(X)"]
    assert without_each(Metric.parse("W")) == {}


def test_without_leaves_several_factors_out():
    metric = Metric.parse("quot(mul(mul(W, G), exp(V)), mul(rowmean(W), sqrt(X)))")
    assert without(metric, ["G", "quot(1, rowmean(W))"]).text == "mul(quot(exp(V), sqrt(X)), W)"
    assert without(metric, []) == without(without(metric, []), [])
