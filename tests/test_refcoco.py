"""REFER's layout to the prepared format: what must arrive, and what must be refused with one sentence."""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import masks
from common.config import UserError
from data_prep import refcoco

SAMPLES = Path(__file__).parents[2] / "shared" / "data"
NAME = "COCO_train2014_000000000007.jpg"


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def make_corpus(folder, edit=None, name="refs(unc).p"):
    """A corpus of two images in REFER's layout; `edit(refs, instances)` may change it. Returns convert's arguments."""
    images = folder / "train2014"
    images.mkdir(parents=True, exist_ok=True)
    for image_id in (7, 8):
        Image.new("RGB", (40, 30), (image_id, 90, 200)).save(images / NAME.replace("7.jpg", f"{image_id}.jpg"))
    instances = {
        "images": [{"id": i, "file_name": NAME.replace("7.jpg", f"{i}.jpg"), "width": 40, "height": 30}
                   for i in (7, 8)],
        "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [2, 3, 10, 10], "area": 100.0, "iscrowd": 0,
             "segmentation": [square(2, 3, 10)]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 3, 18, 10], "area": 50.0, "iscrowd": 0,
             "segmentation": [square(20, 3, 5), square(33, 8, 5)]},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1,
             "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
            {"id": 4, "image_id": 8, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0,
             "segmentation": [square(1, 1, 4)]}]}

    def ref(ref_id, ann_id, image_id, split, first, *sents):
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "split": split,
                "file_name": NAME.replace(".jpg", f"_{ann_id}.jpg"), "sent_ids": list(range(first, first + len(sents))),
                "sentences": [{"sent": s, "raw": s + ".", "tokens": s.split(), "sent_id": first + n}
                              for n, s in enumerate(sents)]}

    refs = [ref(11, 2, 7, "train", 0, "right cat", "Cat  on the right"), ref(10, 1, 7, "train", 2, "left cat"),
            ref(12, 4, 8, "val", 3, "the cat")]
    if edit:
        refs = edit(refs, instances) or refs
    data = pickle.dumps(refs, 0) if name.endswith(".p") else json.dumps(refs).encode()
    (folder / name).write_bytes(data)
    (folder / "instances.json").write_text(json.dumps(instances))
    return {"refs": folder / name, "instances": folder / "instances.json", "images": images, "dataset": "refcoco",
            "data_root": folder / "data"}


def read(args, split):
    return json.loads((args["data_root"] / args["dataset"] / f"{split}.json").read_text())


def test_everything_arrives(tmp_path):
    args = make_corpus(tmp_path)
    counts = refcoco.convert(**args)
    assert counts == {"train": {"images": 1, "objects": 3, "refs": 2, "expressions": 3},
                      "val": {"images": 1, "objects": 1, "refs": 1, "expressions": 1}}
    train = read(args, "train")
    assert train["meta"]["split_by"] == "unc" and train["meta"]["counts"] == counts["train"]
    assert [source["file"] for source in train["meta"]["sources"]] == ["refs(unc).p", "instances.json"]
    assert train["images"] == [{"id": 7, "file_name": NAME, "width": 40, "height": 30}]
    assert Path(train["meta"]["image_root"]) == args["images"].resolve()
    assert train["expressions"][1] == {"id": 1, "ref_id": 11, "image_id": 7, "object_ids": [2],
                                       "text": "Cat  on the right"}
    first, parts, crowd = train["objects"]
    assert masks.bbox(first["mask"]) == first["bbox"] == [2, 3, 10, 10] and masks.area(first["mask"]) == 100
    assert masks.area(parts["mask"]) == 50 and masks.bbox(parts["mask"]) == [20, 3, 18, 10]
    assert crowd["iscrowd"] == 1 and masks.area(crowd["mask"]) == 1200


