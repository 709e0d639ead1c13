"""The runner of tables: rows that train, score, fail, are interrupted and go on; its tables; its check of the rows' flags."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common import rowcheck, sidebyside, tables
from common.config import UserError
from common.plans import Job, Plan, row_facts
from common.reproduce import get_parser, main
from common.runner import Runner, Running, named_by_eval
from tests.conftest import REPOSITORY, TINY, command

FAKE = '''
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for flag in ("--dataset", "--data-root", "--out", "--init"):
    parser.add_argument(flag)
for flag in ("--seed", "--gain", "--fail", "--slow"):
    parser.add_argument(flag, type=int, default=0)
parser.add_argument("--eval-splits", nargs="*")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
out = pathlib.Path(args.out)
if args.fail:
    sys.exit("no luck today")
if args.init and not pathlib.Path(args.init).is_file():
    sys.exit("nothing to begin with")
if not (out / "best.pt").exists():
    time.sleep(args.slow)
for folder in (out, out / "last"):
    (folder / "eval").mkdir(parents=True, exist_ok=True)
(out / "best.pt").write_text("trained")
(out / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
(out / "env.txt").write_text("cpu: 3 cores\\ngpu: none\\ncommit: abc")
with open(out / "calls", "a") as calls:
    calls.write("call\\n")
for split in args.eval_splits:
    summary = {"dataset": args.dataset, "split": split, "mIoU": 50.0 + args.gain + args.seed, "Pr@0.5": 60.0,
               "pointing": {"H": 70.0}, "seconds": 1.0}
    (out / "eval" / f"{args.dataset}_{split}.json").write_text(json.dumps(summary))
    (out / "last" / "eval" / f"{args.dataset}_{split}.json").write_text(json.dumps(summary | {"mIoU": 70.0 + args.seed}))
print("done")
'''


@pytest.fixture
def write(tmp_path):
    """A function that writes a table of a fake script, changed by its argument, and returns its path."""
    (tmp_path / "train_fake.py").write_text(FAKE)

    def make(change=lambda table: None, name="fake"):
        table = {"paper": "Fake", "where": "Table 1", "caption": "Gains", "script": str(tmp_path / "train_fake.py"),
                 "columns": [{"name": "val", "dataset": "corpus", "split": "val", "metrics": ["mIoU", "pointing.H"]}],
                 "embedded": {"shapes": {"flags": "--gain 0", "columns": [{"split": "val", "metrics": ["mIoU"]}]}},
                 "rows": [{"name": "full", "flags": "--gain 3", "published": {"val": [51.5, None]}},
                          {"name": "less", "flags": "--gain 1", "ablates": "full", "effect": "model",
                           "published": {"val": [50.25, 70]}},
                          {"name": "theirs", "built": False, "published": {"val": [12.34, 1]}},
                          {"name": "later", "flags": "--init {full}/best.pt --gain 5"},
                          {"name": "broken", "flags": "--fail 1"},
                          {"name": "after", "flags": "--init {broken}/best.pt"}]}
        change(table)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(table, sort_keys=False))
        return path
    return make


def reproduce(*words, cwd, **options):
    return command("-m", "common.reproduce", *words, cwd=cwd, PYTHONPATH=str(REPOSITORY), **options)


def results_of(path):
    return {(e["row"], e["dataset"], e["seed"]): e for e in tables.load_results(tables.results_path(path))}


def test_rows_fail_alone_and_what_is_done_stays_done(write, tmp_path):
    path = write()
    done = reproduce(path, "--seeds", "2", "--jobs", "2", "--gpus", "0,1", "2,3", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {file.read_text() for file in (tmp_path / "runs/tables/fake/corpus").glob("*/gpus")} == {"0,1", "2,3"}
    assert done.stdout.count("no luck today") == 2 and "it needs broken on corpus, seed 1" in done.stdout
    found = results_of(path)
    assert set(found) == {(row, "corpus", seed) for row in ("full", "less", "later") for seed in (0, 1)}
    entry = found["less", "corpus", 1]
    assert entry["scores"] == {"corpus val": {"mIoU": 52.0, "Pr@0.5": 60.0, "pointing.H": 70.0}}
    assert entry["commands"] == [f"python {tmp_path}/train_fake.py --gain 1 --dataset corpus --data-root data --seed 1 --out "
                                 "runs/tables/fake/corpus/less_s1 --eval-splits val --resume"]
    assert (entry["machine"], entry["commit"]) == ("3 cores", "abc") and entry["seconds"] > 0
    page = (tmp_path / "runs/tables/fake/table.md").read_text()
    assert "| less | 2 | 51.50 ± 0.71 | 50.25 | +1.25 | full | -2.00 ± 0.00 | -1.25 | yes | 70.00 ± 0.00 | 70.00 | +0.00 |" in page
    assert "| theirs |  | not built | 12.34 | - |" in page and "| broken | 0 | not run |" in page
    assert "<svg" in (tmp_path / "runs/tables/fake/table.html").read_text()
    again = reproduce(path, "--seeds", "3", "--rows", "full", "later", cwd=tmp_path)
    assert again.returncode == 0 and "4 results are there, 2 to make" in again.stdout
    assert (tmp_path / "runs/tables/fake/corpus/full_s0/calls").read_text() == "call\n"  # not even started again
    # other settings: the old results are neither shown nor lost, and their folder is kept
    write(lambda table: table["rows"][0].update(flags="--gain 4"))
    changed = reproduce(path, "--rows", "full", cwd=tmp_path)
    assert re.search(r"full +1 +54.00", changed.stdout)
    assert "(6 results made with other settings are not shown)" in changed.stdout
    assert len(tables.load_results(tables.results_path(path))) == 9
    assert len(list((tmp_path / "runs/tables/fake/corpus").glob("full_s0_*/best.pt"))) == 1


def test_equal_settings_in_two_tables_are_one_run(write, tmp_path):
    first, second = write(), write(lambda table: table["columns"][0].update(metrics=["mIoU"]) or table["rows"][1].update(
        name="small", published={}) or table["rows"][0].update(published={}) or table["rows"][2].update(published={}), "other")
    assert reproduce(first, "--rows", "less", cwd=tmp_path).returncode == 0
    done = reproduce(second, "--rows", "small", cwd=tmp_path)
    assert "1 results are there, 0 to make" in done.stdout
    assert results_of(second)["small", "corpus", 0]["from"] == "fake, less"
    # the embedded corpus has rows of its own, and no difference to figures of another corpus
    embedded = reproduce(first, "--rows", "less", "full", "--dataset", "shapes", cwd=tmp_path).stdout
    assert re.search(r"less +1 +51.00 +50.25 +full +-2.00 +-1.25 +one seed", embedded), embedded
    assert "difference" not in embedded and "published, val" in embedded


def test_a_killed_runner_ends_its_children_and_goes_on(write, tmp_path):
    path = write(lambda table: table["rows"][0].update(flags="--slow 60"))
    runner = subprocess.Popen([sys.executable, "-m", "common.reproduce", path, "--rows", "full", "less"], cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "runs/tables/fake/corpus/full_s0/row.log"
    while not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    busy = reproduce(path, "--rows", "full", cwd=tmp_path)
    assert busy.returncode == 1 and "is in use by another process" in busy.stdout
    write(lambda table: table["rows"][0].update(flags="--slow 61"))  # what is in use stays where it is with other settings, too
    busy = reproduce(path, "--rows", "full", cwd=tmp_path)
    assert "is in use by another process" in busy.stdout and not list(log.parent.parent.glob("full_s0_*"))
    runner.send_signal(signal.SIGTERM)
    out, _ = runner.communicate(timeout=30)
    assert runner.returncode == 143 and "the same command goes on from here" in out
    assert subprocess.run(["pgrep", "-f", f"{tmp_path}/train_fake.py"], capture_output=True).returncode == 1
    assert results_of(path) == {}


def planned(path, monkeypatch, *words):
    """The plan of a table, whose runs lie below the table's folder."""
    monkeypatch.chdir(path.parent)
    return Plan(tables.load_table(path), get_parser().parse_args([str(path), *words]))


