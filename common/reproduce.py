r"""Train and score the rows of a paper's table, and print what was measured beside what was published.

    python -m common.reproduce yaml/tables/lts_table2.yaml --dataset refshapes --seeds 3     embedded corpus, two CPU cores
    python -m common.reproduce yaml/tables/pks_table9.yaml --dry-run                         only the commands
    python -m common.reproduce yaml/tables/pks_table9.yaml --dataset refcoco --launcher 'torchrun --nproc_per_node 4'
    python -m common.reproduce yaml/tables/*.yaml --check                                    do the rows' flags do anything?

Without --dataset: every corpus that the table's columns name. Rows run as commands, in
runs/tables/<table>/<dataset>/<row>_s<seed>/, where row.log holds their output. What ended is kept in
yaml/tables/<table>.results.json, to which later calls add rows and seeds; a row that was interrupted goes on from its
checkpoint; a row that fails is reported with the end of its log, the others go on, and the exit status is 1. A result counts
only under the settings it was made with (script, flags, contents of the yaml files, corpus, seed); one that another table has
under the same settings is taken over, not made again. The tables are printed (first metric of each column) and written,
whole, to runs/tables/<table>/table.md and table.html.

Several GPUs or machines: --launcher goes in front of every script, and is torchrun with its own flags. In a SLURM job of four
nodes, one process for each (--ntasks-per-node 1):

    srun torchrun --nnodes 4 --nproc_per_node 8 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID \
        --rdzv-endpoint $HEAD:29500 -- train_lts.py …

--dry-run prints these lines with the given launcher, ready for a job file: each trains or scores one row, those of one row
follow each other, and all can be given again after an interruption. --jobs N runs N rows side by side; with --gpus 0,1 2,3
each of them has its own GPUs (and torchrun needs --standalone then, for a port of its own).

The format of yaml/tables/*.yaml (every key is checked, an unknown one is an error with the nearest name)
  paper, where, caption, remark   source, place in it, what it shows, what concerns the whole table (which IoU, misprints)
  script, flags      what trains the rows on real corpora; `flags` are common to all rows
  datasets           {corpus: further flags} for a corpus trained on
  columns            list of {name, dataset, split, metrics, "on"}: trained on `dataset`, scored on `split` of it or of another
                     corpus, "on" (in quotes: a bare on is a truth value). metrics: keys of the score files that eval.py
                     writes, dotted for nested ones (pointing.H_mask)
  embedded           {corpus: {flags, columns, check}}: what --dataset <corpus> runs; its flags take the place of `flags`
                     and `datasets`; columns default to split val with all metrics; `check`: more flags for --check
  plot               {x: label}: rows with `x` make a curve
  rows               list of
    name, label      short name (of the run folder), and what is printed
    flags            added to the table's; `{row}` in them is that row's run folder, of the same seed, which is made before
    embedded_flags   take the place of the row's flags on embedded corpora; `embedded: false`: not there; `real: false`: there alone
    published        {column: figure or list of figures, one for each metric}; null where the paper has none
    ablates, effect  the row it is compared with, and what its flags act on: model, loss, data, decode or eval
    run_of           trains nothing: takes that row's run
    eval             flags with which eval.py scores the run, with `{row}` as in flags; without them the score is the one that
                     training leaves. `embedded_eval` takes its place on embedded corpora
    trained_on       {corpus: another}: a row that others need, trained on another corpus than theirs; it has no scores
    stage            of a script with stages: the score of <run>/<stage>/
    built: false     somebody else's method, printed as "not built"
    x, remark        place on the plot; misprint, guess, mixed metric
    check            flags for --check of this row and of the one it ablates
"""
import contextlib
import json
import signal
import sys
from pathlib import Path

from common import sidebyside, tables
from common.config import Parser, UserError, run, write_text
from common.plans import Plan
from common.runner import Runner


