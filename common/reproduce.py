"""Train and score the rows of a paper's table, and print what was measured beside what was published.

    python -m common.reproduce yaml/tables/lts_table2.yaml --dataset refshapes --seeds 3      embedded corpus, two CPU cores
    python -m common.reproduce yaml/tables/pks_table9.yaml --dry-run                          only the commands
    python -m common.reproduce yaml/tables/pks_table9.yaml --dataset refcoco --launcher 'torchrun --nproc_per_node 4'
    python -m common.reproduce yaml/tables/*.yaml --check                                     do the rows' flags do anything?

Without --dataset: every corpus that the table's columns name. Rows run as commands, in runs/tables/<table>/<dataset>/<row>_s<seed>/
(row.log holds their output). What ended is kept in yaml/tables/<table>.results.json, to which later calls add rows and seeds;
a row that was interrupted goes on from its checkpoint; a row that fails is reported with the end of its log, the others
go on, and the exit status is 1. A result counts only under the settings it was made with (script, flags, contents of the yaml files,
corpus, seed); one that another table has under the same settings is taken over, not made again. The tables are printed
(first metric of each column) and written, whole, to runs/tables/<table>/table.md and table.html.

Several GPUs or machines: --launcher goes in front of every script, and is torchrun with its own flags, for example in a SLURM job
of four nodes with `srun --ntasks-per-node 1`, one process for each node:

    srun torchrun --nnodes 4 --nproc_per_node 8 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $HEAD:29500 -- train_lts.py …

--dry-run prints these lines with the given launcher, ready for a job file: one line trains or scores one row, lines of the
same row follow each other, and all can be given again after an interruption. --jobs N runs N rows side by side; with
--gpus 0,1 2,3 each of them has its own GPUs (and torchrun needs --standalone then, for a port of its own).

The format of yaml/tables/*.yaml (every key is checked, an unknown one is an error with the nearest name)
  paper, where, caption, remark   source, place in it, what it shows, what concerns the whole table (which IoU, misprints)
  script, flags      what trains the rows on real corpora; `flags` are common to all rows
  datasets           {corpus: further flags} for a corpus trained on
  columns            list of {name, dataset, split, metrics}: trained on `dataset`, scored on `split` of it or, with `on`, of another
                     corpus. metrics: keys of the score files that eval.py writes, dotted for nested ones (pointing.H_mask)
  embedded           {corpus: {flags, columns, check}}: what --dataset <corpus> runs; its flags take the place of `flags` and
                     `datasets`; columns default to split val with all metrics; `check`: more flags for --check
  plot               {x: label}: rows with `x` make a curve
  rows               list of
    name, label      short name (of the run folder), and what is printed
    flags            added to the table's; `{row}` in them is that row's run folder, of the same seed, which is then made before
    embedded_flags   take the place of the row's flags on embedded corpora; `embedded: false`: not there
    published        {column: figure or list of figures, one for each metric}; null where the paper has none
    ablates, effect  the row it is compared with, and what its flags act on: model, loss, data, decode or eval
    run_of           trains nothing: takes that row's run
    eval             flags with which eval.py scores the run; without it the score is the one that training leaves. `{row}` as in
                     flags; `embedded_eval` takes its place on embedded corpora
    trained_on       {corpus: another}: a row that others need, trained on another corpus than theirs; it has no scores
    stage            of a script with stages: the score of <run>/<stage>/
    built: false     somebody else's method, printed as "not built"
    x, remark, check place on the plot; misprint, guess, mixed metric; flags for --check of this row and of the one it ablates
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import tables
from common.config import REPOSITORY, Parser, UserError, load_yaml, run, write_text

SAY_EVERY = 30    # seconds between lines of progress where stderr is no terminal
GRACE = 120       # seconds that an interrupted row has to end its step and save
LAST_LINES = 15   # of a failed row's log
IDLE = ("dataset", "data_root", "eval_splits", "eval_batch_size", "workers", "device", "log_every", "save_every")  # decide no number


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


# ---- rows, settings, commands -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """One row on one corpus with one seed."""
    row: str
    dataset: str
    seed: int

    def __str__(self):
        return f"{self.row} on {self.dataset}, seed {self.seed}"


class Plan:
    """What the runner knows of one table: its rows, folders, settings and commands. `args` are the runner's flags."""

    def __init__(self, table, args):
        self.table, self.args, self.extra = table, args, shlex.split(args.flags)
        self.out = Path(args.out) / table.name if args.out and len(args.tables) > 1 else \
            Path(args.out or Path("runs") / "tables" / table.name)
        known = [*table.embedded, *(column.dataset for column in table.columns)]
        tables.among(f"{table.path}, --dataset", filter(None, [args.dataset]), known)
        tables.among(f"{table.path}, --rows", args.rows, [row.name for row in table.rows])
        self.datasets = [args.dataset] if args.dataset else list(dict.fromkeys(c.dataset for c in table.columns))
        self.digests = {}

    def rows(self, dataset):
        """The rows asked for that can run on `dataset`."""
        return [row for row in self.table.rows if row.built and (not self.args.rows or row.name in self.args.rows)
                and (row.embedded or dataset not in self.table.embedded)]

    def folder(self, job):
        """The run folder of a job."""
        return self.out / job.dataset / f"{job.row}_s{job.seed}"

    def run_folder(self, job):
        """The folder with the run that a job scores: its own, or that of `run_of`, or one with equal settings elsewhere."""
        own = self.folder(Job(self.table.row(job.row).run_of or job.row, job.dataset, job.seed))
        if not trained(own):
            row = self.table.row(self.table.row(job.row).run_of or job.row)
            return next((Path(entry["folder"]) for _, entry in self.stored(row, job.dataset)
                         if entry["seed"] == job.seed and trained(entry["folder"])), own)
        return own

    def settings(self, row, dataset):
        """A digest of all that decides a row's numbers, but for the seed and the code."""
        key = (row.name, dataset)
        if key not in self.digests:
            words, names = self.table.words(row, dataset) + self.extra, tables.IN_FLAGS
            scoring = self.table.scoring(row, dataset)
            needed = {of.name: self.settings(of, dataset) for of in self.table.needs(row, dataset)}
            what = [self.table.script_path().stem, [names.sub(lambda m: needed[m[1]], word) for word in words],
                    settings_files(self.table.script_path(), words), row.trained_on.get(dataset, dataset), row.stage,
                    scoring and shlex.join(names.sub(lambda m: needed.get(m[1], "own"), word) for word in scoring),
                    needed.get(row.run_of)]
            self.digests[key] = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        return self.digests[key]

    def stored(self, row, dataset):
        """[(table's name, result)] under the row's present settings: this table's first, then those of the tables beside it."""
        own, digest = tables.results_path(self.table.path), self.settings(row, dataset)
        found = []
        for path in [own, *sorted(set(own.parent.glob("*.results.json")) - {own})]:
            found += [(path.name.removesuffix(".results.json"), entry) for entry in tables.load_results(path)
                      if (entry["dataset"], entry["settings"]) == (dataset, digest) and (path != own or entry["row"] == row.name)]
        return found

    def results(self, dataset):
        """All stored results on a corpus under the present settings."""
        stored = tables.load_results(tables.results_path(self.table.path))
        digests = {row.name: self.settings(row, dataset) for row in self.table.rows if row.built}
        return [e for e in stored if e["dataset"] == dataset and e["settings"] == digests.get(e["row"])]

    def commands(self, job):
        """The lists of words that make one row: its training, where it has one, and its scoring by eval.py."""
        table, row = self.table, self.table.row(job.row)
        columns, scoring = table.columns_of(job.dataset, row), table.scoring(row, job.dataset)
        splits = list(dict.fromkeys(c.split for c in columns if c.on == job.dataset))
        folder, made = self.run_folder(job), []
        placed = lambda words: [tables.IN_FLAGS.sub(  # noqa: E731
            lambda m: str(self.run_folder(Job(m[1], job.dataset, job.seed))), word) for word in words]
        if not row.run_of:
            made.append([table.script, *placed(table.words(row, job.dataset)), *self.extra,
                         "--dataset", row.trained_on.get(job.dataset, job.dataset), "--data-root", self.args.data_root,
                         "--seed", str(job.seed), "--out", str(folder), "--eval-splits", *splits, "--resume"])
        for corpus in dict.fromkeys(c.on for c in columns):
            if scoring is not None or corpus != job.dataset:
                there = [] if corpus == job.dataset else ["--dataset", corpus, "--data-root", self.args.data_root]
                splits = list(dict.fromkeys(c.split for c in columns if c.on == corpus))
                made.append(["eval.py", "--run", str(folder / row.stage), *there, "--split", *splits,
                             *placed(scoring or [])])
        return made

    def printed(self, words):
        """A command as one types it."""
        return f"{self.args.launcher}{' --' if self.torchrun() else ''} {shlex.join(words)}"

    def started(self, words):
        """The same as the words of a process."""
        ours = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        launcher = [part for word in shlex.split(self.args.launcher) for part in ours.get(word, [word])]
        return [*launcher, *(["--"] if self.torchrun() else []), str(REPOSITORY / words[0]), *words[1:]]

    def torchrun(self):
        """Whether torchrun starts the scripts: it would take their --run for its own --run-path but for a lone --."""
        return "torchrun" in shlex.split(self.args.launcher)

    def jobs(self):
        """The jobs to run, in an order that has what they need in front, and how many results are there already."""
        wanted, done = [], 0
        for seed in range(self.args.seeds):
            for dataset in self.datasets:
                for row in self.rows(dataset):
                    if self.is_done(Job(row.name, dataset, seed)):
                        done += 1
                    else:
                        self.add(wanted, Job(row.name, dataset, seed))
        return wanted, done

    def needed(self, job):
        """[(this plan, job)] of the rows whose runs a job uses."""
        return [(self, Job(row.name, job.dataset, job.seed))
                for row in self.table.needs(self.table.row(job.row), job.dataset)]

    def add(self, wanted, job):
        """Append a job, and before it those whose runs it needs and that are not there."""
        for _, other in self.needed(job):
            if not trained(self.run_folder(other)) or not self.is_done(other):
                self.add(wanted, other)
        if job not in wanted:
            wanted.append(job)

    def is_done(self, job):
        """Whether the job's result is there with all its scores; one of another table is taken over."""
        row = self.table.row(job.row)
        columns = self.table.columns_of(job.dataset, row)
        for name, entry in self.stored(row, job.dataset):
            if entry["seed"] == job.seed and tables.is_complete(entry, columns):
                if name != self.table.name:
                    self.keep(entry | {"row": job.row, "from": entry.get("from") or f"{name}, {entry['row']}"})
                return True
        return False

    def keep(self, entry):
        """Store a result, one process at a time."""
        if self.args.dry_run:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "results.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tables.store(self.table, entry)

    def scores(self, job, said):
        """{corpus and split: {metric: number}} of a finished job; said: the score files that its eval.py named, in order.

        Raises UserError where one is missing.
        """
        row, found = self.table.row(job.row), {}
        for column in self.table.columns_of(job.dataset, row):
            if self.table.scoring(row, job.dataset) is None and column.on == job.dataset:
                folder, name = self.run_folder(job) / row.stage, f"{job.dataset}_{column.split}"
                names = [f"{name}{suffix}.json" for suffix in ("_reg", "")]
                stages = [] if row.stage else [path for of in names for path in folder.glob(f"*/eval/{of}")]
                files = sorted(stages, key=lambda path: path.stat().st_mtime) + [folder / "eval" / of for of in names]
            else:
                files = said
            key, numbers = f"{column.on} {column.split}", {}
            for file in files:
                summary = read_scores(file)
                if (summary.get("dataset"), summary.get("split")) == (column.on, column.split):
                    numbers |= tables.flat(summary)
            missing = [metric for metric in column.metrics if metric not in numbers]
            if missing:
                raise UserError(f"no score file of {key} has {', '.join(missing)}; looked at "
                                f"{', '.join(map(str, files)) or 'none'}.")
            found[key] = found.get(key, {}) | numbers
        return found


