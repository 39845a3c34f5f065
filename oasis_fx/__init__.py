"""oasis_fx: a torch.compile backend that trains networks in a learned activation subspace.

    model = torch.compile(model, backend=oasis_backend(rank=32))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)

Source: OASIS, arXiv 2604.09406.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from oasis_fx._old_names import find_old_modules
from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.errors import OasisWarning
from oasis_fx.ranks import AutoRank
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad, LowRankGradWarning

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.adamw import OasisAdamW
    from oasis_fx.runtime.optim.lion import OasisLion
    from oasis_fx.runtime.optim.muon import OasisMuon
    from oasis_fx.runtime.optim.sgd import OasisSGD
    from oasis_fx.runtime.subspaces.basis_updates import update_bases

find_old_modules()

__version__ = version("oasis-fx")

__all__ = [
    "AutoRank",
    "LowRankGrad",
    "LowRankGradWarning",
    "OasisAdamW",
    "OasisBackend",
    "OasisLion",
    "OasisMuon",
    "OasisSGD",
    "OasisWarning",
    "__version__",
    "oasis_backend",
    "update_bases",
]

_LATER = {
    "OasisAdamW": "oasis_fx.runtime.optim.adamw",
    "OasisLion": "oasis_fx.runtime.optim.lion",
    "OasisMuon": "oasis_fx.runtime.optim.muon",
    "OasisSGD": "oasis_fx.runtime.optim.sgd",
    "update_bases": "oasis_fx.runtime.subspaces.basis_updates",
}


def __getattr__(name: str) -> Any:
    # At first use: their modules load torch._dynamo, which takes seconds, and `oasis-fx --help` need not wait for it.
    if name in _LATER:
        found = getattr(import_module(_LATER[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
