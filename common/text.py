"""Sentences to ids: a word vocabulary (with or without GloVe) and BERT's WordPiece.

Both give lists of ids in which 0 stands for padding, and both are never empty: a sentence without a
single word becomes one unknown word, so that attention and averages over words always have a term.
"""
import re
import unicodedata
from pathlib import Path

from common.config import UserError

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SIDE = re.compile(r"\b(left|right)(?=(?:most|hand|side|ward|wards|er)?\b)", re.IGNORECASE)


def words(text):
    """The lower-case words of a sentence: letters, digits and inner apostrophes; all else separates."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower().replace("’", "'"))


def swap_left_right(text):
    """The sentence that fits the mirrored image: left <-> right, also in leftmost, right-hand, rightside."""
    def other(match):
        word = "right" if match[0].lower() == "left" else "left"
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word
    return _SIDE.sub(other, text)


class Vocabulary:
    """Words and their ids; id 0 is padding, id 1 the unknown word.

    `list(vocabulary)` gives the words in the order of their ids from 2 on; the checkpoint stores that list.
    """
    PAD, UNKNOWN = 0, 1

    def __init__(self, entries):
        self.entries = list(entries)
        self.ids = {word: i for i, word in enumerate(self.entries, start=2)}

    @classmethod
    def build(cls, sentences, known=()):
        """All words of the train `sentences`, and of `known` (the corpus' words that GloVe has), sorted."""
        return cls(sorted({word for text in sentences for word in words(text)} | set(known)))

    def __len__(self):
        return len(self.entries) + 2

    def __iter__(self):
        return iter(self.entries)

    def encode(self, text, max_words):
        """Ids of the first `max_words` words, at least one id long."""
        return [self.ids.get(word, self.UNKNOWN) for word in words(text)[:max_words]] or [self.UNKNOWN]

    def unknown(self, text):
        """The words of `text` that the vocabulary does not have."""
        return [word for word in words(text) if word not in self.ids]


# ---- WordPiece ----------------------------------------------------------------------------------------------

MAX_VOCAB_BYTES = 16 << 20
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
_CJK = re.compile("([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
                  "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])")
_ASCII_WORDS = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
_ASCII_CONTROLS = dict.fromkeys({*range(32), 127} - set(b"\t\n\r"))  # str.translate leaves them out
_GLUED = re.compile(r"(?<=\w) (['’-]) (?=\w)")


class WordPiece:
    """BERT's uncased tokenizer (Devlin et al., 2019; Wu et al., 2016) over a `vocab.txt`, one piece a line.

    Cleaning, accent stripping, lower case, splitting at spaces, punctuation and CJK characters, then the longest
    piece first; a word of more than 100 characters, or one that the pieces cannot spell, becomes [UNK].
    vocab_file: the file, or the list of its lines, which `list(wordpiece)` gives and a checkpoint stores.
    Raises UserError for a file that is no such vocabulary.
    """

    def __init__(self, vocab_file):
        path = "the checkpoint's vocabulary"
        if not isinstance(vocab_file, (list, tuple)):
            path = Path(vocab_file)
            vocab_file = _lines(path)
        self.pieces = list(vocab_file)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        missing = [token for token in SPECIAL if token not in self.ids]
        if missing:
            raise UserError(f"{path} is no WordPiece vocabulary: it has no line {' or '.join(missing)}.")
        if len(self.ids) != len(self.pieces):
            twice = next(piece for i, piece in enumerate(self.pieces) if self.ids[piece] != i)
            raise UserError(f"{path} has the line {twice[:40]!r} twice.")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[token] for token in SPECIAL)
        if self.pad_id != 0:
            raise UserError(f"{path} has [PAD] on line {self.pad_id + 1}; padding is id 0 here, the first line.")
        self._known = {}

    def __len__(self):
        return len(self.pieces)

    def __iter__(self):
        return iter(self.pieces)

    def unknown(self, text):
        """The words of `text` that the pieces cannot spell."""
        return [word for word in words(text) if self.unk_id in self(word)]

    def __call__(self, text):
        """Ids of the whole sentence between [CLS] and [SEP]."""
        ids = []
        for part in _SPECIAL.split(text):  # a special token in the text stands for itself, as in BERT's tokenizer
            if part in SPECIAL:
                ids.append(self.ids[part])
            else:
                for word in _basic_words(part):
                    ids += self._word(word)
        return [self.cls_id, *ids, self.sep_id]

    def encode(self, text, max_words):
        """Ids with at most `max_words` pieces between [CLS] and [SEP]."""
        ids = self(text)
        return ids if len(ids) <= max_words + 2 else ids[:max_words + 1] + ids[-1:]

    def decode(self, ids):
        """The sentence that ids spell: pieces joined, special tokens left out, don't and t-shirt as one word."""
        pieces = [self.pieces[int(i)] for i in ids]
        text = " ".join(piece for piece in pieces if piece not in SPECIAL or piece == "[UNK]")
        return _GLUED.sub(r"\1", text.replace(" ##", ""))

    def _word(self, word):
        """Ids of the pieces of one word, the longest first."""
        if len(word) > 100:
            return [self.unk_id]
        if word not in self._known:
            ids, start = [], 0
            while start < len(word):
                piece, end = None, len(word)
                while end > start and piece is None:
                    piece = self.ids.get(("##" if start else "") + word[start:end])
                    end -= 1
                if piece is None:
                    ids = [self.unk_id]
                    break
                ids.append(piece)
                start = end + 1
            if len(self._known) >= 1 << 16:  # a bound on memory: users' sentences never end
                self._known.clear()
            self._known[word] = ids
        return self._known[word]


def _lines(path):
    """The lines of a vocabulary file. Raises UserError."""
    try:
        if path.stat().st_size > MAX_VOCAB_BYTES:
            raise UserError(f"{path} is larger than {MAX_VOCAB_BYTES >> 20} MiB and is no WordPiece vocabulary.")
        pieces = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text and no WordPiece vocabulary.") from None
    return pieces[:-1] if pieces[-1] == "" else pieces


def _basic_words(text):
    """BERT's basic tokenizer: clean lower-case words, each punctuation mark and CJK character a word of its own."""
    if text.isascii():  # the same, several times as fast
        yield from _ASCII_WORDS.findall(text.translate(_ASCII_CONTROLS).lower())
        return
    text = "".join(" " if c.isspace() else c for c in text if c in "\t\n\r" or not _is_control(c))
    text = _CJK.sub(r" \1 ", text)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    text = "".join(c.lower() for c in text)  # letter by letter: str.lower() alone writes a final sigma otherwise
    for word in text.split():
        start = 0
        for i, c in enumerate(word):
            if _is_punctuation(c):
                if i > start:
                    yield word[start:i]
                yield c
                start = i + 1
        if start < len(word):
            yield word[start:]


def _is_control(c):
    return unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") or c == "\ufffd"


def _is_punctuation(c):
    return c.isascii() and not c.isalnum() and c.isprintable() and c != " " or unicodedata.category(c)[0] == "P"
