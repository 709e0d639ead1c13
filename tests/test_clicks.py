"""Clicks and superpixels: by hand, on a small corpus, resumed, and from hostile files."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data import RefDataset
from data_prep import clicks


def crescent():
    y, x = np.mgrid[:40, :40] + 0.5
    return ((x - 20) ** 2 + (y - 20) ** 2 < 19 ** 2) & ((x - 27) ** 2 + (y - 20) ** 2 > 19 ** 2)


def test_click_by_hand():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    assert clicks.click(mask, [3, 2, 6, 3]) == ([6.0, 3.5, 3, 2, 9, 5], True)
    assert clicks.click(None, [3, 2, 6, 4]) == ([6.0, 4.0, 3, 2, 9, 6], False)
    assert clicks.click(mask & False, [3, 2, 6, 4]) == ([6.0, 4.0, 3, 2, 9, 6], False)
    (x, y, *_), inside = clicks.click(crescent(), [0, 0, 40, 40])
    (u, v, *_), snapped = clicks.click(crescent(), [0, 0, 40, 40], snap=True)
    assert not inside and not crescent()[int(y), int(x)] and snapped and crescent()[int(v), int(u)]
    distance = np.hypot(*(np.argwhere(crescent())[:, ::-1] + 0.5 - [x, y]).T)
    assert np.hypot(u - x, v - y) == pytest.approx(distance.min(), abs=0.02)


@pytest.fixture(scope="module")
def root(shapes, tmp_path_factory):
    """The small corpus with clicks and superpixels, apart from the other tests' copy."""
    copy = tmp_path_factory.mktemp("clicks")
    shutil.copytree(shapes, copy, dirs_exist_ok=True)
    clicks.main(["--dataset", "refshapes", "--data-root", str(copy), "--jobs", "1"])
    return copy


def files(root):
    return {path.name: path.stat().st_mtime_ns for path in (root / "refshapes" / "superpixels").iterdir()}


def test_corpus(root):
    corpus = RefDataset(root / "refshapes" / "train.json", None, None)
    found = clicks.load_clicks(root / "refshapes" / "clicks.json")
    meta = json.loads((root / "refshapes" / "clicks.json").read_text())["meta"]
    assert meta["objects"] == len(found) and meta["columns"] == clicks.COLUMNS
    assert {int(corpus.object_ids[i]) for objects in corpus.objects_of for i in objects} <= set(found)
    i = corpus.objects_of[0][0]
    x, y = np.argwhere(corpus.object_mask(i))[:, ::-1].mean(0) + 0.5
    assert found[int(corpus.object_ids[i])][:2] == pytest.approx((x, y), abs=0.006)
    assert len(files(root)) == len(corpus.image_ids)
    for image_id, (width, height) in zip(corpus.image_ids, corpus.sizes.tolist()):
        segments = clicks.load_superpixels(clicks.superpixel_path(root, "refshapes", image_id), width, height)
        assert segments.shape == (height, width) and segments.min() == 1 and 50 <= segments.max() <= 150


def test_resumes(root):
    """What is whole is kept; what is missing, cut short, of another count or left by a kill is made again."""
    before = files(root)
    names = sorted(before)
    folder, whole = root / "refshapes" / "superpixels", (root / "refshapes" / "clicks.json").read_bytes()
    content = (folder / names[0]).read_bytes()
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(content[:200])
    Image.new("L", (5, 5)).save(folder / names[2])
    (folder / ".1.png.7.tmp").write_bytes(b"x")
    clicks.make(root, "refshapes", jobs=1)
    after = files(root)
    assert sorted(after) == names and [name for name in names if after[name] != before[name]] == names[:3]
    assert (folder / names[0]).read_bytes() == content and (root / "refshapes" / "clicks.json").read_bytes() == whole
    clicks.make(root, "refshapes", segments=20, jobs=2)
    assert all(stamp != after[name] for name, stamp in files(root).items())


@pytest.mark.parametrize("content", ["[]", "{", '{"clicks": {"1": [1, 2, 3]}}', '{"clicks": {"x": [1, 2, 3, 4, 5, 6]}}',
                                     '{"clicks": {"1": [1, 2, 3, 4, 5, true]}}',
                                     '{"clicks": {"1": [1, 2, 3, 4, 5, 1e99]}}', None])
def test_bad_clicks(tmp_path, content):
    if content is not None:
        (tmp_path / "clicks.json").write_text(content)
    with pytest.raises(UserError, match="clicks.json"):
        clicks.load_clicks(tmp_path / "clicks.json")


@pytest.mark.parametrize("damage", ["missing", "cut", "size", "colour"])
def test_bad_superpixels(tmp_path, damage):
    path = tmp_path / "mine" / "superpixels" / "7.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB" if damage == "colour" else "L", (4, 5) if damage == "size" else (60, 50)).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="data_prep.clicks"):
        clicks.load_superpixels(path, 60, 50)


@pytest.mark.parametrize("flags", [["--dataset", "nothing"], ["--dataset", "refshapes", "--segments", "0"],
                                   ["--dataset", "refshapes", "--splits", "nope"]])
def test_bad_calls(shapes, flags):
    with pytest.raises(UserError):
        clicks.main([*flags, "--data-root", str(shapes)])
