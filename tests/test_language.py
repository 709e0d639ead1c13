"""The GRU at any padding, and BERT against transformers with copied random weights."""
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

from common.config import UserError
from common.language import Bert, BiGRU, mean_over_words
from common.text import Vocabulary

SENTENCES = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [2, 0, 0, 0, 0]])


def test_gru_padding_changes_nothing():
    torch.manual_seed(0)
    model = BiGRU(10, 8, 6).eval()
    states, mask = model(SENTENCES)
    assert states.shape == (3, 5, 12) and torch.equal(mask, SENTENCES != 0) and not states[~mask].any()
    mean = mean_over_words(states, mask)
    for row, length in enumerate((5, 2, 1)):
        for ids in (SENTENCES[row:row + 1, :length], torch.cat([SENTENCES[row:row + 1], torch.zeros(1, 4).long()], 1)):
            alone, known = model(ids)
            torch.testing.assert_close(alone[0, :length], states[row, :length])
            torch.testing.assert_close(mean_over_words(alone, known)[0], mean[row])
    torch.testing.assert_close(mean[1], states[1, :2].mean(0))


def test_gru_reads_both_ways_and_survives_a_row_of_padding():
    model = BiGRU(10, 8, 6).eval()
    first, last = (model(torch.tensor([ids]))[0][0] for ids in ([3, 4, 5], [3, 4, 6]))
    assert torch.equal(first[0, :6], last[0, :6]) and not torch.allclose(first[0, 6:], last[0, 6:])
    states, mask = model(torch.tensor([[0, 0], [1, 0]]))
    assert not states[0].any() and not mean_over_words(states, mask)[0].any()


def test_gru_word_vectors():
    vocabulary = Vocabulary(["cat", "dog"])
    model = BiGRU(len(vocabulary), 2, 3, train_embeddings=False)
    assert model.load_vectors(vocabulary, ["dog", "zebra"], [[1.0, 2.0], [3.0, 4.0]]) == 1
    assert model.embedding.weight[vocabulary.ids["dog"]].tolist() == [1, 2]
    assert not model.embedding.weight.requires_grad and not model.embedding.weight[0].any()
    with pytest.raises(UserError, match="2 numbers"):
        model.load_vectors(vocabulary, ["dog"], [[1.0, 2.0, 3.0]])


def peers(**settings):
    """transformers' BERT with random values everywhere, and ours of the same size."""
    torch.manual_seed(0)
    config = BertConfig(**settings)
    theirs = BertModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    return theirs, Bert(config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                        config.intermediate_size, config.vocab_size, config.max_position_embeddings).eval()


TINY = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=50,
            max_position_embeddings=40)


@pytest.mark.parametrize("settings, lengths", [(TINY, (40, 1, 17)), (dict(num_hidden_layers=4, hidden_size=512,
                                               num_attention_heads=8, intermediate_size=2048), (3, 12)), ({}, (22, 9))])
def test_bert_equals_transformers(settings, lengths):
    theirs, ours = peers(**settings)
    assert ours.load_hf(theirs.state_dict()) == ["pooler.dense.weight", "pooler.dense.bias"]
    ids = torch.randint(1, theirs.config.vocab_size, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        expected, result = theirs(ids, attention_mask=mask).last_hidden_state, ours(ids, mask)
        assert (result - expected)[mask.bool()].abs().max() < 1e-4 and expected.std() > 0.1
        alone = ours(ids[1:, :lengths[1]], mask[1:, :lengths[1]])
        assert (alone[0] - result[1, :lengths[1]]).abs().max() < 1e-4
        assert ours(ids, torch.zeros_like(mask)).isfinite().all()


def test_bert_reads_published_names():
    model = BertForPreTraining(BertConfig(**TINY))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {name.replace(*next(((a, b) for a, b in old.items() if name.endswith(a)), ("", ""))): value
             for name, value in model.state_dict().items()} | {"bert.embeddings.position_ids": torch.arange(40)[None]}
    assert "bert.embeddings.LayerNorm.gamma" in state
    ours = Bert(2, 64, 4, 96, 50, 40)
    left = ours.load_hf(state)
    assert left and all(name.startswith(("cls.", "pooler.", "embeddings.position_ids")) for name in left)
    assert torch.equal(ours.encoder["layer"][1].output["LayerNorm"].weight,
                       model.bert.encoder.layer[1].output.LayerNorm.weight)


def test_bert_refuses_what_does_not_fit():
    theirs, _ = peers(**TINY)
    state = theirs.state_dict()
    for ours, change, says in ((Bert(3, 64, 4, 96, 50, 40), {}, "lack encoder.layer.2"),
                               (Bert(1, 64, 4, 96, 50, 40), {}, "unknown names: encoder.layer.1"),
                               (Bert(2, 64, 4, 96, 51, 40), {}, r"word_embeddings.weight \(50, 64\)"),
                               (Bert(2, 64, 4, 96, 50, 40), {"decoder.weight": torch.ones(1)}, "decoder.weight")):
        with pytest.raises(UserError, match=says):
            ours.load_hf({**state, **change})
