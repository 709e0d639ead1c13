"""Settings: script defaults < yaml files < command line, through one argparse parser.

A yaml file is translated into command-line words that stand in front of the user's own, so that
argparse alone decides types, choices and precedence (PyYAML reads `1e-4` as a string; argparse's
`type=float` does not mind). Unknown keys and flags are errors that name the nearest known one.
"""
import argparse
import contextlib
import difflib
import multiprocessing
import os
import re
import sys
from collections import Counter
from pathlib import Path

import yaml

if not hasattr(yaml, "safe_load"):  # the folder yaml/ is importable as a namespace where PyYAML is missing
    sys.exit("error: PyYAML is not installed; run `pip install -r requirements.txt`.")

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_YAML_BYTES = 1 << 17
LOST = {  # how torch words the loss of another process, wherever this one just was
    "DataLoader ": "a process that reads the pictures died (of too little memory?) or hangs (on its disk?); go on with --resume, with "
                   "fewer --workers if it happens again",
    r".*gloo/transport": "another rank has ended, as it may have said, or cannot be reached; start the job again with --resume"}


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what, where and how."""


def run(main):
    """Run `main()` as a program: a UserError becomes `error: …` on stderr and exit status 2, without a traceback.

    Until the ranks of torchrun have met, all of them see the same bad setting and only the first one speaks.
    """
    try:
        status = main()
    except UserError as error:
        torch = sys.modules.get("torch")
        met = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if met or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except RuntimeError as error:
        text = " ".join(str(error).split())
        cause = next((cause for sign, cause in LOST.items() if re.match(sign, text)), None)
        if cause is None:
            raise
        print(f"error: {cause}. What torch said: {text[:300]}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(2)  # Python would wait for a process that hangs
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, knows no abbreviations and shows every default in `--help`."""

    def __init__(self, description):
        class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
            """Keeps the script's docstring as it stands and appends every default that says something."""

            def _get_help_string(self, action):
                return action.help if action.default in (None, "") else super()._get_help_string(action)

        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help).")

    def switch(self, group, name, default, help):
        """Add `--name` and `--no-name` to `group` (or to the parser itself)."""
        (group or self).add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


