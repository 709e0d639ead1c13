r"""REFER's files to the prepared format: RefCOCO, RefCOCO+, RefCOCOg (umd, google), gRefCOCO, and what is laid out so.

    python -m data_prep.refcoco --refs 'refs(unc).p' --instances instances.json --images train2014 \
        --dataset refcoco --data-root data

A refs file is a list of records {ref_id, ann_id, image_id, split, sentences: [{sent, sent_id, ...}], ...}: a pickle
in REFER, JSON in gRefCOCO, where ann_id is a list and [-1] means that nothing in the image is meant. instances.json
is COCO's. Pickles are read as plain data: lists, dictionaries, strings and numbers; anything that would import or
call something is refused. Every sentence is kept, with its spelling; the parts of a mask are united; polygons are
rasterised once, by COCO's own rule; an object's `parts` is the number of its polygons. One file
`data/<dataset>/<split>.json` is written per split, holding the images that have a sentence in it, all objects of those
images, and the sentences. Same input, same bytes.
"""
import hashlib
import io
import json
import os
import pickle
import re
import struct
import warnings
from collections import defaultdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common import masks
from common.config import Parser, UserError, run, write_text

MAX_BYTES = 4 * 2 ** 30
REQUIRED = object()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,63}")


# ---- plain, checked values ------------------------------------------------------------------------------------------

def show(value):
    """A short text of any value for a message; containers by type only, since a hostile one may be endless."""
    if isinstance(value, (str, bytes)):
        return repr(value if len(value) <= 60 else value[:57]) + ("" if len(value) <= 60 else "...")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2 ** 63:
        return "an integer beyond 64 bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def field(record, name, kind, where, default=REQUIRED):
    """`record[name]`, checked to be a `kind` (int, float, str, list, dict, or a tuple of them); else UserError.

    `where` opens the message: the file and the record. A bool is no int; an int passes for a float; integers stay
    within 64 bits and floats are finite. A missing or null field gives `default`, if there is one.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: should be a record with named fields, not {show(record)}")
    value = record.get(name)
    if value is None:
        if default is not REQUIRED:
            return default
        raise UserError(f"{where}: has no field '{name}'")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    right = (type(value) in kinds or (type(value) is int and float in kinds))
    if type(value) is int and right:
        right = abs(value) < 2 ** 63
    elif type(value) is float and right:
        right = abs(value) < 1e300
    if not right:
        raise UserError(f"{where}: field '{name}' should be {' or '.join(k.__name__ for k in kinds)}, "
                        f"but is {show(value)}")
    return value


def check_name(name, what, where):
    """`name` if it can name a folder or a file of the corpus; else UserError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: {show(name)} cannot be {what}; use letters, digits, '_', '+', '-' and '.'")
    return name


def check_inside(name, where):
    """`name` if it is a relative path that stays in the folder it starts from; else UserError.

    Checked as text: a link that a user laid inside the image folder is the user's own affair.
    """
    parts = re.split(r"[/\\]", name)
    if not name.isprintable() or max(len(part.encode()) for part in parts) > 255 or len(name) > 1000:
        raise UserError(f"{where}: {show(name)} cannot be a file's name")
    if parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise UserError(f"{where}: the file name {show(name)} leaves the image folder")
    return name


# ---- files ----------------------------------------------------------------------------------------------------------

def read_bytes(path):
    """A file's bytes; UserError if it cannot be read or is larger than MAX_BYTES."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 30} GiB, too large for an annotation file")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _no_constant(text):
    raise ValueError(f"{text} is no JSON number")


def parse_json(data, path):
    """The value in JSON bytes; UserError naming `path` if they are no JSON."""
    try:
        return json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be an annotation file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a whole JSON file ({str(error)[:120]})") from None


def read_json(path):
    """The value in a JSON file; UserError naming the file if it cannot be read."""
    return parse_json(read_bytes(path), path)


def write_json(path, value):
    """Write compact JSON atomically; the same value gives the same bytes. UserError if it cannot be written."""
    write_text(path, json.dumps(value, separators=(",", ":"), allow_nan=False))


def source(path):
    """{"file", "sha256"} of a source file, for the prepared file's meta."""
    return {"file": Path(path).name, "sha256": hashlib.sha256(read_bytes(path)).hexdigest()}


