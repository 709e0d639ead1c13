"""Published weight files -> one clean `.pt` each, with a report of what was loaded, missing and left over.

    python -m data_prep.weights --kind darknet --input darknet53.conv.74 --out data/weights/darknet53.pt

    --kind     takes
    darknet    Darknet's `.weights`: ImageNet's darknet53.conv.74 or darknet53.weights, or a YOLOv3 detector
    resnet     torchvision's resnet18/34/50/101 `.pth`
    swin       torchvision's swin_t/s/b `.pth`
    vit        Google's AugReg `.npz`; timm's, DeiT's and DINO's `.pth`, `.bin` or `.safetensors`
    bert       Hugging Face's `pytorch_model.bin` or `model.safetensors`, of any size
    seqtr      SeqTR's det_best.pth or segm_best.pth, with --words token_to_ix.pkl and --dataset

The result is a dict {kind, config, state, mean, std, source, sha256, leaky} that `common.backbones.load_weights`
reads. Nothing is unpickled beyond tensors and plain containers, and a file that is not understood is refused.

What comes of a whole SeqTR is a checkpoint of train_seqtr_partial.py with --base released, for `--rec-from` there and for
`python eval.py --checkpoint`.

Leaky weights: the official yolov3.weights were trained on COCO images that stand in RefCOCO's val and test splits.
They are refused without --leaky-init, and results made from them are marked. YOLOv3 files look alike whatever they
were trained on, except for the count of training images in the header, so the one that LTS, MCN and SeqTR use (COCO
without those images) is taken on your word, --coco-minus.
"""
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from common import backbones, checkpoint
from common.backbones import HALF, IMAGENET_MEAN, IMAGENET_STD, load_augreg_npz, load_exactly, read_darknet, read_torch
from common.config import Parser, UserError, run
from common.language import Bert, hf_names
from data_prep.refcoco import parse_json, parse_pickle, read_bytes

MAX_HEADER_BYTES = 100 << 20  # the format's own limit on a safetensors header
MAX_NUMBERS = 1 << 31  # ViT-L, the largest here, has 0.3e9; tensors may claim more numbers than their file has
SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
                     "I8": "i1", "U8": "u1", "BOOL": "?"}
IMAGENET_CLASSIFIER = 1000 * 1024 + 1000  # numbers behind the trunk in darknet53.weights
YOLOV3, YOLOV3_SEEN = 62_001_757, 32_013_312  # numbers in a YOLOv3 of COCO's 80 classes; images the official one saw


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--kind", required=True, choices=tuple(CONVERTERS), help="what the file holds")
    parser.add_argument("--input", required=True, metavar="FILE", help="the file as it was published")
    parser.add_argument("--out", required=True, metavar="FILE.pt", help="where to write, such as data/weights/NAME.pt")
    parser.add_argument("--pixels", choices=("auto", "half", "imagenet"), default="auto",
                        help="vit: the pixel normalisation the file was trained with, 0.5 or ImageNet's mean and std")
    parser.switch(None, "leaky-init", False, "darknet: accept weights trained on RefCOCO's val and test images")
    parser.switch(None, "coco-minus", False, "darknet: a detector trained on COCO without RefCOCO's val and test; seqtr: begun with "
                  "it and not pre-trained on other corpora")
    parser.add_argument("--words", default="", metavar="FILE", help="seqtr: the token_to_ix.pkl or .json that it was trained with")
    parser.add_argument("--dataset", default="", help="seqtr: the corpus it was trained on, as it is called here, such as refcoco")
    return parser


