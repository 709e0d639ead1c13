"""Blocks that no paper claims: convolution with GroupNorm, position encodings, stochastic depth.

GroupNorm (Wu & He, 2018) instead of BatchNorm, so that a sample's result never depends on its batch.
"""
import math

import torch
from torch import nn


class ConvNormAct(nn.Sequential):
    """Convolution without bias, GroupNorm, LeakyReLU(0.1): (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)).

    groups: of the GroupNorm; the largest divisor of `out_channels` up to it is taken. act=False: no LeakyReLU.
    """

    def __init__(self, in_channels, out_channels, kernel=3, stride=1, dilation=1, groups=8, act=True):
        groups = next(g for g in range(min(groups, out_channels), 0, -1) if out_channels % g == 0)
        layers = [nn.Conv2d(in_channels, out_channels, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
                  nn.GroupNorm(groups, out_channels)]
        super().__init__(*layers, *([nn.LeakyReLU(0.1, inplace=True)] if act else []))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops a residual branch of a sample with `rate`, only in training."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


def coordinates(height, width, like):
    """(1, 2, height, width): x and y of every cell's centre in -1..1 (CoordConv), of `like`'s device and dtype.

    -1 and 1 are the outer edges of the map, so that the same place has the same value on every stride.
    """
    x = (torch.arange(width, device=like.device, dtype=like.dtype) * 2 + 1) / width - 1
    y = (torch.arange(height, device=like.device, dtype=like.dtype) * 2 + 1) / height - 1
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def sine_positions(height, width, dim, device=None, temperature=10000.0):
    """(height, width, dim): DETR's fixed 2-D encoding, dim/2 channels of y and then dim/2 of x.

    Positions are (index + 1) / size * 2 pi; sines and cosines alternate. `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine_positions needs a multiple of 4 channels, got {dim}")
    period = temperature ** (torch.arange(dim // 4, device=device) * 4 / dim)

    def encode(size):
        angle = (torch.arange(1, size + 1, device=device) * (2 * math.pi / size))[:, None] / period
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    y, x = encode(height), encode(width)
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)


def normalise(images, mean, std):
    """images (B,3,H,W), uint8 0..255 or float 0..1 -> float (x - mean) / std; `mean`, `std`: 3 values of 0..1 RGB."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None] for v in (mean, std))
    return (images - mean) / std
