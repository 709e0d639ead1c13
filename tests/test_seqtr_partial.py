"""Partial-RES: sequences and their edge cases, equations against naive loops, the cache, each flag, the chain of stages."""
import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_seqtr_partial as partial_res
from common import checkpoint, contours, data, distributed, masks
from common.config import UserError, parse
from common.text import Vocabulary
from data_prep import subsets

VOCABULARY = Vocabulary([f"w{i}" for i in range(20)])
TINY = ["--yaml", "yaml/seqtr_partial_refshapes.yaml", "--size", "64", "--dim", "16", "--heads", "2", "--text-dim", "16",
        "--encoder-layers", "1", "--decoder-layers", "2", "--bins", "32", "--points", "5", "--batch-size", "4", "--workers", "0",
        "--eval-splits", "val", "--amp", "off"]
ROWS = [[], ["--cctf", "released"], ["--cctf", "off"], ["--pmca", "released"], ["--pmca", "off"], ["--cctf", "off", "--pmca", "off"],
        ["--base", "released"], ["--sentence-token"],
        ["--sentence-token", "--base", "released", "--cctf", "released", "--pmca", "released"], ["--stage", "rec"]]


def settings(*flags):
    args = parse(partial_res.get_parser(), [*TINY, *flags])
    return partial_res.of_stage(args, "res" if args.stage == "all" else args.stage)


def build(*flags, seed=0):
    torch.manual_seed(seed)
    args = settings(*flags)
    return args, partial_res.build_model(args, VOCABULARY)


