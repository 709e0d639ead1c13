"""Matrix NMS (Wang et al., SOLOv2, NeurIPS 2020, Sec. 3.3): soft suppression of masks without a loop over them."""
import numpy as np
import torch


@torch.no_grad()
def matrix_nms(masks, scores, labels=None, kernel="gaussian", sigma=2.0):
    """Decay each mask's score by its overlap with masks of higher score, and less where those are suppressed
    themselves.

    masks (N,H,W) bool; scores (N,) float, in any order; labels (N,): only masks of one label compete (None: all do).
    decay_j = min over i with score_i > score_j of f(iou_ij) / f(c_i), where c_i is mask i's largest IoU with any mask
    that scores higher still. kernel `gaussian`: f(x) = exp(-sigma x²); `linear`: f(x) = 1 - x.

    Returns scores * decay (N,), in the given order. Higher is meant strictly, as printed: masks of equal score leave
    each other alone, so the result does not depend on the order of the masks. Two empty masks have an IoU of 0, and
    with the linear kernel a mask with c_i = 1, which has itself been removed, suppresses nothing. Raises ValueError for
    another kernel and for shapes that do not fit.
    """
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"kernel is gaussian or linear, not {kernel!r}")
    if masks.ndim != 3 or scores.shape != masks.shape[:1] or labels is not None and labels.shape != scores.shape:
        raise ValueError(f"masks {tuple(masks.shape)} and scores {tuple(scores.shape)} are not (N,H,W) and (N,)")
    if not len(masks):
        return scores.clone()
    shared = intersections(masks)                                      # (N, N)
    area = shared.diagonal()
    iou = shared / (area[:, None] + area - shared).clamp(min=1)
    higher = scores[:, None] > scores                                  # [i, j]: i may suppress j
    if labels is not None:
        higher &= labels[:, None] == labels
    iou = iou * higher
    compensation = iou.amax(0)[:, None]                                # c_i
    if kernel == "gaussian":
        # the highest mask has c = 0, so the largest exponent is never negative where anything is higher
        return scores * torch.exp(-sigma * (iou.square() - compensation.square()).amax(0).clamp(min=0)).to(scores)
    left = 1 - compensation
    ratio = torch.where(higher & (left > 0), (1 - iou) / left.clamp(min=1e-12), torch.ones_like(iou))
    return scores * ratio.amin(0).to(scores)


def intersections(masks):
    """Pixels that each two of masks (N,H,W) bool share: (N,N) float32 of whole numbers, exact up to 2^24."""
    flat = masks.flatten(1)
    if masks.device.type != "cpu":
        with torch.autocast(masks.device.type, enabled=False):  # half precision would round the counts
            return flat.float() @ flat.float().T
    packed = np.packbits(flat.numpy(), axis=1)                         # (N, bytes); 64 pixels a word beat a product
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)
    shared = np.zeros((len(masks), len(masks)), np.float32)
    for i, row in enumerate(words):
        used = row.nonzero()[0]
        if len(used):
            used = slice(used[0], used[-1] + 1)
            shared[i, i:] = shared[i:, i] = np.bitwise_count(row[used] & words[i:, used]).sum(1, dtype=np.int32)
    return torch.from_numpy(shared)
