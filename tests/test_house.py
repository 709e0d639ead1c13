"""The scripts are laid out alike, so that a diff of two shows the papers' difference, and what others call keeps its name."""
import importlib
import inspect
import re

import pytest

from common.config import REPOSITORY
from tests import children

SCRIPTS = {name: (REPOSITORY / f"{name}.py").read_text(encoding="utf-8") for name in children.SCRIPTS}  # a user's own are his
BANNERS = ["settings", "model", "targets and losses", "training", "main"]
# lines of the loop that say what a paper has of its own: what the optimiser, the losses, the scores are
OWN = re.compile(r"def train|The loop, from|model = model\.to|optimizer = |\"random\"|rate\b|sums = |sentences|forward\(|loss_terms"
                 r"|norm = |shared = |losses = |numbers = |summary|best|metrics\.evaluate|val_|eval_batch_size|was begun")


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners_and_names(name):
    found = re.findall(r"^# ---- (.+?) -+$", SCRIPTS[name], re.M)
    assert [banner for banner in found if banner in BANNERS] == BANNERS
    script = importlib.import_module(name)
    assert all(callable(getattr(script, of)) for of in ("get_parser", "make_vocabulary", "frontend", "build_model", "main"))
    assert all((REPOSITORY / path).is_file() for path in (script.YAML, script.EMBEDDED_YAML))


def loop(text):
    """The lines from `train` to the end of `stop_signal`, without what stands between functions that all scripts have."""
    return text[text.index("def train("):text.index("# ---- main")].splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_loop_is_the_same(name):
    """What is in train_lts.py's loop and says nothing of LTS is in every other one, in the same order."""
    lines = iter(loop(SCRIPTS[name]))
    shared = [line for line in loop(SCRIPTS["train_lts"]) if line.strip() and not OWN.search(line)]
    assert len(shared) > 80 and [line for line in shared if line not in lines] == []


@pytest.mark.parametrize("call, parameters", [
    ("common.matrix_nms:matrix_nms", {"masks": ..., "scores": ..., "labels": None, "kernel": "gaussian", "sigma": 2.0}),
    ("common.losses:sigmoid_focal_loss", {"logits": ..., "targets": ..., "alpha": 0.25, "gamma": 2.0, "reduction": "sum"}),
    ("common.losses:gated_crf_loss", {"prob": ..., "image": ..., "sigma_xy": 6.0, "sigma_rgb": 0.1, "radius": 5, "valid": None,
                                      "image_of": None}),
    ("common.crf:dense_crf", {"image": ..., "prob": ..., "iterations": 10, "gaussian": (3, 3), "bilateral": (80, 13, 10),
                              "exclusive": False}),
    ("common.captions:cider_d", {"hypotheses": ..., "references": ..., "df": None}),
    ("common.captions:document_frequency", {"references": ...}),
    ("common.text:WordPiece", {"vocab_file": ...}), ("common.backbones:load_augreg_npz", {"path": ...}),
    ("common.language:Bert", {"layers": 12, "hidden": 768, "heads": 12, "intermediate": 3072, "vocab_size": 30522}),
    ("common.language:Bert.load_hf", {"state": ...}), ("common.backbones:ViT", {"image_size": 384, "patch": 16}),
    ("common.backbones:ViT.load_timm", {"state": ...}), ("common.backbones:Darknet53.load_darknet", {"path": ...}),
    ("common.mask2former:Mask2Former", {"backbone": "r50", "num_classes": 80, "num_queries": 100}),
    ("common.mask2former:Mask2Former.load_official", {"state": ...}),
    ("common.metrics:SegMeter.update", {"index": ..., "I": ..., "U": ...})], ids=lambda value: value if isinstance(value, str) else "")
def test_public_names(call, parameters):
    module, path = call.split(":")
    of = importlib.import_module(module)
    for name in path.split("."):
        of = getattr(of, name)
    found = [p for p in inspect.signature(of).parameters.values() if p.name != "self"][:len(parameters)]
    assert {p.name: ... if p.default is p.empty else p.default for p in found} == parameters