def inputs(seed=1):
    """Three sentences on an upright, a lying and a small picture, with their sequences."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(data.Canvas.fill, dtype=torch.uint8)[:, None, None].repeat(3, 1, 64, 64)
    for image, (w, h) in zip(images, ((64, 39), (45, 64), (20, 30))):
        image[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    text = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10]])
    tokens = torch.randint(0, 32, (3, 10), generator=generator)
    tokens[1] = 32
    tokens[2, 6:] = 32
    return images, torch.tensor([0, 1, 2]), text, tokens


def blob(seed=0, size=90):
    """A ragged mask in one part."""
    angle, rng = np.linspace(0, 2 * np.pi, 60, endpoint=False), np.random.default_rng(seed)
    radius = size * (0.3 + 0.08 * np.sin(3 * angle + seed)) + rng.normal(0, 0.5, 60)
    points = size / 2 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return contours.rasterise(points, size, size)


def example(mask, frame=None, box=(0, 0, 1, 1), seed=0):
    height, width = mask.shape
    frame = frame or data.Frame(width, height, width, height, width, height)
    holder = type("Corpus", (), {"expression_box": lambda self, e: np.array(box, float)})()
    return data.Example(holder, 0, np.array([0]), mask[None], np.array([0]), frame, np.random.default_rng(seed))


def loss_of(model, args, images, image_of, text, tokens):
    """The sum of the terms, where the boxes are the upper left quarter of each picture."""
    targets = {"tokens": tokens, "boxes": torch.tensor([[0.0, 0, 32, 32]]).expand(len(tokens), 4)}
    return sum(partial_res.loss_terms(model(images, image_of, text, tokens), targets, args).values())


def tokens_of(mask, points=5, bins=32, contour="largest", sampling="uniform", **more):
    return partial_res.make_targets(example(mask), points, bins, contour, sampling, **more)["tokens"][0]


def points_of(tokens, size, bins=32):
    return partial_res.dequantise(tokens[None], torch.tensor([size]), bins)[0]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


# ---- sequences ----------------------------------------------------------------------------------------------

def test_contour_of_a_fixture():
    mask = np.zeros((6, 7), bool)
    mask[1:3, 2:5] = mask[3, 2] = True
    expected = [[2.5, 1], [3.5, 1], [4.5, 1], [5, 1.5], [5, 2.5], [4.5, 3], [3.5, 3], [3, 3.5], [2.5, 4], [2, 3.5], [2, 2.5], [2, 1.5]]
    assert contours.trace(mask, "largest").tolist() == expected
    assert contours.sample(np.array(expected), 4, "stride").tolist() == expected[::3]
    assert len(contours.sample(np.array(expected), 5, "stride")) == 4, "every third vertex: at most N points, not N"
    assert contours.trace(mask, "largest", "anticlockwise").tolist() == [expected[0], *expected[:0:-1]], "from the same vertex"


@pytest.mark.parametrize("seed", range(4))
def test_polygon_gives_the_mask_back(seed):
    mask = blob(seed)
    line = contours.trace(mask, "largest")
    assert contours.area(line) > 0 and line[0, 1] == line[:, 1].min()
    points = contours.sample(line, 200, "uniform")
    gaps = np.linalg.norm(np.diff(np.concatenate([points, points[:1]]), axis=0), axis=1)
    assert np.allclose(points[0], line[0]) and gaps.std() < 0.15 * gaps.mean()
    assert iou(contours.rasterise(points, *mask.shape), mask) >= 0.95
    quantised = points_of(tokens_of(mask, 200, 1000), (90, 90), 1000).numpy()
    assert iou(contours.rasterise(quantised, *mask.shape), mask) >= 0.95


def test_parts_and_holes():
    mask = np.zeros((40, 60), bool)
    mask[5:25, 5:25] = True
    mask[10:15, 10:15] = False
    mask[30:36, 40:50] = mask[2:5, 50:53] = True
    filled = mask.copy()
    filled[10:15, 10:15] = True
    largest = contours.rasterise(contours.trace(mask, "largest"), 40, 60)
    assert largest[5:25, 5:25].mean() > 0.98 and largest.sum() <= 400, "the largest part, its hole filled"
    bridged = contours.rasterise(contours.trace(mask, "bridge"), 40, 60)
    assert iou(bridged, filled) > 0.95
    touching = np.eye(8, dtype=bool)
    assert len(contours.outlines(touching)) == 1, "pixels that meet at a corner are one part"


@pytest.mark.parametrize("size", [(640, 427), (37, 128), (1, 1)])
@pytest.mark.parametrize("bins", [32, 1000])
def test_quantisation_stays_within_a_bin(size, bins):
    points = np.random.default_rng(0).uniform(0, 1, (200, 2)) * size
    points[:2] = [[0, 0], size]
    tokens = partial_res.quantise(points, size, bins)
    assert tokens.min() >= 0 and tokens.max() < bins
    back = points_of(torch.from_numpy(tokens).flatten(), size, bins).numpy()
    error = np.abs(back - points) / size * bins
    assert (error <= 1 + 1e-3).all() and (error[points < np.array(size) * (1 - 1 / bins)] <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("sampling", ["uniform", "stride"])
def test_edge_cases(sampling):
    """One pixel, nothing, fewer vertices than N, and sequences of two, one and no points."""
    one = np.zeros((32, 32), bool)
    assert (tokens_of(one, sampling=sampling) == 32).all(), "an empty mask is EOS alone"
    assert not contours.rasterise(points_of(tokens_of(one), (32, 32)).numpy(), 32, 32).any()
    one[7, 9] = True
    tokens = tokens_of(one, 12, sampling=sampling)
    there = tokens[tokens < 32]
    assert len(there) == (24 if sampling == "uniform" else 8), "N points however short, or all vertices and EOS"
    assert set(there.tolist()) <= {7, 8, 9, 10}
    points = torch.tensor([[2.0, 3], [10, 9]])
    box = contours.rasterise(points.numpy(), 16, 16)
    assert box.sum() == 8 * 6 and box[3:9, 2:10].all(), "two points are the box between them"
    assert np.array_equal(box, contours.rasterise(points.flip(0).numpy(), 16, 16))
    assert not contours.rasterise(points[:1].numpy(), 16, 16).any()
    cut = points_of(torch.tensor([4, 4, 8, 8, 9, 32, 5, 5]), (32, 32))
    assert cut[:2].tolist() == [[4, 4], [8, 8]] and cut[2:].isnan().all(), "EOS ends it, half a point and all behind it fall"
    assert contours.boxes_round(torch.stack([cut, cut * torch.nan])).tolist() == [[4, 4, 8, 8], [0, 0, 0, 0]]


def test_boxes_flips_and_shrinking():
    mask = np.zeros((40, 40), bool)
    mask[10:20, 4:12] = True
    frame = data.Frame(40, 40, 40, 40, 40, 40, flipped=True)
    make = partial(partial_res.make_targets, points=8, bins=40, contour="largest", sampling="uniform")
    boxed = make(example(mask, frame, box=(4, 10, 12, 20)), box=True)["tokens"][0]
    assert boxed.tolist() == [28, 10, 36, 20]
    raw = {0: np.array([[4, 10], [12, 10], [12, 20], [4, 20.0]])}
    mirrored = points_of(make(example(mask, frame), raw=raw)["tokens"][0], (40, 40), 40)[:4].numpy()
    assert contours.area(mirrored) == 80, "raw points stay clockwise in the mirror"
    small = replace(frame, in_width=2, in_height=2)
    assert (make(example(mask, small))["tokens"] < 40).all(), "what shrinks below half a pixel is still there"


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("direction, sign", [("clockwise", 1), ("anticlockwise", -1)])
@pytest.mark.parametrize("sampling", ["uniform", "stride"])
def test_direction(flipped, direction, sign, sampling):
    """Contours run as told, in the mirror, too, from the leftmost of the topmost vertices; so do points that are taken as they are."""
    mask, frame = blob(2), data.Frame(90, 90, 90, 90, 90, 90, flipped=flipped)
    make = lambda **more: points_of(partial_res.make_targets(  # noqa: E731
        example(mask, frame), 12, 90, "largest", sampling, direction, **more)["tokens"][0], (90, 90), 90).numpy()
    traced, raw = make(), make(raw={0: contours.sample(contours.trace(mask, "largest", direction), 12, "uniform")})
    top = contours.trace(mask[:, ::-1] if flipped else mask, "largest")[0]
    assert np.abs(traced[0] - top).max() <= 0.5 and sign * contours.area(traced[np.isfinite(traced).all(1)]) > 1000
    assert sign * contours.area(raw) > 1000


@pytest.mark.parametrize("direction, sign", [("clockwise", 1), ("anticlockwise", -1)])
def test_direction_reaches_the_data(shapes, direction, sign):
    subsets.make(shapes, "refshapes", ratios=[50])
    args = parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes), "--direction", direction, "--points", "12"])
    train = partial_res.training_view(partial_res.of_stage(args, "res"), partial_res.open_train(args), None)
    train.encode, train.canvas = partial_res.frontend(args, VOCABULARY)
    e = int(next(of[0] for of in train.of_image if len(of)))
    points = train[(0, int(train.expression_image[e]), np.array([e]))]["targets"]["tokens"].view(-1, 2).numpy()
    assert sign * contours.area(points) > 0


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_jitter_keeps_the_object(flip):
    mask = np.zeros((50, 100), bool)
    mask[30:48, 60:90] = True
    canvas, sizes = data.Canvas(64), set()
    for seed in range(40):
        frame = partial_res.jitter(example(mask, canvas.frame(100, 50), seed=seed), 0.3, 1.9, flip)
        w, h = partial_res.visible_size(frame)
        covered = frame.masks_in(mask[None])[0]
        assert covered.sum() == pytest.approx(mask.sum() * frame.in_width * frame.in_height / 5000, rel=1e-4)
        picture = frame.image_in(torch.randint(0, 120, (3, 50, 100), dtype=torch.uint8), canvas.fill)
        assert partial_res.extent(picture[None], torch.tensor(canvas.fill, dtype=torch.uint8)).tolist() == [[w, h]]
        assert frame.flipped == bool(flip)
        sizes.add((w, h, frame.left))
    assert len(sizes) > 20


def test_projection_loss():
    mask, box = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    box[5:15, 5:15] = True
    assert partial_res.projection_loss(mask, box) == 2 and partial_res.projection_loss(box, box) == 0
    mask[5:15, 5:10] = True
    assert partial_res.projection_loss(mask, box) == pytest.approx(1 - 2 * 5 / 15)
    ring = box.copy()
    ring[6:14, 6:14] = False
    assert partial_res.projection_loss(ring, box) == 0, "D sees projections alone"
    assert partial_res.projection_loss(ring, box, "parts") == 0, "a hole is no part"


@pytest.mark.parametrize("corners", [[], [(5, 5, 15, 15)], [(5, 5, 15, 9), (3, 11, 15, 16)], [(5, 5, 8, 8), (8, 8, 15, 15), (0, 19, 1, 20)]])
def test_projection_loss_of_parts_equals_the_loop(corners):
    """Each part against the whole box, one list for each axis; the first two rectangles of the last case touch at a corner."""
    each, box = [np.zeros((20, 22), bool) for _ in corners], np.zeros((20, 22), bool)
    box[4:15, 5:15] = True
    for part, (x0, y0, x1, y1) in zip(each, corners):
        part[y0:y1, x0:x1] = True
    mask = np.any(each, axis=0) if each else np.zeros_like(box)
    each = [each[0] | each[1], each[2]] if len(each) == 3 else each
    expected = 0
    for lines in (lambda m: m, np.transpose):
        both = ones = 0
        for part in each:
            for l, b in zip(lines(part), lines(box)):  # noqa: E741
                both, ones = both + (l.any() and b.any()), ones + int(l.any()) + int(b.any())
        expected += 1 - 2 * both / max(1, ones)
    assert partial_res.projection_loss(mask, box, "parts") == pytest.approx(expected)
    assert (expected == pytest.approx(partial_res.projection_loss(mask, box))) == (len(corners) < 2)


# ---- model --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_every_row_trains_and_segments(flags):
    args, model = build(*flags)
    images, image_of, text, tokens = inputs()
    tokens = tokens[:, :2 * model.points]
    loss_of(model, args, images, image_of, text, tokens).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())] == []
    with torch.inference_mode():
        out = model.eval().segment(model.encode_image(images), image_of, text)
    assert out["prob"].shape == (3, 256, 256) and set(out["prob"].unique().tolist()) <= {0.0, 1.0}
    assert out["points"].shape == (3, model.points, 2) and out["boxes"].shape == (3, 4) and out["score"].shape == (3,)


def test_rows_differ():
    seen = {}
    for flags in ROWS[:-1]:
        args, model = build(*flags)
        images, image_of, text, tokens = inputs()
        key = round(loss_of(model, args, images, image_of, text, tokens).item(), 5)
        assert key not in seen, (flags, seen.get(key))
        seen[key] = flags


@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_cached_decoding_is_the_uncached(flags):
    """Token for token, against greedy decoding that runs the whole prefix anew at every step; and the same logits."""
    _, model = build(*flags, seed=3)
    model.eval()
    images, image_of, text, _ = inputs()
    for parameter in model.predictor[-1].parameters():
        parameter.data *= 20  # spread the choices
    with torch.inference_mode():
        memory = model.encode(model.encode_image(images), image_of, text)
        tokens, cached = torch.zeros(3, 0, dtype=torch.int64), [{} for _ in model.decoder]
        for step in range(2 * model.points):
            logits = model.decode(memory, tokens)
            kept = model.decode(memory, tokens[:, -1:] if step else None, step - 1, cached)
            assert torch.allclose(logits[:, -1:], kept, atol=1e-4)
            last = logits[:, -1]
            if model.box:
                last[:, model.bins] = -torch.inf
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
        ended = (tokens == model.bins).cumsum(1) > 0
        assert torch.equal(model.generate(memory)[0], tokens.masked_fill(ended, model.bins))


@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_neither_padding_nor_neighbours_matter(flags):
    """Mixed aspect ratios together equal one image at a time; more padding of the sentence changes nothing, nor do bytes."""
    _, model = build(*flags)
    model.eval()
    images, image_of, text, tokens = inputs()
    tokens = tokens[:, :2 * model.points]
    with torch.inference_mode():
        together = model(images, image_of, F.pad(text, (0, 3)), tokens)
        alone = [model(images[i:i + 1], torch.tensor([0]), text[i:i + 1], tokens[i:i + 1]) for i in range(3)]
        floats = model(images.float() / 255, image_of, text, tokens)
    for name, value in together.items():
        assert torch.allclose(value, torch.cat([one[name] for one in alone]), atol=1e-4)
        assert torch.allclose(value, floats[name], atol=1e-4)


def test_padding_is_not_attended_to():
    """What stands in cells of padding alone, behind the encoder's mask, does not reach the logits."""
    _, model = build()
    model.eval()
    images, image_of, text, tokens = inputs()
    with torch.inference_mode():
        memory = model.encode(model.encode_image(images), image_of, text)
        # cells of 16 pixels: 4 x 3, 3 x 4, 2 x 2 of them hold something of the picture
        assert memory["visible"].sum(1).tolist() == [12, 12, 4]
        before = model.decode(memory, tokens)
        hidden = ~memory["visible"][:, None, :, None]
        memory["keys"] = [tuple(part.masked_fill(hidden, 1e3) for part in keys) for keys in memory["keys"]]
        assert torch.equal(model.decode(memory, tokens), before)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_cctf_equals_the_double_loop(mode):
    """Eq. 4: the mean over the column that x points at and the row that y does, of each image's own size."""
    torch.manual_seed(0)
    cells, bins, size = torch.randn(3, 4, 5, 6), 32, torch.tensor([[5.0, 3], [2.6, 4], [1, 1]])
    valid_x, valid_y = (torch.arange(n) < size[:, i, None].ceil() for i, n in ((0, 5), (1, 4)))
    tokens = torch.randint(0, bins, (3, 8))
    lines = partial_res.co_content(cells, valid_x, valid_y, mode)
    index = partial_res.line_index(tokens, bins, size, 5, 4, mode)
    for e in range(3):
        for t in range(8):
            token, w, h = tokens[e, t].item(), size[e, 0].item(), size[e, 1].item()
            if mode == "paper":
                column, row = cells[e, :math.ceil(h), int(token * w / bins)], cells[e, int(token * h / bins), :math.ceil(w)]
            else:
                column, row = cells[e, int(token / bins * 3)], cells[e, :, int(token / bins * 4)]
            assert torch.allclose(lines[0][e, index[0][e, t]], column.mean(0), atol=1e-6)
            assert torch.allclose(lines[1][e, index[1][e, t]], row.mean(0), atol=1e-6)


