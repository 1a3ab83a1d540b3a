"""Task heads on the pooled [CLS] state."""

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
