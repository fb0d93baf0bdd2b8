"""A metric as one line of mathematics, printed and read, and what the named ones are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_metrics import random_terminals, trees

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.statistics import TERMINALS

EXAMPLES = {
    NAMED["directed-snip-wanda"].text: "exp(0.2 · (colmean(M / G) / rms(colmean(M / G)))) · W² · "
    "G · √X / ((rowmean(W) + colmean(W)) · rowmean(√X))",
    NAMED["pruner-zero"].text: "|W²| · mms(G)",
    "mul(mul(G, W), divrms(mul(G, X), mul(G, X)))": "G · W · (G · X / rms(G · X))",
    "quot(mul(W, sqrt(X)), mul(W, root4(X)))": "W · √X / (W · ∜X)",
    "mul(W, quot(1, mul(G, X)))": "W / (G · X)",
    "sub(W, add(neg(X), cube(G)))": "W − (−X + G³)",
    "add(W, neg(mul(2, -3)))": "W + (−(2 · (−3)))",
    "sqrt(pow15(sqr(sqrt(M))))": "√(((√|M|)²)^1.5)",
    "abs(sub(abs(M), log(-1e-9)))": "abs(|M| − log(−1e-09))",
    "quot(quot(W, X), quot(G, M))": "W · M / (X · G)",
    "mul(quot(W, X), div(neg(X), sub(G, sub(M, W))))": "W · ((−X) / norm(G − (M − W))) / X",
    "mul(power(rowmean(W), -0.7), power(M, 1.2))": "|M|^1.2 / rowmean(W)^0.7",
    "exp(power(add(W, M), -1))": "exp(|W + M|^(−1))",
    "root4(quot(M, cube(-2)))": "∜|M / (−2)³|",
    "mul(0.12345679, mul(W, M))": "0.12345679 · W · M",
    "power(W, X)": "power(W, X)",
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.items())
def test_infix_is_one_line_of_mathematics(text, expected):
    assert Metric.parse(text).infix == expected


READ = {
    "W * sqrt(X)": "mul(W, sqrt(X))",
    "W^2 * G / rowmean(W)": "quot(mul(sqr(W), G), rowmean(W))",
    "W**2 / colmean(W) / norm(G)": "div(quot(sqr(W), colmean(W)), G)",
    "W*(X / rms(X)) / (G + M) - -2": "sub(quot(mul(W, divrms(X, X)), add(G, M)), -2)",
    "-W^1.2 * exp(V)": "mul(neg(power(W, 1.2)), exp(V))",
    "∜X · √|M|^5 / W^-1": "quot(mul(root4(X), sqrt(power(abs(M), 5))), power(W, -1))",
    "M^5 + mul(W, W^1)": "add(mul(M, power(M, 4)), mul(W, W))",
    "G": "G",
}


@pytest.mark.parametrize(("line", "text"), READ.items())
def test_line_of_mathematics_is_read(line, text):
    assert Metric.parse(line).text == text


NUMBERS = st.sampled_from(["0.3", "2", "-1.25", "1e-05", "0.12345679"]).map(Metric)
ENDS = st.one_of(st.sampled_from(sorted(TERMINALS)).map(Metric), NUMBERS)


@pytest.mark.filterwarnings("ignore:std")
@settings(deadline=None, max_examples=60)
@given(trees(ENDS, max_leaves=8))
def test_line_of_any_metric_is_read_as_one_with_its_scores(metric):
    again = Metric.parse(str(metric))
    assert str(Metric.parse(str(again))) == str(again)
    values = {name: x + 0.4 for name, x in random_terminals(5, 5, torch.float64).items()}
    found, expected = (x.score(**values).expand(5, 5) for x in (again, metric))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


W, G, X, V, B, H, M = (random_terminals(5, 7)[name] for name in "WGXVBHM")
M -= 0.6  # which has either sign
IMPORTANCE = W / W.sum(0, keepdim=True) + W / W.sum(1, keepdim=True)


def relative(values):
    return values / values.square().mean().sqrt()


DIRECTION = torch.exp(0.2 * relative((M / G).mean(0)))

# W is absolute, X squared norms.
SCORES = {
    "magnitude": W,
    "wanda": W * X**0.5,
    "ria": IMPORTANCE * (X**0.5) ** 0.5,
    "gblm": W * X**0.5 + W * G,
    "snip": W * G,
    "pruner-zero": W**2 * (G - G.min()) / (G.max() - G.min()),
    "relative-importance": IMPORTANCE,
    "ria-full": IMPORTANCE * X**0.5,
    "gblm-gradient": W * G,
    "gblm-alpha-10": W * X**0.5 + 10 * W * G / 100,
    "wanda-root": W * (X**0.5) ** 0.5,
    "symwanda": W * (X + B**2) ** 0.5,
    "symwanda-l2": (W / W.norm(dim=0) + W / W.norm(dim=1)[:, None]) * X**0.25,
    "movement": W * M,
    "sparsegpt-score": W**2 / H,
    "wifv": V * W**2,
    "wanda-sp": (W * X**0.5) ** 2,
    "flap": V * W**2,
    "taylor": W * M,
    "fisher": (W * G) ** 2,
    "directed-snip-wanda": DIRECTION
    * (W * G)
    * (W / (W.mean(1, keepdim=True) + W.mean(0)))
    * (X.sqrt() / X.sqrt().mean()),
    "directed-snip-deviation": DIRECTION
    * torch.exp(0.1 * relative((M / G).mean(1, keepdim=True)))
    * (W * G) ** 1.3
    * (W / (W.mean(1, keepdim=True) * W.mean(0)).sqrt())
    * (V.sqrt() / X.sqrt().mean()),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_metric_is_the_formula_that_it_is_said_to_be(name):
    metric = named_metric(name).metric.check_scores_weights()
    scores = metric.score(W=W, G=G, X=X, V=V, B=B, H=H, M=M)
    torch.testing.assert_close(scores, SCORES[name])
