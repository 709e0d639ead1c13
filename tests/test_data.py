"""Frames and their inverses, flips, padding, epochs, broken files."""
import itertools
import json
import multiprocessing
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, text
from common.config import UserError

SIZES = [(640, 480), (101, 333), (64, 64), (7, 500)]
CANVASES = [data.Canvas(64), data.Canvas(96, squash=True), data.Canvas(96, max_size=160)]


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flipped", [False, True])
def test_frame_inverse(canvas, size, flipped):
    frame = replace(canvas.frame(*size), flipped=flipped)
    assert frame.canvas_width % 32 == frame.canvas_height % 32 == 0
    rng = np.random.default_rng(0)
    points = rng.random((20, 2)) * size
    assert np.allclose(frame.points_img(frame.points_in(points)), points)
    inside = frame.points_in(torch.from_numpy(points))
    assert (inside >= 0).all() and (inside[:, 0] <= frame.in_width).all() and (inside[:, 1] <= frame.in_height).all()
    boxes = np.sort(rng.random((5, 2, 2)) * size, 1).reshape(5, 4)
    moved = frame.boxes_in(boxes)
    assert (moved[:, :2] <= moved[:, 2:]).all() and np.allclose(frame.boxes_img(moved), boxes)


@pytest.mark.parametrize("flipped", [False, True])
def test_image_mask_and_box_move_together(flipped):
    """A white rectangle in a black picture: the resized picture, the mask and the box name the same cells, and back."""
    frame = replace(data.Canvas(128).frame(400, 200), flipped=flipped)
    mask = np.zeros((1, 200, 400), bool)
    mask[0, 50:150, 40:120] = True
    image = frame.image_in(torch.from_numpy(mask.astype(np.uint8) * 255).expand(3, -1, -1), (9, 9, 9))
    covered = frame.masks_in(mask)[0]
    assert (image[0, :64].float() / 255 - covered[:64]).abs().max() < 0.3 and (image[:, 64:] == 9).all()
    x1, y1, x2, y2 = frame.boxes_in(np.array([40., 50., 120., 150.]))
    assert covered.sum().item() == pytest.approx((x2 - x1) * (y2 - y1), rel=1e-3)
    assert covered[int((y1 + y2) / 2), int((x1 + x2) / 2)] == 1
    for stride in (1, 4):
        back = frame.prob_img(frame.masks_in(mask, stride))[0].numpy() >= 0.5
        assert (back & mask[0]).sum() / (back | mask[0]).sum() > 0.9
    same = data.Canvas(128).frame(128, 128)  # no resizing: the inverse is the identity
    noise = torch.rand(2, 128, 128)
    assert torch.equal(same.prob_img(same.masks_in(noise)), noise)


def test_masks_in_is_the_mean_of_each_cell():
    """Against the loop that the definition says, on a cropped and shifted frame."""
    frame = data.Frame(width=10, height=6, in_width=20, in_height=12, canvas_width=16, canvas_height=16, left=-4, top=2)
    mask = np.random.default_rng(0).random((1, 6, 10)) < 0.5
    canvas = np.zeros((16, 16))
    for y in range(16):
        for x in range(16):
            if 0 <= y - 2 < 12 and 0 <= x + 4 < 20:
                canvas[y, x] = mask[0, (y - 2) // 2, (x + 4) // 2]
    cells = canvas.reshape(4, 4, 4, 4).mean((1, 3))
    assert np.allclose(frame.masks_in(mask, 4)[0], cells, atol=1e-6)


@pytest.mark.parametrize("sentence, mirrored", [
    ("Left guy, second from RIGHT", "Right guy, second from LEFT"),
    ("the leftmost one", "the rightmost one"), ("right-hand side", "left-hand side"),
    ("bright red copyright", "bright red copyright"), ("the one that left", "the one that right"),
])
def test_swap_left_right(sentence, mirrored):
    assert text.swap_left_right(sentence) == mirrored and text.swap_left_right(mirrored) == sentence


@pytest.mark.parametrize("sentence, expected", [
    ("The man's T-shirt/hat!", ["the", "man's", "t", "shirt", "hat"]), ("", []), ("  ?! ", []),
    ("Ünïcode ２ boys’ bag", ["ünïcode", "2", "boys", "bag"]), ("snake_case", ["snake", "case"]),
])
def test_words(sentence, expected):
    assert text.words(sentence) == expected
    vocabulary = text.Vocabulary.build(["a man's hat"], known=["shirt"])
    ids = vocabulary.encode(sentence, 3)
    assert 1 <= len(ids) <= 3 and all(0 < i < len(vocabulary) for i in ids)
    assert list(text.Vocabulary(list(vocabulary))) == list(vocabulary)


def open_train(shapes, **changes):
    vocabulary = text.Vocabulary([])
    path = data.split_path(shapes, "refshapes", "train")
    return data.RefDataset(path, lambda s: vocabulary.encode(s, 9), data.Canvas(64), **changes)


@pytest.mark.parametrize("unit, per_image", [("expression", 1), ("expression", 3), ("ref", 1), ("ref", 0), ("image", 0)])
def test_epoch_plan(shapes, unit, per_image):
    dataset = open_train(shapes)
    plan = data.plan_epoch(dataset, 3, 0, 1, per_image, unit)
    keys = [key for batch in plan for key in batch]
    drawn = np.concatenate([key[2] for key in keys])
    assert len(set(drawn.tolist())) == len(drawn)
    assert all(dataset.expression_image[e] == key[1] for key in keys for e in key[2])
    assert max(len(key[2]) for key in keys) <= (per_image or 99)
    expected = {"expression": len(dataset), "ref": len(set(dataset.ref_ids.tolist())), "image": len(dataset)}[unit]
    assert len(drawn) == expected
    same, other = (data.plan_epoch(dataset, epoch, 0, 1, per_image, unit) for epoch in (3, 4))
    flat = lambda p: [(k[1], k[2].tolist()) for b in p for k in b]  # noqa: E731
    assert flat(same) == flat(plan) != flat(other)


def test_workers_and_order_change_nothing(shapes):
    targets = lambda example: {"mask": example.frame.masks_in(example.masks, 4),  # noqa: E731
                               "noise": torch.from_numpy(example.rng.random(len(example.expressions)))}
    dataset = open_train(shapes, targets=targets, flip=0.5, seed=1)
    plan = data.plan_epoch(dataset, 0, 1, 4, 0, "image")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone, workers = (list(data.load(dataset, plan[1:], n)) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.text, b.text)
        assert all(torch.equal(a.targets[k], b.targets[k]) for k in a.targets)
    assert len({batch.targets["noise"][0].item() for batch in alone}) == len(alone)
    assert {frame.flipped for batch in alone for frame in batch.frames} == {False, True}


def test_evaluation_plan_keeps_images_whole(shapes):
    dataset = open_train(shapes)
    plan = data.plan_evaluation(dataset, 5, most_expressions=12)
    assert [e for b in plan for k in b for e in k[2]] == [e for i in dataset.with_expressions for e in dataset.of_image[i]]
    assert all(len(b) == 1 or sum(len(k[2]) for k in b) <= 12 for b in plan)


@pytest.mark.parametrize("mode, colour, seen", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77, 77, 77)), ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)), ("I;16", 65535, (255, 255, 255)), ("1", 1, (255, 255, 255)),
])
def test_picture_modes(tmp_path, mode, colour, seen):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    Image.new(mode, (5, 4), colour).save(path)
    assert data.load_image(path, 5, 4)[:, 2, 2].tolist() == list(seen)


