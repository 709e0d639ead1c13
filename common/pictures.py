"""Pictures: overlays, heat maps, points, boxes, contact sheets, curves, and one self-contained HTML report.

Arrays are uint8 RGB (H,W,3); masks boolean (H,W); heat maps and points are in the frame of the image they are drawn on.
The page asks the network for nothing, works offline, and escapes every text that comes from data; its content policy
allows one script, known by its digest. Needs numpy, scipy and PIL only.
"""
import base64
import colorsys
import hashlib
import html
import io
import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, maximum_filter

from common.config import UserError, write_bytes, write_text

TRUTH, PREDICTION, OTHER = (38, 166, 91), (232, 93, 36), (64, 120, 224)  # colours of the truth, ours, another run
GROUPS = ("worst", "middle", "best")
BUDGET = 5_200_000  # characters of embedded pictures; above it the next, coarser step of ENCODINGS is taken
ENCODINGS = ((360, 80), (320, 74), (280, 68), (240, 60), (180, 50))  # longest side in pixels, JPEG quality
RAMP = ((16, 5, 37), (55, 9, 70), (102, 14, 85), (150, 29, 84), (193, 59, 70), (223, 100, 50), (239, 148, 52),
        (242, 196, 102), (243, 239, 173))
MAX_TEXT, MAX_WORDS, MAX_CURVE = 300, 60, 400


def colours(t):
    """Perceptual colour map: t in 0..1 of any shape (...) -> uint8 RGB (...,3), dark violet to pale yellow.

    Its lightness (OKLab's L) grows linearly from 0.16 to 0.94, so that equal steps of t look equally large and survive
    a print in grey. Values outside 0..1 are clipped, NaN counts as 0.
    """
    t = np.nan_to_num(np.asarray(t, float), nan=0.0)
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(t, stops, channel) for channel in np.transpose(RAMP)], -1).round().astype(np.uint8)


def overlay(image, mask, colour=PREDICTION, alpha=0.45):
    """Tint a mask and draw a crisp outline around it.

    image uint8 (H,W,3), mask bool (H,W), colour RGB 0..255, alpha 0..1 the strength of the tint -> uint8 (H,W,3).
    Pixels of the mask are tinted; a ring just outside it, about 1/200 of the image's longer side wide, gets the plain
    colour; all others stay. ValueError when the shapes do not fit.
    """
    image, mask = _rgb(image), np.asarray(mask, bool)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"a mask of {mask.shape} does not lie on an image of {image.shape[:2]}")
    width = 2 * max(1, round(max(mask.shape) / 200)) + 1
    grown = maximum_filter(mask.view(np.uint8), width, mode="constant") > 0  # row by row: quick at any width
    out = image.copy()
    out[mask] = np.round(image[mask] * (1.0 - alpha) + np.array(colour, float) * alpha).astype(np.uint8)
    out[grown & ~mask] = colour
    return out


def heat(image, heat, limits=None):
    """Lay a heat map over a greyed photograph: image uint8 (H,W,3), heat float (h,w) of any range -> uint8 (H,W,3).

    The map covers the whole image and is resized to it bilinearly. `limits` (low, high) are the values of the first
    and last colour; by default the map's own finite extremes, and a constant map is then drawn as zero. NaN is zero.
    """
    image, heat = _rgb(image), np.asarray(heat, float)
    finite = heat[np.isfinite(heat)]
    low, high = limits if limits is not None else ((finite.min(), finite.max()) if finite.size else (0, 1))
    scale = 1 / (high - low) if high - low > 1e-30 else 0.0
    unit = np.clip(np.nan_to_num((np.clip(heat, low, high) - low) * scale, nan=0.0), 0, 1).astype(np.float32)
    size = (image.shape[1], image.shape[0])
    unit = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    grey = image @ np.array([0.299, 0.587, 0.114])
    strength = 0.45 + 0.4 * unit  # cold regions keep the photograph readable, hot ones show their colour
    return np.round(grey[..., None] * (1 - strength) + colours(unit[..., 0]) * strength).astype(np.uint8)


def draw_points(image, points, closed=True):
    """Draw a contour and the order of its points: a colour ramp from first (dark) to last (pale), and numbers from 1.

    image uint8 (H,W,3), points (P,2) as x, y in image pixels -> uint8 (H,W,3). `closed` joins the last to the first.
    Points that are not finite are left out; above 40 points only every P/20-th is numbered.
    """
    picture = Image.fromarray(_rgb(image).copy())
    points = np.asarray(points, float).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)].clip(-1e5, 1e5)
    draw, unit, count = ImageDraw.Draw(picture), max(picture.size) / 300, len(points)
    ramp = [tuple(c) for c in colours(np.linspace(0.35, 1, count)).tolist()]
    for casing in (True, False):
        for i in range(count if closed and count > 2 else count - 1):
            draw.line([*points[i], *points[(i + 1) % count]], "black" if casing else ramp[i],
                      max(1, round(1.4 * unit)) + 2 * casing)
    font, radius = ImageFont.load_default(max(8, round(10 * unit))), max(1.0, 2.8 * unit)
    for i, (x, y) in enumerate(points):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=ramp[i], outline="black")
        if i % max(1, math.ceil(count / 20) if count > 40 else 1) == 0:
            draw.text((x + radius, y - radius), str(i + 1), "white", font, "lb", stroke_width=max(1, round(unit / 2)),
                      stroke_fill="black")
    return np.array(picture)