def trained(folder):
    """Whether a run folder holds weights, itself or in a stage."""
    return any(Path(folder).glob("best.pt")) or any(Path(folder).glob("*/best.pt"))


def settings_files(script, words):
    """What the yaml files of a command say: those of --yaml, else the script's own, and what a flag of it would add."""
    if "--yaml" in words:
        rest = words[words.index("--yaml") + 1:]
        given = rest[:next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]
    else:
        given = []
    own = dict(re.findall(r'^(\w*YAML) = "([^"]+)"', script.read_text(encoding="utf-8"), re.M))
    used = given + [path for name, path in own.items() if name != "EMBEDDED_YAML" and not (given and name == "YAML")]
    return [{key: value for key, value in load_yaml(path).items() if key.replace("-", "_") not in IDLE} for path in used]


def read_scores(path):
    """A score file, or an empty dictionary where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- running ------------------------------------------------------------------------------------------------

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
    try:
        found = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if folder.exists() and found.get("settings", digest) != digest:
        aside = folder.with_name(f"{folder.name}_{found['settings']}")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}_{int(time.time())}")
        os.replace(folder, aside)
        print(f"{folder} was made with other settings; it is now {aside}", flush=True)
        found = {}
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "row.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the children inherit it, and hold it when this process is killed
    except OSError:
        lock.close()
        raise UserError(f"{folder} is in use by another process.") from None
    log = folder / "row.log"
    running = Running(plan, job, gpus, lock, plan.commands(job), found.get("seconds", 0.0), log=log,
                      at=log.stat().st_size if log.is_file() else 0)
    note(running)
    start_next(running)
    return running


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
        said = re.findall(r"^scores: (.+)$", log.read().decode("utf-8", "replace"), re.M)
    facts = made_by(plan.run_folder(job))
    machine = "; ".join(facts[key] for key in ("cpu", "gpu") if facts.get(key, "none") != "none") or "unknown"
    entry = {"row": job.row, "dataset": job.dataset, "seed": job.seed,
             "settings": plan.settings(plan.table.row(job.row), job.dataset), "scores": plan.scores(job, said),
             "commands": [plan.printed(words) for words in plan.commands(job)], "folder": str(plan.run_folder(job)),
             "seconds": round(running.seconds(), 1), "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
             "machine": machine, "commit": facts.get("commit", "unknown")}
    plan.keep(entry)
    return entry


def made_by(folder):
    """What the env.txt of a run folder, or of its last stage, says: {cpu, gpu, commit, …}."""
    files = [path for path in (folder / "env.txt", *folder.glob("*/env.txt")) if path.is_file()]
    text = max(files, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8") if files else ""
    return dict(line.partition(": ")[::2] for line in text.splitlines())


def validation(folder):
    """[(step, mIoU)] of a run's log.jsonl; a line cut by a kill is skipped."""
    points = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                points += [(record["step"], record["val_mIoU"])] if "val_mIoU" in record else []
    return points


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
            elif plan.is_done(job) and trained(plan.run_folder(job)):
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
                first = [f"{c.metrics[0]} {entry['scores'][f'{c.on} {c.split}'][c.metrics[0]]:.2f} on {c.on} {c.split}, "
                         for c in one.plan.table.columns_of(one.job.dataset, one.plan.table.row(one.job.row))[:1]]
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
        """Now and then one line: how many rows, the time left as far as earlier rows tell, and what the running ones said last."""
        terminal = sys.stderr.isatty()
        if not self.running or time.monotonic() - self.shown < (1 if terminal else SAY_EVERY):
            return
        self.shown, left = time.monotonic(), ""
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


