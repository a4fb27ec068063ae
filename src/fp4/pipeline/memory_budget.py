"""The memory that a job may use, and the device that it computes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory

# Share of the free memory that is used; the rest is for the system's page cache and for what was not counted.
_SHARE = 0.8


@dataclass(frozen=True)
class Memory:
    """Limits of memory.

    Attributes:
        device: the device that computes.
        gpu: bytes that may be used on that device, 0 for a CPU.
        cpu: bytes of main memory that may be used.
    """

    device: torch.device
    gpu: int
    cpu: int

    @classmethod
    def of(cls, asked: str | Mapping[str, str | int] | None, device: str | torch.device | None) -> Memory:
        """The limits that a user asks for.

        Args:
            asked: such as ``"gpu:60GiB,cpu:200GiB"``, or a mapping; what it does not name is limited by what is free.
            device: the device that computes; None is a GPU if there is one.

        Raises:
            ValueError: ``asked`` has another form, or there is no such device.
        """
        limits = _parse(asked)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device is {str(device)!r}, which cannot be used: {str(error).splitlines()[0]}"
            ) from error
        if "gpu" in limits and chosen.type == "cpu" and not torch.accelerator.is_available():
            raise ValueError("max_memory names gpu, but this machine has none that torch can use")
        free = get_max_memory()
        number = chosen.index or 0
        gpu = 0 if chosen.type == "cpu" else limits.get("gpu", int(free.get(number, 0) * _SHARE))
        return cls(chosen, gpu, limits.get("cpu", int(free["cpu"] * _SHARE)))

    @property
    def allowed(self) -> int:
        """Bytes that may be used where blocks are computed."""
        return self.cpu if self.device.type == "cpu" else self.gpu

    def keeps(self, nbytes: int) -> bool:
        """Whether hidden states of ``nbytes`` stay in memory.

        Those before and after a block, from the quantized and the original prefix, may take half of what is allowed.
        """
        return 4 * nbytes <= self.allowed // 2

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that blocks compute in: float32 on CPUs, where half precision is slower, else the checkpoint's."""
        return torch.float32 if self.device.type == "cpu" else stored


def _parse(asked: str | Mapping[str, str | int] | None) -> dict[str, int]:
    if asked is None:
        return {}
    pairs: list[tuple[str, str | int]]
    if isinstance(asked, str):
        pairs = [(key, size) for key, _, size in (entry.partition(":") for entry in asked.split(","))]
    else:
        pairs = [(str(key), size) for key, size in asked.items()]
    limits = {}
    for key, value in pairs:
        name = key.strip().lower()
        try:
            if name not in ("gpu", "cpu"):
                raise ValueError
            limits[name] = int(convert_file_size_to_int(value.strip() if isinstance(value, str) else value))
        except ValueError as error:
            raise ValueError(
                f"max_memory has {key}:{value}; expected gpu or cpu and a size, e.g. gpu:60GiB,cpu:200GiB"
            ) from error
    return limits
