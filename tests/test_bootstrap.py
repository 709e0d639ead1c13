"""The paired bootstrap against a loop that draws images one by one."""
import numpy as np
import pytest

from common.metrics import iou, paired_bootstrap


def rows_of(rng, gain, images=40, empty=False):
    """Two runs' rows on the same expressions, the first better by about `gain`."""
    mine, theirs = [], []
    for sent_id in range(3 * images):
        U = 0 if empty else int(rng.integers(50, 4000))
        share = rng.uniform(0.2, 0.8)
        for rows, s in ((mine, share + gain), (theirs, share)):
            rows.append({"sent_id": sent_id, "image_id": int(rng.integers(images)) if rows is mine else mine[-1]["image_id"],
                         "I": int(min(1, s) * U), "U": U})
    return mine, theirs


def naive(mine, theirs, resamples, seed):
    """(mIoU, oIoU) differences in points, a row a resample, by explicit draws of whole images."""
    rng, images = np.random.default_rng(seed), sorted({row["image_id"] for row in mine})
    out = []
    for _ in range(resamples):
        picked = [i for image in rng.choice(images, len(images)) for i, row in enumerate(mine) if row["image_id"] == image]
        values = []
        for of in (mine, theirs):
            I, U = (np.array([of[i][key] for i in picked]) for key in ("I", "U"))
            values.append((iou(I, U).mean(), I.sum() / U.sum()))
        out.append([100 * (a - b) for a, b in zip(*values)])
    return np.array(out)


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.15])
def test_agrees_with_a_loop(gain):
    mine, theirs = rows_of(np.random.default_rng(1), gain)
    found, looped = paired_bootstrap(mine, theirs), naive(mine, theirs, 1500, seed=7)
    for column, name in enumerate(("mIoU", "oIoU")):
        low, high = np.percentile(looped[:, column], (2.5, 97.5))
        width = max(high - low, 1e-6)
        assert abs(found[name]["low"] - low) < 0.1 * width and abs(found[name]["high"] - high) < 0.1 * width
        assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"]
        assert (found[name]["p"] < 0.05) == (gain > 0)


def test_answers_of_the_edges():
    mine, theirs = rows_of(np.random.default_rng(2), 0.1)
    assert paired_bootstrap(mine, theirs) == paired_bootstrap(mine, theirs)
    assert paired_bootstrap(mine, theirs)["mIoU"]["difference"] == -paired_bootstrap(theirs, mine)["mIoU"]["difference"]
    same = paired_bootstrap(mine, mine)
    assert all(value == {"difference": 0, "low": 0, "high": 0, "p": 1} for value in same.values())
    assert paired_bootstrap(*rows_of(np.random.default_rng(3), 0.1, empty=True))["oIoU"]["difference"] == 0
    one = paired_bootstrap(mine[:1], theirs[:1])
    assert one["mIoU"]["low"] == one["mIoU"]["high"] == one["mIoU"]["difference"]
    for bad in ([], theirs[:-1], theirs[::-1]):
        with pytest.raises(ValueError, match="same expressions"):
            paired_bootstrap(mine if bad else [], bad)
