"""Vision models of timm and a block of a diffusion UNet."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from zoo import Model, entry, noise


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return f"{cls.__name__}.{name}"


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # so that it counts as a package
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def _timm() -> Any:
    """timm; its models need nothing of torchvision, whose builds do not load beside every build of torch."""
    names = ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".models.feature_extraction",
             ".ops", ".ops.misc", ".utils")  # fmt: skip
    stubs = {f"torchvision{name}": _Stub(f"torchvision{name}") for name in names}
    for name, stub in list(stubs.items())[1:]:
        parent, _, child = name.rpartition(".")
        setattr(stubs[parent], child, stub)
    absent = {name: stub for name, stub in stubs.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        return pytest.importorskip("timm")
    finally:
        for name in absent:
            del sys.modules[name]


@entry("ViT of timm (patch convolution)", left=("cls_token", "pos_embed"))
def vit() -> Model:
    model = _timm().create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4)
    return model, {"x": noise(2, 3, 32, 32)}


@entry("ConvNeXt of timm (depthwise and patch convolutions)", left=("*.conv_dw.weight",))
def convnext() -> Model:
    model = _timm().create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=5)
    return model, {"x": noise(2, 3, 32, 32)}


class ResnetBlock(torch.nn.Module):
    """Of a latent diffusion UNet: two 3x3 convolutions, and a 1x1 shortcut where channels change."""

    def __init__(self, channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.GroupNorm(4, channels), torch.nn.GroupNorm(4, out_channels)
        self.conv1 = torch.nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = torch.nn.Linear(time, out_channels)
        self.shortcut = torch.nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class TransformerBlock(torch.nn.Module):
    """Of a latent diffusion UNet: 1x1 convolutions around self attention, cross attention and a GEGLU."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, channels)
        self.proj_in, self.proj_out = (torch.nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.q1, self.k1, self.v1 = (torch.nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.q2 = torch.nn.Linear(channels, channels, bias=False)
        self.k2, self.v2 = (torch.nn.Linear(context, channels, bias=False) for _ in range(2))
        self.geglu, self.out = torch.nn.Linear(channels, 8 * channels), torch.nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        h = h + F.scaled_dot_product_attention(self.q1(h), self.k1(h), self.v1(h))
        h = h + F.scaled_dot_product_attention(self.q2(h), self.k2(context), self.v2(context))
        value, gate = self.geglu(h).chunk(2, dim=-1)
        h = h + self.out(value * F.gelu(gate))
        return x + self.proj_out(h.reshape(batch, height, width, channels).permute(0, 3, 1, 2))


class UNetStage(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet, self.attention = ResnetBlock(16, 32, 24), TransformerBlock(32, 20)
        self.down = torch.nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.down(self.attention(self.resnet(x, t), context))


@entry("UNet stage of latent diffusion (1x1 convolutions)")
def unet() -> Model:
    return UNetStage(), {"x": noise(2, 16, 8, 8), "t": noise(2, 24), "context": noise(2, 5, 20)}


@entry("UNet of diffusers", alike=True, left=("conv_in.weight",))
def diffusers_unet() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": noise(2, 5, 20),
    }  # fmt: skip
