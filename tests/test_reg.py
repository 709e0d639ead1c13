"""REG: which objects are described, what they are scored against, by whom, and what people's clicks say."""
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from common import captions, checkpoint, data, distributed, reg, study
from common.config import UserError
from tests import describer
from tests.conftest import REPOSITORY, command
from tests.test_pictures import EVIL, Page

ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


def save(path, **settings):
    """A checkpoint of the describer."""
    args = describer.get_parser().parse_args([])
    vars(args).update(settings)
    model = describer.build_model(args, None)
    checkpoint.save(path, {"version": 1, "script": "train_describer", "args": vars(args), "step": 1, "best": {}, "vocabulary":
                           describer.PIECES, "model": model.state_dict()})


@pytest.fixture
def run(shapes, tmp_path, monkeypatch):
    """A run with stages 1, 2 and rb; eval.py takes the describer for its script."""
    load = evaluation.load_script
    monkeypatch.setattr(evaluation, "load_script", lambda name: describer if name == "train_describer" else load(name))
    monkeypatch.setattr(captions, "meteor", lambda *_: 0.25)
    for stage in ("1", "2", "rb"):
        save(tmp_path / "run" / stage / "best.pt", dataset="refshapes", data_root=str(shapes))
    return tmp_path / "run"


def corpus(shapes, name="refshapes", split="testA"):
    vocabulary = describer.make_vocabulary(describer.PIECES)
    front = describer.frontend(SimpleNamespace(size=32), vocabulary)
    return data.RefDataset(data.split_path(shapes, name, split), *front), vocabulary


def described(shapes, batch_size=3, listener=None, **options):
    dataset, vocabulary = corpus(shapes)
    model = describer.Describer(SimpleNamespace(deaf=0))
    listener = listener and (listener, vocabulary)
    rows, _ = reg.evaluate(model, dataset, vocabulary.decode, ALONE, batch_size, listener=listener, **options)
    return rows, dataset


# ---- the loop and its scores --------------------------------------------------------------------------------

def test_every_ref_is_described_once(shapes):
    rows, dataset = described(shapes)
    assert [row["ref_id"] for row in rows] == list(dict.fromkeys(dataset.ref_ids.tolist()))
    by_image = {}
    for row in rows:
        mask = dataset.expression_mask(row["index"])
        assert row["object_id"] == dataset.object_ids[dataset.objects_of[row["index"]][0]] and mask.any()
        by_image.setdefault(row["image_id"], []).append(row["k"])
        assert row["sentence"] == ["top left", "top right", "bottom left", "bottom right", ""][row["k"]]
    for ks in by_image.values():  # a proposal is nobody's twice; an image of more than four objects leaves some without
        given = [k for k in ks if k >= 0]
        assert len(set(given)) == len(given)
    assert any(row["k"] < 0 for row in rows) and any(row["k"] >= 0 for row in rows)


def test_objects_are_matched_with_all_of_their_image(shapes):
    """Also those that no sentence means, but no crowd."""
    dataset, _ = corpus(shapes)
    image = int(dataset.with_expressions[0])
    own = np.flatnonzero(dataset.object_image == image)
    view = reg.one_per_ref(dataset)
    targets = view[(0, image, view.of_image[image])]["targets"]
    assert len(targets["objects"]) == len(own) and targets["count"].tolist() == [len(own)]
    named = {dataset.objects_of[e][0] for e in view.of_image[image]}
    crowd = next(i for i in own.tolist() if i not in named)
    crowds = dataset.crowds.copy()
    crowds[[crowd, min(named)]] = True
    targets = view.view(crowds=crowds)[(0, image, view.of_image[image])]["targets"]
    assert len(targets["objects"]) == len(own) - 1 and len(targets["referred"].unique()) == len(named)


def test_batches_change_nothing(shapes):
    first, _ = described(shapes)
    assert all(described(shapes, batch_size)[0] == first for batch_size in (1, 16))
    images = list(dict.fromkeys(row["image_id"] for row in first))[:2]
    assert described(shapes, limit=2)[0] == [row for row in first if row["image_id"] in images]
    assert {row["sentence"].split(" ")[-1] for row in described(shapes, max_length=2)[0]} <= {"", "top", "bottom"}


