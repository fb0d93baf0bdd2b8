"""Drawings of one metric: its formula, and its tree."""

from collections.abc import Iterator

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from pruning.latex import to_latex
from pruning.metric import Metric
from search.report.charts import STYLE, svg_of
from search.report.palette import LIGHT


def formula_svg(name: str, metric: Metric) -> Markup:
    """Draw the formula as outlines, so that the reader needs no font.

    Args:
        name: Unique in the page.
    """
    outlines = {"svg.fonttype": "path", "mathtext.fontset": "cm", "text.parse_math": True}
    with matplotlib.rc_context({**STYLE, **outlines}):
        figure = Figure()
        # Display-style fractions, as LaTeX sets them in a formula on its own line.
        displayed = to_latex(metric).replace(r"\frac", r"\dfrac")
        figure.text(0, 0, f"${displayed}$", fontsize=13)
        return svg_of(figure, name, metric.text, bbox_inches="tight", pad_inches=0.04)


def tree_svg(name: str, metric: Metric) -> Markup:
    """Draw the tree, root on top: leaves side by side, operators centred above their operands."""
    nodes = list(_placed(metric, 0, [0]))
    columns = 1 + max(x for _, x, _, _ in nodes)
    longest = max(len(node.name) for node, _, _, _ in nodes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * (0.3 + 0.085 * longest), 0.5 * (metric.depth + 1)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(-metric.depth - 0.5, 0.5))
        axes.axis("off")
        for node, x, depth, children in nodes:
            for child in children:
                axes.plot(
                    [x, child], [-depth, -depth - 1], color=LIGHT["edge"], linewidth=1, zorder=1
                )
            colour = LIGHT["operator"] if node.operands else LIGHT["leaf"]
            box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": LIGHT["edge"]}
            axes.text(x, -depth, node.name, ha="center", va="center", bbox=box)
        description = f"Tree of {metric.text}: {metric.size} nodes, {metric.depth + 1} levels"
        return svg_of(figure, name, description)


def _placed(
    metric: Metric, depth: int, free: list[int]
) -> Iterator[tuple[Metric, float, int, list[float]]]:
    """Yield every node with its column, its depth and its operands' columns, the root last.

    Args:
        free: A list of one number, the next free column; updated here.
    """
    if not metric.operands:
        yield metric, free[0], depth, []
        free[0] += 1
        return
    columns = []
    for operand in metric.operands:
        subtree = list(_placed(operand, depth + 1, free))
        yield from subtree
        columns.append(subtree[-1][1])
    yield metric, (columns[0] + columns[-1]) / 2, depth, columns
