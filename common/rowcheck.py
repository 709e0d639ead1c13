"""Does every row's flag do what its `effect` says? `python -m common.reproduce TABLE --check`: one step, nothing trained.

Each row runs in a process of its own, forked from one that has loaded torch, on tiny embedded corpora, with batches of four
images and one step for each stage, and is scored. What its `effect` names is compared with the row that it ablates (of the row's
`stage` alone, where it has one):
`model` the networks that build_model returned (names, shapes, first values), `loss` the terms in the log's first line, `data` the first
training batch, `decode` all that the model answered when it was scored, `eval` the numbers of the score files. Equal is FAIL.
"""
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import data, metrics, runlog, tables
from common.config import REPOSITORY, UserError

TINY = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--log-every", "1", "--amp", "off",
        "--eval-batch-size", "4", "--eval-splits"]  # no split: scored by eval.py alone
SCENES = {"refshapes": {"train": 16, "val": 6, "testA": 4, "testB": 4, "pool": 4},
          "phraseshapes": {"train": [("pool", 0, 16)], "val": [("val", 0, 6)], "miniv": [("val", 6, 2)],
                           "test": [("testA", 0, 4)]},
          "vocshapes": {"train": [("pool", 16, 16)], "val": [("val", 10, 6)]}}


@dataclasses.dataclass(frozen=True)
class Command:
    """What one process does: first the runs that `{row}` in its words stands for, then its training, then eval.py."""
    script: Path
    dataset: str
    words: tuple    # of the training script
    evals: tuple    # words of eval.py, a tuple for each corpus that is scored
    stage: str
    needed: tuple = ()  # (row, Command)

    def place(self, root):
        """Its folder, the same for equal commands; the run lies in its `run`."""
        return root / f"row_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"


def check(rows, jobs):
    """Check (table, row) pairs, at most `jobs` at a time; print a line for each and return the exit status, 1 where one fails."""
    pairs = [(table, row, pair_of(table, row)) for table, row in rows]
    commands = list(dict.fromkeys(command for _, _, pair in pairs for command in pair))
    every, seen = list(dict.fromkeys(one for command in commands for one in with_needed(command))), {}
    with tempfile.TemporaryDirectory(prefix="rowcheck") as folder:
        make_corpora(Path(folder), {command.dataset for command in every})
        while waiting := [command for command in every if command not in seen]:
            seen |= observe_all(Path(folder), [one for one in waiting if all(other in seen for _, other in one.needed)], jobs)
    failed = 0
    for table, row, pair in pairs:
        what = f"{table.name:22} {row.name:24}"
        if not pair:
            print(f"-     {what} {'its table has no embedded corpus' if row.ablates else 'ablates nothing'}")
            continue
        fault = fault_of(row, *(seen[command] for command in pair))
        failed += bool(fault)
        print(f"{'FAIL' if fault else 'PASS'}  {what} {row.effect:7} against {row.ablates}" + (f": {fault}" if fault else ""))
    print(f"{len(pairs)} rows, {sum(bool(pair) for *_, pair in pairs)} compared, {failed} failed; {len(seen)} processes took "
          f"{sum(found.get('seconds', 0) for found in seen.values()):.0f} s of processor time")
    return 1 if failed else 0


def with_needed(command):
    """The commands that one needs, directly or not, and itself."""
    return [*(one for _, other in command.needed for one in with_needed(other)), command]


def fault_of(row, mine, other):
    """Why a row fails, or an empty string. mine, other: what `observe` wrote of it and of the row that it ablates."""
    broken = next((found["fault"] for found in (mine, other) if "fault" in found), "")
    if broken or not mine[row.effect]:
        return broken or f"nothing was seen of its {row.effect}"
    return f"its {row.effect} is that of {row.ablates}" if mine[row.effect] == other[row.effect] else ""


def pair_of(table, row):
    """The commands of a row and of the one that it ablates, or () where there is nothing to compare."""
    dataset = next(iter(table.embedded), None)
    if not row.ablates or dataset is None:
        return ()
    other = table.row(row.ablates)
    more = shlex.split(f"{table.embedded[dataset].check} {row.check} {other.check}")
    return command_of(table, row, dataset, more), command_of(table, other, dataset, more)


def command_of(table, row, dataset, more):
    """The Command of a row on an embedded corpus, with more flags."""
    base, columns = table.row(row.run_of) if row.run_of else row, table.columns_of(dataset, row)
    evals = tuple((*(("--dataset", corpus) if corpus != dataset else ()), "--split",
                   *dict.fromkeys(c.split for c in columns if c.on == corpus), *(table.scoring(row, dataset) or []))
                  for corpus in dict.fromkeys(c.on for c in columns))
    names = dict.fromkeys(of.name for of in [*table.needs(base, dataset), *table.needs(row, dataset)] if of is not base)
    needed = tuple((name, dataclasses.replace(command_of(table, table.row(name), dataset, more), evals=())) for name in names)
    words = once([*table.words(base, dataset), *TINY, *more])
    return Command(table.script_path(), base.trained_on.get(dataset, dataset), words, evals, row.stage, needed)


def once(words):
    """A command's words, sorted by flag, without those that a later one of the same flag overrides: tables that differ in nothing
    else then share a process."""
    groups, flag = {}, None
    for word in words:
        if word.startswith("--"):
            flag = word.split("=")[0].removeprefix("--no-").removeprefix("--")
            groups[flag] = []
        groups[flag].append(word)
    return tuple(word for flag in sorted(groups) for word in groups[flag])