def test_cctf_joins_coordinates_alone():
    """Eq. 5: x takes a column's mean and y a row's, EOS and [TASK] nothing."""
    _, model = build()
    images, image_of, text, tokens = inputs()
    memory = model.encode(model.encode_image(images), image_of, text)
    added = model.embed(memory, tokens) - model.coordinates(tokens)
    assert (added[tokens == 32] == 0).all() and (added[tokens < 32] != 0).any(1).all()
    same = tokens.clone()
    same[:, 1::2] = same[:, ::2]
    index = partial_res.line_index(same, 32, memory["cells"], 4, 4, "paper")
    assert torch.allclose(model.embed(memory, same)[0, 2] - model.coordinates(same[0, 2]), memory["lines"][0][0, index[0][0, 2]], atol=1e-6)
    assert torch.allclose(model.embed(memory, same)[0, 3] - model.coordinates(same[0, 3]), memory["lines"][1][0, index[1][0, 3]], atol=1e-6)


@pytest.mark.parametrize("pmca", ["paper", "released", "off"])
def test_sentence_token_by_hand(pmca):
    """The pooled sentence behind the cells: under GroupNorm with them, without position, never masked, with log G = 0; CCTF and the
    locator do not see it."""
    _, model = build("--sentence-token", "--pmca", pmca, "--locate", "1")
    model.eval()
    torch.nn.init.normal_(model.project[1].weight)
    seen, (images, image_of, text, tokens) = {}, inputs()
    model.encoder[0].register_forward_pre_hook(lambda module, given: seen.update(begin=given))
    model.encoder[-1].register_forward_hook(lambda module, given, out: seen.update(end=out))
    model.decoder[-1].cross.register_forward_pre_hook(lambda module, given: seen.update(mask=given[2]))
    with torch.inference_mode():
        visual, size = model.encode_image(images)
        memory = model.encode((visual, size), image_of, text)
        model.decode(memory, tokens)
        (x, position, attended), conv, norm = seen["begin"], *model.project
        states, known = model.language(text)
        for e in range(3):
            said = torch.stack([state for state, there in zip(states[e], known[e]) if there]).amax(0).tanh()
            cells = [visual[e, :, i, j].tanh() * said for i in range(4) for j in range(4)] + [said]
            rows = torch.stack([conv.weight[:, :, 0, 0] @ cell + conv.bias for cell in cells])     # (17, 16), a group a channel
            rows = (rows - rows.mean(0)) / (rows.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
            assert torch.allclose(x[e], rows + position[e], atol=1e-4)
        assert not position[:, -1].any() and position[:, :-1].any(2).all() and attended[..., -1].all()
        mask, plain = seen["mask"], build("--pmca", pmca)[1].eval()
        assert attended[:, 0, 0, :-1].equal(plain.encode(plain.encode_image(images), image_of, text)["visible"])
        assert (mask[..., -1] == 0).all() if pmca != "off" else mask[..., -1].all()
        assert pmca == "off" or (mask[..., :-1] < 0).any(-1).all()
        u, v = (torch.arange(4) * 16 < size[:, i, None] for i in (0, 1))
        cells = seen["end"][:, :-1].unflatten(1, (4, 4))
        assert all(map(torch.equal, memory["lines"], partial_res.co_content(cells, u, v, "paper")))
        there = attended[:, 0, 0, :-1].view(3, 4, 4)
        assert torch.allclose(memory["where"][there], model.locator(cells)[..., 0][there], atol=1e-6)


def test_gaussian_is_zero_at_its_centre():
    u, v = (torch.arange(4)[None] + 0.5) / 4, (torch.arange(3)[None] + 0.5) / 3
    centre, weight = torch.tensor([u[0, 2], v[0, 1]]).view(1, 1, 1, 2), torch.tensor([2.0, 5.0]).view(1, 1, 1, 2)
    g = partial_res.gaussian(centre, weight, u, v)[0, 0, 0].view(3, 4)
    assert g[1, 2] == 0 and (g.flatten().sort().values[:-1] < 0).all()
    assert g[0, 0].item() == pytest.approx(-(0.5 ** 2 * 2 + (1 / 3) ** 2 * 5)), "Eq. 7, x by the width and y by the height"


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_pmca_by_hand(mode):
    _, model = build("--pmca", mode)
    pmca = model.decoder[0].pmca
    torch.nn.init.normal_(pmca.mlp[-1].weight)
    s, state = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    memory = {"u": torch.tensor([[0.2, 0.6, 1.0]]), "v": torch.tensor([[0.25, 0.75]]), "cells": torch.tensor([[2.5, 2.0]])}
    bias = pmca(s, state, memory)
    assert bias.shape == (1, 1 if mode == "paper" else 2, 3, 6)
    out = pmca.mlp(s if mode == "paper" else state)[0, 1]
    if mode == "paper":
        (cx, cy, sx, sy) = out.sigmoid().tolist()
        expected = -(0.6 - cx) ** 2 / (8 * sx ** 2) - (0.75 - cy) ** 2 / (8 * sy ** 2)
    else:
        cx, cy, sx, sy = *out[2:4].sigmoid().tolist(), *out[6:8].tolist()  # the second head's
        expected = -((0.6 - cx) * 2.5 * sx) ** 2 / 8 - ((0.75 - cy) * 2 * sy) ** 2 / 8
    assert bias[0, -1, 1, 1 * 3 + 1].item() == pytest.approx(expected, rel=1e-4)


def test_losses_by_hand():
    args, _ = build("--smoothing", "0.1", "--eos-weight", "0.25", "--locate", "2")
    logits, tokens = torch.randn(2, 5, 33), torch.tensor([[1, 2, 3, 4], [5, 6, 32, 32]])
    boxes, where = torch.tensor([[8.0, 16, 40, 24], [60, 60, 90, 90]]), torch.randn(2, 4, 4)  # on cells of 16 pixels
    total = 0
    for e, row in enumerate([[1, 2, 3, 4, 32], [5, 6, 32, 32, 32]]):
        for t, token in enumerate(row):
            log = logits[e, t].log_softmax(0)
            total -= (0.9 * log[token] + 0.1 * log.mean()) * (0.25 if token == 32 else 1) / 5
    share = torch.zeros(2, 4, 4)
    share[0, 1, :3], share[1, 3, 3] = torch.tensor([0.25, 0.5, 0.25]), 1
    terms = partial_res.loss_terms({"logits": logits, "where": where}, {"tokens": tokens, "boxes": boxes}, args)
    assert terms["ce"].item() == pytest.approx(total.item(), rel=1e-5)
    assert terms["locate"].item() == pytest.approx(-2 * (share * where.flatten(1).log_softmax(1).view_as(where)).sum().item(), rel=1e-5)


def test_a_few_steps_learn():
    """The loss of one batch falls to a quarter, and the contour is then read back."""
    args, model = build("--dropout", "0", "--smoothing", "0", "--locate", "0")
    images, image_of, text, tokens = inputs()
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=5e-3), None
    for _ in range(120):
        loss = loss_of(model, args, images, image_of, text, tokens) / 3
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * first
    with torch.inference_mode():
        found = model.eval().generate(model.encode(model.encode_image(images), image_of, text))[0]
    assert (found == tokens).float().mean() > 0.9


