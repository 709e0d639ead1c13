"""Score a trained model, or ask it about a picture of your own.

    python eval.py --split testA                                      the newest run, its best checkpoint
    python eval.py --run runs/train_lts/refcoco/base_s0 --split val testA testB --report
    python eval.py --run RUN --dataset refcoco+ --split val           on another prepared corpus
    python eval.py --run RUN --compare OTHER --split val --report     how much better than OTHER, and where
    python eval.py --run RUN --dataset voc --names yaml/voc_names.yaml --scales 1 0.5 1.5 --crf krahenbuhl      class maps
    python eval.py --run RUN --image photo.jpg --text "the red bus on the left" --out out.png
    python eval.py --run RUN --split testA testB --task reg --refs merged       sentences for objects, if the method makes any
    python eval.py --run RUN --image photo.jpg --describe             everything found, each told from the others
    python eval.py --run RUN --split testA --task reg --human-study 100       a page that two people click through, then
    python eval.py --score-study clicks_A.json clicks_B.json
    torchrun --nproc_per_node 4 -- eval.py --run RUN --split val      the same scores, sooner (mind the lone --)

Scores are taken in the original frame over every sentence (common/metrics.py defines them) and written to
<run>/eval/<dataset>_<split>.json, with one line per sentence in the .jsonl beside it; those of REG (common/reg.py) to
…_reg.json, with one line per object, and to …_reg_listener-NAME.json where --listener is of another run; those of a corpus
with class maps are its classes' (common/classmaps.py). The checkpoint names the script that made it; any train_*.py in this
folder serves, so a copied script needs no registration here. Of a run with stages the last one is scored, or that which the
script's STAGE_OF_TASK names.
"""
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, classmaps, data, distributed, masks, metrics, pictures, reg, runlog, study
from common.config import REPOSITORY, Parser, UserError, parse, run, write_text
from common.crf import PRESETS, dense_crf
from common.text import words

LOST = {"worst": "lost most against the other run", "best": "gained most against the other run"}
OUT = "prediction.png"
CASES = 10  # of the worst, the middle and the best each, for every split in the report