def test_ranks_share_the_work(shapes, monkeypatch):
    """Three ranks, here threads that meet at `gather`, describe each image once and all return the rows of one."""
    expected, dataset = described(shapes, batch_size=1)
    world, encoded, meeting = 3, [], threading.Barrier(3)
    shares = [None] * world

    def gather(ranks, item):
        shares[ranks.rank] = item
        meeting.wait(30)
        return list(shares)
    monkeypatch.setattr(distributed, "gather", gather)
    encode = describer.Describer.encode_image
    monkeypatch.setattr(describer.Describer, "encode_image", lambda self, images: encoded.extend(images) or encode(self, images))
    vocabulary = describer.make_vocabulary(describer.PIECES)
    model = describer.Describer(SimpleNamespace(deaf=0))
    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(reg.evaluate, model, dataset, vocabulary.decode, distributed.Ranks(rank, world, ALONE.device), 1)
                for rank in range(world)]
        assert all(run.result()[0] == expected for run in runs)
    assert len(encoded) == len(dataset.with_expressions)


@pytest.mark.parametrize("deaf", [0, 1])
def test_scores(shapes, deaf, monkeypatch):
    """CIDEr-D over the refs of the split; the listener is right for every proposal, or, deaf, for those of one quarter."""
    monkeypatch.setattr(captions, "meteor", lambda *_: 0.25)
    rows, dataset = described(shapes, listener=describer.Describer(SimpleNamespace(deaf=deaf)))
    references = reg.references(dataset)
    summary = reg.summarise(rows, dataset, references)
    expected = captions.cider_d([row["sentence"].split() for row in rows],
                                [[captions.tokenize(text) for text in references[row["ref_id"]]] for row in rows])
    assert summary["CIDEr"] == pytest.approx(expected.mean(), abs=1e-6) and summary["CIDEr"] > 0 and summary["METEOR"] == 0.25
    assert [row["CIDEr"] for row in rows] == pytest.approx(expected, abs=1e-6)
    right = [row["k"] == 0 if deaf else row["k"] >= 0 for row in rows]
    assert summary["Rb-Acc"] == pytest.approx(100 * np.mean(right), abs=1e-4) and summary["n"] == len(rows) == len(references)
    assert summary["no_proposal"] == sum(row["k"] < 0 for row in rows)
    assert summary["mean_references"] == pytest.approx(len(dataset) / len(references))
    quiet = [row | {"referred_back": None} for row in rows]
    monkeypatch.setattr(captions, "meteor", lambda *_: (_ for _ in ()).throw(UserError("no Java")))
    said = []
    assert reg.summarise(quiet, dataset, references, say=said.append)["Rb-Acc"] is None and "no Java" in said[0]
    assert reg.summarise([], dataset, references)["CIDEr"] is None


def test_merged_references(shapes):
    """RefCOCO's sentences first, then RefCOCO+'s about the same object, known by its id and not by its ref_id."""
    one, plus = (corpus(shapes, name)[0] for name in ("refshapes", "refshapes+"))
    plus = plus.view(ref_ids=plus.ref_ids + 100_000)
    found = reg.references(one, plus)
    for ref, texts in found.items():
        e = int(np.flatnonzero(one.ref_ids == ref)[0])
        i = int(one.object_ids[one.objects_of[e][0]])
        others = [text for n, text in enumerate(plus.texts) if int(plus.object_ids[plus.objects_of[n][0]]) == i]
        assert texts == [text for n, text in enumerate(one.texts) if one.ref_ids[n] == ref] + others
    assert sum(map(len, found.values())) > len(one)
    assert [reg.partner(name) for name in ("refcoco", "refcoco+", "refshapes")] == ["refcoco+", "refcoco", "refshapes+"]
    with pytest.raises(UserError, match="use --refs own"):
        reg.partner("refcocog_google")


def test_a_ref_of_several_objects_is_refused(shapes):
    dataset, _ = corpus(shapes)
    with pytest.raises(UserError, match="means 0 objects; REG describes one"):
        reg.one_per_ref(dataset.view(objects_of=[[]] + dataset.objects_of[1:]))


# ---- eval.py ------------------------------------------------------------------------------------------------