def main(argv=None):
    """Convert one file, print the report, return 0. Raises UserError for what is not understood."""
    args = get_parser().parse_args(argv)
    path, out = Path(args.input), Path(args.out)
    if out.suffix != ".pt":
        raise UserError(f"--out {out} must end in .pt.")
    if not path.is_file():
        raise UserError(f"--input {path} does not exist or is no file.")
    if out.exists() and out.samefile(path):
        raise UserError("--out is the input file; choose another name.")
    if args.kind != "seqtr" and (args.words or args.dataset):
        raise UserError(f"--words and --dataset are about SeqTR's checkpoints and mean nothing to --kind {args.kind}.")
    digest = sha256(path)
    try:
        model, left, notes = CONVERTERS[args.kind](path, args)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    state = model.state_dict()
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds numbers that are not finite in {broken[0]}; fetch it again.")
    data = {"kind": args.kind, "config": model.config, "state": state, "mean": getattr(model, "mean", None),
            "std": getattr(model, "std", None), "source": path.name, "sha256": digest, "leaky": args.leaky_init}
    if args.kind == "seqtr":
        data = model.checkpoint | {"model": state, "source": path.name, "sha256": digest}
    write(out, data)
    numbers = sum(value.numel() for value in state.values())
    print(f"{path.name}  sha256 {digest}")
    print(f"loaded    {len(state)} tensors, {numbers:,} numbers: {args.kind} "
          + " ".join(f"{key}={value}" for key, value in model.config.items()))
    print("missing   nothing")
    print("left over " + (", ".join(left) if left else "nothing"))
    if data.get("mean"):
        print(f"pixels    mean {data['mean']}, std {data['std']} of 0..1 RGB")
    if args.leaky_init:
        notes.append("LEAKY: has seen RefCOCO's val and test images; results will say so")
    for note in notes:
        print(f"note      {note}")
    print(f"wrote     {out}")
    return 0


# ---- one converter a kind: (path, args) -> the model with its weights, what was left over, notes -------------

def convert_darknet(path, args):
    """Darknet-53's trunk; decides by what lies behind it what the file was trained on."""
    header, values = read_darknet(path)
    model = backbones.Darknet53()
    rest = len(values) - model.numbers
    left = [f"{rest:,} numbers behind the trunk"] if rest else []
    seen = f"its header counts {header['seen']:,} training images"
    if args.coco_minus and args.leaky_init:
        raise UserError("--coco-minus and --leaky-init contradict each other.")
    official = len(values) == YOLOV3 and header["seen"] == YOLOV3_SEEN
    detector = rest > 0 and rest != IMAGENET_CLASSIFIER
    if official and not args.leaky_init:
        raise UserError(f"{path} is the official yolov3.weights, trained on images of RefCOCO's val and test splits; "
                        "take the COCO-minus weights, or say --leaky-init and have every result marked.")
    if detector and not (args.leaky_init or args.coco_minus):
        raise UserError(f"{path} holds a detector ({rest:,} numbers behind the trunk; {seen}), and nothing in it tells "
                        "its training images: say --coco-minus if they leave out RefCOCO's val and test images, or "
                        "--leaky-init if they do not or you cannot tell.")
    model.load_darknet_stream(values, path)
    what = "a detector" if detector else "ImageNet's classifier" if rest else "a trunk alone, as darknet53.conv.74"
    return model, left, [f"{what}; {seen}"]


def convert_resnet(path, args):
    """torchvision's ResNet; the depth is told by its blocks."""
    state = read_state(path)
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    depths = {(2, 2, 2, 2, False): 18, (3, 4, 6, 3, False): 34, (3, 4, 6, 3, True): 50, (3, 4, 23, 3, True): 101}
    depth = depths.get((*blocks, "layer1.0.conv3.weight" in state))
    if depth is None:
        raise UserError(f"{path} is no ResNet-18, 34, 50 or 101 with torchvision's names; it begins with "
                        f"{_begin(state)}.")
    model = backbones.ResNet(depth)
    old = not any(name.endswith("num_batches_tracked") for name in state)
    notes = ["BatchNorm's batch counters are not in the file (old torchvision); they start at 0"] if old else []
    return model, load_exactly(model, state, ("fc.",)), notes


def convert_swin(path, args):
    """torchvision's Swin; the variant is told by its width and by its blocks at stride 16."""
    state = read_state(path)
    width = len(state.get("features.0.0.bias", ()))
    blocks = len({name.split(".")[2] for name in state if name.startswith("features.5.")})
    variant = {(96, 6): "t", (96, 18): "s", (128, 18): "b"}.get((width, blocks))
    if variant is None:
        raise UserError(f"{path} is no swin_t, s or b with torchvision's names; it begins with {_begin(state)}.")
    model = backbones.Swin(variant)
    return model, load_exactly(model, state, ("norm.", "head.")), []


