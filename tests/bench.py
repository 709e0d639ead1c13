"""Speed and memory as ratios, each against a peer or a plain form in the same process.

    python -m tests.bench                 every row
    python -m tests.bench --only grouped  rows whose name contains the word

A ratio above 1 means that we are faster (or smaller). Times are the median of several rounds that alternate between the
two sides, after one round of warming up. The plain forms stand in this file and say what they stand for.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

import train_lts
from common import data
from common.backbones import Darknet53
from common.config import parse
from common.masks import encode
from common.text import Vocabulary

SENTENCES_PER_IMAGE = 7.2  # RefCOCO val: 10,834 sentences over 1,500 images
ROWS = []


def row(function):
    """Register a row; the function returns {"ratio", and whatever else is worth a column}."""
    ROWS.append(function)
    return function


def seconds(*sides, rounds=5):
    """Median seconds of each side, taken in turns so that a busy moment meets all of them."""
    taken = [[] for _ in sides]
    for i in range(rounds + 1):
        for times, side in zip(taken, sides):
            started = time.perf_counter()
            side()
            if i:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


@row
@torch.inference_mode()
def grouped_evaluation_lts():
    """LTS, Darknet-53 at 416: all sentences of an image on one visual encoding, against one whole pass per sentence."""
    args = parse(train_lts.get_parser(), ["--weights", "none", "--embeddings", "random"])
    model = train_lts.build_model(args, Vocabulary([f"w{i}" for i in range(1000)])).eval()
    images, n = torch.randint(0, 256, (5, 3, 416, 416), dtype=torch.uint8), round(5 * SENTENCES_PER_IMAGE)
    image_of = torch.arange(n) * 5 // n
    text = torch.randint(2, 1000, (n, 8))

    def grouped():
        model.segment(model.encode_image(images), image_of, text)

    def by_sentence():
        for e in range(n):
            model.segment(model.encode_image(images[image_of[e]][None]), torch.tensor([0]), text[e:e + 1])

    def vision():
        for image in images:
            model.encode_image(image[None])

    ours, plain, shared = seconds(grouped, by_sentence, vision, rounds=3)
    each = plain / n - shared / 5  # what a sentence costs beside the image's encoding
    return {"ratio": plain / ours, "bound": plain / (shared + n * each), "ours s": ours, "plain s": plain}


def synthetic_corpus(root, images=17_000, objects=42_000, expressions=120_000):
    """A train.json of RefCOCO's size over one photograph, 640x480; returns its path."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    Image.fromarray(skimage.data.astronaut()).resize((640, 480)).save(root / "images" / "x.jpg", quality=92)
    disc = (np.hypot(*(np.mgrid[:480, :640] - [[[240]], [[320]]])) < 90)
    rle = encode(disc)
    image_of = rng.integers(0, images, objects)
    object_of = rng.integers(0, objects, expressions)
    words = ["left", "right", "man", "woman", "red", "shirt", "the", "in", "dog", "on"]
    prepared = {
        "meta": {"dataset": "big", "split": "train", "image_root": "images"},
        "images": [{"id": i, "file_name": "x.jpg", "width": 640, "height": 480} for i in range(images)],
        "objects": [{"id": i, "image_id": int(image_of[i]), "category_id": 1, "bbox": [230, 150, 180, 180], "area": 25000,
                     "iscrowd": 0, "mask": rle} for i in range(objects)],
        "expressions": [{"id": i, "ref_id": int(o), "image_id": int(image_of[o]), "object_ids": [int(o)],
                         "text": " ".join(rng.choice(words, 4))} for i, o in enumerate(object_of)]}
    (root / "train.json").write_text(json.dumps(prepared))
    return root / "train.json"


@row
def corpus_of_refcoco_size():
    """Opening 120,000 sentences, 17,000 images and 42,000 objects; the peer is the bare json.load of the same file."""
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_corpus(Path(folder))
        code = ("import sys, time; from common import data; open('/proc/self/clear_refs', 'w').write('5')\n"  # peak := now
                "def peak(): return int(next(l for l in open('/proc/self/status') if 'VmHWM' in l).split()[1])\n"
                "before, t = peak(), time.perf_counter(); data.RefDataset(sys.argv[1], None, None)\n"
                "print(time.perf_counter() - t, (peak() - before) / 1e6)")
        taken, gigabytes = map(float, subprocess.run([sys.executable, "-c", code, str(path)], check=True,
                                                     capture_output=True, text=True).stdout.split())
        (plain,) = seconds(lambda: json.loads(path.read_text()), rounds=3)
    return {"ratio": plain / taken, "seconds": taken, "GB": gigabytes}


@row
def loader_against_darknet():
    """Training samples at 416 from one loader worker, against Darknet-53's forward pass on the same images."""
    vocabulary = Vocabulary(["man"])
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_corpus(Path(folder), 200, 400, 1200)
        dataset = data.RefDataset(path, lambda text: vocabulary.encode(text, 15), data.Canvas(416),
                                  partial(train_lts.make_targets, finest_stride=8))
        dataset.small = False  # decode every picture, as a corpus of real size does
        plan = data.plan_epoch(dataset, 0, 0, 8, 1, "ref")[:6]
        backbone = Darknet53().eval()
        images = torch.rand(8, 3, 416, 416)

        def forward():
            with torch.inference_mode():
                backbone(images)
        fed, eaten = seconds(lambda: [None for _ in data.load(dataset, plan, 0)], forward, rounds=3)
    return {"ratio": eaten / (fed / len(plan)), "feeds images/s": 8 * len(plan) / fed, "Darknet eats images/s": 8 / eaten}


def main():
    """Run the rows and print them as one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{'row':34}  ratio  other figures")
    for function in ROWS:
        if only in function.__name__:
            result = function()
            rest = ", ".join(f"{key} {value:.3g}" for key, value in result.items() if key != "ratio")
            print(f"{function.__name__:34} {result['ratio']:6.2f}  {rest}", flush=True)


if __name__ == "__main__":
    main()
