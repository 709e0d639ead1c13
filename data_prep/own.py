"""Your own images, masks and sentences to the prepared format.

    python -m data_prep.own --images photos --masks masks --table sentences.csv --dataset mine --data-root data

The table (CSV, or TSV if its first line holds tabs; UTF-8) has a heading line and the columns
    image      file name inside the image folder
    mask       what the sentence means: a PNG inside the mask folder, as large as its image, where every pixel that
               is not black belongs to the object; or, if --masks is a COCO json, an annotation id.
               Several with ';' between them; empty if nothing in the image is meant
    sentence   the text
    split      train, val, ... (optional; --split where it is missing or empty)
Images that one file names twice are kept once; all annotations of a COCO json's images come along.
"""
import csv
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import masks
from common.config import Parser, UserError, run
from data_prep.refcoco import (check_inside, check_name, image_entry, image_error, image_root, load_instances,
                               object_entry, print_counts, read_bytes, show, source, write_splits)

COLUMNS = ("image", "mask", "sentence")


def read_table(path, split):
    """Rows of the table as dictionaries with image, masks (list), sentence, split and where (for messages)."""
    try:
        content = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the table as CSV in UTF-8") from None
    if "\0" in content:
        raise UserError(f"{path}: not a text table; save it as CSV in UTF-8")
    heading = content.partition("\n")[0]
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t" if "\t" in heading else ",")
        names = [name.strip().lower() if name else "" for name in reader.fieldnames or ()]
        for column in COLUMNS:
            if column not in names:
                raise UserError(f"{path}: its first line must name the columns {', '.join(COLUMNS)}; "
                                f"'{column}' is missing")
        reader.fieldnames = names
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has another number of columns than the first line; "
                                "put quotes around a sentence that holds commas")
            row = {name: value.strip() for name, value in row.items()}
            if not row["sentence"] or not row["image"]:
                raise UserError(f"{where}: the {'image' if row['sentence'] else 'sentence'} is empty")
            rows.append({"image": check_inside(row["image"], where), "sentence": row["sentence"], "where": where,
                         "masks": [name.strip() for name in row["mask"].split(";") if name.strip()],
                         "split": check_name(row.get("split") or split, "a split's name", where)})
    except csv.Error as error:
        raise UserError(f"{path}: not a whole table ({error})") from None
    if not rows:
        raise UserError(f"{path}: has no row below its heading")
    return rows


