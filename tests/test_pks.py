"""PKS: the equations against naive loops, each flag, targets by hand, and the invariances that evaluation relies on."""
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_pks
from common import data
from common.config import UserError, parse
from common.matrix_nms import matrix_nms
from common.text import Vocabulary
from data_prep import clicks
from eval import main as evaluate_run
from tests.conftest import command

VOCABULARY = Vocabulary([f"w{i}" for i in range(20)])
TINY = ["--yaml", "yaml/pks_refshapes.yaml", "--size", "64", "--dim", "16", "--text-dim", "16", "--kernel-dim", "8",
        "--batch-size", "4", "--workers", "0", "--eval-splits", "val", "--amp", "off", "--levels", "1-5"]
WEAK = [["--weak", "--weak-labels", labels] for labels in train_pks.WEAK_LABELS]
ROWS = [[], ["--no-kernel"], ["--fusion", "mean"], ["--fusion", "multiply"], ["--fusion", "concat"], ["--steps", "1"],
        ["--steps", "2"], ["--levels", "5"], ["--levels", "3-5"], ["--msf-kernel", "1"], ["--no-scaled-attention"],
        ["--focal-alpha", "0.25"], ["--focal-gamma", "2"],
        ["--no-kernel", "--fusion", "concat", "--levels", "2-3"], *WEAK, [*WEAK[1], "--no-balanced"],
        [*WEAK[3], "--no-kernel"], [*WEAK[3], "--gcrf-rgb", "unit"]]


def build(*flags, seed=0):
    args = parse(train_pks.get_parser(), [*TINY, *flags], overlays={"weak": train_pks.WEAK_YAML})
    torch.manual_seed(seed)
    return args, train_pks.build_model(args, VOCABULARY)


def inputs(seed=1, size=64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10]])
    return images, torch.tensor([0, 1, 1]), text


