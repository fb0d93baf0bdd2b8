"""The exponents of a formula against what its score does when a layer's scales change."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from toy_metrics import trees

from prunevolve.pruning import operators
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import TERMINALS, Seen

OUT, IN, TOKENS, WINDOWS = 3, 4, 5, 2


class Layer:
    """A layer with what flows into it and the gradients that flow back: its statistics follow."""

    def __init__(self, weight, inputs, gradients):
        self.weight, self.inputs, self.gradients = weight, inputs, gradients

    def scaled(self, c, d):
        """The same function of a network: its outputs grow by c d, so that gradients shrink."""
        return Layer(c * self.weight, d * self.inputs, self.gradients / (c * d))

    def repeated(self, k):
        return Layer(
            self.weight.repeat(k, k), self.inputs.repeat(1, 1, k), self.gradients.repeat(1, 1, k)
        )

    def calibrated(self, windows, length):
        """More windows, and longer ones, so that a token's part in the mean loss shrinks."""
        inputs, gradients = (
            x.repeat(windows, length, 1) for x in (self.inputs, self.gradients / length)
        )
        return Layer(self.weight, inputs, gradients)

    def terminals(self, names):
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        values = {"W": self.weight.abs()}
        for name in names - {"W"}:
            terminal = TERMINALS[name]
            total = terminal.start(linear, self.weight.device).double()
            for inputs, gradients in zip(self.inputs, self.gradients, strict=True):
                window = {
                    "inputs": inputs,
                    "output gradients": gradients,
                    "weight gradients": gradients.T @ inputs,
                }[terminal.source]
                terminal.add(total, window, self.weight)
            windows, tokens = self.inputs.shape[:2]
            values[name] = terminal.finish(total, Seen(windows, windows * tokens))
        return values

    def score(self, metric):
        return evaluated(metric, self.terminals(metric.terminals))


def evaluated(metric, terminals):
    if metric.operands:
        return OPERATORS[metric.name].function(*(evaluated(x, terminals) for x in metric.operands))
    if metric.is_constant:
        return torch.full((1, 1), metric.value, dtype=torch.float64)
    return terminals[metric.name]


def layer_of(seed):
    """In fp64, so that only guards and units matter; eighths, of which all sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((OUT, IN), (WINDOWS, TOKENS, IN), (WINDOWS, TOKENS, OUT))
    halves = (torch.randint(-16, 16, size, generator=generator) + 0.5 for size in sizes)
    return Layer(*(x.double() / 8 for x in halves))


def units_of(metric):
    assume(" has " not in metric.problem and metric.units)
    return metric.units


def agree(metric, before, after, factor):
    assume(before.isfinite().all() and after.isfinite().all())
    assume(before.abs().max() < 1e100 and before.abs().min() > 1e-100)
    torch.testing.assert_close(after, before * factor, rtol=1e-5, atol=0)


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """Without the smallest divisor, which has no units; what it guards is not finite then."""
    monkeypatch.setattr(operators, "SMALLEST_DIVISOR", 0.0)


EXAMPLES = settings(max_examples=100, deadline=None)
LAYERS = st.integers(0, 2**32).map(layer_of)


def metrics(of=TERMINALS, without=()):
    return trees(st.sampled_from([*of, "0.5", "2"]).map(Metric), 5, without)


@pytest.mark.filterwarnings("ignore:std")
@EXAMPLES
@given(metrics(), LAYERS, st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([0.25, 2.0]))
def test_score_scales_by_its_exponents_with_weights_and_activations(metric, layer, c, d):
    units = units_of(metric)
    before, after = layer.score(metric), layer.scaled(c, d).score(metric)
    agree(metric, before, after, c**units.w * d**units.x)


# H inverts the Gram matrix, which copies of one input make singular; the std of zsn is unbiased.
@EXAMPLES
@given(metrics(TERMINALS.keys() - {"H"}, without=["zsn"]), LAYERS, st.sampled_from([2, 3]))
def test_score_scales_by_its_exponent_with_the_sides_of_a_layer(metric, layer, k):
    units = units_of(metric)
    before, after = layer.score(metric), layer.repeated(k).score(metric)
    repeats = [a // b for a, b in zip(after.shape, before.shape, strict=True)]
    agree(metric, before.repeat(*repeats), after, k**units.n)


@EXAMPLES
@given(metrics(without=["zsn"]), LAYERS, st.sampled_from([1, 4]), st.sampled_from([1, 2]))
def test_score_scales_by_its_exponents_with_the_amount_of_calibration(metric, layer, more, longer):
    units = units_of(metric)
    before, after = layer.score(metric), layer.calibrated(more, longer).score(metric)
    agree(metric, before, after, more**units.s * longer**units.t)


@pytest.mark.parametrize("text", ["mul(W, add(G, sqrt(X)))", "exp(colmean(quot(M, G)))"])
def test_metric_whose_operands_do_not_go_together_has_no_units(text):
    assert Metric.parse(text).units is None


def test_metric_can_be_compared_if_a_layers_scales_and_sides_do_not_change_it():
    assert Metric.parse("mul(W, G)").is_comparable  # s^0.5, which is the same for all layers
    assert not Metric.parse("mul(W, sqrt(X))").is_comparable
    assert not Metric.parse("quot(W, rowsum(W))").is_comparable
