"""The scripts as their users run them: trained, evaluated, asked, copied, and given bad input."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from common import checkpoint
from common.data import Canvas
from tests.children import finish
from tests.conftest import REPOSITORY, TINY, command


@pytest.fixture(scope="module")
def trained(unbroken):
    """LTS: two epochs, eight steps."""
    return unbroken("train_lts")[0]


@pytest.fixture
def evaluate(shapes, tmp_path):
    """eval.py with the tiny corpus; returns what it printed."""
    return lambda *words, **options: finish("eval", [*words, "--data-root", shapes, "--workers", "0"], tmp_path / "log", **options)


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_run_folder(trained):
    assert {p.name for p in trained.iterdir()} >= {"config.yaml", "env.txt", "source.py", "log.jsonl", "last.pt", "prev.pt",
                                                   "best.pt", "eval", "report.html"}
    summary = json.loads((trained / "eval" / "refshapes_val.json").read_text())
    rows = [json.loads(line) for line in (trained / "eval" / "refshapes_val.jsonl").read_text().splitlines()]
    assert summary["n"] == len(rows) and {"mIoU", "oIoU", "Pr@0.1", "Pr@0.9", "REC@0.5", "pointing"} <= set(summary)
    assert summary["mIoU"] == pytest.approx(100 * sum(r["I"] / r["U"] for r in rows) / len(rows), abs=1e-3)
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    best = max((r for r in records if "val_mIoU" in r), key=lambda r: r["val_mIoU"])
    assert checkpoint.load(trained / "best.pt")["best"] == {"mIoU": best["val_mIoU"], "step": best["step"]}
    assert "(no data)" not in (trained / "report.html").read_text()  # as of a score that this method does not log


def test_batches_do_not_matter(trained, evaluate, tmp_path):
    """Whole images at once or one after the other: the same scores."""
    scores = []
    for size in ("1", "4"):
        shutil.copytree(trained, tmp_path / size)
        evaluate("--run", tmp_path / size, "--split", "testA", "--batch-size", size)
        scores.append(json.loads((tmp_path / size / "eval" / "refshapes_testA.json").read_text()))
    assert abs(scores[0]["mIoU"] - scores[1]["mIoU"]) <= 0.01


def test_newest_run_and_controls(trained, evaluate, tmp_path):
    """`python eval.py --split …` finds the newest run; the control, the protocols and the masks have files of their own."""
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "x"
    shutil.copytree(trained, run)
    for flags, name in ([], "testA"), (["--shuffle-expressions", "--report"], "testA_shuffled"), (["--protocol", "lavt480"], "testA_lavt480"), \
            (["--protocol", "seqtr640"], "testA_seqtr640"), (["--limit", "2", "--save-masks"], "testA_first2"), \
            (["--limit", "1", "--crf", "deeplab"], "testA_crf-deeplab_first1"):
        said = evaluate("--split", "testA", *flags, cwd=tmp_path)
        assert "newest run: runs/x" in said and (run / "eval" / f"refshapes_{name}.json").exists()
    reports = [(run / f"report{name}.html").read_text() for name in ("", "_shuffled")]
    assert ["Scored with: shuffle expressions True, step" in text for text in reports] == [False, True]
    assert len(list((run / "eval" / "refshapes_testA_first2_masks").glob("*.png"))) == \
        json.loads((run / "eval" / "refshapes_testA_first2.json").read_text())["n"]


def test_own_picture(trained, shapes, evaluate, tmp_path):
    picture = next((shapes / "raw" / "refshapes" / "images").glob("*.png"))
    said = evaluate("--run", trained, "--image", picture, "--text", "the zorgel on the left", "red ball", "", "--out",
                    tmp_path / "out.png")
    assert "never learnt 'zorgel'" in said and (tmp_path / "out.png").stat().st_size > 1000


def test_pictures_show_what_is_scored():
    """The mask that is drawn is refined and cut as the one that is scored."""
    frame, rng = Canvas(32).frame(48, 32), np.random.default_rng(0)
    picture = torch.zeros(3, 32, 48, dtype=torch.uint8)
    picture[:, :, :20] = 200
    output = {"prob": torch.from_numpy(rng.uniform(0.1, 0.5, (2, 8, 8))).float(), "threshold": 0.3}
    output["prob"][1, :, :3] += 0.3
    prob = frame.prob_img(output["prob"])
    for crf, threshold, expected in ((None, None, prob >= 0.3), (None, 0.6, prob >= 0.6),
                                     ("deeplab", 0.5, evaluation.refine_by_crf(picture, prob, "deeplab") >= 0.5)):
        drawn = evaluation.predicted_mask(SimpleNamespace(crf=crf, threshold=threshold), picture, frame, output, 1)
        assert (drawn == expected[1].numpy()).all() and 0 < drawn.mean() < 1


def test_copied_script(shapes, tmp_path):
    """cp train_lts.py train_mine.py, then train and evaluate with no other edit."""
    house = tmp_path / "house"
    shutil.copytree(REPOSITORY, house, ignore=shutil.ignore_patterns("data", "runs", ".git", "tests", "__pycache__"))
    shutil.copy(house / "train_lts.py", house / "train_mine.py")
    ok(command("train_mine.py", *TINY, "--data-root", shapes, "--max-steps", "1", cwd=house))
    done = ok(command("eval.py", "--split", "testA", cwd=house))
    assert "runs/train_mine/refshapes/base_s0" in done.stdout


def edit(path, change):
    prepared = json.loads(path.read_text())
    change(prepared)
    path.write_text(json.dumps(prepared))


@pytest.mark.parametrize("words, sentence", [
    (["train_lts.py", "--data-root", "{tmp}/none"], "python -m data_prep.refcoco --refs"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--lrr", "3"], "did you mean '--lr'"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--out", "{run}"], "holds a run already"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--out", "/proc/none"], "cannot write /proc/none"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--size", "60"], "not a multiple of 32"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--no-fusion", "--no-filter"], "no way into the model"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--weights", "{tmp}/none.pt", "--out", "{tmp}/a"], "none.pt does not exist"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--out", "{run}", "--resume", "--lr", "1"], "; give the same settings to --resume"),
    (["train_lts.py", *TINY, "--data-root", "{broken}", "--out", "{tmp}/b"], "cannot be read as a picture"),
    (["train_lts.py", *TINY, "--data-root", "{data}", "--lr", "1e30", "--clip", "0", "--out", "{tmp}/c"], "loss is not finite at step"),
    (["eval.py", "--run", "{tmp}"], "best.pt does not exist"),
    (["eval.py", "--run", "{run}", "--split", "nope"], "nope.json does not exist"),
    (["eval.py", "--checkpoint", "{tmp}/cut.pt"], "cannot be read as a checkpoint"),
    (["eval.py", "--checkpoint", "{tmp}/other.pt"], "does not fit this model"),
    (["eval.py", "--checkpoint", "{tmp}/script.pt"], "not beside eval.py"),
    (["eval.py", "--run", "{run}", "--image", "{tmp}/none.jpg", "--text", "x"], "none.jpg does not exist"),
    (["eval.py", "--run", "{run}", "--image", "{tmp}/cut.pt", "--text", "x"], "cannot be read as a picture"),
    (["eval.py", "--run", "{run}", "--image", "x.jpg"], "--image needs --text"),
    (["eval.py", "--run", "{run}", "--text", "x"], "--text needs --image"),
    (["eval.py", "--run", "{run}", "--image", "x.jpg", "--text", "x", "--limit", "2", "--report"], "--limit and --report mean nothing"),
])
def test_bad_input(trained, shapes, tmp_path, words, sentence):
    """One sentence, status 2, no traceback."""
    state = checkpoint.load(trained / "best.pt")
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    checkpoint.save(tmp_path / "other.pt", state | {"args": state["args"] | {"dim": 32}})
    checkpoint.save(tmp_path / "script.pt", state | {"script": "train_/../../evil"})
    broken = tmp_path / "broken"
    if "{broken}" in words:
        shutil.copytree(shapes, broken)
        for picture in (broken / "raw" / "refshapes" / "images").glob("*.png"):
            picture.write_bytes(picture.read_bytes()[:300])
    places = {"tmp": tmp_path, "data": shapes, "run": trained, "broken": broken}
    program, *argv = (word.format(**places) for word in words)
    said = finish(program.removesuffix(".py"), argv, tmp_path / "log", status=2)
    assert sentence in said and "Traceback" not in said and said.count("error: ") == 1, said


def test_real_samples(samples, evaluate, tmp_path):
    """COCO photographs with template sentences train; real RefCOCO sentences, which have no train split, are scored."""
    root = tmp_path / "data"
    templates, refcoco = samples / "coco_templates", samples / "refcoco_sample"
    for folder, refs, images, name in ((templates, templates / "refs(template).p", templates / "images", "templates"),
                                       (refcoco / "refcoco", refcoco / "refcoco" / "refs(unc).p",
                                        refcoco / "images" / "train2014", "sample")):
        finish("data_prep.refcoco", ["--refs", refs, "--instances", folder / "instances.json", "--images", images, "--dataset", name,
                                     "--data-root", root], tmp_path / "log")
    out = tmp_path / "run"
    finish("train_lts", [*TINY, "--data-root", root, "--out", out, "--dataset", "templates", "--max-steps", "2", "--eval-splits",
                         "testA"], tmp_path / "log")
    finish("eval", ["--run", out, "--dataset", "sample", "--split", "val", "testA", "testB"], tmp_path / "log")
    counts = [json.loads((out / "eval" / f"sample_{split}.json").read_text())["n"] for split in ("val", "testA", "testB")]
    refs = json.loads((root / "sample" / "val.json").read_text())["meta"]["counts"]
    assert counts[0] == refs["expressions"] and all(counts)