def convert_vit(path, args):
    """ViT of any size at its native grid; its pixel normalisation by where the file comes from."""
    google = path.suffix == ".npz"
    state = load_augreg_npz(path) if google else read_state(path)
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    depth = _count(state, r"blocks\.(\d{1,3})\.")
    if kernel is None or positions is None or kernel.ndim != 4 or not depth:
        raise UserError(f"{path} is no ViT with timm's names; it begins with {_begin(state)}.")
    dim, patch = kernel.shape[0], kernel.shape[-1]
    if not dim or dim % 64:
        raise UserError(f"{path} has a ViT of width {dim}; the widths of published ones are multiples of 64.")
    if kernel.shape != (dim, 3, patch, patch) or not patch or positions.ndim != 3 \
            or (positions.shape[0], positions.shape[2]) != (1, dim) or depth * 12 * dim * dim > _numbers(state):
        raise UserError(f"{path} is an incomplete ViT: its parts do not fit a width of {dim} and {depth} layers.")
    side = math.isqrt(max(positions.shape[1] - 1 - ("dist_token" in state), 0))
    pixels = args.pixels if args.pixels != "auto" else "half" if google else _vit_pixels(path, state)
    mean, std = (HALF, HALF) if pixels == "half" else (IMAGENET_MEAN, IMAGENET_STD)
    model = backbones.ViT(side * patch, patch, dim, depth, dim // 64, mean=mean, std=std)
    return model, model.load_timm(state), []


def _vit_pixels(path, state):
    """`half` for Google's weights in timm's names, `imagenet` for DeiT and DINO."""
    head = state.get("head.weight")
    name = path.name.lower()
    if head is None or "dist_token" in state or "deit" in name or "dino" in name:
        return "imagenet"
    if len(head) > 1000 or "augreg" in name:  # ImageNet-21k's classes
        return "half"
    raise UserError(f"{path} does not tell its pixel normalisation, and a wrong one costs accuracy silently: say "
                    "--pixels half for Google's AugReg weights (timm's vit_*_augreg), --pixels imagenet for DeiT.")


def convert_bert(path, args):
    """BERT of any size; heads are 64 wide, as in all that were published."""
    state = hf_names(read_state(path))
    words, positions = (state.get(f"embeddings.{name}_embeddings.weight") for name in ("word", "position"))
    middle = state.get("encoder.layer.0.intermediate.dense.weight")
    layers = _count(state, r"encoder\.layer\.(\d{1,3})\.")
    if any(table is None or table.ndim != 2 for table in (words, positions, middle)) or not layers:
        raise UserError(f"{path} is no BERT with Hugging Face's names; it begins with {_begin(state)}.")
    hidden = words.shape[1]
    if not hidden or hidden % 64:
        raise UserError(f"{path} has a BERT of width {hidden}; the widths of published ones are multiples of 64.")
    if {positions.shape[1], middle.shape[1]} != {hidden} \
            or layers * (4 * hidden + 2 * len(middle)) * hidden > _numbers(state):
        raise UserError(f"{path} is an incomplete BERT: its parts do not fit a width of {hidden} and {layers} layers.")
    model = Bert(layers, hidden, hidden // 64, len(middle), len(words), len(positions))
    return model, model.load_hf(state), []


def convert_seqtr(path, args):
    """A whole SeqTR for one corpus, of boxes or of contours, as a checkpoint of train_seqtr_partial.py; [TASK] is zero there."""
    import train_seqtr_partial as seqtr  # the one script whose peer published whole models
    if not args.words or not args.dataset:
        raise UserError("--kind seqtr needs --words token_to_ix.pkl, which numbers the words, and --dataset, such as refcoco.")
    if args.coco_minus == args.leaky_init:
        raise UserError(f"nothing in {path} tells its training images: say --coco-minus if it began with Darknet's weights of COCO "
                        "without RefCOCO's val and test images and was trained on its corpus alone, or else --leaky-init.")
    state = read_state(path, ("ema_state_dict", "state_dict"))
    if any(name.startswith("head.task_embedding") for name in state):
        raise UserError(f"{path} is a multi-task SeqTR, which says a box before every contour; there is no such model here.")
    places, table, vectors = (state.get(f"{name}.weight") for name in (
        "head.transformer.seq_positional_encoding.embedding", "head.transformer.query_embedding", "lan_enc.embedding"))
    if any(of is None or of.ndim != 2 for of in (places, table, vectors)) or len(places) % 2 == 0 or len(places) < 5 \
            or table.shape != (1001, 256):
        raise UserError(f"{path} is no SeqTR with the names of its code; it begins with {_begin(state)}.")
    entries = read_words(args.words)
    if len(vectors) != len(entries) + 2:
        raise UserError(f"{args.words} numbers {len(entries) + 2:,} words, {path} has vectors for {len(vectors):,}: they are of "
                        "different corpora.")
    settings = seqtr.get_parser().parse_args([])
    vars(settings).update(base="released", dataset=args.dataset, stage="rec" if len(places) == 5 else "res", cctf="off", pmca="off",
                          points=len(places) // 2, max_words=20 if args.dataset.startswith("refcocog") else 15,
                          leaky_init=args.leaky_init)
    model = seqtr.build_model(settings, seqtr.make_vocabulary(entries))
    model.config = {"stage": settings.stage, "dataset": args.dataset, "words": len(entries)} \
        | ({"points": settings.points} if settings.stage == "res" else {})
    model.checkpoint = {"version": checkpoint.VERSION, "script": seqtr.__name__, "args": vars(settings), "step": 0, "best": {},
                        "vocabulary": entries}
    left = load_exactly(model, seqtr_names(state) | {"task.weight": torch.zeros_like(model.task.weight)})
    return model, left, ["pixels 0..255, zero [TASK], SeqTR's neck and padding: --base released, which the checkpoint says itself"]


def seqtr_names(state):
    """SeqTR's state dict under the names of train_seqtr_partial.py; what is unknown keeps its name."""
    names = {"vis_enc.darknet.0": "backbone.stem", "vis_enc.darknet.12": "neck.4", "vis_enc.darknet.13": "neck.5",
             "fusion.down_bot2mid.1": "merge1", "fusion.down_mid2top.1": "merge2", "fusion.top_project": "merge3",
             "lan_enc.embedding": "language.embedding", "lan_enc.lstm": "language.gru",
             "head.transformer.input_proj.conv": "project.0", "head.transformer.input_proj.gn": "project.1",
             "head.transformer.query_embedding": "coordinates", "head.transformer.seq_positional_encoding.embedding": "places",
             "head.transformer.decoder.norm": "norm"}
    for stage, blocks in enumerate((1, 2, 8, 8, 4)):
        names[f"vis_enc.darknet.{2 * stage + 1}"] = f"backbone.stages.{stage}.0"
        names |= {f"vis_enc.darknet.{2 * stage + 2}.module_list.{i}.{j}": f"backbone.stages.{stage}.{i + 1}.conv{j + 1}"
                  for i in range(blocks) for j in (0, 1)}
    names |= {f"vis_enc.darknet.11.module_list.{i // 2}.{i % 2}": f"neck.{i}" for i in range(4)}
    names |= {f"head.predictor.{i}.fc": f"predictor.{2 * i}" for i in range(3)}
    for half, layers, attentions in (("encoder", 6, {"self_attn": "attention"}),
                                     ("decoder", 3, {"self_attn": "own", "multihead_attn": "cross"})):
        for i in range(layers):
            theirs, ours = f"head.transformer.{half}.layers.{i}", f"{half}.{i}"
            names |= {f"{theirs}.linear1": f"{ours}.feed_forward.0", f"{theirs}.linear2": f"{ours}.feed_forward.3"}
            names |= {f"{theirs}.norm{n + 1}": f"{ours}.norms.{n}" for n in range(len(attentions) + 1)}
            names |= {f"{theirs}.{their}": f"{ours}.{our}" for their, our in attentions.items()}
    renamed = {}
    for name, value in state.items():
        begin = next((begin for begin in names if name.startswith(f"{begin}.")), None)
        end = name[len(begin):].replace(".out_proj.", ".out.") if begin else ""
        if end.startswith(".in_proj_") and value.ndim:  # queries, keys and values in one
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                renamed[f"{names[begin]}.{part}.{end.removeprefix('.in_proj_')}"] = rows
        else:
            renamed[names[begin] + end if begin else name] = value
    return renamed


def read_words(path):
    """The words of SeqTR's token_to_ix, a pickle or JSON of {word: id}, in the order of their ids from 2 on. Raises UserError."""
    path = Path(path)
    words = (parse_json if path.suffix == ".json" else parse_pickle)(read_bytes(path), path)
    if not isinstance(words, dict) or any(type(word) is not str or type(i) is not int for word, i in words.items()) \
            or sorted(words.values()) != list(range(len(words))) or [words.get("PAD"), words.get("UNK")] != [0, 1]:
        raise UserError(f"{path} is no numbering of words from PAD, 0, and UNK, 1, on.")
    return sorted(words, key=words.get)[2:]


CONVERTERS = {"darknet": convert_darknet, "resnet": convert_resnet, "swin": convert_swin, "vit": convert_vit,
              "bert": convert_bert, "seqtr": convert_seqtr}


def _count(state, pattern):
    """1 + the largest block number that `pattern` finds at the start of the names, 0 where none."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _numbers(state):
    """How many numbers a state dict holds: a model that needs more is not built, whatever the shapes claim."""
    return sum(value.numel() for value in state.values())


def _begin(state):
    """The first names of a state dict, for an error."""
    return ", ".join(name[:60] for name in list(state)[:4])


# ---- files --------------------------------------------------------------------------------------------------

def read_state(path, keys=("model", "state_dict")):
    """The float tensors of a `.safetensors` file or of a `torch.save`d one, as {name: float32 tensor}.

    A state dict inside {"model": …} or another of the `keys` is unwrapped, and a prefix `module.` dropped. Raises UserError
    for files that are damaged, hold no tensors, or hold objects that only code could rebuild.
    """
    if Path(path).suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        state = read_torch(path)
        for key in keys:
            state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    tensors = {name.removeprefix("module."): value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    if not 0 < _numbers(tensors) <= MAX_NUMBERS:
        raise UserError(f"{path} holds {_numbers(tensors):,} numbers under names, which is no published backbone.")
    if any(value.layout != torch.strided or value.is_complex() or value.is_quantized for value in tensors.values()):
        raise UserError(f"{path} holds sparse, complex or quantised tensors, which no published backbone has.")
    return {name: value.float() for name, value in tensors.items()}


def read_safetensors(path):
    """A `.safetensors` file -> {name: tensor}: 8 bytes of header length, a JSON header, the numbers (bfloat16 too).

    Raises UserError where the header does not describe the file exactly.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path} is no safetensors file, or cut short: its header would have {length:,} bytes.")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise UserError(f"{path} is no safetensors file: its header is no table.")
        body = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
        tensors, total = {}, 0
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = _safetensor(path, name, entry, body)
                total += tensors[name].nbytes
                if total > len(body):
                    raise UserError(f"{path} is damaged: its tensors overlap.")
        return tensors
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: {str(error).splitlines()[0]}.") from None


def _safetensor(path, name, entry, body):
    """One tensor of `body`, every number of its header entry checked."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    whole = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, span))
    if not isinstance(kind, str) or kind not in SAFETENSORS_TYPES or not whole or len(span) != 2 or len(shape) > 8:
        raise UserError(f"{path}: the header's entry {name[:80]!r} is not understood.")
    dtype = np.dtype(SAFETENSORS_TYPES[kind])
    if span[1] > len(body) or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path} is cut short or damaged: {name[:80]!r} does not lie where the header says.")
    tensor = torch.from_numpy(body[span[0]:span[1]].copy().view(dtype).reshape(shape))
    return tensor.view(torch.bfloat16) if kind == "BF16" else tensor


def sha256(path):
    """The hex digest of a file. Raises UserError when it cannot be read."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def write(path, data):
    """torch.save that leaves either the old file or the whole new one. Raises UserError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(data, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is not ours: the sentence below says so
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}.") from None


if __name__ == "__main__":
    run(main)
