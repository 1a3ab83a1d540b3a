"""Task heads: on the pooled [CLS] state, and on the states of words."""

import torch
from torch import Tensor, nn


class AnswerHead(nn.Module):
    """Logits over a closed list of answers (VQA) or truth values (reasoning): one hidden layer."""

    def __init__(self, hidden: int, num_answers: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.outer = nn.Linear(hidden, num_answers)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.outer(self.norm(nn.functional.gelu(self.inner(pooled_BD))))


class LinearAnswerHead(nn.Module):
    """Logits over a closed list of answers straight from the pooled state, behind dropout (MiniVLM's VQA recipe)."""

    def __init__(self, hidden: int, num_answers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, num_answers)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.outer(self.dropout(pooled_BD))


class PairHead(nn.Module):
    """Answers about two images: the states that one text pools beside each of them, joined, through `num_layers` layers.

    Oscar's form for NLVR2; three layers and dropout 0.3 are its best settings, the norms are as in `AnswerHead`.
    """

    def __init__(self, hidden: int, num_answers: int, num_layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [2 * hidden] + [hidden] * (num_layers - 1)
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Dropout(dropout), nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=1e-12)]
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(widths[-1], num_answers))

    def forward(self, left_BD: Tensor, right_BD: Tensor) -> Tensor:
        """Logits (B, A) from the pooled states of the two passes."""
        return self.layers(torch.cat([left_BD, right_BD], dim=-1))


class WordHead(nn.Module):
    """BERT's masked-language-modelling head: dense, GELU, LayerNorm, and the word table itself as the last layer."""

    def __init__(self, hidden: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states_XD: Tensor, word_table_VD: Tensor) -> Tensor:
        """Logits over the vocabulary (..., V)."""
        states_XD = self.norm(nn.functional.gelu(self.dense(states_XD)))
        return nn.functional.linear(states_XD, word_table_VD, self.bias)
