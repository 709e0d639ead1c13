"""Mutual supervision: each equation against its plain form, each stage and flag, beam search, and the edges of matching."""
import itertools
import json
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train_mutual as mutual
from common import captions, checkpoint, coco_ap, data, distributed, metrics
from common.config import UserError, parse
from common.text import SPECIAL, WordPiece
from data_prep import coco
from tests.conftest import command
from tests.test_learns import sixteen  # noqa: F401: a fixture

YAML = ["--yaml", "yaml/mutual_refshapes.yaml"]
TINY = [*YAML, *("--size 64 --dim 16 --heads 2 --ffn 16 --encoder-ffn 16 --decoder-layers 1 --queries 6 --head-layers 2 --bert-layers 1 "
                 "--bert-dim 16 --bert-heads 2 --points 32 --batch-size 4 --pretrain-batch-size 4 --dsup-batch-size 4").split(),
        "--described", "1", "--eval-splits"]
STEPS = ["--pretrain-steps", "2", "--max-steps", "2", "--dsup-steps", "2", "--rb-steps", "2", "--min-area", "0"]
VOCABULARY = WordPiece([*SPECIAL, "red", "blue", "ball", "box", "left"])
ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


def build(*flags, stage="1", seed=0):
    args = mutual.of_stage(parse(mutual.get_parser(), [*TINY, *flags]), stage)
    torch.manual_seed(seed)
    return args, mutual.build_model(args, VOCABULARY)


def batch():
    """Two images with two objects and one, four sentences, one of which means no object, one of them generated."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[8 + 16 * i:24 + 16 * i, 8:40] = True
    targets = {"masks": masks, "labels": torch.tensor([0, 3, 8]), "object": torch.arange(3), "count": torch.tensor([2, 1]),
               "meant": torch.tensor([1, 0, 0, -1]), "generated": torch.tensor([False, True, False, False])}
    text = data.pad_text([VOCABULARY(said) for said in ("red ball", "blue box left", "ball", "left")])
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([0, 0, 1, 1]), text, targets


def rewards(args, model):
    references = [[["red", "ball"]], [["blue", "box"]], [["ball"]], [["left"]]]
    return partial(mutual.reward, args=args, model=model, vocabulary=VOCABULARY, references=references,
                   df=captions.document_frequency(references))


def features(model, seed=2, images=2):
    generator = torch.Generator().manual_seed(seed)
    n, sizes = model.use.queries, {"queries": (model.use.dim,), "masks": (16, 16), "classes": (10,)}
    return {name: torch.randn(images, n, *size, generator=generator) for name, size in sizes.items()}


# ---- the model ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, flags", [
    ("pretrain", ""), ("pretrain", "--input box"), ("1", ""), ("1", "--tasks res"), ("1", "--tasks reg"), ("1", "--no-e2e"),
    ("1", "--no-indicator"), ("1", "--checkpoint-encoder"), ("1", "--dropout 0.1 --amp bf16"), ("2", ""), ("2", "--amp bf16"),
    ("2", "--reward unambiguity"), ("2", "--reward cider --baseline none"), ("2", "--score sigmoid"), ("3", "--pseudo-weight 1"),
    ("rb", "")])
def test_each_stage_trains_what_it_should(stage, flags):
    """Every parameter of a stage's parts gets a gradient, every other none, under each flag."""
    flags = flags.split()
    args, model = build(*flags, stage=stage)
    images, image_of, text, targets = batch()
    with metrics.autocast(images.device, args.amp):
        out = model.train()(images, image_of, text, targets, 1.5, rewards(args, model))
    terms = mutual.loss_terms(out, targets, text, args)
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name.split(".")[0] in mutual.TRAINED[stage]), name
    assert not any(part.training for name, part in model.named_children() if name not in mutual.TRAINED[stage])
    if stage == "1" and "--tasks" not in flags:
        model.zero_grad()
        mutual.loss_terms(model(images, image_of, text, targets), targets, text, args)["sel"].backward()
        reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.extractor.parameters())
        assert reached == ("--no-e2e" not in flags)


def test_eq1_memory_is_that_of_indicated_objects():
    _, model = build()
    O, image_of, k = features(model)["queries"], torch.tensor([1, 0, 1]), torch.tensor([0, 5, 3])
    for layer, (keys, values) in zip(model.generator.layers, model.generator.memory(O, image_of, k)):
        for e in range(3):
            Z = torch.stack([model.generator.positive if i == k[e] else model.generator.negative for i in range(6)])
            expected = layer.cross.keys((O[image_of[e]] + Z)[None])
            assert torch.allclose(keys[e], expected[0][0], atol=1e-5) and torch.allclose(values[e], expected[1][0], atol=1e-5)
    _, model = build("--no-indicator")
    assert model.generator.memory(O, image_of, k)[0][0].shape[2] == 1