def read_mask(path, image):
    """RLE of a mask file: pixels that are not black (palette: not of index 0) and not transparent. Raises UserError."""
    fault = image_error(path, (image["width"], image["height"]), whole=True)
    if fault:
        raise UserError(f"{fault}; a mask must be a whole picture as large as its image {image['file_name']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # PIL's remarks on odd palettes
        with Image.open(path) as opened:
            if opened.mode in ("LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
                opened = opened.convert("RGBA")
            pixels = np.asarray(opened)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].any(-1) & (pixels[..., 3] > 0 if pixels.shape[-1] == 4 else True)
    rle = masks.encode(pixels)
    if not masks.area(rle, checked=True):
        raise UserError(f"{path}: this mask is black all over; leave the mask empty if nothing is meant")
    return rle


def from_folder(rows, images, folder):
    """(images, objects, categories, image id per row, object ids per row) where masks are PNGs; ids follow names."""
    names = sorted({row["image"] for row in rows})
    where = {row["image"]: row["where"] for row in reversed(rows)}
    entries = {}
    for number, name in enumerate(names):
        size = _image_size(Path(images) / name, where[name])
        entries[name] = {"id": number, "file_name": name, "width": size[0], "height": size[1]}
    pairs = sorted({(row["image"], mask) for row in rows for mask in row["masks"]})
    ids = {pair: number for number, pair in enumerate(pairs)}
    objects = {entry["id"]: [] for entry in entries.values()}
    for (name, mask), number in tqdm(ids.items(), "masks", unit="mask", disable=None, delay=2):
        rle = read_mask(Path(folder) / check_inside(mask, where[name]), entries[name])
        objects[entries[name]["id"]].append(
            {"id": number, "image_id": entries[name]["id"], "category_id": 0, "bbox": masks.bbox(rle, checked=True),
             "area": masks.area(rle, checked=True), "iscrowd": 0, "mask": rle})
    meant = [[ids[row["image"], mask] for mask in row["masks"]] for row in rows]
    image_ids = [entries[row["image"]]["id"] for row in rows]
    categories = [{"id": 0, "name": "object", "supercategory": ""}]
    return {entry["id"]: entry for entry in entries.values()}, objects, categories, image_ids, meant


def _image_size(path, where):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                size = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        size = (1, 1)                                           # image_error says what is wrong
    fault = image_error(path, size)
    if fault:
        raise UserError(f"{fault}; {where} names it")
    return size


def from_coco(rows, images, path, margin):
    """The same as `from_folder` where masks are annotations of a COCO json."""
    records, annotations, categories = load_instances(path)
    by_name = {}
    for record in records.values():
        name = record.get("file_name")
        if isinstance(name, str):
            by_name[name] = record
            by_name.setdefault(name.replace("\\", "/").rpartition("/")[2], record)
    entries, objects, image_ids, meant = {}, {}, [], []
    for row in tqdm(rows, "images and masks", unit="row", disable=None, delay=2):
        if row["image"] not in by_name:
            raise UserError(f"{row['where']}: {path} has no image with the file name {show(row['image'])}")
        image_id = by_name[row["image"]]["id"]
        if image_id not in entries:
            entries[image_id] = image_entry(records[image_id], images, f"{path}: image")
            objects[image_id] = [object_entry(record, entries[image_id], str(path), margin)
                                 for record in annotations.get(image_id, ())]
        known = {entry["id"]: entry for entry in objects[image_id]}
        for mask in row["masks"]:
            if not mask.isascii() or not mask.isdigit() or len(mask) > 18 or int(mask) not in known:
                raise UserError(f"{row['where']}: {path} has no annotation {show(mask)} in the image {row['image']}")
            if known[int(mask)]["mask"] is None:
                raise UserError(f"{row['where']}: annotation {mask} in {path} has no segmentation")
        image_ids.append(image_id)
        meant.append([int(mask) for mask in row["masks"]])
    return entries, objects, categories, image_ids, meant


def convert(images, masks_from, table, dataset, data_root, split="train", margin=2):
    """Prepare a user's own corpus; returns {split: {"images", "objects", "refs", "expressions"}}.

    images: folder; masks_from: folder of PNGs or a COCO json; table: see this module. Sentences about the same
    objects of an image are one ref. Raises UserError with the table's line and the value.
    """
    check_name(dataset, "a dataset's name", "--dataset")
    if not Path(images).is_dir():
        raise UserError(f"{images}: no such folder of images; give it with --images")
    rows = read_table(table, split)
    files = [table]
    if Path(masks_from).is_dir():
        entries, objects, categories, image_ids, meant = from_folder(rows, images, masks_from)
    else:
        entries, objects, categories, image_ids, meant = from_coco(rows, images, masks_from, margin)
        files.append(masks_from)
    refs = {}
    for number, (row, image_id, object_ids) in enumerate(zip(rows, image_ids, meant)):
        object_ids = list(dict.fromkeys(object_ids))
        ref = refs.setdefault((row["split"], image_id, tuple(sorted(object_ids))), {
            "ref_id": len(refs), "image_id": image_id, "ann_ids": object_ids, "split": row["split"], "sentences": []})
        ref["sentences"].append({"sent_id": number, "sent": row["sentence"]})
    folder = Path(data_root) / dataset
    meta = {"dataset": dataset, "split_by": "own", "image_root": image_root(images, folder, data_root),
            "sources": [source(path) for path in files]}
    return write_splits(list(refs.values()), entries, objects, categories, meta, data_root)


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder of the photographs")
    parser.add_argument("--masks", required=True, help="folder of PNG masks, or a COCO json")
    parser.add_argument("--table", required=True, help="CSV or TSV: image, mask, sentence, split")
    parser.add_argument("--dataset", required=True, help="a name for the corpus")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.add_argument("--split", default="train", help="split of rows that name none")
    parser.add_argument("--polygon-margin", type=float, default=2.0,
                        help="pixels that a polygon may reach beyond its image")
    return parser


def main(argv=None):
    """Prepare a user's corpus and print its counts."""
    args = get_parser().parse_args(argv)
    counts = convert(args.images, args.masks, args.table, args.dataset, args.data_root, args.split,
                     args.polygon_margin)
    print_counts(counts, Path(args.data_root) / args.dataset)


if __name__ == "__main__":
    run(main)
