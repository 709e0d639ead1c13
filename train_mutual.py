"""Mutual supervision of RES and REG (Huang, Li, Zhang, Liu, Zhang, Wang; arXiv 2211.07919).

Mask2Former's N queries are the objects. One head tells which of them a sentence means (RES), another says of one of them what
sets it off from the others (REG). The first then rewards the second for sentences that it can resolve, and the second
writes sentences for images that nobody described, from which the first learns once more.

    python train_mutual.py --yaml yaml/mutual_refshapes.yaml     embedded data, two CPU cores, nothing to download
    torchrun --nproc_per_node 8 train_mutual.py                  the paper's setting on RefCOCO, all stages
    python train_mutual.py --stage 2 --reuse RUN --reward unambiguity        Table 5 (a) on another run's step 1
    python train_mutual.py --dataset refcoco+ --stage 1 2 generate 3 rb --reuse RUN     RefCOCO+ on another run's proposals
    python train_mutual.py --dataset refcocog_google --max-words 30 --no-gsup --eval-splits val      RefCOCOg's REG (App. A)
    python train_mutual.py --dataset refcocog_umd --max-words 30 --eval-splits val test              and its RES

Stages, each in a folder of its own below the run's; a chain goes on from what is there:
  pretrain   the proposal extractor on COCO without RefCOCO's val and test images
  1          extractor and both heads, end to end
  2          disambiguation supervision of the generation head, everything else frozen: REG is reported here
  generate   sentences for the pool, the instances of COCO's images that nobody described
  3          as step 1, with those sentences besides: RES is reported here
  rb         a selection head of its own on step 1's frozen extractor, the listener of Rb-Acc

Where the paper is silent
  target     the proposal k of a sentence is the one that Mask2Former's matching gives its object (last layer, with class,
             among all objects of the image). In stages 2, generate, rb and in testing, where labels are not given, whole
             masks are matched and p(any class) stands for that of the class: of two proposals with one mask the heads learnt
             of the surer. Of more objects than proposals those left over teach no head and get no sentence.
  losses     L = L_mask2former + L_sel + L_gen, weights 1 (flags); L_sel is cross-entropy over the N proposals, the softmax of
             Eq. 5; L_gen the sum of Eq. 2 over a sentence's pieces. All N proposals take part, there is no score threshold.
             Mask2Former's mask losses are divided by the number of the step's objects, also of those that jitter crops away.
  clipping   Mask2Former's --clip 0.01 is the extractor's; the heads have --clip-heads, which is off.
  heads      as wide as Mask2Former: C = 256, 8 heads, 2048; post-norm, dropout 0.1. O is what the class and mask heads read.
  words      BERT's WordPiece, [CLS] and [SEP] as <bos> and <eos>, one embedding table for input and output.
  baseline   Eq. 4 as printed has none. We subtract the mean reward of the object's other hypotheses, which changes no
             expectation; `--baseline none` is Eq. 4. CIDEr is CIDEr-D in 0..10, its document frequencies those of the train refs.
  dropout    off in stage 2: the policy that is rewarded is the one that is used.
  E2E        without it the heads read O without a gradient, so that the extractor learns from its own loss alone.
  indicator  without it the generation head sees O_k alone (Sec. 3.2).
  pseudo     the weight acts on L_sel; the generation head does not read its own sentences again. Masks of the pool are real.
             Both losses are divided by their mean weight, or the pool's images would weaken them against L_mask2former.
             `--pseudo-filter random` keeps as many instances as the area would.
  step 3     "retrains the network": `--retrain-from pretrain` begins with the pre-trained extractor, as step 1 does, `1` with
             all of step 1. It visits real and generated sentences alike.
  images     the longer side is resized to --size and the shorter padded; from 512 pixels on objects' masks have half of that.
             Large-scale jitter in pretrain alone: sentences name places.
  lr         5e-4 is read as that of decoder and heads, the backbone and BERT have a tenth (Mask2Former's rule).
  REG        is scored at the end of a run against the corpus' own sentences; Tables 1, 3 and 5 merge those of RefCOCO and RefCOCO+
             (Sec. 4.1): `eval.py --task reg --refs merged`.
  best.pt    is chosen on val: by AP (pretrain), mIoU (1, 3, rb), CIDEr (1 without RES) or the reward of Eq. 6, with 1 or 0 for
             its softmax (2).
"""
import hashlib
import json
import math
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import captions, checkpoint, data, distributed, metrics, reg, runlog
from common.backbones import Small, load_weights, read_torch
from common.coco_ap import average_precision, jitter
from common.config import UserError, base_parser, parse, run, write_text
from common.language import Bert, beam_search
from common.layers import DecoderLayer, normalise
from common.mask2former import BACKBONES, Mask2Former, criterion, mask_costs, read_detectron_pkl
from common.matrix_nms import matrix_nms
from common.text import WordPiece

# ---- settings -----------------------------------------------------------------------------------------------

YAML = "yaml/mutual.yaml"
EMBEDDED_YAML = "yaml/mutual_refshapes.yaml"
make_vocabulary = WordPiece  # what a checkpoint's list of entries becomes again
STAGES = ("pretrain", "1", "2", "generate", "3", "rb")
# what eval.py takes, the best first
STAGE_OF_TASK = {"res": ("3", "1"), "rec": ("3", "1"), "reg": ("2", "1"), "listener": ("rb",)}
TRAINED = {"pretrain": ("extractor",), "1": ("extractor", "selector", "generator"), "2": ("generator",),
           "3": ("extractor", "selector", "generator"), "rb": ("selector",)}