def test_a_run_with_other_settings_stands_in_for_none(write, tmp_path, monkeypatch):
    """A result is there, but in its folder lies another run since: a row that needs the run has it made anew."""
    path = write()
    assert reproduce(path, "--rows", "full", cwd=tmp_path).returncode == 0
    full, later = Job("full", "corpus", 0), Job("later", "corpus", 0)
    assert planned(path, monkeypatch, "--rows", "later").jobs() == ([later], 0)
    (tmp_path / "runs/tables/fake/corpus/full_s0/row.json").write_text('{"settings": "others"}')
    assert planned(path, monkeypatch, "--rows", "later").jobs() == ([full, later], 0)


@pytest.mark.parametrize("flags, same", [("--yaml=b.yaml", True), ("--yaml a.yaml --yaml b.yaml", True), ("--yaml a.yaml", False)])
def test_settings_hold_what_the_yaml_files_say(write, tmp_path, monkeypatch, flags, same):
    """Of the last --yaml alone, which is the one that counts."""
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("gain: 1\n")
    path = write(lambda table: table["rows"][0].update(flags=flags))
    before = planned(path, monkeypatch)
    digest = before.settings(before.table.row("full"), "corpus")
    (tmp_path / "a.yaml").write_text("gain: 2\n")
    assert (planned(path, monkeypatch).settings(before.table.row("full"), "corpus") == digest) == same
    (tmp_path / "a.yaml").write_text("gain: 1\nworkers: 3\n")  # decides no number
    (tmp_path / "b.yaml").write_text("gain: 2\n")
    assert (planned(path, monkeypatch).settings(before.table.row("full"), "corpus") == digest) != same


