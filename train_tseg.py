"""TSEG: Weakly-supervised segmentation of referring expressions (Strudel, Laptev, Schmid; 2022, arXiv 2205.04725).

A ViT gives a vector for every patch and a BERT one for every expression; their cosines say where an expression is. No
mask is seen: a pooling of the patches' scores says whether an expression is in an image at all, and that is learnt from
the expressions of the other images of the batch. Multi-label patch assignment (MPA) lets a patch serve several of them.

    python train_tseg.py --yaml yaml/tseg_phraseshapes.yaml      embedded data, two CPU cores, nothing to download
    torchrun --nproc_per_node 4 train_tseg.py --dataset phrasecut --max-steps 120000 --eval-splits val test      the paper's
    python train_tseg.py --pooling spa                           Tables 1 and 3: gap, gmp, spa, mpa
    python train_tseg.py --full                                  learns from masks, Eq. 9 (yaml/tseg_full.yaml on top)
    python train_tseg.py --pretrain boxes --name boxes           Table 2e, first on RefCOCO's boxes, and then
    python train_tseg.py --dataset phrasecut --max-steps 120000 --eval-splits val test --init RUN/best.pt
    python train_tseg.py --yaml yaml/tseg.yaml yaml/tseg_voc.yaml --pooling spa      Table 1, class names as expressions
    python eval.py --run RUN --dataset voc --names yaml/voc_names.yaml               Sec. 4.6, zero-shot

Where the paper is silent
  size          ViT-S/16 at 384 and BERT-Small without their heads have 50.3 M parameters, with both projections 51.2 M;
                the paper says 42 M in all, which no part that we know of explains.
  temperature   scores are cosines times exp(a), a learnt; it begins at 1/0.07 and ends at 100 at most, as in CLIP. With
                cosines alone Eq. 6 stays between 0.27 and 0.73 and no mask could be small.
  epsilon       of Eq. 4's weights: 1, as in [3]. lambda = 0 of Table 2a: the logarithm's argument is at least 1e-6.
  loss          the sum over texts as printed, and the mean over images; `--reduction mean` averages over texts.
  labels        a text is in an image if any of the image's expressions in the corpus is that string, drawn or not; case
                and spaces do not count. Each string of the batch counts once, in Eq. 5, too. tf-idf: the greatest cosine
                between the text and the image's drawn expressions, a label between 0 and 1.
  classes       `--texts classes` compares an image with all of the corpus' class names, of which it has some and lacks the
                rest; the background is the score 0. Without it negatives are the batch's.
  batch         negatives come from the whole step on all ranks, but not from another of `--accum`'s micro-batches.
  input         the image is stretched to a square, so that no patch is padding when it is tested. Training draws a scale
                in 0.5..2 and a crop (mmsegmentation's custom); patches outside the image take no part in any sum.
  flip          one in two, "left" and "right" are exchanged in the expression.
  SGD           momentum 0.9; neither biases, norms nor the temperature decay.
  GAP, GMP      [2]'s rule: rectified scores by their greatest in the image; background (1 - greatest)^16; argmax.
  argmax        among the expressions asked of the image and the background; equal strings do not compete. Maps are
                interpolated first, to a grid four times as fine as the patches.
  full          Dice with one pixel added above and below; S is interpolated before the sigmoid in testing, too.
  boxes         Eq. 9 with the union of the expression's boxes in the mask's place, and --full's optimiser and size.
  best.pt       that with the highest mIoU of val's expressions, for VOC the names of an image's own classes.
Where we do otherwise
  tokens        BERT-Small's own: WordPiece between [CLS] and [SEP], for "byte pair encoding" with [BOS] and [EOS].
"""
import hashlib
import math
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, data, distributed, metrics, runlog
from common.backbones import ViT, load_weights, resample_positions
from common.config import UserError, base_parser, parse, run
from common.language import Bert
from common.layers import normalise
from common.text import WordPiece, swap_left_right

