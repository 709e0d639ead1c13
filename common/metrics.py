"""Scores of RES (masks) and REC (boxes), and the one evaluation loop that training and eval.py share.

The house definition: original frame, every sentence a sample, integer intersection I and union U. Always both
mIoU = mean(I/U) and oIoU = sum(I)/sum(U); Pr@X is the share of samples with I/U >= X; an empty union scores 1.
mIoU equals the area under Pr@X over X in 0..1. Where some sentences mean nothing in the image, gRefCOCO's scores (Liu et al.,
CVPR 2023) stand beside them: gIoU and cIoU, which are mIoU and oIoU by these rules; N-acc, the share of those sentences whose
mask is empty, and T-acc, the share of the others whose mask is not. PhraseCut's own subsets are by_kind, by_size and by_objects.

`protocol` re-scores the same predictions by the rules of other code bases, so that a difference to a published
number can be traced: `lavt480` squashes truth and prediction to 480x480 and scores an empty intersection 0;
`seqtr640` scores at the network's scale of 640 and, as the released code does, divides by the prediction's area
alone where the truth has several polygons (COCO's rule for crowds), which inflates those samples.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import data, distributed

PROTOCOLS = ("original", "lavt480", "seqtr640")
THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SIZES = (("small", 0.0, 0.02), ("medium", 0.02, 0.2), ("large", 0.2, 1.01))  # share of the image's area; PhraseCut's
OBJECTS = (("none", 0, 0), ("one", 1, 1), ("2-4", 2, 4), ("5 or more", 5, 10 ** 9))  # meant by a sentence; PhraseCut's
LENGTHS = (("1-3 words", 1, 3), ("4-7 words", 4, 7), ("8 or more words", 8, 10 ** 9))


class SegMeter:
    """Integer intersections and unions by sample index; an index given twice counts once, a conflict is an error."""

    def __init__(self):
        self.rows = {}

    def update(self, index, I, U):
        """Add samples: index, I and U are integers or equally long sequences of them. Raises ValueError on nonsense."""
        for i, inter, union in zip(*(np.atleast_1d(np.asarray(v)).tolist() for v in (index, I, U)), strict=True):
            if inter != int(inter) or union != int(union) or not 0 <= inter <= union:
                raise ValueError(f"sample {i}: I={inter} and U={union} are no areas with 0 <= I <= U")
            if self.rows.setdefault(int(i), (int(inter), int(union))) != (inter, union):
                raise ValueError(f"sample {i} was scored before with other areas")

    def summary(self):
        """{n, mIoU, oIoU, Pr@0.1 … Pr@0.9} in percent; None where there is no sample."""
        return scores(*np.array([self.rows[i] for i in sorted(self.rows)], np.int64).reshape(-1, 2).T)


def iou(I, U):
    """I/U of integer arrays; 1 where the union is empty."""
    return np.where(U > 0, I / np.maximum(U, 1), 1.0)


def scores(I, U):
    """{n, mIoU, oIoU, Pr@X} in percent from integer arrays I, U (n,)."""
    values, percent = iou(I, U), lambda x: round(100 * float(x), 4) if len(I) else None
    # math.fsum would do too: the order of samples is fixed, so the sum is the same on any number of ranks
    total = {"n": len(I), "mIoU": percent(values.mean() if len(I) else 0),
             "oIoU": percent(I.sum() / U.sum() if U.sum() else 1)}
    return total | {f"Pr@{x}": percent((values >= x).mean() if len(I) else 0) for x in THRESHOLDS}


def areas(prediction, truth):
    """Integer I and U of boolean masks (E,H,W): two int64 tensors (E,)."""
    inter = (prediction & truth).flatten(1).sum(1)
    return inter, prediction.flatten(1).sum(1) + truth.flatten(1).sum(1) - inter


def boxes_of(masks):
    """The tight xyxy boxes (E,4) of boolean masks (E,H,W), in whole pixels; zeros for an empty mask."""
    out = []
    for axis in (1, 2):
        line = masks.any(dim=axis)  # (E, W), then (E, H)
        size = line.shape[1]
        first = line.int().argmax(1)
        last = size - line.flip(1).int().argmax(1)
        out.append(torch.stack([first, last], 1) * line.any(1, keepdim=True))
    (x, y) = out
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


def box_iou(a, b):
    """IoU of paired xyxy boxes (E,4), (E,4) -> (E,); 0 where the union is empty."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (high - low).clamp(min=0).prod(1).double()
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter
    return torch.where(union > 0, inter / union.clamp(min=1e-9), torch.zeros_like(inter))


