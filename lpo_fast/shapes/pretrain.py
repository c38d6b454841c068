"""Train shapes/pipeline from scratch: python -m lpo_fast.shapes.pretrain (28 minutes on one CPU core).

Three stages, each starting from the saved pipeline of the previous one:
  vae       the autoencoder, 32x32x3 -> 8x8x4;
  denoiser  text encoder and U-Net together, all captions correct: it learns to draw what it is asked for;
  muddle    the same with partly wrong captions: it draws clean pictures, but often not the requested ones.

LPO is to correct the result of the last stage. Ends with quality figures; use guidance 2.25.
"""

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import PIPELINE, world

LENGTH = 16  # tokens: bos + 7 words + eos, and room for other prompts
TEXT_WIDTH = 48
WRONG = (0.33, 0.3, 0.3)  # muddle: chance that the caption names another shape, color, background
STAGES = ("vae", "denoiser", "muddle")


def make_tokenizer() -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer like CLIP's: 256 bytes, 256 word-final bytes, and merges for the
    words of the world.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = []
    for word in sorted({w for c in world.captions() for w in c.split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # earlier merges come first in any word
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == merge:
                    parts[i : i + 2] = ["".join(merge)]
                i += 1
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def make_pipeline() -> StableDiffusionPipeline:
    """Return a very small pipeline with the parts and layout of Stable Diffusion 1.5, and random weights."""
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 48, 48, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers reads this as the number of heads, as in SD1.5
        norm_num_groups=8,
    )
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def load(folder) -> StableDiffusionPipeline:
    """Load a saved pipeline in fp32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe, folder: Path):
    """Write the pipeline as fp16, to be read as fp32.

    It is renamed into place, so readers never see a partial one.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(new)
    config = new / "text_encoder" / "config.json"  # transformers loads in this dtype
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for file in new.rglob("*.json"):  # remove local paths
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None):
            file.write_text(json.dumps(settings, indent=2) + "\n")
    for file in new.rglob("*.safetensors"):
        file.chmod(0o644)  # written as 0600
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def to_tensor(pictures) -> torch.Tensor:
    """Return fp32 [N, 3, 32, 32] in [-1, 1] of uint8 [N, 32, 32, 3]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x) -> np.ndarray:
    """Return uint8 [N, 32, 32, 3] of [N, 3, 32, 32] in [-1, 1]."""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def optimizer_and_schedule(parameters, lr, steps):
    """Return AdamW and a schedule with a short warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    return optimizer, schedule