class _Opcodes(dict):
    """Pickle's instructions; those not listed are refused by name instead of looked up."""

    def __missing__(self, code):
        raise UserError(f"holds the instruction {bytes([code])!r}, which plain data does not need")


class _PlainData(pickle._Unpickler):
    """Unpickler for lists, dictionaries, tuples, strings and numbers only.

    Python's own C unpickler with `find_class` overridden would run no code either, but a single instruction can
    make it allocate tens of gigabytes (a place in its memo is an index); the Python one keeps a dictionary.
    """
    dispatch = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in (
        pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP,
        pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
        pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2,
        pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING,
        pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.UNICODE, pickle.BINUNICODE,
        pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.LIST, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
        pickle.DICT, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.TUPLE, pickle.EMPTY_TUPLE,
        pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST,
        pickle.PERSID, pickle.BINPERSID)})

    def find_class(self, module, name):
        raise UserError(f"asks Python to import {show(module)[1:-1]}.{show(name)[1:-1]}, which no plain data needs")

    def persistent_load(self, pid):
        raise UserError("refers to an object outside the file")

    def _decode_string(self, value):
        """Python 2's byte strings: UTF-8, or else latin1, which always decodes."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")


def parse_pickle(data, path):
    """The plain data in a pickle's bytes; UserError naming `path` and what it asks for if it is more than that."""
    try:
        return _PlainData(io.BytesIO(data)).load()
    except UserError as error:
        raise UserError(f"{path}: this pickle {error}; it is refused") from None
    except Exception as error:          # by its documentation a damaged pickle may raise any exception
        raise UserError(f"{path}: not a whole pickle ({type(error).__name__}: {str(error)[:80]})") from None


# ---- refs -----------------------------------------------------------------------------------------------------------

