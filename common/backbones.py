"""Vision backbones and the readers of their published weights. Nothing here downloads anything.

A convolutional backbone maps normalised images (B,3,H,W) to {stride: feature (B, channels[stride], H/stride,
W/stride)}; `channels` tells the strides and widths, `mean` and `std` the pixel normalisation (of 0..1 RGB) that
its published weights were trained with.
"""
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common.config import UserError
from common.layers import ConvNormAct, DropPath, coordinates

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # mean and std of Google's ViT files
MAX_NPZ_BYTES = 4 << 30


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its stored statistics in training too, and keeps none of its input for the backward pass."""

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return _Frozen.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class _Frozen(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, and dx = dy / sqrt(var + eps) * weight.

    PyTorch's own form keeps x for the gradients of weight and bias, which do not exist here: half of a ResNet's memory.
    """

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        var, weight = ctx.saved_tensors
        return F.batch_norm(grad, torch.zeros_like(var), var, weight, eps=ctx.eps), None, None, None, None, None


def freeze_batchnorm(module):
    """Turn every BatchNorm2d in `module` into one that keeps its statistics and takes no gradient; returns `module`.

    Names in the state dict stay the same. For pre-trained backbones with small batches.
    """
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = FrozenBatchNorm2d
            child.eval().requires_grad_(False)
    return module


# ---- Darknet-53 ---------------------------------------------------------------------------------------------

class DarknetConv(nn.Sequential):
    """Convolution without bias, BatchNorm, LeakyReLU(0.1), as Darknet's `[convolutional]` with batch_normalize=1."""

    def __init__(self, in_channels, out_channels, kernel, stride=1):
        super().__init__(OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            bn=nn.BatchNorm2d(out_channels, eps=1e-5), act=nn.LeakyReLU(0.1, inplace=True)))


