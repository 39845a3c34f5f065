"""Layers of plain torch, and uses of a weight that are none of a linear layer's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo import Model, entry, noise, tokens


class _Plain(torch.nn.Module):
    def __init__(self, function, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _linear(n: int = 24, m: int = 24, bias: bool = True) -> torch.nn.Linear:
    return torch.nn.Linear(n, m, bias)


def _weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape) / 5)


@entry("nn.MultiheadAttention, self")
def attention() -> Model:
    layer = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    return _Plain(lambda s, x: s.layer(x, x, x, need_weights=False)[0], layer=layer), {"x": noise(2, 6, 24)}


@entry("nn.MultiheadAttention, cross")
def cross_attention() -> Model:
    layer = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    run = lambda s, x: s.layer(x, x.sin(), x.cos(), need_weights=False)[0]  # noqa: E731
    return _Plain(run, layer=layer), {"x": noise(2, 6, 24)}


@entry("nn.TransformerEncoder")
def encoder() -> Model:
    layer = torch.nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2), {"src": noise(2, 6, 24)}


@entry("nn.TransformerDecoder")
def decoder() -> Model:
    layer = torch.nn.TransformerDecoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
    return torch.nn.TransformerDecoder(layer, 2), {"tgt": noise(2, 6, 24), "memory": noise(2, 5, 24)}


# Without the setting torch.compile leaves nn.LSTM to eager mode, and no backend sees it.
@entry("nn.LSTM, with `allow_rnn`, and a linear", left=("lstm.*",), config={"allow_rnn": True})
def lstm() -> Model:
    run = lambda s, x: s.out(s.lstm(x)[0])  # noqa: E731
    return _Plain(run, lstm=torch.nn.LSTM(24, 24, batch_first=True), out=_linear()), {"x": noise(2, 6, 24)}


@entry("einsum")
def einsum() -> Model:
    def run(s, x):
        heads = torch.einsum("btn,hdn->bthd", x, s.wide)
        return torch.einsum("btm,nm->btn", heads.flatten(2), s.out)

    return _Plain(run, wide=_weight(4, 8, 24), out=_weight(24, 32)), {"x": noise(2, 6, 24)}


@entry("computed weights (weight norm, a mask, a sum)", left=("normed.*", "masked", "summed"))
def computed() -> Model:
    def run(s, x):
        x = s.normed(x)
        x = F.linear(x, s.masked * 0.5)
        return s.plain(F.linear(x, s.summed + s.masked))

    parts = dict(masked=_weight(24, 24), summed=_weight(24, 24), plain=_linear())
    return _Plain(run, normed=torch.nn.utils.parametrizations.weight_norm(_linear()), **parts), {"x": noise(2, 6, 24)}


@entry("a weight used twice")
def used_twice() -> Model:
    return _Plain(lambda s, x: s.layer(torch.tanh(s.layer(x))), layer=_linear()), {"x": noise(2, 6, 24)}


@entry("a weight used as stored and transposed", left=("weight",))
def both_ways() -> Model:
    return _Plain(lambda s, x: F.linear(torch.tanh(x @ s.weight), s.weight), weight=_weight(24, 24)), {
        "x": noise(2, 6, 24)
    }


@entry("tied output head")
def tied() -> Model:
    def run(s, x):
        return F.linear(s.layer(s.table(x)), s.table.weight)

    return _Plain(run, table=torch.nn.Embedding(64, 24), layer=_linear()), {"x": tokens()}


@entry("frozen weights")
def frozen() -> Model:
    model = _Plain(lambda s, x: s.second(torch.tanh(s.first(x))), first=_linear(), second=_linear())
    model.first.requires_grad_(False)
    return model, {"x": noise(2, 6, 24)}


@entry("batched matmul with a 3-D weight")
def batched() -> Model:
    def run(s, x):
        return torch.bmm(torch.tanh(torch.bmm(x, s.up)), s.down.mT)

    return _Plain(run, up=_weight(3, 24, 40), down=_weight(3, 24, 40)), {"x": noise(3, 6, 24)}


@entry("1-D and 3-D patch convolutions")
def patches() -> Model:
    def run(s, x):
        x = s.line(x)  # [2, 16, 12]
        return s.volume(x.reshape(2, 4, 4, 4, 3)).flatten(1)

    return _Plain(run, line=torch.nn.Conv1d(6, 16, 2, 2), volume=torch.nn.Conv3d(4, 8, (2, 2, 3), (2, 2, 3))), {
        "x": noise(2, 6, 24)
    }


@entry(
    "other convolutions: padded, with groups, overlapping, transposed", left=("grouped.*", "turned.*", "overlapping.*")
)
def convolutions() -> Model:
    parts = dict(
        overlapping=torch.nn.Conv2d(4, 8, 3, padding=1), grouped=torch.nn.Conv2d(8, 8, 1, groups=2),
        padded=torch.nn.Conv2d(8, 8, 2, 2, padding=1), turned=torch.nn.ConvTranspose2d(8, 4, 2, 2),
    )  # fmt: skip
    run = lambda s, x: s.turned(s.padded(s.grouped(s.overlapping(x))))  # noqa: E731
    return _Plain(run, **parts), {"x": noise(2, 4, 8, 8)}
