"""Masks against pycocotools on what it reads well, and refusal of what it does not survive."""
import time

import numpy as np
import pytest
from pycocotools import mask as coco

from common import masks

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 8), (48, 64), (640, 427)]


def random_mask(rng, shape, cells=4):
    """Blobs of a few sizes, or nothing, or everything."""
    kind = rng.integers(4)
    if kind == 0:
        return np.full(shape, bool(rng.integers(2)))
    if kind == 1:
        return rng.random(shape) < rng.random()
    coarse = rng.random((cells, cells)) < 0.5
    rows, columns = (np.arange(n) * cells // n for n in shape)
    return coarse[rows][:, columns]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_pycocotools(shape):
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = random_mask(rng, shape)
        rle = masks.encode(mask)
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        counts = [0] + runs if flat[0] else runs
        for form in (rle, {**rle, "counts": rle["counts"].encode()}, {"size": list(shape), "counts": counts}):
            assert masks.check_rle(form, *shape) == rle
            assert np.array_equal(masks.decode(form), mask)
        assert np.array_equal(coco.decode(rle).astype(bool), mask)
        assert np.array_equal(masks.decode(rle, checked=True), mask)
        assert masks.area(rle) == mask.sum()
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0, 0, 0, 0]
        assert masks.bbox(rle) == [float(v) for v in box]


def test_inner_runs_of_none_are_merged():
    rle = masks.check_rle({"size": [2, 4], "counts": [1, 2, 0, 1, 0, 0, 4]})
    assert rle == masks.check_rle({"size": [2, 4], "counts": [1, 3, 4]})


@pytest.mark.parametrize("rle, word", [
    (None, "size"), ({"size": [2, 2]}, "counts"), ({"counts": "04"}, "size"),
    ({"size": [2, 2, 1], "counts": "4"}, "size"),
    ({"size": [2, 2], "counts": ""}, "runs"), ({"size": [2, 2], "counts": []}, "runs"),
    ({"size": [2, 2], "counts": [1, 2]}, "add up"), ({"size": [2, 2], "counts": [5]}, "run"),
    ({"size": [2, 2], "counts": [-1, 5]}, "run"), ({"size": [2, 2], "counts": [True, 3]}, "run"),
    ({"size": [2, 2], "counts": [1.0, 3]}, "run"), ({"size": [2, 2], "counts": [2 ** 70]}, "run"),
    ({"size": [2, 2], "counts": "3"}, "add up"), ({"size": [2, 2], "counts": "5"}, "add up"),
    ({"size": [2, 2], "counts": "T"}, "cut short"), ({"size": [2, 2], "counts": "0\x00"}, "character"),
    ({"size": [2, 2], "counts": "é"}, "character"), ({"size": [2, 2], "counts": "p"}, "character"),
    ({"size": [2, 2], "counts": "ooooooooo0"}, "run"), ({"size": [2, 2], "counts": "0" * 99}, "runs"),
    ({"size": [2, 2], "counts": "6O"}, "negative"), ({"size": [2, 2], "counts": 4}, "string"),
    ({"size": [0, 2], "counts": "0"}, "between"), ({"size": [-2, -2], "counts": "4"}, "between"),
    ({"size": [2.0, 2], "counts": "4"}, "integers"), ({"size": [100000, 100000], "counts": "4"}, "between"),
    ({"size": [65536, 65536], "counts": "4"}, "more than"), ({"size": [True, 4], "counts": "4"}, "integers"),
])
def test_bad_rle_is_refused(rle, word):
    with pytest.raises(ValueError, match=word):
        masks.check_rle(rle)
    with pytest.raises(ValueError, match=word):
        masks.decode(rle)


def test_size_must_be_the_image_s():
    with pytest.raises(ValueError, match="its image 3"):
        masks.check_rle({"size": [2, 2], "counts": "4"}, 3, 2)


def test_polygons_unite_by_coco_s_rule():
    rng = np.random.default_rng(1)
    for _ in range(20):
        parts = [(rng.random(2 * rng.integers(3, 9)) * 60).tolist() for _ in range(rng.integers(1, 4))]
        peer = coco.merge(coco.frPyObjects(parts, 60, 60))
        assert masks.from_polygons(parts, 60, 60)["counts"] == peer["counts"].decode()
    square = [[2, 1, 6, 1, 6, 4, 2, 4]]
    assert masks.bbox(masks.from_polygons(square, 5, 8)) == [2, 1, 4, 3]
    assert masks.area(masks.from_segmentation(square + [[0, 0, 1, 0, 1, 1, 0, 1]], 5, 8)) == 13
    rle = {"size": [2, 2], "counts": [1, 3]}
    assert masks.from_segmentation(rle, 2, 2) == masks.check_rle(rle)


@pytest.mark.parametrize("polygons, word", [
    ([], "empty"), (None, "list"), ("abc", "list"), ([None], "list"), ([[]], "even"), ([[1, 2, 3, 4]], "even"),
    ([[1, 2, 3, 4, 5, 6, 7]], "even"), ([[1, 2, 3, 4, 5, float("nan")]], "NaN"),
    ([[1, 2, 3, 4, 5, float("inf")]], "infinity"), ([[1, 2, 3, 4, 5, -1e12]], "coordinate"),
    ([[1, 2, 3, 4, 5, 10 ** 400]], "infinity"), ([[1, 2, 3, 4, 5, "6"]], "str"), ([[1, 2, 3, 4, 5, True]], "bool"),
    ([[1, 2, 3, 4, 5, [6]]], "list"), ([[1, 2, 3, 4, 5, None]], "NoneType"), ([[1, 2, 25, 4, 5, 6]], "x coordinate 25"),
    ([[1, 2, 3, -11, 5, 6]], "y coordinate -11"), ([[0, 0, 9, 9] * 10 ** 6], "outline"),
])
def test_bad_polygons_are_refused(polygons, word):
    with pytest.raises(ValueError, match=word):
        masks.from_polygons(polygons, 10, 10)


def test_iou_boxes():
    a = np.array([[0, 0, 4, 4], [0, 0, 0, 0], [2, 2, 2, 2]], float)
    expected = [[1, 0, 0.25], [0, 0, 0], [0.25, 0, 1]]
    assert np.allclose(masks.iou_boxes(a[:, None], a), expected)


def test_checking_is_fast_enough_for_a_corpus():
    """120,000 masks are checked when a corpus loads: 30 microseconds each where nothing else runs."""
    rle = masks.encode(random_mask(np.random.default_rng(3), (480, 640), cells=16))
    start = time.process_time()
    for _ in range(500):
        masks.check_rle(rle, 480, 640)
    assert (time.process_time() - start) / 500 < 1e-3