class DarknetBlock(nn.Module):
    """x + conv3x3(conv1x1(x)), the 1x1 halving the channels."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = DarknetConv(channels, channels // 2, 1)
        self.conv2 = DarknetConv(channels // 2, channels, 3)

    def forward(self, x):
        return x + self.conv2(self.conv1(x))


class Darknet53(nn.Module):
    """The trunk of Darknet-53 (Redmon & Farhadi, YOLOv3, 2018, Table 1): 52 convolutions, features at 8, 16, 32.

    frozen_bn: keep BatchNorm's statistics and parameters as they were loaded.
    """
    kind = "darknet"
    channels = {8: 256, 16: 512, 32: 1024}
    strides = tuple(channels)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    numbers = 40_620_640  # in a weight file: kernels, and four for each channel's BatchNorm

    def __init__(self, frozen_bn=True):
        super().__init__()
        self.config = {}
        self.stem = DarknetConv(3, 32, 3)
        self.stages = nn.ModuleList(
            nn.Sequential(DarknetConv(width // 2, width, 3, 2), *(DarknetBlock(width) for _ in range(blocks)))
            for width, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)))
        if frozen_bn:
            freeze_batchnorm(self)

    def forward(self, images):
        """images (B,3,H,W) in 0..1 -> {8: (B,256,H/8,W/8), 16: (B,512,…), 32: (B,1024,…)}."""
        x, features = self.stem(images), {}
        for i, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if 2 ** i in self.channels:
                features[2 ** i] = x
        return features

    def load_darknet(self, path):
        """Read the trunk from Darknet's binary `.weights`; returns the floats consumed.

        After the header the file is one float32 stream: for every convolution in order BatchNorm's bias, weight,
        running mean and running variance, then the kernel (out, in, k, k). What a detector or classifier has behind
        the trunk is left. Raises UserError for a file that is too short or whose values are no Darknet-53.
        """
        return self.load_darknet_stream(read_darknet(path)[1], path)

    def load_darknet_stream(self, values, path):
        """`load_darknet` on the float32 array that `read_darknet` gave; `path` is named in errors."""
        convs = [module for module in self.modules() if isinstance(module, DarknetConv)]
        state, taken = [], 0
        if len(values) < self.numbers:
            raise UserError(f"{path} ends after {len(values):,} numbers; Darknet-53 has {self.numbers:,}: the file is "
                            "cut short or holds another network.")
        for block in convs:
            for name in ("bias", "weight", "running_mean", "running_var"):
                state.append((getattr(block.bn, name), values[taken:taken + block.bn.num_features]))
                taken += block.bn.num_features
            if not state[-1][1].min() >= 0:
                raise UserError(f"{path} holds a negative variance where Darknet-53 has its BatchNorm: it is the file "
                                "of another network, or damaged.")
            state.append((block.conv.weight, values[taken:taken + block.conv.weight.numel()]))
            taken += block.conv.weight.numel()
        if not np.isfinite(values[:taken]).all():
            raise UserError(f"{path} holds numbers that are not finite; fetch it again.")
        with torch.no_grad():
            for target, numbers in state:
                target.copy_(torch.from_numpy(numbers.copy()).view_as(target))
        return taken


class DarknetNeck(nn.Sequential):
    """The six convolutions, 1x1 and 3x3 in turn, that YOLOv3 has behind the trunk at stride 32, and SeqTR and MCN, too."""

    def __init__(self, channels=1024):
        super().__init__(*(DarknetConv(channels if i % 2 == 0 else channels // 2, channels // 2 if i % 2 == 0 else channels,
                                       1 if i % 2 == 0 else 3) for i in range(6)))


def read_darknet(path):
    """Darknet's `.weights` file -> (header dict: major, minor, revision, seen), float32 array (memory-mapped).

    The header is three int32 and `seen`, the training images, in 64 bit from version 0.2 on and in 32 before
    (darknet's parser.c). Raises UserError when the file cannot be such a file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    if len(head) < 20:
        raise UserError(f"{path} has {len(head)} bytes and is no Darknet weight file.")
    major, minor, revision = (int(v) for v in np.frombuffer(head, "<i4", 3))
    if not (0 <= major <= 9 and 0 <= minor <= 99 and 0 <= revision <= 99):
        raise UserError(f"{path} is no Darknet weight file: its first numbers, the version, are "
                        f"{major}.{minor}.{revision}.")
    wide = major * 10 + minor >= 2
    seen = int(np.frombuffer(head, "<u8" if wide else "<u4", 1, 12)[0])
    start = 20 if wide else 16
    size = path.stat().st_size
    if (size - start) % 4 or size == start:
        raise UserError(f"{path} is no whole number of float32 after its header of {start} bytes: it is cut short.")
    return {"major": major, "minor": minor, "revision": revision, "seen": seen}, \
        np.memmap(path, "<f4", "r", offset=start)


# ---- ResNet and feature pyramid -----------------------------------------------------------------------------

class ResNet(nn.Module):
    """torchvision's ResNet-18/34/50/101 (He et al., 2016) without the classifier, under torchvision's key names."""
    kind = "resnet"
    strides = (4, 8, 16, 32)
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, depth=101, frozen_bn=True):
        super().__init__()
        if depth not in (18, 34, 50, 101):
            raise ValueError(f"ResNet has a depth of 18, 34, 50 or 101, not {depth}")
        self.config = {"depth": depth}
        for name, module in getattr(torchvision.models, f"resnet{depth}")(weights=None).named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        widths = (64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048)
        self.channels = dict(zip(self.strides, widths))
        if frozen_bn:
            freeze_batchnorm(self)

    def forward(self, images):
        """images (B,3,H,W), normalised -> {4, 8, 16, 32: (B, channels[stride], H/stride, W/stride)}."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = {}
        for stride, layer in zip(self.strides, (self.layer1, self.layer2, self.layer3, self.layer4)):
            features[stride] = x = layer(x)
        return features


class ResNetFPN(nn.Module):
    """ResNet with a feature pyramid (Lin et al., 2017): P2..P5, and P6 as P5 sub-sampled, 256 channels each."""
    strides = (4, 8, 16, 32, 64)
    channels = dict.fromkeys(strides, 256)
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, depth=101, frozen_bn=True):
        super().__init__()
        self.body = ResNet(depth, frozen_bn)
        self.fpn = torchvision.ops.FeaturePyramidNetwork(list(self.body.channels.values()), 256)

    def forward(self, images):
        """images (B,3,H,W), normalised -> {4, 8, 16, 32, 64: (B, 256, H/stride, W/stride)}."""
        body = self.body(images)
        levels = self.fpn(OrderedDict((str(stride), feature) for stride, feature in body.items()))
        features = {stride: levels[str(stride)] for stride in body}
        features[64] = F.max_pool2d(features[32], 1, 2)
        return features


# ---- the small backbone of the embedded corpora -------------------------------------------------------------

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm beside a shortcut; stride 2 halves the map and widens it."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, out_channels, 3, stride)
        self.conv2 = ConvNormAct(out_channels, out_channels, 3, act=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ConvNormAct(in_channels, out_channels, 1, stride, act=False)

    def forward(self, x):
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.shortcut(x), 0.1)


class Small(nn.Module):
    """A narrow CNN that learns the embedded corpora from scratch on a CPU; no paper's.

    Reads x and y of each pixel besides RGB (CoordConv, Liu et al., 2018), since sentences name places.
    width: channels at stride 4; they double with the stride. blocks: residual blocks at stride 4, 8, 16, …, one number
    for each stride that is wanted. 0.4 million parameters at the defaults.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, width=16, blocks=(1, 1, 1, 1)):
        super().__init__()
        self.strides = tuple(4 * 2 ** i for i in range(len(blocks)))
        self.channels = {stride: width * stride // 4 for stride in self.strides}
        self.stem = nn.Sequential(ConvNormAct(5, width, 3, 2), ConvNormAct(width, width, 3, 2))
        widths = list(self.channels.values())
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(before, after, 1 if i == 0 else 2),
                          *(ResidualBlock(after, after) for _ in range(blocks[i] - 1)))
            for i, (before, after) in enumerate(zip([width] + widths, widths)))

    def forward(self, images):
        """images (B,3,H,W), normalised -> {stride: (B, channels[stride], H/stride, W/stride)}."""
        place = coordinates(*images.shape[-2:], images).expand(len(images), -1, -1, -1)
        x, features = self.stem(torch.cat([images, place], 1)), {}
        for stride, stage in zip(self.strides, self.stages):
            features[stride] = x = stage(x)
        return features


