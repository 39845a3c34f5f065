"""Statements that read no weight: what happens to activations, buffers and inputs on the way.

Templates are Python over these placeholders:

    {x}  an activation                       {y}  another of its shape
    {n}  the length of its last dimension    {rows}, {k}  the length of its first, and one less
    {b}  a parameter [n]                     {s}  a buffer [n]
"""

from __future__ import annotations

POINTWISE = [
    "torch.tanh({x})",
    "torch.tanh({x})",
    "torch.sin({x})",
    "F.gelu({x})",
    "F.silu({x})",
    "torch.relu({x})",
    "torch.sigmoid({x})",
    "{x} * 0.5",
    "{x} + {b}",
    "{x} * {b}",
    "F.layer_norm({x}, ({n},))",
    "F.softmax({x}, -1)",
    "{x}.square()",
    "{x}.exp().log1p()",
    "F.rms_norm({x}, ({n},))",
    "{x}.clone()",
    "{x}.detach()",
    "{x}.clamp(-1, 1)",
    "{x}.masked_fill({x} > 0, 0.0)",
    "torch.where({x} > 0, {x}, 0.1 * {x})",
    "{x}.roll(1, 0)",
    "{x}.cumsum(0)",
    "{x}.flip(0)",
    "{x}.contiguous()",
    "{x} - {x}.mean(-1, keepdim=True)",
    "F.dropout({x}, 0.0)",
    "F.normalize({x}, dim=-1)",
    "{x}.view_as({x})",
    "{x}[...]",
    "{x}.neg().abs()",
    "torch.addcmul({x}, {x}, {x})",
    "{x}.float().to({x}.dtype)",
    "{x}.double().to({x}.dtype)",
]
TOGETHER = [
    "{x} + {y}",
    "{x} * {y}",
    "{x} - {y}",
    "torch.lerp({x}, {y}, 0.3)",
    "torch.cat([{x}, {y}])",
    "torch.maximum({x}, {y})",
]
TOGETHER += [
    "torch.cat([{x}, {y}], -1)",
    "torch.stack([{x}, {y}])",
    "torch.where({x} > 0, {x}, {y})",
    "{x}.add({y}, alpha=0.5)",
]

# Views, slices and reductions; results may have other shapes.
RESHAPING = [
    "{x}[1:]",
    "{x}[:{k}]",
    "{x}[..., :2]",
    "{x}[::2]",
    "{x}.mT",
    "{x}.transpose(0, 1)",
    "{x}.unsqueeze(0)",
    "{x}.flatten(0, -2)",
    "{x}.reshape(-1, {n})",
    "{x}[None].expand(2, *[-1] * {x}.dim())",
    "{x}.mean(0, keepdim=True)",
    "{x}.sum(-2)",
    "{x}[0]",
    "{x}[-1]",
    "{x}.view({rows}, -1)",
    "{x}.chunk(2)[0]",
    "{x}.split(1)[0]",
    "{x}.narrow(0, 0, {k})",
    "{x}[torch.arange({k})]",
    "F.pad({x}, (1, 0))",
    "{x}.repeat(2, *[1] * ({x}.dim() - 1))",
    "{x}.index_select(0, torch.arange({k}))",
    "{x}.unflatten(0, (-1, 1))",
    "{x}.select(0, 0)",
    "{x}.squeeze()",
    "{x}.as_strided({x}.shape, {x}.stride())",
    "{x}.diagonal(0, -2, -1)",
    "{x}.amax(0, keepdim=True)",
]

# In place, on an activation or an input. Not through .data: eager mode then takes the changed value for the old one.
IN_PLACE = [
    "{x}.mul_(0.5)",
    "{x}[0] = 0.0",
    "{x} += {y}",
    "{x}.add_({y}, alpha=0.5)",
    "F.relu({x}, inplace=True)",
    "{x}[:{k}].mul_(2.0)",
    "{x}.copy_({y} * 0.5)",
    "{x}.tanh_()",
    "{x}.clamp_(-1, 1)",
    "{x}.view(-1)[0] = 1.0",
    "{x}.zero_()",
    "{x}.detach().mul_(0.9)",
    "torch.mul({x}, 0.5, out={x})",
    "{x}[..., 0] *= 0.5",
    "{x}.t_()",
    "torch._foreach_mul_([{x}], 0.5)",
]

WRITE_WEIGHT = [
    "{w}.mul_(0.9)",
    "{w}.clamp_(-0.5, 0.5)",
    "{w}.div_(1 + {w}.norm())",
    "{w}[0] = 0.0",
]

READ_BUFFER = [
    "{x} - {s}",
    "{x} / (1 + {s}.abs())",
    "{x} * torch.sigmoid({s})",
    "{x} + {s}.tanh()",
    "F.layer_norm({x}, ({n},), weight={s})",
]
WRITE_BUFFER = [
    "{s}.mul_(0.9).add_({x}.detach().reshape(-1, {n}).mean(0), alpha=0.1)",
    "{s}.copy_({x}.detach().reshape(-1, {n})[0])",
    "{s}.add_(1.0)",
    "{s} += {x}.detach().reshape(-1, {n}).sum(0)",
    "{s}[0] = {x}.detach().sum()",
    "{s}.lerp_({x}.detach().reshape(-1, {n}).mean(0), 0.1)",
    "torch.nn.init.zeros_({s})",
]
BREAKS = ["torch._dynamo.graph_break()", "torch._dynamo.graph_break()", "if {x}.sum() > 1e6:\n    {x} = {x} * 2"]
