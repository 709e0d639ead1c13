"""SeqTR's published checkpoints: the converted model equals a plain reading of their code's arithmetic; files that do not fit."""
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_seqtr_partial as partial_res
from common import checkpoint, data
from common.config import UserError
from common.text import Vocabulary
from data_prep import weights

WORDS = {"PAD": 0, "UNK": 1, "CLS": 2, "left": 3, "mans": 4, "t": 5, "shirt": 6}
POINTS, TEXT = 4, "Left man's t-shirt!"
BLOCKS = {2: 1, 4: 2, 6: 8, 8: 8, 10: 4, 11: 2}
STAGES = {0: (3, 32, 3, 1), 1: (32, 64, 3, 2), 3: (64, 128, 3, 2), 5: (128, 256, 3, 2), 7: (256, 512, 3, 2), 9: (512, 1024, 3, 2),
          12: (1024, 512, 1, 1), 13: (512, 1024, 3, 1)}  # of vis_enc.darknet


def made_state():
    """A checkpoint's tensors under their names, drawn at random."""
    generator, state = torch.Generator().manual_seed(0), {}

    def put(name, *shape, scale=None, add=0.0):
        scale = scale if scale is not None else 1 / math.sqrt(math.prod(shape[1:]) or 1)
        state[name] = add + scale * torch.empty(shape).uniform_(-1, 1, generator=generator)

    def conv(name, cin, cout, k):
        put(f"{name}.conv.weight", cout, cin, k, k, scale=math.sqrt(5 / (cin * k * k)))
        for part, add in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            put(f"{name}.bn.{part}", cout, scale=0.2, add=add)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    def linear(name, cin, cout, bias=".bias", weight=".weight"):
        put(name + weight, cout, cin, scale=1.5 / math.sqrt(cin))
        put(name + bias, cout, scale=0.1)

    for i, (cin, cout, k, _) in STAGES.items():
        conv(f"vis_enc.darknet.{i}", cin, cout, k)
    state["vis_enc.darknet.0.conv.weight"] /= 128  # of pixels up to 255
    for i, blocks in BLOCKS.items():
        wide = STAGES[i - 1 if i < 11 else 9][1]
        for b in range(blocks):
            conv(f"vis_enc.darknet.{i}.module_list.{b}.0", wide, wide // 2, 1)
            conv(f"vis_enc.darknet.{i}.module_list.{b}.1", wide // 2, wide, 3)
    for name, cin, cout, k in (("down_bot2mid.1", 256, 256, 3), ("down_mid2top.1", 768, 768, 3), ("top_project.0", 1792, 1792, 3),
                               ("top_project.1", 1792, 1024, 1)):
        conv(f"fusion.{name}", cin, cout, k)
    put("lan_enc.embedding.weight", len(WORDS), 300, scale=1.0)
    for end in ("", "_reverse"):
        for way, cin in (("ih", 300), ("hh", 512)):
            linear("lan_enc.lstm", cin, 1536, f".bias_{way}_l0{end}", f".weight_{way}_l0{end}")
    transformer = "head.transformer"
    linear(f"{transformer}.input_proj.conv", 1024, 256)
    state[f"{transformer}.input_proj.conv.weight"] = state[f"{transformer}.input_proj.conv.weight"][..., None, None]
    norms = [f"{transformer}.input_proj.gn", f"{transformer}.decoder.norm"]
    for half, layers, attentions in (("encoder", 6, ["self_attn"]), ("decoder", 3, ["self_attn", "multihead_attn"])):
        for i in range(layers):
            layer = f"{transformer}.{half}.layers.{i}"
            for attention in attentions:
                linear(f"{layer}.{attention}", 256, 768, ".in_proj_bias", ".in_proj_weight")
                linear(f"{layer}.{attention}.out_proj", 256, 256)
            linear(f"{layer}.linear1", 256, 1024)
            linear(f"{layer}.linear2", 1024, 256)
            norms += [f"{layer}.norm{n + 1}" for n in range(len(attentions) + 1)]
    for name in norms:
        put(f"{name}.weight", 256, scale=0.2, add=1.0)
        put(f"{name}.bias", 256, scale=0.2)
    put(f"{transformer}.query_embedding.weight", 1001, 256, scale=1.0)
    put(f"{transformer}.seq_positional_encoding.embedding.weight", 2 * POINTS + 1, 256, scale=1.0)
    for i, cout in enumerate((256, 256, 1001)):
        linear(f"head.predictor.{i}.fc", 256, cout)
    return state


def their_logits(state, image, words, size, tokens):
    """SeqTR's arithmetic read off its code's names: image (3,H,W) of 0..255 with black padding, words (15,), size (w,h) of the
    picture, tokens (T,) -> logits (T+1,1001)."""
    def conv(name, x, stride=1):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        mean, var, scale, shift = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.leaky_relu(F.batch_norm(x, mean, var, scale, shift, False, 0.0, 1e-5), 0.1)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (256,), state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(name, query, key, value, hidden):
        module = nn.MultiheadAttention(256, 8, batch_first=True)
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        return module(query[None], key[None], value[None], attn_mask=hidden, need_weights=False)[0][0]

    x, seen = image[None], {}
    for i in range(14):
        if i in STAGES:
            x = conv(f"vis_enc.darknet.{i}", x, STAGES[i][3])
        else:
            for b in range(BLOCKS[i]):
                y = conv(f"vis_enc.darknet.{i}.module_list.{b}.1", conv(f"vis_enc.darknet.{i}.module_list.{b}.0", x))
                x = y if i == 11 else x + y
        seen[i] = x
    middle = torch.cat([conv("fusion.down_bot2mid.1", F.avg_pool2d(seen[6], 2)), seen[8]], 1)
    coarse = torch.cat([conv("fusion.down_mid2top.1", F.avg_pool2d(middle, 2)), seen[13]], 1)
    visual = conv("fusion.top_project.1", conv("fusion.top_project.0", coarse))
    gru = nn.GRU(300, 512, batch_first=True, bidirectional=True)
    gru.load_state_dict({k.removeprefix("lan_enc.lstm."): v for k, v in state.items() if k.startswith("lan_enc.lstm.")})
    sentence = gru(state["lan_enc.embedding.weight"][words][None])[0][0][words != 0].amax(0)
    fused = visual.tanh() * sentence.tanh()[None, :, None, None]
    name = "head.transformer.input_proj"
    x = F.conv2d(fused, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"])
    x = F.group_norm(x, 32, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"])
    rows, columns = x.shape[2:]
    seen_rows, seen_columns = sum(32 * i < size[1] for i in range(rows)), sum(32 * i < size[0] for i in range(columns))
    position, hidden = torch.zeros(rows * columns, 256), torch.zeros(rows * columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            hidden[i * columns + j] = i >= seen_rows or j >= seen_columns
            for c in range(128):
                slow = 10000 ** (2 * (c // 2) / 128)
                wave = math.cos if c % 2 else math.sin
                position[i * columns + j, c] = wave(min(i + 1, seen_rows) / seen_rows * 2 * math.pi / slow)
                position[i * columns + j, 128 + c] = wave(min(j + 1, seen_columns) / seen_columns * 2 * math.pi / slow)
    x = x[0].flatten(1).T
    for i in range(6):
        name = f"head.transformer.encoder.layers.{i}"
        x = norm(f"{name}.norm1", x + attention(f"{name}.self_attn", x + position, x + position, x, hidden.expand(len(x), -1)))
        x = norm(f"{name}.norm2", x + linear(f"{name}.linear2", linear(f"{name}.linear1", x).relu()))
    memory, place = x, state["head.transformer.seq_positional_encoding.embedding.weight"][:len(tokens) + 1]
    x = torch.cat([torch.zeros(1, 256), state["head.transformer.query_embedding.weight"][tokens]])
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for i in range(3):
        name = f"head.transformer.decoder.layers.{i}"
        x = norm(f"{name}.norm1", x + attention(f"{name}.self_attn", x + place, x + place, x, later))
        seen = attention(f"{name}.multihead_attn", x + place, memory + position, memory, hidden.expand(len(x), -1))
        x = norm(f"{name}.norm2", x + seen)
        x = norm(f"{name}.norm3", x + linear(f"{name}.linear2", linear(f"{name}.linear1", x).relu()))
    x = norm("head.transformer.decoder.norm", x)
    return linear("head.predictor.2.fc", linear("head.predictor.1.fc", linear("head.predictor.0.fc", x).relu()).relu())


@pytest.fixture(scope="module")
def state():
    return made_state()


def convert(monkeypatch, folder, state, *flags, words=WORDS):
    """The converter on a file that would hold `state`; returns the written path."""
    (folder / "ix.pkl").write_bytes(pickle.dumps(words))
    (folder / "segm_best.pth").write_bytes(b"as if")
    monkeypatch.setattr(weights, "read_state", lambda path, keys: dict(state))
    assert weights.main(["--kind", "seqtr", "--input", str(folder / "segm_best.pth"), "--out", str(folder / "out.pt"), "--words",
                         str(folder / "ix.pkl"), "--dataset", "refcoco", *(flags or ["--coco-minus"])]) == 0
    return folder / "out.pt"


def test_converted_seqtr_is_theirs(monkeypatch, tmp_path, capsys, state):
    """What eval.py reads of the file says what SeqTR's code would, from the sentence to the points on the canvas."""
    import eval as program
    path = convert(monkeypatch, tmp_path, state)
    said = capsys.readouterr().out
    assert "missing   nothing" in said and "left over nothing" in said and "points=4" in said
    saved, script, settings = program.read_checkpoint(path)
    model, vocabulary = program.build(path, saved, script, settings, torch.device("cpu"))
    assert (settings.stage, settings.points, settings.leaky_init) == ("res", POINTS, False) and len(vocabulary) == len(WORDS)
    assert not model.task.weight.any()
    encode, canvas = script.frontend(settings, vocabulary)
    assert encode(TEXT) == [3, 4, 5, 6]
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, 40, 96), generator=generator, dtype=torch.uint8)
    tokens = torch.tensor([0, 999, 400, 17, 1000])
    images = torch.tensor(canvas.fill, dtype=torch.uint8)[:, None, None].repeat(1, 1, 96, 96)
    images[0, :, :40] = picture
    words = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours = model(images, torch.tensor([0]), words, tokens[None])["logits"][0]
        theirs = their_logits(state, F.pad(picture.float(), (0, 0, 0, 56)), F.pad(words[0], (0, 11)), (96, 40), tokens)
        assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=2e-3 * theirs.abs().max())
        assert torch.allclose(ours, model(images.float() / 255, torch.tensor([0]), words, tokens[None])["logits"][0], atol=1e-3)
        features = model.encode_image(images)
        out = model.segment(features, torch.tensor([0]), words)
        said = model.generate(model.encode(features, torch.tensor([0]), words))[0]
    there = out["points"][0].isfinite().all(1)
    assert torch.equal(out["points"][0][there], said.view(-1, 2)[there] * torch.tensor([96.0, 64]) / 1000), "sides rounded up to 32"


def test_training_goes_on_from_it(monkeypatch, tmp_path, state):
    """The model of boxes begins one of contours with as many places as it has; a base of another make is refused."""
    state = dict(state)
    name = "head.transformer.seq_positional_encoding.embedding.weight"
    state[name] = state[name][:5]
    begun = checkpoint.load(convert(monkeypatch, tmp_path, state))
    assert begun["args"]["stage"] == "rec"
    words = Vocabulary(begun["vocabulary"])
    args = partial_res.of_stage(partial_res.get_parser().parse_args(["--base", "released"]), "res")
    model = partial_res.build_model(args, words)
    assert partial_res.transfer(model, begun, "x.pt", args) is False
    assert torch.equal(model.places.weight[:5], state[name]) and model.places.weight.shape == (37, 256)
    assert torch.equal(model.coordinates.weight, state["head.transformer.query_embedding.weight"])
    args.base = "paper"
    with pytest.raises(UserError, match="--base released"):
        partial_res.transfer(model, begun, "x.pt", args)


def test_released_targets():
    """Coordinates are shares of the sides rounded up to 32, cut to bins; there and back within a bin."""
    points = torch.tensor([[0.0, 0], [96, 40], [50.05, 39.99]])
    tokens = partial_res.quantise(points.numpy(), (96, 40), 1000, released=True)
    assert tokens.tolist() == [[0, 0], [999, 625], [521, 624]]
    size = partial_res.token_frame(torch.tensor([[96, 40]]), True)
    back = partial_res.dequantise(torch.from_numpy(tokens).flatten()[None], size, 1000)
    assert (back[0] - points).abs().max() <= 96 / 1000 + 1e-3


@pytest.mark.parametrize("change, flags, sentence", [
    ({"head.task_embedding.weight": torch.zeros(2, 256)}, [], "multi-task"),
    ({"head.new.weight": torch.zeros(2)}, [], "unknown names"),
    ({"fusion.top_project.1.bn.bias": None}, [], "lack merge3.1.bn.bias"),
    ({}, ["--leaky-init", "--coco-minus"], "training images"),
    ({"head.transformer.query_embedding.weight": torch.zeros(9, 256)}, [], "no SeqTR"),
    ({"lan_enc.embedding.weight": torch.zeros(9, 300)}, [], "different corpora"), ("words", [], "no numbering of words"),
    ({"lan_enc.embedding.weight": torch.tensor(1.0)}, [], "no SeqTR"),
    ({"head.transformer.encoder.layers.0.self_attn.in_proj_bias": torch.tensor(1.0)}, [], "lack encoder.0.attention")])
def test_what_does_not_fit(monkeypatch, tmp_path, state, change, flags, sentence):
    words = {"PAD": 0, "UNK": 2} if change == "words" else WORDS
    changed = {name: value for name, value in (state | (change if change != "words" else {})).items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        convert(monkeypatch, tmp_path, changed, *flags, words=words)
    assert not (tmp_path / "out.pt").exists()


def test_words_of_another_kind(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"as if")
    with pytest.raises(UserError, match="mean nothing to --kind resnet"):
        weights.main(["--kind", "resnet", "--input", str(tmp_path / "x.pth"), "--out", str(tmp_path / "y.pt"), "--words", "ix.pkl"])


def test_averaged_weights_go_first(tmp_path):
    """As their program saves them: with an optimiser, `module.` before each name, averaged weights beside the last ones."""
    path = tmp_path / "det_best.pth"
    torch.save({"epoch": 3, "lr": 1e-4, "state_dict": {"module.a": torch.zeros(2)}, "ema_state_dict": {"module.a": torch.ones(2)}},
               path)
    keys = ("ema_state_dict", "state_dict")
    assert weights.read_state(path, keys)["a"].tolist() == [1, 1] and weights.read_state(path)["a"].tolist() == [0, 0]
    (tmp_path / "ix.json").write_text(json.dumps(WORDS))
    assert weights.read_words(tmp_path / "ix.json") == list(WORDS)[2:]
