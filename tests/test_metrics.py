"""Scores by hand, boxes, pointing, and the area under Pr@X."""
import numpy as np
import pytest
import torch

from common import metrics
from common.data import Canvas


@pytest.mark.parametrize("rows, expected", [
    ([(0, 5, 10), (1, 0, 10), (2, 10, 10)], {"n": 3, "mIoU": 50.0, "oIoU": 50.0, "Pr@0.5": 66.6667, "Pr@0.6": 33.3333}),
    ([(0, 1, 2), (1, 30, 100)], {"n": 2, "mIoU": 40.0, "oIoU": 30.3922, "Pr@0.3": 100.0, "Pr@0.4": 50.0}),
    ([(0, 0, 0)], {"n": 1, "mIoU": 100.0, "oIoU": 100.0, "Pr@0.9": 100.0}),  # nothing asked, nothing given
    ([(0, 0, 7)], {"n": 1, "mIoU": 0.0, "oIoU": 0.0, "Pr@0.1": 0.0}),        # nothing given
    ([], {"n": 0, "mIoU": None, "oIoU": None}),
])
def test_meter(rows, expected):
    meter = metrics.SegMeter()
    for row in rows + rows[:1]:  # a sample that two ranks deliver counts once
        meter.update(*row)
    assert {key: meter.summary()[key] for key in expected} == expected


@pytest.mark.parametrize("row", [(0, 3, 2), (0, -1, 2), (0, 0.5, 2)])
def test_meter_refuses(row):
    with pytest.raises(ValueError):
        metrics.SegMeter().update(*row)


def test_conflicting_sample():
    meter = metrics.SegMeter()
    meter.update([0, 1], [1, 2], [3, 4])
    with pytest.raises(ValueError, match="scored before"):
        meter.update(1, 2, 5)


def test_miou_is_the_area_under_precision():
    rng = np.random.default_rng(0)
    U = rng.integers(1, 1000, 500)
    I = (U * rng.random(500)).astype(int)
    curve = [(metrics.iou(I, U) >= x).mean() for x in np.linspace(0, 1, 2001)]
    assert abs(100 * np.mean(curve) - metrics.scores(I, U)["mIoU"]) < 0.1


def test_boxes():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2:4, 3:8] = masks[1, 5, 8] = True
    assert metrics.boxes_of(masks).tolist() == [[3, 2, 8, 4], [8, 5, 9, 6], [0, 0, 0, 0]]
    a, b = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]]), torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]])
    assert metrics.box_iou(a, b).tolist() == pytest.approx([1 / 3, 0])


def test_pointing_ignores_padding():
    frame = Canvas(64).frame(100, 50)  # content 64x32, padding below
    heat = torch.zeros(2, 8, 8)
    heat[:, 7, 0] = 9                  # in the padding
    heat[0, 1, 6], heat[1, 3, 1] = 1, 1
    truth = torch.zeros(2, 50, 100, dtype=torch.bool)
    truth[:, 10:30, 75:] = True
    assert metrics._hits(heat, truth, frame).tolist() == [True, False]
