"""Class maps: which class, or none, every pixel of an image shows, from a model that knows sentences alone.

TSEG's zero-shot experiment (Sec. 4.6) for corpora in VOC's layout. The names of all classes are asked of every image. A name
whose `score` says that it is not in the image is dropped, and the model answers again for those that are left. A pixel goes
to the class with the highest mask, or to the background where no mask reaches the method's threshold. A class may have
several names (label engineering): it covers what any of them covers.

A class' IoU is taken over all pixels of the split, those that nobody decided (255) excepted; mIoU is the mean over the
classes and the background, oIoU the sum of their intersections over that of their unions. A class that is neither there nor
predicted has no IoU.

Where the paper is silent: of several views (scales, mirrored) the masks are averaged, and a name stays whose score suffices
in one of them, as in its [3]; each class enters the CRF with the odds of its mask, p / (1 - p), against the threshold's.
"""
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import data, distributed, metrics
from common.config import UserError, load_yaml, nearest
from common.crf import PRESETS, dense_crf
from common.masks import PALETTE, UNDECIDED

NOBODY = np.zeros(0, np.int64)  # an image is loaded without its own expressions
DEFAULTS = {"names": "", "score_threshold": 0.5, "scales": [1.0], "flip_test": False}


def add_flags(parser):
    """The flags that act on corpora with class maps alone."""
    group = parser.add_argument_group("class maps (--dataset voc, vocshapes)")
    add = group.add_argument
    add("--names", default=DEFAULTS["names"], metavar="YAML", help="words for classes, `class: [word, ...]`; a class that is "
        "not in the file, and every class without a file, is asked for by its own name")
    add("--score-threshold", type=float, default=DEFAULTS["score_threshold"], help="a name with a lower score is not in the "
        "image; 0: all names compete")
    add("--scales", type=float, nargs="+", default=DEFAULTS["scales"], help="input sizes, as factors, whose masks are averaged")
    parser.switch(group, "flip-test", DEFAULTS["flip_test"], "average with the mirrored image, at every scale")


def changed(args):
    """{flag: value} of those flags that were given, the values as they may stand in a file's name."""
    given = {key: getattr(args, key) for key, default in DEFAULTS.items() if getattr(args, key) != default}
    short = {"names": lambda path: Path(path).stem, "scales": lambda scales: "x".join(f"{scale:g}" for scale in scales)}
    return {key: short[key](value) if key in short else value for key, value in given.items()}


def load_names(path, classes):
    """[(class number from 1, name)]: what is asked for, by the yaml file `path` (or ""), of `classes`. Raises UserError."""
    words = load_yaml(path) if path else {}
    for name, of in words.items():
        if name not in classes:
            raise UserError(f"{path} has the class {name!r}{nearest(str(name), classes)}; the corpus has {', '.join(classes)}.")
        if not isinstance(of, list) or not of or not all(isinstance(word, str) and word for word in of):
            raise UserError(f"{path}: {name} must be a list of words.")
    return [(c, word) for c, name in enumerate(classes, start=1) for word in dict.fromkeys(words.get(name, [name]))]


def views(dataset, scales, mirror):
    """`dataset` once for each scale, and mirrored too: the canvas' sides are multiples of 32. Raises UserError."""
    if not all(0 < scale <= 16 for scale in scales):
        raise UserError(f"--scales {scales}: give factors above 0, 1 being the size of training.")
    side = lambda length, scale: length if scale == 1 else max(32, round(length * scale / 32) * 32)  # noqa: E731
    canvas = dataset.canvas
    scaled = [replace(canvas, size=side(canvas.size, scale), max_size=canvas.max_size and side(canvas.max_size, scale))
              for scale in scales]
    return [dataset.view(canvas=one, flip=flip, targets=None, augment=None, original=False)
            for one in scaled for flip in ((0.0, 1.0) if mirror else (0.0,))]


