"""Checkpoints: atomic, checked, and nothing in them runs."""
import pickle
import random
import resource
import zipfile

import pytest
import torch

from common import checkpoint
from common.config import UserError


def state(value, size=1000):
    return {"version": checkpoint.VERSION, "script": "train_lts", "model": {"w": torch.full((size,), float(value))}}


def weight(loaded):
    return loaded["model"]["w"][0].item()


@pytest.fixture
def folder(tmp_path):
    """last.pt holds 2, prev.pt holds 1."""
    for value in (1, 2):
        checkpoint.save(tmp_path / "last.pt", state(value), keep="prev.pt")
    return tmp_path


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 2.0).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)


def poison(path):
    class Evil:
        def __reduce__(self):
            return print, ("this must never run",)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(Evil()) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("damage", [lambda p: cut(p, 0), lambda p: cut(p, 10), lambda p: cut(p, 900), flip, poison,
                                    lambda p: p.write_bytes(b"hello"), lambda p: torch.save([1], p), lambda p: p.unlink()])
def test_falls_back_to_prev(folder, damage, capsys):
    damage(folder / "last.pt")
    said = []
    assert weight(checkpoint.load_newest(folder, said.append)) == 1
    assert (len(said) == 1 and "Going on from prev.pt" in said[0]) or not (folder / "last.pt").exists()
    assert "must never run" not in capsys.readouterr().out
    if (folder / "last.pt").exists():
        with pytest.raises(UserError, match="last.pt"):
            checkpoint.load(folder / "last.pt")


def test_nothing_left(folder, tmp_path_factory):
    assert checkpoint.load_newest(tmp_path_factory.mktemp("empty")) is None
    for name in ("last.pt", "prev.pt"):
        cut(folder / name, 50)
    with pytest.raises(UserError, match="Nothing is left to resume from"):
        checkpoint.load_newest(folder)


def test_full_disk_leaves_the_old_file(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="untouched"):
            checkpoint.save(folder / "last.pt", state(3, size=10 ** 6), keep="prev.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weight(checkpoint.load(folder / "last.pt")) == 2 and weight(checkpoint.load(folder / "prev.pt")) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["last.pt", "prev.pt"]


def test_random_states():
    states = checkpoint.random_states()
    drawn = random.random(), torch.rand(3)
    checkpoint.restore_random_states(states)
    assert random.random() == drawn[0] and torch.equal(torch.rand(3), drawn[1])
    torch.save(states, "/dev/null")


def test_load_model_names_what_differs(folder):
    loaded = checkpoint.load(folder / "last.pt")
    with pytest.raises(UserError, match="does not fit this model.*bias"):
        checkpoint.load_model(torch.nn.Linear(2, 2), loaded, "x.pt")
