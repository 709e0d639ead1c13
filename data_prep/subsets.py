"""Nested subsets of a corpus' training objects: those that keep their masks when the others have only boxes.

    python -m data_prep.subsets --dataset refcoco --data-root data

Partial-RES (Qu et al., CVPR 2023), Sec. 4.2: "randomly sampling the entire train data proportionally without
considering the category". Writes data/<dataset>/subset_<ratio>.json for 1, 5, 10, 50 and 100 %: the ids of the objects
that sentences of train name. Each object has a fixed place in an order drawn by the seed, and a ratio takes the first
ones, so that 1 % lies in 5 % lies in 10 %. The order hangs on ids and seed alone: every machine draws the same.
"""
import hashlib
from pathlib import Path

from common.config import Parser, UserError, run
from data_prep.refcoco import field, read_json, source, write_json

RATIOS = (1, 5, 10, 50, 100)


def subset_path(data_root, dataset, ratio):
    """Where the subset of `ratio` percent lies."""
    return Path(data_root) / dataset / f"subset_{ratio}.json"


def draw(object_ids, ratio, seed=0):
    """The sorted ids of `ratio` percent of the objects, at least one of them; smaller ratios are subsets of larger ones."""
    order = sorted(set(object_ids), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    return sorted(order[:max(1, round(len(order) * ratio / 100))])


def make(data_root, dataset, seed=0, ratios=RATIOS):
    """Write the subset of each ratio; returns {ratio: (objects kept, objects there)}. Same corpus and seed, same bytes.

    Raises UserError where train.json is missing, damaged or names no object.
    """
    path = Path(data_root) / dataset / "train.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; prepare {dataset} first (data_prep/README.md says how).")
    named = set()
    for expression in field(read_json(path), "expressions", list, path):
        for i in field(expression, "object_ids", list, f"{path}: an expression"):
            if type(i) is not int:
                raise UserError(f"{path}: an expression names an object that is no whole number; make it again with data_prep.")
            named.add(i)
    if not named:
        raise UserError(f"{path} has no sentence that names an object.")
    origin, counts = source(path), {}
    for ratio in ratios:
        kept = draw(named, ratio, seed)
        meta = {"dataset": dataset, "ratio": ratio, "seed": seed, "objects": len(kept), "of": len(named), "sources": [origin]}
        write_json(subset_path(data_root, dataset, ratio), {"meta": meta, "objects": kept})
        counts[ratio] = (len(kept), len(named))
    return counts


def load(data_root, dataset, ratio):
    """The ids of a subset's objects, a set. Raises UserError where the file is missing or damaged."""
    path = subset_path(data_root, dataset, ratio)
    if not path.is_file():
        raise UserError(f"{path} does not exist; `python -m data_prep.subsets --dataset {dataset} --data-root {data_root}` "
                        "makes it.")
    objects = field(read_json(path), "objects", list, path)
    if not objects or any(type(i) is not int for i in objects):
        raise UserError(f"{path} holds no list of object ids; remove it and run data_prep.subsets again.")
    return set(objects)


def main(argv=None):
    """Write the subsets of one corpus and print their sizes."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="folder below --data-root that data_prep wrote")
    add("--data-root", default="data", help="where the prepared corpora lie")
    add("--ratio", type=int, nargs="+", default=list(RATIOS), help="percent of the objects, 1 to 100")
    add("--seed", type=int, default=0, help="draws the order of the objects")
    args = parser.parse_args(argv)
    wrong = next((ratio for ratio in args.ratio if not 1 <= ratio <= 100), None)
    if wrong is not None:
        raise UserError(f"--ratio {wrong}: give percent from 1 to 100.")
    for ratio, (kept, there) in make(args.data_root, args.dataset, args.seed, args.ratio).items():
        print(f"{subset_path(args.data_root, args.dataset, ratio)}: {kept} of {there} objects")


if __name__ == "__main__":
    run(main)