@dataclass
class ClassMaps:
    """One split of a corpus with class maps, and how it is scored.

    names: as from `load_names`; views: as from `views`; threshold: of masks, None takes the method's; crf: a key of PRESETS.
    Raises UserError for a score_threshold that is none.
    """
    model: torch.nn.Module
    dataset: data.RefDataset
    names: list
    views: list
    score_threshold: float = 0.5
    threshold: float = None
    crf: str = None
    amp: str = "off"

    def __post_init__(self):
        if not 0 <= self.score_threshold <= 1:
            raise UserError(f"--score-threshold {self.score_threshold:g} is no score: give a number from 0 to 1.")

    @torch.inference_mode()
    def predict(self, image, batches):
        """Number of the image, and a Batch of it from each view -> (H,W) uint8, 0 the background, else the class."""
        device = next(self.model.parameters()).device
        text = data.pad_text([self.dataset.encode(word) for _, word in self.names]).to(device)
        with metrics.autocast(device, self.amp):
            features = [self.model.encode_image(batch.images.to(device)) for batch in batches]
            outputs = [self.model.segment(of, text.new_zeros(len(text)), text) for of in features]
            kept = torch.ones(len(text), dtype=torch.bool, device=device)
            if self.score_threshold > 0:
                if "score" not in outputs[0]:
                    raise UserError("this method does not say whether a class is in the image: give --score-threshold 0.")
                kept = torch.stack([output["score"] for output in outputs]).amax(0) >= self.score_threshold
            if not kept.all() and kept.any():
                outputs = [self.model.segment(of, text.new_zeros(int(kept.sum())), text[kept]) for of in features]
        size = self.dataset.sizes[image][::-1].tolist()
        if not kept.any():
            return np.zeros(size, np.uint8)
        prob = sum(batch.frames[0].prob_img(output["prob"].float()) for output, batch in zip(outputs, batches)) / len(batches)
        limit = outputs[0]["threshold"] if self.threshold is None else self.threshold
        of_class = torch.tensor([c for c, _ in self.names], device=device)[kept]
        classes = of_class.unique()
        prob = torch.stack([prob[of_class == c].amax(0) for c in classes])          # of (names, H, W): (classes, H, W)
        best, label = prob.max(0)
        label = self.refined(image, prob, limit) if self.crf else torch.where(best >= limit, label + 1, 0)
        return torch.cat([classes.new_zeros(1), classes])[label].cpu().numpy().astype(np.uint8)

    def refined(self, image, prob, limit):
        """prob (K,H,W) -> (H,W) in 0..K, 0 the background: the best label after mean field."""
        odds = torch.cat([torch.full_like(prob[:1], limit), prob]).clamp(1e-5, 1 - 1e-5)
        odds = odds / (1 - odds)
        picture = self.dataset.picture(image).permute(1, 2, 0).contiguous().numpy()
        return dense_crf(picture, odds / odds.sum(0), **PRESETS[self.crf], exclusive=True).argmax(0)

    def evaluate(self, ranks, workers=0, limit=0, on_image=None):
        """Score every image (or the first `limit`): (rows, seconds), the same on any number of ranks.

        A row: index, image_id, `classes` {number: [I, U]} of those there or predicted, and I, U, their sums without the
        background. on_image(number, (H,W) uint8) is called with every prediction.
        """
        was_training, started = self.model.training, time.monotonic()
        self.model.eval()
        total = min(limit or len(self.dataset.image_ids), len(self.dataset.image_ids))
        mine = distributed.deal(ranks, range(total))
        keys, rows = [[(0, i, NOBODY)] for i in mine], []
        loaded = zip(mine, *(data.load(view, keys, workers // len(self.views)) for view in self.views))
        for image, *batches in tqdm(loaded, f"eval {self.dataset.name} {self.dataset.split}", len(mine), unit="image",
                                    leave=False, disable=None if ranks.main else True):
            predicted = self.predict(image, batches)
            counted = areas(predicted, self.dataset.class_map(image), len(self.dataset.class_names))
            rows.append({"index": image, "image_id": int(self.dataset.image_ids[image]),
                         "I": sum(of[0] for c, of in counted.items() if c), "U": sum(of[1] for c, of in counted.items() if c),
                         "classes": counted})
            if on_image is not None:
                on_image(image, predicted)
        self.model.train(was_training)
        rows = sorted((row for share in distributed.gather(ranks, rows) for row in share), key=lambda row: row["index"])
        if [row["index"] for row in rows] != list(range(total)):
            raise RuntimeError(f"{len(rows)} rows were gathered for {total} images")
        return rows, time.monotonic() - started

    def summarise(self, rows, seconds=0.0, checkpoint="", settings=None):
        """The summary that eval writes; in percent. n: the pairs of an image and a name that was asked of it."""
        names = ["background", *self.dataset.class_names]
        I, U = np.zeros((2, len(names)), np.int64)
        for row in rows:
            for c, of in row["classes"].items():
                I[c], U[c] = I[c] + of[0], U[c] + of[1]
        iou = {name: round(100 * int(i) / int(u), 4) if u else None for name, i, u in zip(names, I, U)}
        there = [value for value in iou.values() if value is not None]
        return {"dataset": self.dataset.name, "split": self.dataset.split, "task": "classes", "n": len(rows) * len(self.names),
                "mIoU": round(float(np.mean(there)), 4) if there else None,
                "oIoU": round(100 * int(I.sum()) / int(U.sum()), 4) if U.any() else None, "classes": iou, "images": len(rows),
                "seconds": round(seconds, 2), "checkpoint": str(checkpoint), "settings": settings or {}}

    def cases(self, chosen):
        """Case dictionaries for `pictures.report`, of {group: rows}, each image predicted anew."""
        cases, names = [], ["background", *self.dataset.class_names]
        for group, rows in chosen.items():
            for row in rows:
                picture = self.dataset.picture(row["index"]).permute(1, 2, 0).numpy()
                batches = [data.collate([view[(0, row["index"], NOBODY)]]) for view in self.views]
                maps = {"truth": self.dataset.class_map(row["index"]), "prediction": self.predict(row["index"], batches)}
                panels = [(f"{title}: {', '.join(names[c] for c in np.unique(of) if 0 < c < UNDECIDED) or 'none'}",
                           paint(picture, of, names)) for title, of in maps.items()]
                cases.append({"group": group, "split": self.dataset.split, "text": self.dataset.file_names[row["index"]],
                              "iou": float(metrics.iou(np.int64(row["I"]), np.int64(row["U"]))),
                              "panels": [("image", picture), *panels], **{key: row[key] for key in ("I", "U", "image_id")}})
        return cases


def areas(predicted, truth, count):
    """{class: [I, U]} in pixels, of the classes there or predicted, from (H,W) uint8 maps; UNDECIDED pixels do not count."""
    decided = truth != UNDECIDED
    a, b = predicted[decided], truth[decided]
    I, A, B = (np.bincount(values, minlength=count + 1) for values in (a[a == b], a, b))
    return {int(c): [int(I[c]), int(A[c] + B[c] - I[c])] for c in np.flatnonzero(A + B)}


def paint(picture, classes, names):
    """picture (H,W,3) uint8 under the classes' colours, each with its name in it: (H,W,3) uint8."""
    shown = (classes > 0)[..., None]
    image = Image.fromarray(np.where(shown, picture * 0.4 + PALETTE[classes] * 0.6, picture).astype(np.uint8))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(8, max(image.size) // 16))
    for c in np.unique(classes[(classes > 0) & (classes != UNDECIDED)]):
        rows, columns = np.nonzero(classes == c)
        middle = len(rows) // 2
        pen.text((int(columns[middle]), int(rows[middle])), names[c], "white", font, "mm", stroke_width=1, stroke_fill="black")
    return np.array(image)
