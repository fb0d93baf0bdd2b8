"""Descents: the derivative through the mask, factors that go, and what is left of the model."""

import math
from dataclasses import replace
from functools import cache, partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional
from toy_metrics import random_terminals
from toy_models import assert_same_tensors, toy_model, toy_windows, weights_of
from toy_setup import SNIP, criterion_of, embedded_setup, made_of, small

from prunevolve.configs.schema import Search
from prunevolve.pruning.masks import Layer, Model, Neurons, NOfM, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.pruner import collect
from prunevolve.pruning.ranking import zeroed
from prunevolve.pruning.statistics import of_layer
from prunevolve.pruning.store import ResidentStore
from prunevolve.search import slope
from prunevolve.search.breeding.factors import MAX_FACTORS
from prunevolve.search.breeding.product import can_descend, factors_of, product_of_powers
from prunevolve.search.breeding.variation import Breeder, seeded
from prunevolve.search.descent import Descent, Step
from prunevolve.search.logarithms import log_scores
from prunevolve.search.records import Candidate
from prunevolve.search.slope import BAND, Ground, Logs, Slope, terms_of
from prunevolve.search.slope_of_neurons import slope_of

TARGETS = [Target(0.6, Model()), Target(0.5, Layer()), Target(0.5, Row()), Target(0.5, NOfM(2, 4))]
named = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.group.name)
POWERS = {
    **{Metric("W"): 1.2, Metric("G"): 0.8, Metric.parse("divrms(X, X)"): 0.3},
    Metric.parse("exp(divrms(rowmean(quot(M, G)), rowmean(quot(M, G))))"): -0.4,
    Metric.parse("divrms(sqr(G), mul(G, H))"): 0.2,  # grown, with its own scale
    Metric.parse("quot(W, rowmean(W))"): 0.0,  # it has a derivative, too
}
BY_MATRICES = {
    "W and G": POWERS,
    "W": {Metric("W"): 1.0, Metric("X"): 0.5, Metric.parse("divrms(rowmean(W), W)"): 0.2},
    "grown": {**POWERS, Metric.parse("exp(divrms(M, mul(G, W)))"): 0.1},
}


