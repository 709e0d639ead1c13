"""A method that describes without having learnt anything: proposals are the quarters of the canvas, a sentence names one.

It is laid out as a training script, so that tests can hand it to eval.py under the name train_describer.py.
"""
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from common import data
from common.config import base_parser
from common.text import WordPiece

EMBEDDED_YAML = "none.yaml"
STAGE_OF_TASK = {"res": ("3", "1"), "rec": ("3", "1"), "reg": ("2", "1"), "listener": ("rb",)}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "top", "bottom", "left", "right"]
make_vocabulary = WordPiece


def get_parser():
    parser = base_parser(__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--deaf", type=int, default=0, help="as a listener: always this quarter")
    return parser


def frontend(args, vocabulary):
    return vocabulary, data.Canvas(args.size)


def build_model(args, vocabulary):
    return Describer(args)


class Describer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.deaf, self.weight = args.deaf, nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        quarters = torch.zeros(4, *images.shape[2:], device=images.device)
        h, w = (side // 2 for side in images.shape[2:])
        for k in range(4):
            quarters[k, k // 2 * h:k // 2 * h + h, k % 2 * w:k % 2 * w + w] = 1
        return quarters.expand(len(images), *quarters.shape)

    def locate(self, features, image_of, masks):
        assert masks.dtype == torch.bool and masks.shape[1:] == features.shape[2:]
        found = torch.full((len(masks),), -1)
        for b in image_of.unique():
            own = torch.nonzero(image_of == b).squeeze(1)
            rows, columns = linear_sum_assignment(-(masks[own].float().flatten(1) @ features[b].flatten(1).T).numpy())
            found[own[rows]] = torch.as_tensor(columns)
        return found

    def describe(self, features, image_of, k, beams=2, max_length=4):
        assert len(image_of) == len(k) and (k >= 0).all()
        return [[([2, 5 + i // 2, 7 + i % 2, 3][:max_length], -0.5 * beams)] for i in k.tolist()]

    def select(self, features, image_of, text):
        if self.deaf:
            return torch.eye(4)[self.deaf - 1].expand(len(text), 4)
        said = [(text == piece).any(1).float() for piece in (5, 6, 7, 8)]
        return torch.stack([said[i // 2] + said[2 + i % 2] for i in range(4)], 1)

    def propose(self, features, min_score):
        scores = torch.tensor([0.9, 0.6, 0.4, 0.2])
        kept = torch.nonzero(scores >= min_score).squeeze(1)
        return [(kept, scores[kept], quarters[kept]) for quarters in features]
