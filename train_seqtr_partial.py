"""Partial-RES: segment point by point, from all boxes and few masks (Qu et al., CVPR 2023), on SeqTR (Zhu et al., ECCV 2022).

Box and mask are sequences of coordinates from one vocabulary: two corners, or N contour points. A model that learnt boxes
(`rec`) learns contours from the masks of a few objects (`res`), contours for all other sentences are predicted and those
that fit their box are kept (`pseudo`), and the model of boxes learns contours again, from both (`retrain`).

    python train_seqtr_partial.py --yaml yaml/seqtr_partial_refshapes.yaml --rows         embedded data, two CPU cores, Table 2
    torchrun --nproc_per_node 4 train_seqtr_partial.py                                    the paper's setting, 10 % of RefCOCO
    python train_seqtr_partial.py --ratio 1 --rec-from runs/…/rec/best.pt --threshold inf Table 4, no selection
    python train_seqtr_partial.py --stage res --cctf off --pmca off --rec-from runs/…/rec/best.pt   Table 1, the baseline
    python train_seqtr_partial.py --ratio 100 --rec-from runs/…/rec/best.pt               all masks: no pseudo labels, no `retrain`

All stages run in their order, each in <run>/<stage>/; a further call goes on from what is there. Of the objects without masks
only the boxes are read.

Where the paper is silent
  backbone      frozen, as most of it in SeqTR. `--no-freeze-backbone` trains it (with its BatchNorm statistics frozen).
  fusion        "from the finest to coarsest": average pooling, concatenation, 3x3 convolution, level by level, as SeqTR, with
                GroupNorm; word vectors of GloVe stay as they are.
  sentence      meets the cells in Eq. 1 alone. `--sentence-token`, the released code's: its tanh is appended to the cells as one
                more token of the encoder, before the 1x1 convolution, so that GroupNorm's statistics are of both. It has no
                position and is always attended to, with log G = 0; CCTF and --locate leave it out. It has no weights of its own,
                so stages with it begin with `rec`, which has none, being SeqTR's, as in the released scripts.
  mp(.)         pools over the words, as its result multiplies every cell ("along the channel dimension" is a slip).
  positions     sine for the cells, in shares of the image's own extent, learned for the sequence. They are added "before
                entering", and, as in DETR, once more to the queries and keys of every layer; SeqTR has these alone. The
                transformer is DETR's: post-norm, 8 heads, 4 times as wide inside.
  SeqTR's code  `--base released`: YOLOv3's neck behind the trunk, BatchNorm in the fusion, pixels of 0..255 and black padding, a
                GRU that reads over padding, positions for queries and keys alone, coordinates cut, not rounded, to bins of
                sides rounded up to 32. Its checkpoints need it: `python -m data_prep.weights --kind seqtr`, then `--rec-from`.
  own size      "resized to 640 x 640" keeps the sides' ratio: a canvas holds the image at its left-top and padding of one colour.
                Coordinates, CCTF and PMCA refer to the part of the canvas that the image fills; cells of padding alone are not
                attended to, nor averaged.
  Eq. 2         its M+1 values meet M bins: the far edge belongs to the last bin.
  contour       of the part with the largest area (`--contour bridge` joins all parts by their nearest points), on pixel edges,
                from the leftmost of its topmost vertices; N points equally far apart along it, however short it is. SeqTR
                takes every ceil(L/N)-th of L vertices, so at most N points: `--sampling stride`. "Clockwise", also where an
                image is mirrored; the released code goes the other way from the same vertex: `--direction anticlockwise`.
  EOS           ends every sequence, and is its every token where there is no mask. In masks it weighs 0.1 (SeqTR).
  output        is cut at the first EOS; one point or none: no mask; two: the box between them; an odd last coordinate falls.
  Eq. 4         cell floor(x W / M) of the image's own, fractional number of columns W; nothing for [TASK] and EOS. The
                released code swaps the axes and scales by W - 1 and H - 1, padding included: `--cctf released`.
  Eq. 6-7       centre and scale in shares of the image, as the sigmoid suggests; log G joins the logits of every head (SMCA).
                A layer's own MLP starts at a centre of 1/2 and a scale of 1/2: nearly flat; scales are at least 1/100. `--pmca
                released`: from the state after self-attention, for each head, the scale free, in cells, and multiplied:
                log G = -(d s)^2 / sigma.
  Eq. 8         "dice" is the loss, 1 - dice coefficient: only so is D < 0.10 stricter than no threshold.
                `--distance parts`, after the released code: each connected part of a mask is compared with the whole box, all
                their projections behind one another, so that few masks in parts pass. (There, holes count as parts, too.)
  pseudo labels every sentence of train without a mask gets its own. Empty masks are no labels, whatever the threshold. They come
                from best.pt, of averaged weights. The released code has the weights without their average: `--pseudo-weights
                last`, those of the last step. masks.json tells how it was made and is not used with other settings.
  retrain       begins from the model of boxes, as the released scripts; `--retrain-from res` goes on instead.
  rec           plain SeqTR without CCTF and PMCA ("the REC model trained in SeqTR"), so that all rows share it (`--rec-from`).
  jitter        scale 0.3 to 1.4, SeqTR's; a crop holds the whole object where it can. For pseudo labels the object is the label.
  first values  of dic(.) and of the last layer: sines of each bin's place, so that neighbouring bins begin alike; of the layers
                before it He's; of the transformer Xavier's, a tenth of them where a layer adds to its input. Trained from
                nothing, attention and the reading of what it finds learn only through each other, and nothing is located until
                both do: a weak or blurred reading (torch's own first values, slow sines, deep post-norm layers) holds that back.
  location      is learnt from coordinates alone, through the whole decoder: too slowly on RefShapes, whose networks begin with
                nothing. `--locate W`, which neither paper nor SeqTR has, adds a cross-entropy over the encoder's cells, whose
                truth is each cell's share of the box. All stages know the boxes; no mask is used.
  rates         those of `res` at 50 and 100 % are that at 10 %, that of `rec` is SeqTR's.
  schedule      five of 90 epochs of warm-up and a tenth after 5/6 of the steps, gradient norm 0.15, averaged weights (SeqTR).
  epoch         visits every object once with one of its sentences drawn (SeqTR).
"""
import copy
import math
import re
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, data, distributed, masks, metrics, runlog
from common.backbones import Darknet53, DarknetConv, DarknetNeck, ResNet, Small, freeze_batchnorm, load_weights
from common.config import UserError, base_parser, parse, run
from common.contours import boxes_round, parts, rasterise, sample, trace
from common.language import BiGRU
from common.layers import Attention, ConvNormAct, EncoderLayer, feed_forward, normalise, sine
from common.text import Vocabulary
from data_prep import subsets
from data_prep.glove import load_words
from data_prep.refcoco import field, read_json, write_json

# ---- settings -----------------------------------------------------------------------------------------------

YAML = "yaml/seqtr_partial.yaml"
EMBEDDED_YAML = "yaml/seqtr_partial_refshapes.yaml"
make_vocabulary = Vocabulary  # what a checkpoint's list of entries becomes again
STAGES = ("rec", "baseline", "cctf", "res", "pseudo", "retrain")
STAGE_OF_TASK = {"rec": ("rec",), "res": ("retrain", "res")}
ROWS = {"baseline": {"cctf": "off", "pmca": "off"}, "cctf": {"pmca": "off"}, "res": {}}  # Table 2: step 2 without parts of it
RATES = {1: 1e-4, 5: 3e-4, 10: 5e-4, 50: 5e-4, 100: 5e-4}  # of `res`, by ratio; Sec. 4.2
RELEASED_MARKS, RELEASED_SPACES = re.compile("[.,'!?\"()*#:;]"), str.maketrans("-/", "  ")  # what SeqTR drops from sentences
INSIDE = 0.5  # a polygon's raster is 0 or 1, and a pixel of the image belongs to it from here on


