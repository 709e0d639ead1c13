"""WordPiece against transformers' tokenizer, on real sentences and on strings that break tokenizers."""
import json

import pytest
from transformers import BertTokenizer

from common.config import UserError
from common.text import WordPiece

HARD = ["", " ", "\t\n\r ", "Café", "man\u200bman", "man\u00adman", "red\u00a0car", "İstanbul", "straße ﬁne", "[MASK]",
        "[mask]", "a[SEP]b [CLS][PAD] [UNK]", "a" * 100, "a" * 101, "t-shirt", "don't", "x" * 10_000,
        "the man " * 1_250, "שלום עולם", "رجل على اليمين", "👍🏽 man 👨\u200d👩\u200d👧 😀", "中文 red車left", "한국어",
        "ΣΑΣ ΟΔΟΣ", "Ǆ ǅ ß ẞ", "e\u0301 n\u0303", "\x00a\x07b\ufffd", "#tag ##ing 50% $5 ^ ` ~ | <b>",
        "…—‘quoted’ “left”", "１２３ ｆｕｌｌ", "a\u2028b\u3000c\u0085d", "\ufeffbom", "𝒜 𠀀", "LEFT\u202eMOST",
        "naïve coöperate Ångström", "don’t 2nd-from-left/right (blue)", "unaffable", "\U000e0001tag", "a\u0378b",
        "\ue000private"]


@pytest.fixture(scope="module")
def peers(samples):
    path = samples / "bert" / "vocab.txt"
    return WordPiece(path), BertTokenizer(str(path))


def test_equals_transformers_on_hard_strings(peers):
    ours, theirs = peers
    for text in HARD:
        assert ours(text) == theirs(text)["input_ids"], text[:60]


def test_equals_transformers_on_every_real_sentence(peers, samples):
    ours, theirs = peers
    refs = json.loads((samples / "annotations" / "refcoco_valtest_refs.json").read_text())
    refs = refs["refs"] if isinstance(refs, dict) else refs
    sentences = [s if isinstance(s, str) else s["sent"] for ref in refs for s in ref["sentences"]]
    assert len(sentences) == 10_834 + 5_657 + 5_095
    wrong = [text for text, ids in zip(sentences, theirs(sentences)["input_ids"]) if ours(text) != ids]
    assert not wrong


def test_decode_and_length(peers):
    ours, _ = peers
    for text in ("the man's t-shirt on the left", "unaffable zebra", "don't"):
        assert ours.decode(ours(text)) == text
    assert ours.decode([ours.cls_id, ours.sep_id, ours.pad_id]) == ""
    ids = ours("one two three four")
    assert ours.encode("one two three four", 2) == ids[:3] + [ours.sep_id]
    assert ours.encode("one two three four", 4) == ids
    assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 100, 101, 102, 103)
    assert len(ours) == 30522


def test_refuses_files_that_are_no_vocabulary(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for content, says in ((b"\xff\xfe\x00\x01", "UTF-8"), (b"", r"no line \[PAD\]"), (b"a\nb\n", r"no line \[PAD\]"),
                          ("\n".join(special[:1] + special[2:]).encode(), r"no line \[UNK\]"),
                          ("\n".join(["a", *special]).encode(), "line 2"),
                          ("\n".join([*special, "twice", "twice"]).encode(), "'twice' twice")):
        (tmp_path / "vocab.txt").write_bytes(content)
        with pytest.raises(UserError, match=says):
            WordPiece(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="cannot read"):
        WordPiece(tmp_path)
    (tmp_path / "vocab.txt").write_text("\r\n".join([*special, "red"]))
    assert WordPiece(tmp_path / "vocab.txt")("Red bus") == [2, 5, 1, 3]