def predict(model, batch):
    """`segment` on the features of `encode_image`: the model's dict, with `prob (E,h,w)` in the network's frame.

    Targets go along only where the dataset makes them, for oracles.
    """
    return model.segment(model.encode_image(batch.images), batch.image_of, batch.text, targets=batch.targets or None)


def autocast(device, amp):
    """The autocast context for --amp off, bf16 or fp16."""
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp), enabled=amp != "off")


@torch.inference_mode()
def evaluate(model, dataset, ranks, batch_size=16, workers=0, amp="off", threshold=None, protocol="original",
             limit=0, refine=None, progress=True, on_batch=None):
    """Score `model` on every expression of `dataset` (or on those of the first `limit` images).

    The model's dict has `prob (E,h,w)` and `threshold`; a method may add `boxes (E,4)` xyxy in the network's frame, scored
    for REC instead of the boxes round its masks, and `heat` {name: (E,h,w)}, whose maxima are scored as pointing.
    model: has `encode_image` and `segment`. threshold: None takes the one that `segment` names. refine: function
    (image (3,H,W) uint8, prob (E,H,W)) -> prob, the dense CRF for example. on_batch(batch, output, masks): called with
    the predicted masks, a list of (E_i,H,W) bool per image. Batches are formed before they are dealt to the ranks, so
    the result does not depend on their number. Returns (rows, seconds): a dict per expression, in the corpus' order.
    """
    was_training = model.training
    model.eval()
    dataset = dataset.view(flip=0.0, augment=None, original=True)
    batches = data.plan_evaluation(dataset, batch_size)
    batches = first_images(batches, limit) if limit else batches
    mine = distributed.deal(ranks, batches)
    started = time.monotonic()
    rows = []
    loaded = data.load(dataset, mine, workers, pin=ranks.device.type == "cuda")
    bar = tqdm(loaded, total=len(mine), desc=f"eval {dataset.name} {dataset.split}", unit="batch", leave=False,
               disable=None if progress and ranks.main else True)
    for batch in bar:
        with autocast(ranks.device, amp):
            output = predict(model, batch.to(ranks.device))
        limit_ = output["threshold"] if threshold is None else threshold
        kept = []
        for i, frame in enumerate(batch.frames):
            of_image = torch.nonzero(batch.image_of == i).squeeze(1)
            prob = frame.prob_img(output["prob"][of_image.to(ranks.device)].float())  # (E_i, H, W)
            if refine is not None:
                picture = dataset.picture(int(dataset.expression_image[batch.index[of_image[0]]]))
                prob = refine(picture, prob)
            truth = batch.masks[i].to(ranks.device)
            masks = prob >= limit_
            kept.append(masks)
            heat = {name: value[of_image.to(ranks.device)].float() for name, value in output.get("heat", {}).items()}
            boxes = frame.boxes_img(output["boxes"][of_image.to(ranks.device)]) if "boxes" in output else boxes_of(masks)
            rows += _rows(dataset, batch.index[of_image.numpy()], masks, truth, prob, limit_, boxes, heat, frame, protocol)
        if on_batch is not None:
            on_batch(batch, output, kept)
    rows = [row for share in distributed.gather(ranks, rows) for row in share]
    rows.sort(key=lambda row: row["index"])
    expected = sum(len(key[2]) for batch in batches for key in batch)
    if len(rows) != expected or len({row["index"] for row in rows}) != expected:
        raise RuntimeError(f"{len(rows)} rows were gathered for {expected} expressions")
    model.train(was_training)
    return rows, time.monotonic() - started


def first_images(batches, limit):
    """The planned batches cut after the first `limit` images."""
    kept = []
    for batch in batches:
        kept.append(batch[:limit - sum(map(len, kept))])
    return [batch for batch in kept if batch]


