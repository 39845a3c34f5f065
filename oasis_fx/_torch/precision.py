"""How exactly torch multiplies float32 matrices: TF32 and bfloat16 products, which users turn on, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BACKENDS = ("cuda", "mkldnn")


@contextmanager
def whole_float32_products(device_type: str) -> Iterator[None]:
    """Compute products of float32 matrices in float32 within the block, whatever the settings of the process.

    TF32 keeps 10 bits of an entry and bfloat16 keeps 7: columns would be orthonormal to 1e-3 only.

    Args:
        device_type: ``"cuda"``, ``"cpu"`` or another one, whose autocast is turned off.
    """
    with torch.autocast(device_type, enabled=False):
        lower = [name for name in _BACKENDS if torch._C._get_fp32_precision_getter(name, "matmul") in ("tf32", "bf16")]
        if not lower:
            yield
            return
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by the newer interface alone, which the older one does not speak of
            kept = {name: torch._C._get_fp32_precision_getter(name, "matmul") for name in lower}
            _set(dict.fromkeys(lower, "ieee"))
            try:
                yield
            finally:
                _set(kept)
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _set(precisions: dict[str, str]) -> None:
    for name, precision in precisions.items():
        torch._C._set_fp32_precision_setter(name, "matmul", precision)
