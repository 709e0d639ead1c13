"""Scores of generated expressions (REG): CIDEr-D, METEOR, and the tokens that both are counted in.

CIDEr-D (Vedantam, Zitnick and Parikh, CVPR 2015) as the evaluation code of COCO captions computes it, where
it is called CIDEr: clipped counts, a Gaussian penalty on the difference in length with sigma 6, n-grams of 1
to 4 words averaged, times 10, without stemming. Two of that code's habits belong to every published figure:
the length is the number of bigrams, and a sentence of fewer than four words has no 4-grams to match, so that
an exact match of one word scores 2.5 and of four or more words 10.
"""
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from itertools import chain
from math import exp, log, sqrt
from pathlib import Path

import numpy as np

from common.config import UserError

SIGMA = 6.0
_BRACKETS = str.maketrans({"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ",
                           "{": " -lcb- ", "}": " -rcb- "})
_JOINED = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|lem(?=me\b)|gim(?=me\b))")
_CLITIC = re.compile(r"(?<=[^\W\d_])(?=n't\b)|(?<=\w)(?='(?:s|m|d|re|ve|ll)\b)")
_TOKEN = re.compile(r"""-[lr][rsc]b-                              # a bracket
                        | (?:[a-z]\.)+(?!\w)                      # a.m.
                        | (?:mrs?|ms|dr|st|no|vs|jr|sr)\.(?!\w)    # abbreviations keep their point
                        | '(?:s|m|d|re|ve|ll|em|n)\b
                        | \w+(?:[-/'.]\w+|(?<=\d)[,:](?=\d)\w+)*
                        | [!?]{2,} | \S""", re.VERBOSE)
_PUNCTUATION = frozenset("' ` . ? ! , : - ; \"".split())
_MAX_VECTORS = 1 << 18  # references remembered: more than the train sentences of any of the corpora


def tokenize(text):
    """Tokens of a sentence for the scores: lower case, the Penn Treebank's splits, without punctuation.

    They follow what the Stanford tokenizer and the COCO caption code make of short English sentences: "man's" and
    "don't" become "man 's" and "do n't", hyphened words stay whole, and brackets stay as "-lrb-", for that code drops
    only their upper-case names. Its rules for dates, addresses and currencies are left out.
    """
    text = text.lower().replace("\u2019", "'").translate(_BRACKETS)
    tokens = _TOKEN.findall(_CLITIC.sub(" ", _JOINED.sub(r"\1 ", text)))
    return [token for token in tokens if token not in _PUNCTUATION]


class DocumentFrequency:
    """In how many documents (an object with its references) each n-gram stands; it unpacks to (counts, documents).

    It remembers the n-grams of the references it has met, so that scoring against them again costs nothing but the
    hypotheses: the case of a reward.
    """

    def __init__(self, counts, documents):
        self.counts, self.documents = counts, documents
        self.unseen = log(max(documents, 1))
        self.idf = {ngram: self.unseen - log(max(count, 1)) for ngram, count in counts.items()}
        self._vectors = {}

    def __iter__(self):
        return iter((self.counts, self.documents))

    def vector(self, tokens, ngrams=None):
        """(n-gram counts, 1 / norm of the tf-idf vector for n = 1..4 with 0 for a zero vector, number of bigrams)."""
        counts = _ngrams(tokens) if ngrams is None else ngrams
        squares = [0.0] * 4
        for ngram, count in counts.items():
            weight = count * self.idf.get(ngram, self.unseen)
            squares[len(ngram) - 1] += weight * weight
        return counts, [square and 1 / sqrt(square) for square in squares], max(len(tokens) - 1, 0)

    def reference(self, tokens, ngrams=None):
        """The vector of a reference, remembered."""
        key = tuple(tokens)
        vector = self._vectors.get(key)
        if vector is None:
            if len(self._vectors) >= _MAX_VECTORS:
                self._vectors.clear()
            vector = self._vectors[key] = self.vector(key, ngrams)
        return vector


def document_frequency(references):
    """The document frequencies of a corpus: `references` holds, for each object, a list of token lists."""
    counts, sentences = Counter(), {}
    for document in references:
        seen = set()
        for tokens in _sentences(document):
            key = tuple(tokens)
            if key not in sentences:
                sentences[key] = _ngrams(key)
            seen.update(sentences[key])
        counts.update(seen)
    df = DocumentFrequency(dict(counts), len(references))
    for tokens, ngrams in sentences.items():
        df.reference(tokens, ngrams)
    return df