def _rows(dataset, index, masks, truth, prob, threshold, boxes, heat, frame, protocol):
    """A dict per expression of one image."""
    inter, union = areas(*_by_protocol(masks, truth, prob, threshold, frame, protocol))
    if protocol == "seqtr640":
        predicted = _by_protocol(masks, truth, prob, threshold, frame, protocol)[0].flatten(1).sum(1)
        several = torch.tensor([any(dataset.parts[i] > 1 for i in dataset.objects_of[e]) for e in index],
                               device=union.device)
        union = torch.where(several, torch.maximum(predicted, inter), union)
    if protocol == "lavt480":
        union = torch.where(union == 0, torch.ones_like(union), union)  # LAVT scores an empty union 0
    annotated = torch.from_numpy(np.stack([dataset.expression_box(e) for e in index])).to(masks.device)
    rec = box_iou(boxes.double(), annotated)
    area = truth.flatten(1).sum(1)
    hits = {f"hit_{name}": _hits(value, truth, frame) for name, value in heat.items()}
    columns = [inter.tolist(), union.tolist(), rec.tolist(), area.tolist(), masks.flatten(1).sum(1).tolist()]
    rows = []
    for n, e in enumerate(index.tolist()):
        image = dataset.expression_image[e]
        row = {"index": e, "sent_id": int(dataset.sent_ids[e]), "ref_id": int(dataset.ref_ids[e]),
               "image_id": int(dataset.image_ids[image]), "I": columns[0][n], "U": columns[1][n],
               "box_iou": round(columns[2][n], 6), "area": columns[3][n], "predicted": columns[4][n],
               "source": dataset.sources[e], "kind": dataset.kinds[e]}
        rows.append(row | {name: int(value[n]) for name, value in hits.items()})
    return rows


def _by_protocol(masks, truth, prob, threshold, frame, protocol):
    """Prediction and truth, boolean (E,h,w), in the frame that the protocol scores in."""
    if protocol == "original":
        return masks, truth
    if protocol == "lavt480":
        size = (480, 480)
    else:  # seqtr640
        scale = 640 / max(frame.width, frame.height)
        size = (max(1, round(frame.height * scale)), max(1, round(frame.width * scale)))
    prediction = F.interpolate(prob[None], size, mode="bilinear", align_corners=False)[0] >= threshold
    return prediction, F.interpolate(truth[None].float(), size, mode="nearest")[0].bool()


