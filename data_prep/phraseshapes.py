"""PhraseShapes: an embedded corpus in PhraseCut's own files, drawn from RefShapes' scenes.

    python -m data_prep.phraseshapes --data-root data

A phrase names what it sees ("ball", "red ball", "red thing", "striped ball") and means every object of the scene that
fits, as in PhraseCut. `<data-root>/raw/phraseshapes/` holds VG_100K/<image_id>.jpg, image_data_split.json and
refer_<split>.json; `data_prep.phrasecut` converts them to `<data-root>/phraseshapes/`, as it does the real ones. Polygons
have no holes, as PhraseCut's: a ring's is filled.
"""
import json
import os
import shutil
from functools import partial
from pathlib import Path

from PIL import Image
from scipy.ndimage import binary_fill_holes
from tqdm import tqdm

from common.config import Parser, UserError, run, write_text
from common.masks import bbox, encode
from data_prep import phrasecut, refshapes

NAME, VERSION = "phraseshapes", 1
# split: RefShapes' scenes that it takes, as (RefShapes' split, first index, count); those of `pool` are drawn fastest
SCALES = {"default": {"train": [("pool", 0, 2000)], "val": [("val", 0, 200)], "miniv": [("val", 200, 20)],
                      "test": [("testA", 0, 100), ("testB", 0, 100)]}}
PATTERNS = (("kind",), ("colour", "kind"), ("colour",), ("texture", "kind"))


def phrases_of(things):
    """All phrases of a scene: [(phrase, PhraseCut's structure type, the things meant)], each string once."""
    found = {}
    for pattern in PATTERNS:
        for thing in things:
            if "texture" in pattern and thing.texture == "plain":
                continue
            words = [getattr(thing, name) for name in refshapes.ATTRIBUTES if name in pattern]
            phrase = " ".join(refshapes.WORDS[word][0] for word in words) + ("" if "kind" in pattern else " thing")
            meant = [t for t in things if all(getattr(t, name) == getattr(thing, name) for name in pattern)]
            found[phrase] = (phrase, "name" if pattern == ("kind",) else "attribute", meant)
    return list(found.values())


def instance_of(mask):
    """PhraseCut's (box [x, y, w, h], polygons of [x, y]) of a mask (H,W) bool."""
    x, y, w, h = (int(value) for value in bbox(encode(mask), checked=True))
    corners = refshapes.outline(binary_fill_holes(mask[y:y + h, x:x + w]), x, y)
    return [x, y, w, h], [[list(point) for point in zip(polygon[::2], polygon[1::2])] for polygon in corners]


def draw(seed, folder, job):
    """Draw and save the scene of `job` = (image_id, split, RefShapes' split, index): (its image record, its tasks)."""
    image_id, split, scenes, index = job
    scene = refshapes.make_scene(seed, scenes, index)
    height, width = scene["image"].shape[:2]
    Image.fromarray(scene["image"]).save(Path(folder) / f"{image_id}.jpg", quality=95)
    tasks = []
    instances = {id(thing): instance_of(thing.visible) for thing in scene["things"]}
    for number, (phrase, kind, meant) in enumerate(phrases_of(scene["things"])):
        boxes, polygons = zip(*(instances[id(thing)] for thing in meant))
        tasks.append({"task_id": f"{image_id}__{number}", "image_id": image_id, "ann_ids": list(range(len(meant))),
                      "instance_boxes": boxes, "Polygons": polygons, "phrase": phrase,
                      "phrase_structure": {"name": phrase.split()[-1], "attributes": phrase.split()[:-1], "relation_ids": [],
                                           "relation_descriptions": [], "type": kind}})
    return {"image_id": image_id, "width": width, "height": height, "split": split}, tasks


def draw_all(draw_one, splits, jobs, title):
    """[draw_one((image_id from 1, split, RefShapes' split, index))] of all scenes of `splits`, an entry of SCALES."""
    planned = [(split, scenes, first + i) for split, parts in splits.items()
               for scenes, first, count in parts for i in range(count)]
    planned = [(image_id, *job) for image_id, job in enumerate(planned, start=1)]
    with refshapes.workers(jobs) as each:
        return list(tqdm(each(draw_one, planned), title, len(planned), unit=" scenes", disable=None))


def make(data_root, scale="default", seed=0, jobs=2):
    """Draw the corpus and prepare it, unless it is there. Raises UserError where it cannot be written."""
    make_once(data_root, NAME, {"version": VERSION, "scale": scale, "seed": seed},
              lambda folder: write_raw(folder, scale, seed, jobs),
              lambda raw: phrasecut.convert(raw, [raw / "VG_100K"], data_root, NAME))


def make_once(data_root, name, made, write, convert):
    """Unless the finished corpus `name` is there: `write` the raw corpus to a folder, move it to its place, `convert` it, and
    write vocab.txt, of the train split's words, and last the marker with `made`. A second process waits. Raises UserError
    where another corpus of that name is there, or nothing can be written.
    """
    raw, folder = Path(data_root) / "raw" / name, Path(data_root) / name
    part, marker, made = raw.with_name(f"{name}.part{os.getpid()}"), folder / f"{name}.json", json.dumps(made)
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        with refshapes.locked(raw.with_name(f"{name}.lock")):
            if marker.is_file():
                if marker.read_text(encoding="utf-8") != made:
                    raise UserError(f"{folder} holds another corpus than asked for ({made}): remove it or choose another "
                                    "--data-root.")
                return
            shutil.rmtree(raw, ignore_errors=True)
            write(part)
            os.replace(part, raw)
            convert(raw)
            train = json.loads((folder / "train.json").read_text(encoding="utf-8"))["expressions"]
            write_text(folder / "vocab.txt", "\n".join(refshapes.wordpieces([e["text"] for e in train])) + "\n")
            write_text(marker, made)
    except OSError as error:
        raise UserError(f"cannot write {name} below {data_root}: {error}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_raw(folder, scale, seed, jobs):
    """Draw a whole corpus into `folder`, in PhraseCut's layout."""
    (folder / "VG_100K").mkdir(parents=True)
    drawn = draw_all(partial(draw, seed, str(folder / "VG_100K")), SCALES[scale], jobs, "drawing PhraseShapes")
    write_text(folder / "image_data_split.json", json.dumps([image for image, _ in drawn]))
    for split in SCALES[scale]:
        tasks = [task for image, of in drawn if image["split"] == split for task in of]
        write_text(folder / f"refer_{split}.json", json.dumps(tasks))


def main(argv=None):
    """Draw and prepare PhraseShapes."""
    parser = Parser(__doc__)
    parser.add_argument("--data-root", default="data", help="where raw/phraseshapes and the prepared corpus lie")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    make(args.data_root, "default", args.seed, args.jobs)


if __name__ == "__main__":
    run(main)
