"""Speed and memory as ratios, each against a peer or a plain form in the same process.

    python -m tests.bench                 every row
    python -m tests.bench --only grouped  rows whose name contains the word

A ratio above 1 means that we are faster (or smaller). Times are the median of several rounds that alternate between the
two sides, after one round of warming up. The plain forms stand in this file and say what they stand for.
"""
import argparse
import statistics
import time

import torch

import train_lts
from common.config import parse
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
