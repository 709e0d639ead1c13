"""Clicks and superpixels of a prepared corpus: what PKS's weak supervision knows of an object (2212.10278, Sec. IV-A).

    python -m data_prep.clicks --dataset refcoco --data-root data

clicks.json has three clicks for every object that a sentence names: the centre of mass of its mask and the left-top and
right-bottom corners of its annotated box, in pixels of the image, whole numbers on pixel edges. It holds no mask and no
picture, so it can be passed on by itself. superpixels/<image_id>.png has the SLIC segments of a training image (Achanta
et al., 2012), numbered from 1, at the image's size. A killed call is finished by the next one, and what is there is
kept.
"""
import io
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common.config import Parser, UserError, run
from common.data import RefDataset, load_image, split_path
from common.masks import MAX_PIXELS
from data_prep.refcoco import field, read_json, source, write_json
from data_prep.refshapes import workers

SPLITS = ("train", "val", "test", "testA", "testB")
COLUMNS = ["centre_x", "centre_y", "left", "top", "right", "bottom"]


# ---- clicks ---------------------------------------------------------------------------------------------------------

def click(mask, box, snap=False):
    """The clicks of one object, and whether the mask holds its centre: ([6 numbers, as in COLUMNS], bool).

    mask (H,W) bool or None, box xywh. The centre is the mask's centre of mass, or the box's centre where there is no
    mask; with `snap`, a centre of mass outside the mask moves to the centre of the mask's nearest pixel.
    """
    x, y, width, height = box
    centre, inside = np.array([x + width / 2, y + height / 2]), False
    if mask is not None and mask.any():
        rows, columns = np.nonzero(mask)
        pixels = np.stack([columns, rows], 1) + 0.5
        centre = pixels.mean(0)
        inside = bool(mask[int(centre[1]), int(centre[0])])
        if snap and not inside:
            centre, inside = pixels[np.square(pixels - centre).sum(1).argmin()], True
    return [round(float(value), 2) for value in (*centre, x, y, x + width, y + height)], inside


def write_clicks(data_root, dataset, splits, snap=False):
    """Write data/<dataset>/clicks.json for every object that a sentence of `splits` names; returns its meta.

    Same corpus, same bytes. Raises UserError where a split is missing or damaged.
    """
    clicks, outside, sources = {}, 0, []
    for split in splits:
        corpus = RefDataset(split_path(data_root, dataset, split), None, None)
        named = sorted({i for objects in corpus.objects_of for i in objects})
        for i in tqdm(named, f"clicks of {split}", unit=" objects", disable=None, delay=2):
            key = str(corpus.object_ids[i])
            if key not in clicks:
                mask = None if corpus.rles[i] is None else corpus.object_mask(i)
                clicks[key], inside = click(mask, corpus.boxes[i], snap)
                outside += not inside
        sources.append(source(corpus.path))
    meta = {"dataset": dataset, "centre": "snapped into the mask" if snap else "centre of mass", "objects": len(clicks),
            "outside": outside, "columns": COLUMNS, "sources": sources}
    write_json(Path(data_root) / dataset / "clicks.json", {"meta": meta, "clicks": clicks})
    return meta


