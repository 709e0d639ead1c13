"""LTS: Locate then Segment (Jing, Kong, Wang, Wang, Li, Tan; CVPR 2021, arXiv 2103.16284).

Vision and sentence are fused at three scales; a kernel made from the sentence filters the fused map to a heat map
(where), and an ASPP head segments from the fused map and the heat map together (what exactly).

    python train_lts.py --yaml yaml/lts_refshapes.yaml          embedded data, two CPU cores, nothing to download
    torchrun --nproc_per_node 4 train_lts.py                    the paper's setting on RefCOCO
    python train_lts.py --no-filter                             Table 2 without relevance filtering
    python train_lts.py --locator transformer                   Table 4

Where the paper is silent
  backbone      Sec. 4.1 does not say whether Darknet-53 is trained. MCN, which LTS follows in its set-up, freezes it;
                so do we. `--no-freeze-backbone` trains it (with its BatchNorm statistics frozen).
  widths        d_k = 1024 (Sec. 4.1) must equal F_m3's channels, so each half of Eq. 7 has 512. The GRU's 1024 are
                512 each way, concatenated by Eq. 4.
  norm          Every convolution of Eq. 5-7 and of ASPP is followed by GroupNorm; MCN has BatchNorm there.
  UpSample      nearest, as in MCN. It commutes with Eq. 7's pointwise W, which is therefore applied before it.
  ASPP          rates 6, 12, 18 with a pointwise and a global branch of 256 channels each (DeepLab v3, MCN); the paper
                cites DeepLab v2, whose rates are `--aspp-rates 6 12 18 24`.
  losses        Eq. 11-12 are sums over cells (their minus sign is missing). We divide their weighted sum by the number
                of P_mask's cells and of sentences; under Adam that common factor cancels. lambda acts as printed.
  target        "down-sampled ground truth": the share of each cell that the mask covers, a number in 0..1.
  optimiser     Adam (AdamW without decay). Word vectors start from GloVe's and are trained.
  H_mask        enters Eq. 10 after its sigmoid, as the h_l of Eq. 12.
  input         "resized to 416x416": the image keeps its shape and is padded (MCN); `--squash` stretches it.
  n filters     "filtering twice": filter i sees F_m3 gated by sigmoid of heat map i-1, the last map goes on, all maps
                are supervised; `--filter-chain parallel` gives the segmentation head all n maps at once instead.
  WordFilter    every word's kernel gives a map; their rectified mean, scaled and shifted, is the heat map.
  no fusion     the sentence enters through the filter's kernel alone. Without filter and segmentation a pointwise
                convolution reads the mask from F_m3; without segmentation the heat map is the mask and L_loc the loss.
  epoch         visits every object once with one of its sentences drawn (MCN); `--epoch-unit expression` all sentences.
"""
import math
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, data, distributed, metrics, runlog
from common.backbones import Darknet53, ResNet, Small, load_weights
from common.config import UserError, base_parser, parse, run
from common.language import BiGRU, mean_over_words
from common.layers import ConvNormAct, normalise, sine_positions
from common.text import Vocabulary
from data_prep.glove import load_words

# ---- settings -----------------------------------------------------------------------------------------------

YAML = "yaml/lts.yaml"
EMBEDDED_YAML = "yaml/lts_refshapes.yaml"
make_vocabulary = Vocabulary  # what a checkpoint's list of entries becomes again


