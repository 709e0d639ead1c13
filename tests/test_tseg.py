"""TSEG: pooling and labels against the equations written out, each flag, gathering over ranks, and the edge cases."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import train_tseg
from common import checkpoint, data, distributed
from common.config import UserError, parse
from common.text import WordPiece
from eval import main as evaluate
from data_prep import vocshapes
from data_prep.refshapes import wordpieces

ALONE = distributed.Ranks(0, 1, torch.device("cpu"))
VOCABULARY = WordPiece(wordpieces(["tabby cat brown red dog left right"] * 30))
TINY = ["--yaml", "yaml/tseg_refshapes.yaml", "--size", "32", "--vit-dim", "12", "--vit-depth", "1", "--bert-dim", "12",
        "--bert-layers", "1", "--dim", "16", "--batch-size", "4", "--workers", "0", "--eval-splits", "val", "--scale", "0.5", "2",
        "--amp", "off"]
ROWS = [[], ["--pooling", "gap"], ["--pooling", "gmp"], ["--pooling", "spa"], ["--labels", "tfidf"], ["--penalty-lambda", "0"],
        ["--penalty-p", "0"], ["--reduction", "mean"], ["--dim", "24"], ["--full"], ["--pretrain", "boxes"]]


def build(*flags, seed=0):
    args = parse(train_tseg.get_parser(), [*TINY, *flags])
    torch.manual_seed(seed)
    return args, train_tseg.build_model(args, VOCABULARY)


def inputs(texts=("tabby cat", "red dog", "left dog", "brown cat"), image_of=(0, 0, 1, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (max(image_of) + 1, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.tensor(image_of), data.pad_text([VOCABULARY(text) for text in texts])


def targets(texts=("tabby cat", "red dog", "left dog", "brown cat"), image_of=(0, 0, 1, 1), inside=None):
    """What the loader makes, the drawn expressions being all that the images have."""
    numbers = [train_tseg.string_number(text) for text in texts]
    known = [[n for n, i in zip(numbers, image_of) if i == mine] for mine in image_of]
    known = [(row * 9)[:8] for row in known]
    masks = torch.zeros(len(texts), 32, 32)
    masks[:, 4:20, 3:18] = 1
    inside = torch.ones(len(texts), 16, dtype=torch.bool) if inside is None else inside
    return {"inside": inside, "string": torch.tensor(numbers), "known": torch.tensor(known), "mask": masks}


def loss_of(model, args, batch, wanted, idf=None, ranks=ALONE):
    return sum(train_tseg.loss_terms(model(*batch), wanted, args, ranks, idf).values())


# ---- Eq. 2-8 ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, share, value", [
    (5, 0, -4.605), (5, .01, -3.72), (5, .02, -3.17), (5, .05, -2.177), (5, .1, -1.303), (5, .2, -.511), (5, .3, -.197),
    (5, .5, -.021), (5, .8, 0), (3, .05, -2.412), (3, .1, -1.609), (3, .2, -.799), (3, .3, -.402), (3, .5, -.084), (0, 1, .01)])
def test_penalty(p, share, value):
    assert train_tseg.size_penalty(torch.tensor(float(share)), 0.01, p).item() == pytest.approx(value, abs=6e-3)


@pytest.mark.parametrize("pooling", ["gap", "gmp", "spa", "mpa"])
def test_pooling_equals_its_equations(pooling):
    args, _ = build("--pooling", pooling, "--eps", "0.5")
    s = 3 * torch.randn(2, 6, 3, dtype=torch.float64)
    inside = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    z = train_tseg.pool(s, inside, args)
    for b in range(2):
        there = [i for i in range(6) if inside[b, i]]
        for j in range(3):
            column = [s[b, i, j].item() for i in there]
            if pooling in ("gap", "gmp"):
                expected = sum(column) / len(there) if pooling == "gap" else max(column)
            else:
                rivals = range(3) if pooling == "spa" else [j]
                total = [1 + sum(math.exp(s[b, i, k]) for k in rivals) for i in there]
                m = [math.exp(v) / t for v, t in zip(column, total)]
                mean = sum(m) / len(m)
                expected = sum(v * w for v, w in zip(column, m)) / (sum(m) + 0.5) + (1 - mean) ** 5 * math.log(0.01 + mean)
            assert z[b, j].item() == pytest.approx(expected, rel=1e-9)


def test_one_text_is_assigned_alike():
    """MPA equals SPA where there is one text, and where all texts are the same string."""
    s = torch.randn(2, 9, 1)
    assert torch.allclose(train_tseg.assign(s, "mpa"), train_tseg.assign(s, "spa"), atol=1e-6)
    copies = s.expand(-1, -1, 3)
    assert torch.allclose(train_tseg.assign(copies, "mpa"), train_tseg.assign(copies, "spa", torch.tensor([3, 3, 3])), atol=1e-6)


@pytest.mark.parametrize("pooling", ["gap", "gmp", "spa", "mpa"])
def test_patches_outside_the_image_change_nothing(pooling):
    args, _ = build("--pooling", pooling)
    s = torch.randn(2, 16, 5, requires_grad=True)
    inside = torch.ones(2, 16, dtype=torch.bool)
    inside[1, 10:] = False
    z = train_tseg.pool(s, inside, args)
    short = train_tseg.pool(s[1:, :10], inside[1:, :10], args)
    other = train_tseg.pool(torch.where(inside[..., None], s, 50.0), inside, args)
    z.sum().backward()
    assert torch.allclose(z[1:], short, atol=1e-6) and torch.equal(z, other) and not s.grad[1, 10:].any()


@pytest.mark.parametrize("pooling", ["gap", "gmp", "spa"])
def test_exclusive_masks_are_the_argmax(pooling):
    args, _ = build("--pooling", pooling)
    same = torch.eye(4, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    s = 2 * torch.randn(16, 4)
    s[:, 3] = s[:, 1]
    prob = train_tseg.exclusive(s, same, args)
    if pooling == "spa":
        e = s[:, :3].exp()
        maps = train_tseg._finer((e / (1 + e.sum(1, keepdim=True))).T.unflatten(1, (4, 4)))
        background = 1 - maps.sum(0)
    else:
        maps = s[:, :3].clamp(min=0)
        maps = train_tseg._finer((maps / maps.amax(0)).T.unflatten(1, (4, 4)))
        background = (1 - maps.amax(0)) ** 16
    winner = torch.cat([background[None], maps]).argmax(0)
    assert 0 <= prob.min() <= prob.max() <= 1 and torch.equal(prob[1], prob[3])
    for j in range(3):
        assert torch.equal(prob[j] >= 0.5, winner == j + 1)


# ---- labels and losses --------------------------------------------------------------------------------------

def test_labels_are_equal_strings():
    """Equal strings are one text; an expression that the image has but did not draw counts as present."""
    texts, image_of = ("Tabby  cat", "red dog", "tabby cat"), (0, 1, 1)
    wanted = targets(texts, image_of)
    wanted["known"][0, 1] = train_tseg.string_number("red dog")
    out = {"image_of": torch.tensor(image_of), "text": inputs(texts, image_of)[2]}
    vectors, string, text = train_tseg.gather_texts(torch.randn(3, 4), wanted["string"], out["text"], ALONE)
    assert len(vectors) == len(string) == len(text) == 2
    labels = train_tseg.image_labels(out, wanted, string, text, torch.tensor([0, 1]), None)
    assert labels.tolist() == [[1, 1], [1, 1]]
    wanted["known"][0] = wanted["string"][0]
    assert train_tseg.image_labels(out, wanted, string, text, torch.tensor([0, 1]), None).tolist() == [[1, 0], [1, 1]]


def test_labels_by_tfidf():
    """The paper's example: brown cat is somewhat in an image of a tabby cat, red dog is not."""
    texts, image_of = ("tabby cat", "brown cat", "red dog"), (0, 1, 1)
    _, _, text = inputs(texts, image_of)
    idf = train_tseg.document_weights([VOCABULARY(t) for t in (*texts, "left dog")], len(VOCABULARY))
    labels = train_tseg.image_labels({"image_of": torch.tensor(image_of), "text": text}, targets(texts, image_of),
                                     targets(texts, image_of)["string"], text, torch.tensor([0, 1]), idf)
    tabby, cat = math.log(4), math.log(2)
    assert labels[0].tolist() == pytest.approx([1, cat ** 2 / (tabby ** 2 + cat ** 2), 0], abs=1e-6)
    assert idf[VOCABULARY.cls_id] == idf[VOCABULARY.sep_id] == 0