def test_eq2_and_weights_by_hand():
    """L_gen sums over a sentence's words and leaves out generated ones; L_sel weighs them; k = -1 teaches nothing."""
    args, _ = build("--pseudo-weight", "0.1", "--gen-weight", "2")
    _, _, text, targets = batch()
    k, scores, words = torch.tensor([2, 1, 0, -1]), torch.randn(4, 6), torch.randn(3, text.shape[1] - 1, len(VOCABULARY))
    terms = mutual.loss_terms({"k": k, "scores": scores, "words": words, "read": ~targets["generated"]}, targets, text, args)
    gen = sum(words[n, t].softmax(-1)[text[e, t + 1]].log() for n, e in ((0, 0), (1, 2)) for t in range(text.shape[1] - 1)
              if text[e, t + 1])
    sel = sum(weight * scores[e].softmax(-1)[k[e]].log() for e, weight in ((0, 1), (1, 0.1), (2, 1)))
    assert torch.allclose(terms["gen"], -2 * gen) and torch.allclose(terms["sel"], -sel)
    batches = [[(0, 0, [0, 1]), (0, 1, [2])], [(0, 2, [3])]]  # the fifth sentence is not drawn
    weighs = mutual.mean_weights(args, SimpleNamespace(sources=["generated", "", "", "", "generated"]), batches)
    assert weighs == pytest.approx({"sel": (0.1 + 3) / 4, "gen": 3 / 4})


@pytest.mark.parametrize("generated, read", [((False, True, False, False), 3), ((True, True, True, True), 1)])
def test_the_generation_head_reads_no_generated_sentences(generated, read):
    """The gradient is that of all sentences read and the generated ones then left out, and no parameter is without one, as DDP
    wants it: of generated ones alone the head reads one, at no weight."""
    args, model = build(stage="3")
    images, image_of, text, targets = batch()
    targets["generated"], gradients = torch.tensor(generated), []
    for told in (targets, targets | {"generated": torch.zeros(4, dtype=torch.bool)}):
        model.zero_grad()
        torch.manual_seed(3)  # of the points where masks are compared
        out = model.train()(images, image_of, text, told, 1.5)
        assert len(out["words"]) == out["read"].sum() == (read if told is targets else 4)
        sum(mutual.loss_terms(out, targets, text, args).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(gradients[0][name], grad, rtol=1e-4, atol=1e-5) for name, grad in gradients[1].items())
    assert any(p.grad.any() for p in model.generator.parameters()) == (read > 1)


def test_eq3_equals_its_plain_form():
    """Each sentence alone, unpadded, on its own copy of the proposals, through the same layers."""
    _, model = build()
    head, (_, image_of, text, _) = model.eval().selector, batch()
    O = features(model)["queries"]
    with torch.no_grad():
        found = head(O, image_of, F.pad(text, (0, 3)))
        for e in range(len(text)):
            ids = text[e, text[e] != 0][None]
            words, x = head.project(head.bert(ids, ids != 0)), O[image_of[e]][None]
            for layer in head.layers:
                x = layer.norms[0](x + layer.own(x, layer.own.keys(x)))
                x = layer.norms[1](x + layer.cross(x, layer.cross.keys(words)))
                x = layer.norms[2](x + layer.feed_forward(x))
            assert torch.allclose(found[e], head.score(x)[0, :, 0], atol=1e-5)


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_eq4_gradient(baseline):
    r, valid = torch.tensor([[3.0, 1.0, 2.0], [5.0, 9.0, 9.0]]), torch.tensor([[True, True, True], [True, False, False]])
    log_p = torch.randn(2, 3, requires_grad=True)
    mutual.policy_loss(log_p, r, valid, baseline).backward()
    expected = {"none": [[3.0, 1.0, 2.0], [15.0, 0.0, 0.0]], "mean": [[1.5, -1.5, 0.0], [0.0, 0.0, 0.0]]}[baseline]
    assert torch.allclose(log_p.grad, -torch.tensor(expected) / 3)


