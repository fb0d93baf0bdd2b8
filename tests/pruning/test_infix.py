"""A metric as one line of mathematics: each operator's form, and what the line means."""

import re
from decimal import Decimal, localcontext

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from toy_metrics import trees

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import LEAVES

FOUND = (
    "quot(mul(quot(sqr(mul(W, exp(colmean(quot(M, G))))), sqrt(divrms(H, H))), "
    "sqr(mul(G, sqrt(quot(W, colmean(W)))))), exp(D))"
)
EXAMPLES = {
    FOUND: "(W · exp(colmean(M / G)))² · (G · √(W / colmean W))² / (√(H / rms(H)) · exp(D))",
    NAMED["directed-snip-wanda"].text: "exp(2 · colmean(M / G)) · W² · G · √X / "
    "((rowmean W + colmean W) · rowmean(√X))",
    NAMED["pruner-zero"].text: "|W · W| · mms(G)",
    "mul(W, quot(1, mul(G, X)))": "W / (G · X)",
    "sub(W, add(neg(X), cube(G)))": "W − (−X + G³)",
    "add(W, neg(mul(2, -3)))": "W + (−2 · (−3))",
    "sqrt(pow15(sqr(sqrt(M))))": "√(((√|M|)²)^1.5)",
    "abs(sub(abs(M), log(-1e-9)))": "abs(|M| − log(−1e-09))",
    "sqr(rowmax(zsn(add(W, 1e9))))": "rowmax(zsn(W + 1e+09))²",
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.items())
def test_infix_is_one_line_of_mathematics(text, expected):
    assert Metric.parse(text).infix == expected


PLAIN = {"·": "*", "−": "-", "²": "**2", "³": "**3", "^": "**"}
FUNCTIONS = {
    name: (lambda x, shift=Decimal(number): 1 / (1 + x * x) + shift)
    for number, name in enumerate(["norm", "rms", *sorted(OPERATORS)])
} | {"abs": abs, "root": lambda x: x.sqrt(), "number": Decimal}
"""What stands as a call in a line; except for `abs`, any function that has no zero does."""

MEANINGS = FUNCTIONS | {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "quot": lambda x, y: x / y,
    "div": lambda x, y: x / FUNCTIONS["norm"](y),
    "divrms": lambda x, y: x / FUNCTIONS["rms"](y),
    "neg": lambda x: -x,
    "sqr": lambda x: x * x,
    "pow": lambda x: x * x,
    "cube": lambda x: x * x * x,
    "pow15": lambda x: abs(x) * abs(x).sqrt(),
    "sqrt": lambda x: abs(x).sqrt(),
    "root4": lambda x: abs(x).sqrt().sqrt(),
}
LEAF_VALUES = {
    name: Decimal(number) / 7 * (-1 if leaf.signed else 1)
    for number, (name, leaf) in enumerate(LEAVES.items(), 2)
}


def value_of(metric):
    """Return what the tree means, with a number for each leaf."""
    if metric.operands:
        return MEANINGS[metric.name](*map(value_of, metric.operands))
    return Decimal(metric.name) if metric.is_constant else LEAF_VALUES[metric.name]


def value_of_line(line):
    """Return what the line means, by Python's rules of precedence."""
    line = re.sub(r"\b(\w{6,}) ([\w.]+)", r"\1(\2)", line)  # rowmean W
    line = re.sub(r"\|([^|]*)\|", r"abs(\1)", line)
    line = re.sub(r"\b\d[\d.]*(e[-+]\d+)?", r"number('\g<0>')", line)
    while "√" in line or "∜" in line:
        start, sign = max((line.rfind(sign), sign) for sign in "√∜")
        end = re.compile(r"[\w.]*").match(line, start + 1).end()
        if line[end : end + 1] == "(":
            end = next(
                place + 1
                for place in range(end, len(line))
                if line[place] == ")"
                and line.count("(", end, place + 1) == line.count(")", end, place + 1)
            )
        root = "root({})" if sign == "√" else "root(root({}))"
        line = line[:start] + root.format(line[start + 1 : end]) + line[end:]
    for sign, python in PLAIN.items():
        line = line.replace(sign, python)
    return eval(line, FUNCTIONS | LEAF_VALUES)


@given(trees(st.sampled_from([*LEAVES, "0.5", "-2e-05", "1"]).map(Metric), max_leaves=12))
def test_infix_means_what_the_tree_means(metric):
    line = metric.infix
    assert line.count("(") == line.count(")")
    with localcontext() as context:
        context.prec = 60
        try:
            expected = value_of(metric)
        except ArithmeticError:  # a division by a difference of 0
            assume(False)
        assert abs(value_of_line(line) - expected) <= (abs(expected) + 1) * Decimal("1e-30")
