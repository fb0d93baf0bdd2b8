"""The statistics that a metric can name, and the running sums of which calibration makes them.

X and G are as in the Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924). Sums are fp32
whatever the weights' dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunevolve.pruning.operators import MATRIX, PER_INPUT, PER_OUTPUT, Shape, Units

# The release multiplies gradients by this before it squares them, so that they fit into fp16.
GRADIENT_FACTOR = 100.0

# Share of its mean diagonal that is added to a Gram matrix's: SparseGPT's (arXiv:2301.00774).
DAMPING = 0.01

# Gradient elements added at a time: on the CPU so few that intermediate results, up to 16 bytes for
# each, stay in its cache; on a device 256 MiB of them, for few operations.
CACHE_CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 24

Layers = Mapping[str, nn.Linear]
Sums = dict[str, dict[str, Tensor]]  # running, by layer and terminal

# What a terminal is made of: gradients need backward passes, the others forward passes alone.
Source = Literal["weight", "inputs", "output gradients", "weight gradients"]


class Seen(NamedTuple):
    """What a sum has seen."""

    windows: int
    tokens: int


@dataclass(frozen=True)
class Terminal:
    """A statistic that a metric can name."""

    shape: Shape  # the sides along which it varies
    source: Source
    units: Units
    meaning: str
    # Adds a window's values, fp32, to a sum in place; also gets the layer's weight. Values are the
    # inputs, (tokens, in_features), or gradients times `GRADIENT_FACTOR`: by the output, (tokens,
    # out_features), or by the weight, when sum, values and weight are a few rows of them.
    add: Callable[[Tensor, Tensor, Tensor], object] = lambda total, values, weight: None
    # Makes the statistic of a sum, which it may overwrite.
    finish: Callable[[Tensor, Seen], Tensor] = lambda total, seen: total
    rows: int = 1  # of a sum that does not vary by row; it starts with zeros
    gram: bool = False  # whether a sum is instead an (in_features, in_features) matrix
    signed: bool = False  # whether it can be negative

    def start(self, layer: nn.Linear, device: torch.device) -> Tensor:
        """Return the empty sum of a layer."""
        rows = layer.out_features if self.shape.by_row else self.rows
        columns = layer.in_features if self.shape.by_column else 1
        return torch.zeros(columns if self.gram else rows, columns, device=device)


_of_inputs = partial(Terminal, PER_INPUT, "inputs")
_of_weights = partial(Terminal, MATRIX, "weight gradients")


def _mean(total: Tensor, seen: Seen) -> Tensor:
    return total.div_(seen.windows)


def _add_deviations(total: Tensor, values: Tensor, _: Tensor) -> None:
    # Squared deviations are merged window by window (Chan et al., 1983): the mean square minus
    # the squared mean would cancel for a channel that is far from zero.
    mean_so_far, deviations, tokens = total.split(1)  # rows of (1, in_features)
    variance, mean = torch.var_mean(values, 0, correction=0, keepdim=True)
    share = len(values) / (tokens[0, 0].item() + len(values))
    apart = mean - mean_so_far
    deviations += len(values) * (variance + apart.square() * (1 - share))
    mean_so_far += apart * share
    tokens += len(values)


def _inverse_diagonal(total: Tensor, seen: Seen) -> Tensor:
    factor, _ = damped_factor(_mean(total, seen))
    return torch.cholesky_inverse(factor).diagonal()[None].clone()


def damped_factor(gram: Tensor) -> tuple[Tensor, int]:
    """Return the lower Cholesky factor of a Gram matrix, (n, n), which is overwritten, damped until
    it has one in fp32, else not finite; and how many times the damping grew tenfold.
    """
    diagonal = gram.diagonal().clone()
    damping = DAMPING * diagonal.mean()
    for grown in range(4):
        gram.diagonal().copy_(diagonal + damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            return factor, grown
        damping = 10 * damping + torch.finfo(gram.dtype).tiny
    return torch.full_like(gram, torch.nan), grown


TERMINALS: dict[str, Terminal] = {
    "W": Terminal(MATRIX, "weight", Units(w=1), "absolute weight"),
    "G": _of_weights(
        Units(w=-1, s=1 / 2),
        "root of the sum over windows of (100 x gradient of the loss by the weight) squared",
        lambda total, gradient, _: total.addcmul_(gradient, gradient),
        lambda total, _: total.sqrt_(),
    ),
    "X": _of_inputs(
        Units(x=2, t=1),
        "mean over windows of the squared L2 norm of an input channel over tokens; no root",
        lambda total, values, _: total.add_(values.square().sum(0, keepdim=True)),
        _mean,
    ),
    "V": _of_inputs(
        Units(x=2),
        "population variance over all tokens of the activation of an input channel",
        _add_deviations,
        lambda total, seen: total[1:2] / seen.tokens,
        rows=3,
    ),
    "B": Terminal(
        PER_OUTPUT,
        "output gradients",
        Units(w=-1, x=-1, t=-1),
        "root of the mean over all tokens of (100 x gradient of the loss by the output) squared",
        lambda total, gradient, _: total.add_(gradient.square().sum(0)[:, None]),
        lambda total, seen: total.div_(seen.tokens).sqrt_(),
    ),
    "H": _of_inputs(
        Units(x=-2, t=-1),
        "diagonal of the inverse of the inputs' Gram matrix, 1% of its mean diagonal added first",
        lambda total, values, _: total.addmm_(values.T, values),
        _inverse_diagonal,
        gram=True,
    ),
    "M": _of_weights(
        Units(w=-1, s=1),
        # Times W it is what keeping the weight gains, to first order (arXiv:2005.07683, Section 4).
        "sum over windows of -100 x gradient of the loss by the weight x sign of the weight",
        lambda total, gradient, w: total.addcmul_(gradient, w.sign().float(), value=-1),
        signed=True,
    ),
}

TERMINAL_SETS: dict[str, tuple[str, ...]] = {
    "release": ("W", "G", "X"),
    "extended": ("W", "G", "X", "V", "H", "M"),
}
"""Terminals that a search draws from if it names none, by the name of its set of operators.

