"""Dense CRF: mean field with Gaussian edges between all pixels (Krähenbühl and Koltun, NeurIPS 2011).

The Gaussian filters run on a permutohedral lattice (Adams, Baek and Davis, 2010) that is held as sparse
matrices: splat S, one blur [1/2 1 1/2] for each of the d+1 axes, slice S'. A filter is their product, so
all masks of an image are columns of one right-hand side and the lattice is built once for them.

Two Potts labels need only one column. With `t = 2q - 1 = tanh(logit / 2)` the mean field of foreground
against background is `logit = unary + sum_k w_k K_k t`, exactly; K_k is the filter after the symmetric
normalisation N K N, N = diag(1 / sqrt(K 1)), that is pydensecrf's default.
"""
import warnings
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

import numpy as np
from scipy import sparse

# The two sets of constants that the field uses; DeepLab's are those of its second version on VOC.
PRESETS = {
    "krahenbuhl": {"iterations": 10, "gaussian": (3, 3), "bilateral": (80, 13, 10)},
    "deeplab": {"iterations": 10, "gaussian": (1, 3), "bilateral": (67, 3, 4)},
}
CLIP = 1e-5  # a probability of 0 or 1 would be a unary that no neighbour can outvote
COLUMNS = 8  # masks filtered at once: more of them fall out of the cache
_KEY_LIMIT = 2 ** 62  # int64
_FEATURE_LIMIT = 2 ** 16  # float32 leaves a fraction of 7 bits beyond it
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing


def dense_crf(image, prob, iterations=10, gaussian=(3, 3), bilateral=(80, 13, 10), exclusive=False):
    """Refine masks by mean field; all masks of one image share one lattice.

    image: uint8 (H, W, 3), RGB. prob: (K, H, W) in 0..1, numpy or a torch tensor; the result is float32 of the same
    kind, shape and device. `gaussian` is (sigma_xy, weight), `bilateral` is (sigma_xy, sigma_rgb, weight), sigmas in
    pixels and in grey levels of 0..255; a weight of 0 leaves a kernel out. Without `exclusive` the K masks are K
    independent foregrounds against their own background; with it they are one distribution over K labels (a
    background among them), normalised here. Lattices are built on the CPU; of a tensor on a GPU the mean field runs there.
    Takes some 600 bytes of memory a pixel, and 8 more for each mask. Raises ValueError for other shapes, types, ranges and
    for values that are not finite.
    """
    image = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image must be uint8 (H, W, 3) and not empty, not {image.dtype} {image.shape}")
    shape = tuple(getattr(prob, "shape", ()))
    if len(shape) != 3 or shape[1:] != image.shape[:2]:
        raise ValueError(f"prob must be (K, {image.shape[0]}, {image.shape[1]}) like the image, not {shape}")
    if not isinstance(iterations, Integral) or iterations < 0:
        raise ValueError(f"iterations must be a whole number >= 0, not {iterations!r}")
    if len(gaussian) != 2 or len(bilateral) != 3:
        raise ValueError("gaussian is (sigma_xy, weight) and bilateral is (sigma_xy, sigma_rgb, weight), "
                         f"not {gaussian!r} and {bilateral!r}")
    sigmas, weights = [float(gaussian[0]), *map(float, bilateral[:2])], [float(gaussian[1]), float(bilateral[2])]
    if not (np.isfinite(sigmas + weights).all() and min(sigmas) > 0 and min(weights) >= 0):
        raise ValueError(f"sigmas must be positive and weights not negative: {gaussian!r}, {bilateral!r}")
    if shape[0] and not (prob.min() >= -1e-3 and prob.max() <= 1 + 1e-3):  # resampling may overshoot a little
        raise ValueError("prob must hold probabilities in 0..1, without NaN")

    pixels = shape[1] * shape[2]
    kernels = [(_spatial_lattice(*shape[1:], sigmas[0]), weights[0])] if weights[0] else []
    if weights[1]:
        kernels.append((build_lattice(_features(image, *sigmas[1:]), pixels), weights[1]))
    field = _exclusive if exclusive else _binary
    if not isinstance(prob, np.ndarray):
        import torch  # only a caller that holds a tensor pays for this import
        if prob.device.type != "cpu":
            return _on_device(field, prob, kernels, iterations)
    host = prob if isinstance(prob, np.ndarray) else prob.detach().float().numpy()  # scipy's products are faster than torch's
    columns = np.ascontiguousarray(host.astype(np.float32).reshape(shape[0], pixels).T)
    refined = np.ascontiguousarray(field(np, columns, kernels, iterations).T).reshape(shape)
    return refined if host is prob else torch.from_numpy(refined)


def _on_device(field, prob, kernels, iterations):
    """`field` of a tensor (K,H,W) where it lies -> (K,H,W); kernels: [(Lattice of numpy's, weight)]."""
    import torch
    with torch.no_grad():
        kernels = [(lattice.torch(prob.device), weight) for lattice, weight in kernels]
        columns = prob.float().flatten(1).T.contiguous()
        return field(torch, columns, kernels, iterations).T.reshape(prob.shape).contiguous()


