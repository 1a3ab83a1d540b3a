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