@pytest.mark.parametrize("flags", ["", "--reward unambiguity --tau 1 --alpha 1", "--score sigmoid", "--reward cider"])
def test_eq5_and_6(flags):
    args, model = build("--hypotheses", "2", *flags.split())
    model.eval()
    seen, image_of, k = features(model), torch.tensor([0, 1, 0, 1]), torch.tensor([2, 4, 0, -1])
    both = [([VOCABULARY.ids[word] for word in said.split()], -1.0) for said in ("red ball", "box")]
    found = [both, both[:1], both, [([], -np.inf)]]
    reward = rewards(args, model)
    values, shown = reward(seen, image_of, k, found)
    for e, r in ((0, 0), (0, 1), (1, 0), (2, 1)):
        said = VOCABULARY.decode(found[e][r][0])
        with torch.no_grad():
            S = model.select(seen, image_of[e:e + 1], torch.tensor([VOCABULARY(said)]))[0]
        share = S[k[e]].sigmoid() if args.score == "sigmoid" else (S[k[e]] / args.tau).exp() / (S / args.tau).exp().sum()
        cider = captions.cider_d([said.split()], [reward.keywords["references"][e]], reward.keywords["df"])[0]
        expected = args.alpha * share * (args.reward != "cider") + cider * (args.reward != "unambiguity")
        assert values[e, r].item() == pytest.approx(float(expected), abs=1e-4)
    assert values[1, 1] == 0 and not values[3].any()
    assert sum(shown.values()).item() == pytest.approx(values[:, 0].sum().item())


def test_beam_search_is_exhaustive_and_caches_are_exact():
    """A beam as wide as the number of sentences finds all of them, at the log p that one uncached pass gives them."""
    _, model = build()
    model.eval()
    seen, image_of, k = features(model), torch.tensor([0, 1]), torch.tensor([3, 1])
    pieces = [i for i in range(len(VOCABULARY)) if i not in (0, 1, 2, 3, 4)]
    every = [list(ids) for length in (1, 2, 3) for ids in itertools.product(pieces, repeat=length)]
    ids, _ = model.generator.rows([[(said, 0.0) for said in every]] * 2, len(every), "cpu")
    with torch.no_grad():
        log_p = model.generator.log_p(seen["queries"], image_of, k, ids)
    found = model.describe(seen, image_of, k, len(every), 3, len(every))
    for e in range(2):
        expected = sorted(zip(every, log_p[e].tolist()), key=lambda pair: -pair[1])
        assert [said for said, _ in found[e][:20]] == [said for said, _ in expected[:20]] and len(found[e]) == len(every)
        assert np.allclose([p for _, p in found[e]], [p for _, p in expected], atol=1e-4)
    narrow = model.describe(seen, image_of, k, 3, 3, 2)
    assert all(len(n) == 2 and n[0][1] <= f[0][1] + 1e-5 for n, f in zip(narrow, found))
    alone = model.describe(seen, image_of[1:], k[1:], 3, 3, 2)[0]
    assert [said for said, _ in alone] == [said for said, _ in narrow[1]]
    assert np.allclose(alone[0][1], narrow[1][0][1], atol=1e-5)
    with pytest.raises(UserError, match="31 word pieces"):
        model.describe(seen, image_of, k, 3, 31)


def test_neither_padding_nor_neighbours_matter():
    _, model = build()
    images, image_of, text, _ = batch()
    with torch.inference_mode():
        out = model.eval().segment(model.encode_image(images), image_of, F.pad(text, (0, 4)))
        alone = model.segment(model.encode_image(images[1:]), torch.tensor([0]), text[2:3, :3])
    assert out["prob"].shape == (4, 64, 64) and torch.allclose(out["prob"][2:3], alone["prob"], atol=1e-5)
    assert torch.allclose(out["score"], out["proposals"].amax(1)) and torch.allclose(out["proposals"].sum(1), torch.ones(4))
    assert torch.allclose(out["heat"]["S"][2:3], alone["heat"]["S"], atol=1e-5)


# ---- objects and proposals ----------------------------------------------------------------------------------

