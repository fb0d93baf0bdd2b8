"""A metric as one line of mathematics: each operator's form, and what binds tighter."""

import pytest

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.metric import Metric

FOUND = (
    "quot(mul(quot(sqr(mul(W, exp(colmean(quot(M, G))))), sqrt(divrms(H, H))), "
    "sqr(mul(G, sqrt(quot(W, colmean(W)))))), exp(D))"
)
EXAMPLES = {
    FOUND: "(W · exp(colmean(M / G)))² · (G · √(W / colmean W))² / (√(H / rms(H)) · exp(D))",
    NAMED["directed-snip-wanda"].text: "exp(0.2 · colmean(M / G) / rms(colmean(M / G))) · W² · "
    "G · √X / "
    "((rowmean W + colmean W) · rowmean(√X))",
    NAMED["pruner-zero"].text: "|W²| · mms(G)",
    "mul(mul(G, W), divrms(mul(G, X), mul(G, X)))": "G² · W · X / rms(G · X)",
    "quot(mul(W, sqrt(X)), mul(W, root4(X)))": "∜X",
    "mul(W, quot(1, mul(G, X)))": "W / (G · X)",
    "sub(W, add(neg(X), cube(G)))": "W − (−X + G³)",
    "add(W, neg(mul(2, -3)))": "W + (−2 · (−3))",
    "sqrt(pow15(sqr(sqrt(M))))": "√(((√|M|)²)^1.5)",
    "abs(sub(abs(M), log(-1e-9)))": "abs(|M| − log(−1e-09))",
    "sqr(rowmax(zsn(add(W, 1e9))))": "rowmax(zsn(W + 1e+09))²",
    "quot(quot(W, X), quot(G, M))": "W · M / (X · G)",
    "quot(W, sqr(neg(add(X, G))))": "W / (−(X + G))²",
    "mul(quot(W, X), div(neg(X), sub(G, sub(M, W))))": "W · (−X) / (X · norm(G − (M − W)))",
    "power(mul(W, G), 0.3)": "(W · G)^0.3",
    "mul(power(rowmean(W), -0.7), power(M, 1.2))": "|M|^1.2 / rowmean(W)^0.7",
    "exp(power(add(W, M), -1))": "exp(|W + M|^(−1))",
    "root4(quot(M, cube(-2)))": "∜|M / (−2)³|",
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.items())
def test_infix_is_one_line_of_mathematics(text, expected):
    assert Metric.parse(text).infix == expected
