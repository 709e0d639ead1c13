"""Evaluation of REG: a sentence for every referred object, scored against the corpus' own and by a listener.

    rows, seconds = evaluate(model, dataset, vocabulary.decode, ranks)
    summary = summarise(rows, dataset, references(dataset))

A sample is a ref: one object with all sentences about it. CIDEr-D and METEOR follow the published evaluation
(common/captions.py): documents are the refs of the evaluated split, and figures are not percentages. Rb-Acc, the
refer-back accuracy of Huang et al. (arXiv 2211.07919, Sec. 4.2), is the share of sentences for which a listener, trained
apart, selects the object's own proposal. An object that has no proposal of its own gets an empty sentence, which
scores 0 and is never referred back.

A method that describes has, beside `encode_image`,
    locate(features, image_of (K,), masks (K,H,W) bool on the canvas) -> (K,) int64, the proposal of each object, or -1;
        the objects of one image come together, so that each proposal is given once
    describe(features, image_of (K,), k (K,), …) -> K lists of (ids, log p), the best first; optional beams, max_length
    propose(features, min_score) -> for each image (index (P,), score (P,), prob (P,h,w)), the instances found
and a listener has `locate` and
    select(features, image_of (E,), text (E,L)) -> logits (E,N) over an image's proposals.
"""
import time

import numpy as np
import torch
from tqdm import tqdm

from common import captions, data, distributed, metrics, pictures
from common.config import UserError


def require(model, names, script):
    """Raise UserError where the method has not what the task needs."""
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        raise UserError(f"{script} does not describe objects (its model has no {', '.join(missing)}); take a method that does.")


def objects_in(example):
    """Targets of a loader worker: all masks of the image on the canvas, and which of them the refs mean.

    Returns objects (O,h,w) bool, their number count (1,), and referred (E,), positions among them. Crowds are left out.
    """
    dataset = example.dataset
    own = [i for i in np.flatnonzero(dataset.object_image == example.image).tolist()
           if dataset.rles[i] is not None and not dataset.crowds[i]]
    meant = [dataset.objects_of[e][0] for e in example.expressions]
    own += [i for i in dict.fromkeys(meant) if i not in own]  # a crowd that a sentence names is described all the same
    masks = np.stack([dataset.object_mask(i) for i in own])
    return {"objects": example.frame.masks_in(masks) >= 0.5, "count": torch.tensor([len(own)]),
            "referred": torch.tensor([own.index(i) for i in meant])}


def one_per_ref(dataset):
    """A view of `dataset` with one expression for each ref, of one object. Raises UserError where a ref means several or none."""
    first = {}
    for e in range(len(dataset)):
        first.setdefault(int(dataset.ref_ids[e]), e)
    wrong = next((ref for ref, e in first.items() if len(dataset.objects_of[e]) != 1), None)
    if wrong is not None:
        raise UserError(f"{dataset.path}: ref {wrong} means {len(dataset.objects_of[first[wrong]])} objects; REG describes one.")
    kept = set(first.values())
    of_image = [np.array([e for e in own if e in kept], np.int64) for own in dataset.of_image]
    return dataset.view(flip=0.0, augment=None, original=False, targets=objects_in, of_image=of_image)


@torch.inference_mode()
def evaluate(model, dataset, decode, ranks, batch_size=16, workers=0, amp="off", listener=None, limit=0, progress=True,
             **options):
    """Describe the object of every ref of `dataset` (or of those on its first `limit` images).

    decode: ids -> sentence. listener: (model, encode: sentence -> ids) for Rb-Acc, on the same canvas, or None. options: beams
    and max_length for `describe`, where not its own. Batches of whole images are formed before they are dealt to the ranks, so
    the result does not depend on their number. Returns (rows, seconds), a row for each ref in the corpus' order.
    """
    was_training = model.training
    model.eval()
    dataset = one_per_ref(dataset)
    batches = data.plan_evaluation(dataset, batch_size)
    batches = metrics.first_images(batches, limit) if limit else batches
    mine = distributed.deal(ranks, batches)
    started, rows = time.monotonic(), []
    loaded = data.load(dataset, mine, workers, pin=ranks.device.type == "cuda")
    for batch in tqdm(loaded, total=len(mine), desc=f"describe {dataset.name} {dataset.split}", unit="batch", leave=False,
                      disable=None if progress and ranks.main else True):
        batch = batch.to(ranks.device)
        with metrics.autocast(ranks.device, amp):
            features = model.encode_image(batch.images)
            k = locate(model, features, batch)
            sentences, chances = describe(model, features, batch.image_of, k, decode, **options)
            right = refer_back(*listener, batch, sentences).tolist() if listener else [None] * len(sentences)
        for n, e in enumerate(batch.index.tolist()):
            rows.append({"index": e, "ref_id": int(dataset.ref_ids[e]),
                         "image_id": int(dataset.image_ids[dataset.expression_image[e]]),
                         "object_id": int(dataset.object_ids[dataset.objects_of[e][0]]), "sentence": sentences[n],
                         "k": int(k[n]), "log_p": chances[n], "referred_back": right[n]})
    rows = sorted((row for share in distributed.gather(ranks, rows) for row in share), key=lambda row: row["index"])
    expected = sum(len(key[2]) for batch in batches for key in batch)
    if len({row["index"] for row in rows}) != expected or len(rows) != expected:
        raise RuntimeError(f"{len(rows)} rows were gathered for {expected} refs")
    model.train(was_training)
    return rows, time.monotonic() - started


def locate(model, features, batch):
    """The proposal k (E,) of each ref's object, matched together with all objects of its image; -1: none."""
    count, referred = batch.targets["count"], batch.targets["referred"]
    object_image = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    found = model.locate(features, object_image, batch.targets["objects"])
    return found[referred + (count.cumsum(0) - count)[batch.image_of]]