def test_settings_hold_what_the_words_for_classes_say(write, tmp_path, monkeypatch):
    path, digests = write(lambda table: table["rows"][1].update(eval="--names words.yaml")), []
    for words in ("[man]", "[man, woman]", "[man]  # again"):
        (tmp_path / "words.yaml").write_text(f"person: {words}\n")
        plan = planned(path, monkeypatch)
        digests.append([plan.settings(plan.table.row(row), "corpus") for row in ("full", "less")])
    assert digests[0] == digests[2] and digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


def test_scores_that_training_wrote_are_not_those_of_eval():
    log = "$ python train_lts.py --eval-splits val\nscores: a.json\n$ torchrun -- eval.py --run x\nscores: b.json\nscores: c.json\n"
    assert named_by_eval(log) == ["b.json", "c.json"]


def test_a_row_s_time_is_noted_while_it_runs(write, tmp_path, monkeypatch):
    plan, job = planned(write(), monkeypatch), Job("full", "corpus", 0)
    runner = Runner([], plan.args)
    runner.running, runner.shown = [Running(plan, job, "", None, [], earlier=5.0, log=tmp_path / "row.log")], -1000.0
    runner.say()
    assert row_facts(plan.folder(job))["seconds"] >= 5


@pytest.mark.parametrize("words, message", [
    (["--seeds", "0"], "at least 1"), (["--gpus", "0", "1"], "names 2 groups"), (["--first"], "for --check alone"),
    (["--check", "--dataset", "shapes"], "--dataset means nothing to --check"), (["--flags=--x 'y"], "--flags: .* cannot be read"),
    (["--flags=--seed=3"], "--flags: --seed=3 is set by the runner"), (["--launcher", "a '"], "--launcher: .* cannot be read"),
    (["--dataset", "shape"], "there is no 'shape', did you mean 'shapes'"), (["--rows", "ful"], "did you mean 'full'")])
def test_what_cannot_be_meant_is_refused(write, words, message):
    with pytest.raises(UserError, match=message):
        main([str(write()), *words])


@pytest.mark.parametrize("launcher, ends", [
    ("python", "python"), ("/opt/bin/torchrun --nnodes 2", "torchrun --nnodes 2 --"),
    ("python -m torch.distributed.run", "torch.distributed.run --"), ("srun python", "srun python")])
def test_torchrun_has_a_lone_dash_behind_it(write, monkeypatch, launcher, ends):
    plan = planned(write(), monkeypatch, "--launcher", launcher)
    assert plan.printed(["eval.py", "--run", "x"]).endswith(f"{ends} eval.py --run x")