def draw_boxes(image, boxes, labels=None, colour=PREDICTION):
    """Draw boxes (N,4) as x0, y0, x1, y1 in image pixels, with a text in each corner when `labels` (N,) are given.

    image uint8 (H,W,3) -> uint8 (H,W,3). Boxes that are not finite are left out; corners may come in any order.
    """
    picture = Image.fromarray(_rgb(image).copy())
    draw, unit = ImageDraw.Draw(picture), max(picture.size) / 300
    font = ImageFont.load_default(max(8, round(8 * unit)))
    for i, box in enumerate(np.asarray(boxes, float).reshape(-1, 4)):
        if np.isfinite(box).all():
            (x0, x1), (y0, y1) = sorted(box[::2].clip(-1e5, 1e5)), sorted(box[1::2].clip(-1e5, 1e5))
            draw.rectangle([x0, y0, x1, y1], outline=colour, width=max(1, round(unit)))
            if labels is not None:
                text = _clean(labels[i], 40)
                draw.rectangle(draw.textbbox((x0, y0), text, font), fill=colour)
                draw.text((x0, y0), text, "white", font)
    return np.array(picture)


def distinct(count):
    """`count` colours that are told apart with ease, the first ones best: a list of RGB 0..255."""
    hues = [(0.02 + 0.381966 * i) % 1 for i in range(count)]  # by the golden angle, each far from those before it
    return [tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, (0.5, 0.62, 0.4)[i // 7 % 3], 0.85))
            for i, hue in enumerate(hues)]


def numbered(image, masks, texts, side=900):
    """Masks in different colours, a number on each, and below the picture what each number says.

    image uint8 (H,W,3), masks (N,H,W) bool, texts (N,) -> uint8 (H',W',3). A picture whose longer side is below `side` is
    enlarged to it. Large masks are painted first; a number stands at the mask's inmost point, an empty mask has none.
    """
    image = _rgb(image)
    scale = max(1.0, side / max(image.shape[:2]))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    masks = np.asarray(masks, bool).reshape(-1, *image.shape[:2])
    large = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    colour = distinct(len(masks))
    for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        canvas = overlay(canvas, large[i], colour[i], 0.4)
    font = ImageFont.load_default(max(15, round(max(size) / 45)))
    radius, gap = round(font.size * 0.85), round(font.size * 0.5)
    letter = font.getlength("the small dog that sits between them") / 36  # a text's mean width of a letter
    columns = max(8, int((size[0] - 4 * gap - 2 * radius) / letter))
    lines = [textwrap.wrap(_clean(text), columns) or [""] for text in texts]
    heights = [max(2 * radius, round(1.25 * font.size) * len(of)) + gap for of in lines]
    sheet = Image.new("RGB", (size[0], size[1] + sum(heights) + gap * bool(len(lines))), "white")
    sheet.paste(Image.fromarray(canvas), (0, 0))
    draw, y = ImageDraw.Draw(sheet), size[1] + gap

    def badge(x, y, i):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour[i], "white", max(2, radius // 8))
        draw.text((x, y), str(i + 1), "white", font, "mm", stroke_width=2, stroke_fill="black")

    for i, (of, height) in enumerate(zip(lines, heights, strict=True)):
        badge(gap + radius, y + radius, i)
        draw.text((2 * gap + 2 * radius, y + (radius if len(of) == 1 else 0)), "\n".join(of), (20, 20, 20), font,
                  "lm" if len(of) == 1 else None)
        y += height
        if masks[i].any():  # the border counts as outside, so that a number stays on the picture
            row, column = np.unravel_index(distance_transform_edt(np.pad(masks[i], 1)).argmax(), np.add(masks[i].shape, 2))
            badge((column - 0.5) * scale, (row - 0.5) * scale, i)
    return np.array(sheet)


def tile(images, captions, columns=4, side=360):
    """A contact sheet: uint8 (H_i,W_i,3) images with a caption of at most two lines under each -> uint8 (H,W,3).

    images and captions (N,) of equal length; `columns` cells a row; `side`: images are shrunk to that many pixels
    (never enlarged). No image gives a small white sheet. PIL's own font knows Latin letters only.
    """
    font, gap = ImageFont.load_default(13), 10
    small = [_shrink(image, side) for image in images]
    width, across = max([120] + [picture.width for picture in small]), min(max(1, columns), max(1, len(small)))
    rows = [list(zip(small, captions, strict=True))[i:i + across] for i in range(0, len(small), across)]
    heights = [max(picture.height for picture, _ in row) + 44 for row in rows]
    sheet = Image.new("RGB", (gap + (width + gap) * across, gap + sum(heights)), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, caption) in enumerate(row):
            x = gap + column * (width + gap)
            sheet.paste(picture, (x, y))
            draw.text((x, y + picture.height + 3), "\n".join(textwrap.wrap(_clean(caption), width // 8, max_lines=2,
                      placeholder=" …")), (40, 40, 40), font)
        y += height
    return np.array(sheet)


def save(path, array):
    """Write uint8 (H,W,3) to a .png, .jpg or .webp file, whole or not at all. UserError when that cannot be done."""
    path, buffer = Path(path), io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"cannot write {path}: pictures are .png, .jpg or .webp files.")
    Image.fromarray(_rgb(array)).save(buffer, kind, **({} if kind == "PNG" else {"quality": 92}))
    write_bytes(path, buffer.getvalue())


def data_uri(array, quality=80, max_side=360):
    """uint8 (H,W,3) -> a JPEG as a `data:` address; JPEG quality 1..95, longer side at most `max_side` pixels."""
    buffer = io.BytesIO()
    _shrink(array, max_side).save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve_svg(series, title, x_label, y_label, log_y=False):
    """Curves as inline SVG for a page of `page`, which gives it light and dark colours.

    series: {name: [(x, y), …]}; pairs with a value that is missing, not finite or beyond 1e30 are left out. log_y: a
    logarithmic axis, where all values are positive. A series of more than 400 points is drawn by the means of 400 runs of neighbours. The legend shows
    each series' last value. Without any point the axes say so.
    """
    lines = {_clean(name, 40): _points(points) for name, points in series.items()}
    every = [point for points in lines.values() for point in points]
    log_y = log_y and all(y > 0 for _, y in every)
    place = math.log10 if log_y else float
    x_low, x_high = _range([x for x, _ in every], 0)
    y_low, y_high = _range([place(y) for _, y in every], 0.05)
    left, right, top, bottom = 46, 350, 42, 196
    at_x = lambda x: left + (right - left) * (x - x_low) / (x_high - x_low)
    at_y = lambda y: bottom - (bottom - top) * (place(y) - y_low) / (y_high - y_low)
    dim, legend, entry = "fill:var(--dim,#666)", [], 0
    parts = [_svg_text(4, 14, title, "font-weight:600;font-size:13px"), _svg_text(4, 31, y_label, dim),
             _svg_text(right, 229, x_label, dim, "end")]
    for y in _log_ticks(y_low, y_high) if log_y else _ticks(y_low, y_high):
        parts.append(f'<path d="M{left} {at_y(y):.1f}H{right}" style="stroke:var(--line,#ddd)"/>'
                     + _svg_text(left - 5, at_y(y) + 4, f"{y:,.6g}", dim, "end"))
    for x in _ticks(x_low, x_high):
        anchor = "end" if at_x(x) > right - 15 else "middle"
        parts.append(f'<path d="M{at_x(x):.1f} {bottom}v4" style="stroke:var(--dim,#666)"/>'
                     + _svg_text(at_x(x), bottom + 16, f"{x:,.6g}", dim, anchor))
    parts.append(f'<path d="M{left} {bottom}H{right}" style="stroke:var(--dim,#666)"/>')
    if not every:
        parts.append(_svg_text((left + right) / 2, (top + bottom) / 2, "no data", dim, "middle"))
    cursor, row = 4, 0
    for name, points in lines.items():
        colour, dashes = f"var(--s{entry % 6},#0b6b75)", ";stroke-dasharray:5 3" if entry >= 6 else ""
        style = f"stroke:{colour};stroke-width:1.8;fill:none;stroke-linejoin:round{dashes}"
        drawn = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        if len(points) < 30:
            parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.4" style="fill:{colour}"/>'
                      for x, y in points]
        parts.append(f'<polyline points="{drawn}" style="{style}"/>')
        text = name + (f" {points[-1][1]:,.4g}" if points else " (no data)")
        needed = 32 + 6.3 * len(text)
        if cursor + needed > 360 and cursor > 4:
            cursor, row = 4, row + 1
        legend.append(f'<path d="M{cursor} {246 + 16 * row}h16" style="{style}"/>'
                      + _svg_text(cursor + 21, 250 + 16 * row, text, ""))
        cursor, entry = cursor + needed, entry + 1
    return (f'<svg viewBox="0 0 360 {260 + 16 * row}" role="img" aria-label="{_h(title)}" style="font:11px system-ui,'
            f'sans-serif;fill:var(--ink,#222);font-variant-numeric:tabular-nums">{"".join(parts + legend)}</svg>')


