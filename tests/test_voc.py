"""VOC and SBD, in files laid out as theirs, the published lists, and the embedded VOCShapes."""
import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common import data, masks
from common.config import UserError
from data_prep import refshapes, voc, vocshapes

A, B, C, D = "2007_000032", "2008_000008", "2009_000001", "2010_000002"  # VOC train, both train, SBD only, VOC val


def class_map(label, void=False):
    values = np.zeros((12, 16), np.uint8)
    values[2:8, 3:9] = label
    if void:
        values[2:8, 9] = 255
    return values


def make(root):
    """VOC with A, B in train and D in val; SBD with B and C, and with D, which must not be trained on."""
    devkit, sbd = root / "VOC2012", root / "dataset"
    for folder in (devkit / "JPEGImages", devkit / "SegmentationClass", devkit / "ImageSets" / "Segmentation", sbd / "cls"):
        folder.mkdir(parents=True)
    for name in (A, B, C, D):
        Image.new("RGB", (16, 12), "grey").save(devkit / "JPEGImages" / f"{name}.jpg")
    for name, label in ((A, 11), (B, 15), (D, 20)):
        picture = Image.fromarray(class_map(label, void=True), "P")
        picture.putpalette(list(range(256)) * 3)
        picture.save(devkit / "SegmentationClass" / f"{name}.png")
    for name, label in ((B, 3), (C, 7), (D, 1)):
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": class_map(label),
                                                        "CategoriesPresent": [label]}})
    (devkit / "ImageSets" / "Segmentation" / "train.txt").write_text(f"{A}\n{B}\n")
    (devkit / "ImageSets" / "Segmentation" / "val.txt").write_text(f"{D}\n")
    (sbd / "train.txt").write_text(f"{B}\n{C}\n")
    (sbd / "val.txt").write_text(f"{D}\n")
    return devkit, sbd


def test_convert(tmp_path):
    devkit, sbd = make(tmp_path)
    counts = voc.convert(devkit, tmp_path / "data", sbd)
    assert {split: count["images"] for split, count in counts.items()} == {"train": 3, "val": 1}
    train = json.loads((tmp_path / "data" / "voc" / "train.json").read_text())
    assert [e["text"] for e in train["expressions"]] == ["dining table", "person", "car"]  # B keeps VOC's label
    image = train["images"][0]
    assert image["labels"] == [11] and masks.decode(image["ignore"]).sum() == 6
    made = tmp_path / "data" / "voc" / train["images"][2]["class_map"]
    assert (masks.read_class_map(made, 20) == class_map(7)).all() and "ignore" not in train["images"][2]
    dataset = data.RefDataset(tmp_path / "data" / "voc" / "train.json", None, None)
    assert (dataset.expression_mask(0) == (class_map(11) == 11)).all() and dataset.picture(2).shape == (3, 12, 16)
    first = (tmp_path / "data" / "voc" / "train.json").read_bytes()
    voc.convert(devkit, tmp_path / "data", sbd)
    assert first == (tmp_path / "data" / "voc" / "train.json").read_bytes()


def test_without_sbd(tmp_path):
    devkit, _ = make(tmp_path)
    assert voc.convert(devkit, tmp_path / "data")["train"]["images"] == 2


def test_published_lists(samples):
    """The augmented list that other code bases ship is VOC's train and SBD without VOC's val."""
    names = {part: [line.split()[0].rsplit("/", 1)[1][:-4] for line in (samples / "voc" / f"{part}.txt").open()]
             for part in ("train_voc", "val_voc", "train_augvoc")}
    made = voc.augmented(names["train_voc"], names["val_voc"], names["train_augvoc"] + names["val_voc"][:100])
    assert len(made) == voc.PUBLISHED["train"] and made == sorted(names["train_augvoc"])
    assert len(set(names["val_voc"])) == voc.PUBLISHED["val"]


def spoil(devkit, sbd, what):
    if what == "a name":
        (sbd / "train.txt").write_text("../../etc/passwd\n")
    elif what == "no mat":
        (sbd / "cls" / f"{C}.mat").write_bytes(b"MATLAB 5.0 nonsense")
    elif what == "a class":
        savemat(sbd / "cls" / f"{C}.mat", {"GTcls": {"Segmentation": class_map(21)}})
    elif what == "colours":
        Image.new("RGB", (16, 12)).save(devkit / "SegmentationClass" / f"{A}.png")
    elif what == "size":
        Image.new("RGB", (15, 12)).save(devkit / "JPEGImages" / f"{C}.jpg")
    else:
        (devkit / "JPEGImages" / f"{D}.jpg").unlink()


@pytest.mark.parametrize("what, says", [("a name", "no VOC image name"), ("no mat", "not a .mat of SBD"), ("a class", "class 21"),
                                        ("colours", "mode RGB"), ("size", "15 x 12"), ("missing", "is missing")])
def test_what_is_wrong_is_named(tmp_path, what, says):
    devkit, sbd = make(tmp_path)
    spoil(devkit, sbd, what)
    with pytest.raises(UserError, match=says):
        voc.convert(devkit, tmp_path / "data", sbd)


def test_vocshapes_are_class_maps(tmp_path, monkeypatch):
    """The embedded corpus goes through VOC's files: each class covers its visible objects, up to the undecided edges."""
    monkeypatch.setitem(vocshapes.SCALES, "tiny", {"train": [("pool", 0, 2)], "val": [("val", 0, 1)]})
    monkeypatch.setattr(vocshapes.make, "__defaults__", ("tiny", 0, 1))
    vocshapes.make(tmp_path)
    train = data.RefDataset(tmp_path / "vocshapes" / "train.json", None, None)
    scene, classes = refshapes.make_scene(0, "pool", 0), train.class_map(0)
    assert train.class_names == list(vocshapes.CLASSES) and "donut" in train.class_names and "ring" not in train.class_names
    assert {train.texts[e] for e in train.of_image[0]} == {vocshapes.CLASSES[c - 1] for c in np.unique(classes) if 0 < c < 255}
    for c, kind in enumerate(refshapes.KIND_NAMES, start=1):
        seen = np.logical_or.reduce([t.visible for t in scene["things"] if t.kind == kind] + [classes == 999])
        assert not ((classes == c) & ~seen).any() and np.isin(classes[seen], (c, 255)).all()
    assert 0.01 < (classes == 255).mean() < 0.2
    before = (tmp_path / "vocshapes" / "train.json").stat().st_mtime_ns
    vocshapes.make(tmp_path)
    assert (tmp_path / "vocshapes" / "train.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another corpus"):
        vocshapes.make(tmp_path, "tiny", seed=1, jobs=1)
    assert data.require(tmp_path, "vocshapes", ["train", "val"], "")
    with pytest.raises(UserError, match="drawn without it"):
        data.require(tmp_path, "vocshapes", ["train", "testA"], "")
    (tmp_path / "vocshapes" / "vocshapes.json").unlink()  # as a killed process leaves it
    assert not data.require(tmp_path, "vocshapes", ["train", "val"], "")
    data.make_embedded(tmp_path, "vocshapes")
    assert data.require(tmp_path, "vocshapes", ["train", "val"], "")
