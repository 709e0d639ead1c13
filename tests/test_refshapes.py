"""RefShapes: the same scenes for ever, sentences that mean one object, and files that say what was drawn."""
import hashlib
import json
import re

import numpy as np
import pytest

from common.config import UserError
from common.masks import decode, from_segmentation
from data_prep import refshapes
from data_prep.refshapes import ATTRIBUTES, KINDS, NAMES, PHOTOS, SIDES, WORDS, Random, annotation, make, make_scene

SCENES = {split: [make_scene(0, split, index) for index in range(count)]
          for split, count in (("train", 40), ("val", 40), ("testA", 15), ("testB", 15), ("pool", 2))}
SPOKEN = [(split, scene, name, sentence) for split, scenes in SCENES.items() for scene in scenes
          for name, said in scene["sentences"].items() for sentence in said]
MEANS = {word: value for value, synonyms in WORDS.items() for word in synonyms}
CLEAN = set(MEANS) | {word for style in (refshapes.SHORT, refshapes.LONG) for templates in style.values()
                      for template in templates for word in template.split()} | {
    "left", "right", "top", "bottom", "second", "third"}


def test_random_numbers_are_splitmix64():
    one, two = Random(), Random()
    one.state = two.state = 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert one.raw(3).tolist() == published
    assert [two.integer(0, 2 ** 32 - 1) for _ in published] == [value >> 32 for value in published]


@pytest.mark.parametrize("split, expected", [
    ("train", "58f1ac300afb96e7"), ("val", "4a84994625aec8e6"), ("testA", "06e2e7543fc7afd6"),
    ("testB", "9a6d69e018c95be1"), ("pool", "7a2e07434567a0ad")])
def test_scenes_never_change(split, expected):
    total = hashlib.sha256()
    for scene in SCENES[split][:2]:
        total.update(scene["image"].tobytes() + json.dumps([scene["image"].shape, scene["sentences"]]).encode())
        for thing in scene["things"]:
            total.update(f"{thing.kind} {thing.colour} {thing.texture}".encode() + np.packbits(thing.visible).tobytes())
    assert total.hexdigest()[:16] == expected


# ---- an independent reader: what a sentence means, from its text and the objects' places ------------------------

RELATIONS = {r"(?:that is )?(?:to the left|on the left|left) of": lambda o, a: o.x < a.x,
             r"(?:that is )?(?:to the right|on the right|right) of": lambda o, a: o.x > a.x,
             r"above|over|that is above|higher up than": lambda o, a: o.y < a.y,
             r"below|under|that is below|lying under": lambda o, a: o.y > a.y,
             r"next to|that is next to|by|closest to|near|lying beside": None,
             r"behind|that is partly hidden behind|in front of|that lies in front of|covering part of":
                 lambda o, a: (o.whole & a.whole).any(),
             r"(?:that is )?bigger than": lambda o, a: o.r > a.r, r"(?:that is )?smaller than": lambda o, a: o.r < a.r,
             r"(?:that has the )?same color as": lambda o, a: o.colour == a.colour}
ORDER = re.compile(r"\b(second|third)\b.* from (?:the )?(left|right|top|bottom)\b|"
                   r"\b(second|third) from (?:the )?(left|right|top|bottom)\b")
NUMBER = {"left": lambda o: o.x, "right": lambda o: -o.x, "top": lambda o: o.y, "bottom": lambda o: -o.y,
          "biggest": lambda o: -o.r, "smallest": lambda o: o.r}
SAME = {"leftmost": "left", "rightmost": "right", "upper": "top", "highest": "top", "lower": "bottom",
        "lowest": "bottom", "largest": "biggest", "center": "middle"}


def matches(phrase, things):
    """Positions of the objects that the attribute words of a phrase fit."""
    values = [MEANS[word] for word in phrase.split() if MEANS.get(word)]
    return [i for i, t in enumerate(things) if all(v in (getattr(t, name) for name in ATTRIBUTES) for v in values)]


