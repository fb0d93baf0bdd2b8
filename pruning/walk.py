"""The walk that runs passes over a model's blocks, and prunes them.

The search scores and masks its candidates with the same code.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import Stays, stays_of
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.passes import Pass, Procedure, Removal, Step
from prunevolve.pruning.progress import Progress
from prunevolve.pruning.ranking import DegenerateScores, check_extremes, extremes, zeroed
from prunevolve.pruning.statistics import GRAM, exact_fp32, of_layer
from prunevolve.pruning.store import Store
from prunevolve.pruning.stream import Stream, logits_in_parts

_JUDGING = ("masked", "half", "updated")  # streams of the windows held back

# Maps each window's states that enter the head, (T, hidden_size), a function that makes logits of
# them, the windows, and what is called after each to the windows' losses.
Losses = Callable[..., Tensor]

# Called with a kind of something that was found out, and with it by block or layer.
Record = Callable[[str, JsonObject], object]

# Maps the key of a statistic, such as `G/layer`, and the statistic to what is kept of it.
Keep = Callable[[str, Tensor], Tensor]


@dataclass
class Walk:
    """Runs passes over the blocks, one after the other."""

    store: Store
    windows: Mapping[str, Tensor]  # token ids, (N, T), by what they are for
    terminals: frozenset[str]  # the statistics of the dense model that are wanted
    states: Offload  # where hidden states and gradients are put aside
    statistics: Offload  # where statistics of the dense model go, by `G/layer`
    on_progress: Progress
    keep: Keep
    procedure: Procedure | None = None  # how blocks are pruned; None if they are not
    forgets: bool = True  # whether a layer's statistics are dropped once it is pruned
    kept_scores: MutableMapping[str, Tensor] | None = None
    record: Record = lambda name, value: None
    losses: Losses | None = None
    guard: JsonObject = field(default_factory=dict)  # what came of it
    part: float | None = None  # that blocks are mixed by; None while they are pruned
    behind: dict[str, Tensor] = field(default_factory=dict)  # statistics behind pruned blocks
    # Layer names and what goes of them, in the order in which they are pruned.
    removals: Iterator[tuple[str, Removal]] | None = None
    streams: dict[str, Stream] = field(default_factory=dict)

    @exact_fp32()
    def run(self, passes: Sequence[Pass]) -> None:
        """Run passes in order."""
        backward = any(each.keeps_inputs for each in passes)
        with _frozen(self.store.model) if backward else nullcontext():
            for each in passes:
                order = [*self.store.blocks]
                if each.name == "backward":
                    order.reverse()
                selects = each.prunes or each.name == "threshold"
                if self.procedure and selects and self.removals is None:
                    self.removals = self._select(self.procedure, order)
                if each.name != "threshold":
                    self._run(each, order)

    @exact_fp32()
    def mix(self, part: float) -> None:
        """Write all blocks a part of the way from masked to updated, and measure the model."""
        self.part = part
        mixes = Pass("prune", prunes=("write",), pruned=(Step("pruned", "pruned perplexity"),))
        self._run(mixes, [*self.store.blocks])

    def _run(self, each: Pass, order: list[str]) -> None:
        store = self.store
        self.on_progress(each.name, 0, len(order))
        self._start(each)
        dense = [step for step in each.dense if step.stream in self.streams]
        pruned = [step for step in each.pruned if step.stream in self.streams]
        pruned = [step for step in pruned if step.way != "apart"]
        judges = "masked" in self.streams
        for done, (block, following) in enumerate(zip(order, [*order[1:], None], strict=True), 1):
            prunes = bool(each.prunes) and (judges or not self.is_done(block))
            is_new = prunes and block not in store.written
            if dense or prunes:
                with store.open_dense(block, following) as module:
                    for step in dense:
                        self._take(step, block, module)
                    if prunes:
                        self._renew(block, module)
                    for step in pruned if is_new else []:
                        self._take(step, block, module)
            if pruned and not is_new:
                with store.open(block) as module:
                    for step in pruned:
                        self._take(step, block, module)
            self.on_progress(each.name, done, len(order))
        self._end(each)

    def _start(self, each: Pass) -> None:
        """Let the windows of a pass enter the first block."""
        # The calibration windows pass the dense model once more as targets, for a training.
        sources = {"targets": "calibration", **dict.fromkeys(_JUDGING, "held_back")}
        source_of = {x: sources.get(x, x) for x in each.enters}
        entering = [x for x, source in source_of.items() if source in self.windows]
        with self.store.outside() if entering else nullcontext():
            for name in entering:
                windows = self.windows[source_of[name]].to(self.store.device)
                kept = each.keeps_inputs and name == "calibration"
                self.streams[name] = Stream(name, windows, self.states, kept)
                self.streams[name].embed(self.store.model)

    def _end(self, each: Pass) -> None:
        """Measure, differentiate or delete what has left the last block, or gradients the first."""
        with self.store.outside() if self.streams else nullcontext():
            if "masked" in self.streams:
                self._judge()
            for name, stream in list(self.streams.items()):
                if name in ("dense", "pruned"):
                    self.record("losses", {name: self._losses(stream).tolist()})
                elif each.keeps_inputs:
                    stream.differentiate(self.store.model)
                    continue
                else:
                    stream.drop(0 if each.name == "backward" else len(self.store.blocks))
                del self.streams[name]

    def _judge(self) -> None:
        """Choose how much of the update stays, by the losses of windows held back."""
        found = [self._losses(self.streams.pop(name)).mean().item() for name in _JUDGING]
        part = part_chosen(*found)
        self.guard = {**dict(zip(("without", "half", "with"), found, strict=True)), "part": part}
        if part < 1 and "pruned" in self.streams:  # it will be measured on what is mixed
            self.streams.pop("pruned").drop(len(self.store.blocks))

    def _losses(self, stream: Stream) -> Tensor:
        """Return the losses of the windows of a stream that has left the last block."""
        model, windows = self.store.model, stream.windows
        assert self.losses
        stage, total = f"{stream.name} perplexity", len(windows)
        states, logits = stream.leave(model), partial(logits_in_parts, model)
        return self.losses(
            states, logits, windows, lambda done: self.on_progress(stage, done, total)
        )

    def _take(self, step: Step, block: str, module: nn.Module) -> None:
        waits, i = step.way == "wait", self.store.blocks.index(block)
        if waits and block in self.store.written:
            return
        terminals = step.terminals if waits else step.terminals & self.missing(block)
        layers, stream = self.store.layers[block], self.streams[step.stream]
        for key, statistic in stream.take(step.way, i, module, layers, terminals).items():
            if waits:
                self.behind[key] = statistic
            else:
                self.statistics[key] = self.keep(key, statistic)

    def missing(self, block: str) -> frozenset[str]:
        """Return the terminals of the dense model that a block needs and that are not there yet."""
        if self.is_done(block):
            return frozenset()
        layers = self.store.layers[block]
        return frozenset(
            x for x in self.terminals if any(f"{x}/{y}" not in self.statistics for y in layers)
        )

    def is_done(self, block: str) -> bool:
        """Whether a block's scores are no longer needed; one threshold needs all to the end."""
        written = self.store.written
        mixes = self.part is not None
        needs_all = not mixes and self.procedure is not None and self.procedure.needs_all_scores
        return block in written and (not needs_all or written.issuperset(self.store.blocks))

    # A layer's way: its statistics, its scores by them, its mask by the scores, its weight by that.

    def _score_by(self, metric: Metric, layer: str) -> Tensor:
        """Return a layer's scores, (out_features, in_features), fp32 and finite."""
        statistics = of_layer(self.statistics, layer, metric.terminals)
        if self.procedure and self.procedure.sequential:
            statistics |= of_layer(self.behind, layer, metric.terminals)
        here = {terminal: tensor.to(self.store.device) for terminal, tensor in statistics.items()}
        absolute = self.store.weight(layer).abs() if "W" in metric.terminals else None
        scores = metric.score(W=absolute, **here)
        check_extremes(metric.text, layer, *extremes(scores))
        return scores

    def _score(self, metric: Metric, layer: str) -> Tensor:
        """Return a layer's scores by the procedure's metric, kept or new."""
        if self.kept_scores is None:
            return self._score_by(metric, layer)
        if layer not in self.kept_scores:
            self.kept_scores[layer] = self._score_by(metric, layer)
        return self.kept_scores[layer]

    def _select(self, procedure: Procedure, order: list[str]) -> Iterator[tuple[str, Removal]]:
        """Decide what goes of each layer: now, or when it is due if the group allows that."""
        store, target = self.store, procedure.target
        left = [block for block in order if not self.is_done(block)]
        layers = [layer for block in left for layer in store.layers[block]]
        fractions = dict.fromkeys(layers, target.sparsity)
        if procedure.own_masks:
            return iter(fractions.items())
        return target.group.select(partial(self._score, procedure.metric), fractions)

    def _renew(self, block: str, module: nn.Module) -> None:
        """Make an open block's new weights, and write them if they are not yet."""
        store, is_new = self.store, block not in self.store.written
        store.finish()  # the block before it does not wait in memory beside these scores
        if self.part is not None:
            weights, stays = store.updated(block)
            weights = {x: between(store.dense(x), y, self.part) for x, y in weights.items()}
        else:
            weights, stays = ({}, {}) if self.is_done(block) else self._pruned(block, module)
            if "masked" in self.streams:
                changed = weights if is_new else store.updated(block)[0]
                self._pass_apart("masked", 0.0, block, module, changed)
                self._pass_apart("half", 0.5, block, module, changed)
        if is_new:  # even if all its layers are skipped
            store.write(block, weights, stays)

    def _pruned(self, block: str, module: nn.Module) -> tuple[dict[str, Tensor], Stays]:
        """Return an open block's masked and updated weights, and what stays of layers that become
        narrower; nothing if it is written.
        """
        procedure, is_new = self.procedure, block not in self.store.written
        assert procedure and self.removals
        weights: dict[str, Tensor] = {}
        stays: dict[str, tuple[int, Tensor]] = {}
        for layer in self.store.layers[block]:
            name, removal = next(self.removals)
            assert name == layer, (name, layer)
            if is_new:
                weights[layer] = self._changed(procedure, layer, removal)
                if isinstance(removal, Tensor):  # a block's masks together would take much memory
                    stays |= stays_of({layer: removal})
            for terminal in self.terminals | procedure.pruned_terminals:
                self.behind.pop(f"{terminal}/{layer}", None)
                if self.forgets:
                    self.statistics.pop(f"{terminal}/{layer}", None)
        if is_new and procedure.training and "targets" in self.streams:
            i = self.store.blocks.index(block)
            examples = self.streams["calibration"].examples(i, self.streams["targets"])
            weights, errors = procedure.training(block, module, weights, examples)
            self.record("training", {block: dict(errors)})
        return weights, stays

    def _pass_apart(
        self, stream: str, part: float, block: str, module: nn.Module, changed: Mapping[str, Tensor]
    ) -> None:
        """Let a stream pass a block with its layers' weights a part of the way to changed ones."""
        store, parameters = self.store, dict[str, Tensor]()
        for layer, weight in changed.items():
            dense = store.weight(layer)
            weight = weight.to(store.dense(layer).dtype)  # as it is once it is written
            mixed = between(dense, weight, part).to(dense.dtype)
            parameters[f"{layer.removeprefix(f'{block}.')}.weight"] = mixed

        def apart(*arguments: object, **keywords: object) -> Tensor:
            output: Tensor = functional_call(module, parameters, arguments, keywords)
            return output

        i = store.blocks.index(block)
        self.streams[stream].take("apart", i, apart, {}, frozenset())

    def _changed(self, procedure: Procedure, layer: str, removal: Removal) -> Tensor:
        dense = self.store.dense(layer)
        if not procedure.update:
            assert isinstance(removal, Tensor)
            return zeroed(dense, removal)
        try:
            weight, grown = procedure.update(dense, removal, self.behind[f"{GRAM}/{layer}"])
        except DegenerateScores as error:
            raise DegenerateScores(f"layer {layer}: {error}") from error
        if grown:
            self.record("damping", {layer: grown})
        return weight


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, only watched parameters take part in a backward pass."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def part_chosen(without: float, half: float, all_of_it: float) -> float:
    """Return the part of an update's way, in tenths, where a parabola through losses is lowest.

    Masks by gradients can lower the loss of little pruning below the dense model's, and to restore
    the dense outputs undoes that. Where the parabola has no lowest point, or losses are not finite,
    it is the best of the three.
    """
    curve = 2 * (without - 2 * half + all_of_it)
    if math.isfinite(curve) and curve > 0:
        return round(min(max((3 * without - 4 * half + all_of_it) / (2 * curve), 0.0), 1.0), 1)
    losses = {0.0: without, 0.5: half, 1.0: all_of_it}
    return min((x for x in losses if math.isfinite(losses[x])), key=losses.__getitem__, default=0.0)


def between(dense: Tensor, changed: Tensor, part: float) -> Tensor:
    """Return weights, fp32, a part of the way from dense ones to changed ones, and 0 where these
    are.
    """
    masked = zeroed(dense, changed == 0).float()
    # Changed ones that are not finite make nothing else finite.
    return torch.lerp(masked, changed.to(masked.device).float(), part) if part else masked
