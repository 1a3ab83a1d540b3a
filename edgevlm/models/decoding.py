"""Captions word by word: the image and its tags are read once, and each further word costs two tokens per layer.

Under the sequence-to-sequence mask tags and regions never see the caption, and a word never sees what follows it. So
their keys and values are computed once; a step runs the word decided last, and a [MASK] in the place of the next.
The captions of one image (beams, samples) share its context. Ours; the search is plain beam search with a length
penalty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from edgevlm.artifacts import TokenizerSpec
from edgevlm.models.attention import MASKED, Attention, Layer, attention_mask
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM


class Captions(NamedTuple):
    """K captions per image, best first where they were searched for."""

    ids_BKT: Tensor
    """Words, then [SEP] if the caption ended by itself, then [PAD]."""
    scores_BK: Tensor
    """Log-probability; of a beam search, divided by length ** length_penalty."""


class KeyValues(NamedTuple):
    """What one layer's attention reads."""

    keys: Tensor
    values: Tensor


@dataclass
class Draft:
    """Captions in the making, K per image; t words of each are decided ([CLS] is the first)."""

    context: list[KeyValues]
    """Per layer that reads words (B, H, C, d): tags and, in a single stream, the image."""
    context_mask_B11C: Tensor
    words: list[KeyValues]
    """Per layer (B, H, K, t, d)."""
    image: list[KeyValues | None]
    """Per layer (B, H, S, d): what a cross-modal layer reads of the image; None for all others."""
    image_valid_BS: Tensor

    @property
    def num_words(self) -> int:
        return self.words[0].keys.shape[3] if self.words else 0

    def follow(self, parents_BK: Tensor) -> None:
        """Caption k goes on from the words of caption `parents_BK[:, k]`."""

        def take(x_BHKtd: Tensor) -> Tensor:
            index = parents_BK[:, None, :, None, None]
            return x_BHKtd.gather(2, index.expand(-1, x_BHKtd.shape[1], -1, *x_BHKtd.shape[3:]))

        self.words = [KeyValues(take(layer.keys), take(layer.values)) for layer in self.words]


def read_context(model: VLM, regions: Regions, tag_ids_BG: Tensor, num_caption: int) -> Draft:
    """Read images and their tags, once; no caption is begun.

    Args:
        model: a model with the head `words`.
        regions: regions of B images.
        tag_ids_BG: word ids of the tags, which stand behind the caption's `num_caption` places; G may be 0.
        num_caption: places of the caption, as in training ([CLS] and [SEP] included).
    """
    fusion = model.fusion
    blank = tag_ids_BG.new_full((tag_ids_BG.shape[0], num_caption), fusion.pad_id)
    x_BCD = fusion.embed_words(torch.cat([blank, tag_ids_BG], 1), num_caption)[:, num_caption:]
    image_BSD = fusion.embed_image(regions.features_BND, regions.boxes_norm_BN4)
    valid_BC, image_valid = (tag_ids_BG != fusion.pad_id).to(x_BCD.dtype), fusion.image_valid(model.valid(regions))
    if fusion.config.has_encoders:
        for layer in fusion.vision:
            image_BSD, *_ = layer(image_BSD, attention_mask(image_valid))
    else:
        x_BCD, valid_BC = torch.cat([x_BCD, image_BSD], dim=1), torch.cat([valid_BC, image_valid], dim=1)
    mask_B11C = attention_mask(valid_BC)
    draft = Draft([], mask_B11C, [], [], image_valid)
    for layer in _layers(model):
        q, k, v = _project(layer.attention, x_BCD, x_BCD)
        scores = torch.matmul(q, k.transpose(-1, -2)) + mask_B11C
        seen = _project(layer.cross_attention, x_BCD, image_BSD)[1:] if hasattr(layer, "cross_attention") else None
        draft.context.append(KeyValues(k, v))
        draft.image.append(seen and KeyValues(*seen))
        attended = torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2)
        x_BCD = _rest_of_layer(layer, x_BCD, attended, draft.image[-1], image_valid)
    return draft