def load_refs(path):
    """Read a refs file (REFER pickle, or JSON; told apart by its first byte) into checked records.

    Returns a list of {"ref_id", "image_id", "ann_ids": [...], "split", "sentences": [{"sent_id", "sent", and where
    given "kind", "source"}]} in the file's order; ann_ids is empty where nothing is meant. Where sent_ids are
    missing or not unique, sentences are numbered in the file's order. Raises UserError.
    """
    data = read_bytes(path)
    parse = parse_json if data.lstrip()[:1] in (b"[", b"{") else parse_pickle
    records = parse(data, path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: should hold a list of refs, but holds {show(records) if records else 'nothing'}")
    refs = [_ref(record, f"{path}: ref number {number}", path) for number, record in enumerate(records)]
    if len({ref["ref_id"] for ref in refs}) < len(refs):
        raise UserError(f"{path}: two refs have the same ref_id")
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    ids = {sentence["sent_id"] for sentence in sentences}
    if None in ids or len(ids) < len(sentences):
        for number, sentence in enumerate(sentences):
            sentence["sent_id"] = number
    return refs


def _ref(record, where, path):
    ref_id = field(record, "ref_id", int, where)
    where = f"{path}: ref {ref_id}"
    meant = field(record, "ann_id", (int, list), where, default=[])
    meant = meant if isinstance(meant, list) else [meant]
    for ann_id in meant:
        if type(ann_id) is not int or abs(ann_id) >= 2 ** 63:
            raise UserError(f"{where}: field 'ann_id' holds {show(ann_id)} where an integer should stand")
    sentences = []
    for item in field(record, "sentences", list, where):
        sent = field(item, "sent", str, f"{where}, sentence", default=None)
        sentence = {"sent_id": field(item, "sent_id", int, f"{where}, sentence", default=None),
                    "sent": field(item, "raw", str, f"{where}, sentence") if sent is None else sent}
        for extra in ("kind", "source"):
            if item.get(extra) is not None:
                sentence[extra] = field(item, extra, str, f"{where}, sentence")
        sentences.append(sentence)
    return {"ref_id": ref_id, "image_id": field(record, "image_id", int, where),
            "ann_ids": list(dict.fromkeys(ann_id for ann_id in meant if ann_id != -1)),
            "split": check_name(field(record, "split", str, where), "a split's name", where), "sentences": sentences}


def extend(refs, extended, path):
    """Refs of the splits `<split>_extended`, from a refs file with more sentences for the same test objects (refer2).

    An object is known by its ann_id. Sentences that `refs` has too keep their ids; the others get new ones, above
    all of `refs`', and the source "extended". Only objects that `refs` has, of splits other than train and val.
    """
    own = {(ref["split"], tuple(ref["ann_ids"])): ref for ref in refs}
    free = 1 + max((sentence["sent_id"] for ref in refs for sentence in ref["sentences"]), default=-1)
    found = []
    for more in extended:
        ref = own.get((more["split"], tuple(more["ann_ids"])))
        if ref is None or more["split"] in ("train", "val"):
            continue
        known = {sentence["sent"] for sentence in ref["sentences"]}
        sentences = list(ref["sentences"])
        for sentence in more["sentences"]:
            if sentence["sent"] not in known:
                sentences.append({"sent_id": free, "sent": sentence["sent"], "source": "extended"})
                known.add(sentence["sent"])
                free += 1
        found.append({**ref, "split": f"{ref['split']}_extended", "sentences": sentences})
    if not found:
        raise UserError(f"{path}: shares no test object with the refs file, so it does not extend it")
    return found


# ---- instances and images -------------------------------------------------------------------------------------------

def load_instances(path):
    """COCO's instances file: ({image id: record}, {image id: [annotations]}, categories). UserError if damaged."""
    data = read_json(path)
    images, annotations = {}, defaultdict(list)
    for record in field(data, "images", list, path):
        image_id = field(record, "id", int, f"{path}: an image")
        if image_id in images:
            raise UserError(f"{path}: two images have the id {image_id}")
        images[image_id] = record
    seen = set()
    for record in field(data, "annotations", list, path):
        ann_id = field(record, "id", int, f"{path}: an annotation")
        if ann_id in seen:
            raise UserError(f"{path}: two annotations have the id {ann_id}")
        seen.add(ann_id)
        annotations[field(record, "image_id", int, f"{path}: annotation {ann_id}")].append(record)
    categories = []
    for record in field(data, "categories", list, path, default=[]):
        where = f"{path}: a category"
        categories.append({"id": field(record, "id", int, where), "name": field(record, "name", str, where),
                           "supercategory": field(record, "supercategory", str, where, default="")})
    return images, annotations, categories


def image_error(path, size, whole=False):
    """What is wrong with an image file that should be `size` (width, height), as a sentence; "" if nothing.

    Reads the header only, or with `whole` decodes the image to its last byte. More than PIL's limit of pixels
    against decompression bombs is wrong too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.size != tuple(size):
                    return f"{path}: {image.size[0]} x {image.size[1]} pixels, but it should be {size[0]} x {size[1]}"
                if whole:
                    image.load()
    except FileNotFoundError:
        return f"{path}: the image file is missing"
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        return f"{path}: not an image that can be read ({str(error)[:100]})"
    return ""


def image_entry(record, folder, where, check=True):
    """A prepared image from a COCO image record, its file looked up under COCO's names of 2014 and 2017.

    check: the file must be there, and of the size that the record says. Raises UserError.
    """
    image_id = field(record, "id", int, where)
    where = f"{where} {image_id}"
    name = check_inside(field(record, "file_name", str, where), where)
    width, height = field(record, "width", int, where), field(record, "height", int, where)
    try:
        masks.check_size(height, width)
    except ValueError as error:
        raise UserError(f"{where}: {error}, not {width} x {height}") from None
    names = (name, f"COCO_train2014_{image_id:012d}.jpg", f"{image_id:012d}.jpg")
    name = next((found for found in names if os.path.isfile(os.path.join(folder, found))), name)
    fault = image_error(os.path.join(folder, name), (width, height)) if check else ""
    if fault:
        raise UserError(f"{fault}; {where} names it, and --images says where it lies")
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def object_entry(record, image, where, margin):
    """A prepared object from a COCO annotation record; the mask is None where there is no segmentation."""
    ann_id = record["id"]
    where = f"{where}: annotation {ann_id}"
    segmentation = field(record, "segmentation", (list, dict), where, default=None)
    rle = None
    if segmentation:
        try:
            rle = masks.from_segmentation(segmentation, image["height"], image["width"], margin)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    box = field(record, "bbox", list, where, default=None if rle is None else masks.bbox(rle, checked=True))
    if box is None or len(box) != 4 or any(type(v) not in (int, float) or not abs(v) < 1e9 for v in box):
        raise UserError(f"{where}: field 'bbox' should be four numbers [x, y, width, height]")
    area = field(record, "area", float, where, default=None)
    if area is None:
        area = masks.area(rle, checked=True) if rle else box[2] * box[3]
    crowd = field(record, "iscrowd", int, where, default=0)
    if crowd not in (0, 1):
        raise UserError(f"{where}: field 'iscrowd' should be 0 or 1, not {show(crowd)}")
    return {"id": ann_id, "image_id": image["id"], "category_id": field(record, "category_id", int, where, default=0),
            "bbox": box, "area": area, "iscrowd": crowd, "mask": rle,
            "parts": len(segmentation) if isinstance(segmentation, list) else 1}  # polygons, for --protocol seqtr640


# ---- the corpus -----------------------------------------------------------------------------------------------------

def image_root(images, folder, data_root):
    """The image folder as the prepared file names it: relative to `folder` if it lies in data_root, else absolute."""
    images, folder, data_root = (os.path.realpath(path) for path in (images, folder, data_root))
    inside = os.path.commonpath([images, data_root]) == data_root
    return Path(os.path.relpath(images, folder)).as_posix() if inside else images


def write_splits(refs, images, objects, categories, meta, data_root):
    """Write data/<dataset>/<split>.json for each split among `refs`; returns {split: counts}.

    refs as of `load_refs`; images {id: prepared image}; objects {image id: [prepared objects]};
    meta: "dataset", "split_by", "image_root", "sources".
    """
    splits = defaultdict(list)
    for ref in refs:
        splits[ref["split"]].append(ref)
    counts = {}
    for split, members in splits.items():
        expressions = [
            {"id": sentence["sent_id"], "ref_id": ref["ref_id"], "image_id": ref["image_id"],
             "object_ids": ref["ann_ids"], "text": sentence["sent"],
             **{extra: sentence[extra] for extra in ("source", "kind") if extra in sentence}}
            for ref in members for sentence in ref["sentences"]]
        used = sorted({ref["image_id"] for ref in members if ref["sentences"]})
        kept = [entry for image_id in used for entry in sorted(objects.get(image_id, []), key=lambda o: o["id"])]
        counts[split] = {"images": len(used), "objects": len(kept), "refs": len(members),
                         "expressions": len(expressions)}
        head = {"dataset": meta["dataset"], "split": split, "split_by": meta["split_by"],
                "image_root": meta["image_root"], "categories": sorted(categories, key=lambda c: c["id"]),
                "sources": meta["sources"], "counts": counts[split]}
        write_json(Path(data_root) / meta["dataset"] / f"{split}.json",
                   {"meta": head, "images": [images[image_id] for image_id in used], "objects": kept,
                    "expressions": sorted(expressions, key=lambda e: e["id"])})
    return counts


def convert(refs, instances, images, dataset, data_root, split_by=None, image_check=True, extended=None, margin=2):
    """Prepare a corpus laid out as REFER's; returns {split: {"images", "objects", "refs", "expressions"}}.

    refs, instances: files; images: the folder of the photographs; the result is `data_root`/`dataset`/<split>.json.
    split_by: who made the splits (default: from a file name like `refs(unc).p`). image_check: every image must be
    there and have the size that instances.json says. extended: see `extend`. margin: pixels that a polygon may
    reach beyond its image. Raises UserError with the file, the record and the value.
    """
    check_name(dataset, "a dataset's name", "--dataset")
    refs_file, instances_file = Path(refs), Path(instances)
    if split_by is None:
        found = re.search(r"\(([A-Za-z0-9_]+)\)", refs_file.name)
        split_by = found[1] if found else ""
    if image_check and not os.path.isdir(images):
        raise UserError(f"{images}: no such folder of images; give it with --images")
    refs = load_refs(refs_file)
    files = [refs_file, instances_file]
    if extended is not None:
        refs += extend(refs, load_refs(extended), extended)
        files.append(Path(extended))
    image_records, annotations, categories = load_instances(instances_file)

    used = sorted({ref["image_id"] for ref in refs if ref["sentences"]})
    image_entries, objects = {}, {}
    for image_id in tqdm(used, "images and masks", unit="image", disable=None, delay=2):
        if image_id not in image_records:
            ref = next(ref for ref in refs if ref["image_id"] == image_id)
            raise UserError(f"{refs_file}: ref {ref['ref_id']} is about image {image_id}, which {instances_file} "
                            "does not have")
        entry = image_entry(image_records[image_id], images, f"{instances_file}: image", image_check)
        image_entries[image_id] = entry
        objects[image_id] = [object_entry(record, entry, str(instances_file), margin)
                             for record in annotations.get(image_id, ())]
    for ref in refs:
        known = {entry["id"]: entry for entry in objects.get(ref["image_id"], ())}
        for ann_id in ref["ann_ids"] if ref["sentences"] else ():
            if ann_id not in known:
                raise UserError(f"{refs_file}: ref {ref['ref_id']} names annotation {ann_id}, which {instances_file} "
                                f"does not have in image {ref['image_id']}")
            if known[ann_id]["mask"] is None:
                raise UserError(f"{instances_file}: annotation {ann_id} has no segmentation, "
                                f"but ref {ref['ref_id']} in {refs_file} names it")
    folder = Path(data_root) / dataset
    meta = {"dataset": dataset, "split_by": split_by, "image_root": image_root(images, folder, data_root),
            "sources": [source(path) for path in files]}
    return write_splits(refs, image_entries, objects, categories, meta, data_root)


def print_counts(counts, folder):
    """Print one line per split and where the files lie."""
    print(f"{'split':<16}{'images':>9}{'objects':>9}{'refs':>9}{'sentences':>11}")
    for split, count in counts.items():
        print(f"{split:<16}{count['images']:>9}{count['objects']:>9}{count['refs']:>9}{count['expressions']:>11}")
    print(f"written to {folder}")


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--refs", required=True, help="refs(unc).p, refs(umd).p, refs(google).p or grefs(unc).json")
    parser.add_argument("--instances", required=True, help="instances.json of the same archive, or COCO's own")
    parser.add_argument("--images", required=True, help="folder of the photographs (COCO train2014)")
    parser.add_argument("--dataset", required=True,
                        help="refcoco, refcoco+, refcocog_umd, refcocog_google, grefcoco, or a name of yours")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.add_argument("--split-by", default=None,
                        help="who made the splits; None: what stands in brackets in the refs file's name")
    parser.add_argument("--extended", default=None, metavar="REFS",
                        help="refer2's refs file with more sentences for the test objects; makes <split>_extended")
    parser.add_argument("--polygon-margin", type=float, default=2.0,
                        help="pixels that a polygon may reach beyond its image")
    parser.switch(None, "image-check", True, "look whether every image is there and of the right size")
    return parser


def main(argv=None):
    """Prepare one corpus and print its counts."""
    args = get_parser().parse_args(argv)
    counts = convert(args.refs, args.instances, args.images, args.dataset, args.data_root, args.split_by,
                     args.image_check, args.extended, args.polygon_margin)
    print_counts(counts, Path(args.data_root) / args.dataset)


if __name__ == "__main__":
    run(main)