def describe(model, features, image_of, k, decode, **options):
    """([sentence], [its log p]) for the proposals k (K,) of images image_of (K,); ("", None) where k is -1."""
    known = torch.nonzero(k >= 0).squeeze(1)
    sentences, chances = [""] * len(k), [None] * len(k)
    if len(known):
        for n, best in zip(known.tolist(), model.describe(features, image_of[known], k[known], **options)):
            sentences[n], chances[n] = decode(best[0][0]), round(float(best[0][1]), 4)
    return sentences, chances


def refer_back(listener, encode, batch, sentences):
    """Whether the listener selects each ref's object by its sentence: (E,) bool. Proposals are the listener's own."""
    features = listener.encode_image(batch.images)
    k = locate(listener, features, batch)
    text = data.pad_text([encode(sentence) for sentence in sentences]).to(k.device)
    empty = torch.tensor([not sentence for sentence in sentences], device=k.device)
    return (listener.select(features, batch.image_of, text).argmax(1) == k) & ~empty


@torch.inference_mode()
def describe_found(model, image_in, frame, decode, min_score, **options):
    """Sentences for what a method finds in one picture: image_in (1,3,H,W) on the canvas, frame its Frame.

    Returns ([sentence], [score], masks (P,H,W) bool in the picture's own frame).
    """
    features = model.encode_image(image_in)
    k, scores, prob = model.propose(features, min_score)[0]
    sentences, _ = describe(model, features, torch.zeros_like(k), k, decode, **options)
    masks = frame.prob_img(prob.float()) >= 0.5 if len(k) else torch.zeros(0, frame.height, frame.width, dtype=torch.bool)
    return sentences, scores.tolist(), masks.cpu().numpy()


# ---- scores -------------------------------------------------------------------------------------------------

def references(dataset, merged_with=None):
    """{ref_id: sentences}; `merged_with`, a RefDataset, adds its sentences about the same object, known by its id."""
    found, about = {}, {}
    for e, text in enumerate(merged_with.texts if merged_with is not None else []):
        for i in merged_with.objects_of[e]:
            about.setdefault(int(merged_with.object_ids[i]), []).append(text)
    meant = {}
    for e, text in enumerate(dataset.texts):
        found.setdefault(int(dataset.ref_ids[e]), []).append(text)
        meant[int(dataset.ref_ids[e])] = dataset.objects_of[e]
    return {ref: texts + [text for i in meant[ref] for text in about.get(int(dataset.object_ids[i]), [])]
            for ref, texts in found.items()}


def partner(name):
    """The corpus whose sentences `--refs merged` adds: RefCOCO's for RefCOCO+, and the other way round. UserError: none."""
    if name.rstrip("+") not in ("refcoco", "refshapes"):
        raise UserError(f"--refs merged joins RefCOCO and RefCOCO+; {name} has sentences of its own alone: use --refs own.")
    return name[:-1] if name.endswith("+") else name + "+"


def score(rows, references):
    """Add to each row its `references` and its `CIDEr` among these rows; returns the tokens (hypotheses, references)."""
    hypotheses = [captions.tokenize(row["sentence"]) for row in rows]
    documents = [[captions.tokenize(text) for text in references[row["ref_id"]]] for row in rows]
    for row, value in zip(rows, captions.cider_d(hypotheses, documents)):
        row |= {"references": references[row["ref_id"]], "CIDEr": round(float(value), 6)}
    return hypotheses, documents


def summarise(rows, dataset, references, seconds=0.0, checkpoint="", settings=None, meteor=True, say=print):
    """The summary that eval writes; `rows` get their references and CIDEr. METEOR is None, and said, where it cannot run."""
    mean = lambda values: round(float(np.mean(values)), 6) if len(rows) else None  # noqa: E731
    tokens, corpus_meteor = score(rows, references), None
    if meteor and rows:
        try:
            corpus_meteor = round(captions.meteor(*tokens), 6)
        except UserError as error:
            say(f"METEOR is left out: {error}")
    heard = rows and rows[0]["referred_back"] is not None
    return {"dataset": dataset.name, "split": dataset.split, "task": "reg", "n": len(rows),
            "CIDEr": mean([row["CIDEr"] for row in rows]), "METEOR": corpus_meteor,
            "Rb-Acc": round(100 * mean([row["referred_back"] for row in rows]), 4) if heard else None,
            "mean_references": mean([len(row["references"]) for row in rows]), "no_proposal": sum(row["k"] < 0 for row in rows),
            "images": len({row["image_id"] for row in rows}), "seconds": round(seconds, 2), "checkpoint": str(checkpoint),
            "settings": settings or {}}


def cases(dataset, chosen):
    """Case dictionaries for `pictures.report` of chosen rows {group: rows}: the object, its sentence, and people's own."""
    heard = {None: [], True: ["the listener found it"], False: ["the listener was misled"]}
    return [{"group": group, "split": dataset.split, "text": row["sentence"] or "(no proposal, no sentence)",
             "facts": heard[row["referred_back"]], "panels": [("the object", outlined(dataset, row["index"]))],
             **{key: row[key] for key in ("CIDEr", "references", "ref_id", "image_id")}}
            for group, rows in chosen.items() for row in rows]


def outlined(dataset, e):
    """The picture of expression e with its object outlined, uint8 (H,W,3)."""
    picture = dataset.picture(int(dataset.expression_image[e])).permute(1, 2, 0).numpy()
    return pictures.overlay(picture, dataset.expression_mask(e), pictures.TRUTH)
