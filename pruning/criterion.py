"""A criterion: a metric and the comparison group that it is meant for."""

from dataclasses import dataclass

from pruning.masks import GROUPS
from pruning.metric import Metric


@dataclass(frozen=True)
class Criterion:
    """What decides which weights go.

    Attributes:
        metric: Scores every weight.
        group: One of `pruning.masks.GROUPS`: which weights compete with one another. An n:m
            pattern has its own groups.
    """

    metric: Metric
    group: str

    @staticmethod
    def parse(text: str, group: str) -> "Criterion":
        """Read a criterion from its metric's text and its group.

        Raises:
            ValueError: If the group is unknown, and as `Metric.parse` and `check_scores_weights`.
        """
        if group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r:.40}")
        return Criterion(Metric.parse(text).check_scores_weights(), group)

    @property
    def text(self) -> str:
        """The metric's text, without the group."""
        return self.metric.text

    def __str__(self) -> str:
        return f"{self.group}:{self.metric.text}"
