"""Metrics as LaTeX: each operator's form, the parentheses, and that mathtext can draw them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser

from pruning.baselines import BASELINES
from pruning.latex import to_latex
from pruning.leaves import LEAVES
from pruning.metric import Metric
from pruning.operators import RELEASE


def call(name, *operands):
    """Build a metric without the parser, so that names which it does not know can stand in it."""
    return Metric(name, tuple(Metric(o) if isinstance(o, str) else o for o in operands))


def draw(latex):
    return MathTextParser("path").parse(f"${latex}$")


SUM = call("add", "W", "G")
UNSIGNED = call("neg", "W")

FORMS = [
    (Metric("W"), "W"),
    (Metric("A"), "A"),
    (call("add", "W", "G"), "W + G"),
    (call("sub", "W", "G"), "W - G"),
    (call("mul", "W", "G"), r"W \, G"),
    (call("div", "W", "G"), r"\frac{W}{\left\|G\right\|_F}"),
    (call("quot", "W", "G"), r"\frac{W}{G}"),
    (call("sqr", "W"), "W^{2}"),
    (call("pow", "W"), "W^{2}"),
    (call("cube", "W"), "W^{3}"),
    (call("root4", UNSIGNED), r"\left|-W\right|^{1/4}"),
    (call("pow15", "X"), "X^{1.5}"),
    (call("pow15", call("sqr", "X")), r"\left(X^{2}\right)^{1.5}"),
    (call("neg", "W"), "-W"),
    (call("skp", "W"), "W"),
    (call("abs", "W"), r"\left|W\right|"),
    (call("abs", call("abs", "W")), r"\left|W\right|"),
    (call("log", "W"), r"\ln\left(W + 0.001\right)"),
    (call("log", call("sub", "W", "G")), r"\ln\left(\left|W - G\right| + 0.001\right)"),
    (call("exp", "W"), r"\exp\left(W\right)"),
    (call("sqrt", "X"), r"\sqrt{X}"),
    (call("sqrt", call("log", "X")), r"\sqrt{\left|\ln\left(X + 0.001\right)\right|}"),
    (call("tanh", "W"), r"\tanh\left(W\right)"),
    (call("mms", "W"), r"\mathrm{mms}\left(W\right)"),
    (call("zsn", "W"), r"\mathrm{zsn}\left(W\right)"),
    (call("rowsum", "W"), r"\Sigma_{\mathrm{row}}\left(W\right)"),
    (call("rowmean", "W"), r"\mu_{\mathrm{row}}\left(W\right)"),
    (call("rowmax", "W"), r"\max_{\mathrm{row}}\left(W\right)"),
    (call("rownorm", "W"), r"\left\|W\right\|_{\mathrm{row}}"),
    (call("colsum", "W"), r"\Sigma_{\mathrm{col}}\left(W\right)"),
    (call("colmean", "W"), r"\mu_{\mathrm{col}}\left(W\right)"),
    (call("colmax", "W"), r"\max_{\mathrm{col}}\left(W\right)"),
    (call("colnorm", "W"), r"\left\|W\right\|_{\mathrm{col}}"),
    (call("new_one", "W", "G"), r"\mathrm{new\_one}\left(W,\, G\right)"),
    (Metric("0.5"), "0.5"),
    (Metric("-2e-3"), r"-2 \times 10^{-3}"),
]


@pytest.mark.parametrize(("metric", "latex"), FORMS)
def test_to_latex_writes_each_operator_and_mathtext_draws_it(metric, latex):
    assert to_latex(metric) == latex
    draw(latex)


PARENTHESES = [
    (call("mul", "X", SUM), r"X \, \left(W + G\right)"),
    (call("mul", call("mul", "W", "W"), call("mul", "G", "X")), r"W \, W \, G \, X"),
    (call("add", SUM, SUM), "W + G + W + G"),
    (call("sub", "X", SUM), r"X - \left(W + G\right)"),
    (call("sub", SUM, "X"), "W + G - X"),
    (call("add", "G", UNSIGNED), r"G + \left(-W\right)"),
    (call("mul", "G", UNSIGNED), r"G \, \left(-W\right)"),
    (call("neg", SUM), r"-\left(W + G\right)"),
    (call("sqr", call("mul", "W", "G")), r"\left(W \, G\right)^{2}"),
    (call("sqr", call("sqr", "W")), r"\left(W^{2}\right)^{2}"),
    (call("sqr", call("tanh", "W")), r"\left(\tanh\left(W\right)\right)^{2}"),
    (call("sqr", call("abs", "W")), r"\left|W\right|^{2}"),
    (call("sqr", "-2"), r"\left(-2\right)^{2}"),
    (call("sqr", "2e3"), r"\left(2 \times 10^{3}\right)^{2}"),
    (call("mul", "W", "0.5"), r"W \cdot 0.5"),
    (call("mul", "0.5", "W"), r"0.5 \, W"),
    (call("mul", call("abs", "W"), call("abs", "G")), r"\left|W\right| \cdot \left|G\right|"),
    (call("mul", call("skp", SUM), "X"), r"\left(W + G\right) \, X"),
]


@pytest.mark.parametrize(("metric", "latex"), PARENTHESES)
def test_to_latex_puts_parentheses_only_where_the_reading_needs_them(metric, latex):
    assert to_latex(metric) == latex
    draw(latex)


def test_to_latex_writes_wanda_as_its_paper_does():
    assert to_latex(BASELINES["wanda"].criterion.metric) == r"W \, \sqrt{X}"


def trees():
    leaves = st.sampled_from(sorted(LEAVES)).map(Metric)
    names = sorted(RELEASE)

    def grown(children):
        return st.sampled_from(names).flatmap(
            lambda name: st.tuples(*[children] * RELEASE[name].arity).map(
                lambda operands: Metric(name, operands)
            )
        )

    return st.recursive(leaves, grown, max_leaves=12)


@given(trees())
def test_mathtext_draws_any_metric(metric):
    draw(to_latex(metric))
