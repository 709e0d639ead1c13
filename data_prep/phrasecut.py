"""PhraseCut (Wu et al., CVPR 2020) to the prepared format.

    python -m data_prep.phrasecut --annotations VGPhraseCut_v0 --images VG_100K VG_100K_2 --data-root data

The folder of annotations holds image_data_split.json (or image_data_split3000.json): a list of {image_id, width, height,
…}, and refer_<split>.json: a list of tasks {task_id, image_id, phrase, Polygons, instance_boxes, phrase_structure, …},
where Polygons[instance][polygon] is a list of [x, y]. Images are Visual Genome's, <image_id>.jpg, in one folder or several.

A phrase means all its instances. Their masks follow PhraseCut's own tools: each vertex is cut to whole pixels, PIL fills
the polygon with its outline, a polygon of one point is passed over. A phrase of which nothing is left then, answered by an
empty mask, has the IoU 1 here and 0 by those tools. The released val lacks the 100 images of miniv;
`val_miniv` is both together, on which the paper of PhraseCut reports. An expression's `source` is its task_id, its `kind`
the type that PhraseCut gives its structure (name, attribute, relation, verbose).
"""
import os
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from common import masks
from common.config import Parser, UserError, run
from data_prep.refcoco import (check_name, field, image_error, image_root, print_counts, read_json, show, source, write_splits)

SPLITS = ("train", "val", "miniv", "test")
SIZES = ("image_data_split.json", "image_data_split3000.json")
FAR = 10 ** 5  # pixels; a vertex beyond is no vertex, and PIL's arithmetic ends somewhere
COUNTS = {"train": (71746, 310816), "val": (2971, 20316), "miniv": (100, 821), "test": (2545, 14354)}  # images, phrases


def rasterise(polygons, height, width):
    """RLE of the union of `polygons`, lists of [x, y], as PhraseCut's own tools draw it. Raises ValueError (one sentence)."""
    height, width = masks.check_size(height, width)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    if not isinstance(polygons, list):
        raise ValueError("an instance must be a list of polygons")
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise ValueError("a polygon must be a list of points")
        points = [_point(point) for point in polygon]
        if len(points) >= 2:
            pen.polygon(points, fill=1, outline=1)
    return masks.encode(canvas)


def _point(point):
    """(x, y) in whole pixels, cut towards zero, or ValueError."""
    if not isinstance(point, list) or len(point) != 2 or any(type(v) not in (int, float) for v in point):
        raise ValueError("a polygon's point must be two numbers [x, y]")
    if not all(abs(v) <= FAR for v in point):  # false for NaN
        raise ValueError(f"a polygon holds the point {show(point[0])}, {show(point[1])}, which is far from any image")
    return int(point[0]), int(point[1])


