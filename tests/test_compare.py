"""eval.py --compare: two runs on the same sentences, their difference and their predictions side by side."""
import json

import pytest

import eval as evaluation
import train_lts
from common.config import UserError, write_text
from tests.conftest import TINY


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """Two runs of one step, with other seeds, the first scored on val already."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, splits in ((0, ["val"]), (1, [])):
        train_lts.main([*TINY, "--data-root", str(shapes), "--out", str(folder / f"s{seed}"), "--max-steps", "1",
                        "--seed", str(seed), "--threshold", "0.1", "--eval-splits", *splits])
    return folder


def test_compare(runs, capsys):
    mine, other = runs / "s0", runs / "s1"
    words = ["--run", str(mine), "--compare", str(other), "--split", "val", "--workers", "0", "--report"]
    evaluation.main(words)
    out = capsys.readouterr().out
    (written,) = (mine / "eval").glob(f"refshapes_val_against_*_{other.parent.name}_s1.json")
    found = json.loads(written.read_text())
    scores = [json.loads((run / "eval/refshapes_val.json").read_text()) for run in (mine, other)]  # the other's made here
    for key in ("mIoU", "oIoU"):
        assert found[key]["difference"] == pytest.approx(scores[0][key] - scores[1][key], abs=2e-4)
        assert f"{key} {found[key]['difference']:+.2f} (" in out
    page = (mine / "report.html").read_text()
    assert "gained most against the other run" in page.lower() and f"{other}, IoU " in page
    assert f"refshapes val against {other}: mIoU" in page
    stored = (other / "eval/refshapes_val.jsonl").stat().st_mtime_ns
    evaluation.main(words[:-1])  # the other's rows are read, and the result is the same
    assert (other / "eval/refshapes_val.jsonl").stat().st_mtime_ns == stored
    assert json.loads(written.read_text()) == found


@pytest.mark.parametrize("ending, old, new", [
    ("jsonl", '"sent_id": ', '"sent_'), ("jsonl", '"area"', '"size"'), ("json", "best.pt", "last.pt"), ("json", '"off"', '"bf16"')])
def test_stored_rows_that_are_not_the_checkpoint_s_are_made_anew(runs, capsys, ending, old, new):
    words = ["--run", str(runs / "s0"), "--compare", str(runs / "s1"), "--split", "val", "--workers", "0"]
    evaluation.main(words)
    file = runs / f"s1/eval/refshapes_val.{ending}"
    before = file.read_text()
    assert old in before
    write_text(file, before.replace(old, new))
    evaluation.main(words)
    without_time = [[line for line in text.splitlines() if '"seconds"' not in line] for text in (before, file.read_text())]
    assert without_time[0] == without_time[1]


def test_what_cannot_be_compared(runs, capsys):
    words = ["--run", str(runs / "s0"), "--split", "val", "--workers", "0", "--compare"]
    with pytest.raises(UserError, match="does not exist"):
        evaluation.main([*words, str(runs / "nowhere")])
    rows = runs / "s1" / "eval" / "refshapes_val.jsonl"
    (runs / "damaged").mkdir()
    (runs / "damaged/best.pt").write_text("no weights")
    with pytest.raises(UserError, match=f"--compare {runs}/damaged: "):
        evaluation.main([*words, str(runs / "damaged")])
    evaluation.main([*words, str(runs / "s1")])
    rows.write_text(rows.read_text().replace('"area": ', '"area": 1', 1))  # the object is another one
    with pytest.raises(UserError, match="scored on other sentences or masks of refshapes val; remove"):
        evaluation.main([*words, str(runs / "s1")])


def test_a_threshold_has_a_file_of_its_own(runs, capsys):
    before = (runs / "s0/eval/refshapes_val.json").read_text()
    for threshold in ("0.5", "0.7"):
        evaluation.main(["--run", str(runs / "s0"), "--split", "val", "--workers", "0", "--threshold", threshold])
        assert f"scores: {runs}/s0/eval/refshapes_val_threshold-{threshold}.json" in capsys.readouterr().out
    assert (runs / "s0/eval/refshapes_val.json").read_text() == before
    assert json.loads((runs / "s0/eval/refshapes_val_threshold-0.5.json").read_text())["settings"]["threshold"] == 0.5
