"""Backbones against timm and torchvision with copied random weights, and the readers of published formats."""
import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

from common import backbones, layers
from common.config import UserError


def same(ours, theirs, tolerance=1e-4):
    """Equal to `tolerance` of the largest value, and not trivially so."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape and theirs.std() > 0
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def shake(model):
    """Random values everywhere, BatchNorm's statistics too, so that no parameter can be left out unseen."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, (nn.Linear, nn.LayerNorm)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.05)
    return model.eval()


# ---- Darknet-53 ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def darknet():
    """timm's Darknet-53 with Darknet's own slope, and its numbers as a `.weights` stream."""
    model = shake(timm.create_model("darknet53", num_classes=0))
    stream = []
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.1
        if hasattr(module, "conv") and hasattr(module, "bn"):
            bn = module.bn
            stream += [bn.bias, bn.weight, bn.running_mean, bn.running_var, module.conv.weight.flatten()]
    return model, torch.cat([part.detach() for part in stream]).numpy()


def weights_file(path, values, version=(0, 2, 5), seen=32_000_000):
    seen_type = "<u8" if version[0] * 10 + version[1] >= 2 else "<u4"
    path.write_bytes(np.array(version, "<i4").tobytes() + np.array(seen, seen_type).tobytes()
                     + np.asarray(values, "<f4").tobytes())
    return path


@pytest.mark.parametrize("version, rest", [((0, 2, 5), 7), ((0, 1, 0), 0)])
def test_darknet_reads_the_binary_and_equals_timm(darknet, tmp_path, version, rest):
    theirs, stream = darknet
    ours = backbones.Darknet53().eval()
    path = weights_file(tmp_path / "w.weights", np.concatenate([stream, np.ones(rest)]), version)
    assert ours.load_darknet(path) == 40_620_640 == len(stream)
    assert backbones.read_darknet(path)[0]["seen"] == 32_000_000
    images = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        features = ours(images)
        same(features[32], theirs.forward_features(images))
    assert {stride: tuple(f.shape[1:]) for stride, f in features.items()} == {
        8: (256, 12, 8), 16: (512, 6, 4), 32: (1024, 3, 2)}


@pytest.mark.parametrize("damage, says", [
    (lambda head, body: head + body[:-4], "cut short"), (lambda head, body: head + body[:-3], "cut short"),
    (lambda head, body: head[:8], "8 bytes"), (lambda head, body: b"\x7fELF" + head[4:] + body, "version"),
    (lambda head, body: head + body[4:] + body[:4], "negative variance"),
    (lambda head, body: head + np.float32(np.nan).tobytes() + body[4:], "not finite")])
def test_darknet_refuses_damaged_files(darknet, tmp_path, damage, says):
    path = weights_file(tmp_path / "w.weights", darknet[1])
    whole = path.read_bytes()
    path.write_bytes(damage(whole[:20], whole[20:]))
    with pytest.raises(UserError, match=says) as error:
        backbones.Darknet53().load_darknet(path)
    assert str(path) in str(error.value)


# ---- ResNet, pyramid, Swin, Small -----------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_torchvisions(depth):
    theirs = shake(getattr(torchvision.models, f"resnet{depth}")(weights=None))
    ours = backbones.ResNet(depth).eval()
    assert backbones.load_exactly(ours, theirs.state_dict(), ("fc.",)) == ["fc.weight", "fc.bias"]
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = ours(images)
        same(theirs.fc(features[32].mean((2, 3))), theirs(images))
    assert {s: f.shape[1:] for s, f in features.items()} == {
        s: (ours.channels[s], 64 // s, 96 // s) for s in (4, 8, 16, 32)}


def test_frozen_batchnorm_stays_frozen():
    model = nn.Sequential(backbones.ResNet(18), nn.Identity()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0](torch.randn(2, 3, 64, 64))[32].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].bn1.weight.grad is None and model[0].conv1.weight.grad is not None
    thawed = backbones.ResNet(18, frozen_bn=False).train()
    thawed(torch.randn(2, 3, 64, 64))
    assert thawed.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])  # the parameters stay float32
