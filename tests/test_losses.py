"""Losses against torchvision, loops over pixels, and gradcheck."""
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from common.losses import gated_crf_loss, partial_cross_entropy, sigmoid_focal_loss


def data(n=2, height=6, width=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(n, height, width, generator=generator, dtype=dtype)
    image = torch.rand(n, 3, height, width, generator=generator, dtype=dtype) * 0.4
    valid = torch.rand(n, height, width, generator=generator) < 0.7
    return prob, image, valid


def crf_by_loop(prob, image, sigma_xy, sigma_rgb, radius, valid):
    """The definition, pair by pair."""
    total = 0.0
    count, height, width = prob.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    for n in range(count):
        for y, x in cells:
            for v, u in cells:
                if (y, x) == (v, u) or max(abs(y - v), abs(x - u)) > radius or not (valid[n, y, x] and valid[n, v, u]):
                    continue
                far = ((y - v) ** 2 + (x - u) ** 2) / sigma_xy ** 2 \
                    + ((image[n, :, y, x] - image[n, :, v, u]) ** 2).sum().item() / sigma_rgb ** 2
                p, q = prob[n, y, x].item(), prob[n, v, u].item()
                total += torch.tensor(-0.5 * far, dtype=torch.float64).exp().item() * (p + q - 2 * p * q)
    return total / max(1, int(valid.sum()))


def crf_unfolded(prob, image, sigma_xy=6.0, sigma_rgb=0.1, radius=5):
    """The usual form: neighbourhoods of features and of both classes' probabilities unfolded. Every pixel is valid."""
    n, height, width = prob.shape
    side = 2 * radius + 1
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y])[None].expand(n, -1, -1, -1).to(prob) / sigma_xy
    features = torch.cat([place, image / sigma_rgb], 1)
    unfold = lambda t: F.unfold(t, side, padding=radius).view(n, t.shape[1], side ** 2, height, width)  # noqa: E731
    kernel = (-0.5 * (unfold(features) - features[:, :, None]).square().sum(1)).exp()
    kernel = kernel * unfold(torch.ones_like(prob)[:, None])[:, 0]  # neighbours outside the image do not count
    kernel[:, side ** 2 // 2] = 0
    classes = torch.stack([prob, 1 - prob], 1)
    alike = (unfold(classes) * classes[:, :, None]).sum(1)
    return (kernel * (1 - alike)).sum() / prob.numel()


@pytest.mark.parametrize("sigma_xy, sigma_rgb, radius", [(6.0, 0.1, 5), (1.5, 0.3, 2), (6.0, 0.1, 20)])
@pytest.mark.parametrize("gated", [False, True])
def test_gated_crf_equals_the_double_loop(sigma_xy, sigma_rgb, radius, gated):
    prob, image, valid = data()
    mask = valid if gated else None
    expected = crf_by_loop(prob, image, sigma_xy, sigma_rgb, radius, valid if gated else torch.ones_like(valid))
    assert gated_crf_loss(prob, image, sigma_xy, sigma_rgb, radius, mask).item() == pytest.approx(expected, rel=1e-9)
    single = gated_crf_loss(prob.float(), image.float(), sigma_xy, sigma_rgb, radius, mask)
    assert single.item() == pytest.approx(expected, rel=1e-5) and single.dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
def test_gated_crf_gradient(gated):
    prob, image, valid = data()
    of = torch.tensor([1, 1])
    assert torch.autograd.gradcheck(
        lambda p: gated_crf_loss(p, image, 2.0, 0.3, 2, valid if gated else None, of), prob.requires_grad_())


def test_gated_crf_equals_the_unfolded_form():
    prob, image, _ = data(3, 20, 17)
    ours, plain = prob.clone().requires_grad_(), prob.clone().requires_grad_()
    a, b = gated_crf_loss(ours, image), crf_unfolded(plain, image)
    a.backward(), b.backward()
    assert torch.allclose(a, b) and torch.allclose(ours.grad, plain.grad)


def test_gated_crf_details():
    """image_of shares pictures; what lies under the gate never matters; nothing valid gives 0; no half precision."""
    prob, image, valid = data(4)
    of = torch.tensor([1, 0, 0, 1])
    shared = gated_crf_loss(prob, image[:2], valid=valid, image_of=of)
    assert torch.equal(shared, gated_crf_loss(prob, image[of], valid=valid))
    hidden = gated_crf_loss(torch.where(valid, prob, 9.0), torch.where(valid[:, None], image, 9.0), valid=valid)
    assert torch.equal(hidden, gated_crf_loss(prob, image, valid=valid))
    assert gated_crf_loss(prob, image, valid=torch.zeros_like(valid)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_crf_loss(prob.float(), image), gated_crf_loss(prob.float(), image.float()))
    with pytest.raises(ValueError):
        gated_crf_loss(prob, image[:2])


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_focal_equals_torchvision(alpha, gamma, reduction):
    logits, targets = torch.randn(3, 5, dtype=torch.float64) * 5, torch.randint(0, 2, (3, 5)).double()
    assert torch.allclose(sigmoid_focal_loss(logits, targets, alpha, gamma, reduction),
                          torchvision_focal(logits, targets, alpha, gamma, reduction))


def test_focal_is_finite_far_out():
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([1.0, 0.0, 0.0, 1.0])).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("labels, balanced, expected", [
    ([1, 0, 0, 0, -1], True, (1 + (2 + 3 + 4) / 3) / 2), ([1, 0, 0, 0, -1], False, (1 + 2 + 3 + 4) / 4),
    ([1, 1, -1, -1, -1], True, 1.5), ([-1, 0, -1, -1, 0], True, 3.5), ([-1] * 5, True, 0.0), ([-1] * 5, False, 0.0)])
def test_partial_cross_entropy(labels, balanced, expected):
    """Cell i costs i + 1 under its label; -1 costs nothing."""
    labels = torch.tensor([labels])
    wrong = 1 - (-torch.arange(1.0, 6.0)).exp()  # -log(1 - wrong) = 1, 2, …
    logits = torch.logit(torch.where(labels == 1, 1 - wrong, wrong)).requires_grad_()
    loss = partial_cross_entropy(logits, labels, balanced)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([expected], abs=1e-5) and (logits.grad[labels < 0] == 0).all()