COUNT = 2  # of windows of a derivative


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    counts = {"STEPS": 4, "STEPS_OF_TASK": 1, "MORE_STEPS": 1, "LAST_STEPS": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, count in counts.items():
            patch.setattr(f"prunevolve.search.descent.{name}", count)
        yield


# The derivative


def ground_of(target, **settings):
    """Return where a tiny LLaMA is pruned; of no layer are there more rows than are sampled."""
    store = ResidentStore(toy_model("llama", **settings).requires_grad_(False))
    windows = toy_windows(8)
    statistics = collect(store, windows, frozenset("XGVHM"))
    master = {name: store.dense(name) for name in linear_layers(store.model)}
    return Ground(store, master, statistics, target, windows, torch.linspace(0.5, 2, 8), False)


def slope_and_exponents(ground, powers):
    exponents = torch.tensor(list(powers.values()), dtype=torch.float64)
    return slope_of(ground, Logs(ground, list(powers))), exponents


def derivative(ground, powers=POWERS):
    made, exponents = slope_and_exponents(ground, powers)
    return made.derivative(exponents, ground.windows[:COUNT], ground.weights[:COUNT])


def scores_of(ground, metric, layer):
    """Return a layer's scores by a metric, (out, in), fp64."""
    weight = ground.master[layer]
    there = {"W": weight.abs(), **of_layer(ground.statistics, layer)}
    scores = metric.score(**{name: x.double() for name, x in there.items()})
    return scores.double().expand(weight.shape)


def masks_of(ground, metric):
    fractions = dict.fromkeys(ground.master, ground.target.sparsity)
    scored = partial(scores_of, ground, metric)
    return dict(ground.target.group.select(lambda layer: scored(layer).float(), fractions))


def groups_of(matrices, group):
    """Return the weights that compete, a group in a row, of each layer or of all."""
    if group == Model():
        return [torch.cat([x.flatten() for x in matrices])[None]]
    return [group.rows(x) for x in matrices]


def worths_of(ground, masked, stays):
    """Return the derivative of the loss by each mask, of which layers' weights were made, fp64."""
    loss, weights = 0, {f"{layer}.weight": weight for layer, weight in masked.items()}
    for window, weight in zip(ground.windows[:COUNT], ground.weights, strict=False):
        logits = functional_call(ground.store.model, weights, (window[None],)).logits[0]
        loss += weight * functional.cross_entropy(logits[:-1], window[1:]) / COUNT
    return [worth.double() for worth in torch.autograd.grad(loss, stays)]


def own_derivative(ground, powers):
    """Return the derivative written out, all scores at once, and the weights that are left."""
    target, layers = ground.target, list(ground.master)
    logs, scores = [], []
    for layer in layers:
        logs.append([scores_of(ground, base, layer).log() for base in powers])
        scores.append(sum(e * x for e, x in zip(powers.values(), logs[-1], strict=True)))
    kept, nears = [], []
    for group in groups_of(scores, target.group):
        ordered = group.sort(dim=1).values
        removed = int(target.sparsity * group.shape[1])
        last, first = ordered[:, removed - 1 : removed], ordered[:, removed : removed + 1]
        # A model's threshold is the last that goes.
        middle = last if target.group == Model() else (last + first) / 2
        kept.append(group > last)
        nears.append((1 - ((group - middle) / BAND).square()).clamp(min=0))
    stays = torch.cat([x.flatten() for x in kept]).float().split([x.numel() for x in scores])
    stays = [x.view_as(y).requires_grad_() for x, y in zip(stays, scores, strict=True)]
    masked = {x: ground.master[x] * mask for x, mask in zip(layers, stays, strict=True)}
    worths = worths_of(ground, masked, stays)
    total = []
    for number in range(len(powers)):
        values = groups_of([x[number] for x in logs], target.group)
        total.append(0.0)
        for near, worth, value in zip(nears, groups_of(worths, target.group), values, strict=True):
            mean = (near * value).sum(1, keepdim=True) / near.sum(1, keepdim=True).clamp(min=1e-20)
            total[-1] += (near * worth * (value - mean)).sum().item()
    return total, masked


@named
@pytest.mark.parametrize("powers", BY_MATRICES.values(), ids=BY_MATRICES)
def test_derivative_is_the_sum_that_is_written_out(target, powers):
    ground = ground_of(target)
    found = derivative(ground, powers)
    expected, masked = own_derivative(ground, powers)
    assert max(map(abs, expected)) > 0.01
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    left = weights_of(ground.store.model)
    assert left.keys() == masked.keys() and all(torch.equal(left[x], masked[x]) for x in left)


def test_derivative_is_the_same_where_blocks_run_again_in_the_backward_pass(monkeypatch):
    ground, runs, plain = ground_of(TARGETS[0]), [], slope.checkpoint

    def counted(function, *arguments, **options):
        runs.append(function)
        return plain(function, *arguments, **options)

    monkeypatch.setattr(slope, "checkpoint", counted)
    expected = derivative(ground)
    assert runs == []
    assert torch.equal(derivative(replace(ground, low_memory=True)), expected)
    blocks = [ground.store.model.get_submodule(name) for name in ground.store.blocks]
    assert len(runs) == len(blocks)
    assert not any("forward" in vars(block) for block in blocks)


MLPS = [
    {f"model.layers.{i}.mlp.{x}_proj": x == "down" for x in ("gate", "up", "down")} for i in (0, 1)
]
STEP = 1e-4  # of a finite difference


def of_neurons_written_out(ground, powers, gone):
    """Return of each MLP how near its neurons are to the threshold, what each is worth, and the
    derivatives of its log score by each exponent, fp64.
    """
    nears, stays, slopes, masked = [], [], [], {}
    for mlp in MLPS:
        bases = {layer: [scores_of(ground, base, layer) for base in powers] for layer in mlp}

        def logs(moved, by=0.0, mlp=mlp, bases=bases):
            powered = [e + by * (i == moved) for i, e in enumerate(powers.values())]
            each = {x: prod(y**e for y, e in zip(bases[x], powered, strict=True)) for x in mlp}
            return sum(each[x].sum(0 if behind else 1) for x, behind in mlp.items()).log()

        middle = logs(None).sort().values[gone - 1 : gone + 1].mean()
        nears.append((1 - ((logs(None) - middle) / BAND).square()).clamp(min=0))
        stays.append((logs(None) > middle).float().requires_grad_())
        differences = [logs(i, STEP) - logs(i, -STEP) for i in range(len(powers))]
        slopes.append(torch.stack(differences, 1) / (2 * STEP))
        (down,) = (layer for layer, behind in mlp.items() if behind)
        masked[down] = ground.master[down] * stays[-1]
    return list(zip(nears, worths_of(ground, masked, stays), slopes, strict=True))


@pytest.mark.parametrize(("sparsity", "gone"), [(0.3, 32), (0.6, 64)])
@pytest.mark.parametrize("matrices", ["grown", "W"])
def test_derivative_where_neurons_go_is_the_sum_that_is_written_out(matrices, sparsity, gone):
    powers = BY_MATRICES[matrices]
    ground = ground_of(Target(sparsity, Neurons()), intermediate_size=96)
    expected, inside = 0, []
    for near, worth, derivatives in of_neurons_written_out(ground, powers, gone):
        mean = (near * worth).sum() / near.sum()
        expected += (near * (worth - mean)) @ derivatives
        inside.append((near, derivatives - (near @ derivatives) / near.sum()))
    assert expected.abs().max() > 0.01 and min((near > 0).sum() for near, _ in inside) > 8
    ground.store.restore({x: 0 * y for x, y in ground.master.items()})  # as a task before may leave
    found = derivative(ground, powers)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    # All is dense but what takes the output of neurons that the metric removes.
    masks = masks_of(ground, product_of_powers(powers.items()))
    left = {
        name: zeroed(weight, masks[name]) if name.endswith("down_proj") else weight
        for name, weight in ground.master.items()
    }
    assert_same_tensors(weights_of(ground.store.model), left)
    # How factors differ near the threshold decides which can be left out.
    shares = torch.cat([near for near, _ in inside])
    values = torch.cat([value for _, value in inside])
    expected = (shares[:, None] * values).T @ values / shares.sum()
    made, exponents = slope_and_exponents(ground, powers)
    torch.testing.assert_close(made.covariance(exponents), expected, rtol=1e-3, atol=1e-5)


@cache
def on_embedded(*settings):
    return made_of(embedded_setup(*small(4, length=64), *settings, terminals="XGVHM"))


ALL_COMPETE = ("pruning.group=model",)


def test_threshold_that_a_sample_of_rows_gives_removes_what_the_target_asks():
    (resident,) = on_embedded(*ALL_COMPETE).residents
    made, exponents = slope_and_exponents(resident.ground(TARGETS[0], [1.0]), POWERS)
    windows = resident.tokens["fitness"]
    try:
        made.derivative(exponents, windows, torch.ones(len(windows)))
        removed = [x.flatten() == 0 for x in weights_of(resident.store.model).values()]
    finally:
        resident.restore()
    assert torch.cat(removed).float().mean().item() == pytest.approx(0.6, abs=0.01)


# Logarithms


def test_logarithms_that_are_read_off_bits_are_exact_to_four_digits():
    x = torch.logspace(-37, 38, 6000, dtype=torch.float64).float().reshape(60, 100)
    by_row, by_column = torch.rand(60, 1), torch.rand(1, 100)
    found = log_scores([(-x, 0.5), (x.sqrt(), -1.5)], by_row, by_column)
    expected = (0.5 - 0.75) * x.double().log() + by_row + by_column
    assert (found - expected).abs().max() < 1e-4
    assert log_scores([(torch.zeros(1, 1), 1.0)] * 2, *[torch.zeros(1, 1)] * 2).isfinite().all()


SHARING = Metric.parse("mul(X, divrms(sqrt(mul(X, H)), quot(X, V)))")  # of terms that are alike


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["row", "model"]))
def test_whatever_is_bred_can_descend_and_its_terms_add_up(seed, group):
    with seeded(seed):
        metric = Breeder(Search(initial_depth=(1, 3)), group).varied.random()
    assert can_descend(metric)
    values = {name: x.double() for name, x in random_terminals(6, 8).items()}
    for base in (*factors_of(metric), SHARING):
        assert base.never_negative
        logs = [multiple * term.score(**values).log() for term, multiple in terms_of(base).items()]
        expected = base.score(**values).log().expand(6, 8)
        expected = expected.where(expected.isfinite(), sum(logs))  # an exp may leave the range
        torch.testing.assert_close(sum(logs).expand(6, 8), expected)


