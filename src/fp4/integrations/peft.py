"""LoRA on packed experts: what PEFT's ``target_parameters`` finds there, and how the adapter runs.

PEFT puts LoRA on the 3D parameters of an experts module. In a dense module it adds the low-rank product to the whole
stack before each forward pass. Here the stack stays packed: the base runs in packed kernels, and each expert's rows
are multiplied with its own low-rank factors. The adapter's tensors have the names and shapes that they have in the
dense model, so the same file fits both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from fp4.nn import FP4Experts, FP4Linear
from fp4.nn.grouped import LowRank


@contextlib.contextmanager
def experts_shown(model: nn.Module, config: Any) -> Iterator[None]:
    """Show the weights of packed experts as parameters while PEFT injects an adapter.

    At any other time they are none, because what looks for parameters then would move, count or save them.

    Args:
        model: the model that gets the adapter.
        config: PEFT's configuration of the adapter; experts are made known to it.

    Raises:
        ValueError: the adapter targets a packed weight that PEFT could not train.
    """
    _refuse_linears(model, config)
    experts = [module for module in model.modules() if isinstance(module, FP4Experts)]
    if experts and hasattr(config, "_register_custom_module"):
        config._register_custom_module({FP4Experts: ParamWrapper})
    shown = [(module, name) for module in experts for name in module.layout.projections]
    for module, name in shown:
        module._parameters[name] = getattr(module, name)
    try:
        yield
    finally:
        for module, name in shown:
            del module._parameters[name]


def _refuse_linears(model: nn.Module, config: Any) -> None:
    targets = list(getattr(config, "target_parameters", None) or [])
    for name, module in model.named_modules():
        weight = f"{name.removesuffix('.base_layer')}.weight"
        if isinstance(module, FP4Linear) and any(weight == t or weight.endswith(f".{t}") for t in targets):
            raise ValueError(
                f"target_parameters names {weight}, the weight of a packed Linear layer, which is not a parameter; "
                "name the layer in target_modules instead"
            )


class ParamWrapper(lora.ParamWrapper):
    """PEFT's LoRA layer around one projection of :class:`FP4Experts`; PEFT finds its own again by this class's name.

    Args:
        base_layer: the experts module, or the wrapper of another of its projections.
        adapter_name: name of the adapter.
        parameter_name: name of the projection.
        config: PEFT's configuration of the adapter.
        **kwargs: see PEFT's ``ParamWrapper``.

    Raises:
        ValueError: the target is no projection, this process holds only a share of it, or PEFT has no such LoRA.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None, config: Any, **kwargs: Any
    ) -> None:
        experts: Any = base_layer
        while not isinstance(experts, FP4Experts):
            experts = experts.base_layer  # of the wrapper of another projection
        if parameter_name is None or parameter_name not in experts.layout.projections:
            names = " and ".join(experts.layout.projections)
            raise ValueError(
                f"the adapter targets {parameter_name or 'the whole'} of a {type(experts).__name__}; LoRA can be put "
                f"on {names} of experts, by target_parameters"
            )
        if any(packed.split is not None for packed in experts.packed().values()):
            raise ValueError(
                f"the adapter targets {parameter_name} of experts, of which this process holds only a share; "
                "load the model in one process to train an adapter on experts"
            )
        super().__init__(base_layer, adapter_name, parameter_name, config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the experts with the updates of the active adapters; arguments as of :class:`FP4Experts`."""
        self._check_forward_args(x, *args, **kwargs)
        updates = dict(kwargs.pop("updates", None) or {})
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.disable_adapters and not self.merged:
            active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
            updates[self.parameter_name] = [self._update(adapter) for adapter in active]
        out: Tensor = self.base_layer(x, *args, updates=updates, **kwargs)
        return out

    def _update(self, adapter: str) -> LowRank:
        left, right, scale = self.get_delta_factors(adapter)
        experts: Any = self.get_base_layer()
        if experts.layout.is_transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return LowRank(left, right, scale)
