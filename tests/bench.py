"""Speed and memory as ratios, each against a peer or a plain form in the same process.

    python -m tests.bench                     every row, about ten minutes on two cores
    python -m tests.bench crf mask2former     rows whose name contains one of the words

A ratio above 1 means that we are faster, or smaller; one below its goal is marked. Times are the median of several rounds that
alternate between the two sides, after one round of warming up; memory is the peak of resident memory above what lay there before.
The plain forms stand in this file, or in the test that shows that they give the same, and say what they stand for.
"""
import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import skimage.data
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from pycocotools import mask as coco

import train_lts
import train_mutual
import train_pks
import train_seqtr_partial
import train_tseg
from common import checkpoint, data
from common.backbones import Darknet53, ViT, freeze_batchnorm
from common.captions import cider_d, document_frequency
from common.config import REPOSITORY, UserError, parse
from common.crf import dense_crf
from common.layers import Attention
from common.losses import gated_crf_loss
from common.mask2former import Mask2Former
from common.masks import from_polygons
from common.matrix_nms import matrix_nms
from common.text import SPECIAL, Vocabulary, WordPiece

PEER = 0.95  # the least ratio against a peer that does the same arithmetic
SHARE = 0.8  # the least share of its bound that grouped evaluation reaches
SENTENCES = 7  # of an image; RefCOCO val: 10,834 sentences over 1,500 images


@dataclass
class Row:
    """A benchmark: `run(toy)` -> {"ratio", and whatever else is worth a figure}; the least ratios of time and memory."""
    run: object
    goal: float = 0.0
    memory_goal: float = 0.0


ROWS = {}


def row(goal=0.0, memory_goal=0.0, **variants):
    """Register a function as a row, or, with `variants` {suffix: arguments}, as several of them with the goals first."""
    def register(function):
        for suffix, (goal_, *arguments) in (variants or {"": (goal,)}).items():
            name = f"{function.__name__}_{suffix}" if suffix else function.__name__
            ROWS[name] = Row(partial(function, *arguments), goal_, memory_goal)
            ROWS[name].run.__doc__ = function.__doc__
        return function
    return register


# ---- measuring ----------------------------------------------------------------------------------------------

