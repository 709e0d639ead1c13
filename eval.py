"""Score a trained model, or ask it about a picture of your own.

    python eval.py --split testA                                      the newest run, its best checkpoint
    python eval.py --run runs/train_lts/refcoco/base_s0 --split val testA testB --report
    python eval.py --run RUN --dataset refcoco+ --split val           on another prepared corpus
    python eval.py --run RUN --image photo.jpg --text "the red bus on the left" --out out.png
    torchrun --nproc_per_node 4 -- eval.py --run RUN --split val      the same scores, sooner (mind the lone --)

Scores are taken in the original frame over every sentence (common/metrics.py defines them) and written to
<run>/eval/<dataset>_<split>.json, with one line per sentence in the .jsonl beside it. The checkpoint names the
script that made it; any train_*.py in this folder serves, so a copied script needs no registration here.
"""
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import checkpoint, data, distributed, metrics, pictures, runlog
from common.config import REPOSITORY, Parser, UserError, parse, run, write_text
from common.crf import PRESETS, dense_crf
from common.text import words

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
    add("--task", choices=("res", "rec"), default="res", help="the headline of the output: masks, or boxes around them")
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
    out = parser.add_argument_group("what to write")
    parser.switch(out, "report", False, "write report.html with scores, curves and pictures of cases")
    parser.switch(out, "save-masks", False, "write every predicted mask as <run>/eval/<dataset>_<split>_masks/<sent_id>.png")
    add = parser.add_argument_group("a picture of your own").add_argument
    add("--image", default="", help="any picture")
    add("--text", nargs="+", default=[], help="one sentence or several")
    add("--out", default="prediction.png", help="the picture with the mask on it")
    if script is not None and hasattr(script, "eval_flags"):
        script.eval_flags(parser)
    return parser


# ---- the run ------------------------------------------------------------------------------------------------

