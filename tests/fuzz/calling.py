"""The ways in which a program is called, and the text that runs one: eagerly, under stock torch, or under the backend.

A way is Python over these names:

    f           the module, compiled or not           batches   a list of lists of inputs, made anew for each run
    loss(out)   a scalar of what a call returned      keep(out) notes what a call returned, for the comparison
    done()      ends a backward pass                  step()    ends an optimizer step that changes no weight
"""

from __future__ import annotations

from fuzz.program import Program, module_text
from oasis_fx.runtime.subspaces.rules import RULES

CALLS = {
    "once": "out = keep(f(*batches[0]))\nloss(out).backward()\ndone()",
    "accumulated": "for batch in batches[:2]:\n    out = keep(f(*batch))\n    loss(out).backward()\n    done()",
    "together": "outs = [keep(f(*batch)) for batch in batches[:2]]\nsum(map(loss, outs)).backward()\ndone()",
    "reversed": (
        "outs = [keep(f(*batch)) for batch in batches[:2]]\n"
        "for out in reversed(outs):\n    loss(out).backward()\n    done()"
    ),
    "retained": (
        "out = keep(f(*batches[0]))\nloss(out).backward(retain_graph=True)\ndone()\nloss(out).backward()\ndone()"
    ),
    "evaluated first": (
        "with torch.no_grad():\n    keep(f(*batches[0]))\nout = keep(f(*batches[1]))\nloss(out).backward()\ndone()"
    ),
    "autograd.grad": (
        "out = keep(f(*batches[0]))\n"
        "gradients = torch.autograd.grad(loss(out), trained, allow_unused=True)\n"
        "for parameter, gradient in zip(trained, gradients):\n    parameter.grad = gradient\ndone()"
    ),
    "stepped": (
        "for batch in batches[:2]:\n    loss(keep(f(*batch))).backward()\n    done()\n    step()\n"
        "out = keep(f(*batches[2]))\nloss(out).backward()\ndone()"
    ),
}

PREAMBLE = """\
import operator
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
"""


def alone(program: Program) -> str:
    """A script that runs a program under the backend and eagerly, and prints how far its gradients are apart."""
    o = program.options
    rule = repr(o.rule) if o.rule in RULES else o.rule
    backend = (
        f"oasis_backend(rank={o.rank!r}, subspace={rule}, memory_budget={o.budget}, inner={o.inner!r}, "
        f"exclude={o.exclude})"
    )
    if o.inner == "no code":
        backend = backend.replace("'no code'", "'inductor'")
    make = "\n".join(f"        {p.name} = {p.make}" for p in program.inputs)
    names = ", ".join(p.name for p in program.inputs)
    calls = "\n".join(f"    {line}" for line in CALLS[o.calls].split("\n"))
    return f"""\
# seed {program.seed}: {", ".join(sorted(program.features()))}
{PREAMBLE}from oasis_fx import AutoRank, LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.rules import *


def randoms(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(torch.{o.dtype})


def nonleaf(x):
    leaves.append(x.requires_grad_())
    return x * 1


{module_text(program)}

def run(backend):
    global leaves
    leaves, kept = [], []
    torch._dynamo.reset()
    net = Net(randoms(0))
    trained = [p for p in net.parameters() if p.requires_grad]
    f = torch.compile(net, backend=backend, dynamic={o.dynamic}) if backend else net

    def batch(number):
        randn = randoms(100 + number)
{make}
        leaves.extend(x for x in ({names},) if x.is_leaf and x.requires_grad)
        return [{names}]

    def keep(out):
        kept.append(out)
        return out

    def loss(out):
        read = [out[i] for i in {program.in_loss} if out[i].requires_grad]
        return sum((o * torch.linspace(-1, 1.5, o.numel()).to(o).view(o.shape)).sum() for o in read)

    def done():
        pass

    def step():
        if backend and trained:
            OasisAdamW(trained, lr=0.0, weight_decay=0.0).step()
        net.zero_grad()

    batches = [batch(number) for number in range(3)]
{calls}
    return net, leaves, kept


plain, x, out = run(None)
net, y, found = run({backend})
for (name, p), q in zip(net.named_parameters(), plain.parameters()):
    g, dense = p.grad, q.grad
    if isinstance(g, LowRankGrad) and g.basis is not None:
        g, dense = g.factor, as_rows(dense, g.features) @ g.basis.detach()
    print(name, "None" if g is None or dense is None else float((g - dense).norm() / dense.norm()))
gradients = [(a.grad, b.grad) for a, b in zip(x, y)]
outputs, buffers = zip(sum(out, ()), sum(found, ())), zip(plain.buffers(), net.buffers())
for kind, pairs in (("input gradient", gradients), ("output", outputs), ("buffer", buffers)):
    for a, b in pairs:
        print(kind, "None" if a is None or b is None else float((a - b).norm()))
"""