def dots_svg(rows, title, x_label):
    """Rows of measured values as inline SVG for a page of `page`: a dot for each value, a bar at their mean, and a
    hollow diamond at a published figure.

    rows: (label, values, published or None). A row without values or figure stays empty.
    """
    every = [value for _, values, published in rows for value in (*values, published) if _is_finite(value)]
    low, high = _range(every, 0.08)
    left, right, top, step = 130, 350, 26, 17
    bottom = top + step * len(rows)
    at = lambda x: left + (right - left) * (x - low) / (high - low)
    dim = "fill:var(--dim,#666)"
    parts = [_svg_text(4, 14, title, "font-weight:600;font-size:13px"), _svg_text(right, bottom + 32, x_label, dim, "end")]
    for x in _ticks(low, high) if every else ():
        parts.append(f'<path d="M{at(x):.1f} {top}V{bottom}" style="stroke:var(--line,#ddd)"/>'
                     + _svg_text(at(x), bottom + 15, f"{x:,.6g}", dim, "middle"))
    for i, (label, values, published) in enumerate(rows):
        y = top + step * (i + 0.5)
        parts.append(_svg_text(left - 8, y + 4, label if len(label) < 21 else label[:19] + "…", "", "end"))
        parts += [f'<circle cx="{at(value):.1f}" cy="{y:.1f}" r="3" style="fill:var(--s0,#0b6b75);fill-opacity:.6"/>'
                  for value in values]
        if values:
            parts.append(f'<path d="M{at(sum(values) / len(values)):.1f} {y - 6:.1f}v12" '
                         'style="stroke:var(--s0,#0b6b75);stroke-width:2"/>')
        if _is_finite(published):
            parts.append(f'<path d="M{at(published):.1f} {y - 5:.1f}l5 5l-5 5l-5-5z" '
                         'style="fill:none;stroke:var(--s1,#c2571a);stroke-width:1.5"/>')
    if not every:
        parts.append(_svg_text((left + right) / 2, (top + bottom) / 2, "not run", dim, "middle"))
    return (f'<svg viewBox="0 0 360 {bottom + 38}" role="img" aria-label="{_h(title)}" style="font:11px system-ui,'
            f'sans-serif;fill:var(--ink,#222);font-variant-numeric:tabular-nums">{"".join(parts)}</svg>')


