"""Formulas in MathML: each operator's form, and the parentheses, read back as plain text."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.baselines import BASELINES
from pruning.leaves import LEAVES
from pruning.metric import Metric
from pruning.operators import OPERATORS
from search.report.formula import to_mathml


def call(name, *operands):
    """Build a metric without the parser, so that names which it does not know can stand in it."""
    return Metric(name, tuple(Metric(o) if isinstance(o, str) else o for o in operands))


def plain(element):
    """Return a MathML element as plain text: powers as ^, subscripts as _, fractions as a/b."""
    parts = [plain(child) for child in element]
    form = {"msup": "{}^{}", "msub": "{}_{}", "mfrac": "[{}]/[{}]", "msqrt": "√[{}]"}
    if element.tag in form:
        return form[element.tag].format(*parts)
    return (element.text or "") + "".join(parts)


def formula(metric):
    return plain(ElementTree.fromstring(to_mathml(metric)))


SUM = call("add", "W", "G")
NEGATIVE = call("neg", "W")

FORMS = [
    (Metric("W"), "W"),
    (call("add", "W", "G"), "W+G"),
    (call("sub", "W", "G"), "W−G"),
    (call("mul", "W", "G"), "W⋅G"),
    (call("div", "W", "G"), "[W]/[‖G‖_F]"),
    (call("quot", "W", "G"), "[W]/[G]"),
    (call("sqr", "W"), "W^2"),
    (call("pow", "W"), "W^2"),
    (call("cube", "W"), "W^3"),
    (call("root4", NEGATIVE), "|−W|^1/4"),
    (call("pow15", "X"), "X^1.5"),
    (call("pow15", call("sqr", "X")), "(X^2)^1.5"),
    (call("neg", "W"), "−W"),
    (call("abs", "W"), "|W|"),
    (call("log", "W"), "ln(W+0.001)"),
    (call("log", call("sub", "W", "G")), "ln(|W−G|+0.001)"),
    (call("exp", "W"), "exp(W)"),
    (call("sqrt", "X"), "√[X]"),
    (call("sqrt", call("log", "X")), "√[|ln(X+0.001)|]"),
    (call("tanh", "W"), "tanh(W)"),
    (call("mms", "W"), "mms(W)"),
    (call("rowsum", "W"), "Σ_row(W)"),
    (call("colmean", "W"), "μ_col(W)"),
    (call("rowmax", "W"), "max_row(W)"),
    (call("colnorm", "W"), "‖W‖_col"),
    (call("new_one", "W", "G"), "new_one(W,G)"),
    (Metric("0.5"), "0.5"),
    (Metric("-2e-3"), "−2×10^-3"),
]

PARENTHESES = [
    (call("mul", "X", SUM), "X⋅(W+G)"),
    (call("mul", call("mul", "W", "W"), call("mul", "G", "X")), "W⋅W⋅G⋅X"),
    (call("add", SUM, SUM), "W+G+W+G"),
    (call("sub", "X", SUM), "X−(W+G)"),
    (call("sub", SUM, "X"), "W+G−X"),
    (call("add", "G", NEGATIVE), "G+(−W)"),
    (call("mul", "G", NEGATIVE), "G⋅(−W)"),
    (call("neg", SUM), "−(W+G)"),
    (call("sqr", call("mul", "W", "G")), "(W⋅G)^2"),
    (call("sqr", call("sqr", "W")), "(W^2)^2"),
    (call("sqr", call("abs", "W")), "|W|^2"),
    (call("sqr", "-2"), "(−2)^2"),
    (call("sqr", "2e3"), "(2×10^3)^2"),
]


@pytest.mark.parametrize(("metric", "expected"), FORMS)
def test_formula_writes_each_operator(metric, expected):
    assert formula(metric) == expected


@pytest.mark.parametrize(("metric", "expected"), PARENTHESES)
def test_formula_puts_parentheses_only_where_the_reading_needs_them(metric, expected):
    assert formula(metric) == expected


def test_formula_writes_wanda_as_its_paper_does():
    assert formula(BASELINES["wanda"].criterion.metric) == "W⋅√[X]"


def trees():
    leaves = st.sampled_from([*sorted(LEAVES), "0.5", "-2e-3"]).map(Metric)
    names = sorted(OPERATORS)

    def grown(children):
        return st.sampled_from(names).flatmap(
            lambda name: st.tuples(*[children] * OPERATORS[name].arity).map(
                lambda operands: Metric(name, operands)
            )
        )

    return st.recursive(leaves, grown, max_leaves=12)


@given(trees())
def test_formula_of_any_metric_is_well_formed_and_names_each_leaf(metric):
    mathml = to_mathml(metric)
    ElementTree.fromstring(mathml)
    leaves = [node.name for node in metric.nodes() if node.name in LEAVES]
    assert sorted(re.findall(r"<mi>([A-Z])</mi>", mathml)) == sorted(leaves)