# Factors that go


def descent_of(ground, metric, added=()):
    return Descent(Metric.parse(metric), added, ground.target.group == Model(), [ground], (0,))


TWINS = "divrms(X, X)", "divrms(sqr(X), sqr(X))"


@named
def test_of_two_factors_that_do_the_same_one_goes_and_the_other_does_its_part(target):
    ground = ground_of(target)
    rest = "mul(mul(W, G), power(divrms(H, H), 0.5))"
    twins = "mul(power({}, 0.5), power({}, 0.3))".format(*TWINS)  # X to the power 1.1
    descent = descent_of(ground, f"mul({rest}, {twins})")
    powers, before = factors_of(descent.metric), masks_of(ground, descent.metric)
    gone = descent.leave_out()
    assert gone.text in TWINS
    left = factors_of(descent.metric)
    assert left.keys() == powers.keys() - {gone}
    of_x = {TWINS[0]: 1.1, TWINS[1]: 0.55}
    assert all(left[x] == pytest.approx(of_x[x.text], rel=0.1) for x in left if x.text in TWINS)

    def changed(metric):
        masks = masks_of(ground, metric)
        return torch.cat([(masks[x] != before[x]).flatten() for x in before]).float().mean()

    assert changed(descent.metric) < 0.02
    without = product_of_powers((x, powers[x]) for x in left)
    assert changed(descent.metric) < 0.3 * changed(without)