def get_parser():
    """Every setting with its default, which is the paper's on RefCOCO."""
    parser = base_parser(__doc__)
    parser.set_defaults(epochs=45, batch_size=18, lr=1e-3, epoch_unit="ref")
    input_ = parser.add_argument_group("input")
    add = input_.add_argument
    add("--size", type=int, default=416, help="side of the square input, a multiple of 32; Sec. 4.1, Table 6")
    parser.switch(input_, "squash", False, "stretch the image to the square instead of padding it")
    add("--max-words", type=int, default=15,
        help="words a sentence keeps: 15, RefCOCOg 20; Sec. 4.1. 0: blind to the sentence, a control")
    add("--flip", type=float, default=0.0, help="probability of mirroring image and sentence (left <-> right)")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--backbone", choices=("darknet53", "resnet50", "resnet101", "small"), default="darknet53",
        help="darknet53 in Sec. 4.1; `small` learns the embedded corpora from nothing")
    add("--finest-stride", type=int, choices=(4, 8), default=8,
        help="stride of F_m3; 8 in Sec. 3.1, 4 for small pictures (P_mask then has half the input's size)")
    add("--weights", default="data/weights/darknet53_coco_minus.pt",
        help="file that `python -m data_prep.weights` wrote, or `none` to train from nothing")
    parser.switch(model, "leaky-init", False, "accept weights that saw RefCOCO's val or test images (marked in results)")
    parser.switch(model, "freeze-backbone", True, "keep the backbone's weights as they are")
    add("--embeddings", choices=("glove", "random"), default="glove",
        help="word vectors: data/<dataset>/words.npz from `python -m data_prep.glove`, or trained from nothing")
    add("--text-dim", type=int, default=1024, help="bi-GRU, both directions together; Sec. 4.1")
    add("--dim", type=int, default=1024, help="channels of F_m1, F_m2, F_m3 and of the kernel (d_k); Sec. 4.1")
    add("--aspp-dim", type=int, default=256, help="channels of each ASPP branch")
    add("--aspp-rates", type=int, nargs="+", default=[6, 12, 18], help="even dilations of the ASPP branches")
    add("--threshold", type=float, default=0.25, help="binarisation of P_mask; Sec. 3.4")
    ablation = parser.add_argument_group("ablation (Tables 2, 4, 5)")
    add = ablation.add_argument
    parser.switch(ablation, "fusion", True, "multiply the sentence into the visual map, Eq. 5; Table 2")
    parser.switch(ablation, "filter", True, "locate with the heat map, Eq. 8 or 9; Table 2")
    parser.switch(ablation, "seg", True, "segment with ASPP and deconvolution, Eq. 10; Table 2")
    add("--lambda-loc", type=float, default=0.1, help="weight of L_loc, Eq. 13; 0: Table 2 without L_loc")
    add("--locator", choices=("filter", "transformer"), default="filter", help="Eq. 8 or Eq. 9; Table 4")
    add("--filters", type=int, choices=(1, 2, 3), default=1, help="times of filtering, n of Table 5")
    add("--filter-chain", choices=("serial", "parallel"), default="serial", help="how n filters follow each other")
    parser.switch(ablation, "word-filter", False, "a kernel from every word instead of the sentence; Table 5")
    loss = parser.add_argument_group("loss and schedule")
    add = loss.add_argument
    add("--dice", type=float, default=0.0, help="weight of a Dice term beside L_seg; not in the paper, for small objects")
    add("--schedule", choices=("step", "cosine"), default="step", help="step: lr falls by 10 at --lr-drop; Sec. 4.1")
    add("--lr-drop", type=int, default=30, help="epoch of the fall; Sec. 4.1")
    add("--warmup-steps", type=int, default=0, help="steps in which lr rises from 0")
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay")
    return parser


def frontend(args, vocabulary):
    """What stands between the files and the model: sentence -> ids, and the canvas that an image is laid on."""
    if args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of 32, the backbone's coarsest stride.")
    return lambda text: vocabulary.encode(text, args.max_words), data.Canvas(args.size, squash=args.squash)


# ---- model --------------------------------------------------------------------------------------------------
# Shapes: B images, E sentences, L words, D = --dim channels, A = --aspp-dim. F_m3 is (h,w) at --finest-stride (8 in the
# paper), F_m2 and F_m1 at two and four times that stride, P_mask at half of it.

BACKBONES = {"darknet53": Darknet53, "resnet50": lambda: ResNet(50), "resnet101": lambda: ResNet(101),
             "small": lambda: Small(24, (1, 3, 4))}