def get_parser():
    """Every setting with its default, which is the paper's on RefCOCO."""
    parser = base_parser(__doc__)
    parser.set_defaults(epochs=1000, max_steps=90000, batch_size=8, lr=5e-4, clip=0.01, epoch_unit="ref", expressions_per_image=8,
                        eval_every=4)
    stages = parser.add_argument_group("stages")
    add = stages.add_argument
    add("--stage", nargs="+", choices=("all", *STAGES), default=["all"],
        help="some of the stages; what they begin with must be there")
    add("--reuse", default="", metavar="RUN", help="run whose stages stand in for those that this run does not have")
    add("--pretrain-steps", type=int, default=368750, help="Mask2Former's; --max-steps are those of steps 1 and 3")
    add("--pretrain-lr", type=float, default=1e-4, help="Mask2Former's; --lr is that of steps 1, 3 and rb")
    add("--pretrain-batch-size", type=int, default=16, help="Mask2Former's")
    add("--dsup-steps", type=int, default=20000, help="of stage 2; App. B")
    add("--dsup-lr", type=float, default=1e-6, help="of stage 2; App. B")
    add("--dsup-batch-size", type=int, default=4, help="of stage 2; App. B")
    add("--rb-steps", type=int, default=90000, help="of stage rb; silent, step 1's")
    add("--retrain-from", choices=("pretrain", "1"), default="pretrain", help="what step 3 begins with; silent")
    add("--coco", default="coco",
        help="folder below --data-root with train.json, val.json and pool.json of `python -m data_prep.coco`")
    add = parser.add_argument_group("input").add_argument
    add("--max-words", type=int, default=15,
        help="word pieces of a sentence, read or written: 15, RefCOCOg 30. 0: blind to the sentence, a control of RES")
    add("--vocab", default="data/weights/bert_vocab.txt",
        help="BERT's vocab.txt, or `own`: data/<dataset>/vocab.txt, which the embedded corpora have")
    add("--flip", type=float, default=0.0, help="probability of mirroring image and sentence (left <-> right) in 1, 3 and rb")
    add("--jitter", type=float, nargs=2, default=[0.1, 2.0], metavar=("LOW", "HIGH"),
        help="large-scale jitter of pretrain; Mask2Former's")
    add("--jitter-flip", type=float, default=0.5, help="probability of mirroring in pretrain; Mask2Former's")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--weights", default="data/weights/resnet101.pt",
        help="backbone's file that `python -m data_prep.weights` wrote, Microsoft's Swin `.pth`, or `none` to train from nothing")
    add("--official", default="", metavar="PKL",
        help="Mask2Former of Facebook's model zoo instead of stage pretrain; it has seen RefCOCO's val and test images, so it "
        "needs --leaky-init")
    add("--bert-weights", default="data/weights/bert_base.pt", help="BERT's file of data_prep.weights, or `none`")
    parser.switch(model, "leaky-init", False, "accept weights that saw RefCOCO's val or test images (marked in results)")
    add("--classes", type=int, default=80, help="object categories of --coco")
    add("--queries", type=int, default=100, help="N; Sec. 3.2")
    add("--dim", type=int, default=256, help="C; Mask2Former's")
    add("--heads", type=int, default=8, help="of all attention but BERT's; Mask2Former's")
    add("--ffn", type=int, default=2048, help="width of the decoders' feed-forward layers; Mask2Former's")
    add("--encoder-layers", type=int, default=6, help="deformable layers of the pixel decoder; Mask2Former's")
    add("--encoder-ffn", type=int, default=1024, help="their width")
    add("--decoder-layers", type=int, default=9, help="of the masked decoder; Mask2Former's")
    add("--head-layers", type=int, default=4, help="of the selection and of the generation head; Sec. 4.1")
    add("--dropout", type=float, default=0.1, help="in the heads and in BERT")
    add("--bert-layers", type=int, default=12, help="BERT-base, Sec. 4.1")
    add("--bert-dim", type=int, default=768, help="its width; its feed-forward layers are four times as wide")
    add("--bert-heads", type=int, default=12, help="of its attention")
    add("--points", type=int, default=12544, help="places where masks are compared in training; Mask2Former's")
    parser.switch(model, "checkpoint-encoder", False, "recompute the deformable layers in the backward pass: less memory")
    add("--beams", type=int, default=5, help="of the beam search in testing, and for the pool where --expressions are fewer")
    ablation = parser.add_argument_group("ablation (Tables 1, 3, 5 to 9, Fig. 5)")
    add = ablation.add_argument
    add("--input", choices=("mask", "box"), default="mask", help="box: the inside of its box is an object's mask; Table 1")
    add("--tasks", choices=("both", "res", "reg"), default="both",
        help="what steps 1 and 3 learn; both: `Joint` of Tables 3 and 6")
    parser.switch(ablation, "e2e", True, "the heads' losses reach the extractor; Tables 3 and 6")
    parser.switch(ablation, "indicator", True, "O + Z(k), Eq. 1; Table 3")
    parser.switch(ablation, "dsup", True, "stage 2 is part of the chain; Table 3")
    parser.switch(ablation, "gsup", True, "stages generate and 3 are part of the chain; Table 6")
    add("--reward", choices=("both", "unambiguity", "cider"), default="both", help="Eq. 6, its first or its second term; Table 5")
    add("--score", choices=("softmax", "sigmoid"), default="softmax", help="unambiguity over all proposals, or of one; Table 5")
    add("--tau", type=float, default=2.5, help="Eq. 6, of the softmax; 1: Eq. 5; Table 5")
    add("--alpha", type=float, default=4.0, help="Eq. 6")
    add("--hypotheses", type=int, default=5, help="q1 of Eq. 4; Sec. 4.1")
    add("--baseline", choices=("mean", "none"), default="mean", help="what is subtracted from a reward")
    add("--expressions", type=int, default=3, help="q2, sentences generated for each instance of the pool; Sec. 4.1")
    add("--min-area", type=float, default=1024.0,
        help="instances of the pool kept have a larger area, in pixels; Fig. 5: 0, 1024, 4096")
    add("--pseudo-filter", choices=("area", "random"), default="area", help="keep those, or as many at random; Fig. 5")
    add("--pseudo-weight", type=float, default=0.1,
        help="of generated sentences in L_sel; Table 7; 1: Fig. 5 without reweighting")
    add("--described", type=float, default=1.0,
        help="share of the train images whose sentences are used; the others join the pool, for corpora whose own is small")
    add("--size", type=int, default=1024, help="the longer side of the image, a multiple of 32; Table 8")
    add("--backbone", choices=tuple(BACKBONES), default="r101", help="Table 9: swin_b")
    loss = parser.add_argument_group("loss and schedule")
    add = loss.add_argument
    add("--m2f-weight", type=float, default=1.0, help="of Mask2Former's losses in steps 1 and 3")
    add("--class-weight", type=float, default=2.0, help="of the class among them, where each of the masks' two has 5, and in "
        "matching always 2; Mask2Former's")
    add("--sel-weight", type=float, default=1.0, help="of L_sel")
    add("--gen-weight", type=float, default=1.0, help="of L_gen, Eq. 2")
    add("--schedule", choices=("step", "cosine"), default="step",
        help="step: lr falls by 10 at each of --lr-drops; never in stage 2")
    add("--lr-drops", type=float, nargs="*", default=[0.6667, 0.8889], help="shares of the steps; App. B: 60k and 80k of 90k")
    add("--pretrain-lr-drops", type=float, nargs="*", default=[0.8889, 0.9630], help="of pretrain; Mask2Former's")
    add("--warmup", type=float, default=0.0, help="share of the steps in which lr rises from 0")
    add("--backbone-lr", type=float, default=0.1, help="the backbone's rate, as a share of lr; Mask2Former's")
    add("--bert-lr", type=float, default=0.1, help="BERT's, likewise")
    add("--weight-decay", type=float, default=0.05, help="App. B; none on norms and embeddings (Mask2Former)")
    add("--clip-heads", type=float, default=0.0,
        help="largest gradient norm of the two heads; --clip is the extractor's; 0: none")
    return parser


def frontend(args, vocabulary):
    """What stands between the files and the model: sentence -> ids, and the canvas that an image is laid on."""
    low, high = args.jitter
    for wrong, sentence in (
            (args.size % 32, f"--size {args.size} is not a multiple of 32, the backbone's coarsest stride."),
            (not 0 <= args.max_words <= 510, f"--max-words {args.max_words}: BERT reads 510 pieces between [CLS] and [SEP]."),
            (not 0 < low <= high <= 16, f"--jitter {low:g} {high:g} is no range of factors: 0 < LOW <= HIGH <= 16."),
            (args.hypotheses < 2 and args.baseline == "mean", "--hypotheses 1 needs --baseline none: there are no others."),
            (not 0 < args.described <= 1, f"--described {args.described:g} is no share: give a number above 0 and at most 1."),
            (args.tau <= 0, f"--tau {args.tau:g} divides the scores of Eq. 6: give a number above 0."),
            (min(args.beams, args.hypotheses, args.expressions, args.queries, args.points) < 1,
             "--beams, --hypotheses, --expressions, --queries and --points are at least 1.")):
        if wrong:
            raise UserError(sentence)
    return lambda text: vocabulary.encode(text, args.max_words), data.Canvas(args.size)


def of_stage(args, stage):
    """The settings of one stage: those of the call, with what the stage fixes (App. B)."""
    changed = {
        "pretrain": {"lr": args.pretrain_lr, "max_steps": args.pretrain_steps, "batch_size": args.pretrain_batch_size,
                     "flip": args.jitter_flip, "epoch_unit": "image", "lr_drops": args.pretrain_lr_drops},
        "2": {"lr": args.dsup_lr, "max_steps": args.dsup_steps, "batch_size": args.dsup_batch_size, "flip": 0.0,
              "epoch_unit": "ref", "schedule": "step", "lr_drops": [], "warmup": 0.0},
        "rb": {"max_steps": args.rb_steps}}.get(stage, {})
    return type(args)(**{**vars(args), **changed, "stage": [stage]})


# ---- model --------------------------------------------------------------------------------------------------
# Shapes: B images, E sentences or objects, R rows (hypotheses) of each, N proposals, T word pieces, C = --dim channels,
# masks (h,w) at a quarter of the canvas. `k` is the number of a proposal, -1 for none.

