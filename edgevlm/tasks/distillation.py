"""Distillation: how far a student is from its teacher in logits, attention maps, hidden and pooled states.

The first three are EfficientVLM's, the last is DistillVLM's contrast against a queue of earlier states.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import gather, pad_across_processes
from torch import Tensor, nn

from edgevlm import processes

NCE_TEMPERATURE = 0.07
"""Of the contrast's softmax; MoCo's, and that of the contrastive loss of EfficientVLM's models."""


def logit_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) per row, temperature 1; 0 where there are no rows."""
    divergence = F.kl_div(
        student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="sum", log_target=True
    )
    return divergence / max(1, len(student_logits))


def attention_loss(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """Mean squared error of attention maps after softmax, times the number of keys (a map's values shrink with it).

    Heads are compared one by one; where the counts differ, the means over heads are.
    """
    if student_BHTT.shape[1] != teacher_BHTT.shape[1]:
        student_BHTT, teacher_BHTT = student_BHTT.mean(1), teacher_BHTT.mean(1)
    return student_BHTT.shape[-1] * F.mse_loss(student_BHTT, teacher_BHTT)


class StateContrast(nn.Module):
    """Which of many teacher states is that of the same question? Its own against a queue of earlier ones (InfoNCE).

    The queue is a buffer, so snapshots carry it and a resumed training goes on with the same negatives. It holds the
    states of all processes, and is the same in each.

    Args:
        student_width, teacher_width: of the states; a projection leads from one to the other where they differ.
        size: states in the queue; the oldest go first.
    """

    queue_KD: Tensor
    num_seen: Tensor

    def __init__(self, student_width: int, teacher_width: int, size: int) -> None:
        super().__init__()
        self.projection = projection(student_width, teacher_width)
        self.register_buffer("queue_KD", torch.zeros(size, teacher_width))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))

    def forward(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        """Cross-entropy of recognising the teacher's state, nats; 0 while the queue is empty. Then the states join it."""
        student_BD = F.normalize(self.projection(student_BD).float(), dim=1)
        teacher_BD = F.normalize(teacher_BD.float(), dim=1)
        own_B1 = (student_BD * teacher_BD).sum(1, keepdim=True)
        others_BK = student_BD @ self.queue_KD.clone().T  # a copy: autograd needs it as it is now
        empty_K = torch.arange(len(self.queue_KD), device=own_B1.device) >= self.num_seen
        similarity = torch.cat([own_B1, others_BK.masked_fill(empty_K, -torch.inf)], dim=1) / NCE_TEMPERATURE
        loss = F.cross_entropy(similarity, torch.zeros(len(similarity), dtype=torch.long, device=similarity.device))
        self.enqueue(teacher_BD)
        return loss

    @torch.no_grad()
    def enqueue(self, states_BD: Tensor) -> None:
        """Put the states of all processes into the queue, in order."""
        states = from_everyone(states_BD)[-len(self.queue_KD) :]
        places = (self.num_seen + torch.arange(len(states), device=states.device)) % len(self.queue_KD)
        self.queue_KD[places] = states
        self.num_seen += len(states)


def projection(student_width: int, teacher_width: int) -> nn.Module:
    """From the student's width to the teacher's; nothing to do (and to learn) where they are equal."""
    return nn.Identity() if student_width == teacher_width else nn.Linear(student_width, teacher_width)


def from_everyone(rows_BD: Tensor) -> Tensor:
    """The rows of all processes, which may have different numbers of them, in order of the processes."""
    if processes.world_size() == 1:
        return rows_BD
    counts: Tensor = gather(torch.tensor([len(rows_BD)], device=rows_BD.device))  # pyright: ignore
    padded: Tensor = gather(pad_across_processes(rows_BD.contiguous(), dim=0))  # pyright: ignore
    parts = padded.split(len(padded) // len(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
