"""A table of a paper as a list of rows, what was measured of it, and how the two look side by side.

The format of yaml/tables/*.yaml is described in common/reproduce.py. Measured results lie beside the table in
<table>.results.json; each carries a digest of its settings, and only those of the present settings are shown.
"""
import html
import json
import math
import re
import shlex
import statistics
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from common import pictures
from common.config import REPOSITORY, UserError, load_yaml, nearest, write_text

EFFECTS = ("model", "loss", "data", "decode", "eval")
METRICS = ("mIoU", "oIoU", *(f"Pr@0.{i}" for i in range(1, 10)), "REC@0.5", "n", "CIDEr", "METEOR", "Rb-Acc", "H-Acc", "class mIoU",
           "gIoU", "cIoU", "N-acc", "T-acc")
NESTED = ("pointing", "by_kind", "by_size", "by_length", "by_source", "subsets", "classes")  # dotted: pointing.H_mask
NO_PERCENT = ("CIDEr",)
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
    for text in (row.flags, row.embedded_flags, row.eval, row.embedded_eval, row.check, table.flags, *map(str, table.datasets.values())):
        try:
            words = shlex.split(text or "")
        except ValueError as error:
            raise UserError(f"{where}: the flags {text!r} cannot be read ({error}).") from None
        for word in words:
            if word.split("=")[0] in ("--dataset", "--data-root", "--out", "--seed", "--eval-splits", "--resume", "--name"):
                raise UserError(f"{where}: {word} is set by the runner.")
            among(f"{where}, flags", IN_FLAGS.findall(word), names)
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
            entry["scores"], entry["seed"], entry["row"], entry["dataset"], entry["settings"]
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


def flat(summary, prefix=""):
    """The numbers of a score file by name, nested ones dotted; without those that tell how long it took."""
    out = {}
    for key, value in summary.items():
        if isinstance(value, dict) and key != "settings":
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seconds":
            out[prefix + key] = value
    return out


# ---- side by side -------------------------------------------------------------------------------------------

def values_of(results, row, column, metric):
    """{seed: score} of one cell."""
    scores = {e["seed"]: e["scores"].get(f"{column.on} {column.split}", {}).get(metric) for e in results
              if e["row"] == row.name}
    return {seed: value for seed, value in scores.items() if value is not None}


def published_of(table, row, column, metric):
    """(figure, its column) as published for the cell; on an embedded corpus, of the first column with that metric."""
    own = [other for other in table.columns if other.name == column.name and other.dataset == column.dataset] \
        or [other for other in table.columns if metric in other.metrics]
    for other in own:
        if metric in other.metrics and other.name in row.published:
            return row.published[other.name][other.metrics.index(metric)], other
    return None, own[0] if own else None


def spread(values):
    """`63.10 ± 0.42`: mean and sample deviation of a list, or what there is of them."""
    if not values:
        return "not run"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def verdict(differences, published):
    """Whether measured differences (paired by seed) bear out a published one, by the 95 % t interval of their mean."""
    if not differences or not published:
        return ""
    if len(differences) < 2:
        return "one seed"
    mean, half = statistics.fmean(differences), 0.0
    if any(d != differences[0] for d in differences):
        from scipy import stats  # slow to load, and few calls need it
        half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= half:
        return "cannot tell"
    return "yes" if mean * published > 0 else "no"


def blocks(table, dataset, results, all_metrics=True):
    """The table on one corpus: (title, header, lines of cells) for each column; without `all_metrics` its first metric."""
    embedded, out = dataset in table.embedded, []
    for column in table.columns_of(dataset):
        lines, metrics = [], column.metrics if all_metrics else column.metrics[:1]
        header = ["row", "seeds"]
        for metric in metrics:
            _, source = published_of(table, table.rows[0], column, metric)
            header += [metric, f"published, {source.name if source else '-'}"] if embedded else \
                [metric, "published", "difference"]
        ablating, head = any(row.ablates for row in table.rows), metrics[0]
        if ablating:
            header += ["against", f"{head} measured", "published", "borne out"]
        for row in table.rows:
            if dataset in row.trained_on:
                continue
            label = row.label or row.name
            first = values_of(results, row, column, head)
            cells = [label, str(len(first)) if row.built else ""]
            for metric in metrics:
                measured = list(values_of(results, row, column, metric).values())
                figure, _ = published_of(table, row, column, metric)
                absent = "not built" if not row.built else "not here" if embedded and not row.embedded else "not run"
                cells += [spread(measured) if measured else absent, "-" if figure is None else f"{figure:.2f}"]
                if not embedded:
                    cells.append(f"{statistics.fmean(measured) - figure:+.2f}" if measured and figure is not None else "-")
            if ablating:
                cells += _against(table, row, column, head, results) if row.ablates else ["", "", "", ""]
            lines.append(cells)
        trained = "" if column.on == dataset else f", trained on {dataset}"
        out.append((f"{column.name} ({column.on} {column.split}{trained})", header, lines))
    return out


