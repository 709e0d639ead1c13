"""The log of a training run."""
import pytest

from common import runlog


@pytest.mark.parametrize("moments, waiting", [
    # two micro-batches, asked for at 10 and 15 and there at 11 and 17, and the step's end at 20
    ([10, 11, 15, 17, 20], 0.3),
    # what lies between two steps, an evaluation, counts for neither
    ([10, 11, 15, 15, 20, 90, 94, 94, 94, 100], 0.25)])
def test_waiting_is_the_share_of_the_steps_that_data_took(tmp_path, monkeypatch, moments, waiting):
    clock = iter([0, *moments])
    monkeypatch.setattr(runlog.time, "monotonic", lambda: next(clock))
    log, batches = runlog.Log(tmp_path, main=False, total=9), iter(range(9))
    for step in range(len(moments) // 5):
        assert [log.fetch(batches), log.fetch(batches)] == [2 * step, 2 * step + 1]
        log.step(dict)
    assert log.waiting() == pytest.approx(waiting)
    log.write({})
    assert log.waiting() == 0