def test_locate_none_one_and_a_hundred():
    """Each object its own proposal; without objects nothing; of a hundred objects as many as there are proposals."""
    _, model = build()
    seen = features(model)
    own = F.interpolate((seen["masks"] > 0).float(), scale_factor=4).bool()                       # proposals' masks as objects
    k = model.locate(seen, torch.tensor([0, 1, 1]), torch.stack([own[0, 4], own[1, 2], own[1, 0]]))
    assert k.tolist() == [4, 2, 0]
    twins = {**seen, "masks": seen["masks"][:, [0, 1, 2, 3, 4, 4]], "classes": seen["classes"].clone()}
    for surer in (4, 5):
        twins["classes"][0, 4:, -1] = 9 * (torch.tensor([4, 5]) != surer)
        assert model.locate(twins, torch.tensor([0]), own[:1, 4]).tolist() == [surer]
    assert model.locate(seen, torch.zeros(0, dtype=torch.int64), own[0, :0]).shape == (0,)
    many = model.locate(seen, torch.zeros(100, dtype=torch.int64), torch.rand(100, 64, 64) > 0.5)
    assert sorted(many[many >= 0].tolist()) == list(range(6)) and (many == -1).sum() == 94
    assert model.describe(seen, torch.zeros(3, dtype=torch.int64), torch.tensor([1, -1, 0]))[1] == [([], -np.inf)]
    assert model.describe(seen, torch.zeros(1, dtype=torch.int64), torch.tensor([-1])) == [[([], -np.inf)]]


@pytest.mark.parametrize("stage", ["pretrain", "1", "2", "rb"])
@pytest.mark.parametrize("objects", [0, 100])
def test_stages_on_images_with_no_object_and_with_a_hundred(stage, objects):
    args, model = build(stage=stage)
    images, image_of, text, _ = batch()
    targets = {"masks": torch.rand(2 * objects, 64, 64) > 0.5, "labels": torch.zeros(2 * objects, dtype=torch.int64),
               "count": torch.tensor([objects, objects]), "meant": torch.full((4,), objects - 1),
               "generated": torch.zeros(4, dtype=torch.bool)}
    out = model(images, image_of, text, targets, float(objects), rewards(args, model))
    terms = mutual.loss_terms(out, targets, text, args)
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_propose_gives_one_of_two_copies():
    _, model = build()
    seen = features(model, images=1)
    seen["masks"].fill_(-5)
    seen["masks"][0, :2, 2:9, 2:9] = 5  # two copies, one of them surer, and another instance
    seen["masks"][0, 2, 10:, 10:] = 5
    seen["classes"].fill_(-9)[..., -1] = 9
    for i, logit in enumerate((9.0, 8.0, 8.5)):
        seen["classes"][0, i, i], seen["classes"][0, i, -1] = logit, 0
    (index, score, prob), = model.propose(seen, 0.5)
    assert index.tolist() == [0, 2] and (score > 0.9).all() and prob.shape == (2, 64, 64)
    assert model.propose(seen, 1.1)[0][2].shape == (0, 64, 64)


def test_filled_boxes():
    masks = torch.rand(5, 9, 7) > 0.9
    masks[0] = False
    for mask, box in zip(masks, mutual.filled_boxes(masks)):
        y, x = torch.nonzero(mask, as_tuple=True)
        expected = torch.zeros_like(mask)
        if len(y):
            expected[y.min():y.max() + 1, x.min():x.max() + 1] = True
        assert torch.equal(box, expected)


# ---- corpora ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def root(shapes):
    coco.shapes(shapes, jobs=1)
    return shapes


def test_targets(root):
    """An image's objects without crowds, each sentence's place among them, also when jitter moves one off the canvas."""
    path = root / "refshapes" / "train.json"
    prepared = data.load_prepared(path)
    image, first = prepared["images"][0]["id"], prepared["objects"][0]
    crowd = next(o for o in prepared["objects"] if o["image_id"] == image and o is not first)
    crowd["iscrowd"] = 1
    make = partial(mutual.make_targets, box=False, stride=1)
    dataset = mutual.labelled(data.RefDataset(path, lambda text: [1], data.Canvas(64), make, prepared=prepared), 9)
    keys = (0, 0, dataset.of_image[0])
    targets = dataset[keys]["targets"]
    inside = [o for o in prepared["objects"] if o["image_id"] == image and not o["iscrowd"]]
    assert targets["count"].item() == len(inside) == len(targets["masks"])
    assert targets["labels"].tolist() == [o["category_id"] - 1 for o in inside]
    for e, meant in zip(dataset.of_image[0].tolist(), targets["meant"].tolist()):
        named = prepared["expressions"][e]["object_ids"][0]
        assert (inside[meant]["id"] if meant >= 0 else crowd["id"]) == named
    seen = [dataset.view(augment=partial(mutual.jitter, low=3, high=3), seed=seed)[keys]["targets"] for seed in range(5)]
    assert any(t["count"] < len(inside) for t in seen) and all(t["masks"].flatten(1).any(1).all() for t in seen)
    with pytest.raises(UserError, match="9 categories"):
        mutual.labelled(dataset, 80)
    bare = prepared | {"objects": [o for o in prepared["objects"] if o["image_id"] != image],
                       "expressions": mutual.blank_sentences(prepared["images"])}
    bare = mutual.labelled(data.RefDataset(path, lambda text: [1], data.Canvas(64), make, prepared=bare), 9)
    none = bare[(0, 0, bare.of_image[0])]["targets"]
    assert none["masks"].shape == (0, 64, 64) and none["count"].item() == bare.objects_in[0] == 0 and none["meant"].tolist() == [-1]


