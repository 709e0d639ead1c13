"""Published weight files through `python -m data_prep.weights` and back into a model; and files that mean harm."""
import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from transformers import BertConfig, BertForPreTraining, BertModel

from common import backbones
from common.backbones import load_weights
from common.config import UserError
from common.language import Bert
from data_prep import weights
from tests.conftest import command
from tests.test_backbones import augreg, tiny_vit, weights_file

BERT = dict(num_hidden_layers=1, hidden_size=64, num_attention_heads=1, intermediate_size=32, vocab_size=12,
            max_position_embeddings=8)


class Bomb:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def convert(kind, path, *flags):
    """Run the converter in this process; returns the file it wrote."""
    out = path.with_name(f"{kind}.pt")
    assert weights.main(["--kind", kind, "--input", str(path), "--out", str(out), *flags]) == 0
    return out


def equal(model, theirs, names=None):
    own = model.state_dict()
    return all(torch.equal(own[name], value) for name, value in theirs.items() if name in (names or own))


# ---- Darknet: what lies behind the trunk tells what the file is ---------------------------------------------

TRUNK = backbones.Darknet53.numbers
IMAGENET, DETECTOR = weights.IMAGENET_CLASSIFIER, weights.YOLOV3 - TRUNK


@pytest.mark.parametrize("rest, seen, flags, leaky", [
    (0, 1, [], False), (IMAGENET, 1, [], False), (DETECTOR, weights.YOLOV3_SEEN, ["--leaky-init"], True),
    (DETECTOR, weights.YOLOV3_SEEN, [], "official yolov3.weights"),
    (DETECTOR, weights.YOLOV3_SEEN, ["--coco-minus"], "official yolov3.weights"),
    (DETECTOR, 28_800_000, ["--coco-minus"], False), (DETECTOR, 28_800_000, [], "--coco-minus"),
    (DETECTOR, 28_800_000, ["--coco-minus", "--leaky-init"], "contradict"), (-4, 1, [], "cut short")])
def test_darknet(tmp_path, capsys, rest, seen, flags, leaky):
    path = tmp_path / "some.weights"
    with open(weights_file(path, [], seen=seen), "ab") as file:
        file.truncate(20 + 4 * (TRUNK + rest))  # zeros, and no room on the disk
    if isinstance(leaky, str):
        with pytest.raises(UserError, match=leaky):
            convert("darknet", path, *flags)
        assert not (tmp_path / "darknet.pt").exists()
        return
    out = convert("darknet", path, *flags)
    report = capsys.readouterr().out
    assert f"{rest:,} numbers behind the trunk" in report if rest else "left over nothing" in report
    assert f"counts {seen:,}" in report and ("LEAKY" in report) == leaky
    if leaky:
        model = backbones.Darknet53()
        with pytest.raises(UserError, match="--leaky-init"):
            load_weights(model, out)
        assert load_weights(model, out, leaky_init=True)["leaky"] is True
        assert not any(value.any() for value in model.state_dict().values())
    assert backbones.read_converted(out)["leaky"] is leaky


# ---- the other kinds --------------------------------------------------------------------------------------------

def test_resnet(tmp_path, capsys):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "r.pth")
    out = convert("resnet", tmp_path / "r.pth")
    report = capsys.readouterr().out
    assert "depth=18" in report and "left over fc.weight, fc.bias" in report and "batch counters" in report
    pyramid = backbones.ResNetFPN(18)
    meta = load_weights(pyramid, out)
    assert equal(pyramid.body, state)
    assert meta["source"] == "r.pth" and meta["sha256"] == weights.sha256(tmp_path / "r.pth")
    with pytest.raises(UserError, match="depth=18"):
        load_weights(backbones.ResNet(34), out)
    with pytest.raises(UserError, match="for resnet, not for Darknet53"):
        load_weights(backbones.Darknet53(), out)


def test_swin(tmp_path):
    state = torchvision.models.swin_t(weights=None).state_dict()
    torch.save(state, tmp_path / "swin.pth")
    model = backbones.Swin("t")
    load_weights(model, convert("swin", tmp_path / "swin.pth"))
    assert equal(model, state)


def write_vit(path, model):
    state = model.state_dict()
    if path.suffix == ".npz":
        np.savez(path, **augreg(model))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    elif "dino" in path.name:
        torch.save({name: value for name, value in state.items() if not name.startswith("head")}, path)
    else:
        torch.save({"model": state}, path)


