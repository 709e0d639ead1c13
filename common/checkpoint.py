"""Checkpoints that survive a kill at any moment, a full disk and a flipped bit.

A file is written beside its final name, flushed to the disk and then renamed; `last.pt` becomes `prev.pt`
first. torch's zip format carries a CRC-32 of every record, which `load` verifies before it reads.
Only plain types and tensors are stored, so that `torch.load(weights_only=True)` reads them.
"""
import os
import random
import zipfile
from pathlib import Path

import torch

from common.config import UserError

VERSION = 1


def save(path, state, keep=None):
    """Write `state` to `path` atomically; the file that was there is kept under the name `keep`, if given.

    Raises UserError when the folder cannot be written or the disk is full; the old file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_name(keep))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is gone or not ours: the sentence below says so
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); the checkpoint that was there is untouched. "
                        "Free some space or choose another --out, then go on with --resume.") from None


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path, device="cpu"):
    """Read a file that `save` wrote. Raises UserError when it is missing, cut short, damaged, or holds code."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: its part {damaged} fails the checksum.")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UserError:
        raise
    except Exception as error:  # zipfile, torch's reader and its unpickler raise nearly anything on hostile bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}).") from None
    if not isinstance(state, dict) or state.get("version") != VERSION or not isinstance(state.get("script"), str):
        raise UserError(f"{path} is no checkpoint of this repository's scripts (version {VERSION}).")
    return state


def load_newest(folder, say=print, device="cpu"):
    """The state in `last.pt`, or in `prev.pt` where that is missing or damaged (said aloud), or None where neither is.

    Raises UserError when files are there and none can be read.
    """
    errors = []
    for name in ("last.pt", "prev.pt"):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            state = load(path, device)
        except UserError as error:
            errors.append(str(error))
            continue
        for message in errors:
            say(f"warning: {message} Going on from {name}.")
        return state
    if errors:
        raise UserError(" ".join(errors) + " Nothing is left to resume from; remove the folder to start afresh.")
    return None


def random_states():
    """The random states of python, torch and every GPU, as plain types. numpy draws only from seeded generators."""
    version, words, gauss = random.getstate()
    return {"python": [version, list(words), gauss], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_states(states):
    """Put back what `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def load_model(model, state, path):
    """Load a checkpoint's weights into `model`, every name and shape exactly. Raises UserError where they differ."""
    try:
        model.load_state_dict(state["model"], strict=True)
    except (RuntimeError, KeyError, TypeError) as error:
        first = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
        raise UserError(f"{path} does not fit this model: {' '.join(first)}"[:400]) from None