# ---- mean field ---------------------------------------------------------------------------------------------


def _binary(xp, prob, kernels, iterations):
    """K foregrounds, each against its background: prob (N, K) -> (N, K); `xp` is numpy or torch."""
    refined = xp.empty_like(prob)
    for first in range(0, prob.shape[1], COLUMNS):
        part = prob[:, first:first + COLUMNS]
        unary = (xp.log(part.clip(CLIP, 1)) - xp.log((1 - part).clip(CLIP, 1))) / 2
        t = xp.tanh(unary)
        for _ in range(iterations):
            half = unary  # of the logit
            for lattice, weight in kernels:
                half = half + (weight / 2) * lattice.filter(t)
            t = xp.tanh(half)
        refined[:, first:first + COLUMNS] = (1 + t) / 2
    return refined


def _exclusive(xp, prob, kernels, iterations):
    """One distribution over the K columns: prob (N, K) -> (N, K) with rows that sum to 1."""
    if prob.shape[1] == 0:
        return prob
    unary = xp.log(prob.clip(CLIP, 1))
    q = _softmax(xp, unary)
    for _ in range(iterations):
        logit = unary
        for lattice, weight in kernels:
            logit = logit + weight * lattice.filter(q)
        q = _softmax(xp, logit)
    return q


def _softmax(xp, logit):
    e = xp.exp(logit - xp.amax(logit, 1)[:, None])
    return e / e.sum(1)[:, None]


# ---- the lattice --------------------------------------------------------------------------------------------


class Lattice(NamedTuple):
    """A Gaussian filter with symmetric normalisation, as sparse matrices over M lattice vertices."""
    splat: object  # (M, N), d+1 entries a pixel
    blurs: list  # d+1 times (M, M)
    slice: object  # (N, M)

    def filter(self, x):
        """(N, K) -> (N, K)."""
        x = self.splat @ x
        for blur in self.blurs:
            x = blur @ x
        return self.slice @ x

    def torch(self, device):
        """The same matrices as torch's CSR tensors on `device`."""
        import torch

        def convert(matrix):
            matrix = matrix.tocsr()
            return torch.sparse_csr_tensor(torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices),
                                           torch.from_numpy(matrix.data), matrix.shape, device=device,
                                           check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return Lattice(convert(self.splat), [convert(blur) for blur in self.blurs], convert(self.slice))


@lru_cache(maxsize=8)
def _spatial_lattice(height, width, sigma):
    """The lattice of the pixel positions; it depends on the size alone, and a data set has few sizes."""
    return build_lattice(_positions(height, width, sigma), height * width)


def _positions(height, width, sigma):
    """x / sigma and y / sigma of every pixel: float32 (2, H*W)."""
    grid = np.empty((2, height, width), np.float32)
    grid[0] = np.arange(width, dtype=np.float32) / np.float32(sigma)
    grid[1] = np.arange(height, dtype=np.float32)[:, None] / np.float32(sigma)
    return grid.reshape(2, -1)


def _features(image, sigma_xy, sigma_rgb):
    """Position and colour of every pixel, each over its sigma: float32 (5, H*W), padded with zeros to blocks of four.

    The authors' code pads so, and the vertices round that black point at the origin carry the blur of dark pixels.
    """
    pixels = image.shape[0] * image.shape[1]
    features = np.zeros((5, pixels + -pixels % 4), np.float32)
    features[:2, :pixels] = _positions(*image.shape[:2], sigma_xy)
    features[2:, :pixels] = image.reshape(pixels, 3).T / np.float32(sigma_rgb)
    return features