# ---- ViT ----------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, dim/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """Pre-norm transformer layer with stochastic depth on both branches."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021) without its head, under timm's key names; S/16 at 384 by default.

    image_size: side in pixels of the square grid that the learned positions stand for. drop_path: rate of the last
    layer; it grows linearly from 0. mean, std: of the pixel normalisation, part of the state dict because published
    files differ in it (Google's 0.5, DeiT's and DINO's ImageNet values).
    """
    kind = "vit"

    def __init__(self, image_size=384, patch=16, dim=384, depth=12, heads=6, drop_path=0.0, mean=HALF, std=HALF):
        super().__init__()
        if image_size % patch or dim % heads:
            raise ValueError(f"ViT: {patch} must divide the image size {image_size}, and {heads} heads the width {dim}")
        self.config = {"image_size": image_size, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
        self.strides, self.channels = (patch,), {patch: dim}
        self.register_buffer("pixels", torch.tensor([mean, std]))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def mean(self):
        """Mean of the pixel normalisation, of 0..1 RGB."""
        return tuple(round(value, 6) for value in self.pixels[0].tolist())

    @property
    def std(self):
        """Standard deviation of the pixel normalisation, of 0..1 RGB."""
        return tuple(round(value, 6) for value in self.pixels[1].tolist())

    def forward(self, images):
        """images (B,3,H,W), normalised -> patch features (B, N, dim) after the final norm, rows of the grid in turn.

        H and W are multiples of `patch`, N = H/patch * W/patch; positions are resampled where that is not the native
        grid. The class token takes part and is dropped at the end. Raises ValueError for other sizes.
        """
        patch = self.config["patch"]
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(f"ViT needs sides that are multiples of {patch}, got {tuple(images.shape[-2:])}")
        x = self.patch_embed(images)
        positions = resample_positions(self.pos_embed, x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + positions
        return self.norm(self.blocks(x))[:, 1:]

    def load_timm(self, state):
        """Load a state dict under timm's names (timm, DeiT, DINO); returns the names that were left over.

        Positions of another grid are resampled, a distillation token is dropped. Raises UserError, naming them, for
        parameters that are missing, unknown, or of another shape.
        """
        state = {**state, "pixels": self.pixels}
        if "dist_token" in state and _is_positions(state.get("pos_embed")):
            state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
        if _is_positions(state.get("pos_embed")):
            side = self.config["image_size"] // self.config["patch"]
            state["pos_embed"] = resample_positions(state["pos_embed"], (side, side))
        return load_exactly(self, state, ("head.", "head_dist.", "dist_token", "pre_logits."))


def _is_positions(tensor):
    """Whether `tensor` is (1, 1 + side², dim), or that with a second extra token."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 3 or tensor.shape[1] < 2:
        return False
    return any(math.isqrt(n) ** 2 == n for n in (tensor.shape[1] - 1, tensor.shape[1] - 2))


def resample_positions(positions, grid):
    """Learned positions (1, 1 + side², dim) for a grid (rows, columns): bilinear, as TSEG's Sec. 4.2; class token as it is."""
    side = math.isqrt(positions.shape[1] - 1)
    if (side, side) == tuple(grid) or side * side != positions.shape[1] - 1:
        return positions
    square = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=tuple(grid), mode="bilinear")
    return torch.cat([positions[:, :1], square.flatten(2).transpose(1, 2).to(positions.dtype)], 1)


