"""Look a prepared corpus over: counts, masks, boxes, images, leaks, and a sheet of pictures for the eye.

    python -m data_prep.check --dataset refcoco --data-root data

Every mask must decode and fill its image, every box must agree with its mask, every image must open to its last
byte and have the size that is written down, the counts must be the published ones, and no image of a val or test
split of any RefCOCO corpus under the data root may stand in a train split or in a pre-training list. Prints the
faults and ends with status 1, or prints "ok". Writes data/<dataset>/check.png: some sentences with what they mean left bright.

Counts: refs and images as TensorFlow Datasets' ref_coco catalogue lists them; sentences as the LTS and PKS papers
give them; gRefCOCO's total as its authors do. What no source at hand gives per split is None and is not compared.
"""
import io
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from common import masks
from common.config import Parser, UserError, run, write_bytes
from data_prep.refcoco import check_inside, check_name, field, image_error, parse_json, read_bytes, read_json

# dataset: {split: (images, refs, sentences)}; None: not known
PUBLISHED = {
    "refcoco": {"train": (16994, 42404, 120624), "val": (1500, 3811, 10834), "testA": (750, 1975, 5657),
                "testB": (750, 1810, 5095)},
    "refcoco+": {"train": (16992, 42278, 120191), "val": (1500, 3805, 10758), "testA": (750, 1975, 5726),
                 "testB": (750, 1798, 4889)},
    "refcocog_umd": {"train": (21899, 42226, None), "val": (1300, 2573, None), "test": (2600, 5023, None)},
    "refcocog_google": {"train": (24698, 44822, None), "val": (4650, 5000, None)},
    "grefcoco": {"train": (None, None, None), "val": (None, None, None), "testA": (None, None, None),
                 "testB": (None, None, None)},
}
TOTAL = {"refcocog_umd": 95010, "grefcoco": 278232}      # sentences of all splits together
SHARED_BY_DESIGN = ("refcocog_google",)                  # this partition splits objects, not images
PARTS = {"meta": dict, "images": list, "objects": list, "expressions": list}
BOX_PIXELS, BOX_IOU = 4, 0.7      # COCO's boxes hold the polygons' thin spikes, which cover no pixel's centre


def count(refs):
    """{split: {"images", "refs", "sentences"}} of refs, each with "split", "image_id" and a list "sentences"."""
    counts = {}
    for ref in refs:
        entry = counts.setdefault(ref["split"], {"images": set(), "refs": 0, "sentences": 0})
        entry["images"].add(ref["image_id"])
        entry["refs"] += 1
        entry["sentences"] += len(ref["sentences"])
    return {split: {**entry, "images": len(entry["images"])} for split, entry in counts.items()}


def published(dataset):
    """{split: {"images", "refs", "sentences"}} as published, None where not known; {} for another corpus."""
    return {split: dict(zip(("images", "refs", "sentences"), row))
            for split, row in PUBLISHED.get(dataset, {}).items()}


def load_splits(data_root, dataset):
    """{split: content of data/<dataset>/<split>.json}; UserError if there is none or one is damaged.

    A JSON file with neither images nor expressions is a sidecar (clicks, subsets, a corpus' marker) and left out.
    """
    folder = Path(data_root) / check_name(dataset, "a dataset's name", "--dataset")
    splits = {}
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if isinstance(data, dict) and not {"images", "expressions"} & data.keys():
            continue
        for part, kind in PARTS.items():
            field(data, part, kind, path)
        splits[path.stem] = data
    if not splits:
        raise UserError(f"{folder}: no prepared corpus here; make it with python -m data_prep.refcoco "
                        "(data_prep/README.md lists the commands)")
    return splits


def refs_of(split, data, where):
    """Refs of a prepared split, as `count` takes them."""
    refs = {}
    for record in data["expressions"]:
        ref_id = field(record, "ref_id", int, f"{where}: an expression")
        ref = refs.setdefault(ref_id, {"split": split, "image_id": field(record, "image_id", int, where),
                                       "sentences": []})
        ref["sentences"].append(field(record, "text", str, f"{where}: ref {ref_id}"))
    return list(refs.values())


