"""A table of a paper as a list of rows, and the results that were measured of it.

The format of yaml/tables/*.yaml is described in common/reproduce.py. Measured results lie beside the table in
<table>.results.json; each carries a digest of its settings, and only those of the present settings are shown.
"""
import json
import math
import re
import shlex
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from common.config import REPOSITORY, UserError, load_yaml, nearest, write_text

EFFECTS = ("model", "loss", "data", "decode", "eval")
METRICS = ("mIoU", "oIoU", *(f"Pr@0.{i}" for i in range(1, 10)), "REC@0.5", "n", "CIDEr", "METEOR", "Rb-Acc", "H-Acc",
           "gIoU", "cIoU", "N-acc", "T-acc")
NESTED = ("pointing", "by_kind", "by_size", "by_length", "by_objects", "classes")  # dotted: pointing.H_mask
NO_PERCENT = ("CIDEr", "METEOR")  # small numbers, printed with a digit more
KEPT = ("row", "dataset", "seed", "settings", "scores", "commands", "folder", "seconds", "date", "machine", "commit")
ROW_NAME, IN_FLAGS = re.compile(r"[\w+.-]+"), re.compile(r"\{([\w+.-]+)\}")


# ---- the format ---------------------------------------------------------------------------------------------

@dataclass
class Column:
    """Scores of one split: trained on `dataset`, scored on the same corpus or, with `on`, on another."""
    split: str
    metrics: list
    dataset: str = ""
    on: str = ""
    name: str = ""


@dataclass
class Embedded:
    """What runs instead on an embedded corpus."""
    flags: str
    columns: list = field(default_factory=list)
    check: str = ""


@dataclass
class Row:
    """One line of the table; see common/reproduce.py for what each key means."""
    name: str
    label: str = ""
    flags: str = ""
    embedded_flags: str = None
    embedded: bool = True
    real: bool = True
    ablates: str = ""
    effect: str = ""
    run_of: str = ""
    stage: str = ""
    eval: str = None
    embedded_eval: str = None
    trained_on: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)
    remark: str = ""
    built: bool = True
    x: float = None
    check: str = ""


@dataclass
class Table:
    """A whole file."""
    paper: str
    where: str
    caption: str
    script: str
    columns: list
    rows: list
    flags: str = ""
    datasets: dict = field(default_factory=dict)
    embedded: dict = field(default_factory=dict)
    remark: str = ""
    plot: dict = field(default_factory=dict)

    def row(self, name):
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def columns_of(self, dataset, row=None):
        """The columns that a run on `dataset` fills; `row`: what this row is scored on, nothing where it has another corpus."""
        if row is not None and dataset in row.trained_on:
            return []
        entry = self.embedded.get(dataset)
        return entry.columns if entry else [column for column in self.columns if column.dataset == dataset]

    def script_path(self):
        """The training script's file."""
        return REPOSITORY / self.script

    def words(self, row, dataset):
        """The flags of a row on a corpus, as words; {row} still stands for other rows' folders."""
        entry = self.embedded.get(dataset)
        own = row.flags if entry is None or row.embedded_flags is None else row.embedded_flags
        return shlex.split(f"{entry.flags if entry else f'{self.flags} {self.datasets.get(dataset) or str()}'} {own}")

    def scoring(self, row, dataset):
        """The flags with which eval.py scores a row on a corpus, as words, {row} as in `words`; None: training's own score."""
        flags = row.embedded_eval if dataset in self.embedded and row.embedded_eval is not None else row.eval
        return None if flags is None else shlex.split(flags)

    def needs(self, row, dataset):
        """The rows whose runs this one uses."""
        words = [] if row.run_of else self.words(row, dataset)
        names = [name for word in words + (self.scoring(row, dataset) or []) for name in IN_FLAGS.findall(word)]
        return [self.row(name) for name in dict.fromkeys(filter(None, [row.run_of, *names])) if name != row.name]


