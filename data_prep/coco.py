r"""COCO's instances without the images that RefCOCO, RefCOCO+ and RefCOCOg are scored on, and the images nobody described.

    python -m data_prep.coco --instances instances_train2017.json --images train2017 --data-root data \
        --refs 'refcoco/refs(unc).p' 'refcoco+/refs(unc).p' 'refcocog/refs(umd).p' 'refcocog/refs(google).p'
    python -m data_prep.coco --shapes                 RefShapes in COCO's place: data/cocoshapes/

Writes to data/coco/, in the prepared format without sentences:

    train.json   every image but those of the val and test splits: what a proposal extractor may be pre-trained on
    val.json     images of the val splits that stand in no test split, or COCO's own with --val-instances: for its AP
    pool.json    the images of train.json that no refs file has a sentence about, if they have a mask: to be described

The published corpora leave out 6,549 images, so that 76,234 of train2014 or 111,738 of train2017 remain. RefCOCOg's
Google partition splits objects and not images: its val images stay in training, unless --exclude-google-val (then the
extractor saw none of the images that REG is scored on there); its sentences always keep images out of the pool.
Images are known by COCO's ids, which are the same in 2014 and 2017.
"""
import os
import re
from pathlib import Path

from tqdm import tqdm

from common.config import Parser, UserError, run
from data_prep import refshapes
from data_prep.check import is_train, load_splits
from data_prep.refcoco import check_name, image_entry, image_root, load_instances, load_refs, object_entry, source, write_json

REMAIN = {82_783: 76_234, 118_287: 111_738}  # images of train2014, train2017: how many without the 6,549
COCO_NAME = re.compile(r"(?:^|_)(\d{12})\.\w+$")


def images_of(path):
    """{split: set of image ids with a sentence} of a refs file, or of a folder that data_prep.refcoco wrote. UserError."""
    path, splits = Path(path), {}
    if path.is_dir():
        for split, data in load_splits(path.parent, path.name).items():
            splits[split] = {expression["image_id"] for expression in data["expressions"]}
    else:
        for ref in load_refs(path):
            splits.setdefault(ref["split"], set()).update([ref["image_id"]] if ref["sentences"] else [])
    return splits


def is_google(path):
    """Whether a refs file, or a prepared folder, is RefCOCOg's Google partition: by its name."""
    return "google" in Path(path).name


def sort_out(corpora, exclude_google_val=False):
    """What the corpora are needed for: {path: {split: image ids}} -> (left out of training, val alone, described) sets.

    left out: images of any val or test split, those of the Google partition only if asked; val alone: of them, those in no
    test split; described: images with a sentence in any split.
    """
    val, test, described = set(), set(), set()
    for path, splits in corpora.items():
        for split, ids in splits.items():
            described |= ids
            if not is_train(split) and (exclude_google_val or not is_google(path)):
                (val if split.startswith("val") else test).update(ids)
    return val | test, val - test, described


def refuse_leak(images, forbidden, what):
    """Raise UserError where a prepared image has a forbidden id, or COCO's number of such an image in its file name."""
    for image in images:
        found = COCO_NAME.search(image["file_name"])
        for number in (image["id"], int(found[1]) if found else None):
            if number in forbidden:
                raise UserError(f"image {image['id']} ({image['file_name']}) is COCO's image {number}, which {what}; are the ids "
                                "in --instances COCO's own?")


