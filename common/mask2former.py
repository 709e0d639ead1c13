"""Mask2Former in plain PyTorch: the proposals of one script, a published peer and no idea of that script's paper.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022 (arXiv 2112.01527), with
the deformable attention of Zhu et al., "Deformable DETR", ICLR 2021 (arXiv 2010.04159). Settings that the paper leaves
open are those of its authors' COCO instance configurations.

    model = Mask2Former("r50")
    outputs = model(images, aux=True)
    losses = criterion(outputs, [{"labels": (n,) int64, "masks": (n,H,W) bool}, …one for each image])
    found = instances(outputs["pred_logits"][0], outputs["pred_masks"][0], frame.prob_img)
"""
import io
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import SwinTransformerBlock

from common.backbones import ResNet, Small, Swin, load_exactly
from common.config import UserError
from common.layers import sine_positions

STRIDES = (4, 8, 16, 32)
LEVELS = 3  # memory maps, from stride 32 to 8
MAX_PKL_BYTES = 4 << 30


# ---- backbones ----------------------------------------------------------------------------------------------

class NormedSwin(nn.Module):
    """Swin with a LayerNorm on each stage's output, as dense prediction takes it (Liu et al., 2021, code of Sec. 4.2).

    window: side of the attention windows in cells; 12 for weights pre-trained at 384 px, 7 for those at 224.
    drop_path: rate of the last block; it grows linearly from 0. A map that one window covers is not shifted, as in
    torchvision; the authors' detection code shifts there too (canvases up to 32 * window pixels).
    """

    def __init__(self, variant="b", window=12, drop_path=0.3):
        super().__init__()
        self.body = Swin(variant)
        self.channels, self.mean, self.std = self.body.channels, self.body.mean, self.body.std
        blocks = [module for module in self.body.modules() if isinstance(module, SwinTransformerBlock)]
        for i, block in enumerate(blocks):
            block.stochastic_depth.p = drop_path * i / (len(blocks) - 1)
            if block.attn.window_size != [window, window]:
                block.attn.shift_size = [window // 2 if shift else 0 for shift in block.attn.shift_size]
                block.attn.window_size = [window, window]
                block.attn.define_relative_position_bias_table()
                block.attn.define_relative_position_index()
        for i, width in enumerate(self.channels.values()):
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, images):
        """images (B,3,H,W), normalised -> {4, 8, 16, 32: (B, channels[stride], H/stride, W/stride)}."""
        features = self.body(images)
        return {stride: getattr(self, f"norm{i}")(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                for i, (stride, feature) in enumerate(features.items())}


BACKBONES = {"r18": lambda: ResNet(18), "r50": lambda: ResNet(50), "r101": lambda: ResNet(101), "small": Small,
             "swin_t": lambda: NormedSwin("t", 7), "swin_s": lambda: NormedSwin("s", 7),
             "swin_b": lambda: NormedSwin("b", 12)}


# ---- bilinear sampling --------------------------------------------------------------------------------------

def corners(xy, size, scale=None):
    """The four cells round each point of a map, and their bilinear weights.

    xy: (..., 2) in cells, a cell's centre at +0.5. size: int tensor (..., 2), width and height. Returns index (..., 4)
    int32 into the flattened map and weight (..., 4), times scale (...) if given. Cells outside weigh 0 (zero padding);
    gradients flow through the weights to xy.
    """
    (columns, across), (rows, down) = map(_neighbours, xy.unbind(-1), size.unbind(-1))
    down = [share if scale is None else share * scale for share in down]
    index = [row * size[..., 0] + column for row in rows for column in columns]
    return torch.stack(index, -1), torch.stack([y * x for y in down for x in across], -1)


def _neighbours(at, size):
    """The cells before and behind positions along one axis, kept inside, and their shares: 0 where they are not."""
    at = at - 0.5
    low = at.detach().floor()
    share = at - low
    shares = (1 - share) * ((low >= 0) & (low < size)), share * ((low >= -1) & (low < size - 1))
    return [(low + step).int().clamp(min=0).minimum(size - 1) for step in (0, 1)], shares  # NaN stays inside, too


def sample(maps, points):
    """Differentiable values of maps (M,h,w) at points (M,P,2), x and y in 0..1 of the whole map -> (M,P)."""
    if not maps.numel():
        return maps.new_zeros(points.shape[:2])
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def sample_masks(masks, points):
    """What `sample` gives, for target masks (M,H,W) of any type, without a float copy of them and without gradient.

    points: (M,P,2), or (1,P,2) where all masks share them.
    """
    size = torch.tensor(masks.shape[:-3:-1], device=points.device, dtype=torch.int32)
    index, weight = corners(points * size, size)
    values = masks.flatten(1).gather(1, index.flatten(1).long().expand(len(masks), -1))
    return (values.unflatten(1, weight.shape[1:]) * weight).sum(-1)


# ---- pixel decoder ------------------------------------------------------------------------------------------

def deformable_sum(value, shapes, xy, weight):
    """Sum over levels and points of weight * value at xy (Deformable DETR, Eq. 3), without a compiled operator.

    value (B,S,heads,d): the levels' cells, one level behind the other, `shapes` their [(h, w)]. xy (B,Q,heads,L,P,2):
    in cells of each level. weight (B,Q,heads,L,P). Returns (B,Q,heads*d).

    The bilinear value of a point is itself a weighted sum of four cells, so a query's answer is one weighted bag of
    4*L*P rows of `value`: `embedding_bag` sums them without ever holding the sampled values, (B,Q,heads,L,P,d), which
    the usual form keeps for the backward pass; and its gradient is deterministic on GPUs, grid_sample's is not.
    """
    batch, cells, heads, dim = value.shape
    sizes = torch.tensor(shapes, device=value.device, dtype=torch.int32)
    start = (sizes.prod(1).cumsum(0) - sizes.prod(1)).int()
    index, share = corners(xy, sizes.flip(1)[:, None], weight)                  # (B,Q,heads,L,P,4)
    image = torch.arange(batch, device=value.device, dtype=torch.int32)[:, None, None, None, None, None] * cells
    head = torch.arange(heads, device=value.device, dtype=torch.int32)[:, None, None, None]
    index = (index + start[:, None, None] + image) * heads + head
    bags = index.shape[:3].numel()
    out = F.embedding_bag(index.view(bags, -1), value.reshape(-1, dim), mode="sum",
                          per_sample_weights=share.view(bags, -1))
    return out.view(batch, -1, heads * dim)


class DeformableAttention(nn.Module):
    """Multi-scale deformable self-attention: each cell looks at `points` places per head on each of the levels."""

    def __init__(self, dim=256, heads=8, points=4):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * LEVELS * points * 2)
        self.attention_weights = nn.Linear(dim, heads * LEVELS * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset()

    def reset(self):
        """Head h starts by looking in direction 2 pi h / heads, 1, 2, … cells far, with equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None] * direction[:, None, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, LEVELS, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query, value, places, shapes):
        """query (B,Q,C), value (B,S,C), places (Q,2) of the queries in 0..1 of the map, shapes [(h, w)] -> (B,Q,C)."""
        split = (self.heads, LEVELS, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2))
        weight = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, split[1:])
        sizes = torch.tensor(shapes, device=value.device).flip(1)[:, None]        # (L, 1, 2): width, height
        xy = places[:, None, None, None] * sizes + offsets
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))
        return self.output_proj(deformable_sum(values, shapes, xy, weight))


class DeformableLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, LayerNorm behind each."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x, positions, places, shapes):
        x = self.norm1(x + self.self_attn(x + positions, x, places, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class PixelDecoder(nn.Module):
    """MSDeformAttn pixel decoder (Sec. 3.2.3): strides 32, 16, 8 through deformable layers, then one FPN step to 4.

    channels: {stride: width} of the backbone. checkpoint_layers: recompute the layers in the backward pass. Computes in
    float32 whatever the autocast, as the authors do.
    """

    def __init__(self, channels, dim=256, heads=8, layers=6, ffn=1024, checkpoint_layers=False):
        super().__init__()
        self.checkpoint_layers = checkpoint_layers
        groups = math.gcd(32, dim)
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(channels[stride], dim, 1), nn.GroupNorm(groups, dim))
                                        for stride in (32, 16, 8))
        self.level_embed = nn.Parameter(torch.randn(LEVELS, dim))
        self.layers = nn.ModuleList(DeformableLayer(dim, heads, ffn) for _ in range(layers))
        self.adapter = nn.Sequential(nn.Conv2d(channels[4], dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.output = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, dim, 1)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            nn.init.zeros_(proj[0].bias)
        for conv in (self.adapter[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features):
        """{stride: (B,channels,h,w)} -> memory [(B,dim,h,w) at 32, 16, 8], mask features (B,dim,H/4,W/4)."""
        with torch.autocast(features[4].device.type, enabled=False):
            maps = [proj(features[stride].float()) for proj, stride in zip(self.input_proj, (32, 16, 8))]
            shapes = [tuple(x.shape[-2:]) for x in maps]
            x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)          # (B, S, dim)
            positions = torch.cat([sine_positions(h, w, x.shape[-1], x.device).flatten(0, 1) + embed
                                   for (h, w), embed in zip(shapes, self.level_embed)])
            places = torch.cat([centres(h, w, x.device) for h, w in shapes])
            for layer in self.layers:
                if self.checkpoint_layers and torch.is_grad_enabled():
                    x = checkpoint(layer, x, positions, places, shapes, use_reentrant=False)
                else:
                    x = layer(x, positions, places, shapes)
            memory = [level.transpose(1, 2).unflatten(-1, shape)
                      for level, shape in zip(x.split([h * w for h, w in shapes], 1), shapes)]
            fine = self.adapter(features[4].float())
            fine = fine + F.interpolate(memory[-1], fine.shape[-2:], mode="bilinear", align_corners=False)
            return memory, self.mask_features(self.output(fine))


def centres(height, width, device):
    """(height*width, 2): x and y of the cells' centres in 0..1, row after row."""
    y, x = torch.meshgrid((torch.arange(height, device=device) + 0.5) / height,
                          (torch.arange(width, device=device) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


# ---- masked decoder -----------------------------------------------------------------------------------------

class Attention(nn.MultiheadAttention):
    """torch's multi-head attention and its parameters, with one mask for all heads that is never copied per head."""

    def forward(self, query, key, value, blocked=None):
        """query (B,Q,C), key and value (B,K,C), blocked (B,Q,K): True where a query may not look -> (B,Q,C)."""
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for x, weight, bias in parts)
        out = F.scaled_dot_product_attention(q, k, v, None if blocked is None else ~blocked[:, None])
        return self.out_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward: in this order (Sec. 3.2.2), LayerNorm behind each."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.cross_attn, self.cross_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.self_attn, self.self_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.linear1, self.linear2, self.ffn_norm = nn.Linear(dim, ffn), nn.Linear(ffn, dim), nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x, positions, key, value, blocked):
        x = self.cross_norm(x + self.cross_attn(x + positions, key, value, blocked))
        x = self.self_norm(x + self.self_attn(x + positions, x + positions, x))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskedDecoder(nn.Module):
    """Transformer decoder with masked attention (Sec. 3.2.1): a query looks only where it last predicted its mask.

    The layers take the memory maps in turn, from the coarsest on. Query features and positions are learnt.
    """

    def __init__(self, num_classes, num_queries, dim=256, heads=8, layers=9, ffn=2048):
        super().__init__()
        self.query_feat, self.query_embed = nn.Embedding(num_queries, dim), nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                                        nn.Linear(dim, dim))

    def forward(self, memory, mask_features, aux=False):
        """Memory and mask features of the pixel decoder -> the dict of `Mask2Former.forward`."""
        keys, values, pixels = [], [], []
        for level, embed in zip(memory, self.level_embed.weight):
            values.append(level.flatten(2).transpose(1, 2) + embed)                          # (B, hw, dim)
            keys.append(values[-1] + sine_positions(*level.shape[-2:], level.shape[1], level.device).flatten(0, 1))
            # Resizing is linear: masks of resized features are the resized masks, at a fraction of the cost.
            pixels.append(F.interpolate(mask_features.detach(), level.shape[-2:], mode="bilinear").flatten(2))
        x = self.query_feat.weight.expand(len(mask_features), -1, -1)
        earlier = []
        for i, layer in enumerate(self.layers):
            normed = self.decoder_norm(x)
            embedding = self.mask_embed(normed)
            if aux:
                earlier.append(self.predict(normed, embedding, mask_features))
            blocked = embedding.detach() @ pixels[i % LEVELS] < 0
            blocked &= ~blocked.all(-1, keepdim=True)  # an empty mask blocks nothing: softmax needs a place
            x = layer(x, self.query_embed.weight, keys[i % LEVELS], values[i % LEVELS], blocked)
        queries = self.decoder_norm(x)
        outputs = {**self.predict(queries, self.mask_embed(queries), mask_features), "queries": queries}
        return {**outputs, "aux": earlier} if aux else outputs

    def predict(self, queries, embedding, mask_features):
        """Class logits (B,N,C+1) and mask logits (B,N,H/4,W/4) of queries (B,N,dim) and their mask embeddings."""
        return {"pred_logits": self.class_embed(queries),
                "pred_masks": torch.einsum("bnc,bchw->bnhw", embedding, mask_features)}


class Mask2Former(nn.Module):
    """Backbone, pixel decoder and masked decoder; the defaults are the authors' for COCO instances.

    backbone: r18, r50, r101 (BatchNorm frozen), swin_t, swin_s, swin_b, small, or a module with `channels` that gives
    {stride: feature} at 4, 8, 16, 32. num_classes: without "no object". encoder_layers, decoder_layers: deformable and
    masked ones. checkpoint_encoder: trade time for memory in the deformable layers.
    Images are normalised with `mean` and `std` (of 0..1 RGB); sides that are multiples of 32 waste nothing.
    """

    def __init__(self, backbone="r50", num_classes=80, num_queries=100, dim=256, heads=8, encoder_layers=6,
                 decoder_layers=9, encoder_ffn=1024, decoder_ffn=2048, checkpoint_encoder=False):
        super().__init__()
        if isinstance(backbone, str) and backbone not in BACKBONES:
            raise UserError(f"Mask2Former has no backbone {backbone!r}; choose from {', '.join(BACKBONES)}.")
        self.backbone = BACKBONES[backbone]() if isinstance(backbone, str) else backbone
        self.mean, self.std = self.backbone.mean, self.backbone.std
        self.num_classes, self.num_queries, self.dim = num_classes, num_queries, dim
        self.pixel_decoder = PixelDecoder(self.backbone.channels, dim, heads, encoder_layers, encoder_ffn,
                                          checkpoint_encoder)
        self.predictor = MaskedDecoder(num_classes, num_queries, dim, heads, decoder_layers, decoder_ffn)

    def forward(self, images, aux=False):
        """images (B,3,H,W), normalised floats -> dict of logits:

        pred_logits (B,N,C+1), the last one "no object"; pred_masks (B,N,H/4,W/4); queries (B,N,dim), what both were
        read from; with `aux`, aux: [{pred_logits, pred_masks}] of the learnt queries and of every layer but the last.
        """
        return self.predictor(*self.pixel_decoder(self.backbone(images)), aux)

    def load_official(self, state):
        """Load {name: tensor or numpy array} under Facebook's names; returns the names that were left over.

        `read_detectron_pkl` reads such a dict. The weights in the authors' model zoo have seen the images of
        RefCOCO's val and test splits. Raises UserError for parameters that are missing, unknown or of another shape.
        """
        swin = isinstance(self.backbone, NormedSwin)
        table = OFFICIAL + (tuple((f"^backbone\\.{old}", f"backbone.body.{new}") for old, new in SWIN) if swin
                            else RESNET)
        return load_exactly(self, self._renamed(state, table), ("criterion.empty_weight",))

    def load_swin_official(self, state):
        """Load Microsoft's Swin (the dict in their ImageNet-1K and -22K `.pth`, `model` inside) into the backbone.

        Returns the names that were left over: the classifier and its norm. The norms on the stages' outputs stay as
        they are, no such file has them. Raises UserError for parameters that are missing, unknown or of another shape,
        which is how a file of another window size ends.
        """
        if not isinstance(self.backbone, NormedSwin):
            raise UserError("these weights are for a Swin, and the backbone is none.")
        state = state.get("model", state) if isinstance(state, dict) else None
        if not isinstance(state, dict):
            raise UserError("these are no Swin weights: they are not tensors under names.")
        renamed = self._renamed({f"backbone.body.{name}": value for name, value in state.items()},
                                tuple((f"^backbone\\.body\\.{old}", f"backbone.body.{new}") for old, new in SWIN))
        body = {name.removeprefix("backbone.body."): value for name, value in renamed.items()}
        return load_exactly(self.backbone.body, body, ("norm.", "head."))

    def _renamed(self, state, table):
        """`state` under our names, as tensors; a Swin's index of relative positions is compared with ours."""
        own, renamed = self.state_dict(), {}
        for name, value in state.items():
            for old, new in table:
                name = re.sub(old, new, name)
            renamed[name] = torch.tensor(value) if isinstance(value, np.ndarray) else value
        for name in [name for name in renamed if name.endswith(".attn_mask")]:
            del renamed[name]  # computed from the size of their image, no weight
        for name, ours in own.items():
            if name.endswith(".relative_position_index"):
                theirs = renamed.setdefault(name, ours).flatten()
                renamed[name] = theirs
                if theirs.shape == ours.shape and not torch.equal(theirs.to(ours), ours):
                    raise UserError(f"{name} numbers a window's relative positions in another order than ours; the "
                                    "biases beside it would land on wrong places.")
        return renamed


# ---- matcher ------------------------------------------------------------------------------------------------

def mask_costs(logits, truth):
    """Cross-entropy and Dice cost of every predicted for every target mask on the same places.

    logits (N,P), truth (n,P) in 0..1 -> two (N,n): BCE, mean over P, and 1 - (2 sum pt + 1) / (sum p + sum t + 1).
    """
    with torch.autocast(logits.device.type, enabled=False):  # these sums leave half precision's range
        prob = logits.sigmoid()
        bce = (F.softplus(logits).sum(1)[:, None] - logits @ truth.T) / logits.shape[1]  # BCE(x, t) = softplus(x) - x t
        dice = 1 - (2 * prob @ truth.T + 1) / (prob.sum(1)[:, None] + truth.sum(1) + 1)
    return bce, dice


@torch.no_grad()
def match(logits, masks, labels, truth, points, weights=(2.0, 5.0, 5.0)):
    """Bipartite matching of one image's predictions and targets (Sec. 3.3): the cheapest pairs, one to one.

    logits (N,C+1), masks (N,h,w) logits, labels (n,), truth (n,H,W) masks, points (P,2) in 0..1 where all masks are
    compared; weights of -p(class), BCE and Dice. Returns query and target indices, min(N, n) each. Costs that are
    not finite count as the highest, so that a diverging run ends in its loss and not here.
    """
    if not len(labels):
        return labels.new_zeros(0), labels.new_zeros(0)
    points = points[None]
    at = F.grid_sample(masks.float()[None], 2 * points[:, :, None] - 1, align_corners=False)[0, :, :, 0]  # (N, P)
    bce, dice = mask_costs(at, sample_masks(truth, points))
    cost = weights[0] * -logits.float().softmax(-1)[:, labels] + weights[1] * bce + weights[2] * dice
    pairs = linear_sum_assignment(torch.nan_to_num(cost, 1e9, 1e9, 1e9).cpu().numpy())
    return tuple(torch.as_tensor(side, device=labels.device) for side in pairs)


# ---- losses -------------------------------------------------------------------------------------------------

def criterion(outputs, targets, num_masks=None, weights=(2.0, 5.0, 5.0), no_object=0.1, points=12544, oversample=3,
              importance=0.75, costs=(2.0, 5.0, 5.0)):
    """Mask2Former's losses (Sec. 3.3 and 4.1) on the last and all `aux` outputs, each matched for itself.

    targets: for each image {"labels": (n,) int64, "masks": (n,H,W) bool over the canvas}; n may be 0. num_masks: what
    the mask losses are divided by, the mean count of targets per rank; this batch's own without it, at least 1. The
    weights of the class loss are summed by it, too, so that the gradient of a step does not depend on its ranks.
    weights, costs: of class, BCE and Dice, in the losses and in matching. no_object: the class weight of unmatched queries.
    points: places per mask; `importance` of them are the most uncertain of points * oversample random ones.
    Returns {"loss": their sum, with gradient; "class", "mask", "dice": its parts, detached; "matches": [(queries,
    targets)] of the last output, for each image}.
    """
    given, num_masks = num_masks, sum(len(target["labels"]) for target in targets) if num_masks is None else num_masks
    num_masks = max(float(num_masks), 1.0)
    totals, last = torch.zeros(3, device=outputs["pred_logits"].device), None
    for output in [outputs, *outputs.get("aux", [])]:
        logits, masks = output["pred_logits"].float(), output["pred_masks"]
        matches = [match(logits[b], masks[b], target["labels"], target["masks"],
                         torch.rand(points, 2, device=logits.device), costs) for b, target in enumerate(targets)]
        last = matches if last is None else last
        mask, dice = mask_losses(masks, targets, matches, points, oversample, importance)
        parts = torch.stack([class_loss(logits, targets, matches, no_object, given), mask / num_masks, dice / num_masks])
        totals = totals + parts * totals.new_tensor(weights)
    names = dict(zip(("class", "mask", "dice"), totals.detach()))
    return {"loss": totals.sum(), **names, "matches": last}


def class_loss(logits, targets, matches, no_object=0.1, num_masks=None):
    """Cross-entropy of logits (B,N,C+1); unmatched queries shall say "no object", at that weight; weighted mean.

    num_masks: the number of matched queries that the mean reckons with; this batch's own without it.
    """
    truth = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
    for b, (queries, found) in enumerate(matches):
        truth[b, queries] = targets[b]["labels"][found]
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = no_object
    matched = sum(len(queries) for queries, _ in matches) if num_masks is None else num_masks
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), weight, reduction="sum")
    return loss / (matched + no_object * (truth.numel() - matched))


