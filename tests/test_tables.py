"""The files of yaml/tables/: all readable, every built row can be printed as commands, and no row's flag is idle."""
import importlib
import time

import pytest

from common import tables
from common.config import parse
from common.plans import Job, Plan
from common.reproduce import get_parser
from tests.conftest import REPOSITORY, command

FILES = sorted((REPOSITORY / "yaml" / "tables").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_has_commands_that_its_script_parses(path):
    """On every corpus of the table; the flags of training go through the script's own parser."""
    table = tables.load_table(path)
    plan = Plan(table, get_parser().parse_args([str(path)]))
    parser = importlib.import_module(table.script_path().stem).get_parser()
    for dataset in [*plan.datasets, *table.embedded]:
        for row in plan.rows(dataset):
            for words in plan.commands(Job(row.name, dataset, 0)):
                if words[0] == table.script:
                    assert parse(parser, words[1:]).dataset == row.trained_on.get(dataset, dataset)


def test_one_row_of_every_table_changes_what_it_says():
    done = check("--first")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_row_changes_what_it_says():
    """At most ten minutes on two cores."""
    started = time.monotonic()
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 600


def check(*words):
    return command("-m", "common.reproduce", *FILES, "--check", "--jobs", "2", *words, timeout=1200)