def convert(instances, images, refs, data_root, dataset="coco", exclude_google_val=False, val_instances=None, val_images=None,
            image_check=True, margin=2):
    """Write data_root/dataset/{train,val,pool}.json; returns {split: counts} with "left out" beside them.

    instances, images: COCO's file of train2014 or train2017 and the folder of its photographs; refs: refs files or prepared
    folders, see `images_of`; val_instances, val_images: COCO's val, else val.json is taken from the val splits. image_check
    and margin as in `data_prep.refcoco.convert`. Raises UserError, also for what would leak.
    """
    check_name(dataset, "a dataset's name", "--dataset")
    corpora = {path: images_of(path) for path in refs}
    for path, splits in corpora.items():
        if not any(map(is_train, splits)):
            raise UserError(f"{path} has no train split, so images that it describes would pass for undescribed ones.")
    if exclude_google_val and not any(map(is_google, corpora)):
        raise UserError("--exclude-google-val needs the Google partition among --refs: a file or folder with google in its name.")
    left_out, val, described = sort_out(corpora, exclude_google_val)
    if not left_out:
        raise UserError(f"{', '.join(map(str, refs))}: no val or test split to leave out of training.")

    records, annotations, categories = load_instances(instances)
    if not left_out & records.keys():
        raise UserError(f"{instances} has none of the {len(left_out)} val and test images of the refs; it should be COCO's "
                        "train2014 or train2017.")
    train = {i: record for i, record in records.items() if i not in left_out}
    counts = {"left out": len(left_out & records.keys()), "described": len(described & records.keys())}
    files = [Path(instances), *(Path(path) for path in refs if not Path(path).is_dir())]
    head = {"split_by": "", "exclude_google_val": exclude_google_val, "sources": [source(path) for path in files]}
    folder = Path(data_root) / dataset
    if val_instances:
        held_out = load_instances(val_instances)
        both = held_out[0].keys() & train.keys()
        if both:
            raise UserError(f"{val_instances} shares {len(both)} images with {instances}, such as {min(both)}: no held-out set.")

    def write(split, entries, objects, categories, head, root):
        refuse_leak(entries, {"train": left_out, "pool": left_out | described}.get(split, set()),
                    "a val or test split has" if split == "train" else "a refs file describes")
        counts[split] = {"images": len(entries), "objects": len(objects),
                         "crowds": sum(entry["iscrowd"] for entry in objects)}
        meta = {"dataset": dataset, "split": split, "image_root": image_root(root, folder, data_root),
                "categories": sorted(categories, key=lambda c: c["id"]), **head,
                "counts": {**counts[split], "refs": 0, "expressions": 0}}
        write_json(folder / f"{split}.json", {"meta": meta, "images": entries, "objects": objects, "expressions": []})

    def prepare(records, annotations, file, root):
        entries, objects = [], []
        for i in tqdm(sorted(records), "images and masks", unit="image", disable=None, delay=2):
            entries.append(image_entry(records[i], root, f"{file}: image", image_check))
            objects += sorted((object_entry(a, entries[-1], str(file), margin) for a in annotations.get(i, ())),
                              key=lambda o: o["id"])
        return entries, objects

    for root, option in ((images, "--images"), (val_images, "--val-images")):
        if root and image_check and not os.path.isdir(root):
            raise UserError(f"{root}: no such folder of images; give it with {option}")
    entries, objects = prepare(train, annotations, instances, images)
    write("train", entries, objects, categories, head, images)
    seen = {o["image_id"] for o in objects if o["mask"] and not o["iscrowd"]} - described
    write("pool", [entry for entry in entries if entry["id"] in seen], [o for o in objects if o["image_id"] in seen],
          categories, head, images)
    if val_instances:
        (records, annotations, categories), head = held_out, head | {"sources": [source(val_instances)]}
    else:
        val_instances, val_images, records = instances, images, {i: records[i] for i in val & records.keys()}
    write("val", *prepare(records, annotations, val_instances, val_images), categories, head, val_images)

    remain = REMAIN.get(len(train) + counts["left out"])
    if remain and not exclude_google_val and len(train) != remain:
        counts["warning"] = f"{len(train)} images remain and not {remain}: are RefCOCO, RefCOCO+ and RefCOCOg-umd among --refs?"
    return counts


def shapes(data_root, jobs=2):
    """RefShapes in COCO's place: `<data_root>/cocoshapes/`, from the RefShapes of any scale there, which is drawn if need be."""
    if not all(refshapes.is_made(data_root, name) for name in refshapes.NAMES):
        refshapes.make(data_root, jobs=jobs)
    raw = Path(data_root) / "raw" / "refshapes"
    return convert(raw / refshapes.NAMES[0] / "instances.json", raw / "images",
                   [raw / name / "refs(unc).p" for name in refshapes.NAMES], data_root, "cocoshapes")


def print_counts(counts, folder):
    """Print what was left out, a line per file, and where they lie."""
    print(f"left out of training: {counts['left out']} images of val and test splits; described: {counts['described']} images")
    print(f"{'':<8}{'images':>9}{'objects':>9}{'crowds':>9}")
    for split in ("train", "val", "pool"):
        print(f"{split:<8}" + "".join(f"{counts[split][what]:>9}" for what in ("images", "objects", "crowds")))
    if "warning" in counts:
        print(f"warning: {counts['warning']}")
    print(f"written to {folder}")


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--instances", default="", help="instances_train2017.json or instances_train2014.json")
    add("--images", default="", help="folder of its photographs; names of both years are found")
    add("--refs", nargs="+", default=[], help="refs files as published, or folders that data_prep.refcoco wrote; the images of "
        "their val and test splits are left out")
    parser.switch(None, "exclude-google-val", False, "leave out the val images of RefCOCOg's Google partition, too")
    add("--val-instances", default="", help="COCO's instances_val2017.json for val.json; empty: the val splits' images")
    add("--val-images", default="", help="folder of its photographs")
    add("--dataset", default="coco", help="folder to write below --data-root")
    add("--data-root", default="data", help="where the prepared corpora lie")
    add("--polygon-margin", type=float, default=2.0, help="pixels that a polygon may reach beyond its image")
    parser.switch(None, "image-check", True, "look whether every image is there and of the right size")
    parser.switch(None, "shapes", False, "prepare RefShapes in COCO's place, as data/cocoshapes; nothing else is needed")
    return parser


def main(argv=None):
    """Prepare the corpus and print its counts."""
    args = get_parser().parse_args(argv)
    if args.shapes:
        default = vars(get_parser().parse_args([]))
        given = [key for key, value in vars(args).items() if value != default[key] and key not in ("shapes", "data_root")]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} means nothing to --shapes, which knows its own files.")
        return print_counts(shapes(args.data_root), Path(args.data_root) / "cocoshapes")
    missing = [f"--{name}" for name in ("instances", "images", "refs") if not getattr(args, name)]
    if missing or bool(args.val_instances) != bool(args.val_images):
        what = " ".join(missing) or "both --val-instances and --val-images"
        raise UserError(f"{what} must be given, or --shapes for the embedded data (see --help).")
    counts = convert(args.instances, args.images, args.refs, args.data_root, args.dataset, args.exclude_google_val,
                     args.val_instances or None, args.val_images or None, args.image_check, args.polygon_margin)
    print_counts(counts, Path(args.data_root) / args.dataset)


if __name__ == "__main__":
    run(main)
