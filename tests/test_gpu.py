"""The engine on another device gives what it gives on the CPU: on CUDA, and on a pretended one."""

import pytest
import torch
from far_device import CUDA, far_device
from toy_models import toy_model, toy_windows
from toy_setup import embedded_setup, made_of

from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import linear_layers, load_config
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.run.job import procedure_of
from prunevolve.pruning.run.options import Method
from prunevolve.pruning.statistics import STATISTICS
from prunevolve.pruning.store import FolderStore, ResidentStore
from prunevolve.pruning.stream import Stream
from prunevolve.search.records import Candidate

MODEL = Target(0.37, Model())

# Now, while tests are collected: torch asks for devices once, at the first gradient.
FAR = far_device()


@pytest.fixture(params=[CUDA, FAR])
def device(request):
    """A device that is not the CPU."""
    return request.param


@pytest.mark.parametrize(
    "target", [Target(0.5, Row()), Target(0.6, Layer()), Target(0.5, NOfM(2, 4)), MODEL]
)
def test_masks_are_those_of_the_cpu(target, device):
    # One decimal: many ties.
    scores = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    layers = {"a": scores, "b": 2 * scores}
    fractions = dict.fromkeys(layers, target.sparsity)
    elsewhere = dict(target.group.select(lambda name: layers[name].to(device), fractions))
    for name, mask in target.group.select(layers.__getitem__, fractions):
        assert torch.equal(elsewhere[name].cpu(), mask)


@pytest.mark.parametrize("device", [CUDA, pytest.param(FAR, marks=pytest.mark.slow)], indirect=True)
def test_an_evaluator_measures_what_it_measures_on_the_cpu(device):
    metric, outcomes = "mul(W, add(mul(0.5, B), quot(V, rowsum(X))))", []
    for place in ("cpu", device):
        settings = ("tasks=[{}, {pattern: '2:4'}]", "search.stages=[1]")
        terminals = "".join(STATISTICS)
        evaluator = made_of(embedded_setup(*settings, terminals=terminals, device=place))
        outcomes.append(evaluator.evaluate(Candidate(0, Criterion.parse(metric, "model"))))
    assert outcomes[1].kind == outcomes[0].kind
    # A near tie may fall the other way where sums run in another order.
    assert outcomes[1].rises == pytest.approx(outcomes[0].rises, rel=5e-3)


@pytest.mark.parametrize(("group", "held"), [(Row(), 0), (Model(), 2)])
def test_folder_pruned_with_blocks_elsewhere_is_that_of_the_cpu(tmp_path, group, held, device):
    toy_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="4KB")
    zeros = []
    for place in ("cpu", device):
        shards = tmp_path / place
        shards.mkdir()
        store = FolderStore(
            Checkpoint(tmp_path / "dense"),
            load_config(str(tmp_path / "dense")),
            *("float32", place, shards, held),
        )
        metric = Metric.parse("mul(W, add(G, mul(X, abs(M))))")
        prune(store, Procedure(metric, Target(0.5, group)), {"calibration": toy_windows()})
        weights = [Checkpoint(store.shard(block)) for block in store.blocks]
        read = [one.read(name).flatten() for one in weights for name in one.entries]
        zeros.append(torch.cat(read) == 0)
    # A near tie may fall the other way where sums run in another order.
    assert (zeros[0] != zeros[1]).float().mean() < 0.01


def test_states_are_put_aside_while_the_device_goes_on(device):
    began = []

    class States(dict):
        def __setitem__(self, key, value):
            began.append(key)
            assert value.device.type == "cpu" and not value.isnan().any()
            super().__setitem__(key, value)

    model = toy_model("llama").to(device)
    stream = Stream("calibration", toy_windows().to(model.device), States())
    stream.embed(model)
    began.clear()
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: began.append("run"))
    stream.forward(0, block, {})
    keys = [f"calibration.1.{window}" for window in range(3)]
    assert began == ["run", "run", keys[0], "run", *keys[1:]]


@pytest.mark.parametrize(
    ("methods", "own_masks"),
    [
        ({}, True),
        ({"update": "sparsegpt"}, False),
        ({"update": "reconstruct", "allocation": "owl"}, False),
    ],
    ids=str,
)
def test_methods_around_a_metric_give_near_what_they_give_on_the_cpu(methods, own_masks, device):
    weights = []
    for place in ("cpu", device):
        model = toy_model("llama").to(place)
        recipe = procedure_of(
            Method(**methods), Criterion.parse("mul(W, sqrt(X))", "layer"), own_masks
        )
        prune(ResidentStore(model), recipe, {"calibration": toy_windows(count=4)})
        layers = linear_layers(model).values()
        weights.append(torch.cat([layer.weight.detach().flatten().cpu() for layer in layers]))
    one, other = weights
    assert ((one == 0) != (other == 0)).float().mean() < 0.02
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99
