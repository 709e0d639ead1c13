"""Mask2Former against transformers' with the same weights under Facebook's names, and what is no peer's."""
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import get_relative_position_index
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinBackbone, SwinConfig
from transformers.models.mask2former import modeling_mask2former as peer

from common import mask2former
from common.backbones import Small
from common.coco_ap import coco_results
from common.config import UserError
from common.mask2former import Mask2Former, NormedSwin, criterion, instances, mask_costs, match, read_detectron_pkl
from common.masks import decode

# transformers' names -> Facebook's, the table of its conversion script turned round
FACEBOOK = (
    (r"^model\.pixel_level_module\.encoder\.embedder\.embedder\.", "backbone.stem.conv1."),
    *((rf"^model\.pixel_level_module\.encoder\.encoder\.stages\.{i}\.layers\.", f"backbone.res{i + 2}.")
      for i in range(4)),
    *((rf"^(backbone\.res.*)\.layer\.{i}\.", rf"\1.conv{i + 1}.") for i in range(3)),
    (r"^(backbone.*)\.convolution\.", r"\1."), (r"^(backbone.*)\.normalization\.", r"\1.norm."),
    (r"^model\.pixel_level_module\.decoder\.", "sem_seg_head.pixel_decoder."),
    (r"pixel_decoder\.input_projections\.", "pixel_decoder.input_proj."),
    (r"pixel_decoder\.(level_embed|encoder)", r"pixel_decoder.transformer.\1"),
    (r"pixel_decoder\.(adapter|layer)_1\.0\.", r"pixel_decoder.\1_1."),
    (r"pixel_decoder\.(adapter|layer)_1\.1\.", r"pixel_decoder.\1_1.norm."),
    (r"pixel_decoder\.mask_projection\.", "pixel_decoder.mask_features."),
    (r"(pixel_decoder.*)\.self_attn_layer_norm\.", r"\1.norm1."), (r"(pixel_decoder.*)\.fc", r"\1.linear"),
    (r"(pixel_decoder.*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^model\.transformer_module\.queries_features\.", "sem_seg_head.predictor.query_feat."),
    (r"^model\.transformer_module\.queries_embedder\.", "sem_seg_head.predictor.query_embed."),
    (r"^model\.transformer_module\.level_embed\.", "sem_seg_head.predictor.level_embed."),
    (r"^model\.transformer_module\.decoder\.layernorm\.", "sem_seg_head.predictor.decoder_norm."),
    (r"^model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
     r"sem_seg_head.predictor.mask_embed.layers.\1."),
    (r"^class_predictor\.", "sem_seg_head.predictor.class_embed."),
    *((rf"^model\.transformer_module\.decoder\.layers\.(\d)\.{theirs}", rf"sem_seg_head.predictor.transformer_{ours}")
      for theirs, ours in ((r"cross_attn\.", r"cross_attention_layers.\1.multihead_attn."),
                           (r"cross_attn_layer_norm\.", r"cross_attention_layers.\1.norm."),
                           (r"self_attn\.", r"self_attention_layers.\1.self_attn."),
                           (r"self_attn_layer_norm\.", r"self_attention_layers.\1.norm."),
                           (r"fc", r"ffn_layers.\1.linear"), (r"final_layer_norm\.", r"ffn_layers.\1.norm."))),
)
MICROSOFT = (
    (r"^swin\.layernorm\.", "norm."), (r"^swin\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^swin\.embeddings\.norm\.", "patch_embed.norm."), (r"^swin\.encoder\.", ""), (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"), (r"\.attention\.(relative_position_bias\.)?", ".attn."), (r"\.o_proj\.", ".proj."),
)


def rename(state, table, packed="in_proj_"):
    """`state` under other names; separate query, key and value projections become one."""
    out = {}
    for name, value in state.items():
        for old, new in table:
            name = re.sub(old, new, name)
        out[name] = value
    for name in [name for name in out if ".q_proj." in name]:
        out[name.replace("q_proj.", packed)] = torch.cat([out.pop(name.replace(".q_", f".{x}_")) for x in "qkv"])
    return {name: value for name, value in out.items() if not name.endswith("num_batches_tracked")}


def shake(model):
    """Noise on everything, so that no parameter can be left out or exchanged unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "empty_weight" not in name:
                noise = torch.randn_like(value) * (0.05 if value.ndim == 1 else 0.01)
                value.copy_((value + noise).clamp(min=0.5) if name.endswith("running_var") else value + noise)
                if name.endswith("normalization.weight"):
                    value.copy_(0.5 + noise.abs())  # theirs start at 0.02, which would silence the backbone
    return model.eval()


def theirs(depths=(3, 4, 6, 3), widths=(256, 512, 1024, 2048), **settings):
    """transformers' model on a ResNet of bottlenecks."""
    resnet = ResNetConfig(depths=list(depths), hidden_sizes=list(widths), embedding_size=64,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    return shake(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=resnet, num_labels=80,
                                                                       **settings)))


