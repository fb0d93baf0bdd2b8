"""One mask, one fingerprint; a metric that cannot prune is refused with the reason."""

import hashlib

import pytest
import torch

from pruning.calibration import Statistics
from pruning.masks import Target
from pruning.metric import Metric
from search.fingerprint import ROWS, Probe, fingerprint, take_probe, tensors_digest

HALF = Target(0.5, "row")
TWO_OF_FOUR = Target(0.5, "row", (2, 4))


def probe(seed: int = 0, x_scale: float = 1.0) -> Probe:
    """Two layers on different scales, 6 rows of 16 inputs; all leaves positive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.1

    names = {"a": 1.0, "b": 3.0}
    weights = {name: draw(6, 16) * scale - 0.8 for name, scale in names.items()}
    X = {name: draw(1, 16) * x_scale for name in names}
    G = {name: draw(6, 16) for name in names}
    return Probe(weights, Statistics(X, G))


def mark(text: str, target: Target = HALF, on: Probe | None = None) -> str:
    return fingerprint(Metric.parse(text), target, on or probe())


def refusal(text: str, target: Target = HALF, on: Probe | None = None) -> str:
    with pytest.raises(ValueError) as error:
        mark(text, target, on)
    return str(error.value)


# Same and different masks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("W", "sqr(W)"),
        ("W", "sqrt(W)"),
        ("W", "log(W)"),
        ("W", "add(W, W)"),
        ("mul(W, sqrt(X))", "mul(X, sqr(W))"),
        ("mul(W, G)", "add(log(mul(W, G)), log(mul(W, G)))"),
        ("mul(W, G)", "zsn(mul(G, W))"),
        ("W", "div(W, X)"),
    ],
)
def test_fingerprint_is_shared_by_formulas_of_one_order(one, other, seed):
    assert mark(one, on=probe(seed)) == mark(other, on=probe(seed))


def test_fingerprint_differs_where_the_mask_does():
    texts = ("W", "neg(W)", "G", "mul(W, G)", "add(W, G)", "mul(W, sqrt(X))", "sub(W, G)")
    assert len({mark(text) for text in texts}) == len(texts)


def test_fingerprint_depends_on_the_target():
    targets = [
        *(Target(0.5, group) for group in ("row", "layer", "model")),
        *(Target(0.25, "row"), TWO_OF_FOUR, Target(0.5, "row", (4, 8))),
    ]
    assert len({mark("W", target) for target in targets}) == len(targets)


def test_fingerprint_across_the_model_tells_layers_on_one_scale_from_layers_on_their_own():
    assert mark("W", HALF) == mark("mms(W)", HALF)
    assert mark("W", Target(0.5, "layer")) == mark("mms(W)", Target(0.5, "layer"))
    assert mark("W", Target(0.5, "model")) != mark("mms(W)", Target(0.5, "model"))


def test_fingerprint_of_n_of_m_is_shared_by_formulas_of_one_order():
    assert mark("W", TWO_OF_FOUR) == mark("sqr(W)", TWO_OF_FOUR)
    assert mark("W", TWO_OF_FOUR) != mark("G", TWO_OF_FOUR)


def test_fingerprint_is_a_hash_of_the_packed_mask():
    weights = {"a": torch.tensor([[0.3, -0.1, 0.4, 0.2], [5.0, 6.0, -1.0, 2.0]])}
    # Row by row 0101 and 0011: one byte.
    expected = hashlib.sha256(bytes([0b01010011])).hexdigest()[:16]
    assert mark("W", on=Probe(weights, Statistics())) == expected


# Degenerate metrics


@pytest.mark.parametrize("text", ["sub(W, W)", "tanh(exp(exp(exp(W))))"])
def test_fingerprint_refuses_constant_scores(text):
    assert refusal(text) == f"layer a: the scores of '{text}' are constant"


@pytest.mark.parametrize("text", ["zsn(sub(W, W))", "exp(exp(exp(exp(exp(W)))))"])
def test_fingerprint_refuses_scores_that_are_not_finite(text):
    assert refusal(text) == f"layer a: the scores of '{text}' are not finite"


@pytest.mark.parametrize("target", [HALF, Target(0.5, "layer"), Target(0.5, "model"), TWO_OF_FOUR])
@pytest.mark.parametrize("text", ["X", "div(X, W)", "mul(X, sqrt(X))"])
def test_fingerprint_refuses_a_metric_of_x_alone(text, target):
    assert refusal(text, target) == f"'{text}' prunes the same inputs in every row"


def test_fingerprint_refuses_a_metric_in_which_x_drowns_the_weights():
    assert refusal("add(W, X)", on=probe(x_scale=1e5)) == (
        "'add(W, X)' prunes the same inputs in every row"
    )
    assert mark("add(W, X)")


def test_fingerprint_takes_a_metric_whose_rows_differ_in_one_layer_alone():
    one = probe(x_scale=1e5)
    one.statistics.X["a"].div_(1e5)
    assert mark("add(W, X)", on=one)


def test_fingerprint_refuses_a_pattern_that_does_not_divide_the_inputs():
    message = refusal("W", Target(0.5, "row", (3, 7)))
    assert message == "in_features must be a multiple of the group length 7, got 16"


# The probe


def model_tensors(blocks: int, rows: int) -> tuple[dict[str, torch.Tensor], Statistics]:
    names = [f"layers.{i}.{part}" for i in range(blocks) for part in ("mlp.up", "attn.q")]
    count = torch.arange(float(rows))[:, None]
    weights = {name: (count + i / 10).expand(rows, 4).bfloat16() for i, name in enumerate(names)}
    X = {name: torch.ones(1, 4) for name in names}
    G = {name: count.expand(rows, 4) * 2 for name in names}
    return weights, Statistics(X, G)


def test_take_probe_takes_an_early_a_middle_and_a_late_block():
    weights, statistics = model_tensors(blocks=12, rows=4)
    taken = take_probe(weights, statistics, {f"layers.{i}": None for i in range(12)})
    assert list(taken.weights) == [
        f"layers.{i}.{part}" for i in (0, 11, 6) for part in ("attn.q", "mlp.up")
    ]


def test_take_probe_of_one_block_takes_it_once():
    weights, statistics = model_tensors(blocks=1, rows=4)
    taken = take_probe(weights, statistics, {"layers.0": None})
    assert list(taken.weights) == ["layers.0.attn.q", "layers.0.mlp.up"]


def test_take_probe_takes_every_statistic_that_is_there_on_the_same_rows():
    name, count = "layers.0.up", torch.arange(40.0)[:, None]
    statistics = Statistics(A={name: torch.ones(1, 4)}, V={name: torch.ones(1, 4)}, B={name: count})
    taken = take_probe({name: count.expand(40, 4)}, statistics, {"layers.0": None}).statistics
    assert taken.B[name][:, 0].tolist() == list(range(0, 32, 2))
    assert taken.A[name].shape == taken.V[name].shape == (1, 4)
    assert not taken.X and not taken.G


@pytest.mark.parametrize(("rows", "step", "count"), [(40, 2, 16), (16, 1, 16), (5, 1, 5)])
def test_take_probe_takes_the_same_evenly_spaced_rows_of_w_and_g(rows, step, count):
    weights, statistics = model_tensors(blocks=1, rows=rows)
    taken = take_probe(weights, statistics, {"layers.0": None})
    assert count <= ROWS
    expected = torch.arange(0.0, step * count, step)
    assert torch.equal(taken.weights["layers.0.mlp.up"][:, 0], expected)
    assert torch.equal(taken.statistics.G["layers.0.mlp.up"][:, 0], 2 * expected)
    assert taken.statistics.X["layers.0.mlp.up"].shape == (1, 4)
    assert taken.weights["layers.0.mlp.up"].dtype == torch.float32


def test_take_probe_is_a_copy():
    weights = {"layers.0.a": torch.ones(2, 4)}
    statistics = Statistics({"layers.0.a": torch.ones(1, 4)}, {"layers.0.a": torch.ones(2, 4)})
    taken = take_probe(weights, statistics, {"layers.0": None})
    for tensor in (weights, statistics.X, statistics.G):
        tensor["layers.0.a"].zero_()
    assert all(tensor.all() for tensor in taken.to_tensors().values())


def test_probe_comes_back_from_its_tensors_whatever_their_order():
    one = probe()
    tensors = one.to_tensors()
    assert set(tensors) == {"W/a", "W/b", "G/a", "G/b", "X/a", "X/b"}
    again = Probe.from_tensors(dict(reversed(tensors.items())))
    assert list(again.weights) == ["a", "b"]
    assert all(torch.equal(again.to_tensors()[key], tensors[key]) for key in tensors)
    for target in (HALF, Target(0.5, "model"), TWO_OF_FOUR):
        assert mark("mul(W, G)", target, again) == mark("mul(W, G)", target, one)


# Digests of tensors


def test_tensors_digest_sees_every_name_and_value_and_no_order():
    tensors = {"W/a": torch.ones(2, 3), "X/a": torch.zeros(1, 3, dtype=torch.bfloat16)}
    changed = {
        "value": tensors | {"W/a": torch.ones(2, 3).index_fill_(1, torch.tensor([2]), 1.0001)},
        "name": {"W/b": tensors["W/a"], "X/a": tensors["X/a"]},
        "missing": {"W/a": tensors["W/a"]},
    }
    digest = tensors_digest(tensors)
    assert digest == tensors_digest(dict(reversed(tensors.items())))
    assert len({digest, *map(tensors_digest, changed.values())}) == 4


def test_tensors_digest_is_of_values_not_of_their_layout():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensors_digest({"a": matrix.T.contiguous().T}) == tensors_digest({"a": matrix})