def test_interrupted_in_the_middle_of_a_row_it_ends_with_the_same_numbers(shapes, tmp_path):
    """The real script: one run unbroken, one ended after a few steps and started again by the same command."""
    flags = " ".join([*TINY[:-4], "--amp off --epochs 2 --flip 0.5"])
    found = []
    for place in ("unbroken", "broken"):
        (tmp_path / place).mkdir()
        path = tmp_path / place / "lts.yaml"
        path.write_text(yaml.safe_dump({
            "paper": "LTS", "where": "-", "caption": "-", "script": "train_lts.py",
            "columns": [{"dataset": "refcoco", "split": "val", "metrics": ["mIoU"]}],
            "embedded": {"refshapes": {"flags": flags, "columns": [{"split": "val", "metrics": ["mIoU", "oIoU"]}]}},
            "rows": [{"name": "full"}]}))
        words = [sys.executable, "-m", "common.reproduce", path, "--dataset", "refshapes", "--data-root", shapes]
        options = {"cwd": tmp_path / place, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}}
        if place == "broken":
            runner = subprocess.Popen(words, stdout=subprocess.DEVNULL, **options)
            log = tmp_path / place / "runs/tables/lts/refshapes/full_s0/row.log"
            while not (log.is_file() and "trained parameters" in log.read_text()):
                time.sleep(0.02)
            runner.send_signal(signal.SIGTERM)
            assert runner.wait(timeout=60) == 143
            assert "stopped by a signal; saved at step" in log.read_text() and not results_of(path)
        done = subprocess.run(words, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        scores = results_of(path)["full", "refshapes", 0]["scores"]["refshapes val"]
        found.append({key: value for key, value in scores.items() if "second" not in key})
    assert found[0] == found[1] and found[0]["n"] > 0


def test_check_runs_what_a_row_needs_before_it(monkeypatch):
    first = rowcheck.Command(Path("a.py"), "shapes", ("1",), (), "")
    second = replace(first, words=("2",), needed=(("first", first),))
    third = replace(first, words=("3",), needed=(("second", second),))
    rounds = []
    monkeypatch.setattr(rowcheck, "make_corpora", lambda folder, names: None)
    monkeypatch.setattr(rowcheck, "pair_of", lambda table, row: (third, first))
    monkeypatch.setattr(rowcheck, "observe_all", lambda folder, commands, jobs: rounds.append(commands) or {
        command: {"loss": command.words} for command in commands})
    assert rowcheck.check([(SimpleNamespace(name="t"), SimpleNamespace(name="r", effect="loss", ablates="f"))], 2) == 0
    assert rounds == [[first], [second], [third]]


def test_the_score_of_another_rows_stage_needs_no_command(write, tmp_path):
    path = write(lambda table: table.update(rows=[{"name": "full"}, {"name": "late", "run_of": "full", "stage": "last"}]))
    done = reproduce(path, "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results_of(path)
    assert [found["late", "corpus", seed]["scores"]["corpus val"]["mIoU"] for seed in (0, 1)] == [70, 71]
    assert found["late", "corpus", 0]["commands"] == []


def test_commands_that_come_to_the_same_are_one():
    words = rowcheck.once("--steps=9 --filter --sizes 1 2 --steps 1 --no-filter".split())
    assert words == ("--no-filter", "--sizes", "1", "2", "--steps", "1")


def test_of_two_stages_the_later_ones_score_counts(write, tmp_path, monkeypatch):
    path, job = write(), Job("full", "corpus", 0)
    (tmp_path / "train_fake.py").write_text('STAGES = ("one", "two")')
    monkeypatch.chdir(tmp_path)
    plan = Plan(tables.load_table(path), get_parser().parse_args([str(path)]))
    for moment, (stage, value) in enumerate([("two", 2.0), ("one", 1.0)]):  # which was written last says nothing
        file = plan.folder(job) / stage / "eval" / "corpus_val.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"dataset": "corpus", "split": "val", "mIoU": value, "pointing": {"H": value}}))
        os.utime(file, (moment, moment))
    assert plan.scores(job, [])["corpus val"]["mIoU"] == 2.0


def test_dry_run_prints_the_commands(write, tmp_path):
    def chain(table):
        table["columns"].append({"name": "far", "dataset": "corpus", "on": "moon", "split": "test", "metrics": ["mIoU"]})
        table["rows"] = [{"name": "full", "flags": "--gain 3"},
                         {"name": "late", "run_of": "full", "stage": "last", "eval": "--crf unary"}]

    path = write(chain)
    done = reproduce(path, "--dry-run", "--launcher", "torchrun --nproc_per_node 4", "--flags=--amp bf16", cwd=tmp_path)
    run, end = "runs/tables/fake/corpus/full_s0", "--dataset moon --data-root data --split test"
    assert done.stdout.splitlines() == [
        f"torchrun --nproc_per_node 4 -- {tmp_path}/train_fake.py --gain 3 --amp bf16 --dataset corpus --data-root data "
        f"--seed 0 --out {run} --eval-splits val --resume",
        f"torchrun --nproc_per_node 4 -- eval.py --run {run} {end}",
        f"torchrun --nproc_per_node 4 -- eval.py --run {run}/last --split val --crf unary",
        f"torchrun --nproc_per_node 4 -- eval.py --run {run}/last {end} --crf unary"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update(captoin="x"), "unknown key 'captoin', did you mean 'caption'"),
    (lambda t: t.pop("where"), "lacks where"),
    (lambda t: t.update(script="train_lst.py"), "train_lst.py does not exist, did you mean 'train_lts.py'"),
    (lambda t: t["rows"][1].update(effct="model"), "row 2 has the unknown key 'effct', did you mean 'effect'"),
    (lambda t: t["rows"][1].update(ablates="ful"), "there is no 'ful', did you mean 'full'"),
    (lambda t: t["rows"][1].update(effect="modle"), "effect is one of .* did you mean 'model'"),
    (lambda t: t["rows"][1].pop("effect"), "`ablates` and `effect` go together"),
    (lambda t: t["rows"][1].update(name="full"), "the name stands twice"),
    (lambda t: t["rows"][1].update(name="../full"), "a name has letters"),
    (lambda t: t["rows"][1].update(flags="--out x"), "--out is set by the runner"),
    (lambda t: t["embedded"]["shapes"].update(flags="--seed 3"), "--seed is set by the runner"),
    (lambda t: t["rows"][1].update(flags="--init {fll}/best.pt"), "there is no 'fll', did you mean 'full'"),
    (lambda t: t["rows"][0].update(flags="--init {later}/best.pt"), "in a circle: full -> later -> full"),
    (lambda t: t["rows"][1].update(flags="--name 'x"), "cannot be read"),
    (lambda t: t["rows"][1].update(flags=3), "flags must be str, got 3"),
    (lambda t: t["rows"][1].update(run_of="full"), "a row with run_of trains nothing"),
    (lambda t: t["rows"][2].update(flags="--x"), "what is not built has no flags"),
    (lambda t: t["rows"][0]["published"].update(val=["51,5", 1]), "'51,5' under val is no number"),
    (lambda t: t["rows"][0]["published"].update(val=[51.5]), "1 published figures for the 2 metrics"),
    (lambda t: t["rows"][0]["published"].update(vla=[51.5, 1]), "there is no 'vla', did you mean 'val'"),
    (lambda t: t["columns"][0].update(metrics=["mIuO"]), "there is no 'mIuO', did you mean 'mIoU'"),
    (lambda t: t["columns"][0].pop("dataset"), "names no dataset"),
    (lambda t: t.update(datasets={"corpse": "--x"}), "there is no 'corpse', did you mean 'corpus'"),
    (lambda t: t.update(rows=[]), "has no rows"),
])
def test_format(write, change, message):
    with pytest.raises(UserError, match=message):
        tables.load_table(write(change))


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 3}', '{"results": [[]]}', '{"results": [{"row": "full", "seed": 0}]}', "\udcff"])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "x.results.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="x.results.json is no file of results"):
        tables.load_results(tmp_path / "x.results.json")


