"""Tensors on their way to a device: in one piece of memory, copied beside what the device computes."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch
from torch import Tensor

_ALIGNED_BYTES = 64
"""Where tensors begin, as vector instructions and a GPU's loads like it."""


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """Tensors that lie one behind the other in one piece of memory, so that one copy takes them to a device."""

    memory: Tensor
    """(bytes,), uint8."""
    spans: Mapping[str, _Span]
    """Where each lies in it."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, pin_memory: bool = False) -> Self:
        """Copy tensors of the CPU into one piece, page-locked where a GPU is to fetch it by itself."""
        spans, end = {}, 0
        for name, tensor in tensors.items():
            spans[name] = _Span(-(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES, tuple(tensor.shape), tensor.dtype)
            end = spans[name].end
        packed = cls(torch.empty(end, dtype=torch.uint8, pin_memory=pin_memory), spans)
        for name, tensor in packed.tensors().items():
            tensor.copy_(tensors[name])
        return packed

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name; they share the memory."""
        return {
            name: self.memory[span.start : span.end].view(span.dtype).view(span.shape)
            for name, span in self.spans.items()
        }

    def over(self, copies: "DeviceCopies") -> Self:
        """Copy to a device."""
        return replace(self, memory=copies.copy([self.memory])[0])


class DeviceCopies:
    """Copies to a device. A GPU makes them beside its work, on a stream of their own, and nobody waits for them.

    Args:
        device: where to.
        timed: note how long the device waits for copies; see `take_stalled_seconds`.
    """

    def __init__(self, device: torch.device | str, *, timed: bool = False) -> None:
        self._timed = timed
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy some tensors, from page-locked memory without waiting; what comes after sees them whole."""
        if self._stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copied = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        working = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=self._timed) for _ in range(2))
        before.record(working)
        working.wait_stream(self._stream)
        after.record(working)
        if self._timed:
            self._stalls.append((before, after))
        for tensor in copied:
            tensor.record_stream(working)  # or its memory would be given to the next copy too early
        return copied

    def take_stalled_seconds(self) -> float:
        """Returns how long the device did nothing but wait for copies, since the last call."""
        stalled_ms = 0.0
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            stalled_ms += before.elapsed_time(after)
        return stalled_ms / 1000


class HostCopy:
    """A tensor on its way to the host, for whoever asks for it once the device has made it: nobody waits until then.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._made = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Wait for the device, as long as it takes, and return the tensor, on the CPU; from any thread."""
        if self._made is not None:
            self._made.synchronize()
        return self._values.cpu()


class LateNumbers:
    """Numbers that a device computes, for whoever asks for them once it has: a step later nobody waits for them.

    Args:
        values: (numbers,), on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._copy = HostCopy(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LateNumbers) and self.read() == other.read()

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def read(self) -> list[float]:
        """Wait for the device, as long as it takes, and return the numbers."""
        return self._copy.read().tolist()
