"""Sentences to ids: a word vocabulary (with or without GloVe) and BERT's WordPiece.

Both give lists of ids in which 0 stands for padding, and both are never empty: a sentence without a
single word becomes one unknown word, so that attention and averages over words always have a term.
"""
import re
import unicodedata

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