def find_checkpoint(args, say):
    """The checkpoint to score; `say` prints which run was found. Raises UserError where there is none."""
    if args.checkpoint:
        return Path(args.checkpoint)
    if args.run:
        path = Path(args.run) / "best.pt"
        stages = sorted(Path(args.run).glob("*/best.pt"), key=lambda stage: stage.stat().st_mtime)
        if not path.is_file() and not stages:
            raise UserError(f"{path} does not exist; is {args.run} the folder of a run that has been evaluated once?")
        return path if path.is_file() else stages[-1]  # a run with stages: the last one
    found = sorted(Path("runs").glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no run below runs/ yet; train one, or name it with --run.")
    if say:
        print(f"newest run: {found[-1].parent}")
    return found[-1]


def load_script(name):
    """The training script that a checkpoint names, imported from this folder and from nowhere else."""
    if not re.fullmatch(r"train_\w+", name) or not (REPOSITORY / f"{name}.py").is_file():
        raise UserError(f"the checkpoint was made by {name}.py, which is not beside eval.py; put that script there.")
    return importlib.import_module(name)


def load_run(path, device, argv):
    """(script, args, its settings, model on `device`, vocabulary, state) of a checkpoint.

    A flag that the script adds by `eval_flags` and that is a setting of it, too, overrides the run's. What was asked of
    those flags stands in `args.added`, {name: value}.
    """
    state = checkpoint.load(path)
    script = load_script(state["script"])
    parser = script.get_parser()
    missing = [key for key in ("args", "vocabulary", "model") if key not in state]
    if missing or not isinstance(state["args"], dict):
        raise UserError(f"{path} lacks {', '.join(missing) or 'its settings'}; it is no checkpoint of {state['script']}.py.")
    settings = parser.parse_args([])
    unknown = sorted(set(state["args"]) - set(vars(settings)))
    if unknown:
        raise UserError(f"{path} was made with settings that {state['script']}.py does not know: {', '.join(unknown)}.")
    vars(settings).update(state["args"])
    args = parse(get_parser(script), argv)
    if args.crf and args.threshold is None:
        args.threshold = 0.5
    own = vars(get_parser().parse_args([]))
    args.added = {key: value for key, value in vars(args).items() if key not in own and value not in (None, False)}
    vars(settings).update({key: value for key, value in args.added.items() if key in vars(settings)})
    vocabulary = script.make_vocabulary(state["vocabulary"])
    model = script.build_model(settings, vocabulary)
    checkpoint.load_model(model, state, path)
    return script, args, settings, model.to(device).eval(), vocabulary, state


# ---- splits -------------------------------------------------------------------------------------------------

def score_split(args, ranks, path, split, script, settings, model, vocabulary, state):
    """Evaluate one split, write its json and jsonl, and return (summary, rows, dataset)."""
    root, name = args.data_root or settings.data_root, args.dataset or settings.dataset
    data.require(root, name, [split], script.EMBEDDED_YAML)
    targets = script.eval_targets(args, settings) if hasattr(script, "eval_targets") else None
    dataset = data.RefDataset(data.split_path(root, name, split), *script.frontend(settings, vocabulary), targets)
    if args.shuffle_expressions:
        dataset = metrics.shuffled(dataset)
    suffix = "".join([f"_{args.protocol}" if args.protocol != "original" else "",
                      "_shuffled" if args.shuffle_expressions else "", f"_crf-{args.crf}" if args.crf else "",
                      *(f"_{key.replace('_', '-')}" + ("" if value is True else f"-{value}")
                        for key, value in args.added.items()), f"_first{args.limit}" if args.limit else ""])
    base = path.parent / "eval" / f"{name}_{split}{suffix}"
    writer = mask_writer(dataset, base.with_name(base.name + "_masks")) if args.save_masks else None
    refine = partial(refine_by_crf, preset=args.crf) if args.crf else None
    rows, seconds = metrics.evaluate(model, dataset, ranks, args.batch_size, args.workers, args.amp, args.threshold,
                                     args.protocol, args.limit, refine, on_batch=writer)
    used = {key: getattr(args, key) for key in ("protocol", "threshold", "crf", "limit", "shuffle_expressions", "amp")}
    summary = metrics.summarise(rows, dataset, args.task, seconds, path, used | args.added | {"step": state["step"]})
    if getattr(settings, "leaky_init", False):
        summary["warning"] = "the backbone's weights were trained on images of the validation and test splits"
    if ranks.main:
        write_text(base.with_suffix(".json"), json.dumps(summary, indent=1))
        write_text(base.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return summary, rows, dataset


def refine_by_crf(picture, prob, preset):
    """picture (3,H,W) uint8, prob (E,H,W) -> prob after mean field; all sentences of the image share one lattice."""
    return dense_crf(picture.permute(1, 2, 0).contiguous().numpy(), prob, **PRESETS[preset])


def mask_writer(dataset, folder):
    """A callback for `evaluate` that stores every predicted mask as a PNG named by its sent_id."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(batch, output, masks):
        flat = [mask for of_image in masks for mask in of_image.cpu().numpy()]
        for e, mask in zip(batch.index.tolist(), flat):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{dataset.sent_ids[e]}.png")
    return write


def print_table(summaries):
    """One line a split: the headline scores with their full names."""
    columns = ["n", "mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "REC@0.5"]
    columns = ["n", "REC@0.5"] + columns[1:-1] if summaries[0]["task"] == "rec" else columns
    print(f"{'':24}" + "".join(f"{column:>9}" for column in columns))
    for summary in summaries:
        cells = [summary[column] for column in columns]
        print(f"{summary['dataset'] + ' ' + summary['split']:24}"
              + "".join(f"{'-' if cell is None else cell if isinstance(cell, int) else f'{cell:.2f}':>9}" for cell in cells))
        for title in ("by_kind", "pointing"):
            if summary.get(title):
                parts = [f"{name} {value['mIoU'] if isinstance(value, dict) else value:.2f}"
                         for name, value in summary[title].items()]
                print(f"{'':24}  {'mIoU by kind' if title == 'by_kind' else 'pointing'}: {', '.join(parts)}")
        if "warning" in summary:
            print(f"  warning: {summary['warning']}")


# ---- the report ---------------------------------------------------------------------------------------------

def write_report(args, path, script, settings, model, device, scored):
    """report.html of the run: scores, curves, and the worst, middle and best cases of every split just scored."""
    cases = []
    for summary, rows, dataset in scored:
        chosen = choose_cases(rows)
        cases += render_cases(script, settings, model, device, dataset, chosen, args.threshold)
    records = runlog.read_log(path.parent)
    losses = [name for name in (records[0] if records else {}) if name not in
              ("step", "epoch", "seconds", "lr", "grad", "GB")]
    curves = {
        "Training losses": {"x": "step", "y": "loss", "log": True, "series": {
            name: [(r["step"], r[name]) for r in records if name in r] for name in losses}},
        "Validation": {"x": "step", "y": "percent", "series": {
            name: [(r["step"], r[f"val_{name}"]) for r in records if f"val_{name}" in r] for name in ("mIoU", "oIoU")}},
        "Learning rate": {"x": "step", "y": "lr", "series": {"lr": [(r["step"], r["lr"]) for r in records if "lr" in r]}},
    }
    curves = {title: curve for title, curve in curves.items() if any(curve["series"].values())}
    environment = path.parent / "env.txt"
    made = environment.read_text(encoding="utf-8") if environment.is_file() else ""
    warnings = {summary["warning"] for summary, _, _ in scored if "warning" in summary}
    target = path.parent / "report.html"
    pictures.report(target, title=f"{script.__name__}: {path.parent.name} on {settings.dataset}", settings=vars(settings),
                    summary=[summary for summary, _, _ in scored], curves=curves, cases=cases, notes=sorted(warnings),
                    command=made)
    print(f"report: {target}")


def choose_cases(rows):
    """{group: rows}: the CASES lowest, the CASES round the median and the CASES highest by IoU, without overlap."""
    order = sorted(rows, key=lambda row: (metrics.iou(np.int64(row["I"]), np.int64(row["U"])), row["index"]))
    size = min(CASES, len(order) // 3 or 1)
    middle = (len(order) - size) // 2
    groups = {"worst": order[:size], "middle": order[middle:middle + size], "best": order[-size:][::-1]}
    return groups if len(order) >= 3 else {"worst": order}


@torch.inference_mode()
def render_cases(script, settings, model, device, dataset, chosen, threshold):
    """Case dictionaries for `pictures.report`, each predicted anew together with its image's other sentences."""
    view, cases = dataset.view(original=True), []
    for group, rows in chosen.items():
        for row in rows:
            image = int(dataset.expression_image[row["index"]])
            sample = view[(0, image, dataset.of_image[image])]
            if isinstance(sample, UserError):
                raise sample
            batch = data.collate([sample]).to(device)
            n = int(np.flatnonzero(batch.index == row["index"])[0])
            output = metrics.predict(model, batch)
            panels = panels_of(dataset.picture(image), batch.frames[0], output, n, threshold)
            panels.insert(1, ("truth", pictures.overlay(panels[0][1], sample["masks"][n].numpy(),
                                                       pictures.TRUTH)))
            if hasattr(script, "case_panels"):
                panels += script.case_panels(settings, dataset, row["index"])
            text = dataset.texts[row["index"]]
            cases.append({"group": group, "split": dataset.split, "text": text, "words": attended(text, output, n),
                          "kind": row["kind"], "iou": float(metrics.iou(np.int64(row["I"]), np.int64(row["U"]))),
                          "panels": panels, **{key: row[key] for key in ("I", "U", "sent_id", "ref_id", "image_id")}})
    return cases


def attended(text, output, n):
    """[(word, [weight of each step])] where the method attends to words: `word_attention` (E,J,L)."""
    if "word_attention" not in output:
        return []
    return list(zip(words(text), output["word_attention"][n].float().T.cpu().tolist()))


def panels_of(picture, frame, output, n, threshold):
    """[(caption, uint8 picture)]: the image, the prediction for expression n with its points, and every heat map."""
    image = picture.permute(1, 2, 0).numpy()
    limit = output["threshold"] if threshold is None else threshold
    mask = (frame.prob_img(output["prob"][n:n + 1].float())[0] >= limit).cpu().numpy()
    panels = [("image", image), ("prediction", pictures.overlay(image, mask))]
    if "points" in output:
        points = frame.points_img(output["points"][n].float()).cpu().numpy()
        panels.append(("points, first to last", pictures.draw_points(image, points[np.isfinite(points).all(1)])))
    for name, heat in output.get("heat", {}).items():
        panels.append((name, pictures.heat(image, frame.prob_img(heat[n:n + 1].float())[0].cpu().numpy())))
    return panels


# ---- a picture of one's own ---------------------------------------------------------------------------------

@torch.inference_mode()
def describe_picture(args, script, settings, model, vocabulary, device):
    """Segment what each sentence of --text means in --image, print where it is and write the overlays to --out."""
    if not args.text:
        raise UserError("--image needs --text, the sentence to look for.")
    encode, canvas = script.frontend(settings, vocabulary)
    picture = data.load_image(args.image)
    frame = canvas.frame(picture.shape[2], picture.shape[1])
    batch = data.Batch(images=frame.image_in(picture, canvas.fill)[None], text=data.pad_text([encode(t) for t in args.text]),
                       image_of=torch.zeros(len(args.text), dtype=torch.int64), index=np.arange(len(args.text)),
                       frames=[frame]).to(device)
    output = metrics.predict(model, batch)
    tiles, captions = [], []
    for n, text in enumerate(args.text):
        unknown = vocabulary.unknown(text)
        if unknown:
            print(f"note: the model never learnt {', '.join(map(repr, unknown))}")
        panels = panels_of(picture, frame, output, n, args.threshold)
        limit = output["threshold"] if args.threshold is None else args.threshold
        mask = frame.prob_img(output["prob"][n:n + 1].float()) >= limit
        box = metrics.boxes_of(mask)[0].tolist()
        print(f"{text!r}: " + (f"{100 * mask.float().mean():.1f} % of the picture, box x {box[0]}-{box[2]}, y {box[1]}-{box[3]}"
                               if mask.any() else "nothing found"))
        tiles += [array for _, array in panels[1:]]
        captions += [f"{text}" if caption == "prediction" else caption for caption, _ in panels[1:]]
    out = pictures.tile(tiles, captions, len(tiles) // len(args.text)) if len(tiles) > 1 else tiles[0]
    pictures.save(args.out, out)
    print(f"picture: {args.out}")


# ---- main ---------------------------------------------------------------------------------------------------

def main(argv=None, ranks=None):
    """Score, or answer about --image. A training script passes its own `ranks` when it calls this at its end."""
    argv = sys.argv[1:] if argv is None else list(argv)
    known, _ = get_parser().parse_known_args(argv)
    started_here = ranks is None
    ranks = ranks or distributed.start(known.device)
    try:
        path = find_checkpoint(known, ranks.main)
        script, args, settings, model, vocabulary, state = load_run(path, ranks.device, argv)
        if args.image:
            return describe_picture(args, script, settings, model, vocabulary, ranks.device)
        scored = [score_split(args, ranks, path, split, script, settings, model, vocabulary, state)
                  for split in args.split]
        if ranks.main:
            print_table([summary for summary, _, _ in scored])
            if args.report:
                write_report(args, path, script, settings, model, ranks.device, scored)
        distributed.barrier(ranks)
    finally:
        if started_here:
            distributed.finish()


if __name__ == "__main__":
    run(main)
