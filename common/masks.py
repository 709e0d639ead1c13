"""Masks, run-length codes (RLE) and polygons, checked before pycocotools' C code sees them; class maps.

pycocotools trusts what it is given: run lengths that do not fill the image return uninitialised memory or never
end, a NaN or a far coordinate ends the process. So everything that comes from a file passes `check_rle` or
`from_polygons`, and the C code only ever sees codes that fill their image exactly.

The format is COCO's: runs go down the columns, background first; the compressed string writes each run as a signed
number in groups of five bits, least significant first (characters '0' to 'o', the sixth bit says "goes on"), from
the fourth run on as the difference to the run two before.
"""
import io

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from common.config import UserError, write_bytes

MAX_PIXELS = 2 ** 28     # of one image: 16,384 x 16,384
MAX_SIDE = 2 ** 16       # JPEG's own limit; bounds what rasterising a polygon allocates
UNDECIDED = 255          # of a class map: no class, and not the background either
MAX_OUTLINE = 10 ** 7    # pixels along one polygon's outline; pycocotools allocates 40 bytes for each


def _size(size):
    """(height, width) of an RLE, as Python integers; ValueError if they are not those of an image."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError("an RLE's size must be [height, width]")
    return check_size(*size)


def check_size(height, width):
    """Return (height, width) as integers; ValueError unless both are in 1..MAX_SIDE with at most MAX_PIXELS pixels."""
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            raise ValueError("height and width must be integers")
        if not 0 < side <= MAX_SIDE:
            raise ValueError(f"height and width must lie between 1 and {MAX_SIDE}")
    if int(height) * int(width) > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are more than {MAX_PIXELS}")
    return int(height), int(width)


def _runs(text, limit=np.inf):
    """Run lengths (N,) int64 in a compressed string (bytes); ValueError if it is none, or over `limit` characters."""
    if not text:
        raise ValueError("the RLE has no runs")
    if len(text) > limit:
        raise ValueError("the RLE has more runs than the image has pixels")
    code = np.frombuffer(text, np.uint8) - np.uint8(48)         # below '0' wraps round to above 63
    if code.max() > 63:
        raise ValueError("the RLE holds a character that no RLE has")
    ends = np.flatnonzero(code < 32)
    if not len(ends) or ends[-1] != len(code) - 1:
        raise ValueError("the RLE is cut short")
    starts = np.empty_like(ends)
    starts[0] = 0
    starts[1:] = ends[:-1] + 1
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("the RLE holds a run longer than any image")
    if len(ends) == len(code):                                  # every number fits one character
        values = (code & 31).astype(np.int64)
    else:
        shift = 5 * (np.arange(len(code)) - np.repeat(starts, lengths))
        values = np.add.reduceat((code & 31).astype(np.int64) << shift, starts)
    values -= ((code[ends] & 16) > 0).astype(np.int64) << (5 * lengths)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _checked(rle, height, width):
    """(runs (N,) int64, height, width, tidy) of any RLE, where `tidy` says that its string can stay; or ValueError."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError("an RLE must have size and counts")
    h, w = _size(rle["size"])
    if (height is not None and h != height) or (width is not None and w != width):
        raise ValueError(f"the RLE is {h} high and {w} wide, its image {height} and {width}")
    counts = rle["counts"]
    if isinstance(counts, str):
        if not counts.isascii():
            raise ValueError("the RLE holds a character that no RLE has")
        counts = counts.encode("ascii")
    if isinstance(counts, bytes):
        runs, tidy = _runs(counts, 7 * (h * w + 1)), True
    elif isinstance(counts, (list, tuple)):
        if not counts or len(counts) > h * w + 1:
            raise ValueError("the RLE has no runs, or more than the image has pixels")
        if any(type(run) is not int or not 0 <= run <= h * w for run in counts):
            raise ValueError("the RLE holds a run that is no length within the image")
        runs, tidy = np.array(counts, np.int64), False
    else:
        raise ValueError("an RLE's counts must be a string or a list")
    if len(runs) > h * w + 1 or runs.min() < 0:
        raise ValueError("the RLE has a negative run, or more runs than the image has pixels")
    total = int(runs.sum())
    if total != h * w:
        raise ValueError(f"the RLE's runs add up to {total}, its image has {h * w} pixels")
    if len(runs) > 1 and runs[1:].min() == 0:                   # an inner run of none makes pycocotools stop early
        runs, tidy = _from_flat(_flat(runs)), False
    return runs, h, w, tidy


def _flat(runs):
    """Pixels (H*W,) bool in column order from run lengths."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _from_flat(flat):
    """Run lengths of pixels (H*W,) bool in column order; only the first may be 0."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    return np.concatenate([[0], runs]) if flat[0] else runs