def read(text, things):
    """(positions that the head words fit, the position meant) of a sentence without typing errors."""
    text = text.replace("is above all the others", "top").replace("is below all the others", "bottom")
    text = text.replace("has one on each side of it", "middle").replace("things around it", "")
    for pattern, holds in RELATIONS.items():
        found = re.fullmatch(rf"(.*?) (?:{pattern}) (.*)", text)
        if found and "picture" not in text and any(MEANS.get(word) in KINDS for word in found[2].split()):
            head, anchor = matches(found[1], things), matches(found[2], things)
            assert len(anchor) == 1, text
            a, others = things[anchor[0]], [i for i in head if i != anchor[0]]
            if holds is None:
                return head, min(others, key=lambda i: (things[i].x - a.x) ** 2 + (things[i].y - a.y) ** 2)
            fitting = [i for i in others if holds(things[i], a)]
            assert len(fitting) == 1 and len(others) >= 2, text
            return head, fitting[0]
    head = matches(text, things)
    order = ORDER.search(text)
    if order:
        rank, side = [group for group in order.groups() if group]
        return head, sorted(head, key=lambda i: NUMBER[side](things[i]))[{"second": 1, "third": 2}[rank]]
    keys = [SAME.get(word, word) for word in text.split()]
    if "middle" in keys:
        return head, sorted(head, key=lambda i: things[i].x)[len(head) // 2]
    keys = [NUMBER[key] for key in keys if key in NUMBER]
    assert keys or len(head) == 1, text
    return head, min(head, key=lambda i: sum(key(things[i]) for key in keys))


def test_an_independent_reader_finds_the_object_that_is_meant():
    seen = set()
    for _, scene, name, sentence in SPOKEN:
        if set(sentence["text"].split()) <= CLEAN:
            head, one = read(sentence["text"], scene["things"])
            assert (head, one) == (sentence["head"], sentence["thing"]), (name, sentence)
            seen.add((name, sentence["kind"], sentence["op"]))
    assert len({op for _, _, op in seen}) >= 22 and len(seen) > 40


# ---- what the corpora promise -----------------------------------------------------------------------------------

def test_head_words_never_decide_a_place_order_or_relation():
    assert all(sentence["thing"] in sentence["head"] for *_, sentence in SPOKEN)
    hard = [len(s["head"]) for *_, s in SPOKEN if s["kind"] != "attribute"]
    assert min(hard) >= 2 and np.mean(1 / np.array(hard)) < 0.48


def test_shares_of_kinds_and_typing_errors_and_styles():
    for kind in ("place", "order", "relation"):
        assert np.mean([s["kind"] == kind for _, _, name, s in SPOKEN if name == "refshapes"]) > 0.17, kind
    wrong = [not set(s["text"].split()) <= CLEAN for *_, s in SPOKEN]
    assert 0.01 < np.mean(wrong) < 0.045
    lengths = {name: np.mean([len(s["text"].split()) for _, _, n, s in SPOKEN if n == name]) for name in NAMES}
    assert lengths["refshapes"] < 5.5 < 8 < lengths["refshapesg"]
    assert 60 <= len({word for *_, s in SPOKEN for word in s["text"].split()} & CLEAN) <= 120
    assert 6 < len([1 for _, _, n, s in SPOKEN if n == "refshapes"]) / 110 < 8


def test_refshapes_plus_has_no_places():
    banned = {*SIDES, "top", "bottom", "middle", "center", "corner", "upper", "lower", "highest", "lowest", "second",
              "third"}
    assert not [s for _, _, name, s in SPOKEN if name == "refshapes+" and banned & set(s["text"].split())]


def test_typing_errors_leave_left_and_right_alone():
    rng = Random(1)
    typed = {refshapes.mistyped(rng, "leftmost red star right") for _ in range(60)}
    assert len(typed) == 4 and all(re.fullmatch("leftmost red [star]{3,4} right", text) for text in typed)


def test_super_categories_and_photographs_of_the_splits():
    for split, only in (("testA", "round"), ("testB", "cornered")):
        kinds = {scene["things"][s["thing"]].kind for sp, scene, _, s in SPOKEN if sp == split}
        assert {KINDS[kind][0] for kind in kinds} == {only} and len(kinds) >= 3
    assert len({p for photos in PHOTOS.values() for p in photos}) == sum(map(len, PHOTOS.values()))
    for split, scenes in SCENES.items():
        assert {scene["photo"] for scene in scenes} <= set(PHOTOS["train" if split == "pool" else split])


def test_objects_can_be_seen_and_some_have_no_sentence():
    for scenes in SCENES.values():
        for scene in scenes:
            assert sum(t.visible.astype(int) for t in scene["things"]).max() == 1
            assert all(t.visible.sum() >= 60 for t in scene["things"])
    assert np.mean([len(scene["things"]) - len({s["thing"] for s in scene["sentences"]["refshapes"]})
                    for scene in SCENES["train"]]) > 1
    assert all(not scene["sentences"] for scene in SCENES["pool"])


def test_annotations_are_the_visible_pixels():
    parts, forms = [], set()
    for scene in SCENES["val"]:
        for thing in scene["things"]:
            for as_polygon in (True, False):
                made = annotation(thing.visible, as_polygon)
                mask = decode(from_segmentation(made["segmentation"], *thing.visible.shape))
                x, y, w, h = made["bbox"]
                assert (mask == thing.visible).all() and made["area"] == mask.sum() == mask[y:y + h, x:x + w].sum()
                assert mask[y:y + h, x:x + w].any(0)[[0, -1]].all() and mask[y:y + h, x:x + w].any(1)[[0, -1]].all()
                forms.add((as_polygon, type(made["segmentation"])))
                parts.append(len(made["segmentation"]) if as_polygon else 0)
    assert {(True, list), (True, dict), (False, dict)} == forms and max(parts) >= 2


@pytest.mark.parametrize("rows", [["11", "11"], ["10", "01"], ["01", "10"], ["101", "111"], ["0110", "1001", "0110"]])
def test_outlines_of_touching_parts_rasterise_exactly(rows):
    mask = np.zeros((8, 9), bool)
    mask[2:2 + len(rows), 3:3 + len(rows[0])] = np.array([[c == "1" for c in row] for row in rows])
    segmentation = annotation(mask, True)["segmentation"]
    assert (decode(from_segmentation(segmentation, 8, 9)) == mask).all()


# ---- the files --------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch):
    counts = {"train": 12, "val": 8, "testA": 2, "testB": 2, "pool": 2}
    monkeypatch.setattr(refshapes, "SCALES", {"default": counts, "large": {**counts, "train": 13}})


def test_make_walks_the_real_road_and_survives_being_killed(tmp_path, tiny):
    stale = tmp_path / "raw" / "refshapes.part1"
    stale.mkdir(parents=True)
    make(tmp_path, jobs=1)
    raw = tmp_path / "raw" / "refshapes"
    before = refshapes.digest(raw)
    assert not stale.exists() and all(refshapes.is_made(tmp_path, name) for name in NAMES)
    for name in NAMES:
        prepared = json.loads((tmp_path / name / "val.json").read_text())
        assert prepared["meta"]["counts"]["images"] == 8
        assert {e["kind"] for e in prepared["expressions"]} <= {"attribute", "place", "order", "relation"}
        vocabulary = (tmp_path / name / "vocab.txt").read_text().split("\n")
        assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert {"a", "##z", "##0"} <= set(vocabulary)
    image_ids = {image["id"] for image in json.loads((raw / "refshapes" / "instances.json").read_text())["images"]}
    assert len(image_ids - {ref["image_id"] for ref in refshapes.read_refs(raw / "refshapes" / "refs(unc).p")}) == 2

    prepared = (tmp_path / "refshapes" / "train.json").read_bytes()
    (tmp_path / "refshapes" / refshapes.MARKER).unlink()
    (tmp_path / "refshapes" / "train.json").write_text("{")
    assert not refshapes.is_made(tmp_path, "refshapes")
    make(tmp_path, jobs=1)
    assert (tmp_path / "refshapes" / "train.json").read_bytes() == prepared and refshapes.digest(raw) == before

    for scale, seed in (("large", 0), ("default", 1)):
        with pytest.raises(UserError, match="another RefShapes"):
            make(tmp_path, scale, seed, jobs=1)
    (raw / refshapes.MARKER).unlink()
    with pytest.raises(UserError, match="unfinished"):
        make(tmp_path, jobs=1)

    oracle = refshapes.blind(tmp_path, "refshapes", "train")
    assert oracle["head words"]["attribute"] > 55 and oracle["head words"]["hard"] <= 50
    assert all(oracle[answer]["all"] < 30 for answer in ("union", "random", "largest", "central"))


def test_unwritable_root_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write RefShapes"):
        make(tmp_path / "file", jobs=1)


@pytest.mark.slow
def test_the_whole_default_corpus_never_changes(tmp_path):
    make(tmp_path)
    assert refshapes.digest(tmp_path / "raw" / "refshapes") == refshapes.DIGEST
