"""Round to bfloat16 stochastically within Triton kernels, as `oasis_fx.runtime.optim.rounding` does by operators.

The noise is Philox4x32's: a function of a seed and of an entry's place, so that a run can be repeated. Seven rounds of
it pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the usual ten are a margin of
safety that costs a kernel two instructions an entry. Each call gives 128 bits, the noise of eight entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Seeds above 2^32 all have one type, so that no kernel is compiled anew for a small one.
SEED_BASE = 1 << 40


@triton.jit  # type: ignore[untyped-decorator]
def _product(constant: tl.constexpr, value):
    """Return the upper and the lower half of a uint32 product: one instruction, where ``umulhi`` and ``*`` are two."""
    wide = value.to(tl.uint64) * constant
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def philox(seed, place, stream):
    """Return four random uint32 for each entry of ``place``, by Philox4x32-7: those of `tl.philox` with seven rounds.

    Args:
        seed: the key, an int64 scalar of at least `SEED_BASE`.
        place, stream: the counter: int32 of any shape, and an int32 scalar.
    """
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = place.to(tl.uint32), stream.to(tl.uint32)
    c2, c3 = c1 * 0, c1 * 0
    for _ in tl.static_range(7):
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit  # type: ignore[untyped-decorator]
def sixteen_bits(seed, place, stream):
    """Return random int32 from 0 to 65535, eight for each entry of ``place`` [..., c]: [..., c, 2, 2, 2].

    Args: those of `philox`.
    """
    a, b, c, d = philox(seed, place, stream)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def round_stochastically(value, noise):
    """Round float32 to bfloat16, up or down at random, and right on average; exact values, infinities and NaN stay.

    Args:
        value: float32, of any shape.
        noise: int32 from 0 to 65535, of the same shape.
    """
    # bfloat16 is the upper half of float32: add noise below the cut, then cut. A GPU's arithmetic makes one NaN only,
    # 0x7FFFFFFF, to which noise would carry over into a number: its lower half goes first. That is one instruction,
    # where a comparison with itself and a choice are two. Every number is less than it, as an integer too. The mask is
    # for infinities: with noise in its lower half, one would be a NaN.
    bits = (tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFF0000) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
