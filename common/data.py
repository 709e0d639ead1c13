"""The prepared corpora as batches: images on a canvas, sentences as ids, targets made in loader workers.

A batch groups expressions by image, so that vision runs once per image:
    images (B,3,H,W) uint8, text (E,L) ids with 0 = padding, image_of (E,) the image of each expression.

Frames, the field's main source of bugs, are explicit. `_img` is the original image, `_in` the network's
canvas; a `Frame` maps points, boxes, masks and probabilities between them, and back exactly.

Order and augmentation are pure functions of (seed, epoch, index): no worker holds state, so a run that
stops anywhere resumes with the very batches that it would have seen.
"""
import copy
import functools
import importlib
import json
import os
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from common.config import UserError
from common.masks import MAX_PIXELS, check_rle, decode, read_class_map
from common.text import swap_left_right

# corpora that are drawn on first use: the module of data_prep that does it, whose name the finished folder's marker bears
EMBEDDED = {"refshapes": "refshapes", "refshapes+": "refshapes", "refshapesg": "refshapes", "phraseshapes": "phraseshapes",
            "vocshapes": "vocshapes"}
SMALL_CORPUS = 2 ** 28  # bytes of decoded pictures that may stay in memory
WORKER_TIMEOUT = 300  # seconds after which a hung loader worker ends the run instead of hanging it
STOPS = {signal.SIGINT} | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())  # macOS does not tell who sent a signal


