"""What differs between model families, as data: text conditioning, null rule, added conditions, pooled stages.

SD1.5 and SD2.1 share a family (one CLIP text encoder, "" as the null text); SDXL has two encoders, pooled text and time
ids, and zeros as the policy's null text. The family is read from the denoiser's config, never asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpo_fast.errors import InputError


@dataclass(frozen=True)
class Family:
    """encoders: (subfolder, class) of each text encoder; its tokenizer lies in the subfolder of the same suffix.

    penultimate: the context is the hidden state before the last layer, else the final output. zero_null: the policy's
    null text is zeros, not the encoding of "" (a reward model always encodes ""). time_ids: the denoiser is also given
    pooled text and sizes; the pooled text is then a projection already and LRMs need no text projection of their own.
    """

    name: str
    encoders: tuple[tuple[str, type[nn.Module]], ...]
    penultimate: bool = False
    zero_null: bool = False
    time_ids: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, in the order of the encoders."""
        return tuple(name.replace("text_encoder", "tokenizer") for name, _ in self.encoders)


SD = Family("sd", (("text_encoder", CLIPTextModel),))
SDXL = Family("sdxl", (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)),
              penultimate=True, zero_null=True, time_ids=True)


def family_of(unet_config: dict) -> Family:
    """The family of a denoiser, from its config."""
    return SDXL if unet_config.get("addition_embed_type") == "text_time" else SD


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

    def bring(self, prompts: Tensor) -> None:
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


class Windowed:
    """Text features of all prompts in the host's pinned memory; on the device those of a few, as one ``Text`` would be.

    ``bring`` copies them there, into tensors whose addresses never change, as CUDA graphs need it. The copy waits for
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

    def bring(self, prompts: Tensor) -> None:
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
                   home: Callable[[int], torch.device | str] | None = None) -> Text:
    """Text features of all prompts, in batches on the encoders' device, with the null text of a policy or an LRM.

    dtype: of the context (``Text.prepared``). home: tells from the bytes of all features where they are kept.
    """
    device = next(encoders[0].parameters()).device
    texts, kept = [], device
    for first in range(0, len(prompts), batch):
        ids = tokenize(tokenizers, prompts[first:first + batch])
        text = encode(family, encoders, [i.to(device) for i in ids]).prepared(dtype)
        if home and not texts:
            kept = home(sum(x.nbytes for x in (text.context, text.pooled)) * len(prompts) // len(text))
        texts.append(text.to(kept))
    null = encode(family, encoders, [i.to(device) for i in tokenize(tokenizers, [""])])
    if zero_null:
        null = Text(torch.zeros_like(null.context), torch.zeros_like(null.pooled))
    return replace(concatenate(texts), null=null.prepared(dtype))


def time_ids(height: int, width: int) -> Tensor:
    """SDXL's size conditions [1, 6]: original size, crop corner, target size, in pixels."""
    return torch.tensor([[height, width, 0, 0, height, width]])


def added_conditions(text: Text, sizes: Tensor | None) -> dict[str, Tensor] | None:
    """The denoiser's added_cond_kwargs, or None for families without."""
    return None if sizes is None else {"text_embeds": text.pooled, "time_ids": sizes.expand(len(text), -1)}


def predict(unet: nn.Module, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
    """Network outputs [2B, C, H, W], null pass first, for latents x_t [B, C, H, W] at t [B]."""
    both = text.guided()
    return unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both.context, return_dict=False,
                added_cond_kwargs=added_conditions(both, sizes))[0]


