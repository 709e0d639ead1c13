"""Language: a bidirectional GRU over word embeddings, BERT, and beam search for what writes."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from common.backbones import load_exactly
from common.config import UserError


class BiGRU(nn.Module):
    """Word embeddings and one bidirectional GRU layer (Cho et al., 2014).

    vocab_size: ids run from 0 (padding) to vocab_size - 1. hidden: units of one direction; a word's state has
    2 * hidden. train_embeddings=False keeps the embeddings as they are. dropout: on the embeddings, only in training.
    """

    def __init__(self, vocab_size, embed_dim=300, hidden=512, train_embeddings=True, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.embedding.weight.requires_grad_(train_embeddings)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embed_dim, hidden, batch_first=True, bidirectional=True)
        self.dim = 2 * hidden

    @torch.no_grad()
    def load_vectors(self, vocabulary, words, vectors):
        """Set the embeddings of `words` to the rows of `vectors` (len(words), embed_dim), such as GloVe's.

        Words that `vocabulary` does not have are passed over; returns how many were set. Raises UserError when the
        vectors have another width than the embeddings.
        """
        vectors = torch.as_tensor(vectors, dtype=self.embedding.weight.dtype)
        width = self.embedding.embedding_dim
        if vectors.shape != (len(words), width):
            raise UserError(f"word vectors are {tuple(vectors.shape)}; {len(words)} words need {width} numbers each.")
        rows = [(vocabulary.ids[word], i) for i, word in enumerate(words) if word in vocabulary.ids]
        if rows:
            ours, theirs = map(list, zip(*rows))
            self.embedding.weight[ours] = vectors[theirs].to(self.embedding.weight.device)
        return len(rows)

    def forward(self, ids):
        """ids (E, L) int64 with 0 = padding behind the words -> word states (E, L, 2 * hidden), mask (E, L) bool.

        States are zero at padding, and a sentence's states do not depend on how far it is padded.
        """
        mask = ids != 0
        lengths = mask.sum(1).clamp(min=1).cpu()  # a row of padding alone is read as one word and masked below
        embedded = self.dropout(self.embedding(ids))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=ids.shape[1])
        return states * mask[..., None], mask


def mean_over_words(states, mask):
    """The average of each sentence's word states: (E, L, C), mask (E, L) bool -> (E, C); zero without words."""
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


class BertLayer(nn.Module):
    """Post-norm transformer layer under the key names of Hugging Face's BERT."""

    def __init__(self, hidden, heads, intermediate, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}),
            "output": _dense_and_norm(hidden, hidden)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, intermediate)})
        self.output = _dense_and_norm(intermediate, hidden)

    def forward(self, x, visible):
        """x (B, L, hidden), visible (B, 1, 1, L) bool -> (B, L, hidden)."""
        q, k, v = (self.attention["self"][name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("query", "key", "value"))
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=rate).transpose(1, 2).flatten(2)
        x = self._add(x, attended, self.attention["output"], rate)
        return self._add(x, F.gelu(self.intermediate["dense"](x)), self.output, rate)

    @staticmethod
    def _add(x, branch, output, rate):
        return output["LayerNorm"](x + F.dropout(output["dense"](branch), rate))


def _dense_and_norm(in_features, out_features):
    return nn.ModuleDict({"dense": nn.Linear(in_features, out_features),
                          "LayerNorm": nn.LayerNorm(out_features, eps=1e-12)})


class Bert(nn.Module):
    """BERT's encoder (Devlin et al., 2019), by default base uncased; no pooler, one segment, exact GELU.

    intermediate: width of the feed-forward layers; positions: longest sentence; dropout: on embeddings, attention and
    branches, only in training.
    """
    kind = "bert"

    def __init__(self, layers=12, hidden=768, heads=12, intermediate=3072, vocab_size=30522, positions=512,
                 dropout=0.1):
        super().__init__()
        self.config = {"layers": layers, "hidden": hidden, "heads": heads, "intermediate": intermediate,
                       "vocab_size": vocab_size, "positions": positions}
        self.dim, self.dropout = hidden, nn.Dropout(dropout)
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(vocab_size, hidden, padding_idx=0),
            "position_embeddings": nn.Embedding(positions, hidden),
            "token_type_embeddings": nn.Embedding(2, hidden),
            "LayerNorm": nn.LayerNorm(hidden, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(
            BertLayer(hidden, heads, intermediate, dropout) for _ in range(layers))})
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids, attention_mask):
        """ids (B, L) int64, attention_mask (B, L) true or 1 at tokens -> last hidden states (B, L, hidden).

        States at padding are meaningless, but finite even where a row is padding alone.
        """
        table = self.embeddings
        x = table["word_embeddings"](ids) + table["token_type_embeddings"].weight[0]
        x = x + table["position_embeddings"].weight[:ids.shape[1]]
        x = self.dropout(table["LayerNorm"](x))
        visible = attention_mask.bool()
        visible = (visible | ~visible.any(1, keepdim=True))[:, None, None]  # no kernel agrees on softmax over nothing
        for layer in self.encoder["layer"]:
            x = layer(x, visible)
        return x

    def load_hf(self, state):
        """Load a state dict under Hugging Face's names; returns the names left over (pooler and pre-training heads).

        A prefix `bert.` and the old names LayerNorm.gamma and .beta are understood. Raises UserError, naming them, for
        parameters that are missing, unknown, or of another shape.
        """
        return load_exactly(self, hf_names(state), ("cls.", "pooler.", "embeddings.position_ids"))


def hf_names(state):
    """A BERT state dict under its modern names: no prefix `bert.`, LayerNorm.weight/.bias for .gamma/.beta."""
    modern = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.")
        for old, new in modern.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        renamed[name] = value
    return renamed


@torch.no_grad()
def beam_search(follow, count, start, end, banned, beams, max_length):
    """The `beams` likeliest sentences of 1 to `max_length` pieces that a beam search meets, for each of `count` things at once.

    follow: (pieces (K,R), length, parents (KR,)) -> logits (K,R,V) of what follows the R pieces at place `length`; its last
    call's row of each is `parents`, for caches that grow (None at first). Piece 0 is padding; start and end are pieces, too.
    banned (V,) bool: pieces that no sentence has. log p counts `end` and is not divided by the length. Returns K lists of
    (ids without start and end, log p), the best first.
    """
    device = banned.device
    ids = torch.full((count, 1, 1), start, device=device)
    total, parents = torch.zeros(count, 1, device=device), None
    ended = total > 0
    pieces = torch.arange(len(banned), device=device)
    for length in range(max_length + 1):
        log_p = follow(ids[..., -1], length, parents).float().log_softmax(-1)                      # (K, R, V)
        now = banned | (pieces != end if length == max_length else pieces == end if length == 0 else False)
        log_p = log_p.masked_fill(now, -math.inf)
        log_p = torch.where(ended[..., None], torch.where(pieces == 0, 0.0, -math.inf), log_p)  # a whole sentence stays as it is
        total, best = (total[..., None] + log_p).flatten(1).topk(min(beams, log_p[0].numel()))
        parent, piece = best // log_p.shape[-1], best % log_p.shape[-1]
        ids = torch.cat([ids.gather(1, parent[..., None].expand(-1, -1, ids.shape[-1])), piece[..., None]], -1)
        ended = (piece == end) | (piece == 0)
        if ended.all():
            break
        parents = (parent + torch.arange(count, device=device)[:, None] * log_p.shape[1]).flatten()
    return [[([i for i in row if i not in (0, end)], score) for row, score in zip(rows, scores) if score > -math.inf]
            for rows, scores in zip(ids[..., 1:].tolist(), total.tolist())]
