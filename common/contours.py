"""Contours: a mask's outlines as polygons, points along them, and the mask and the box that points enclose.

Points are continuous, in pixels, whole numbers on pixel edges.
"""
import numpy as np
import torch
from skimage.measure import find_contours, label

from common import masks


def outlines(mask):
    """The outer contours of a mask (H,W): a list of (n,2) polygons in x and y, clockwise as seen, the largest first.

    scikit-image's marching squares serve: their vertices at half pixels lie on the edges between foreground and background
    (a border follower's lie on the centres of border pixels and lose half a pixel all round), and the foreground is on a
    fixed side of them, which tells outlines from holes. Pixels that touch at a corner are one part.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    cut = np.pad(mask[top:rows[-1] + 1, left:columns[-1] + 1].astype(np.float32), 1)
    found = [contour[:-1, ::-1] + [left - 0.5, top - 0.5] for contour in find_contours(cut, 0.5, fully_connected="high")]
    signed = [(area(contour), contour) for contour in found]
    return [contour for size, contour in sorted(signed, key=lambda pair: -pair[0]) if size > 0]


def area(polygon):
    """Signed area of a polygon (n,2), positive where it goes clockwise as seen, y pointing down."""
    x, y = polygon.T
    return 0.5 * float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())


def parts(mask):
    """The connected parts of a mask (H,W), as masks (n,H,W); pixels that touch at a corner are one part."""
    numbered = label(mask, connectivity=2)
    return numbered == np.arange(1, numbered.max() + 1)[:, None, None]


def trace(mask, contour, direction="clockwise"):
    """One closed contour (n,2) of a mask from the leftmost of its topmost vertices, `clockwise` or `anticlockwise` as seen; None
    where the mask is empty."""
    found = outlines(mask)
    if not found:
        return None
    line = found[0]
    rest = found[1:] if contour == "bridge" else []
    while rest:  # walk to the nearest part, once round it, and back the same way
        gaps = [np.square(line[:, None] - part[None]).sum(-1) for part in rest]
        k = min(range(len(rest)), key=lambda i: gaps[i].min())
        i, j = np.unravel_index(gaps[k].argmin(), gaps[k].shape)
        part = np.roll(rest.pop(k), -j, axis=0)
        line = np.concatenate([line[:i + 1], part, part[:1], line[i:]])
    line = np.roll(line, -np.lexsort((line[:, 0], line[:, 1]))[0], axis=0)
    return line if direction == "clockwise" else np.roll(line[::-1], 1, axis=0)


def sample(line, count, sampling):
    """Points of a closed contour (n,2), its first one first: `count` of them, equally far apart along it (`uniform`), or every
    ceil(n/count)-th of its vertices (`stride`), at most `count`."""
    if sampling == "stride":
        return line[::-(-len(line) // count)]
    closed = np.concatenate([line, line[:1]])
    along = np.concatenate([[0], np.sqrt(np.square(np.diff(closed, axis=0)).sum(1)).cumsum()])
    at = np.arange(count) * along[-1] / count
    return np.stack([np.interp(at, along, closed[:, 0]), np.interp(at, along, closed[:, 1])], 1)


def rasterise(points, height, width):
    """The mask (height,width) that points (P,2) enclose, rows of NaN left out: nothing for one point or none, the box between
    two, the polygon of more."""
    points = points[np.isfinite(points).all(1)].astype(float)
    if len(points) < 2:
        return np.zeros((height, width), bool)
    if len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return masks.decode(masks.from_polygons([points.ravel().tolist()], height, width), checked=True)


def boxes_round(points):
    """xyxy boxes (E,4) round points (E,P,2), NaN left out; zeros for fewer than two points."""
    missing = points.isnan()
    low, high = points.masked_fill(missing, torch.inf).amin(1), points.masked_fill(missing, -torch.inf).amax(1)
    several = ((~missing).all(2).sum(1) > 1)[:, None]
    return torch.where(several, torch.cat([low, high], 1), 0.0)