def get_parser():
    """Every setting with its default, which is the paper's on RefCOCO."""
    parser = base_parser(__doc__)
    parser.set_defaults(epochs=120, batch_size=128, lr=0.0, clip=0.15, epoch_unit="ref", eval_every=5)
    stages = parser.add_argument_group("stages")
    add = stages.add_argument
    add("--stage", choices=("all", *STAGES), default="all", help="one stage alone; those before it must be there")
    parser.switch(stages, "rows", False, "train the other rows of Table 2, too: `baseline` and `cctf` are `res` without PMCA, and "
                  "`baseline` without CCTF")
    add("--rec-epochs", type=int, default=60, help="epochs of `rec`; SeqTR's. --epochs are those of `res`, Sec. 4.2: 120 to 150; "
        "--eval-every counts in those, and all stages are evaluated equally often")
    add("--retrain-epochs", type=int, default=120, help="epochs of `retrain`; Sec. 4.2")
    add("--rec-from", default="", help="best.pt of another run's `rec` instead of that stage")
    add("--pseudo-from", default="", help="masks.json of another run's `pseudo` instead of the stages `res` and `pseudo`")
    add("--retrain-from", choices=("rec", "res"), default="rec", help="the weights that `retrain` begins with")
    add = parser.add_argument_group("input").add_argument
    add("--size", type=int, default=640, help="side of the square input, a multiple of 32; Sec. 4.2")
    add("--max-words", type=int, default=15,
        help="words a sentence keeps: 15, RefCOCOg 20; Sec. 4.2. 0: blind to the sentence, a control")
    add("--flip", type=float, default=0.0, help="probability of mirroring image and sentence (left <-> right)")
    add("--jitter", type=float, nargs=2, default=[0.3, 1.4], metavar=("LOW", "HIGH"),
        help="large-scale jitter, needs one expression an image; `1 1`: none")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--backbone", choices=("darknet53", "resnet50", "resnet101", "small"), default="darknet53", help="Sec. 4.2")
    add("--finest-stride", type=int, choices=(4, 8), default=8,
        help="the finest of three scales; the transformer's cells are four times as wide; 4 for small pictures")
    add("--weights", default="data/weights/darknet53_coco_minus.pt",
        help="file that `python -m data_prep.weights` wrote, or `none` to train from nothing")
    parser.switch(model, "leaky-init", False, "accept weights that saw RefCOCO's val or test images (marked in results)")
    parser.switch(model, "freeze-backbone", True, "keep the backbone's weights as they are")
    add("--embeddings", choices=("glove", "random"), default="glove",
        help="word vectors: data/<dataset>/words.npz from `python -m data_prep.glove`, or trained from nothing")
    add("--text-dim", type=int, default=1024, help="bi-GRU, both directions together, and the fused maps of Eq. 1")
    add("--dim", type=int, default=256, help="channels of the transformer; Sec. 3.2")
    add("--heads", type=int, default=8, help="of its attention; SeqTR's")
    add("--encoder-layers", type=int, default=6, help="Sec. 3.2")
    add("--decoder-layers", type=int, default=3, help="Sec. 3.2")
    add("--dropout", type=float, default=0.1, help="in the transformer; SeqTR's")
    add("--waves", type=float, default=1.0, help="of the cells' fastest sine over the image; DETR's 1")
    add("--base", choices=("paper", "released"), default="paper", help="released: SeqTR's published network in all that the paper "
        "tells otherwise or not at all, as its checkpoints need it")
    add("--bins", type=int, default=1000, help="M of Eq. 2")
    ablation = parser.add_argument_group("ablation (Tables 1-4, Fig. 6)")
    add = ablation.add_argument
    add("--ratio", type=int, choices=subsets.RATIOS, default=10, help="percent of the objects that have masks; Table 1, Fig. 6")
    add("--cctf", choices=("paper", "released", "off"), default="paper", help="co-content teacher forcing, Eq. 4-5; Table 2")
    add("--pmca", choices=("paper", "released", "off"), default="paper", help="point-modulated cross-attention, Eq. 6-7; Table 2")
    parser.switch(ablation, "sentence-token", False, "the pooled sentence as one more token of the encoder, as released; in all "
                  "stages but `rec`")
    add("--sigma", type=float, default=8.0, help="bandwidth of Eq. 7; SMCA's")
    add("--points", type=int, default=18, help="N: 18, RefCOCOg 12; Sec. 4.2. (SeqTR's code has 12 for RefCOCO+, too)")
    add("--contour", choices=("largest", "bridge"), default="largest", help="what is traced of a mask in several parts")
    add("--sampling", choices=("uniform", "stride"), default="uniform", help="N points, or at most N by SeqTR's stride")
    add("--direction", choices=("clockwise", "anticlockwise"), default="clockwise",
        help="which way round contours run: Sec. 3.1's, or the released code's")
    add("--pseudo-weights", choices=("averaged", "last"), default="averaged",
        help="of `res`, for pseudo labels: the averaged ones of best.pt, or, as released, the last step's own, of last.pt")
    add("--distance", choices=("whole", "parts"), default="whole",
        help="D of Eq. 8 of the whole mask, or, as released, of each of its parts against the whole box")
    add("--threshold", type=float, default=0.10, help="T: pseudo labels with D of Eq. 8 (0 to 2) below it are kept; inf: all")
    parser.switch(ablation, "rpp", True, "resample pseudo masks' contours; without, learn the predicted points; Table 3")
    loss = parser.add_argument_group("loss and schedule")
    add = loss.add_argument
    add("--smoothing", type=float, default=0.1, help="label smoothing; SeqTR's")
    add("--eos-weight", type=float, default=0.1, help="weight of EOS among a mask's tokens; SeqTR's")
    add("--locate", type=float, default=0.0, help="weight of the location loss on the encoder's cells; not the paper's, 0: none")
    add("--stage-lr", type=float, default=5e-4, help="rate of `rec` and `retrain`; Sec. 4.2. --lr is that of `res`, 0: by ratio")
    add("--schedule", choices=("step", "cosine"), default="step", help="step: lr falls by 10 at --lr-drop")
    add("--lr-drop", type=float, default=0.833, help="share of the steps before the fall; SeqTR's")
    add("--warmup", type=float, default=0.055, help="share of the steps in which lr rises from 0; SeqTR's")
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay")
    add("--optimizer", choices=("adamw", "amsgrad"), default="adamw", help="adamw: Sec. 4.2; amsgrad: the released code's Adam")
    add("--ema", type=float, default=0.999, help="largest decay of the averaged weights, which are scored; 0: none")
    return parser


def frontend(args, vocabulary):
    """What stands between the files and the model: sentence -> ids, and the canvas that an image is laid on."""
    if args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of 32, the backbone's coarsest stride.")
    plain = (lambda text: RELEASED_MARKS.sub("", text.lower()).translate(RELEASED_SPACES)) if args.base == "released" else str
    return lambda text: vocabulary.encode(plain(text), args.max_words), data.Canvas(args.size)


