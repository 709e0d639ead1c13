"""The word vectors that a corpus needs, out of GloVe's text file.

    python -m data_prep.glove --glove glove.840B.300d.txt --dataset refcoco --data-root data

Reads the file as a stream and keeps the vectors of the words that occur in any split of the corpus, in
data/<dataset>/words.npz: `words`, a sorted array of strings, and `vectors`, float32 (words, dimensions). A line of
GloVe's file is a word and its numbers, with spaces between; some tokens of glove.840B hold spaces themselves and are
told apart by their number of fields.
"""
import io
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import text
from common.config import Parser, UserError, run, write_bytes
from data_prep.check import load_splits
from data_prep.refcoco import MAX_BYTES, field

MAX_LINE = 2 ** 16


def words_needed(data_root, dataset):
    """{word: how often it occurs} in all sentences of a prepared corpus."""
    counts = {}
    for split, data in load_splits(data_root, dataset).items():
        for record in data["expressions"]:
            for word in text.words(field(record, "text", str, f"{dataset}/{split}.json: an expression")):
                counts[word] = counts.get(word, 0) + 1
    return counts


def read_glove(path, wanted):
    """Vectors of the `wanted` words in a GloVe text file: ({word: (D,) float32}, number of damaged lines among them).

    D is the number of fields of the first line less one. A wanted word's line that has another number of fields,
    or fields that are not finite numbers, counts as damaged. Raises UserError if the file is no such text.
    """
    wanted = {word.encode("utf-8"): word for word in wanted}
    found, damaged, size = {}, 0, None
    try:
        with open(path, "rb") as file, tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, disable=None,
                                            delay=2, desc=Path(path).name) as bar:
            if file.read(2) in (b"PK", b"\x1f\x8b"):
                raise UserError(f"{path}: this is an archive; unpack it and give the .txt file in it")
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b"")):
                if number % 5000 == 0:
                    bar.update(file.tell() - bar.n)
                if size is None:
                    fields = line.split()
                    if len(fields) == 2 and number == 0:        # word2vec's heading: how many words, how many numbers
                        continue
                    size = len(fields) - 1
                    if not 10 <= size <= 4096:
                        raise UserError(f"{path}: its first line is no word with its vector, so it is not GloVe's text")
                word = wanted.get(line[:line.find(b" ")])
                if word is None or word in found:
                    continue
                fields = line.split()
                if len(fields) != size + 1:
                    damaged += len(fields) < size + 1           # more: a token with spaces that begins like a word
                    continue
                try:
                    vector = [float(value) for value in fields[1:]]
                except ValueError:
                    vector = [math.nan]
                if all(abs(value) < 1e30 for value in vector):
                    found[word] = np.array(vector, np.float32)
                else:
                    damaged += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not found:
        raise UserError(f"{path}: holds no vector of any of the corpus' {len(wanted)} words; is it GloVe's text file?")
    return found, damaged


def save_words(path, vectors):
    """Write {word: (D,) float32} as words.npz, sorted, atomically; the same vectors give the same bytes."""
    words, buffer = sorted(vectors), io.BytesIO()
    np.savez(buffer, words=np.array(words), vectors=np.stack([vectors[word] for word in words]))
    write_bytes(path, buffer.getvalue())


def load_words(path):
    """Read words.npz: (list of W words, float32 array (W, D)). Never unpickles. Raises UserError if it is damaged."""
    advice = "make it again with python -m data_prep.glove"
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise UserError(f"{path}: larger than any word list; {advice}")
        with np.load(path, allow_pickle=False) as arrays:
            words, vectors = arrays["words"], arrays["vectors"]
    except FileNotFoundError:
        folder = Path(path).parent
        raise UserError(f"{path}: there is no such file; `python -m data_prep.glove --glove glove.840B.300d.txt --dataset {folder.name} "
                        f"--data-root {folder.parent}` makes it, or train the words from nothing with --embeddings random") from None
    # what zipfile and numpy raise for damage in the archive, in a member's compression or in an array's header
    except (OSError, KeyError, ValueError, EOFError, MemoryError, SyntaxError, RuntimeError, NotImplementedError,
            struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole words.npz ({type(error).__name__}); {advice}") from None
    if words.dtype.kind != "U" or words.ndim != 1 or vectors.dtype != np.float32 or vectors.ndim != 2 \
            or len(words) != len(vectors) or not len(words) or not np.isfinite(vectors).all():
        raise UserError(f"{path}: its words and vectors do not fit each other; {advice}")
    return words.tolist(), vectors


def get_parser():
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--glove", required=True, help="GloVe's text file, unpacked: glove.840B.300d.txt")
    parser.add_argument("--dataset", required=True, help="a prepared corpus under the data root")
    parser.add_argument("--data-root", default="data", help="where the prepared corpora lie")
    return parser


def main(argv=None):
    """Write words.npz of one corpus and print how many words it covers."""
    args = get_parser().parse_args(argv)
    counts = words_needed(args.data_root, args.dataset)
    if re.search(r"\.(zip|gz)$", args.glove):
        raise UserError(f"{args.glove}: unpack it and give the .txt file in it")
    vectors, damaged = read_glove(args.glove, counts)
    path = Path(args.data_root) / args.dataset / "words.npz"
    save_words(path, vectors)
    missing = sorted((word for word in counts if word not in vectors), key=lambda word: (-counts[word], word))
    used, total = sum(counts[word] for word in vectors), sum(counts.values())
    print(f"{len(vectors)} of {len(counts)} words have a vector ({100 * len(vectors) / len(counts):.1f} %), "
          f"which is {100 * used / total:.2f} % of the running words")
    if missing:
        print(f"missing: {len(missing)}, such as {', '.join(missing[:10])}")
    if damaged:
        print(f"{damaged} damaged lines of words needed were left out")
    print(f"written to {path}")


if __name__ == "__main__":
    run(main)