def load_table(path):
    """Read and check one file of yaml/tables/. Raises UserError that names the file, the fault and the nearest name."""
    path = Path(path)
    table = _build(Table, load_yaml(path), path)
    table.path, table.name = path, path.stem
    if not table.script_path().is_file():
        known = [script.name for script in REPOSITORY.glob("train_*.py")]
        raise UserError(f"{path}: script {table.script} does not exist{nearest(table.script, known)}.")
    table.columns = _columns(table.columns, "", path)
    for column in table.columns:
        if not column.dataset:
            raise UserError(f"{path}: column {column.name!r} names no dataset.")
    among(f"{path}, datasets", table.datasets, {column.dataset for column in table.columns})
    among(f"{path}, plot", table.plot, ("x",))
    every = list(dict.fromkeys(metric for column in table.columns for metric in column.metrics))
    for name, entry in table.embedded.items():
        entry = table.embedded[name] = _build(Embedded, entry, path, f"embedded {name}")
        entry.columns = _columns(entry.columns or [{"split": "val", "metrics": every}], name, path)
    if not isinstance(table.rows, list) or not table.rows:
        raise UserError(f"{path} has no rows.")
    table.rows = [_build(Row, row, path, f"row {i + 1}") for i, row in enumerate(table.rows)]
    names = [row.name for row in table.rows]
    for row in table.rows:
        _check_row(table, row, names)
    for row in table.rows:
        _check_order(table, row, ())
    return table


def _build(kind, mapping, path, where=""):
    """`mapping` as a dataclass, its keys and types checked."""
    where = f"{path}, {where}" if where else str(path)
    if not isinstance(mapping, dict):
        raise UserError(f"{where} is no list of `key: value`.")
    known = {item.name: item for item in fields(kind)}
    mapping = {key: value for key, value in mapping.items() if value is not None or key not in known}
    for key, value in mapping.items():
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}{nearest(str(key), list(known))}.")
        wanted = {float: (int, float)}.get(known[key].type, known[key].type)
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise UserError(f"{where}: {key} must be {known[key].type.__name__}, got {value!r}.")
    missing = [name for name, item in known.items()
               if item.default is MISSING and item.default_factory is MISSING and name not in mapping]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}.")
    return kind(**mapping)


def among(where, names, known):
    """Raise UserError where one of `names` is not among the known ones."""
    for name in names:
        if name not in known:
            raise UserError(f"{where}: there is no {name!r}{nearest(str(name), list(known))}.")


