"""A user's own images, masks and sentences to the prepared format."""
import json

import numpy as np
import pytest
from PIL import Image

from common import masks
from common.config import UserError
from data_prep import own

TABLE = "image,mask,sentence,split\na.png,one.png,the left one,\na.png,one.png;two.png,both,\nb.png,,nothing,val\n"


def make(folder, table=TABLE, name="table.csv"):
    (folder / "photos").mkdir()
    (folder / "masks").mkdir()
    for image in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "blue").save(folder / "photos" / image)
    left, right = np.zeros((10, 20), np.uint8), np.zeros((10, 20), np.uint8)
    left[2:6, 1:5], right[3:9, 12:19] = 255, 1
    Image.fromarray(left).save(folder / "masks" / "one.png")
    Image.fromarray(right).convert("P").save(folder / "masks" / "two.png")
    (folder / name).write_text(table, encoding="utf-8")
    return {"images": folder / "photos", "masks_from": folder / "masks", "table": folder / name, "dataset": "mine",
            "data_root": folder / "data"}


def read(args, split):
    return json.loads((args["data_root"] / "mine" / f"{split}.json").read_text())


@pytest.mark.parametrize("name, change", [("table.csv", str), ("table.csv", lambda t: "\ufeff" + t),
                                          ("table.tsv", lambda t: t.replace(",", "\t")),
                                          ("table.csv", lambda t: t.replace("\n", "\r\n"))])
def test_png_masks(tmp_path, name, change):
    args = make(tmp_path, change(TABLE), name)
    counts = own.convert(**args)
    assert counts == {"train": {"images": 1, "objects": 2, "refs": 2, "expressions": 2},
                      "val": {"images": 1, "objects": 0, "refs": 1, "expressions": 1}}
    train = read(args, "train")
    assert [e["object_ids"] for e in train["expressions"]] == [[0], [0, 1]]
    assert [o["bbox"] for o in train["objects"]] == [[1, 2, 4, 4], [12, 3, 7, 6]]
    assert masks.area(train["objects"][0]["mask"]) == 16 == train["objects"][0]["area"]
    assert read(args, "val")["expressions"][0]["object_ids"] == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_every_kind_of_png(tmp_path, mode):
    args = make(tmp_path)
    shape = np.zeros((10, 20), np.uint8)
    shape[2:6, 1:5] = 200
    if mode == "I;16":
        picture = Image.fromarray(shape.astype(np.uint16))
    elif mode in ("RGBA", "LA"):
        picture = Image.new(mode, (20, 10))
        picture.paste(Image.fromarray(shape).convert(mode), mask=Image.fromarray(shape))
    else:
        picture = Image.fromarray(shape).convert(mode)
    picture.save(tmp_path / "masks" / "one.png")
    own.convert(**args)
    assert read(args, "train")["objects"][0]["bbox"] == [1, 2, 4, 4]


def test_coco_json(tmp_path):
    args = make(tmp_path, "image\tmask\tsentence\na.png\t5\tthe left one\na.png\t5;6\tboth\n")
    box = [1, 2, 5, 2, 5, 6, 1, 6]
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": [{"id": 3, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [{"id": i, "image_id": 3, "category_id": 1, "segmentation": [box]} for i in (5, 6, 7)],
        "categories": [{"id": 1, "name": "thing"}]}))
    own.convert(**{**args, "masks_from": tmp_path / "coco.json"}, split="test")
    data = read(args, "test")
    assert [o["id"] for o in data["objects"]] == [5, 6, 7] and data["objects"][0]["bbox"] == [1, 2, 4, 4]
    assert [e["object_ids"] for e in data["expressions"]] == [[5], [5, 6]]
    args["table"].write_text("image,mask,sentence\na.png,8,x\n")
    with pytest.raises(UserError, match="no annotation '8' in the image a.png"):
        own.convert(**{**args, "masks_from": tmp_path / "coco.json"})


@pytest.mark.parametrize("table, message", [
    ("", "first line must name"), ("image,sentence\na.png,x\n", "'mask' is missing"),
    ("image,mask,sentence\n", "no row"),
    ("image,mask,sentence\na.png,one.png,a, b\n", "line 2: has another number"),
    ("image,mask,sentence\na.png,one.png\n", "line 2: has another number"),
    ("image,mask,sentence\na.png,one.png,\n", "line 2: the sentence is empty"),
    ("image,mask,sentence\nc.png,one.png,x\n", "c.png: the image file is missing; .*line 2"),
    ("image,mask,sentence\na.png,no.png,x\n", "no.png: the image file is missing"),
    ("image,mask,sentence\n../a.png,one.png,x\n", "leaves the image folder"),
    ("image,mask,sentence\na.png,../masks/one.png,x\n", "leaves the image folder"),
    ("image,mask,sentence,split\na.png,one.png,x,../y\n", "cannot be a split's name"),
    ("image,mask,sentence\na.png,black.png,x\n", "black all over"),
    ("image,mask,sentence\na.png,small.png,x\n", "4 x 4 pixels, but it should be 20 x 10"),
])
def test_bad_tables_are_named(tmp_path, table, message):
    args = make(tmp_path, table)
    Image.new("L", (20, 10)).save(tmp_path / "masks" / "black.png")
    Image.new("L", (4, 4), 1).save(tmp_path / "masks" / "small.png")
    with pytest.raises(UserError, match=message) as caught:
        own.convert(**args)
    assert str(tmp_path) in str(caught.value)


def test_command_line(tmp_path, capsys):
    args = make(tmp_path)
    own.main(["--images", str(args["images"]), "--masks", str(args["masks_from"]), "--table", str(args["table"]),
              "--dataset", "mine", "--data-root", str(args["data_root"])])
    assert "val" in capsys.readouterr().out