def test_same_input_gives_the_same_bytes(tmp_path):
    args = make_corpus(tmp_path)
    refcoco.convert(**args)
    first = {path.name: path.read_bytes() for path in (tmp_path / "data" / "refcoco").iterdir()}
    refcoco.convert(**args)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "data" / "refcoco").iterdir()}
    assert set(first) == {"train.json", "val.json"}


def test_image_root_is_relative_inside_the_data_root(tmp_path):
    args = make_corpus(tmp_path)
    refcoco.convert(**{**args, "data_root": tmp_path})
    root = json.loads((tmp_path / "refcoco" / "val.json").read_text())["meta"]["image_root"]
    assert root == "../train2014"


@pytest.mark.parametrize("name", ["grefs(unc).json", "grefs(unc).p"])
def test_several_objects_or_none(tmp_path, name):
    def edit(refs, instances):
        refs[0]["ann_id"], refs[1]["ann_id"], refs[2]["ann_id"] = [2, 1, 2], [-1], None
    args = make_corpus(tmp_path, edit, name)
    refcoco.convert(**args)
    assert [e["object_ids"] for e in read(args, "train")["expressions"]] == [[2, 1], [2, 1], []]
    assert [e["object_ids"] for e in read(args, "val")["expressions"]] == [[]]


def test_sentences_without_their_own_ids_are_numbered(tmp_path):
    def edit(refs, instances):
        for sentence in refs[0]["sentences"]:
            sentence["sent_id"] = 5
    assert [s["sent_id"] for r in refcoco.load_refs(make_corpus(tmp_path, edit)["refs"]) for s in r["sentences"]] \
        == [0, 1, 2, 3]


def test_extended_sentences_stand_in_splits_of_their_own(tmp_path):
    def test_split(refs, instances):
        refs[2]["split"] = "testA"

    def more(refs, instances):
        test_split(refs, instances)
        refs[2]["sentences"] += [{"sent": "only cat", "sent_id": 0}]
    args = make_corpus(tmp_path, test_split)
    extended = make_corpus(tmp_path / "new", more)["refs"]
    refcoco.convert(**args, extended=extended)
    assert [e["text"] for e in read(args, "testA")["expressions"]] == ["the cat"]
    rows = read(args, "testA_extended")["expressions"]
    assert [(e["id"], e["text"], e.get("source")) for e in rows] == [(3, "the cat", None), (4, "only cat", "extended")]


def test_file_names_of_2014_and_2017_are_both_found(tmp_path):
    args = make_corpus(tmp_path)
    (args["images"] / NAME).rename(args["images"] / "000000000007.jpg")
    refcoco.convert(**args)
    assert read(args, "train")["images"][0]["file_name"] == "000000000007.jpg"


def test_python_2_strings(tmp_path):
    """A pickle of Python 2 holds byte strings, in UTF-8 or latin1."""
    for text, coded in (("café", "caf\\xc3\\xa9"), ("café", "caf\\xe9")):
        file = tmp_path / "refs(unc).p"
        file.write_bytes(("(lp0\n(dp1\nS'ref_id'\nI1\nsS'ann_id'\nI2\nsS'image_id'\nI3\nsS'split'\nS'train'\ns"
                          f"S'sentences'\n(lp2\n(dp3\nS'sent'\nS'{coded}'\nsS'sent_id'\nL0L\nsasa.").encode())
        assert refcoco.load_refs(file)[0]["sentences"] == [{"sent_id": 0, "sent": text}]


class Callback:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_that_call_are_refused_by_name(tmp_path, protocol):
    file = tmp_path / "refs(unc).p"
    file.write_bytes(pickle.dumps([{"ref_id": Callback()}], protocol))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: .*(builtins|__builtin__)\.exec"):
        refcoco.load_refs(file)


def test_numpy_in_a_pickle_is_refused_by_name(tmp_path):
    file = tmp_path / "refs(google).p"
    file.write_bytes(pickle.dumps([np.int64(3)]))
    with pytest.raises(UserError, match="numpy"):
        refcoco.load_refs(file)