def test_first_values_let_it_locate():
    """A cell is marked, and where it is must be found: within 100 steps. Torch's own first values would still guess (log 4)."""
    _, model = build("--stage", "rec", "--dim", "32", "--text-dim", "32", "--waves", "2")
    optimizer, generator, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1), []
    for _ in range(100):
        cell = torch.randint(0, 16, (32,), generator=generator)
        visual = torch.randn(32, 32, 4, 4, generator=generator)
        visual.flatten(2)[torch.arange(32), :8, cell] += 3
        tokens = torch.stack([cell % 4, cell // 4, cell % 4 + 1, cell // 4 + 1], 1) * 8 - torch.tensor([0, 0, 1, 1])
        memory = model.encode((visual, torch.full((32, 2), 64.0)), torch.arange(32), torch.full((32, 3), 4))
        loss = F.cross_entropy(model.decode(memory, tokens)[:, :2].flatten(0, 1), tokens[:, :2].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.75 * math.log(4)


@pytest.mark.parametrize("box, expected", [((3.4, 2, 4, 5), (3, 2, 7, 7)), ((3, 2, 0, 0), (3, 2, 4, 3)), ((-9, -9, 12, 30), (0, 0, 3, 20)),
                                           ((-9, 4, 3, 2), (0, 4, 1, 6)), ((90, 90, 5, 5), (29, 19, 30, 20))])
def test_box_masks_stay_in_their_image(box, expected):
    corpus = type("Corpus", (), {"sizes": np.array([[30, 20]]), "object_image": np.array([0]), "boxes": np.array([box], float)})
    mask, (x0, y0, x1, y1) = partial_res.box_mask(corpus, [0]), expected
    assert mask.shape == (20, 30) and mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)


def test_average():
    """Begins equal to the weights, follows them, and takes buffers of whole numbers over."""
    model, averaged = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model.weight.data.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    partial_res.average(averaged, model, 0.75)
    assert averaged.weight.tolist() == [1.5, 1.5] and averaged.num_batches_tracked == 7


@pytest.mark.parametrize("ratio, stage, rate", [(1, "res", 1e-4), (1, "baseline", 1e-4), (5, "res", 3e-4), (10, "res", 5e-4),
                                                (1, "retrain", 5e-4), (1, "rec", 5e-4)])
def test_rates_of_the_paper(ratio, stage, rate):
    args = partial_res.of_stage(parse(partial_res.get_parser(), ["--ratio", str(ratio)], own_yaml=partial_res.YAML), stage)
    assert partial_res.learning_rate(args, 500, 1000) == rate and partial_res.learning_rate(args, 900, 1000) == pytest.approx(rate / 10)
    assert (args.cctf, args.pmca) == (("off", "off") if stage in ("rec", "baseline") else ("paper", "paper"))


def test_own_yaml_is_the_defaults():
    defaults = vars(partial_res.get_parser().parse_args([]))
    assert vars(parse(partial_res.get_parser(), [], own_yaml=partial_res.YAML)) == defaults | {
        "name": "base", "eval_splits": ["val", "testA", "testB"]}


# ---- stages -------------------------------------------------------------------------------------------------

CHAIN = [*TINY, "--ratio", "50", "--threshold", "inf", "--rec-epochs", "1", "--epochs", "1", "--retrain-epochs", "1",
         "--save-every", "1", "--log-every", "1", "--eval-every", "1"]


def finish(*argv, log):
    from tests import children  # which takes CHAIN from here
    return children.finish("train_seqtr_partial", argv, log)


@pytest.fixture(scope="module")
def chain(unbroken, shapes, tmp_path_factory):
    """The run folder of all stages and of the rows of Table 2, which a second call adds; and what both printed."""
    whole, _ = unbroken("train_seqtr_partial")
    out = tmp_path_factory.mktemp("chain") / "run"
    shutil.copytree(whole, out)
    said = finish(*CHAIN, "--rows", "--data-root", shapes, "--out", out, log=out.parent / "log")
    return out, (whole.parent / "log0").read_text() + said


def labels(out):
    return json.loads((out / "pseudo" / "masks.json").read_text())["labels"]


def test_chain(chain, shapes):
    out, said = chain
    assert all((out / stage / "best.pt").is_file() and (out / stage / "report.html").is_file() for stage in ("rec", "res", "retrain"))
    table = said[said.rindex("stage  "):].splitlines()[1:]
    assert "reach mIoU" in said and [line.split()[0] for line in table] == ["rec", "baseline", "cctf", "res", "pseudo", "retrain"]
    assert all(checkpoint.load(out / stage / "best.pt")["args"][key] == value for stage, row in partial_res.ROWS.items()
               for key, value in ({"cctf": "paper", "pmca": "paper"} | row).items())
    train = data.RefDataset(shapes / "refshapes" / "train.json", None, None)
    supervised = partial_res.has_masks(parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes)]), train)
    assert 0 < supervised.sum() < len(train)
    assert {label["id"] for label in labels(out)} == set(train.sent_ids[~supervised].tolist())
    for label in labels(out):
        e = int(np.flatnonzero(train.sent_ids == label["id"])[0])
        mask = masks.decode(masks.check_rle(label["mask"], *train.sizes[train.expression_image[e]][::-1]))
        assert label["D"] == pytest.approx(partial_res.projection_loss(mask, partial_res.box_mask(train, train.objects_of[e])), abs=1e-5)
    rec = checkpoint.load(out / "rec" / "best.pt")
    assert "REC@0.5" in rec["best"] and rec["args"]["cctf"] == "off" and not any(".pmca." in name for name in rec["model"])


