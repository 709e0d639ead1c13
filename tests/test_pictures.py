"""Pictures touch only what they should, and the report shows every score and escapes every text."""
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from common import pictures

pytestmark = pytest.mark.filterwarnings("error")
PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
EVIL = "<script>alert('x')</script> & \"q\" </style> \ud800\x00" + "long " * 2000


@pytest.mark.parametrize("shape, box", [((60, 80), (10, 20, 30, 50)), ((1, 1), (0, 1, 0, 1)), ((5, 9), (0, 0, 0, 0))])
def test_overlay_changes_the_mask_and_a_ring_around_it(shape, box):
    image, mask, ring = np.full((*shape, 3), 99, np.uint8), np.zeros(shape, bool), np.zeros(shape, bool)
    mask[box[0]:box[1], box[2]:box[3]] = True
    ring[max(0, box[0] - 1):box[1] + 1, max(0, box[2] - 1):box[3] + 1] = mask.any()
    assert ((pictures.overlay(image, mask) != image).any(-1) == ring).all()


def test_heat_is_monotonic_and_safe():
    flat, cold = np.full((3, 4), 7.0), pictures.heat(PHOTO, np.full((3, 4), np.nan))
    assert (cold == pictures.heat(PHOTO, flat)).all() and (cold != pictures.heat(PHOTO, flat, (0, 7))).any()
    light = pictures.heat(np.full((4, 24, 3), 128, np.uint8), np.linspace(0, 1, 12)[None]).astype(int).sum(-1)
    assert (np.diff(light[0]) >= 0).all() and light[0, -1] > light[0, 0]
    assert pictures.heat(PHOTO[:1, :1], np.array([[np.inf]])).shape == (1, 1, 3)


def test_points_boxes_sheets_and_files(tmp_path):
    dark, points = np.full((300, 300, 3), 9, np.uint8), [[50, 50], [250, 50], [250, 250], [np.nan, 1]]
    drawn = pictures.draw_points(dark, points)
    at = [drawn[y, x].astype(int).sum() for x, y in points[:3]]
    assert at == sorted(set(at)) and tuple(drawn[250, 250]) == pictures.RAMP[-1]
    assert drawn[150, 150].max() > 9 and (pictures.draw_points(dark, points, closed=False)[150, 150] == 9).all()
    for few in ([], [[0, 0]], [[0, 0], [1e9, 4]]):
        assert pictures.draw_points(PHOTO[:1, :1], few).shape == (1, 1, 3)
    boxed = pictures.draw_boxes(dark, [[200, 100, 20, 30], [np.nan] * 4], ["a", EVIL], (1, 2, 3))
    assert tuple(boxed[100, 60]) == (1, 2, 3) and (boxed[150:] == 9).all()
    assert pictures.tile([PHOTO] * 5, [EVIL] * 5, 3).shape[0] > 120 and pictures.tile([], []).ndim == 3
    pictures.save(tmp_path / "new" / "a.png", PHOTO)
    for bad in ("a.txt", "new/a.png/b.png"):
        with pytest.raises(pictures.UserError):
            pictures.save(tmp_path / bad, PHOTO)


def test_numbered_masks():
    """Each mask has a colour and a number of its own, above what the number says; an empty mask is named below alone."""
    masks = np.zeros((3, 60, 80), bool)
    masks[0, 5:25, 5:35] = masks[1, 30:55, 40:75] = True
    blank = np.full((60, 80, 3), 200, np.uint8)
    drawn = pictures.numbered(blank, masks, ["a", EVIL, ""], side=320)
    first, second = pictures.distinct(3)[:2]
    assert len(set(pictures.distinct(100))) == 100 and drawn.shape[1] == 320 and drawn.shape[0] > 240
    assert abs(int(drawn[30, 30, 0]) - 0.6 * 200 - 0.4 * first[0]) < 2
    assert abs(int(drawn[130, 170, 0]) - 0.6 * 200 - 0.4 * second[0]) < 2 and (drawn[200, 60] == 200).all()
    assert all((drawn[240:] == colour).all(-1).any() for colour in pictures.distinct(3))
    assert pictures.numbered(blank, masks[:0], []).shape == (675, 900, 3)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("points", [[], [(1, 2)], [(1, float("nan")), (2, None)], [(0, 5), (1, 5)], [(0, -1)],
                                    [(9, 1e99)], [(i, 1e-9 * 2 ** (i % 60)) for i in range(5000)]])
def test_curves_stay_inside_the_frame(points, log_y):
    svg = pictures.curve_svg({EVIL: points}, EVIL, "x", "y", log_y)
    numbers = re.split("[ ,]", " ".join(re.findall(r'points="([^"]+)"', svg)))
    assert "<script" not in svg and len(svg) < 16000 and all(0 <= float(n or 0) <= 360 for n in numbers)


def test_a_loss_below_zero_is_drawn():
    svg = pictures.curve_svg({"loss": [(1, 2), (2, -1), (3, 0)]}, "", "", "", log_y=True)
    assert [len(points.split()) for points in re.findall(r'points="([^"]+)"', svg)] == [3]


class Page(HTMLParser):
    """Collects tags with their attributes, and text; fails on a tag closed out of turn."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.stack += [tag] * (tag not in ("meta", "img", "input"))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report(tmp_path, monkeypatch):
    summary = [{"dataset": EVIL, "split": "val", "n": 1234, "mIoU": 68.1234, "oIoU": 65.5, "REC@0.5": float("nan"),
                **{f"Pr@0.{i}": 90.5 - i for i in range(1, 10)}, "pointing": {"heat": 81.74}, "control": {"mIoU": 7.5},
                "settings": {"lr": 1}, "by_kind": {EVIL: {"n": 7, "mIoU": 61.25, "oIoU": None}}}]
    noise = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    cases = [{"group": group, "text": EVIL, "kind": '"><b>', "iou": 0.5, "words": [(EVIL, [0.25, float("nan")])],
              "facts": [EVIL], "references": [EVIL],
              "panels": [(EVIL, PHOTO), ("truth", other)]} for group in ("best", "worst") for other in noise]
    monkeypatch.setattr(pictures, "BUDGET", 150_000)
    curves = {EVIL: {"series": {EVIL: [(1, 2)]}, "x": EVIL, "y": EVIL}}
    for repeat in range(2):  # the second without anything to show
        pictures.report(tmp_path / "r.html", title=EVIL, settings={EVIL: [EVIL]}, summary=summary[repeat:],
                        curves=curves if not repeat else {}, cases=cases[repeat * 80:], notes=[EVIL], command=EVIL)
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        page = Page(text)
        assert not page.stack and [tag for tag, _ in page.tags].count("script") == 1
        assert not re.search("https?://", text) and len(list(tmp_path.iterdir())) == 1
        if not repeat:
            images = [attrs for tag, attrs in page.tags if tag == "img"]
            embedded = [attrs["src"] for attrs in images if "src" in attrs]
            assert len(images) == 160 and len(embedded) == 41 and sum(map(len, embedded)) <= 150_000
            assert all(attrs["data-kind"] == '"><b>' for tag, attrs in page.tags if tag == "article")
            assert page.text.index("Worst") < page.text.index("Best")
            for shown in ("68.12", "65.50", "1,234", "81.74", "7.50", "61.25", "89.50", "81.50", "<script>alert"):
                assert shown in page.text
