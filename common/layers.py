"""Blocks that no paper claims: convolution with GroupNorm, position encodings, stochastic depth, attention, transformer layers.

GroupNorm (Wu & He, 2018) instead of BatchNorm, so that a sample's result never depends on its batch.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
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


def sine(place, dim, waves=1.0, temperature=10000.0):
    """Sines and cosines (..., n, dim) in turn of places (..., n) in shares of a side, DETR's: the fastest has `waves` waves over
    the side, the others are up to `temperature` times slower. `dim` must be even."""
    period = temperature ** (torch.arange(dim // 2, device=place.device) * 2 / dim)
    angle = place[..., None] * 2 * math.pi * waves / period
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_positions(height, width, dim, device=None, temperature=10000.0):
    """(height, width, dim): DETR's fixed 2-D encoding, dim/2 channels of y and then dim/2 of x.

    Positions are (index + 1) / size * 2 pi; sines and cosines alternate. `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine_positions needs a multiple of 4 channels, got {dim}")
    y, x = (sine(torch.arange(1, size + 1, device=device) / size, dim // 2, temperature=temperature) for size in (height, width))
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)


def normalise(images, mean, std):
    """images (B,3,H,W), uint8 0..255 or float 0..1 -> float (x - mean) / std; `mean`, `std`: 3 values of 0..1 RGB."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None] for v in (mean, std))
    return (images - mean) / std


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, key, value=None):
        """Projected keys and values, (E,heads,n,C/heads) each, of key and value (E,n,C), by default the same."""
        return self._split(self.key(key)), self._split(self.value(key if value is None else value))

    def forward(self, query, keys, mask=None):
        """query (E,T,C), keys from `keys` -> (E,T,C); mask, if any, broadcasts to (E,heads,T,n): bool, true where seen, or added
        to the logits."""
        parts = [self._split(self.query(query)), *keys]
        on_cpu = query.device.type == "cpu"  # where bfloat16's backward pass takes several times as long as float32's
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            parts = [part.float() for part in parts] if on_cpu else parts
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(parts[0].dtype)
            x = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


def feed_forward(dim, dropout, inner=None):
    """The pointwise half of a transformer layer, `inner` wide inside, by default four times as wide."""
    inner = inner or 4 * dim
    return nn.Sequential(nn.Linear(dim, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, dim))


class EncoderLayer(nn.Module):
    """DETR's (Carion et al., 2020): positions join queries and keys; post-norm."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads, dropout), feed_forward(dim, dropout)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)), nn.Dropout(dropout)

    def forward(self, x, position, visible):
        """x, position (E,S,C), visible (E,1,1,S) bool -> (E,S,C)."""
        asked = x + position
        x = self.norms[0](x + self.dropout(self.attention(asked, self.attention.keys(asked, x), visible)))
        return self.norms[1](x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """The transformer's (Vaswani et al., 2017), in its two halves, on keys that its caller projects; post-norm. ffn: inner width."""

    def __init__(self, dim, heads, ffn, dropout):
        super().__init__()
        self.own, self.cross = Attention(dim, heads, dropout), Attention(dim, heads, dropout)
        self.feed_forward = feed_forward(dim, dropout, ffn)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3)), nn.Dropout(dropout)

    def among(self, x, keys, mask=None):
        """Self-attention of x (E,T,C) on `own.keys`, those of x and of what came before; mask as in `Attention` -> (E,T,C)."""
        return self.norms[0](x + self.dropout(self.own(x, keys, mask)))

    def ask(self, x, keys, mask=None):
        """Cross-attention of x (E,T,C) on `cross.keys`, and the feed-forward half -> (E,T,C)."""
        x = self.norms[1](x + self.dropout(self.cross(x, keys, mask)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))