def mask_losses(masks, targets, matches, points=12544, oversample=3, importance=0.75):
    """BCE and Dice of the matched masks of logits (B,N,h,w) on sampled points: two sums over the masks."""
    logits = torch.cat([masks[b, queries] for b, (queries, _) in enumerate(matches)]).float()      # (M, h, w)
    if not len(logits):
        return (masks.float().sum() * 0,) * 2  # keeps every parameter in the graph of every rank
    with torch.no_grad():
        places = uncertain_points(logits, points, oversample, importance)                          # (M, P, 2)
        shares = places.split([len(queries) for queries, _ in matches])
        truth = torch.cat([sample_masks(target["masks"][found], share)
                           for target, (_, found), share in zip(targets, matches, shares)])
    logits = sample(logits, places)
    prob = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum()
    dice = 1 - (2 * (prob * truth).sum(1) + 1) / (prob.sum(1) + truth.sum(1) + 1)
    return bce, dice.sum()


def uncertain_points(logits, points, oversample=3, importance=0.75):
    """Where to compare masks (PointRend, Kirillov et al., 2020): (M,points,2) in 0..1 for logits (M,h,w).

    `importance` of them are those of points * oversample random places with the smallest |logit|, the others random.
    """
    places = torch.rand(len(logits), int(points * oversample), 2, device=logits.device)
    best = (-sample(logits, places).abs()).topk(int(importance * points), 1).indices
    places = places.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([places, torch.rand(len(logits), points - best.shape[1], 2, device=logits.device)], 1)