def test_exif_rotation(tmp_path):
    """The corpus' size decides whether the stored or the shown picture was annotated."""
    picture = Image.new("RGB", (6, 4))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "x.png", exif=exif)
    assert data.load_image(tmp_path / "x.png", 6, 4)[0, 0, 0] == 255
    assert data.load_image(tmp_path / "x.png", 4, 6)[0, 0, 3] == 255
    with pytest.raises(UserError, match="corpus says 9x9"):
        data.load_image(tmp_path / "x.png", 9, 9)


def damaged(prepared, *where, value):
    for key in where[:-1]:
        prepared = prepared[key]
    prepared[where[-1]] = value


@pytest.mark.parametrize("where, value, sentence", [
    (("expressions", 0, "image_id"), 10 ** 9, "not in the prepared format"),
    (("expressions", 0, "text"), 5, "text is no string"),
    (("expressions", 0, "object_ids"), ["x"], "not in the prepared format"),
    (("images", 0, "file_name"), "../../etc/passwd", "leaves the image root"),
    (("images", 0, "width"), 10 ** 8, "impossible size"),
    (("images", 0, "height"), 1.5, "whole numbers expected"),
    (("objects", 0, "id"), "7", "not in the prepared format"),
    (("expressions",), [], "no expression"),
    (("meta",), None, "not in the prepared format"),
])
def test_damaged_corpus(shapes, tmp_path, where, value, sentence):
    prepared = json.loads(data.split_path(shapes, "refshapes", "val").read_text())
    damaged(prepared, *where, value=value)
    path = tmp_path / "val.json"
    path.write_text(json.dumps(prepared))
    with pytest.raises(UserError, match=sentence):
        data.RefDataset(path, None, None)


def test_worker_error_keeps_its_sentence(shapes, tmp_path):
    dataset = open_train(shapes)
    dataset.root = tmp_path
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^.*\.png does not exist; --images"):
            next(data.load(dataset, data.plan_evaluation(dataset, 2), workers))


def test_what_an_evaluation_cached_may_have_a_gradient_later():
    frame, prob = data.Canvas(32).frame(37, 21), torch.rand(1, 8, 8, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        frame.prob_img(prob)
    frame.prob_img(prob).sum().backward()
    assert prob.grad.any()


def test_loader_process_obeys_its_parent_alone(shapes, monkeypatch):
    """A hung one outlives the signals of others and ends with the loading."""
    dataset = open_train(shapes)
    plan = data.plan_evaluation(dataset, 2)
    first, calls = sum(len(key[2]) for key in plan[0]), itertools.count()
    dataset.encode = lambda _: [1] if next(calls) < first else time.sleep(1e6)  # hangs in the second batch
    batches = data.load(dataset, plan, 1)
    next(batches)
    worker, = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["sh", "-c", f"kill -s {name} {worker.pid}"], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that torch waits before SIGTERM
    batches.close()
    worker.join(60)
    assert not worker.is_alive()


@pytest.mark.parametrize("there, sentence", [([], "prepare mine with `python -m data_prep.refcoco"), (["val"], "or run on the embedded"),
                                             (["train", "val"], "be content with train and val by --eval-splits")])
def test_a_missing_split_is_named(tmp_path, there, sentence):
    (tmp_path / "mine").mkdir()
    for split in there:
        (tmp_path / "mine" / f"{split}.json").touch()
    with pytest.raises(UserError, match=sentence) as raised:
        data.require(tmp_path, "mine", ["train", "val", "testA"], "some.yaml")
    assert ("--eval-splits" in str(raised.value)) == (len(there) == 2) and ".json does not exist" in str(raised.value)