def _against(table, row, column, metric, results):
    """The cells that compare a row with the one it ablates: name, measured and published difference, verdict."""
    other = table.row(row.ablates)
    mine, theirs = values_of(results, row, column, metric), values_of(results, other, column, metric)
    paired = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    figures = [published_of(table, of, column, metric)[0] for of in (row, other)]
    published = None if None in figures else figures[0] - figures[1]
    measured = spread(paired) if paired else "not run"
    return [other.label or other.name, measured if measured.startswith(("-", "n")) else f"+{measured}",
            "-" if published is None else f"{published:+.2f}", verdict(paired, published)]


def notes_of(table):
    """Remarks of the table and of its rows, as sentences."""
    return ([table.remark] if table.remark else []) + [f"{row.label or row.name}: {row.remark}" for row in table.rows
                                                       if row.remark]


def as_text(table, dataset, results):
    """For the terminal: the first metric of each column, in aligned columns."""
    out = [f"{table.paper}, {table.where}: {table.caption}"]
    for title, header, lines in blocks(table, dataset, results, all_metrics=False):
        widths = [max(map(len, column)) for column in zip(header, *lines)]
        out += ["", title] + ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                                        for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
                              for line in (header, *lines)]
    return "\n".join(out)


def as_markdown(table, datasets, results):
    """The whole table, a section for each corpus."""
    out = [f"# {table.paper}, {table.where}", "", table.caption + ".", ""]
    for dataset in datasets:
        for title, header, lines in blocks(table, dataset, results[dataset]):
            out += [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                    *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]
        out += _provenance(results[dataset])
    return "\n".join(out + [*(f"- {note}" for note in notes_of(table)), "", EXPLAINED, ""])


EXPLAINED = ("Measured: mean ± sample deviation over the seeds. Borne out: yes or no where the 95 % t interval of the measured "
             "differences, paired by seed, leaves 0 out, on the published side or on the other.")


def _provenance(results):
    """Sentences: what made these results, on which machines and when."""
    lines = []
    for entry in results:
        source = f" (measured for {entry['from']})" if entry.get("from") else ""
        lines.append(f"- {entry['row']}, seed {entry['seed']}{source}: {entry['seconds']:.0f} s, {entry['date']}, "
                     f"{entry['machine']}, commit {entry['commit']}: " + " && ".join(f"`{c}`" for c in entry["commands"]))
    return lines + [""] if lines else []


def as_page(table, datasets, results, curves):
    """One self-contained HTML page: tables, plots, and how each number was made. curves: {row: [(step, score)]}."""
    escape, parts = html.escape, [f"<header><h1>{html.escape(f'{table.paper}, {table.where}')}</h1></header>",
                                  f"<p>{html.escape(table.caption)}</p>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in [*notes_of(table), EXPLAINED]]
    for dataset in datasets:
        for column, (title, header, lines) in zip(table.columns_of(dataset), blocks(table, dataset, results[dataset])):
            head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
            body = "".join("<tr>" + f'<th scope="row">{escape(line[0])}</th>'
                           + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:]) + "</tr>" for line in lines)
            parts.append(f'<h2>{escape(title)}</h2><div class="scroll"><table class="scores"><thead><tr>{head}</tr></thead>'
                         f"<tbody>{body}</tbody></table></div>")
            parts.append(f'<div class="grid curves">{"".join(_plots(table, dataset, column, results[dataset]))}</div>')
        made = "".join(f"<li>{escape(line.lstrip('- '))}</li>" for line in _provenance(results[dataset]) if line)
        parts.append(f"<details><summary>{len(results[dataset])} runs on {escape(dataset)}</summary><ul>{made}</ul></details>")
    if any(curves.values()):
        plot = pictures.curve_svg(curves, "Validation, seed 0", "step", "mIoU, percent")
        parts.append(f'<h2>Training</h2><div class="grid curves">{plot}</div>')
    return pictures.page(f"{table.paper}, {table.where}", "\n".join(parts))


def _plots(table, dataset, column, results):
    """SVGs of one column's first metric: every row's seeds beside the published figure, and the curve of a figure."""
    metric = column.metrics[0]
    unit = metric if metric in NO_PERCENT else f"{metric}, percent"
    measured = {row.name: list(values_of(results, row, column, metric).values()) for row in table.rows}
    own = dataset not in table.embedded
    published = {row.name: published_of(table, row, column, metric)[0] if own else None for row in table.rows}
    yield pictures.dots_svg([(row.label or row.name, measured[row.name], published[row.name]) for row in table.rows],
                            column.name, unit)
    if table.plot:
        along = sorted((row for row in table.rows if row.x is not None), key=lambda row: row.x)
        lines = {"measured": [(row.x, statistics.fmean(measured[row.name])) for row in along if measured[row.name]]}
        if own:
            lines["published"] = [(row.x, published[row.name]) for row in along]
        yield pictures.curve_svg(lines, column.name, str(table.plot["x"]), unit)
