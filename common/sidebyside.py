"""A table of a paper beside what was measured of it: as text, as Markdown and as one self-contained HTML page."""
import html
import math
import statistics

from common import pictures
from common.tables import NO_PERCENT, shown

STANDS_FOR = {"refshapes": "refcoco", "refshapes+": "refcoco+", "refshapesg": "refcocog", "phraseshapes": "phrasecut",
              "vocshapes": "voc"}


def values_of(results, row, column, metric):
    """{seed: score} of one cell."""
    scores = {e["seed"]: e["scores"].get(f"{column.on} {column.split}", {}).get(metric) for e in results
              if e["row"] == row.name}
    return {seed: value for seed, value in scores.items() if value is not None}


def published_column(table, column, metric):
    """The paper's column beside a measured one: itself, or for an embedded corpus the first with that metric, of the corpus
    that it stands for and of its split where the table has them; None where the paper does not have the metric."""
    having = sorted((other for other in table.columns if metric in other.metrics), key=lambda other: other.split != column.split)
    itself = [other for other in having if other.name == column.name and other.dataset == column.dataset]
    kin = [other for other in having if other.dataset.split("_")[0] == STANDS_FOR.get(column.dataset)]
    return next(iter(itself + kin + having), None)


def published_of(table, row, column, metric):
    """(figure or None, its column) as published for the cell."""
    source = published_column(table, column, metric)
    figures = row.published.get(source.name) if source else None
    return figures[source.metrics.index(metric)] if figures else None, source


def spread(values, metric, sign=""):
    """`63.10 ± 0.42`: mean and sample deviation of a list, or what there is of them."""
    if not values:
        return "not run"
    mean = shown(statistics.fmean(values), metric, sign)
    return f"{mean} ± {shown(statistics.stdev(values), metric)}" if len(values) > 1 else mean


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
    embedded, out, ablating = dataset in table.embedded, [], any(row.ablates for row in table.rows)
    for column in table.columns_of(dataset):
        lines, metrics = [], column.metrics if all_metrics else column.metrics[:1]
        header = ["row", "seeds"]
        for metric in metrics:
            source = published_column(table, column, metric)
            header += [metric, "published", "difference"] if not embedded else \
                [metric, f"published, {source.name}"] if source else [metric]
            if ablating and metric == metrics[0]:
                header += ["against", f"{metric} measured", "published", "borne out"]
        for row in table.rows:
            if dataset in row.trained_on:
                continue
            absent = "not built" if not row.built else "not here" if embedded and not row.embedded else "not run"
            cells = [row.label or row.name, str(len(values_of(results, row, column, metrics[0]))) if row.built else ""]
            for metric in metrics:
                measured = list(values_of(results, row, column, metric).values())
                figure, source = published_of(table, row, column, metric)
                cells.append(spread(measured, metric) if measured else absent)
                if source:
                    cells.append("-" if figure is None else shown(figure, metric))
                if not embedded:
                    cells.append(shown(statistics.fmean(measured) - figure, metric, "+") if measured and figure is not None else "-")
                if ablating and metric == metrics[0]:
                    cells += _against(table, row, column, metric, results) if row.ablates else ["", "", "", ""]
            lines.append(cells)
        place = f"{column.on} {column.split}" + ("" if column.on == dataset else f", trained on {dataset}")
        out.append((place if column.name == f"{column.on} {column.split}" else f"{column.name} ({place})", header, lines))
    return out


def _against(table, row, column, metric, results):
    """The cells that compare a row with the one it ablates: name, measured and published difference, verdict."""
    other = table.row(row.ablates)
    mine, theirs = values_of(results, row, column, metric), values_of(results, other, column, metric)
    paired = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    figures = [published_of(table, of, column, metric)[0] for of in (row, other)]
    published = None if None in figures else figures[0] - figures[1]
    return [other.label or other.name, spread(paired, metric, "+"), "-" if published is None else shown(published, metric, "+"),
            verdict(paired, published)]


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


EXPLAINED = ("Measured: mean ± sample deviation over the seeds. Borne out: yes or no where the 95 % t interval of the "
             "measured differences, paired by seed, leaves 0 out, on the published side or on the other.")


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
            parts.append(f'<h2>{escape(title)}</h2><div class="scroll"><table class="scores sides"><thead><tr>{head}</tr></thead>'
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