def test_classification_loss_is_the_printed_one():
    args, model = build()
    batch, wanted = inputs(), targets()
    out = model(*batch)
    z = train_tseg.pool(train_tseg.similarities(out["patches"], out["texts"], out["scale"]), wanted["inside"][:2], args).sigmoid()
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1.]])
    printed = -(true * z.log() + (1 - true) * (1 - z).log()).sum()
    assert loss_of(model, args, batch, wanted).item() == pytest.approx(printed.item(), rel=1e-5)
    args.reduction = "mean"
    assert loss_of(model, args, batch, wanted).item() == pytest.approx(printed.item() / 4, rel=1e-5)


def test_dice_is_the_printed_one():
    s, truth = torch.randn(1, 16), targets()["mask"][:1]
    m = torch.nn.functional.interpolate(s.view(1, 1, 4, 4), (32, 32), mode="bilinear")[0, 0].sigmoid()
    printed = 1 - 2 * (m * truth[0]).sum() / (m.sum() + truth[0].sum())
    ours = train_tseg.dice(s, truth, torch.ones(1, 16, dtype=torch.bool), smooth=0)
    assert ours.item() == pytest.approx(printed.item(), rel=1e-5)
    assert train_tseg.dice(torch.full((1, 16), -99.0), 0 * truth, torch.ones(1, 16, dtype=torch.bool)).item() == pytest.approx(0)