# ---- faults: each function returns a list of sentences --------------------------------------------------------------

def count_faults(dataset, counts):
    """Where the counts differ from the published ones."""
    faults = []
    for split, row in published(dataset).items():
        row = {what: number for what, number in row.items() if number is not None}
        if row and split not in counts:
            faults.append(f"{dataset}/{split}.json is missing")
            continue
        for what, number in row.items():
            if counts[split][what] != number:
                faults.append(f"{dataset}/{split}.json has {counts[split][what]} {what}, published are {number}")
    if dataset in TOTAL and published(dataset).keys() <= counts.keys():
        total = sum(counts[split]["sentences"] for split in published(dataset))
        if total != TOTAL[dataset]:
            faults.append(f"{dataset} has {total} sentences in all, published are {TOTAL[dataset]}")
    return faults


def record_faults(path, data):
    """Where images, objects and expressions of one split are damaged, or masks and boxes do not fit."""
    faults, images, objects = [], {}, {}
    for number, record in enumerate(data["images"]):
        where = f"{path}: image number {number}"
        try:
            image_id = field(record, "id", int, where)
            check_inside(field(record, "file_name", str, where), where)
            images[image_id] = masks.check_size(record.get("height"), record.get("width"))
            if record.get("ignore") is not None:
                masks.check_rle(record["ignore"], *images[image_id])
        except (UserError, ValueError) as error:
            faults.append(_with(where, error))
    for record in tqdm(data["objects"], f"{path.stem}: masks", unit="mask", disable=None, delay=2):
        where = f"{path}: object {record.get('id') if isinstance(record, dict) else '?'}"
        try:
            object_id = field(record, "id", int, where)
            image_id = field(record, "image_id", int, where)
            box = field(record, "bbox", list, where)
            if image_id not in images:
                raise UserError(f"{where}: its image {image_id} is not in the file")
            if len(box) != 4 or any(type(v) not in (int, float) or not abs(v) < 1e9 for v in box):
                raise UserError(f"{where}: its box is not four numbers")
            objects[object_id] = image_id, 0
            if record.get("mask") is not None:
                rle = masks.check_rle(record["mask"], *images[image_id])
                objects[object_id] = image_id, masks.area(rle, checked=True)
                if objects[object_id][1] and not box_fits(box, masks.bbox(rle, checked=True)):
                    raise UserError(f"{where}: its box {[round(v, 1) for v in box]} does not fit its mask, which "
                                    f"spans {masks.bbox(rle, checked=True)}")
        except (UserError, ValueError) as error:
            faults.append(_with(where, error))
    for number, record in enumerate(data["expressions"]):
        where = f"{path}: expression number {number}"
        try:
            field(record, "id", int, where)
            image_id = field(record, "image_id", int, where)
            if image_id not in images:
                raise UserError(f"{where}: its image {image_id} is not in the file")
            if not field(record, "text", str, where).strip():
                raise UserError(f"{where}: its text is empty")
            for object_id in field(record, "object_ids", list, where):
                if type(object_id) is not int or objects.get(object_id, (None,))[0] != image_id:
                    raise UserError(f"{where}: names an object that its image {image_id} does not have")
                if not objects[object_id][1]:
                    raise UserError(f"{where}: the object {object_id} that it names has no mask, or an empty one")
        except UserError as error:
            faults.append(str(error))
    return faults


def _with(where, error):
    return str(error) if isinstance(error, UserError) else f"{where}: {error}"


def box_fits(box, span):
    """Whether a box and a mask's tight box, both [x, y, w, h], agree as well as COCO's own do.

    Measured on 3,347 COCO objects: the edges differ by 0.45 pixels in the middle, 2.3 at the 99th percentile and
    10 at most; where by more than 4, the IoU is above 0.84.
    """
    (x, y, w, h), (i, j, k, m) = box, span
    apart = max(abs(x - i), abs(y - j), abs(x + w - i - k), abs(y + h - j - m))
    return apart <= BOX_PIXELS or bool(masks.iou_boxes(box, span) >= BOX_IOU)