# ---- settings -----------------------------------------------------------------------------------------------

YAML = "yaml/tseg.yaml"
FULL_YAML = "yaml/tseg_full.yaml"  # on top of it with --full and --pretrain
EMBEDDED_YAML = "yaml/tseg_phraseshapes.yaml"
make_vocabulary = WordPiece  # what a checkpoint's list of entries becomes again
TINY = 1e-6  # of Eq. 7's logarithm


def get_parser():
    """Every setting with its default, which is the paper's on RefCOCO."""
    parser = base_parser(__doc__)
    parser.set_defaults(epochs=1000, max_steps=80000, batch_size=32, lr=1e-3, epoch_unit="image", expressions_per_image=3,
                        eval_every=10)
    add = parser.add_argument_group("input").add_argument
    add("--size", type=int, default=384, help="side of the square input, a multiple of --patch; Sec. 4.2, 512 with --full")
    add("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"), help="random rescaling in training; "
        "a square of --size is cropped from the result or padded to it; 1 1: neither")
    add("--max-words", type=int, default=30, help="word pieces an expression keeps. 0: blind to the expression, a control")
    add("--flip", type=float, default=0.5, help="probability of mirroring image and expression (left <-> right); Sec. 4.2")
    add("--vocab", default="data/weights/bert_vocab.txt",
        help="BERT's vocab.txt, or `own`: data/<dataset>/vocab.txt, which the embedded corpora have")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--weights", default="data/weights/vit_s16_384.pt",
        help="ViT's file that `python -m data_prep.weights` wrote, or `none` to train from nothing")
    add("--text-weights", default="data/weights/bert_small.pt", help="BERT's file, likewise, or `none`")
    add("--init", default="", metavar="CHECKPOINT", help="best.pt of another run of this script to start from; Table 2e")
    add("--init-part", choices=("all", "vision"), default="all", help="what --init gives: all weights, or the ViT's alone, and "
        "--text-weights BERT's")
    parser.switch(model, "leaky-init", False, "accept weights that saw RefCOCO's val or test images (marked in results)")
    add("--patch", type=int, default=16, help="side of a patch; ViT-S/16, Sec. 4.2")
    add("--vit-dim", type=int, default=384, help="width of the ViT")
    add("--vit-depth", type=int, default=12, help="layers of the ViT")
    add("--vit-heads", type=int, default=6, help="heads of the ViT")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the ViT's last layer; Sec. 4.2")
    add("--bert-dim", type=int, default=512, help="width of the BERT; BERT-Small, Sec. 4.2")
    add("--bert-layers", type=int, default=4, help="layers of the BERT")
    add("--bert-heads", type=int, default=8, help="heads of the BERT")
    add("--dropout", type=float, default=0.1, help="dropout in the BERT")
    add("--threshold", type=float, default=0.5, help="binarisation of MPA's and --full's masks: the background's "
        "score is 0; Sec. 3.3")
    add("--cam-alpha", type=float, default=16.0, help="exponent of GAP's and GMP's background in testing, as in [2]")
    ablation = parser.add_argument_group("ablation (Tables 1 to 3)")
    add = ablation.add_argument
    add("--pooling", choices=("gap", "gmp", "spa", "mpa"), default="mpa", help="Eq. 2, 3, 4 with 5, 4 with 6; Table 3")
    add("--penalty-lambda", type=float, default=0.01, help="lambda of the size penalty, Eq. 7; Table 2a")
    add("--penalty-p", type=float, default=5.0, help="p of the size penalty, Eq. 7; Table 2a")
    add("--dim", type=int, default=1024, help="width of the common embedding space; Table 2b")
    add("--labels", choices=("identity", "tfidf"), default="identity", help="when an expression is in an image; Table 2c")
    add("--texts", choices=("batch", "classes"), default="batch", help="what an image is compared with: the expressions of its "
        "batch, or the names of all classes of the corpus; Table 1")
    add("--fraction", type=float, default=1.0, help="share of the training images, drawn by --seed; Table 2d")
    parser.switch(ablation, "full", False, f"learn from masks, Eq. 9; {FULL_YAML} comes on top")
    add("--pretrain", choices=("boxes",), default=None, help=f"learn from boxes, for a later --init; Table 2e; {FULL_YAML}")
    loss = parser.add_argument_group("loss and schedule")
    add = loss.add_argument
    add("--eps", type=float, default=1.0, help="epsilon of Eq. 4's weights")
    add("--reduction", choices=("sum", "mean"), default="sum", help="over the texts of the batch; the sum in Sec. 3.3")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="Sec. 4.2; AdamW with --full")
    add("--warmup-steps", type=int, default=0, help="steps in which lr rises from 0")
    add("--weight-decay", type=float, default=1e-4, help="Sec. 4.2")
    return parser


