"""oasis_fx: a torch.compile backend that trains networks in a learned activation subspace.

    model = torch.compile(model, backend=oasis_backend(rank=32))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)

Source: OASIS, arXiv 2604.09406.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.low_rank_grad import LowRankGrad, LowRankGradWarning

if TYPE_CHECKING:
    from oasis_fx.runtime.lion import OasisLion
    from oasis_fx.runtime.muon import OasisMuon
    from oasis_fx.runtime.optimizer import OasisAdamW
    from oasis_fx.runtime.sgd import OasisSGD

__all__ = [
    "LowRankGrad",
    "LowRankGradWarning",
    "OasisAdamW",
    "OasisBackend",
    "OasisLion",
    "OasisMuon",
    "OasisSGD",
    "OasisWarning",
    "oasis_backend",
]

_OPTIMIZERS = {"OasisAdamW": "optimizer", "OasisLion": "lion", "OasisMuon": "muon", "OasisSGD": "sgd"}


def __getattr__(name: str) -> Any:
    # At first use: their modules load torch._dynamo, which takes seconds, and `oasis-fx --help` need not wait for it.
    if name in _OPTIMIZERS:
        found = getattr(import_module(f"oasis_fx.runtime.{_OPTIMIZERS[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