def page(title, body, script=""):
    """A whole HTML document in the house's style. title: text; body: HTML, its texts already escaped; script: code.

    The content policy runs that script only, and loads nothing but `data:` pictures.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_h(title)}</title>\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>"
            + (f"<script>{script}</script>" if script else "") + "</body></html>\n")


def report(path, *, title, settings, summary, curves, cases, notes=(), command=""):
    """Write one self-contained HTML page: scores, breakdowns, curves, cases with pictures, settings, command.

    path: the file. title, command and notes (sentences above the scores): text. settings: {name: value}.
    summary: a dict per split as eval writes it; scores in percent or None. Any further number, or dict of numbers, gets
    a row of its own, and any dict of {name: {n, mIoU, oIoU}} a table of bars.
    curves: {title: {"series": {name: [(x, y)]}, "x": label, "y": label, optional "log": bool}}.
    cases: dicts with `text` and `panels` [(caption, uint8 (H,W,3))], and optionally group (worst, middle, best, or
    others), split, kind, iou in 0..1, CIDEr in 0..10, I and U in pixels, sent_id, ref_id, image_id, facts and references
    (lists of text), words [(word, [weight >= 0 per step])]. Equal panels are embedded once. All pictures together stay
    under BUDGET characters by coarser JPEG.
    Raises UserError when the file cannot be written.
    """
    sections = {"Scores": _scores(summary), "Breakdown": _breakdown(summary), "Curves": _curves(curves),
                "Cases": _cases(cases), "Settings": _settings(settings, summary, command)}
    sections = {name: text for name, text in sections.items() if text}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    body = f"<header><h1>{_h(title)}</h1><nav>{links}</nav></header>" \
        + "".join(f'<p class="note" dir="auto">{_h(note, 2000)}</p>' for note in notes) \
        + "".join(f'\n<section id="{name.lower()}"><h2>{name}</h2>{text}</section>' for name, text in sections.items())
    write_text(path, page(title, body, SCRIPT))


MEANINGS = {"mIoU": "mean of I / U", "oIoU": "sum of I / sum of U", "REC@0.5": "boxes, IoU ≥ 0.5",
            "control": "shuffled sentences", "pointing": "peak inside the mask", "CIDEr": "CIDEr-D, of at most 10",
            "METEOR": "of at most 1", "Rb-Acc": "found again by the listener, percent",
            "mean_references": "people's sentences an object", "no_proposal": "objects without a proposal",
            "N-acc": "no target: empty mask", "T-acc": "target: mask not empty"}
HEAD = ("mIoU", "oIoU", "CIDEr", "METEOR", "Rb-Acc")
COUNTS = ("n", "no_proposal", "images", "seconds")
TITLES = {"by_kind": "kind of sentence", "by_size": "size of the object", "by_length": "length of the sentence",
          "by_objects": "number of objects meant"}


def _scores(summary):
    """Two tables, a column per split and a row per score: the headline scores and counts, and Pr@X."""
    flat = [_flat(of_split) for of_split in summary]
    names = list(dict.fromkeys([*HEAD, *(key for row in flat for key in row if key not in COUNTS), *COUNTS]))
    common = [next(iter(values)) for values in _named(summary) if len(values) == 1]
    head, precision = "", ""
    for name in names:
        if any(name in row for row in flat):
            digits = {"seconds": 1, "CIDEr": 3, "METEOR": 3}.get(name, 2)
            cells = "".join(f"<td>{_number(row.get(name), digits)}</td>" for row in flat)
            kind = "head" if name in HEAD else "count" if name in COUNTS else ""
            meaning = MEANINGS.get(name.split(" ")[0], "")
            label = _h({"n": "sentences"}.get(name, name.replace("_", " "))) + (f"<small>{meaning}</small>" if meaning else "")
            row = f'<tr class="{kind}"><th scope="row">{label}</th>{cells}</tr>'
            head, precision = (head, precision + row) if name.startswith("Pr@") else (head + row, precision)
    unit = [] if any("CIDEr" in row for row in flat) else ["percent"]
    tables = [(" · ".join([*common, *unit]), head),
              ("Pr@X: share of sentences with IoU ≥ X, percent", precision)]
    return _grid([_table("scores", *of, summary) for of in tables if of[1]], summary)


def _flat(of_split):
    """The numbers of one summary by name; {"pointing": {"heat": 1}} becomes "pointing heat"."""
    out = {}
    for key, value in of_split.items():
        inner = value if isinstance(value, dict) and key != "settings" else {"": value}
        inner = {name: inner[name] for name in ("mIoU", "oIoU") if name in inner} if "mIoU" in inner else inner
        out |= {f"{key} {name}".strip(): number for name, number in inner.items()
                if number is None or (isinstance(number, (int, float, np.number)) and not isinstance(number, bool))}
    return out


def _named(summary):
    """The distinct datasets and the distinct tasks of the splits, in order."""
    return [dict.fromkeys(str(s[key]) for s in summary if s.get(key)) for key in ("dataset", "task")]


def _table(kind, caption, rows, summary):
    """A table with a column per split; its head names dataset and task only where they differ."""
    shown = [key for key, values in zip(("dataset", "task"), _named(summary), strict=True) if len(values) > 1]
    columns = "".join(f'<th scope="col">{_h(s.get("split", ""))}'
                      + "".join(f"<small>{_h(s.get(key, ''))}</small>" for key in shown) + "</th>" for s in summary)
    return f'<div class="scroll"><table class="{kind}"><caption>{_h(caption)}</caption><thead><tr><td></td>{columns}' \
        f"</tr></thead><tbody>{rows}</tbody></table></div>"


def _breakdown(summary):
    """A table of bars for every dict of groups: rows are groups, columns are splits."""
    keys = dict.fromkeys(key for s in summary for key, value in s.items() if key != "settings" and value
                         and isinstance(value, dict) and all(isinstance(of, dict) for of in value.values()))
    tables = []
    for key in keys:
        names, rows = dict.fromkeys(name for s in summary for name in s.get(key) or {}), ""
        for name in names:
            found = [(s.get(key) or {}).get(name) or {} for s in summary]
            rows += f'<tr><th scope="row">{_h(name)}</th>' + "".join(
                f'<td><b>{_number(of.get("mIoU"))}</b>{_bar(of.get("mIoU"))}'
                f'<small>oIoU {_number(of.get("oIoU"))}</small><small>n {_number(of.get("n"))}</small></td>'
                for of in found) + "</tr>"
        tables.append(_table("bars", f"mIoU by {TITLES.get(key, key[3:])}", rows, summary))
    return _grid(tables, summary)


def _grid(tables, summary):
    return tables and f'<div class="grid{" wide" if len(summary) > 4 else ""}">{"".join(tables)}</div>'


def _bar(percent):
    return f'<i class="bar"><i style="width:{percent if _is_finite(percent) else 0:.1f}%"></i></i>'


def _curves(curves):
    drawn = [curve_svg(c["series"], name, c.get("x", ""), c.get("y", ""), c.get("log", False))
             for name, c in curves.items()]
    return drawn and f'<div class="grid curves">{"".join(drawn)}</div>'


def _cases(cases):
    """The filter and the cards, grouped."""
    if not cases:
        return ""
    embed, facets = _embedder([array for case in cases for _, array in case["panels"]]), ""
    for facet in ("group", "split", "kind"):
        values = sorted({str(case[facet]) for case in cases if case.get(facet)}, key=lambda v: (_rank(v), v))
        chips = "".join(f'<label class="chip"><input type="checkbox" name="{facet}" value="{_h(value)}">'
                        f"<span>{_h(value)}</span></label>" for value in values)
        facets += f"<fieldset><legend>{facet}</legend>{chips}</fieldset>" if len(values) > 1 else ""
    present = [str(case.get("group") or "") for case in cases]
    order = sorted(dict.fromkeys(present), key=_rank)
    groups = "".join(f'\n<section class="group"><h3>{_h(name.capitalize())}</h3>'
                     + "".join(_card(case, embed) for case, of in zip(cases, present, strict=True) if of == name)
                     + "</section>" for name in order)
    return ('<form class="filter" role="search"><label>Filter by word <input type="search" autocomplete="off"></label>'
            f'{facets}<output aria-live="polite">{len(cases)} cases</output></form>{groups}')


def _rank(group):
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _card(case, embed):
    """One case as an article."""
    facts = [case.get("split"), case.get("kind")]
    facts += [f"{name[:-3]} {case[name]}" for name in ("sent_id", "ref_id", "image_id") if case.get(name) is not None]
    facts += [str(fact) for fact in case.get("facts", ())]
    facts += [f"I {_number(case['I'])} / U {_number(case['U'])} px"] if case.get("U") is not None else []
    badge = ""
    for name, key, most, digits in (("IoU", "iou", 1, 1), ("CIDEr", "CIDEr", 10, 2)):
        if _is_finite(case.get(key)):
            value = case[key] * (100 if key == "iou" else 1)
            badge = f'<p class="badge"><span>{name} <b>{value:.{digits}f}</b></span>{_bar(100 * case[key] / most)}</p>'
    panels = [f"<figure>{embed(array, caption)}<figcaption>{_h(caption, 80)}</figcaption></figure>"
              for caption, array in case["panels"]]
    shape = case["panels"][0][1].shape if panels else (1, 1)
    per_row = math.ceil(len(panels) / math.ceil(len(panels) / 6)) if panels else 1
    width = min(max(230 * shape[1] / shape[0], 90), 420)  # so that portraits do not tower over the other cards
    marks = "".join(f' data-{facet}="{_h(case[facet])}"' for facet in ("group", "split", "kind") if case.get(facet))
    return (f'\n<article class="case"{marks}>{badge}<p class="sentence" dir="auto">{_h(case.get("text", ""))}</p>'
            f'<p class="facts">{" · ".join(_h(fact, 60) for fact in facts if fact)}</p>'
            f'<div class="panels" style="--n:{per_row};--w:{width:.0f}px">{"".join(panels)}</div>'
            f'{_attention(case.get("words") or [])}{_references(case.get("references") or [])}</article>')


def _references(texts):
    """People's sentences about the same object, as a list."""
    items = "".join(f'<li dir="auto">{_h(text)}</li>' for text in texts[:30])
    return items and f'<ul class="references">{items}</ul>'


