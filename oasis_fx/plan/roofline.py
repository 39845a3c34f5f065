"""The time of a training step, predicted: a roofline model.

A kernel takes the longer of two times, that of its FLOPs and that of its bytes, each at the rate that programs reach on
the device (`oasis_fx.plan.devices`), and the cost of a launch beside it. Kernels run one after another. Where the host
works while the device does, a step takes as long as the slower of the two; on a CPU they are one.

Which kernels a graph runs as is in `oasis_fx.plan.fusion`, what an optimizer does in `oasis_fx.plan.optimizer_work`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oasis_fx.plan.devices import Device
from oasis_fx.plan.fusion import kernels_of
from oasis_fx.plan.kernels import Kernel, Kind
from oasis_fx.plan.trace import Halves


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a training step.

    Attributes:
        forward, backward, optimizer: what the device is busy with.
        host: for how long the host is busy, where it works while the device does; 0 elsewhere.
    """

    forward: float
    backward: float
    optimizer: float
    host: float

    @property
    def step(self) -> float:
        return max(self.forward + self.backward + self.optimizer, self.host)


def kernel_seconds(kernel: Kernel, device: Device) -> float:
    """Predict the time of a kernel, in seconds, its launches included."""
    slowest = max(
        kernel.flops / _flop_rate(kernel, device),
        kernel.num_bytes / (device.bandwidth * _bandwidth_share(kernel, device)),
        kernel.instructions / (device.instructions * device.shares.instructions),
    )
    return slowest + kernel.launches * device.launch


def graph_seconds(kernels: Iterable[Kernel], device: Device, blocks: int, traced: int) -> tuple[float, float]:
    """Predict the time of a graph, and how long it keeps the host busy, in seconds.

    Args:
        kernels: of the graph of a model with ``traced`` blocks.
        blocks: how many the model has. Each counts as much as the traced ones do in the mean, since under a budget
            they are not equal.
    """
    seconds = host = 0.0
    for kernel in kernels:
        count = 1.0 if kernel.block is None else blocks / traced
        seconds += count * kernel_seconds(kernel, device)
        host += count * kernel.launches * device.host_launch
    return seconds, host


def optimizer_seconds(
    fewer: Sequence[Kernel], traced: Sequence[Kernel], device: Device, blocks: int, num_traced: int
) -> float:
    """Predict the time of an optimizer step from the work for ``num_traced`` blocks and for one fewer, in seconds."""
    seconds = [sum(kernel_seconds(kernel, device) for kernel in work) for work in (fewer, traced)]
    return seconds[1] + (blocks - num_traced) * (seconds[1] - seconds[0])


def step_seconds(
    graphs: Halves,
    optimizer: tuple[Sequence[Kernel], Sequence[Kernel]],
    device: Device,
    blocks: int,
    traced: int,
) -> StepTime:
    """Predict the time of a step.

    Args:
        graphs: forward and backward, of the model with ``traced`` blocks.
        optimizer: its work for a block fewer, and for these.
        blocks: of the model that is predicted for.
    """
    (forward, host), (backward, more) = (graph_seconds(kernels_of(graph), device, blocks, traced) for graph in graphs)
    launches = [sum(kernel.launches for kernel in work) for work in optimizer]
    operators = launches[1] + (blocks - traced) * (launches[1] - launches[0])
    busy = host + more + operators * device.host_operator if device.parallel else 0.0
    return StepTime(forward, backward, optimizer_seconds(*optimizer, device, blocks, traced), busy)


def _flop_rate(kernel: Kernel, device: Device) -> float:
    shares, dtype = device.shares, str(kernel.dtype).removeprefix("torch.")
    if kernel.kind is Kind.FUSED or kernel.kind is Kind.ADAMW or dtype not in device.matmul_flops:
        return device.flops * shares.plain
    by_head = {Kind.ATTENTION: shares.attention, Kind.ATTENTION_BACKWARD: shares.attention_backward}.get(kernel.kind)
    share = shares.matmul
    if by_head is not None:
        share = by_head[max((size for size in by_head if size <= kernel.head), default=min(by_head))]
    return device.matmul_flops[dtype] * share


def _bandwidth_share(kernel: Kernel, device: Device) -> float:
    shares = device.shares
    if kernel.kind is Kind.ADAMW:
        return shares.adamw
    return shares.fused if kernel.kind in (Kind.FUSED, Kind.LOW_RANK_WEIGHTS) else shares.thin