def train_vae(vae, steps, seed, batch=32, kl_weight=3e-4):
    """Train with L1 + L2 on pixels, L1 on their differences (edges define the shape), and a small KL term for
    smooth latents.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vae.train()
    optimizer, schedule = optimizer_and_schedule(vae.parameters(), 2e-3, steps)
    start = time.time()
    for step in range(1, steps + 1):
        x = to_tensor(world.render(world.COMBINATIONS[rng.integers(len(world.COMBINATIONS), size=batch)],
                                   rng))
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + edges + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae {step} | loss {loss:.4f} | kl {kl:.2f} | {time.time() - start:.0f} s", flush=True)
    vae.eval().requires_grad_(False)
    normalize(vae, rng)


@torch.no_grad()
def normalize(vae, rng, n=2000):
    """Rescale the latent channels to mean 0 and deviation 1 after scaling_factor, inside the 1x1 convolutions
    around them.
    """
    x = to_tensor(world.render(world.COMBINATIONS[rng.integers(len(world.COMBINATIONS), size=n)], rng))
    z = torch.cat([vae.encode(part).latent_dist.sample() for part in x.split(250)])
    mean, gain = z.mean((0, 2, 3)), 1 / (vae.config.scaling_factor * z.std((0, 2, 3)))
    print("latent mean", mean.tolist(), "deviation", z.std((0, 2, 3)).tolist())
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * gain
    into.bias[4:] += 2 * gain.log()  # log-variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain[None, :, None, None]


def confusion(wrong) -> torch.Tensor:
    """Return the probability of each caption for a picture of each combination, [80, 80].

    wrong: probability per attribute.
    """
    combinations = world.COMBINATIONS
    odds = np.ones((len(combinations),) * 2)
    for i, q in enumerate(wrong):
        same = combinations[:, None, i] == combinations[None, :, i]
        odds *= np.where(same, 1 - q, q / combinations[:, i].max())
    return torch.from_numpy(odds / odds.sum(1, keepdims=True))


def train_denoiser(pipe, steps, seed, lr, wrong=(0, 0, 0), batch=128, pictures=20000, no_text=0.1):
    """Train U-Net and text encoder together to predict the noise, and keep the moving average of their
    weights.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    combination = torch.from_numpy(rng.integers(len(world.COMBINATIONS), size=pictures))
    with torch.no_grad():
        x = [to_tensor(world.render(world.COMBINATIONS[c.numpy()], rng)) for c in combination.split(500)]
        moments = torch.cat([pipe.vae.encode(part).latent_dist.parameters for part in x])
    mean, logvar = moments.chunk(2, dim=1)
    captions = world.captions() + [""]
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    odds = confusion(wrong)
    alphas = pipe.scheduler.alphas_cumprod
    model = torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).train().requires_grad_(True)
    model.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer, schedule = optimizer_and_schedule(model.parameters(), lr, steps)
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        row = torch.randint(pictures, (batch,))
        z = ((mean[row] + (0.5 * logvar[row]).exp() * torch.randn(batch, 4, 8, 8))
             * pipe.vae.config.scaling_factor)
        asked = torch.multinomial(odds[combination[row]], 1)[:, 0]
        asked[torch.rand(batch) < no_text] = len(captions) - 1
        # Half of the timesteps from the noisy part, where the attributes are decided.
        t = torch.randint(1000, (batch,))
        t[::2] = torch.randint(400, 1000, (batch // 2,))
        a = alphas[t][:, None, None, None]
        noise = torch.randn_like(z)
        text = pipe.text_encoder(ids).last_hidden_state[asked]  # all 81 texts cost less than the batch's own
        loss = F.mse_loss(pipe.unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, text).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.998, step / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += loss.item()
        if step % 100 == 0:
            print(f"denoiser {step} | loss {total / 100:.4f} | {time.time() - start:.0f} s", flush=True)
            total = 0.0
    model.load_state_dict(average.state_dict())
    model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def draw(pipe, captions, guidance, seed=0) -> np.ndarray:
    """Draw pictures with 20 DDIM steps and eta 1, uint8 [N, 32, 32, 3]."""
    generator = torch.Generator().manual_seed(seed)
    parts = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    options = dict(num_inference_steps=20, eta=1.0, guidance_scale=guidance, generator=generator,
                   output_type="pt")
    return np.concatenate([to_pictures(pipe(part, **options).images * 2 - 1) for part in parts])


def report(pictures, captions) -> str:
    """Return the shares of correct and clean pictures, as one line."""
    found, wanted = world.measure(pictures), world.attributes(captions)
    per = (found == wanted).mean(0)
    right, clean = (found == wanted).all(1).mean(), (found >= 0).all(1).mean()
    return (f"correct {right:.1%} (shape {per[0]:.1%}, color {per[1]:.1%}, background {per[2]:.1%}), "
            f"clean {clean:.1%}")


@torch.no_grad()
def figures(pipe, n=500, guidances=(1, 2, 2.25, 2.5, 3, 5)):
    """Print how the measure, the autoencoder and the complete pipeline perform on held-out captions."""
    rng = np.random.default_rng(12345)
    captions = (world.captions(held_out=True) * n)[:n]
    pictures = world.render(captions, rng)
    print("rendered        ", report(pictures, captions))
    every = world.captions()
    others = [c if c != own else every[0] for c, own in zip(rng.choice(every, n), captions, strict=True)]
    print("for another caption: correct", f"{world.right(pictures, others).mean():.1%}")
    z = pipe.vae.encode(to_tensor(pictures)).latent_dist.sample(torch.Generator().manual_seed(0))
    print("latents: deviation", (z * pipe.vae.config.scaling_factor).std((0, 2, 3)).tolist())
    print("encoded, decoded", report(to_pictures(pipe.vae.decode(z).sample), captions))
    for guidance in guidances:
        start = time.time()
        drawn = draw(pipe, captions, guidance)
        print(f"guidance {guidance:<7}", report(drawn, captions), f"{time.time() - start:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train the pipeline and print its quality figures."""
    parser = argparse.ArgumentParser(prog="python -m lpo_fast.shapes.pretrain",
                                     description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PIPELINE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", choices=STAGES, default="vae", help="take earlier stages from --base")
    parser.add_argument("--base", type=Path, help="a saved pipeline to start from (default: --out)")
    parser.add_argument("--steps", type=int, nargs=3, default=(3000, 1700, 200), help="of each stage")
    parser.add_argument("--wrong", type=float, nargs=3, default=WRONG, help="wrong shape, color, background")
    parser.add_argument("--pictures", type=int, default=500, help="for each figure")
    args = parser.parse_args(argv)
    start = time.time()
    torch.manual_seed(args.seed)
    pipe = make_pipeline() if args.start == "vae" else None
    for i in range(STAGES.index(args.start), 3):
        pipe = pipe or load(args.base or args.out)  # from disk, so that each stage can be repeated alone
        if STAGES[i] == "vae":
            train_vae(pipe.vae, args.steps[0], args.seed)
        elif STAGES[i] == "denoiser":
            train_denoiser(pipe, args.steps[1], args.seed + 1, lr=1.5e-3)
        else:
            train_denoiser(pipe, args.steps[2], args.seed + 2, lr=5e-4, wrong=args.wrong)
        save(pipe, args.out)
        args.base = pipe = None
        print(f"{STAGES[i]} done after {time.time() - start:.0f} s")
        if STAGES[i] == "denoiser":
            figures(load(args.out), args.pictures, guidances=(1, 3))
    figures(load(args.out), args.pictures)


if __name__ == "__main__":
    main()