def test_dice_sees_nothing_outside_the_image():
    s, inside = torch.full((1, 4, 4), -99.0), torch.ones(1, 4, 4, dtype=torch.bool)
    s[..., 3], inside[..., 3] = 99, False
    assert train_tseg.dice(s.flatten(1), torch.zeros(1, 32, 32), inside.flatten(1)).item() < 0.5 \
        < train_tseg.dice(s.flatten(1), torch.zeros(1, 32, 32), torch.ones(1, 16, dtype=torch.bool)).item()


@pytest.mark.parametrize("flags, threshold, finer", [
    ([], 0.4, lambda maps: maps), (["--full"], 0.4, train_tseg._finer), (["--pretrain", "boxes"], 0.4, train_tseg._finer),
    (["--pooling", "spa"], 0.5, None), (["--pooling", "gmp"], 0.5, None)], ids=["mpa", "full", "boxes", "spa", "gmp"])
def test_segment_goes_by_its_method(flags, threshold, finer):
    """MPA: the mask of Eq. 6 on the patches' grid; from masks: S is interpolated first; the others: an argmax, whatever --threshold.
    Equal strings count once in the score. No S is above the scale, 100 at most: vectors are of length 1."""
    args, model = build("--threshold", "0.4", *flags)
    images, image_of, text = inputs(("tabby cat", "red dog", "tabby cat"), (0, 0, 0))
    with torch.inference_mode():
        features = model.eval().encode_image(images)
        out, s = model.segment(features, image_of, text), train_tseg.similarities(features, model.encode_text(text), model.scale())
    assert s.abs().max() <= 1.001 / 0.07 and out["threshold"] == threshold
    maps = s[0].T.unflatten(1, (4, 4))
    assert finer is None or torch.allclose(out["prob"], finer(maps).sigmoid(), atol=1e-6)
    once = train_tseg.pool(s[:, :, :2], torch.ones(1, 16, dtype=torch.bool), args)[0].sigmoid()
    assert torch.allclose(out["score"], once[[0, 1, 0]], atol=1e-5) and torch.allclose(out["heat"]["S"], maps.sigmoid(), atol=1e-6)
    nn.init.constant_(model.log_scale, 9.0)
    assert model.scale().item() == pytest.approx(100)


@pytest.mark.parametrize("pooling", ["spa", "mpa"])
def test_classes_take_the_batchs_place(pooling):
    """--texts classes: the printed loss over the names of all classes, whatever the batch says; its image has the others' not."""
    args, model = build("--pooling", pooling, "--texts", "classes")
    names = ("tabby cat", "red dog", "left dog", "brown cat")
    batch, wanted = inputs(("red dog", "tabby cat", "red dog"), (0, 0, 1)), targets(("red dog", "tabby cat", "red dog"), (0, 0, 1))
    model.compare_with(inputs(names)[2], targets(names)["string"])
    with torch.no_grad():
        s = train_tseg.similarities(model.encode_image(batch[0]), model.encode_text(inputs(names)[2]), model.scale())
        z = train_tseg.pool(s, torch.ones(2, 16, dtype=torch.bool), args)
    true = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0.]])
    printed = torch.nn.functional.multilabel_soft_margin_loss(z, true, reduction="none").sum() * 4
    assert loss_of(model, args, batch, wanted).item() == pytest.approx(printed.item(), rel=1e-5)
    loss_of(model, args, batch, wanted).backward()
    assert all(p.grad is not None for p in model.parameters()) and "class_text" not in model.state_dict()