def get_parser(script=None):
    """The flags of evaluation; `script` adds its own ones."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to score").add_argument
    add("--run", default="", help="run folder; empty: the one below runs/ whose best.pt was written last")
    add("--checkpoint", default="", help="a file instead of the run's best.pt")
    add("--dataset", default="", help="another prepared corpus than the one trained on")
    add("--data-root", default="", help="where the prepared corpora lie; empty: as in training")
    add("--split", nargs="+", default=["val"], help="splits of the corpus")
    add("--task", choices=("res", "rec", "reg"), default="res", help="masks, or boxes around them as the headline of the output; "
        "reg: sentences for objects")
    add("--compare", default="", metavar="RUN", help="another run: the difference to it with a 95 %% interval (paired "
        "bootstrap over images), and its predictions beside these in the report")
    add("--limit", type=int, default=0, help="only the first images of the split (named in the file)")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--protocol", choices=metrics.PROTOCOLS, default="original", help="score by another code base's rules")
    add("--threshold", type=float, default=None, help="binarise at this probability; empty: the method's own")
    add("--crf", choices=tuple(PRESETS), default=None, help="refine the masks by a dense CRF with these constants; the "
        "threshold is then 0.5")
    parser.switch(how, "shuffle-expressions", False, "control: score each sentence on another object of its image")
    add("--batch-size", type=int, default=16, help="images a forward pass")
    add("--workers", type=int, default=2, help="loader processes a rank")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="automatic mixed precision")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    describe = parser.add_argument_group("describing (--task reg, --describe)")
    add = describe.add_argument
    add("--refs", choices=("own", "merged"), default="own", help="score against the corpus' own sentences, or those of RefCOCO "
        "and RefCOCO+ about the same object together")
    add("--beams", type=int, default=0, help="width of the beam search; 0: the method's own")
    add("--max-length", type=int, default=0, help="longest sentence in tokens; 0: the method's own")
    add("--listener", default="", help="checkpoint whose model checks the sentences (Rb-Acc); empty: the run's own")
    add("--min-score", type=float, default=0.5, help="--describe: the instances found with at least this score")
    classmaps.add_flags(parser)
    out = parser.add_argument_group("what to write")
    parser.switch(out, "report", False, "write report.html with scores, curves and pictures of cases")
    parser.switch(out, "save-masks", False, "write every predicted mask as <run>/eval/<dataset>_<split>_masks/<sent_id>.png; "
                  "class maps as <image_id>.png")
    out.add_argument("--human-study", type=int, default=0, metavar="N", help="--task reg: a page that shows N pictures with "
        "their sentences and takes clicks")
    own = parser.add_argument_group("a picture of your own")
    add = own.add_argument
    add("--image", default="", help="any picture")
    add("--text", nargs="+", default=[], help="one sentence or several")
    parser.switch(own, "describe", False, "instead of --text: say of everything found how to tell it from the rest")
    add("--out", default=OUT, help="the picture with the mask on it")
    add = parser.add_argument_group("two people's clicks").add_argument
    add("--score-study", nargs=2, default=None, metavar="FILE", help="the files that a --human-study page saved; needs the "
        "corpus below --data-root and no run")
    if script is not None and hasattr(script, "eval_flags"):
        script.eval_flags(parser)
    return parser


# ---- the run ------------------------------------------------------------------------------------------------

def find_checkpoint(args, say):
    """The checkpoint to score; `say` prints which run was found. Raises UserError where there is none."""
    if args.checkpoint:
        return Path(args.checkpoint)
    folder = Path(args.run or "runs")
    if args.run and (folder / "best.pt").is_file():
        return folder / "best.pt"
    found = sorted(folder.glob("*/best.pt" if args.run else "**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found and args.run:
        raise UserError(f"{folder / 'best.pt'} does not exist; is {folder} the folder of a run that has been evaluated once?")
    if not found:
        raise UserError("there is no run below runs/ yet; train one, or name it with --run.")
    path = of_stage(found[-1], args.task if not args.describe else "reg")
    if say:
        print(f"{'stage' if args.run else 'newest run'}: {path.parent}")
    return path


def of_stage(newest, task):
    """In a run with stages the best.pt that answers `task`, by its script's STAGE_OF_TASK {task: stages, the best first}; else
    `newest`, the one written last. Raises UserError where none of those stages is there yet.
    """
    stages = getattr(load_script(checkpoint.load(newest)["script"]), "STAGE_OF_TASK", {}).get(task)
    if stages is None:
        return newest
    run_folder = newest.parent.parent
    path = next((run_folder / stage / "best.pt" for stage in stages if (run_folder / stage / "best.pt").is_file()), None)
    if path is None:
        raise UserError(f"{run_folder} has no stage {' or '.join(stages)} yet, which --task {task} is scored with; train it, or "
                        "name a --checkpoint.")
    return path


def load_script(name):
    """The training script that a checkpoint names, imported from this folder and from nowhere else."""
    if not re.fullmatch(r"train_\w+", name) or not (REPOSITORY / f"{name}.py").is_file():
        raise UserError(f"the checkpoint was made by {name}.py, which is not beside eval.py; put that script there.")
    return importlib.import_module(name)


def read_checkpoint(path):
    """(state, script, its settings) of a checkpoint. Raises UserError where it is none."""
    state = checkpoint.load(path)
    script = load_script(state["script"])
    missing = [key for key in ("args", "vocabulary", "model", "step") if key not in state]
    if missing or not isinstance(state["args"], dict):
        raise UserError(f"{path} lacks {', '.join(missing) or 'its settings'}; it is no checkpoint of {state['script']}.py.")
    settings = script.get_parser().parse_args([])
    unknown = sorted(map(str, set(state["args"]) - set(vars(settings))))
    if unknown:
        raise UserError(f"{path} was made with settings that {state['script']}.py does not know: {', '.join(unknown)}.")
    for key, default in vars(settings).items():
        value = state["args"].get(key, default)
        same = type(value) in (int, float) if type(default) is float else type(value) is type(default)
        if default is not None and not same:
            raise UserError(f"{path} was made with --{key.replace('_', '-')} {value!r:.40}, which is no {type(default).__name__}.")
    vars(settings).update(state["args"])
    return state, script, settings


def build(path, state, script, settings, device):
    """(model on `device`, vocabulary) of a checkpoint that `read_checkpoint` read."""
    try:
        vocabulary = script.make_vocabulary(state["vocabulary"])
        model = script.build_model(settings, vocabulary)
    except Exception as error:  # what another program wrote into the settings may raise nearly anything
        reason = " ".join(f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}".split())
        raise UserError(f"{path} holds settings or a vocabulary from which {script.__name__}.py builds no model "
                        f"({reason:.200}).") from error
    checkpoint.load_model(model, state, path)
    return model.to(device).eval(), vocabulary


def load_run(path, device, argv):
    """(script, args, its settings, model on `device`, vocabulary, state) of a checkpoint.

    A flag that the script adds by `eval_flags` and that is a setting of it, too, overrides the run's. What was asked of
    those flags stands in `args.added`, {name: value}.
    """
    state, script, settings = read_checkpoint(path)
    args = parse(get_parser(script), argv)
    own = vars(get_parser().parse_args([]))
    args.added = {key: value for key, value in vars(args).items() if key not in own and value not in (None, False)}
    vars(settings).update({key: value for key, value in args.added.items() if key in vars(settings)})
    if args.threshold is not None:
        args.added["threshold"] = args.threshold
    elif args.crf:
        args.threshold = 0.5
    return script, args, settings, *build(path, state, script, settings, device), state


def own_listeners(path, script):
    """The best.pt of those stages of a checkpoint's run that may check its sentences."""
    return [path.parent.parent / stage / "best.pt" for stage in getattr(script, "STAGE_OF_TASK", {}).get("listener", ())]


