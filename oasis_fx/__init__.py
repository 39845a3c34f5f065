"""oasis_fx: a torch.compile backend that trains networks in a learned activation subspace.

    model = torch.compile(model, backend=oasis_backend(rank=32))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)

Source: OASIS, arXiv 2604.09406.
"""

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.low_rank_grad import LowRankGrad, LowRankGradWarning
from oasis_fx.runtime.optimizer import OasisAdamW

__all__ = ["LowRankGrad", "LowRankGradWarning", "OasisAdamW", "OasisBackend", "OasisWarning", "oasis_backend"]
