"""COCO without what RefCOCO is scored on: which images go where, and what would leak is refused."""
import json
import shutil

import pytest

from common import data
from common.config import UserError
from data_prep import coco, refcoco
from data_prep.check import read_ids
from tests.test_refcoco import make_corpus, square

# image: its split in RefCOCO, RefCOCO+, RefCOCOg-umd and in the Google partition; 9 is described by nobody, 10 has a crowd alone
SPLITS = {1: ("train",), 2: ("val",), 3: ("val", "testA"), 4: ("train", "testB"), 5: ("train", "train", "test"),
          6: (None, None, "train", "val"), 7: (None, None, None, "val"), 8: ("train", "train", "train", "train"), 9: (), 10: ()}
REFS = ("refs(unc).p", "plus/refs(unc).p", "refs(umd).p", "refs(google).p")


@pytest.fixture
def source(tmp_path):
    """Files of ten images in COCO's layout; returns convert's arguments, whose `instances` may be edited."""
    instances = {"categories": [{"id": 3, "name": "cat"}], "images": [], "annotations": []}
    for i in SPLITS:
        # one name of 2014, one of 2017: neither decides anything
        name = f"{'COCO_train2014_' if i % 2 else ''}{i:012d}.jpg"
        instances["images"].append({"id": i, "file_name": name, "width": 40, "height": 30})
        instances["annotations"].append({"id": 10 * i, "image_id": i, "category_id": 3, "bbox": [2, 3, 10, 10], "area": 100.0,
                                         "iscrowd": int(i == 10), "segmentation": [square(2, 3, 10)]})
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    for corpus, name in enumerate(REFS):
        refs = [{"ref_id": i, "ann_id": 10 * i, "image_id": i, "split": splits[corpus], "sentences": [{"sent": "a cat"}]}
                for i, splits in SPLITS.items() if splits[corpus:corpus + 1] not in ((), (None,))]
        refs.append({"ref_id": 99, "ann_id": 90, "image_id": 9, "split": "train", "sentences": []})  # a ref without a sentence
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(refs))
    return {"instances": tmp_path / "instances.json", "images": tmp_path, "refs": [tmp_path / name for name in REFS],
            "data_root": tmp_path / "data", "image_check": False}


def written(source, dataset="coco"):
    """{split: the image ids of the file}."""
    return {split: {image["id"] for image in json.loads((source["data_root"] / dataset / f"{split}.json").read_text())["images"]}
            for split in ("train", "val", "pool")}


@pytest.mark.parametrize("google, train", [(False, {1, 6, 7, 8, 9, 10}), (True, {1, 8, 9, 10})])
def test_where_images_go(source, google, train):
    counts = coco.convert(**source, exclude_google_val=google)
    assert written(source) == {"train": train, "val": {2, 6, 7} if google else {2}, "pool": {9}}
    assert counts["left out"] == len(SPLITS) - len(train)
    assert counts["train"] == {"images": len(train), "objects": len(train), "crowds": 1}
    prepared = json.loads((source["data_root"] / "coco" / "train.json").read_text())
    assert {o["image_id"] for o in prepared["objects"]} == train and prepared["expressions"] == []
    assert prepared["objects"][0]["category_id"] == 3 and prepared["objects"][0]["mask"]["size"] == [30, 40]
    assert read_ids(source["data_root"] / "coco" / "train.json") == train  # what `data_prep.check --pretrain-ids` reads
    before = (source["data_root"] / "coco" / "train.json").read_bytes()
    coco.convert(**source, exclude_google_val=google)
    assert (source["data_root"] / "coco" / "train.json").read_bytes() == before


def test_prepared_folders_serve_as_refs(tmp_path):
    args = make_corpus(tmp_path)
    refcoco.convert(**args)
    counts = coco.convert(args["instances"], args["images"], [tmp_path / "data" / "refcoco"], tmp_path / "data")
    assert written({"data_root": tmp_path / "data"}) == {"train": {7}, "val": {8}, "pool": set()}
    assert counts["train"]["crowds"] == 1


def test_cocos_own_val(source, tmp_path):
    val = {"categories": [{"id": 3, "name": "cat"}], "annotations": [],
           "images": [{"id": 500, "file_name": "000000000500.jpg", "width": 4, "height": 3}]}
    (tmp_path / "val.json").write_text(json.dumps(val))
    coco.convert(**source, val_instances=tmp_path / "val.json", val_images=tmp_path)
    assert written(source)["val"] == {500}


def edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


@pytest.mark.parametrize("change, flags, sentence", [
    (lambda s: edit(s["instances"], lambda v: v["images"][0].update(file_name="COCO_train2014_000000000003.jpg")), {},
     "is COCO's image 3, which a val or test split has"),
    (lambda s: edit(s["instances"], lambda v: v["images"][8].update(file_name="000000000001.jpg")), {},
     "is COCO's image 1, which a refs file describes"),
    (lambda s: edit(s["instances"], lambda v: [i.update(id=i["id"] + 100) for i in v["images"]] and v), {}, "has none of the 4"),
    (lambda s: edit(s["refs"][0], lambda v: [ref for ref in v if ref["split"] != "train"]), {}, "has no train split"),
    (lambda s: s.update(refs=s["refs"][3:]), {}, "no val or test split"),
    (lambda s: s.update(refs=s["refs"][:3]), {"exclude_google_val": True}, "needs the Google partition"),
    (lambda s: shutil.copy(s["instances"], s["images"] / "val.json"), {"val_instances": "val.json", "val_images": "."},
     "no held-out set"),
    (lambda s: None, {"image_check": True}, "the image file is missing"),
])
def test_refused(source, tmp_path, change, flags, sentence):
    change(source)
    flags = {name: tmp_path / value if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(UserError, match=sentence):
        coco.convert(**source | flags)
    assert not (source["data_root"] / "coco" / "pool.json").exists()


def test_a_forgotten_corpus_is_said(source, monkeypatch, capsys):
    """Of the whole of COCO another number than the published one remains."""
    monkeypatch.setattr(coco, "REMAIN", {10: 5})
    words = [f"--{name.replace('_', '-')}={source[name]}" for name in ("instances", "images", "data_root")]
    coco.main([*words, "--no-image-check", "--refs", *map(str, source["refs"])])
    assert "warning: 6 images remain and not 5" in capsys.readouterr().out
    with pytest.raises(UserError, match="--refs must be given,"):
        coco.main(words)
    with pytest.raises(UserError, match="--instances means nothing to --shapes"):
        coco.main([*words, "--shapes"])


def test_embedded(shapes):
    """RefShapes in COCO's place: the pool's scenes are there, those of val and test are not."""
    coco.shapes(shapes, jobs=1)
    splits = {split: {int(i) for i in data.RefDataset(shapes / "refshapes" / f"{split}.json", None, None).image_ids}
              for split in ("train", "val", "testA", "testB")}
    found = written({"data_root": shapes}, "cocoshapes")
    assert len(found["pool"]) == 2 and found["train"] == splits["train"] | found["pool"] and found["val"] == splits["val"]


def test_real_image_sets(samples):
    """RefCOCO's val, testA and testB as published: 1,500, 750 and 750 images, none of them twice."""
    splits = coco.images_of(samples / "annotations" / "refcoco_valtest_refs.json")
    assert {split: len(ids) for split, ids in splits.items()} == {"val": 1500, "testA": 750, "testB": 750}
    left_out, val, described = coco.sort_out({"refs(unc).p": splits})
    assert len(left_out) == len(described) == 3000 and val == splits["val"]
