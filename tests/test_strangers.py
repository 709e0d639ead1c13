"""What strangers hand to a running script: sentences, pictures, settings, checkpoints, run folders. Each is taken or refused with
one sentence; nothing runs, hangs, or reaches the report as markup."""
import copy
import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from common import checkpoint, config, data
from common.config import Parser
from tests.children import finish, words
from tests.test_hostile import disturb, survives, watch  # noqa: F401: `watch` guards every test
from tests.test_pictures import Page

SENTENCES = [
    "", " \t\n", "\0", "\ud800", "\u202eright to left\u202c", "الكلب على اليسار", "左边的红色球", "e\u0301\u0302\u0303" * 50, "👩‍👩‍👧‍👦🏳️‍🌈", "\ufeff\u200b\u2028",
    "<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", "\"'><b>&amp;", "{{7*7}}${7*7}%s%n", "javascript:alert(1)",
    "a" * 10_000, "left " * 2_000, "../../etc/passwd", "[MASK] [PAD] [CLS]", "\x1b[31mred\x07", "İıﬀﬃ ß Ω ½ ²", "-" * 300 + "/" * 300]


@pytest.fixture(scope="module")
def odd(shapes, tmp_path_factory):
    """The tiny corpus with strange sentences everywhere."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(shapes, root, dirs_exist_ok=True)
    for path in (root / "refshapes").glob("*.json"):
        prepared = json.loads(path.read_text())
        for i, expression in enumerate(prepared.get("expressions", [])):
            expression["text"] = SENTENCES[i % len(SENTENCES)]
        path.write_text(json.dumps(prepared))
    return root


@pytest.mark.parametrize("script, flags", [
    ("train_lts", []), ("train_pks", []), ("train_tseg", []), ("train_seqtr_partial", ["--stage", "rec"]), ("train_mutual", ["--no-gsup"])])
def test_sentences(odd, tmp_path, script, flags):
    """Trained and evaluated on them; in the report they are text."""
    out = tmp_path / "run"
    finish(script, words(script, odd, out, "--max-steps", "1", *flags), tmp_path / "log")
    report = next(out.rglob("report.html"))
    page = Page(report.read_text(encoding="utf-8"))
    assert "<script>alert(1)</script>" in page.text and "onerror" not in {key for _, attrs in page.tags for key in attrs}
    assert sum(tag == "script" for tag, _ in page.tags) <= 1


@pytest.fixture(scope="module")
def run(unbroken, tmp_path_factory):
    """A trained LTS to be asked."""
    folder = tmp_path_factory.mktemp("lts") / "run"
    shutil.copytree(unbroken("train_lts")[0], folder)
    return folder


@pytest.mark.parametrize("mode, size", [("CMYK", (40, 30)), ("I;16", (40, 30)), ("RGBA", (40, 30)), ("LA", (40, 30)), ("P", (40, 30)), ("1", (40, 30)),
                                        ("F", (40, 30)), ("RGB", (1, 1)), ("RGB", (3000, 1)), ("RGB", (1, 3000)), ("L", (4000, 3000))])
def test_pictures(run, tmp_path, mode, size):
    """Any mode and shape is answered, with the strange sentences, by a picture."""
    picture = tmp_path / ("x.tif" if mode in ("CMYK", "F", "I;16") else "x.png")
    Image.new(mode, size).save(picture)
    asked = [text for text in SENTENCES if "\0" not in text]
    assert survives(tmp_path, evaluation.main, ["--run", str(run), "--image", str(picture), "--text", *asked[:1 if size[0] == 4000 else 8], "--out", str(tmp_path / "out.png")])
    with Image.open(tmp_path / "out.png") as answer:
        answer.load()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_picture_lies_under_its_mask(tmp_path, orientation):
    """The corpus has the size that is shown: bright pixels and mask coincide, in the image and on the canvas."""
    shown = np.zeros((30, 50, 3), np.uint8)
    shown[4:11, 7:21] = 255
    turned = Image.fromarray(shown)
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    if orientation > 1:
        turned = turned.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "x.png", exif=exif)
    picture = data.load_image(tmp_path / "x.png", 50, 30) if orientation > 4 else data.load_image(tmp_path / "x.png")
    mask = torch.from_numpy(shown[..., 0] > 0)
    assert torch.equal(picture[0] > 127, mask)
    frame = data.Canvas(64).frame(50, 30)
    on_canvas = frame.image_in(picture, (0, 0, 0))[0] / 255.0
    assert (on_canvas - frame.masks_in(mask[None])[0]).abs().mean() < 0.02


NINE = ", ".join(["*{0}"] * 9)
LAUGHS = ["&a [x, x, x, x, x, x, x, x, x]", *(f"&{chr(98 + i)} [{NINE.format(chr(97 + i))}]" for i in range(9))]
BOMBS = {
    "laughs": "\n".join(f"size: {laugh}" for laugh in LAUGHS), "laughs in a switch": f"squash: [{', '.join(LAUGHS)}]",
    "merges": "a: &a {x: 1}\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{NINE.format(chr(97 + i))}]}}\n" for i in range(9)),
    "depth": "size: " + "[" * 10_000, "many keys": "".join(f"k{i}: 1\n" for i in range(6_000)), "a long number": "size: " + "9" * 10_000,
    "code": "size: !!python/object/apply:os.system ['true']\n", "itself": "size: &a [*a]\n", "no text": "\0",
    "huge": "#" * (config.MAX_YAML_BYTES + 1)}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml(tmp_path, name):
    """Refused within seconds, in a short sentence."""
    parser = Parser("x")
    parser.switch(None, "squash", False, "x")
    parser.add_argument("--size", type=int)
    (tmp_path / "x.yaml").write_text(BOMBS[name])
    started = time.monotonic()
    assert not survives(tmp_path, config.yaml_words, parser, tmp_path / "x.yaml")
    assert time.monotonic() - started < 10


def test_checkpoints(run, tmp_path):
    """Strange values anywhere in what a checkpoint says of itself; some are harmless."""
    state, taken = checkpoint.load(run / "best.pt"), 0
    path = tmp_path / "best.pt"
    said = {key: value for key, value in state.items() if key != "model"}
    for seed in range(80):
        strange = disturb(random.Random(seed), copy.deepcopy(said))
        checkpoint.save(path, strange | {"model": state["model"]})
        taken += survives(tmp_path, evaluation.load_run, path, torch.device("cpu"), [])
    for model in ({}, {"x": 1}, None, {name: value[:1] for name, value in state["model"].items() if value.ndim}):
        checkpoint.save(path, state | {"model": model})
        assert not survives(tmp_path, evaluation.load_run, path, torch.device("cpu"), [])
    assert 0 < taken < 80


@pytest.mark.parametrize("name, content", [
    ("log.jsonl", '{"step": 1, "loss": "<script>"}\n{"step": 2, "loss": 1e999}\n{"step": 3, "loss": null}\n[]\n{"step": {}}\n{'),
    ("log.jsonl", '{"step": 1, "</svg><script>": 1, "loss": [1], "lr": {}, "val_mIoU": "x"}\n'), ("log.jsonl", "\udcff"), ("env.txt", "<script>\udcff")])
def test_run_folder(run, shapes, tmp_path, name, content):
    """A report is made of a folder with a strange log or environment, or the file is named."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "run" / "report.html").unlink()
    if survives(tmp_path, evaluation.main, ["--run", str(tmp_path / "run"), "--data-root", str(shapes), "--limit", "1", "--workers", "0", "--report"]):
        page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        assert sum(tag == "script" for tag, _ in page.tags) <= 1