def same(a, b, tolerance=1e-3):
    """Equal to `tolerance` of the largest value, and not trivially so."""
    assert a.shape == b.shape and b.std() > 0
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@pytest.fixture(scope="module")
def pair():
    """transformers' R50 and ours, the whole structure with the same random weights, loaded under Facebook's names."""
    other, ours = theirs(output_auxiliary_logits=True), Mask2Former("r50").eval()
    assert ours.load_official(rename(other.state_dict(), FACEBOOK)) == ["criterion.empty_weight"]
    return other, ours


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Mask2Former(Small(8), num_classes=5, num_queries=7, dim=32, heads=4, encoder_layers=1, decoder_layers=3,
                       encoder_ffn=32, decoder_ffn=32)


def targets(*counts, size=64, classes=5):
    """Random rectangles: so many on each image."""
    torch.manual_seed(1)
    found = []
    for n in counts:
        masks = torch.zeros(n, size, size, dtype=torch.bool)
        for mask, (y, x) in zip(masks, torch.randint(0, size - 20, (n, 2)).tolist()):
            mask[y:y + 20, x:x + 16] = True
        found.append({"labels": torch.randint(0, classes, (n,)), "masks": masks})
    return found


# ---- parity -------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (70, 61)])
def test_forward_equals_transformers(pair, size):
    other, ours = pair
    torch.manual_seed(2)
    images = torch.randn(2, 3, *size)
    a, b = ours(images, aux=True), other(images)
    same(a["pred_logits"], b.class_queries_logits)
    same(a["pred_masks"], b.masks_queries_logits)
    assert a["queries"].shape == (2, 100, 256) and len(a["aux"]) == len(b.auxiliary_logits) == 9
    for mine, peers in zip(a["aux"], b.auxiliary_logits):
        same(mine["pred_logits"], peers["class_queries_logits"])
        same(mine["pred_masks"], peers["masks_queries_logits"])
    same(ours(images)["pred_masks"], b.masks_queries_logits)


def test_losses_and_matching_equal_transformers_on_the_same_points(pair):
    other = pair[0].criterion
    truth = targets(3, 0, 6, classes=80)
    output = [{"pred_logits": torch.randn(3, 20, 81), "pred_masks": 3 * torch.randn(3, 20, 16, 16)} for _ in range(3)]
    labels, masks = [t["labels"] for t in truth], [t["masks"].float() for t in truth]
    torch.manual_seed(3)
    expected = other(output[0]["pred_masks"], output[0]["pred_logits"], masks, labels,
                     [{"masks_queries_logits": o["pred_masks"], "class_queries_logits": o["pred_logits"]}
                      for o in output[1:]])
    torch.manual_seed(3)
    ours = criterion({**output[0], "aux": output[1:]}, truth)
    for name, theirs_, weight in (("class", "cross_entropy", 2), ("mask", "mask", 5), ("dice", "dice", 5)):
        parts = [value for key, value in expected.items() if key.startswith(f"loss_{theirs_}")]
        assert len(parts) == 3
        torch.testing.assert_close(ours[name], weight * sum(parts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["loss"], ours["class"] + ours["mask"] + ours["dice"])
    torch.manual_seed(3)
    pairs = other.matcher(output[0]["pred_masks"], output[0]["pred_logits"], masks, labels)
    assert all(torch.equal(a, b) for one, two in zip(ours["matches"], pairs) for a, b in zip(one, two))
    logits, points = torch.randn(4, 50) * 5, (torch.rand(3, 50) > 0.5).float()
    for cost, function in zip(mask_costs(logits, points), (peer.pair_wise_sigmoid_cross_entropy_loss,
                                                           peer.pair_wise_dice_loss)):
        torch.testing.assert_close(cost, function(logits, points), rtol=1e-4, atol=1e-5)
    for half in (torch.bfloat16, torch.float16):  # a background's logits alone add up to more than half precision holds
        with torch.autocast("cpu", half):
            costs = mask_costs(torch.full((2, 12544), -9.0), torch.ones(1, 12544))
        assert costs[0].flatten().tolist() == pytest.approx([9.0, 9.0], rel=1e-4) and costs[0].dtype == torch.float32
    ours = criterion(output[0], truth, num_masks=18)
    torch.manual_seed(3)
    assert criterion(output[0], truth)["dice"] / ours["dice"] == pytest.approx(2, rel=0.02)


@torch.no_grad()
def test_swin_equals_transformers_under_microsofts_names():
    config = SwinConfig(window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])
    other = shake(SwinBackbone(config))
    state = rename(other.state_dict(), MICROSOFT, "qkv.")
    norms = {name: state.pop(name) for name in list(state) if name.startswith("hidden_states_norms")}
    for name in [name for name in state if name.endswith("bias_table")]:
        state[name.replace("bias_table", "index")] = get_relative_position_index(4, 4)
    state.update({"head.weight": torch.zeros(2, 2), "layers.0.blocks.1.attn_mask": torch.zeros(4)})
    model = Mask2Former(NormedSwin("t", 4)).eval()
    assert sorted(model.load_swin_official({"model": state})) == ["head.weight", "norm.bias", "norm.weight"]
    official = {f"backbone.{name}": value for name, value in state.items() if name[:5] not in ("head.", "norm.")}
    official.update({f"backbone.norm{int(name[25]) - 1}.{name[27:]}": value for name, value in norms.items()})
    heads = theirs(depths=(1,) * 4, widths=(96, 192, 384, 768)).state_dict()
    official.update({k: v for k, v in rename(heads, FACEBOOK).items() if not k.startswith("backbone")})
    images = torch.randn(1, 3, 136, 152)  # maps that are no multiple of the window, down to 5 x 5
    before = model.backbone(images)
    assert model.load_official(official) == ["criterion.empty_weight"]
    for mine, plain, peers in zip(model.backbone(images).values(), before.values(), other(images).feature_maps):
        same(mine, peers)
        assert not torch.allclose(plain, mine)  # the norms on the outputs came with the second file alone
    index = "layers.2.blocks.0.attn.relative_position_index"
    with pytest.raises(UserError, match="another order"):
        model.load_swin_official({**state, index: state[index].T.contiguous()})
    with pytest.raises(UserError, match="other shapes"):
        Mask2Former("swin_t").load_swin_official(state)


