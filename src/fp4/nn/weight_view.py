"""What others see as the ``weight`` of a packed layer: a dense tensor whose values are computed when they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Packed(Protocol):
    """What has a weight that is packed until somebody writes to it: a layer, or one projection of an experts module."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    def device(self) -> torch.device:
        """Device of what holds the weight."""

    @property
    def weight(self) -> Tensor:
        """A view while the weight is packed, else the dense weight."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Values of the weight."""

    def become_dense(self, weight: Tensor) -> None:
        """Take a dense weight in place of the packed one."""


class EditedWeight(nn.Parameter):
    """The dense weight of a layer whose packed weight somebody has written to.

    Its ``data`` may be assigned the :class:`WeightView` that the layer had before: what was written to that view has
    reached this weight already.
    """

    @property
    def data(self) -> Tensor:
        """The values."""
        values: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return values

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value.dense() if isinstance(value, WeightView) else value)  # type: ignore[attr-defined]


class WeightView(Tensor):
    """The weight ``[..., N, K]`` of a packed layer, in the dtype of the model, without memory of its own.

    Shape, dtype and device are known at once. Any operation that reads values dequantizes them for that operation and
    keeps nothing. An operation that writes to the view, to some of its elements or to a slice of it, or an assignment
    to its ``data``, gives the layer a dense weight with the new values in place of the packed one. Only the parts that
    one operation makes several of (``chunk``, ``unbind``) are copies.

    Args:
        layer: what holds the packed weight.
    """

    _layer: Packed
    #: Makes ``isinstance(view, nn.Parameter)`` true, which libraries ask before they use a weight.
    _is_param = True
    #: Keeps a model's ``_init_weights`` from writing random values, as some do to the weights of child modules.
    _is_hf_initialized = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: Packed) -> WeightView:  # noqa: D102  (the class describes it)
        view: WeightView = Tensor._make_wrapper_subclass(
            cls, layer.shape, dtype=layer.dtype, device=layer.device, requires_grad=False
        )
        view._layer = layer
        return view

    def dense(self) -> Tensor:
        """The values, in a tensor of their own unless the layer holds a dense weight by now."""
        return self._layer.dequantize(self.dtype) if self._is_packed else self._layer.weight.detach()

    @property
    def _is_packed(self) -> bool:
        return isinstance(self._layer.weight, WeightView)

    def _write(self) -> Tensor:
        """The memory of the values, for writing; the layer becomes dense."""
        if self._is_packed:
            self._layer.become_dense(self.dense())
        return self.dense()

    @property
    def data(self) -> Tensor:
        """The view itself: what is written to it reaches the layer, as it does with a parameter's ``data``."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
            self._layer.become_dense(value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the dense values."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        kwargs = dict(kwargs or {})
        written = _written(func, args, kwargs)
        for view in written:
            view._write()
        if (
            func.is_view
            and isinstance(args[0], WeightView)
            and isinstance(func._schema.returns[0].type, torch.TensorType)
        ):
            return WeightSlice(args[0], functools.partial(_apply, func, args[1:], kwargs))
        result = func(*tree_map_only(WeightView, cls.dense, args), **tree_map_only(WeightView, cls.dense, kwargs))
        # An operation in place returns its first argument, which has the new values through its layer.
        return written[0] if written and not isinstance(result, tuple) else result

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write some elements; the layer becomes dense."""
        self._write()[index] = value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """What ``print`` shows: the values, as of a dense weight."""
        return repr(self.dense())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """The values as a numpy array, as :meth:`torch.Tensor.numpy` gives them."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """The values in nested lists."""
        return self.dense().tolist()


class WeightSlice(WeightView):
    """Part of the weight of a packed layer, or its elements in another order.

    It has the values in memory of its own until somebody writes to the weight or to the slice; then it is a view of the
    dense weight, as a slice of any tensor is.

    Args:
        whole: the weight, or another slice of it.
        select: the operation that takes the slice.
    """

    _whole: WeightView
    _select: Callable[[Tensor], Tensor]
    _cached: Tensor
    _is_param = False

    @staticmethod
    def __new__(cls, whole: WeightView, select: Callable[[Tensor], Tensor]) -> WeightSlice:  # noqa: D102
        values = select(whole.dense())
        part: WeightSlice = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            dtype=values.dtype,
            device=values.device,
            requires_grad=False,
        )
        part._whole, part._select, part._cached = whole, select, values
        return part

    def dense(self) -> Tensor:
        """The values; they share the memory of the layer's weight once that is dense."""
        return self._cached if self._is_packed else self._select(self._whole.dense())

    @property
    def _is_packed(self) -> bool:
        return self._whole._is_packed

    def _write(self) -> Tensor:
        return self._select(self._whole._write())

    @property
    def data(self) -> Tensor:
        """The slice itself; what is assigned is written to the weight."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
            self._write().copy_(value)


def _apply(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: Tensor) -> Tensor:
    result: Tensor = func(first, *args, **kwargs)
    return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[WeightView]:
    """The views among the arguments that an operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, WeightView):
                found.append(value)
    return found