@pytest.mark.parametrize("name, dataset, split, expected", [
    ("pks_table2", "refshapes+", "val", ("RefCOCO+ val", 60.90)), ("pks_table2", "refcoco+", "val", ("RefCOCO+ val", 60.90)),
    ("pks_table2", "refshapes+", "testB", ("RefCOCO+ testB", 51.35)), ("pks_table2", "refshapesg", "val", ("RefCOCOg val (U)", 60.38)),
    ("tseg_full", "refshapes", "val", ("refcoco", 66.00)), ("tseg_full", "phraseshapes", "val", ("phrasecut", 49.6)),
    ("mutual_table3", "refshapes", "val", ("testB", None)), ("mutual_fig5", "refshapes", "val", ("val", None))])
def test_published_figures_are_those_of_the_corpus_and_split_that_an_embedded_one_stands_for(name, dataset, split, expected):
    table = tables.load_table(REPOSITORY / f"yaml/tables/{name}.yaml")
    [column] = [column for column in table.columns_of(dataset) if column.split == split]
    figure, source = sidebyside.published_of(table, table.row("full"), column, column.metrics[0])
    assert (source.name, figure) == expected


@pytest.mark.parametrize("metric, measured, published, difference", [
    ("CIDEr", "0.591", "0.927", "-0.336"), ("METEOR", "0.591", "0.248", "+0.343"), ("mIoU", "0.59", "-", "-")])