# ---- weights ------------------------------------------------------------------------------------------------

def test_official_names_load_with_nothing_missing_or_left(pair):
    other, ours = pair
    state = rename(other.state_dict(), FACEBOOK)
    decoder, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for name, shape in (("backbone.stem.conv1.norm.running_mean", (64,)),
                        ("backbone.res5.0.shortcut.norm.weight", (2048,)),
                        ("backbone.res4.5.conv2.weight", (256, 256, 3, 3)),
                        (f"{decoder}.transformer.level_embed", (3, 256)),
                        (f"{decoder}.transformer.encoder.layers.5.self_attn.sampling_offsets.bias", (192,)),
                        (f"{decoder}.adapter_1.norm.bias", (256,)),
                        (f"{decoder}.layer_1.weight", (256, 256, 3, 3)),
                        (f"{predictor}.transformer_cross_attention_layers.8.multihead_attn.in_proj_weight", (768, 256)),
                        (f"{predictor}.transformer_self_attention_layers.0.self_attn.in_proj_bias", (768,)),
                        (f"{predictor}.transformer_ffn_layers.8.linear1.weight", (2048, 256)),
                        (f"{predictor}.mask_embed.layers.2.weight", (256, 256)),
                        (f"{predictor}.query_feat.weight", (100, 256))):
        assert state[name].shape == shape
    del state["criterion.empty_weight"]
    old = {name.replace(f"{decoder}.", "sem_seg_head.").replace("query_feat", "static_query"): value.numpy()
           for name, value in state.items()}  # as in the first files, and as arrays
    assert ours.load_official(old) == []
    with pytest.raises(UserError, match="predictor.class_embed.bias"):
        ours.load_official({k: v for k, v in state.items() if not k.endswith("class_embed.bias")})
    with pytest.raises(UserError, match="backbone.res6"):
        ours.load_official({**state, "backbone.res6.weight": torch.zeros(1)})