def next_word(model: VLM, draft: Draft, last_BK: Tensor, mask_id: int) -> Tensor:
    """Logits (B, K, V) of the word that follows; `last_BK`, the word decided last, joins the draft."""
    t = draft.num_words
    ids_BK2 = torch.stack([last_BK, torch.full_like(last_BK, mask_id)], dim=-1)
    hidden_2T = torch.zeros(2, t + 2, device=ids_BK2.device)
    hidden_2T[0, -1] = MASKED  # the word does not see the [MASK] behind it
    positions = torch.tensor([t, t + 1], device=ids_BK2.device)
    states, layers = _write(model, draft, ids_BK2, positions, hidden_2T)
    draft.words = [KeyValues(layer.keys[:, :, :, :-1], layer.values[:, :, :, :-1]) for layer in layers]
    return _logits(model, states[:, :, 1])


def word_logits(model: VLM, draft: Draft, captions_BKT: Tensor, tokenizer: TokenizerSpec) -> Tensor:
    """Logits (B, K, T, V) of every word of finished captions; all words in one differentiable pass.

    Every word stands there twice: as itself, read by the words behind it, and as a [MASK] that reads the words before it.
    The result is that of `next_word` fed with the caption word by word. `draft` must be fresh, and stays so.
    """
    num_words = captions_BKT.shape[2]
    begin = torch.full_like(captions_BKT[..., :1], tokenizer.cls_id)
    read = torch.cat([begin, captions_BKT[..., :-1]], dim=-1)
    ids = torch.cat([read, torch.full_like(captions_BKT, tokenizer.mask_id)], dim=-1)
    place = torch.arange(num_words, device=ids.device)
    earlier = place[None, :] <= place[:, None]
    itself = torch.eye(num_words, dtype=torch.bool, device=ids.device)
    nothing = torch.zeros_like(itself)
    sees = torch.cat([torch.cat([earlier, nothing], 1), torch.cat([earlier, itself], 1)])
    states, _ = _write(model, draft, ids, torch.cat([place, place + 1]), (~sees).float() * MASKED)
    return _logits(model, states[:, :, num_words:])


