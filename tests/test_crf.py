"""The dense CRF against pydensecrf, against exact sums over all pixels, and at its edges."""
import numpy as np
import pytest
import skimage.data
import torch

from common.crf import (PRESETS, _binary, _exclusive, _features, _on_device, _positions, _spatial_lattice, build_lattice,
                        dense_crf)

# pydensecrf2 1.1 on `photo(name)`: {pixel: foreground} at six pixels that it moves by more than 0.05
STORED = {
    ("astronaut", "krahenbuhl"): {4024: .04025, 9817: .2831, 11204: .05157, 11911: .57295, 13638: .96894,
                                  16313: .77396},
    ("astronaut", "deeplab"): {2124: .03794, 5543: .86474, 9054: .96794, 12831: .59603, 14864: .73023, 16311: .83732},
    ("coffee", "krahenbuhl"): {191: .08399, 4869: .51816, 7400: .06901, 9082: .95831, 11456: .28106, 14629: .0441},
    ("coffee", "deeplab"): {2153: .03189, 5346: .04644, 7761: .24148, 10072: .09439, 12380: .03404, 14630: .28253},
    ("chelsea", "krahenbuhl"): {2523: .36491, 2757: .03639, 3468: .20047, 4007: .03274, 4115: .10651, 7522: .85085},
    ("chelsea", "deeplab"): {302: .0623, 2338: .61643, 3451: .15222, 4436: .47272, 5554: .04293, 7635: .03006}}


def photo(name, step=4):
    """(image, prob (H,W)): a photograph that scikit-image brings, a soft disc that leans to red."""
    image = np.ascontiguousarray(getattr(skimage.data, name)()[::step, ::step])
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    logit = (.3 * height - np.hypot(y - .5 * height, x - .45 * width)) / 8
    red = image[..., 0].astype(float) - image[..., 2]
    return image, (1 / (1 + np.exp(-logit - red / 100))).astype(np.float32)


def peer(image, prob, iterations, gaussian, bilateral):
    """pydensecrf on (K, H, W) labels."""
    crf = pytest.importorskip("pydensecrf.densecrf").DenseCRF2D(image.shape[1], image.shape[0], len(prob))
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(prob.clip(1e-5, 1)).reshape(len(prob), -1), np.float32))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=image, compat=bilateral[2])
    return np.array(crf.inference(iterations)).reshape(prob.shape)


@pytest.mark.parametrize("name, preset", STORED)
def test_equals_stored_results_of_pydensecrf(name, preset):
    image, prob = photo(name)
    refined = dense_crf(image, prob[None], **PRESETS[preset])
    where = list(STORED[name, preset])
    assert refined.dtype == np.float32 and refined.shape == (1, *prob.shape)
    assert np.abs(refined.ravel()[where] - list(STORED[name, preset].values())).max() < 1e-4
    assert np.abs(prob.ravel()[where] - refined.ravel()[where]).min() > 0.05


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_equals_pydensecrf(name, preset):
    image, prob = photo(name, step=3)
    expected = peer(image, np.stack([1 - prob, prob]), **PRESETS[preset])
    assert np.abs(dense_crf(image, prob[None], **PRESETS[preset])[0] - expected[1]).max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5), (33, 46)])
def test_equals_pydensecrf_on_noise_with_many_labels(shape):
    draw = np.random.default_rng(shape[0])
    image = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[draw.random(shape) < 0.3] = 0
    prob = draw.dirichlet(np.ones(4), shape).transpose(2, 0, 1).astype(np.float32)
    settings = {"iterations": 4, "gaussian": (2, 1.5), "bilateral": (11, 40, 3)}
    refined = dense_crf(image, prob, **settings, exclusive=True)
    assert np.abs(refined - peer(image, prob, **settings)).max() < 1e-4
    assert np.abs(refined.sum(0) - 1).max() < 1e-5


@pytest.mark.parametrize("name, points, tolerance", [
    ("gaussian 3", lambda image: _positions(*image.shape[:2], 3), 0.03),
    ("bilateral 80/13", lambda image: _features(image, 80, 13), 0.12),
    ("bilateral 67/3", lambda image: _features(image, 67, 3), 0.15)])
def test_the_filter_is_near_the_exact_sum_over_all_pairs(name, points, tolerance):
    image = np.ascontiguousarray(skimage.data.astronaut()[20:220:5, 150:350:5])
    features = points(image)
    y, x = np.mgrid[:40, :40]
    mask = (np.hypot(y - 18, x - 22) < 11).astype(np.float32).ravel()
    lattice = build_lattice(features, len(mask))
    squares = (features ** 2).sum(0)
    kernel = np.exp(-np.maximum(squares[:, None] + squares - 2 * features.T @ features, 0) / 2)
    scale = 1 / np.sqrt(kernel.sum(1))
    exact = scale * (kernel @ (scale * mask))
    assert np.linalg.norm(lattice.filter(mask) - exact) < tolerance * np.linalg.norm(exact)


def test_weights_are_barycentric_and_the_spatial_lattice_is_kept():
    ones = np.ones(40 * 50, np.float32)
    lattice = _spatial_lattice(40, 50, 3.0)
    assert _spatial_lattice(40, 50, 3.0) is lattice
    share = lattice.slice.multiply(1 / lattice.slice.sum(1)[:, None]).tocsr()  # without the normalisation
    assert lattice.slice.data.min() >= 0 and np.allclose(share @ np.ones(share.shape[1]), ones)
    assert [abs(blur - blur.T).max() for blur in lattice.blurs] == [0, 0, 0]