class Mutual(nn.Module):
    """Proposal extractor, proposal selection head (RES) and indicated generation head (REG)."""

    def __init__(self, args, vocabulary):
        super().__init__()
        if args.dim % 4 or args.dim % args.heads or args.bert_dim % args.bert_heads:
            raise UserError("--heads and 4 must divide --dim, and --bert-heads --bert-dim.")
        self.use, self.stage = args, args.stage[-1]
        backbone = Small(24, (1, 2, 3, 1)) if args.backbone == "small" else args.backbone  # as LTS' small one, and stride 32
        self.extractor = Mask2Former(backbone, args.classes, args.queries, args.dim, args.heads, args.encoder_layers,
                                     args.decoder_layers, args.encoder_ffn, args.ffn, args.checkpoint_encoder)
        self.selector = SelectionHead(args, len(vocabulary)) if args.tasks != "reg" else None
        self.generator = GenerationHead(args, vocabulary) if args.tasks != "res" else None
        for name, part in self.named_children():
            if name not in TRAINED.get(self.stage, ()):
                part.requires_grad_(False)

    def train(self, mode=True):
        """As ever, but what is frozen stays in evaluation mode, and in stage 2 all of it."""
        super().train(mode)
        for name, part in self.named_children():
            if name not in TRAINED.get(self.stage, ()) or self.stage == "2":
                part.train(False)
        return self

    def encode_image(self, images):
        """What no sentence changes, once per image: images (B,3,H,W) uint8 or float in 0..1 -> dict of `queries`, the proposals O
        (B,N,C), `masks`, their logits (B,N,h,w), and `classes` (B,N,K+1), the last one "no object"."""
        out = self.extractor(normalise(images, self.extractor.mean, self.extractor.std))
        return {"queries": out["queries"], "masks": out["pred_masks"], "classes": out["pred_logits"]}

    def forward(self, images, image_of, text, targets, masks_per_image=1.0, rewards=None):
        """What the stage's losses need: images (B,3,H,W), image_of (E,), text (E,L), targets of `make_targets`.

        masks_per_image: mean over the whole step, by which Mask2Former divides its mask losses. rewards: in stage 2, function
        (features, k (E,), E lists of hypotheses) -> their rewards. Returns a dict: `m2f` their sum, `scores` S (E,N), `k` (E,),
        `words` logits of those that the generation head has `read` (E,) bool, not the generated ones; in stage 2 `log_p` and
        `rewards` (E,R) with `valid`, and `shown`, sums for the log.
        """
        if self.stage == "2":
            return self.disambiguate(images, image_of, targets, rewards)
        if self.stage == "rb":
            with torch.no_grad():
                features = self.encode_image(images)
                k = self.locate_meant(features, image_of, targets)
            return {"scores": self.selector(features["queries"], image_of, text), "k": k}
        outputs = self.extractor(normalise(images, self.extractor.mean, self.extractor.std), aux=True)
        counts = targets["count"].tolist()
        scenes = [{"labels": labels, "masks": masks} for labels, masks in
                  zip(targets["labels"].split(counts), targets["masks"].split(counts))]
        losses = criterion(outputs, scenes, masks_per_image * len(images), (self.use.class_weight, 5.0, 5.0), points=self.use.points)
        out = {"m2f": losses["loss"] * len(images)}
        if self.stage == "pretrain":
            return out
        proposals = outputs["queries"] if self.use.e2e else outputs["queries"].detach()
        matched = torch.cat([labels.new_full((n,), -1).scatter(0, objects, queries) for (queries, objects), n, labels in
                             zip(losses["matches"], counts, targets["labels"].split(counts))])
        out["k"] = k = meant_proposals(matched, image_of, targets)
        if self.selector is not None:
            out["scores"] = self.selector(proposals, image_of, text)
        if self.generator is not None:
            out["read"] = read = ~targets["generated"]
            read[0] |= ~read.any()  # DDP asks for every parameter's gradient; `loss_terms` gives this one no weight
            out["words"] = self.generator(proposals, image_of[read], k[read].clamp(min=0), text[read, None, :-1]).squeeze(1)
        return out

    def disambiguate(self, images, image_of, targets, rewards):
        """Stage 2: q1 hypotheses for each object by beam search, their rewards, and their log p with its gradient."""
        with torch.no_grad():
            features = self.encode_image(images)
            k = self.locate_meant(features, image_of, targets)
            found = self.describe(features, image_of, k, self.use.hypotheses, hypotheses=self.use.hypotheses)
            ids, valid = self.generator.rows(found, self.use.hypotheses, k.device)               # (E, R, T+1), (E, R)
            values, shown = rewards(features, image_of, k, found)
        log_p = self.generator.log_p(features["queries"], image_of, k.clamp(min=0), ids)
        return {"log_p": log_p, "rewards": values, "valid": valid, "shown": shown}

    def select(self, features, image_of, text):
        """S of Eq. 3: features from `encode_image`, image_of (E,), text (E,L) -> logits (E,N) over the image's proposals."""
        if self.selector is None:
            raise UserError("this model was trained with --tasks reg and selects nothing.")
        return self.selector(features["queries"], image_of, text)

    def segment(self, features, image_of, text, targets=None):
        """The mask of the proposal with the largest S: prob (E,H,W) on the canvas, its threshold, `score` (E,), the softmax of S
        there, `proposals` (E,N), that of all, and the heat map `S`, each proposal's mask at its share of the softmax."""
        share = self.select(features, image_of, text).float().softmax(-1)                         # (E, N)
        best = share.argmax(-1)
        masks = features["masks"].float()
        heat = masks.new_zeros(len(share), *masks.shape[2:])
        for b in image_of.unique().tolist():
            heat[image_of == b] = torch.tensordot(share[image_of == b], masks[b].sigmoid(), 1)
        return {"prob": upsample(masks[image_of, best]).sigmoid(), "threshold": 0.5, "heat": {"S": heat},
                "score": share.gather(1, best[:, None]).squeeze(1), "proposals": share}

    @torch.no_grad()
    def locate(self, features, image_of, masks):
        """The proposals k (K,) of objects: their masks (K,H,W) bool on the canvas, at any stride, and images image_of (K,).

        Bipartite matching (Sec. 3.2) among an image's objects, which are given together, by Mask2Former's mask costs on
        whole masks and by p(any class) in place of p(its class); -1 where an image has more objects than proposals.
        """
        k = torch.full((len(masks),), -1, device=image_of.device)
        masks = filled_boxes(masks) if self.use.input == "box" else masks
        if len(masks):
            truth = F.interpolate(masks[None].float(), features["masks"].shape[-2:], mode="area")[0].flatten(1)    # (K, hw)
        for b in image_of.unique().tolist():
            own = torch.nonzero(image_of == b).squeeze(1)
            bce, dice = mask_costs(features["masks"][b].float().flatten(1), truth[own])
            nothing = features["classes"][b].float().softmax(-1)[:, -1:]
            cost = torch.nan_to_num(2 * nothing + 5 * bce + 5 * dice, 1e9, 1e9, 1e9)
            queries, found = linear_sum_assignment(cost.cpu().numpy())
            k[own[torch.as_tensor(found, device=k.device)]] = torch.as_tensor(queries, device=k.device)
        return k

    def locate_meant(self, features, image_of, targets):
        """`locate` for the objects of a batch's targets, then the proposal k (E,) of what each of its sentences means."""
        return meant_proposals(self.locate(features, objects_image(targets), targets["masks"]), image_of, targets)

    @torch.no_grad()
    def describe(self, features, image_of, k, beams=None, max_length=None, hypotheses=1):
        """Sentences for the proposals k (K,) of images image_of (K,): K lists of (ids, log p), the best first.

        Beam search with `beams` (default --beams) live sentences of at most `max_length` (default --max-words) pieces; ids are
        without [CLS] and [SEP]. k = -1, an object that no proposal stands for, gives the empty sentence with log p of -inf.
        """
        if self.generator is None:
            raise UserError("this model was trained with --tasks res and describes nothing.")
        beams, max_length = max(beams or self.use.beams, hypotheses), max_length or max(1, self.use.max_words)
        if max_length > self.generator.longest:
            raise UserError(f"sentences of {max_length} word pieces are asked for; this model writes {self.generator.longest}.")
        known = k >= 0
        found = iter(self.generator.search(features["queries"], image_of[known], k[known], beams, max_length))
        return [next(found)[:hypotheses] if there else [([], -math.inf)] for there in known.tolist()]

    @torch.no_grad()
    def propose(self, features, min_score=0.5):
        """The instances found in each image, the surest first: [(index (P,), score (P,), prob (P,H,W) on the canvas)].

        A score is Mask2Former's, p(class) times the mask's mean probability, decayed by Matrix NMS where a surer proposal
        covers the same place.
        """
        found = []
        for classes, masks in zip(features["classes"].float().softmax(-1)[..., :-1], features["masks"].float()):
            inside, prob = masks > 0, masks.sigmoid()
            mean = (prob * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
            score = matrix_nms(inside, classes.amax(-1) * mean)
            order = score.argsort(descending=True)
            order = order[score[order] >= min_score]
            found.append((order, score[order], upsample(masks[order]).sigmoid()))
        return found


def upsample(logits):
    """Mask logits (E,h,w) at a quarter of the canvas -> (E,4h,4w): Mask2Former interpolates before the sigmoid."""
    return F.interpolate(logits[:, None], scale_factor=4, mode="bilinear", align_corners=False).squeeze(1)


def filled_boxes(masks):
    """The inside of the boxes round masks (K,H,W) bool, as masks."""
    rows, columns = (line.cumsum(1).bool() & line.flip(1).cumsum(1).flip(1).bool() for line in (masks.any(2), masks.any(1)))
    return rows[:, :, None] & columns[:, None]


def objects_image(targets):
    """The image of each object in a batch's targets, (n,)."""
    count = targets["count"]
    return torch.repeat_interleave(torch.arange(len(count), device=count.device), count)


def meant_proposals(located, image_of, targets):
    """The proposal (E,) of each sentence's object: located (n,) those of all objects of the batch, or -1."""
    count, meant = targets["count"], targets["meant"]
    place = meant + (count.cumsum(0) - count)[image_of]
    padded = torch.cat([located, located.new_full((1,), -1)])
    return padded[torch.where(meant >= 0, place, len(located))]


def decoder(args):
    """The layers of a head."""
    return nn.ModuleList(DecoderLayer(args.dim, args.heads, args.ffn, args.dropout) for _ in range(args.head_layers))


class SelectionHead(nn.Module):
    """Eq. 3: proposals attend to each other and to BERT's words; S is read from each."""

    def __init__(self, args, vocabulary_size):
        super().__init__()
        self.bert = Bert(args.bert_layers, args.bert_dim, args.bert_heads, 4 * args.bert_dim, vocabulary_size,
                         dropout=args.dropout)
        self.project = nn.Sequential(nn.Linear(args.bert_dim, args.dim), nn.LayerNorm(args.dim))
        self.layers = decoder(args)
        self.score = nn.Sequential(nn.Linear(args.dim, args.dim), nn.ReLU(), nn.Linear(args.dim, args.dim), nn.ReLU(),
                                   nn.Linear(args.dim, 1))

    def forward(self, proposals, image_of, text):
        """proposals O (B,N,C), image_of (E,), text (E,L) ids -> S (E,N)."""
        known = text != 0
        words = self.project(self.bert(text, known))                                             # F_Y, (E, L, C)
        seen = known[:, None, None]
        x = proposals
        for i, layer in enumerate(self.layers):
            x = layer.among(x, layer.own.keys(x))
            x = x.index_select(0, image_of) if i == 0 else x  # up to here no sentence had a part in it: once per image
            x = layer.ask(x, layer.cross.keys(words), seen)
        return self.score(x).squeeze(-1)


class GenerationHead(nn.Module):
    """Eq. 1-2: a causal decoder over words that asks the indicated objects O + Z(k)."""

    def __init__(self, args, vocabulary):
        super().__init__()
        self.use, self.start, self.end = args, vocabulary.cls_id, vocabulary.sep_id
        banned = torch.zeros(len(vocabulary), dtype=torch.bool)
        banned[[vocabulary.pad_id, vocabulary.cls_id, vocabulary.unk_id, vocabulary.mask_id]] = True
        self.register_buffer("banned", banned, persistent=False)
        self.words = nn.Embedding(len(vocabulary), args.dim, padding_idx=0)  # of input and output
        self.longest = max(args.max_words, 30)  # word pieces of a sentence
        self.places = nn.Embedding(self.longest + 1, args.dim)
        self.bias = nn.Parameter(torch.zeros(len(vocabulary)))
        self.norm, self.dropout, self.layers = nn.LayerNorm(args.dim), nn.Dropout(args.dropout), decoder(args)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        if args.indicator:
            self.positive, self.negative = (nn.Parameter(torch.randn(args.dim)) for _ in range(2))  # I_pos, I_neg

    def memory(self, proposals, image_of, k):
        """Keys and values of O + Z(k) for every layer: O (B,N,C), image_of (E,), k (E,) -> [2 x (E,heads,N,C/heads)].

        Those of O + I_neg are projected once per image; in each object's copy row k is replaced by that of O_k + I_pos.
        """
        chosen = proposals[image_of, k][:, None]                                                  # O_k, (E, 1, C)
        if not self.use.indicator:
            return [layer.cross.keys(chosen) for layer in self.layers]
        out = []
        for layer in self.layers:
            others, own = layer.cross.keys(proposals + self.negative), layer.cross.keys(chosen + self.positive)
            out.append([other.index_select(0, image_of).scatter(2, k[:, None, None, None].expand_as(one), one)
                        for other, one in zip(others, own)])
        return out

    def decode(self, ids, place, memory, caches=None):
        """ids (E,R,T), the first of them at position `place` -> logits (E,R,T,V) of the pieces that follow.

        The R rows of an object share its memory. caches: a dict for each layer, which holds the keys of what came before and
        takes in the new ones.
        """
        rows, length = ids.shape[1:]
        x = self.dropout(self.norm(self.words(ids) + self.places.weight[place:place + length])).flatten(0, 1)   # (ER, T, C)
        for layer, keys, cache in zip(self.layers, memory, caches or [None] * len(self.layers)):
            own = layer.own.keys(x)
            if cache:
                own = tuple(torch.cat([old, new], 2) for old, new in zip(cache["keys"], own))
            if cache is not None:
                cache["keys"] = own
            total = own[0].shape[2]
            seen = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
            x = layer.among(x, own, seen)
            x = layer.ask(x.unflatten(0, (-1, rows)).flatten(1, 2), keys).unflatten(1, (rows, -1)).flatten(0, 1)
        return F.linear(x, self.words.weight, self.bias).unflatten(0, (-1, rows))

    def forward(self, proposals, image_of, k, ids):
        """Teacher forcing: proposals (B,N,C), image_of (E,), k (E,), ids (E,R,T) beginning with [CLS] -> logits (E,R,T,V)."""
        return self.decode(ids, 0, self.memory(proposals, image_of, k))

    def log_p(self, proposals, image_of, k, ids):
        """log p of whole sentences ids (E,R,T+1), [CLS] … [SEP] and padding: the sum over their pieces, (E,R)."""
        logits = self(proposals, image_of, k, ids[..., :-1]).float()
        return -F.cross_entropy(logits.movedim(-1, 1), ids[..., 1:], ignore_index=0, reduction="none").sum(-1)

    def rows(self, found, count, device):
        """Hypotheses as `describe` gives them -> ids (E,count,T+1) between [CLS] and [SEP], and which are there, (E,count)."""
        longest = max((len(ids) for hypotheses in found for ids, _ in hypotheses), default=0)
        out = torch.zeros(len(found), count, longest + 2, dtype=torch.int64)
        valid = torch.zeros(len(found), count, dtype=torch.bool)
        for e, hypotheses in enumerate(found):
            for r, (ids, log_p) in enumerate(hypotheses):
                out[e, r, :len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
                valid[e, r] = log_p > -math.inf
        return out.to(device), valid.to(device)

    @torch.no_grad()
    def search(self, proposals, image_of, k, beams, max_length):
        """Beam search for all objects at once, each step on the keys that the earlier ones left: `beam_search`'s lists."""
        if not len(k):
            return []
        memory, caches = self.memory(proposals, image_of, k), [{} for _ in self.layers]

        def follow(pieces, length, parents):
            for cache in caches if length else ():
                cache["keys"] = tuple(keys.index_select(0, parents) for keys in cache["keys"])
            return self.decode(pieces[..., None], length, memory, caches)[:, :, -1]
        return beam_search(follow, len(k), self.start, self.end, self.banned, beams, max_length)


def build_model(args, vocabulary):
    """The network with fresh weights; it reads no file."""
    return Mutual(args, vocabulary)


# ---- targets and losses -------------------------------------------------------------------------------------

def make_targets(example, box, stride):
    """In a loader worker: an image's objects and what its sentences mean. Crowds and objects outside the canvas are left out.

    masks (n,H/stride,W/stride) bool, labels (n,) classes, object (n,) positions in the dataset, count (1,) = n; for the E
    sentences meant (E,), the place of the object among these or -1, and generated (E,) bool.
    """
    dataset, expressions = example.dataset, example.expressions
    own = np.flatnonzero(dataset.object_image == example.image)
    own = np.array([i for i in own.tolist() if dataset.rles[i] is not None and not dataset.crowds[i]], np.int64)
    width, height = dataset.sizes[example.image]
    masks = np.stack([dataset.object_mask(i) for i in own]) if len(own) else np.zeros((0, height, width), bool)
    shares = example.frame.masks_in(masks, stride)                                               # (n, H/stride, W/stride)
    most = shares.flatten(1).amax(1) if len(own) else shares.new_zeros(0)
    kept = most > 0
    inside = shares[kept] >= most[kept, None, None].clamp(max=0.5)  # a sliver below half a pixel is still there
    own = own[kept.numpy()]
    place = {i: n for n, i in enumerate(own.tolist())}
    named = [dataset.objects_of[e] for e in expressions.tolist()]
    meant = [place.get(objects[0], -1) if len(objects) == 1 else -1 for objects in named]
    return {"masks": filled_boxes(inside) if box else inside, "labels": torch.from_numpy(dataset.labels[own]),
            "object": torch.from_numpy(own), "count": torch.tensor([len(own)]), "meant": torch.tensor(meant),
            "generated": torch.tensor([dataset.sources[e] == "generated" for e in expressions.tolist()])}


def targets_of(args):
    """`make_targets` as the settings have it; proposals' masks have a quarter of the canvas, so half of a large one is enough."""
    return partial(make_targets, box=args.input == "box", stride=2 if args.size >= 512 else 1)


def loss_terms(out, targets, text, args):
    """Weighted loss terms: `m2f` summed over the images, the others over the sentences: {name: scalar}. Eq. 2-4."""
    if "log_p" in out:
        return {"rl": policy_loss(out["log_p"], out["rewards"], out["valid"], args.baseline)}
    terms = {"m2f": (args.m2f_weight if args.stage != ["pretrain"] else 1.0) * out["m2f"]} if "m2f" in out else {}
    if "scores" in out:
        loss = F.cross_entropy(out["scores"].float(), out["k"], ignore_index=-1, reduction="none")
        terms["sel"] = args.sel_weight * (loss * torch.where(targets["generated"], args.pseudo_weight, 1.0)).sum()
    if "words" in out:
        read, real = out["read"], (out["k"] >= 0) & ~targets["generated"]
        loss = F.cross_entropy(out["words"].float().transpose(1, 2), text[read, 1:], ignore_index=0, reduction="none")
        terms["gen"] = args.gen_weight * (loss.sum(1) * real[read]).sum()                         # Eq. 2
    return terms


def shown_terms(out):
    """What the log shows beside the losses, summed over the sentences: how often S is right, or the rewards."""
    if "scores" in out:
        return {"right": (out["scores"].argmax(-1) == out["k"]).float().sum()}
    return out.get("shown", {})


def policy_loss(log_p, rewards, valid, baseline):
    """Eq. 4 as a loss: -r log p, the mean over an object's hypotheses, summed over the objects. All (E,R).

    baseline `mean`: r is taken against the mean reward of the other hypotheses; an only one then teaches nothing.
    """
    valid = valid.float()
    count = valid.sum(1, keepdim=True)
    rewards = rewards * valid
    if baseline == "mean":
        others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
        rewards = torch.where(count > 1, rewards - others, 0.0)
    return -(rewards * log_p * valid / count.clamp(min=1)).sum()


def unambiguity(scores, k, score, tau):
    """The first term of Eq. 6 without alpha: logits S (M,N) and k (M,) -> (M,) in 0..1; tau = 1 is Eq. 5.

    score `sigmoid` looks at S_k alone, as JointSLR does (Table 5 c).
    """
    scores = scores.float()
    prob = scores.sigmoid() if score == "sigmoid" else (scores / tau).softmax(-1)
    return prob.gather(1, k.clamp(min=0)[:, None]).squeeze(1)


@torch.no_grad()
def reward(features, image_of, k, found, args, model, vocabulary, references, df):
    """r(Y, k) of Eq. 6 for hypotheses `found`: E lists of (ids, log p); references: E lists of token lists.

    Returns (E, --hypotheses), 0 where a hypothesis is missing, and the sums over E of the best one's two terms.
    """
    device = k.device
    place = [(e, r) for e, hypotheses in enumerate(found) for r in range(len(hypotheses))]
    rows, columns = (torch.tensor(side, device=device) for side in zip(*place))
    texts = [vocabulary.decode(found[e][r][0]) for e, r in place]
    terms = torch.zeros(2, len(found), args.hypotheses, device=device)
    if args.reward != "cider":
        text = data.pad_text([vocabulary.encode(text, args.max_words) for text in texts]).to(device)
        scores = model.select(features, image_of[rows], text)
        terms[0, rows, columns] = args.alpha * unambiguity(scores, k[rows], args.score, args.tau)
    if args.reward != "unambiguity":
        cider = captions.cider_d([captions.tokenize(text) for text in texts], [references[e] for e, _ in place], df)
        terms[1, rows, columns] = torch.tensor(cider, dtype=torch.float32, device=device)
    terms[:, k < 0] = 0  # nothing was said of them
    return terms.sum(0), {"unambiguity": terms[0, :, 0].sum(), "CIDEr": terms[1, :, 0].sum()}


# ---- corpora ------------------------------------------------------------------------------------------------

def labelled(dataset, classes):
    """Give `dataset` the classes 0 … K-1 of its objects, `labels`, and how many an image has, `objects_in`.

    Classes are in the order of category ids. Raises UserError where K is not `classes`.
    """
    known = {category["id"]: i for i, category in enumerate(sorted(dataset.meta["categories"], key=lambda c: c["id"]))}
    missing = set(dataset.categories.tolist()) - known.keys()
    if len(known) != classes or missing:
        other = f" and objects of the unknown {min(missing)}" if missing else ""
        raise UserError(f"{dataset.path} has {len(known)} categories{other}; --classes is {classes}, the number of --coco's.")
    dataset.labels = np.array([known[i] for i in dataset.categories.tolist()], np.int64)
    whole = np.array([rle is not None for rle in dataset.rles], bool) & ~dataset.crowds
    dataset.objects_in = np.bincount(dataset.object_image[whole], minlength=len(dataset.image_ids))
    return dataset


def blank_sentences(images):
    """One empty sentence that means nothing for each of the prepared images, so that those without any are visited."""
    return [{"id": image["id"], "ref_id": image["id"], "image_id": image["id"], "object_ids": [], "text": ""} for image in images]


def wordless(path):
    """The prepared corpus in `path` with empty sentences alone."""
    prepared = data.load_prepared(path)
    return prepared | {"expressions": blank_sentences(prepared.get("images", []))}


def described(args, expressions):
    """Of the train split's sentences those that are used: of a share --described of its images, drawn by --seed."""
    images = np.unique([expression["image_id"] for expression in expressions])
    drawn = np.random.default_rng((args.seed, 2)).permutation(images)[:max(1, round(args.described * len(images)))]
    kept = set(drawn.tolist())
    return [expression for expression in expressions if expression["image_id"] in kept]


def with_pool(args, sentences):
    """The train split and the pool as one RefDataset; `sentences`: prepared (train, pool) -> its sentences."""
    paths = data.split_path(args.data_root, args.dataset, "train"), Path(args.data_root) / args.coco / "pool.json"
    parts = [data.load_prepared(path) for path in paths]
    merged = {"meta": parts[0]["meta"], **{key: [*parts[0][key], *parts[1][key]] for key in ("images", "objects")}}
    dataset = data.RefDataset(paths[0], None, None, prepared=merged | {"expressions": sentences(*parts)})
    roots = [(path.parent / part["meta"]["image_root"]).absolute() for path, part in zip(paths, parts) for _ in part["images"]]
    dataset.file_names = [str(root / name) for root, name in zip(roots, dataset.file_names)]
    return dataset


def undescribed(train, pool, args):
    """Empty sentences for the images that nobody described: the pool's, and those that --described leaves out."""
    kept = {expression["image_id"] for expression in described(args, train["expressions"])}
    hidden = {expression["image_id"] for expression in train["expressions"]} - kept
    images = [image for image in train["images"] if image["id"] in hidden] + pool["images"]
    if not images:
        raise UserError(f"the pool of --coco {args.coco} has no image and --described 1 leaves none over: there is nothing to "
                        "describe; go without --gsup, or lower --described.")
    return blank_sentences(images)


def real_and_generated(train, pool, generated, args):
    """D_real and the filtered D_gen. generated: {object id: texts}; kept are objects of more than --min-area pixels, or as many
    at random. Raises UserError for objects that are not there."""
    objects = {o["id"]: o for o in [*train["objects"], *pool["objects"]]}
    unknown = next((i for i in generated if i not in objects), None)
    if unknown is not None:
        raise UserError(f"object {unknown} was described and is not there; were the corpora made again? Run --stage generate anew.")
    kept = sorted(i for i in generated if objects[i]["area"] > args.min_area)
    if args.pseudo_filter == "random":
        kept = sorted(np.random.default_rng((args.seed, 3)).choice(sorted(generated), len(kept), replace=False).tolist())
    free, ref = (1 + max(expression[key] for expression in train["expressions"]) for key in ("id", "ref_id"))
    said = [(ref + n, i, text) for n, i in enumerate(kept) for text in generated[i]]
    return described(args, train["expressions"]) + [
        {"id": free + n, "ref_id": ref_id, "image_id": objects[i]["image_id"], "object_ids": [i], "text": text,
         "source": "generated"} for n, (ref_id, i, text) in enumerate(said)]


def read_shards(folder):
    """The lines of all `rank*.jsonl`, one for each image; what a kill cut short is left out."""
    lines = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                lines.setdefault(int(line["image"]), line)
            except (ValueError, KeyError, TypeError):
                continue
    return list(lines.values())


def check_corpus(dataset):
    """Refuse sentences that do not mean one object with a mask. Raises UserError."""
    for e, objects in enumerate(dataset.objects_of):
        if len(objects) != 1 or dataset.rles[objects[0]] is None:
            raise UserError(f"{dataset.path}: the sentence {dataset.texts[e]!r} means {len(objects)} objects"
                            f"{' without a mask' if len(objects) == 1 else ''}; this method selects and describes one.")


def stage_data(args, vocabulary, origin):
    """(train, val) of a stage, ready for the loop; those of pretrain are --coco's."""
    encode, canvas = frontend(args, vocabulary)
    stage = args.stage[-1]
    corpus = args.coco if stage == "pretrain" else args.dataset
    train_path, val_path = (data.split_path(args.data_root, corpus, split) for split in ("train", "val"))
    seen = {"encode": encode, "canvas": canvas, "targets": targets_of(args), "seed": args.seed, "flip": args.flip}
    if stage == "pretrain":
        train_set, val_set = (data.RefDataset(path, encode, canvas, prepared=wordless(path)) for path in (train_path, val_path))
        seen["augment"] = partial(jitter, low=args.jitter[0], high=args.jitter[1])
    else:
        if stage == "3":
            generated = {of_one["object"]: [said["text"] for said in of_one["sentences"]]
                         for line in read_shards(origin["generate"].parent) for of_one in line["objects"]}
            train_set = with_pool(args, partial(real_and_generated, generated=generated, args=args))
        else:
            prepared = data.load_prepared(train_path)
            if stage != "rb" and args.described < 1:  # the listener measures, so it may hear all
                prepared["expressions"] = described(args, prepared["expressions"])
            train_set = data.RefDataset(train_path, encode, canvas, prepared=prepared)
        check_corpus(train_set)
        val_set = data.RefDataset(val_path, encode, canvas)
    return labelled(train_set.view(**seen), args.classes), labelled(val_set, args.classes)


# ---- generation supervision ---------------------------------------------------------------------------------

def made_with(args, checkpoint):
    """What the pool's sentences depend on, kept beside them as made.json; checkpoint: the describer's digest."""
    own = ("dataset", "coco", "expressions", "max_words", "size", "input", "described", "seed")
    return {"checkpoint": checkpoint, "beams": max(args.beams, args.expressions), **{name: getattr(args, name) for name in own}}


def check_sentences(folder, made):
    """Refuse sentences in `folder` that were made with something else than `made`. Raises UserError."""
    known = folder / "made.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    changed = [f"{name} {before[name]!s:.12} instead of {value!s:.12}" for name, value in made.items()
               if before.get(name, value) != value]
    if changed:
        raise UserError(f"{folder} holds sentences made with {', '.join(changed)}; remove it and run --stage generate again.")


def generate(args, ranks, folder, model, vocabulary, made):
    """Write --expressions sentences for every instance of the pool, a JSON line an image, into <run>/generate/rank<r>.jsonl.

    What any number of ranks wrote before is kept; made: `made_with`, written beside it.
    """
    encode, canvas = frontend(args, vocabulary)
    pool = with_pool(args, partial(undescribed, args=args)).view(encode=encode, canvas=canvas, targets=targets_of(args))
    pool = labelled(pool, args.classes)
    written = {line["image"] for line in read_shards(folder)}
    distributed.barrier(ranks)
    if ranks.main:
        write_text(folder / "made.json", json.dumps(made))
    left = [[key for key in keys if int(pool.image_ids[key[1]]) not in written]
            for keys in data.plan_evaluation(pool, args.eval_batch_size)]
    mine = distributed.deal(ranks, [keys for keys in left if keys])
    model.eval()
    with open(folder / f"rank{ranks.rank}.jsonl", "a", encoding="utf-8") as file, torch.inference_mode():
        file.write("\n")  # what a kill cut short ends here
        for batch in tqdm(data.load(pool, mine, args.workers, pin=ranks.device.type == "cuda"), total=len(mine), unit="batch",
                          desc="generate", disable=None if ranks.main else True):
            batch = batch.to(ranks.device)
            with metrics.autocast(ranks.device, args.amp):
                features = model.encode_image(batch.images)
                image_of = objects_image(batch.targets)
                k = model.locate(features, image_of, batch.targets["masks"])
                found = model.describe(features, image_of, k, hypotheses=args.expressions)
            lines = [{"image": int(pool.image_ids[pool.expression_image[e]]), "objects": []} for e in batch.index.tolist()]
            for b, i, hypotheses in zip(image_of.tolist(), batch.targets["object"].tolist(), found):
                said = [{"text": vocabulary.decode(ids), "log_p": round(log_p, 4)} for ids, log_p in hypotheses if ids]
                lines[b]["objects"] += [{"object": int(pool.object_ids[i]), "sentences": said}] if said else []
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
    distributed.barrier(ranks)
    if ranks.main:
        lines = read_shards(folder)
        objects = [o for line in lines for o in line["objects"]]
        counts = {"images": len(lines), "objects": len(objects), "sentences": sum(len(o["sentences"]) for o in objects)}
        write_text(folder / "done.json", json.dumps(made | counts, indent=1))
        print(f"{counts['sentences']} sentences about {counts['objects']} instances of {counts['images']} images", flush=True)
        for of_one in objects[:1]:
            print("for example: " + ", ".join(repr(said["text"]) for said in of_one["sentences"]), flush=True)
    distributed.barrier(ranks)


# ---- validation ---------------------------------------------------------------------------------------------

def measure_of(args):
    """What chooses a stage's best.pt on val."""
    res = "CIDEr" if args.tasks == "reg" else "mIoU"
    return {"pretrain": "AP", "1": res, "2": "reward", "3": "mIoU", "rb": "mIoU"}[args.stage[-1]]


def validate(args, ranks, model, vocabulary, val_set):
    """{score: value} of a stage on val: AP; or mIoU, oIoU, CIDEr, `found` (percent of the generated sentences by which the model
    itself selects their object) and `reward`, Eq. 6 with `found` for its softmax."""
    stage, scores = args.stage[-1], {}
    if stage == "pretrain":
        return {"AP": average_precision(model, val_set, ranks, args.eval_batch_size, args.workers, args.amp,
                                        filled_boxes if args.input == "box" else None)}
    if args.tasks != "reg" and stage != "2":
        rows, _ = metrics.evaluate(model, val_set, ranks, args.eval_batch_size, args.workers, args.amp)
        scores |= {key: metrics.summarise(rows, val_set)[key] for key in ("mIoU", "oIoU")}
    if args.tasks != "res" and stage != "rb":
        listener = (model, val_set.encode) if args.tasks == "both" else None
        rows, _ = reg.evaluate(model, val_set, vocabulary.decode, ranks, args.eval_batch_size, args.workers, args.amp,
                               listener)
        summary = reg.summarise(rows, val_set, reg.references(val_set), meteor=False)
        scores["CIDEr"] = summary["CIDEr"]
        if listener:
            scores["found"] = summary["Rb-Acc"]
            scores["reward"] = (args.reward != "cider") * args.alpha * scores["found"] / 100 \
                + (args.reward != "unambiguity") * scores["CIDEr"]
    return scores


# ---- training -----------------------------------------------------------------------------------------------

def learning_rate(args, step, steps):
    """The rate of step 0 … steps-1, a pure function of the step."""
    warmup = round(args.warmup * steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if args.schedule == "cosine":
        done = max(0, step - warmup) / max(1, steps - warmup)
        return args.lr * rise * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * rise * 0.1 ** sum(step >= share * steps for share in args.lr_drops)        # App. B


NO_DECAY = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
NO_DECAY_NAMES = ("positive", "negative", "relative_position_bias_table")


def parameter_groups(args, model):
    """What is trained, by its share of the rate and its decay: less of both for what is pre-trained, or a norm or embedding."""
    groups, shares = {}, {"extractor.backbone": args.backbone_lr, "selector.bert": args.bert_lr}
    for prefix, module in model.named_modules():
        share = shares.get(".".join(prefix.split(".")[:2]), 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            decay = 0.0 if isinstance(module, NO_DECAY) or name in NO_DECAY_NAMES else args.weight_decay
            if parameter.requires_grad:
                groups.setdefault((share, decay), []).append(parameter)
    return [{"params": group, "share": share, "weight_decay": decay} for (share, decay), group in groups.items()]


def mean_weights(args, dataset, batches):
    """What a sentence of an epoch's batches weighs in L_sel and L_gen on average; below 1 where some are generated."""
    generated = float(np.mean([dataset.sources[e] == "generated" for keys in batches for key in keys for e in key[2]]))
    return {"sel": 1 - generated * (1 - args.pseudo_weight), "gen": 1 - generated}


def clip_gradients(args, model):
    """Clip the extractor's gradient to --clip and the heads' to --clip-heads; returns the norm of both before that."""
    parts = ((args.clip, (model.extractor,)), (args.clip_heads, (model.selector, model.generator)))
    norms = [nn.utils.clip_grad_norm_([p for part in of if part is not None for p in part.parameters() if p.grad is not None],
                                      limit or float("inf")) for limit, of in parts]
    return math.hypot(*map(float, norms))


def train(args, ranks, folder, state, model, vocabulary, train_set, val_set, begun):
    """The loop, from `state` (a checkpoint, or None) to the last step. Leaves last.pt, prev.pt, best.pt and log.jsonl.

    begun: what the stage began with, {stage: digest}, kept in last.pt.
    """
    model = model.to(ranks.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(args, model), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model
    forward = torch.compile(wrapped) if args.compile else wrapped
    rewards_of = rewarder(args, model, vocabulary, train_set) if args.stage == ["2"] else None

    plan = lambda epoch: data.plan_epoch(train_set, epoch, args.seed, args.batch_size,  # noqa: E731
                                         args.expressions_per_image, args.epoch_unit)
    steps_per_epoch = len(plan(0))
    steps = min(args.max_steps or args.epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    weigh = mean_weights(args, train_set, plan(0))
    measure = measure_of(args)
    step, best = 0, {measure: -1.0, "step": 0}
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
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": random,
                "steps": steps, "begun": begun}, keep="prev.pt")

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
                masks_per_image = float(train_set.objects_in[[key[1] for key in keys]].mean())
                rate = learning_rate(args, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["share"]
                count = lambda name: len(keys) if name == "m2f" else sentences * weigh.get(name, 1.0)  # noqa: E731
                sums, shown = {}, {}
                for micro in range(args.accum):
                    batch = log.fetch(loaded).to(ranks.device)
                    sync = micro == args.accum - 1 or ranks.world == 1
                    with nullcontext() if sync else wrapped.no_sync():
                        with metrics.autocast(ranks.device, args.amp):
                            out = forward(batch.images, batch.image_of, batch.text, batch.targets, masks_per_image,
                                          rewards_of and rewards_of(batch))
                        terms = loss_terms(out, batch.targets, batch.text, args)
                        # ranks and micro-batches may hold unequal numbers of sentences, so each adds its sum over the
                        # step's number; DDP averages over the ranks, hence the factor
                        scaler.scale(sum(term / count(name) for name, term in terms.items()) * ranks.world).backward()
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0) + term.detach()
                    for name, term in shown_terms(out).items():
                        shown[name] = shown.get(name, 0) + term
                scaler.unscale_(optimizer)
                norm = clip_gradients(args, model)
                # one reduction tells every rank the losses and whether any of them was asked to stop
                shared = torch.stack([*sums.values(), *shown.values(),
                                      torch.tensor(float(stopping()), device=ranks.device)]).double()
                *values, stop = distributed.total(ranks, shared).tolist()
                losses = {name: value / count(name) for name, value in zip(sums, values)}
                shown = {name: value / sentences for name, value in zip(shown, values[len(sums):])}
                if not math.isfinite(sum(values)) or not (scaler.is_enabled() or math.isfinite(norm)):
                    images = [int(train_set.image_ids[key[1]]) for key in keys]
                    raise UserError(f"the loss is not finite at step {step + 1} ({losses}, gradient {norm}), on images {images}; "
                                    f"lower --lr or set --clip. The last checkpoint in {folder} is from before.")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                numbers = lambda: {"loss": sum(losses.values()), **losses, **shown, "lr": rate,  # noqa: E731
                                   "grad": norm, "waiting": log.waiting(), "GB": runlog.memory(ranks.device)}
                log.step(numbers)
                if step % args.log_every == 0 or step == steps:
                    log.write({"step": step, "epoch": epoch, "seconds": log.seconds(), **numbers()})
                ended = step % steps_per_epoch == 0 or step == steps
                if ended and ((epoch + 1) % args.eval_every == 0 or step == steps):
                    scores = validate(args, ranks, model, vocabulary, val_set)
                    log.write({"step": step, "epoch": epoch, **{f"val_{name}": value for name, value in scores.items()}})
                    log.say(f"epoch {epoch + 1}: val " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
                    if scores[measure] > best[measure]:
                        best = {measure: scores[measure], "step": step}
                        if ranks.main:
                            checkpoint.save(folder / "best.pt", snapshot(args, model, vocabulary, step, best))
                if stop or ended or args.save_every and step % args.save_every == 0:
                    save()
                if stop:
                    log.say(f"stopped by a signal; saved at step {step}, go on with --resume")
                    raise SystemExit(143)
        if distributed.any_rank(ranks, stopping()):  # asked for during the last evaluation
            raise SystemExit(143)


def rewarder(args, model, vocabulary, train_set):
    """batch -> what its hypotheses are rewarded by: the references are all sentences about an object, documents are the refs."""
    about, refs = {}, {}
    for e, text in enumerate(train_set.texts):
        tokens = captions.tokenize(text)
        about.setdefault(train_set.objects_of[e][0], []).append(tokens)
        refs.setdefault(int(train_set.ref_ids[e]), []).append(tokens)
    df = captions.document_frequency(list(refs.values()))
    return lambda batch: partial(reward, args=args, model=model, vocabulary=vocabulary, df=df,
                                 references=[about[train_set.objects_of[e][0]] for e in batch.index.tolist()])


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


# what has no part in a stage; the stages' own steps, rates and batches stand under the common names in each
ELSEWHERE = {"pretrain_steps", "pretrain_lr", "pretrain_batch_size", "pretrain_lr_drops", "dsup_steps", "dsup_lr",
             "dsup_batch_size", "rb_steps", "dsup", "gsup", "reuse", "beams"}
ONLY_2 = {"reward", "score", "tau", "alpha", "hypotheses", "baseline"}
ONLY_3 = {"expressions", "min_area", "pseudo_filter", "pseudo_weight", "retrain_from"}
HEADS = {"described", "tasks", "e2e", "indicator", "m2f_weight", "sel_weight", "gen_weight", "bert_weights", "bert_lr", "clip_heads"}
UNSEEN = {"pretrain": ONLY_2 | ONLY_3 | HEADS, "1": ONLY_2 | ONLY_3, "2": ONLY_3, "3": ONLY_2, "rb": ONLY_2 | ONLY_3 | {"described"}}


def check_same_run(state, args, folder):
    """Refuse to resume a run under settings that would make it another one. Raises UserError."""
    free = {"yaml", "resume", "out", "name", "workers", "device", "eval_every", "save_every", "log_every", "eval_splits",
            "eval_batch_size", "data_root", "compile", "leaky_init"} | ELSEWHERE | UNSEEN[args.stage[-1]]
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


def load_vocabulary(args):
    """The WordPiece vocabulary that --vocab names. Raises UserError."""
    own = Path(args.data_root) / args.dataset / "vocab.txt"
    path = own if args.vocab == "own" else Path(args.vocab)
    if not path.is_file():
        raise UserError(f"{path} does not exist: --vocab wants the vocab.txt that is published beside BERT's weights, or run on "
                        f"the embedded data with `--yaml {EMBEDDED_YAML}`.")
    return WordPiece(path)


# ---- stages -------------------------------------------------------------------------------------------------

def begin(args, model, vocabulary, origin):
    """Give a fresh model what its stage begins with; returns whether those weights saw RefCOCO's val or test images."""
    stage, extractor = args.stage[-1], model.extractor
    leaky = []
    if stage in ("2", "generate"):
        leaky.append(transfer(model, origin["1" if stage == "2" else "describer"], vocabulary, TRAINED["1"]))
    elif stage == "rb":
        leaky.append(transfer(model, origin["1"], vocabulary, ("extractor", "generator")))
    elif "1" in needed(args):  # step 3, of all that it has
        return transfer(model, origin["1"], vocabulary, [name for name, _ in model.named_children()])
    elif stage == "pretrain":
        if args.weights.endswith(".pth"):
            load_published(args.weights, read_torch, extractor.load_swin_official)
        elif args.weights != "none":
            leaky.append(load_weights(extractor.backbone, args.weights, args.leaky_init)["leaky"])
    elif args.official:
        load_published(args.official, read_detectron_pkl, extractor.load_official)
        leaky.append(True)
    else:
        leaky.append(transfer(model, origin["pretrain"], vocabulary, ("extractor",)))
    if stage in ("1", "3", "rb") and model.selector is not None and args.bert_weights != "none":
        load_weights(model.selector.bert, args.bert_weights)
    return any(leaky)


def load_published(path, read, load):
    """`load` what `read` finds in the file; the UserError of weights that do not fit then names it."""
    state = read(path)
    try:
        load(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def transfer(model, path, vocabulary, parts):
    """Take over `parts` of the model in another stage's best.pt; returns whether it saw RefCOCO's val or test images."""
    state = checkpoint.load(path)
    if len(parts) > 1 and state.get("vocabulary") != list(vocabulary):
        raise UserError(f"{path} was trained with another vocabulary than this corpus'; train its own step 1.")
    theirs = {name: value for name, value in state.get("model", {}).items() if name.split(".")[0] in parts}
    if not theirs:
        raise UserError(f"{path} was made by {state['script']}.py and holds no {' or '.join(parts)}.")
    checkpoint.load_model(model, {"model": model.state_dict() | theirs}, path)
    return bool(state["args"].get("leaky_init"))


def run_stage(args, ranks, folder, origin):
    """One stage in `folder`, from what lies there; origin: `origins`."""
    stage = args.stage[-1]
    finished = folder / "done.json"  # of generate; the others say it in last.pt
    state = checkpoint.load_newest(folder) if stage != "generate" else None
    begun = {name: hashlib.sha256(origin[name].read_bytes()).hexdigest() for name in needed(args)}
    if stage == "generate":
        made = made_with(args, begun["describer"])
        check_sentences(folder, made)
    elif stage == "3":
        check_sentences(origin["generate"].parent, {name: getattr(args, name) for name in
                                                    ("dataset", "coco", "expressions", "described")})
    if state:
        check_same_run(state, args, folder)
        other = next((name for name, value in state["begun"].items() if begun.get(name) != value), None)
        if other:
            raise UserError(f"{folder} was begun with another {origin[other]} than is there now; remove {folder} to train it anew.")
    if state and state["step"] >= state["steps"] or stage == "generate" and finished.is_file():
        if ranks.main:
            print(f"stage {stage} is done: {folder}", flush=True)
        return
    torch.manual_seed(args.seed + (stage == "rb"))  # the listener of Rb-Acc is no copy of step 1's selection head
    if ranks.main:
        runlog.open_folder(folder, args, __file__)
        print(f"stage {stage}, run folder {folder}", flush=True)
    distributed.barrier(ranks)
    vocabulary = load_vocabulary(args)
    model = build_model(args, vocabulary)
    args.leaky_init = state["args"]["leaky_init"] if state else begin(args, model, vocabulary, origin)
    if stage == "generate":
        return generate(args, ranks, folder, model.to(ranks.device), vocabulary, made)
    train(args, ranks, folder, state, model, vocabulary, *stage_data(args, vocabulary, origin), begun)


def chosen_stages(args):
    """The stages to run, in their order. Raises UserError for those that the settings rule out."""
    tasks = f"--tasks {args.tasks}"
    ruled_out = {"pretrain": args.official and "--official", "2": args.tasks != "both" and tasks,
                 "generate": args.tasks == "res" and tasks, "3": args.tasks == "reg" and tasks,
                 "rb": args.tasks != "both" and tasks}
    if args.stage == ["all"]:
        left_out = {stage for stage, why in ruled_out.items() if why}
        left_out |= {"2"} if not args.dsup else set()
        left_out |= {"3"} if not args.gsup or "generate" in left_out and not args.reuse else set()
        left_out |= {"generate"} if "3" in left_out else set()
        return [stage for stage in STAGES if stage not in left_out]
    if "all" in args.stage:
        raise UserError("--stage all stands alone.")
    for stage in args.stage:
        if ruled_out.get(stage):
            raise UserError(f"--stage {stage} makes no sense with {ruled_out[stage]}.")
    return [stage for stage in STAGES if stage in args.stage]


def check_files(args, stages, folder):
    """Refuse a chain that would end days later for want of a file that a stage still to begin reads. Raises UserError."""
    if args.reuse and not Path(args.reuse).is_dir():
        raise UserError(f"--reuse {args.reuse}: there is no such run.")
    if args.official and not args.leaky_init:
        raise UserError(f"{args.official}: the model zoo's weights were trained on images of RefCOCO's val and test splits; "
                        "say --leaky-init to start from them all the same, and every result will be marked.")
    fresh = {stage for stage in stages if not (folder / stage / "last.pt").is_file()}
    bert = {"1", "3", "rb"} if args.tasks != "reg" else set()
    for path, readers in ((args.weights, {"pretrain"}), (args.official, {"1", "3"}), (args.bert_weights, bert)):
        if readers & fresh and path not in ("", "none") and not Path(path).is_file():
            raise UserError(f"{path} does not exist; data_prep/README.md says where the weights are published and how to make this "
                            f"file of them, or run on the embedded data with `--yaml {EMBEDDED_YAML}`.")


def needed(args):
    """The stages that a stage begins with."""
    start = args.retrain_from if args.stage[-1] == "3" else "pretrain"
    start = [] if start == "pretrain" and args.official else [start]
    return {"pretrain": [], "1": start, "2": ["1"], "generate": ["describer"], "3": [*start, "generate"], "rb": ["1"]}[args.stage[-1]]


def origins(args, folder):
    """{stage: its best.pt, or generate's done.json} of this run, or of --reuse where this run has none; `describer`, who writes
    for the pool, is stage 2, with --no-dsup step 1."""
    found = {}
    for stage in STAGES:
        name = "done.json" if stage == "generate" else "best.pt"
        places = [Path(run) / stage / name for run in (folder, args.reuse) if run]
        found[stage] = next((path for path in places if path.is_file()), places[0])
    return found | {"describer": found["2" if args.dsup and args.tasks == "both" else "1"]}


def evaluate_stages(args, ranks, folder):
    """Score the stages' best.pt where that has not been done since they were written, and print what the chain reached."""
    from eval import listener_suffix, main as evaluate_run  # the same program that a user runs afterwards
    listener, scored = origins(args, folder)["rb"], []
    heard = ["--listener", str(listener)] if listener.is_file() else []
    for stage, task in (("1", "res"), ("3", "res"), ("1", "reg"), ("2", "reg")):
        best = folder / stage / "best.pt"
        if not best.is_file() or {"res": "reg", "reg": "res"}[task] == args.tasks or not args.eval_splits:
            continue
        suffix = "_reg" + listener_suffix(heard and listener, [folder / "rb" / "best.pt"]) if task == "reg" else ""
        files = [folder / stage / "eval" / f"{args.dataset}_{split}{suffix}.json" for split in args.eval_splits]
        since = max(path.stat().st_mtime for path in (best, *([listener] if heard and task == "reg" else [])))
        if distributed.any_rank(ranks, not all(path.is_file() and path.stat().st_mtime >= since for path in files)):
            evaluate_run(["--run", str(folder / stage), "--checkpoint", str(best), "--split", *args.eval_splits, "--report",
                          "--task", task, "--device", args.device, *(heard if task == "reg" else []),
                          "--batch-size", str(args.eval_batch_size), "--workers", str(args.workers)], ranks)
        scored += [(stage, task, path) for path in files]
    if ranks.main and scored:
        columns = {"mIoU": ".2f", "oIoU": ".2f", "REC@0.5": ".2f", "CIDEr": ".3f", "METEOR": ".3f", "Rb-Acc": ".2f"}
        print(f"{'stage':8}{'task':6}{'split':>8}" + "".join(f"{name:>9}" for name in columns) + f"   {folder}")
        for stage, task, path in scored:
            summary = json.loads(path.read_text(encoding="utf-8"))
            cells = ["-" if summary.get(name) is None else format(summary[name], form) for name, form in columns.items()]
            print(f"{stage:8}{task:6}{summary['split']:>8}" + "".join(f"{cell:>9}" for cell in cells))


# ---- main ---------------------------------------------------------------------------------------------------

def main(argv=None):
    """Prepare, train the stages one after the other, then score their best.pt on --eval-splits and write the reports."""
    args = parse(get_parser(), argv, own_yaml=YAML)
    splits, coco = ["train", "val", *args.eval_splits], Path(args.data_root) / args.coco
    present = data.require(args.data_root, args.dataset, splits, EMBEDDED_YAML)
    stages, folder = chosen_stages(args), runlog.run_folder(args, Path(__file__).stem)
    check_files(args, stages, folder)
    wanted = {"pretrain": ("train", "val"), "generate": ("pool",), "3": ("pool",)}
    wanted = [coco / f"{split}.json" for stage in stages for split in wanted.get(stage, ())]
    missing = [path for path in wanted if not path.is_file()]
    embedded = args.dataset in data.EMBEDDED and args.coco == "cocoshapes"
    if missing and not embedded:
        raise UserError(f"{missing[0]} does not exist: prepare it with `python -m data_prep.coco` (see its --help), or run on "
                        f"the embedded data with `--yaml {EMBEDDED_YAML}`.")
    ranks = distributed.start(args.device)
    args.amp = distributed.resolve_amp(args.amp, ranks.device)
    try:
        if not present or missing:
            if ranks.main:
                if not present:
                    data.make_embedded(args.data_root, args.dataset)
                if missing:
                    from data_prep import coco as instances_tool  # only the embedded data needs it here
                    instances_tool.shapes(args.data_root)
            distributed.barrier(ranks)
        args.resume = True  # a chain goes on from what is there
        for stage in stages:
            origin = origins(args, folder)
            settings = of_stage(args, stage)
            lacking = next((origin[name] for name in needed(settings) if not origin[name].exists()), None)
            if lacking is not None:
                raise UserError(f"{lacking} does not exist, which --stage {stage} begins with"
                                + (f", and {args.reuse} has none" if args.reuse else "")
                                + "; run the stages before it, or name a run that has it with --reuse.")
            run_stage(settings, ranks, folder / stage, origin)
        evaluate_stages(args, ranks, folder)
    finally:
        distributed.finish()


if __name__ == "__main__":
    run(main)
