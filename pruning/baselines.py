"""Published pruning metrics, written in the metric language, each with its comparison group."""

from dataclasses import dataclass

from pruning.metric import Metric


@dataclass(frozen=True)
class Baseline:
    """A named metric: its formula, the group in which weights compete, and its source."""

    text: str
    group: str
    source: str

    @property
    def metric(self) -> Metric:
        return Metric.parse(self.text)


BASELINES: dict[str, Baseline] = {
    "magnitude": Baseline(
        "W", "layer", "Han et al., 2015, arXiv:1506.02626; over each whole matrix"
    ),
    "wanda": Baseline("mul(W, sqrt(X))", "row", "Sun et al., 2024, arXiv:2306.11695, Section 3"),
    "gblm": Baseline("mul(W, add(G, sqrt(X)))", "row", "Das et al., 2024, arXiv:2311.04902"),
    "snip": Baseline(
        "mul(W, G)", "model", "Lee et al., 2019, arXiv:1810.02340; G over many samples"
    ),
    "pruner-zero": Baseline(
        "mul(abs(mul(W, W)), mms(G))", "row", "Dong et al., 2024, arXiv:2406.02924"
    ),
}
"""RIA (arXiv:2402.12354) divides by row and column sums, which this language cannot say."""