# ---- frames -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Frame:
    """How one image lies on its canvas: resized to (in_width, in_height), its corner at (left, top), maybe mirrored.

    Coordinates are continuous, in pixels, with whole numbers on pixel edges: a pixel's centre is at +0.5.
    """
    width: int
    height: int
    in_width: int
    in_height: int
    canvas_width: int
    canvas_height: int
    left: int = 0
    top: int = 0
    flipped: bool = False

    def points_in(self, points):
        """(..., 2) xy points of the image -> of the canvas."""
        x, y = points[..., 0] / self.width, points[..., 1] / self.height
        x = 1 - x if self.flipped else x
        return _lib(points).stack([x * self.in_width + self.left, y * self.in_height + self.top], -1)

    def points_img(self, points):
        """(..., 2) xy points of the canvas -> of the image; the exact inverse of `points_in`."""
        x, y = (points[..., 0] - self.left) / self.in_width, (points[..., 1] - self.top) / self.in_height
        x = 1 - x if self.flipped else x
        return _lib(points).stack([x * self.width, y * self.height], -1)

    def boxes_in(self, boxes):
        """(..., 4) xyxy boxes of the image -> of the canvas, again with x1 <= x2."""
        return self._boxes(boxes, self.points_in)

    def boxes_img(self, boxes):
        """(..., 4) xyxy boxes of the canvas -> of the image."""
        return self._boxes(boxes, self.points_img)

    @staticmethod
    def _boxes(boxes, move):
        lib, one, other = _lib(boxes), move(boxes[..., :2]), move(boxes[..., 2:])
        return lib.concatenate((lib.minimum(one, other), lib.maximum(one, other)), -1)

    def image_in(self, image, fill):
        """(3,H,W) uint8 image -> (3,canvas_height,canvas_width) uint8; free space holds `fill`, three 0..255 values."""
        size = (self.in_height, self.in_width)
        resized = image if image.shape[1:] == size else F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        resized = resized.flip(-1) if self.flipped else resized
        if (self.left, self.top, *size) == (0, 0, self.canvas_height, self.canvas_width):
            return resized
        canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, self.canvas_height, self.canvas_width)
        to_y, from_y = _overlap(self.top, self.in_height, self.canvas_height)
        to_x, from_x = _overlap(self.left, self.in_width, self.canvas_width)
        canvas[:, to_y, to_x] = resized[:, from_y, from_x]
        return canvas

    def masks_in(self, masks, stride=1):
        """(E,H,W) masks -> (E,canvas/stride,canvas/stride) float in 0..1: the share of each cell that the mask covers."""
        rows = _coverage(self.height, self.in_height, self.top, self.canvas_height // stride, stride, False)
        columns = _coverage(self.width, self.in_width, self.left, self.canvas_width // stride, stride, self.flipped)
        shares = torch.from_numpy(np.asarray(masks, np.float32))  # numpy turns bool to float faster than torch
        shares = shares if rows is None else rows @ shares
        return shares if columns is None else shares @ columns.T

    def prob_img(self, prob):
        """(E,h,w) map over the whole canvas, at any stride -> (E,H,W) over the image, bilinear between cell centres."""
        h, w = prob.shape[-2:]
        rows = _bilinear(self.height, self.in_height, self.top, h, self.canvas_height, False)
        columns = _bilinear(self.width, self.in_width, self.left, w, self.canvas_width, self.flipped)
        prob = prob[..., rows, :] if isinstance(rows, slice) else rows.to(prob) @ prob
        return prob[..., columns] if isinstance(columns, slice) else prob @ columns.to(prob).T


def _lib(array):
    """torch or numpy: frames map both."""
    return torch if isinstance(array, torch.Tensor) else np


def _overlap(start, length, limit):
    """Slices of the canvas and of the content where they meet along one axis."""
    first, last = max(start, 0), max(min(start + length, limit), 0)
    return slice(first, max(first, last)), slice(first - start, max(first, last) - start)


@functools.lru_cache(maxsize=256)  # a corpus has few sizes; where a random scale makes many, the eldest go
@torch.inference_mode(False)  # what an evaluation leaves in the cache may have a gradient behind it later
def _coverage(size, in_size, start, cells, stride, flipped):
    """(cells, size) matrix: the share of each canvas cell that each image pixel covers, along one axis; None for the identity."""
    if (size, start, stride, flipped) == (in_size, 0, 1, False) and cells == size:
        return None
    edges = np.arange(size + 1) * in_size / size
    edges = (in_size - edges if flipped else edges) + start
    low, high = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    cell = np.arange(cells)[:, None] * stride
    return torch.from_numpy(((np.minimum(high, cell + stride) - np.maximum(low, cell)).clip(0) / stride).astype(np.float32))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _bilinear(size, in_size, start, cells, canvas, flipped):
    """(size, cells) matrix that reads a row of `cells` values at the centres of the image's pixels, along one axis; or their
    slice, where each of these is the centre of a cell."""
    if (in_size, canvas, flipped) == (size, cells, False) and 0 <= start <= cells - size:
        return slice(start, start + size)
    x = (torch.arange(size, dtype=torch.float64) + 0.5) * in_size / size
    x = (in_size - x if flipped else x) + start
    scale = cells / canvas
    first, last = start * scale, (start + in_size) * scale  # the cells that hold content: padding is never read
    low, high = max(0, int(first)), min(cells - 1, max(0, int(np.ceil(last)) - 1))
    u = (x * scale - 0.5).clamp(low, max(low, high))
    left = u.floor().long().clamp(max=cells - 1)
    weight = u - left
    matrix = torch.zeros(size, cells, dtype=torch.float64)
    rows = torch.arange(size)
    matrix[rows, left] += 1 - weight
    matrix[rows, (left + 1).clamp(max=cells - 1)] += weight
    return matrix


@dataclass(frozen=True)
class Canvas:
    """The rule that places an image; it looks at the image's size alone, never at its batch.

    max_size = 0: a square of side `size`, filled by the whole image (`squash`) or by the resized image and padding on
    the right and below. Otherwise the detectors' rule: shorter side `size`, longer side at most `max_size`, on a
    canvas of that size rounded up to a multiple of 32, upright or lying as the image is. `fill` colours the free space.
    """
    size: int
    max_size: int = 0
    squash: bool = False
    fill: tuple = (124, 116, 104)  # ImageNet's mean colour, 0..255

    def frame(self, width, height):
        """The Frame of an image of that size."""
        if self.squash:
            return Frame(width, height, self.size, self.size, self.size, self.size)
        if not self.max_size:
            scale, canvas = self.size / max(width, height), (self.size, self.size)
        else:
            scale = min(self.size / min(width, height), self.max_size / max(width, height))
            short, long = (-(-side // 32) * 32 for side in (self.size, self.max_size))
            canvas = (long, short) if width >= height else (short, long)
        in_width, in_height = (max(1, round(side * scale)) for side in (width, height))
        return Frame(width, height, in_width, in_height, *canvas)


# ---- the corpus ---------------------------------------------------------------------------------------------

def split_path(data_root, dataset, split):
    """Where data_prep puts a split."""
    return Path(data_root) / dataset / f"{split}.json"


def require(data_root, dataset, splits, hint):
    """Return whether every split is there. A missing or unfinished embedded corpus is reported, any other raises UserError, as does
    a split that a finished embedded corpus does not have.

    hint: the yaml that runs the same script on the embedded data.
    """
    reader = {"phrasecut": "phrasecut", "voc": "voc"}.get(dataset)
    command = f"python -m data_prep.{reader} (see its --help)" if reader else \
        f"python -m data_prep.refcoco --refs REFS.p --instances instances.json --images IMAGES --dataset {dataset} " \
        f"--data-root {data_root}"
    missing = [path for path in (split_path(data_root, dataset, split) for split in splits) if not path.is_file()]
    if missing and dataset not in EMBEDDED:
        there = [split for split in splits if split_path(data_root, dataset, split) not in missing]
        raise UserError(
            f"{missing[0]} does not exist: prepare {dataset} with `{command}` (data_prep/README.md says where the files are), "
            + (f"be content with {' and '.join(there)} by --eval-splits, " if {"train", "val"} <= set(there) else "")
            + f"or run on the embedded data with `--yaml {hint}`.")
    finished = dataset not in EMBEDDED or (Path(data_root) / dataset / f"{EMBEDDED[dataset]}.json").is_file()
    if missing and finished:
        raise UserError(f"{missing[0]} does not exist: {dataset} is drawn without it. Name other splits, or remove "
                        f"{missing[0].parent} to have {dataset} drawn anew.")
    return finished


def make_embedded(data_root, dataset):
    """Draw the embedded corpus `dataset`, and its siblings, below `data_root`. Raises UserError where it cannot be written."""
    importlib.import_module(f"data_prep.{EMBEDDED[dataset]}").make(data_root)  # nobody else needs the generators


def load_image(path, width=0, height=0):
    """A picture as (3,H,W) uint8 RGB; grey, 16 bit, palette, CMYK and alpha are converted.

    With `width` and `height` the picture must have that size, as it is stored or as its EXIF rotation shows it.
    Raises UserError for a missing, broken or absurdly large file and for another size.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS // 4:
                raise UserError(f"{path}: {picture.width}x{picture.height} pixels are more than a picture may have.")
            if width and picture.size != (width, height) or not width:
                picture = ImageOps.exif_transpose(picture)
            if width and picture.size != (width, height):
                raise UserError(f"{path} has {picture.width}x{picture.height} pixels and the corpus says "
                                f"{width}x{height}: is it the picture that was annotated?")
            if picture.mode.startswith(("I", "F")):
                values = np.asarray(picture, np.float64)
                picture = Image.fromarray((values / max(values.max(), 1) * 255).clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; --images of data_prep names the folder of the pictures.") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}.") from None


class Example:
    """What a script's `targets` function sees of one image, in a loader worker.

    meant (U,H,W) bool in the image's own frame, the distinct masks, or a function that makes them, called when they are
    first read, so that training without masks neither decodes nor needs any; mask_of (E,) which of them each expression
    drawn means; `rng` is seeded by (seed, epoch, index).
    """

    def __init__(self, dataset, image, expressions, meant, mask_of, frame, rng):
        self.dataset, self.image, self.expressions, self.mask_of = dataset, image, expressions, mask_of
        self.frame, self.rng, self._meant = frame, rng, meant

    @property
    def meant(self):
        """(U,H,W) bool."""
        if callable(self._meant):
            self._meant = self._meant()
        return self._meant

    @property
    def masks(self):
        """(E,H,W) bool, one for each expression drawn."""
        return self.meant[self.mask_of]


class RefDataset(torch.utils.data.Dataset):
    """One split of a prepared corpus; `dataset[(epoch, image, expressions)]` is one image with those expressions.

    path: the split's json. encode: sentence -> list of ids. canvas: Canvas. targets: Example -> {name: tensor}, each with
    one row per expression, or None. flip: the probability of mirroring image and sentence. augment: Example -> Frame, a
    random scale or crop that may look at the masks, or None. Masks of the original frame are delivered when `original`
    is true (evaluation). prepared: what the file would hold, in its place.
    Raises UserError where the file is missing or is no prepared corpus.
    """

    def __init__(self, path, encode, canvas, targets=None, flip=0.0, seed=0, augment=None, original=False,
                 prepared=None):
        self.path, self.encode, self.canvas, self.targets = Path(path), encode, canvas, targets
        self.flip, self.seed, self.augment, self.original = flip, seed, augment, original
        self._read(load_prepared(self.path) if prepared is None else prepared)

    def _read(self, prepared):
        """Fill the columns from the prepared json, checking what later code relies on."""
        where = self.path
        try:
            self.meta, images, objects, expressions = (prepared[k] for k in ("meta", "images", "objects", "expressions"))
            self.name, self.split = str(self.meta["dataset"]), str(self.meta["split"])
            self.root = where.parent / self.meta["image_root"]
            self.image_ids = _integers([image["id"] for image in images])
            self.sizes = _integers([(image["width"], image["height"]) for image in images]).reshape(-1, 2)
            self.file_names = [image["file_name"] for image in images]
            self.class_maps = [image.get("class_map") for image in images]
            self.class_names = [str(category["name"]) for category in self.meta.get("categories", [])]
            position = {id_: i for i, id_ in enumerate(self.image_ids.tolist())}
            self.object_ids = _integers([o["id"] for o in objects])
            self.object_image = _integers([position[o["image_id"]] for o in objects])
            self.categories = _integers([o["category_id"] for o in objects])
            self.boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
            self.areas = np.array([o["area"] for o in objects], np.float64)
            self.parts = _integers([o.get("parts", 1) for o in objects])
            self.rles = [o["mask"] for o in objects]
            self.crowds = np.array([bool(o.get("iscrowd", 0)) for o in objects], bool)
            known = {id_: i for i, id_ in enumerate(self.object_ids.tolist())}
            self.sent_ids = _integers([e["id"] for e in expressions])
            self.ref_ids = _integers([e["ref_id"] for e in expressions])
            self.expression_image = _integers([position[e["image_id"]] for e in expressions])
            self.objects_of = [[known[i] for i in e["object_ids"]] for e in expressions]
            self.texts = [e["text"] for e in expressions]
            self.kinds = [e.get("kind", "") for e in expressions]
            self.sources = [e.get("source", "") for e in expressions]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where} is not in the prepared format ({type(error).__name__}: {error}); "
                            "make it again with data_prep.") from None
        faults = [
            (len(position) < len(images), "gives an image id twice"),
            (len(known) < len(objects), "gives an object id twice"),
            (len(set(self.sent_ids.tolist())) < len(expressions), "gives an expression id twice"),
            (not all(isinstance(text, str) for text in self.texts), "has an expression whose text is no string"),
            ((self.sizes < 1).any() or (self.sizes.prod(1) > MAX_PIXELS).any(), "has an image of impossible size"),
            (any(not isinstance(f, str) or os.path.isabs(f) or os.path.normpath(f).startswith("..") or "\0" in f
                 for f in self.file_names), "has a file_name that leaves the image root"),
            (any(path is not None and (type(path) is not str or "\0" in path) for path in self.class_maps),
             "has a class_map that is no path"),
            (not len(expressions), "has no expression"),
        ]
        for found, what in faults:
            if found:
                raise UserError(f"{where} {what}; make it again with data_prep.")
        order = np.argsort(self.expression_image, kind="stable")
        bounds = np.searchsorted(self.expression_image[order], np.arange(len(images) + 1))
        self.of_image = [order[bounds[i]:bounds[i + 1]] for i in range(len(images))]
        self.with_expressions = np.flatnonzero(np.diff(bounds))
        self.checked = set()  # the objects whose masks have been found in order
        self.decoded, self.small = {}, 3 * int(self.sizes.prod(1).sum()) <= SMALL_CORPUS

    def __len__(self):
        return len(self.sent_ids)

    def view(self, **changes):
        """A shallow copy with other attributes: the same split seen in another way. Samples read the columns, not `expression_mask`."""
        other = copy.copy(self)
        other.__dict__.update(changes)
        return other

    def object_mask(self, i):
        """Object i's mask, (H,W) bool in the image's frame. Raises UserError where it has none or a damaged one."""
        width, height = self.sizes[self.object_image[i]]
        try:
            if self.rles[i] is None:
                raise ValueError("it has no mask")
            if i not in self.checked:
                self.rles[i] = check_rle(self.rles[i], height, width)
                self.checked.add(i)
            return decode(self.rles[i], checked=True)
        except ValueError as error:
            raise UserError(f"{self.path}, object {self.object_ids[i]}: {error}.") from None

    def expression_mask(self, e):
        """The union of the masks that expression e names, (H,W) bool; all False where it names none."""
        return self._union(self.expression_image[e], self.objects_of[e])

    def _union(self, image, objects):
        if len(objects) == 1:
            return self.object_mask(objects[0])
        width, height = self.sizes[image]
        return np.logical_or.reduce([self.object_mask(i) for i in objects] or [np.zeros((height, width), bool)])

    def expression_box(self, e):
        """The xyxy box round the annotated boxes of the objects that expression e names; zeros where it names none."""
        boxes = self.boxes[self.objects_of[e]]
        return np.concatenate([boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)]) if len(boxes) else np.zeros(4)

    def class_map(self, image):
        """Image number `image` as (H,W) uint8: 0 background, c the c-th of `class_names`, 255 undecided. Raises UserError."""
        path, (width, height) = self.path.parent / self.class_maps[image], self.sizes[image]
        classes = read_class_map(path, len(self.class_names))
        if classes.shape != (height, width):
            raise UserError(f"{path} has {classes.shape[1]}x{classes.shape[0]} pixels and the corpus says {width}x{height}.")
        return classes

    def picture(self, image):
        """Image number `image`, (3,H,W) uint8. Without loader processes a small corpus stays decoded in memory."""
        if image in self.decoded:
            return self.decoded[image]
        picture = load_image(self.root / self.file_names[image], *map(int, self.sizes[image]))
        if self.small and torch.utils.data.get_worker_info() is None:
            self.decoded[image] = picture
        return picture

    def __getitem__(self, key):
        try:
            return self._sample(*key)
        except UserError as error:  # travels to the main process as a value: a worker's raise would lose its sentence
            return error

    def _sample(self, epoch, image, expressions):
        rng = np.random.default_rng((self.seed, epoch, int(expressions[0]) if len(expressions) else image))
        distinct = {named: n for n, named in enumerate(dict.fromkeys(tuple(self.objects_of[e]) for e in expressions))}
        mask_of = np.array([distinct[tuple(self.objects_of[e])] for e in expressions], np.int64)
        meant = lambda: np.stack([self._union(image, named) for named in distinct])  # noqa: E731
        example = Example(self, image, expressions, meant, mask_of, self.canvas.frame(*map(int, self.sizes[image])), rng)
        if self.augment:
            example.frame = self.augment(example)
        if self.flip and rng.random() < self.flip:
            example.frame = replace(example.frame, flipped=True)
        frame = example.frame
        texts = [swap_left_right(self.texts[e]) if frame.flipped else self.texts[e] for e in expressions]
        targets = self.targets(example) if self.targets else {}
        return {"image": frame.image_in(self.picture(image), self.canvas.fill), "ids": [self.encode(text) for text in texts],
                "frame": frame, "expressions": expressions, "targets": targets,
                "masks": torch.from_numpy(example.masks) if self.original else None}


def load_prepared(path):
    """The json of a split, as data_prep wrote it. Raises UserError where it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            prepared = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it with data_prep.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as json: {error}.") from None
    if not isinstance(prepared, dict):
        raise UserError(f"{path} is not in the prepared format; make it again with data_prep.")
    return prepared


def _integers(values):
    """int64 array of a list of true integers; a float or a string in it is a TypeError."""
    array = np.array(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind != "i":
        raise TypeError(f"whole numbers expected, got {array.dtype}")
    return array.astype(np.int64)


# ---- batches ------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """images (B,3,H,W) uint8; text (E,L) int64, 0 = padding; image_of (E,); targets: name -> (E, …).

    index (E,) are positions in the dataset; frames, one per image; masks, per image (E_i,H,W) bool or None.
    """
    images: torch.Tensor
    text: torch.Tensor
    image_of: torch.Tensor
    index: np.ndarray
    frames: list
    targets: dict = field(default_factory=dict)
    masks: list = field(default_factory=list)

    def to(self, device):
        """The same batch with its tensors on `device`; frames and indices stay on the host."""
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return replace(self, images=move(self.images), text=move(self.text), image_of=move(self.image_of),
                       targets={name: move(tensor) for name, tensor in self.targets.items()})

    def pin_memory(self):
        """Called by the loader when it feeds a GPU."""
        return replace(self, images=self.images.pin_memory(), text=self.text.pin_memory(),
                       targets={name: tensor.pin_memory() for name, tensor in self.targets.items()})


def pad_text(ids):
    """Lists of ids -> (E,L) int64, padded with 0 to the longest."""
    text = np.zeros((len(ids), max(map(len, ids), default=1)), np.int64)
    for row, sentence in zip(text, ids):
        row[:len(sentence)] = sentence
    return torch.from_numpy(text)


def collate(samples):
    """A list of samples -> Batch, or the first UserError among them."""
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if error is not None:
        return error
    counts = torch.tensor([len(sample["expressions"]) for sample in samples])
    names = samples[0]["targets"]
    return Batch(images=torch.stack([sample["image"] for sample in samples]),
                 text=pad_text([ids for sample in samples for ids in sample["ids"]]),
                 image_of=torch.repeat_interleave(torch.arange(len(samples)), counts),
                 index=np.concatenate([sample["expressions"] for sample in samples]),
                 frames=[sample["frame"] for sample in samples],
                 targets={name: torch.cat([sample["targets"][name] for sample in samples]) for name in names},
                 masks=[sample["masks"] for sample in samples])


def plan_epoch(dataset, epoch, seed, batch_size, per_image, unit):
    """The training batches of an epoch, a pure function of its arguments: lists of keys (epoch, image, expressions).

    unit `expression`: every sentence once; `ref`: every object once, one of its sentences drawn; `image`: every image
    once. `per_image` sentences of one image go together (0: all). Images of unlike canvases never share a batch. The
    last batch that is not full is left out, unless it is the only one.
    """
    rng = np.random.default_rng((seed, epoch))
    items = []
    for image in dataset.with_expressions:
        drawn = rng.permutation(dataset.of_image[image])
        if unit == "ref":
            drawn = drawn[np.unique(dataset.ref_ids[drawn], return_index=True)[1]]
            drawn = rng.permutation(drawn)
        step = per_image or len(drawn)
        groups = [drawn[i:i + step] for i in range(0, len(drawn), step)]
        items += [(epoch, int(image), group) for group in (groups[:1] if unit == "image" else groups)]
    shapes = {}
    for i in rng.permutation(len(items)):
        frame = dataset.canvas.frame(*map(int, dataset.sizes[items[i][1]]))
        shapes.setdefault((frame.canvas_height, frame.canvas_width), []).append(items[i])
    batches = [group[i:i + batch_size] for group in shapes.values()
               for i in range(0, len(group) - batch_size + 1, batch_size)]
    if not batches:
        return [max(shapes.values(), key=len)]
    return [batches[i] for i in rng.permutation(len(batches))]


def plan_evaluation(dataset, batch_size, most_expressions=128):
    """The evaluation batches: whole images with all their expressions, in the corpus' order.

    A batch holds at most `batch_size` images of one canvas and, beyond its first image, `most_expressions` sentences.
    """
    batches, canvas = [], None
    for image in dataset.with_expressions:
        frame = dataset.canvas.frame(*map(int, dataset.sizes[image]))
        key = (0, int(image), dataset.of_image[image])
        full = not batches or len(batches[-1]) >= batch_size or canvas != (frame.canvas_height, frame.canvas_width) \
            or sum(len(k[2]) for k in batches[-1]) + len(key[2]) > most_expressions
        if full:
            batches.append([])
        batches[-1].append(key)
        canvas = (frame.canvas_height, frame.canvas_width)
    return batches


def _obey_parent(_):
    """In a loader process, which is born with STOPS blocked: SIGTERM ends it when the training process sent it, and nobody else.

    Ctrl-C, `timeout` and schedulers signal every process of a job at once. The training process then saves and ends its loader
    processes itself, by SIGTERM where they hang; they must not die before it, as it would take that for a fault.
    """
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)
    if signal.SIGTERM in STOPS:
        threading.Thread(target=wait, daemon=True).start()


def load(dataset, batches, workers=0, pin=False):
    """Yield the Batch of each planned list of keys. A sample's UserError is raised here, in the main process; a loader process
    that dies or hangs is a RuntimeError of torch's, which `config.run` knows by its first word.
    """
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin,
        timeout=WORKER_TIMEOUT if workers else 0,
        # a forked process has the corpus without a copy; the ways that start afresh would have to pickle it
        multiprocessing_context="fork" if workers else None, worker_init_fn=_obey_parent,
        generator=torch.Generator())  # its own, or every new loader would advance the run's random state
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        batches = iter(loader)  # forks, and the loader processes keep STOPS blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, EOFError) as error:  # a process died with the tensors that it was handing over
            raise RuntimeError(f"DataLoader worker is gone ({error})") if workers else error
        if batch is None:
            return
        if isinstance(batch, UserError):
            raise batch
        yield batch