@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_every_row_trains_and_segments(flags):
    args, model = build(*flags)
    batch = inputs()
    inside = torch.ones(4, 16, dtype=torch.bool)
    inside[2:, 8:] = False
    idf = train_tseg.document_weights([VOCABULARY("red dog"), VOCABULARY("left cat")], len(VOCABULARY))
    loss = loss_of(model, args, batch, targets(inside=inside), idf if args.labels == "tfidf" else None)
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.log_scale.grad != 0
    out = model.eval().segment(model.encode_image(batch[0]), *batch[1:])
    assert len(out["prob"]) == len(out["score"]) == len(out["heat"]["S"]) == 4
    assert 0 <= out["prob"].min() <= out["prob"].max() <= 1 and out["prob"].shape[1] % 4 == 0


def test_rows_differ():
    """No two rows of the tables are the same model, loss and answer."""
    seen = {}
    for flags in ROWS:
        args, model = build(*flags)
        idf = torch.ones(len(VOCABULARY)) if args.labels == "tfidf" else None
        loss = loss_of(model, args, inputs(), targets(), idf).item()
        key = (round(loss, 5), tuple(model.segment(model.encode_image(inputs()[0]), *inputs()[1:])["prob"].shape))
        key += (args.pretrain,)  # boxes differ from masks in their targets alone
        assert key not in seen, (flags, seen[key])
        seen[key] = flags


@pytest.mark.parametrize("flags", [[], ["--pooling", "spa"], ["--pooling", "gap"]], ids=" ".join)
def test_neither_padding_nor_other_images_matter(flags):
    _, model = build(*flags)
    model.eval()
    images, image_of, text = inputs()
    with torch.inference_mode():
        out = model.segment(model.encode_image(images), image_of, text)
        padded = model.segment(model.encode_image(images), image_of, torch.nn.functional.pad(text, (0, 5)))
        alone = model.segment(model.encode_image(images[1:]), torch.tensor([0, 0]), text[2:])
    for key in ("prob", "score"):
        assert torch.allclose(out[key], padded[key], atol=1e-5) and torch.allclose(out[key][2:], alone[key], atol=1e-5)


# ---- ranks --------------------------------------------------------------------------------------------------

SHARES = [(("tabby cat", "red dog", "left brown dog right"), (0, 0, 0)), (("left dog", "tabby cat"), (0, 1))]
IDF = torch.arange(len(VOCABULARY)) / 9.0
SHARED = [([], None), (["--pooling", "spa", "--labels", "tfidf"], IDF)]  # SPA's sums, too, are over the texts of all ranks