# ---- inference ----------------------------------------------------------------------------------------------

@torch.no_grad()
def instances(logits, masks, resize, top=100):
    """One image's instances: the `top` pairs of query and class by p(class), scored p(class) * mean mask probability.

    logits (N,C+1), masks (N,h,w) logits. resize: (K,h,w) -> (K,H,W) in the frame wanted, such as `Frame.prob_img`.
    Returns {"labels" (K,), "scores" (K,) in falling order, "masks" (K,H,W) bool, "queries" (K,)}; one query may answer
    with several classes.
    """
    prob = logits.float().softmax(-1)[:, :-1]
    scores, best = prob.flatten().topk(min(top, prob.numel()))
    queries, labels = best // prob.shape[1], best % prob.shape[1]
    used, which = queries.unique(return_inverse=True)
    inside, mean = [], []
    for part in masks[used].float().split(16):  # resized logits of all masks would fill memory on a large photograph
        part = resize(part)
        inside.append(part > 0)
        mean.append((part.sigmoid() * inside[-1]).flatten(1).sum(1) / (inside[-1].flatten(1).sum(1) + 1e-6))
    inside, mean = torch.cat(inside), torch.cat(mean)
    scores, order = (scores * mean[which]).sort(descending=True, stable=True)
    return {"labels": labels[order], "scores": scores, "masks": inside[which[order]], "queries": queries[order]}


