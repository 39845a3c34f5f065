"""Roads of a weight into a matmul or a convolution: templates of statements.

Each road is Python over these placeholders:

    {x}  the activation [.., n]      {w}  the weight as [m, n]     {wt}  the weight as [n, m]
    {b}  a vector [m]                {n}, {m}  the sizes

A road ends as [.., m]. Where the weight is read, X is ``{x}.reshape(-1, n)``.
"""

from __future__ import annotations

import random

# Any number of dimensions of the activation, from one.
ANY = [
    "F.linear({x}, {w})",
    "F.linear({x}, {w})",
    "F.linear({x}, {w}, {b})",
    "F.linear(input={x}, weight={w})",
    "F.linear({x}, bias={b}, weight={w})",
    "torch.ops.aten.linear({x}, {w})",
    "torch.ops.aten.linear.default({x}, {w}, {b})",
    "{x} @ {wt}",
    "{x} @ {wt}",
    "{x} @ {wt} + {b}",
    "torch.matmul({x}, {wt})",
    "torch.matmul(input={x}, other={wt})",
    "{x}.matmul({wt})",
    "operator.matmul({x}, {wt})",
    "torch.einsum('...i,oi->...o', {x}, {w})",
    "torch.einsum('oi,...i->...o', {w}, {x})",
    "torch.einsum('...i,io->...o', {x}, {wt})",
    "torch.inner({x}, {w})",
    "{x}.inner({w})",
    "torch.tensordot({x}, {w}, dims=([-1], [1]))",
    "torch.tensordot({x}, {wt}, dims=1)",
    "torch.matmul({w}, {x}.unsqueeze(-1)).squeeze(-1)",
    "F.linear({x}.unsqueeze(0), {w}).squeeze(0)",
]
TWO = [
    "torch.mm({x}, {wt})",
    "{x}.mm({wt})",
    "torch.mm(input={x}, mat2={wt})",
    "torch.mm({w}, {x}.t()).t()",
    "({w} @ {x}.t()).t()",
    "torch.addmm({b}, {x}, {wt})",
    "torch.addmm({b}, {x}, {wt}, beta=0.5, alpha=2.0)",
    "torch.addmm(input={b}, mat1={x}, mat2={wt})",
    "{b}.addmm({x}, {wt})",
    "torch.einsum('bi,oi->bo', {x}, {w})",
    "torch.einsum(' b i , o i -> b o ', {x}, {w})",
    "torch.einsum('bi,oi', {x}, {w})",
    "torch.einsum({x}, [0, 1], {w}, [2, 1], [0, 2])",
    "torch.einsum('oi,bi->ob', {w}, {x}).t()",
    "torch.einsum('bi,oi->bo', [{x}, {w}])",
    "F.conv1d({x}.t()[None], {w}[:, :, None])[0].t()",
    "F.conv2d({x}.t()[None, :, :, None], {w}[:, :, None, None])[0, :, :, 0].t()",
    "torch.stack([torch.mv({w}, row) for row in {x}.unbind(0)])",
    "torch.bmm({x}[None], {wt}[None])[0]",
]
THREE = [
    "torch.bmm({x}, {wt}[None].expand({x}.shape[0], -1, -1))",
    "torch.bmm({x}, {wt}.repeat({x}.shape[0], 1, 1))",
    "torch.baddbmm({b}, {x}, {wt}.expand({x}.shape[0], -1, -1))",
    "F.conv1d({x}.mT, {w}[..., None]).mT",
    "F.conv1d(input={x}.mT, weight={w}.unsqueeze(-1), bias={b}).mT",
    "F.conv2d({x}.mT[..., None], {w}[..., None, None])[..., 0].mT",
    "torch.einsum('bti,oi->bto', {x}, {w})",
    "torch.einsum('oi,bti->tbo', {w}, {x}).transpose(0, 1)",
    "torch.einsum('bti,oi->bot', {x}, {w}).mT",
    "({w} @ {x}.mT).mT",
    "torch.matmul({w}, {x}.transpose(1, 2)).transpose(-1, -2)",
    "torch.addmm({b}, {x}.flatten(0, 1), {wt}).view({x}.shape[0], -1, {m})",
    "torch.cat([F.linear(part, {w}) for part in {x}.split(1)])",
]

TRANSPOSES = [
    ".t()",
    ".t()",
    ".T",
    ".mT",
    ".transpose(0, 1)",
    ".transpose(-1, -2)",
    ".transpose(dim0=0, dim1=1)",
    ".permute(1, 0)",
    ".permute((1, 0))",
    ".permute(dims=(1, 0))",
    ".swapaxes(0, 1)",
    ".movedim(0, 1)",
    ".adjoint()",
]
TRANSPOSING_CALLS = [
    "torch.transpose({e}, 0, 1)",
    "torch.t({e})",
    "torch.permute({e}, (1, 0))",
    "torch.einsum('ab->ba', {e})",
    "torch.transpose(input={e}, dim0=0, dim1=1)",
]