@pytest.mark.parametrize(
    ("target", "start", "fixed"),
    [
        (TARGETS[0], "mul(mul(sqrt(W), sqrt(G)), sqr(divrms(X, X)))", ["W", "G"]),
        (TARGETS[0], "mul(quot(W, rowmean(W)), sqrt(divrms(X, X)))", ["quot(W, rowmean(W))"]),
        (TARGETS[2], "mul(mul(sqr(W), G), divrms(X, X))", ["W"]),
        (TARGETS[3], "mul(mul(W, sqr(G)), divrms(X, X))", ["G"]),
    ],
    ids=str,
)
def test_what_gives_the_others_their_scale_never_goes(target, start, fixed):
    ground = ground_of(target)
    descent = descent_of(ground, start, (Metric.parse("mul(W, G)"), Metric.parse("divrms(H, H)")))
    for _ in range(2):
        descent.step(0.05)
    gone = []
    while base := descent.leave_out():
        gone.append(base.text)
        assert descent.metric.is_comparable or target.group != Model()
    assert len(gone) == len(set(gone)) >= 2 and not set(fixed) & set(gone)
    assert descent.removable == 0
    powers = factors_of(Metric.parse(start))  # as it was
    assert factors_of(descent.metric) == {x: powers[x] for x in powers if x.text in fixed}


def went(steps):
    """Return what a generator yielded and what it returned."""
    yielded = []
    while True:
        try:
            yielded.append(next(steps))
        except StopIteration as end:
            return yielded, end.value


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("mul(W, sqr(X))", "row"),  # of which X has the largest exponent
        ("mul(quot(W, rowmean(W)), sqr(divrms(X, X)))", "model"),
        ("mul(rowmean(W), mul(X, sqrt(H)))", "row"),  # which has no matrix
    ],
)
def test_whatever_is_left_of_a_finalist_tells_the_weights_of_a_row_and_of_a_column(
    on_tiny, text, group
):
    _, path = went(on_tiny.shortening(criterion_of(text, group), 7))
    assert [criterion.metric.problem for criterion, _ in path] == [""] * len(path)


