"""Several processes do what one does: the gradient of a step, the scores of an evaluation; and a rank that dies loses nothing."""
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import checkpoint
from tests.children import SCRIPTS, Moment, finish, start, words
from tests.conftest import REPOSITORY
from tests.test_faults import assert_unharmed

UNEVEN = ["--batch-size", "5", "--expressions-per-image", "all", "--max-steps", "1", "--clip", "0"]  # 2 images and 3
PRETRAIN = ["--stage", "pretrain", "--pretrain-batch-size", "5", "--pretrain-steps", "1"]
DSUP = ["--stage", "2", "--dsup-batch-size", "5", "--dsup-steps", "1", "--reuse", "{run}"]
FROM_BOXES = ["--rec-from", "{run}/rec/best.pt"]
GSUP = ["--stage", "3", "--reuse", "{run}", "--seed", "5"]  # both ranks' shares have real and generated sentences
RETRAIN = ["--stage", "retrain", "--pseudo-from", "{run}/pseudo/masks.json", *FROM_BOXES]
STEPS = [("train_lts", []), ("train_pks", []), ("train_pks", ["--weak"]), ("train_tseg", []), ("train_tseg", ["--full"]),
         ("train_seqtr_partial", ["--stage", "rec"]), ("train_seqtr_partial", ["--stage", "res", *FROM_BOXES]),
         ("train_seqtr_partial", RETRAIN), ("train_mutual", PRETRAIN), ("train_mutual", ["--stage", "1", "--reuse", "{run}"]),
         ("train_mutual", DSUP), ("train_mutual", GSUP)]


@dataclass(frozen=True)
class SameDice:
    """torch.rand gives each row the same numbers, so that ranks compare their masks in the places where one rank does."""

    def arm(self):
        """Called in the child before the program starts."""
        real = torch.rand
        torch.rand = lambda *size, device=None: real(*size[-2:], generator=torch.Generator().manual_seed(size[-2])).expand(size)


def first_step(script, shapes, out, ranks, flags):
    """Every parameter's gradient: Adam's first moment after one step is a tenth of it."""
    finish(script, words(script, shapes, out, *UNEVEN, "--eval-splits", *flags), f"{out}.log", ranks, [SameDice()])
    state = checkpoint.load(next(out.rglob("last.pt")))["optimizer"]["state"]
    return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])


@pytest.mark.parametrize("script, flags", STEPS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_gradient(unbroken, shapes, tmp_path, script, flags):
    """Two ranks with unequal shares of a batch, images and sentences, move the weights as one rank does; so do micro-batches."""
    flags = [flag.format(run=unbroken(script)[0] if "{run}" in flag else "") for flag in flags]
    one = first_step(script, shapes, tmp_path / "one", 1, flags)
    for ranks, accum in [(2, 1)] + [(1, 2)] * (script == "train_lts"):
        other = first_step(script, shapes, tmp_path / f"{ranks}{accum}", ranks, [*flags, "--accum", accum])
        assert one.norm() > 0 and (other - one).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scores(unbroken, shapes, tmp_path, script):
    """One, two and three ranks score alike to the bit, with batches that do not come out even."""
    stage = max(unbroken(script)[0].rglob("best.pt"), key=lambda path: path.stat().st_mtime)
    rows = []
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        shutil.copy(stage, tmp_path / str(ranks))
        finish("eval", ["--run", tmp_path / str(ranks), "--split", "val", "--batch-size", "2", "--workers", "0", "--data-root", shapes],
               tmp_path / "log", ranks)
        rows.append({path.name: path.read_bytes() for path in (tmp_path / str(ranks) / "eval").glob("*.jsonl")})
    assert rows[0] and rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("script", [pytest.param(s, marks=[] if s == "train_lts" else pytest.mark.slow) for s in SCRIPTS])
def test_dead_rank(shapes, tmp_path, script):
    """When a rank is killed the others end by themselves; the job goes on from the last checkpoint on as many ranks."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(script, words(script, shapes, whole), tmp_path / "log", ranks=2)
    running = start(script, words(script, shapes, out), tmp_path / "log", 2, [Moment("common.runlog:Log.step", 3)], hurt_rank=1)
    codes = running.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), running.said
    assert "Traceback" not in running.said and "another rank" in running.said, running.said
    finish(script, words(script, shapes, out, "--resume"), tmp_path / "log", ranks=2)
    assert_unharmed(out, whole)


@pytest.mark.slow
def test_torchrun(shapes, tmp_path):
    """The launcher itself: one of its ranks is killed, the job ends, a new job resumes."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish("train_lts", words("train_lts", shapes, whole), tmp_path / "log", ranks=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_lts.py"]
    argv = [*launcher, *map(str, words("train_lts", shapes, out))]
    options = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, **options) as job:
        while not (out / "last.pt").exists():
            assert job.poll() is None
            time.sleep(0.01)
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert job.wait(120) != 0
    assert subprocess.run([*argv, "--resume"], timeout=200, **options).returncode == 0
    assert_unharmed(out, whole)
