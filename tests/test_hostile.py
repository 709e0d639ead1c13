"""Hundreds of seeded mutations of every kind of file: no code runs, nothing hangs or dies, one sentence names the file.

A mutation may leave a file valid; then the reader may accept it. Anything else than success or a UserError that
names one of the files fails the test, and so does a reader that takes more than ten seconds.
"""
import io
import json
import pickle
import pickletools
import random
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common import masks
from common.config import UserError
from data_prep import check, glove, own, refcoco
from tests.test_own import make as make_own
from tests.test_refcoco import NAME, make_corpus

SEEDS = 250
HUGE = [2 ** 31, 2 ** 63, -2 ** 63, 10 ** 30, -1, 0, 1e308, -1e308, 1e-320, 65536, 2 ** 28]
STRANGE = HUGE + [None, True, "", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "C:\\x", "[" * 50, [], [[]],
                  {}, [None], float("nan"), float("inf"), -float("inf"), [1, 2], {"size": [5, 5], "counts": "0"}]
CODE_RAN = []


@pytest.fixture(autouse=True)
def watch():
    """Fails a test in which a file's code ran; a reader that hangs is interrupted."""
    def expired(*_):
        raise TimeoutError("a reader did not come to an end")
    before = signal.signal(signal.SIGALRM, expired)
    CODE_RAN.clear()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not CODE_RAN


def survives(folder, reader, *args, **options):
    """True if `reader` takes the input, False if it refuses it with one sentence that names a file under `folder`."""
    signal.alarm(10)
    try:
        reader(*args, **options)
        return True
    except UserError as error:
        text = str(error)
        assert str(folder) in text and "\n" not in text and len(text) < 800, text
        return False
    finally:
        signal.alarm(0)


def attack():
    CODE_RAN.append(True)


class Attack:
    def __reduce__(self):
        return attack, ()


def damage(rng, data):
    """Bytes with a cut, changed, doubled or foreign piece."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = data[min(at, other):max(at, other)][:50]
        elif kind == 3:
            data[at:at] = rng.choice([b"\0", b"\xff" * 4, b"[" * 3000, b"NaN", b"1e999", b"9" * 5000, b'"', b"{"])
        else:
            del data[at:at + rng.randrange(1, 9)]
    return bytes(data)


def places(value, found=None):
    """All (container, key) in nested lists and dictionaries."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def disturb(rng, value):
    """Put strange values into nested lists and dictionaries, or take some away."""
    for _ in range(rng.choice([1, 1, 2])):
        box, key = rng.choice(places(value))
        if rng.random() < 0.2 and isinstance(box, dict):
            del box[key]
        else:
            box[key] = rng.choice(STRANGE)
    return value


def test_pickles(tmp_path):
    plain = refcoco.load_refs(make_corpus(tmp_path)["refs"])
    file, taken = tmp_path / "refs(unc).p", 0
    for seed in range(2 * SEEDS):
        rng = random.Random(seed)
        file.write_bytes(damage(rng, pickle.dumps(plain, rng.randrange(6))))
        taken += survives(tmp_path, refcoco.load_refs, file)
    assert 0 < taken < 2 * SEEDS


def test_pickles_that_call(tmp_path):
    """Every instruction of pickle's own list, in front of and amid an attack, in every protocol."""
    file = tmp_path / "refs(unc).p"
    for protocol in range(6):
        whole = pickle.dumps([{"ref_id": 1, "sentences": [Attack()]}], protocol)
        file.write_bytes(whole)
        assert not survives(tmp_path, refcoco.load_refs, file)
        for number, opcode in enumerate(pickletools.opcodes):
            rng = random.Random(number)
            at = rng.randrange(2 if protocol > 1 else 0, len(whole))
            file.write_bytes(whole[:at] + opcode.code.encode("latin1") + rng.choice([b"", b"\n", b"\x01", b"\xff" * 8])
                             + whole[at:])
            assert not survives(tmp_path, refcoco.load_refs, file)
    for tail in (b"\x82\x01.", b"c__main__\nx\n.", b"(S'ls'\nios\nsystem\n.", b"Pabc\n.", b"\x80\x02K\x01Q.",
                 b"r\xff\xff\xff\xff.", b"]r\xff\xff\xff\xff.", b"]p99999999999\n.", b"", b".", b"\x80\xff.",
                 b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
                 b"\x8d" + struct.pack("<Q", 2 ** 62) + b".", b"I" + b"9" * 100000 + b"\n.", b"(" * 100000 + b".",
                 b"]" + b"2\x85" * 100000 + b"."):
        file.write_bytes(tail)
        assert not survives(tmp_path, refcoco.load_refs, file)


def test_a_pickle_that_contains_itself(tmp_path):
    loop = [{"ref_id": 1}]
    loop[0]["sentences"] = loop[0]["ref_id"] = loop
    (tmp_path / "refs.p").write_bytes(pickle.dumps(loop))
    assert not survives(tmp_path, refcoco.load_refs, tmp_path / "refs.p")


@pytest.mark.parametrize("name", ["refs", "instances"])
def test_json_cut_and_changed(tmp_path, name):
    args = make_corpus(tmp_path, name="grefs(unc).json")
    good = args[name].read_bytes()
    taken = 0
    for seed in range(SEEDS):
        args[name].write_bytes(damage(random.Random(seed), good))
        taken += survives(tmp_path, refcoco.convert, **args)
    assert taken < SEEDS
    args[name].write_bytes(b"[" * 10 ** 6)
    assert not survives(tmp_path, refcoco.convert, **args)