def test_eval(run, shapes, capsys):
    evaluation.main(["--run", str(run), "--split", "testA", "testB", "--task", "reg", "--refs", "merged", "--report",
                     "--workers", "0", "--human-study", "3"])
    said = capsys.readouterr().out
    assert f"stage: {run}/2" in said and "Rb-Acc" in said and "study of 3 sentences" in said
    summary = json.loads((run / "2" / "eval" / "refshapes_testA_reg_merged.json").read_text())
    assert {"CIDEr", "METEOR", "Rb-Acc", "refs", "mean_references", "n", "images", "seconds", "checkpoint"} <= set(summary)
    assert summary["settings"]["listener"] == f"{run}/rb/best.pt"
    assert summary["refs"] == "merged" and summary["mean_references"] > 2
    rows = [json.loads(line) for line in (run / "2" / "eval" / "refshapes_testA_reg_merged.jsonl").read_text().splitlines()]
    assert len(rows) == summary["n"] and rows[0]["image_id"] and rows[0]["k"] in range(-1, 4)
    page = Page((run / "2" / "report_reg.html").read_text())
    assert "CIDEr" in page.text and rows[0]["references"][0] in page.text and "found it" in page.text
    evaluation.main(["--run", str(run / "1"), "--split", "testA", "--task", "reg", "--beams", "3",
                     "--limit", "1", "--workers", "0"])
    assert (run / "1" / "eval" / "refshapes_testA_reg_beams-3_first1.json").exists()


@pytest.mark.parametrize("stages, task, found", [
    (("1", "2", "rb"), "reg", "2"), (("2", "1", "rb"), "reg", "2"), (("1", "rb"), "reg", "1"), (("rb", "1", "3"), "res", "3"),
    (("1", "2"), "rec", "1"), (("pretrain",), "reg", None)])
def test_stage_of_a_task(run, stages, task, found, monkeypatch):
    """Whichever was written last, and by --run as well as for the newest run of all."""
    shutil.copytree(run / "1", run.parent / "runs" / "x" / "kept")
    for n, stage in enumerate(stages):
        shutil.copytree(run / "1", run.parent / "runs" / "x" / stage, dirs_exist_ok=True)
        os.utime(run.parent / "runs" / "x" / stage / "best.pt", (n + 10 ** 10,) * 2)
    monkeypatch.chdir(run.parent)
    for name in ("runs/x", ""):
        args = evaluation.get_parser().parse_args(["--run", name, "--task", task])
        if found:
            assert evaluation.find_checkpoint(args, False) == Path("runs/x") / found / "best.pt"
        else:
            with pytest.raises(UserError, match="no stage 2 or 1 yet"):
                evaluation.find_checkpoint(args, False)


def test_another_listener_has_results_of_its_own(run, shapes):
    """The run's own listener, named or not, writes one file; those of two others lie beside it."""
    for place in ("others/a/rb/best.pt", "others/b/rb/best.pt"):
        save(run.parent / place, deaf=1, dataset="refshapes", data_root=str(shapes))
    flags = ["--run", str(run), "--split", "testA", "--task", "reg", "--workers", "0"]
    for listener in ([], [run / "rb" / "best.pt"], *([run.parent / "others" / of / "rb" / "best.pt"] for of in "ab")):
        evaluation.main([*flags, *(["--listener", str(listener[0])] if listener else [])])
    found = {path.name.partition("_reg")[2]: json.loads(path.read_text()) for path in (run / "2" / "eval").glob("*.json")}
    others = [f"_listener-{run.parent.name}_others_{of}_rb_best.json" for of in "ab"]
    heard = dict(zip([".json", *others], (run, run.parent / "others" / "a", run.parent / "others" / "b")))
    assert {name: summary["settings"]["listener"] for name, summary in found.items()} == {
        name: str(of / "rb" / "best.pt") for name, of in heard.items()}
    assert found[".json"]["Rb-Acc"] > found[others[0]]["Rb-Acc"] == found[others[1]]["Rb-Acc"]


def test_without_a_listener(run, capsys):
    shutil.rmtree(run / "rb")
    flags = ["--run", str(run), "--split", "testA", "--task", "reg", "--workers", "0"]
    evaluation.main(flags)
    assert "Rb-Acc is left out" in capsys.readouterr().out
    save(run.parent / "other.pt", size=64)
    with pytest.raises(UserError, match="pictures of another size"):
        evaluation.main([*flags, "--listener", str(run.parent / "other.pt")])


