"""PhraseCut, in files laid out as its own."""
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common import data, masks
from common.config import UserError
from data_prep import phrasecut, phraseshapes, refshapes

SQUARE, ROOF, POINT = [[2.9, 3.1], [8.7, 3.0], [8.2, 9.9], [2.0, 9.0]], [[10, 2], [19.5, 2], [15, 11]], [[1, 1]]


def task(number, image_id, phrase, instances, kind="name"):
    return {"task_id": f"{image_id}__{number}", "image_id": image_id, "phrase": phrase, "Polygons": instances,
            "instance_boxes": [[0, 0, 1, 1]] * len(instances), "ann_ids": list(range(len(instances))),
            "phrase_structure": {"name": phrase.split()[-1], "attributes": [], "relation_ids": [], "type": kind}}


def make(root):
    """Two folders of images; train, val and miniv."""
    annotations, folders = root / "VGPhraseCut_v0", [root / "VG_100K", root / "VG_100K_2"]
    for folder in (annotations, *folders):
        folder.mkdir()
    for image_id, folder in ((1, folders[0]), (2, folders[1]), (3, folders[1])):
        Image.new("RGB", (20, 12), "green").save(folder / f"{image_id}.jpg")
    sizes = [{"image_id": i, "width": 20, "height": 12, "coco_id": None, "split": "train"} for i in (1, 2, 3)]
    (annotations / "image_data_split.json").write_text(json.dumps(sizes))
    tasks = {"train": [task(0, 1, "two things", [[SQUARE], [ROOF, POINT]], "verbose"), task(1, 1, "roof", [[ROOF]])],
             "val": [task(0, 2, "red box", [[SQUARE]], "attribute")], "miniv": [task(0, 3, "nothing seen", [[POINT]])]}
    for split, of in tasks.items():
        (annotations / f"refer_{split}.json").write_text(json.dumps(of))
    return annotations, folders


def drawn(*polygons):
    """A mask as PhraseCut's tools make it: a canvas for each polygon, and their union."""
    union = np.zeros((12, 20), bool)
    for polygon in polygons:
        canvas = Image.new("L", (20, 12), 0)
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
        union |= np.array(canvas) > 0
    return union


def test_convert(tmp_path):
    annotations, folders = make(tmp_path)
    counts = phrasecut.convert(annotations, folders, tmp_path / "data")
    assert {split: (count["images"], count["expressions"]) for split, count in counts.items()} == {
        "train": (1, 2), "val": (1, 1), "miniv": (1, 1), "val_miniv": (2, 2)}
    dataset = data.RefDataset(tmp_path / "data" / "phrasecut" / "train.json", None, None)
    assert (dataset.expression_mask(0) == drawn(SQUARE, ROOF)).all() and len(dataset.objects_of[0]) == 2
    assert (dataset.expression_mask(1) == drawn(ROOF)).all()
    assert dataset.kinds == ["verbose", "name"] and dataset.sources == ["1__0", "1__1"]
    both = data.RefDataset(tmp_path / "data" / "phrasecut" / "val_miniv.json", None, None)
    assert both.texts == ["red box", "nothing seen"] and both.picture(1).shape == (3, 12, 20)
    assert not both.expression_mask(1).any()


@pytest.mark.parametrize("points", [SQUARE, [[0, 0], [3, 3]], [[-5.5, -0.5], [30, 4], [4, 30]], [[0.9, 0.9]] * 3])
def test_masks_are_phrasecuts(points):
    """Vertices are cut towards zero, also negative ones; two points are a line."""
    assert (masks.decode(phrasecut.rasterise([points], 12, 20)) == drawn(points)).all()


def spoil(annotations, what):
    path = annotations / "refer_train.json"
    tasks = json.loads(path.read_text())
    if what == "point":
        tasks[1]["Polygons"] = [[[[1, 2], [1e300, 4]]]]
    elif what == "shape":
        tasks[1]["Polygons"] = [[[1, 2, 3]]]
    elif what == "image":
        tasks[1]["image_id"] = 9
    elif what == "none":
        tasks[1]["Polygons"] = []
    elif what == "phrase":
        tasks[1]["phrase"] = 7
    path.write_text(json.dumps(tasks))
    if what == "sizes":
        (annotations / "image_data_split.json").unlink()


@pytest.mark.parametrize("what, says", [("point", "far from any image"), ("shape", "two numbers"), ("image", "about image 9"),
                                        ("none", "no instance"), ("phrase", "'phrase' should be str"),
                                        ("sizes", "no image_data_split.json")])
def test_what_is_wrong_is_named(tmp_path, what, says):
    annotations, folders = make(tmp_path)
    spoil(annotations, what)
    with pytest.raises(UserError, match=says):
        phrasecut.convert(annotations, folders, tmp_path / "data")


def test_a_missing_image_is_named(tmp_path):
    annotations, folders = make(tmp_path)
    (folders[1] / "2.jpg").unlink()
    with pytest.raises(UserError, match="2.jpg"):
        phrasecut.convert(annotations, folders, tmp_path / "data")


def test_phraseshapes_means_all_that_fit(tmp_path):
    """The embedded corpus goes through PhraseCut's files: a phrase's mask is that of every object that fits it."""
    phraseshapes.SCALES["tiny"] = {"train": [("pool", 0, 3)], "val": [("val", 0, 1)]}
    phraseshapes.make(tmp_path, "tiny", jobs=1)
    dataset = data.RefDataset(tmp_path / "phraseshapes" / "train.json", None, None)
    scene = refshapes.make_scene(0, "pool", 0)
    assert len(dataset) > 20 and dataset.picture(0).shape[1:] == scene["image"].shape[:2]
    for e in dataset.of_image[0]:
        *_, noun = dataset.texts[e].split()
        seen = np.logical_or.reduce([t.visible for t in scene["things"] if noun in (t.kind, "thing") and all(
            word in (t.colour, t.texture) for word in dataset.texts[e].split()[:-1])])
        mask = dataset.expression_mask(e)
        assert (mask >= seen).all() and (noun == "ring" or noun == "thing" or mask.sum() < 1.5 * seen.sum())
    before = (tmp_path / "phraseshapes" / "train.json").stat().st_mtime_ns
    phraseshapes.make(tmp_path, "tiny", jobs=1)
    assert (tmp_path / "phraseshapes" / "train.json").stat().st_mtime_ns == before
