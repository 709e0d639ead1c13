"""PKS: Position, Kernel, Segmentation (Li, Sun, Xiao, Lim, Zhao; TCSVT 2023, arXiv 2212.10278), from masks or from
clicks.

The sentence only says where: it is fused with every level of a feature pyramid into heat maps of the object's centre.
The cells that answer choose kernels, made from vision alone, and each kernel cuts its mask from a feature map of the
image. Sentence and mask meet nowhere else, so centres and a few labelled pixels are enough to train it.

    python train_pks.py --yaml yaml/pks_refshapes.yaml          embedded data, two CPU cores, nothing to download
    torchrun --nproc_per_node 4 train_pks.py                    the paper's setting on RefCOCO
    torchrun --nproc_per_node 4 train_pks.py --weak             from three clicks an object, Sec. IV
    python train_pks.py --levels 3-5 --steps 1                  Tables IV-VI
    python eval.py --split val --oracle-pos                     Table VII

Where the paper is silent
  levels        level 1 is the finest (stride 4), level 5 the coarsest (64), as Table VI's caption wants it; all keep
                the pyramid's own resolution. Eq. 7's "i = 2..L" would then miss the finest; Panoptic FPN and SOLOv2
                read P2-P5.
  backbone      ImageNet's weights ("original ResNet101"), trained throughout, BatchNorm frozen.
  MSF           the projections are shared by the levels, and every step has its own. phi_F and phi_S are linear (phi_F
                then commutes with the average), varphi_F is a convolution, GroupNorm and LeakyReLU; its kernel is 1x1,
                because 3x3 would cost more than the printed 50 hours allow. `--msf-kernel 3` is for small pictures.
  attention     Eq. 3 as printed. On small pictures its sigmoid saturates; `--scaled-attention` divides the product of D
                numbers by sqrt(D), as transformers do.
  language      enters by Eq. 4 alone. "mean" replaces the attention by the words' mean, "multiply" and "concat" join
                that mean to the features first and convolve then (Table IV).
  L_pos         Eq. 9 averages over cells, where one centre among 67,200 cells would vanish beside L_seg; each level's
                sum is divided by its sentence's positive cells (RetinaNet). Per sentence, so neither ranks nor batches
                matter. alpha and gamma of the focal loss are RetinaNet's.
  centre        centre of mass of the mask, as for the clicks of Sec. IV-A; cells beyond the border are left out.
  kernel head   two 3x3 convolutions and a pointwise one (the lighter SOLOv2).
  decoder       Panoptic FPN's, half as wide as the kernels, with SOLOv2's two coordinates on its coarsest level: a
                kernel could not tell two equal objects apart otherwise.
  L_seg         Dice with squares in the denominator (V-Net), one for each kernel, averaged over a sentence's kernels.
  "merges"      Matrix NMS ranks masks, and never changes the best one. `--merge agree`: the mean, by decayed scores, of
                the survivors whose IoU with the best is at least 0.5. `top1`, `soft` (all survivors), `union` (their
                maximum).
  no position   where no cell passes lambda_f the best cell speaks; at most --max-kernels cells do.
  pCE           "point FG + BG" labels one cell among thousands: foreground and background are averaged separately.
                `--no-balanced` is the plain mean.
  superpixel    SLIC on the original image; the click's segment is cut at the corner clicks' box, outside which is
                background. Cells of padding have no label.
  GCRF          of the mean mask over a sentence's kernels, by the canvas' cells; "raw RGB" in [70]'s code is normalised
                by ImageNet's mean and deviation, and sigma_rgb = 0.1 is meant for that. `--gcrf-rgb unit` takes 0..1.
  schedule      SOLOv2's: warm-up of 500 steps, a tenth at 22 and 27 of 30 epochs, gradient norm at most 35. No
                mirroring, RefCOCO names left and right. An epoch is every sentence: 30 of them fit the printed hours,
                refs do not.
"""
import math
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FeaturePyramidNetwork

from common import checkpoint, data, distributed, metrics, pictures, runlog
from common.backbones import IMAGENET_MEAN, IMAGENET_STD, ResNetFPN, Small, load_weights
from common.config import UserError, base_parser, parse, run
from common.language import BiGRU, mean_over_words
from common.layers import ConvNormAct, coordinates, normalise
from common.losses import gated_crf_loss, partial_cross_entropy, sigmoid_focal_loss
from common.matrix_nms import matrix_nms
from common.text import Vocabulary
from data_prep import clicks
from data_prep.glove import load_words

# ---- settings -----------------------------------------------------------------------------------------------

YAML = "yaml/pks.yaml"
WEAK_YAML = "yaml/pks_weak.yaml"
EMBEDDED_YAML = "yaml/pks_refshapes.yaml"
make_vocabulary = Vocabulary  # what a checkpoint's list of entries becomes again
MERGES = ("agree", "top1", "soft", "union")
KERNELS = ("gaussian", "linear")