def load_sizes(folder):
    """({image id: (width, height)}, the file) of the list of images. Raises UserError."""
    path = next((Path(folder) / name for name in SIZES if (Path(folder) / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: has no {SIZES[0]}; --annotations names the folder of PhraseCut's json files")
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: should hold a list of images, but holds {show(records)}")
    sizes = {}
    for number, record in enumerate(records):
        image_id = field(record, "image_id", int, f"{path}: image number {number}")
        where = f"{path}: image {image_id}"
        sizes[image_id] = (field(record, "width", int, where), field(record, "height", int, where))
        try:
            masks.check_size(*sizes[image_id][::-1])
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return sizes, path


def find_images(image_ids, folders):
    """({image id: path}, root): <image id>.jpg in the first of `folders` that has it, and the folder round them all.

    An image that is nowhere stays where the first folder would have it.
    """
    folders = [os.path.realpath(folder) for folder in folders]
    paths = {}
    for image_id in image_ids:
        name = f"{image_id}.jpg"
        there = (folder for folder in folders if len(folders) > 1 and os.path.isfile(os.path.join(folder, name)))
        paths[image_id] = os.path.join(next(there, folders[0]), name)
    return paths, os.path.commonpath(folders)


def read_tasks(path, sizes, next_object, next_phrase):
    """(refs, {image id: [prepared objects]}) of a refer_<split>.json; ids count on from the two given. Raises UserError."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: should hold a list of tasks, but holds {show(records) if records else 'nothing'}")
    refs, objects = [], {}
    for number, record in enumerate(tqdm(records, path.name, unit="phrase", disable=None, delay=2)):
        task = field(record, "task_id", str, f"{path}: task number {number}")
        where = f"{path}: task {show(task)}"
        image_id = field(record, "image_id", int, where)
        if image_id not in sizes:
            raise UserError(f"{where}: is about image {image_id}, which the list of images does not have")
        width, height = sizes[image_id]
        instances = field(record, "Polygons", list, where)
        if not instances:
            raise UserError(f"{where}: field 'Polygons' has no instance")
        ids = []
        for polygons in instances:
            try:
                rle = rasterise(polygons, height, width)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            ids.append(next_object)
            objects.setdefault(image_id, []).append(
                {"id": next_object, "image_id": image_id, "category_id": 0, "bbox": masks.bbox(rle, checked=True),
                 "area": masks.area(rle, checked=True), "iscrowd": 0, "mask": rle})
            next_object += 1
        structure = field(record, "phrase_structure", dict, where, default={})
        kind = field(structure, "type", str, where, default=None)
        sentence = {"sent_id": next_phrase + number, "sent": field(record, "phrase", str, where), "source": task}
        refs.append({"ref_id": next_phrase + number, "image_id": image_id, "ann_ids": ids,
                     "sentences": [sentence | ({"kind": kind} if kind else {})]})
    return refs, objects


def convert(annotations, images, data_root, dataset="phrasecut", image_check=True):
    """Prepare PhraseCut; returns {split: counts} of the splits whose files are there, and of val_miniv.

    annotations: the folder of json files; images: a list of folders. image_check: every image must be there and have the
    size that the annotations say. Raises UserError with the file, the task and the value.
    """
    check_name(dataset, "a dataset's name", "--dataset")
    annotations, folder = Path(annotations), Path(data_root) / dataset
    for place in images if image_check else ():
        if not Path(place).is_dir():
            raise UserError(f"{place}: no such folder of images; give Visual Genome's with --images")
    sizes, size_file = load_sizes(annotations)
    files = {split: annotations / f"refer_{split}.json" for split in SPLITS}
    present = {split: path for split, path in files.items() if path.is_file()}
    if not present:
        raise UserError(f"{annotations}: has no refer_train.json, refer_val.json, refer_miniv.json or refer_test.json")
    counts, held, next_object, next_phrase = {}, {}, 1, 1
    for split, path in present.items():
        refs, objects = read_tasks(path, sizes, next_object, next_phrase)
        next_object, next_phrase = next_object + sum(map(len, objects.values())), next_phrase + len(refs)
        paths, root = find_images(objects, images)
        entries = {}
        for image_id in tqdm(sorted(objects), f"{split} images", unit="image", disable=None, delay=2):
            fault = image_error(paths[image_id], sizes[image_id]) if image_check else ""
            if fault:
                raise UserError(f"{fault}; {path} names it, and --images says where Visual Genome's folders lie")
            entries[image_id] = {"id": image_id, "file_name": Path(os.path.relpath(paths[image_id], root)).as_posix(),
                                 "width": sizes[image_id][0], "height": sizes[image_id][1]}
        meta = {"dataset": dataset, "split_by": "phrasecut", "image_root": image_root(root, folder, data_root),
                "sources": [source(size_file), source(path)]}
        counts |= _write(split, refs, entries, objects, meta, data_root)
        if split in ("val", "miniv"):
            held[split] = refs, entries, objects, meta
    if len(held) == 2:
        (refs, entries, objects, meta), (more_refs, more_entries, more_objects, more) = held["val"], held["miniv"]
        together = {image_id: objects.get(image_id, []) + more_objects.get(image_id, [])
                    for image_id in {**objects, **more_objects}}
        meta = meta | {"sources": meta["sources"] + more["sources"][1:]}
        counts |= _write("val_miniv", refs + more_refs, entries | more_entries, together, meta, data_root)
    return counts


def _write(split, refs, entries, objects, meta, data_root):
    categories = [{"id": 0, "name": "object", "supercategory": ""}]
    return write_splits([ref | {"split": split} for ref in refs], entries, objects, categories, meta, data_root)


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--annotations", required=True, help="the folder VGPhraseCut_v0 with image_data_split.json, refer_*.json")
    parser.add_argument("--images", required=True, nargs="+", help="the folder of Visual Genome's images, or both of them")
    parser.add_argument("--dataset", default="phrasecut", help="name of the prepared corpus")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.switch(None, "image-check", True, "look whether every image is there and of the right size")
    return parser


def main(argv=None):
    """Prepare PhraseCut, print its counts and where they differ from the published ones."""
    args = get_parser().parse_args(argv)
    counts = convert(args.annotations, args.images, args.data_root, args.dataset, args.image_check)
    print_counts(counts, Path(args.data_root) / args.dataset)
    for split, (images, phrases) in COUNTS.items() if args.dataset == "phrasecut" else ():
        found = counts.get(split, {"images": 0, "expressions": 0})
        if (found["images"], found["expressions"]) != (images, phrases):
            print(f"note: {split} was published with {images} images and {phrases} phrases")


if __name__ == "__main__":
    run(main)