def check_settings(args):
    """Refuse numbers and mixtures of flags that no run can have, before any stage costs time. Raises UserError."""
    for name, least in (("points", 2), ("bins", 2), ("heads", 1), ("epochs", 1), ("rec_epochs", 1), ("retrain_epochs", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}.")
    if args.sigma <= 0:
        raise UserError(f"--sigma {args.sigma:g} is no bandwidth; give a number above 0.")
    low, high = args.jitter
    if not 0 < low <= high:
        raise UserError(f"--jitter {low:g} {high:g}: give the smallest scale, above 0, and then the largest.")
    if (low, high) != (1, 1) and args.expressions_per_image != 1:
        raise UserError("--jitter looks at the object, so it needs --expressions-per-image 1; `--jitter 1 1` turns it off.")
    if args.base == "released" and args.weights != "none" and not args.rec_from and args.stage in ("all", "rec"):
        raise UserError(f"--base released sees pixels of 0..255, which the backbone in --weights {args.weights} was not trained with: "
                        "begin with a SeqTR that data_prep.weights converted, by --rec-from, or with --weights none.")
    for flag, given in (("--pseudo-weights last", args.pseudo_weights == "last"), ("--distance parts", args.distance == "parts")):
        if given and args.ratio == 100:
            raise UserError(f"{flag} tells how pseudo labels are made, and --ratio 100 needs none; leave one of the two out.")
    if args.pseudo_weights == "last" and not args.ema and not args.pseudo_from:
        raise UserError("--pseudo-weights last is the choice against averaged weights, of which --ema 0 has none; leave one of the "
                        "two out.")
    for stage, flag, given in (("rec", "--rec-from", args.rec_from), ("res", "--pseudo-from", args.pseudo_from),
                               ("pseudo", "--pseudo-from", args.pseudo_from)):
        if given and args.stage == stage:
            raise UserError(f"{flag} takes the place of the stage {stage}; leave one of the two out.")


def of_stage(args, stage):
    """The settings of one stage: those of the call, with what the stage fixes."""
    own = {"rec": args.rec_epochs, "retrain": args.retrain_epochs}
    epochs = own.get(stage, args.epochs)
    changed = {"stage": stage, "epochs": epochs, "eval_every": max(1, round(args.eval_every * epochs / args.epochs)),
               "lr": args.stage_lr if stage in own else args.lr or RATES[args.ratio]}
    changed |= ROWS["baseline"] | {"sentence_token": False} if stage == "rec" else ROWS.get(stage, {})
    return type(args)(**{**vars(args), **changed})


# ---- model --------------------------------------------------------------------------------------------------
# Shapes: B images, E sentences, L words, C = --dim channels, S = h*w cells of the coarsest map (and, behind them, the token of
# --sentence-token), T tokens of a sequence, P points. Tokens are bins 0 … M-1 and EOS = M; x and y alternate, x first.

BACKBONES = {"darknet53": Darknet53, "resnet50": lambda: ResNet(50), "resnet101": lambda: ResNet(101),
             "small": lambda: Small(24, (1, 2, 6))}


class SeqTR(nn.Module):
    """Image and sentence to a sequence of coordinates."""

    def __init__(self, args, vocabulary_size):
        super().__init__()
        self.points = 2 if args.stage == "rec" else args.points
        self.bins, self.cctf, self.box, self.waves = args.bins, args.cctf, args.stage == "rec", args.waves
        self.released, self.max_words, self.sentence_token = args.base == "released", args.max_words, args.sentence_token
        self.fill = torch.tensor(data.Canvas.fill, dtype=torch.uint8)
        self.backbone = BACKBONES[args.backbone]()
        if args.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.strides = [args.finest_stride * 2 ** i for i in range(3)]
        if not set(self.strides) <= set(self.backbone.strides):
            raise UserError(f"--finest-stride {args.finest_stride} needs features at {self.strides}; --backbone "
                            f"{args.backbone} has {list(self.backbone.strides)}.")
        if args.dim % 4 or args.dim % args.heads or args.text_dim % 2:
            raise UserError(f"--dim {args.dim} must be a multiple of 4 and of --heads {args.heads}, and --text-dim even.")
        fine, middle, coarse = (self.backbone.channels[stride] for stride in self.strides)
        conv = DarknetConv if self.released else ConvNormAct
        self.neck = freeze_batchnorm(DarknetNeck(coarse)) if self.released else nn.Identity()
        for layer in list(self.neck.children())[:4 if args.freeze_backbone else 0]:
            layer.requires_grad_(False)
        self.merge1 = conv(fine, fine, 3)
        self.merge2 = conv(fine + middle, fine + middle, 3)
        self.merge3 = nn.Sequential(conv(fine + middle + coarse, fine + middle + coarse, 3),
                                    conv(fine + middle + coarse, args.text_dim, 1))
        self.language = BiGRU(vocabulary_size, hidden=args.text_dim // 2, train_embeddings=args.embeddings == "random")
        self.project = nn.Sequential(nn.Conv2d(args.text_dim, args.dim, 1),
                                     nn.GroupNorm(math.gcd(32, args.dim), args.dim))
        self.encoder = nn.ModuleList(EncoderLayer(args.dim, args.heads, args.dropout) for _ in range(args.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(args.dim, args.heads, args.dropout, args.pmca, args.sigma)
                                     for _ in range(args.decoder_layers))
        self.norm = nn.LayerNorm(args.dim)
        self.task = nn.Embedding(2, args.dim)                    # [TASK]: a box, a mask
        self.coordinates = nn.Embedding(args.bins + 1, args.dim)  # dic(.) of Eq. 3, for x and y alike
        self.places = nn.Embedding(2 * args.points + 1, args.dim)  # of the sequence; a box uses the first five
        self.predictor = nn.Sequential(nn.Linear(args.dim, args.dim), nn.ReLU(), nn.Linear(args.dim, args.dim), nn.ReLU(),
                                       nn.Linear(args.dim, args.bins + 1))
        self.first_values()
        self.locator = nn.Linear(args.dim, 1) if args.locate else None

    @torch.no_grad()
    def first_values(self):
        """Draw what training begins with, where torch's own values would let it locate nothing (see `first values` above)."""
        for module in (self.encoder, self.decoder, self.task, self.coordinates, self.places):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in self.decoder:
            if layer.pmca is not None:
                layer.pmca.start()
        for layer in self.predictor[:-1:2]:  # torch's own would shrink what is said by three with each layer
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        # each layer begins close to the identity; only the first of the decoder looks at the cells with full strength
        quiet = [layer.feed_forward[-1] for layer in (*self.encoder, *self.decoder)]
        quiet += [layer.attention.out for layer in self.encoder] + [layer.own.out for layer in self.decoder]
        for layer in quiet + [layer.cross.out for layer in self.decoder[1:]]:
            layer.weight.mul_(0.1)
        waves = 0.3 * bin_waves(self.bins, self.coordinates.embedding_dim)
        self.coordinates.weight[:-1] = waves  # bins that lie together begin alike, as what is read and as what is said
        self.predictor[-1].weight[:-1] = waves

    def encode_image(self, images):
        """What no sentence changes, once per image: images (B,3,H,W) uint8 or float in 0..1 -> fused map (B,text_dim,h,w) and
        the extent (B,2) of each picture on its canvas, width and height in pixels."""
        size = extent(images, self.fill)
        if self.released:  # 0..255, and black padding
            pixels = images.float() * (1 if images.dtype == torch.uint8 else 255)
            x, y = (torch.arange(side, device=images.device) < size[:, i, None] for i, side in enumerate(images.shape[:1:-1]))
            pixels = pixels * (y[:, None, :, None] & x[:, None, None])
        else:
            pixels = normalise(images, self.backbone.mean, self.backbone.std)
        features = self.backbone(pixels)
        fine, middle, coarse = (features[stride] for stride in self.strides)
        x = self.merge1(F.avg_pool2d(fine, 2))
        x = self.merge2(F.avg_pool2d(torch.cat([x, middle], 1), 2))
        return self.merge3(torch.cat([x, self.neck(coarse)], 1)), size

    def forward(self, images, image_of, text, tokens):
        """Teacher forcing: images (B,3,H,W), image_of (E,), text (E,L) ids, tokens (E,2P) -> `logits` (E,2P+1,M+1), and
        with --locate those of the cells, `where` (E,h,w)."""
        memory = self.encode(self.encode_image(images), image_of, text)
        return {"logits": self.decode(memory, tokens), "where": memory["where"]}

    def encode(self, features, image_of, text):
        """Fusion and encoder: features from `encode_image` -> what the decoder reads, a dict with a row for each sentence: `keys`
        of its layers, `visible` (E,S), the cells' places `u` (E,w) and `v` (E,h), how many `cells` (E,2) the image spans, CCTF's
        `lines` and the logits `where` (E,h,w) of --locate, or None."""
        visual, size = features
        size = size[image_of]
        if self.released:  # the GRU reads on over padding, up to the longest sentence
            known = text != 0
            padded = F.pad(text, (0, max(0, self.max_words - text.shape[1])))
            states = self.language.gru(self.language.embedding(padded))[0][:, :text.shape[1]]
        else:
            states, known = self.language(text)
        sentence = states.masked_fill(~known[..., None], -torch.inf).amax(1)                 # mp(F_l), (E, text_dim)
        sentence = sentence.tanh()[..., None]                                                # (E, text_dim, 1)
        fused = visual.tanh().index_select(0, image_of) * sentence[..., None]                                # Eq. 1
        h, w = fused.shape[2:]
        if self.sentence_token:
            fused = torch.cat([fused.flatten(2), sentence], 2)[..., None]                    # (E, text_dim, h*w + 1, 1)
        x = self.project(fused).flatten(2).transpose(1, 2)                                   # (E, S, C)
        stride, frame = self.strides[-1], token_frame(size, self.released)
        column, row = (torch.arange(side, device=x.device) for side in (w, h))
        u, v = (column + 0.5) * stride / frame[:, :1], (row + 0.5) * stride / frame[:, 1:]   # (E, w), (E, h), shares of the sides
        valid_x, valid_y = column * stride < size[:, :1], row * stride < size[:, 1:]         # where the near edge is the image's
        visible = (valid_y[:, :, None] & valid_x[:, None]).flatten(1)                        # (E, h*w)
        place = [valid.cumsum(1) / valid.sum(1, keepdim=True) for valid in (valid_x, valid_y)] if self.released else [u, v]
        x_wave, y_wave = (sine(of_axis, x.shape[2] // 2, self.waves) for of_axis in place)
        position = torch.cat([y_wave[:, :, None].expand(-1, -1, w, -1), x_wave[:, None].expand(-1, h, -1, -1)], -1).flatten(1, 2)
        attended = visible
        if self.sentence_token:
            position, attended = F.pad(position, (0, 0, 0, 1)), F.pad(visible, (0, 1), value=True)       # (E, S, C), (E, S)
        x = x if self.released else x + position
        for layer in self.encoder:
            x = layer(x, position, attended[:, None, None])
        cells = x[:, :h * w] if self.sentence_token else x
        where = self.locator(cells)[..., 0].masked_fill(~visible, -1e4).unflatten(1, (h, w)) if self.locator else None
        lines = co_content(cells.unflatten(1, (h, w)), valid_x, valid_y, self.cctf) if self.cctf != "off" else None
        keys = [layer.cross.keys(x + position, x) for layer in self.decoder]
        return {"keys": keys, "visible": attended, "u": u, "v": v, "cells": frame / stride, "lines": lines, "where": where}

    def embed(self, memory, tokens, start=0):
        """S of Eq. 5: tokens (E,T), the first of them coordinate number `start` of its sequence -> (E,T,C)."""
        embedded = self.coordinates(tokens)                                                  # Eq. 3
        if self.cctf == "off":
            return embedded
        index_x, index_y = line_index(tokens, self.bins, memory["cells"], memory["u"].shape[1], memory["v"].shape[1], self.cctf)
        take = lambda lines, index: lines.gather(1, index[..., None].expand(-1, -1, lines.shape[2]))  # noqa: E731
        is_x = (torch.arange(start, start + tokens.shape[1], device=tokens.device) % 2 == 0)[None, :, None]
        content = torch.where(is_x, take(memory["lines"][0], index_x), take(memory["lines"][1], index_y))
        if self.cctf == "paper":
            content = content.masked_fill((tokens == self.bins)[..., None], 0)
        return embedded + content                                                            # Eq. 5

    def decode(self, memory, tokens=None, start=0, cache=None):
        """Logits of what follows each token. Without a cache: tokens (E,T) -> (E,T+1,M+1), for [TASK] and each token. With a
        cache (a list, a dict for each decoder layer): only the new tokens are computed, and [TASK] stands for tokens=None."""
        with_task = cache is None or tokens is None
        parts = [self.task.weight[0 if self.box else 1].expand(len(memory["visible"]), 1, -1)] if with_task else []
        parts += [] if tokens is None else [self.embed(memory, tokens, start)]
        s = torch.cat(parts, 1)
        place = self.places.weight[0 if with_task else start + 1:][:s.shape[1]]
        x = s if self.released else s + place
        for i, layer in enumerate(self.decoder):
            x = layer(x, s, place, memory, memory["keys"][i], None if cache is None else cache[i])
        return self.predictor(self.norm(x))

    def generate(self, memory):
        """Greedy decoding of all sentences together: tokens (E,2P), EOS from the first EOS on, and the geometric mean (E,) of
        the probabilities chosen."""
        cache, tokens = [{} for _ in self.decoder], None
        chosen, logs = [], []
        ended = torch.zeros(len(memory["visible"]), dtype=torch.bool, device=memory["visible"].device)
        for step in range(2 * self.points):
            logits = self.decode(memory, tokens, step - 1, cache)[:, -1].float()
            if self.box:
                logits[:, self.bins] = -torch.inf                                            # a box always has two corners
            log, token = logits.log_softmax(-1).max(-1)
            chosen.append(torch.where(ended, self.bins, token))
            logs.append(torch.where(ended, 0.0, log))
            ended = ended | (token == self.bins)
            tokens = chosen[-1][:, None]
            if ended.all():
                break
        sequence = torch.full((len(ended), 2 * self.points), self.bins, device=ended.device)
        sequence[:, :len(chosen)] = torch.stack(chosen, 1)
        said = ((sequence != self.bins).sum(1) + 1).clamp(max=len(logs))
        return sequence, (torch.stack(logs, 1).sum(1) / said).exp()

    def segment(self, features, image_of, text, targets=None):
        """features from `encode_image`, image_of (E,), text (E,L) -> prob (E,h,w) on the canvas, the raster of `points` (E,P,2),
        NaN where the sequence had ended; `boxes` (E,4) round them, zeros where nothing was drawn; `score` (E,); with --locate the
        `heat` of each cell."""
        visual, size = features
        side = visual.shape[-1] * self.strides[-1]
        memory = self.encode(features, image_of, text)
        tokens, score = self.generate(memory)
        points = dequantise(tokens, token_frame(size, self.released)[image_of], self.bins)
        scale = max(1, 256 // side)                              # small canvases are drawn finer than their pixels
        prob = np.stack([rasterise(p * scale, side * scale, side * scale) for p in points.cpu().numpy()]) \
            if len(points) else np.zeros((0, side, side), bool)
        out = {"prob": torch.from_numpy(prob).to(visual.device).float(), "threshold": INSIDE, "points": points,
               "boxes": boxes_round(points), "score": score}
        where = memory["where"]
        return out if where is None else out | {"heat": {"location": where.flatten(1).softmax(1).view_as(where)}}


def extent(images, fill):
    """Width and height (B,2) of each picture on its canvas (B,3,H,W), uint8 or 0..1: padding has the colour `fill` (3 of
    0..255) and lies on the right and below."""
    fill = fill.to(images.device)[:, None, None]
    drawn = (images != fill).any(1) if images.dtype == torch.uint8 else ((images * 255 - fill).abs() > 0.25).any(1)
    sides = []
    for axis in (1, 2):                                          # columns, then rows that hold anything else
        line = drawn.any(axis)
        last = line.shape[1] - line.flip(1).int().argmax(1)
        sides.append(torch.where(line.any(1), last, line.shape[1]))
    return torch.stack(sides, 1).float()


def bin_waves(bins, dim):
    """(bins, dim): sines and cosines of a bin's place, from half a wave over the image to one over 16 bins."""
    frequency = torch.logspace(math.log10(0.5), math.log10(max(1.0, bins / 16)), dim // 2)
    angle = torch.arange(bins)[:, None] * (2 * math.pi / bins) * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def co_content(cells, valid_x, valid_y, mode):
    """E{.} of Eq. 4: cells (E,h,w,C) -> features (E,w,C) of the columns that x points at and (E,h,C) of the rows that y does.

    Only cells of the image count: valid_x (E,w), valid_y (E,h). As released, x points at rows and y at columns, and all
    cells count: (E,h,C) and (E,w,C).
    """
    if mode == "released":
        return cells.mean(2), cells.mean(1)
    columns = (cells * valid_y[:, :, None, None]).sum(1) / valid_y.sum(1)[:, None, None]
    rows = (cells * valid_x[:, None, :, None]).sum(2) / valid_x.sum(1)[:, None, None]
    return columns, rows


def line_index(tokens, bins, cells, w, h, mode):
    """The lines of `co_content` that tokens (E,T) point at, read as x and as y: two (E,T) int64.

    cells (E,2): columns and rows of the image's own, fractional; w, h: those of the canvas.
    """
    if mode == "released":
        return tokens * (h - 1) // bins, tokens * (w - 1) // bins
    share = tokens.clamp(max=bins - 1)[..., None] / bins * cells[:, None]                    # W x / M, H y / M
    index = share.long()
    return index[..., 0], index[..., 1]


def gaussian(centre, weight, u, v):
    """log G of Eq. 7: centre, weight (E,n,T,2) as x, y; places u (E,w), v (E,h) -> (E,n,T,h*w), 0 at the centre and below it
    elsewhere: -((u - c_w)^2 weight_x + (v - c_h)^2 weight_y)."""
    x = (u[:, None, None] - centre[..., :1]).square() * weight[..., :1]
    y = (v[:, None, None] - centre[..., 1:]).square() * weight[..., 1:]
    return -(y[..., None] + x[..., None, :]).flatten(-2)


class PMCA(nn.Module):
    """Where a point's cross-attention looks first, Eq. 6-7."""

    def __init__(self, dim, heads, mode, sigma):
        super().__init__()
        self.mode, self.sigma, self.maps = mode, sigma, heads if mode == "released" else 1
        self.mlp = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim // 4), nn.ReLU(),
                                 nn.Linear(dim // 4, 4 * self.maps))

    def start(self):
        """Begin with the same map for every point: centre 1/2, scale 1/2 (as released: as Xavier draws them)."""
        if self.mode == "paper":
            nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, s, state, memory):
        """s (E,T,C) of Eq. 5, state (E,T,C) after self-attention -> log G (E, 1 or heads, T, h*w)."""
        out = self.mlp(state if self.mode == "released" else s).float()
        centre, scale = (part.unflatten(-1, (self.maps, 2)).transpose(1, 2) for part in out.chunk(2, -1))   # (E, n, T, 2)
        if self.mode == "released":
            weight = (scale * memory["cells"][:, None, None]).square() / self.sigma
        else:
            weight = 1 / (self.sigma * scale.sigmoid().clamp(min=1e-2).square())
        return gaussian(centre.sigmoid(), weight, memory["u"], memory["v"])


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention modulated by PMCA, feed-forward; post-norm."""

    def __init__(self, dim, heads, dropout, pmca, sigma):
        super().__init__()
        self.own, self.cross = Attention(dim, heads, dropout), Attention(dim, heads, dropout)
        self.feed_forward = feed_forward(dim, dropout)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3)), nn.Dropout(dropout)
        self.pmca = None if pmca == "off" else PMCA(dim, heads, pmca, sigma)

    def forward(self, x, s, place, memory, keys, cache=None):
        """x (E,T,C); s (E,T,C) of Eq. 5; place (T,C); keys: the memory's, for this layer. With a cache, which takes the new
        keys in, x holds only the tokens behind those that it has."""
        asked = x + place
        own = self.own.keys(asked, x)
        if cache:
            own = tuple(torch.cat([old, new], 2) for old, new in zip(cache["keys"], own))
        if cache is not None:
            cache["keys"] = own
        length, count = own[0].shape[2], x.shape[1]
        seen = torch.ones(count, length, dtype=torch.bool, device=x.device).tril(length - count)
        x = self.norms[0](x + self.dropout(self.own(asked, own, seen)))
        mask = memory["visible"][:, None, None]
        if self.pmca is not None:
            log_g = self.pmca(s, x, memory)
            mask = F.pad(log_g, (0, mask.shape[-1] - log_g.shape[-1])).masked_fill(~mask, -torch.inf)  # the sentence's is 0
        x = self.norms[1](x + self.dropout(self.cross(x + place, keys, mask)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))


def build_model(args, vocabulary):
    """The network with fresh weights; it reads no file."""
    return SeqTR(args, len(vocabulary))


# ---- sequences ----------------------------------------------------------------------------------------------
# Points are continuous, in pixels of the canvas, whole numbers on pixel edges. common/contours.py traces and draws them.

def token_frame(size, released):
    """Width and height (...,2) that coordinates are shares of: the image's own, and as released those up to a multiple of 32."""
    return -(-size // 32) * 32 if released else size


def quantise(points, size, bins, released=False):
    """Eq. 2: points (P,2) on an image of `size` (width, height) -> tokens (P,2), those of the far edge in the last bin. The
    released code does not round, it cuts."""
    share = points / token_frame(np.asarray(size, float), released)
    return np.floor(bins * share + (0 if released else 0.5)).clip(0, bins - 1).astype(np.int64)


def dequantise(tokens, size, bins):
    """Tokens (E,2P) -> points (E,P,2) on the canvas, NaN from the pair that EOS ends; size (E,2) of the images."""
    pairs = tokens.unflatten(1, (-1, 2))
    ended = (pairs == bins).any(2).cumsum(1) > 0
    return (pairs * size[:, None] / bins).masked_fill(ended[..., None], torch.nan)


def visible_size(frame):
    """Width and height of the part of the canvas that an image fills; its left-top corner is the canvas' or lies beyond it."""
    return min(frame.left + frame.in_width, frame.canvas_width), min(frame.top + frame.in_height, frame.canvas_height)


# ---- targets and losses -------------------------------------------------------------------------------------

def make_targets(example, points, bins, contour, sampling, direction="clockwise", released=False, box=False, pseudo=None, raw=None):
    """In a loader worker: the sequence of each sentence, `tokens` (E,2P), EOS behind its end, and its annotated box, `boxes`
    (E,4), on the canvas.

    box: the corners of that box instead of the mask's contour. pseudo: {expression: RLE} of masks that stand for the
    annotated ones. raw: {expression: (P,2) points in the image's frame} that are taken as they are.
    """
    frame, pseudo, raw, expressions = example.frame, pseudo or {}, raw or {}, example.expressions.tolist()
    boxes = frame.boxes_in(np.stack([example.dataset.expression_box(e) for e in expressions]))
    back = -1 if frame.flipped else 1                            # the same way round in the mirror, too
    lines = dict(zip(expressions, boxes.reshape(-1, 2, 2))) if box else {
        e: frame.points_in(raw[e])[::back][:points] for e in expressions if e in raw}
    keys, shapes = {}, {}                                        # contours to trace; sentences about the same objects share one
    for e, k in zip(expressions, example.mask_of.tolist()):
        if e not in lines:
            keys[e] = (e,) if e in pseudo else k
            shapes.setdefault(keys[e], masks.decode(pseudo[e], checked=True) if e in pseudo else example.meant[k])
    if shapes:
        shares = frame.masks_in(np.stack(list(shapes.values()))).numpy()
        traced = {key: sequence(share, points, contour, sampling, direction) for key, share in zip(shapes, shares)}
        lines |= {e: traced[key] for e, key in keys.items()}
    rows = np.full((len(expressions), 2 if box else points, 2), bins, np.int64)
    for row, e in zip(rows, expressions):
        row[:len(lines[e])] = quantise(lines[e], visible_size(frame), bins, released)
    return {"tokens": torch.from_numpy(rows).flatten(1), "boxes": torch.from_numpy(boxes).float()}


def sequence(share, points, contour, sampling, direction):
    """At most `points` points (P,2) along the contour of a mask, given by the share (H,W) of each pixel that it covers; an object
    that shrank below half a pixel is still there. (0,2) for an empty mask."""
    most = share.max()
    line = trace(share >= min(0.5, most), contour, direction) if most > 0 else None
    return np.zeros((0, 2)) if line is None else sample(line, points, sampling)


def jitter(example, low, high, flip, pseudo=None):
    """Large-scale jitter: the Frame of one sentence's image, scaled by low … high and cropped to the canvas where it is larger,
    the object as a whole wherever it fits; mirrored with probability `flip`. pseudo: as for `make_targets`."""
    frame, rng, e = example.frame, example.rng, int(example.expressions[0])
    mask = masks.decode(pseudo[e], checked=True) if pseudo and e in pseudo else example.masks[0]
    scale, flipped = rng.uniform(low, high), rng.random() < flip
    sides = [max(1, round(side * scale)) for side in (frame.in_width, frame.in_height)]
    corner = []
    for axis, (side, canvas) in enumerate(zip(sides, (frame.canvas_width, frame.canvas_height))):
        line = mask.any(axis)
        line = line[::-1] if flipped and axis == 0 else line
        there = np.flatnonzero(line) if line.any() else np.arange(len(line))
        near, far = there[0] * side / len(line), (there[-1] + 1) * side / len(line)
        room = max(0, side - canvas)
        bounds = sorted(np.clip([far - canvas, near], 0, room))
        corner.append(-round(rng.uniform(*bounds)))
    return data.Frame(frame.width, frame.height, *sides, frame.canvas_width, frame.canvas_height, *corner, flipped)


def box_mask(dataset, objects):
    """The box round the annotated boxes of an image's objects as a mask (H,W), at least a pixel wide."""
    width, height = dataset.sizes[dataset.object_image[objects[0]]]
    near, size = dataset.boxes[objects, :2], dataset.boxes[objects, 2:]
    x0, y0 = np.round(near.min(0)).astype(int).clip(0, [width - 1, height - 1])
    x1, y1 = np.round((near + size).max(0)).astype(int)
    mask = np.zeros((height, width), bool)
    mask[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = True
    return mask


def boxes_alone(dataset, **changes):
    """A view in which objects have their boxes for masks, so that no hidden mask is ever looked at, or need be there."""
    return dataset.view(object_mask=lambda i: box_mask(dataset, [i]), **changes)


def projection_loss(mask, box, distance="whole"):
    """D of Eq. 8 of masks (H,W) bool: how unlike their projections on both axes are, 0 (equal) to 2 (apart). `parts`: those of
    each part of `mask`, and the box's as often, behind one another."""
    each, total = parts(mask) if distance == "parts" else mask[None], 0.0                # (n, H, W)
    for axis in (1, 2):
        l = each.any(axis)                                                               # noqa: E741
        b = np.broadcast_to(box.any(axis - 1), l.shape)
        total += 1 - 2 * (l & b).sum() / max(1, l.sum() + b.sum())
    return float(total)


def cover(boxes, h, w, stride):
    """Which share of each of h x w cells of `stride` pixels boxes (E,4) cover: (E,h,w)."""
    near, far = ([torch.arange(side, device=boxes.device) * stride + more for side in (w, h)] for more in (0, stride))
    x, y = ((boxes[:, i + 2, None].minimum(far[i]) - boxes[:, i, None].maximum(near[i])).clamp(min=0) / stride for i in (0, 1))
    return y[:, :, None] * x[:, None]


def loss_terms(out, targets, args):
    """Label-smoothed cross-entropy, the mean over a sequence's tokens, and that over the cells, each summed over the sentences:
    {name: scalar}."""
    truth = F.pad(targets["tokens"], (0, 1), value=args.bins)                            # (E, 2P+1)
    loss = F.cross_entropy(out["logits"].float().transpose(1, 2), truth, reduction="none", label_smoothing=args.smoothing)
    weight = torch.where((truth == args.bins) & (args.stage != "rec"), args.eos_weight, 1.0)
    terms = {"ce": (loss * weight).mean(1).sum()}
    if args.locate:
        covered = cover(targets["boxes"], *out["where"].shape[1:], args.size / out["where"].shape[2]).flatten(1)
        share = covered / covered.sum(1, keepdim=True).clamp(min=1e-6)
        terms["locate"] = args.locate * F.cross_entropy(out["where"].float().flatten(1), share, reduction="sum")
    return terms


def narrowed(dataset, chosen):
    """A view of `dataset` with only the sentences whose `chosen` (n,) is true."""
    of_image = [expressions[chosen[expressions]] for expressions in dataset.of_image]
    return dataset.view(of_image=of_image, with_expressions=np.array([i for i, e in enumerate(of_image) if len(e)], np.int64))


def has_masks(args, dataset):
    """Which sentences of train (n,) mean only objects of the subset of --ratio. Raises UserError for another corpus' subset."""
    objects = subsets.load(args.data_root, args.dataset, args.ratio)
    kept = np.isin(dataset.object_ids, sorted(objects))
    if kept.sum() < len(objects):
        raise UserError(f"{subsets.subset_path(args.data_root, args.dataset, args.ratio)} names objects that {dataset.path} does "
                        "not have; remove it and run data_prep.subsets again.")
    return np.array([all(kept[i] for i in meant) for meant in dataset.objects_of])


def training_view(args, train_set, labels):
    """What a stage learns from: the boxes of all sentences, the masks of some, or those with pseudo masks, of the file `labels`.
    Raises UserError where there is nothing."""
    if args.stage == "rec":
        return boxes_alone(train_set, targets=partial(train_set.targets, box=True))
    supervised = has_masks(args, train_set)
    if not supervised.any():
        raise UserError(f"{train_set.path}: no sentence means only objects of the {args.ratio} % that have masks; raise --ratio.")
    if args.stage in ROWS:
        return narrowed(train_set, supervised)
    pseudo, raw = read_pseudo(args, labels, train_set)
    supervised[list(pseudo)] = True
    return narrowed(train_set, supervised).view(
        targets=partial(train_set.targets, pseudo=pseudo, raw=None if args.rpp else raw),
        augment=partial(train_set.augment, pseudo=pseudo) if train_set.augment else None)


def check_corpus(dataset):
    """Refuse sentences that mean nothing: a sequence of points has no beginning there. Raises UserError."""
    none = next((e for e, objects in enumerate(dataset.objects_of) if not objects), None)
    if none is not None:
        raise UserError(f"{dataset.path}: the sentence {dataset.texts[none]!r} means no object; boxes and contours cannot "
                        "teach that.")


def polygon_bound(dataset, bins, released=False, limit=300):
    """Mean IoU in percent, in the image's frame, of the sequences that `dataset.targets` makes of the true masks themselves:
    what its number of points and bins allows. Of at most `limit` sentences, evenly chosen."""
    values = []
    for e in np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).round().astype(int)).tolist():
        image = int(dataset.expression_image[e])
        frame, mask = dataset.canvas.frame(*map(int, dataset.sizes[image])), dataset.expression_mask(e)
        example = data.Example(dataset, image, np.array([e]), mask[None], np.zeros(1, int), frame, np.random.default_rng(0))
        tokens = dataset.targets(example)["tokens"]
        points = dequantise(tokens, token_frame(torch.tensor([visible_size(frame)]), released), bins)[0].numpy()
        scale = max(1, 256 // frame.canvas_width)
        drawn = rasterise(points * scale, frame.canvas_height * scale, frame.canvas_width * scale)
        drawn = frame.prob_img(torch.from_numpy(drawn)[None].float())[0].numpy() >= INSIDE
        values.append((drawn & mask).sum() / max(1, (drawn | mask).sum()))
    return 100 * float(np.mean(values))


# ---- pseudo labels ------------------------------------------------------------------------------------------

def make_pseudo(args, ranks, folder, model, train_set):
    """Predict a contour for every sentence of train whose object has no mask, and write <run>/pseudo/masks.json: masks (RLE) and
    points in the image's frame, and D of Eq. 8; and how they were made."""
    view = narrowed(boxes_alone(train_set, targets=None), ~has_masks(args, train_set))
    mine = []

    def keep(batch, output, predicted):
        for i, frame in enumerate(batch.frames):
            of_image = np.flatnonzero(batch.image_of.cpu().numpy() == i)
            points = frame.points_img(output["points"][of_image].cpu().double())
            for e, mask, drawn in zip(batch.index[of_image].tolist(), predicted[i].cpu().numpy(), points.numpy()):
                drawn = drawn[np.isfinite(drawn).all(1)].round(2)
                distance = projection_loss(mask, box_mask(train_set, train_set.objects_of[e]), args.distance)
                mine.append({"index": e, "id": int(train_set.sent_ids[e]), "mask": masks.encode(mask), "points": drawn.tolist(),
                             "D": round(distance, 6)})

    if len(view.with_expressions):
        metrics.evaluate(model, view, ranks, args.eval_batch_size, args.workers, args.amp, on_batch=keep)
    labels = sorted((label for share in distributed.gather(ranks, mine) for label in share), key=lambda label: label["index"])
    if ranks.main:
        meta = {key: getattr(args, key) for key in ("dataset", "ratio", "pseudo_weights", "distance", "direction", "leaky_init")}
        write_json(folder / "masks.json", {"meta": meta | {"sentences": len(labels)},
                                           "labels": [{k: v for k, v in label.items() if k != "index"} for label in labels]})
    distributed.barrier(ranks)


def open_pseudo(args, path):
    """The content of a file of pseudo labels. Raises UserError where it is damaged or was made with other settings; the direction
    of its points matters without RPP alone."""
    content = read_json(path)
    meta = field(content, "meta", dict, path)
    made = {"dataset": field(meta, "dataset", str, path), "ratio": field(meta, "ratio", int, path)}
    # files from before there was a choice do not tell it
    made |= {key: field(meta, key, str, path, default) for key, default in (
        ("pseudo_weights", "averaged"), ("distance", "whole"), ("direction", "clockwise")) if key != "direction" or not args.rpp}
    other = [f"--{key.replace('_', '-')} {value}" for key, value in made.items() if value != getattr(args, key)]
    if other:
        raise UserError(f"{path} was made with {', '.join(other)}; say the same, or make others under another --name.")
    return content


def read_pseudo(args, path, dataset):
    """The labels whose D is below --threshold and whose mask is not empty: {expression: RLE}, {expression: (P,2) points of the
    image}. Raises UserError where the file is damaged, or was made with other settings."""
    content = open_pseudo(args, path)
    known = {id_: e for e, id_ in enumerate(dataset.sent_ids.tolist())}
    pseudo, raw = {}, {}
    for label in field(content, "labels", list, path):
        e = known.get(field(label, "id", int, path))
        if e is None:
            raise UserError(f"{path}: train has no sentence {label['id']}; was the corpus made again? Remove {path.parent}.")
        if not field(label, "D", float, path) < args.threshold:
            continue
        width, height = dataset.sizes[dataset.expression_image[e]]
        try:
            rle = masks.check_rle(label.get("mask"), height, width)
            points = np.array(field(label, "points", list, path), float).reshape(-1, 2)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, sentence {label['id']}: {error}.") from None
        if masks.area(rle, checked=True):
            pseudo[e], raw[e] = rle, points
    return pseudo, raw


# ---- training -----------------------------------------------------------------------------------------------

def learning_rate(args, step, steps):
    """The rate of step 0 … steps-1, a pure function of the step."""
    warmup = round(args.warmup * steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if args.schedule == "cosine":
        done = max(0, step - warmup) / max(1, steps - warmup)
        return args.lr * rise * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * rise * (0.1 if step >= args.lr_drop * steps else 1.0)


def average(averaged, model, decay):
    """Move the averaged weights and buffers towards the model's: averaged = decay * averaged + (1 - decay) * model."""
    for old, new in zip(averaged.state_dict().values(), model.state_dict().values()):
        old.lerp_(new, 1 - decay) if old.is_floating_point() else old.copy_(new)


def train(args, ranks, folder, state, model, vocabulary, train_set, val_set):
    """The loop, from `state` (a checkpoint, or None) to the last step. Leaves last.pt, prev.pt, best.pt and log.jsonl."""
    model = model.to(ranks.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    averaged = copy.deepcopy(model) if args.ema else model  # of the weights that training begins with
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True) \
        if args.optimizer == "adamw" else torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.98), eps=1e-9, amsgrad=True,
                                                           weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model
    forward = torch.compile(wrapped) if args.compile else wrapped

    plan = lambda epoch: data.plan_epoch(train_set, epoch, args.seed, args.batch_size,  # noqa: E731
                                         args.expressions_per_image, args.epoch_unit)
    steps_per_epoch = len(plan(0))
    steps = min(args.max_steps or args.epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    measure = "REC@0.5" if args.stage == "rec" else "mIoU"
    step, best = 0, {measure: -1.0, "step": 0}
    if state:
        checkpoint.load_model(model, state, folder / "last.pt")
        if args.ema:
            checkpoint.load_model(averaged, {"model": state["averaged"]}, folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        checkpoint.restore_random_states(state["random"][ranks.rank % len(state["random"])])
        step, best = state["step"], state["best"]

    def save():
        random = distributed.gather(ranks, checkpoint.random_states())
        if ranks.main:
            checkpoint.save(folder / "last.pt", snapshot(args, model, vocabulary, step, best) | {
                "averaged": averaged.state_dict() if args.ema else None,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": random}, keep="prev.pt")

    with runlog.Log(folder, ranks.main, steps, step) as log, stop_signal() as stopping:
        log.truncate(step)
        log.say(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, "
                f"{sum(map(len, train_set.of_image))} sentences, "
                f"{steps_per_epoch} steps an epoch of {args.batch_size} images, {steps} steps from step {step}")
        while step < steps:
            epoch, position = divmod(step, steps_per_epoch)
            batches = plan(epoch)[position:position + steps - step]
            loaded = data.load(train_set, [part for keys in batches for part in my_parts(keys, args, ranks)],
                               args.workers, pin=ranks.device.type == "cuda")
            for keys in batches:
                sentences = sum(len(key[2]) for key in keys)  # of the whole step, on all ranks
                rate = learning_rate(args, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                sums = {}
                for micro in range(args.accum):
                    batch = log.fetch(loaded).to(ranks.device)
                    sync = micro == args.accum - 1 or ranks.world == 1
                    with nullcontext() if sync else wrapped.no_sync():
                        with metrics.autocast(ranks.device, args.amp):
                            out = forward(batch.images, batch.image_of, batch.text, batch.targets["tokens"])
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
                if args.ema:
                    average(averaged, model, min(args.ema, (1 + step) / (10 + step)))
                step += 1
                numbers = lambda: {"loss": sum(losses.values()), **losses, "lr": rate,  # noqa: E731
                                   "grad": norm, "waiting": log.waiting(), "GB": runlog.memory(ranks.device)}
                log.step(numbers)
                if step % args.log_every == 0 or step == steps:
                    log.write({"step": step, "epoch": epoch, "seconds": log.seconds(), **numbers()})
                ended = step % steps_per_epoch == 0 or step == steps
                if ended and ((epoch + 1) % args.eval_every == 0 or step == steps):
                    rows, seconds = metrics.evaluate(averaged, val_set, ranks, args.eval_batch_size, args.workers, args.amp)
                    summary = metrics.summarise(rows, val_set, seconds=seconds)
                    log.write({"step": step, "epoch": epoch, "val_mIoU": summary["mIoU"], "val_oIoU": summary["oIoU"],
                               "val_REC@0.5": summary["REC@0.5"]})
                    log.say(f"epoch {epoch + 1}: val mIoU {summary['mIoU']:.2f}, oIoU {summary['oIoU']:.2f}, "
                            f"REC@0.5 {summary['REC@0.5']:.2f} "
                            f"({summary['n']} sentences in {seconds:.0f} s)")
                    if summary[measure] > best[measure]:
                        best = {measure: summary[measure], "step": step}
                        if ranks.main:
                            checkpoint.save(folder / "best.pt", snapshot(args, averaged, vocabulary, step, best))
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


LATER = dict.fromkeys(ROWS, {"rows", "rec_epochs", "stage_lr", "retrain_epochs", "retrain_from", "pseudo_from", "threshold", "rpp",
                             "pseudo_weights", "distance"})
LATER["retrain"] = {"rows", "rec_epochs"}
LATER["rec"] = LATER["res"] - {"stage_lr"} | {"ratio", "sigma", "contour", "sampling", "direction", "eos_weight"}  # it does not see


def check_same_run(state, args, folder):
    """Refuse to resume a run under settings that would make it another one. Raises UserError."""
    free = {"yaml", "resume", "out", "name", "workers", "device", "eval_every", "save_every", "log_every", "eval_splits",
            "eval_batch_size", "data_root", "compile", "leaky_init"} | LATER[args.stage]
    if state["script"] != Path(__file__).stem:
        raise UserError(f"{folder} is a run of {state['script']}.py, not of {Path(__file__).name}.")
    changed = [key for key, value in vars(args).items() if key not in free and state["args"].get(key) != value]
    if changed:
        was = ", ".join(f"--{key.replace('_', '-')} {state['args'].get(key)!r}" for key in changed)
        raise UserError(f"{folder} was begun with {was}; give the same settings to go on, or another --name.")


class stop_signal:
    """Turns SIGTERM into a question that the loop asks at the end of each step."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return lambda: self.asked

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)


# ---- main ---------------------------------------------------------------------------------------------------

def transfer(model, begun, path, args):
    """Begin with the weights of another stage, its checkpoint `begun`; returns whether they saw RefCOCO's val or test images.
    PMCA's and the locator's may be missing, the locator's be left over; of another number of points as many places are taken as
    there are. --sentence-token may differ: it has no weights, and `rec` never has it. Raises UserError where the rest differs."""
    if "coordinates.weight" not in begun["model"]:
        raise UserError(f"{path} was made by {begun['script']}.py and holds no SeqTR.")
    shape = ("base", "backbone", "finest_stride", "text_dim", "dim", "heads", "encoder_layers", "decoder_layers", "waves", "bins")
    other = [f"--{key.replace('_', '-')} {begun['args'].get(key)}" for key in shape if begun["args"].get(key) != getattr(args, key)]
    if other:
        raise UserError(f"{path} was made with {', '.join(other)}; say the same to begin with it.")
    own = model.state_dict()
    theirs = {name: value for name, value in begun["model"].items() if name in own or "locator." not in name}
    table = theirs["places.weight"][:len(own["places.weight"])]
    theirs["places.weight"] = torch.cat([table, own["places.weight"][len(table):]])
    new = {name: value for name, value in own.items() if ".pmca." in name or "locator." in name}
    checkpoint.load_model(model, {"model": new | theirs}, path)
    return bool(begun["args"].get("leaky_init"))


def open_train(args):
    """The split train with the targets and the jitter that all stages share; how it encodes sentences is set later."""
    targets = partial(make_targets, points=args.points, bins=args.bins, contour=args.contour, sampling=args.sampling,
                      direction=args.direction, released=args.base == "released")
    low, high = args.jitter
    augment = partial(jitter, low=low, high=high, flip=args.flip) if (low, high) != (1, 1) else None
    path, flip = data.split_path(args.data_root, args.dataset, "train"), 0.0 if augment else args.flip
    train_set = data.RefDataset(path, None, None, targets, flip, args.seed, augment)
    check_corpus(train_set)
    return train_set


def run_stage(args, ranks, folder, origin, labels):
    """One stage, from what lies in `folder`; origin: the checkpoint it begins with, or None; labels: the file of pseudo labels."""
    torch.manual_seed(args.seed)
    begun, train_set = checkpoint.load(origin) if origin else None, open_train(args)
    if begun:  # the words that its weights know
        vocabulary = Vocabulary(begun["vocabulary"])
    else:
        glove = Path(args.data_root) / args.dataset / "words.npz"
        known, vectors = load_words(glove) if args.embeddings == "glove" else ([], None)
        vocabulary = Vocabulary.build(train_set.texts, known)
    train_set.encode, train_set.canvas = frontend(args, vocabulary)
    model = build_model(args, vocabulary)

    if args.stage == "pseudo":
        check_same_run(begun, of_stage(args, "res"), origin.parent)
        made = folder / "masks.json"
        if made.is_file() and made.stat().st_mtime >= origin.stat().st_mtime:
            open_pseudo(args, made)  # other settings do not make them anew: `retrain` may have begun with these
            return
        checkpoint.load_model(model, begun, origin)
        args.leaky_init = bool(begun["args"].get("leaky_init"))
        make_pseudo(args, ranks, folder, model.to(ranks.device), train_set)
        return
    val_set = data.RefDataset(data.split_path(args.data_root, args.dataset, "val"), *frontend(args, vocabulary))
    state = checkpoint.load_newest(folder)
    if state:
        check_same_run(state, args, folder)
    if ranks.main:
        runlog.open_folder(folder, args, __file__)
        print(f"run folder {folder}", flush=True)
    distributed.barrier(ranks)
    if state:
        args.leaky_init = state["args"]["leaky_init"]
    elif begun:
        args.leaky_init = transfer(model, begun, origin, args)
        if args.stage == "retrain":  # labels of leaky weights are leaky, too
            args.leaky_init |= field(open_pseudo(args, labels)["meta"], "leaky_init", bool, labels, False)
    else:
        if args.weights != "none":
            args.leaky_init = load_weights(model.backbone, args.weights, args.leaky_init)["leaky"]
        if vectors is not None:
            model.language.load_vectors(vocabulary, known, vectors)
    if args.stage == "res" and ranks.main and not state:
        bound = polygon_bound(val_set.view(targets=train_set.targets), args.bins, args.base == "released")
        print(f"{args.points} points of the true masks reach mIoU {bound:.2f} on val", flush=True)
    train(args, ranks, folder, state, model, vocabulary, training_view(args, train_set, labels), val_set)

    best = (folder / "best.pt").stat().st_mtime
    scored = [folder / "eval" / f"{args.dataset}_{split}.json" for split in args.eval_splits]
    if not distributed.any_rank(ranks, not all(path.is_file() and path.stat().st_mtime >= best for path in scored)):
        return
    from eval import main as evaluate_run  # the same program that a user runs afterwards
    evaluate_run(["--run", str(folder), "--split", *args.eval_splits, "--report", "--device", args.device,
                  "--task", "rec" if args.stage == "rec" else "res",
                  "--batch-size", str(args.eval_batch_size), "--workers", str(args.workers)], ranks)


def stages_of(args, folder):
    """What this call runs, [(stage, the checkpoint that it begins with, or None)], and the file of pseudo labels. Raises UserError
    where something is neither there nor made on the way."""
    best = {stage: folder / stage / "best.pt" for stage in STAGES} | ({"rec": Path(args.rec_from)} if args.rec_from else {})
    begins = {"baseline": "rec", "cctf": "rec", "res": "rec", "pseudo": "res", "retrain": args.retrain_from}
    origins = {stage: best[before] for stage, before in begins.items()}
    if args.pseudo_weights == "last":
        origins["pseudo"] = folder / "res" / "last.pt"
    labels, all_known = Path(args.pseudo_from or folder / "pseudo" / "masks.json"), args.ratio == 100  # none is left to predict
    skipped = {"rec": args.rec_from, "baseline": not args.rows, "cctf": not args.rows, "res": args.pseudo_from,
               "pseudo": args.pseudo_from or all_known, "retrain": all_known}
    stages = [stage for stage in STAGES if not skipped[stage]] if args.stage == "all" else [args.stage]
    for stage in stages:
        needed = [(origins[stage], begins[stage])] if stage != "rec" else []
        for path, maker in needed + ([(labels, "pseudo")] if stage == "retrain" else []):
            if maker not in stages and not path.is_file():
                raise UserError(f"{path} does not exist, which the stage {stage} needs; the stage {maker} makes such a file.")
    if "retrain" in stages and "pseudo" not in stages:
        open_pseudo(args, labels)  # told before `rec` is trained
    return [(stage, origins.get(stage)) for stage in stages], labels


def print_stages(args, folder, labels):
    """One table of what the stages reached, from the files that they left."""
    whole = f"--cctf {args.cctf} --pmca {args.pmca}" if "off" in (args.cctf, args.pmca) else "+ CCTF + PMCA"
    names = {"rec": "boxes", "baseline": "baseline", "cctf": "+ CCTF", "res": whole, "retrain": "+ retraining"}
    print(f"{'stage':10}{'':26}{'split':>8}{'REC@0.5':>9}{'mIoU':>8}{'oIoU':>8}{'Pr@0.5':>8}{'Pr@0.9':>8}{'minutes':>9}   {folder}")
    for stage, name in names.items():
        clock = np.array([record["seconds"] for record in runlog.read_log(folder / stage) if "seconds" in record])
        gained = np.diff(clock, prepend=0)
        minutes = np.where(gained < 0, clock, gained).sum() / 60  # the clock of a run that went on began anew
        for split in args.eval_splits:
            path = folder / stage / "eval" / f"{args.dataset}_{split}.json"
            if path.is_file():
                summary = read_json(path)
                cells = ["-" if stage == "rec" else f"{summary[key]:.2f}" for key in ("mIoU", "oIoU", "Pr@0.5", "Pr@0.9")]
                print(f"{stage:10}{name:26}{split:>8}{summary['REC@0.5']:>9.2f}" + "".join(f"{cell:>8}" for cell in cells)
                      + f"{minutes:>9.1f}")
        if stage == "res" and labels.is_file():
            values = np.array([field(label, "D", float, labels) for label in field(read_json(labels), "labels", list, labels)])
            print(f"{'pseudo':10}{(values < args.threshold).sum()} of {len(values)} labels have D < {args.threshold:g}")


def main(argv=None):
    """Prepare, then train the stages one after the other; each scores its best.pt on --eval-splits and writes its report."""
    args = parse(get_parser(), argv, own_yaml=YAML)
    check_settings(args)
    splits = ["train", "val", *args.eval_splits]
    present = data.require(args.data_root, args.dataset, splits, EMBEDDED_YAML)
    ranks = distributed.start(args.device)
    args.amp = distributed.resolve_amp(args.amp, ranks.device)
    try:
        if not present:
            if ranks.main:
                data.make_embedded(args.data_root, args.dataset)
            distributed.barrier(ranks)
        if distributed.any_rank(ranks, not subsets.subset_path(args.data_root, args.dataset, args.ratio).is_file()):
            if ranks.main:
                subsets.make(args.data_root, args.dataset, ratios=[args.ratio])
            distributed.barrier(ranks)
        folder = runlog.run_folder(args, Path(__file__).stem)
        args.resume = True  # a chain goes on from what is there
        stages, labels = stages_of(args, folder)
        for stage, origin in stages:
            run_stage(of_stage(args, stage), ranks, folder / stage, origin, labels)
        if ranks.main:
            print_stages(args, folder, labels)
    finally:
        distributed.finish()


if __name__ == "__main__":
    run(main)