# ---- weights ------------------------------------------------------------------------------------------------
# (pattern, replacement) from the published names to ours, applied in turn.

OFFICIAL = (
    (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "pixel_decoder."),  # files older than its version 2
    (r"^sem_seg_head\.", ""),
    (r"^pixel_decoder\.transformer\.(encoder\.)?", "pixel_decoder."),
    (r"^pixel_decoder\.(adapter|layer)_1\.weight$", r"pixel_decoder.\1_1.0.weight"),
    (r"^pixel_decoder\.(adapter|layer)_1\.norm\.", r"pixel_decoder.\1_1.1."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.adapter."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output."),
    (r"^predictor\.static_query\.", "predictor.query_feat."),
    (r"^predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r"predictor.layers.\1.cross_attn."),
    (r"^predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.", r"predictor.layers.\1.self_attn."),
    (r"^predictor\.transformer_(cross|self)_attention_layers\.(\d+)\.norm\.", r"predictor.layers.\2.\1_norm."),
    (r"^predictor\.transformer_ffn_layers\.(\d+)\.norm\.", r"predictor.layers.\1.ffn_norm."),
    (r"^predictor\.transformer_ffn_layers\.(\d+)\.", r"predictor.layers.\1."),
    *((rf"^predictor\.mask_embed\.layers\.{i}\.", f"predictor.mask_embed.{2 * i}.") for i in range(3)),
)
RESNET = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone."),
    *((rf"^backbone\.res{i}\.", f"backbone.layer{i - 1}.") for i in (2, 3, 4, 5)),
    (r"^(backbone\.layer.*)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^(backbone\.layer.*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\.layer.*)\.shortcut\.", r"\1.downsample.0."),
)
# The four cells that patch merging stacks, and so the columns of its reduction, lie in the same order in both.
SWIN = (
    (r"patch_embed\.proj\.", "features.0.0."),
    (r"patch_embed\.norm\.", "features.0.2."),
    *((rf"layers\.{i}\.blocks\.(\d+)\.mlp\.fc{j}\.", rf"features.{2 * i + 1}.\1.mlp.{place}.")
      for i in range(4) for j, place in ((1, 0), (2, 3))),
    *((rf"layers\.{i}\.blocks\.", f"features.{2 * i + 1}.") for i in range(4)),
    *((rf"layers\.{i}\.downsample\.", f"features.{2 * i + 2}.") for i in range(3)),
)


