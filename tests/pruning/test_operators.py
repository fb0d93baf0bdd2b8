"""Every operator of the table against values worked by hand."""

import math
from itertools import product

import pytest
import torch

from prunevolve.pruning.operators import EXTENDED, OPERATORS, RELEASE
from prunevolve.pruning.statistics import TERMINAL_SETS

A = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
B = torch.tensor([[2.0, 5.0], [-1.0, 4.0]])
ROW = torch.tensor([[3.0, 4.0]])


def apply(name, *operands):
    return OPERATORS[name].function(*operands)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add", (A, B), [[3.0, 3.0], [2.0, 4.0]]),
        ("sub", (A, B), [[-1.0, -7.0], [4.0, -4.0]]),
        ("mul", (A, B), [[2.0, -10.0], [-3.0, 0.0]]),
        ("mul", (A, ROW), [[3.0, -8.0], [9.0, 0.0]]),
        ("sqr", (A,), [[1.0, 4.0], [9.0, 0.0]]),
        ("pow", (A,), [[1.0, 4.0], [9.0, 0.0]]),
        ("neg", (A,), [[-1.0, 2.0], [-3.0, 0.0]]),
        ("skp", (A,), [[1.0, -2.0], [3.0, 0.0]]),
        ("abs", (A,), [[1.0, 2.0], [3.0, 0.0]]),
        ("sqrt", (torch.tensor([[4.0, -9.0]]),), [[2.0, 3.0]]),
        # The range of A is [-2, 3].
        ("mms", (A,), [[0.6, 0.0], [1.0, 0.4]]),
        ("quot", (A, B), [[0.5, -0.4], [-3.0, 0.0]]),
        ("quot", (B, torch.tensor([[2.0], [-4.0]])), [[1.0, 2.5], [0.25, -1.0]]),
        # The divisor is kept away from zero, and keeps its sign.
        (
            "quot",
            (torch.ones(1, 1), torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 1e-12, -1e-11]])),
            [[1e12, 1e12, 1e12, -1e12, 1e12, -1e11]],
        ),
        ("power", (torch.tensor([[4.0, -9.0, 0.0]]), torch.tensor([[1.5]])), [[8.0, 27.0, 0.0]]),
        ("power", (torch.tensor([[4.0, 0.0]]), torch.tensor([[-0.5]])), [[0.5, 1e6]]),
        ("root4", (torch.tensor([[16.0, -81.0]]),), [[2.0, 3.0]]),
        ("pow15", (torch.tensor([[4.0, -9.0]]),), [[8.0, 27.0]]),
        ("cube", (A,), [[1.0, -8.0], [27.0, 0.0]]),
        ("rowsum", (A,), [[-1.0], [3.0]]),
        ("rowmean", (A,), [[-0.5], [1.5]]),
        ("rowmax", (A,), [[1.0], [3.0]]),
        ("rownorm", (A,), [[5**0.5], [3.0]]),
        ("colsum", (A,), [[4.0, -2.0]]),
        ("colmean", (A,), [[2.0, -1.0]]),
        ("colmax", (A,), [[3.0, 0.0]]),
        ("colnorm", (A,), [[10**0.5, 2.0]]),
        ("rowrms", (A,), [[2.5**0.5], [4.5**0.5]]),
        ("colrms", (A,), [[5**0.5, 2**0.5]]),
        # The norm of all of A is sqrt(1 + 4 + 9), whatever the place.
        ("div", (ROW, A), [[3 / 14**0.5, 4 / 14**0.5], [3 / 14**0.5, 4 / 14**0.5]]),
        # Broadcast to two rows, (3, 4) has the norm sqrt(2 * 25), not 5.
        ("div", (A, ROW), [[1 / 50**0.5, -2 / 50**0.5], [3 / 50**0.5, 0.0]]),
        ("log", (torch.tensor([[0.0, -0.5]]),), [[math.log(0.001), math.log(0.501)]]),
        ("tanh", (torch.tensor([[0.5, 20.0, 30.0]]),), [[math.tanh(0.5), 1.0, 1.0]]),
        # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, over n - 1 = 3.
        (
            "zsn",
            (torch.tensor([[1.0, 2.0], [3.0, 6.0]]),),
            [[-2 / (14 / 3) ** 0.5, -1 / (14 / 3) ** 0.5], [0.0, 3 / (14 / 3) ** 0.5]],
        ),
        # (3, 4) over two rows: the mean of the squares is 12.5, as over one.
        ("divrms", (A, ROW), [[12.5**-0.5, -2 * 12.5**-0.5], [3 * 12.5**-0.5, 0.0]]),
    ],
)
def test_operator_gives_the_value_worked_by_hand(name, operands, expected):
    torch.testing.assert_close(apply(name, *operands), torch.tensor(expected))


def test_exp_clamps_at_one_hundred_and_still_overflows_above_88_7():
    result = apply("exp", torch.tensor([[0.0, -1.0, 88.0, 89.0, 1000.0]]))
    torch.testing.assert_close(result[0, :2], torch.tensor([1.0, math.exp(-1)]))
    assert result.isinf().tolist() == [[False, False, False, True, True]]
    in_double = apply("exp", torch.tensor([1000.0], dtype=torch.float64))
    assert in_double.item() == pytest.approx(math.exp(100))


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_treats_each_of_several_matrices_as_if_it_were_alone_and_writes_to_none(name):
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(2, 3, 5, 4, generator=generator) for _ in "xy"]
    operands = operands[: OPERATORS[name].arity]
    before = [operand.clone() for operand in operands]
    together = apply(name, *operands)
    for place in product(range(2), range(3)):
        alone = apply(name, *(operand[place] for operand in operands))
        torch.testing.assert_close(together[place], alone)
    assert together.dtype == torch.float32
    assert all(map(torch.equal, operands, before))


def test_release_holds_the_operators_and_leaves_of_the_release():
    binary = {name for name, operator in RELEASE.items() if operator.arity == 2}
    assert binary == {"add", "sub", "mul", "div"}
    unary = {"sqr", "pow", "neg", "skp", "abs", "log", "exp", "sqrt", "tanh", "mms", "zsn"}
    assert RELEASE.keys() == binary | unary
    assert TERMINAL_SETS["release"] == ("W", "G", "X")
    assert TERMINAL_SETS["extended"] == ("W", "G", "X", "V", "H", "M")
    assert EXTENDED.items() > RELEASE.items()


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if row.unsigned])
def test_function_for_what_is_never_negative_gives_the_same_bits(name):
    values = torch.tensor([[0.0, -0.0, 1e-20, 1e-12, 3.0, math.inf, math.nan]])
    operator, first = OPERATORS[name], torch.tensor([[-2.0], [0.0], [5.0]])
    one, other = (f(first, values) for f in (operator.function, operator.unsigned))
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))