def get_parser():
    """The runner's own flags."""
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="files of yaml/tables/")
    parser.add_argument("--dataset", default="", help="an embedded corpus, or one of the columns'; empty: all of the columns'")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … N-1 of every row")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows (and those they need)")
    parser.switch(None, "dry-run", False, "print the commands and run nothing")
    parser.switch(None, "check", False, "train nothing: does every row's flag change what its `effect` names?")
    parser.switch(None, "first", False, "--check: only the first row of each table that has something to compare")
    parser.add_argument("--jobs", type=int, default=1, help="rows that run side by side")
    parser.add_argument("--gpus", nargs="+", default=[], help="CUDA_VISIBLE_DEVICES of the jobs side by side, one word each")
    parser.add_argument("--launcher", default="python", help="what starts a script: python, or torchrun with its flags")
    parser.add_argument("--flags", default="", help="further flags of every training, as one word: --flags='--amp bf16'. They "
                        "belong to the settings of its results")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    parser.add_argument("--out", default="", help="run folders and pages; empty: runs/tables/<table>")
    return parser


def validation(folder):
    """[(step, mIoU)] of a run's log.jsonl; a line cut by a kill is skipped. (common.runlog reads it, too, but loads torch.)"""
    points = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                points += [(record["step"], record["val_mIoU"])] if "val_mIoU" in record else []
    return points


def show(plan):
    """Print the table and write it as Markdown and as a page."""
    table, results = plan.table, {dataset: plan.results(dataset) for dataset in plan.datasets}
    for dataset in plan.datasets:
        print("\n" + sidebyside.as_text(table, dataset, results[dataset]))
        stored = [e for e in tables.load_results(tables.results_path(table.path)) if e["dataset"] == dataset]
        if len(stored) > len(results[dataset]):
            print(f"({len(stored) - len(results[dataset])} results made with other settings are not shown)")
    curves = {}
    for entry in (entry for found in results.values() for entry in found if entry["seed"] == 0):
        row = table.row(entry["row"])
        points = validation(Path(entry["folder"]) / row.stage)
        if points and not row.run_of:
            curves[f"{entry['row']} {entry['dataset']}" if len(results) > 1 else entry["row"]] = points
    write_text(plan.out / "table.md", sidebyside.as_markdown(table, plan.datasets, results))
    write_text(plan.out / "table.html", sidebyside.as_page(table, plan.datasets, results, curves))
    print(f"\ntable: {plan.out / 'table.md'}, {plan.out / 'table.html'}")


def main(argv=None):
    """Check, print or run the rows of the tables; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs are at least 1.")
    if len(args.gpus) > args.jobs:
        raise UserError(f"--gpus names {len(args.gpus)} groups, but --jobs runs {args.jobs} rows at a time.")
    if args.first and not args.check:
        raise UserError("--first is for --check alone.")
    given = [f"--{key.replace('_', '-')}" for key, value in vars(args).items()
             if value != parser.get_default(key) and key not in ("tables", "check", "first", "rows", "jobs")]
    if args.check and given:
        raise UserError(f"{' and '.join(given)} mean{'s' * (len(given) == 1)} nothing to --check.")
    found = [tables.load_table(path) for path in args.tables]
    if args.check:
        from common.rowcheck import check
        for table in found:
            tables.among(f"{table.path}, --rows", args.rows, [row.name for row in table.rows])
        rows = [[(table, row) for row in table.rows if row.built and (row.name in args.rows or not args.rows)]
                for table in found]
        if args.first:
            rows = [[pair for pair in of_table if pair[1].ablates][:1] for of_table in rows]
        return check(sum(rows, []), args.jobs)
    plans = [Plan(table, args) for table in found]
    if args.dry_run:
        for plan in plans:
            for job in plan.jobs()[0]:
                print("\n".join(plan.printed(words) for words in plan.commands(job)))
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        runner = Runner(plans, args)
        runner.run()
    except (KeyboardInterrupt, SystemExit):
        print("\nstopped; the same command goes on from here", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    for plan in plans:
        show(plan)
    for plan, job, reason in runner.failed:
        print(f"FAILED {plan.table.name}: {job}: {reason}")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    run(main)