@pytest.mark.parametrize("name, expected", [("r101", 63_015_505), ("swin_b", None)])
def test_parameter_counts(name, expected):
    with torch.device("meta"):
        model = Mask2Former(name)
    counts = [sum(p.numel() for p in part.parameters())
              for part in (model, model.pixel_decoder, model.predictor.layers)]
    assert counts[2] == 14_406_656 - 512 - 3 * (256 * 256 + 256)  # the published count has the norm and the mask MLP
    if expected:
        assert counts[:2] == [expected, 6_035_904]
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert frozen == 105_344  # BatchNorm's


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pkl_is_read_as_arrays(tmp_path, protocol):
    path = tmp_path / "model_final.pkl"
    arrays = {"a": np.random.rand(3, 4).astype("f4"), "b": np.arange(6).reshape(2, 3), "c": np.float32(2),
              "f": np.asfortranarray(np.random.rand(3, 5)), "h": np.ones((), "f2")}
    model = OrderedDict(arrays)
    model._metadata = OrderedDict(version=1)  # torch's state dicts have it
    path.write_bytes(pickle.dumps({"model": model, "__author__": "x", "matching_heuristics": True}, protocol))
    read = read_detectron_pkl(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(read[name], array) and read[name].dtype == array.dtype


@pytest.mark.parametrize("data, message", [
    ({"model": {"a": Payload()}}, "posix.system"), ({"model": {"a": np.array([Payload()], object)}}, "'O8'"),
    ({"model": {"a": np.array([{}], object)}}, "'O8'"), ({"model": {"a": np.zeros(2, "f4,O")}}, "'V12'"),
    ({"model": {"a": np.zeros(2, ">f4")}}, "big-endian"), ({"model": {"a": [1.0]}}, "named arrays"), ({}, "'model'"),
    (b"", "whole pickle"), (pickle.dumps({"model": {"a": np.ones(9)}})[:-20], "whole pickle"),
    (b"\x80\x02r\xff\xff\xff\x7fN.", "whole pickle|'model'"), (b"\x80\x02cos\nsystem\n.", "os.system"),
    (b"\x80\x02X\x01\x00\x00\x00aQ.", "outside the file"), (b"\x80\x02c_codecs\nencode\n}b.", "sets attributes"),
    (pickle.dumps({"model": {"a": np.ones(9)}}).replace(b"K\t\x85", b"K\x0a\x85"), "whole pickle")])
def test_hostile_pkl_is_refused(tmp_path, data, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    with pytest.raises(UserError, match=message):
        read_detectron_pkl(path)


# ---- parts --------------------------------------------------------------------------------------------------

def test_deformable_sum_equals_a_loop():
    torch.manual_seed(0)
    shapes, heads, dim, points = [(2, 3), (4, 5), (7, 9)], 2, 3, 2
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(2, cells, heads, dim, dtype=torch.double, requires_grad=True)
    xy = (torch.rand(2, 4, heads, 3, points, 2, dtype=torch.double) * 12 - 2).requires_grad_()  # some far outside
    weight = torch.rand(2, 4, heads, 3, points, dtype=torch.double, requires_grad=True)
    expected = torch.zeros(2, 4, heads, dim, dtype=torch.double)
    for b, q, head, level, p in np.ndindex(2, 4, heads, 3, points):
        (h, w), start = shapes[level], sum(h * w for h, w in shapes[:level])
        x, y = xy[b, q, head, level, p].tolist()
        for row, column in np.ndindex(h, w):
            share = max(0, 1 - abs(x - 0.5 - column)) * max(0, 1 - abs(y - 0.5 - row))
            expected[b, q, head] += weight[b, q, head, level, p] * share * value[b, start + row * w + column, head]
    ours = mask2former.deformable_sum(value, shapes, xy, weight)
    torch.testing.assert_close(ours, expected.view(2, 4, -1))
    wild = torch.full_like(xy, float("nan"))
    wild[0], wild[1, 0] = 1e30, -float("inf")
    assert not mask2former.deformable_sum(value, shapes, wild, weight)[1].isfinite().any()  # nor does it crash
    locations = xy / torch.tensor([[w, h] for h, w in shapes])[:, None]
    other = peer.multi_scale_deformable_attention(value, shapes, locations, weight)
    grads = [torch.autograd.grad((out * torch.arange(6)).sum(), (value, xy, weight)) for out in (ours, other)]
    for mine, theirs_ in zip(*grads):
        torch.testing.assert_close(mine, theirs_)


def test_checkpointed_encoder_gives_the_same_gradient(tiny):
    images, truth = torch.randn(2, 3, 64, 64), targets(2, 3)
    gradients = []
    for tiny.pixel_decoder.checkpoint_layers in (False, True):
        tiny.zero_grad()
        torch.manual_seed(5)
        criterion(tiny(images, aux=True), truth, points=500)["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in tiny.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))
    tiny.pixel_decoder.checkpoint_layers = False


@pytest.mark.parametrize("counts", [(0, 0), (0, 100), (8, 1)])
def test_any_number_of_objects(tiny, counts):
    """None at all, and more than there are queries: all parameters get a finite gradient, pairs are one to one."""
    tiny.zero_grad()
    out = criterion(tiny(torch.randn(2, 3, 64, 64), aux=True), targets(*counts), points=300)
    out["loss"].backward()
    assert [len(queries) for queries, _ in out["matches"]] == [min(n, 7) for n in counts]
    assert all(len(set(side.tolist())) == len(side) for pair in out["matches"] for side in pair)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tiny.parameters())
    assert (out["mask"] == 0) == (sum(counts) == 0) and out["class"] > 0


def test_matching_finds_a_hundred_objects_and_survives_nonsense():
    truth = targets(100)[0]
    order = torch.randperm(100)
    masks = truth["masks"][order].float() * 20 - 10
    masks[3] = float("nan")
    queries, found = match(torch.zeros(100, 6), masks, truth["labels"], truth["masks"], torch.rand(2000, 2))
    good = queries != 3
    same_mask = (truth["masks"][order[queries]] == truth["masks"][found]).flatten(1).all(1)
    assert len(queries) == 100 and same_mask[good].all()


def test_instances_are_scored_by_class_and_mask():
    logits = torch.tensor([[2.0, 1.0, 9.0], [0.0, 5.0, 0.0], [-9.0, -9.0, 9.0]])  # the last column is "no object"
    masks = torch.stack([torch.full((2, 2), value) for value in (3.0, 0.1, -1.0)])
    masks[0, 0] = -2
    prob = logits.softmax(-1)
    found = instances(logits, masks, lambda part: part.repeat_interleave(2, -1), top=4)
    expected = {(0, 0): prob[0, 0] * torch.tensor(3.0).sigmoid(), (0, 1): prob[0, 1] * torch.tensor(3.0).sigmoid(),
                (1, 0): prob[1, 0] * torch.tensor(0.1).sigmoid(), (1, 1): prob[1, 1] * torch.tensor(0.1).sigmoid()}
    pairs = list(zip(found["queries"].tolist(), found["labels"].tolist()))
    assert pairs == sorted(expected, key=expected.get, reverse=True) and pairs[0] == (1, 1)
    torch.testing.assert_close(found["scores"], torch.stack([expected[pair] for pair in pairs]))
    assert torch.equal(found["masks"][pairs.index((0, 0))], torch.tensor([[False] * 4, [True] * 4]))


def test_learns_and_finds_two_rectangles(tiny):
    """Boxes of two classes come out as instances, and as COCO's records."""
    truth = targets(2)
    truth[0]["labels"] = torch.tensor([1, 4])
    colours = torch.tensor([3.0, -3.0])[:, None, None]
    images = torch.randn(1, 3, 64, 64) * 0.1 + (truth[0]["masks"] * colours).sum(0)
    optimizer = torch.optim.AdamW(tiny.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(tiny(images, aux=True), truth, points=400)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
    out = tiny(images)
    up = torch.nn.Upsample(scale_factor=4, mode="bilinear")
    found = instances(out["pred_logits"][0], out["pred_masks"][0], lambda masks: up(masks[None])[0], top=10)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True) and len(found["labels"]) == 10
    records = coco_results(found, 17, [10, 11, 12, 13, 14])
    for label, mask in zip(truth[0]["labels"].tolist(), truth[0]["masks"]):
        best = next(record for record in records[:2] if record["category_id"] == 10 + label)
        overlap = (torch.from_numpy(decode(best["segmentation"])) & mask).sum() / mask.sum()
        assert overlap > 0.8 and best["score"] > 0.5 and best["image_id"] == 17


# ---- speed --------------------------------------------------------------------------------------------------

def deformable_sides(px=512):
    """Two functions: forward and backward through a deformable layer at px x px, ours and transformers'."""
    torch.manual_seed(0)
    shapes = [(px // stride, px // stride) for stride in (32, 16, 8)]
    places = torch.cat([mask2former.centres(h, w, "cpu") for h, w in shapes])
    x, positions = torch.randn(1, len(places), 256, requires_grad=True), torch.randn(1, len(places), 256)
    layer, other = mask2former.DeformableLayer(256, 8, 1024), peer.Mask2FormerPixelDecoderEncoderLayer(Mask2FormerConfig())
    reference, unmasked = places[None, :, None].expand(-1, -1, 3, -1), torch.zeros(1, len(places), dtype=torch.bool)
    return (lambda: layer(x, positions, places, shapes).sum().backward(),
            lambda: other(x, unmasked, positions, reference, shapes)[0].sum().backward())


@pytest.mark.slow
def test_a_deformable_layer_is_faster_and_smaller_than_transformers():
    from tests.bench import compare
    figures = compare(*deformable_sides(), toy=False)
    assert figures["ratio"] > 1 and figures["memory"] > 1, figures
