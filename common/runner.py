"""Runs the jobs of plans as child processes: some side by side, each logged, its failure survived, its end waited for."""
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common.config import UserError, write_text
from common.plans import Job, Plan, row_facts
from common.tables import shown

SAY_EVERY = 30    # seconds between lines of progress where stderr is no terminal
GRACE = 120       # seconds that an interrupted row has to end its step and save
LAST_LINES = 15   # of a failed row's log


@dataclass
class Running:
    """A job whose commands run one after the other."""
    plan: Plan
    job: Job
    gpus: str
    lock: object
    left: list
    earlier: float                   # seconds of interrupted attempts
    process: subprocess.Popen = None
    log: Path = None
    at: int = 0                      # where in the log this attempt began
    began: float = field(default_factory=time.monotonic)

    def seconds(self):
        """Wall time of the row, over all attempts."""
        return self.earlier + time.monotonic() - self.began


def begin(plan, job, gpus):
    """Lock the job's folder and start its first command. Raises UserError where the folder is in use."""
    folder, digest = plan.folder(job), plan.settings(plan.table.row(job.row), job.dataset)
    lock, found = hold(folder), row_facts(folder)  # held first: a folder that is in use is not moved, either
    if found.get("settings", digest) != digest:
        aside = folder.with_name(f"{folder.name}_{found['settings']}")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}_{int(time.time())}")
        os.replace(folder, aside)
        print(f"{folder} was made with other settings; it is now {aside}", flush=True)
        lock.close()
        lock, found = hold(folder), {}
    log = folder / "row.log"
    log.touch()  # it stays empty where a row is the score of another's stage, which no command makes
    running = Running(plan, job, gpus, lock, plan.commands(job), found.get("seconds", 0.0), log=log,
                      at=log.stat().st_size)
    note(running)
    start_next(running)
    return running


def hold(folder):
    """The open lock file of a folder, made where it is not there. Raises UserError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "row.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the children inherit it, and hold it when this process is killed
    except OSError:
        lock.close()
        raise UserError(f"{folder} is in use by another process.") from None
    return lock


def note(running):
    """Write down the settings and the seconds so far of a job."""
    digest = running.plan.settings(running.plan.table.row(running.job.row), running.job.dataset)
    write_text(running.plan.folder(running.job) / "row.json",
               json.dumps({"settings": digest, "seconds": round(running.seconds(), 1)}))


def start_next(running):
    """Start the next command of a job, its output appended to row.log."""
    if not running.left:  # the score of a stage: nothing to do but to read it
        running.process = None
        return
    words = running.left.pop(0)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": running.gpus} if running.gpus else {})
    with open(running.log, "ab") as log:
        log.write(f"$ {running.plan.printed(words)}\n".encode())
        log.flush()
        try:
            running.process = subprocess.Popen(running.plan.started(words), stdin=subprocess.DEVNULL, stdout=log,
                                               stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                                               pass_fds=[running.lock.fileno()])
        except OSError as error:
            raise UserError(f"{words[0]} cannot be started with --launcher {running.plan.args.launcher!r}: "
                            f"{error.strerror}.") from None


def tail(path, lines, since=0):
    """The last lines of a log, and of what is redrawn in place only the last state."""
    try:
        with open(path, "rb") as file:
            file.seek(max(since, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()][-lines:]


def end(running):
    """Store the result of a job whose commands all ended well, and return it. Raises UserError where a score is missing."""
    plan, job = running.plan, running.job
    with open(running.log, "rb") as log:
        log.seek(running.at)
        said = named_by_eval(log.read().decode("utf-8", "replace"))
    facts = made_by(plan.run_folder(job))
    machine = "; ".join(facts[key] for key in ("cpu", "gpu") if facts.get(key, "none") != "none") or "unknown"
    entry = {"row": job.row, "dataset": job.dataset, "seed": job.seed,
             "settings": plan.settings(plan.table.row(job.row), job.dataset), "scores": plan.scores(job, said),
             "commands": [plan.printed(words) for words in plan.commands(job)], "folder": str(plan.run_folder(job)),
             "seconds": round(running.seconds(), 1), "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
             "machine": machine, "commit": facts.get("commit", "unknown")}
    plan.keep(entry)
    return entry


def named_by_eval(log):
    """The score files that the eval.py commands of a log say they wrote, in order; training scores its own, too."""
    commands = re.split(r"^\$ ", log, flags=re.M)
    return [file for of in commands if " eval.py " in of.partition("\n")[0]
            for file in re.findall(r"^scores: (.+)$", of, re.M)]


def made_by(folder):
    """What the env.txt of a run folder, or of its last stage, says: {cpu, gpu, commit, …}."""
    files = [path for path in (folder / "env.txt", *folder.glob("*/env.txt")) if path.is_file()]
    text = max(files, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8") if files else ""
    return dict(line.partition(": ")[::2] for line in text.splitlines())


def stop(running):
    """End the children of all running jobs: ask, wait for the end of their step, then kill; a second Ctrl-C does not wait."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for one in running:
        if one.process and one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for one in running:
        try:
            if one.process:
                one.process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        note(one)
        one.lock.close()