def make_corpora(folder, names):
    """Tiny embedded corpora of those names below `folder`; scripts forked from here draw others that small, too."""
    for name, scenes in SCENES.items():
        importlib.import_module(f"data_prep.{name}").SCALES["default"] = scenes
    for name in names:
        if not data.require(folder, name, ["train"], ""):
            data.make_embedded(folder, name)


def observe_all(folder, commands, jobs):
    """{command: what `observe` wrote} of commands whose needed ones have been observed."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(REPOSITORY))
    for module in ("scipy.stats", "skimage.segmentation", "torchvision.ops", "eval"):
        importlib.import_module(module)  # once here, or every child reads them anew
    context, waiting, running = multiprocessing.get_context("fork"), list(commands), {}
    bar = tqdm(total=len(commands), desc="rows", disable=None)
    while waiting or running:
        while waiting and len(running) < jobs:
            process = context.Process(target=observe, args=(folder, waiting.pop(0)))
            process.start()
            running[process.sentinel] = process
        for sentinel in multiprocessing.connection.wait(list(running)):
            running.pop(sentinel).join()
            bar.update()
    bar.close()
    seen = {}
    for command in commands:
        file = command.place(folder) / "seen.json"
        seen[command] = json.loads(file.read_text()) if file.is_file() else {"fault": "its process died"}
    return seen


# ---- in the process of a row --------------------------------------------------------------------------------

def observe(root, command):
    """Run a command and write what was seen of it to seen.json in its folder; root: where the corpora and all runs lie."""
    folder = command.place(root)
    folder.mkdir()
    os.chdir(folder)
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        seen = see(root, folder / "run", command)
    except (UserError, SystemExit) as error:
        seen = {"fault": " ".join(str(error).split())}
    except Exception as error:  # whatever a script does wrong is this row's fault, and the others go on
        last = traceback.extract_tb(error.__traceback__)[-1]
        seen = {"fault": f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {error}"}
    (folder / "seen.json").write_text(json.dumps(seen | {"seconds": time.process_time()}))


def see(root, run, command):
    """{effect: digests}, by watching the functions that every script calls under the same names."""
    from eval import main as evaluate
    script = importlib.import_module(command.script.stem)
    places = {name: other.place(root) / "run" for name, other in command.needed}
    for name, place in places.items():
        fault = json.loads((place.parent / "seen.json").read_text()).get("fault")
        if fault:
            raise UserError(f"{name}, which it needs: {fault}")
    seen = {"model": [], "data": [], "decode": []}
    build, load, predict, asked = script.build_model, data.load, metrics.predict, True

    def watched_build(args, *others):
        nonlocal asked  # whether this is the stage that the row's score is of; its model is built before its data is read
        asked = not command.stage or args.stage in (command.stage, [command.stage])
        model = build(args, *others)
        if asked:
            seen["model"].append(digest(dict(model.state_dict())))
        return model

    def watched_load(dataset, *args, **options):
        for i, batch in enumerate(load(dataset, *args, **options)):
            if i == 0 and dataset.split == "train" and asked:
                seen["data"].append(digest(dataclasses.replace(batch, frames=[])))
            yield batch

    def watched_predict(model, batch):
        output = predict(model, batch)
        seen["decode"].append(digest(output))
        return output

    script.build_model, data.load, metrics.predict = watched_build, watched_load, watched_predict
    train(script, root, run, command, places)
    trained, seen["decode"] = {effect: list(seen[effect]) for effect in ("model", "data")}, []
    for words in command.evals:
        words = [tables.IN_FLAGS.sub(lambda match: str(places.get(match[1], run)), word) for word in words]
        evaluate(["--run", str(run / command.stage), "--workers", "0", "--batch-size", "4", "--data-root", str(root), *words])
    seen |= trained
    logs = sorted(path.parent for path in (run / command.stage).rglob("log.jsonl"))
    seen["loss"] = [{key: value for key, value in runlog.read_log(log)[0].items()
                     if key not in ("step", "epoch", "seconds", "lr", "waiting", "GB")} for log in logs]
    files = sorted((run / command.stage).rglob("eval/*.json"))
    seen["eval"] = [tables.flat(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return seen


def train(script, root, run, command, places):
    """Train `command` into the folder `run`; places: {row: folder} of the rows that it needs."""
    words = [tables.IN_FLAGS.sub(lambda match: str(places[match[1]]), word) for word in command.words]
    script.main([*words, "--dataset", command.dataset, "--data-root", str(root), "--seed", "0", "--out", str(run)])


def digest(value):
    """A short string that differs where anything in nested tensors, arrays, dictionaries, lists and plain values differs."""
    state = hashlib.sha256()

    def add(item):
        if dataclasses.is_dataclass(item):
            item = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        if isinstance(item, torch.Tensor):
            item = item.detach().float().numpy() if item.dtype == torch.bfloat16 else item.detach().numpy()
        if isinstance(item, np.ndarray):
            state.update(f"{item.shape}{item.dtype}".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, dict):
            for key in sorted(item):
                add(key)
                add(item[key])
        elif isinstance(item, (list, tuple)):
            state.update(f"[{len(item)}".encode())
            for part in item:
                add(part)
        elif item is None or isinstance(item, (str, int, float, np.generic)):
            state.update(f"{item!r};".encode())
        else:
            raise TypeError(f"{type(item).__name__} has no digest")

    add(value)
    return state.hexdigest()[:16]
