"""A few steps with the installed package, nothing of the repository beside it."""

import sys
from importlib.metadata import version

import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


torch.manual_seed(0)
model, x = Net(), torch.randn(64, 32)
backend = oasis_backend(rank=8)
model.compile(backend=backend)
optimizer = OasisAdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = (model(x) - x.flip(1)).square().mean()
    loss.backward()
    assert isinstance(model.a.weight.grad, LowRankGrad) and isinstance(model.b.weight.grad, LowRankGrad)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert "a.weight" in str(backend.report()[0]) and len(backend.stats()) == 2
print(
    f"oasis_fx {version('oasis-fx')} from {sys.argv[2]}, torch {torch.__version__}: {losses[0]:.3f}, {losses[-1]:.3f}"
)