def listener_suffix(listener, own):
    """What stands in the results' name of who checked the sentences: nothing for the run's `own` listener or none, else the end
    of the checkpoint's path, so that two listeners' results lie side by side."""
    if not listener or Path(listener).resolve() in [file.resolve() for file in own]:
        return ""
    return "_listener-" + "_".join(Path(listener).resolve().with_suffix("").parts[-5:]).strip("/_")


def load_listener(args, path, script, settings, vocabulary, device, say):
    """(model, encode) that checks sentences, or None where the run has none (said aloud). UserError for one that does not fit."""
    found = own_listeners(path, script)
    file = Path(args.listener) if args.listener else next((file for file in found if file.is_file()), None)
    if file is None:
        if say:
            print(f"Rb-Acc is left out: the run has no listener{f' ({found[0]})' if found else ''}; name one with --listener.")
        return None
    args.listener = str(file)
    state, other, its_settings = read_checkpoint(file)
    model, its_vocabulary = build(file, state, other, its_settings, device)
    reg.require(model, ("locate", "select"), f"{other.__name__}.py")
    encode, canvas = other.frontend(its_settings, its_vocabulary)
    if canvas != script.frontend(settings, vocabulary)[1]:
        raise UserError(f"the listener {file} looks at pictures of another size than {path}; take one of the same size.")
    return model, encode


# ---- splits -------------------------------------------------------------------------------------------------

def score_split(args, ranks, path, split, script, settings, model, vocabulary, state):
    """Evaluate one split, write its json and jsonl, and return (summary, rows, dataset)."""
    root, name = args.data_root or settings.data_root, args.dataset or settings.dataset
    provide(ranks, root, name, split, script)
    targets = script.eval_targets(args, settings) if hasattr(script, "eval_targets") else None
    dataset = data.RefDataset(data.split_path(root, name, split), *script.frontend(settings, vocabulary), targets)
    if any(dataset.class_maps):
        return score_class_maps(args, ranks, path, settings, model, state, dataset)
    for key in classmaps.changed(args):
        raise UserError(f"--{key.replace('_', '-')} is for corpora with class maps; {name} has none.")
    if args.shuffle_expressions:
        dataset = metrics.shuffled(dataset)
    base = result_file(path, name, split, suffix_of(args))
    writer = mask_writer(dataset, base.with_name(base.name + "_masks")) if args.save_masks else None
    refine = partial(refine_by_crf, preset=args.crf) if args.crf else None
    rows, seconds = metrics.evaluate(model, dataset, ranks, args.batch_size, args.workers, args.amp, args.threshold,
                                     args.protocol, args.limit, refine, on_batch=writer)
    summary = metrics.summarise(rows, dataset, args.task, seconds, path, used(args, state))
    write_results(ranks, base, settings, summary, rows)
    return summary, rows, dataset


def used(args, state):
    """What a score file says of the way in which sentences were scored, and of the checkpoint's step."""
    keys = ("protocol", "threshold", "crf", "limit", "shuffle_expressions", "amp")
    return {key: getattr(args, key) for key in keys} | args.added | {"step": state["step"]}


def stored_rows(base, path, settings):
    """The rows stored at `base`; None where they are damaged, of another checkpoint or age than `path`, or other settings."""
    files = [base.parent / f"{base.name}.{ending}" for ending in ("json", "jsonl")]
    try:
        summary, text = json.loads(files[0].read_text(encoding="utf-8")), files[1].read_text(encoding="utf-8")
        rows = [{key: row[key] for key in ("sent_id", "image_id", "area", "I", "U")} for row in map(json.loads, text.splitlines())]
        own = Path(summary["checkpoint"]).name == path.name and summary["settings"] == settings and summary["n"] == len(rows)
        return rows if own and files[1].stat().st_mtime >= path.stat().st_mtime else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def provide(ranks, root, name, split, script):
    """See that the split is there: an embedded corpus is drawn, any other that is missing raises UserError."""
    if distributed.any_rank(ranks, not data.require(root, name, [split], script.EMBEDDED_YAML)):
        if ranks.main:
            data.make_embedded(root, name)
        distributed.barrier(ranks)


