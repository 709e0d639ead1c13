"""The scripts as their users run them: trained, evaluated, copied, killed and resumed, on several ranks, with bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from common import checkpoint
from tests.conftest import REPOSITORY, TINY, command


def train(shapes, out, *flags, script="train_lts.py", **options):
    return command(script, *TINY, "--data-root", shapes, "--out", out, *flags, **options)


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """An unbroken run of two epochs, eight steps, saved after each."""
    out = tmp_path_factory.mktemp("run") / "whole"
    ok(train(shapes, out, "--epochs", "2", "--eval-every", "1", "--save-every", "1", "--log-every", "1"))
    return out


def weights(folder, name="last.pt"):
    return checkpoint.load(folder / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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


@pytest.mark.parametrize("how, after", [(signal.SIGKILL, 3), (signal.SIGKILL, 6), (signal.SIGTERM, 5)])
def test_killed_and_resumed_is_the_unbroken_run(trained, shapes, tmp_path, how, after):
    """Ended in mid-epoch by a signal, then resumed: bit for bit the weights, and the log without a gap."""
    out, flags = tmp_path / "run", ["--epochs", "2", "--eval-every", "1", "--save-every", "1", "--log-every", "1"]
    process = subprocess.Popen([sys.executable, "train_lts.py", *TINY, "--data-root", str(shapes), "--out", str(out), *flags],
                               cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # as `command` has it: sums depend on it
    log, deadline = out / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {after},' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait(60) in (-signal.SIGKILL, 143)
    assert not same(weights(out), weights(trained))
    ok(train(shapes, out, *flags, "--resume"))
    assert same(weights(out), weights(trained)) and same(weights(out, "best.pt"), weights(trained, "best.pt"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert [s for s in dict.fromkeys(steps)] == list(range(1, 9)) and len(steps) == 8 + 2


def test_ranks(trained, shapes, tmp_path):
    """Two ranks train; one, two and three ranks, other batch sizes and single sentences score alike."""
    ok(train(shapes, tmp_path / "two", "--epochs", "1", ranks=2))
    scores = {}
    for ranks in (1, 2, 3):
        run = tmp_path / f"copy{ranks}"
        shutil.copytree(trained, run)
        ok(command("eval.py", "--run", run, "--split", "testA", "--batch-size", "2", "--data-root", shapes, ranks=ranks))
        scores[ranks] = (run / "eval" / "refshapes_testA.jsonl").read_bytes()
    assert scores[1] == scores[2] == scores[3]
    ok(command("eval.py", "--run", tmp_path / "copy2", "--split", "testA", "--batch-size", "1", "--data-root", shapes))
    one, other = (json.loads((tmp_path / f"copy{n}" / "eval" / "refshapes_testA.json").read_text()) for n in (1, 2))
    assert abs(one["mIoU"] - other["mIoU"]) <= 0.01


def test_gradients_of_two_ranks(shapes, tmp_path):
    """One step on two ranks moves the weights as one step on one does."""
    runs = {}
    for ranks, accum in ((1, 1), (1, 2), (2, 1)):
        out = tmp_path / f"{ranks}{accum}"
        ok(train(shapes, out, "--max-steps", "1", "--accum", accum, ranks=ranks))
        state = checkpoint.load(out / "last.pt")["optimizer"]["state"]
        # Adam's first moment after one step is a tenth of the gradient
        runs[ranks, accum] = torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])
    for gradient in runs.values():
        assert (gradient - runs[1, 1]).norm() <= 1e-5 * runs[1, 1].norm()


def test_newest_run_and_controls(trained, shapes, tmp_path):
    """`python eval.py --split …` finds the newest run; the control, the protocols and the masks have files of their own."""
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "x"
    shutil.copytree(trained, run)
    for flags, name in ([], "testA"), (["--shuffle-expressions"], "testA_shuffled"), (["--protocol", "lavt480"], "testA_lavt480"), \
            (["--protocol", "seqtr640"], "testA_seqtr640"), (["--limit", "2", "--save-masks"], "testA_first2"), \
            (["--limit", "1", "--crf", "deeplab"], "testA_crf-deeplab_first1"):
        done = ok(command(REPOSITORY / "eval.py", "--split", "testA", "--data-root", shapes, *flags, cwd=tmp_path))
        assert "newest run: runs/x" in done.stdout and (run / "eval" / f"refshapes_{name}.json").exists()
    assert len(list((run / "eval" / "refshapes_testA_first2_masks").glob("*.png"))) == \
        json.loads((run / "eval" / "refshapes_testA_first2.json").read_text())["n"]


def test_own_picture(trained, shapes, tmp_path):
    picture = next((shapes / "raw" / "refshapes" / "images").glob("*.png"))
    done = ok(command("eval.py", "--run", trained, "--image", picture, "--text", "the zorgel on the left", "red ball", "",
                      "--out", tmp_path / "out.png"))
    assert "never learnt 'zorgel'" in done.stdout and (tmp_path / "out.png").stat().st_size > 1000


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
    (["train_lts.py", *TINY, "--data-root", "{data}", "--out", "{run}", "--resume", "--lr", "1"], "--lr 0.003; give the same"),
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
    done = command(*(word.format(**places) for word in words))
    assert done.returncode == 2 and sentence in done.stderr, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


def test_real_samples(samples, tmp_path):
    """COCO photographs with template sentences train; real RefCOCO sentences, which have no train split, are scored."""
    root = tmp_path / "data"
    templates, refcoco = samples / "coco_templates", samples / "refcoco_sample"
    for folder, refs, images, name in ((templates, templates / "refs(template).p", templates / "images", "templates"),
                                       (refcoco / "refcoco", refcoco / "refcoco" / "refs(unc).p",
                                        refcoco / "images" / "train2014", "sample")):
        ok(command("-m", "data_prep.refcoco", "--refs", refs, "--instances", folder / "instances.json", "--images", images,
                   "--dataset", name, "--data-root", root))
    out = tmp_path / "run"
    ok(train(root, out, "--dataset", "templates", "--max-steps", "2", "--eval-splits", "testA"))
    ok(command("eval.py", "--run", out, "--dataset", "sample", "--split", "val", "testA", "testB"))
    counts = [json.loads((out / "eval" / f"sample_{split}.json").read_text())["n"] for split in ("val", "testA", "testB")]
    refs = json.loads((root / "sample" / "val.json").read_text())["meta"]["counts"]
    assert counts[0] == refs["expressions"] and all(counts)
