"""Every command that the READMEs and the programs' own descriptions print is one that the program takes, on files that are there."""
import importlib
import re
import shlex

import pytest

import eval as evaluation
from common.config import REPOSITORY, Parser, UserError, parse

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in sorted(REPOSITORY.glob("train_*.py"))}
MODULES = ["data_prep." + path.stem for path in sorted((REPOSITORY / "data_prep").glob("[a-z]*.py"))] + ["common.reproduce"]
PROGRAM = re.compile(r"(?:python|torchrun(?: --[a-z_]+ \d+)*(?: --)?) (?:-m ([\w.]+)|(\w+)\.py)(.*)")


def commands():
    """[(where it is printed, module, words)] of the fenced blocks of the READMEs and of indented lines of docstrings."""
    texts = {name: "\n".join(re.findall(r"```\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.S))
             for name in ("README.md", "data_prep/README.md")}
    remark = {name: r"\s# " for name in texts}
    for name in (*SCRIPTS, "eval", *MODULES):
        doc = importlib.import_module(name).__doc__
        texts[name] = "\n".join(line[4:] for line in doc.splitlines() if line.startswith("    "))
    found = []
    for where, text in texts.items():
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            for part in re.split(f" && |{remark.get(where, r'  +| (?=Table )')}", line):
                program = PROGRAM.fullmatch(part.strip())
                if program and not (program[1] or "").startswith(("pytest", "tests.")):
                    found.append((where, program[1] or program[2], shlex.split(program[3])))
    return found


class Taken(Exception):
    """The parser took the words."""


@pytest.mark.parametrize("where, module, words", commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_command(monkeypatch, where, module, words):
    for word in words:
        if re.match(r"(yaml|data_prep|common|tests)/", word):
            assert list(REPOSITORY.glob(word)), f"{where}: {word} does not exist"
    if module in SCRIPTS:
        parse(SCRIPTS[module].get_parser(), words, SCRIPTS[module].YAML)
    elif module == "eval":
        assert any(takes(evaluation.get_parser(script), words) for script in (None, *SCRIPTS.values())), words
    elif module != "train_mine":
        plain = Parser.parse_args

        def watched(self, *args):
            plain(self, *args)
            raise Taken
        monkeypatch.setattr(Parser, "parse_args", watched)
        with pytest.raises(Taken):
            importlib.import_module(module).main(words)


def takes(parser, words):
    try:
        return bool(parse(parser, words))
    except UserError:
        return False


@pytest.mark.parametrize("module", ["eval", *SCRIPTS, *MODULES])
def test_help(module, capsys):
    """It is printed, with every flag explained; a lone percent sign in an explanation would end it with a traceback."""
    if module in SCRIPTS:
        parsers = [SCRIPTS[module].get_parser(), evaluation.get_parser(SCRIPTS[module])]
        assert all(action.help for parser in parsers for action in parser._actions)
        assert all(len(parser.format_help()) > 1000 for parser in parsers)
        return
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    assert ended.value.code == 0 and "--" in capsys.readouterr().out


def test_there_are_commands():
    """The pattern above finds them, in every place."""
    places = [where for where, *_ in commands()]
    assert len(places) > 60 and {*SCRIPTS, "eval", "README.md", "data_prep/README.md", "common.reproduce"} <= set(places)
