"""The run folder: settings, environment and source that made it, a JSONL log, a progress bar.

`runs/<script>/<dataset>/<name>_s<seed>/` holds config.yaml env.txt source.py log.jsonl last.pt prev.pt best.pt
eval/ report.html.
"""
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.config import REPOSITORY, UserError, dump, write_text


def run_folder(args, script):
    """The folder of this run, from --out or from the script, dataset, name and seed."""
    return Path(args.out) if args.out else Path("runs") / script / args.dataset / f"{args.name}_s{args.seed}"


def open_folder(folder, args, source):
    """Make the run folder and write config.yaml, env.txt and source.py into it.

    Raises UserError when the folder holds a run already and --resume was not given, or cannot be written.
    """
    used = any((folder / name).exists() for name in ("last.pt", "prev.pt", "best.pt", "log.jsonl"))
    if used and not args.resume:
        raise UserError(f"{folder} holds a run already; go on with --resume, or choose another --name or --out.")
    dump(args, folder / "config.yaml")
    write_text(folder / "env.txt", environment())
    write_text(folder / "source.py", Path(source).read_text(encoding="utf-8"))


def command():
    """The command line that started this process, as one types it."""
    launcher = f"torchrun --nproc_per_node {os.environ['WORLD_SIZE']}" if "WORLD_SIZE" in os.environ else "python"
    return f"{launcher} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def environment():
    """What a rerun needs to know: command, commit, versions, machine."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = git("status", "--porcelain", "--untracked-files=no")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["none"]
    return "\n".join([
        f"command: {command()}",
        f"commit: {git('rev-parse', 'HEAD')}" + (" with uncommitted changes" if changed not in ("", "unknown") else ""),
        f"date: {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"cpu: {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"gpu: {', '.join(cards)}", ""])


def processor():
    """The CPU's name; where the system does not tell it, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


class Log:
    """Appends to log.jsonl and shows progress: a bar on a terminal, a plain line every `plain_every` seconds elsewhere.

    Only the main rank writes and shows. Use as a context manager, so that the bar is closed on any way out.
    """

    def __init__(self, folder, main, total, done=0, plain_every=30.0):
        self.main, self.plain_every = main, plain_every
        self.path = Path(folder) / "log.jsonl"
        self.total, self.done, self.first = total, done, done
        self.started = self.shown = time.monotonic()
        self.begun, self.waited, self.worked = None, 0.0, 0.0
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) \
            if main and sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()

    def say(self, text):
        """Print a line of text without tearing the bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def fetch(self, batches):
        """The next of `batches`; a step begins with its first one, and what the loader makes it wait for it counts."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        self.begun = self.begun or asked
        return batch

    def waiting(self):
        """Share of the steps since the log's last line that went by in waiting for data, 0..1."""
        return self.waited / max(self.worked, 1e-9)

    def write(self, record):
        """Append one JSON line. Raises UserError when the disk is full."""
        self.waited = self.worked = 0.0
        if self.main:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}.") from None

    def seconds(self):
        """Wall time since this process began to train."""
        return round(time.monotonic() - self.started, 2)

    def step(self, numbers):
        """Count one optimiser step; `numbers` is {name: float} for the bar or the plain line, evaluated lazily."""
        self.done += 1
        now = time.monotonic()
        self.worked, self.begun = self.worked + now - (self.begun or now), None
        if self.bar:
            self.bar.update()
            if now - self.shown > 0.5:
                self.bar.set_postfix_str(_line(numbers()))
                self.shown = now
        elif self.main and (now - self.shown > self.plain_every or self.done == self.total):
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            self.say(f"step {self.done}/{self.total}, {_clock(now - self.started)} run, {_clock(left)} left, "
                     f"{_line(numbers())}")
            self.shown = now

    def truncate(self, step):
        """Drop the lines that an interrupted run wrote after the checkpoint of `step`, which will be written again."""
        if self.main and self.path.exists():
            kept = [line for line in _lines(self.path) if _record(line).get("step", float("inf")) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))


def read_log(folder):
    """The records of log.jsonl, {name: number}, oldest first; a line cut by a kill is skipped, and what is no number."""
    path = Path(folder) / "log.jsonl"
    return [record for record in map(_record, _lines(path) if path.exists() else []) if "step" in record]


def _lines(path):
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _record(line):
    try:
        return {name: value for name, value in json.loads(line).items() if isinstance(value, (int, float))}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _line(numbers):
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def memory(device):
    """Peak memory of the device in GB, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows, where the figure is left out
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
