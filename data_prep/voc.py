"""Pascal VOC 2012 and SBD (Hariharan et al., ICCV 2011) to the prepared format, class names as expressions.

    python -m data_prep.voc --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE/dataset --data-root data

`train` is the augmented list of 10,582 images: VOC's train and all of SBD, without VOC's val; an image that both annotate
keeps VOC's. `val` is VOC's, 1,449 images. Without --sbd, `train` is VOC's own 1,464. The photographs are VOC's JPEGImages,
which hold SBD's, too.

`data/voc/<split>.json` has an object and an expression for each class of an image; `labels` are the image's classes (1 to
20), `ignore` the RLE of the pixels that nobody decided (255), `class_map` the class map: VOC's own file, or a PNG made
from SBD's .mat in data/voc/classes/. Object and expression ids are the image's id times 32, plus the class.
"""
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import masks
from common.config import Parser, UserError, run
from data_prep.refcoco import (MAX_BYTES, check_name, image_error, image_root, print_counts, read_bytes, show, source,
                               write_json)

CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
           "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor")
PUBLISHED = {"train": 10582, "val": 1449}


def read_list(path):
    """The image names, such as 2007_000032, of a VOC or SBD list: one a line. Raises UserError."""
    try:
        names = read_bytes(path).decode("ascii").split()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list of VOC image names") from None
    wrong = next((name for name in names if not re.fullmatch(r"\d{4}_\d{6}", name)), None)
    if wrong is not None or not names:
        raise UserError(f"{path}: {show(wrong) if names else 'an empty list'} is no VOC image name such as 2007_000032")
    return names


def augmented(voc_train, voc_val, sbd):
    """The augmented training list, sorted: all of VOC's train and of SBD that is not in VOC's val."""
    return sorted((set(voc_train) | set(sbd)) - set(voc_val))


def read_mat(path, count=len(CLASSES)):
    """SBD's class map (H,W) uint8 out of cls/<name>.mat, GTcls.Segmentation. Raises UserError."""
    from scipy.io import loadmat  # slow to import, and only SBD needs it
    try:
        if Path(path).stat().st_size > MAX_BYTES >> 6:
            raise UserError(f"{path}: too large for one image's annotation")
        content = loadmat(path, variable_names=["GTcls"], simplify_cells=True)
        values = np.asarray(content["GTcls"]["Segmentation"])
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: the class map is missing") from None
    except Exception as error:  # scipy's reader raises nearly anything on damaged bytes
        raise UserError(f"{path}: not a .mat of SBD with GTcls.Segmentation ({type(error).__name__})") from None
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise UserError(f"{path}: GTcls.Segmentation is no map of whole numbers")
    return masks.check_classes(values, count, path)


def entries(name, classes, class_map, names=CLASSES):
    """(image, objects, expressions) of the prepared format for a class map (H,W); class_map: its file as it is named;
    names: what the classes from 1 on are called.
    """
    height, width = classes.shape
    image_id = int(name.replace("_", ""))
    labels = [int(label) for label in np.unique(classes) if label not in (0, masks.UNDECIDED)]
    image = {"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height, "labels": labels,
             "class_map": class_map}
    if (classes == masks.UNDECIDED).any():
        image["ignore"] = masks.encode(classes == masks.UNDECIDED)
    objects, expressions = [], []
    for label in labels:
        rle, id_ = masks.encode(classes == label), image_id * 32 + label
        objects.append({"id": id_, "image_id": image_id, "category_id": label, "bbox": masks.bbox(rle, checked=True),
                        "area": masks.area(rle, checked=True), "iscrowd": 0, "mask": rle})
        expressions.append({"id": id_, "ref_id": id_, "image_id": image_id, "object_ids": [id_], "text": names[label - 1]})
    return image, objects, expressions


def convert(voc, data_root, sbd=None, dataset="voc", image_check=True, classes=CLASSES):
    """Prepare VOC, or other class maps in its layout; returns {split: counts}. sbd: SBD's folder `dataset`, or None; classes:
    the names of the classes from 1 on. Raises UserError.
    """
    check_name(dataset, "a dataset's name", "--dataset")
    if not 0 < len(classes) < 32:  # ids count them in five bits
        raise UserError(f"--classes names {len(classes)} classes; there can be 1 to 31")
    voc, folder = Path(voc), Path(data_root) / dataset
    lists = [voc / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val")]
    train, val = map(read_list, lists)
    files, own = {"train": lists[:1], "val": lists[1:]}, {*train, *val}
    if sbd is not None:
        sbd = Path(sbd)
        extra = [sbd / f"{split}.txt" for split in ("train", "val")]
        files["train"] = [*lists, *extra]
        train = augmented(train, val, [name for path in extra for name in read_list(path)])
    counts = {}
    for split, names in (("train", train), ("val", sorted(val))):
        images, objects, expressions = [], [], []
        for name in tqdm(sorted(names), f"VOC {split}", unit="image", disable=None, delay=2):
            if name in own:
                path = voc / "SegmentationClass" / f"{name}.png"
                labels = masks.read_class_map(path, len(classes))
            else:
                labels, path = read_mat(sbd / "cls" / f"{name}.mat", len(classes)), folder / "classes" / f"{name}.png"
                masks.save_map(path, labels)
            photograph = voc / "JPEGImages" / f"{name}.jpg"
            fault = image_error(photograph, labels.shape[::-1]) if image_check else ""
            if fault:
                raise UserError(f"{fault}; --voc names the folder VOC2012 with all of its JPEGImages")
            image, its_objects, its_expressions = entries(
                name, labels, f"{image_root(path.parent, folder, data_root)}/{path.name}", classes)
            images.append(image)
            objects += its_objects
            expressions += its_expressions
        counts[split] = {"images": len(images), "objects": len(objects), "refs": len(expressions),
                         "expressions": len(expressions)}
        meta = {"dataset": dataset, "split": split, "split_by": "voc2012" + ("+sbd" if sbd and split == "train" else ""),
                "image_root": image_root(voc / "JPEGImages", folder, data_root),
                "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(classes, start=1)],
                "sources": [source(path) for path in files[split]], "counts": counts[split]}
        write_json(folder / f"{split}.json", {"meta": meta, "images": images, "objects": objects, "expressions": expressions})
    return counts


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--voc", required=True, help="the folder VOCdevkit/VOC2012")
    parser.add_argument("--sbd", default=None, help="SBD's folder benchmark_RELEASE/dataset; None: VOC's own train alone")
    parser.add_argument("--dataset", default="voc", help="name of the prepared corpus")
    parser.add_argument("--classes", nargs="+", default=CLASSES, metavar="NAME", help="what the classes from 1 on are called")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.switch(None, "image-check", True, "look whether every photograph is there and as large as its class map")
    return parser


def main(argv=None):
    """Prepare VOC, print its counts and where they differ from the published ones."""
    args = get_parser().parse_args(argv)
    counts = convert(args.voc, args.data_root, args.sbd, args.dataset, args.image_check, args.classes)
    print_counts(counts, Path(args.data_root) / args.dataset)
    for split, images in PUBLISHED.items() if args.sbd else ():
        if counts[split]["images"] != images:
            print(f"note: {split} has {counts[split]['images']} images; with the published lists it has {images}")


if __name__ == "__main__":
    run(main)
