"""A device that is not the CPU in PyTorch's eyes, for machines without a GPU.

A `Far` tensor keeps its values on the CPU and says that it is elsewhere. As on a GPU, an operator
refuses tensors of two devices, copies between them have to be asked for, there is no `numpy()`, and
a copy to the CPU that nobody waits for is not there yet: it is NaN until an event after it.
"""

from collections import deque
from functools import cache
from itertools import count
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "far"

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])
"""A test's parameter: the GPU, if there is one."""

_kept: list[torch.library.Library] = []

_aten = torch.ops.aten
_MOVES = (_aten._to_copy, _aten.to, _aten.copy_)
_INDEXES = (_aten.index, _aten.index_put, _aten.index_put_)

_numbers = count()
_coming: deque[tuple[int, Tensor, Tensor]] = deque()
"""Copies that nobody has waited for: number, copy, and the values that it is going to have."""


def _arrive(last: float = inf) -> None:
    while _coming and _coming[0][0] <= last:
        _, copy, values = _coming.popleft()
        copy.copy_(values)


class Event:
    """A point in the device's work, as `torch.cuda.Event`."""

    def record(self) -> None:
        self._last = next(_numbers)

    def synchronize(self) -> None:
        _arrive(self._last)


class Far(Tensor):
    """A tensor on the device `far`, whose values are in `near`."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
            requires_grad=near.requires_grad,
        )
        far.near = near
        return far

    @property
    def data(self) -> Tensor:
        """The values without their history; setting it changes what the tensor holds."""
        return self.detach()

    @data.setter
    def data(self, value: "Far") -> None:
        self.near = value.near

    def tolist(self) -> Any:
        """Return the values; torch refuses it for subclasses."""
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _apply(operator, args, kwargs or {})


# Views of tensors from outside of inference mode need what tensors from within lack.
@torch.inference_mode(False)
def _apply(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kind, terminals = operator.overloadpacket, tree_leaves((args, kwargs))
    tensors = [x for x in terminals if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    asked = next((x for x in terminals if isinstance(x, torch.device)), None)
    goes_far = bool(far) if asked is None else asked.type == NAME
    if kind is _aten.copy_:
        goes_far = isinstance(args[0], Far)
    if not far and not goes_far:
        return operator(*args, **kwargs)
    # A number may come from anywhere, and an index from the CPU, as on a GPU.
    free = args[1] if kind in _INDEXES and isinstance(args[0], Far) else ()
    here = [x for x in tensors if not isinstance(x, Far) and x.dim() and not _is_in(x, free)]
    if far and here and kind not in _MOVES:
        raise RuntimeError(f"{operator} on tensors of two devices: {tuple(here[0].shape)} on cpu")
    leaves = bool(far) and not goes_far
    if kind is _aten._local_scalar_dense or (leaves and not kwargs.get("non_blocking")):
        _arrive()
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    result = operator(*near_args, **near_kwargs)
    if leaves and kwargs.get("non_blocking"):
        values, result = result, torch.full_like(result, torch.nan)
        _coming.append((next(_numbers), result, values))
    if goes_far:
        result = tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(operator, args, kwargs, result) if far else result


def _is_in(tensor: Tensor, others: Any) -> bool:
    return any(tensor is other for other in others)


def _near(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.near if isinstance(value, Far) else value


@cache
def far_device() -> str:
    """Make the device known to torch, for the rest of the process; return its name."""
    from torch.utils import backend_registration as backends

    class Module(backends._DummyBackendModule):
        Event = Event

        @staticmethod
        def get_amp_supported_dtype() -> list[torch.dtype]:
            """Return what `torch.utils.checkpoint` asks of every device that torch knows."""
            return [torch.bfloat16]

    backends._setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _apply(op, args, kwargs), "PrivateUse1")
    _kept.append(library)
    return NAME