# What leaves a matrix [m, n] as it is.
SAME = [
    "{e}.contiguous()",
    "{e}.clone()",
    "{e}.to({dtype})",
    "{e}.to(dtype={dtype})",
    "{e}.view({m}, {n})",
    "{e}.reshape({m}, {n})",
    "{e}.reshape(-1, {n})",
    "{e}[None].squeeze(0)",
    "{e}.unsqueeze(0)[0]",
    "{e}.expand({m}, {n})",
    "{e} * 1.0",
    "{e}.type_as({x})",
    "{e}.to({x}.dtype)",
    "{e}.to({x})",
    "{e}.flatten(1)",
    "torch.cat([{e}[:1], {e}[1:]])",
    "{e}[:]",
    "{e}.view_as({e})",
    "torch.tanh({e})",
    "{e} + 0.1",
    "{e}.to(device='cpu')",
    "{e}.type({dtype})",
    "{e}.flip(0)",
    "{e}.narrow(0, 0, {m})",
    "{e}.T.T",
    "{e}.permute(1, 0).contiguous().t()",
]

# Rows of a stored [m, n], as matrices of fewer rows, and lists of them that are its rows in order.
ROWS = [
    "{e}[:{k}]",
    "{e}[{k}:]",
    "{e}.narrow(0, 0, {k})",
    "{e}.split({k})[0]",
    "{e}.chunk(2)[0]",
    "{e}.chunk(2)[-1]",
    "{e}.tensor_split(2)[0]",
    "{e}.narrow(dim=0, start=0, length={k})",
    "{e}.split(split_size={k}, dim=0)[0]",
    "{e}[torch.arange({k})]",
    "{e}[::2]",
    "{e}.chunk(2, dim=-2)[0]",
    "torch.chunk({e}, 2)[0]",
    "{e}.split([{k}, {m} - {k}])[1]",
    "{e}.index_select(0, torch.arange({k}))",
    "{e}.unflatten(0, (1, -1))[0]",
]
PARTS = [
    "{e}.chunk(2)",
    "{e}.split({k})",
    "torch.split({e}, {k})",
    "{e}.tensor_split(2)",
    "{e}.split([{k}, {m} - {k}])",
    "{e}.chunk(chunks=2, dim=0)",
    "torch.chunk({e}, 2, dim=0)",
    "({e}[:{k}], {e}[{k}:])",
]
COLUMNS = ["{e}[:, :{n}]", "{e}.narrow(1, 0, {n})", "{e}[..., :{n}]", "{e}.split({n}, dim=1)[0]", "{e}[:, -{n}:]"]

# Experts: x [e, t, n], {w} [e, m, n], {wt} [e, n, m].
EXPERTS = [
    "torch.bmm({x}, {wt})",
    "{x} @ {wt}",
    "torch.baddbmm({b}, {x}, {wt})",
    "torch.baddbmm({b}, {x}, {wt}, beta=0.5, alpha=2.0)",
    "torch.einsum('etn,emn->etm', {x}, {w})",
    "torch.einsum('emn,etn->emt', {w}, {x}).mT",
    "torch.bmm({w}, {x}.mT).mT",
    "torch.stack([F.linear({x}[j], {w}[j]) for j in range({x}.shape[0])])",
    "torch.stack([a @ w for a, w in zip({x}.unbind(0), {wt}.unbind(0))])",
    "torch.matmul(input={x}, other={wt})",
    "torch.bmm(input={x}, mat2={wt})",
]


FLIPS = [".mT", ".transpose(1, 2)", ".transpose(-1, -2)", ".permute(0, 2, 1)", ".transpose(dim0=1, dim1=2)"]

# Of a stored [e, m, n], as one matrix of n columns.
STACKED = [
    "{e}.flatten(0, 1)",
    "{e}.view(-1, {n})",
    "{e}[0]",
    "{e}.reshape(-1, {n})",
    "{e}.unbind(0)[-1]",
    "{e}.select(0, 0)",
]


def transposed(rng: random.Random, expression: str) -> str:
    """Python for the transpose of a matrix."""
    if rng.random() < 0.75:
        return expression + rng.choice(TRANSPOSES)
    return rng.choice(TRANSPOSING_CALLS).format(e=expression)


def multiplication(rng: random.Random, dims: int) -> str:
    """A road for an activation of so many dimensions."""
    own = {2: TWO, 3: THREE}.get(dims, [])
    return rng.choice(own if own and rng.random() < 0.5 else ANY)