def load_clicks(path):
    """{object id: (centre x, centre y, left, top, right, bottom)} in pixels of the image. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; `python -m data_prep.clicks --dataset {Path(path).parent.name} "
                        f"--data-root {Path(path).parent.parent}` makes it.")
    clicks = {}
    for key, values in field(read_json(path), "clicks", dict, path).items():
        finite = isinstance(values, list) and len(values) == 6 and all(
            type(value) in (int, float) and abs(value) < 1e9 for value in values)
        if not finite or not key.isascii() or not key.isdigit() or len(key) > 18:
            raise UserError(f"{path}: object {key[:40]!r} should have six numbers ({', '.join(COLUMNS)}).")
        clicks[int(key)] = tuple(float(value) for value in values)
    return clicks


# ---- superpixels ----------------------------------------------------------------------------------------------------

def superpixel_path(data_root, dataset, image_id):
    """Where the segments of an image lie."""
    return Path(data_root) / dataset / "superpixels" / f"{image_id}.png"


def segments_of(image, count):
    """SLIC with the paper's parameters (compactness 10, 10 iterations): uint8 (H,W,3) -> (H,W) uint8 or uint16 from 1.

    About `count` segments: SLIC lays a regular grid first and keeps segments connected.
    """
    from skimage.segmentation import slic  # slow to import, and the readers do without
    segments = slic(image, n_segments=count, compactness=10.0, max_num_iter=10, start_label=1, channel_axis=-1)
    return segments.astype(np.uint8 if segments.max() < 256 else np.uint16)


def write_superpixels(count, task):
    """Segment one image; task: (picture, width, height, target). Returns a fault, or None. Finished targets are
    kept."""
    picture, width, height, target = task
    try:
        if is_made(target, width, height, count):
            return None
        segments = segments_of(load_image(picture, width, height).permute(1, 2, 0).numpy(), count)
        note, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        note.add_text("segments", str(count))
        Image.fromarray(segments).save(buffer, "PNG", pnginfo=note)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, target)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot write {target}: {error.strerror or error}."


def is_made(path, width, height, count):
    """Whether `path` holds the segments of an image of that size, made with that count."""
    try:
        with Image.open(path) as opened:
            made = opened.size == (width, height) and opened.info.get("segments") == str(count)
            opened.verify()
            return made
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def load_superpixels(path, width, height):
    """Segment numbers (H,W) int32 of an image of that size. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; `python -m data_prep.clicks --dataset {Path(path).parents[1].name} "
                        f"--data-root {Path(path).parents[2]}` makes it.")
    try:
        with Image.open(path) as opened:
            if opened.size != (width, height) or opened.mode not in ("L", "I;16") or width * height > MAX_PIXELS:
                raise UserError(f"{path} is no map of segments of {width}x{height} pixels; remove it and run "
                                "data_prep.clicks again.")
            return np.asarray(opened).astype(np.int32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run data_prep.clicks again.") from None


def make(data_root, dataset, splits=None, snap=False, superpixels=("train",), segments=100, jobs=2):
    """Write clicks.json and the superpixels of a prepared corpus; returns clicks.json's meta.

    splits: whose objects get clicks; None: all of SPLITS that are there. superpixels: splits whose images get segments.
    Raises UserError.
    """
    splits = splits or [split for split in SPLITS if split_path(data_root, dataset, split).is_file()]
    if not splits:
        raise UserError(f"{split_path(data_root, dataset, 'train')} does not exist; prepare {dataset} first.")
    meta = write_clicks(data_root, dataset, splits, snap)
    tasks = {}
    for split in superpixels:
        corpus = RefDataset(split_path(data_root, dataset, split), None, None)
        for image_id, name, (width, height) in zip(corpus.image_ids.tolist(), corpus.file_names, corpus.sizes.tolist()):
            tasks[image_id] = (corpus.root / name, width, height, superpixel_path(data_root, dataset, image_id))
    try:
        folder = superpixel_path(data_root, dataset, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):
            left.unlink()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}.") from None
    with workers(min(jobs, len(tasks))) as each:
        for fault in tqdm(each(partial(write_superpixels, segments), tasks.values()), "superpixels", len(tasks),
                          unit=" images", disable=None):
            if fault:
                raise UserError(fault)
    return meta


def is_complete(data_root, dataset, splits=("train",)):
    """Whether clicks.json is there, and a file of superpixels for every image of `splits`; `make` looks closer."""
    if not (Path(data_root) / dataset / "clicks.json").is_file():
        return False
    ids = (i for split in splits for i in RefDataset(split_path(data_root, dataset, split), None, None).image_ids)
    return all(superpixel_path(data_root, dataset, i).is_file() for i in ids)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="folder below --data-root that data_prep wrote")
    add("--data-root", default="data", help="where the prepared corpora lie")
    add("--splits", nargs="+", default=None, help="splits whose objects get clicks; default: all that are there")
    add("--click", choices=("com", "snap"), default="com",
        help="centre of mass, or where that lies outside the mask the mask's nearest pixel")
    add("--superpixels", nargs="*", default=["train"], help="splits whose images are segmented")
    add("--segments", type=int, default=100, help="superpixels of an image; Sec. V-B")
    add("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    if not 1 <= args.segments < 2 ** 16:
        raise UserError(f"--segments {args.segments}: an image has between 1 and 65,535 superpixels.")
    meta = make(args.data_root, args.dataset, args.splits, args.click == "snap", args.superpixels, args.segments,
                args.jobs)
    print(f"{Path(args.data_root) / args.dataset / 'clicks.json'}: {meta['objects']} objects, the centres of "
          f"{meta['outside']} ({100 * meta['outside'] / max(1, meta['objects']):.2f} %) lie outside their masks")


if __name__ == "__main__":
    run(main)