def suffix_of(args):
    """What stands in the results' name of the way in which sentences were scored."""
    return "".join([f"_{args.protocol}" if args.protocol != "original" else "",
                    "_shuffled" if args.shuffle_expressions else "", f"_crf-{args.crf}" if args.crf else "",
                    *(f"_{key.replace('_', '-')}" + ("" if value is True else f"-{value}")
                      for key, value in (args.added | classmaps.changed(args)).items()),
                    f"_first{args.limit}" if args.limit else ""])


def search_options(args):
    """What was asked of the beam search; the rest is the method's own."""
    return {key: value for key, value in (("beams", args.beams), ("max_length", args.max_length)) if value}


def result_file(path, dataset, split, suffix):
    """The results' place without its ending."""
    return path.parent / "eval" / f"{dataset}_{split}{suffix}"


def write_results(ranks, base, settings, summary, rows):
    """The json and the jsonl of a split, with the warning that leaky weights ask for."""
    if getattr(settings, "leaky_init", False):
        summary["warning"] = "the backbone's weights were trained on images of the validation and test splits"
    if ranks.main:
        write_text(base.parent / f"{base.name}.json", json.dumps(summary, indent=1))
        write_text(base.parent / f"{base.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"scores: {base}.json", flush=True)


def describe_split(listener, args, ranks, path, split, script, settings, model, vocabulary, state):
    """Describe the objects of one split and score the sentences; as `score_split`, and the page of --human-study."""
    root, name = args.data_root or settings.data_root, args.dataset or settings.dataset
    names = [name] + ([reg.partner(name)] if args.refs == "merged" else [])
    for of_corpus in names:
        provide(ranks, root, of_corpus, split, script)
    dataset, *merged = (data.RefDataset(data.split_path(root, of_corpus, split), *script.frontend(settings, vocabulary))
                        for of_corpus in names)
    options = search_options(args)
    rows, seconds = reg.evaluate(model, dataset, vocabulary.decode, ranks, args.batch_size, args.workers, args.amp, listener,
                                 args.limit, **options)
    used = {"refs": args.refs, "limit": args.limit, "amp": args.amp, "listener": args.listener} | options | args.added
    summary = reg.summarise(rows, dataset, reg.references(dataset, *merged), seconds, path, used | {"step": state["step"]},
                            meteor=ranks.main) | {"refs": args.refs}
    suffix = "".join(["_reg", "_merged" if args.refs == "merged" else "",
                      listener_suffix(args.listener, own_listeners(path, script)),
                      *(f"_{key.replace('_', '-')}-{value}" for key, value in (options | args.added).items()),
                      f"_first{args.limit}" if args.limit else ""])
    base = result_file(path, name, split, suffix)
    write_results(ranks, base, settings, summary, rows)
    if args.human_study and ranks.main:
        chosen = study.draw(rows, args.human_study)
        page = base.with_name(f"{base.name}_study.html")
        study.write_page(page, chosen, dataset, path)
        print(f"study of {len(chosen)} sentences: {page}")
    return summary, rows, dataset


def score_class_maps(args, ranks, path, settings, model, state, dataset):
    """`score_split` of a corpus with class maps: every class is asked for by name (common/classmaps.py)."""
    for flag, given in (("protocol", args.protocol != "original"), ("task", args.task != "res"),
                        ("shuffle-expressions", args.shuffle_expressions), ("compare", args.compare)):
        if given:
            raise UserError(f"--{flag} is for sentences, and {dataset.name} is scored by class maps; leave it out.")
    scorer = classmaps.ClassMaps(model, dataset, classmaps.load_names(args.names, dataset.class_names),
                                 classmaps.views(dataset, args.scales, args.flip_test), args.score_threshold, args.threshold,
                                 args.crf, args.amp)
    base = result_file(path, dataset.name, dataset.split, suffix_of(args))
    folder = base.with_name(base.name + "_masks")
    save = lambda image, of: masks.save_map(folder / f"{dataset.image_ids[image]}.png", of, palette=True)  # noqa: E731
    rows, seconds = scorer.evaluate(ranks, args.workers, args.limit, save if args.save_masks else None)
    used = {key: getattr(args, key) for key in ("threshold", "crf", "limit", "amp", *classmaps.DEFAULTS)}
    summary = scorer.summarise(rows, seconds, path, used | args.added | {"step": state["step"]})
    write_results(ranks, base, settings, summary, rows)
    return summary, rows, scorer


class Comparison:
    """Another run beside the one just scored: `compare` scores it on the same sentences, `panel` draws its predictions."""

    def __init__(self, run_folder, argv, ranks):
        known, _ = get_parser().parse_known_args([*argv, "--run", run_folder, "--checkpoint", ""])
        self.path, self.name, self.ranks = find_checkpoint(known, False), run_folder, ranks
        try:
            self.script, self.args, self.settings, *self.rest = load_run(self.path, ranks.device, argv)
        except UserError as error:  # a flag, say, that the other run's script does not have
            raise UserError(f"--compare {run_folder}: {error}") from None
        self.sets, self.values, self.sentences = {}, {}, []

    def compare(self, path, summary, rows, dataset, suffix):
        """Print and write how much more the rows of one split score than this run's, which are read where `stored_rows` has
        them and else made. Raises UserError where they are of other sentences, pictures or truths."""
        name, split = dataset.name, dataset.split
        base = result_file(self.path, name, split, suffix_of(self.args))
        others = stored_rows(base, self.path, used(self.args, self.rest[-1]))
        if distributed.any_rank(self.ranks, others is None):
            self.args.dataset = name
            others = score_split(self.args, self.ranks, self.path, split, self.script, self.settings, *self.rest)[1]
        asked = [[(row["sent_id"], row["image_id"], row["area"]) for row in of] for of in (rows, others)]
        if asked[0] != asked[1]:
            raise UserError(f"{self.name} was scored on other sentences or masks of {name} {split}; remove {base}.jsonl and try "
                            "again.")
        found = metrics.paired_bootstrap(rows, others)
        said = ", ".join(f"{key} {value['difference']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f}, p = {value['p']:.2g})"
                         for key, value in found.items())
        self.sentences.append(f"{name} {split} against {self.name}: {said}; 95 % intervals, paired bootstrap over "
                              f"{summary['images']} images")
        if self.ranks.main:
            print(self.sentences[-1])
            other = "_".join(self.path.parent.parts[-4:])  # script, corpus, run and stage: the last alone, `base_s0`, many share
            target = result_file(path, name, split, f"{suffix}_against_{other}")
            write_text(f"{target}.json", json.dumps({"run": str(path), "against": str(self.path), "dataset": name,
                                                     "split": split, **found}, indent=1))
        self.values[split] = {row["sent_id"]: metrics.iou(np.int64(row["I"]), np.int64(row["U"])) for row in others}
        self.sets[split] = data.RefDataset(dataset.path, *self.script.frontend(self.settings, self.rest[1]))

    def panel(self, picture, split, index):
        """(caption, picture) of this run's prediction for expression `index` of a picture (3,H,W) uint8."""
        batch, n, output = predict_case(self.args, self.rest[0], self.sets[split], index, self.ranks.device)
        mask = predicted_mask(self.args, picture, batch.frames[0], output, n)
        return f"{self.name}, IoU {100 * self.values[split][int(self.sets[split].sent_ids[index])]:.1f}", \
            pictures.overlay(picture.permute(1, 2, 0).numpy(), mask, pictures.OTHER)


def refine_by_crf(picture, prob, preset):
    """picture (3,H,W) uint8, prob (E,H,W) -> prob after mean field; all sentences of the image share one lattice."""
    return dense_crf(picture.permute(1, 2, 0).contiguous().numpy(), prob, **PRESETS[preset])


def mask_writer(dataset, folder):
    """A callback for `evaluate` that stores every predicted mask as a PNG named by its sent_id."""
    def write(batch, output, predicted):
        flat = [mask for of_image in predicted for mask in of_image.cpu().numpy()]
        for e, mask in zip(batch.index.tolist(), flat):
            masks.save_map(folder / f"{dataset.sent_ids[e]}.png", mask.astype(np.uint8) * 255)
    return write


def print_table(summaries):
    """One line a split: the headline scores with their full names."""
    columns = ["n", "mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "REC@0.5"]
    columns = ["n", "REC@0.5"] + columns[1:-1] if summaries[0]["task"] == "rec" else columns
    digits = 2
    if summaries[0]["task"] == "reg":
        columns, digits = ["n", "CIDEr", "METEOR", "Rb-Acc", "refs"], 3
        summaries = [summary | {"refs": summary["mean_references"]} for summary in summaries]
    if summaries[0]["task"] == "classes":
        columns = ["n", "mIoU", "oIoU"]
    print(f"{'':24}" + "".join(f"{column:>9}" for column in columns))
    for summary in summaries:
        cells = [summary[column] for column in columns]
        print(f"{summary['dataset'] + ' ' + summary['split']:24}"
              + "".join(f"{'-' if cell is None else cell if isinstance(cell, int) else f'{cell:.{digits}f}':>9}" for cell in cells))
        for title in ("by_kind", "pointing"):
            if summary.get(title):
                parts = [f"{name} {value['mIoU'] if isinstance(value, dict) else value:.2f}"
                         for name, value in summary[title].items()]
                print(f"{'':24}  {'mIoU by kind' if title == 'by_kind' else 'pointing'}: {', '.join(parts)}")
        if "classes" in summary:
            print(" " * 26 + ", ".join(f"{name} {'-' if iou is None else f'{iou:.1f}'}" for name, iou in summary["classes"].items()))
        if "warning" in summary:
            print(f"  warning: {summary['warning']}")


# ---- the report ---------------------------------------------------------------------------------------------

def write_report(args, path, script, settings, model, device, scored, other=None):
    """report.html of the run (the control and sentences have their own): scores, curves, and the worst, middle and best cases
    of every split just scored; beside `other`, a Comparison, the cases that lost and gained most against it."""
    cases, reg_ = [], args.task == "reg"
    for summary, rows, dataset in scored:
        if reg_:
            cases += reg.cases(dataset, choose_cases(rows, lambda row: row["CIDEr"]))
        else:
            value = lambda row: metrics.iou(np.int64(row["I"]), np.int64(row["U"]))  # noqa: E731
            if other is not None:
                theirs = other.values[dataset.split]
                chosen = choose_cases(rows, lambda row: value(row) - theirs[row["sent_id"]])  # noqa: B023
                chosen = {LOST.get(group, group): of for group, of in chosen.items() if group != "middle"}
            else:
                chosen = choose_cases(rows, value)
            cases += dataset.cases(chosen) if summary["task"] == "classes" else render_cases(
                args, script, settings, model, device, dataset, chosen, other)
    records = runlog.read_log(path.parent)
    losses = [name for name in (records[0] if records else {}) if name not in
              ("step", "epoch", "seconds", "lr", "grad", "waiting", "GB")]
    curves = {
        "Training losses": {"x": "step", "y": "loss", "log": True, "series": {
            name: [(r["step"], r[name]) for r in records if name in r] for name in losses}},
        "Validation": {"x": "step", "y": "percent", "series": {
            name: [(r["step"], r[f"val_{name}"]) for r in records if f"val_{name}" in r] for name in ("mIoU", "oIoU", "REC@0.5")}},
        "Validation, sentences": {"x": "step", "y": "CIDEr-D", "series": {
            "CIDEr": [(r["step"], r["val_CIDEr"]) for r in records if "val_CIDEr" in r]}},
        "Learning rate": {"x": "step", "y": "lr", "series": {"lr": [(r["step"], r["lr"]) for r in records if "lr" in r]}},
        "Waiting for data": {"x": "step", "y": "share of the steps", "series": {
            "waiting": [(r["step"], r["waiting"]) for r in records if "waiting" in r]}},
    }
    for curve in curves.values():  # a method logs what it has: no line, and no legend, for the rest
        curve["series"] = {name: points for name, points in curve["series"].items() if points}
    curves = {title: curve for title, curve in curves.items() if curve["series"]}
    environment = path.parent / "env.txt"
    made = environment.read_text(encoding="utf-8", errors="replace") if environment.is_file() else ""
    warnings = {summary["warning"] for summary, _, _ in scored if "warning" in summary}
    how = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in scored[0][0]["settings"].items()
                    if value not in (None, False, 0, "", "off", "original"))
    target = path.parent / f"report{'_reg' if reg_ else '_shuffled' if args.shuffle_expressions else ''}.html"
    pictures.report(target, title=f"{script.__name__}: {path.parent.name} on {settings.dataset}", settings=vars(settings),
                    summary=[summary for summary, _, _ in scored], curves=curves, cases=cases,
                    notes=(other.sentences if other else []) + sorted(warnings) + [f"Scored with: {how}."], command=made)
    print(f"report: {target}")


def choose_cases(rows, value):
    """{group: rows}: the CASES lowest, the CASES round the median and the CASES highest by value(row), without overlap."""
    order = sorted(rows, key=lambda row: (value(row), row["index"]))
    size = min(CASES, len(order) // 3 or 1)
    middle = (len(order) - size) // 2
    groups = {"worst": order[:size], "middle": order[middle:middle + size], "best": order[-size:][::-1]}
    return groups if len(order) >= 3 else {"worst": order}


@torch.inference_mode()
def render_cases(args, script, settings, model, device, dataset, chosen, other=None):
    """Case dictionaries for `pictures.report`, each predicted anew; other: a Comparison whose predictions stand beside."""
    cases = []
    for group, rows in chosen.items():
        for row in rows:
            batch, n, output = predict_case(args, model, dataset, row["index"], device)
            picture, frame = dataset.picture(int(dataset.expression_image[row["index"]])), batch.frames[0]
            panels = panels_of(picture, frame, output, n, predicted_mask(args, picture, frame, output, n))
            panels.insert(1, ("truth", pictures.overlay(panels[0][1], batch.masks[0][n].numpy(), pictures.TRUTH)))
            if other is not None:
                panels.insert(3, other.panel(picture, dataset.split, row["index"]))
            if hasattr(script, "case_panels"):
                panels += script.case_panels(settings, dataset, row["index"])
            text = dataset.texts[row["index"]]
            cases.append({"group": group, "split": dataset.split, "text": text, "words": attended(text, output, n),
                          "kind": row["kind"], "iou": float(metrics.iou(np.int64(row["I"]), np.int64(row["U"]))),
                          "panels": panels, **{key: row[key] for key in ("I", "U", "sent_id", "ref_id", "image_id")}})
    return cases


def predict_case(args, model, dataset, index, device):
    """Expression `index` predicted together with its image's other sentences: (batch, its place in it, the model's dict)."""
    image = int(dataset.expression_image[index])
    sample = dataset.view(original=True)[(0, image, dataset.of_image[image])]
    if isinstance(sample, UserError):
        raise sample
    batch = data.collate([sample]).to(device)
    with metrics.autocast(device, args.amp):
        return batch, int(np.flatnonzero(batch.index == index)[0]), metrics.predict(model, batch)


def predicted_mask(args, picture, frame, output, n):
    """Expression n's mask (H,W) bool in the frame of its picture (3,H,W) uint8, as --threshold and --crf have it."""
    prob = frame.prob_img(output["prob"][n:n + 1].float())
    prob = refine_by_crf(picture, prob, args.crf) if args.crf else prob
    limit = output["threshold"] if args.threshold is None else args.threshold
    return (prob[0] >= limit).cpu().numpy()


def attended(text, output, n):
    """[(word, [weight of each step])] where the method attends to words: `word_attention` (E,J,L)."""
    if "word_attention" not in output:
        return []
    return list(zip(words(text), output["word_attention"][n].float().T.cpu().tolist()))


def panels_of(picture, frame, output, n, mask):
    """[(caption, uint8 picture)]: the image, the predicted mask of expression n, its points, and every heat map."""
    image = picture.permute(1, 2, 0).numpy()
    panels = [("image", image), ("prediction", pictures.overlay(image, mask))]
    if "points" in output:
        points = frame.points_img(output["points"][n].float()).cpu().numpy()
        panels.append(("points, first to last", pictures.draw_points(image, points[np.isfinite(points).all(1)])))
    for name, heat in output.get("heat", {}).items():
        heat = frame.prob_img(heat[n:n + 1].float())[0].cpu().numpy()
        panels.append((f"{name}, {heat.min():.2f} to {heat.max():.2f}", pictures.heat(image, heat)))  # each in its own range
    return panels


# ---- a picture of one's own ---------------------------------------------------------------------------------

@torch.inference_mode()
def segment_picture(args, script, settings, model, vocabulary, device):
    """Segment what each sentence of --text means in --image, print where it is and write the overlays to --out."""
    if not args.text:
        raise UserError("--image needs --text, the sentence to look for, or --describe.")
    encode, canvas = script.frontend(settings, vocabulary)
    picture = data.load_image(args.image)
    frame = canvas.frame(picture.shape[2], picture.shape[1])
    batch = data.Batch(images=frame.image_in(picture, canvas.fill)[None], text=data.pad_text([encode(t) for t in args.text]),
                       image_of=torch.zeros(len(args.text), dtype=torch.int64), index=np.arange(len(args.text)),
                       frames=[frame]).to(device)
    with metrics.autocast(device, args.amp):
        output = metrics.predict(model, batch)
    tiles, captions = [], []
    for n, text in enumerate(args.text):
        unknown = vocabulary.unknown(text)
        if unknown:
            print(f"note: the model never learnt {', '.join(map(repr, unknown))}")
        mask = predicted_mask(args, picture, frame, output, n)
        panels = panels_of(picture, frame, output, n, mask)
        box = metrics.boxes_of(torch.from_numpy(mask)[None])[0].tolist()
        print(f"{text!r}: " + (f"{100 * mask.mean():.1f} % of the picture, box x {box[0]}-{box[2]}, y {box[1]}-{box[3]}"
                               if mask.any() else "nothing found"))
        tiles += [array for _, array in panels[1:]]
        captions += [f"{text}" if caption == "prediction" else caption for caption, _ in panels[1:]]
    out = pictures.tile(tiles, captions, len(tiles) // len(args.text)) if len(tiles) > 1 else tiles[0]
    pictures.save(args.out, out)
    print(f"picture: {args.out}")


def describe_picture(args, script, settings, model, vocabulary, device):
    """Say of every instance found in --image how to tell it from the others; print the sentences, draw them to --out."""
    reg.require(model, ("propose", "describe"), f"{script.__name__}.py")
    _, canvas = script.frontend(settings, vocabulary)
    picture = data.load_image(args.image)
    frame = canvas.frame(picture.shape[2], picture.shape[1])
    image_in = frame.image_in(picture, canvas.fill)[None].to(device)
    options = search_options(args)
    with metrics.autocast(device, args.amp):
        sentences, scores, found = reg.describe_found(model, image_in, frame, vocabulary.decode, args.min_score, **options)
    for n, (sentence, score, mask) in enumerate(zip(sentences, scores, found), start=1):
        print(f"{n:>3}  {sentence}  (score {score:.2f}, {100 * mask.mean():.1f} % of the picture)")
    if not sentences:
        print(f"nothing found with a score of {args.min_score:g} or more; a lower --min-score finds more")
    pictures.save(args.out, pictures.numbered(picture.permute(1, 2, 0).numpy(), found, sentences))
    print(f"picture: {args.out}")


# ---- main ---------------------------------------------------------------------------------------------------

def refuse_mixtures(args):
    """Raise UserError for flags that what is asked for would not heed, or negative numbers."""
    if args.score_study:
        default = vars(get_parser().parse_args([]))
        given = [key for key, value in vars(args).items() if value != default[key] and key not in ("score_study", "data_root")]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} means nothing to --score-study, which reads two files and a corpus.")
    how = {"--threshold": args.threshold is not None, "--crf": args.crf}
    maps = {f"--{key.replace('_', '-')}": True for key in classmaps.changed(args)}
    split = maps | {"--dataset": args.dataset, "--split": args.split != ["val"], "--limit": args.limit, "--compare": args.compare,
                    "--report": args.report}
    scored = {"--protocol": args.protocol != "original", "--shuffle-expressions": args.shuffle_expressions,
              "--save-masks": args.save_masks}
    sentences = {"--refs": args.refs != "own", "--listener": args.listener, "--human-study": args.human_study}
    search = {"--beams": args.beams, "--max-length": args.max_length}
    found = {"--min-score": args.min_score != 0.5}
    task = "--describe" if args.describe else "--image" if args.image and args.task == "res" else f"--task {args.task}"
    unheeded = {"--describe": split | how | scored | sentences | {"--text": args.text},
                "--image": split | scored | sentences | search | found,
                "--task reg": how | maps | scored | found | {"--image": args.image, "--compare": args.compare}}
    given = [flag for flag, value in unheeded.get(task, sentences | search | found | {"--image": args.image}).items() if value]
    if given:
        raise UserError(f"{' and '.join(given)} mean{'s' * (len(given) == 1)} nothing to {task}.")
    for flag, value in (("--describe", args.describe), ("--text", args.text), ("--out", args.out != OUT)):
        if value and not args.image:
            raise UserError(f"{flag} needs --image, a picture of your own.")
    if min(args.beams, args.max_length, args.human_study) < 0:
        raise UserError("--beams, --max-length and --human-study are numbers from 0 on.")


def main(argv=None, ranks=None):
    """Score, or answer about --image. A training script passes its own `ranks` when it calls this at its end."""
    argv = sys.argv[1:] if argv is None else list(argv)
    known, _ = get_parser().parse_known_args(argv)
    refuse_mixtures(known)
    if known.score_study:
        print(study.scored(*known.score_study, parse(get_parser(), argv).data_root or "data"))
        return
    started_here = ranks is None
    ranks = ranks or distributed.start(known.device)
    try:
        path = find_checkpoint(known, ranks.main)
        script, args, settings, model, vocabulary, state = load_run(path, ranks.device, argv)
        if args.image:
            if hasattr(script, "eval_targets") and script.eval_targets(args, settings):
                raise UserError("--image comes without the truth that an oracle asks; leave its flag out.")
            of_picture = describe_picture if args.describe else segment_picture
            return of_picture(args, script, settings, model, vocabulary, ranks.device)
        score = score_split
        if args.task == "reg":
            reg.require(model, ("locate", "describe"), f"{script.__name__}.py")
            listener = load_listener(args, path, script, settings, vocabulary, ranks.device, ranks.main)
            score = partial(describe_split, listener)
        scored = [score(args, ranks, path, split, script, settings, model, vocabulary, state) for split in args.split]
        other = Comparison(args.compare, argv, ranks) if args.compare else None
        for of_split in scored if other else ():
            other.compare(path, *of_split, suffix_of(args))
        if ranks.main:
            print_table([summary for summary, _, _ in scored])
            if args.report:
                write_report(args, path, script, settings, model, ranks.device, scored, other)
        distributed.barrier(ranks)
    finally:
        if started_here:
            distributed.finish()


if __name__ == "__main__":
    run(main)