def down_mid(unet: nn.Module, x: Tensor, t: Tensor, text: Text, sizes: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Run the down and mid blocks only. Each down block's last map before its down-sampler, and the mid map."""
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    added = unet.get_aug_embed(emb=emb, encoder_hidden_states=text.context,
                               added_cond_kwargs=added_conditions(text, sizes))
    emb = emb if added is None else emb + added
    h, stages = unet.conv_in(x), []
    for block in unet.down_blocks:
        cross = {"encoder_hidden_states": text.context} if getattr(block, "has_cross_attention", False) else {}
        h, residuals = block(hidden_states=h, temb=emb, **cross)
        stages.append(residuals[len(block.resnets) - 1])
    return stages, unet.mid_block(h, emb, encoder_hidden_states=text.context)


def empty_down_mid(folder: Path) -> UNet2DConditionModel:
    """A denoiser without its up blocks, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
    return unet


def load_down_mid(folder: Path, state: dict[str, Tensor] | None = None) -> UNet2DConditionModel:
    """A denoiser without its up blocks, whose weights are never read from disk. state: weights that go before its own."""
    unet = empty_down_mid(folder)
    unet.register_to_config(_name_or_path=str(folder.absolute()))  # where ``up_blocks`` finds the rest
    wanted = set(unet.state_dict())
    found = {name: tensor for name, tensor in (state or {}).items() if name in wanted}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in wanted - found.keys()}
    if missing := wanted - found.keys():
        raise InputError(str(folder), f"lacks {len(missing)} weights, the first {min(missing)!r}",
                         "point to a whole diffusers U-Net")
    unet.load_state_dict(found, assign=True)
    return unet.float()


def up_blocks(unet: nn.Module) -> dict[str, Tensor]:
    """What ``load_down_mid`` left on disk, fp32: whole denoisers are written with it. Empty if the files are gone."""
    kept, rest = set(unet.state_dict()), {}
    for file in weight_files(Path(unet.config._name_or_path)):
        with safe_open(file, "pt") as tensors:
            rest |= {name: tensors.get_tensor(name).float() for name in tensors.keys() if name not in kept}
    return rest


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: all shards, of variants (.fp16, .non_ema) only if there is nothing else."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if "." not in file.stem] or [file for file in files if ".fp16" in file.stem]


def variant(folder: Path) -> str | None:
    """The variant that ``from_pretrained`` has to be asked for: None where full precision lies there."""
    return "fp16" if any(".fp16" in file.stem for file in weight_files(folder)) else None


def load_unet(path: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The denoiser below ``path``."""
    folder = path / "unet"
    return UNet2DConditionModel.from_pretrained(folder, variant=variant(folder), torch_dtype=dtype, use_safetensors=True)


def load_text(path: Path, family: Family, folder: Path | None = None,
              state: dict[str, Tensor] | None = None) -> list[nn.Module]:
    """The family's text encoders, fp32: from ``state`` (names start with the subfolder), from below ``folder`` (an LRM's
    own), or from below ``path``, whichever has them first. Raises InputError if weights are missing."""
    encoders = []
    for name, cls in family.encoders:
        source = (folder if folder is not None and (folder / name).is_dir() else path) / name
        how = {"variant": variant(source), "dtype": torch.float32, "output_loading_info": True, "use_safetensors": True,
               "attn_implementation": "sdpa"}  # else a config.json may name code of the hub
        if own := part(state or {}, name):
            encoder, info = cls.from_pretrained(None, config=cls.config_class.from_pretrained(source), state_dict=own, **how)
        else:
            encoder, info = cls.from_pretrained(source, **how)
        if missing := info["missing_keys"]:
            raise InputError(str(source), f"lacks {len(missing)} weights, the first {min(missing)!r}",
                             "use a whole text encoder")
        encoders.append(encoder)
    return encoders


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a submodule, without its name in front."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def load_tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    """The family's tokenizers below ``path``, or the only one, which lies there itself."""
    if len(family.tokenizers) == 1 and not (path / family.tokenizers[0]).is_dir():
        return [CLIPTokenizer.from_pretrained(path)]
    return [CLIPTokenizer.from_pretrained(path, subfolder=name) for name in family.tokenizers]


def vae_folder(path: Path) -> Path:
    """Where the VAE lies: below a pipeline, or ``path`` itself."""
    return path / "vae" if (path / "vae").is_dir() else path


def vae_config(path: Path) -> dict:
    """The VAE's config.json, with diffusers' default of what old ones lack. Nothing is loaded."""
    return {"scaling_factor": 0.18215} | json.loads((vae_folder(path) / "config.json").read_text())


def load_vae(path: Path) -> AutoencoderKL:
    """The VAE of a pipeline, or a directory of its own; frozen, fp32."""
    folder = vae_folder(path)
    vae = AutoencoderKL.from_pretrained(folder, variant=variant(folder), torch_dtype=torch.float32, use_safetensors=True)
    return vae.requires_grad_(False).eval()


def pixels(path: Path, unet_config: dict, resolution: int = 0) -> int:
    """Height and width of the pictures of a denoiser whose VAE is below ``path``: ``resolution``, or 0 for its own."""
    return resolution or unet_config["sample_size"] * pixels_per_latent(path)


def pixels_per_latent(path: Path) -> int:
    """How many pixels a latent stands for in each direction: 8, unless the VAE below ``path`` says otherwise."""
    config = path / "vae" / "config.json"
    stages = len(json.loads(config.read_text())["block_out_channels"]) if config.is_file() else 4
    return 2 ** (stages - 1)
