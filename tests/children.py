"""The scripts in processes of their own that can be killed, forked from one that has imported them: no run waits for imports.

`start` runs a program as its user does, with the exit status and the output that he would see. A `Moment` hurts the process
from within when it calls a function for the n-th time, so that no test waits for a clock.
"""
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import run
from data_prep import refshapes
from tests.conftest import REPOSITORY, TINY, TINY_SCALE
from tests.test_mutual import STEPS, TINY as MUTUAL
from tests.test_pks import TINY as PKS
from tests.test_seqtr_partial import CHAIN
from tests.test_tseg import TINY as TSEG

TWO_EPOCHS = ["--epochs", "2", "--save-every", "1", "--log-every", "1", "--eval-every", "1"]
SCRIPTS = {  # what makes each script small enough for a test: two epochs, or a chain of stages
    "train_lts": [*TINY, *TWO_EPOCHS],
    "train_pks": [*PKS, *TWO_EPOCHS],
    "train_tseg": [*TSEG, *TWO_EPOCHS],
    "train_seqtr_partial": CHAIN,
    "train_mutual": [*MUTUAL, *STEPS, "--max-steps", "3", *TWO_EPOCHS[2:], "--eval-splits", "val"],
}
MOMENTS = {  # what a process is about to do, and the call that does it
    "data making": "data_prep.refshapes:make_scene", "a step": "common.runlog:Log.step",
    "saving, not yet on the disk": "os:fsync", "saving, not yet in place": "os:replace", "evaluating": "common.metrics:areas",
    "between stages": "common.runlog:open_folder", "the last evaluation": "eval:main"}
IDLE, ENDLESS = 120, 600  # seconds without work, of work, after which a process hangs: on a busy machine all take their time
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "eval", *SCRIPTS])


@dataclass(frozen=True)
class Moment:
    """The `count`-th call of `target` ("module:name.name"), before which the process is sent `number`; 0: it hangs for good.

    group: all processes that it has started are sent the signal, too, as `timeout` and a terminal's Ctrl-C do.
    """
    target: str
    count: int
    number: int = signal.SIGKILL
    group: bool = False

    def arm(self):
        """Called in the child before the program starts."""
        calls = itertools.count(1)
        if self.group:
            os.setpgid(0, 0)
        _wrap(self.target, lambda: next(calls) == self.count and self.strike())

    def strike(self):
        """Hurt the process that has come to the moment."""
        if self.group:  # from outside it, as a loader process tells its parent's word from others'; who dies of it is dead thereafter
            subprocess.run(["sh", "-c", f"kill -s {int(self.number)} -- -{os.getpgid(0)}; sleep 0.3"], start_new_session=True)
        elif self.number:
            os.kill(os.getpid(), self.number)
        else:
            _hang()


@dataclass(frozen=True)
class Setting:
    """`target` ("module:NAME") has another value."""
    target: str
    value: object

    def arm(self):
        """As Moment's."""
        module, name = self.target.split(":")
        setattr(importlib.import_module(module), name, self.value)


@dataclass(frozen=True)
class Tally:
    """Counts the calls of each of `targets` into a json file."""
    targets: tuple
    path: str

    def arm(self):
        """As Moment's."""
        counts = dict.fromkeys(self.targets, 0)
        dump = open  # `open` is no target; the file is small and written anew at every call
        for target in self.targets:
            def called(target=target):
                counts[target] += 1
                with dump(self.path, "w") as file:
                    json.dump(counts, file)
            _wrap(target, called)


@dataclass(frozen=True)
class SmallDisk:
    """No file may grow beyond so many bytes."""
    size: int

    def arm(self):
        """As Moment's."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def _hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a process that waits for a lost disk
    time.sleep(10 ** 6)


def _wrap(target, before):
    """Have `before()` called in front of every call of `target`."""
    module, path = target.split(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def wrapped(*args, **options):
        before()
        return real(*args, **options)
    setattr(owner, name, wrapped)


def unbroken(script, data_root, folder):
    """Train `script` in peace: (run folder, {target of MOMENTS: number of calls})."""
    tally = Tally(tuple(MOMENTS.values()), str(folder / "tally.json"))
    finish(script, words(script, data_root, folder / "run"), folder / "log", hurt=[tally])
    counts = json.loads((folder / "tally.json").read_text())
    never = [moment for moment, target in MOMENTS.items() if not counts[target] and moment != "data making"]  # done before
    assert not never, f"{script} has no moment of {', '.join(never)}"
    return folder / "run", counts


def words(script, data_root, out, *more):
    """The command line of a small run."""
    return [*SCRIPTS[script], "--data-root", data_root, "--out", out, *more]


class Running:
    """A program under way in one process for each rank."""

    def __init__(self, processes, log):
        self.processes, self.log = processes, log

    def wait(self):
        """The exit status of every rank, as a list; those left are ended when they do no more work, or work without end."""
        before, since, late = 0.0, time.monotonic(), list(self.processes)
        while late and time.monotonic() - since < IDLE and before < ENDLESS:
            multiprocessing.connection.wait([process.sentinel for process in late], 5)
            late = [process for process in late if process.exitcode is None]
            done = sum(_work(process.pid) for process in late)
            if abs(done - before) > 0.05:  # what a waiting process wakes up for takes less
                before, since = done, time.monotonic()
        for process in late:
            process.kill()
            process.join()
        assert not late, f"hangs: {self.said}"
        return [process.exitcode for process in self.processes]

    @property
    def said(self):
        """Everything printed so far."""
        return "".join(Path(f"{self.log}{rank}").read_text() for rank in range(len(self.processes))
                       if Path(f"{self.log}{rank}").exists())


def _work(pid):
    """Processor seconds of a process and of those that it has started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(_work, started))


def start(program, argv, log, ranks=1, hurt=(), hurt_rank=None, cwd=REPOSITORY):
    """Run `python program.py argv…` in `cwd`, on `ranks` processes; what they print goes to the files `log`0, `log`1, ….

    hurt: what befalls rank `hurt_rank`, or all, in this order: Moment, Setting, Tally, SmallDisk, …. Returns Running.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = CONTEXT.Process(target=_child, args=(
            program, [str(word) for word in argv], f"{log}{rank}",
            {key: str(value) for key, value in meeting.items()} if ranks > 1 else {}, hurt if hurt_rank in (None, rank) else (), cwd))
        process.start()
        processes.append(process)
    return Running(processes, log)


def finish(program, argv, log, ranks=1, hurt=(), status=0, cwd=REPOSITORY):
    """`start`, and wait; every rank must end with `status`. Returns what was printed."""
    running = start(program, argv, log, ranks, hurt, cwd=cwd)
    codes = running.wait()
    assert codes == [status] * ranks, (codes, running.said)
    return running.said


def _child(program, argv, log, environment, hurt, cwd):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in a shell's background inherit its ignoring
    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    refshapes.SCALES["tiny"] = TINY_SCALE
    refshapes.make.__defaults__ = ("tiny", 0, 1)  # what a script makes where no corpus is yet
    sys.argv = [f"{program}.py", *argv]
    for harm in hurt:
        harm.arm()
    run(importlib.import_module(program).main)