def test_average_precision_of_the_truth(root):
    path = root / "cocoshapes" / "val.json"
    dataset = mutual.labelled(data.RefDataset(path, lambda text: [1], data.Canvas(128), prepared=mutual.wordless(path)), 9)

    class Oracle(torch.nn.Module):
        images = iter(range(len(dataset.image_ids)))

        def encode_image(self, pictures):
            masks, classes = torch.full((len(pictures), 12, 128, 128), -9.0), torch.full((len(pictures), 12, 10), -9.0)
            for b in range(len(pictures)):
                image = next(self.images)
                frame = dataset.canvas.frame(*map(int, dataset.sizes[image]))
                for n, i in enumerate(np.flatnonzero(dataset.object_image == image)):
                    masks[b, n] = 18 * frame.masks_in(dataset.object_mask(i)[None])[0] - 9
                    classes[b, n, dataset.labels[i]] = 9
            return {"masks": masks, "classes": classes}

    assert coco_ap.average_precision(Oracle(), dataset, ALONE) > 90 and coco_ap.coco_ap([], {}) == 0
    Oracle.images = iter(range(len(dataset.image_ids)))
    assert coco_ap.average_precision(Oracle(), dataset, ALONE, region=mutual.filled_boxes) < 80  # masks are no boxes
    damaged = [{**rle, "counts": "0"} for rle in dataset.rles]  # pycocotools would read what no pixel stands in
    dataset.checked.clear()
    Oracle.images = iter(range(len(dataset.image_ids)))
    with pytest.raises(UserError, match="val.json, object"):
        coco_ap.average_precision(Oracle(), dataset.view(rles=damaged), ALONE)