class Runner:
    """Runs every job of some plans, at most --jobs at a time; `failed` lists (plan, job, reason)."""

    def __init__(self, plans, args):
        self.running, self.failed, self.ended, self.waiting, self.known = [], [], 0, [], []
        self.free = [args.gpus[i % len(args.gpus)] if args.gpus else "" for i in range(args.jobs)]
        self.slots, self.shown = args.jobs, time.monotonic()
        for plan in plans:
            wanted, done = plan.jobs()
            self.waiting += [(plan, job) for job in wanted]
            self.known += [entry["seconds"] for dataset in plan.datasets for entry in plan.results(dataset)
                           if not plan.table.row(entry["row"]).run_of]
            print(f"{plan.table.name}: {done} results are there, {len(wanted)} to make", flush=True)
        self.total = len(self.waiting)

    def run(self):
        """Until nothing is left to do. On any way out before, the children are ended and what they saved is kept."""
        try:
            while self.waiting or self.running:
                self.start()
                self.look_after()
                self.say()
                if self.running:
                    time.sleep(0.1)
        except BaseException:
            stop(self.running)
            raise

    def start(self):
        """Start jobs whose needs are met, while there is room."""
        for plan, job in list(self.waiting) if self.free else ():
            needed = plan.needed(job)
            if any(item in self.waiting or any((one.plan, one.job) == item for one in self.running) for item in needed):
                continue
            self.waiting.remove((plan, job))
            broken = next((of for p, of, _ in self.failed if (p, of) in needed), None)
            if broken:
                self.fail(plan, job, f"it needs {broken}")
            elif plan.is_done(job) and plan.has_run(job):
                self.ended += 1  # another table has just made it
            else:
                print(f"begin {plan.table.name}: {job}", flush=True)
                gpus = self.free.pop(0)
                try:
                    self.running.append(begin(plan, job, gpus))
                except UserError as error:
                    self.free.append(gpus)
                    self.fail(plan, job, error)
            if not self.free:
                return

    def look_after(self):
        """Go on with the jobs whose command has ended: their next command, their result, or their failure."""
        for one in list(self.running):
            status = one.process.poll() if one.process else 0
            if status is None:
                continue
            try:
                if status:
                    raise UserError(f"exit status {status}")
                if one.left:
                    start_next(one)
                    continue
                entry = end(one)
                self.ended += 1
                self.known.append(entry["seconds"])
                columns = one.plan.table.columns_of(one.job.dataset, one.plan.table.row(one.job.row))
                first = [f"{c.metrics[0]} {shown(entry['scores'][f'{c.on} {c.split}'][c.metrics[0]], c.metrics[0])} on {c.on} "
                         f"{c.split}, " for c in columns[:1]]
                print(f"ended {one.plan.table.name}: {one.job}: {''.join(first)}{clock(entry['seconds'])}", flush=True)
            except UserError as error:
                self.fail(one.plan, one.job, error, tail(one.log, LAST_LINES, one.at))
            note(one)
            one.lock.close()
            self.running.remove(one)
            self.free.append(one.gpus)

    def fail(self, plan, job, reason, lines=()):
        """Note a failed job and say how its log ended."""
        self.failed.append((plan, job, reason))
        print(f"FAILED {plan.table.name}: {job}: {reason} (log: {plan.folder(job) / 'row.log'})", flush=True)
        for line in lines:
            print(f"    | {line}", flush=True)

    def say(self):
        """Now and then one line: how many rows, the time left as far as earlier ones tell, and what the running ones said."""
        terminal = sys.stderr.isatty()
        if not self.running or time.monotonic() - self.shown < (1 if terminal else SAY_EVERY):
            return
        self.shown, left = time.monotonic(), ""
        for one in self.running:
            note(one)  # when this process is killed, no more of a row's time is lost than since now
        if self.known:
            mean = sum(self.known) / len(self.known)
            seconds = mean * len(self.waiting) + sum(max(0.0, mean - one.seconds()) for one in self.running)
            left = f", about {clock(seconds / min(self.slots, len(self.waiting) + len(self.running)))} left"
        states = "; ".join(f"{one.job.row} seed {one.job.seed}: {(tail(one.log, 1, one.at) or ['starts'])[0]}"
                           for one in self.running)
        line = f"{self.ended} of {self.total} rows{left} | {states}"
        print(f"\r{line[:118]:118}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def clock(seconds):
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
