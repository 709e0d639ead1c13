"""Matrix NMS against a loop written from SOLOv2's Sec. 3.3."""
import math

import pytest
import torch

from common.matrix_nms import matrix_nms


def blobs(n, height=40, width=50, seed=0):
    """n boxes with ragged edges, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, height, width, generator=generator) < 0.9
    for mask, (y, x, h, w) in zip(masks, torch.rand(n, 4, generator=generator)):
        keep = torch.zeros_like(mask)
        top, left = int(y * height * 0.7), int(x * width * 0.7)
        keep[top:top + 4 + int(h * 20), left:left + 4 + int(w * 20)] = True
        mask &= keep
    masks[n // 2:n // 2 + 3] = masks[:3]
    return masks, torch.rand(n, generator=generator)


def by_loop(masks, scores, labels, kernel, sigma=2.0):
    """decay_j = min over s_i > s_j of f(iou_ij) / f(iou_.i), f(iou_.i) = min over s_k > s_i of f(iou_ki)."""
    n = len(masks)
    f = {"gaussian": lambda x: math.exp(-sigma * x * x), "linear": lambda x: 1 - x}[kernel]

    def iou(i, j):
        union = int((masks[i] | masks[j]).sum())
        return int((masks[i] & masks[j]).sum()) / union if union else 0.0

    def above(j):
        return [i for i in range(n) if scores[i] > scores[j] and (labels is None or labels[i] == labels[j])]

    out = []
    for j in range(n):
        decay = 1.0
        for i in above(j):
            compensation = min([f(iou(k, i)) for k in above(i)], default=1.0)
            if compensation > 0:
                decay = min(decay, f(iou(i, j)) / compensation)
        out.append(scores[j].item() * decay)
    return torch.tensor(out)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_loop_in_any_order(kernel, labelled, tied):
    masks, scores = blobs(14)
    masks[5] = False
    scores = (scores * 3).round() / 3 if tied else scores
    labels = torch.arange(14) % 2 if labelled else None
    ours = matrix_nms(masks, scores, labels, kernel)
    assert torch.allclose(ours, by_loop(masks, scores, labels, kernel), atol=1e-6)
    assert (ours < scores).any() and (ours <= scores).all()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    assert torch.equal(matrix_nms(masks[order], scores[order], labels if labels is None else labels[order], kernel),
                       ours[order])


def test_known_cases():
    """A duplicate decays by e^-2 (gaussian) or to 0 (linear); the top one and what it does not touch never change."""
    masks = torch.zeros(4, 8, 9, dtype=torch.bool)
    masks[0, :4] = masks[1, :4] = masks[2, :4] = True
    masks[3, 5:] = True
    scores = torch.tensor([0.5, 0.9, 0.4, 0.1])
    assert matrix_nms(masks, scores).tolist() == pytest.approx([0.5 * math.exp(-2), 0.9, 0.4 * math.exp(-2), 0.1])
    assert matrix_nms(masks, scores, kernel="linear").tolist() == pytest.approx([0, 0.9, 0, 0.1])
    assert matrix_nms(masks, scores, torch.arange(4)).tolist() == pytest.approx(scores.tolist())
    assert matrix_nms(masks, torch.full((4,), 0.3)).tolist() == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_nothing_one_and_empty(kernel):
    assert matrix_nms(torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0), kernel=kernel).shape == (0,)
    assert matrix_nms(torch.ones(1, 4, 5, dtype=torch.bool), torch.tensor([0.7]), kernel=kernel).tolist() == \
        pytest.approx([0.7])
    scores = torch.tensor([0.2, 0.8, 0.5])
    decayed = matrix_nms(torch.zeros(3, 4, 5, dtype=torch.bool), scores, kernel=kernel)
    assert decayed.tolist() == pytest.approx(scores.tolist())


def test_half_precision_counts_exactly():
    masks = torch.ones(2, 200, 336, dtype=torch.bool)
    masks[1, 0, 0] = False
    with torch.autocast("cpu", torch.bfloat16):
        decayed = matrix_nms(masks, torch.tensor([0.9, 0.8]))
    assert decayed[1].item() == pytest.approx(0.8 * math.exp(-2 * (67199 / 67200) ** 2), rel=1e-6)


@pytest.mark.parametrize("changes", [{"kernel": "hard"}, {"scores": torch.rand(3)}, {"labels": torch.zeros(3)},
                                     {"masks": torch.zeros(4, 5, dtype=torch.bool)}])
def test_bad_arguments(changes):
    with pytest.raises(ValueError):
        matrix_nms(**{"masks": torch.zeros(4, 4, 5, dtype=torch.bool), "scores": torch.rand(4)} | changes)
