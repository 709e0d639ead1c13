"""Subsets of masks: nested, seeded, of the right size, the same bytes again, and refused where they do not fit."""
import json
import shutil

import pytest

from common.config import UserError
from data_prep import subsets


def test_nested_and_sized():
    ids = range(1000, 1700)
    drawn = [set(subsets.draw(ids, ratio)) for ratio in subsets.RATIOS]
    assert [len(d) for d in drawn] == [7, 35, 70, 350, 700]
    assert all(small < large for small, large in zip(drawn, drawn[1:]))
    assert subsets.draw(ids, 1) != subsets.draw(ids, 1, seed=1) and subsets.draw([5, 3], 1) in ([3], [5])
    assert subsets.draw(range(20), 10) == [6, 14], "the order hangs on ids and seed alone, on every machine"


def test_files(shapes, tmp_path, capsys):
    (tmp_path / "refshapes").mkdir()  # the other tests' subsets stay
    shutil.copy(shapes / "refshapes" / "train.json", tmp_path / "refshapes")
    subsets.main(["--dataset", "refshapes", "--data-root", str(tmp_path)])
    paths = [subsets.subset_path(tmp_path, "refshapes", ratio) for ratio in subsets.RATIOS]
    before = [path.read_bytes() for path in paths]
    prepared = json.loads((tmp_path / "refshapes" / "train.json").read_text())
    named = {i for e in prepared["expressions"] for i in e["object_ids"]}
    assert subsets.load(tmp_path, "refshapes", 100) == named and f"{len(named)} of {len(named)} objects" in capsys.readouterr().out
    subsets.make(tmp_path, "refshapes")
    assert [path.read_bytes() for path in paths] == before
    subsets.make(tmp_path, "refshapes", seed=1)
    assert [path.read_bytes() for path in paths][:4] != before[:4]


@pytest.mark.parametrize("text, sentence", [(None, "data_prep.subsets --dataset d"), ("[1]", "record"), ('{"objects": []}', "no list"),
                                            ('{"objects": ["1"]}', "no list"), ("{", "not a whole JSON")])
def test_damaged(tmp_path, text, sentence):
    (tmp_path / "d").mkdir()
    if text:
        (tmp_path / "d" / "subset_10.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        subsets.load(tmp_path, "d", 10)


@pytest.mark.parametrize("words, sentence", [(["--dataset", "none"], "prepare none first"), (["--dataset", "d", "--ratio", "0"], "1 to 100")])
def test_bad_words(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        subsets.main([*words, "--data-root", str(tmp_path)])