def load_augreg_npz(path):
    """Google's ViT file (`.npz` of JAX arrays, AugReg, Steiner et al., 2022) -> state dict under timm's names.

    Holds `head.*` where the file has one. Raises UserError for a file that is damaged or of another architecture.
    """
    arrays = _read_npz(Path(path))
    state = {}

    def take(name, *axes, shape=None):
        """Array `name`, reshaped, its axes put in torch's order."""
        array = arrays.pop(name)
        array = array.reshape(shape) if shape else array
        return torch.from_numpy(np.ascontiguousarray(array.transpose(axes) if axes else array, dtype=np.float32))

    def norm(theirs, ours):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = take(f"{theirs}/scale"), take(f"{theirs}/bias")

    def linear(theirs, ours):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = take(f"{theirs}/kernel", 1, 0), take(f"{theirs}/bias")

    try:
        state["patch_embed.proj.weight"] = take("embedding/kernel", 3, 2, 0, 1)  # HWIO -> OIHW
        dim = len(state["patch_embed.proj.weight"])
        state["patch_embed.proj.bias"] = take("embedding/bias")
        state["cls_token"] = take("cls")
        state["pos_embed"] = take("Transformer/posembed_input/pos_embedding")
        depth = 1 + max(int(n) for n in re.findall(r"Transformer/encoderblock_(\d{1,3})/", "\n".join(arrays)))
        for i in range(depth):
            theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
            norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
            attention = f"{theirs}/MultiHeadDotProductAttention_1"
            parts = ("query", "key", "value")
            state[f"{ours}.attn.qkv.weight"] = torch.cat(
                [take(f"{attention}/{part}/kernel", 1, 0, shape=(dim, dim)) for part in parts])
            state[f"{ours}.attn.qkv.bias"] = torch.cat(
                [take(f"{attention}/{part}/bias", shape=(dim,)) for part in parts])
            state[f"{ours}.attn.proj.weight"] = take(f"{attention}/out/kernel", 1, 0, shape=(dim, dim))
            state[f"{ours}.attn.proj.bias"] = take(f"{attention}/out/bias")
            norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
            linear(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
            linear(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
        norm("Transformer/encoder_norm", "norm")
        if "head/kernel" in arrays:
            linear("head", "head")
    except KeyError as error:
        raise UserError(f"{path} has no array {error}: it is no AugReg ViT, or an incomplete one.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no AugReg ViT: {error}.") from None
    unknown = [name for name in arrays if not name.startswith("pre_logits/")]
    if unknown:
        raise UserError(f"{path} is no plain ViT; it also holds {_some(unknown)}.")
    return state


def _read_npz(path):
    """All arrays of an `.npz`, without the prefix `opt/target/` that some files have. Never unpickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_NPZ_BYTES:
                raise UserError(f"{path} unpacks to more than {MAX_NPZ_BYTES >> 30} GiB and is no ViT.")
        with np.load(path, allow_pickle=False) as archive:
            return {name.removeprefix("opt/target/"): archive[name] for name in archive.files}
    except UserError:
        raise
    except Exception as error:  # zip and npy headers written by anyone raise nearly anything
        raise UserError(f"cannot read {path} as .npz ({_first_line(error)}).") from None


# ---- Swin ---------------------------------------------------------------------------------------------------

class Swin(nn.Module):
    """torchvision's Swin Transformer (Liu et al., 2021), the four stages' outputs, under torchvision's key names.

    variant: t, s or b, each with its own stochastic depth. The stages' outputs are not normalised.
    """
    kind = "swin"
    strides = (4, 8, 16, 32)
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, variant="b"):
        super().__init__()
        if variant not in ("t", "s", "b"):
            raise ValueError(f"Swin has the variants t, s and b, not {variant!r}")
        self.config = {"variant": variant}
        whole = getattr(torchvision.models, f"swin_{variant}")(weights=None)
        self.features = whole.features
        width = whole.features[0][0].out_channels
        self.channels = {stride: width * stride // 4 for stride in self.strides}

    def forward(self, images):
        """images (B,3,H,W), normalised -> {4, 8, 16, 32: (B, channels[stride], H/stride, W/stride)}."""
        x, features = images, {}
        for i, layer in enumerate(self.features):  # patches, then stage and merging in turn, channels last
            x = layer(x)
            if i % 2:
                features[2 ** (i // 2 + 2)] = x.permute(0, 3, 1, 2)
        return features


# ---- converted weight files ---------------------------------------------------------------------------------

def load_exactly(model, state, left_over=()):
    """Load every parameter of `model` from `state`; returns the names in `state` that begin with one of `left_over`.

    BatchNorm's batch counters may be absent (old torchvision files). Raises UserError, naming them, for parameters
    that are missing or of another shape, and for names that are neither the model's nor expected to be left over.
    """
    own = model.state_dict()
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    left = [name for name in state if name not in own]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    unknown = [name for name in left if not name.startswith(tuple(left_over))]
    for names, what in ((missing, "lack"), (shapes, "have other shapes:"), (unknown, "hold unknown names:")):
        if names:
            raise UserError(f"these weights do not fit {type(model).__name__}; they {what} {_some(names)}.")
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return left


def load_weights(model, path, leaky_init=False):
    """Load a file that `python -m data_prep.weights` wrote into a backbone (or BERT); returns what it says of itself.

    The dict has kind, config, mean, std (pixel normalisation, None for text), source, sha256 and leaky. A ViT takes
    over the file's pixel normalisation. Raises UserError for other files, another kind of network, and for weights
    that have seen RefCOCO's val or test images unless `leaky_init`.
    """
    path, model = Path(path), getattr(model, "body", model)
    data = read_converted(path)
    if data["kind"] != getattr(model, "kind", None):
        raise UserError(f"{path} holds weights for {data['kind']}, not for {type(model).__name__}.")
    for key, value in model.config.items():
        if key != "image_size" and data["config"].get(key) != value:
            raise UserError(f"{path} was made for {key}={data['config'].get(key)}, the model has {key}={value}.")
    if data["leaky"] and not leaky_init:
        raise UserError(f"{path} was trained on images of RefCOCO's val and test splits; say --leaky-init to start "
                        "from it all the same, and every result will be marked.")
    try:
        loader = getattr(model, "load_timm", None) or getattr(model, "load_hf", None)
        loader(data["state"]) if loader else load_exactly(model, data["state"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if model.kind == "vit":
        model.pixels.copy_(torch.tensor([data["mean"], data["std"]]))
    return {key: value for key, value in data.items() if key != "state"}


def read_torch(path):
    """What a `torch.save`d file holds, on the CPU, tensors and plain types alone.

    Raises UserError for a file that is damaged (its checksums are verified) or that only code could rebuild.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: its part {damaged[:80]} fails the checksum; fetch it again.")
        with warnings.catch_warnings():  # about pickle's versions; what counts is whether the file is refused
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, torch's readers and its unpickler raise nearly anything on hostile bytes
        raise UserError(f"cannot read {path} as tensors alone ({_first_line(error)[:200]}); it is damaged, of another "
                        "format, or asks for code to be run, which is refused.") from None


def read_converted(path):
    """The dict in a converted weight file, its checksums and types verified. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; data_prep/README.md says where the weights are published, and "
                        "`python -m data_prep.weights --help` how to make this file of them.")
    data = read_torch(path)
    types = {"kind": str, "config": dict, "state": dict, "source": str, "sha256": str, "leaky": bool}
    if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in types.items()):
        raise UserError(f"{path} was not written by `python -m data_prep.weights`; convert it with that.")
    if data["kind"] == "vit" and not all(
            isinstance(data.get(key), (tuple, list)) and len(data[key]) == 3
            and all(isinstance(value, float) for value in data[key]) for key in ("mean", "std")):
        raise UserError(f"{path} does not tell its pixel normalisation; convert it again.")
    return data


def _some(names, limit=6):
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name)[:80] for name in names[:limit]) + more


def _first_line(error):
    """The first line of an exception's text, or its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
