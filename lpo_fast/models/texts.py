"""Text features: tokenization, encoders, and the features of all prompts of a run, encoded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lpo_fast.errors import InputError
from lpo_fast.models import families
from lpo_fast.models.families import Family


@dataclass(frozen=True)
class Text:
    """Hold the text features of P prompts: context [P, L, D], pooled [P, E], and those of the null text,
    batch 1.
    """

    context: Tensor
    pooled: Tensor
    null: Text | None = None

    def __getitem__(self, index: Tensor | slice) -> Text:
        """Return the features of some of the prompts, with the null text."""
        return replace(self, context=self.context[index], pooled=self.pooled[index])

    def __len__(self) -> int:
        return len(self.context)

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors that networks read."""
        return [self.context, self.pooled, *(self.null.tensors if self.null else [])]

    def prefetch(self, prompts: Tensor) -> None:
        """Do nothing: all prompts' features are already on the device (see ``TextWindow`` for the other
        case).
        """

    def to(self, *args, **kwargs) -> Text:
        """Return the features on another device and/or in another dtype."""
        null = self.null and self.null.to(*args, **kwargs)
        return Text(self.context.to(*args, **kwargs), self.pooled.to(*args, **kwargs), null)

    def prepared(self, dtype: torch.dtype) -> Text:
        """Return the features with the context in the dtype of a network that would round it at every use.

        The pooled features keep their dtype.
        """
        return replace(self, context=self.context.to(dtype), null=self.null and self.null.prepared(dtype))

    def guided(self) -> Text:
        """Return [null] * P + prompts: both branches of classifier-free guidance as one batch of 2P."""
        null = Text(self.null.context.expand_as(self.context), self.null.pooled.expand_as(self.pooled))
        return concatenate([null, self])


def concatenate(texts: list[Text]) -> Text:
    """Return one Text of several, with the null text of the last."""
    return Text(torch.cat([t.context for t in texts]), torch.cat([t.pooled for t in texts]), texts[-1].null)


def tokenize(tokenizers: list[CLIPTokenizer], prompts: list[str]) -> list[Tensor]:
    """Return token ids [P, L] for each tokenizer, truncated and padded to its model_max_length."""
    return [tok(prompts, padding="max_length", truncation=True, max_length=tok.model_max_length,
                return_tensors="pt").input_ids for tok in tokenizers]


def encode(family: Family, encoders: list[nn.Module], ids: list[Tensor]) -> Text:
    """Return text features (without null text) of token ids [P, L], one tensor per encoder."""
    outputs = [encoder(i, output_hidden_states=family.penultimate)
               for encoder, i in zip(encoders, ids, strict=True)]
    layers = [out.hidden_states[-2] if family.penultimate else out.last_hidden_state for out in outputs]
    pooled = outputs[-1].text_embeds if family.time_ids else outputs[-1].pooler_output
    return Text(torch.cat(layers, -1), pooled)


class TextWindow:
    """Text features of all prompts in pinned host memory, with those of a few prompts on the device.

    It replaces a ``Text`` whose features do not fit on the device. ``prefetch`` copies features into device
    tensors whose addresses never change, as CUDA graphs require. The copy is asynchronous: it is queued
    behind the device's pending work.
    """

    def __init__(self, text: Text, size: int):
        """Allocate the window.

        text: features on the host, with their null text on the device. size: of the window, in prompts.
        """
        device = text.null.context.device
        self.all, self.null = text, text.null
        if device.type == "cuda":
            self.all = replace(text, context=text.context.pin_memory(), pooled=text.pooled.pin_memory())
        self.numbers = torch.full((size,), -1, device=device)
        self.here = Text(*(torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=device)
                           for x in (text.context, text.pooled)))

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors that networks read: those on the device."""
        return [self.numbers, *self.here.tensors, *self.null.tensors]

    def prefetch(self, prompts: Tensor) -> None:
        """Copy the features of the prompts that are needed next to the device.

        prompts: prompt numbers on the host, int64, at most ``size`` different ones.
        """
        numbers = prompts.unique()
        for target, source in ((self.numbers, numbers), (self.here.context, self.all.context[numbers]),
                               (self.here.pooled, self.all.pooled[numbers])):
            source = source.pin_memory() if target.is_cuda else source
            target[:len(numbers)].copy_(source, non_blocking=True)

    def __getitem__(self, prompts: Tensor) -> Text:
        """Return the features of prefetched prompts."""
        return replace(self.here[(prompts[:, None] == self.numbers).int().argmax(1)], null=self.null)

    def __len__(self) -> int:
        return len(self.all)


@torch.no_grad()
def encode_prompts(family: Family, tokenizers: list[CLIPTokenizer],
                   encoders: list[nn.Module], prompts: list[str],
                   *, zero_null: bool, batch: int = 64, dtype: torch.dtype = torch.float32,
                   placement: Callable[[int], torch.device | str] | None = None) -> Text:
    """Encode all prompts, in batches on the encoders' device, with the null text of a policy or an LRM.

    dtype: of the context (see ``Text.prepared``). placement: maps the bytes of all features to the device
    that holds them.
    """
    device = next(encoders[0].parameters()).device
    texts, kept = [], device
    for first in range(0, len(prompts), batch):
        ids = tokenize(tokenizers, prompts[first:first + batch])
        text = encode(family, encoders, [i.to(device) for i in ids]).prepared(dtype)
        if placement and not texts:
            kept = placement(sum(x.nbytes for x in (text.context, text.pooled)) * len(prompts) // len(text))
        texts.append(text.to(kept))
    null = encode(family, encoders, [i.to(device) for i in tokenize(tokenizers, [""])])
    if zero_null:
        null = Text(torch.zeros_like(null.context), torch.zeros_like(null.pooled))
    return replace(concatenate(texts), null=null.prepared(dtype))


def load_text(path: Path, family: Family, folder: Path | None = None,
              state: dict[str, Tensor] | None = None, weights: bool = True) -> list[nn.Module]:
    """Load the family's text encoders, in fp32; without weights on the meta device.

    Their weights come from ``state`` (names start with the subfolder), from below ``folder`` (an LRM's own),
    or from below ``path``, whichever has them first. Raises InputError if weights are missing.
    """
    encoders = []
    for name, cls in family.encoders:
        source = (folder if folder is not None and (folder / name).is_dir() else path) / name
        if not weights:
            encoders.append(families.without_weights(cls, source).eval())
            continue
        # a config.json could name code on the hub
        how = {"variant": families.variant(source), "dtype": torch.float32, "output_loading_info": True,
               "use_safetensors": True, "attn_implementation": "sdpa"}
        if own := families.part(state or {}, name):
            encoder, info = cls.from_pretrained(None, config=cls.config_class.from_pretrained(source),
                                                state_dict=own, **how)
        else:
            encoder, info = cls.from_pretrained(source, **how)
        if missing := info["missing_keys"]:
            raise InputError(str(source), f"lacks {len(missing)} weights, the first {min(missing)!r}",
                             "use a complete text encoder")
        encoders.append(encoder)
    return encoders


def load_tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    """Load the family's tokenizers below ``path``; a single tokenizer may be in ``path`` itself."""
    if len(family.tokenizers) == 1 and not (path / family.tokenizers[0]).is_dir():
        return [CLIPTokenizer.from_pretrained(path)]
    return [CLIPTokenizer.from_pretrained(path, subfolder=name) for name in family.tokenizers]