def seconds(*sides, rounds=5):
    """Median seconds of each side, taken in turns so that a busy moment meets all of them."""
    taken = [[] for _ in sides]
    for i in range(rounds + 1):
        for times, side in zip(taken, sides):
            started = time.perf_counter()
            side()
            if i or rounds == 1:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def peak(side):
    """MiB of resident memory that `side()` needs at its peak, above what lies there before."""
    def read(name):
        with open("/proc/self/status", encoding="ascii") as file:
            return int(next(line for line in file if line.startswith(name)).split()[1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier sides gave back must not be this side's for nothing
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    before = read("VmRSS")
    side()
    return max(read("VmHWM") - before, 1) / 1024


def compare(ours, plain, toy, rounds=5):
    """The figures of two functions that do the same."""
    s, plain_s = seconds(ours, plain, rounds=1 if toy else rounds)
    mib, plain_mib = peak(ours), peak(plain)
    return {"ratio": plain_s / s, "memory": plain_mib / mib, "s": s, "plain s": plain_s, "MiB": mib, "plain MiB": plain_mib}


class one_thread:
    """Within it torch computes on one thread, as a peer does that knows no other way."""

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


# ---- evaluation and decoding --------------------------------------------------------------------------------

METHODS = {  # script, its paper's network without weight files, a smaller one for tests
    "lts": (train_lts, [], ["--size", "64", "--dim", "16", "--backbone", "small", "--finest-stride", "4"]),
    "pks": (train_pks, ["--size", "400", "--max-size", "672"], ["--size", "64", "--max-size", "0", "--dim", "16", "--backbone", "small"]),
    "partial": (train_seqtr_partial, [], ["--size", "64", "--dim", "16", "--heads", "2", "--text-dim", "16", "--points", "3",
                                          "--backbone", "small", "--finest-stride", "4"]),
    "tseg": (train_tseg, [], ["--size", "64", "--vit-dim", "12", "--vit-heads", "2", "--vit-depth", "1", "--bert-layers", "1"]),
    "mutual": (train_mutual, ["--size", "512"], ["--size", "64", "--queries", "5", "--dim", "16", "--heads", "2", "--backbone", "small",
                                                 "--encoder-layers", "1", "--decoder-layers", "1", "--bert-layers", "1"]),
}


def build(method, toy, flags=None):
    """(script, model, vocabulary size, an image as its canvas holds one of 640x480) of a paper's network, untrained.

    flags: other ones than those of METHODS, which has some networks smaller than their papers'.
    """
    script, own, small = METHODS[method]
    flags = own if flags is None else flags
    known = vars(script.get_parser().parse_args([]))
    flags = [word for flag, value in (("weights", "none"), ("text-weights", "none"), ("bert-weights", "none"), ("embeddings", "random"))
             if flag.replace("-", "_") in known for word in (f"--{flag}", value)] + (small if toy else flags)
    args = parse(script.get_parser(), flags, own_yaml=script.YAML)
    size = 100 if toy else 30522 if script.make_vocabulary is WordPiece else 10_000
    vocabulary = script.make_vocabulary([*SPECIAL, *(f"w{i}" for i in range(size))])
    torch.manual_seed(0)
    frame = script.frontend(args, vocabulary)[1].frame(640, 480)
    images = torch.randint(0, 256, (1, 3, frame.canvas_height, frame.canvas_width), dtype=torch.uint8)
    return script, script.build_model(args, vocabulary).eval(), size, images


@row(**{method: (0.0, method) for method in METHODS})
@torch.inference_mode()
def grouped(method, toy=False):
    """the sentences of an image on one encoding of it, against a whole pass for each of them (PKS and mutual supervision at half
    their papers' size); the bound is what sharing the encoding alone allows"""
    _, model, size, images = build(method, toy)
    text, image_of = torch.randint(6, size, (SENTENCES, 8)), torch.zeros(SENTENCES, dtype=torch.int64)
    features = model.encode_image(images)
    all_, one, vision, sentence = seconds(lambda: model.segment(model.encode_image(images), image_of, text),
                                          lambda: model.segment(model.encode_image(images), image_of[:1], text[:1]),
                                          lambda: model.encode_image(images),
                                          lambda: model.segment(features, image_of[:1], text[:1]), rounds=1 if toy else 5)
    ratio, bound = SENTENCES * one / all_, SENTENCES * one / (vision + SENTENCES * sentence)
    return {"ratio": ratio, "bound": bound, "share of bound": ratio / bound, "share goal": SHARE, "s": all_, "plain s": SENTENCES * one,
            "MiB": peak(lambda: model.segment(model.encode_image(images), image_of, text))}


def decode_anew(model, memory, read):
    """Greedy decoding that runs the whole decoder at every step, as SeqTR's released code does: the prefix and, from `read`, what
    each layer reads of the image."""
    tokens = torch.zeros(len(memory["visible"]), 0, dtype=torch.int64)
    for _ in range(2 * model.points):
        memory = memory | {"keys": [layer.cross.keys(*of) for layer, of in zip(model.decoder, read)]}
        tokens = torch.cat([tokens, model.decode(memory, tokens)[:, -1:].argmax(-1)], 1)
    return tokens


@row(goal=6)
@torch.inference_mode()
def decoding_partial(toy=False):
    """Partial-RES' decoder with its cache, 36 coordinates of 32 sentences, against the whole decoder anew at every step"""
    _, model, size, images = build("partial", toy)
    count = 2 if toy else 32
    with torch.no_grad():
        model.predictor[-1].bias[model.bins] = -1e4  # nobody stops early
    with patch.object(Attention, "keys", autospec=True, side_effect=Attention.keys) as projection:
        memory = model.encode(model.encode_image(images), torch.zeros(count, dtype=torch.int64), torch.randint(6, size, (count, 8)))
    read = [call.args[1:] for call in projection.call_args_list[-len(model.decoder):]]
    assert torch.equal(model.generate(memory)[0], decode_anew(model, memory, read))
    return compare(lambda: model.generate(memory), lambda: decode_anew(model, memory, read), toy, rounds=3)


def search_anew(head, proposals, image_of, k, beams, length):
    """Beam search that runs every whole prefix through the decoder at every step; ids and scores as `search` gives them."""
    memory, ids = head.memory(proposals, image_of, k), torch.full((len(k), 1, 1), head.start)
    total, ended = torch.zeros(len(k), 1), torch.zeros(len(k), 1, dtype=torch.bool)
    for step in range(length + 1):
        log_p = head.decode(ids, 0, memory)[:, :, -1].log_softmax(-1).masked_fill(head.banned, -torch.inf)
        end = log_p[..., head.end].clone()
        if step == length:
            log_p[:] = -torch.inf
        log_p[..., head.end] = end if step else -torch.inf
        log_p[ended] = -torch.inf
        log_p[..., 0] = torch.where(ended, 0.0, log_p[..., 0])
        total, best = (total[..., None] + log_p).flatten(1).topk(min(beams, log_p[0].numel()))
        parent, piece = best // log_p.shape[-1], best % log_p.shape[-1]
        ids = torch.cat([ids.gather(1, parent[..., None].expand(-1, -1, ids.shape[-1])), piece[..., None]], -1)
        ended = (piece == head.end) | (piece == 0)
    return [[([i for i in row if i not in (0, head.end)], score) for row, score in zip(rows, scores)]
            for rows, scores in zip(ids[..., 1:].tolist(), total.tolist())]


@row(goal=1.0)
@torch.inference_mode()
def decoding_mutual(toy=False):
    """beam search of 5 beams and 15 pieces for 10 objects with the cache, against every whole prefix anew at every step"""
    _, model, _, _ = build("mutual", toy)
    head, dim = model.generator, model.use.dim
    with torch.no_grad():
        head.bias[head.end] = -20.0  # no sentence ends early
    proposals, k = torch.randn(1, 5 if toy else 100, dim), torch.arange(3 if toy else 10)
    call = (proposals, torch.zeros_like(k), k, 5, 4 if toy else 15)
    for ours, plain in zip(head.search(*call), search_anew(head, *call)):
        assert [ids for ids, _ in ours] == [ids for ids, _ in plain]
    return compare(lambda: head.search(*call), lambda: search_anew(head, *call), toy, rounds=3)


# ---- dense CRF, losses, Matrix NMS, CIDEr-D -----------------------------------------------------------------

@row(**{"80_13_one": (1.3, 80, 13, 1), "80_13_eight": (4, 80, 13, 8), "67_3_one": (1.0, 67, 3, 1), "67_3_eight": (2, 67, 3, 8)})
def crf(sigma_xy, sigma_rgb, masks, toy=False):
    """dense CRF of a photograph of 500x375, building its lattice, on one thread, against pydensecrf2, one CRF for each mask"""
    from tests.test_crf import peer
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        raise UserError("pydensecrf2 is not installed; `pip install pydensecrf2==1.1` builds it.") from None
    image = np.ascontiguousarray(skimage.data.coffee()[:375, :500][::8 if toy else 1, ::8 if toy else 1])
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    centres = np.random.default_rng(0).random((masks, 2)) * (height, width)
    prob = np.stack([1 / (1 + np.exp((np.hypot(y - a, x - b) - height / 4) / 8)) for a, b in centres]).astype(np.float32)
    settings = {"iterations": 10, "gaussian": (3, 3), "bilateral": (sigma_xy, sigma_rgb, 10)}

    def theirs():
        return np.stack([peer(image, np.stack([1 - p, p]), **settings)[1] for p in prob])
    with one_thread():
        assert np.abs(dense_crf(image, prob, **settings) - theirs()).max() < 1e-3
        return compare(lambda: dense_crf(image, prob, **settings), theirs, toy, rounds=3)


@row(goal=5, memory_goal=8)
def gated_crf(toy=False):
    """Gated-CRF loss and its gradient, 2 masks of 200x336, against unfolding the neighbourhoods as the released loss does"""
    from tests.test_losses import crf_unfolded
    size = (20, 30) if toy else (200, 336)
    prob, image = torch.rand(2, *size, requires_grad=True), torch.rand(2, 3, *size)
    return compare(lambda: gated_crf_loss(prob, image).backward(), lambda: crf_unfolded(prob, image).backward(), toy, rounds=3)


def nms_by_loop(masks, scores, sigma=2.0):
    """SOLOv2's Sec. 3.3 pair by pair: every IoU once, the masks in the order of their scores."""
    order = scores.argsort(descending=True).tolist()
    areas, largest, decayed = masks.flatten(1).sum(1).tolist(), [], scores.clone()
    for n, j in enumerate(order):
        ious = []
        for i in order[:n]:
            inter = (masks[i] & masks[j]).sum().item()
            ious.append(inter / max(areas[i] + areas[j] - inter, 1))
        largest.append(max(ious, default=0.0))
        decayed[j] *= min([np.exp(-sigma * iou ** 2) / np.exp(-sigma * worst ** 2) for iou, worst in zip(ious, largest)], default=1.0)
    return decayed


@row(goal=20)
def nms(toy=False):
    """Matrix NMS of 500 masks of 200x336, against a loop over the pairs"""
    from tests.test_matrix_nms import blobs
    masks, scores = blobs(12) if toy else blobs(500, 200, 336)
    assert torch.allclose(matrix_nms(masks, scores), nms_by_loop(masks, scores), atol=1e-4)
    return compare(lambda: matrix_nms(masks, scores), lambda: nms_by_loop(masks, scores), toy, rounds=2)


@row(goal=6)
def cider(toy=False):
    """CIDEr-D of 2,000 sentences with what depends on the references alone at hand, as in training, against pycocoevalcap, which
    counts it"""
    from tests.test_captions import corpus, peer
    hypotheses, references = corpus(20 if toy else 2000, 500, 3, 8, seed=0)
    df = document_frequency(references)
    figures = compare(lambda: cider_d(hypotheses, references, df), lambda: peer(hypotheses, references), toy)
    [counting] = seconds(lambda: cider_d(hypotheses, references), rounds=1 if toy else 5)
    return figures | {"ratio where both count": figures["plain s"] / counting}


# ---- networks -----------------------------------------------------------------------------------------------

@row(goal=1.0, memory_goal=1.0)
def mask2former_layer(toy=False):
    """a deformable layer, forward and backward at 512 px on one thread, against transformers'"""
    from tests.test_mask2former import deformable_sides
    with one_thread():
        return compare(*deformable_sides(64 if toy else 512), toy)


@row(goal=PEER)
def mask2former_whole(toy=False):
    """Mask2Former with ResNet-50, its BatchNorm frozen, forward and backward at 256 px, against transformers'"""
    from tests.test_mask2former import theirs
    small = dict(encoder_layers=1, decoder_layers=2, num_queries=5) if toy else {}
    its = small | {"decoder_layers": 3} if toy else {}  # theirs counts the first prediction, too
    other = freeze_batchnorm(theirs(**its).train())
    ours = Mask2Former("r50", **small).train()
    images = torch.randn(1, 3, 64 if toy else 256, 64 if toy else 256)

    def step(model):
        out = model(images) if model is ours else model(pixel_values=images)
        masks, classes = (out["pred_masks"], out["pred_logits"]) if model is ours else \
            (out.masks_queries_logits, out.class_queries_logits)
        (masks.mean() + classes.mean()).backward()
    return compare(lambda: step(ours), lambda: step(other), toy)


@row(goal=PEER)
@torch.inference_mode()
def bert(toy=False):
    """BERT-base forward, 32 sentences of 5 to 22 pieces, against transformers'"""
    from tests.test_language import TINY, peers
    theirs, ours = peers(**TINY) if toy else peers()
    lengths = torch.linspace(5, 22, 3 if toy else 32).round().long()
    mask = torch.arange(22) < lengths[:, None]
    ids = torch.randint(1, 40, mask.shape) * mask
    return compare(lambda: ours(ids, mask), lambda: theirs(input_ids=ids, attention_mask=mask.long()), toy)


@row(goal=PEER)
@torch.inference_mode()
def vit(toy=False):
    """ViT-S/16 forward, 2 images of 384x384, against timm's"""
    import timm
    theirs = timm.models.VisionTransformer(64, 16, embed_dim=64, depth=2, num_heads=4) if toy else timm.create_model("vit_small_patch16_384")
    ours, images = ViT(64, 16, 64, 2, 4).eval() if toy else ViT().eval(), torch.randn(2, 3, *(2 * [64 if toy else 384]))
    theirs.eval()
    return compare(lambda: ours(images), lambda: theirs.forward_features(images), toy)


# ---- data ---------------------------------------------------------------------------------------------------

def disc(parts=2):
    """Polygons of discs of 40 corners each on 640x480."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return [np.stack([200 + 200 * i + 90 * np.cos(angle), 240 + 90 * np.sin(angle)], 1).ravel().round(2).tolist() for i in range(parts)]


def synthetic_corpus(root, images, objects, expressions):
    """A train.json over photographs of 640x480 that scikit-image brings; returns its path."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    for i, photograph in enumerate(photographs):
        Image.fromarray(photograph).resize((640, 480)).save(root / "images" / f"{i}.jpg", quality=92)
    rle = from_polygons(disc(), 480, 640)
    image_of = rng.integers(0, images, objects)
    object_of = rng.integers(0, objects, expressions)
    words = ["left", "right", "man", "woman", "red", "shirt", "the", "in", "dog", "on"]
    prepared = {
        "meta": {"dataset": "big", "split": "train", "image_root": "images"},
        "images": [{"id": i, "file_name": f"{i % len(photographs)}.jpg", "width": 640, "height": 480} for i in range(images)],
        "objects": [{"id": i, "image_id": int(image_of[i]), "category_id": 1, "bbox": [110, 150, 380, 180], "area": 50000,
                     "iscrowd": 0, "mask": rle} for i in range(objects)],
        "expressions": [{"id": i, "ref_id": int(o), "image_id": int(image_of[o]), "object_ids": [int(o)],
                         "text": " ".join(rng.choice(words, 4))} for i, o in enumerate(object_of)]}
    (root / "train.json").write_text(json.dumps(prepared))
    return root / "train.json"


def decode_polygons():
    """Polygons to a mask by pycocotools, as LAVT's and CRIS' readers do for every sample."""
    return coco.decode(coco.merge(coco.frPyObjects(disc(), 480, 640))).astype(bool)


@row(goal=1.2)
def mask_decoding(toy=False):
    """an object's mask from the prepared run lengths, checked before they are decoded, against pycocotools from the polygons"""
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.RefDataset(synthetic_corpus(Path(folder), 5, 50, 60), None, None)
    assert (dataset.object_mask(0) == decode_polygons()).all()
    times = 1 if toy else 200
    return compare(lambda: [dataset.object_mask(i % 50) for i in range(times)], lambda: [decode_polygons() for _ in range(times)], toy)


class Lavt(torch.utils.data.Dataset):
    """One sample an item as LAVT's data set hands it out: picture and mask squashed to 480x480, floats, normalised."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image, mask = Image.open(self.paths[i]).convert("RGB"), Image.fromarray(decode_polygons().astype(np.uint8), mode="P")
        image = TF.resize(image, [480, 480])
        mask = TF.resize(mask, [480, 480], interpolation=TF.InterpolationMode.NEAREST)
        image = TF.normalize(TF.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return image, torch.as_tensor(np.asarray(mask).copy(), dtype=torch.int64), torch.tensor([1] * 20)


@row(one_sentence=(PEER, 1), all_sentences=(PEER, 0))
def loader(per_image, toy=False):
    """LTS' training samples squashed to 480 in one process, one sentence of an image or all of them in a batch, against a loader
    of single samples as LAVT's, which also squashes to 480; pictures decoded every time"""
    vocabulary = Vocabulary(["man"])
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_corpus(Path(folder), *((8, 16, 48) if toy else (60, 150, 430)))
        dataset = data.RefDataset(path, lambda text: vocabulary.encode(text, 20), data.Canvas(480, squash=True),
                                  partial(train_lts.make_targets, finest_stride=8))
        dataset.small = False  # decode every picture, as a corpus of real size does
        plan = data.plan_epoch(dataset, 0, 0, 8, per_image, "expression")[:1 if toy else 5]
        sentences = sum(len(key[2]) for keys in plan for key in keys)
        samples = Lavt([dataset.root / dataset.file_names[dataset.expression_image[e]] for keys in plan for key in keys for e in key[2]])
        figures = compare(lambda: [None for _ in data.load(dataset, plan, 0)],
                          lambda: [None for _ in torch.utils.data.DataLoader(samples, batch_size=8)], toy, rounds=3)
    return figures | {"sentences/s": sentences / figures["s"]}


@row(goal=20)
def loader_against_darknet(toy=False):
    """LTS' training samples at 416 from one process, every picture decoded, against the time Darknet-53's forward pass takes for them;
    20: data waiting is under 5 % of a step on a processor even without overlap"""
    vocabulary, size = Vocabulary(["man"]), 64 if toy else 416
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_corpus(Path(folder), 60, 120, 360)
        dataset = data.RefDataset(path, lambda text: vocabulary.encode(text, 15), data.Canvas(size),
                                  partial(train_lts.make_targets, finest_stride=8))
        dataset.small = False
        plan = data.plan_epoch(dataset, 0, 0, 8, 1, "ref")[:1 if toy else 6]
        backbone, images = Darknet53().eval(), torch.rand(8, 3, size, size)

        def forward():
            with torch.inference_mode():
                backbone(images)
        fed, eaten = seconds(lambda: [None for _ in data.load(dataset, plan, 0)], forward, rounds=1 if toy else 3)
    return {"ratio": eaten / (fed / len(plan)), "images/s": 8 * len(plan) / fed, "Darknet's images/s": 8 / eaten}


@row(goal=1)
def memory_pks(toy=False):
    """the 32 GB of a card of PKS' paper against its share of a step in float32, eight images of 1333x800 with a sentence each: what
    forward, losses and backward pass of one and of two take on the processor, extrapolated, with parameters and momentum"""
    script, model, size, _ = build("pks", toy, [])
    args = parse(script.get_parser(), [*METHODS["pks"][2], "--size", "256"] if toy else [], own_yaml=script.YAML)
    frame, model = script.frontend(args, Vocabulary(["man"]))[1].frame(1333, 800), model.train()

    def step(count):
        targets = {"mask": frame.masks_in(np.ones((count, frame.height, frame.width), bool), 4),
                   "cells": script.cells_round(np.full((count, 2), 32.0), frame)}
        out = model(torch.rand(count, 3, frame.canvas_height, frame.canvas_width), torch.arange(count), torch.randint(6, size, (count, 8)))
        sum(script.loss_terms(out, targets, args).values()).backward()
        model.zero_grad()
    step(1)
    one, two = (peak(partial(step, count)) for count in (1, 2))
    lasting = 2 * sum(p.nbytes for p in model.parameters()) / 2 ** 20
    eight = (lasting + one + 7 * (two - one)) / 1024
    return {"ratio": 32e9 / 2 ** 30 / eight, "GiB": eight, "GiB one": one / 1024, "GiB two": two / 1024}


@row()
def corpus_of_refcoco_size(toy=False):
    """opening 120,000 sentences, 17,000 images and 42,000 objects, against the bare json.load of the same file"""
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_corpus(Path(folder), *((17, 42, 120) if toy else (17_000, 42_000, 120_000)))
        return compare(lambda: data.RefDataset(path, None, None), lambda: json.loads(path.read_text()), toy, rounds=3)


@row()
def start_up(toy=False):
    """`python eval.py --image` with a small LTS, from the command to the picture, against `python -c "import torch, torchvision"`"""
    with tempfile.TemporaryDirectory() as folder:
        args = parse(train_lts.get_parser(), ["--yaml", "yaml/lts_refshapes.yaml"])
        vocabulary = Vocabulary(["red", "ball"])
        best = {"version": checkpoint.VERSION, "script": "train_lts", "args": vars(args), "step": 1, "best": {"mIoU": 0.0, "step": 1},
                "vocabulary": list(vocabulary), "model": train_lts.build_model(args, vocabulary).state_dict()}
        checkpoint.save(Path(folder) / "best.pt", best)
        Image.fromarray(skimage.data.astronaut()).save(Path(folder) / "x.jpg")

        def start(*words):
            subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True)
        ask = ["--run", folder, "--image", f"{folder}/x.jpg", "--text", "red ball", "--out", f"{folder}/out.png"]
        if toy:  # forked, without the imports that the row is about
            from tests.children import finish
            sides = lambda: finish("eval", ask, f"{folder}/log"), lambda: None
        else:
            sides = lambda: start("eval.py", *ask), lambda: start("-c", "import torch, torchvision")
        ours, bare = seconds(*sides, rounds=1 if toy else 3)
    return {"ratio": bare / ours, "s": ours, "plain s": bare}


# ---- the table ----------------------------------------------------------------------------------------------

def shown(row, figures):
    """The last five cells of a row: ratio, its goal, memory, its goal, the other figures; what misses its goal is marked."""
    goals = {"ratio": row.goal, "memory": row.memory_goal, "share of bound": figures.get("share goal", 0.0)}
    mark = {key: " **missed**" for key, goal in goals.items() if figures.get(key, goal) < goal}
    cells = [cell for key in ("ratio", "memory") for cell in (
        f"{figures[key]:.2f}{mark.get(key, '')}" if key in figures else "", f"{goals[key]:g}" if goals[key] else "")]
    others = [f"{key} {value:.3g}{mark.get(key, '')}" for key, value in figures.items() if key not in ("ratio", "memory")]
    return [*cells, ", ".join(others)]


def main():
    """Run the rows and print them as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="rows whose name contains one of these; none: all rows")
    words = parser.parse_args().words
    chosen = {name: row for name, row in ROWS.items() if not words or any(word in name for word in words)}
    if not chosen:
        sys.exit(f"error: no row's name contains {' or '.join(words)}; there are {', '.join(ROWS)}.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| row | what | ratio | goal | memory | goal | figures |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    for name, row in chosen.items():
        what = " ".join(row.run.__doc__.split())
        try:
            figures = row.run()
        except UserError as error:
            print(f"| {name} | {what} | not run: {error} | | | | |", flush=True)
            continue
        print(f"| {name} | {what} | {' | '.join(shown(row, figures))} |", flush=True)


if __name__ == "__main__":
    main()