def test_finalist_loses_one_factor_after_another_and_says_which(on_tiny):
    start = criterion_of("mul(mul(W, G), mul(divrms(X, X), sqrt(divrms(H, H))))", "model")
    steps, path = went(on_tiny.shortening(start, 7))
    assert {base.text for _, base in path} == {"divrms(X, X)", "divrms(H, H)"}
    left = [{x.text for x in factors_of(criterion.metric)} for criterion, _ in path]
    assert left == [{"W", "G", path[1][1].text}, {"W", "G"}]
    assert steps == [Step(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert went(on_tiny.shortening(start, 7))[1] == path


# From a candidate to where it leads


@pytest.fixture(scope="module")
def on_tiny(tiny_llama_dir):
    """An evaluator of two tasks on a tiny model."""
    tasks = "tasks=[{sparsity: 0.5}, {pattern: '2:4', weight: 3}]"
    model = f"model={tiny_llama_dir}"
    return made_of(embedded_setup(*small(3, length=16), model, tasks, terminals="XGVHM"))


FROM_SNIP = Candidate(5, SNIP, "descent", (2,))


def masters_of(evaluator):
    return [weights_of(resident.store.model) for resident in evaluator.residents]


def assert_as_it_was(evaluator, masters):
    for resident, master in zip(evaluator.residents, masters, strict=True):
        model = resident.store.model
        assert_same_tensors(weights_of(model), master)
        for parameter in model.parameters():
            assert parameter.grad is None and not parameter.requires_grad
            assert not parameter._post_accumulate_grad_hooks
        assert not any("forward" in vars(module) for module in model.modules())


NEURONS = ("pruning.pattern=neurons", "pruning.sparsity=0.4", "pruning.group=layer")


@pytest.mark.parametrize(
    ("settings", "start", "fewest"),
    [(ALL_COMPETE, SNIP, 3), (NEURONS, criterion_of("W", "layer"), 2)],
    ids=["model", "neurons"],
)
def test_descent_lowers_the_fitness_with_few_factors(settings, start, fewest):
    evaluator = on_embedded(*settings)
    masters, before = masters_of(evaluator), evaluator.evaluate(Candidate(5, start))
    steps, outcome = went(evaluator.evaluating(Candidate(5, start, "descent", (2,))))
    assert outcome.kind == "evaluated" and outcome.fitness < 0.9 * before.fitness
    assert fewest <= len(factors_of(outcome.tuned.metric)) <= MAX_FACTORS
    assert outcome.tuned.group == start.group
    assert outcome.tuned.metric.is_comparable or start.group != "model"
    # What it says of where it led is what that has.
    measured = evaluator.evaluate(Candidate(6, outcome.tuned))
    assert replace(outcome, tuned=None) == measured
    assert steps == [Step(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert_as_it_was(evaluator, masters)


def test_descent_follows_from_its_index_and_the_seed(on_tiny):
    outcome = on_tiny.evaluate(FROM_SNIP)
    assert on_tiny.evaluate(replace(FROM_SNIP, parents=(1,))) == outcome
    other = on_tiny.evaluate(replace(FROM_SNIP, index=6))
    assert other.tuned != outcome.tuned


def test_each_task_has_its_turn_with_its_own_weight(on_tiny, monkeypatch):
    turns, plain = [], Slope.derivative

    def noted(self, exponents, windows, weights):
        turns.append((self.ground.target.group.name, *{*weights.tolist()}))
        return plain(self, exponents, windows, weights)

    monkeypatch.setattr(Slope, "derivative", noted)
    on_tiny.evaluate(FROM_SNIP)
    names = [name for name, *_ in turns]
    assert names == (["model", "2:4"] * len(names))[: len(names)]
    # The fitness is the mean of the tasks' losses over their rises, by weight.
    cells = on_tiny.scale.cells
    expected = [pytest.approx([cell.weight / cell.rise], rel=1e-6) for cell in cells]
    assert [weights for _, *weights in turns[:2]] == expected


def broken(*arguments):
    raise KeyError("X")


@pytest.mark.parametrize("low_memory", [False, True])
def test_model_is_as_it_was_however_a_descent_ends(on_tiny, monkeypatch, low_memory):
    masters = masters_of(on_tiny)
    for resident in on_tiny.residents:
        monkeypatch.setattr(resident, "_low_memory", low_memory)
    on_tiny.evaluate(FROM_SNIP)
    assert_as_it_was(on_tiny, masters)
    unfinished = on_tiny.evaluating(FROM_SNIP)
    next(unfinished)
    unfinished.close()
    assert_as_it_was(on_tiny, masters)
    for place in ("gradient_at_head", "mean_of", "Slope.covariance"):
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(f"prunevolve.search.slope.{place}", broken)
            on_tiny.evaluate(FROM_SNIP)
        assert_as_it_was(on_tiny, masters)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_derivative_that_is_not_finite_makes_its_candidate_degenerate(on_tiny, monkeypatch, value):
    masters, plain = masters_of(on_tiny), slope.gradient_at_head
    monkeypatch.setattr(slope, "gradient_at_head", lambda *args: plain(*args) * value)
    outcome = on_tiny.evaluate(FROM_SNIP)
    assert (outcome.kind, outcome.fitness, outcome.tuned) == ("degenerate", None, None)
    assert outcome.reason == "the derivative of the loss is not finite"
    assert went(on_tiny.shortening(SNIP, 7)) == ([], [])
    assert_as_it_was(on_tiny, masters)