def get_parser():
    """Every setting with its default, which is the paper's on RefCOCO."""
    parser = base_parser(__doc__)
    parser.set_defaults(epochs=30, batch_size=32, lr=1e-2, clip=35.0, epoch_unit="expression")
    add = parser.add_argument_group("input").add_argument
    add("--size", type=int, default=800, help="shorter side of the input; Sec. V-B. With --max-size 0: a square's")
    add("--max-size", type=int, default=1333, help="longest side of the input; Sec. V-B. 0: a square, padded")
    add("--max-words", type=int, default=20, help="words a sentence keeps. 0: blind to the sentence, a control")
    add("--flip", type=float, default=0.0, help="probability of mirroring image and sentence (left <-> right)")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--backbone", choices=("resnet101", "resnet50", "small"), default="resnet101",
        help="with a feature pyramid; resnet101 in Sec. V-B; `small` learns the embedded corpora from nothing")
    add("--weights", default="data/weights/resnet101.pt",
        help="file that `python -m data_prep.weights` wrote, or `none` to train from nothing")
    parser.switch(model, "scaled-attention", False, "divide Eq. 3's product by sqrt(--dim) before the sigmoid")
    parser.switch(model, "leaky-init", False, "accept weights that saw RefCOCO's val or test images (marked in results)")
    add("--embeddings", choices=("glove", "random"), default="glove",
        help="word vectors: data/<dataset>/words.npz from `python -m data_prep.glove`, or trained from nothing")
    add("--text-dim", type=int, default=1024, help="a word after the bi-GRU; Sec. V-B")
    add("--dim", type=int, default=256, help="channels of the position and kernel heads, and of the small pyramid")
    add("--kernel-dim", type=int, default=256, help="numbers of a kernel, c' of Eq. 5")
    add("--kernel-convs", type=int, default=2, help="3x3 convolutions of the kernel head, at least one")
    add("--msf-kernel", type=int, choices=(1, 3), default=1, help="side of varphi_F's kernel, Eq. 4")
    infer = parser.add_argument_group("inference")
    add = infer.add_argument
    add("--lambda-f", type=float, default=0.1, help="heat from which a cell chooses its kernel, Eq. 6; Sec. V-B")
    add("--max-kernels", type=int, default=100, help="kernels a sentence may choose; the hottest cells go first")
    add("--nms", choices=KERNELS, default="gaussian", help="decay of Matrix NMS")
    add("--nms-keep", type=float, default=0.05, help="decayed score from which a mask survives; SOLOv2's")
    add("--merge", choices=MERGES, default="agree", help="how the surviving masks become one")
    add("--threshold", type=float, default=0.5, help="binarisation of the masks")
    ablation = parser.add_argument_group("ablation (Tables III-VI, IX)")
    add = ablation.add_argument
    parser.switch(ablation, "kernel", True, "the kernel head; without it the fused features are decoded, Table III")
    add("--fusion", choices=("msf", "mean", "multiply", "concat"), default="msf", help="Table IV")
    add("--steps", type=int, default=4, help="J of Eq. 1, at least 1; Table V")
    add("--levels", default="1-5", help="levels that locate and choose kernels, such as 1-5 or 5; Table VI")
    parser.switch(ablation, "weak", False, f"learn from clicks, Sec. IV; reads {WEAK_YAML}, too")
    add("--weak-labels", choices=WEAK_LABELS, default="superpixel_gcrf", help="Table IX")
    loss = parser.add_argument_group("loss and schedule")
    add = loss.add_argument
    add("--focal-alpha", type=float, default=0.25,
        help="weight of the centre's cells in Eq. 9, 1 - alpha that of the others; RetinaNet's")
    add("--focal-gamma", type=float, default=2.0, help="how little well-answered cells count in Eq. 9; RetinaNet's")
    add("--lambda-w", type=float, default=0.01, help="weight of the Gated-CRF loss, Eq. 14; Sec. V-B")
    add("--gcrf-xy", type=float, default=6.0, help="sigma in cells of the mask; [70]")
    add("--gcrf-rgb-sigma", type=float, default=0.1, help="sigma of colours; [70]")
    add("--gcrf-radius", type=int, default=5, help="neighbours in each direction, in cells of the mask; [70]")
    add("--gcrf-rgb", choices=("imagenet", "unit"), default="imagenet", help="the colours' space")
    parser.switch(loss, "balanced", True, "average foreground and background of the partial cross-entropy separately")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd has a momentum of 0.9; Sec. V-B")
    add("--schedule", choices=("step", "cosine"), default="step", help="step: lr falls by 10 at each of --lr-drops")
    add("--lr-drops", type=int, nargs="+", default=[22, 27], help="epochs of the falls")
    add("--warmup-steps", type=int, default=500, help="steps in which lr rises from 0")
    add("--weight-decay", type=float, default=1e-4, help="Sec. V-B")
    return parser


WEAK_LABELS = ("point_fg", "point_fg_bg", "superpixel", "superpixel_gcrf")


def eval_flags(parser):
    """The flags that this script adds to eval.py; those that are settings, too, override the run's."""
    group = parser.add_argument_group("PKS")
    parser.switch(group, "oracle-pos", False, "the true centre's cells choose the kernels, Table VII")
    group.add_argument("--merge", choices=MERGES, default=None, help="how masks become one; empty: as trained")
    group.add_argument("--nms", choices=KERNELS, default=None, help="decay of Matrix NMS; empty: as trained")


def eval_targets(args, settings):
    """The targets that `segment` is given in evaluation: the true centres for --oracle-pos, else None."""
    return make_targets if args.oracle_pos else None


def frontend(args, vocabulary):
    """What stands between the files and the model: sentence -> ids, and the canvas that an image is laid on."""
    if not args.max_size and args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of 32, the backbone's coarsest stride.")
    if not args.weak and args.weak_labels != WEAK_LABELS[-1]:
        raise UserError(f"--weak-labels {args.weak_labels} is a way to learn from clicks: give --weak, too.")
    return lambda text: vocabulary.encode(text, args.max_words), data.Canvas(args.size, args.max_size)


# ---- model --------------------------------------------------------------------------------------------------
# Shapes: B images, E sentences, L words, D = --dim channels, C = --kernel-dim, N cells of all levels together, K
# kernels of a sentence; level i has (h_i,w_i) cells of stride STRIDES[i - 1], masks have (h,w) at stride 4.