def test_describe(run, tmp_path, capsys):
    Image.fromarray(np.full((60, 40, 3), 128, np.uint8)).save(tmp_path / "photo.png")
    flags = ["--run", str(run), "--image", str(tmp_path / "photo.png"), "--describe", "--out", str(tmp_path / "out.png")]
    evaluation.main(flags)
    said = capsys.readouterr().out
    assert "1  top left  (score 0.90" in said and "2  top right  (score 0.60" in said and " 3  " not in said
    evaluation.main([*flags, "--min-score", "0.95"])
    assert "nothing found with a score of 0.95" in capsys.readouterr().out and Image.open(tmp_path / "out.png").size == (600, 900)


@pytest.mark.parametrize("flags, sentence", [
    (["--task", "reg", "--crf", "deeplab", "--save-masks"], "--crf and --save-masks mean nothing to --task reg"),
    (["--beams", "2", "--min-score", "0.1"], "--beams and --min-score mean nothing to --task res"),
    (["--task", "reg", "--image", "x.png"], "--image means nothing to --task reg"),
    (["--describe"], "--describe needs --image"),
    (["--score-study", "a.json", "b.json"], "--run means nothing to --score-study"),
    (["--describe", "--image", "x.png", "--text", "a"], "--text means nothing to --describe"),
    (["--task", "reg", "--beams", "-1"], "numbers from 0 on"),
    (["--task", "reg", "--dataset", "refshapesg", "--refs", "merged"], "use --refs own"),
    (["--task", "reg"], "does not describe objects (its model has no locate)"),
    (["--describe", "--image", "x.png"], "does not describe objects (its model has no propose, describe)"),
])
def test_refused(run, monkeypatch, flags, sentence):
    if "no locate" in sentence:
        monkeypatch.delattr(describer.Describer, "locate")
    if "no propose" in sentence:
        monkeypatch.delattr(describer.Describer, "propose")
        monkeypatch.delattr(describer.Describer, "describe")
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluation.main(["--run", str(run), "--workers", "0", *flags])


@pytest.mark.slow
def test_processes(shapes, tmp_path):
    """Two ranks, dealt three batches, write the lines of one; one of them says that METEOR is missing."""
    house, lines = tmp_path / "house", {}
    shutil.copytree(REPOSITORY, house, ignore=shutil.ignore_patterns("data", "runs", ".git", "tests", "__pycache__"))
    shutil.copy(REPOSITORY / "tests" / "describer.py", house / "train_describer.py")
    save(tmp_path / "run" / "best.pt", dataset="refshapes", data_root=str(shapes))
    for ranks in (1, 2):
        flags = ["--task", "reg", "--split", "testA", "--limit", "3", "--batch-size", "1", "--workers", "0"]
        done = command("eval.py", "--run", tmp_path / "run", "--listener", tmp_path / "run" / "best.pt", *flags, cwd=house,
                       ranks=ranks, PATH="/nowhere")
        assert done.returncode == 0 and done.stdout.count("METEOR is left out") == 1, done.stderr
        lines[ranks] = (tmp_path / "run" / "eval" / "refshapes_testA_reg_first3.jsonl").read_bytes()
    assert lines[1] == lines[2]


# ---- people's clicks ----------------------------------------------------------------------------------------

def test_study_page(shapes, tmp_path):
    """It escapes what it shows, asks the network for nothing, and does not know where the objects are."""
    rows, dataset = described(shapes)
    chosen = study.draw(rows, 4)
    assert chosen == study.draw(rows, 4) != study.draw(rows, 4, seed=1) and len(study.draw(rows, 10 ** 6)) == len(rows)
    chosen[0] = chosen[0] | {"sentence": EVIL[:200]}
    study.write_page(tmp_path / "study.html", chosen, dataset, '"><script>')
    text = (tmp_path / "study.html").read_text(encoding="utf-8")
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and "<script>alert" in page.text and "default-src 'none'" in text
    cards = [attributes for tag, attributes in page.tags if attributes.get("class") == "item"]
    assert [int(card["data-ref"]) for card in cards] == [row["ref_id"] for row in chosen]
    assert all(set(card) == {"class", "hidden", "data-ref", "data-image", "data-width", "data-height"} for card in cards)
    assert not [a for _, a in page.tags for key in ("src", "href") if not a.get(key, "#").startswith(("data:image", "#"))]