def words_of(where, text):
    """Flags as words. Raises UserError where a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}: the flags {text!r} cannot be read ({error}).") from None


def refuse_set(where, words):
    """Raise UserError for a flag that the runner sets itself."""
    for word in words:
        if word.split("=")[0] in ("--dataset", "--data-root", "--out", "--seed", "--eval-splits", "--resume", "--name"):
            raise UserError(f"{where}: {word} is set by the runner.")


def _columns(entries, dataset, path):
    columns = [_build(Column, entry, path, f"column {i + 1}") for i, entry in enumerate(entries)]
    for column in columns:
        column.dataset = column.dataset or dataset
        column.on = column.on or column.dataset
        column.name = column.name or f"{column.on} {column.split}"
        if not column.metrics:
            raise UserError(f"{path}: column {column.name!r} has no metrics.")
        among(f"{path}, column {column.name!r}, metrics",
               [m for m in column.metrics if str(m).split(".")[0] not in NESTED], METRICS)
    if not columns or len({column.name for column in columns}) < len(columns):
        raise UserError(f"{path}: columns need names that differ, and there must be one.")
    return columns


def _check_row(table, row, names):
    where = f"{table.path}, row {row.name!r}"
    faults = [
        (not ROW_NAME.fullmatch(row.name) or row.name.startswith("."), "a name has letters, digits and _ + - . only"),
        (names.count(row.name) > 1, "the name stands twice"),
        (bool(row.ablates) != bool(row.effect), "`ablates` and `effect` go together"),
        (row.effect and row.effect not in EFFECTS, f"effect is one of {', '.join(EFFECTS)}{nearest(row.effect, EFFECTS)}"),
        (row.ablates == row.name or row.run_of == row.name, "a row cannot stand for itself"),
        (not row.built and (row.flags or row.ablates or row.run_of or row.eval is not None),
         "what is not built has no flags, eval, run_of or ablates"),
        (row.run_of and (row.flags or row.embedded_flags), "a row with run_of trains nothing and has no flags"),
        (row.embedded_eval is not None and row.eval is None, "`embedded_eval` takes the place of `eval`, which it lacks"),
        (row.trained_on and (row.published or row.ablates or row.run_of or row.eval is not None),
         "what is trained on another corpus has no scores in the table: no published, ablates, run_of or eval"),
        (row.run_of and row.eval is None and not row.stage, "run_of needs `eval` or `stage`, or it is that row again"),
    ]
    for found, what in faults:
        if found:
            raise UserError(f"{where}: {what}.")
    for text in (row.flags, row.embedded_flags, row.eval, row.embedded_eval, row.check, table.flags,
                 *map(str, table.datasets.values()), *(f"{entry.flags} {entry.check}" for entry in table.embedded.values())):
        words = words_of(where, text or "")
        refuse_set(where, words)
        among(f"{where}, flags", [name for word in words for name in IN_FLAGS.findall(word)], names)
    among(f"{where}, ablates and run_of", filter(None, (row.ablates, row.run_of)), names)
    for name in filter(None, (row.ablates, row.run_of)):
        if not table.row(name).built or name == row.run_of and table.row(name).run_of:
            raise UserError(f"{where}: {name!r} trains nothing itself.")
    columns = {column.name: column for column in table.columns}
    among(f"{where}, trained_on", row.trained_on, {*table.embedded, *(column.dataset for column in columns.values())})
    among(f"{where}, published", row.published, columns)
    for name, values in row.published.items():
        values = row.published[name] = values if isinstance(values, list) else [values]
        if len(values) != len(columns[name].metrics):
            raise UserError(f"{where}: {name} has {len(values)} published figures for the {len(columns[name].metrics)} "
                            f"metrics {', '.join(columns[name].metrics)}.")
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))
                                      or not math.isfinite(value)):
                raise UserError(f"{where}: the published figure {value!r} under {name} is no number.")


def _check_order(table, row, above):
    """Raise UserError where rows need each other in a circle."""
    if row.name in above:
        raise UserError(f"{table.path}: rows need each other in a circle: {' -> '.join([*above, row.name])}.")
    for dataset in [*table.embedded, table.columns[0].dataset]:
        for needed in table.needs(row, dataset):
            _check_order(table, needed, (*above, row.name))


# ---- results ------------------------------------------------------------------------------------------------

def results_path(table_path):
    """Where the measured results of a table lie."""
    return Path(table_path).with_suffix(".results.json")


def load_results(path):
    """The list of results in `path`; empty where there is no file. Raises UserError for a damaged one."""
    if not Path(path).is_file():
        return []
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        for entry in found:
            for key in KEPT:
                entry[key]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of results ({type(error).__name__}: {error}); remove it or restore it.") from None


def store(table, entry):
    """Put one result into the table's file, in the place of the same row's with the same settings, corpus and seed."""
    path = results_path(table.path)
    key = lambda e: (e["dataset"], e["row"], e["settings"], e["seed"])  # noqa: E731
    kept = [other for other in load_results(path) if key(other) != key(entry)] + [entry]
    order = {row.name: i for i, row in enumerate(table.rows)}
    kept.sort(key=lambda e: (e["dataset"], order.get(e["row"], len(order)), e["settings"], e["seed"]))
    write_text(path, json.dumps({"table": table.name, "results": kept}, indent=1) + "\n")


def is_complete(entry, columns):
    """Whether a result holds every score of `columns`."""
    return all(metric in entry["scores"].get(f"{column.on} {column.split}", {})
               for column in columns for metric in column.metrics)


def shown(value, metric, sign=""):
    """A score, or with sign "+" a difference, with as many digits as papers print of that metric."""
    return f"{value:{sign}.{3 if metric in NO_PERCENT else 2}f}"


def flat(summary, prefix=""):
    """The numbers of a score file by name, nested ones dotted; without those that tell how long it took."""
    out = {}
    for key, value in summary.items():
        if isinstance(value, dict) and key != "settings":
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seconds":
            out[prefix + key] = value
    return out
