"""LTS: each shortcut against the equation written out, each flag, and the invariances that evaluation relies on."""
import pytest
import torch
import torch.nn.functional as F

import train_lts
from common.config import UserError, parse
from common.text import Vocabulary
from tests.conftest import TINY

VOCABULARY = Vocabulary([f"w{i}" for i in range(20)])
ROWS = [[], ["--no-fusion"], ["--no-filter"], ["--no-seg"], ["--no-seg", "--no-filter"], ["--no-seg", "--no-fusion"],
        ["--lambda-loc", "0"], ["--filters", "2"], ["--filters", "3", "--filter-chain", "parallel"], ["--word-filter"],
        ["--locator", "transformer"]]


def build(*flags, seed=0):
    args = parse(train_lts.get_parser(), [*TINY, *flags])
    torch.manual_seed(seed)
    return args, train_lts.build_model(args, VOCABULARY)


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    text = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10]])
    return images, torch.tensor([0, 1, 1]), text


def targets(count=3):
    masks = torch.zeros(count, 16, 16)
    masks[:, 4:10, 3:9] = 1
    return {"mask": masks, "heat": F.avg_pool2d(masks[:, None], 2).squeeze(1)}


@pytest.mark.parametrize("flags", ROWS, ids=" ".join)
def test_every_row_trains_and_segments(flags):
    """Every parameter gets a gradient in every ablation, and the output is what evaluation expects."""
    args, model = build(*flags)
    images, image_of, text = inputs()
    terms = train_lts.loss_terms(model(images, image_of, text), targets(), args)
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    out = model.eval().segment(model.encode_image(images), image_of, text)
    assert out["prob"].shape[0] == 3 and 0 <= out["prob"].min() <= out["prob"].max() <= 1 and out["threshold"] == args.threshold
    assert ("heat" in out) == ("--no-filter" not in flags)


def test_rows_differ():
    """No two rows of Tables 2, 4 and 5 are the same model and the same loss."""
    seen = {}
    for flags in ROWS:
        args, model = build(*flags)
        terms = train_lts.loss_terms(model(*inputs()), targets(), args)
        key = (sum(p.numel() for p in model.parameters()), round(sum(terms.values()).item(), 5))
        assert key not in seen, (flags, seen[key])
        seen[key] = flags


@pytest.mark.parametrize("rates", [[2, 4, 8], [6, 12, 18, 24]])
@pytest.mark.parametrize("flags", [[], ["--no-filter"], ["--filters", "2", "--filter-chain", "parallel"]], ids=" ".join)
def test_segmenter_equals_its_plain_form(rates, flags):
    """Eq. 10 on the concatenation itself, branch by branch, at full resolution."""
    _, model = build("--aspp-rates", *map(str, rates), *flags)
    segmenter = model.segmenter
    fused = train_lts.Fused(torch.randn(3, 8, 4, 6), torch.randn(2, 8, 8, 12), torch.tensor([0, 1, 1]))
    priors = [torch.randn(3, 8, 12) for _ in range(segmenter.point.weight.shape[1] - 16)]
    x = torch.cat([fused.whole(), *(prior.sigmoid()[:, None] for prior in priors)], 1)
    branches = [F.leaky_relu(norm(conv(x)), 0.1) for conv, norm in
                zip([segmenter.point, *segmenter.dilated], segmenter.norms)]
    overall = F.leaky_relu(segmenter.overall(x.mean((2, 3))), 0.1)[..., None, None].expand_as(branches[0])
    x = F.leaky_relu(segmenter.norm(segmenter.project(torch.cat([*branches, overall], 1))), 0.1)
    expected = segmenter.deconvolution(x).squeeze(1)
    assert torch.allclose(segmenter(fused, priors), expected, atol=1e-5)


def test_filter_equals_its_loop():
    """Eq. 8: at every cell the inner product of the sentence's kernel and F_m3; the second filter sees gated features."""
    _, model = build("--filters", "2")
    locator, fused = model.locator, train_lts.Fused(torch.randn(3, 8, 2, 3), torch.randn(2, 8, 4, 6), torch.tensor([1, 0, 1]))
    sentence, whole = torch.randn(3, 16), fused.whole()
    heats = locator(fused, sentence, sentence[:, None], torch.ones(3, 1, dtype=torch.bool))
    gated = whole
    for i, heat in enumerate(heats):
        kernel = locator.kernels[i](sentence)
        for e in range(3):
            for y in range(4):
                for x in range(6):
                    assert heat[e, y, x].item() == pytest.approx((kernel[e] @ gated[e, :, y, x] + locator.bias[i]).item(),
                                                                 abs=1e-5)
        gated = whole * heat.sigmoid()[:, None]


@pytest.mark.parametrize("flags", [[], ["--word-filter"], ["--locator", "transformer"]], ids=" ".join)
def test_neither_padding_nor_neighbours_matter(flags):
    """A sentence's mask is the same with more padding, alone, and among other images."""
    _, model = build(*flags)
    model.eval()
    images, image_of, text = inputs()
    with torch.inference_mode():
        out = model.segment(model.encode_image(images), image_of, text)["prob"]
        padded = model.segment(model.encode_image(images), image_of, F.pad(text, (0, 5)))["prob"]
        alone = model.segment(model.encode_image(images[1:]), torch.tensor([0]), text[1:2, :1])["prob"]
    assert torch.allclose(out, padded, atol=1e-5) and torch.allclose(out[1:2], alone, atol=1e-5)


def test_losses_by_hand():
    """Eq. 11-13 as printed (sums, with the missing minus), divided by the number of P_mask's cells."""
    args, _ = build("--lambda-loc", "0.1", "--dice", "0")
    truth, mask, heat = targets(), torch.randn(3, 16, 16), torch.randn(3, 8, 8)
    bce = lambda logits, y: -(y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log()).sum()  # noqa: E731
    printed = bce(mask, truth["mask"]) + 0.1 * bce(heat, truth["heat"])
    ours = sum(train_lts.loss_terms({"mask": mask, "heats": [heat]}, truth, args).values())
    assert ours.item() == pytest.approx(printed.item() / 256, rel=1e-5)


def test_empty_mask_is_finite():
    args, model = build("--dice", "1")
    empty = {name: torch.zeros_like(value) for name, value in targets().items()}
    sum(train_lts.loss_terms(model(*inputs()), empty, args).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("flags", [["--locator", "transformer", "--filters", "2"], ["--no-filter", "--word-filter"]], ids=" ".join)
def test_flags_without_a_filter_are_refused(flags):
    with pytest.raises(UserError, match="are about the filter"):
        build(*flags)


@pytest.mark.parametrize("schedule, step, expected", [
    ("step", 299, 1.0), ("step", 300, 0.1), ("step", 449, 0.1), ("cosine", 0, 1.0), ("cosine", 225, 0.5)])
def test_learning_rate(schedule, step, expected):
    args, _ = build("--lr", "1", "--schedule", schedule, "--lr-drop", "30", "--warmup-steps", "0")
    assert train_lts.learning_rate(args, step, 450, 10) == pytest.approx(expected)
