"""oasis_fx: a torch.compile backend that trains networks in a learned activation subspace.

    model = torch.compile(model, backend=oasis_backend(rank=32))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)

Source: OASIS, arXiv 2604.09406.
"""

from typing import TYPE_CHECKING, Any

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.low_rank_grad import LowRankGrad, LowRankGradWarning

if TYPE_CHECKING:
    from oasis_fx.runtime.optimizer import OasisAdamW

__all__ = ["LowRankGrad", "LowRankGradWarning", "OasisAdamW", "OasisBackend", "OasisWarning", "oasis_backend"]


def __getattr__(name: str) -> Any:
    # At first use: its module loads torch._dynamo, which takes seconds, and `oasis-fx --help` need not wait for it.
    if name == "OasisAdamW":
        from oasis_fx.runtime.optimizer import OasisAdamW

        globals()[name] = OasisAdamW
        return OasisAdamW
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
