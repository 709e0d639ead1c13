"""What each paper's network costs: parameters, operations and latency, as a Markdown table.

    python -m tests.costs                 all methods, some minutes on two cores
    python -m tests.costs lts tseg        some of them

Of an untrained network in its paper's setting, on one image of 640x480 pixels and sentences of eight words. Operations are
multiply-adds of convolutions and matrix products, as torch counts them, divided by two; the sampling of deformable attention is
not counted. An image is encoded once, whatever is asked about it; a sentence's share is what one more sentence adds.
"""
import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import METHODS, build

FULL_SIZE = {"pks": [], "mutual": []}  # the papers' own, where the benchmark takes less


def cost(call):
    """(multiply-adds, seconds) of a call; the seconds are the least of three, after the count has warmed it up."""
    with FlopCounterMode(display=False) as counter:
        call()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return counter.get_total_flops() / 2, min(seconds)


@torch.inference_mode()
def figures(method, toy=False):
    """(parameters, canvas, multiply-adds of an image and of a further sentence, seconds of each) of one method."""
    _, model, size, images = build(method, toy, FULL_SIZE.get(method))
    text = torch.randint(6, size, (5, 8))
    features = model.encode_image(images)
    image, seconds = cost(lambda: model.encode_image(images))
    (one, soon), (five, late) = (cost(lambda n=n: model.segment(features, torch.zeros(n, dtype=torch.int64), text[:n])) for n in (1, 5))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, "x".join(map(str, images.shape[:1:-1])), image, (five - one) / 4, seconds, (late - soon) / 4


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], help="empty: all")
    chosen = parser.parse_args().methods or METHODS
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, fp32\n")
    print("| | parameters, M | canvas | image, G multiply-adds | sentence | image, s | sentence |\n|---|---|---|---|---|---|---|")
    for method in chosen:
        parameters, canvas, image, sentence, *seconds = figures(method)
        print(f"| {method} | {parameters / 1e6:.1f} | {canvas} | {image / 1e9:.1f} | {sentence / 1e9:.2f} | {seconds[0]:.2f} | "
              f"{seconds[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