@pytest.mark.parametrize("name", ["refs", "instances"])
def test_values_of_wrong_types_and_sizes(tmp_path, name):
    args = make_corpus(tmp_path, name="grefs(unc).json")
    good = args[name].read_text()
    taken = 0
    for seed in range(SEEDS):
        args[name].write_text(json.dumps(disturb(random.Random(seed), json.loads(good))))
        taken += survives(tmp_path, refcoco.convert, **args)
        assert not any(path.suffix == ".json" for path in tmp_path.parent.iterdir())          # nothing written outside
    assert 0 < taken < SEEDS


def test_rle(tmp_path):
    """Changed run lengths: either refused, or a mask that is exactly as large as it says."""
    rng = np.random.default_rng(0)
    good = masks.encode(rng.random((30, 40)) < 0.2)
    taken = 0
    for seed in range(4 * SEEDS):
        draw = random.Random(seed)
        rle = {"size": list(good["size"]), "counts": damage(draw, good["counts"].encode()).decode("latin1")}
        if seed % 4 == 0:
            rle = disturb(draw, {"size": [30, 40], "counts": [3, 40, 5, 1152]})
        elif seed % 4 == 1:                                     # right lengths, with runs of none in between
            cuts = sorted(draw.choices(range(1201), k=draw.randrange(9)))
            rle = {"size": [30, 40], "counts": [b - a for a, b in zip([0] + cuts, cuts + [1200])]}
        elif seed % 4 == 2:
            rle["size"] = draw.choice([[40, 30], [30, 41], [1, 1200], [60, 20], [2 ** 16, 2 ** 12]])
        try:
            mask = masks.decode(rle)
            assert mask.shape == tuple(rle["size"]) and mask.dtype == bool
            assert masks.area(rle) == mask.sum() and masks.decode(masks.check_rle(rle)).sum() == mask.sum()
            taken += 1
        except ValueError as error:
            assert str(error)
    assert SEEDS <= taken < 2 * SEEDS


def test_polygons():
    taken = 0
    for seed in range(4 * SEEDS):
        rng = random.Random(seed)
        polygons = [[rng.uniform(-5, 45) for _ in range(2 * rng.randrange(1, 8))] for _ in range(rng.randrange(4))]
        if polygons and rng.random() < 0.7:
            disturb(rng, polygons)
        try:
            assert masks.decode(masks.from_polygons(polygons, 30, 40)).shape == (30, 40)
            taken += 1
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
    assert 0 < taken < 4 * SEEDS


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_broken_images(tmp_path, form):
    """A damaged photograph: conversion reads its header, the check all of it."""
    args = make_corpus(tmp_path)
    refcoco.convert(**args)
    splits = check.load_splits(args["data_root"], "refcoco")
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=form)
    found = 0
    for seed in range(SEEDS // 5):
        (args["images"] / NAME).write_bytes(damage(random.Random(seed), buffer.getvalue()))
        survives(tmp_path, refcoco.convert, **args)
        faults = check.image_faults(args["data_root"], "refcoco", splits)
        assert all(str(tmp_path) in fault and "\n" not in fault for fault in faults)
        found += bool(faults)
    assert found


def png(width, height):
    """A PNG that says it is so large, and holds nothing."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(2 ** 30, 2 ** 30), (60000, 60000), (10000, 10000), (0, 0)])
def test_images_of_absurd_size(tmp_path, size):
    def edit(refs, instances):
        instances["images"][0].update(width=size[0], height=size[1])
    args = make_corpus(tmp_path, edit)
    (args["images"] / NAME).write_bytes(png(*size))
    assert not survives(tmp_path, refcoco.convert, **args)


def test_prepared_files(tmp_path):
    args = make_corpus(tmp_path)
    refcoco.convert(**args)
    path = tmp_path / "data" / "refcoco" / "train.json"
    good, taken = path.read_text(), 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        bad = json.dumps(disturb(rng, json.loads(good))).encode() if seed % 2 else damage(rng, good.encode())
        path.write_bytes(bad)
        taken += survives(tmp_path, check.check, "refcoco", args["data_root"])
    assert 0 < taken < SEEDS


def test_own_tables_and_masks(tmp_path):
    args = make_own(tmp_path)
    table, mask = args["table"], tmp_path / "masks" / "one.png"
    for file in (table, mask):
        good, taken = file.read_bytes(), 0
        for seed in range(SEEDS // 2):
            file.write_bytes(damage(random.Random(seed), good))
            taken += survives(tmp_path, own.convert, **args)
        assert taken < SEEDS // 2
        file.write_bytes(good)


def test_glove_and_its_words(tmp_path):
    file, words = tmp_path / "glove.txt", tmp_path / "words.npz"
    good = "".join(f"w{n} " + " ".join(["0.25"] * 20) + "\n" for n in range(40)).encode()
    glove.save_words(words, {f"w{n}": np.full(20, n, np.float32) for n in range(40)})
    packed, taken = words.read_bytes(), 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        file.write_bytes(damage(rng, good))
        survives(tmp_path, glove.read_glove, file, [f"w{n}" for n in range(40)])
        words.write_bytes(damage(rng, packed))
        taken += survives(tmp_path, glove.load_words, words)
    assert taken < SEEDS