class LTS(nn.Module):
    """Image and sentence to the mask's logits and the heat map's logits."""

    def __init__(self, args, vocabulary_size):
        super().__init__()
        half = args.dim // 2
        self.threshold, self.use = args.threshold, args
        self.backbone = BACKBONES[args.backbone]()
        if args.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.language = BiGRU(vocabulary_size, hidden=args.text_dim // 2)
        self.strides = [4 * args.finest_stride, 2 * args.finest_stride, args.finest_stride]  # of F_v1, F_v2, F_v3
        if not set(self.strides) <= set(self.backbone.strides):
            raise UserError(f"--finest-stride {args.finest_stride} needs features at {self.strides}; --backbone "
                            f"{args.backbone} has {list(self.backbone.strides)}.")
        channels = [self.backbone.channels[stride] for stride in self.strides]
        self.visual1 = ConvNormAct(channels[0], args.dim, 1)   # g(F_v1 W_v1), Eq. 5
        self.visual2 = ConvNormAct(channels[1], half, 1)       # g(F_v2 W_v2), Eq. 7
        self.visual3 = ConvNormAct(channels[2], half, 1)       # g(F_v3 W_v3), Eq. 7
        if args.fusion:
            self.textual = nn.Linear(args.text_dim, args.dim)  # W_t, Eq. 5
        elif not args.filter:
            raise UserError("--no-fusion --no-filter leaves the sentence no way into the model.")
        self.merge1 = ConvNormAct(args.dim, half, 1)           # g(F_m1 W_m1), Eq. 7
        self.merge2 = ConvNormAct(args.dim, half, 1)           # g(F_m2 W_m2), Eq. 7
        if (args.filters > 1 or args.word_filter) and (args.locator == "transformer" or not args.filter):
            raise UserError("--filters and --word-filter are about the filter, which --no-filter and --locator transformer do without.")
        maps = 0
        if args.filter:
            self.locator = TransformerLocator(args.dim, args.text_dim) if args.locator == "transformer" else \
                FilterLocator(args.dim, args.text_dim, args.filters, args.filter_chain, args.word_filter)
            maps = args.filters if args.locator == "filter" and args.filter_chain == "parallel" else 1
        elif not args.seg:
            self.reader = nn.Conv2d(args.dim, 1, 1)
        if args.seg:
            self.segmenter = Segmenter(args.dim, maps, args.aspp_dim, args.aspp_rates)

    def encode_image(self, images):
        """What no sentence changes, once per image: images (B,3,H,W) uint8 or float in 0..1 -> the three g(F_v W_v)."""
        features = self.backbone(normalise(images, self.backbone.mean, self.backbone.std))
        v1, v2, v3 = (features[stride] for stride in self.strides)
        return self.visual1(v1), self.visual2(v2), self.visual3(v3)

    def forward(self, images, image_of, text):
        """images (B,3,H,W), image_of (E,), text (E,L) ids -> dict of logits: `mask` (E,2h,2w) and `heats` n x (E,h,w)."""
        return self.decode(self.encode_image(images), image_of, text)

    def decode(self, features, image_of, text):
        """The part that depends on the sentence; features from `encode_image`, the rest as in `forward`."""
        visual1, visual2, visual3 = features
        states, known = self.language(text)
        sentence = mean_over_words(states, known)                                        # (E, text_dim), Eq. 3
        # index_select and not [image_of]: its backward, adding whole maps, is ten times as fast on a CPU
        fused1 = visual1.index_select(0, image_of)                                       # (E, D, h/4, w/4)
        if self.use.fusion:
            fused1 = fused1 * F.leaky_relu(self.textual(sentence), 0.1)[..., None, None]  # Eq. 5
        fused2 = torch.cat([_up(self.merge1(fused1)), visual2.index_select(0, image_of)], 1)  # (E, D, h/2, w/2), Eq. 6-7
        # F_m3 = concat(up(coarse), fine[image_of]), Eq. 6-7, is kept in its two parts: what is pointwise or even-dilated
        # acts on `coarse` at a quarter of the cells and on `fine` once per image, with the very same result.
        fused3 = Fused(self.merge2(fused2), visual3, image_of)                           # (E, D/2, h/2, w/2), (B, D/2, h, w)
        heats = self.locator(fused3, sentence, states, known) if self.use.filter else []
        if self.use.seg:
            priors = heats if self.use.filter_chain == "parallel" else heats[-1:]
            mask = self.segmenter(fused3, priors)                                        # Eq. 10
        else:
            mask = heats[-1] if heats else self.reader(fused3.whole()).squeeze(1)
        return {"mask": mask, "heats": heats}

    def segment(self, features, image_of, text, targets=None):
        """features from `encode_image`, image_of (E,), text (E,L) -> prob (E,2h,2w) in the input's frame, its threshold, and
        the heat map where the model has one."""
        out = self.decode(features, image_of, text)
        result = {"prob": out["mask"].sigmoid(), "threshold": self.threshold}
        if out["heats"]:
            result["heat"] = {"H_mask": out["heats"][-1].sigmoid()}
        return result


class Fused:
    """F_m3 in its two parts: coarse (E,D/2,h/2,w/2), to be doubled, and fine (B,D/2,h,w), to be read by image_of (E,)."""

    def __init__(self, coarse, fine, image_of):
        self.coarse, self.fine, self.image_of = coarse, fine, image_of

    def whole(self):
        """F_m3 itself, (E, D, h, w)."""
        return torch.cat([_up(self.coarse), self.fine_of_sentence()], 1)

    def fine_of_sentence(self):
        """The fine half, once for each sentence, (E, D/2, h, w)."""
        return self.fine.index_select(0, self.image_of)


def _up(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


class FilterLocator(nn.Module):
    """Relevance filtering, Eq. 8: kernels from the sentence (or from each word) filter F_m3, n times."""

    def __init__(self, dim, text_dim, filters, chain, by_word):
        super().__init__()
        self.kernels = nn.ModuleList(nn.Linear(text_dim, dim) for _ in range(filters))  # W_k
        self.serial, self.by_word = chain == "serial", by_word
        for kernel in self.kernels:
            kernel.weight.data /= dim ** 0.5  # H_mask starts of order one whatever d_k is
        self.bias = nn.Parameter(torch.zeros(filters))  # beside Eq. 8: lets the rare foreground start low
        if by_word:
            self.scale = nn.Parameter(torch.ones(filters))

    def forward(self, fused, sentence, states, known):
        """sentence (E,T), states (E,L,T), known (E,L) -> n heat maps' logits (E,h,w)."""
        heats, gate = [], 1.0
        for i, to_kernel in enumerate(self.kernels):
            kernel = to_kernel(states if self.by_word else sentence[:, None])           # (E, L or 1, D), K = f_text W_k
            coarse, fine = kernel.chunk(2, -1)
            response = _up(torch.einsum("eld,edhw->elhw", coarse, fused.coarse)) \
                + torch.einsum("eld,edhw->elhw", fine, fused.fine_of_sentence())  # Eq. 8
            response = response * gate
            if self.by_word:
                response = mean_over_words(F.leaky_relu(response, 0.1).flatten(2), known).unflatten(1, response.shape[2:])
                response = response * self.scale[i]
            else:
                response = response.squeeze(1)
            heats.append(response + self.bias[i])
            if self.serial:
                gate = heats[-1].sigmoid()[:, None]
        return heats


class TransformerLocator(nn.Module):
    """Eq. 9: a one-layer transformer decoder; F_m3's cells ask, the sentence answers. 4 heads (Sec. 4.1)."""

    def __init__(self, dim, text_dim, heads=4):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(dim, heads, kdim=text_dim, vdim=text_dim, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.reader = nn.Linear(dim, 1)

    def forward(self, fused, sentence, states, known):
        """As FilterLocator.forward; one heat map."""
        x = fused.whole()
        _, _, h, w = x.shape
        position = sine_positions(h, w, x.shape[1], x.device).flatten(0, 1)                 # (hw, D), fixed
        x = x.flatten(2).transpose(1, 2)                                                    # (E, hw, D)
        asked = x + position
        x = self.norms[0](x + self.self_attention(asked, asked, x, need_weights=False)[0])
        memory = sentence[:, None]                                                          # (E, 1, T)
        x = self.norms[1](x + self.cross_attention(x + position, memory, memory, need_weights=False)[0])
        x = self.norms[2](x + self.feed_forward(x))
        return [self.reader(x).squeeze(-1).unflatten(1, (h, w))]


class Segmenter(nn.Module):
    """Eq. 10: ASPP over concat(F_m3, H_mask), then a deconvolution to twice the size.

    Each branch is linear up to its norm, so it is applied to the parts of its input where they are smallest: to `coarse`
    before the doubling with half the dilation (an even dilation never mixes the two cells of a pair), to `fine` once per
    image. The weights are those of one plain convolution over the concatenation.
    """

    def __init__(self, dim, maps, width, rates):
        super().__init__()
        if any(rate % 2 for rate in rates):
            raise UserError(f"--aspp-rates {rates}: the rates must be even.")
        self.point = nn.Conv2d(dim + maps, width, 1, bias=False)
        self.dilated = nn.ModuleList(nn.Conv2d(dim + maps, width, 3, padding=r, dilation=r, bias=False) for r in rates)
        self.norms = nn.ModuleList(nn.GroupNorm(min(8, width // 4), width) for _ in range(len(rates) + 1))
        self.overall = nn.Linear(dim + maps, width)
        self.project = nn.Conv2d(width * (len(rates) + 2), width, 1, bias=False)
        self.norm = nn.GroupNorm(min(8, width // 4), width)
        self.deconvolution = nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1)
        nn.init.constant_(self.deconvolution.bias, -2.0)  # foreground is rare: start near its share of the cells

    def forward(self, fused, priors):
        """fused: F_m3; priors: heat maps' logits, each (E,h,w) -> P_mask's logits (E,2h,2w)."""
        prior = torch.stack(priors, 1).sigmoid() if priors else None                        # (E, maps, h, w)
        branches = [F.leaky_relu(norm(self.split(conv, fused, prior)), 0.1)
                    for conv, norm in zip([self.point, *self.dilated], self.norms)]
        means = [fused.coarse.mean((2, 3)), fused.fine.mean((2, 3))[fused.image_of]]
        means += [prior.mean((2, 3))] if prior is not None else []
        overall = F.leaky_relu(self.overall(torch.cat(means, 1)), 0.1)[..., None, None]      # (E, A, 1, 1)
        # the projection of the branches' concatenation, as the sum of each one's own
        x = sum(F.conv2d(branch, weight) for branch, weight in
                zip([*branches, overall], self.project.weight.split(overall.shape[1], 1)))
        return self.deconvolution(F.leaky_relu(self.norm(x), 0.1)).squeeze(1)

    @staticmethod
    def split(conv, fused, prior):
        """conv(concat(up(coarse), fine[image_of], prior)), computed part by part. -> (E, A, h, w)"""
        half, rate = fused.coarse.shape[1], conv.dilation[0]
        keep = dict(dilation=rate // 2, padding=rate // 2) if rate > 1 else {}
        coarse, fine, rest = conv.weight.split([half, half, conv.weight.shape[1] - 2 * half], 1)
        out = _up(F.conv2d(fused.coarse, coarse, **keep)) \
            + F.conv2d(fused.fine, fine, padding=conv.padding, dilation=rate).index_select(0, fused.image_of)
        return out + F.conv2d(prior, rest, padding=conv.padding, dilation=rate) if prior is not None else out


def build_model(args, vocabulary):
    """The network with fresh weights; it reads no file."""
    return LTS(args, len(vocabulary))


# ---- targets and losses -------------------------------------------------------------------------------------

def make_targets(example, finest_stride):
    """In a loader worker: the share of each cell of P_mask (E,2h,2w) and of H_mask (E,h,w) that the mask covers."""
    mask = example.frame.masks_in(example.meant, finest_stride // 2)
    return {"mask": mask[example.mask_of], "heat": F.avg_pool2d(mask, 2)[example.mask_of]}


def loss_terms(out, targets, args):
    """Weighted loss terms, each summed over the sentences (E): {name: scalar}. Eq. 11-13, by P_mask's cells."""
    terms = {}
    if args.seg or not out["heats"]:
        truth = targets["mask"] if args.seg else targets["heat"]
        terms["seg"] = _bce(out["mask"], truth)                                                    # Eq. 11
        if args.dice:
            terms["dice"] = args.dice * dice(out["mask"], truth)
    if out["heats"] and (args.lambda_loc or not args.seg):
        # Eq. 13 weighs sums: L_loc has a quarter of P_mask's cells, hence the 1/4 between the means
        weight = args.lambda_loc / 4 if args.seg else 1.0
        terms["loc"] = weight * sum(_bce(heat, targets["heat"]) for heat in out["heats"]) / len(out["heats"])  # Eq. 12
    return terms


def _bce(logits, truth):
    """Binary cross-entropy, mean over cells and sum over sentences."""
    return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none").mean((1, 2)).sum()


def dice(logits, truth, smooth=1.0):
    """1 - 2 sum(p y) / (sum p^2 + sum y^2), sum over sentences; `smooth` cells keep empty masks finite."""
    prob = logits.float().sigmoid().flatten(1)
    truth = truth.flatten(1)
    overlap = 2 * (prob * truth).sum(1) + smooth
    return (1 - overlap / (prob.square().sum(1) + truth.square().sum(1) + smooth)).sum()


# ---- training -----------------------------------------------------------------------------------------------

def learning_rate(args, step, steps, steps_per_epoch):
    """The rate of step 0 … steps-1, a pure function of the step."""
    rise = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.schedule == "cosine":
        done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
        return args.lr * rise * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * rise * (0.1 if step >= args.lr_drop * steps_per_epoch else 1.0)               # Sec. 4.1


def train(args, ranks, folder, state, model, vocabulary, train_set, val_set):
    """The loop, from `state` (a checkpoint, or None) to the last step. Leaves last.pt, prev.pt, best.pt and log.jsonl."""
    model = model.to(ranks.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
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
    args = parse(get_parser(), argv, own_yaml=YAML)
    splits = ["train", "val", *args.eval_splits]
    present = data.require(args.data_root, args.dataset, splits, EMBEDDED_YAML)
    ranks = distributed.start(args.device)
    args.amp = distributed.resolve_amp(args.amp, ranks.device)
    try:
        if not present:
            if ranks.main:
                data.make_embedded(args.data_root, args.dataset)
            distributed.barrier(ranks)
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
        train_set = data.RefDataset(train_path, None, None, partial(make_targets, finest_stride=args.finest_stride), args.flip,
                                    args.seed)
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
