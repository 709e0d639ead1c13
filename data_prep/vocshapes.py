"""VOCShapes: an embedded corpus in Pascal VOC's own files, drawn from RefShapes' scenes.

    python -m data_prep.vocshapes --data-root data

A class is a kind of object. `<data-root>/raw/vocshapes/` holds JPEGImages/, SegmentationClass/ (palettes; where two classes
meet the pixels are 255, undecided) and ImageSets/Segmentation/; `data_prep.voc` converts them to `<data-root>/vocshapes/`, as
it does the real ones. One class bears a name that PhraseShapes never says ("donut", where its phrases say "ring"), as VOC's
"person" hardly stands in PhraseCut: without other words for it, yaml/vocshapes_names.yaml, it is not found zero-shot.
"""
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import Parser, run, write_text
from common.masks import PALETTE, UNDECIDED
from data_prep import refshapes, voc
from data_prep.phraseshapes import draw_all, make_once

NAME, VERSION = "vocshapes", 1
CLASSES = tuple({"ring": "donut"}.get(kind, kind) for kind in refshapes.KIND_NAMES)
# as phraseshapes.SCALES; neither shares a scene with PhraseShapes, whose model is tested on val
SCALES = {"default": {"train": [("pool", 2000, 1000)], "val": [("val", 220, 80), ("testA", 100, 60), ("testB", 100, 60)]}}


def class_map(things, height, width):
    """(H,W) uint8: 1.. by kind of the visible object, 0 background, UNDECIDED where neighbours above or beside differ."""
    classes = np.zeros((height, width), np.uint8)
    for thing in things:
        classes[thing.visible] = refshapes.KIND_NAMES.index(thing.kind) + 1
    edge = np.zeros((height, width), bool)
    edge[1:] |= classes[1:] != classes[:-1]
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    return np.where(edge, np.uint8(UNDECIDED), classes)


def draw(seed, folder, job):
    """Draw and save the scene of `job` = (image_id, split, RefShapes' split, index): (its name in VOC's way, its split)."""
    image_id, split, scenes, index = job
    scene, name = refshapes.make_scene(seed, scenes, index), f"2012_{image_id:06d}"
    Image.fromarray(scene["image"]).save(Path(folder) / "JPEGImages" / f"{name}.jpg", quality=95)
    picture = Image.fromarray(class_map(scene["things"], *scene["image"].shape[:2]))
    picture.putpalette(PALETTE.ravel().tolist())
    picture.save(Path(folder) / "SegmentationClass" / f"{name}.png")
    return name, split


def write_raw(folder, scale, seed, jobs):
    """Draw a whole corpus into `folder`, in VOC's layout."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    drawn = draw_all(partial(draw, seed, str(folder)), SCALES[scale], jobs, "drawing VOCShapes")
    for split in SCALES[scale]:
        names = "".join(f"{name}\n" for name, of in drawn if of == split)
        write_text(folder / "ImageSets" / "Segmentation" / f"{split}.txt", names)


def make(data_root, scale="default", seed=0, jobs=2):
    """Draw the corpus and prepare it, unless it is there. Raises UserError where it cannot be written."""
    make_once(data_root, NAME, {"version": VERSION, "scale": scale, "seed": seed},
              lambda folder: write_raw(folder, scale, seed, jobs),
              lambda raw: voc.convert(raw, data_root, dataset=NAME, classes=CLASSES))


def main(argv=None):
    """Draw and prepare VOCShapes."""
    parser = Parser(__doc__)
    parser.add_argument("--data-root", default="data", help="where raw/vocshapes and the prepared corpus lie")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    make(args.data_root, "default", args.seed, args.jobs)


if __name__ == "__main__":
    run(main)