def targets(centres=((20, 30), (63, 1), (40, 40)), size=64):
    masks, labels = torch.zeros(3, size // 4, size // 4), torch.full((3, size // 4, size // 4), -1, dtype=torch.int8)
    masks[:, 4:10, 3:9] = 1
    labels[:, 6:8, 5:7], labels[:, 12:] = 1, 0
    frame = data.Canvas(size).frame(size, size)
    return {"mask": masks, "labels": labels, "inside": torch.ones_like(masks).bool(),
            "cells": train_pks.cells_round(np.array(centres, float), frame)}


def step(args, model, of=None):
    terms = train_pks.loss_terms(model(*inputs()), targets() if of is None else of, args)
    sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_every_row_trains_and_segments(monkeypatch, flags):
    """Every parameter gets a gradient in every ablation, and the output is what evaluation expects, all sentences together or one
    at a time."""
    args, model = build(*flags)
    terms = step(args, model)
    assert all(torch.isfinite(term) for term in terms.values()) and set(terms) >= {"pos", "seg"}
    assert ("gcrf" in terms) == (args.weak and args.weak_labels == "superpixel_gcrf")
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    images, image_of, text = inputs()
    out = model.eval().segment(model.encode_image(images), image_of, text)
    assert out["prob"].shape == (3, 16, 16) and 0 <= out["prob"].min() <= out["prob"].max() <= 1
    assert list(out["heat"]) == [f"level{i}" for i in train_pks.parse_levels(args.levels)] and len(out["score"]) == 3
    if args.fusion == "msf":
        assert out["word_attention"].shape == (3, args.steps, 4) and (out["word_attention"][1, :, 1:] == 0).all()
    monkeypatch.setattr(train_pks, "CACHE", 1)
    with torch.no_grad():
        alone = model.segment(model.encode_image(images), image_of, text)
    for name, value in {"prob": out["prob"], "score": out["score"], **out["heat"]}.items():
        assert torch.allclose(alone["heat"].get(name, alone.get(name)), value, atol=1e-5), name


def test_rows_differ():
    """No two rows of Tables III-VI and IX are the same model and the same loss."""
    seen = {}
    for flags in ROWS:
        args, model = build(*flags)
        key = (args.weak and args.weak_labels, sum(p.numel() for p in model.parameters()),
               round(sum(step(args, model).values()).item(), 5))  # the weak labels themselves: test_weak_targets
        assert key not in seen, (flags, seen[key])
        seen[key] = flags


@pytest.mark.parametrize("kernel, scaled, scale", [(1, "--scaled-attention", 0.25), (3, "--no-scaled-attention", 1.0)])
def test_fusion_equals_its_equations(kernel, scaled, scale):
    """Eq. 1-4 for each sentence, word and channel by itself, with phi_F applied before the average as printed."""
    _, model = build("--steps", "3", "--msf-kernel", str(kernel), scaled)
    head, level = model.position_head, torch.randn(2, 16, 5, 6)
    states, known = torch.randn(3, 4, 16), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    image_of = torch.tensor([0, 1, 1])
    (heat,), (fused,), attention = head([head.look(level)], image_of, states, known)
    for e in range(3):
        x = level[image_of[e]]
        for j, one in enumerate(head.steps):
            projected = torch.einsum("dc,chw->dhw", one.phi_f.weight, x) + one.phi_f.bias[:, None, None]
            average = projected.mean((1, 2))
            summed = torch.zeros(16)
            for t in range(int(known[e].sum())):
                word = one.phi_s.weight @ states[e, t] + one.phi_s.bias
                weight = 1 / (1 + torch.exp(-scale * (word @ average)))
                assert attention[e, 0, j, t].item() == pytest.approx(weight.item(), abs=1e-5)
                summed = summed + weight * word
            sentence = one.varphi_s.weight @ summed + one.varphi_s.bias
            visual = one.varphi_f(x[None])[0]
            x = torch.stack([sentence[c] * visual[c] for c in range(16)])
        assert torch.allclose(fused[e], x, atol=1e-4)
        assert torch.allclose(heat[e], head.read(x[None])[0, 0], atol=1e-4)


@pytest.mark.parametrize("fusion", ["multiply", "concat", "mean"])
def test_other_fusions_equal_their_plain_form(fusion):
    """Table IV: the words' mean beside, times, or after the convolution of the features."""
    _, model = build("--fusion", fusion, "--steps", "1", "--msf-kernel", "1")
    head, level, states = model.position_head, torch.randn(1, 16, 5, 6), torch.randn(1, 3, 16)
    one = head.steps[0]
    _, (fused,), attention = head([head.look(level)], torch.tensor([0]), states, torch.ones(1, 3, dtype=torch.bool))
    words = one.phi_s(states).mean(1)[0]
    if fusion == "mean":
        expected = one.varphi_s(words)[:, None, None] * one.varphi_f(level)[0]
    elif fusion == "multiply":
        expected = one.varphi_f(words[:, None, None] * level)[0]
    else:
        both = torch.cat([level, states.mean(1)[..., None, None].expand(-1, -1, 5, 6)], 1)
        weight = torch.cat([one.varphi_f[0].weight, one.phi_s.weight[..., None, None]], 1)
        _, norm, activation = one.varphi_f
        expected = activation(norm(F.conv2d(both, weight, one.phi_s.bias)))[0]
    assert attention is None and torch.allclose(fused[0], expected, atol=1e-5)


def test_dynamic_convolution_equals_its_loop():
    """Eq. 8: at every cell of M the inner product with the kernel that stands at the chosen cell of its own level."""
    _, model = build("--levels", "2-4")
    images, image_of, text = inputs()
    out, cells = model(images, image_of, text), targets()["cells"]
    logits, chosen = train_pks.dynamic_convolution(out, *train_pks.true_cells(cells, out))
    pyramid = model.backbone(train_pks.normalise(images, model.backbone.mean, model.backbone.std))
    for e, image in enumerate(image_of):
        k = 0
        for level in (2, 3, 4):
            kernels = model.kernel_head(pyramid[2 ** (level + 1)])[image].flatten(1)
            for cell in cells[e, level - 1]:
                assert chosen[e, k] == (cell >= 0)
                if cell >= 0:
                    expected = torch.einsum("c,chw->hw", kernels[:, cell], out["mask"][image])
                    assert torch.allclose(logits[e, k], expected, atol=1e-4)
                k += 1
        assert k == logits.shape[1]


@pytest.mark.parametrize("width, height, size, max_size", [(40, 40, 64, 0), (50, 30, 64, 0), (60, 50, 100, 150),
                                                           (50, 60, 100, 150)])
@pytest.mark.parametrize("flipped", [False, True])
def test_cells_by_hand(width, height, size, max_size, flipped):
    """The cells lie round the centre's own, on maps of the very size that the pyramid has, and none leaves the map."""
    frame = data.replace(data.Canvas(size, max_size).frame(width, height), flipped=flipped)
    mask = np.zeros((2, height, width), bool)
    mask[0, 5:9, 3:21] = True
    mask[1, -1, -1] = True
    example = data.Example(None, 0, np.arange(2), mask, np.arange(2), frame, None)
    made = train_pks.make_targets(example)
    pyramid = train_pks.SmallFPN(8)(torch.zeros(1, 3, frame.canvas_height, frame.canvas_width))
    centres = frame.points_in(np.array([[12.0, 7.0], [width - 0.5, height - 0.5]]))
    assert torch.allclose(made["mask"], frame.masks_in(mask, 4)) and made["mask"].shape[1:] == pyramid[4].shape[2:]
    for i, stride in enumerate(train_pks.STRIDES):
        rows, columns = pyramid[stride].shape[2:]
        for e, (x, y) in enumerate(centres):
            row, column = int(y // stride), int(x // stride)
            expected = {r * columns + c for r in (row - 1, row, row + 1) for c in (column - 1, column, column + 1)
                        if 0 <= r < rows and 0 <= c < columns}
            assert set(made["cells"][e, i].tolist()) - {-1} == expected and made["cells"].shape == (2, 5, 9)


def test_position_loss_by_hand():
    """Eq. 9: on each level the focal sum over its positive cells, then the mean over levels and the sum over
    sentences."""
    cells = targets()["cells"]
    heats = [torch.randn(3, 8, 8), torch.randn(3, 4, 4)]
    loss = train_pks.position_loss({"heats": heats, "strides": [8, 16]}, cells)
    total = 0.0
    for heat, level in zip(heats, (1, 2)):
        for e in range(3):
            positive = {c for c in cells[e, level].tolist() if c >= 0}
            prob = heat[e].flatten().sigmoid()
            each = [-0.25 * (1 - p) ** 2 * p.log() if n in positive else -0.75 * p ** 2 * (1 - p).log()
                    for n, p in enumerate(prob)]
            total += sum(each).item() / len(positive) / 2
    assert loss.item() == pytest.approx(total, rel=1e-4)


def blob(x, y, radius=5, size=20):
    v, u = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.sigmoid(radius ** 2 - (u - x) ** 2.0 - (v - y) ** 2)


def test_merge():
    """What a distractor does to each rule: only `union` pastes it in whole; top1 is the best mask; order is no
    matter."""
    prob = torch.stack([blob(5, 5), blob(6, 5), blob(15, 15, 4)])
    score = torch.tensor([0.8, 0.9, 0.3])
    merged = {how: train_pks.merge(prob, score, how, "gaussian", 0.05) for how in train_pks.MERGES}
    decayed = matrix_nms(prob > 0.5, score)
    agreeing = (decayed[0] * prob[0] + decayed[1] * prob[1]) / (decayed[0] + decayed[1])
    assert torch.equal(merged["top1"], prob[1]) and torch.allclose(merged["agree"], agreeing)
    assert torch.allclose(merged["soft"], torch.einsum("k,khw->hw", decayed, prob) / decayed.sum())
    assert torch.equal(merged["union"], prob.amax(0)) and merged["union"][15, 15] > 0.5 > merged["soft"][15, 15]
    assert decayed[0] < 0.5 and torch.equal(train_pks.merge(prob, score, "union", "gaussian", 0.5), prob[1])
    order = torch.tensor([2, 0, 1])
    for how, whole in merged.items():
        assert torch.allclose(train_pks.merge(prob[order], score[order], how, "gaussian", 0.05), whole)
        one = train_pks.merge(prob[:1], torch.tensor([1e-30]), how, "linear", 0.05)
        assert torch.allclose(one, prob[0]), how  # the best cell speaks, however cold


@pytest.mark.parametrize("threshold", ["0.999", "0", "0.01"])
def test_neither_padding_nor_neighbours_matter(threshold):
    """A sentence's mask is the same with more padding, alone, and among other images, whether no or every cell
    passes."""
    _, model = build("--lambda-f", threshold)
    model.eval()
    images, image_of, text = inputs()
    with torch.inference_mode():
        out = model.segment(model.encode_image(images), image_of, text)["prob"]
        padded = model.segment(model.encode_image(images), image_of, F.pad(text, (0, 5)))["prob"]
        alone = model.segment(model.encode_image(images[1:]), torch.tensor([0]), text[1:2, :1])["prob"]
    assert torch.allclose(out, padded, atol=1e-5) and torch.allclose(out[1:2], alone, atol=1e-5)


def test_inference_follows_the_paper():
    """Eq. 6 and 8 cell by cell: those above lambda_f, or the best alone; the true centre's cells with targets."""
    _, model = build("--levels", "2-3", "--merge", "soft", "--max-kernels", "1000", "--lambda-f", "0.012")
    model.eval()
    images, image_of, text = inputs()
    with torch.inference_mode():
        features = model.encode_image(images)
        out, oracle = (model.segment(features, image_of, text, given) for given in (None, targets()))
        heat = torch.cat([h.flatten(1) for h in out["heat"].values()], 1)
        cells = targets()["cells"]
        for e in range(3):
            passing = (heat[e] > 0.012).nonzero().squeeze(1)
            passing = passing if len(passing) else heat[e].argmax()[None]
            true = torch.cat([c[c >= 0] + start for c, start in zip(cells[e, 1:3], (0, 64))])
            for chosen, got in ((passing, out), (true, oracle)):
                kernels, mask = features["kernels"][image_of[e], chosen], features["mask"][image_of[e]]
                prob = torch.einsum("kc,chw->khw", kernels, mask).sigmoid()
                expected = train_pks.merge(prob, heat[e][chosen], "soft", "gaussian", 0.05)
                assert torch.allclose(got["prob"][e], expected, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--no-kernel"], *WEAK], ids=" ".join)
def test_nothing_to_learn_is_finite(flags):
    """Empty masks, no label, no position: losses and gradients stay finite, and the oracle answers with an empty
    mask."""
    args, model = build(*flags)
    nothing = targets(centres=[(np.nan, np.nan)] * 3)
    nothing["mask"].zero_(), nothing["labels"].fill_(-1)
    assert (nothing["cells"] == -1).all()
    step(args, model, nothing)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if args.kernel:
        images, image_of, text = inputs()
        assert (model.segment(model.encode_image(images), image_of, text, nothing)["prob"] == 0).all()


def test_chosen_cells_alone_teach_the_mask():
    """A missing cell's kernel has no part in L_seg: the loss is that of the cells that exist."""
    args, model = build("--levels", "1")
    out, given = model(*inputs()), targets()
    logits, chosen = train_pks.dynamic_convolution(out, *train_pks.true_cells(given["cells"], out))
    assert chosen.sum(1).tolist() == [9, 4, 9]
    expected = 0.0
    for e in range(3):
        prob, y = logits[e][chosen[e]].sigmoid(), given["mask"][e]
        each = 1 - (2 * (prob * y).sum((1, 2)) + 1) / (prob.square().sum((1, 2)) + y.square().sum() + 1)
        expected += each.mean().item()
    assert train_pks.loss_terms(out, given, args)["seg"].item() == pytest.approx(expected, rel=1e-5)


# ---- clicks -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weak(shapes):
    """A view of the small corpus, its clicks, and the data root with superpixels."""
    clicks.make(shapes, "refshapes", jobs=1)
    corpus = data.RefDataset(shapes / "refshapes" / "train.json", lambda text: [1], data.Canvas(64))
    return corpus, clicks.load_clicks(shapes / "refshapes" / "clicks.json"), shapes


@pytest.mark.parametrize("kind", train_pks.WEAK_LABELS)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_weak_targets(weak, kind, flip):
    """Sec. IV-A by its own words, on the canvas: clicked cell or superpixel, outside the corners, else unknown."""
    corpus, clicked, root = weak
    targets = partial(train_pks.make_weak_targets, clicked=clicked, data_root=root, labels=kind)
    view = corpus.view(flip=flip, targets=targets)
    full = corpus.view(flip=flip, targets=train_pks.make_targets)
    seen = set()
    for image in range(6):
        key = (0, image, corpus.of_image[image])
        made, true, frame = view[key]["targets"], full[key]["targets"], view[key]["frame"]
        assert torch.equal(made["cells"], true["cells"]) and made["labels"].shape == true["mask"].shape
        y, x = np.mgrid[:16, :16] * 4 + 2
        inside = (x < frame.in_width) & (y < frame.in_height)
        assert (made["inside"].numpy() == inside).all()
        for n, e in enumerate(key[2]):
            label = made["labels"][n].numpy()
            number = clicked[int(corpus.object_ids[corpus.objects_of[e][0]])]
            box = frame.boxes_in(np.array(number[2:]))
            outside = (x < box[0]) | (x >= box[2]) | (y < box[1]) | (y >= box[3])
            cell = made["cells"][n, 0, 4].item()
            assert label[cell // 16, cell % 16] == 1
            label[cell // 16, cell % 16] = -1
            if kind != "point_fg":
                background = label[outside & inside]
                assert (background[background != -1] == 0).all() and (label[~outside] != 0).all()
                assert (label == 0).sum() >= (outside & inside).sum() - 1 and (label[~inside] == -1).all()
            assert kind.startswith("superpixel") or (label != 1).all()
            seen |= set(np.unique(label).tolist())
    assert seen == {-1} | ({0} if kind != "point_fg" else set()) | ({1} if kind.startswith("superpixel") else set())


def test_report_panels(weak):
    """Clicks, superpixels and labels of a case, drawn on the picture itself; nothing where the run was not weak."""
    corpus, _, _ = weak
    weakly, fully = build("--weak")[0], build()[0]
    panels = train_pks.case_panels(weakly, corpus, 3)
    height, width = corpus.sizes[corpus.expression_image[3]][::-1]
    assert [caption.split(":")[0] for caption, _ in panels] == ["clicks", "superpixels", "labels"]
    assert all(array.shape == (height, width, 3) and array.dtype == np.uint8 for _, array in panels)
    assert train_pks.case_panels(fully, corpus, 3) == []


def test_unknown_object_is_an_error(weak):
    corpus, _, root = weak
    view = corpus.view(targets=partial(train_pks.make_weak_targets, clicked={}, data_root=root, labels="point_fg"))
    assert isinstance(view[(0, 0, corpus.of_image[0])], UserError)


@pytest.mark.parametrize("flags", [["--levels", "0-3"], ["--levels", "3-2"], ["--levels", "x"], ["--steps", "0"],
                                   ["--no-kernel", "--levels", "5"], ["--weak-labels", "point_fg"]])
def test_bad_settings(flags):
    with pytest.raises(UserError):
        train_pks.frontend(build(*flags)[0], VOCABULARY)


def test_several_objects_are_refused(weak):
    corpus, _, _ = weak
    with pytest.raises(UserError, match="means 2 objects"):
        train_pks.check_corpus(corpus.view(objects_of=[[0, 1]] + corpus.objects_of[1:]))


@pytest.mark.parametrize("schedule, at, expected", [("step", 0, 0.1), ("step", 9, 1.0), ("step", 220, 0.1),
                                                    ("step", 270, 0.01), ("cosine", 155, 0.5)])
def test_learning_rate(schedule, at, expected):
    args, _ = build("--lr", "1", "--schedule", schedule, "--lr-drops", "22", "27", "--warmup-steps", "10")
    assert train_pks.learning_rate(args, at, 300, 10) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("flags", [[], ["--no-kernel", "--levels", "2-3"]], ids=" ".join)
def test_script(shapes, tmp_path, monkeypatch, flags):
    """Trained, evaluated and reported as its users run it; eval.py's flags for PKS reach the model."""
    train_pks.main([*TINY, *flags, "--data-root", str(shapes), "--out", str(tmp_path / "run"), "--max-steps", "2"])
    summary = json.loads((tmp_path / "run" / "eval" / "refshapes_val.json").read_text())
    levels = [2, 3] if flags else [1, 2, 3, 4, 5]
    assert set(summary["pointing"]) == {f"level{i}" for i in levels} and (tmp_path / "run" / "report.html").exists()
    asked = []
    segment = train_pks.PKS.segment

    def spy(model, features, image_of, text, targets=None):
        asked.append((model.merge, targets is not None))
        return segment(model, features, image_of, text, targets)

    monkeypatch.setattr(train_pks.PKS, "segment", spy)
    for words, expected in ([], ("agree", False)), (["--oracle-pos", "--merge", "union"], ("union", True)):
        evaluate_run(["--run", str(tmp_path / "run"), "--data-root", str(shapes), "--workers", "0", *words])
        assert set(asked) == {expected}
        asked.clear()


def test_weak_on_two_ranks(shapes, tmp_path):
    """Clicks are made on first use, by one rank for both."""
    (shapes / "refshapes" / "clicks.json").unlink(missing_ok=True)
    flags = ["--weak", "--data-root", shapes, "--out", tmp_path / "run", "--max-steps", "1"]
    done = command("train_pks.py", *TINY, *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (shapes / "refshapes" / "clicks.json").exists() and (tmp_path / "run" / "best.pt").exists()


def test_missing_corpus_is_named(tmp_path):
    with pytest.raises(UserError, match="python -m data_prep.refcoco.*" + train_pks.EMBEDDED_YAML):
        train_pks.main(["--weak", "--data-root", str(tmp_path)])


def test_missing_clicks_are_named(shapes, tmp_path):
    args = parse(train_pks.get_parser(), [*TINY, "--weak", "--dataset", "mine", "--data-root", str(tmp_path)])
    with pytest.raises(UserError, match="data_prep.clicks --dataset mine"):
        train_pks.weak_targets(args, train_pks.distributed.Ranks(0, 1, torch.device("cpu")))