def frontend(args, vocabulary):
    """What stands between the files and the model: sentence -> ids, and the canvas that an image is laid on."""
    low, high = args.scale
    for wrong, sentence in (
            (min(args.size, args.patch) < 1 or args.size % args.patch,
             f"--size {args.size} is no multiple of --patch {args.patch}."),
            (not 0 <= args.max_words <= 510, f"--max-words {args.max_words}: BERT reads 510 pieces between [CLS] and [SEP]."),
            (not 0 < low <= high <= 16, f"--scale {low:g} {high:g} is no range of factors: 0 < LOW <= HIGH <= 16."),
            (not all(value >= 0 for value in (args.penalty_lambda, args.penalty_p, args.eps)),
             "--penalty-lambda, --penalty-p and --eps are numbers from 0 on."),
            (args.init_part != "all" and not args.init,
             f"--init-part {args.init_part} is a part of what --init names: give --init."),
            (args.full and args.pretrain, "--full learns from masks and --pretrain from boxes: give one of them."),
            ((args.full or args.pretrain) and (args.pooling, args.labels, args.reduction) != ("mpa", "identity", "sum"),
             "--full and --pretrain learn each mask by itself: leave out --pooling, --labels and --reduction."),
            (args.texts == "classes" and (args.full or args.pretrain or args.labels == "tfidf"),
             "--texts classes is for learning from image labels: leave out --full, --pretrain and --labels tfidf.")):
        if wrong:
            raise UserError(sentence)
    return lambda text: vocabulary.encode(text, args.max_words), data.Canvas(args.size, squash=True)


# ---- model --------------------------------------------------------------------------------------------------
# Shapes: B images, E expressions, N patches of a grid (g,g), D = --dim channels, L texts that an image is compared with.