@pytest.mark.parametrize("name, flags, mean", [
    ("vit.npz", [], 0.5), ("deit_small.pth", [], 0.485), ("dino.pth", [], 0.485), ("model.safetensors", None, None),
    ("model.safetensors", ["--pixels", "imagenet"], 0.485), ("vit_augreg.safetensors", [], 0.5)])
def test_vit_and_its_pixels(tmp_path, name, flags, mean):
    theirs = tiny_vit()
    write_vit(tmp_path / name, theirs)
    if flags is None:
        with pytest.raises(UserError, match="--pixels"):
            convert("vit", tmp_path / name)
        return
    out = convert("vit", tmp_path / name, *flags)
    model = backbones.ViT(64, 16, 64, 2, 1)
    load_weights(model, out)
    assert equal(model, theirs.state_dict()) and model.mean[0] == mean
    again = backbones.ViT(96, 16, 64, 2, 1)  # a checkpoint carries the pixels; the file may be gone by then
    again.load_state_dict({**model.state_dict(), "pos_embed": again.pos_embed})
    assert again.std == model.std
    load_weights(backbones.ViT(96, 16, 64, 2, 1), out)
    with pytest.raises(UserError, match="depth=2"):
        load_weights(backbones.ViT(64, 16, 64, 3, 1), out)


@pytest.mark.parametrize("suffix, dtype", [("bin", torch.float32), ("safetensors", torch.float32),
                                           ("safetensors", torch.bfloat16), ("safetensors", torch.float16)])
def test_bert(tmp_path, capsys, suffix, dtype):
    state = {name: value.to(dtype) for name, value in BertForPreTraining(BertConfig(**BERT)).state_dict().items()
             if not name.startswith("cls.predictions.decoder")}
    path = tmp_path / f"model.{suffix}"
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = Bert(1, 64, 1, 32, 12, 8)
    load_weights(model, convert("bert", path))
    expected = {name.removeprefix("bert."): value.float() for name, value in state.items()}
    assert equal(model, expected, model.state_dict()) and "cls.predictions.bias" in capsys.readouterr().out


def test_command_line(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"x": Bomb(tmp_path / "ran")}))
    done = command("-m", "data_prep.weights", "--kind", "bert", "--input", path, "--out", tmp_path / "x.pt")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "x.bin" in done.stderr


# ---- what is not understood, damaged, or hostile ----------------------------------------------------------------

def test_no_code_runs(tmp_path):
    torch.save({"layer1.0.conv1.weight": Bomb(tmp_path / "ran")}, tmp_path / "zip.pth")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "ran")}))
    for name in ("zip.pth", "raw.bin"):
        for kind in ("resnet", "vit", "bert"):
            with pytest.raises(UserError, match=name):
                convert(kind, tmp_path / name)
        with pytest.raises(UserError, match=name):
            load_weights(backbones.Small(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind, state", [
    ("resnet", {"layer1.0.conv1.weight": torch.ones(2)}), ("resnet", {}), ("resnet", [1, 2]),
    ("swin", {"a": torch.ones(2)}),
    ("vit", {"pos_embed": torch.ones(1, 5, 64), "patch_embed.proj.weight": torch.ones(64, 3, 16, 16)}),
    ("vit", {"pos_embed": torch.ones(0, 5, 64), "patch_embed.proj.weight": torch.ones(64, 3, 16, 16),
             "blocks.0.x": torch.ones(1)}),
    ("bert", {"embeddings.word_embeddings.weight": torch.ones(5)}),
    ("bert", {"embeddings.word_embeddings.weight": torch.ones(1).expand(50_000_000, 64)}),
    ("bert", {"embeddings.word_embeddings.weight": torch.ones(12, 64).to_sparse()})])
def test_refuses_other_networks(tmp_path, kind, state):
    torch.save(state, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="deit.pth"):
        convert(kind, tmp_path / "deit.pth")


@pytest.mark.parametrize("kind, state", [
    ("vit", {"pos_embed": torch.ones(1, 5, 192), "patch_embed.proj.weight": torch.ones(192, 3, 1, 1),
             "blocks.99.x": torch.ones(1)}),
    ("vit", {"pos_embed": torch.ones(1, 5, 192), "patch_embed.proj.weight": torch.ones(192, 0, 1, 9),
             "blocks.0.x": torch.ones(1)}),
    ("bert", {"embeddings.word_embeddings.weight": torch.ones(12, 192),
              "embeddings.position_embeddings.weight": torch.ones(8, 192), "encoder.layer.99.x": torch.ones(1),
              "encoder.layer.0.intermediate.dense.weight": torch.ones(32, 192)})])