def image_faults(data_root, dataset, splits):
    """Images that are missing, do not decode to the last byte, or have another size."""
    wanted = {}
    for split, data in splits.items():
        root = Path(data_root) / dataset / field(data["meta"], "image_root", str, f"{dataset}/{split}.json: meta")
        for record in data["images"]:
            if isinstance(record, dict) and isinstance(record.get("file_name"), str):
                try:
                    name = check_inside(record["file_name"], "")
                except UserError:
                    continue                                                # record_faults has it
                wanted[str(root / name)] = record.get("width"), record.get("height")
    faults = []
    for path, size in tqdm(wanted.items(), "images", unit="image", disable=None, delay=2):
        fault = image_error(path, size, whole=True)
        if fault:
            faults.append(fault)
    return faults


def is_train(split):
    """Whether a split is learnt from: train, parts of it, and pools of images without sentences."""
    return split.startswith(("train", "pool"))


def image_ids(data):
    """The set of image ids of a prepared split; records without an integer id are faults elsewhere."""
    return {record["id"] for record in data["images"] if isinstance(record, dict) and type(record.get("id")) is int}


def is_coco(dataset):
    """Whether a corpus belongs to the RefCOCO family, whose image ids are COCO's."""
    return dataset.startswith(("refcoco", "grefcoco"))


def leak_faults(data_root, dataset, splits, pretrain=frozenset(), alone=False):
    """Val and test images that are trained on: (faults, notes).

    Compared are the corpus' own splits and, if it is of the RefCOCO family, those of all others under the data root
    (not with `alone`); `pretrain`: image ids of a pre-training set.
    """
    corpora = {dataset: splits}
    if is_coco(dataset) and not alone:
        for folder in sorted(Path(data_root).iterdir()):
            if folder.name != dataset and is_coco(folder.name) and any(folder.glob("*.json")):
                corpora[folder.name] = load_splits(data_root, folder.name)
    train = {f"{name}/{split}": image_ids(data) for name, parts in corpora.items() for split, data in parts.items()
             if is_train(split)}
    train["the pre-training list"] = set(pretrain)
    faults, notes = [], []
    for name, parts in corpora.items():
        for split, data in parts.items():
            if is_train(split):
                continue
            for place, ids in train.items():
                both = sorted(image_ids(data) & ids)
                if not both:
                    continue
                text = (f"{len(both)} of the images of {name}/{split} are in {place}, such as "
                        + ", ".join(map(str, both[:3])))
                if name in SHARED_BY_DESIGN and place.startswith(f"{name}/"):
                    notes.append(f"{text} (so by design: this partition splits objects, not images)")
                elif name != dataset and not place.startswith((f"{dataset}/", "the ")):
                    continue                                                # the other corpora's own affair
                else:
                    other = name != dataset or not place.startswith((f"{dataset}/", "the "))
                    faults.append(text + ("; a leak where one serves to train for the other, else use --alone"
                                          if other else ""))
    return faults, notes


def read_ids(path):
    """Image ids of a pre-training list: COCO's instances.json, a JSON list, or lines with an id or a COCO file name."""
    data = read_bytes(path)
    if data.lstrip()[:1] in (b"[", b"{"):
        value = parse_json(data, path)
        if isinstance(value, dict):
            value = [field(record, "id", int, f"{path}: an image") for record in field(value, "images", list, path)]
        lines = [item if isinstance(item, (int, str)) else "" for item in value]
    else:
        lines = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    ids = set()
    for line in lines:
        found = re.search(r"(\d{1,18})(?:\.[A-Za-z]{2,5})?\s*$", str(line))
        if not found:
            raise UserError(f"{path}: {str(line)[:60]!r} is neither an image id nor a COCO file name")
        ids.add(int(found[1]))
    return ids


# ---- the sheet ------------------------------------------------------------------------------------------------------