# ---- main ---------------------------------------------------------------------------------------------------

def show(plan):
    """Print the table and write it as Markdown and as a page."""
    table, results = plan.table, {dataset: plan.results(dataset) for dataset in plan.datasets}
    for dataset in plan.datasets:
        print("\n" + tables.as_text(table, dataset, results[dataset]))
        older = sum(e["dataset"] == dataset for e in tables.load_results(tables.results_path(table.path))) - len(results[dataset])
        if older:
            print(f"({older} results made with other settings are not shown)")
    curves = {}
    for entry in (entry for found in results.values() for entry in found if entry["seed"] == 0):
        points = validation(Path(entry["folder"]))
        if points and not table.row(entry["row"]).run_of:
            curves[f"{entry['row']} {entry['dataset']}" if len(results) > 1 else entry["row"]] = points
    write_text(plan.out / "table.md", tables.as_markdown(table, plan.datasets, results))
    write_text(plan.out / "table.html", tables.as_page(table, plan.datasets, results, curves))
    print(f"\ntable: {plan.out / 'table.md'}, {plan.out / 'table.html'}")


def main(argv=None):
    """Check, print or run the rows of the tables; returns the exit status."""
    args = get_parser().parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs are at least 1.")
    found = [tables.load_table(path) for path in args.tables]
    if args.check:
        from common.rowcheck import check
        for table in found:
            tables.among(f"{table.path}, --rows", args.rows, [row.name for row in table.rows])
        rows = [[(table, row) for row in table.rows if row.built and (row.name in args.rows or not args.rows)] for table in found]
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
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
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