BAD = {
    "no annotation": (lambda r, i: r[0].update(ann_id=99), r"ref 11 names annotation 99"),
    "annotation of another image": (lambda r, i: r[0].update(ann_id=4), r"ref 11 names annotation 4"),
    "no such image": (lambda r, i: r[0].update(image_id=9), r"ref 11 is about image 9"),
    "polygon outside": (lambda r, i: i["annotations"][0].update(segmentation=[square(50, 3, 10)]),
                        r"annotation 1: .*x coordinate 60 lies outside"),
    "polygon partly outside": (lambda r, i: i["annotations"][0].update(segmentation=[square(35, 3, 10)]),
                               r"annotation 1: .*outside"),
    "no polygon": (lambda r, i: i["annotations"][0].update(segmentation=[]), r"annotation 1 has no segmentation"),
    "RLE of another size": (lambda r, i: i["annotations"][2].update(segmentation={"size": [4, 4], "counts": [16]}),
                            r"annotation 3: the RLE is 4 high"),
    "image of another size": (lambda r, i: i["images"][0].update(width=41), r"40 x 30 pixels, but it should be 41"),
    "missing image": (lambda r, i: i["images"][0].update(id=6, file_name="x.jpg") or r[0].update(image_id=6)
                      or i["annotations"][1].update(image_id=6), r"x\.jpg: the image file is missing"),
    "path that leaves": (lambda r, i: i["images"][0].update(file_name="../" + NAME), r"leaves the image folder"),
    "absolute path": (lambda r, i: i["images"][0].update(file_name="/etc/passwd"), r"leaves the image folder"),
    "split that leaves": (lambda r, i: r[0].update(split="../../train"), r"cannot be a split's name"),
    "wrong type": (lambda r, i: r[0].update(image_id="7"), r"field 'image_id' should be int, but is '7'"),
    "no field": (lambda r, i: r[0].pop("sentences"), r"ref 11: has no field 'sentences'"),
    "same id": (lambda r, i: r[0].update(ref_id=10), r"same ref_id"),
    "box of three": (lambda r, i: i["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1: field 'bbox'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(tmp_path, case):
    edit, message = BAD[case]
    args = make_corpus(tmp_path, lambda refs, instances: edit(refs, instances) and None)
    with pytest.raises(UserError, match=message) as caught:
        refcoco.convert(**args)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("**/*.json"))


def test_missing_images_can_be_let_pass(tmp_path):
    args = make_corpus(tmp_path)
    (args["images"] / NAME).unlink()
    with pytest.raises(UserError, match="missing"):
        refcoco.convert(**args)
    refcoco.convert(**args, image_check=False)
    assert read(args, "train")["images"][0]["file_name"] == NAME


def test_command_line(tmp_path, capsys):
    args = make_corpus(tmp_path)
    refcoco.main([f for name, value in args.items() for f in (f"--{name.replace('_', '-')}", str(value))])
    assert "train" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        refcoco.convert(**{**args, "images": tmp_path / "elsewhere"})


def test_real_sample(tmp_path):
    folder = SAMPLES / "refcoco_sample"
    if not folder.is_dir():
        pytest.skip("the sample of RefCOCO is not on this machine")
    counts = refcoco.convert(folder / "refcoco" / "refs(unc).p", folder / "refcoco" / "instances.json",
                             folder / "images" / "train2014", "refcoco", tmp_path)
    assert {split: count["refs"] for split, count in counts.items()} == {"val": 13, "testA": 4, "testB": 8}
    objects = [o for path in (tmp_path / "refcoco").glob("*.json") for o in json.loads(path.read_text())["objects"]]
    assert len(objects) == 148 and sum(o["iscrowd"] for o in objects) == 1
    ious = [masks.iou_boxes(o["bbox"], masks.bbox(o["mask"])) for o in objects]
    assert np.median(ious) > 0.9