@pytest.mark.parametrize("flags", ["--min-area 0", "--min-area 500", "--min-area 500 --pseudo-filter random"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_generated_sentences_join_the_corpus(root, flags, share):
    """Of the objects described those that the filter keeps, beside the sentences of the images that count as described."""
    args = parse(mutual.get_parser(), [*TINY, *flags.split(), "--data-root", str(root), "--described", str(share)])
    pool = mutual.with_pool(args, partial(mutual.undescribed, args=args))
    real = data.RefDataset(root / "refshapes" / "train.json", None, None)
    assert len(pool) == 2 + round((1 - share) * 16) and set(pool.texts) == {""}
    objects = np.flatnonzero(np.isin(pool.object_image, pool.with_expressions))
    objects = objects[np.argsort(pool.areas[objects])][::2]
    said = {int(pool.object_ids[i]): ["red ball", "the left one"] for i in objects}
    merged = mutual.with_pool(args, partial(mutual.real_and_generated, generated=said, args=args))
    new = [e for e, source in enumerate(merged.sources) if source == "generated"]
    large = {int(pool.object_ids[i]) for i in objects if pool.areas[i] > args.min_area}
    meant = {int(merged.object_ids[merged.objects_of[e][0]]) for e in new}
    assert len(meant) == len(large) > 0 and ("random" in flags or meant == large)
    assert len(new) == 2 * len(meant) and len({int(merged.ref_ids[e]) for e in new}) == len(meant)
    old = {text for e, text in enumerate(merged.texts) if e not in new}
    assert old <= set(real.texts) and (len(merged) - len(new) == len(real)) == (share == 1)
    images = [{int(merged.expression_image[e]) for e in range(len(merged)) if (e in new) == side} for side in (True, False)]
    assert not images[0] & images[1]
    for image in (0, int(merged.expression_image[new[0]])):
        assert merged.picture(image).shape == (3, *merged.sizes[image][::-1])
    if share == 1:
        with pytest.raises(UserError, match="nothing to describe"):
            mutual.with_pool(args, lambda train, pool: mutual.undescribed(train, pool | {"images": []}, args))
    with pytest.raises(UserError, match="object 5 was described"):
        mutual.with_pool(args, partial(mutual.real_and_generated, generated={5: ["x"]}, args=args))


@pytest.mark.parametrize("stage, step, expected", [
    ("1", 59999, 5e-4), ("1", 60003, 5e-5), ("1", 80001, 5e-6), ("3", 80001, 5e-6), ("2", 19999, 1e-6),
    ("pretrain", 327777, 1e-4), ("pretrain", 356000, 1e-6)])
def test_learning_rates_of_appendix_b(stage, step, expected):
    args = mutual.of_stage(parse(mutual.get_parser(), [], own_yaml=mutual.YAML), stage)
    assert mutual.learning_rate(args, step, args.max_steps) == pytest.approx(expected, rel=1e-6)
    expected = {"1": (90000, 8), "2": (20000, 4), "3": (90000, 8), "pretrain": (368750, 16)}
    assert (args.max_steps, args.batch_size) == expected[stage]


def test_parameter_groups():
    """Backbone and BERT at a tenth, norms and embeddings without decay, everything trained in exactly one group."""
    args, model = build("--backbone-lr", "0.1", "--bert-lr", "0.1", "--weight-decay", "0.05")
    groups = mutual.parameter_groups(args, model)
    where = {id(p): (group["share"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = {name: where.pop(id(p)) for name, p in model.named_parameters()}
    assert not where
    for part, expected in (("extractor.backbone.stem.0.0.weight", (0.1, 0.05)), ("extractor.backbone.stem.0.1.weight", (0.1, 0.0)),
                           ("selector.bert.embeddings.word_embeddings.weight", (0.1, 0.0)), ("generator.positive", (1.0, 0.0)),
                           ("selector.layers.0.own.query.weight", (1.0, 0.05)), ("extractor.predictor.query_feat.weight", (1.0, 0.0))):
        assert names[part] == expected, part


# ---- the chain ----------------------------------------------------------------------------------------------

def test_chain_resumes_between_its_stages(root, tmp_path, capsys):
    """All stages, one after the other; what is done is not done again; what a stage did not train is as it was."""
    flags, out = [*TINY, *STEPS, "--data-root", str(root), "--out", str(tmp_path / "run")], tmp_path / "run"
    with pytest.raises(UserError, match="pretrain/best.pt does not exist"):
        mutual.main([*flags, "--stage", "1"])
    with pytest.raises(UserError, match="say --leaky-init"):
        mutual.main([*flags, "--stage", "1", "--official", "model_final.pkl"])
    mutual.main([*flags, "--stage", "pretrain", "1"])
    assert not (out / "2").exists()
    one = (out / "1" / "best.pt").read_bytes()
    mutual.main(flags)
    said = capsys.readouterr().out
    assert "stage 1 is done" in said and (out / "generate" / "done.json").is_file()
    weights = {stage: checkpoint.load(out / stage / "best.pt")["model"] for stage in ("1", "2", "3", "rb")}
    for stage, parts in (("2", ("extractor", "selector")), ("rb", ("extractor", "generator"))):
        same = {name for name, value in weights[stage].items() if torch.equal(value, weights["1"][name])}
        assert {name for name in weights["1"] if name.split(".")[0] in parts} <= same < set(weights["1"])
    mutual.main(flags)
    said = capsys.readouterr().out
    assert all(f"stage {stage} is done" in said for stage in mutual.STAGES)
    with pytest.raises(UserError, match="begun with --alpha"):
        mutual.main([*flags, "--alpha", "1"])
    with pytest.raises(UserError, match="begun with another .*1/best.pt than is there now"):
        shutil.copy(out / "3" / "best.pt", out / "1" / "best.pt")
        mutual.main([*flags, "--stage", "2"])
    (out / "1" / "best.pt").write_bytes(one)

    # killed after three of four steps, and gone on: the weights of the unbroken run
    more = [*flags[:-1], str(tmp_path / "four"), "--reuse", str(out), "--stage", "1", "--max-steps", "4", "--save-every", "1"]
    mutual.main(more)
    last = tmp_path / "four" / "1" / "last.pt"
    whole = checkpoint.load(last)["model"]
    last.with_name("prev.pt").replace(last)
    mutual.main(more)
    assert "from step 3" in capsys.readouterr().out
    assert all(torch.equal(value, whole[name]) for name, value in checkpoint.load(last)["model"].items())

    # generate: cut short in the middle of a line, written on by two shards' worth, nothing twice
    folder = out / "generate"
    whole = {line["image"]: line for line in mutual.read_shards(folder)}
    text = (folder / "rank0.jsonl").read_text().splitlines()
    (folder / "rank0.jsonl").write_text("\n".join(text[:-1] + [text[-1][:30]]))
    (folder / "done.json").unlink()
    mutual.main([*flags, "--stage", "generate"])
    assert {line["image"]: line for line in mutual.read_shards(folder)} == whole and len(whole) == 2
    (folder / "done.json").unlink()
    for done in (False, True):
        (folder / "done.json").write_text("{}") if done else None
        for more, what in (("--expressions 2", "expressions 3 instead of 2"), ("--input box", "input mask instead of box"),
                           ("--no-dsup", "checkpoint [0-9a-f]{12} instead of")):
            with pytest.raises(UserError, match=f"holds sentences made with {what}"):
                mutual.main([*flags, "--stage", "generate", *more.split()])
    for more, what in (("--expressions 4", "expressions 3 instead of 4"), ("--dataset refshapes+", "dataset refshapes instead of")):
        with pytest.raises(UserError, match=what):
            mutual.main([*flags[:-1], str(tmp_path / "five"), "--reuse", str(out), "--stage", "3", *more.split()])

    # step 3 on top of step 1
    args = mutual.of_stage(parse(mutual.get_parser(), [*flags, "--retrain-from", "1"]), "3")
    model, vocabulary = mutual.build_model(args, mutual.load_vocabulary(args)), mutual.load_vocabulary(args)
    mutual.begin(args, model, vocabulary, mutual.origins(args, out))
    one = checkpoint.load(out / "1" / "best.pt")["model"]
    assert mutual.needed(args) == ["1", "generate"] and all(torch.equal(one[name], value) for name, value in model.state_dict().items())

    # another run's stages serve, its proposals also with another vocabulary
    mutual.main([*flags[:-1], str(tmp_path / "plus"), "--reuse", str(out), "--stage", "1", "--dataset", "refshapes+"])
    for stage in ("2", "rb"):
        with pytest.raises(UserError, match="another vocabulary"):
            mutual.main([*flags[:-1], str(tmp_path / "other"), "--reuse", str(out), "--stage", stage, "--dataset", "refshapes+"])
    shutil.rmtree(tmp_path / "other")
    mutual.main([*flags[:-1], str(tmp_path / "other"), "--reuse", str(out), "--stage", "2", "--reward", "unambiguity"])
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["2"]


def test_stages_are_scored_where_that_is_not_done(tmp_path, monkeypatch):
    """By the listener of --reuse where the run has none, under its name; again when listener or stage are newer than the scores."""
    run, listener, calls = tmp_path / "run", tmp_path / "other" / "rb" / "best.pt", []
    for path in (run / "1" / "best.pt", run / "2" / "best.pt", listener):
        path.parent.mkdir(parents=True)
        path.touch()
    suffix = {"res": "", "reg": f"_reg_listener-{'_'.join(tmp_path.parts[-2:])}_other_rb_best"}

    def evaluate(argv, _):
        flags = parse(evaluation.get_parser(), argv)
        assert flags.listener == (str(listener) if flags.task == "reg" else "")
        calls.append((flags.run[-1], flags.task))
        file = Path(flags.run) / "eval" / f"refshapes_val{suffix[flags.task]}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"split": "val", "CIDEr": 0.5}))
    monkeypatch.setattr(evaluation, "main", evaluate)
    args = parse(mutual.get_parser(), [*TINY, "val", "--reuse", str(tmp_path / "other")])
    for touched, expected in ((None, [("1", "res"), ("1", "reg"), ("2", "reg")]), (None, []),
                              (listener, [("1", "reg"), ("2", "reg")]), (run / "2" / "best.pt", [("2", "reg")])):
        if touched:
            os.utime(touched, (10 ** 10,) * 2)
        calls.clear()
        mutual.evaluate_stages(args, ALONE, run)
        assert calls == expected
        if touched:
            os.utime(touched, (0, 0))


@pytest.mark.parametrize("flags, stages", [
    ("", "pretrain 1 2 generate 3 rb"), ("--no-dsup", "pretrain 1 generate 3 rb"), ("--no-gsup", "pretrain 1 2 rb"),
    ("--tasks res", "pretrain 1"), ("--tasks res --reuse x", "pretrain 1 3"), ("--tasks reg", "pretrain 1"),
    ("--official x.pkl", "1 2 generate 3 rb"), ("--stage rb 2", "2 rb"),
    ("--stage 1 2 --tasks reg", UserError("2 makes no sense with --tasks reg")),
    ("--stage pretrain --official x.pkl", UserError("pretrain makes no sense with --official")),
    ("--stage all 2", UserError("stands alone"))])
def test_chosen_stages(flags, stages):
    args = parse(mutual.get_parser(), [*TINY, *flags.split()])
    if isinstance(stages, UserError):
        with pytest.raises(UserError, match=str(stages)):
            mutual.chosen_stages(args)
    else:
        assert mutual.chosen_stages(args) == stages.split()


@pytest.mark.parametrize("flags, stage, sentence", [
    ("--weights w.pt", "pretrain", "w.pt does not exist"), ("--weights w.pt", "1", ""), ("--weights there.pt", "pretrain", ""),
    ("--bert-weights b.pt", "1", "b.pt does not exist"), ("--bert-weights b.pt", "rb", "b.pt does not exist"),
    ("--bert-weights b.pt --tasks reg", "1", ""), ("--bert-weights b.pt", "2", ""), ("--bert-weights b.pt", "3", ""),
    ("--official o.pkl --leaky-init", "1", "o.pkl does not exist"), ("--official there.pt", "1", "say --leaky-init"),
    ("--reuse runs/x", "2", "runs/x: there is no such run")])
def test_files_are_asked_for_before_a_chain_begins(tmp_path, monkeypatch, flags, stage, sentence):
    """Of stages that are still to begin: here all but 3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "3").mkdir(parents=True)
    for name in ("there.pt", "run/3/last.pt"):
        (tmp_path / name).touch()
    args = parse(mutual.get_parser(), [*TINY, *flags.split()])
    if sentence:
        with pytest.raises(UserError, match=sentence):
            mutual.check_files(args, ["generate", stage], tmp_path / "run")
    else:
        mutual.check_files(args, ["generate", stage], tmp_path / "run")


@pytest.mark.parametrize("name, flags", [("swin.pth", "--weights {}"), ("m2f.pkl", "--weights none --official {} --leaky-init")])
def test_weights_that_do_not_fit_are_named(tmp_path, name, flags):
    path = tmp_path / name
    with open(path, "wb") as file:
        torch.save({"model": {}}, file) if name == "swin.pth" else pickle.dump({"model": {"a": np.ones(2, "f4")}}, file)
    args, model = build(*flags.format(path).split(), stage="1" if "official" in flags else "pretrain")
    with pytest.raises(UserError, match=f"{name}: these weights"):
        mutual.begin(args, model, VOCABULARY, {})


@pytest.mark.parametrize("flags, sentence", [
    ("--tau 0", "--tau 0 divides"), ("--points 0", "--points are at least 1"), ("--dim 18 --heads 2", "--heads and 4 must divide"),
    ("--size 100", "not a multiple of 32"), ("--jitter 2 1", "no range of factors"),
    ("--hypotheses 1", "needs --baseline none"), ("--described 0", "is no share"), ("--max-words 511", "BERT reads 510")])
def test_settings_that_cannot_be(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        args, _ = build(*flags.split())
        mutual.frontend(args, VOCABULARY)


# ---- overfitting gates --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_overfits_sixteen_images(sixteen):  # noqa: F811
    """16 images: every sentence finds its object, and every object is described in the very words of one of its sentences."""
    coco.shapes(sixteen, jobs=1)
    shutil.copy(sixteen / "cocoshapes" / "train.json", sixteen / "cocoshapes" / "val.json")
    # whole words: a vocabulary of so few sentences spells most of them, and 15 pieces would hold half a sentence
    texts = [e["text"] for e in json.loads((sixteen / "refshapes" / "train.json").read_text())["expressions"]]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    (sixteen / "refshapes" / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    out = sixteen / "run"
    done = command("train_mutual.py", *YAML, "--data-root", sixteen, "--out", out, *(
        "--stage pretrain 1 --described 1 --flip 0 --jitter 1 1 --jitter-flip 0 --size 160 --pretrain-steps 500 --max-steps 1000 "
        "--eval-every 100000 --eval-splits val").split(), timeout=3000)
    assert done.returncode == 0, done.stderr
    reached = json.loads((out / "1" / "eval" / "refshapes_val.json").read_text())["mIoU"]
    rows = [json.loads(line) for line in (out / "1" / "eval" / "refshapes_val_reg.jsonl").read_text().splitlines()]
    right = sum(captions.tokenize(row["sentence"]) in [captions.tokenize(text) for text in row["references"]] for row in rows)
    print(f"mIoU {reached:.2f}, {right} of {len(rows)} objects word for word")
    assert reached >= 90 and len(rows) >= 16 and right >= max(16, 0.9 * len(rows))