def _attention(words):
    """Words shaded by weight, a line per step; the darkest shade is the largest weight of all steps."""
    weights = [[float(w) if _is_finite(w) else 0.0 for w in of] for _, of in words[:MAX_WORDS]]
    most, lines = max([w for of in weights for w in of] + [1e-9]), ""
    steps = max([len(of) for of in weights] + [0])
    for step in range(steps):
        spans = "".join(f'<span style="--a:{max(0.0, of[step] / most):.2f}">{_h(word, 40)}<small>{of[step]:.2f}</small>'
                        "</span> " for (word, _), of in zip(words, weights) if step < len(of))
        lines += f'<p dir="auto">{f"<small>step {step + 1}</small> " if steps > 1 else ""}{spans}</p>'
    return lines and f'<div class="words">{lines}</div>'


def _embedder(arrays):
    """A function (array, alt) -> <img>: the first use of a picture carries its bytes, later ones name the first."""
    key = lambda array: (array.shape, hashlib.sha256(np.ascontiguousarray(array)).digest())
    unique = {key(array): array for array in arrays}
    for side, quality in ENCODINGS:
        coded = {name: data_uri(array, quality, side) for name, array in unique.items()}
        if sum(map(len, coded.values())) <= BUDGET:
            break
    number = {}

    def embed(array, alt):
        name = key(array)
        source = f'data-same="p{number[name]}"' if name in number else \
            f'id="p{number.setdefault(name, len(number))}" src="{coded[name]}"'
        height, width = array.shape[:2]
        return f'<img {source} alt="{_h(alt, 80)}" width="{width}" height="{height}" loading="lazy" decoding="async">'

    return embed


