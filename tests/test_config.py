"""Settings: precedence, types, typing errors, and a folder named yaml/ that must not shadow PyYAML."""
import importlib
from pathlib import Path

import pytest
import yaml

import train_lts
from common.config import REPOSITORY, UserError, dump, parse
from tests.conftest import command


SCRIPTS = sorted(path.stem for path in REPOSITORY.glob("train_*.py"))


def settings(tmp_path, *files, argv=()):
    paths = []
    for i, text in enumerate(files):
        paths.append(tmp_path / f"{i}.yaml")
        paths[-1].write_text(text)
    return parse(train_lts.get_parser(), [*(["--yaml", *map(str, paths)] if paths else []), *argv], train_lts.YAML)


def test_order(tmp_path):
    assert settings(tmp_path).lr == 1e-3 and settings(tmp_path).epochs == 45
    args = settings(tmp_path, "lr: 1e-4\nepochs: 3\nseg: false", "epochs: 5", argv=["--batch-size", "4"])
    assert (args.lr, args.epochs, args.seg, args.batch_size, args.size) == (1e-4, 5, False, 4, 416)
    assert settings(tmp_path, "expressions-per-image: all").expressions_per_image == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_own_yaml_holds_the_defaults(name):
    """A script's yaml and its `--help` must tell the same story: the paper's."""
    script = importlib.import_module(name)
    own, defaults = parse(script.get_parser(), [], script.YAML), parse(script.get_parser(), [])
    assert {k for k in vars(own) if getattr(own, k) != getattr(defaults, k)} <= {"eval_splits"}


@pytest.mark.parametrize("text, argv, sentence", [
    ("lrr: 1", [], "unknown key 'lrr', did you mean 'lr'"),
    ("seg: 'no'", [], "seg must be true or false"),
    ("lr: true", [], "lr must not be a truth value"),
    ("lr: fast", [], "invalid float value: 'fast'"),
    ("backbone: vgg", [], "invalid choice: 'vgg'"),
    ("model: {lr: 1}", [], "unknown key 'model'"),
    ("lr: {a: 1}", [], "nested"),
    ("lr: [1, 2", [], "not valid yaml"),
    ("lr: 1\nlr: 2", [], "sets 'lr' twice"),
    ("a: &a [x]\nb: &b [*a, *a]\nlr: *b", [], "unknown key 'a'"),
    ("- lr", [], "no `key: value` lines"),
    ("", ["--batchsize", "3"], "unknown argument '--batchsize', did you mean '--batch-size'"),
    ("", ["--yaml", "missing.yaml"], "missing.yaml does not exist"),
    ("", ["--expressions-per-image", "0"], "neither a positive number nor `all`"),
])
def test_errors(tmp_path, text, argv, sentence):
    with pytest.raises(UserError, match=sentence.replace("[", r"\[").replace("(", r"\(")):
        settings(tmp_path, *([text] if text else []), argv=argv)


def test_dump_reads_back(tmp_path):
    args = settings(tmp_path, "expressions_per_image: all\nlr: 3e-4", argv=["--no-filter", "--aspp-rates", "2", "4"])
    assert args.name == "no-filter"
    dump(args, tmp_path / "config.yaml")
    again = parse(train_lts.get_parser(), ["--yaml", str(tmp_path / "config.yaml")], train_lts.YAML)
    again.yaml = args.yaml
    assert vars(again) == vars(args)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_yaml_parses(name):
    script = importlib.import_module(name)
    files = sorted((REPOSITORY / "yaml").glob(f"{Path(script.YAML).stem}*.yaml"))  # a copied script keeps its original's
    assert len(files) >= 2
    for path in files:
        parse(script.get_parser(), ["--yaml", str(path)], script.YAML)


def test_yaml_folder_does_not_shadow_pyyaml():
    assert "site-packages" in yaml.__file__ and not list((REPOSITORY / "yaml").rglob("*.py"))
    done = command("-c", "import yaml; print(yaml.safe_load('a: 1'))")
    assert done.stdout.strip() == "{'a': 1}", done.stderr
