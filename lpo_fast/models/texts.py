"""Text features: tokens, encoders, all prompts of a run encoded once, on the device or within its reach."""

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
    """Text features of P prompts: context [P, L, D], pooled [P, E], and those of the null text, batch 1."""

    context: Tensor
    pooled: Tensor
    null: Text | None = None

    def __getitem__(self, index: Tensor | slice) -> Text:
        """Features of some of the prompts; the null text comes along."""
        return replace(self, context=self.context[index], pooled=self.pooled[index])

    def __len__(self) -> int:
        return len(self.context)

    @property
    def tensors(self) -> list[Tensor]:
        """All that networks read."""
        return [self.context, self.pooled, *(self.null.tensors if self.null else [])]

    def prefetch(self, prompts: Tensor) -> None:
        """All prompts' features are where they are used (else see ``Windowed``)."""

    def to(self, *args, **kwargs) -> Text:
        """Device and/or dtype."""
        null = self.null and self.null.to(*args, **kwargs)
        return Text(self.context.to(*args, **kwargs), self.pooled.to(*args, **kwargs), null)

    def prepared(self, dtype: torch.dtype) -> Text:
        """The context in the precision of a network that would round it at every use; the pooled features as they are."""
        return replace(self, context=self.context.to(dtype), null=self.null and self.null.prepared(dtype))

    def guided(self) -> Text:
        """[null] * P + prompts: both branches of classifier-free guidance as one batch of 2P."""
        null = Text(self.null.context.expand_as(self.context), self.null.pooled.expand_as(self.pooled))
        return concatenate([null, self])


def concatenate(texts: list[Text]) -> Text:
    """One Text of many, null text of the last."""
    return Text(torch.cat([t.context for t in texts]), torch.cat([t.pooled for t in texts]), texts[-1].null)


def tokenize(tokenizers: list[CLIPTokenizer], prompts: list[str]) -> list[Tensor]:
    """Token ids [P, L] for each tokenizer, truncated and padded to its model_max_length."""
    return [tok(prompts, padding="max_length", truncation=True, max_length=tok.model_max_length,
                return_tensors="pt").input_ids for tok in tokenizers]


def encode(family: Family, encoders: list[nn.Module], ids: list[Tensor]) -> Text:
    """Text features (without null) of token ids [P, L], one tensor an encoder."""
    outputs = [encoder(i, output_hidden_states=family.penultimate) for encoder, i in zip(encoders, ids, strict=True)]
    layers = [out.hidden_states[-2] if family.penultimate else out.last_hidden_state for out in outputs]
    pooled = outputs[-1].text_embeds if family.time_ids else outputs[-1].pooler_output
    return Text(torch.cat(layers, -1), pooled)


class TextWindow:
    """Text features of all prompts in the host's pinned memory; on the device those of a few, as one ``Text`` would be.

    ``prefetch`` copies them there, into tensors whose addresses never change, as CUDA graphs need it. The copy waits for
    nothing: it is queued behind the work that the device still has.
    """

    def __init__(self, text: Text, size: int):
        """text: features on the host, their null text on the device; size: of the window, prompts."""
        device = text.null.context.device
        self.all, self.null = text, text.null
        if device.type == "cuda":
            self.all = replace(text, context=text.context.pin_memory(), pooled=text.pooled.pin_memory())
        self.numbers = torch.full((size,), -1, device=device)
        self.here = Text(*(torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=device) for x in (text.context, text.pooled)))

    @property
    def tensors(self) -> list[Tensor]:
        """All that networks read: what is on the device."""
        return [self.numbers, *self.here.tensors, *self.null.tensors]

    def prefetch(self, prompts: Tensor) -> None:
        """Prompt numbers on the host, int64 [up to size]: those that will be asked for next."""
        numbers = prompts.unique()
        for target, source in ((self.numbers, numbers), (self.here.context, self.all.context[numbers]),
                               (self.here.pooled, self.all.pooled[numbers])):
            source = source.pin_memory() if target.is_cuda else source
            target[:len(numbers)].copy_(source, non_blocking=True)

    def __getitem__(self, prompts: Tensor) -> Text:
        """Features of prompts that were brought."""
        return replace(self.here[(prompts[:, None] == self.numbers).int().argmax(1)], null=self.null)

    def __len__(self) -> int:
        return len(self.all)


@torch.no_grad()
def encode_prompts(family: Family, tokenizers: list[CLIPTokenizer], encoders: list[nn.Module], prompts: list[str],
                   *, zero_null: bool, batch: int = 64, dtype: torch.dtype = torch.float32,
                   placement: Callable[[int], torch.device | str] | None = None) -> Text:
    """Text features of all prompts, in batches on the encoders' device, with the null text of a policy or an LRM.

    dtype: of the context (``Text.prepared``). placement: tells from the bytes of all features where they are kept.
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
              state: dict[str, Tensor] | None = None) -> list[nn.Module]:
    """The family's text encoders, fp32: from ``state`` (names start with the subfolder), from below ``folder`` (an LRM's
    own), or from below ``path``, whichever has them first. Raises InputError if weights are missing."""
    encoders = []
    for name, cls in family.encoders:
        source = (folder if folder is not None and (folder / name).is_dir() else path) / name
        how = {"variant": families.variant(source), "dtype": torch.float32, "output_loading_info": True, "use_safetensors": True,
               "attn_implementation": "sdpa"}  # else a config.json may name code of the hub
        if own := families.part(state or {}, name):
            encoder, info = cls.from_pretrained(None, config=cls.config_class.from_pretrained(source), state_dict=own, **how)
        else:
            encoder, info = cls.from_pretrained(source, **how)
        if missing := info["missing_keys"]:
            raise InputError(str(source), f"lacks {len(missing)} weights, the first {min(missing)!r}",
                             "use a whole text encoder")
        encoders.append(encoder)
    return encoders


def load_tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    """The family's tokenizers below ``path``, or the only one, which lies there itself."""
    if len(family.tokenizers) == 1 and not (path / family.tokenizers[0]).is_dir():
        return [CLIPTokenizer.from_pretrained(path)]
    return [CLIPTokenizer.from_pretrained(path, subfolder=name) for name in family.tokenizers]