def gradients(rank, folder):
    """One of two ranks with unlike numbers of images, texts and words: the gradients that DDP agrees on, for each of SHARED."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks, found = distributed.Ranks(rank, 2, torch.device("cpu")), []
    for flags, idf in SHARED:
        args, model = build(*flags)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        (loss_of(wrapped, args, inputs(*SHARES[rank], seed=rank), targets(*SHARES[rank]), idf, ranks) * 2 / 3).backward()
        found.append([p.grad for p in model.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    from tests.children import CONTEXT  # it imports this file
    processes = [CONTEXT.Process(target=gradients, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    images = torch.cat([inputs(*share, seed=rank)[0] for rank, share in enumerate(SHARES)])
    texts, image_of = SHARES[0][0] + SHARES[1][0], (0, 0, 0, 1, 2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for n, (flags, idf) in enumerate(SHARED):
        args, model = build(*flags)
        (loss_of(model, args, (images, *inputs(texts, image_of)[1:]), targets(texts, image_of), idf) / 3).backward()
        own = [p.grad for p in model.parameters()]
        scale = max(grad.abs().max() for grad in own)
        for of_rank in found:
            for grad, other in zip(own, of_rank[n], strict=True):
                assert (grad - other).abs().max() <= 1e-5 * max(grad.abs().max(), 1e-3 * scale)


# ---- loading and whole runs ---------------------------------------------------------------------------------

def training_set(shapes, *flags):
    args = parse(train_tseg.get_parser(), [*TINY, "--data-root", str(shapes), *flags])
    vocabulary = train_tseg.load_vocabulary(args)
    dataset = data.RefDataset(data.split_path(shapes, "refshapes", "train"), *train_tseg.frontend(args, vocabulary), None,
                              args.flip, 0, partial(train_tseg.augment, scale=args.scale))
    dataset.targets = partial(train_tseg.make_targets, args=args, widest=max(map(len, dataset.of_image)))
    return args, dataset


def test_samples_say_where_the_image_is(shapes):
    """Patches outside the rescaled image are marked; the strings are those of the mirrored expressions."""
    args, dataset = training_set(shapes, "--flip", "1")
    seen = set()
    for epoch in range(8):
        sample = dataset[(epoch, 0, dataset.of_image[0][:2])]
        frame, wanted = sample["frame"], sample["targets"]
        covered = np.zeros((32, 32))
        covered[:max(0, frame.top + frame.in_height), :max(0, frame.left + frame.in_width)] = 1
        shares = covered.reshape(4, 8, 4, 8).mean((1, 3))
        assert torch.equal(wanted["inside"][0].view(4, 4), torch.from_numpy(shares >= 0.5))
        mirrored = [train_tseg.swap_left_right(dataset.texts[e]) for e in dataset.of_image[0]]
        assert set(wanted["known"][0].tolist()) == {train_tseg.string_number(text) for text in mirrored}
        assert set(wanted["string"].tolist()) <= set(wanted["known"][0].tolist())
        assert 16 <= frame.in_width <= 64 and -32 <= frame.left <= 0
        seen.add((frame.in_width, frame.left, frame.top))
    assert len(seen) > 4


def test_an_image_of_less_than_half_a_patch_still_counts(shapes):
    _, dataset = training_set(shapes, "--scale", "0.05", "0.05")
    sample = dataset[(0, 0, dataset.of_image[0][:2])]
    assert sample["frame"].in_width == 2 and sample["targets"]["inside"].all()


def test_boxes_take_the_masks_place(shapes):
    args, dataset = training_set(shapes, "--pretrain", "boxes", "--flip", "0", "--scale", "1", "1")
    sample = dataset[(0, 0, dataset.of_image[0][:1])]
    x, y, w, h = dataset.boxes[dataset.objects_of[dataset.of_image[0][0]][0]]
    width, height = dataset.sizes[0]
    assert sample["targets"]["mask"].sum().item() == pytest.approx(w * h * 32 * 32 / (width * height), rel=0.01)


def test_text_alone_needs_no_masks(shapes):
    """Weak learning and boxes do without masks, which --full asks for."""
    for flags, needs in (([], False), (["--labels", "tfidf"], False), (["--pretrain", "boxes"], False), (["--full"], True)):
        _, dataset = training_set(shapes, *flags)
        dataset.rles = [None] * len(dataset.rles)
        assert isinstance(dataset[(0, 0, dataset.of_image[0])], UserError) == needs


def test_classes_then_class_maps(tmp_path):
    """Table 1 as a user runs it, on VOCShapes: image labels, then per-class IoU with several scales and the CRF."""
    vocshapes.SCALES["tiny"] = {"train": [("pool", 0, 8)], "val": [("val", 0, 3)]}
    vocshapes.make(tmp_path, "tiny", jobs=1)
    train_tseg.main([*TINY[:2], "yaml/tseg_voc.yaml", *TINY[2:], "--pooling", "spa", "--dataset", "vocshapes", "--data-root",
                     str(tmp_path), "--max-steps", "2", "--out", str(tmp_path / "run")])
    flags = ["--run", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]
    evaluate([*flags, "--scales", "1", "2", "--flip-test", "--crf", "deeplab", "--names", "yaml/vocshapes_names.yaml", "--save-masks"])
    name = "vocshapes_val_crf-deeplab_names-vocshapes_names_scales-1x2_flip-test"
    for name in ("vocshapes_val", name):
        summary = json.loads((tmp_path / "run" / "eval" / f"{name}.json").read_text())
        assert list(summary["classes"]) == ["background", *vocshapes.CLASSES] and summary["images"] == 3
    assert len(list((tmp_path / "run" / "eval" / f"{name}_masks").glob("*.png"))) == 3
    assert "prediction: " in (tmp_path / "run" / "report.html").read_text()
    from tests.children import finish
    rows = tmp_path / "run" / "eval" / "vocshapes_val.jsonl"
    alone = rows.read_bytes()
    rows.unlink()
    finish("eval", flags, tmp_path / "log", ranks=2)
    assert rows.read_bytes() == alone
    for wrong, says in ((["--protocol", "lavt480"], "--protocol is for sentences"), (["--task", "rec"], "--task is for sentences"),
                        (["--compare", str(tmp_path / "run")], "--compare is for sentences"),
                        (["--compare", "x", "--task", "reg"], "--compare means nothing to --task reg"),
                        (["--scales", "2", "--task", "reg"], "--scales means nothing to --task reg")):
        with pytest.raises(UserError, match=says):
            evaluate([*flags, *wrong])


def test_fractions_are_nested(shapes):
    _, dataset = training_set(shapes)
    few, many = (set(train_tseg.draw_images(dataset, share, 3).tolist()) for share in (0.25, 0.5))
    assert len(few) == 4 and len(many) == 8 and few < many
    assert np.array_equal(train_tseg.draw_images(dataset, 1, 3), dataset.with_expressions)
    with pytest.raises(UserError, match="--fraction"):
        train_tseg.draw_images(dataset, 0, 3)


def test_boxes_then_text(shapes, tmp_path):
    """Table 2e's two runs, as a user starts them: boxes, then text from there; scores are written."""
    common = [*TINY, "--data-root", str(shapes), "--max-steps", "2", "--epochs", "1"]
    train_tseg.main([*common, "--pretrain", "boxes", "--out", str(tmp_path / "boxes")])
    train_tseg.main([*common, "--init", str(tmp_path / "boxes" / "best.pt"), "--labels", "tfidf",
                     "--fraction", "0.5", "--lr", "0", "--out", str(tmp_path / "text")])
    assert json.loads((tmp_path / "text" / "eval" / "refshapes_val.json").read_text())["n"] > 0
    assert "<figcaption>S, 0." in (tmp_path / "text" / "report.html").read_text()  # the scores of the patches
    first, second = (checkpoint.load(tmp_path / name / "best.pt")["model"] for name in ("boxes", "text"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("texts, size", [
    (["zzz qqq"], (40, 30)), ([""], (40, 30)), (["§§ ☃"], (40, 30)), (["red dog"], (3, 2)),
    ([f"red dog {i}" for i in range(200)], (40, 30)), (["red dog"] * 3, (500, 1))],
                         ids=["unknown", "empty", "signs", "smaller than a patch", "200 phrases", "a line"])
@pytest.mark.parametrize("pooling", ["gap", "gmp", "spa", "mpa"])
def test_odd_requests_have_answers(texts, size, pooling):
    """Unknown words, a one-coloured image, many phrases, tiny images: finite scores, and masks as large as the image."""
    args, model = build("--pooling", pooling)
    encode, canvas = train_tseg.frontend(args, VOCABULARY)
    frame = canvas.frame(*size)
    image = frame.image_in(torch.full((3, size[1], size[0]), 77, dtype=torch.uint8), canvas.fill)
    text, image_of = data.pad_text([encode(text) for text in texts]), torch.zeros(len(texts), dtype=torch.int64)
    with torch.inference_mode():
        out = model.eval().segment(model.encode_image(image[None]), image_of, text)
    prob = frame.prob_img(out["prob"])
    assert prob.shape == (len(texts), size[1], size[0]) and prob.isfinite().all() and out["score"].isfinite().all()
    if len(texts) == 3:
        assert torch.allclose(prob[0], prob[2], atol=1e-5) and out["score"][0] == pytest.approx(out["score"][2].item(), abs=1e-5)


@pytest.mark.parametrize("step, expected", [(0, 1.0), (50, 0.5 ** 0.9), (99, 0.01 ** 0.9)])
def test_learning_rate(step, expected):
    args, _ = build("--lr", "1", "--warmup-steps", "0")
    assert train_tseg.learning_rate(args, step, 100, 10) == pytest.approx(expected)


def test_full_changes_optimiser_and_size():
    """--full and --pretrain bring the fully supervised settings; the command line still wins; neither goes with both."""
    settings = lambda *flags: parse(train_tseg.get_parser(), list(flags), train_tseg.YAML,  # noqa: E731
                                    {"full": train_tseg.FULL_YAML, "pretrain": train_tseg.FULL_YAML})
    weak, full, boxes = settings(), settings("--full"), settings("--pretrain", "boxes", "--size", "256")
    assert (weak.optimizer, weak.lr, weak.size, weak.batch_size) == ("sgd", 1e-3, 384, 32)
    assert (full.optimizer, full.lr, full.size, full.batch_size, full.name) == ("adamw", 5e-5, 512, 16, "full")
    assert (boxes.optimizer, boxes.size) == ("adamw", 256)
    assert vars(settings()) | {"yaml": None, "name": ""} == vars(train_tseg.get_parser().parse_args([])) | {
        "eval_splits": weak.eval_splits, "name": ""}


@pytest.mark.parametrize("flags, says", [
    (["--size", "33"], "multiple of --patch"), (["--patch", "0"], "multiple of --patch 0"), (["--scale", "2", "1"], "no range"),
    (["--max-words", "600"], "510 pieces"), (["--penalty-lambda", "-0.1"], "from 0 on"), (["--init-part", "vision"], "give --init"), (["--full", "--pretrain", "boxes"], "one of them"),
    (["--full", "--pooling", "spa"], "leave out --pooling"), (["--full", "--labels", "tfidf"], "leave out --pooling, --labels"),
    (["--pretrain", "boxes", "--reduction", "mean"], "and --reduction"), (["--texts", "classes", "--full"], "--texts classes is for"),
    (["--vit-heads", "0"], "--vit-heads 0 does not divide --vit-dim 12"), (["--bert-heads", "5"], "--bert-heads 5 does not divide --bert-dim")])
def test_settings_that_cannot_be(flags, says):
    args = parse(train_tseg.get_parser(), [*TINY, *flags])
    with pytest.raises(UserError, match=says):
        train_tseg.frontend(args, VOCABULARY)
        train_tseg.build_model(args, VOCABULARY)


def test_inputs_that_the_patches_do_not_fill_are_named():
    _, model = build("--patch", "12", "--size", "36")
    with pytest.raises(UserError, match="32 pixels is no multiple of --patch 12: choose other --scales"):
        model.encode_image(inputs()[0])


def test_missing_files_are_named(shapes, tmp_path):
    """Published settings on a corpus without BERT's vocabulary; a start from a run with other words."""
    with pytest.raises(UserError, match="bert_vocab.txt does not exist.*tseg_phraseshapes.yaml"):
        train_tseg.main(["--dataset", "refshapes", "--data-root", str(shapes), "--out", str(tmp_path / "run"), "--device", "cpu"])
    args, model = build()
    checkpoint.save(tmp_path / "best.pt", train_tseg.snapshot(args, model, VOCABULARY, 0, {}))
    with pytest.raises(UserError, match="expressions are names of classes"):
        train_tseg.class_texts(training_set(shapes)[1])
    args.init = str(tmp_path / "best.pt")
    with pytest.raises(UserError, match="another vocabulary than --vocab"):
        train_tseg.begin(args, model, WordPiece(wordpieces(["other words"] * 30)))


@pytest.mark.parametrize("part, same", [("all", {"vision", "language", "from_patch", "from_text", "log_scale"}), ("vision", {"vision"})])
@pytest.mark.parametrize("leaky", [False, True])
def test_begin_from_another_run(tmp_path, part, same, leaky):
    """--init takes a run of another size (Table 2e: boxes at 512, text at 384), --init-part vision leaves BERT to --text-weights."""
    args, model = build("--size", "64", *["--leaky-init"] * leaky)
    nn.init.zeros_(model.log_scale)
    checkpoint.save(tmp_path / "best.pt", train_tseg.snapshot(args, model, VOCABULARY, 0, {}))
    args, fresh = build("--init", str(tmp_path / "best.pt"), "--init-part", part, seed=1)
    assert train_tseg.begin(args, fresh, VOCABULARY) == leaky
    ours, theirs = fresh.state_dict(), model.state_dict()
    grid = ours.pop("vision.pos_embed")[:, 1:].unflatten(1, (4, 4))
    large = theirs.pop("vision.pos_embed")[:, 1:].unflatten(1, (8, 8))
    assert (grid.mean((1, 2)) - large.mean((1, 2))).abs().max() < 0.01
    other = {name.split(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert {name.split(".")[0] for name in ours} - other == same
    args.text_weights = str(tmp_path / "missing.pt")
    if part == "vision":
        with pytest.raises(UserError, match="missing.pt"):
            train_tseg.begin(args, fresh, VOCABULARY)
    else:
        train_tseg.begin(args, fresh, VOCABULARY)
