"""The smallest models that the real loaders accept, and what tests do with them."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import lpo_fast
from lpo_fast.run import optimization

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden"
TOKENIZER = Path(lpo_fast.__file__).parent / "shapes" / "pipeline" / "tokenizer"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())


def update(optimizer: torch.optim.Optimizer, pairs: int, max_norm: float = 1.0) -> optimization.OptimizerStep:
    """A loop's without a loss scale, which float64 has none of."""
    return optimization.OptimizerStep(optimizer, torch.amp.GradScaler(DEVICE.type, enabled=False), max_norm, pairs, "")


def text_config(name: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A tiny text encoder's config that covers the tokenizer's words."""
    return CLIPTextConfig(**CONFIGS[name] | {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id})


def two_stages(name: str, **changes) -> dict:
    """Config of the first and the last stage of a denoiser, a layer each, for what the interpreter has to go through."""
    config = CONFIGS[name] | changes
    listed = {key: (values[0], values[-1]) for key, values in config.items() if isinstance(values, list | tuple)}
    return config | listed | {"layers_per_block": 1, "sample_size": 8}


def make_sd(folder: Path, text: str = "text_encoder", pad: str = "<|endoftext|>", prediction: str = "epsilon",
            **unet) -> Path:
    """A random Stable Diffusion 1.5 or 2.1 in miniature: 4×8×8 latents, 16×16 pictures, 16 tokens. unet: its config."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    width = CONFIGS[text]["hidden_size"]
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config(text, tokenizer)), tokenizer=tokenizer,
        unet=UNet2DConditionModel(**CONFIGS["unet_sd15"] | {"sample_size": 8, "cross_attention_dim": width} | unet),
        scheduler=DDIMScheduler(**CONFIGS["scheduler"] | {"prediction_type": prediction}), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def make_sd21(folder: Path, prediction: str = "v_prediction") -> Path:
    """SD2.1 in miniature: the VAE of ``make_sd``, another text width, and a tokenizer that pads with "!"."""
    return make_sd(folder, "text_encoder_2", "!", prediction, use_linear_projection=True, attention_head_dim=(1, 2, 2, 3))


def make_sdxl(folder: Path, sd: Path) -> Path:
    """SDXL in miniature, without model_index.json; the VAE and the scheduler are those of ``sd``."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    UNet2DConditionModel(**CONFIGS["unet_sdxl"] | {"sample_size": 8}).save_pretrained(folder / "unet")
    for suffix, encoder in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        encoder(text_config(f"text_encoder{suffix}", tokenizer)).save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    for part in ("vae", "scheduler"):
        shutil.copytree(sd / part, folder / part)
    return folder