def cider_d(hypotheses, references, df=None):
    """CIDEr-D of each hypothesis against its references: float64 (n,), in 0..10.

    hypotheses: n token lists. references: n lists of token lists, at least one each. df: from `document_frequency`, or
    its two values; without it the documents are these references, as in the published evaluation (of one document
    alone every score is then 0, for each n-gram stands in all of them). The corpus' score is the mean.
    Raises ValueError where the two do not match or a sentence is a string.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for the references of {len(references)} objects")
    if df is None:
        df = document_frequency(references)
    elif not isinstance(df, DocumentFrequency):
        df = DocumentFrequency(*df)
    idf, unseen = df.idf, df.unseen
    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, document) in enumerate(zip(_sentences(hypotheses), references)):
        counts, inverse, length = df.vector(hypothesis)
        ngrams = counts.keys()
        total = 0.0
        for tokens in _sentences(document):
            counts_ref, inverse_ref, length_ref = df.reference(tokens)
            similarity = 0.0
            for ngram in ngrams & counts_ref.keys():
                n, weight, count = len(ngram) - 1, idf.get(ngram, unseen), counts_ref[ngram]
                similarity += min(counts[ngram], count) * count * weight * weight * inverse[n] * inverse_ref[n]
            total += similarity * exp(-(length - length_ref) ** 2 / (2 * SIGMA ** 2))
        if not document:
            raise ValueError(f"item {i} has no reference")
        scores[i] = 10 * total / 4 / len(document)
    return scores


def _ngrams(tokens):
    """Counts of the n-grams of 1 to 4 tokens, as tuples."""
    second, third, fourth = tokens[1:], tokens[2:], tokens[3:]
    return Counter(chain(zip(tokens), zip(tokens, second), zip(tokens, second, third),
                         zip(tokens, second, third, fourth)))


def _sentences(sentences):
    """The token lists as they come; a string among them would be scored letter by letter."""
    for tokens in sentences:
        if isinstance(tokens, str):
            raise ValueError(f"expected a list of tokens and got the string {tokens!r}")
        yield tokens


# ---- METEOR -------------------------------------------------------------------------------------------------


def meteor(hypotheses, references):
    """METEOR 1.5 of a corpus (Denkowski and Lavie, 2014), in 0..1, by its own program inside `pycocoevalcap`.

    hypotheses: n token lists; references: n lists of token lists. The value is the program's aggregate over the corpus,
    the published figure; the mean over sentences is far higher. Needs Java and 2 GiB of memory. Raises UserError where
    package or Java are missing or the program ends early, ValueError as `cider_d` does.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for the references of {len(references)} objects")
    if not hypotheses:
        return 0.0
    lines = []
    for hypothesis, document in zip(_sentences(hypotheses), references):
        if not document:
            raise ValueError(f"item {len(lines)} has no reference")
        sentences = [" ".join(tokens) for tokens in (*_sentences(document), hypothesis)]
        # fields are separated by `|||`, requests by the end of the line
        lines.append(" ||| ".join(["SCORE", *(" ".join(text.replace("|||", " ").split()) for text in sentences)]))

    command = ["java", "-Xmx2G", "-jar", str(_meteor_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, encoding="utf-8") as process:
            try:
                statistics = [_ask(process, line) for line in lines]
                process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
                process.stdin.flush()
                answers = [process.stdout.readline() for _ in range(len(lines) + 1)]  # the sentences', the aggregate
            finally:
                process.kill()
        return float(answers[-1])
    except (OSError, ValueError):
        raise UserError("METEOR's Java program ended early: try `java -version`, and see that 2 GiB of memory are "
                        "free.") from None


def _ask(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def _meteor_jar():
    package = find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else []
    jars = [jar for jar in (Path(folder) / "meteor" / "meteor-1.5.jar" for folder in folders) if jar.is_file()]
    if not jars:
        raise UserError("METEOR's program comes with a package that is not installed: `pip install pycocoevalcap`.")
    if shutil.which("java") is None:
        raise UserError("METEOR needs Java, and there is no `java` on the PATH: install one (`apt-get install "
                        "default-jre-headless`).")
    return jars[0]