def _text(rle):
    """pycocotools' RLE with its counts as str, so that JSON can hold it."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def check_rle(rle, height=None, width=None):
    """Return `rle` as {"size": [h, w], "counts": compressed str}, safe for pycocotools.

    rle: {"size": [h, w], "counts": compressed str or bytes, or a list of run lengths}. With `height` and `width`
    the size must be that one. Raises ValueError (one sentence) unless the size is an image's, no run is negative
    and the runs add up to exactly h*w.
    """
    runs, h, w, tidy = _checked(rle, height, width)
    if tidy:
        counts = rle["counts"]
        return {"size": [h, w], "counts": counts if isinstance(counts, str) else counts.decode("ascii")}
    return _text(coco.frPyObjects({"size": [h, w], "counts": runs.tolist()}, h, w))


def encode(mask):
    """RLE of a mask (H,W), bool or 0/1. Raises ValueError for another shape."""
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask must be (height, width), not of shape {mask.shape}")
    check_size(*mask.shape)
    return _text(coco.encode(np.asfortranarray(mask != 0).view(np.uint8)))


def decode(rle, checked=False):
    """Mask (H,W) bool of an RLE, in column order in memory. Raises ValueError as `check_rle` does.

    `checked`: the RLE came from this module, so only its string is read. (Several times as fast as pycocotools'
    decode, which goes pixel by pixel; the same pixels.)
    """
    if checked:
        (h, w), runs = rle["size"], _runs(rle["counts"].encode("ascii"))
    else:
        runs, h, w, _ = _checked(rle, None, None)
    return _flat(runs).reshape(w, h).T


def area(rle, checked=False):
    """Number of foreground pixels of an RLE."""
    return int(coco.area(rle if checked else check_rle(rle)))


def bbox(rle, checked=False):
    """Tight box [x, y, w, h] (pixels, whole numbers) around an RLE's foreground; zeros for an empty mask."""
    return coco.toBbox(rle if checked else check_rle(rle)).tolist()


def from_polygons(polygons, height, width, margin=None):
    """RLE of the union of polygons by COCO's own rasterisation (pycocotools frPyObjects, then merge).

    polygons: list of lists [x0, y0, x1, y1, ...] in pixels. A coordinate may lie outside the image by at most
    `margin` pixels (default: one image size). Raises ValueError naming the value otherwise, and for lists that
    are no polygons: fewer than 6 numbers, an odd number of them, something that is not a finite number.
    """
    height, width = check_size(height, width)
    if not isinstance(polygons, (list, tuple)) or not polygons:
        raise ValueError("a segmentation must be a list of polygons, and not an empty one")
    return _text(coco.merge(coco.frPyObjects([_polygon(points, height, width, margin) for points in polygons],
                                             height, width)))


def _polygon(points, height, width, margin):
    """One polygon's numbers as a list of floats, or ValueError."""
    if not isinstance(points, (list, tuple)):
        raise ValueError("a polygon must be a list of numbers")
    if len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon must have an even count of at least 6 numbers, not {len(points)}")
    for value in points:
        if type(value) is not float and type(value) is not int:
            raise ValueError(f"a polygon holds a {type(value).__name__} where a number should stand")
        if not abs(value) < 1e9:                                # false for NaN
            raise ValueError(f"a polygon holds the coordinate {float(value) if abs(value) < 1e300 else 'infinity'}"
                             if value == value else "a polygon holds the coordinate NaN")
    xy = np.array(points, np.float64).reshape(-1, 2)            # (N, 2)
    limit = np.array([width, height])
    over = np.maximum(-xy, xy - limit)                          # how far outside, per coordinate
    if (over > (limit if margin is None else margin)).any():
        worst = np.unravel_index(over.argmax(), over.shape)
        raise ValueError(f"a polygon's {'xy'[worst[1]]} coordinate {xy[worst]:g} lies outside the image "
                         f"of {width} x {height} pixels")
    outline = np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        raise ValueError(f"a polygon's outline is {outline:.0f} pixels long")
    return xy.ravel().tolist()


def from_segmentation(segmentation, height, width, margin=None):
    """RLE of a COCO segmentation: a list of polygons (see `from_polygons`) or an RLE (see `check_rle`)."""
    if isinstance(segmentation, dict):
        return check_rle(segmentation, height, width)
    return from_polygons(segmentation, height, width, margin)


def iou_boxes(a, b):
    """IoU of boxes [x, y, w, h] (last axis), broadcast: (...,4) and (...,4) -> (...); 0 where both are empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    inter = np.maximum(high - low, 0).prod(-1)
    union = np.maximum(a[..., 2:], 0).prod(-1) + np.maximum(b[..., 2:], 0).prod(-1) - inter
    return np.divide(inter, union, out=np.zeros(np.broadcast(inter, union).shape), where=union > 0)


def _palette():
    """(256,3) uint8: VOC's colours; the bits of a class's number, three by three, are the colours' bits from the highest."""
    numbers = np.arange(256)
    return np.stack([sum((numbers >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)],
                    1).astype(np.uint8)


PALETTE = _palette()


def save_map(path, values, palette=False):
    """Write (H,W) uint8 as a PNG, with VOC's colours if `palette`, whole or not at all. Raises UserError."""
    picture, buffer = Image.fromarray(values), io.BytesIO()
    if palette:
        picture.putpalette(PALETTE.ravel().tolist())
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def read_class_map(path, count):
    """A PNG in VOC's way as (H,W) uint8: 0 background, 1..count, UNDECIDED. Raises UserError for another picture."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise UserError(f"{path}: a picture of mode {picture.mode} is no class map; VOC's are palettes")
            check_size(picture.height, picture.width)
            return check_classes(np.array(picture), count, path)
    except FileNotFoundError:
        raise UserError(f"{path}: the class map is missing") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a class map that can be read ({str(error)[:100]})") from None


def check_classes(values, count, path):
    """An integer array (H,W) of a class map as uint8. Raises UserError where it holds another number."""
    wrong = np.setdiff1d(values, [*range(count + 1), UNDECIDED])
    if wrong.size:
        raise UserError(f"{path}: holds the class {wrong[0]}; there are 0 to {count}, and {UNDECIDED} for undecided pixels")
    return values.astype(np.uint8)
