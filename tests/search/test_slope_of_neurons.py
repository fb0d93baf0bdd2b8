"""Descents where neurons go: the derivative by the exponents of a metric, and the model after."""

from math import prod

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from toy_models import assert_same_tensors, toy_model, toy_windows, weights_of
from toy_setup import criterion_of, embedded_setup, made_of, small

from prunevolve.pruning.masks import Neurons, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.pruner import collect
from prunevolve.pruning.ranking import zeroed
from prunevolve.pruning.statistics import of_layer
from prunevolve.pruning.store import ResidentStore
from prunevolve.search.breeding.factors import MAX_FACTORS
from prunevolve.search.breeding.product import factors_of, product_of_powers
from prunevolve.search.records import Candidate
from prunevolve.search.slope import BAND, Ground, Logs
from prunevolve.search.slope_of_neurons import slope_of

STEP = 1e-4  # of a finite difference
POWERS = {
    "W and G": {
        **{Metric("W"): 1.2, Metric("G"): 0.8, Metric.parse("divrms(X, X)"): 0.3},
        Metric.parse("exp(divrms(rowmean(quot(M, G)), rowmean(quot(M, G))))"): -0.4,
        Metric.parse("divrms(sqr(G), mul(G, H))"): 0.2,  # grown, with its own scale
        Metric.parse("quot(W, rowmean(W))"): 0.0,  # it has a derivative, too
    },
    "W": {Metric("W"): 1.0, Metric("X"): 0.5, Metric.parse("divrms(rowmean(W), W)"): 0.2},
}
MLPS = [
    {f"model.layers.{i}.mlp.{x}_proj": x == "down" for x in ("gate", "up", "down")} for i in (0, 1)
]


@pytest.fixture(params=[0.3, 0.6])
def ground(request):
    store = ResidentStore(toy_model("llama", intermediate_size=96).requires_grad_(False))
    windows, target = toy_windows(4), Target(request.param, Neurons())
    statistics = collect(store, windows, frozenset("XGVHM"))
    master = {name: store.dense(name) for name in linear_layers(store.model)}
    return Ground(store, master, statistics, target, windows, torch.linspace(0.5, 2, 4), False)


def scores_of(ground, metric, layer):
    """Return a layer's scores by a metric, (out, in), fp64."""
    weight = ground.master[layer]
    scores = metric.score(W=weight.abs(), **of_layer(ground.statistics, layer))
    return scores.expand(weight.shape).double()


def written_out(ground, powers):
    """Return of each MLP how near its neurons are to the threshold, what each is worth, and the
    derivatives of its log score by each exponent, fp64.
    """
    nears, stays, slopes, masked, loss = [], [], [], {}, 0
    for mlp in MLPS:
        bases = {layer: [scores_of(ground, base, layer) for base in powers] for layer in mlp}

        def logs(moved, by=0.0, mlp=mlp, bases=bases):
            powered = [e + by * (i == moved) for i, e in enumerate(powers.values())]
            each = {x: prod(y**e for y, e in zip(bases[x], powered, strict=True)) for x in mlp}
            return sum(each[x].sum(0 if behind else 1) for x, behind in mlp.items()).log()

        ordered, gone = logs(None).sort().values, {0.3: 32, 0.6: 64}[ground.target.sparsity]
        middle = ordered[gone - 1 : gone + 1].mean()
        nears.append((1 - ((logs(None) - middle) / BAND).square()).clamp(min=0))
        stays.append((logs(None) > middle).float().requires_grad_())
        differences = [logs(i, STEP) - logs(i, -STEP) for i in range(len(powers))]
        slopes.append(torch.stack(differences, 1) / (2 * STEP))
        (down,) = (layer for layer, behind in mlp.items() if behind)
        masked[f"{down}.weight"] = ground.master[down] * stays[-1]
    for window, weight in zip(ground.windows[:2], ground.weights, strict=False):
        logits = functional_call(ground.store.model, masked, (window[None],)).logits[0]
        loss += weight * functional.cross_entropy(logits[:-1], window[1:]) / 2
    worths = [worth.double() for worth in torch.autograd.grad(loss, stays)]
    return list(zip(nears, worths, slopes, strict=True))


@pytest.mark.parametrize("powers", POWERS.values(), ids=POWERS)
def test_derivative_is_the_sum_that_is_written_out(ground, powers):
    slope = slope_of(ground, Logs(ground, list(powers)))
    exponents = torch.tensor(list(powers.values()), dtype=torch.float64)
    expected, inside = 0, []
    for near, worth, derivatives in written_out(ground, powers):
        mean = (near * worth).sum() / near.sum()
        expected += (near * (worth - mean)) @ derivatives
        inside.append((near, derivatives - (near @ derivatives) / near.sum()))
    assert expected.abs().max() > 0.01 and min((near > 0).sum() for near, _ in inside) > 8
    ground.store.restore({x: 0 * y for x, y in ground.master.items()})  # as a task before may leave
    found = slope.derivative(exponents, ground.windows[:2], ground.weights[:2])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    # All is dense but what takes the output of neurons that the metric removes.
    metric = product_of_powers(powers.items())
    fractions = dict.fromkeys(ground.master, ground.target.sparsity)
    masks = dict(Neurons().select(lambda x: scores_of(ground, metric, x).float(), fractions))
    left = {
        name: zeroed(weight, masks[name]) if name.endswith("down_proj") else weight
        for name, weight in ground.master.items()
    }
    assert_same_tensors(weights_of(ground.store.model), left)
    # How factors differ near the threshold decides which can be left out.
    shares = torch.cat([near for near, _ in inside])
    values = torch.cat([value for _, value in inside])
    covariance = (shares[:, None] * values).T @ values / shares.sum()
    torch.testing.assert_close(slope.covariance(exponents), covariance, rtol=1e-3, atol=1e-5)


def test_descent_ends_evaluated_with_few_factors_and_leaves_the_model_as_it_was(monkeypatch):
    for name, count in {"STEPS": 4, "STEPS_OF_TASK": 1, "MORE_STEPS": 1, "LAST_STEPS": 2}.items():
        monkeypatch.setattr(f"prunevolve.search.descent.{name}", count)
    target = ("pruning.pattern=neurons", "pruning.sparsity=0.4", "pruning.group=layer")
    evaluator = made_of(embedded_setup(*small(3, length=64), *target, terminals="XGVHM"))
    (resident,) = evaluator.residents
    before, start = weights_of(resident.store.model), criterion_of("W", "layer")
    outcome = evaluator.evaluate(Candidate(5, start, "descent", (2,)))
    assert outcome.kind == "evaluated" and outcome.tuned.group == "layer"
    assert 1 < len(factors_of(outcome.tuned.metric)) <= MAX_FACTORS
    assert outcome.fitness < 0.9 * evaluator.evaluate(Candidate(6, start)).fitness
    assert outcome.fitness == evaluator.evaluate(Candidate(7, outcome.tuned)).fitness
    assert_same_tensors(weights_of(resident.store.model), before)
    for parameter in resident.store.model.parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks
