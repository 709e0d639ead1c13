"""RefShapes, the embedded corpora: drawn scenes in the published corpora's own files.

    python -m data_prep.refshapes --data-root data              # draw, write, convert; under a minute on two cores
    python -m data_prep.refshapes --data-root data --blind      # what perfect masks reach without reading sentences
    python -m data_prep.refshapes --sheet sheet.png             # a contact sheet of val scenes

`<data-root>/raw/refshapes/` holds `images/` and, for `refshapes`, `refshapes+` and `refshapesg`, COCO's
`instances.json` and REFER's `refs(unc).p`; `data_prep.refcoco` converts them, like the real corpora, to
`<data-root>/<name>/`. The three differ in their sentences, after RefCOCO (short, with places), RefCOCO+ (no
places) and RefCOCOg (long, with relations).

Everything is drawn and worded with integer arithmetic and this file's own random numbers, so that a seed gives
the same pixels and the same files on any version of the libraries. The photographs behind the shapes are those
that scikit-image installs; each serves one split only. A sentence of place, order or relation always has at
least two objects that match its head words ("ball" in "ball left of the box"), and its own object fits it by a
clear margin where no other does.
"""
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import string
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.config import Parser, UserError, run, write_text
from common.masks import area, bbox, encode, from_polygons

NAMES = ("refshapes", "refshapes+", "refshapesg")
VERSION = 1
DIGEST = "6f578917e53056ed8d9b16fa84df0e40566dee3cb809149a480663eadfa08c57"  # `digest` of the default scale, seed 0
SCALES = {"default": {"train": 3000, "val": 300, "testA": 200, "testB": 200, "pool": 200},
          "large": {"train": 20000, "val": 1500, "testA": 1000, "testB": 1000, "pool": 1000}}


# ---- randomness ---------------------------------------------------------------------------------------------

class Random:
    """SplitMix64 (Steele, Lea and Flood 2014) from a key of integers: a stream that no library version can change."""
    GAMMA = 0x9E3779B97F4A7C15

    def __init__(self, *key):
        self.state = 0
        for part in key:
            self.state = int(self._mix(np.array([(self.state + part * self.GAMMA) % 2 ** 64], np.uint64))[0])

    @staticmethod
    def _mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def raw(self, count):
        """(count,) uint64 numbers, each bit random."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(self.GAMMA) + np.uint64(self.state)
        self.state = (self.state + count * self.GAMMA) % 2 ** 64
        return self._mix(steps)

    def integer(self, low, high):
        """An integer in low..high, both included."""
        self.state = z = (self.state + self.GAMMA) % 2 ** 64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2 ** 64
        return low + ((z ^ (z >> 31)) >> 32) * (high - low + 1) // 2 ** 32

    def chance(self, percent):
        """True in `percent` of 100 cases."""
        return self.integer(0, 99) < percent

    def pick(self, items, weights=None):
        """One of `items`, uniformly or by integer weights."""
        if weights is None:
            return items[self.integer(0, len(items) - 1)]
        place = self.integer(0, sum(weights) - 1)
        for item, weight in zip(items, weights):
            place -= weight
            if place < 0:
                return item

    def shuffled(self, items):
        """A new list in random order."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.integer(0, i)
            items[i], items[j] = items[j], items[i]
        return items


# ---- kinds and drawing --------------------------------------------------------------------------------------

ROUND, CORNERED = "round", "cornered"
# super-category, synonyms, and the size in per mille that makes the kinds' areas alike
KINDS = {"ball": (ROUND, ("ball", "circle", "ball"), 900), "ring": (ROUND, ("ring", "donut", "hoop"), 1000),
         "moon": (ROUND, ("moon", "crescent", "moon"), 1100), "heart": (ROUND, ("heart",), 950),
         "box": (CORNERED, ("box", "square", "box"), 1000), "star": (CORNERED, ("star",), 1200),
         "triangle": (CORNERED, ("triangle",), 1100), "cross": (CORNERED, ("cross", "plus"), 1000),
         "diamond": (CORNERED, ("diamond",), 1150)}
KIND_NAMES = tuple(KINDS)
COLOURS = {"red": (208, 36, 40), "green": (44, 160, 58), "blue": (40, 84, 214), "yellow": (240, 214, 48),
           "purple": (150, 52, 178), "white": (240, 240, 238), "black": (34, 34, 38)}
TURNS = ((1024, 0), (989, 265), (989, -265))  # 1024 times cosine and sine of 0, 15 and -15 degrees
PHOTOS = {"train": ("astronaut", "brick", "camera", "moon", "motorcycle_left", "gravel", "coins", "clock_motion"),
          "val": ("chelsea", "grass"), "testA": ("coffee", "cell"), "testB": ("ihc", "page")}


@dataclass
class Thing:
    """One object: what it is, its centre and radius in pixels, and its masks (H,W) bool."""
    kind: str
    colour: str
    texture: str
    size: str
    x: int = 0
    y: int = 0
    r: int = 0
    turn: tuple = TURNS[0]
    whole: np.ndarray = None
    visible: np.ndarray = None


def inside(kind, u, v):
    """Which points belong to the shape: (…) bool from coordinates in thousandths of its radius, y downwards."""
    a, b = np.abs(u), np.abs(v)
    square = u * u + v * v
    if kind == "ball":
        return square <= 1000 ** 2
    if kind == "ring":
        return (square <= 1000 ** 2) & (square >= 520 ** 2)
    if kind == "moon":
        return (square <= 1000 ** 2) & ((u - 480) ** 2 + v * v >= 760 ** 2)
    if kind == "heart":  # (x^2 + y^2 - 1)^3 <= x^2 y^3, in hundredths
        x, y = u * 115 // 1000, (100 - v * 115) // 1000 + 10
        return (x * x + y * y - 10000) ** 3 <= 100 * x * x * y ** 3
    if kind == "box":
        return np.maximum(a, b) <= 820
    if kind == "diamond":
        return a * 1000 + b * 640 <= 640000
    if kind == "triangle":
        return (v <= 640) & (a * 1640 <= 920 * (v + 1000))
    if kind == "cross":
        return (np.minimum(a, b) <= 330) & (np.maximum(a, b) <= 960)
    lines = ((0, 1000), (951, 309), (588, -809), (-588, -809), (-951, 309))  # a star's point lies behind four of five
    return sum((u * n + v * m <= 309000).astype(np.int64) for n, m in lines) >= 4


def local(thing, height, width):
    """Slices of the window around the object, and the coordinates u, v of its pixels in thousandths of its radius."""
    reach = thing.r * 3 // 2
    rows = slice(max(0, thing.y - reach), min(height, thing.y + reach + 1))
    columns = slice(max(0, thing.x - reach), min(width, thing.x + reach + 1))
    y = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None] - thing.y
    x = np.arange(columns.start, columns.stop, dtype=np.int64)[None] - thing.x
    cos, sin = thing.turn
    unit = 1024 * thing.r * KINDS[thing.kind][2] // 1000
    return (rows, columns), (x * cos + y * sin) * 1000 // unit, (y * cos - x * sin) * 1000 // unit


@lru_cache(maxsize=None)
def photograph(name):
    """(H,W,3) uint8 of a photograph that scikit-image installs. Raises UserError where it is missing."""
    import skimage  # only the folder is needed, and not by those who read a finished corpus
    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except OSError:
        raise UserError(f"{path} cannot be read; reinstall scikit-image, whose photographs RefShapes uses.") from None


def background(rng, name, height, width):
    """A crop of a photograph, mirrored, shrunk by a whole factor, muted and tinted by chance: (H,W,3) int32."""
    photo = photograph(name)
    fits = [f for f in (1, 2, 3) if photo.shape[0] // f >= height and photo.shape[1] // f >= width]
    factor = rng.pick(fits)
    top = rng.integer(0, photo.shape[0] - height * factor)
    left = rng.integer(0, photo.shape[1] - width * factor)
    crop = photo[top:top + height * factor, left:left + width * factor].astype(np.int32)
    crop = crop[:, ::-1] if rng.chance(50) else crop
    total = sum(crop[i::factor, j::factor] for i in range(factor) for j in range(factor))
    crop = (2 * total + factor * factor) // (2 * factor * factor)  # means, rounded half up
    tint = np.array([rng.integer(170, 256) for _ in range(3)], np.int32)
    calm = np.array([rng.integer(80, 170) for _ in range(3)], np.int32)
    strength = rng.integer(110, 190)
    return ((crop * tint >> 8) * strength + calm * (256 - strength)) >> 8


def paint(canvas, thing):
    """Draw the object onto canvas (H,W,3) int32, and fill in `thing.whole`."""
    height, width = canvas.shape[:2]
    window, u, v = local(thing, height, width)
    shape = inside(thing.kind, u, v)
    thing.whole = np.zeros((height, width), bool)
    thing.whole[window] = shape
    base = np.array(COLOURS[thing.colour])
    bright = base.sum() > 450
    other = base * 5 // 9 if bright else np.minimum(base + 105, 255)
    if thing.texture == "striped":
        marked = (u + 4100) % 500 < 200
    elif thing.texture == "dotted":
        marked = ((u + 4000) % 600 - 300) ** 2 + ((v + 4000) % 600 - 300) ** 2 < 180 ** 2
    else:
        marked = np.zeros_like(shape)
    colour = np.where(marked[..., None], other, base) * (256 - (u + v)[..., None] * 36 // 1000) >> 8
    inner = np.pad(shape, 1)
    inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    rim = shape & ~inner
    colour[rim] = base * 6 // 10 if thing.colour != "black" else 92
    canvas[window][shape] = colour[shape]


def bar(rng, thing, height, width):
    """(H,W) bool of a straight bar, 4 to 6 pixels wide, that runs across the picture over `thing`."""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    a, b = rng.pick(((1, 0), (0, 1), (3, 1), (3, -1), (1, 3), (-1, 3)))
    shift = rng.integer(-thing.r // 3, thing.r // 3)
    length = 1 if a * b == 0 else 3  # about the length of (a, b)
    distance = a * (x - thing.x) + b * (y - thing.y) - shift * length
    half = rng.integer(2, 3) * length
    return (distance >= -half) & (distance < half)


# ---- scenes -------------------------------------------------------------------------------------------------

def things_of(rng, split):
    """What a scene holds, before places are given: a group of one kind, a second smaller one, and others."""
    few = rng.shuffled(COLOURS)[:rng.integer(3, 4)]
    allowed = [k for k in KINDS if KINDS[k][0] == {"testA": ROUND, "testB": CORNERED}.get(split, KINDS[k][0])]
    first, second = rng.shuffled(allowed)[:2]
    kinds = [first] * rng.pick((2, 3, 4), (2, 5, 2)) + [second] * rng.pick((1, 2, 3), (3, 3, 2))
    kinds += [rng.pick(KIND_NAMES) for _ in range(rng.pick((0, 1, 2), (2, 3, 2)))]
    return [Thing(kind, rng.pick(few), rng.pick(("plain", "striped", "dotted"), (72, 16, 12)),
                  rng.pick(("small", "big"))) for kind in kinds]


def eligible(things, split):
    """Positions of the objects that a split's sentences may mean: testA has the round kinds, testB the others."""
    only = {"testA": ROUND, "testB": CORNERED}.get(split)
    return [i for i, thing in enumerate(things) if only in (None, KINDS[thing.kind][0])]


def overlaps(things):
    """(N,N) list of lists: the pixels that two objects' whole shapes share; on the diagonal each one's own."""
    flat = np.stack([thing.whole.ravel() for thing in things]).astype(np.float32)  # sums below 2**24 are exact
    return (flat @ flat.T).astype(np.int64).tolist()


def placed(rng, things, height, width):
    """Give every object a centre and a radius; False where one finds no room."""
    side = max(height, width)
    close = 60 if rng.chance(40) else 88  # per cent of the two radii that centres keep apart
    for i, thing in enumerate(things):
        thing.r = side * (rng.integer(80, 102) if thing.size == "small" else rng.integer(138, 175)) // 1000
        thing.turn = rng.pick(TURNS)
        edge = thing.r * 9 // 10
        for _ in range(40):
            thing.x, thing.y = rng.integer(edge, width - 1 - edge), rng.integer(edge, height - 1 - edge)
            if all(10000 * ((thing.x - o.x) ** 2 + (thing.y - o.y) ** 2) >= (close * (thing.r + o.r)) ** 2
                   for o in things[:i]):
                break
        else:
            return False
    return True


def make_scene(seed, split, index):
    """One scene, a pure function of its arguments.

    split: train, val, testA, testB or pool (train-like, without sentences). Returns {"image": (H,W,3) uint8, "photo",
    "things": [Thing] from back to front, "sentences": {name: [{"thing", "text", "kind", "op", "head"}]}} where `thing`
    is the position of the object meant and `head` are the positions of all objects that match the head words.
    """
    rng = Random(VERSION, seed, ("train", "val", "testA", "testB", "pool").index(split), index)
    while True:
        height, width = rng.integer(120, 190), rng.integer(120, 190)
        things = rng.shuffled(things_of(rng, split))
        photo = rng.pick(PHOTOS["train" if split == "pool" else split])
        if not placed(rng, things, height, width):
            continue
        canvas = background(rng, photo, height, width)
        free = np.ones((height, width), bool)
        for thing in things:
            paint(canvas, thing)
        if rng.chance(40):
            over = bar(rng, rng.pick(things), height, width)
            canvas[over] = np.array(rng.pick(((120, 92, 66), (128, 128, 132), (72, 66, 64))))
            free &= ~over
        for thing in reversed(things):
            thing.visible = thing.whole & free
            free &= ~thing.whole
        if any(t.visible.sum() < max(60, t.whole.sum() * 55 // 100) for t in things):
            continue
        sentences = {}
        if split != "pool":
            overlap = overlaps(things)
            meant = [list(meanings(things, i, overlap, height, width)) for i in eligible(things, split)]
            sentences = {name: say(rng, name, meant) for name in NAMES}
        if all(len(said) >= 4 for said in sentences.values()):
            break
    noise = rng.raw(-(-canvas.size // 8)).astype("<u8").view(np.uint8)[:canvas.size].reshape(canvas.shape)
    image = np.clip(canvas + noise.astype(np.int64) % 9 - 4, 0, 255).astype(np.uint8)
    return {"image": image, "photo": photo, "things": things, "sentences": sentences}


# ---- meanings: what can be said of an object without ambiguity ----------------------------------------------

ATTRIBUTES = ("size", "texture", "colour", "kind")
HEADS = ((), ("kind",), ("colour",), ("colour", "kind"), ("size", "kind"), ("size", "colour", "kind"),
         ("texture", "kind"), ("texture",), ("texture", "colour", "kind"), ("size", "colour"))
ANCHORS = (("kind",), ("colour", "kind"), ("size", "kind"), ("size", "colour", "kind"), ("texture", "kind"))


def phrases(things, one, patterns):
    """{phrase: matching positions} of what words of attributes say of object `one`; a phrase is {attribute: value}."""
    found = []
    for pattern in patterns:
        words = {name: getattr(things[one], name) for name in pattern}
        if words.get("texture") != "plain":
            found.append((words, [i for i, t in enumerate(things)
                                  if all(getattr(t, name) == value for name, value in words.items())]))
    return found


def places(things, one, head, height, width):
    """The places and orders, as (kind, op), that `one` alone holds among the objects of `head`, by clear margins."""
    t, others = things[one], [things[i] for i in head if i != one]
    gaps = {"x": max(10, width * 8 // 100), "y": max(10, height * 8 // 100)}
    for axis, low, high in (("x", "left", "right"), ("y", "top", "bottom")):
        ahead = [getattr(o, axis) - getattr(t, axis) for o in others]
        if min(ahead) >= gaps[axis]:
            yield "place", low
        if max(ahead) <= -gaps[axis]:
            yield "place", high
        for sign, side in ((1, low), (-1, high)):
            line = sorted([0] + [sign * a for a in ahead])
            rank = line.index(0)
            gap = gaps[axis] * 3 // 4
            if len(line) >= 3 and rank in (1, 2) and rank < len(line) - 1 and all(
                    b - a >= gap for a, b in zip(line[:rank + 1], line[1:rank + 2])):
                yield "order", f"{'first second third'.split()[rank]} {side}"
    share = [(o.x * 100 // width, o.y * 100 // height) for o in (t, *others)]
    for right in (0, 1):
        for bottom in (0, 1):
            here = [(100 - x if right else x, 100 - y if bottom else y) for x, y in share]
            if max(here[0]) <= 42 and all(max(o) >= 55 and sum(o) >= sum(here[0]) + 15 for o in here[1:]):
                yield "place", f"{'bottom' if bottom else 'top'} {'right' if right else 'left'}"
    off = [(2 * o.x - width) ** 2 + (2 * o.y - height) ** 2 for o in (t, *others)]
    spread = sorted(o.x - t.x for o in others)
    if len(others) == 2 and spread[0] <= -gaps["x"] and spread[1] >= gaps["x"] and off[0] * 9 <= min(off[1:]) * 4:
        yield "place", "middle"


def sizes(things, one, head):
    """`biggest` or `smallest` where `one` is that among `head` by a quarter of its radius."""
    others = [things[i].r for i in head if i != one]
    if things[one].r * 4 >= max(others) * 5:
        yield "attribute", "biggest"
    if things[one].r * 5 <= min(others) * 4:
        yield "attribute", "smallest"


def relations(things, one, head, anchor, overlap, height, width):
    """The relations, as ("relation", op), to object `anchor` that `one` alone has among the objects of `head`."""
    t, a = things[one], things[anchor]
    others = [things[i] for i in head if i not in (one, anchor)]
    for axis, extent, low, high in (("x", width, "left of", "right of"), ("y", height, "above", "below")):
        across = "y" if axis == "x" else "x"
        for sign, op in ((-1, low), (1, high)):
            ahead = sign * (getattr(t, axis) - getattr(a, axis))
            if ahead * 10 >= extent and ahead >= abs(getattr(t, across) - getattr(a, across)) and all(
                    sign * (getattr(o, axis) - getattr(a, axis)) * 20 <= -extent for o in others):
                yield "relation", op
    far = [(o.x - a.x) ** 2 + (o.y - a.y) ** 2 for o in (t, *others)]
    if far[0] * 100 <= 36 * min(far[1:]) and far[0] * 100 <= 12 * (height ** 2 + width ** 2):
        yield "relation", "near"
    if overlap[one][anchor] * 12 >= overlap[one][one] and not any(
            overlap[i][anchor] for i in head if i not in (one, anchor)):
        yield "relation", "behind" if one < anchor else "in front"
    if t.r * 4 >= a.r * 5 and all(o.r * 10 <= a.r * 9 for o in others):
        yield "relation", "bigger"
    if t.r * 5 <= a.r * 4 and all(o.r * 9 >= a.r * 10 for o in others):
        yield "relation", "smaller"
    if t.colour == a.colour and all(o.colour != a.colour for o in others):
        yield "relation", "same colour"


def meanings(things, one, overlap, height, width):
    """All that can be said of object `one`: dicts of kind, op, words (of the head), head and, in relations, anchor."""
    anchors = [(i, words) for i in range(len(things)) if i != one
               for words, match in phrases(things, i, ANCHORS) if len(match) == 1]
    known = {}  # several phrases can have the same matches
    for words, head in phrases(things, one, HEADS):
        base = {"thing": one, "words": words, "head": head}
        if len(head) == 1:
            yield {**base, "kind": "attribute", "op": "plain"}
            continue
        if tuple(head) not in known:
            known[tuple(head)] = (
                list(sizes(things, one, head)), list(places(things, one, head, height, width)),
                [(*said, anchor) for anchor in sorted({i for i, _ in anchors}) if len(head) - (anchor in head) >= 2
                 for said in relations(things, one, head, anchor, overlap, height, width)])
        by_size, by_place, by_relation = known[tuple(head)]
        for kind, op in (by_size if "size" not in words else []) + by_place:
            yield {**base, "kind": kind, "op": op}
        for kind, op, anchor in by_relation if words else ():
            yield from ({**base, "kind": kind, "op": op, "anchor": phrase} for i, phrase in anchors if i == anchor
                        and not (op == "same colour" and ("colour" in words or "colour" in phrase))
                        and not (op in ("bigger", "smaller") and ("size" in words or "size" in phrase)))


# ---- wording ------------------------------------------------------------------------------------------------

WORDS = {"small": ("small", "little", "small"), "big": ("big", "large", "big"), "striped": ("striped",),
         "dotted": ("dotted", "spotted"), "red": ("red",), "green": ("green",), "blue": ("blue",),
         "yellow": ("yellow", "gold", "yellow"), "purple": ("purple", "violet", "purple"), "white": ("white",),
         "black": ("black",), "": ("one", "thing", "shape", "object"),
         **{kind: synonyms for kind, (_, synonyms, _) in KINDS.items()}}
SHORT = {
    "plain": ("{n}", "{n}", "the {n}"), "biggest": ("biggest {n}", "largest {n}"), "smallest": ("smallest {n}",),
    "left": ("left {n}", "{n} on the left", "leftmost {n}", "{n} on left", "{n} far left"),
    "right": ("right {n}", "{n} on the right", "rightmost {n}", "{n} on right", "{n} far right"),
    "top": ("top {n}", "{n} at the top", "highest {n}", "upper {n}"),
    "bottom": ("bottom {n}", "{n} at the bottom", "lowest {n}", "lower {n}"),
    "middle": ("middle {n}", "{n} in the middle", "center {n}"),
    "corner": ("{v} {h} {n}", "{n} {v} {h}", "{n} in {v} {h} corner"),
    "order": ("{o} {n} from {s}", "{n} {o} from {s}", "{o} {n} from the {s}", "{o} from {s} {n}"),
    "left of": ("{n} left of {a}", "{n} to the left of the {a}"),
    "right of": ("{n} right of {a}", "{n} to the right of the {a}"),
    "above": ("{n} above {a}", "{n} over the {a}"), "below": ("{n} below {a}", "{n} under the {a}"),
    "near": ("{n} next to {a}", "{n} by the {a}", "{n} closest to {a}", "{n} near {a}"),
    "behind": ("{n} behind {a}", "{n} behind the {a}"), "in front": ("{n} in front of {a}",),
    "bigger": ("{n} bigger than {a}",), "smaller": ("{n} smaller than {a}",),
    "same colour": ("{n} same color as {a}",)}
LONG = {
    "plain": ("the {n} in this picture", "the only {n} that you can see", "a {n} with other things around it"),
    "biggest": ("the {n} that is the biggest of them all", "the largest {n} in the picture"),
    "smallest": ("the {n} that is the smallest of them all", "the smallest {n} in the picture"),
    "left": ("the {n} on the left side of the picture", "the {n} that is farthest to the left"),
    "right": ("the {n} on the right side of the picture", "the {n} that is farthest to the right"),
    "top": ("the {n} at the top of the picture", "the {n} that is above all the others"),
    "bottom": ("the {n} at the bottom of the picture", "the {n} that is below all the others"),
    "middle": ("the {n} in the middle of the picture", "the {n} that has one on each side of it"),
    "corner": ("the {n} in the {v} {h} corner of the picture", "the {n} that is at the {v} {h}"),
    "order": ("the {n} that is the {o} one from the {s}", "the {o} {n} counting from the {s}"),
    "left of": ("the {n} that is to the left of the {a}", "a {n} on the left of the {a}"),
    "right of": ("the {n} that is to the right of the {a}", "a {n} on the right of the {a}"),
    "above": ("the {n} that is above the {a}", "a {n} higher up than the {a}"),
    "below": ("the {n} that is below the {a}", "a {n} lying under the {a}"),
    "near": ("the {n} that is next to the {a}", "the {n} closest to the {a}", "a {n} lying beside the {a}"),
    "behind": ("the {n} that is partly hidden behind the {a}", "a {n} behind the {a}"),
    "in front": ("the {n} that lies in front of the {a}", "a {n} covering part of the {a}"),
    "bigger": ("the {n} that is bigger than the {a}",), "smaller": ("the {n} that is smaller than the {a}",),
    "same colour": ("the {n} that has the same color as the {a}",)}
SIDES = ("left", "right", "leftmost", "rightmost")
# of 100 sentences, how many of each kind are asked for; and the relations that a style does not use
MIX = {"refshapes": {"attribute": 22, "place": 28, "order": 24, "relation": 26},
       "refshapes+": {"attribute": 45, "relation": 55},
       "refshapesg": {"attribute": 22, "place": 14, "order": 12, "relation": 52}}
UNSAID = {"refshapes": ("bigger", "smaller", "same colour"), "refshapes+": ("left of", "right of"), "refshapesg": ()}


def noun(rng, words):
    """Words of attributes as a noun phrase: {"colour": "red"} -> "red thing"."""
    return " ".join(rng.pick(WORDS[words.get(name, "")]) for name in ATTRIBUTES if name in words or name == "kind")


def worded(rng, name, meaning):
    """The sentence that says a meaning in the style of a corpus."""
    op = meaning["op"]
    ordinal, _, side = op.partition(" ") if meaning["kind"] == "order" else ("", "", "")
    vertical, _, horizontal = op.partition(" ")
    key = "order" if side else "corner" if meaning["kind"] == "place" and horizontal else op
    template = rng.pick((LONG if name == "refshapesg" else SHORT)[key])
    return template.format(n=noun(rng, meaning["words"]), a=noun(rng, meaning.get("anchor", {})),
                           o=ordinal, s=side, v=vertical, h=horizontal)


def mistyped(rng, text):
    """The sentence with two letters of a word swapped, or one left out; never in a word that mirroring exchanges."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word not in SIDES]
    if not long:
        return text
    i = rng.pick(long)
    at = rng.integer(1, len(words[i]) - 2)
    word = words[i]
    words[i] = word[:at] + (word[at + 1] + word[at] + word[at + 2:] if rng.chance(50) else word[at + 1:])
    return " ".join(words)


def say(rng, name, meant):
    """The sentences of a scene in one style: about seven, of three or four of its objects.

    meant: for each object that may be meant, the list of its `meanings`.
    """
    choices = [m for one in rng.shuffled(meant)[:rng.integer(3, 4)] for m in one
               if m["kind"] in MIX[name] and m["op"] not in UNSAID[name]]
    said, texts = [], set()
    for _ in range(rng.integer(5, 9)):
        kinds = [kind for kind in MIX[name] if any(m["kind"] == kind for m in choices)]
        if not kinds:
            break
        kind = rng.pick(kinds, [MIX[name][k] for k in kinds])
        ops = sorted({m["op"] for m in choices if m["kind"] == kind})
        op = rng.pick(ops, [1 if op.startswith("third") else 3 for op in ops])
        fitting = [m for m in choices if m["kind"] == kind and m["op"] == op]
        meaning = rng.pick(fitting, [{1: 6, 2: 6, 3: 4, 4: 3}.get(len(m["head"]), 1) for m in fitting])
        text = worded(rng, name, meaning)
        if rng.integer(0, 999) < 25:
            text = mistyped(rng, text)
        if text not in texts:
            texts.add(text)
            said.append({"thing": meaning["thing"], "text": text, "kind": kind, "op": op, "head": meaning["head"]})
    return said


# ---- writing ------------------------------------------------------------------------------------------------

def outline(mask, left=0, top=0):
    """A mask's outline along pixel edges: a list of polygons [x0, y0, x1, y1, ...], or None where it has a hole.

    left, top: where the mask's corner lies in the image.
    """
    grid = np.pad(mask, 1).astype(np.int8)
    across, down = np.diff(grid, axis=0)[:, 1:-1], np.diff(grid, axis=1)[1:-1]
    after = {}  # edges by their start, each with the object on its right-hand side
    for change, (dx, dy), (fx, fy) in ((across == 1, (1, 0), (0, 0)), (across == -1, (-1, 0), (1, 0)),
                                       (down == 1, (0, -1), (0, 1)), (down == -1, (0, 1), (0, 0))):
        y, x = change.nonzero()
        for start in zip((x + left + fx).tolist(), (y + top + fy).tolist()):
            after.setdefault(start, []).append((start[0] + dx, start[1] + dy))
    polygons = []
    while after:
        here = next(iter(after))
        corners, step, double_area = [], None, 0
        while here in after:
            ends = after[here]
            if len(ends) > 1 and step:  # two parts touch at this corner: turn right, which keeps them apart
                ends.sort(key=lambda end: end == (here[0] - step[1], here[1] + step[0]))
            there = ends.pop()
            if not ends:
                del after[here]
            if (there[0] - here[0], there[1] - here[1]) != step:
                corners += here
            step = (there[0] - here[0], there[1] - here[1])
            double_area += here[0] * there[1] - there[0] * here[1]
            here = there
        if double_area < 0:
            return None
        polygons.append(corners)
    return polygons


def annotation(mask, as_polygon):
    """COCO's bbox, area and segmentation of a mask: polygons where wanted and exact, else an uncompressed RLE."""
    rle = encode(mask)
    x, y, w, h = (int(value) for value in bbox(rle, checked=True))
    segmentation = outline(mask[y:y + h, x:x + w], x, y) if as_polygon else None
    if not segmentation or from_polygons(segmentation, *mask.shape) != rle:
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
        segmentation = {"size": list(mask.shape), "counts": np.diff([0, *edges, len(flat)]).tolist()}
    return {"bbox": [x, y, w, h], "area": area(rle, checked=True), "iscrowd": 0, "segmentation": segmentation}


def draw(seed, folder, task):
    """Draw and save scene `task` = (image_id, split, index); returns its COCO image, annotations and sentences."""
    image_id, split, index = task
    scene = make_scene(seed, split, index)
    height, width = scene["image"].shape[:2]
    file_name = f"refshapes_{image_id:06d}.png"
    Image.fromarray(scene["image"]).save(Path(folder) / file_name, compress_level=1)
    annotations = []
    for i, thing in enumerate(scene["things"]):
        cut = (thing.visible != thing.whole).any()
        annotations.append({"id": image_id * 100 + i, "image_id": image_id,
                            "category_id": KIND_NAMES.index(thing.kind) + 1,
                            **annotation(thing.visible, as_polygon=not cut or (image_id + i) % 2 == 0)})
    return {"id": image_id, "file_name": file_name, "width": width, "height": height}, annotations, scene["sentences"]


def refs_of(name, scenes, splits):
    """REFER's list of refs, one for each object that has sentences, from what `draw` returned for every scene."""
    refs, sentence_id = [], 0
    for (image, annotations, sentences), split in zip(scenes, splits):
        said = sentences.get(name, [])
        for one in sorted({s["thing"] for s in said}):
            listed = []
            for s in said:
                if s["thing"] == one:
                    sentence_id += 1
                    listed.append({"sent": s["text"], "raw": s["text"], "tokens": s["text"].split(), "kind": s["kind"],
                                   "sent_id": sentence_id, "head": [annotations[i]["id"] for i in s["head"]]})
            refs.append({"ref_id": len(refs) + 1, "ann_id": annotations[one]["id"], "image_id": image["id"],
                         "category_id": annotations[one]["category_id"], "file_name": image["file_name"],
                         "split": split, "sentences": listed, "sent_ids": [s["sent_id"] for s in listed]})
    return refs


def write_raw(folder, scale, seed, jobs):
    """Draw a whole corpus into `folder`: images/, and instances.json and refs(unc).p for each of NAMES."""
    (folder / "images").mkdir(parents=True)
    tasks = [(split, index) for split, count in SCALES[scale].items() for index in range(count)]
    tasks = [(image_id, *task) for image_id, task in enumerate(tasks, start=1)]
    with workers(jobs) as each:
        scenes = list(tqdm(each(partial(draw, seed, str(folder / "images")), tasks), "drawing RefShapes", len(tasks),
                           unit=" scenes", disable=None))
    instances = {"info": {"description": "RefShapes", "version": VERSION, "scale": scale, "seed": seed},
                 "licenses": [], "images": [image for image, _, _ in scenes],
                 "annotations": [a for _, annotations, _ in scenes for a in annotations],
                 "categories": [{"id": i, "name": kind, "supercategory": KINDS[kind][0]}
                                for i, kind in enumerate(KIND_NAMES, start=1)]}
    text = json.dumps(instances, separators=(",", ":"))
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "instances.json").write_text(text, encoding="utf-8")
        with open(folder / name / "refs(unc).p", "wb") as file:
            pickle.dump(refs_of(name, scenes, [task[1] for task in tasks]), file, protocol=2)


@contextlib.contextmanager
def workers(jobs):
    """An ordered parallel `map` over `jobs` processes; the built-in one for a single job."""
    if jobs <= 1:
        yield map
        return
    # forked, because a process that starts afresh would import the training script that draws its corpus, and torch, anew
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield partial(pool.imap, chunksize=20)
        pool.close()
        pool.join()


def wordpieces(sentences):
    """The lines of a WordPiece vocabulary: special tokens, letters and digits (also as ##), words used 30 times."""
    signs = string.digits + string.ascii_lowercase
    counts = {}
    for word in " ".join(sentences).split():
        counts[word] = counts.get(word, 0) + 1
    words = sorted(word for word, count in counts.items() if count >= 30 and len(word) > 1)
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), *words]


def read_refs(path):
    """REFER's refs of a file that `write_raw` wrote: plain data, with each sentence's `head`."""
    from data_prep.refcoco import parse_pickle, read_bytes
    return parse_pickle(read_bytes(path), path)


def digest(folder):
    """sha256 (hex) of a raw corpus: decoded pixels and parsed files, whatever their compression and byte order."""
    folder, total = Path(folder), hashlib.sha256()
    for path in sorted((folder / "images").glob("*.png")):
        with Image.open(path) as picture:
            total.update(f"{path.name} {picture.size} {picture.mode}".encode() + picture.tobytes())
    for name in NAMES:
        for parsed in (json.loads((folder / name / "instances.json").read_text(encoding="utf-8")),
                       read_refs(folder / name / "refs(unc).p")):
            total.update(json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode())
    return total.hexdigest()


# ---- the whole corpus ---------------------------------------------------------------------------------------

MARKER = "refshapes.json"  # written last, in the raw folder and in each prepared one


def is_made(data_root, name):
    """Whether `<data_root>/<name>` is a finished corpus of this version."""
    return _marker(Path(data_root) / name).get("version") == VERSION


def _marker(folder):
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def locked(path):
    """Hold the lock file: a second process waits. The system frees it when its holder ends, however it ends."""
    with open(path, "w", encoding="ascii") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks: two processes at once are not served
            pass
        yield


def make(data_root, scale="default", seed=0, jobs=2):
    """Draw the corpora where they are not there yet, and prepare each of NAMES below `data_root`.

    scale: a key of SCALES. jobs: processes. What a killed call left is finished or made again by the next one.
    Raises UserError where `data_root` holds RefShapes of another scale, seed or version, or cannot be written.
    """
    data_root, made = Path(data_root), {"version": VERSION, "scale": scale, "seed": seed}
    raw = data_root / "raw" / "refshapes"
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        with locked(raw.parent / "refshapes.lock"):
            for folder in (raw, *(data_root / name for name in NAMES)):
                found = _marker(folder)
                if found not in ({}, made) or (folder == raw and raw.exists() and not found):
                    there, asked = (", ".join(f"{key} {value}" for key, value in m.items()) for m in (found, made))
                    raise UserError(f"{folder} holds another RefShapes ({there or 'unfinished'}) than asked for "
                                    f"({asked}): remove it or choose another --data-root.")
            if not raw.exists():
                clear(raw.parent)
                part = raw.with_name(f"refshapes.part{os.getpid()}")  # a killed call's workers may yet write to theirs
                write_raw(part, scale, seed, jobs)
                write_text(part / MARKER, json.dumps(made))
                os.replace(part, raw)
                clear(raw.parent)
            missing = [name for name in NAMES if not is_made(data_root, name)]
            with workers(min(jobs, len(missing))) as each:
                for _ in tqdm(each(partial(prepare, data_root, made), missing), "converting", len(missing),
                              unit=" corpora", disable=None):
                    pass
    except OSError as error:
        raise UserError(f"cannot write RefShapes below {data_root}: {error}.") from None


def clear(folder):
    """Remove what killed calls left in `folder`."""
    for left in folder.glob("refshapes.part*"):
        shutil.rmtree(left, ignore_errors=True)


def prepare(data_root, made, name):
    """Convert one raw corpus to the prepared format, with its vocab.txt."""
    from data_prep.refcoco import convert
    raw = data_root / "raw" / "refshapes"
    convert(refs=raw / name / "refs(unc).p", instances=raw / name / "instances.json", images=raw / "images",
            dataset=name, data_root=data_root)
    train = json.loads((data_root / name / "train.json").read_text(encoding="utf-8"))["expressions"]
    write_text(data_root / name / "vocab.txt", "\n".join(wordpieces([e["text"] for e in train])) + "\n")
    write_text(data_root / name / MARKER, json.dumps(made))


def blind(data_root, name, split):
    """What perfect masks reach without the sentence, or with its head words alone: {answer: {kind: mIoU in percent}}.

    Answers: an object drawn from those that match the head words, the union of all objects, one drawn from all, the
    largest, the one nearest to the image's centre. Expected values, from the raw files. Kind "hard" is place, order
    and relation together.
    """
    raw = Path(data_root) / "raw" / "refshapes" / name
    instances = json.loads((raw / "instances.json").read_text(encoding="utf-8"))
    images = {image["id"]: image for image in instances["images"]}
    objects = {}
    for annotation in instances["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    scores = {}
    for ref in (ref for ref in read_refs(raw / "refs(unc).p") if ref["split"] == split):
        image, all_ = images[ref["image_id"]], objects[ref["image_id"]]
        iou = {o["id"]: float(o["id"] == ref["ann_id"]) for o in all_}  # visible masks of a scene never overlap
        areas = {o["id"]: o["area"] for o in all_}

        def off_centre(o):
            x, y, w, h = o["bbox"]
            return (2 * x + w - image["width"]) ** 2 + (2 * y + h - image["height"]) ** 2
        central = min(all_, key=off_centre)["id"]
        for sentence in ref["sentences"]:
            row = {"head words": np.mean([iou[i] for i in sentence["head"]]),
                   "union": areas[ref["ann_id"]] / sum(areas.values()), "random": np.mean(list(iou.values())),
                   "largest": iou[max(areas, key=areas.get)], "central": iou[central]}
            for answer, value in row.items():
                for kind in (sentence["kind"], "all", *(("hard",) if sentence["kind"] != "attribute" else ())):
                    scores.setdefault(answer, {}).setdefault(kind, []).append(100 * value)
    return {answer: {kind: float(np.mean(values)) for kind, values in of.items()} for answer, of in scores.items()}


def sheet(path, seed=0, count=24, columns=4, zoom=2):
    """Save a contact sheet of val scenes: the object meant is outlined, the sentence stands below it."""
    cell = (200 * zoom, 200 * zoom + 16)
    page = Image.new("RGB", (cell[0] * columns, cell[1] * -(-count // columns)), "white")
    pen = ImageDraw.Draw(page)
    for index in range(count):
        scene = make_scene(seed, "val", index)
        said = scene["sentences"][NAMES[index % 3]]
        sentence = said[index % len(said)]
        mask = np.pad(scene["things"][sentence["thing"]].visible, 1).repeat(zoom, 0).repeat(zoom, 1)
        inner = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        picture = np.pad(scene["image"], ((1, 1), (1, 1), (0, 0))).repeat(zoom, 0).repeat(zoom, 1)
        picture[1:-1, 1:-1][mask[1:-1, 1:-1] & ~inner] = (0, 255, 255)
        corner = (index % columns * cell[0], index // columns * cell[1])
        page.paste(Image.fromarray(picture), corner)
        pen.text((corner[0] + 4, corner[1] + picture.shape[0] + 2), f"{sentence['text']} [{sentence['kind']}]", "black")
    try:
        page.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}.") from None


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data-root", default="data", help="where raw/refshapes and the prepared corpora lie")
    parser.add_argument("--scale", choices=tuple(SCALES), default="default", help="large is for tables")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.switch(None, "blind", False, "print what perfect masks reach without reading sentences")
    parser.add_argument("--split", choices=("train", "val", "testA", "testB"), default="val", help="split for --blind")
    parser.add_argument("--sheet", default="", metavar="PNG", help="only save a contact sheet of val scenes to this file")
    args = parser.parse_args(argv)
    if args.sheet:
        sheet(args.sheet, args.seed)
        return
    make(args.data_root, args.scale, args.seed, args.jobs)
    kinds = ("attribute", "place", "order", "relation", "hard", "all")
    for name in NAMES if args.blind else ():
        print(f"{name + ' ' + args.split:<18}" + "".join(f"{kind:>11}" for kind in kinds))
        for answer, of in blind(args.data_root, name, args.split).items():
            print(f"  {answer:<16}" + "".join(f"{of[kind]:>11.1f}" if kind in of else f"{'-':>11}" for kind in kinds))


if __name__ == "__main__":
    run(main)