STRIDES = (4, 8, 16, 32, 64)
PRIOR = 0.01  # what a heat map says at first, so that the many empty cells do not drown the first steps (RetinaNet)
CACHE = 2 ** 23  # bytes of fused maps that evaluation on a processor works on at a time


class SmallFPN(nn.Module):
    """The small backbone of the embedded corpora under a feature pyramid, strides 4 to 64."""
    strides = STRIDES
    mean, std = Small.mean, Small.std

    def __init__(self, dim, width=24, blocks=(1, 1, 2, 1)):
        super().__init__()
        self.body = Small(width, blocks)
        self.fpn = FeaturePyramidNetwork(list(self.body.channels.values()), dim, norm_layer=partial(nn.GroupNorm, 8))
        self.channels = dict.fromkeys(STRIDES, dim)

    def forward(self, images):
        """images (B,3,H,W), normalised -> {4, 8, 16, 32, 64: (B, dim, H/stride, W/stride)}."""
        levels = self.fpn({str(stride): feature for stride, feature in self.body(images).items()})
        features = {stride: levels[str(stride)] for stride in self.body.strides}
        return features | {64: F.max_pool2d(features[32], 1, 2)}


BACKBONES = {"resnet101": lambda dim: ResNetFPN(101), "resnet50": lambda dim: ResNetFPN(50), "small": SmallFPN}


