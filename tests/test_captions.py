"""CIDEr-D against pycocoevalcap, the tokens, and METEOR's program."""
import json
import random
import re
import shutil

import numpy as np
import pytest

from common.captions import cider_d, document_frequency, meteor, tokenize
from common.config import UserError


def corpus(items, words, low, high, seed):
    """(hypotheses, references): random sentences of low..high words, frequent words and rare ones."""
    draw = random.Random(seed)

    def sentence():
        return [f"w{int(words * draw.random() ** 3)}" for _ in range(draw.randint(low, high))]
    return [sentence() for _ in range(items)], [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(items)]


def peer(hypotheses, references):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer()
    for hypothesis, document in zip(hypotheses, references):
        scorer += (" ".join(hypothesis), [" ".join(tokens) for tokens in document])
    return scorer.compute_score()[1]


@pytest.mark.parametrize("items, words, low, high", [(200, 300, 1, 6), (100, 8, 0, 9), (60, 2000, 8, 20), (1, 4, 4, 4)])
def test_equals_pycocoevalcap_on_random_corpora(items, words, low, high):
    hypotheses, references = corpus(items, words, low, high, seed=items)
    expected = peer(hypotheses, references)
    df = document_frequency(references)
    for given in (None, df, tuple(df)):
        assert np.abs(cider_d(hypotheses, references, given) - expected).max() < 1e-9
    assert np.abs(cider_d(hypotheses, references, df) - expected).max() < 1e-9  # with the references remembered


def test_equals_pycocoevalcap_on_published_outputs(samples):
    rows = json.loads((samples / "reg" / "refcoco_val_uniref_golden.json").read_text())
    letters = re.compile("[a-z ]*[a-z][a-z ]*")
    rows = [row for row in rows if all(map(letters.fullmatch, [*row["gts"], row["sent"]]))]
    assert len(rows) > 3000
    hypotheses = [row["sent"].split() for row in rows]
    references = [[text.split() for text in row["gts"]] for row in rows]
    assert np.abs(cider_d(hypotheses, references) - peer(hypotheses, references)).max() < 1e-9
    assert all(tokenize(row["sent"]) == row["sent"].split() for row in rows)


def test_document_frequencies_of_another_corpus_decide():
    train = [[["red", "bus"]], [["red", "car"], ["red", "van"]], [["dog"]]]
    counts, documents = df = document_frequency(train)
    assert documents == 3 and counts[("red",)] == 2 and counts[("red", "bus")] == 1
    common, rare = cider_d([["red"], ["dog"]], [[["red", "dog"]]] * 2, df)
    assert 0 < common < rare


@pytest.mark.parametrize("words, score", [(0, 0), (1, 2.5), (2, 5), (3, 7.5), (4, 10), (9, 10)])
def test_an_exact_match_scores_a_quarter_for_each_length_it_has(words, score):
    sentence = [f"w{i}" for i in range(words)]
    assert cider_d([sentence, ["x"]], [[sentence], [["y"]]])[0] == pytest.approx(score)


@pytest.mark.parametrize("hypotheses, references, message", [
    ([["a"]], [], "1 hypotheses"), ([["a"]], [[]], "item 0 has no reference"),
    (["a dog"], [[["a"]]], "the string 'a dog'"), ([["a"]], [["a dog"]], "the string 'a dog'")])
def test_wrong_input_is_named(hypotheses, references, message):
    for score in (cider_d, meteor):
        with pytest.raises(ValueError, match=message):
            score(hypotheses, references)


def test_nothing_to_score():
    assert cider_d([], []).shape == (0,) and meteor([], []) == 0


@pytest.mark.parametrize("text, tokens", [
    ("The man's hat", "the man 's hat"), ("don't", "do n't"), ("they'll we've I'm", "they 'll we 've i 'm"),
    ("t-shirt, left-most.", "t-shirt left-most"), ("t - shirt", "t shirt"), ("the dogs’ toy", "the dogs toy"),
    ("(left) [red]", "-lrb- left -rrb- -lsb- red -rsb-"), ("5 o'clock", "5 o'clock"), ("#3 at 50%", "# 3 at 50 %"),
    ("boy. red shirt...", "boy red shirt"), ("man w/ hat and/or cap", "man w / hat and/or cap"), ("1,000 3.5 12:30",
     "1,000 3.5 12:30"), ("what?!", "what ?!"), ("u.s. st. bernard", "u.s. st. bernard"), ("a&b x+y", "a & b x + y"),
    ("cannot gonna", "can not gon na"), ("dog--cat;man,red", "dog cat man red"), ("", ""), (" ... ", "")])
def test_tokens_are_the_stanford_tokenizers(text, tokens):
    """The right-hand sides are what pycocoevalcap's PTBTokenizer prints."""
    assert " ".join(tokenize(text)) == tokens


@pytest.mark.slow
def test_meteor_equals_pycocoevalcap():
    program = pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("there is no java")
    hypotheses = [["red", "bus"], [], ["man", "left"]]
    references = [[["red", "bus"], ["bus"]], [["dog"]], [["left", "man"], ["boy"]]]
    expected, each = program.Meteor().compute_score(
        {i: [" ".join(tokens) for tokens in document] for i, document in enumerate(references)},
        {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)})
    assert meteor(hypotheses, references) == expected != pytest.approx(np.mean(each))


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Install a pycocoevalcap without METEOR in it, and a shell script (or nothing) as `java`."""
    jar = tmp_path / "pycocoevalcap" / "meteor" / "meteor-1.5.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    monkeypatch.setattr("common.captions.find_spec", lambda name: type("Spec", (), {
        "submodule_search_locations": [str(jar.parents[1])]}))
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(script):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
    return install


def test_meteor_is_the_aggregate_and_fields_stay_apart(java, tmp_path):
    java(f'''while read -r line; do echo "$line" >> {tmp_path}/asked
case "$line" in SCORE*) echo 7;; *) echo 0.5; echo 0.7; echo 0.25;; esac; done''')
    assert meteor([["a", "|||\n", "b"], []], [[["c"], ["d", "e"]], [["f"]]]) == 0.25
    assert (tmp_path / "asked").read_text().splitlines() == ["SCORE ||| c ||| d e ||| a b", "SCORE ||| f |||",
                                                             "EVAL ||| 7 ||| 7"]


@pytest.mark.parametrize("script, message", [(None, "no `java`"), ("exit 1", "ended early"),
                                             ("read -r line; echo 1; echo 2", "ended early")])
def test_meteor_says_what_it_lacks(script, message, java, monkeypatch):
    if script:
        java(script)
    with pytest.raises(UserError, match=message):
        meteor([["a"], ["b"]], [[["a"]], [["b"]]])
    monkeypatch.setattr("common.captions.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        meteor([["a"]], [[["a"]]])