def test_builds_nothing_larger_than_the_file(tmp_path, kind, state):
    torch.save(state, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="incomplete"):
        convert(kind, tmp_path / "deit.pth")


def test_refuses_numbers_that_are_not_finite(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer4.1.bn2.weight"][3] = float("nan")
    torch.save(state, tmp_path / "r.pth")
    with pytest.raises(UserError, match="not finite in layer4.1.bn2.weight"):
        convert("resnet", tmp_path / "r.pth")


def test_refuses_bad_places(tmp_path):
    (tmp_path / "r.pth").write_bytes(b"x")
    for source, out, says in (("absent", "x.pt", "does not exist"), ("r.pth", "x.bin", "must end in .pt")):
        with pytest.raises(UserError, match=says):
            weights.main(["--kind", "resnet", "--input", str(tmp_path / source), "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match="--leaky"):
        weights.main(["--kind", "resnet", "--input", "a", "--out", "b.pt", "--leaky"])


@pytest.mark.parametrize("entry", [
    [], None, {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
    {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": "F8", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
    {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}])
def test_safetensors_header(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="m.safetensors.*'x'"):
        weights.read_safetensors(path)


@pytest.mark.parametrize("length, header", [(0, b""), (1 << 62, b"{}"), (2, b"[]"), (2, b"{\xff"), (2, b"{}"),
                                            (9, b"{}"), (200_000, b"[" * 200_000)])
def test_safetensors_frame(tmp_path, length, header):
    (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="m.safetensors"):
        weights.read_state(tmp_path / "m.safetensors")


def test_safetensors_overlap(tmp_path):
    header = json.dumps({str(i): {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for i in range(2)}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="overlap"):
        weights.read_safetensors(path)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """One good file of each format: kind -> path, and a converted one."""
    folder = tmp_path_factory.mktemp("good")
    state = BertModel(BertConfig(**BERT)).state_dict()
    torch.save(state, folder / "b.bin")
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "b.safetensors")
    np.savez(folder / "v.npz", **augreg(tiny_vit()))
    convert("bert", folder / "b.bin")
    return {"zip": folder / "b.bin", "legacy": folder / "old.bin", "safetensors": folder / "b.safetensors",
            "npz": folder / "v.npz", "converted": folder / "bert.pt"}


@pytest.mark.parametrize("which", ["zip", "legacy", "safetensors", "npz", "converted"])
def test_mutated_files_give_a_sentence(small_files, tmp_path, which):
    good, rng = small_files[which].read_bytes(), np.random.default_rng(0)
    path = tmp_path / small_files[which].name
    refused = 0
    for trial in range(150):
        data = bytearray(good)
        if trial % 3 == 0:
            del data[rng.integers(len(data)):]
        else:
            reach = min(len(data), 2000) if trial % 3 == 1 else len(data)  # headers, or anywhere
            for position in rng.integers(reach, size=rng.integers(1, 6)):
                data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            if which == "converted":
                load_weights(Bert(1, 64, 1, 32, 12, 8), path)
            else:
                weights.main(["--kind", "vit" if which == "npz" else "bert", "--input", str(path),
                              "--out", str(tmp_path / "out.pt")])
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_converted_file_of_another_make(small_files, tmp_path):
    data = torch.load(small_files["converted"], weights_only=True)
    for change in ({"leaky": 1}, {"state": None}, {"kind": "vit", "mean": None}, {"config": {}}, {"state": {}}):
        torch.save({**data, **change}, tmp_path / "w.pt")
        with pytest.raises(UserError, match="w.pt"):
            load_weights(Bert(1, 64, 1, 32, 12, 8), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="w.pt"):
        load_weights(Bert(1, 64, 1, 32, 12, 8), tmp_path / "w.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_weights(Bert(1, 64, 1, 32, 12, 8), tmp_path / "absent.pt")


def test_a_full_size_vit(tmp_path):
    theirs = timm.create_model("vit_small_patch16_384")
    np.savez(tmp_path / "S_16.npz", **augreg(theirs))
    model = backbones.ViT()
    load_weights(model, convert("vit", tmp_path / "S_16.npz"))
    assert equal(model, theirs.state_dict()) and model.config["heads"] == 6
