"""Every row of the benchmark runs; what it measures is not judged on a busy machine."""
import math

import pytest

from tests import costs
from tests.bench import METHODS, ROWS


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    if name.startswith("crf"):
        pytest.importorskip("pydensecrf.densecrf")
    figures = ROWS[name].run(toy=True)
    assert ROWS[name].run.__doc__ and all(value > 0 and math.isfinite(value) for value in figures.values()), figures


@pytest.mark.parametrize("method", METHODS)
def test_costs_are_counted(method):
    parameters, _, image, sentence, *_ = costs.figures(method, toy=True)
    assert parameters > 0 and image > 0 and sentence > 0