class PKS(nn.Module):
    """Image and sentence to heat maps, kernels and the features that kernels cut masks from."""

    def __init__(self, args, vocabulary_size):
        super().__init__()
        self.merge, self.nms, self.nms_keep, self.threshold = args.merge, args.nms, args.nms_keep, args.threshold
        self.lambda_f, self.max_kernels, self.kernel = args.lambda_f, args.max_kernels, args.kernel
        self.levels = parse_levels(args.levels)
        self.strides = [STRIDES[level - 1] for level in self.levels]
        self.backbone = BACKBONES[args.backbone](args.dim)
        channels = self.backbone.channels[4]
        self.language = BiGRU(vocabulary_size, hidden=args.text_dim // 2)
        self.position_head = PositionHead(channels, args)
        if args.kernel:
            self.kernel_head = KernelHead(channels, args.dim, args.kernel_dim, args.kernel_convs)
            self.decoder = Decoder(channels, args.kernel_dim, STRIDES[:4])
        else:
            used = [stride for stride in self.strides if stride < 64]
            if not used:
                raise UserError(f"--no-kernel decodes the fused levels 1 to 4, and --levels is {args.levels}.")
            self.decoder = Decoder(args.dim, args.kernel_dim, used)
            for stride, inner, layer in zip(STRIDES, self.backbone.fpn.inner_blocks, self.backbone.fpn.layer_blocks):
                inner.requires_grad_(stride >= used[0])  # what no level reads would keep DDP waiting for its gradient
                layer.requires_grad_(stride in used)
            self.read = nn.Conv2d(args.kernel_dim, 1, 1)

    def encode_image(self, images):
        """What no sentence changes, once per image: images (B,3,H,W) uint8 or float in 0..1 -> dict with the first
        fusion step's visual half per level, and kernels (B,N,C) and mask features (B,C,h,w) where the model has a
        kernel head."""
        pyramid = self.backbone(normalise(images, self.backbone.mean, self.backbone.std))
        levels = [pyramid[stride] for stride in self.strides]
        features = {"fusion": [self.position_head.look(level) for level in levels]}
        if self.kernel:
            features["kernels"] = torch.cat([self.kernel_head(level).flatten(2) for level in levels], 2).transpose(1, 2)
            features["mask"] = self.decoder(pyramid)                                     # M, Eq. 7
        return features

    def forward(self, images, image_of, text):
        """images (B,3,H,W), image_of (E,), text (E,L) ids -> what `loss_terms` needs, see `decode`."""
        features = self.encode_image(images)
        return self.decode(features, image_of, text) | {"images": images, "image_of": image_of}

    def decode(self, features, image_of, text):
        """The part that depends on the sentence: dict with `heats` (logits, a (E,h_i,w_i) for each level) and
        `attention` (E,levels,J,L) or None; with a kernel head its `kernels` and `mask` as in `encode_image`, else
        `mask` logits (E,h,w)."""
        states, known = self.language(text)
        # without gradients a processor takes few sentences at a time, whose maps fit its caches: those of all do not
        largest = max(seen[1][0].nbytes for seen in features["fusion"])
        share = len(text) if torch.is_grad_enabled() or text.device.type != "cpu" else max(1, CACHE // largest)
        heats, attention, masks = zip(*(self.locate(features, *of) for of in zip(
            image_of.split(share), states.split(share), known.split(share))))
        out = {"heats": [torch.cat(level) for level in zip(*heats)], "strides": self.strides,
               "attention": None if attention[0] is None else torch.cat(attention)}
        if self.kernel:
            return out | {"kernels": features["kernels"], "mask": features["mask"]}
        return out | {"mask": torch.cat(masks)}

    def locate(self, features, image_of, states, known):
        """`decode` of encoded sentences, states (E,L,T), known (E,L): heats, attention and, without a kernel head, mask logits."""
        heats, fused, attention = self.position_head(features["fusion"], image_of, states, known)
        mask = None if self.kernel else self.read(self.decoder(dict(zip(self.strides, fused)))).squeeze(1)
        return heats, attention, mask

    def segment(self, features, image_of, text, targets=None):
        """features from `encode_image`, image_of (E,), text (E,L) -> prob (E,H/4,W/4) in the input's frame, its
        threshold, the best heat as `score` (E,), the heat maps, and the words' attention (E,J,L) averaged over the
        levels.

        targets: None, or what `make_targets` gave: the true centre's cells then choose the kernels, by their heat.
        """
        out = self.decode(features, image_of, text)
        heats = [heat.float().sigmoid() for heat in out["heats"]]
        flat = torch.cat([heat.flatten(1) for heat in heats], 1)                         # (E, N)
        if self.kernel:
            if targets is None:
                score, cell = flat.topk(min(self.max_kernels, flat.shape[1]), dim=1)     # Eq. 6
                chosen = score > self.lambda_f
                chosen[:, 0] = True
            else:
                cell, chosen = true_cells(targets["cells"], out)
                score = flat.gather(1, cell)
            prob = torch.stack([self.cut(features, image_of[e], cell[e][chosen[e]], score[e][chosen[e]])
                                for e in range(len(image_of))])
        else:
            prob = out["mask"].float().sigmoid()
        result = {"prob": prob, "threshold": self.threshold, "score": flat.amax(1),
                  "heat": {f"level{level}": heat for level, heat in zip(self.levels, heats)}}
        if out["attention"] is not None:
            result["word_attention"] = out["attention"].mean(1)
        return result

    def cut(self, features, image, cell, score):
        """One sentence's mask: cell, score (K,) -> prob (h,w), zero where K = 0. Eq. 8, Matrix NMS, merging."""
        mask = features["mask"][image].float()
        if not len(cell):
            return torch.zeros_like(mask[0])
        kernel = features["kernels"][image, cell].float()                                # (K, C)
        prob = torch.einsum("kc,chw->khw", kernel, mask).sigmoid()                       # Eq. 8
        return merge(prob, score, self.merge, self.nms, self.nms_keep)


def merge(prob, score, how, nms, keep):
    """One mask of several: prob (K,h,w), score (K,) -> (h,w). `how`, of MERGES, acts on what survives Matrix NMS."""
    masks, top = prob > 0.5, score.argmax()
    decayed = matrix_nms(masks, score, kernel=nms)
    kept = decayed >= keep
    if how == "top1":
        return prob[top]
    if how == "agree":
        inter = (masks & masks[top]).flatten(1).sum(1)
        kept &= inter >= 0.5 * (masks | masks[top]).flatten(1).sum(1)
    kept[top] = True
    if how == "union":
        return prob[kept].amax(0)
    weight = decayed[kept].clamp(min=1e-12)[:, None, None]
    return (weight * prob[kept]).sum(0) / weight.sum()


def parse_levels(text):
    """`3-5` -> [3, 4, 5], `5` -> [5]. Raises UserError."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first) <= 5):
        raise UserError(f"--levels {text} is no range of the levels 1 to 5, such as 1-5 or 5.")
    return list(range(int(first), int(last or first) + 1))


class PositionHead(nn.Module):
    """Sec. III-B: J steps of fusion with the sentence on every level, then a heat map of the object's centre, Eq.
    1-4."""

    def __init__(self, channels, args):
        super().__init__()
        if args.steps < 1:
            raise UserError("--steps must be at least 1.")
        widths = [channels] + [args.dim] * (args.steps - 1)
        self.fusion = args.fusion
        scale = args.dim ** -0.5 if args.scaled_attention else 1.0
        self.steps = nn.ModuleList(FusionStep(width, args.dim, args.text_dim, args.fusion, args.msf_kernel, scale)
                                   for width in widths)
        self.read = nn.Conv2d(args.dim, 1, 3, padding=1)                                 # FCL, Eq. 2
        nn.init.constant_(self.read.bias, math.log(PRIOR / (1 - PRIOR)))

    def look(self, level):
        """The first step's half that no sentence changes; level (B,channels,h,w) -> what `FusionStep.fuse` takes."""
        return self.steps[0].look(level)

    def forward(self, looks, image_of, states, known):
        """looks: from `look`, a level each; states (E,L,T), known (E,L) -> heat logits, fused maps (E,D,h_i,w_i),
        attention."""
        phrases = [step.phi_s(states) for step in self.steps]                            # phi_S(X_S), on all levels
        heats, fused, attention = [], [], []
        for seen in looks:
            # index_select and not [image_of]: its backward, adding whole maps, is ten times as fast on a CPU
            seen = [None if part is None else part.index_select(0, image_of) for part in seen]
            attended = []
            for j, (step, words) in enumerate(zip(self.steps, phrases)):
                x, weight = step.fuse(*(seen if j == 0 else step.look(x)), words, known)  # Eq. 1
                attended.append(weight)
            heats.append(self.read(x).squeeze(1))                                        # Eq. 2
            fused.append(x)
            attention.append(attended)
        if self.fusion != "msf":
            return heats, fused, None
        return heats, fused, torch.stack([torch.stack(level, 1) for level in attention], 1)


class FusionStep(nn.Module):
    """Eq. 3-4, or one of Table IV's other ways to join a sentence to a feature map."""

    def __init__(self, channels, dim, text_dim, fusion, kernel, scale):
        super().__init__()
        self.fusion, self.scale = fusion, scale
        self.phi_s = nn.Linear(text_dim, dim if fusion != "multiply" else channels)
        if fusion == "msf":
            self.phi_f = nn.Linear(channels, dim)
        if fusion in ("msf", "mean"):
            self.varphi_s = nn.Linear(dim, dim)
        self.varphi_f = ConvNormAct(channels, dim, kernel)

    def look(self, x):
        """x (N,channels,h,w) -> Avg(phi_F(x)) (N,D) or None, and varphi_F(x) (N,D,h,w) or what stands for it."""
        average = self.phi_f(x.mean((2, 3))) if self.fusion == "msf" else None
        if self.fusion == "multiply":
            return average, x
        return average, self.varphi_f[0](x) if self.fusion == "concat" else self.varphi_f(x)

    def fuse(self, average, visual, words, known):
        """average, visual: from `look`, for each sentence; words (E,L,D), known (E,L) -> (E,D,h,w), attention (E,L) or
        None."""
        if self.fusion == "msf":
            attention = (self.scale * words @ average[..., None]).squeeze(-1).sigmoid() * known      # A, Eq. 3
            sentence = self.varphi_s((attention[..., None] * words).sum(1))
            return sentence[..., None, None] * visual, attention                         # Eq. 4
        sentence = mean_over_words(words, known)
        if self.fusion == "mean":
            return self.varphi_s(sentence)[..., None, None] * visual, None
        sentence = sentence[..., None, None]
        if self.fusion == "multiply":
            return self.varphi_f(sentence * visual), None
        _, norm, activation = self.varphi_f  # one layer over the concatenation is the sum of its halves' layers
        return activation(norm(visual + sentence)), None


class KernelHead(nn.Sequential):
    """CoordConv, Eq. 5: level (B,channels,h,w) -> kernels (B,C,h,w), without language."""

    def __init__(self, channels, dim, kernel_dim, convs):
        super().__init__(*(ConvNormAct(dim if i else channels + 2, dim) for i in range(convs)),
                         nn.Conv2d(dim if convs else channels + 2, kernel_dim, 1))
        self[-1].weight.data /= kernel_dim ** 0.5  # masks' logits start of order one whatever C is

    def forward(self, level):
        place = coordinates(*level.shape[-2:], level).expand(len(level), -1, -1, -1)
        return super().forward(torch.cat([level, place], 1))


class Decoder(nn.Module):
    """Panoptic FPN's decoder, Eq. 7: {stride: (N,channels,h,w)}, of which it reads `strides` -> M (N,C,H/4,W/4)."""

    def __init__(self, channels, kernel_dim, strides):
        super().__init__()
        width = kernel_dim // 2
        self.strides = strides
        self.paths = nn.ModuleList()
        for stride in strides:
            inputs = [channels + 2 * (stride == strides[-1])] + [width] * 3
            convolutions = max(1, int(math.log2(stride)) - 2)
            self.paths.append(nn.ModuleList(ConvNormAct(inputs[i], width) for i in range(convolutions)))
        self.project = ConvNormAct(width, kernel_dim, 1)

    def forward(self, pyramid):
        total = 0
        for stride, path in zip(self.strides, self.paths):
            x = pyramid[stride]
            if stride == self.strides[-1]:
                x = torch.cat([x, coordinates(*x.shape[-2:], x).expand(len(x), -1, -1, -1)], 1)
            for convolution in path:
                x = convolution(x)
                if stride > 4:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + x
        return self.project(total)


def build_model(args, vocabulary):
    """The network with fresh weights; it reads no file."""
    return PKS(args, len(vocabulary))


# ---- targets and losses -------------------------------------------------------------------------------------

def make_targets(example):
    """In a loader worker: the share of each stride-4 cell that the mask covers (E,h,w), and the centre's `cells`."""
    frame, own = example.frame, example.mask_of
    columns, rows = (example.meant.sum(axis) for axis in (1, 2))                             # (U, W), (U, H) pixels
    with np.errstate(invalid="ignore"):  # an empty mask has no centre
        centres = np.stack([(line @ np.arange(line.shape[1])) / line.sum(1) for line in (columns, rows)], 1) + 0.5
    return {"mask": frame.masks_in(example.meant, 4)[own], "cells": cells_round(frame.points_in(centres[own]), frame)}


def make_weak_targets(example, clicked, data_root, labels):
    """In a loader worker, from clicks alone: `labels` (E,h,w) int8, 1 foreground, 0 background, -1 unknown (Sec. IV-A);
    `inside` (E,h,w) bool, the cells that hold image; the clicked centre's `cells`.

    clicked: {object id: six numbers}, from `data_prep.clicks`. labels: of WEAK_LABELS. Raises UserError.
    """
    dataset, frame = example.dataset, example.frame
    height, width = frame.canvas_height // 4, frame.canvas_width // 4
    x, y = np.meshgrid(np.arange(width) * 4 + 2, np.arange(height) * 4 + 2)
    inside = (x >= frame.left) & (x < frame.left + frame.in_width) \
        & (y >= frame.top) & (y < frame.top + frame.in_height)
    segments = None
    if labels.startswith("superpixel"):
        size = dataset.sizes[example.image].tolist()
        segments = clicks.load_superpixels(
            clicks.superpixel_path(data_root, dataset.name, dataset.image_ids[example.image]), *size)
    centres, maps = [], []
    for e in example.expressions:
        number = int(dataset.object_ids[dataset.objects_of[e][0]])
        if number not in clicked:
            raise UserError(f"clicks.json of {dataset.name} lacks object {number}; run data_prep.clicks again.")
        click = np.array(clicked[number])
        (centre,), (box,) = frame.points_in(click[None, :2]), frame.boxes_in(click[None, 2:])
        boxed = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
        label = np.full((height, width), -1, np.int8)
        if labels != "point_fg":
            label[inside & ~boxed] = 0
        if segments is not None:
            column, row = (min(max(int(v), 0), limit - 1) for v, limit in zip(click[:2], size))
            share = frame.masks_in((segments == segments[row, column])[None], 4)[0].numpy()
            label[(share >= 0.5) & boxed] = 1
        column, row = (min(max(int(v / 4), 0), limit - 1) for v, limit in zip(centre, (width, height)))
        label[row, column] = 1
        centres.append(centre)
        maps.append(label)
    return {"labels": torch.from_numpy(np.stack(maps)), "cells": cells_round(np.array(centres), frame),
            "inside": torch.from_numpy(inside).expand(len(maps), -1, -1).contiguous()}


def weak_targets(args, ranks):
    """The function for RefDataset(targets=…) with --weak. The embedded corpora get their clicks and superpixels on
    first use; for others UserError says what to run."""
    missing = args.dataset in data.EMBEDDED and not clicks.is_complete(args.data_root, args.dataset)
    if distributed.any_rank(ranks, missing):
        if ranks.main:
            clicks.make(args.data_root, args.dataset)
        distributed.barrier(ranks)
    clicked = clicks.load_clicks(Path(args.data_root) / args.dataset / "clicks.json")
    return partial(make_weak_targets, clicked=clicked, data_root=args.data_root, labels=args.weak_labels)


def case_panels(settings, dataset, expression):
    """What --weak would be told of an expression, for the report (Figs. 5 and 10): [(caption, uint8 picture)], else
    []."""
    objects = dataset.objects_of[expression]
    if not settings.weak or len(objects) != 1 or dataset.rles[objects[0]] is None:
        return []
    image = dataset.picture(int(dataset.expression_image[expression])).permute(1, 2, 0).numpy()
    (x, y, *corners), _ = clicks.click(dataset.object_mask(objects[0]), dataset.boxes[objects[0]])
    segments, known = clicks.segments_of(image, 100), np.ones(image.shape[:2], bool)
    left, top, right, bottom = (int(round(v)) for v in corners)
    known[top:bottom, left:right] = False
    edges = np.zeros_like(known)
    edges[1:, 1:] = (segments[1:, 1:] != segments[:-1, 1:]) | (segments[1:, 1:] != segments[1:, :-1])
    labels = pictures.overlay(image // 2 * known[..., None] + image * ~known[..., None],
                              (segments == segments[int(y), int(x)]) & ~known, pictures.TRUTH)
    return [("clicks", pictures.draw_points(pictures.draw_boxes(image, [corners]), [(x, y)])),
            ("superpixels", np.where(edges[..., None], np.array([[pictures.OTHER]], np.uint8), image)),
            ("labels: outside the box dark, foreground green", labels)]


def check_corpus(dataset):
    """PKS looks for one centre: refuse to learn from sentences that mean several objects or none. Raises UserError."""
    other = next((e for e, objects in enumerate(dataset.objects_of) if len(objects) != 1), None)
    if other is not None:
        raise UserError(f"{dataset.path}: the sentence {dataset.texts[other]!r} means {len(dataset.objects_of[other])} "
                        "objects; PKS looks for one centre and cannot learn it.")


def cells_round(centres, frame):
    """The 3x3 cells round each centre (E,2) on the canvas, on every level: (E,5,9) int64, row * w_i + column, or -1 for
    a cell outside the map and for all cells of a centre that is NaN."""
    levels = []
    for stride in STRIDES:
        height, width = -(-frame.canvas_height // stride), -(-frame.canvas_width // stride)
        x, y = np.nan_to_num(centres // stride, nan=-9.0).astype(np.int64).clip(-9, [width, height]).T[..., None]
        columns, rows = x + np.tile([-1, 0, 1], 3), y + np.repeat([-1, 0, 1], 3)         # (E, 9)
        there = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        levels.append(np.where(there, rows * width + columns, -1))
    return torch.from_numpy(np.stack(levels, 1))


def true_cells(cells, out):
    """`cells` of the targets as positions among all cells of the model's levels: (E,K) and whether each exists
    (E,K)."""
    cells = torch.stack([cells[:, STRIDES.index(stride)] for stride in out["strides"]], 1)          # (E, levels, 9)
    sizes = [heat[0].numel() for heat in out["heats"]]
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=cells.device)[:, None]
    return (cells.clamp(min=0) + starts).flatten(1), (cells >= 0).flatten(1)


def loss_terms(out, targets, args):
    """Weighted loss terms, each summed over the sentences (E): {name: scalar}. Eq. 9-14."""
    terms = {"pos": position_loss(out, targets["cells"], args.focal_alpha, args.focal_gamma)}
    if args.kernel:
        logits, chosen = dynamic_convolution(out, *true_cells(targets["cells"], out))    # (E, K, h, w), (E, K)
    else:
        logits = out["mask"].float()[:, None]
        chosen = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mean = lambda loss: ((loss * chosen).sum(1) / chosen.sum(1).clamp(min=1)).sum()  # noqa: E731
    if not args.weak:
        terms["seg"] = mean(dice(logits, targets["mask"][:, None]))                      # Eq. 10
        return terms
    labels = targets["labels"][:, None].expand(-1, logits.shape[1], -1, -1).flatten(0, 1)
    terms["seg"] = mean(partial_cross_entropy(logits.flatten(0, 1), labels, args.balanced).view_as(chosen))   # Eq. 12
    if args.weak_labels == "superpixel_gcrf":
        prob = (logits.sigmoid() * chosen[..., None, None]).sum(1) / chosen.sum(1).clamp(min=1)[:, None, None]
        colours = (IMAGENET_MEAN, IMAGENET_STD) if args.gcrf_rgb == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        image = F.avg_pool2d(normalise(out["images"], *colours), 4)
        inside = targets["inside"]
        energy = gated_crf_loss(prob, image, args.gcrf_xy, args.gcrf_rgb_sigma, args.gcrf_radius, inside,
                                out["image_of"])
        # by the cells of the canvas, which are the same for all: a mean over `inside` would depend on the batch's
        # company
        terms["gcrf"] = args.lambda_w * energy * inside.sum() / inside[0].numel()        # Eq. 13-14
    return terms


def position_loss(out, cells, alpha=0.25, gamma=2.0):
    """L_pos, Eq. 9: focal loss over the centre's cells (E,5,9), the mean over the levels; summed over sentences."""
    total = 0
    for stride, heat in zip(out["strides"], out["heats"]):
        cell = cells[:, STRIDES.index(stride)]
        heat = heat.float().flatten(1)
        truth = torch.zeros(heat.shape[0], heat.shape[1] + 1, device=heat.device)        # the last column takes the -1
        truth = truth.scatter_(1, torch.where(cell < 0, heat.shape[1], cell), 1.0)[:, :-1]
        loss = sigmoid_focal_loss(heat, truth, alpha, gamma, reduction="none").sum(1)
        total = total + (loss / truth.sum(1).clamp(min=1)).sum()
    return total / len(out["heats"])


def dynamic_convolution(out, cell, chosen):
    """Eq. 8 before the sigmoid: cell, chosen (E,K) -> logits (E,K,h,w), zero where not chosen, and `chosen` again."""
    kernels = out["kernels"][out["image_of"][:, None], cell].float() * chosen[..., None]             # (E, K, C)
    return torch.einsum("ekc,echw->ekhw", kernels, out["mask"].float()[out["image_of"]]), chosen


def dice(logits, truth, smooth=1.0):
    """1 - 2 sum(p y) / (sum p^2 + sum y^2): logits (E,K,h,w), truth (E,1,h,w) -> (E,K); `smooth` keeps empty masks
    finite."""
    prob = logits.sigmoid()
    overlap = 2 * (prob * truth).sum((2, 3)) + smooth
    return 1 - overlap / (prob.square().sum((2, 3)) + truth.square().sum((2, 3)) + smooth)


# ---- training -----------------------------------------------------------------------------------------------

def learning_rate(args, step, steps, steps_per_epoch):
    """The rate of step 0 … steps-1, a pure function of the step."""
    rise = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.schedule == "cosine":
        done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
        return args.lr * rise * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * rise * 0.1 ** sum(step >= drop * steps_per_epoch for drop in args.lr_drops)


def train(args, ranks, folder, state, model, vocabulary, train_set, val_set):
    """The loop, from `state` (a checkpoint, or None) to the last step. Leaves last.pt, prev.pt, best.pt and log.jsonl."""
    model = model.to(ranks.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True) \
        if args.optimizer == "adamw" else \
        torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)  # Sec. V-B
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model
    forward = torch.compile(wrapped) if args.compile else wrapped

    plan = lambda epoch: data.plan_epoch(train_set, epoch, args.seed, args.batch_size,  # noqa: E731
                                         args.expressions_per_image, args.epoch_unit)
    steps_per_epoch = len(plan(0))
    steps = min(args.max_steps or args.epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    step, best = 0, {"mIoU": -1.0, "step": 0}
    if state:
        checkpoint.load_model(model, state, folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        checkpoint.restore_random_states(state["random"][ranks.rank % len(state["random"])])
        step, best = state["step"], state["best"]

    def save():
        random = distributed.gather(ranks, checkpoint.random_states())
        if ranks.main:
            checkpoint.save(folder / "last.pt", snapshot(args, model, vocabulary, step, best) | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": random}, keep="prev.pt")

    with runlog.Log(folder, ranks.main, steps, step) as log, stop_signal() as stopping:
        log.truncate(step)
        log.say(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, {len(train_set)} sentences, "
                f"{steps_per_epoch} steps an epoch of {args.batch_size} images, {steps} steps from step {step}")
        while step < steps:
            epoch, position = divmod(step, steps_per_epoch)
            batches = plan(epoch)[position:position + steps - step]
            loaded = data.load(train_set, [part for keys in batches for part in my_parts(keys, args, ranks)],
                               args.workers, pin=ranks.device.type == "cuda")
            for keys in batches:
                sentences = sum(len(key[2]) for key in keys)  # of the whole step, on all ranks
                rate = learning_rate(args, step, steps, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                sums = {}
                for micro in range(args.accum):
                    batch = log.fetch(loaded).to(ranks.device)
                    sync = micro == args.accum - 1 or ranks.world == 1
                    with nullcontext() if sync else wrapped.no_sync():
                        with metrics.autocast(ranks.device, args.amp):
                            out = forward(batch.images, batch.image_of, batch.text)
                        terms = loss_terms(out, batch.targets, args)
                        # ranks and micro-batches may hold unequal numbers of sentences, so each adds its sum over the
                        # step's number; DDP averages over the ranks, hence the factor
                        scaler.scale(sum(terms.values()) * ranks.world / sentences).backward()
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0) + term.detach()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, args.clip or float("inf")).item()
                # one reduction tells every rank the losses and whether any of them was asked to stop
                shared = torch.stack([*sums.values(), torch.tensor(float(stopping()), device=ranks.device)]).double()
                *values, stop = distributed.total(ranks, shared).tolist()
                losses = {name: value / sentences for name, value in zip(sums, values)}
                if not math.isfinite(sum(values)) or not (scaler.is_enabled() or math.isfinite(norm)):
                    images = [int(train_set.image_ids[key[1]]) for key in keys]
                    raise UserError(f"the loss is not finite at step {step + 1} ({losses}, gradient {norm}), on images {images}; "
                                    f"lower --lr or set --clip. The last checkpoint in {folder} is from before.")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                numbers = lambda: {"loss": sum(losses.values()), **losses, "lr": rate,  # noqa: E731
                                   "grad": norm, "waiting": log.waiting(), "GB": runlog.memory(ranks.device)}
                log.step(numbers)
                if step % args.log_every == 0 or step == steps:
                    log.write({"step": step, "epoch": epoch, "seconds": log.seconds(), **numbers()})
                ended = step % steps_per_epoch == 0 or step == steps
                if ended and ((epoch + 1) % args.eval_every == 0 or step == steps):
                    rows, seconds = metrics.evaluate(model, val_set, ranks, args.eval_batch_size, args.workers, args.amp)
                    summary = metrics.summarise(rows, val_set, seconds=seconds)
                    log.write({"step": step, "epoch": epoch, "val_mIoU": summary["mIoU"], "val_oIoU": summary["oIoU"]})
                    log.say(f"epoch {epoch + 1}: val mIoU {summary['mIoU']:.2f}, oIoU {summary['oIoU']:.2f} "
                            f"({summary['n']} sentences in {seconds:.0f} s)")
                    if summary["mIoU"] > best["mIoU"]:
                        best = {"mIoU": summary["mIoU"], "step": step}
                        if ranks.main:
                            checkpoint.save(folder / "best.pt", snapshot(args, model, vocabulary, step, best))
                if stop or ended or args.save_every and step % args.save_every == 0:
                    save()
                if stop:
                    log.say(f"stopped by a signal; saved at step {step}, go on with --resume")
                    raise SystemExit(143)
        if distributed.any_rank(ranks, stopping()):  # asked for during the last evaluation
            raise SystemExit(143)


def my_parts(keys, args, ranks):
    """The micro-batches of one step that this rank computes: `accum` lists of keys, none of them empty."""
    shares = ranks.world * args.accum
    if len(keys) < shares:
        raise UserError(f"a step has {len(keys)} images for {ranks.world} ranks x --accum {args.accum}; "
                        "raise --batch-size or lower --accum.")
    bounds = [len(keys) * i // shares for i in range(shares + 1)]
    parts = [keys[low:high] for low, high in zip(bounds, bounds[1:])]
    return parts[ranks.rank * args.accum:(ranks.rank + 1) * args.accum]


def snapshot(args, model, vocabulary, step, best):
    """What eval.py needs, in plain types and tensors."""
    return {"version": checkpoint.VERSION, "script": Path(__file__).stem, "args": vars(args), "step": step, "best": best,
            "vocabulary": list(vocabulary), "model": model.state_dict()}


def check_same_run(state, args, folder):
    """Refuse to resume a run under settings that would make it another one. Raises UserError."""
    free = {"yaml", "resume", "out", "name", "workers", "device", "eval_every", "save_every", "log_every", "eval_splits",
            "eval_batch_size", "data_root", "compile", "leaky_init"}
    if state["script"] != Path(__file__).stem:
        raise UserError(f"{folder} is a run of {state['script']}.py, not of {Path(__file__).name}.")
    changed = [key for key, value in vars(args).items() if key not in free and state["args"].get(key) != value]
    if changed:
        was = ", ".join(f"--{key.replace('_', '-')} {state['args'].get(key)!r}" for key in changed)
        raise UserError(f"{folder} was begun with {was}; give the same settings to --resume, or another --name.")


class stop_signal:
    """Turns SIGTERM into a question that the loop asks at the end of each step."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return lambda: self.asked

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)


# ---- main ---------------------------------------------------------------------------------------------------

def main(argv=None):
    """Prepare, train, then score best.pt on --eval-splits and write the report."""
    args = parse(get_parser(), argv, own_yaml=YAML, overlays={"weak": WEAK_YAML})
    splits = ["train", "val", *args.eval_splits]
    present = data.require(args.data_root, args.dataset, splits, EMBEDDED_YAML)
    ranks = distributed.start(args.device)
    args.amp = distributed.resolve_amp(args.amp, ranks.device)
    try:
        if not present:
            if ranks.main:
                data.make_embedded(args.data_root, args.dataset)
            distributed.barrier(ranks)
        targets = weak_targets(args, ranks) if args.weak else make_targets
        torch.manual_seed(args.seed)
        folder = runlog.run_folder(args, Path(__file__).stem)
        state = checkpoint.load_newest(folder) if args.resume else None
        if state:
            check_same_run(state, args, folder)
        if ranks.main:
            runlog.open_folder(folder, args, __file__)
            print(f"run folder {folder}", flush=True)
        distributed.barrier(ranks)

        glove = Path(args.data_root) / args.dataset / "words.npz"
        known, vectors = load_words(glove) if args.embeddings == "glove" else ([], None)
        train_path = data.split_path(args.data_root, args.dataset, "train")
        train_set = data.RefDataset(train_path, None, None, targets, args.flip, args.seed)
        check_corpus(train_set)
        vocabulary = Vocabulary.build(train_set.texts, known)
        train_set.encode, train_set.canvas = frontend(args, vocabulary)
        val_set = data.RefDataset(data.split_path(args.data_root, args.dataset, "val"), *frontend(args, vocabulary))

        model = build_model(args, vocabulary)
        if state:
            args.leaky_init = state["args"]["leaky_init"]
        elif args.weights != "none":
            args.leaky_init = load_weights(model.backbone, args.weights, args.leaky_init)["leaky"]
        if vectors is not None and not state:
            model.language.load_vectors(vocabulary, known, vectors)
        train(args, ranks, folder, state, model, vocabulary, train_set, val_set)

        if not args.eval_splits:
            return
        from eval import main as evaluate_run  # the same program that a user runs afterwards
        evaluate_run(["--run", str(folder), "--split", *args.eval_splits, "--report", "--device", args.device,
                      "--batch-size", str(args.eval_batch_size), "--workers", str(args.workers)], ranks)
    finally:
        distributed.finish()


if __name__ == "__main__":
    run(main)
