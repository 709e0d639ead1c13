"""COCO's mask AP of a proposal extractor on a prepared corpus, by pycocotools, and the jitter that extractors are trained with."""
import io
from contextlib import redirect_stdout

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from common import data, distributed, metrics
from common.mask2former import instances
from common.masks import encode


def jitter(example, low, high):
    """Large-scale jitter (Ghiasi et al., 2021): the Frame of a sample's image scaled by low … high, cropped to the canvas at
    random where it is larger."""
    frame, rng = example.frame, example.rng
    scale = rng.uniform(low, high)
    sides = [max(1, round(side * scale)) for side in (frame.in_width, frame.in_height)]
    canvas = (frame.canvas_width, frame.canvas_height)
    corner = [-round(rng.uniform(0, max(0, side - room))) for side, room in zip(sides, canvas)]
    return data.Frame(frame.width, frame.height, *sides, *canvas, *corner)


@torch.inference_mode()
def average_precision(model, dataset, ranks, batch_size=16, workers=0, amp="off", region=None):
    """COCO's mask AP, in percent, of the model's instances on `dataset`, a RefDataset, in the original frame.

    model.encode_image gives `classes` (B,N,K+1), the last one "no object", in the order of category ids, and `masks` (B,N,h,w),
    logits. region: masks (1,H,W) bool -> masks, what stands for an object's mask; without it the mask itself.
    """
    was_training = model.training
    model.eval()
    ids = sorted(category["id"] for category in dataset.meta["categories"])
    mine = distributed.deal(ranks, data.plan_evaluation(dataset, batch_size))
    found = []
    for batch in tqdm(data.load(dataset, mine, workers, pin=ranks.device.type == "cuda"), total=len(mine), unit="batch",
                      leave=False, desc="AP", disable=None if ranks.main else True):
        with metrics.autocast(ranks.device, amp):
            features = model.encode_image(batch.to(ranks.device).images)
        for b, (frame, e) in enumerate(zip(batch.frames, batch.index.tolist())):
            here = instances(features["classes"][b], features["masks"][b], frame.prob_img)
            found += coco_results(here, int(dataset.image_ids[dataset.expression_image[e]]), ids)
    found = [result for share in distributed.gather(ranks, found) for result in share]
    model.train(was_training)
    annotations = []
    for i in (i for i, rle in enumerate(dataset.rles) if rle is not None):
        mask = dataset.object_mask(i)  # checks the code, which pycocotools would trust
        rle = dataset.rles[i] if region is None else encode(region(torch.from_numpy(mask)[None])[0].numpy())
        annotations.append({"id": len(annotations) + 1, "image_id": int(dataset.image_ids[dataset.object_image[i]]),
                            "category_id": int(dataset.categories[i]), "segmentation": rle, "area": float(dataset.areas[i]),
                            "bbox": dataset.boxes[i].tolist(), "iscrowd": int(dataset.crowds[i])})
    pictures = [{"id": int(i), "width": int(w), "height": int(h)} for i, (w, h) in zip(dataset.image_ids, dataset.sizes)]
    return coco_ap(found, {"images": pictures, "categories": [{"id": i} for i in ids], "annotations": annotations})


def coco_results(found, image_id, category_ids):
    """What `mask2former.instances` found, as COCO's result records; category_ids: the corpus' id of each of our classes."""
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["masks"].cpu().numpy())
    return [{"image_id": image_id, "category_id": category_ids[label], "score": score, "segmentation": encode(mask)}
            for label, score, mask in rows]


def coco_ap(found, truth):
    """COCO's mask AP, in percent, of the records of `coco_results` for all images of `truth`.

    truth: a dict as in COCO's json: images, categories, and annotations whose segmentations are RLEs that were checked.
    """
    if not found:  # pycocotools cannot index an empty list
        return 0.0
    with redirect_stdout(io.StringIO()):
        corpus = COCO()
        corpus.dataset = truth
        corpus.createIndex()
        evaluation = COCOeval(corpus, corpus.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(100 * float(evaluation.stats[0]), 4)
