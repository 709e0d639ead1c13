"""Settings: script defaults < yaml files < command line, through one argparse parser.

A yaml file is translated into command-line words that stand in front of the user's own, so that
argparse alone decides types, choices and precedence (PyYAML reads `1e-4` as a string; argparse's
`type=float` does not mind). Unknown keys and flags are errors that name the nearest known one.
"""
import sys


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what, where and how."""


def run(main):
    """Run `main()` as a program: a UserError becomes `error: …` on stderr and exit status 2, without a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