def build_lattice(features, count):
    """The lattice of N points for unit variance: features float32 (d, N or more) -> Lattice of the first N = `count`.

    Points are lifted to d+1 coordinates E of sum zero, in units of d+1 (Adams et al.). With cell = round(E) and the
    remainders E - cell sorted downwards, t_0 >= ... >= t_d, the simplex of a point is a walk that starts at `cell`,
    shifted to sum zero, and takes one step along the axis of t_0, then of t_1, and so on; its barycentric weights
    are 1 - t_0 + t_d, t_0 - t_1, ..., t_(d-1) - t_d. The blur goes one such step to either side of a vertex. Raises
    ValueError where the points lie so far apart that numbers run out.
    """
    d, n = features.shape
    too_fine = "a sigma is too small: the lattice of this image is too fine for its numbers"
    if features.max() > _FEATURE_LIMIT:
        raise ValueError(too_fine)
    lifted = np.empty((d + 1, n), np.float32)
    tail = np.zeros(n, np.float32)
    for j in range(d, 0, -1):
        scaled = features[j - 1] * np.float32(np.float32(np.sqrt(2 / 3) * (d + 1)) / np.sqrt(j * (j + 1)))
        lifted[j] = tail - j * scaled
        tail += scaled
    lifted[0] = tail
    cell = np.rint(lifted * np.float32(1 / (d + 1)))
    lifted -= cell * (d + 1)

    # d - axis rides in the three lowest bits of the remainder, so that minima and maxima sort both at once. Of equal
    # remainders (a column x = 0, black pixels) the lower axis goes first, as in the authors' code: vertices of weight
    # zero carry the blur on, so the choice shows in the result.
    order = (lifted * np.float32(2 ** 25)).astype(np.int32) << 3
    order |= np.arange(d, -1, -1, dtype=np.int32)[:, None]
    for last in range(d, 0, -1):
        for i in range(last):
            low = np.minimum(order[i], order[i + 1])
            np.maximum(order[i], order[i + 1], out=order[i])
            order[i + 1] = low
    weights = np.empty((n, d + 1), np.float32)
    weights[:, 0] = (d + 1 << 28) - (order[0] - order[d])
    weights[:, 1:] = (order[:-1] - order[1:]).T
    weights *= np.float32(2 ** -28 / (d + 1))

    # A vertex is one integer, linear in its first d coordinates, so that a step along an axis adds a constant.
    cell = cell.astype(np.int64)
    spans = [(d + 1) * (int(row.max()) - int(row.min()) + 6) for row in cell[:d]]
    strides = [1]
    for span in spans:
        strides.append(strides[-1] * span)
    if strides.pop() > _KEY_LIMIT:
        raise ValueError(too_fine)
    steps = np.array([(d + 1) * stride for stride in strides] + [0]) - sum(strides)
    keys = np.empty((d + 1, n), np.int64)
    keys[0] = steps @ cell
    for i in range(d):
        np.add(keys[i], steps[d - (order[i] & 7)], out=keys[i + 1])

    vertex, distinct = _number(keys.ravel())
    _, tables = _hash(distinct)
    blurs = [_blur(_find(distinct, tables, distinct + step)) for step in steps]
    weights, indices = weights[:count], np.ascontiguousarray(vertex.reshape(d + 1, n)[:, :count].T)
    ends = np.arange(0, count * (d + 1) + 1, d + 1, dtype=np.int32)
    slices = sparse.csr_array((weights.ravel(), indices.ravel(), ends), shape=(count, len(distinct)))
    mass = Lattice(slices.T, blurs, slices).filter(np.ones(count, np.float32))
    rows = slices.data.reshape(count, d + 1)
    rows /= np.sqrt(mass + np.float32(1e-20))[:, None]
    return Lattice(slices.T, blurs, slices)


def _number(keys):
    """Number int64 `keys` from 0: (number of each key, the M distinct keys)."""
    owner, _ = _hash(keys)
    first = np.flatnonzero(owner == np.arange(len(keys)))
    number = np.empty(len(keys), np.int32)
    number[first] = np.arange(len(first))
    return number[owner], keys[first]


def _hash(keys):
    """Hash tables over int64 `keys`: (position (n,) of one key equal to each, tables for `_find`).

    All keys are written at once and the last one written owns a slot; those that find another key there go on to the
    next, smaller table. This takes a quarter of the time that sorting them does.
    """
    owner, pending, tables = np.empty(len(keys), np.int64), np.arange(len(keys)), []
    while len(pending):
        left, bits = keys[pending], len(pending).bit_length()  # more slots than keys
        table = np.full(1 << bits, -1, np.int32)
        slot = _slots(left, len(tables), bits)
        table[slot] = pending
        taken = table[slot]
        owner[pending] = taken  # those of another key are put right by a later table
        tables.append((table, bits))
        pending = pending[np.flatnonzero(keys[taken] != left)]
    return owner, tables


def _find(keys, tables, wanted):
    """Position in `keys` of each `wanted` key, -1 for those not among them; `tables` as from `_hash(keys)`."""
    position = np.full(len(wanted), -1, np.int32)
    pending = np.arange(len(wanted))
    for number, (table, bits) in enumerate(tables):
        left = wanted[pending]
        taken = table[_slots(left, number, bits)]
        same = (keys[taken] == left) & (taken >= 0)
        position[pending[same]] = taken[same]
        pending = pending[~same & (taken >= 0)]  # an empty slot: no such key ever came here
    return position


def _slots(keys, number, bits):
    """Slot of int64 keys in a table of 2^bits: the upper bits of a product, with another factor for each table."""
    factor = np.uint64((_MIX * (2 * number + 1)) % 2 ** 64)
    return ((keys.view(np.uint64) * factor) >> np.uint64(64 - bits)).view(np.int64)


def _blur(up):
    """[1/2 1 1/2] along one axis, `up` (M,) the next vertex or -1: vertices that no pixel touches do not exist.

    A missing neighbour is the vertex itself with weight 0: rows of one length spare the product its mispredicted ends.
    """
    m = len(up)
    here = np.arange(m, dtype=np.int32)
    lower = np.flatnonzero(up >= 0)
    upper = up[lower]
    columns = np.repeat(here, 3).reshape(m, 3)
    columns[lower, 1] = upper
    columns[upper, 2] = lower
    data = (columns != here[:, None]).astype(np.float32) * np.float32(0.5)
    data[:, 0] = 1
    return sparse.csr_array((data.ravel(), columns.ravel(), np.arange(0, 3 * m + 1, 3, dtype=np.int32)), shape=(m, m))
