"""What goes wrong while a script runs: it is killed at any moment, its disk fills, its files rot, its clock jumps, its loader
processes and its ranks die. Nothing is lost: the run that goes on ends with the bits of the run that nothing happened to."""
import json
import os
import random
import signal
import time
import zipfile

import pytest
import torch

from common import checkpoint
from tests import children
from tests.children import SCRIPTS, Moment, SmallDisk, Tally, finish, start
from tests.conftest import TINY_SCALE

MOMENTS = {  # what the process is about to do
    "data making": "data_prep.refshapes:make_scene", "a step": "common.runlog:Log.step",
    "saving, not yet on the disk": "os:fsync", "saving, not yet in place": "os:replace", "evaluating": "common.metrics:areas",
    "between stages": "common.runlog:open_folder", "the last evaluation": "eval:main"}
KILLS = [pytest.param(script, number, marks=[] if number < 2 else pytest.mark.slow)
         for script in SCRIPTS for number in range(20)]


@pytest.fixture(scope="module")
def unbroken(shapes, tmp_path_factory):
    """script -> (run folder, {target: calls}) of a run that nothing happens to; made once."""
    made = {}

    def of(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            tally = Tally(tuple(MOMENTS.values()), str(folder / "tally.json"))
            finish(script, words(script, shapes, folder / "run"), folder / "log", hurt=tally)
            made[script] = folder / "run", json.loads((folder / "tally.json").read_text())
        return made[script]
    return of


def words(script, data_root, out, *more):
    return [*SCRIPTS[script], "--data-root", data_root, "--out", out, *more]


def content(run):
    """All that a run leaves and that must not depend on what happened to it: {file: value}."""
    found = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.name in ("last.pt", "best.pt"):
            state = checkpoint.load(path)
            found[name] = {key: value for key, value in state.items() if key not in ("args", "random")}
            found[name]["random"] = [rank["torch"] for rank in state.get("random", [])]  # nothing draws from python's own
        elif path.name == "log.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in record.items() if key not in ("seconds", "GB")} for record in records]
        elif path.suffix == ".jsonl" or path.name == "masks.json":
            found[name] = path.read_text()
    return found


def alike(a, b):
    """Whether nested lists, dictionaries and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def assert_unharmed(run, whole):
    ours, theirs = content(run), content(whole)
    assert ours.keys() == theirs.keys() and len(ours) >= 4
    assert [name for name in ours if not alike(ours[name], theirs[name])] == []


def jump_clock(run, rng):
    """Give everything that lies there a date between 1970 and 2100, as a clock leaves that jumps."""
    for path in run.rglob("*"):
        os.utime(path, (rng.randrange(2 ** 32),) * 2)


@pytest.mark.parametrize("script, number", KILLS)
def test_killed_at_any_moment(unbroken, shapes, tmp_path, script, number):
    """Seeded: SIGKILL or SIGTERM before a call of one of MOMENTS; the clock jumps; the run goes on."""
    whole, tally = unbroken(script)
    rng = random.Random(f"{script} {number}")
    moment = list(MOMENTS)[(2 * list(SCRIPTS).index(script) + number) % len(MOMENTS)]
    sign = (signal.SIGKILL, signal.SIGTERM)[(number + number // len(MOMENTS)) % 2]
    calls = sum(TINY_SCALE.values()) if moment == "data making" else tally[MOMENTS[moment]]
    data_root, out = tmp_path / "data" if moment == "data making" else shapes, tmp_path / "run"
    running = start(script, words(script, data_root, out), tmp_path / "log", hurt=Moment(MOMENTS[moment], rng.randint(1, calls), sign))
    assert running.wait() in ([-signal.SIGKILL], [-signal.SIGTERM], [143]), (moment, running.said)
    jump_clock(out, rng)
    finish(script, words(script, data_root, out, "--resume"), tmp_path / "log")
    assert_unharmed(out, whole)