def test_frozen_batchnorm_computes_the_same_and_keeps_less(dtype, tolerance):
    plain, x = shake(nn.BatchNorm2d(8)).requires_grad_(False), torch.randn(2, 8, 5, 7, dtype=dtype)
    kept, results = [], []
    for norm in (plain, backbones.freeze_batchnorm(copy.deepcopy(plain))):
        sizes, leaf = [], x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            out = norm(leaf)
        kept.append(max(sizes))
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for theirs, ours in zip(*results):
        same(ours, theirs, tolerance)
    assert kept == [x.numel(), 8]


def test_pyramid():
    model = backbones.ResNetFPN(18).eval()
    features = model(torch.randn(1, 3, 128, 192))
    assert {s: tuple(f.shape[1:]) for s, f in features.items()} == {
        s: (256, 128 // s, 192 // s) for s in model.strides}
    assert torch.equal(features[64], features[32][:, :, ::2, ::2])


def test_swin_is_torchvisions():
    theirs = shake(torchvision.models.swin_t(weights=None))
    ours = backbones.Swin("t").eval()
    backbones.load_exactly(ours, theirs.state_dict(), ("norm.", "head."))
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        features = ours(images)
        same(theirs.head(theirs.norm(features[32].permute(0, 2, 3, 1)).mean((1, 2))), theirs(images))
    assert {s: f.shape[1:] for s, f in features.items()} == {
        s: (ours.channels[s], 96 // s, 64 // s) for s in (4, 8, 16, 32)}


def test_small():
    torch.manual_seed(0)
    model = backbones.Small().eval()
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 5e5
    images = torch.randn(3, 3, 64, 96)
    features = model(images)
    assert {s: tuple(f.shape[1:]) for s, f in features.items()} == {4: (16, 16, 24), 8: (32, 8, 12), 16: (64, 4, 6),
                                                                  32: (128, 2, 3)}
    same(model(images[1:2])[32], features[32][1:2], 1e-5)
    flat = model(torch.zeros(1, 3, 64, 64))[32]
    assert (flat[..., 0, 0] - flat[..., 1, 1]).abs().max() > 1e-3  # a uniform image still tells its places apart


# ---- ViT ----------------------------------------------------------------------------------------------------

def tiny_vit(image_size=64, patch=16, **settings):
    return shake(timm.models.VisionTransformer(img_size=image_size, patch_size=patch, embed_dim=64, depth=2,
                                               num_heads=4, num_classes=5, **settings))


def test_vit_equals_timm_at_its_native_size():
    theirs, ours = shake(timm.create_model("vit_small_patch16_384")), backbones.ViT().eval()
    assert ours.load_timm(theirs.state_dict()) == ["head.weight", "head.bias"]
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        same(ours(images), theirs.forward_features(images)[:, 1:])


resample = partial(timm.layers.resample_abs_pos_embed, interpolation="bilinear", antialias=False)  # TSEG's way; timm's is bicubic


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (32, 32)])
def test_vit_equals_timm_at_other_sizes(size, monkeypatch):
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", resample)
    theirs = tiny_vit(dynamic_img_size=True)
    ours = backbones.ViT(64, 16, 64, 2, 4).eval()
    ours.load_timm(theirs.state_dict())
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        same(ours(images), theirs.forward_features(images)[:, 1:])


def test_vit_takes_positions_of_another_grid_and_drops_distillation():
    state = tiny_vit().state_dict()
    ours = backbones.ViT(96, 16, 64, 2, 4)
    ours.load_timm(state)
    expected = resample(state["pos_embed"], [6, 6])
    same(ours.pos_embed, expected, 1e-6)
    extra = torch.full((1, 1, 64), 9.0)
    distilled = {**state, "dist_token": extra, "head_dist.weight": extra,
                 "pos_embed": torch.cat([state["pos_embed"][:, :1], extra, state["pos_embed"][:, 1:]], 1)}
    assert set(ours.load_timm(distilled)) == {"head.weight", "head.bias", "head_dist.weight", "dist_token"}
    same(ours.pos_embed, expected, 1e-6)


def test_vit_refuses_what_does_not_fit():
    state, model = tiny_vit().state_dict(), backbones.ViT(64, 16, 64, 2, 4)
    for change, says in (({"norm.weight": None}, "lack norm.weight"), ({"pos_embed": torch.ones(3)}, "pos_embed"),
                         ({"surprise": torch.ones(1)}, "unknown.*surprise"),
                         ({"cls_token": torch.ones(1, 1, 8)}, r"cls_token \(1, 1, 8\)"),
                         ({"pos_embed": torch.ones(1, 12, 64)}, "pos_embed")):
        with pytest.raises(UserError, match=says):
            model.load_timm({name: value for name, value in {**state, **change}.items() if value is not None})
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros(1, 3, 60, 64))


def test_vit_drop_path_is_off_in_evaluation():
    model, images = backbones.ViT(32, 16, 64, 4, 4, drop_path=0.9), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def augreg(model, prefix=""):
    """A timm ViT's numbers under the names and in the layout of Google's files."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    arrays = {"embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0), "cls": state["cls_token"],
              "embedding/bias": state["patch_embed.proj.bias"],
              "Transformer/posembed_input/pos_embedding": state["pos_embed"]}

    def norm(name, ours):
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def dense(name, ours):
        arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]

    for i in range(len(model.blocks)):
        name, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{name}/MultiHeadDotProductAttention_1"
        weights, biases = np.split(state[f"{ours}.attn.qkv.weight"], 3), np.split(state[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(len(weight), heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        out = state[f"{ours}.attn.proj.weight"]
        arrays[f"{attention}/out/kernel"] = out.T.reshape(heads, -1, len(out))
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        norm(f"{name}/LayerNorm_0", f"{ours}.norm1")
        norm(f"{name}/LayerNorm_2", f"{ours}.norm2")
        dense(f"{name}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{name}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
    norm("Transformer/encoder_norm", "norm")
    dense("head", "head")
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_augreg_npz(tmp_path, prefix):
    theirs = tiny_vit()
    np.savez(tmp_path / "w.npz", **augreg(theirs, prefix))
    state = backbones.load_augreg_npz(tmp_path / "w.npz")
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("change, says", [
    ({"Transformer/encoderblock_1/LayerNorm_2/bias": None}, "has no array"),
    ({"conv_root/kernel": np.ones(2)}, "conv_root"), ({"cls": np.array([{}], object)}, "cannot read"),
    ({"embedding/kernel": np.ones(5)}, "no AugReg"),
    ({"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias": np.ones(7)}, "no AugReg")])
def test_augreg_refuses_other_files(tmp_path, change, says):
    arrays = {name: value for name, value in {**augreg(tiny_vit()), **change}.items() if value is not None}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(UserError, match=says):
        backbones.load_augreg_npz(tmp_path / "w.npz")


# ---- position encodings -------------------------------------------------------------------------------------

def test_sine_positions_are_detrs():
    theirs = DetrSinePositionEmbedding(8, normalize=True)
    expected = theirs(torch.Size([1, 3, 5, 7]), torch.device("cpu"), torch.float32, torch.ones(1, 5, 7, dtype=torch.bool))
    expected = expected[0].movedim(0, -1) if expected.ndim == 4 else expected[0].unflatten(0, (5, 7))
    same(layers.sine_positions(5, 7, 16), expected)
    with pytest.raises(ValueError, match="multiple of 4"):
        layers.sine_positions(5, 7, 18)


def test_coordinates_are_cell_centres():
    grid = layers.coordinates(2, 4, torch.zeros(1))
    assert grid[0, 0].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2 and grid[0, 1].tolist() == [[-0.5] * 4, [0.5] * 4]