class _Dtype:
    """Stands for a pickled numpy dtype: a plain number's and nothing else."""

    def __init__(self, code, *_):
        if str(code).lstrip("<|=") not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"):
            raise UserError(f"holds an array of type {str(code)[:20]!r} where plain numbers should stand")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state):
        if state[1] not in ("<", "|", "="):
            raise UserError("holds big-endian numbers, which no such file does")


class _Array:
    """Stands for a pickled numpy array: shape, type and bytes, put together without numpy's own unpickling."""
    array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        self.array = _from_bytes(data, kind, shape, "F" if fortran else "C")


class _Ndarray:
    """What `numpy.ndarray` is read as; only ever a name handed to `_reconstruct`."""


def _from_bytes(data, kind, shape, order="C"):
    """A numpy array from bytes and a _Dtype. Raises whatever does not fit."""
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _wrapped(data, kind, shape, order="C"):
    """What protocol 5 calls for an array in the file."""
    made = _Array()
    made.array = _from_bytes(data, kind, shape, order)
    return made


def _scalar(kind, data):
    """A numpy number as an array without axes."""
    return _wrapped(data, kind, ())


def _encode(text, _codec="latin1"):
    """How protocol 2 of Python 3 writes bytes."""
    return text.encode("latin1")


class _Arrays(pickle._Unpickler):
    """Unpickler of plain containers and of numpy's arrays, which it puts together itself.

    No name in the file reaches numpy or any other code. Python's own C unpickler would allocate what a single
    instruction asks for; this one keeps a dictionary.
    """
    names = {("collections", "OrderedDict"): OrderedDict, ("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Ndarray,
             ("_codecs", "encode"): _encode,
             **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
             **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
             **{(f"numpy.{core}.numeric", "_frombuffer"): _wrapped for core in ("core", "_core")}}

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        """Give an array its contents; attributes of a dict, such as torch's `_metadata`, are left out."""
        if isinstance(self.stack[-2], OrderedDict):
            self.stack.pop()
        elif isinstance(self.stack[-2], (_Array, _Dtype)):
            super().load_build()
        else:
            raise UserError("sets attributes of what is no array; it is refused")

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module, name):
        if (module, name) not in self.names:
            raise UserError(f"asks Python for {module[:60]}.{name[:60]}, which no weight file needs; it is refused")
        return self.names[module, name]

    def persistent_load(self, pid):
        raise UserError("refers to an object outside the file; it is refused")


def read_detectron_pkl(path):
    """The weights in a detectron2 model zoo `.pkl`, {"model": {name: array}, …} -> {name: numpy array, read-only}.

    Nothing in the file is run: of code it may name numpy's arrays and OrderedDict alone, and those are built here.
    Raises UserError for anything else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_PKL_BYTES:
            raise UserError(f"{path} is larger than {MAX_PKL_BYTES >> 30} GiB and is no such weight file.")
        data = _Arrays(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path} {error}.") from None
    except Exception as error:  # by pickle's documentation a damaged file may raise any exception
        raise UserError(f"{path} is no whole pickle of weights ({type(error).__name__}: {str(error)[:80]}).") from None
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or not model or not all(
            isinstance(name, str) and isinstance(value, _Array) and value.array is not None
            for name, value in model.items()):
        raise UserError(f"{path} holds no dict 'model' of named arrays, as detectron2's weight files do.")
    return {name: value.array for name, value in model.items()}