def base_parser(description):
    """The flags that every training script has. Each script sets its paper's own values with `set_defaults`."""
    parser = Parser(description)
    data = parser.add_argument_group("data")
    data.add_argument("--yaml", nargs="+", default=None, metavar="FILE",
                      help="settings files, the later ones win; they replace the script's own yaml")
    data.add_argument("--dataset", default="refcoco", help="folder below --data-root that data_prep wrote")
    data.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    data.add_argument("--expressions-per-image", type=positive_or_all, default=1,
                      help="sentences of one image in a batch: a number, or `all`; vision runs once for all of them")
    data.add_argument("--epoch-unit", choices=("expression", "ref", "image"), default="expression",
                      help="what an epoch visits once: each sentence, each object (one sentence drawn), each image")
    data.add_argument("--workers", type=int, default=4, help="loader processes a rank; 0 loads in the main process")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, default=1, help="passes over the training split")
    optim.add_argument("--max-steps", type=int, default=0, help="end after so many optimiser steps; 0: --epochs decide")
    optim.add_argument("--batch-size", type=int, default=8, help="images a step, over all ranks and micro-batches")
    optim.add_argument("--accum", type=int, default=1, help="micro-batches a step; raise it when memory is short")
    optim.add_argument("--lr", type=float, default=1e-3, help="peak learning rate for this --batch-size")
    optim.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    optim.add_argument("--seed", type=int, default=0, help="seeds weights, order, augmentation and dropout")
    run_ = parser.add_argument_group("run")
    run_.add_argument("--out", default="", help="run folder; empty: runs/<script>/<dataset>/<name>_s<seed>")
    run_.add_argument("--name", default="", help="name of the run; empty: `base` or the ablation flags that differ")
    run_.add_argument("--amp", choices=("off", "bf16", "fp16", "auto"), default="off",
                      help="mixed precision; fp16 scales the loss; auto: bf16 where the device has instructions for it")
    run_.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (under torchrun the rank picks N)")
    run_.add_argument("--eval-every", type=int, default=1, help="epochs between evaluations on val")
    run_.add_argument("--eval-splits", nargs="*", default=["val"], help="splits that best.pt is scored on at the end")
    run_.add_argument("--eval-batch-size", type=int, default=16, help="images a forward pass in evaluation")
    run_.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: at every epoch's end")
    run_.add_argument("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    parser.switch(run_, "compile", False, "torch.compile the model: slow start, faster steps")
    parser.switch(run_, "resume", False, "go on from last.pt in the run folder; starts afresh where nothing lies")
    return parser


def positive_or_all(text):
    """`all` -> 0, which stands for every sentence of the image; otherwise a positive integer."""
    if text == "all":
        return 0
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor `all`")
    return int(text)


def parse(parser, argv=None, own_yaml=None, overlays=None):
    """Settings in their order: defaults < own yaml (dropped by --yaml) < overlays < --yaml files < command line.

    overlays: {flag: yaml file}; a file is used when its boolean flag is set on the command line or in a --yaml file.
    Returns the Namespace with `name` filled in. Raises UserError on unknown keys and flags, wrong types and choices.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    typed = _parse(parser, argv, "the command line")
    own_words = yaml_words(parser, own_yaml) if own_yaml and not getattr(typed, "yaml", None) else []
    yaml_words_ = [word for file in getattr(typed, "yaml", None) or [] for word in yaml_words(parser, file)]
    flags = _parse(parser, yaml_words_ + argv, "the settings")
    overlay_words = [word for flag, file in (overlays or {}).items() if getattr(flags, flag)
                     for word in yaml_words(parser, file)]
    before = _parse(parser, own_words + overlay_words + yaml_words_, "the yaml files")
    args = _parse(parser, own_words + overlay_words + yaml_words_ + argv, "the settings")
    if not getattr(args, "name", "unnamed"):
        args.name = _changed_name(parser, before, args)
    return args


def _parse(parser, words, where):
    """parse_args that names the nearest flag when it meets an unknown one."""
    args, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"{where} has the unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}.")
    return args


def nearest(name, known):
    """`, did you mean 'x'?` with the one of `known` that looks most like `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _changed_name(parser, before, args):
    """`base`, or the ablation flags that the command line changed: `no-filter`, `filters=2_lambda-loc=0`."""
    parts = []
    for group in parser._action_groups:
        for action in group._group_actions if group.title.startswith("ablation") else []:
            value = getattr(args, action.dest)
            if value != getattr(before, action.dest):
                key = action.dest.replace("_", "-")
                parts.append(key if value is True else f"no-{key}" if value is False else f"{key}={value}")
    return "_".join(parts).replace("/", "-") or "base"


def _values(node, known):
    """How many values a yaml node stands for, its aliases written out; without end where it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_values(part, known) for part in inner))
    return known[id(node)]


def load_yaml(path):
    """A mapping from a yaml file, looked up in the working directory and then in the repository.

    Raises UserError for a missing or unreadable file, anything that is no flat mapping, and a key given twice.
    """
    path = str(path)
    found = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if found is None:
        raise UserError(f"settings file {path} does not exist.")
    if found.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"{path} is larger than {MAX_YAML_BYTES} bytes and is no settings file.")
    try:
        text = found.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node and _values(node, {}) > MAX_YAML_BYTES:  # a dozen aliases of each other can stand for billions
            raise ValueError("its aliases repeat each other beyond measure")
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        mapping = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())}.") from None
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path} sets {twice!r} twice.")
    if not isinstance(mapping or {}, dict):
        raise UserError(f"{path} holds no `key: value` lines.")
    return mapping or {}


def yaml_words(parser, path):
    """The command-line words that a flat yaml file stands for, checked against the parser. Raises UserError."""
    actions = {action.dest: action for action in parser._actions}
    words = []
    for key, value in load_yaml(path).items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None or action.dest in ("help", "yaml"):
            raise UserError(f"{path} has the unknown key {key!r}{nearest(str(key), list(actions))}.")
        flag = action.option_strings[0]
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        if value is None:
            continue
        if is_switch != isinstance(value, bool):
            raise UserError(f"{path}: {key} must {'be true or false' if is_switch else 'not be a truth value'}, "
                            f"got {value!r} (yaml reads bare yes, no, on, off as truth values).")
        if isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
            raise UserError(f"{path}: {key} is nested; settings are flat `key: value` lines.")
        if is_switch:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    try:
        _parse(parser, words, path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return words


def dump(args, path):
    """Write every setting to `path` as yaml that `--yaml` reads back to the same values."""
    kept = {key: ("all" if key == "expressions_per_image" and value == 0 else value)
            for key, value in vars(args).items() if key not in ("yaml", "resume", "out")}
    write_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def write_text(path, text):
    """Write a text file as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """Write a file so that a reader sees the old file or the new one, never half of one. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