def _hits(heat, truth, frame):
    """Whether the centre of each heat map's highest cell lies in the truth: heat (E,h,w), truth (E,H,W) -> (E,)."""
    h, w = heat.shape[-2:]
    y = (torch.arange(h, device=heat.device) + 0.5) * frame.canvas_height / h
    x = (torch.arange(w, device=heat.device) + 0.5) * frame.canvas_width / w
    inside = ((y >= frame.top) & (y < frame.top + frame.in_height))[:, None] \
        & ((x >= frame.left) & (x < frame.left + frame.in_width))[None]
    best = heat.masked_fill(~inside, -torch.inf).flatten(1).argmax(1)
    point = frame.points_img(torch.stack([x[best % w], y[best // w]], -1))
    column = point[:, 0].long().clamp(0, frame.width - 1)
    row = point[:, 1].long().clamp(0, frame.height - 1)
    return truth[torch.arange(len(truth), device=truth.device), row, column]


def summarise(rows, dataset, task="res", seconds=0.0, checkpoint="", settings=None):
    """The summary that eval writes: all scores in percent, and by kind, object size and sentence length."""
    I, U = (np.array([row[key] for row in rows], np.int64) for key in ("I", "U"))
    size = np.array([row["area"] / max(1, int(dataset.sizes[dataset.expression_image[row["index"]]].prod()))
                     for row in rows])
    length = np.array([len(dataset.texts[row["index"]].split()) for row in rows])
    kind = np.array([row["kind"] for row in rows])
    meant = np.array([len(dataset.objects_of[row["index"]]) for row in rows])
    groups = {
        "by_kind": {name: kind == name for name in sorted(set(kind.tolist()) - {""})},
        "by_size": {name: (size >= low) & (size < high) for name, low, high in SIZES},
        "by_length": {name: (length >= low) & (length <= high) for name, low, high in LENGTHS},
    }
    if (meant != 1).any():
        groups["by_objects"] = {name: (meant >= low) & (meant <= high) for name, low, high in OBJECTS}
    meter = SegMeter()
    meter.update([row["index"] for row in rows], I, U)
    overall = meter.summary()
    summary = {"dataset": dataset.name, "split": dataset.split, "task": task, **overall,
               "REC@0.5": round(100 * float(np.mean([row["box_iou"] >= 0.5 for row in rows])), 4) if rows else None,
               "images": len({row["image_id"] for row in rows}), "seconds": round(seconds, 2),
               "checkpoint": str(checkpoint), "settings": settings or {}}
    if (meant == 0).any():
        share = lambda of: round(100 * float(of.mean()), 4) if len(of) else None  # noqa: E731
        empty = np.array([row["predicted"] == 0 for row in rows])
        summary |= {"gIoU": overall["mIoU"], "cIoU": overall["oIoU"], "N-acc": share(empty[meant == 0]),
                    "T-acc": share(~empty[meant > 0])}
    heats = [key[4:] for key in (rows[0] if rows else {}) if key.startswith("hit_")]
    if heats:
        summary["pointing"] = {name: round(100 * float(np.mean([row[f"hit_{name}"] for row in rows])), 4)
                               for name in heats}
    for title, members in groups.items():
        summary[title] = {name: {key: scores(I[of], U[of])[key] for key in ("n", "mIoU", "oIoU")}
                          for name, of in members.items() if of.any()}
    return summary


def paired_bootstrap(rows, others, resamples=10_000, seed=0):
    """How much `rows` of one run score above `others` of another on the same expressions, by resampling images.

    rows, others: dictionaries with sent_id, image_id, I and U, in the same order. Returns {mIoU, oIoU: {difference, low, high,
    p}}: points of percent, the 95 % percentile interval and the two-sided p, twice the smaller tail with k resamples
    counted as (k + 1) / (resamples + 1). Raises ValueError where the expressions differ or there is none.
    """
    if not rows or [row["sent_id"] for row in rows] != [row["sent_id"] for row in others]:
        raise ValueError("the two runs were not scored on the same expressions")
    _, image = np.unique([row["image_id"] for row in rows], return_inverse=True)
    I, U, I2, U2 = (np.array([row[key] for row in of], np.int64) for of in (rows, others) for key in ("I", "U"))
    columns = np.stack([iou(I, U), iou(I2, U2), np.ones(len(I)), I, U, I2, U2], 1)
    sums = np.zeros((image.max() + 1, columns.shape[1]))                                 # (images, 7)
    np.add.at(sums, image, columns)
    rng, drawn = np.random.default_rng(seed), [sums.sum(0, keepdims=True)]
    chunk = max(1, 2 ** 22 // len(sums))
    for first in range(0, resamples, chunk):
        counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), min(chunk, resamples - first))
        drawn.append(counts @ sums)                                                      # (chunk, 7)
    of = np.concatenate(drawn).T
    differences = {"mIoU": (of[0] - of[1]) / of[2], "oIoU": iou(of[3], of[4]) - iou(of[5], of[6])}
    found = {}
    for name, values in differences.items():
        first, values = 100 * values[0], 100 * values[1:]
        low, high = np.percentile(values, (2.5, 97.5))
        tail = min((values <= 0).sum(), (values >= 0).sum())
        found[name] = {"difference": round(float(first), 4), "low": round(float(low), 4), "high": round(float(high), 4),
                       "p": min(1.0, float(2 * (tail + 1) / (resamples + 1)))}
    return found


def shuffled(dataset, seed=0):
    """A control: a view of `dataset` in which each sentence points at another object of its image, drawn by `seed`.

    Only objects that have a mask are drawn; images that hold no other object are left out.
    """
    rng = np.random.default_rng((seed, 1))
    objects_of, of_image = list(dataset.objects_of), list(dataset.of_image)
    for image in dataset.with_expressions:
        candidates = [i for i in np.flatnonzero(dataset.object_image == image).tolist() if dataset.rles[i] is not None]
        kept = []
        for e in dataset.of_image[image].tolist():
            others = [i for i in candidates if i not in dataset.objects_of[e]]
            if others:
                objects_of[e] = [others[rng.integers(len(others))]]
                kept.append(e)
        of_image[image] = np.array(kept, np.int64)
    left = np.array([i for i in dataset.with_expressions if len(of_image[i])], np.int64)
    return dataset.view(objects_of=objects_of, of_image=of_image, with_expressions=left)