class TSEG(nn.Module):
    """Images to patch vectors, expressions to text vectors, both of length 1, and the scale of their products."""

    def __init__(self, args, vocabulary_size):
        super().__init__()
        for dim, heads in (("vit-dim", "vit-heads"), ("bert-dim", "bert-heads")):
            width, parts = (getattr(args, name.replace("-", "_")) for name in (dim, heads))
            if min(width, parts) < 1 or width % parts:
                raise UserError(f"--{heads} {parts} does not divide --{dim} {width}.")
        self.use = args
        self.vision = ViT(args.size, args.patch, args.vit_dim, args.vit_depth, args.vit_heads, args.drop_path)
        self.language = Bert(args.bert_layers, args.bert_dim, args.bert_heads, 4 * args.bert_dim, vocabulary_size,
                             dropout=args.dropout)
        self.from_patch = nn.Linear(args.vit_dim, args.dim)
        self.from_text = nn.Linear(args.bert_dim, args.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.compare_with(None, None)

    def compare_with(self, text, string):
        """In training every image meets these texts (L,W), numbered (L,), instead of its batch's expressions; None ends it."""
        self.register_buffer("class_text", text, persistent=False)
        self.register_buffer("class_string", string, persistent=False)

    def encode_image(self, images):
        """images (B,3,H,W) uint8 or float in 0..1 -> unit patch vectors (B,N,D) float32. Raises UserError for other sides."""
        if images.shape[-1] % self.use.patch:
            raise UserError(f"an input of {images.shape[-1]} pixels is no multiple of --patch {self.use.patch}: choose other "
                            "--scales.")
        x = self.vision(normalise(images, self.vision.mean, self.vision.std))
        return F.normalize(self.from_patch(x).float(), dim=-1)

    def encode_text(self, text):
        """text (E,L) ids -> unit vectors (E,D) float32 of the first token, [CLS]; Sec. 3.1."""
        states = self.language(text, text != 0)
        return F.normalize(self.from_text(states[:, 0]).float(), dim=-1)

    def scale(self):
        """1/temperature, at most 100."""
        return self.log_scale.float().clamp(max=math.log(100)).exp()

    def forward(self, images, image_of, text):
        """images (B,3,H,W), image_of (E,), text (E,L) -> dict: patches (B,N,D), texts (E,D), scale, and the two inputs.

        With classes to compare with, texts and text are theirs.
        """
        text = text if self.class_text is None else self.class_text
        return {"patches": self.encode_image(images), "texts": self.encode_text(text), "scale": self.scale(),
                "image_of": image_of, "text": text, "string": self.class_string}

    def segment(self, features, image_of, text, targets=None):
        """features from `encode_image`, image_of (E,), text (E,L) -> the pooling's own masks (Sec. 3.3) as prob (E,g,g), or
        four times as fine where an argmax or an interpolation of scores decides; score (E,), sigmoid(z) of Eq. 2-8, at least
        0.5 where the text is in the image (Sec. 3.3); heat: sigmoid(S).
        An expression's answer depends on the other expressions of its image where the pooling is not MPA, and on no other.
        """
        args = self.use
        with torch.autocast(text.device.type, enabled=False):
            s = similarities(features.float(), self.encode_text(text), self.scale())          # (B, N, E)
        supervised = args.full or args.pretrain
        grid = math.isqrt(s.shape[1])
        maps = s[image_of, :, torch.arange(len(text), device=text.device)].unflatten(1, (grid, grid))   # (E, g, g)
        prob, score = maps.sigmoid(), s.new_zeros(len(text))
        if supervised:
            prob = _finer(maps).sigmoid()
        elif args.pooling != "mpa":
            prob = s.new_zeros(len(text), 4 * grid, 4 * grid)
        for b in image_of.unique().tolist():
            of = torch.nonzero(image_of == b).squeeze(1)
            same = (text[of][:, None] == text[of][None]).all(-1)                               # (E_b, E_b)
            one = s[b:b + 1][:, :, of]                                                         # (1, N, E_b)
            inside = torch.ones_like(one[:, :, 0], dtype=torch.bool)
            score[of] = pool(one, inside, args, same.sum(1))[0].sigmoid()
            if not supervised and args.pooling != "mpa":
                prob[of] = exclusive(one[0], same, args)
        threshold = args.threshold if supervised or args.pooling == "mpa" else 0.5
        return {"prob": prob, "threshold": threshold, "score": score, "heat": {"S": maps.sigmoid()}}


def similarities(patches, texts, scale):
    """S of Eq. 1, scaled: unit vectors (B,N,D) and (L,D) -> (B,N,L)."""
    return scale * (patches @ texts.T)


def assign(s, pooling, copies=1):
    """The masks M of Eq. 5 or Eq. 6 against the background's score 0: s (B,N,L) -> (B,N,L) in 0..1.

    copies (L,): how often each text stands in the list; the sum of Eq. 5 counts it once.
    """
    if pooling == "mpa":
        return s.sigmoid()                                                                     # Eq. 6
    counted = s - torch.as_tensor(copies, dtype=s.dtype, device=s.device).log()
    total = torch.cat([s.new_zeros(*s.shape[:2], 1), counted], 2).logsumexp(2, keepdim=True)
    return (s - total).exp()                                                                   # Eq. 5


def size_penalty(share, lambda_, p):
    """z_size, Eq. 7, of a mask's share of the image (in 0..1): (1 - share)^p log(lambda + share)."""
    return (1 - share).clamp(min=0) ** p * (lambda_ + share).clamp(min=TINY).log()


def pool(s, inside, args, copies=1):
    """The score z of every text in every image: s (B,N,L) float32, inside (B,N) bool -> (B,L). Eq. 2-8.

    Patches outside the image take part in nothing.
    """
    inside = inside[..., None]
    if args.pooling == "gmp":
        return s.masked_fill(~inside, -torch.inf).amax(1)                                      # Eq. 3
    count = inside.sum(1)
    if args.pooling == "gap":
        return (s * inside).sum(1) / count                                                     # Eq. 2
    masks = assign(s, args.pooling, copies) * inside
    total = masks.sum(1)
    weighted = (masks * s).sum(1) / (total + args.eps)                                         # Eq. 4
    return weighted + size_penalty(total / count, args.penalty_lambda, args.penalty_p)         # Eq. 8


def exclusive(s, same, args):
    """Masks where the texts of one image compete (Sec. 3.3): s (N,E), same (E,E) bool, which texts are equal strings
    -> (E,4g,4g) in 0..1, at least 0.5 where the text's map is above the background's and every other text's.
    """
    if args.pooling == "spa":
        maps = assign(s[None], "spa", same.sum(1))[0]
    else:
        maps = s.clamp(min=0)
        maps = maps / maps.amax(0).clamp(min=1e-5)
    grid = math.isqrt(len(s))
    maps = _finer(maps.T.unflatten(1, (grid, grid)))                                           # (E, 4g, 4g)
    first = same.int().argmax(1)
    strings = first == torch.arange(len(first), device=s.device)
    if args.pooling == "spa":
        background = 1 - maps[strings].sum(0)
    else:
        background = (1 - maps.amax(0)).clamp(min=0) ** args.cam_alpha
    best, who = maps.masked_fill(~strings[:, None, None], -1.0).topk(min(2, len(s.T)), 0)
    rival = torch.where(who[:1] == first[:, None, None], best[-1:] if len(best) == 2 else -torch.ones_like(best), best[:1])
    return (1 + maps - torch.maximum(rival, background[None])) / 2


def _finer(maps):
    """(E,g,g) -> (E,4g,4g), bilinear."""
    return F.interpolate(maps[:, None], scale_factor=4, mode="bilinear")[:, 0]


def build_model(args, vocabulary):
    """The network with fresh weights; it reads no file."""
    return TSEG(args, len(vocabulary))


# ---- targets and losses -------------------------------------------------------------------------------------

def augment(example, scale):
    """A Frame drawn for training: the image rescaled by a factor of `scale` = (low, high) and cropped at random."""
    side = example.frame.canvas_width
    resized = max(1, round(side * example.rng.uniform(*scale)))
    left, top = (-int(example.rng.integers(0, max(0, resized - side) + 1)) for _ in range(2))
    return data.Frame(example.frame.width, example.frame.height, resized, resized, side, side, left, top)


def make_targets(example, args, widest):
    """In a loader worker. `inside` (E,N) bool: the patches at least half of which is image. Weak: `string` (E,), a number
    for each expression's string, and `known` (E,widest), those of all its image's expressions. With --full or --pretrain
    `mask` (E,H,W): the share of each pixel that the mask, or the box, covers.
    """
    dataset, frame, count = example.dataset, example.frame, len(example.expressions)
    starts = np.arange(0, args.size, args.patch)
    across, down = (np.clip(start + length - starts, 0, args.patch) for start, length in
                    ((frame.left, frame.in_width), (frame.top, frame.in_height)))
    inside = torch.from_numpy(2 * np.outer(down, across) >= args.patch ** 2).flatten()         # (N,)
    inside |= ~inside.any()  # an image of less than half a patch
    targets = {"inside": inside.expand(count, -1).contiguous()}
    if args.full or args.pretrain:
        masks = frame.masks_in(boxes_of(example)) if args.pretrain else frame.masks_in(example.meant)[example.mask_of]
        return targets | {"mask": masks}
    string = lambda e: string_number(swap_left_right(dataset.texts[e]) if frame.flipped else dataset.texts[e])  # noqa: E731
    known = [string(e) for e in dataset.of_image[example.image]]
    known += known[:1] * (widest - len(known))
    return targets | {"string": torch.tensor([string(e) for e in example.expressions]),
                      "known": torch.tensor(known).expand(count, -1).contiguous()}


def string_number(text):
    """A signed 64-bit number of a string, the same for the same words in the same order."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def boxes_of(example):
    """(E,H,W) bool: the union of the boxes of each expression's objects, in whole pixels of the image."""
    dataset, frame = example.dataset, example.frame
    masks = np.zeros((len(example.expressions), frame.height, frame.width), bool)
    for mask, e in zip(masks, example.expressions):
        for x, y, w, h in dataset.boxes[dataset.objects_of[e]]:
            mask[max(0, round(y)):max(0, round(y + h)), max(0, round(x)):max(0, round(x + w))] = True
    return masks


class GatherRows(torch.autograd.Function):
    """Rows (R,D) of every rank -> (world,R,D) on every rank; the gradient of a row is the sum over the ranks' losses."""

    @staticmethod
    def forward(ctx, rows, ranks):
        ctx.rank = ranks.rank
        parts = [torch.empty_like(rows) for _ in range(ranks.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rank], None


def gather_texts(texts, string, text, ranks):
    """Each string of the global batch once: vectors (E,D), numbers (E,) and ids (E,W) of this rank -> (L,D), (L,), (L,W').

    The order is that of the ranks. Ranks may hold unlike numbers of texts; gradients reach every rank's vectors.
    """
    if ranks.world > 1:
        most = torch.tensor(text.shape, device=text.device)
        shapes = [torch.empty_like(most) for _ in range(ranks.world)]
        dist.all_gather(shapes, most)
        counts, (rows, width) = [int(shape[0]) for shape in shapes], torch.stack(shapes).amax(0).tolist()
        pad = rows - len(text)
        texts = GatherRows.apply(F.pad(texts, (0, 0, 0, pad)), ranks)
        whole = torch.cat([string[:, None], F.pad(text, (0, width - text.shape[1]))], 1)
        whole = GatherRows.apply(F.pad(whole, (0, 0, 0, pad)), ranks)
        texts, whole = (torch.cat([part[:count] for part, count in zip(parts, counts)]) for parts in (texts, whole))
        string, text = whole[:, 0], whole[:, 1:]
    keep = (string[:, None] == string[None]).int().argmax(1) == torch.arange(len(string), device=string.device)
    return texts[keep], string[keep], text[keep]


def document_weights(ids, size):
    """log(documents / documents that hold the piece): lists of ids -> (size,); 0 for pieces that none or all hold."""
    counts = torch.zeros(size)
    for document in ids:
        counts[list(set(document))] += 1
    return torch.where(counts > 0, (len(ids) / counts.clamp(min=1)).log(), torch.zeros(size))


def tfidf(text, idf):
    """Unit tf-idf vectors (L,V) of ids (L,W), 0 for those without a piece that tells: [CLS] and [SEP] stand in all."""
    bags = torch.zeros(len(text), len(idf), device=text.device).scatter_add_(1, text, torch.ones_like(text, dtype=idf.dtype))
    return F.normalize(bags * idf, dim=1)


def image_labels(out, targets, string, text, first, idf):
    """How true it is that each of the L texts is in each image: (B,L) in 0..1. idf None: equal strings only; Table 2c."""
    labels = (targets["known"][first][:, :, None] == string).any(1).float()
    if idf is not None:
        similar = tfidf(out["text"], idf) @ tfidf(text, idf).T                                 # (E, L)
        where = out["image_of"][:, None].expand_as(similar)
        nearest = torch.zeros_like(labels).scatter_reduce_(0, where, similar, "amax")
        labels = torch.maximum(labels, nearest.clamp(max=1))
    return labels


def loss_terms(out, targets, args, ranks, idf=None):
    """{name: scalar}: weak, the classification loss of Sec. 3.3, summed over this rank's images against the texts of all
    ranks; with --full or --pretrain, Eq. 9 summed over its expressions.
    """
    image_of, count = out["image_of"], len(out["patches"])
    first = torch.searchsorted(image_of, torch.arange(count, device=image_of.device))          # an expression of each image
    inside = targets["inside"]
    if args.full or args.pretrain:
        s = similarities(out["patches"], out["texts"], out["scale"])
        s = s[image_of, :, torch.arange(len(image_of), device=image_of.device)]                # (E, N)
        return {"dice": dice(s, targets["mask"], inside).sum()}
    texts, string, text = out["texts"], out["string"], out["text"]
    if string is None:
        texts, string, text = gather_texts(texts, targets["string"], text, ranks)
    z = pool(similarities(out["patches"], texts, out["scale"]), inside[first], args)           # (B, L)
    labels = image_labels(out, targets, string, text, first, idf)
    loss = F.binary_cross_entropy_with_logits(z, labels, reduction="sum")                      # L_cls
    return {"cls": loss / len(string) if args.reduction == "mean" else loss}


def dice(s, truth, inside, smooth=1.0):
    """Eq. 9 on pixels: scores s (E,N) of patches, truth (E,H,W), inside (E,N) -> (E,). `smooth` pixels keep it finite."""
    grid = math.isqrt(s.shape[1])
    prob = F.interpolate(s.unflatten(1, (1, grid, grid)), truth.shape[1:], mode="bilinear")[:, 0].sigmoid()
    prob = prob * F.interpolate(inside.float().unflatten(1, (1, grid, grid)), truth.shape[1:])[:, 0]
    overlap = (prob * truth).sum((1, 2))
    return 1 - (2 * overlap + smooth) / (prob.sum((1, 2)) + truth.sum((1, 2)) + smooth)


# ---- training -----------------------------------------------------------------------------------------------

def make_optimizer(args, model):
    """SGD or AdamW (Sec. 4.2); vectors and scalars do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, fused=True)


def learning_rate(args, step, steps, steps_per_epoch):
    """The rate of step 0 … steps-1, a pure function of the step: the poly rule of Sec. 4.2."""
    rise = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    return args.lr * rise * (1 - step / steps) ** 0.9


def train(args, ranks, folder, state, model, vocabulary, train_set, val_set, idf):
    """The loop, from `state` (a checkpoint, or None) to the last step. Leaves last.pt, prev.pt, best.pt and log.jsonl."""
    model = model.to(ranks.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, model)
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
                # of the whole step, on all ranks: the classification loss is an image's, Eq. 9 an expression's
                sentences = sum(len(key[2]) for key in keys) if args.full or args.pretrain else len(keys)
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
                        terms = loss_terms(out, batch.targets, args, ranks, idf)
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


def load_vocabulary(args):
    """The WordPiece vocabulary that --vocab names. Raises UserError."""
    own = Path(args.data_root) / args.dataset / "vocab.txt"
    path = own if args.vocab == "own" else Path(args.vocab)
    if not path.is_file():
        raise UserError(f"{path} does not exist: --vocab wants the vocab.txt that is published beside BERT's weights, or run on "
                        f"the embedded data with `--yaml {EMBEDDED_YAML}`.")
    return WordPiece(path)


def draw_images(dataset, fraction, seed):
    """The images of `dataset` that training sees: a share of those with expressions; a smaller share is part of a larger."""
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction} is no share: give a number above 0 and at most 1.")
    drawn = np.random.default_rng((seed, 2)).permutation(dataset.with_expressions)
    return np.sort(drawn[:max(1, round(fraction * len(drawn)))])


def class_texts(dataset):
    """The names of a corpus' classes as `TSEG.compare_with` takes them. Raises UserError where expressions say something else."""
    other = sorted(set(dataset.texts) - set(dataset.class_names))
    if other:
        raise UserError(f"--texts classes is for corpora whose expressions are names of classes; {dataset.name} has {other[0]!r}.")
    return (data.pad_text([dataset.encode(name) for name in dataset.class_names]),
            torch.tensor([string_number(name) for name in dataset.class_names]))


def begin(args, model, vocabulary):
    """Load what --init, --weights and --text-weights name; returns whether any of it saw RefCOCO's val or test images."""
    files = {"vision": args.weights, "language": args.text_weights}
    if args.init:
        files = {"language": args.text_weights} if args.init_part == "vision" else {}
    leaky = [start_from(model, vocabulary, args)] if args.init else []
    leaky += [load_weights(getattr(model, part), path, args.leaky_init)["leaky"] for part, path in files.items() if path != "none"]
    return any(leaky)


def start_from(model, vocabulary, args):
    """Load the weights of another run of this script, maybe of another --size; returns whether they saw RefCOCO's val or test
    images. Raises UserError where it has other words or another shape.
    """
    state = checkpoint.load(args.init)
    if state["script"] != Path(__file__).stem:
        raise UserError(f"--init {args.init} is no run of {Path(__file__).name}.")
    if args.init_part == "all" and state.get("vocabulary") != list(vocabulary):
        raise UserError(f"--init {args.init} has another vocabulary than --vocab; its ViT alone: --init-part vision.")
    weights, side = dict(state["model"]), args.size // args.patch
    weights["vision.pos_embed"] = resample_positions(weights["vision.pos_embed"], (side, side))
    if args.init_part == "vision":
        weights = model.state_dict() | {name: value for name, value in weights.items() if name.startswith("vision.")}
    checkpoint.load_model(model, {"model": weights}, args.init)
    return bool(state["args"]["leaky_init"])


# ---- main ---------------------------------------------------------------------------------------------------

def main(argv=None):
    """Prepare, train, then score best.pt on --eval-splits and write the report."""
    args = parse(get_parser(), argv, own_yaml=YAML, overlays={"full": FULL_YAML, "pretrain": FULL_YAML})
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

        vocabulary = load_vocabulary(args)
        val_set = data.RefDataset(data.split_path(args.data_root, args.dataset, "val"), *frontend(args, vocabulary))
        train_set = data.RefDataset(data.split_path(args.data_root, args.dataset, "train"), *frontend(args, vocabulary),
                                    None, args.flip, args.seed, partial(augment, scale=args.scale))
        train_set.targets = partial(make_targets, args=args, widest=max(map(len, train_set.of_image)))
        train_set.with_expressions = draw_images(train_set, args.fraction, args.seed)
        idf = None
        if args.labels == "tfidf":
            idf = document_weights([train_set.encode(text) for text in train_set.texts], len(vocabulary)).to(ranks.device)

        model = build_model(args, vocabulary)
        if args.texts == "classes":
            model.compare_with(*class_texts(train_set))
        args.leaky_init = state["args"]["leaky_init"] if state else begin(args, model, vocabulary)
        train(args, ranks, folder, state, model, vocabulary, train_set, val_set, idf)

        if not args.eval_splits:
            return
        from eval import main as evaluate_run  # the same program that a user runs afterwards
        evaluate_run(["--run", str(folder), "--split", *args.eval_splits, "--report", "--device", args.device,
                      "--batch-size", str(args.eval_batch_size), "--workers", str(args.workers)], ranks)
    finally:
        distributed.finish()


if __name__ == "__main__":
    run(main)
