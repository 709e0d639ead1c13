"""The rows of a table as commands: which there are, in which folders, with which settings, and which results are there."""
import fcntl
import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from common import tables
from common.config import REPOSITORY, Parser, UserError, load_yaml

IDLE = ("dataset", "data_root", "eval_splits", "eval_batch_size", "workers", "device", "log_every",
        "save_every")  # settings that decide no number


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
        self.table, self.args, self.launcher = table, args, tables.words_of("--launcher", args.launcher)
        self.extra = tables.words_of("--flags", args.flags)
        tables.refuse_set("--flags", self.extra)
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
                and (row.embedded if dataset in self.table.embedded else row.real)]

    def folder(self, job):
        """The run folder of a job."""
        return self.out / job.dataset / f"{job.row}_s{job.seed}"

    def run_folder(self, job):
        """The folder with the run that a job scores: its own, or that of `run_of`, or one with equal settings elsewhere."""
        row = self.base(job)
        own, digest = self.folder(Job(row.name, job.dataset, job.seed)), self.settings(row, job.dataset)
        if trained(own, digest):
            return own
        return next((Path(entry["folder"]) for _, entry in self.stored(row, job.dataset)
                     if entry["seed"] == job.seed and trained(entry["folder"], digest)), own)

    def has_run(self, job):
        """Whether the run that a job scores is there, made with the present settings."""
        return trained(self.run_folder(job), self.settings(self.base(job), job.dataset))

    def base(self, job):
        """The row whose run a job scores."""
        row = self.table.row(job.row)
        return self.table.row(row.run_of) if row.run_of else row

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
                    needed.get(row.run_of), *names_files(scoring or [])]
            self.digests[key] = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        return self.digests[key]

    def stored(self, row, dataset):
        """[(table's name, result)] under the row's present settings: this table's first, then those of the tables beside it."""
        own, digest = tables.results_path(self.table.path), self.settings(row, dataset)
        found = []
        for path in [own, *sorted(set(own.parent.glob("*.results.json")) - {own})]:
            found += [(path.name.removesuffix(".results.json"), entry) for entry in tables.load_results(path)
                      if (entry["dataset"], entry["settings"]) == (dataset, digest)
                      and (path != own or entry["row"] == row.name)]
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
        launcher = [part for word in self.launcher for part in ours.get(word, [word])]
        return [*launcher, *(["--"] if self.torchrun() else []), str(REPOSITORY / words[0]), *words[1:]]

    def torchrun(self):
        """Whether torchrun starts the scripts: it would take their --run for its own --run-path but for a lone --."""
        return any(Path(word).name in ("torchrun", "torch.distributed.run") for word in self.launcher)

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
            if not self.has_run(other) or not self.is_done(other):
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
        with open(self.table.path, "r+b") as lock:  # beside the results, as runners with other --out write them, too
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
                names = [f"{name}{suffix}.json" for suffix in ("_reg", "_reg_listener-*", "")]
                order = [] if row.stage else stages_of(self.table.script_path())  # of two stages the later one's score counts
                stages = [path for stage in order for of in names for path in folder.glob(f"{stage}/eval/{of}")]
                files = stages + [path for of in names for path in folder.glob(f"eval/{of}")]
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
                                f"{', '.join(map(str, files)) or f'none below {self.run_folder(job)}'}.")
            found[key] = found.get(key, {}) | numbers
        return found


def trained(folder, digest):
    """Whether a run folder holds weights, itself or in a stage, and they were not made with other settings than `digest`."""
    weights = any(Path(folder).glob("best.pt")) or any(Path(folder).glob("*/best.pt"))
    return weights and row_facts(folder).get("settings", digest) == digest


def row_facts(folder):
    """What the runner wrote down of a run folder, {settings, seconds}; empty where it made none there."""
    try:
        return json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def stages_of(script):
    """The stages that a script names in its `STAGES`, in their order; none where it has none."""
    found = re.search(r"^STAGES = \((.*?)\)", script.read_text(encoding="utf-8"), re.M | re.S)
    return re.findall(r'"([^"]+)"', found[1]) if found else []


def settings_files(script, words):
    """What the yaml files of a command say: those of --yaml, else the script's own, and what a flag of it would add."""
    parser = Parser("")
    parser.add_argument("--yaml", nargs="+", default=[])
    given = parser.parse_known_args(words)[0].yaml
    own = dict(re.findall(r'^(\w*YAML) = "([^"]+)"', script.read_text(encoding="utf-8"), re.M))
    used = given + [path for name, path in own.items() if name != "EMBEDDED_YAML" and not (given and name == "YAML")]
    return [{key: value for key, value in load_yaml(path).items() if key.replace("-", "_") not in IDLE} for path in used]


def names_files(words):
    """What the file of eval.py's --names says, in a list; empty where the words have no such flag."""
    parser = Parser("")
    parser.add_argument("--names", default="")
    given = parser.parse_known_args(words)[0].names
    return [sorted(map(str, load_yaml(given).items()))] if given else []


def read_scores(path):
    """A score file, or an empty dictionary where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