@pytest.mark.parametrize("flags, stage", [(["--ratio", "100", "--sentence-token"], "res"), (["--pseudo-from", "{out}/pseudo/masks.json", "--no-rpp"], "retrain")])
def test_stages_that_are_not_needed(chain, shapes, tmp_path, flags, stage):
    """Of all masks none is left to predict; labels of another run are taken as they are. A stage begins with the weights it is
    given, and so does their average."""
    out, _ = chain
    finish(*CHAIN, *(flag.format(out=out) for flag in flags), "--data-root", shapes, "--out", tmp_path / "r", "--rec-from",
           out / "rec" / "best.pt", "--eval-splits", "--lr", "1e-20", "--stage-lr", "1e-20", log=out.parent / "log")
    assert {path.parent.name for path in (tmp_path / "r").glob("*/*")} == {stage} and not (tmp_path / "r" / stage / "eval").exists()
    begun, averaged = (checkpoint.load(of / "best.pt")["model"] for of in (out / "rec", tmp_path / "r" / stage))
    assert all(torch.allclose(value, averaged[name], atol=1e-6) for name, value in begun.items() if name != "places.weight")


def test_a_second_call_finds_all_done(chain, shapes, tmp_path):
    out, _ = chain
    before = {path: path.stat().st_mtime_ns for path in [*out.rglob("*.pt"), *out.rglob("eval/*"), out / "pseudo" / "masks.json"]}
    finish(*CHAIN, "--data-root", shapes, "--out", out, log=tmp_path / "log")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_labels_are_made_anew_for_a_new_model(chain, shapes, tmp_path):
    """Those older than `res` are not its own; with other settings than those of `res` nothing is predicted."""
    out, ranks = tmp_path / "run", distributed.Ranks(0, 1, torch.device("cpu"))
    shutil.copytree(chain[0], out)
    label = lambda *flags: partial_res.run_stage(partial_res.of_stage(  # noqa: E731
        parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes), *flags]), "pseudo"), ranks, out / "pseudo",
        out / "res" / "best.pt", None)
    kept = json.dumps({"meta": {"dataset": "refshapes", "ratio": 50}, "labels": []})
    (out / "pseudo" / "masks.json").write_text(kept)
    label()
    assert (out / "pseudo" / "masks.json").read_text() == kept, "of a time when there was no choice of weights and distance"
    os.utime(out / "pseudo" / "masks.json", (0, 0))
    with pytest.raises(UserError, match="was begun with --sigma 8.0"):
        label("--sigma", "1")
    label()
    assert labels(out) == labels(chain[0])


def test_how_labels_are_made(chain, shapes, tmp_path, monkeypatch):
    """Of the weights and with the D that are asked for; a file of others is neither used nor lost; what leaked is told."""
    out, made = tmp_path / "run", tmp_path / "run" / "pseudo" / "masks.json"
    shutil.copytree(chain[0], out)
    state = checkpoint.load(out / "res" / "last.pt")
    state["model"]["predictor.4.bias"][-1] = 1e4  # the last weights say EOS
    state["args"]["leaky_init"] = True
    checkpoint.save(out / "res" / "last.pt", state)
    os.utime(made)
    call = lambda *flags, of=out: partial_res.main(  # noqa: E731
        [*CHAIN, "--eval-splits", "--data-root", str(shapes), "--out", str(of), *flags])
    elsewhere = ["--pseudo-from", str(made), "--rec-from", str(out / "rec" / "best.pt")]
    for flags, was in ((["--pseudo-weights", "last"], "averaged"), (["--distance", "parts"], "whole")):
        for more, of in (["--stage", "pseudo"], out), (elsewhere, tmp_path / "other"):
            with pytest.raises(UserError, match=f"masks.json was made with {flags[0]} {was}; say the same"):
                call(*flags, *more, of=of)
        with pytest.raises(UserError, match=f"retrain was begun with {flags[0]} '{was}'"):
            partial_res.check_same_run(checkpoint.load(out / "retrain" / "last.pt"), settings(*CHAIN, "--stage", "retrain", *flags),
                                       out / "retrain")
    with pytest.raises(UserError, match="made with --direction clockwise"):
        call("--no-rpp", "--direction", "anticlockwise", *elsewhere, of=tmp_path / "other")
    assert labels(out) == labels(chain[0]) and not (tmp_path / "other").exists()

    monkeypatch.setattr(partial_res, "projection_loss", lambda mask, box, distance: {"whole": 0.25, "parts": 0.5}[distance])
    for flag, value, distance in (("--distance", "parts", 0.5), ("--pseudo-weights", "last", 0.25)):
        made.unlink()
        call("--stage", "pseudo", flag, value)
        assert {label["D"] for label in labels(out)} == {distance}
    assert all(label["points"] == [] for label in labels(out)) and any(label["points"] for label in labels(chain[0]))
    meta = json.loads(made.read_text())["meta"]
    assert (meta["pseudo_weights"], meta["distance"], meta["leaky_init"]) == ("last", "whole", True)
    call(*elsewhere, "--pseudo-weights", "last", "--max-steps", "1", of=tmp_path / "retrained")
    assert [checkpoint.load(of / "retrain" / "last.pt")["args"]["leaky_init"] for of in (tmp_path / "retrained", out)] == [True, False]
    (out / "res" / "last.pt").unlink()
    with pytest.raises(UserError, match="res/last.pt does not exist, which the stage pseudo needs"):
        call("--stage", "pseudo", "--pseudo-weights", "last")


def test_boxes_stand_for_hidden_masks(shapes, tmp_path):
    """With jitter, too, the boxes of all objects are learnt, contours predicted and learnt again where nobody drew the other masks."""
    subsets.make(shapes, "refshapes", ratios=[50])
    args = parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes), "--jitter", "0.3", "1.9", "--expressions-per-image", "1"])
    train = partial_res.open_train(args)
    train.encode, train.canvas = partial_res.frontend(args, VOCABULARY)
    hidden = ~partial_res.has_masks(args, train)
    kept = {i for e in np.flatnonzero(~hidden) for i in train.objects_of[e]}
    train.rles = [rle if i in kept else None for i, rle in enumerate(train.rles)]

    def crops(view):
        for e in np.flatnonzero(hidden)[::5].tolist():
            yield e, view[(e, int(train.expression_image[e]), np.array([e]))]["frame"]

    def on_canvas(frame, near, far):
        points = frame.points_in(np.array([near, far], float))
        fits = (np.ptp(points, axis=0) <= 64).all()
        assert not fits or (points >= -1).all() and (points <= 65).all()
        return fits

    assert sum(on_canvas(frame, *train.expression_box(e).reshape(2, 2))
               for e, frame in crops(partial_res.training_view(partial_res.of_stage(args, "rec"), train, None))) > 5
    pseudo_args, path = partial_res.of_stage(args, "pseudo"), tmp_path / "pseudo" / "masks.json"
    model = partial_res.build_model(pseudo_args, VOCABULARY)
    partial_res.make_pseudo(pseudo_args, distributed.Ranks(0, 1, torch.device("cpu")), path.parent, model, train)
    found = json.loads(path.read_text())
    assert [label["id"] for label in found["labels"]] == train.sent_ids[hidden].tolist()
    for label, e in zip(found["labels"], np.flatnonzero(hidden)):
        mask = np.zeros(train.sizes[train.expression_image[e]][::-1], bool)
        mask[-20:, -20:] = True
        label.update(mask=masks.encode(mask), points=[[1, 1], [9, 1], [9, 9]], D=0)
    path.write_text(json.dumps(found))
    view = partial_res.training_view(partial_res.of_stage(args, "retrain"), train, path)
    for e, frame in crops(view):
        assert on_canvas(frame, (frame.width - 20, frame.height - 20), (frame.width, frame.height))


def test_no_sentence_with_a_mask(shapes, monkeypatch):
    args = partial_res.of_stage(parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes)]), "res")
    monkeypatch.setattr(partial_res, "has_masks", lambda args, dataset: np.zeros(len(dataset), bool))
    with pytest.raises(UserError, match="only objects of the 50 %"):
        partial_res.training_view(args, partial_res.open_train(args), None)


def test_minutes_of_a_run_that_went_on(tmp_path, capsys):
    args = parse(partial_res.get_parser(), [*CHAIN])
    (tmp_path / "rec" / "eval").mkdir(parents=True)
    (tmp_path / "rec" / "eval" / "refshapes_val.json").write_text('{"REC@0.5": 50.0}')
    (tmp_path / "rec" / "log.jsonl").write_text("".join(f'{{"step": {i}, "seconds": {s}}}\n' for i, s in enumerate((60, 120, 30, 90))))
    partial_res.print_stages(args, tmp_path, tmp_path / "none")
    assert capsys.readouterr().out.splitlines()[1].split() == ["rec", "boxes", "val", "50.00", "-", "-", "-", "-", "3.5"]


