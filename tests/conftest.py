"""Shared fixtures: a tiny embedded corpus, and a way to run a script as its user does."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
TINY = ["--yaml", "yaml/lts_refshapes.yaml", "--size", "32", "--dim", "16", "--text-dim", "16", "--aspp-dim", "8",
        "--batch-size", "4", "--workers", "0", "--eval-splits", "val", "--amp", "off"]
TINY_SCALE = {"train": 16, "val": 6, "testA": 4, "testB": 4, "pool": 2}  # scenes of each split


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A data root with a RefShapes of a few scenes, written and converted as the real one is."""
    from data_prep import refshapes
    refshapes.SCALES["tiny"] = TINY_SCALE
    root = tmp_path_factory.mktemp("data")
    refshapes.make(root, scale="tiny", jobs=1)
    return root


@pytest.fixture(scope="session")
def unbroken(shapes, tmp_path_factory):
    """script -> (run folder, {target: calls}) of a small run that nothing happened to, made once; read only."""
    from tests import children
    made = {}

    def of(script):
        if script not in made:
            made[script] = children.unbroken(script, shapes, tmp_path_factory.mktemp(script))
        return made[script]
    return of


@pytest.fixture(scope="session")
def samples():
    """The folder of real sample files; a test that needs it skips where it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"the sample files are not at {SHARED}")
    return SHARED


def command(*words, ranks=1, cwd=REPOSITORY, timeout=240, **environment):
    """Run `python words…` (or torchrun with `ranks`) from `cwd`; returns the finished process with its text output."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                                      "--master_port", str(29500 + os.getpid() % 2000), "--"]
    return subprocess.run([sys.executable, *launcher, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
