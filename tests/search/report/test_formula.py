"""Formulas in MathML: each operator's form, and the parentheses, read back as plain text."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_metrics import trees

from prunevolve.pruning.leaves import LEAVES
from prunevolve.pruning.metric import Metric
from prunevolve.search.report.formula import to_mathml


def plain(element):
    """Return a MathML element as plain text: powers as ^, subscripts as _, fractions as a/b."""
    parts = [plain(child) for child in element]
    form = {"msup": "{}^{}", "msub": "{}_{}", "mfrac": "[{}]/[{}]", "msqrt": "√[{}]"}
    if element.tag in form:
        return form[element.tag].format(*parts)
    return (element.text or "") + "".join(parts)


def formula(metric):
    return plain(ElementTree.fromstring(to_mathml(metric)))


FORMS = {
    "add(W, G)": "W+G",
    "sub(W, G)": "W−G",
    "div(W, G)": "[W]/[‖G‖_F]",
    "quot(W, G)": "[W]/[G]",
    "sqr(W)": "W^2",
    "pow(W)": "W^2",
    "cube(W)": "W^3",
    "root4(neg(W))": "|−W|^1/4",
    "pow15(X)": "X^1.5",
    "pow15(sqr(X))": "(X^2)^1.5",
    "abs(W)": "|W|",
    "log(W)": "ln(W+0.001)",
    "log(sub(W, G))": "ln(|W−G|+0.001)",
    "exp(W)": "exp(W)",
    "mul(W, sqrt(X))": "W⋅√[X]",
    "sqrt(log(X))": "√[|ln(X+0.001)|]",
    "mms(W)": "mms(W)",
    "rowsum(W)": "Σ_row(W)",
    "colmean(W)": "μ_col(W)",
    "rowmax(W)": "max_row(W)",
    "colnorm(W)": "‖W‖_col",
    "-2e-30": "−2×10^-30",
    # Parentheses stand only where the reading needs them.
    "mul(X, add(W, G))": "X⋅(W+G)",
    "mul(mul(W, W), mul(G, X))": "W⋅W⋅G⋅X",
    "add(add(W, G), add(W, G))": "W+G+W+G",
    "sub(X, add(W, G))": "X−(W+G)",
    "sub(add(W, G), X)": "W+G−X",
    "add(G, neg(W))": "G+(−W)",
    "mul(G, neg(W))": "G⋅(−W)",
    "neg(add(W, G))": "−(W+G)",
    "sqr(mul(W, G))": "(W⋅G)^2",
    "sqr(sqr(W))": "(W^2)^2",
    "sqr(abs(W))": "|W|^2",
    "sqr(-2)": "(−2)^2",
    "sqr(2e3)": "(2×10^3)^2",
}


@pytest.mark.parametrize(("text", "expected"), FORMS.items())
def test_formula_writes_each_operator(text, expected):
    assert formula(Metric.parse(text)) == expected


def test_formula_writes_an_unknown_operator_by_its_name():
    assert formula(Metric("new_one", (Metric("W"), Metric("G")))) == "new_one(W,G)"


@given(trees(st.sampled_from([*LEAVES, "0.5", "-2e-3"]).map(Metric), max_leaves=12))
def test_formula_of_any_metric_is_well_formed_and_names_each_leaf(metric):
    mathml = to_mathml(metric)
    ElementTree.fromstring(mathml)
    leaves = [node.name for node in metric.nodes() if node.name in LEAVES]
    assert sorted(re.findall(r"<mi>([A-Z])</mi>", mathml)) == sorted(leaves)
