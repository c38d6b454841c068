"""The smallest models that the real loaders accept, and what tests do with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import lpo_fast
from lpo_fast.models import families, texts
from lpo_fast.run import optimization, states

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden"
TOKENIZER = Path(lpo_fast.__file__).parent / "shapes" / "pipeline" / "tokenizer"
CLIP_SIZE, CLIP_DIM = 16, 12
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())


def update(optimizer: torch.optim.Optimizer, pairs: int, max_norm: float = 1.0) -> optimization.OptimizerStep:
    """Return a loop's optimizer step without a loss scale, which float64 has none of."""
    return optimization.OptimizerStep(optimizer, torch.amp.GradScaler(DEVICE.type, enabled=False), max_norm,
                                      pairs, "")


def text_config(name: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return a tiny text encoder's config that covers the tokenizer's words."""
    return CLIPTextConfig(**CONFIGS[name] | {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id})


def two_stages(name: str, **changes) -> dict:
    """Return the config of the first and the last stage of a denoiser, a layer each,
    for what the interpreter has to go through."""
    config = CONFIGS[name] | changes
    listed = {key: (values[0], values[-1]) for key, values in config.items()
              if isinstance(values, list | tuple)}
    return config | listed | {"layers_per_block": 1, "sample_size": 8}


def make_sd(folder: Path, text: str = "text_encoder", pad: str = "<|endoftext|>", prediction: str = "epsilon",
            **unet) -> Path:
    """Make a random Stable Diffusion 1.5 or 2.1 in miniature: 4×8×8 latents, 16×16 pictures, 16 tokens.
    unet: its config."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    width = CONFIGS[text]["hidden_size"]
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config(text, tokenizer)), tokenizer=tokenizer,
        unet=UNet2DConditionModel(**CONFIGS["unet_sd15"]
                                  | {"sample_size": 8, "cross_attention_dim": width} | unet),
        scheduler=DDIMScheduler(**CONFIGS["scheduler"] | {"prediction_type": prediction}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def make_sd21(folder: Path, prediction: str = "v_prediction") -> Path:
    """Make SD2.1 in miniature: the VAE of ``make_sd``, another text width,
    and a tokenizer that pads with "!"."""
    return make_sd(folder, "text_encoder_2", "!", prediction, use_linear_projection=True,
                   attention_head_dim=(1, 2, 2, 3))


def make_sdxl(folder: Path, sd: Path) -> Path:
    """Make SDXL in miniature, without model_index.json; the VAE and the scheduler are those of ``sd``."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    UNet2DConditionModel(**CONFIGS["unet_sdxl"] | {"sample_size": 8}).save_pretrained(folder / "unet")
    for suffix, encoder in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        encoder(text_config(f"text_encoder{suffix}",
                            tokenizer)).save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    for part in ("vae", "scheduler"):
        shutil.copytree(sd / part, folder / part)
    return folder


def parts(rank: int = 2, ema: bool = False, bias: bool = True) -> dict:
    """Return what a loop saves, after a step."""
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(3, rank, bias=bias), nn.Linear(rank, 1).requires_grad_(False))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    average = EMAModel(module.parameters(), decay=0.5) if ema else None
    return {"weights": states.Trained(module), "optimizer": optimizer,
            "scaler": torch.amp.GradScaler("cpu", enabled=False), "ema": average}


def pipeline(folder: Path):
    """Return diffusers' pipeline of a directory, put together by hand (SDXL's test directory has
    no model_index.json)."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    family = families.family_of(unet.config)
    parts = {"vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"), "unet": unet,
             "scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler")}
    parts |= dict(zip((name for name, _ in family.encoders), texts.load_text(folder, family), strict=True))
    parts |= dict(zip(family.tokenizers, texts.load_tokenizers(folder, family), strict=True))
    if family.time_ids:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def pictures(n: int = 3) -> list[Image.Image]:
    """Return random pictures for the CLIP of ``make_clip``."""
    values = np.random.default_rng(0).integers(0, 256, (n, CLIP_SIZE, CLIP_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def make_clip(folder: Path) -> None:
    """Write a random CLIP with its processor, and an aesthetic head."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CONFIGS["text_encoder"] | {"vocab_size": len(tokenizer),
                                      "max_position_embeddings": tokenizer.model_max_length,
                                      "eos_token_id": tokenizer.eos_token_id, "projection_dim": CLIP_DIM}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": CLIP_SIZE, "patch_size": 4, "projection_dim": CLIP_DIM}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_DIM,
                                 logit_scale_init_value=1.7))
    model.save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE},
                                crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    layers = nn.Sequential(nn.Linear(CLIP_DIM, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1),
                           nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, folder / "head.pth")