def test_scores_have_the_digits_that_papers_print(metric, measured, published, difference):
    """CIDEr and METEOR three, percentages two."""
    table = tables.load_table(REPOSITORY / "yaml/tables/mutual_table3.yaml")
    table.columns[0].metrics = [metric]
    table.row("e").published = {} if metric == "mIoU" else {"testB": [float(published)]}
    results = [{"row": "e", "seed": 0, "scores": {"refcoco+ testB": {metric: 0.591}}}]
    [(_, header, lines)] = sidebyside.blocks(table, "refcoco+", results)
    row = next(line for line in lines if line[0].startswith("(e)"))
    assert (header[2:5], row[2:5]) == ([metric, "published", "difference"], [measured, published, difference])


@pytest.mark.parametrize("differences, published, expected", [
    ([-2.0, -2.5, -2.2], -1.0, "yes"), ([-2.0, -2.5, -2.2], 1.0, "no"), ([-2.0, 2.5, 0.1], 1.0, "cannot tell"),
    ([-2.0], -1.0, "one seed"), ([], -1.0, ""), ([-2.0, -2.1], None, ""), ([1.0, 1.0], 1.0, "yes"),
    ([0.0, 0.0], 1.0, "cannot tell")])
def test_verdict(differences, published, expected):
    assert sidebyside.verdict(differences, published) == expected


def test_check_fails_where_a_flag_does_nothing(tmp_path):
    """Of rows that change what they say, what they do not say, and nothing, only the first pass."""
    rows = [{"name": "full"}, {"name": "model", "flags": "--filters 2", "ablates": "full", "effect": "model"},
            {"name": "loss", "flags": "--lambda-loc 0.3", "ablates": "full", "effect": "loss"},
            {"name": "decode", "run_of": "full", "eval": "--threshold 0.01", "ablates": "full", "effect": "eval"},
            {"name": "wrong", "flags": "--lambda-loc 0.3", "ablates": "full", "effect": "model"},
            {"name": "nothing", "flags": "--log-every 7", "ablates": "full", "effect": "loss"},
            {"name": "unknown", "flags": "--fitlers 2", "ablates": "full", "effect": "model"}]
    path = tmp_path / "lts.yaml"
    path.write_text(yaml.safe_dump({
        "paper": "LTS", "where": "-", "caption": "-", "script": "train_lts.py", "rows": rows,
        "columns": [{"dataset": "refcoco", "split": "val", "metrics": ["mIoU"]}],
        "embedded": {"refshapes": {"flags": " ".join(TINY[:8])}}}))
    done = reproduce(path, "--check", cwd=tmp_path)
    lines = {line.split()[2]: line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))}
    assert done.returncode == 1 and "7 rows, 6 compared, 3 failed" in done.stdout, done.stdout + done.stderr
    assert [row for row, line in lines.items() if line.startswith("FAIL")] == ["wrong", "nothing", "unknown"]
    assert "its model is that of full" in lines["wrong"] and "did you mean '--filters'" in lines["unknown"]
