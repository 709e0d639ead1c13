"""Every row of the benchmark runs; what it measures is not judged on a busy machine."""
import math

import pytest

from tests import costs
from tests.bench import METHODS, ROWS, Row, shown


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    if name.startswith("crf"):
        pytest.importorskip("pydensecrf.densecrf")
    figures = ROWS[name].run(toy=True)
    assert ROWS[name].run.__doc__ and all(value > 0 and math.isfinite(value) for value in figures.values()), figures


@pytest.mark.parametrize("row, figures, cells", [
    (Row(None, 2, 1), {"ratio": 2.0, "memory": 1.5, "s": 3}, ["2.00", "2", "1.50", "1", "s 3"]),
    (Row(None, 2, 1), {"ratio": 1.99, "memory": 0.5, "s": 3}, ["1.99 **missed**", "2", "0.50 **missed**", "1", "s 3"]),
    (Row(None), {"ratio": 0.5}, ["0.50", "", "", "", ""]),
    (Row(None), {"ratio": 3, "share of bound": 0.7, "share goal": 0.8},
     ["3.00", "", "", "", "share of bound 0.7 **missed**, share goal 0.8"])])
def test_missed_goals_are_marked(row, figures, cells):
    assert shown(row, figures) == cells


@pytest.mark.parametrize("method", METHODS)
def test_costs_are_counted(method):
    parameters, _, image, sentence, *_ = costs.figures(method, toy=True)
    assert parameters > 0 and image > 0 and sentence > 0
