"""Make diffusers directories with random weights for benchmarks: published architectures, and a small one."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNETS = {  # the published unet/config.json; the rest are diffusers' defaults
    "sd15": SD15,
    "sd21": {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
             "use_linear_projection": True},
    "sdxl": {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
             "use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
    # for CPUs: SD1.5 with a quarter of every width, on pictures of half the side
    "small": {"sample_size": 32, "cross_attention_dim": 192, "attention_head_dim": 4,
              "block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16}}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
          "projection_dim": 1024, "hidden_act": "gelu"}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}
SMALL_L = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
           "projection_dim": 192}
TEXTS = {"sd15": [CLIP_L], "sd21": [CLIP_H], "sdxl": [CLIP_L, CLIP_G], "small": [SMALL_L]}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VAES = {family: {**VAE, "sample_size": 512, "scaling_factor": 0.13025 if family == "sdxl" else 0.18215}
        for family in UNETS}
VAES["small"] |= {"block_out_channels": (32, 64, 128, 128)}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}
BLOCK = 4_194_301  # random normals, repeated in all weights: drawing 3.5 billion takes minutes


def save_config(module: nn.Module, folder: Path, _: str = "") -> None:
    """Write config.json only."""
    folder.mkdir(parents=True, exist_ok=True)
    (module.save_config if hasattr(module, "save_config") else module.config.save_pretrained)(folder)


def save_random(module: nn.Module, folder: Path, stem: str) -> None:
    """Write the config and random fp16 weights of a module on the meta device.

    The weights' scale preserves that of activations; norms and biases are neutral.
    """
    tensors, normals = {}, torch.randn(BLOCK).half()
    for name, tensor in module.state_dict().items():
        if tensor.dim() < 2:
            tensors[name] = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.float16)
        else:
            std = 0.02 if "embedding.weight" in name else tensor[0].numel() ** -0.5
            tensors[name] = ((normals.repeat(-(-tensor.numel() // BLOCK))[:tensor.numel()] * std)
                             .view(tensor.shape))
    save_config(module, folder)
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def make(family: str, folder: Path, save: Callable[[nn.Module, Path, str], None] = save_random) -> Path:
    """Make a diffusers directory; return it. The tokenizer is the embedded world's, with 77 tokens.

    family: a key of UNETS.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from lpo_fast.shapes import PIPELINE
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", model_max_length=77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "vocab_size": 49408}
    kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNETS[family]), AutoencoderKL(**VAES[family])
        texts = {suffix: kind(CLIPTextConfig(**config | ids))
                 for (suffix, kind), config in zip(kinds.items(), TEXTS[family], strict=False)}
    save(unet, folder / "unet", "diffusion_pytorch_model")
    save(vae, folder / "vae", "diffusion_pytorch_model")
    for suffix, text in texts.items():
        save(text, folder / f"text_encoder{suffix}", "model")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


def make_lrm(model: Path, folder: Path) -> Path:
    """Make an untrained LRM of ``model`` without another copy of the networks; return its folder.

    Its denoiser is a link to the model's. Its text encoders are the model's, as in official LRMs whose text
    encoders were frozen.
    """
    from lpo_fast.lrm import checkpoint
    from lpo_fast.models import denoisers, families
    unet = denoisers.empty_down_mid(model / "unet")
    family = families.family_of(unet.config)
    name, kind = family.encoders[-1]
    config = families.without_weights(kind, model / name).config
    width = config.projection_dim if family.time_ids else config.hidden_size
    generator = torch.Generator().manual_seed(0)
    heads = {"visual_projection": (width, sum(checkpoint.feature_widths(unet, True)))}
    heads |= {} if family.time_ids else {"text_projection": (width, width)}
    state = {head: {"weight": torch.randn(shape, generator=generator) * shape[1] ** -0.5}
             for head, shape in heads.items()}
    folder.mkdir(parents=True)
    (folder / "unet").symlink_to((model / "unet").absolute())
    torch.save(state | {"logit_scale": 2.6592}, folder / "state_dict.pt")
    return folder
