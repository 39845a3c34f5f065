"""What a device can do: peak rates by data sheet, and the share of them that programs reach.

Peaks, without sparsity, by the vendors' data sheets:

- H100: NVIDIA H100 Tensor Core GPU data sheet, column SXM. H200: NVIDIA H200 Tensor Core GPU data sheet, column SXM.
- A100: NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM.
- RTX-4090: NVIDIA Ada GPU Architecture whitepaper, appendix A; with float32 accumulators.
- L4: NVIDIA L4 Tensor Core GPU data sheet, which gives rates with sparsity: half of them.

Shares of the H100 and the H200 are calibrated from measurements that are in this repository:

- matmul, H100: 52.3 ms for the 40.6 TFLOP of ``benchmarks/results/profile-stock-2048x8-bfloat16-8x2048-r32-gpu.txt``.
  H200: what is left of the forward pass of ``benchmarks/results/gpu/2026-11-27-after/step-llama-8b-*-8x2048-*.json``
  without attention and element-wise work.
- attention, heads of 64: the same profile. Heads of 128: the forward and backward passes of 2 x 8192 tokens less those
  of 8 x 2048, where nothing but attention differs (the same folder). Its FLOPs are counted with the mask as it is.
- fused: kernels of the same profile whose tensors can be told from their names (SiLU, RMSNorm); a copy on an H200
  (``kernels-tf32.json``). thin: P and C in ``profile-oasis-2048x8-*.txt``.
- adamw, instructions, float32 products and the host's time: ``optimizer_step.json`` and docs/performance.md, "On a
  GPU".

The A100, the RTX 4090 and the L4 were not measured: their shares are those of the H200, and the clock of an L4, which
may take 72 W, will often be lower than that. That a kernel of a compiled graph keeps the host busy for 10 us is an
assumption, made for all of them. ``cpu`` is a machine of 2 cores of an AMD EPYC (Zen 1) in float32, by
``python -m benchmarks.device_rates``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """Which part of a device's peaks programs reach.

    Attributes:
        matmul: of the FLOPs of a matmul on tensor cores.
        plain: of the FLOPs of a matmul in a dtype for which there are none, and of other arithmetic.
        attention, attention_backward: of the FLOPs of a matmul, by the size of a head; the next smaller one counts.
        fused: of the bandwidth, in element-wise kernels and reductions.
        thin: of the bandwidth, in matmuls and attention.
        adamw: of the bandwidth, in torch's fused AdamW.
        instructions: of the instructions that a device can issue.
    """

    matmul: float
    plain: float
    attention: Mapping[int, float]
    attention_backward: Mapping[int, float]
    fused: float
    thin: float
    adamw: float
    instructions: float


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as ``--time`` takes it.
        matmul_flops: FLOP/s of a matmul, by the name of its dtype. In any other dtype a matmul runs at ``flops``.
        flops: FLOP/s of all other arithmetic, in float32; a multiplication and an addition are two.
        bandwidth: of its memory, in bytes a second.
        instructions: that all threads together can issue a second.
        shares: what programs reach of these.
        launch: seconds that each kernel takes beside its work.
        host_launch: seconds for which a kernel of a compiled graph keeps the host busy.
        host_operator: the same for an operator of an optimizer step, which Python calls.
        parallel: whether the host works while the device does.
    """

    name: str
    matmul_flops: Mapping[str, float]
    flops: float
    bandwidth: float
    instructions: float
    shares: Shares
    launch: float
    host_launch: float
    host_operator: float
    parallel: bool = True


_H200_SHARES = Shares(
    matmul=0.66,
    plain=0.34,
    attention={64: 0.27, 128: 0.38},
    attention_backward={64: 0.24, 128: 0.30},
    fused=0.88,
    thin=0.72,
    adamw=0.58,
    instructions=0.35,
)
_H100_SHARES = Shares(
    matmul=0.78,
    plain=0.34,
    attention={64: 0.27, 128: 0.38},
    attention_backward={64: 0.24, 128: 0.30},
    fused=0.92,
    thin=0.72,
    adamw=0.67,
    instructions=0.35,
)
_CPU_SHARES = Shares(
    matmul=1.0,
    plain=1.0,
    attention={1: 0.75},
    attention_backward={1: 0.75},
    fused=0.6,
    thin=1.0,
    adamw=1.0,
    instructions=1.0,
)


def _gpu(
    name: str, tensor: float, plain: float, bandwidth: float, issues: float, shares: Shares = _H200_SHARES
) -> Device:
    rates = {"bfloat16": tensor, "float16": tensor}
    return Device(name, rates, plain, bandwidth, issues, shares, launch=2e-6, host_launch=10e-6, host_operator=33e-6)


# Instructions: multiprocessors x 4 warps of 32 threads x boost clock.
DEVICES = (
    _gpu("H100", 989e12, 67e12, 3.35e12, 132 * 128 * 1.98e9, _H100_SHARES),
    _gpu("H200", 989e12, 67e12, 4.8e12, 132 * 128 * 1.98e9),
    _gpu("A100", 312e12, 19.5e12, 2.039e12, 108 * 128 * 1.41e9),
    _gpu("RTX-4090", 165e12, 82.6e12, 1.008e12, 128 * 128 * 2.52e9),
    _gpu("L4", 121e12, 30.3e12, 0.3e12, 58 * 128 * 2.04e9),
    # What was measured, so that most shares are 1. Both cores together: twice the rates of one, but for memory.
    Device("cpu", {"float32": 70e9}, 10e9, 18e9, math.inf, _CPU_SHARES, 5e-6, 0.0, 0.0, parallel=False),
)


def find_device(name: str) -> Device:
    """Return a device by its name, in any case.

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise ValueError(f"device is {name!r}: it must be one of {known}")