def _settings(settings, summary, command):
    """The settings and what made the page."""
    rows = "".join(f"<tr><th scope=\"row\">{_h(name)}</th><td>{_h(_plain(value))}</td></tr>"
                   for name, value in settings.items())
    used = dict.fromkeys(str(s["checkpoint"]) for s in summary if s.get("checkpoint"))
    made = (f"<p>Made by</p><pre>{_h(command, 4000)}</pre>" if command else "") \
        + "".join(f"<p>from the weights in <code>{_h(name)}</code></p>" for name in used)
    return made + (f'<details><summary>{len(settings)} settings</summary><div class="scroll"><table class="settings">'
                   f"<tbody>{rows}</tbody></table></div></details>" if settings else "")


def _plain(value):
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _rgb(image):
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a picture is uint8 (H,W,3), not {image.dtype} {image.shape}")
    return image


def _shrink(array, side):
    picture = Image.fromarray(np.ascontiguousarray(_rgb(array)))
    scale = min(1.0, side / max(picture.size))
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _clean(text, limit=MAX_TEXT):
    """Printable text of at most `limit` characters: control characters and lone surrogates go, a cut shows as …"""
    text = str(text)
    text = text if len(text) <= limit else text[:limit - 1] + "…"
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", " ", text)


def escape(text, limit=MAX_TEXT):
    """Text of at most `limit` characters, safe in HTML, quoted attributes and SVG alike."""
    return html.escape(_clean(text, limit))


