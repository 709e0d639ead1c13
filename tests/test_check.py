"""The check of prepared corpora finds what is wrong and lets pass what is right; and the words of GloVe."""
import json
import re

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from data_prep import check, clicks, glove, refcoco, subsets
from tests.test_refcoco import NAME, SAMPLES, make_corpus


def prepared(tmp_path, dataset="refcoco_tiny"):
    args = {**make_corpus(tmp_path), "dataset": dataset}
    refcoco.convert(**args)
    return args, tmp_path / "data" / dataset / "train.json"


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def faults(args, **options):
    return check.check(args["dataset"], args["data_root"], **options)[0]


def test_counts_of_refcoco_are_the_published_ones():
    file = SAMPLES / "annotations" / "refcoco_valtest_refs.json"
    if not file.is_file():
        pytest.skip("RefCOCO's val and test annotations are not on this machine")
    counts, published = check.count(refcoco.load_refs(file)), check.published("refcoco")
    assert [counts[split]["sentences"] for split in ("val", "testA", "testB")] == [10834, 5657, 5095]
    assert [counts[split]["refs"] for split in ("val", "testA", "testB")] == [3811, 1975, 1810]
    assert all(counts[split] == published[split] for split in counts)
    assert sum(row["sentences"] for row in published.values()) == 142210


