"""Class maps against a painter whose answers are known: the rule of Sec. 4.6, words for classes, views, CRF, areas."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import classmaps, data, distributed, masks
from common.config import UserError
from data_prep import voc

ALONE = distributed.Ranks(0, 1, torch.device("cpu"))
COLOURS = {"red": 1, "green": 2, "blue": 3}


class Painter(torch.nn.Module):
    """Knows the three words: an expression's mask is its channel of the image, its score is given."""

    def __init__(self, scores=None):
        super().__init__()
        self.scores, self.weight = scores, torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        return images / 255

    def segment(self, features, image_of, text):
        out = {"prob": features[image_of, text[:, 0] - 1], "threshold": 0.5}
        return out if self.scores is None else out | {"score": torch.tensor([self.scores[word] for word in text[:, 0].tolist()])}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two images in VOC's layout, red on the left, green on the upper right, with undecided pixels between them."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    picture, classes = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)
    for c, where in ((1, (slice(0, 32), slice(0, 16))), (2, (slice(0, 16), slice(24, 48)))):
        picture[where] = np.eye(3, dtype=np.uint8)[c - 1] * 250
        classes[where] = c
    classes[13:19] = classes[:, 13:19] = classes[:, 21:27] = 255
    for split, name in (("train", "2007_000001"), ("val", "2007_000002")):
        Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.jpg", quality=100, subsampling=0)
        masks.save_map(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    voc.convert(root, root, dataset="colours", classes=tuple(COLOURS))
    return data.RefDataset(root / "colours" / "val.json", lambda word: [COLOURS[word]], data.Canvas(64, squash=True))


def scorer(corpus, names=None, scores=None, scales=(1,), flip=False, **how):
    names = names or [(c, word) for word, c in COLOURS.items()]
    return classmaps.ClassMaps(Painter(scores), corpus, names, classmaps.views(corpus, scales, flip), **how)


KNOWN = {1: 0.9, 2: 0.8, 3: 0.1}


@pytest.mark.parametrize("expected, how", [
    ((100, 100, 100, None), {"scores": KNOWN}),
    ((100, 100, 100, None), {"score_threshold": 0}),
    ((100, 100, 100, None), {"scores": KNOWN, "scales": (0.5, 1, 2), "flip": True}),
    ((100, 100, 100, None), {"scores": KNOWN, "crf": "krahenbuhl"}),
    (("less", 100, 0, None), {"scores": KNOWN | {2: 0.4}}),
    (("less", 0, 0, None), {"scores": dict.fromkeys(KNOWN, 0.4)}),
    (("less", 0, 0, None), {"scores": KNOWN, "threshold": 1.1}),
    (("less", 0, 100, None), {"scores": KNOWN, "names": [(1, "blue"), (2, "green")]}),
    ((100, 100, 100, None), {"scores": KNOWN, "names": [(1, "blue"), (2, "green"), (1, "red")]}),
    ((100, 0, 100, 0), {"scores": KNOWN, "names": [(3, "red"), (2, "green")]}),
], ids=["score", "no score", "views", "crf", "filtered", "none left", "threshold", "a wrong word", "two words", "another class"])
def test_rule(corpus, expected, how):
    made = scorer(corpus, **how)
    rows, seconds = made.evaluate(ALONE)
    summary = made.summarise(rows, seconds)
    found = summary["classes"].values()
    assert [("less" if iou and iou < 100 else iou) for iou in found] == list(expected)
    assert summary["mIoU"] == pytest.approx(np.mean([iou for iou in found if iou is not None]), abs=1e-4)
    assert summary["images"] == len(rows) == 1 and summary["n"] == len(made.names)
    case, = made.cases({"worst": rows})
    assert [caption.split(":")[0] for caption, _ in case["panels"]] == ["image", "truth", "prediction"]
    assert case["iou"] == pytest.approx(rows[0]["I"] / rows[0]["U"])


def test_areas_leave_undecided_pixels_out():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 4, (2, 9, 7)).astype(np.uint8)
    b[generator.random((9, 7)) < 0.3] = 255
    for c, (inter, union) in classmaps.areas(a, b, 5).items():
        assert inter == sum(x == y == c for x, y in zip(a.flat, b.flat))
        assert union == sum((x == c or y == c) and y != 255 for x, y in zip(a.flat, b.flat))
    assert classmaps.areas(np.uint8([[1, 1]]), np.uint8([[255, 255]]), 3) == {}


def test_words_for_classes(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text("person: [man, woman, man]\n")
    assert classmaps.load_names(path, ["dog", "person"]) == [(1, "dog"), (2, "man"), (2, "woman")]
    assert classmaps.load_names("", ["dog"]) == [(1, "dog")]
    assert [c for c, _ in classmaps.load_names("yaml/voc_names.yaml", voc.CLASSES)] == [*range(1, 15), *[15] * 8, *range(16, 21)]
    for text, says in (("persons: [man]", "did you mean 'person'"), ("person: man", "list of words"), ("person: [1]", "list of words")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            classmaps.load_names(path, ["person"])


def test_what_is_wrong_is_named(corpus, tmp_path):
    with pytest.raises(UserError, match="--score-threshold 0"):
        scorer(corpus).evaluate(ALONE)
    with pytest.raises(UserError, match="--scales"):
        classmaps.views(corpus, [0], False)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="from 0 to 1"):
            scorer(corpus, score_threshold=wrong)
    for name, says in (("nowhere.png", "missing"), ("small.png", "1x1 pixels")):
        masks.save_map(tmp_path / "small.png", np.uint8([[1]]))
        with pytest.raises(UserError, match=says):
            corpus.view(class_maps=[str(tmp_path / name)]).class_map(0)