B, a number of each row, is not among them: by it a search overfits how much each block of its
models can lose (docs/LOG.md: few factors, on models that a search never saw)."""

# The terminals that need calibration windows.
STATISTICS = frozenset(name for name, terminal in TERMINALS.items() if terminal.source != "weight")

GRAM = "gram"
"""The mean over windows of x x^T summed over tokens, (in_features, in_features), of a layer's
inputs x. No metric can name it; it is for those who change masks and weights."""

COLLECTED = TERMINALS | {GRAM: replace(TERMINALS["H"], shape=MATRIX, finish=_mean)}
"""All that calibration can compute."""


@contextmanager
def exact_fp32() -> Iterator[None]:
    """While open, a GPU multiplies in fp32, not in TF32, as SparseGPT's release makes it."""
    settings = torch.backends.cuda.matmul
    # From torch 2.9 on the old name cannot be read once the new one was set.
    new = hasattr(settings, "fp32_precision")
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def need_backward(terminals: frozenset[str]) -> frozenset[str]:
    """Return the terminals that need backward passes; the other statistics need none."""
    return frozenset(name for name in terminals if COLLECTED[name].source.endswith("gradients"))


def sums_size(layers: Iterable[nn.Linear], terminals: frozenset[str]) -> int:
    """Return the bytes of the running sums of some layers, and of what factors one of them."""
    layers, meta = list(layers), torch.device("meta")
    rows = [COLLECTED[name] for name in terminals & COLLECTED.keys() - {"W"}]
    sums = sum(terminal.start(layer, meta).nbytes for layer in layers for terminal in rows)
    # Those of H are factored and inverted, one layer at a time.
    return sums + ("H" in terminals) * 2 * 4 * max((x.in_features for x in layers), default=0) ** 2


def of_layer(
    statistics: Mapping[str, Tensor], layer: str, terminals: Iterable[str] = STATISTICS
) -> dict[str, Tensor]:
    """Return one layer's statistics by terminal, those that are there by `X/layer`."""
    keys = {terminal: f"{terminal}/{layer}" for terminal in sorted(terminals)}
    return {terminal: statistics[key] for terminal, key in keys.items() if key in statistics}


class Statistics(dict[str, Tensor]):
    """Statistics by `X/layer`, `G/layer` and so on, of the terminal's shape, fp32."""

    def of(self, layer: str) -> dict[str, Tensor]:
        """Return one layer's statistics by terminal, as `Metric.score` takes them."""
        return of_layer(self, layer)


@contextmanager
def watched(layers: Layers, terminals: Set[str]) -> Iterator[Sums]:
    """While open, add up what layers see, in sums by layer and terminal.

    The layers' inputs must take part in a backward pass.
    """
    sums = {
        name: {x: COLLECTED[x].start(layer, layer.weight.device) for x in sorted(terminals)}
        for name, layer in layers.items()
    }
    with ExitStack() as hooks:
        for name, layer in layers.items():
            _watch(layer, sums[name], hooks)
        yield sums


def statistics_of(sums: Sums, windows: Tensor) -> dict[str, Tensor]:
    """Turn sums over windows, (N, T), into statistics by `X/layer`; the sums are used up."""
    seen = Seen(len(windows), windows.numel())
    return {
        f"{terminal}/{layer}": COLLECTED[terminal].finish(totals.pop(terminal), seen)
        for layer, totals in sums.items()
        for terminal in list(totals)
    }


def _watch(layer: nn.Linear, sums: Mapping[str, Tensor], hooks: ExitStack) -> None:
    def watch_input(_: object, inputs: Sequence[Tensor]) -> None:
        _add(sums, "inputs", inputs[0].detach(), layer.weight)

    def watch_output(_: object, __: object, output: Tensor) -> None:
        output.register_hook(lambda g: _add(sums, "output gradients", g, layer.weight))

    def take_gradient(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        chunk = CACHE_CHUNK if gradient.device.type == "cpu" else DEVICE_CHUNK
        step = max(1, chunk // gradient.shape[1])
        for start in range(0, len(gradient), step):
            rows = slice(start, start + step)
            of_rows = {terminal: total[rows] for terminal, total in sums.items()}
            _add(of_rows, "weight gradients", gradient[rows], weight.detach()[rows])

    sources = {COLLECTED[terminal].source for terminal in sums}
    if "inputs" in sources:
        hooks.enter_context(layer.register_forward_pre_hook(watch_input))
    if "output gradients" in sources:
        hooks.enter_context(layer.register_forward_hook(watch_output))
    if "weight gradients" in sources:
        hooks.callback(layer.weight.requires_grad_(True).requires_grad_, False)
        hooks.enter_context(layer.weight.register_post_accumulate_grad_hook(take_gradient))


def _add(sums: Mapping[str, Tensor], source: Source, values: Tensor, weight: Tensor) -> None:
    values = values.reshape(-1, values.shape[-1]).float()
    if source.endswith("gradients"):
        values = values * GRADIENT_FACTOR
    for terminal, total in sums.items():
        if COLLECTED[terminal].source == source:
            COLLECTED[terminal].add(total, values, weight)