def test_what_retraining_learns_from(chain, shapes):
    """True masks of the subset, pseudo masks elsewhere, none that is empty or unlike its box, and no hidden mask is read."""
    out, _ = chain
    train = data.RefDataset(shapes / "refshapes" / "train.json", None, None, partial(
        partial_res.make_targets, points=5, bins=32, contour="largest", sampling="uniform"))
    args = partial_res.of_stage(parse(partial_res.get_parser(), [*CHAIN, "--data-root", str(shapes)]), "retrain")
    supervised = partial_res.has_masks(args, train)
    train.rles = [rle if any(supervised[e] and i in meant for e, meant in enumerate(train.objects_of)) else None
                  for i, rle in enumerate(train.rles)]  # as where nobody drew them
    path, prepared = out.parent / "other" / "pseudo" / "masks.json", json.loads((out / "pseudo" / "masks.json").read_text())
    path.parent.mkdir(parents=True)
    for label in prepared["labels"]:
        e = int(np.flatnonzero(train.sent_ids == label["id"])[0])
        label["mask"] = masks.encode(partial_res.box_mask(train, train.objects_of[e]))
        label["D"], label["points"] = 0.0, [[1, 1], [9, 1], [9, 9]]
    width, height = train.sizes[train.expression_image[np.flatnonzero(train.sent_ids == prepared["labels"][0]["id"])[0]]].tolist()
    prepared["labels"][0]["mask"] = masks.encode(np.zeros((height, width), bool))
    prepared["labels"][1]["D"] = 0.1
    path.write_text(json.dumps(prepared))
    assert args.threshold == math.inf
    all_labels, _ = partial_res.read_pseudo(args, path, train)
    args.threshold = 0.1
    pseudo, _ = partial_res.read_pseudo(args, path, train)
    assert len(pseudo) == len(prepared["labels"]) - 2 and len(all_labels) == len(pseudo) + 1
    for flags, expected in (([], 5), (["--no-rpp"], 3)):
        args.rpp = not flags
        view = partial_res.training_view(args, train, path)
        assert sum(map(len, view.of_image)) == supervised.sum() + len(pseudo)
        view.encode, view.canvas = partial_res.frontend(args, VOCABULARY)
        e = next(e for e in pseudo if sum(view.objects_of[o] == view.objects_of[e] for o in pseudo) > 1)
        tokens = view[(0, int(view.expression_image[e]), np.array([e]))]["targets"]["tokens"][0]
        assert (tokens < 32).sum() == 2 * expected
        if not flags:  # sentences about one object keep a contour each
            same = np.array([o for o in pseudo if view.objects_of[o] == view.objects_of[e]])
            view.targets.keywords["pseudo"][same[-1]] = masks.encode(np.ones(view.sizes[view.expression_image[e]][::-1], bool))
            rows = view[(0, int(view.expression_image[e]), same)]["targets"]["tokens"]
            assert same[0] == e and (rows[0] == tokens).all() and (rows[-1] != tokens).any()
    args.stage = "res"
    for e in partial_res.training_view(args, train, path).of_image:
        assert supervised[e].all()


@pytest.mark.parametrize("flags, sentence", [
    (["--dim", "18"], "multiple of 4"), (["--text-dim", "15"], "--text-dim even"), (["--size", "60"], "multiple of 32"),
    (["--rec-from", "{rec}", "--dim", "32"], "made with --dim 16"), (["--out", "{out}", "--lr", "1"], "give the same settings to go on"),
    (["--rec-from", "{rec}", "--waves", "3"], "made with --waves 2.0"),
    (["--rec-from", "{rec}", "--pseudo-from", "{out}/pseudo/masks.json", "--ratio", "10"], "was made with --ratio 50; say the same"),
])
def test_bad_input(chain, shapes, tmp_path, flags, sentence):
    out, _ = chain
    words = [word.format(rec=out / "rec" / "best.pt", out=out) for word in flags]
    with pytest.raises(UserError, match=sentence):
        partial_res.main([*CHAIN, "--data-root", str(shapes), "--out", str(tmp_path / "r"), *words])


@pytest.mark.parametrize("flags, sentence", [
    (["--stage", "res"], "rec/best.pt does not exist"), (["--rec-from", "none.pt"], "none.pt does not exist"),
    (["--stage", "retrain", "--rec-from", __file__], "masks.json does not exist"), (["--pseudo-from", "none.json"], "none.json does not exist"),
    (["--pseudo-from", __file__, "--retrain-from", "res"], "res/best.pt does not exist"),
    (["--stage", "rec", "--rec-from", "x.pt"], "--rec-from takes the place of the stage rec"),
    (["--stage", "res", "--pseudo-from", "x.json"], "--pseudo-from takes the place of the stage res"),
    (["--jitter", "0.5", "1.5"], "--expressions-per-image 1"), (["--jitter", "1.5", "0.5"], "smallest scale"),
    (["--base", "released", "--weights", "x.pt"], "converted, by --rec-from"), (["--points", "1"], "--points 1: give at least 2"),
    (["--rec-epochs", "0"], "--rec-epochs 0: give at least 1"), (["--heads", "0"], "--heads 0: give at least 1"),
    (["--sigma", "-8"], "no bandwidth"), (["--pseudo-weights", "last", "--ratio", "100"], "--ratio 100 needs none"),
    (["--distance", "parts", "--ratio", "100"], "--ratio 100 needs none"), (["--pseudo-weights", "last", "--ema", "0"], "--ema 0 has none"),
])
def test_refused_before_anything_is_trained(shapes, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        partial_res.main([*CHAIN, "--data-root", str(shapes), "--out", str(tmp_path / "r"), *flags])
    assert not (tmp_path / "r").exists()


def test_sentences_that_mean_nothing_are_refused(shapes):
    train = data.RefDataset(shapes / "refshapes" / "train.json", None, None)
    partial_res.check_corpus(train)
    train.objects_of[3] = []
    with pytest.raises(UserError, match="means no object"):
        partial_res.check_corpus(train)