@pytest.mark.parametrize("click, expected", [
    ((0, 0), True), ((0.99, 1.99), True), ((1, 0), False), ((0, 2), False), ((4, 3), True), ((3.5, 2.5), True), ((4, 1.9), False),
    (None, False), ((4.01, 3), None), ((-0.01, 0), None)])
def test_clicks_on_the_border(click, expected):
    """A pixel owns its left and upper edge, the last one its other edge too; what lies outside the picture is no click."""
    mask = np.zeros((3, 4), bool)
    mask[:2, 0] = mask[2, 3] = True
    if expected is None:
        with pytest.raises(ValueError, match="outside a picture of 4 x 3"):
            study.hit(mask, click)
    else:
        assert study.hit(mask, click) is expected


@pytest.fixture
def clicked(shapes, tmp_path):
    """Two people's files about four refs: both hit the first, one each the next two, nobody the last."""
    dataset, _ = corpus(shapes)
    refs = list(dict.fromkeys(dataset.ref_ids.tolist()))[:4]
    for rater, hits in (("a", (1, 1, 0, 0)), ("b", (1, 0, 1, 0))):
        clicks = []
        for n, (ref, right) in enumerate(zip(refs, hits)):
            mask = dataset.expression_mask(int(np.flatnonzero(dataset.ref_ids == ref)[0]))
            y, x = np.argwhere(mask if right else ~mask)[0].tolist()
            x, y = (None, None) if n == 3 and rater == "a" else (x + 0.5, y + 0.5)  # "I cannot tell"
            clicks.append({"ref_id": ref, "image_id": 1, "sentence": "…", "x": x, "y": y})
        saved = {"study": "s1", "rater": rater, "dataset": "refshapes", "split": "testA", "checkpoint": "", "clicks": clicks}
        (tmp_path / f"{rater}.json").write_text(json.dumps(saved))
    return tmp_path


def test_two_people_score(clicked, shapes, capsys):
    evaluation.main(["--score-study", str(clicked / "a.json"), str(clicked / "b.json"), "--data-root", str(shapes)])
    assert "25.0 % of 4 sentences led both people to the object (50.0 % the first, 50.0 % the second)" in capsys.readouterr().out
    result = json.loads((clicked / "study_refshapes_testA_s1.json").read_text())
    assert [row["hits"] for row in result["rows"]] == [[True, True], [True, False], [False, True], [False, False]]


@pytest.mark.parametrize("flags, sentence", [
    (["--split", "testA"], "--split means nothing to --score-study"), (["--datta-root", "data"], "did you mean '--data-root'")])
def test_a_study_needs_nothing_else(clicked, flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluation.main(["--score-study", str(clicked / "a.json"), str(clicked / "b.json"), *flags])


@pytest.mark.parametrize("change, sentence", [
    (lambda v: v.update(study="s2"), "different studies: s1 and s2"),
    (lambda v: v.update(rater="a"), "by the same person"),
    (lambda v: v["clicks"].pop(), "let both people finish"),
    (lambda v: v["clicks"][0].update(x=1e6), "outside a picture"),
    (lambda v: v["clicks"][0].update(x="1"), "a click that is no place"),
    (lambda v: v["clicks"][0].update(x=float("nan")), "a click that is no place"),
    (lambda v: v["clicks"].append(v["clicks"][0]), "stands there twice"),
    (lambda v: v.update(dataset="../../etc"), "should be names"),
    (lambda v: v.pop("rater"), "it lacks 'rater'"),
    (lambda v: v.update(clicks=5), "no file of clicks"),
])
def test_bad_clicks(clicked, shapes, change, sentence):
    value = json.loads((clicked / "b.json").read_text())
    change(value)
    (clicked / "b.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=sentence):
        study.score(clicked / "a.json", clicked / "b.json", shapes)


def test_clicks_for_another_corpus(clicked, shapes):
    for name in "ab":
        path = clicked / f"{name}.json"
        path.write_text(path.read_text().replace("testA", "testB"))
    with pytest.raises(UserError, match="has no ref"):
        study.score(clicked / "a.json", clicked / "b.json", shapes)
