"""Losses that no paper of this repository claims: focal, partial cross-entropy, Gated-CRF."""
import torch
import torch.nn.functional as F


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="sum"):
    """Focal loss (Lin et al., 2017, Eq. 5) on each element: -alpha_t (1 - p_t)^gamma log p_t.

    logits, targets (0..1) of one shape; alpha weighs the positives and 1 - alpha the negatives (negative: no weighing).
    reduction: `sum`, `mean` or `none`. Raises ValueError for another one.
    """
    prob = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (prob + targets - 2 * prob * targets) ** gamma       # 1 - p_t
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction is sum, mean or none, not {reduction!r}")
    return loss if reduction == "none" else getattr(loss, reduction)()


def partial_cross_entropy(logits, labels, balanced=True):
    """Binary cross-entropy over the labelled cells alone (Tang et al., 2018; PKS, Eq. 12).

    logits (N, …); labels of that shape: 1 foreground, 0 background, -1 unknown. balanced: the average of the
    foreground's mean and the background's mean (of the one that exists, where one is missing), so that a few cells of
    foreground weigh as much as a wide background; otherwise the mean over all labelled cells. Returns (N,), 0 where
    nothing is labelled.
    """
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits), reduction="none").flatten(1)
    labels = labels.flatten(1)
    groups = [labels == 1, labels == 0] if balanced else [labels >= 0]
    means = [(loss * of).sum(1) / of.sum(1).clamp(min=1) for of in groups]
    return sum(means) / sum(of.any(1).to(loss) for of in groups).clamp(min=1)


def gated_crf_loss(prob, image, sigma_xy=6.0, sigma_rgb=0.1, radius=5, valid=None, image_of=None):
    """Gated-CRF loss (Obukhov et al., 2019): neighbouring pixels of like colour should get like labels.

    prob (N,H,W): foreground probabilities. image (N,3,H,W), at prob's size and in the units that sigma_rgb is meant for
    (Obukhov et al.: normalised by ImageNet's mean and deviation), or (B,3,H,W) with image_of (N,), the image of each
    map. sigma_xy: in pixels of prob. valid (N,H,W) bool: False gates a pixel out, as a source and as a neighbour.

    The sum, over ordered pairs of pixels a != b inside the image, at most `radius` rows and columns apart and both
    valid, of K_ab (p_a + p_b - 2 p_a p_b), K_ab = exp(-|xy_a - xy_b|² / 2 sigma_xy² - |rgb_a - rgb_b|² / 2 sigma_rgb²),
    over the number of valid pixels. A scalar; gradients go to prob alone. Raises ValueError for shapes that do not fit.
    """
    count, height, width = prob.shape
    if image.shape[1:] != (3, height, width) or len(image) != count and image_of is None:
        raise ValueError(f"image {tuple(image.shape)} does not fit prob {tuple(prob.shape)} and image_of")
    if valid is not None and valid.shape != prob.shape:
        raise ValueError(f"valid {tuple(valid.shape)} does not fit prob {tuple(prob.shape)}")
    with torch.autocast(prob.device.type, enabled=False):
        prob = prob if prob.dtype == torch.float64 else prob.float()
        return _GatedCRF.apply(prob, image.detach().to(prob), sigma_xy, sigma_rgb, radius, valid, image_of)


class _GatedCRF(torch.autograd.Function):
    """The energy and its gradient in one pass over half of the neighbourhood, K being symmetric.

    `differ` and `agree` gather, for every pixel, K over its neighbours b, weighted by 1 - p_b and by p_b. The energy is
    2 sum_a p_a differ_a and its gradient 2 (differ - agree), so only one map is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, prob, image, sigma_xy, sigma_rgb, radius, valid, image_of):
        height, width = prob.shape[1:]
        image = image / sigma_rgb
        if valid is None:
            on, off, total = prob, 1 - prob, prob.numel()
        else:
            on, off, total = prob * valid, (1 - prob) * valid, valid.sum().clamp(min=1)
        differ, agree = torch.zeros_like(prob), torch.zeros_like(prob)
        for down in range(min(radius, height - 1) + 1):
            for right in range(-min(radius, width - 1), min(radius, width - 1) + 1):
                if down == 0 and right <= 0:
                    continue
                here = (..., slice(0, height - down), slice(max(0, -right), width - max(0, right)))
                there = (..., slice(down, height), slice(max(0, right), width + min(0, right)))
                far = (image[here] - image[there]).square_().sum(1).add_((down ** 2 + right ** 2) / sigma_xy ** 2)
                kernel = far.mul_(-0.5).exp_()                         # (B, H - down, W - |right|)
                kernel = kernel if image_of is None else kernel[image_of]
                for out, value in ((differ, off), (agree, on)):
                    out[here].addcmul_(kernel, value[there])
                    out[there].addcmul_(kernel, value[here])
        energy = (on.double() * differ).sum() * 2 / total
        gradient = differ.sub_(agree).mul_(2 / total)
        ctx.save_for_backward(gradient if valid is None else gradient.mul_(valid))
        return energy.to(prob)

    @staticmethod
    def backward(ctx, upstream):
        return (ctx.saved_tensors[0] * upstream, *[None] * 6)