def test_masks_are_independent_binary_problems():
    image, prob = photo("coffee")
    masks = np.stack([prob, 1 - prob, prob ** 2, *np.repeat(prob[None] / 3, 7, 0)])  # more than go through at once
    together = dense_crf(image, masks)
    for i in (0, 2, 9):
        assert np.abs(dense_crf(image, masks[i:i + 1])[0] - together[i]).max() < 1e-5
        both = dense_crf(image, np.stack([1 - masks[i], masks[i]]), exclusive=True)
        assert np.abs(both[1] - together[i]).max() < 1e-5
    assert np.abs(together[0] + together[1] - 1).max() < 1e-4


@pytest.mark.parametrize("exclusive", [False, True])
def test_tensors_have_the_same_answer(exclusive):
    """On the CPU by the same products; the road that a GPU's tensors take is gone here with the CPU's."""
    image, prob = photo("chelsea")
    masks = np.stack([prob, 1 - prob, prob / 2])
    expected, tensor = dense_crf(image, masks, exclusive=exclusive), torch.from_numpy(masks)
    for given in (tensor, tensor.double(), tensor.clone().requires_grad_()):
        refined = dense_crf(torch.from_numpy(image), given, exclusive=exclusive)
        assert refined.dtype == torch.float32 and torch.equal(refined, torch.from_numpy(expected))
    assert dense_crf(image, tensor.bfloat16(), exclusive=exclusive).dtype == torch.float32
    kernels = [(_spatial_lattice(*prob.shape, 3.0), 3.0), (build_lattice(_features(image, 80.0, 13.0), prob.size), 10.0)]
    refined = _on_device(_exclusive if exclusive else _binary, tensor, kernels, 10)
    assert refined.shape == masks.shape and refined.is_contiguous() and np.abs(refined.numpy() - expected).max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_gpu_has_the_same_answer(exclusive):
    image, prob = photo("chelsea")
    masks = np.stack([prob, 1 - prob, prob / 2])
    refined = dense_crf(image, torch.from_numpy(masks).cuda(), exclusive=exclusive)
    assert refined.is_cuda and np.abs(refined.cpu().numpy() - dense_crf(image, masks, exclusive=exclusive)).max() < 1e-4


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("k, height, width", [(0, 4, 5), (1, 1, 1), (2, 1, 1), (3, 2, 7), (200, 9, 8)])
def test_small_and_large_cases(k, height, width, exclusive, kind):
    image = np.full((height, width, 3), 77, np.uint8)  # one colour
    prob = kind(np.tile(np.linspace(0, 1, width, dtype=np.float32), (k, height, 1)))
    refined = np.asarray(dense_crf(image, prob, exclusive=exclusive))
    assert refined.shape == (k, height, width) and np.isfinite(refined).all()
    assert ((refined >= 0) & (refined <= 1)).all()


def test_what_everybody_agrees_on_stays_and_certainty_can_be_outvoted():
    image, prob = photo("coffee")
    assert (dense_crf(image, np.full((1, *prob.shape), 0.5, np.float32)) == 0.5).all()
    assert np.abs(dense_crf(image, prob[None], iterations=0)[0] - prob).max() < 1e-5
    assert np.abs(dense_crf(image, prob[None], gaussian=(3, 0), bilateral=(80, 13, 0))[0] - prob).max() < 1e-5
    hard = np.zeros((1, 30, 30), np.float32)
    hard[0, 15, 15] = 1
    assert dense_crf(np.zeros((30, 30, 3), np.uint8), hard).max() < 0.5


IMAGE, PROB = np.zeros((4, 5, 3), np.uint8), np.full((1, 4, 5), 0.5, np.float32)


@pytest.mark.parametrize("image, prob, settings, message", [
    (IMAGE[..., 0], PROB, {}, "image must be"), (IMAGE / 255, PROB, {}, "image must be uint8"),
    (IMAGE[:0], PROB[:, :0], {}, "not empty"), (IMAGE, PROB[0], {}, r"prob must be \(K, 4, 5\)"),
    (IMAGE, PROB.transpose(0, 2, 1), {}, "prob must be"), (IMAGE, [0.5], {}, "prob must be"),
    (IMAGE, PROB * np.nan, {}, "probabilities"), (IMAGE, PROB - 1, {}, "probabilities"), (IMAGE, PROB * 9, {}, "0..1"),
    (IMAGE, PROB, {"iterations": -1}, "iterations"), (IMAGE, PROB, {"iterations": 2.5}, "iterations"),
    (IMAGE, PROB, {"gaussian": (3,)}, "gaussian is"), (IMAGE, PROB, {"bilateral": (80, 0, 10)}, "positive"),
    (IMAGE, PROB, {"gaussian": (3, -1)}, "negative"), (IMAGE, PROB, {"bilateral": (80, np.nan, 10)}, "positive"),
    (IMAGE, PROB, {"bilateral": (1e-9, 13, 10)}, "too small"),
    (np.repeat(IMAGE + np.arange(0, 200, 40, dtype=np.uint8)[:, None], 2, 0)[:4], PROB,
     {"bilateral": (1e-3, 1e-2, 10)}, "too small")])
def test_wrong_input_is_named(image, prob, settings, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(image, prob, **settings)
