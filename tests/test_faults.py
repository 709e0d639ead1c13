"""What goes wrong while a script runs: it is killed at any moment, its disk fills, its files rot, its clock jumps, its loader
processes and its ranks die. Nothing is lost: the run that goes on ends with the bits of the run that nothing happened to."""
import json
import os
import random
import signal
import zipfile

import pytest
import torch

from common import checkpoint
from tests.children import MOMENTS, SCRIPTS, Moment, Setting, SmallDisk, finish, start, words
from tests.conftest import TINY_SCALE

KILLS = [pytest.param(script, number, marks=[] if number < 2 else pytest.mark.slow)
         for script in SCRIPTS for number in range(20)]


def content(run):
    """All that a run leaves and that must not depend on what happened to it: {file: value}."""
    found = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.name in ("last.pt", "best.pt"):
            state = checkpoint.load(path)
            # the settings name the folder, and `begun` holds digests of files that hold settings
            found[name] = {key: value for key, value in state.items() if key not in ("args", "begun", "random")}
            found[name]["random"] = [rank["torch"] for rank in state.get("random", [])]  # nothing draws from python's own
        elif path.name == "log.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in record.items() if key not in ("seconds", "waiting", "GB")} for record in records]
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
    sign = (signal.SIGKILL, signal.SIGTERM)[number % 2]  # each moment meets both, as there are seven of them
    # the first of all runs makes the subsets of its corpus, too, so its last calls may have no counterpart
    calls = sum(TINY_SCALE.values()) if moment == "data making" else max(1, tally[MOMENTS[moment]] - 1)
    data_root, out = tmp_path / "data" if moment == "data making" else shapes, tmp_path / "run"
    running = start(script, words(script, data_root, out), tmp_path / "log",
                    hurt=[Moment(MOMENTS[moment], rng.randint(1, calls), sign)])
    assert running.wait() in ([-signal.SIGKILL], [-signal.SIGTERM], [143]), (moment, running.said)
    jump_clock(out, rng)
    finish(script, words(script, data_root, out, "--resume"), tmp_path / "log")
    assert_unharmed(out, whole)


def rot(path):
    """Flip a bit of the file's largest part, as a bad disk does."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[part.header_offset + part.file_size // 2 + 100] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("script", SCRIPTS)
def test_rotten_checkpoint(unbroken, shapes, tmp_path, script):
    """A flipped bit in the newest last.pt: said aloud, and the run goes on from prev.pt."""
    whole, _ = unbroken(script)
    out = tmp_path / "run"
    step = 5 if script == "train_mutual" else 4  # the third of a stage, which has saved twice by then
    start(script, words(script, shapes, out), tmp_path / "log", hurt=[Moment("common.runlog:Log.step", step)]).wait()
    rot(max(out.rglob("last.pt"), key=lambda path: path.stat().st_mtime))
    said = finish(script, words(script, shapes, out, "--resume"), tmp_path / "log")
    assert said.count("Going on from prev.pt") == 1 and "fails the checksum" in said
    assert_unharmed(out, whole)


@pytest.mark.parametrize("script, size", [pytest.param(script, size, marks=[] if script == "train_lts" else pytest.mark.slow)
                                          for script in SCRIPTS for size in (5_000, 60_000)])
def test_full_disk(unbroken, shapes, tmp_path, script, size):
    """No file may grow beyond `size` bytes: one sentence, status 2; with more room the run goes on."""
    whole, _ = unbroken(script)
    out = tmp_path / "run"
    start(script, words(script, shapes, out), tmp_path / "log", hurt=[Moment("common.runlog:Log.step", 3)]).wait()
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    said = finish(script, words(script, shapes, out, "--resume"), tmp_path / "log", hurt=[SmallDisk(size)], status=2)
    assert_one_sentence(said, "cannot write")
    assert all(path.read_bytes() == data for path, data in before.items())
    finish(script, words(script, shapes, out, "--resume"), tmp_path / "log")
    assert_unharmed(out, whole)


def assert_one_sentence(said, what):
    assert said.count("error: ") == 1 and what in said and "Traceback" not in said, said


@pytest.mark.parametrize("how", [signal.SIGKILL, 0])
@pytest.mark.parametrize("script", [pytest.param(s, marks=[] if s == "train_lts" else pytest.mark.slow) for s in SCRIPTS])
def test_loader_process(unbroken, shapes, tmp_path, script, how):
    """One that dies and one that hangs end the run with a sentence; then it goes on."""
    whole, _ = unbroken(script)
    out = tmp_path / "run"
    with_workers = words(script, shapes, out, "--workers", "1")
    said = finish(script, with_workers, tmp_path / "log", status=2,
                  hurt=[Moment("common.data:load_image", 7, how), Setting("common.data:WORKER_TIMEOUT", 3)])
    assert_one_sentence(said, "--resume")
    finish(script, [*with_workers, "--resume"], tmp_path / "log")
    assert_unharmed(out, whole)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("script", [pytest.param(s, marks=[] if s == "train_lts" else pytest.mark.slow) for s in SCRIPTS])
def test_signal_to_all_processes(unbroken, shapes, tmp_path, script, number, status):
    """`timeout`, a scheduler or Ctrl-C signals the loader processes, too: SIGTERM still saves the last step, nothing is torn."""
    whole, _ = unbroken(script)
    out = tmp_path / "run"
    with_workers = words(script, shapes, out, "--workers", "1", "--save-every", "0")
    said = finish(script, with_workers, tmp_path / "log", status=status, hurt=[Moment("common.runlog:Log.step", 1, number, True)])
    assert "Traceback" not in said and "error" not in said, said
    assert ("saved at step 2" in said) == (number == signal.SIGTERM), said
    finish(script, words(script, shapes, out, "--resume"), tmp_path / "log")
    assert_unharmed(out, whole)