def draw_sheet(data_root, dataset, splits, path, columns=4, rows=4, cell=320, seed=0):
    """Save a sheet of `columns` x `rows` sentences drawn by `seed`: what is meant stays bright, in yellow boxes."""
    choices = [(split, number) for split, data in splits.items() for number in range(len(data["expressions"]))]
    picked = random.Random(seed).sample(choices, min(columns * rows, len(choices)))
    sheet = Image.new("RGB", (columns * cell, max(1, -(-len(picked) // columns)) * (cell + 40)), "white")
    font = ImageFont.load_default()
    for place, (split, number) in enumerate(picked):
        data = splits[split]
        expression = data["expressions"][number]
        image = next(record for record in data["images"] if record["id"] == expression["image_id"])
        meant = [record for record in data["objects"] if record["id"] in expression["object_ids"]]
        root = Path(data_root) / dataset / data["meta"]["image_root"]
        with Image.open(root / image["file_name"]) as opened:
            pixels = np.asarray(opened.convert("RGB"), np.float32)
        inside = np.zeros(pixels.shape[:2], bool)
        for record in meant:
            inside |= masks.decode(record["mask"])
        pixels[~inside] *= 0.35
        picture = ImageOps.contain(Image.fromarray(pixels.astype(np.uint8)), (cell - 8, cell - 8))
        scale = picture.width / image["width"]
        for record in meant:
            x, y, w, h = (scale * value for value in record["bbox"])
            ImageDraw.Draw(picture).rectangle([x, y, x + max(w, 1), y + max(h, 1)], outline=(255, 230, 0), width=2)
        x, y = place % columns * cell + 4, place // columns * (cell + 40) + 4
        sheet.paste(picture, (x, y))
        text = f"{split} {expression['id']}: {expression['text']}".encode("latin1", "replace").decode("latin1")
        lines = [text[start:start + 52] for start in range(0, min(len(text), 104), 52)]
        ImageDraw.Draw(sheet).multiline_text((x, y + picture.height + 2), "\n".join(lines), fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def check(dataset, data_root, pretrain_ids=None, alone=False, image_check=True):
    """All faults of a prepared corpus, and notes: (list of sentences, list of sentences, counts). Draws the sheet."""
    folder = Path(data_root) / dataset
    splits = load_splits(data_root, dataset)
    pretrain = read_ids(pretrain_ids) if pretrain_ids else frozenset()
    faults, refs = [], []
    for split, data in splits.items():
        faults += record_faults(folder / f"{split}.json", data)
        try:
            refs += refs_of(split, data, folder / f"{split}.json")
        except UserError as error:
            faults.append(str(error))
    if image_check:
        faults += image_faults(data_root, dataset, splits)
    whole = not faults
    counts = count(refs)
    leaks, notes = leak_faults(data_root, dataset, splits, pretrain, alone)
    faults += count_faults(dataset, counts) + leaks
    if whole and image_check:
        draw_sheet(data_root, dataset, splits, folder / "check.png")
        notes.append(f"look at {folder / 'check.png'}: what is left bright must be what the sentence means")
    return faults, notes, counts


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", required=True, help="a folder of prepared files under the data root")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.add_argument("--pretrain-ids", default=None, metavar="FILE",
                        help="image ids that weights were trained on: instances.json, a JSON list, or lines")
    parser.add_argument("--alone", action="store_true",
                        help="leaks within this corpus only, not against the other RefCOCO corpora here")
    parser.switch(None, "image-check", True, "open every image, and draw the sheet")
    parser.add_argument("--show", type=int, default=50, help="faults to print")
    return parser


def main(argv=None):
    """Check one corpus, print what was found; returns 1 if there are faults."""
    args = get_parser().parse_args(argv)
    faults, notes, counts = check(args.dataset, args.data_root, args.pretrain_ids, args.alone,
                                  args.image_check)
    known = published(args.dataset)
    print(f"{'split':<16}{'images':>9}{'refs':>9}{'sentences':>11}   published")
    for split, row in counts.items():
        public = [known.get(split, {}).get(what) for what in row]
        print(f"{split:<16}{row['images']:>9}{row['refs']:>9}{row['sentences']:>11}   "
              + (" ".join("not known" if number is None else str(number) for number in public) if known else "-"))
    for note in notes:
        print(note)
    for fault in faults[:args.show]:
        print(f"fault: {fault}")
    if len(faults) > args.show:
        print(f"... and {len(faults) - args.show} more")
    print(f"{len(faults)} faults" if faults else "ok")
    return 1 if faults else 0


if __name__ == "__main__":
    run(main)