_h = escape


def _is_finite(value):
    return value is not None and math.isfinite(value)


def _number(value, digits=2):
    """Digits with thousands set apart: integers plainly, others with `digits` decimals, and – for what is missing."""
    if not _is_finite(value):
        return "–"
    return f"{int(value):,}" if isinstance(value, (int, np.integer)) else f"{value:,.{digits}f}"


def _points(points):
    kept = [(float(x), float(y)) for x, y in points if _is_finite(x) and _is_finite(y) and max(abs(x), abs(y)) < 1e30]
    if len(kept) <= MAX_CURVE:
        return kept
    return [tuple(run.mean(0)) for run in np.array_split(np.array(kept), MAX_CURVE)]


def _range(values, margin):
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low, high):
    """About five round values between low and high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low, high):
    """Round values between 10**low and 10**high: powers of ten where there are three, else 1, 2 and 5 of each."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    decades = decades[::max(1, len(decades) // 6)]
    for mantissas in ((1,), (1, 2, 5)):
        found = [m * 10.0 ** k for k in decades for m in mantissas if low <= math.log10(m) + k <= high]
        if len(found) >= 3:
            return found
    return _ticks(10.0 ** low, 10.0 ** high)


def _svg_text(x, y, text, style, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{_h(text, 60)}</text>'


STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--ink:#1c1e20;--dim:#60666b;--line:#dedbd4;--accent:#0b6b75;
--wash:11 107 117;--s0:#0b6b75;--s1:#c2571a;--s2:#6a51a3;--s3:#4a7c2a;--s4:#b03a63;--s5:#7a6a4f}
@media(prefers-color-scheme:dark){:root{--bg:#141618;--card:#1b1e21;--ink:#e7e5e0;--dim:#9ba1a6;--line:#30353a;
--accent:#66c4cc;--wash:102 196 204;--s0:#66c4cc;--s1:#f09a5e;--s2:#b3a0e0;--s3:#9ccb7c;--s4:#ec8fb0;--s5:#c9b68f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:1360px;margin:0 auto;padding:1.2rem 1rem 4rem}
h1,h2,h3{line-height:1.2;font-weight:600;margin:0}h1{font-size:1.55rem}h2{font-size:1.2rem;margin:2.4rem 0 .8rem}
h3{font-size:1rem;color:var(--dim);margin:1.6rem 0 .6rem}
header{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;align-items:baseline;justify-content:space-between}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}a{color:var(--accent);text-underline-offset:.2em}
small{color:var(--dim);font-size:.8rem;font-weight:400}p{margin:.4rem 0}.note{color:var(--dim);max-width:46rem}
.scroll{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.25rem 1.2rem .25rem 0;text-align:right;
vertical-align:baseline}td:last-child,th:last-child{padding-right:0}tbody tr{border-top:1px solid var(--line)}
th{font-weight:500}th[scope=row],caption{text-align:left}caption{font-weight:600;padding-bottom:.3rem}
th small,td small{display:block;line-height:1.3}
.scores,.bars{width:100%}.grid th[scope=row]{position:sticky;left:0;background:var(--bg)}.scores td{white-space:nowrap}
.head td{font-size:1.35rem;font-weight:600;line-height:1.3}.head:first-child td{color:var(--accent)}
.sides th{overflow-wrap:normal}.sides th[scope=row]{white-space:nowrap}.count{color:var(--dim)}.wide{grid-template-columns:100%!important}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.6rem 3rem;align-items:start}
.curves{grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}svg{width:100%;max-width:32rem;height:auto}
.bars td,.bars thead th{text-align:left}.bars td b{font-weight:500}
.bar{display:block;height:4px;background:var(--line);border-radius:2px;min-width:3rem;margin:.15rem 0}
.bar>i{display:block;height:100%;background:var(--accent);border-radius:2px;max-width:100%}
.filter{display:flex;flex-wrap:wrap;gap:.6rem 1.4rem;align-items:center;padding:.6rem 0}
.filter input[type=search]{font:inherit;padding:.3rem .6rem;border:1px solid var(--line);border-radius:6px;
background:var(--card);color:inherit;width:11rem}output{color:var(--dim)}
fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.3rem;align-items:center}
legend{float:left;color:var(--dim);padding:0 .4rem 0 0}.chip{position:relative;cursor:pointer}
.chip input{position:absolute;inset:0;opacity:0;margin:0;cursor:pointer}
.chip span{display:block;padding:.15rem .7rem;border:1px solid var(--line);border-radius:1rem;background:var(--card)}
.chip :checked+span{background:var(--accent);border-color:var(--accent);color:var(--bg)}
:focus-visible,.chip :focus-visible+span{outline:2px solid var(--accent);outline-offset:2px}
.case{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:0 0 .8rem;
display:grid;grid-template-columns:auto 1fr;gap:.1rem 1.1rem;align-items:baseline}[hidden]{display:none!important}
.badge{grid-row:span 2;margin:0;color:var(--dim);white-space:nowrap}.badge b{color:var(--ink);font-size:1.15rem}
.sentence{grid-column:2;margin:0;font-size:1.08rem;line-height:1.35}.facts{grid-column:2;margin:0;color:var(--dim);
font-size:.8rem}.panels,.words{grid-column:1/-1}.panels{display:grid;gap:.5rem;margin-top:.5rem;
grid-template-columns:repeat(var(--n),minmax(0,var(--w)))}figure{margin:0}
img{display:block;width:100%;height:auto;border-radius:3px;background:var(--line)}
figcaption{color:var(--dim);font-size:.8rem;line-height:1.35;padding-top:.15rem}
.references{margin:.5rem 0 0;padding-left:1.1rem;color:var(--dim)}
@media(min-width:641px){.case:has(.references)>.panels{grid-column:1}}
.words p{margin:.35rem 0 0}.words span{display:inline-block;padding:0 .35rem;border-radius:3px;text-align:center;
background:rgb(var(--wash)/calc(var(--a)*.5))}
.words span small{display:block;font-size:.7rem;line-height:1.2;color:inherit;opacity:.8}
pre,code{font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap}pre{margin:.4rem 0;padding:.6rem .8rem;
background:var(--card);border:1px solid var(--line);border-radius:6px}summary{cursor:pointer;padding:.3rem 0}
.settings td{text-align:left;font:13px/1.5 ui-monospace,monospace}.settings th{white-space:nowrap}
@media(max-width:900px){.panels{grid-template-columns:repeat(3,minmax(0,var(--w)))}}
@media(max-width:640px){.panels{grid-template-columns:1fr 1fr}.case{padding:.7rem;grid-template-columns:1fr}
.case>*{grid-column:1}.badge{display:flex;gap:.7rem;align-items:center}.badge .bar{flex:1}.head td{font-size:1.15rem}
th,td{padding-right:.7rem}}
@media print{:root{--bg:#fff}nav,.filter{display:none}main{max-width:none;padding:0}
.grid th[scope=row]{position:static}.case,figure,svg,table{break-inside:avoid}h2,h3{break-after:avoid}
.panels{grid-template-columns:repeat(var(--n),minmax(0,var(--w)))}}
"""

SCRIPT = """
const cases = [...document.querySelectorAll('.case')], form = document.querySelector('.filter');
const split = text => text.toLowerCase().match(/[\\p{L}\\p{N}\\p{M}']+/gu) || [];
const begins = (words, start) => words.some(word => word.startsWith(start));
for (const image of document.querySelectorAll('[data-same]'))
  image.src = document.getElementById(image.dataset.same).src;
for (const item of cases) item.found = split(item.querySelector('.sentence').textContent);
function filter() {
  const wanted = split(form.querySelector('[type=search]').value), chosen = {};
  for (const box of form.querySelectorAll(':checked')) (chosen[box.name] ||= []).push(box.value);
  let shown = 0;
  for (const item of cases) {
    item.hidden = !(wanted.every(word => begins(item.found, word)) &&
      Object.entries(chosen).every(([facet, values]) => values.includes(item.dataset[facet])));
    shown += !item.hidden;
  }
  for (const group of document.querySelectorAll('.group')) group.hidden = !group.querySelector('.case:not([hidden])');
  form.querySelector('output').textContent = `${shown < cases.length ? shown + ' of ' : ''}${cases.length} cases`;
}
form?.addEventListener('input', filter);
form?.addEventListener('submit', event => event.preventDefault());
if (form) filter();
"""