def test_a_good_corpus_passes_and_is_drawn(tmp_path, capsys):
    args, path = prepared(tmp_path)
    assert check.main(["--dataset", "refcoco_tiny", "--data-root", str(args["data_root"])]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ok")
    blue = np.asarray(Image.open(path.parent / "check.png").convert("RGB"))[..., 2].astype(int)
    shares = [(np.abs(blue - level) < 9).mean() for level in (200, 70)]     # the cats, and the dimmed rest
    assert 0.015 < shares[0] < shares[1]


def test_sidecars_are_no_splits(tmp_path):
    """With clicks and subsets beside the splits a corpus is checked, and GloVe's words found, as without them."""
    args, path = prepared(tmp_path)
    before = check.load_splits(args["data_root"], "refcoco_tiny").keys()
    clicks.write_clicks(args["data_root"], "refcoco_tiny", ["train"])
    subsets.make(args["data_root"], "refcoco_tiny")
    assert len(list(path.parent.glob("*.json"))) == len(before) + 1 + len(subsets.RATIOS)
    assert check.load_splits(args["data_root"], "refcoco_tiny").keys() == before and not faults(args)
    assert glove.words_needed(args["data_root"], "refcoco_tiny")


def jpeg_cut_short(args):
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    file = args["images"] / NAME
    Image.fromarray(noise).save(file, quality=95)
    file.write_bytes(file.read_bytes()[:-900])


BAD = {
    "short RLE": (lambda d: d["objects"][0]["mask"].update(counts="3"), "object 1: .*add up"),
    "another size": (lambda d: d["objects"][0]["mask"].update(size=[40, 30]), "object 1: the RLE is 40 high"),
    "moved box": (lambda d: d["objects"][0].update(bbox=[8, 3, 10, 10]), "object 1: its box .* does not fit"),
    "xyxy box": (lambda d: d["objects"][1].update(bbox=[20, 3, 38, 13]), "object 2: its box .* does not fit"),
    "no mask": (lambda d: d["objects"][0].update(mask=None), "expression number 2: the object 1 .* has no mask"),
    "stranger": (lambda d: d["expressions"][0].update(object_ids=[4]), "expression number 0: names an object"),
    "no text": (lambda d: d["expressions"][0].update(text=" "), "expression number 0: its text is empty"),
    "no image": (lambda d: d["images"][0].update(file_name="x.jpg"), "x.jpg: the image file is missing"),
    "path": (lambda d: d["images"][0].update(file_name="../x.jpg"), "leaves the image folder"),
    "size": (lambda d: d["images"][0].update(width=39), "40 x 30 pixels, but it should be 39 x 30"),
    "type": (lambda d: d["objects"].append("x"), "object .: should be a record"),
    "leak": (lambda d: d["images"][0].update(id=8), "1 of the images of refcoco_tiny/val are in refcoco_tiny/train"),
    "cut JPEG": (jpeg_cut_short, "not an image that can be read .*truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_are_found(tmp_path, capsys, case):
    edit, message = BAD[case]
    args, path = prepared(tmp_path)
    if edit is jpeg_cut_short:
        edit(args)
    else:
        change(path, edit)
    assert check.main(["--dataset", "refcoco_tiny", "--data-root", str(args["data_root"])]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
    assert any(re.search(message, line) for line in found), found


def test_leaks_between_corpora_and_pre_training(tmp_path):
    args, _ = prepared(tmp_path)

    def swapped(refs, instances):
        for ref in refs:
            ref["split"] = "val" if ref["split"] == "train" else "train"
    other = {**make_corpus(tmp_path / "other", swapped), "dataset": "refcoco+", "data_root": args["data_root"]}
    refcoco.convert(**other)
    found = faults(args)
    assert len(found) == 2 and all("1 of the images of refcoco" in fault for fault in found)
    assert faults(args, alone=True) == []
    for content, leaked in (("7\n9\n", True), ('{"images": [{"id": 7}]}', True), (f'["{NAME}"]', True), ("[9]", False),
                            ("train2014/COCO_train2014_000000000008.jpg\n", True)):
        (tmp_path / "ids").write_text(content)
        assert any("pre-training" in fault for fault in faults(args, pretrain_ids=tmp_path / "ids")) == leaked
    (tmp_path / "ids").write_text("seven\n")
    with pytest.raises(UserError, match="neither an image id"):
        faults(args, pretrain_ids=tmp_path / "ids")


def test_published_counts_are_asked_for(tmp_path):
    args, _ = prepared(tmp_path, "refcoco")
    assert "refcoco/val.json has 1 refs, published are 3811" in faults(args)
    assert "refcoco/testA.json is missing" in faults(args)
    args, _ = prepared(tmp_path, "grefcoco")                                # released in parts; only its sum is known
    assert faults(args, alone=True) == []
    rows = {split: {"images": 1, "refs": 1, "sentences": 1} for split in ("train", "val", "testA", "testB")}
    assert check.count_faults("grefcoco", rows) == ["grefcoco has 4 sentences in all, published are 278232"]


def test_missing_corpus_and_damaged_file(tmp_path):
    with pytest.raises(UserError, match="data_prep.refcoco"):
        check.check("refcoco", tmp_path)
    args, path = prepared(tmp_path)
    path.write_text('{"meta": {}, "images": [], "objects": []}')
    with pytest.raises(UserError, match="train.json: has no field 'expressions'"):
        faults(args)


# ---- GloVe ----------------------------------------------------------------------------------------------------------

def vector(*start):
    return " ".join(map(str, (list(start) + [0.5] * 12)[:12]))


GLOVE = (f", {vector(1)}\nright {vector(2)}\ncat . cat {vector(3)}\nthe 1 2 3\non {vector('x')}\ncat {vector(4)}\n"
         f"left {vector('nan')}\ncat {vector(5)}\nRight {vector(6)}\nzebra {vector(7)}")


def test_glove_keeps_the_words_needed(tmp_path, capsys):
    args, path = prepared(tmp_path)
    (tmp_path / "glove.txt").write_text(GLOVE)
    command = ["--glove", str(tmp_path / "glove.txt"), "--dataset", args["dataset"],
               "--data-root", str(args["data_root"])]
    glove.main(command)
    out = capsys.readouterr().out
    assert "2 of 5 words" in out and "60.00 %" in out and "3 damaged lines" in out and "the, left, on" in out
    words, vectors = glove.load_words(path.parent / "words.npz")
    assert words == ["cat", "right"] and vectors[:, 0].tolist() == [4, 2] and vectors.shape == (2, 12)
    first = (path.parent / "words.npz").read_bytes()
    (tmp_path / "glove.txt").write_text(f"9 12\n{GLOVE}")                  # with word2vec's heading
    glove.main(command)
    assert (path.parent / "words.npz").read_bytes() == first


@pytest.mark.parametrize("content, message", [
    (b"", "holds no vector"), (b"PK\x03\x04", "archive"), (b"hello\n", "not GloVe"), (b"\xff" * 200000, "not GloVe"),
    (b"dog " + vector().encode(), "holds no vector")])
def test_what_is_no_glove_is_named(tmp_path, content, message):
    (tmp_path / "glove.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"glove.txt: .*{message}"):
        glove.read_glove(tmp_path / "glove.txt", ["cat"])


@pytest.mark.parametrize("arrays, message", [
    ({"words": np.array(["a"])}, "not a whole"),
    ({"words": np.array(["a"], object), "vectors": np.zeros((1, 2))}, "not a whole"),
    ({"words": np.array(["a", "b"]), "vectors": np.zeros((1, 2), np.float32)}, "do not fit"),
    ({"words": np.array(["a"]), "vectors": np.full((1, 2), np.nan, np.float32)}, "do not fit"), (None, "no such file")])
def test_damaged_words_are_named(tmp_path, arrays, message):
    if arrays:
        np.savez(tmp_path / "words.npz", **arrays)
    with pytest.raises(UserError, match=f"words.npz: .*{message}"):
        glove.load_words(tmp_path / "words.npz")