def word_log_probs(model: VLM, draft: Draft, captions_BKT: Tensor, tokenizer: TokenizerSpec) -> Tensor:
    """Log-probability (B, K, T) with which `sample` draws each word of these captions, 0 at [PAD]; differentiable."""
    logits = word_logits(model, draft, captions_BKT, tokenizer)
    first = (torch.arange(captions_BKT.shape[2], device=logits.device) == 0).view(1, 1, -1, 1)
    log_probs = (logits + _forbidden(logits, tokenizer, first)).log_softmax(-1)
    chosen = log_probs.gather(-1, captions_BKT.long().unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(captions_BKT == tokenizer.pad_id, 0.0)


# --- searching ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: VLM, draft: Draft, tokenizer: TokenizerSpec, max_words: int, no_repeat: int = 0) -> Captions:
    """The likeliest word at every step; (B, 1, T). Settings as in `beam_search`."""
    return _roll_out(model, draft, tokenizer, max_words, no_repeat, 1, lambda log_probs: log_probs.argmax(-1))


@torch.no_grad()
def sample(model: VLM, draft: Draft, tokenizer: TokenizerSpec, max_words: int, num_samples: int = 1) -> Captions:
    """Captions drawn from the model's distribution by PyTorch's random state; (B, num_samples, T)."""

    def draw(log_probs_BKV: Tensor) -> Tensor:
        return torch.multinomial(log_probs_BKV.exp().flatten(0, 1), 1).view(log_probs_BKV.shape[:2])

    return _roll_out(model, draft, tokenizer, max_words, 0, num_samples, draw)


@torch.no_grad()
def beam_search(
    model: VLM,
    draft: Draft,
    tokenizer: TokenizerSpec,
    max_words: int,
    num_beams: int,
    length_penalty: float = 1.0,
    no_repeat: int = 0,
) -> Captions:
    """The best `num_beams` captions of each image, best first; (B, num_beams, T).

    A caption's score is its log-probability / length ** length_penalty, [SEP] counted. Finished captions keep their
    place among the beams as long as no other outranks them. An image is done when no unfinished caption can still
    reach its best finished one: log-probabilities only fall, so the bound is exact and never changes the result.

    Args:
        model: a model with the head `words`.
        draft: fresh from `read_context`; used up.
        tokenizer: the special ids. Of these only [SEP] is ever written, and not as the first word.
        max_words: length at which an unfinished caption is taken as it is; at most `num_caption` - 1.
        num_beams: 1 gives the captions of `greedy`.
        length_penalty: 0 or more; larger favours longer captions.
        no_repeat: no sequence of so many words twice in a caption; 0 = free.
    """
    batch, device = draft.context_mask_B11C.shape[0], draft.context_mask_B11C.device
    shape = (batch, num_beams)
    last = torch.full(shape, tokenizer.cls_id, device=device)
    ids = torch.empty(*shape, 0, dtype=torch.long, device=device)
    done = torch.zeros(shape, dtype=torch.bool, device=device)
    lengths = torch.zeros(shape, device=device)
    totals = torch.full(shape, -torch.inf, device=device)
    totals[:, 0] = 0.0  # all beams begin alike: the first word is chosen for one of them
    for _ in range(max_words):
        log_probs = _step(model, draft, last, ids, tokenizer, no_repeat)
        size = log_probs.shape[-1]
        resting = torch.full_like(log_probs, -torch.inf)
        resting[..., tokenizer.pad_id] = 0.0  # a finished caption goes on as itself
        candidates = totals.unsqueeze(-1) + torch.where(done.unsqueeze(-1), resting, log_probs)
        lengths = lengths + (~done).to(lengths.dtype)
        ranks = candidates / lengths.unsqueeze(-1) ** length_penalty
        best = ranks.flatten(1).topk(num_beams).indices
        parents, last = best // size, best % size
        totals = candidates.flatten(1).gather(1, best)
        lengths, done = lengths.gather(1, parents), done.gather(1, parents)
        ids = torch.cat([ids.gather(1, parents.unsqueeze(-1).expand_as(ids)), last.unsqueeze(-1)], dim=-1)
        done = done | (last == tokenizer.sep_id)
        draft.follow(parents)
        reached = (totals / lengths**length_penalty).masked_fill(~done, -torch.inf).amax(1)
        reachable = (totals / max_words**length_penalty).masked_fill(done, -torch.inf).amax(1)
        if bool((reached >= reachable).all()):
            break
    scores, order = torch.sort(totals / lengths**length_penalty, dim=1, descending=True, stable=True)
    return Captions(ids.gather(1, order.unsqueeze(-1).expand_as(ids)), scores)


def _roll_out(
    model: VLM,
    draft: Draft,
    tokenizer: TokenizerSpec,
    max_words: int,
    no_repeat: int,
    num_captions: int,
    pick: Callable[[Tensor], Tensor],
) -> Captions:
    shape = (draft.context_mask_B11C.shape[0], num_captions)
    device = draft.context_mask_B11C.device
    last = torch.full(shape, tokenizer.cls_id, device=device)
    ids = torch.empty(*shape, 0, dtype=torch.long, device=device)
    done = torch.zeros(shape, dtype=torch.bool, device=device)
    totals = torch.zeros(shape, device=device)
    for _ in range(max_words):
        log_probs = _step(model, draft, last, ids, tokenizer, no_repeat)
        last = pick(log_probs)
        totals = totals + log_probs.gather(-1, last.unsqueeze(-1)).squeeze(-1).masked_fill(done, 0.0)
        last = last.masked_fill(done, tokenizer.pad_id)
        ids = torch.cat([ids, last.unsqueeze(-1)], dim=-1)
        done = done | (last == tokenizer.sep_id)
        if bool(done.all()):
            break
    return Captions(ids, totals)


def _step(
    model: VLM, draft: Draft, last_BK: Tensor, ids_BKT: Tensor, tokenizer: TokenizerSpec, no_repeat: int
) -> Tensor:
    """Log-probabilities (B, K, V) of the next word among those that may be written."""
    logits = next_word(model, draft, last_BK, tokenizer.mask_id)
    first = torch.tensor(ids_BKT.shape[-1] == 0, device=logits.device)
    logits = logits + _forbidden(logits, tokenizer, first)
    if no_repeat:
        logits = logits.masked_fill(_repeats(ids_BKT, no_repeat, logits.shape[-1]), -torch.inf)
    return logits.log_softmax(-1)


def _forbidden(logits: Tensor, tokenizer: TokenizerSpec, first: Tensor) -> Tensor:
    """-inf for ids that are no words, and for [SEP] where `first`: a caption says something."""
    out = torch.zeros_like(logits)
    out[..., [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.mask_id]] = -torch.inf
    is_end = torch.arange(logits.shape[-1], device=logits.device) == tokenizer.sep_id
    return out.masked_fill(is_end & first, -torch.inf)


def _repeats(ids_BKT: Tensor, length: int, vocab_size: int) -> Tensor:
    """Words (B, K, V) that would complete a sequence of `length` words a second time."""
    counts = torch.zeros(*ids_BKT.shape[:2], vocab_size, device=ids_BKT.device)
    if ids_BKT.shape[-1] >= length:
        said = ids_BKT.unfold(2, length, 1)
        tail = ids_BKT[..., ids_BKT.shape[-1] - length + 1 :].unsqueeze(2)
        same = (said[..., :-1] == tail).all(-1)
        counts.scatter_add_(2, said[..., -1], same.to(counts.dtype))
    return counts > 0


# --- the layers, on words ----------------------------------------------------------------------------------------


def _write(
    model: VLM, draft: Draft, ids_BKQ: Tensor, positions_Q: Tensor, hidden_QT: Tensor
) -> tuple[Tensor, list[KeyValues]]:
    """Run Q further tokens of every caption through all layers.

    Returns:
        Last states (B, K, Q, D), and per layer the keys and values of the t words before and the Q tokens.
    """
    fusion = model.fusion
    x_BKQD = fusion.word_norm(fusion.words(ids_BKQ) + fusion.positions(positions_Q) + fusion.types.weight[0])
    num_captions, num_context = ids_BKQ.shape[1], draft.context_mask_B11C.shape[-1]
    layers: list[KeyValues] = []
    for index, (layer, context, image) in enumerate(zip(_layers(model), draft.context, draft.image, strict=True)):
        x_BTD = x_BKQD.flatten(1, 2)
        q, k, v = (x.unflatten(2, (num_captions, -1)) for x in _project(layer.attention, x_BTD, x_BTD))
        if draft.words:
            k = torch.cat([draft.words[index].keys, k], dim=3)
            v = torch.cat([draft.words[index].values, v], dim=3)
        layers.append(KeyValues(k, v))
        # All captions of an image ask its one context: for that they are one row of queries.
        of_context = torch.matmul(q.flatten(2, 3), context.keys.transpose(-1, -2)) + draft.context_mask_B11C
        of_words = torch.matmul(q, k.transpose(-1, -2)) + hidden_QT
        attention = torch.cat([of_context, of_words.flatten(2, 3)], dim=-1).softmax(-1)
        from_words = torch.matmul(attention[..., num_context:].unflatten(2, (num_captions, -1)), v)
        y = torch.matmul(attention[..., :num_context], context.values) + from_words.flatten(2, 3)
        x_BTD = _rest_of_layer(layer, x_BTD, y.transpose(1, 2).flatten(2), image, draft.image_valid_BS)
        x_BKQD = x_BTD.unflatten(1, (num_captions, -1))
    return x_BKQD, layers


def _layers(model: VLM) -> list[Layer]:
    """Those that read words, in order."""
    fusion = model.fusion
    return [*(fusion.text if fusion.config.has_encoders else ()), *fusion.layers]  # pyright: ignore[reportReturnType]


def _project(attention: Attention, x_BTD: Tensor, read_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries (B, H, T, d), keys and values (B, H, S, d)."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    q = heads(attention.query(x_BTD)) * attention.head_dim**-0.5
    return q, heads(attention.key(read_BSD)), heads(attention.value(read_BSD))


def _rest_of_layer(
    layer: Layer, x: Tensor, attended: Tensor, image: KeyValues | None, image_valid_BS: Tensor
) -> Tensor:
    """What follows the tokens' attention to each other in `Layer.forward`."""
    x = layer.attention_norm(x + layer.dropout(layer.attention.output(attended)))
    if image is not None:
        other = layer.cross_attention
        q = other.query(x).unflatten(-1, (other.num_heads, other.head_dim)).transpose(1, 2) * other.head_dim**-0.5
        scores = torch.matmul(q, image.keys.transpose(-1, -2)) + attention_mask(image_valid_BS)
        attention = scores.softmax(-1) * image_valid_BS[:, None, None, :]
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)
        looked = torch.matmul(attention, image.values).transpose(1, 2).flatten(2)
        x = layer.cross_norm(x + layer.dropout(other.output(looked)))
    return layer.feed_forward(x)


def _logits(model: VLM, states: Tensor) -> Tensor:
    assert model.word_head is not None, "a captioner has the head `words`"
    return model.word_head(states, model.fusion.words.weight)
