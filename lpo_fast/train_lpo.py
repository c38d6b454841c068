"""The LPO loop: sample pairs for a batch of prompts, train the policy on them, repeat (arXiv 2502.01051, algorithm 1)."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lpo_fast import backbone, checkpoint, data, loss, runs, sample, schedule, select, speed
from lpo_fast.backbone import Text
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.loss import StepDPO
from lpo_fast.sample import CounterNoise, Pairs, Predict, Score
from lpo_fast.schedule import Schedule

PICTURE_EPOCH = 0xFFFFFFFF  # pictures for the report have noise of their own


class Policy:
    """The denoiser that trains and its reference: the same weights with the adapters off, or a frozen copy of them."""

    def __init__(self, unet: UNet2DConditionModel, text: Text, sizes: Tensor | None, *, full: bool, precision: str = "no"):
        self.unet, self.text, self.sizes, self.precision = unet, text, sizes, precision
        self.frozen = copy.deepcopy(unet).requires_grad_(False) if full else None

    def predict(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """(null, text) outputs in fp32 for latents x_t [B, C, H, W] at t [B] and prompt numbers [B]."""
        return self._evaluate(self.unet, x_t, t, prompts)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the model that training started from."""
        if self.frozen is not None:
            return self._evaluate(self.frozen, x_t, t, prompts)
        with adapters_off(self.unet):
            return self._evaluate(self.unet, x_t, t, prompts)

    def _evaluate(self, unet: nn.Module, x_t: Tensor, t: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        with speed.autocast(self.precision):
            null, text = backbone.predict(unet, x_t, t, self.text[prompts], self.sizes)
        return null.float(), text.float()


@contextmanager
def adapters_off(unet: nn.Module) -> Iterator[None]:
    """Without the LoRA. Unlike peft's ``disable_adapters`` this leaves requires_grad alone."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def pair_loss(policy: Policy, sched: Schedule, pairs: Pairs, weight: Tensor, *, guidance: float, beta: float,
              eps: float) -> StepDPO:
    """One policy and one reference evaluation serve both members of each pair. weight: [N], see ``loss.step_dpo``."""
    at = pairs.x_t, pairs.t, pairs.prompt
    return loss.step_dpo(sched, pairs.x_t, pairs.winner, pairs.loser, pairs.t, policy.predict(*at),
                         policy.reference(*at), guidance=guidance, beta=beta, eps=eps, weight=weight)


def padded(pairs: Pairs, size: int) -> Pairs:
    """Exactly ``size`` pairs: the last ones repeat the first, marked as not valid, so that shapes never change."""
    index = torch.arange(size, device=pairs.t.device)
    real = index < len(pairs.t)
    return pairs.take(torch.where(real, index, 0))._replace(valid=real)


def train_step(policy: Policy, sched: Schedule, pairs: Pairs, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, config: LPO) -> dict[str, float]:
    """One optimizer step on up to train_batch_size · accumulate pairs; its metrics, official names first."""
    total, parts = len(pairs.t), []
    for first in range(0, total, config.train_batch_size):
        micro = padded(pairs.take(slice(first, first + config.train_batch_size)), config.train_batch_size)
        out = pair_loss(policy, sched, micro, micro.valid / total, guidance=config.guidance_scale,
                        beta=config.beta, eps=config.clip_eps)
        scaler.scale(out.loss).backward()
        parts.append([field.detach()[micro.valid] for field in out[1:]])
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(trainable(policy.unet), config.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    losses, win, lose, *densities = (torch.cat(field) for field in zip(*parts, strict=True))
    means = [losses, win, lose, *(d.exp() for d in densities), (win > lose).float(), win - lose]
    names = ("train_loss", "train_ratio_win", "train_ratio_lose", "train_win_prob_policy", "train_win_prob_ref",
             "train_lose_prob_policy", "train_lose_prob_ref", "implicit_acc", "train_margin")
    values = torch.stack([*(m.mean() for m in means), grad_norm]).tolist()
    return dict(zip((*names, "grad_norm"), values, strict=True)) | {"lr": optimizer.param_groups[0]["lr"]}


def batch_metrics(pairs: Pairs, scores: Tensor, sched: Schedule) -> dict[str, object]:
    """What one prompt batch gave. pairs: all of them, step-major; scores: [steps, K, B]."""
    t, valid = pairs.t, pairs.valid
    bands = {"even_large": t > 751, "large": (t > 501) & (t <= 751), "mid": (t >= 251) & (t <= 501),
             "small": (t > 1) & (t < 251)}
    steps, _, size = scores.shape
    counts = {f"{name}_noise_samples_num": int((valid & band).sum()) for name, band in bands.items()}
    return {"preference_scores_mean": scores.mean().item(), "preference_scores_std": scores.std().item(),
            "total_valid_samples_num": int(valid.sum()), **counts, "timesteps": t.view(steps, size)[:, 0].tolist(),
            "valid_by_timestep": valid.view(steps, size).sum(1).tolist(), "pairs_possible": len(t)}


def trainable(unet: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in unet.parameters() if p.requires_grad]


def order(config: LPO, epoch: int, prompts: int) -> list[Tensor]:
    """The prompt batches of an epoch, shuffled: a function of the seed and the epoch."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    return list(torch.randperm(prompts, generator=generator).split(config.batch_size))


def shuffled(pairs: Pairs, config: LPO, epoch: int, batch: int) -> Pairs:
    """The valid pairs in random order: a function of the seed, the epoch and the batch."""
    index = pairs.valid.nonzero()[:, 0]
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) * 1_000_003 + batch)
    return pairs.take(index[torch.randperm(len(index), generator=generator).to(index.device)])


def check(config: LPO) -> list[str]:
    """Refuse whatever can be refused before anything is loaded or written; the prompts."""
    config.check()
    unet = check_model(config.model, "--model")
    lrm = check_lrm(config)
    for key in ("in_channels", "sample_size"):
        if backbone.family_of(unet) != backbone.family_of(lrm) or unet[key] != lrm[key]:
            raise InputError(config.lrm, "scores another latent space than the model's",
                             "use an LRM trained for this kind of model", "--lrm")
    prompts = data.read_prompts(config.prompts, config.caption_key)
    if config.lora:
        checkpoint.read_lora(Path(config.lora))
    runs.open_directory(config, checkpoint.STATE)
    return prompts


def check_model(model: str, flag: str) -> dict:
    """The U-Net config of a diffusers directory, all parts of which are there."""
    path = Path(model)
    if not model or not path.is_dir():
        raise InputError(model or "(none)", "no such directory", "name a Stable Diffusion directory in diffusers layout", flag)
    if not (path / "unet" / "config.json").is_file():
        raise InputError(model, "is no pipeline: unet/config.json is missing", "name its top directory", flag)
    unet = json.loads((path / "unet" / "config.json").read_text())
    family = backbone.family_of(unet)
    for part in (*(name for name, _ in family.encoders), *family.tokenizers, "vae", "scheduler"):
        if not (path / part).is_dir():
            raise InputError(model, f"is no whole pipeline: {part}/ is missing", "download all of it", flag)
    return unet


def check_lrm(config: LPO) -> dict:
    """The U-Net config of the LRM's directory."""
    path = Path(config.lrm)
    if not config.lrm or not path.is_dir():
        raise InputError(config.lrm or "(none)", "no such directory", "train one with `lrm`, or download casiatao/LRM", "--lrm")
    for part in ("unet/config.json", "state_dict.pt"):
        if not (path / part).is_file():
            raise InputError(config.lrm, f"is no latent reward model: {part} is missing", "name its top directory", "--lrm")
    if config.lrm_base:
        check_model(config.lrm_base, "--lrm-base")
    return json.loads((path / "unet" / "config.json").read_text())


def load_policy(config: LPO, prompts: list[str], device: torch.device) -> tuple[Policy, Schedule]:
    """The policy with a LoRA attached (or all weights trainable), its text features and its sampler's schedule."""
    model = Path(config.model)
    precision = speed.precision(config.mixed_precision, "fp16")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).eval()
    family = backbone.family_of(unet.config)
    encoders = [e.to(device).eval() for e in backbone.load_text(model, family)]
    tokenizers = backbone.load_tokenizers(model, family)
    text = backbone.encode_prompts(family, tokenizers, encoders, prompts, zero_null=family.zero_null)
    too_long = sum(len(ids) > tokenizers[0].model_max_length for ids in tokenizers[0](prompts).input_ids)
    if too_long:
        runs.say(f"{too_long} of {len(prompts)} prompts exceed {tokenizers[0].model_max_length} tokens and are cut")
    if not config.full:
        unet.to(speed.DTYPES[precision])
        checkpoint.add_lora(unet, config.rank, config.alpha or config.rank, config.targets, config.seed)
        for parameter in trainable(unet):
            parameter.data = parameter.data.float()
        if config.lora:
            checkpoint.load_lora(unet, Path(config.lora))
    sizes = checkpoint.size_conditions(model, family, unet)
    sizes = None if sizes is None else sizes.to(device)
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    sched = schedule.from_config(scheduler, config.num_steps, config.eta).to(device)
    return Policy(unet, text, sizes, full=config.full, precision=precision), sched


def load_score(config: LPO, prompts: list[str], device: torch.device) -> Score:
    """The LRM as a function of latents, timesteps and prompt numbers; its text features are computed here, once."""
    path, base = Path(config.lrm), Path(config.lrm_base or config.model)
    lrm = checkpoint.load_lrm(path, base).to(device)
    tokenizers = backbone.load_tokenizers(path if (path / "tokenizer").is_dir() else base, lrm.family)
    text = backbone.encode_prompts(lrm.family, tokenizers, list(lrm.text_encoders), prompts, zero_null=False)
    lrm.text_encoders = nn.ModuleList()  # never needed again
    precision = speed.precision(config.mixed_precision, "fp16")

    def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        with speed.autocast(precision):
            return lrm.score(x, t, text[index])
    return score


def train(config: LPO, wrap_score: Callable[[Score], Score] = lambda score: score) -> Path:
    """Run LPO; the run directory. wrap_score may alter the reward (a control experiment, another scorer)."""
    prompts = check(config)
    device = speed.device()
    policy, sched = load_policy(config, prompts, device)
    score = wrap_score(load_score(config, prompts, device))
    low, high = config.threshold_min, config.threshold_max
    gap = select.gaps(sched, config.threshold_shape, low, low if config.threshold_shape == "none" else high)
    shape = (policy.unet.config.in_channels, *[policy.unet.config.sample_size] * 2)
    optimizer = speed.optimizer(
        config.optimizer, policy.unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=policy.precision == "fp16")
    ema = EMAModel(trainable(policy.unet), decay=config.ema_decay) if config.ema_decay else None

    out, run = Path(config.out), runs.Run(config, "lpo")
    at = {"epoch": 0, "batch": 0, "step": 0}
    if config.resume:
        at = load_state(out / checkpoint.STATE, policy.unet, optimizer, scaler, ema, run)
    else:
        draw_pictures(config, policy, sched, prompts, shape, "before")
    batches = -(-len(prompts) // config.batch_size)
    total = min(config.epochs * batches, config.max_batches or config.epochs * batches)
    bar = tqdm(total=total, initial=at["epoch"] * batches + at["batch"], desc="LPO", unit="batch", leave=False)
    with runs.stoppable() as stopped:
        while bar.n < total and not stopped:
            start = time.perf_counter()
            index = order(config, at["epoch"], len(prompts))[at["batch"]].to(device)
            draw = CounterNoise(config.seed, at["epoch"], index, shape)
            pairs, scores = sample.trajectory(
                policy.predict, score, sched, gap, draw, index, guidance=config.guidance_scale,
                num_candidates=config.num_candidates, start=config.start_step, stop=config.stop_step)
            run.log("batch", at["step"], epoch=at["epoch"], **batch_metrics(pairs, scores, sched))
            sampled = time.perf_counter()
            pairs, row = shuffled(pairs, config, at["epoch"], at["batch"]), None
            size = config.train_batch_size * config.accumulate
            for first in range(0, len(pairs.t), size):
                row = train_step(policy, sched, pairs.take(slice(first, first + size)), optimizer, scaler, config)
                if ema:
                    ema.step(trainable(policy.unet))
                run.log("train", at["step"], epoch=at["epoch"], **row)
                at["step"] += 1
            seconds = time.perf_counter() - start
            run.time(global_step=at["step"], sampling=sampled - start, seconds=seconds,
                     prompts_per_second=len(index) / seconds)
            runs.say(log_line(at["step"], row, len(pairs.t), seconds, len(index)))
            at["batch"] += 1
            bar.update()
            if at["batch"] == batches:
                at = at | {"epoch": at["epoch"] + 1, "batch": 0}
                if at["epoch"] % config.save_epochs == 0:
                    save_checkpoint(out / f"checkpoint_{at['epoch'] - 1}", policy.unet, config, at["step"])
            if bar.n % config.save_batches == 0 or bar.n == total or stopped:
                save_state(out / checkpoint.STATE, policy.unet, optimizer, scaler, ema, run, at)
    bar.close()
    if stopped:
        run.close()
        runs.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(128 + stopped[0])
    finish(config, policy, sched, prompts, shape, ema)
    run.close()
    return out


def log_line(step: int, row: dict[str, float] | None, pairs: int, seconds: float, prompts: int) -> str:
    """One prompt batch in one line."""
    trained = "no valid pair" if row is None else f"loss {row['train_loss']:.3f} | acc {row['implicit_acc']:.2f}"
    return (f"step {step} | {trained} | pairs {pairs} | {seconds * 1e3:.0f} ms | "
            f"{prompts / seconds:.1f} prompts/s | {runs.memory()}")


def finish(config: LPO, policy: Policy, sched: Schedule, prompts: list[str], shape: tuple[int, int, int],
           ema: EMAModel | None) -> None:
    """Export the weights (their average, if one was kept) and draw the pictures after training."""
    if ema:
        ema.copy_to(trainable(policy.unet))
    out = Path(config.out)
    if config.full:
        with checkpoint.replacing(out / "unet") as aside:
            policy.unet.save_pretrained(aside)
    else:
        checkpoint.save_lora(policy.unet, out)
    draw_pictures(config, policy, sched, prompts, shape, "after")


def save_checkpoint(folder: Path, unet: UNet2DConditionModel, config: LPO, step: int) -> None:
    """An official checkpoint directory: unet_lora.pt or unet/, and global_step.json."""
    with checkpoint.replacing(folder) as aside:
        aside.mkdir()
        if config.full:
            unet.save_pretrained(aside / "unet")
        else:
            torch.save(checkpoint.lora_state(unet), aside / checkpoint.LORA_OFFICIAL)
        (aside / "global_step.json").write_text(json.dumps({"global_step": step}))


def save_state(file: Path, unet: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               ema: EMAModel | None, run: runs.Run, at: dict[str, int]) -> None:
    """All that a resumed run needs; randomness is counter-based, so there is no generator state."""
    with checkpoint.replacing(file) as aside:
        torch.save({"at": at, "metrics": run.size, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "ema": ema and ema.state_dict(),
                    "weights": {n: p.detach() for n, p in unet.named_parameters() if p.requires_grad}}, aside)


def load_state(file: Path, unet: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               ema: EMAModel | None, run: runs.Run) -> dict[str, int]:
    """Restore what ``save_state`` wrote; where the run goes on."""
    state = checkpoint.read_pickle(file, "--out")
    own = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in state["weights"].items()}:
        raise InputError(str(file), "was saved with other trained weights", "resume with the run's own settings", "--out")
    for name, parameter in own.items():
        parameter.data.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if ema and state["ema"]:
        ema.load_state_dict(state["ema"])
    run.truncate(state["metrics"])
    return state["at"]


@torch.no_grad()
def draw_pictures(config: LPO, policy: Policy, sched: Schedule, prompts: list[str], shape: tuple[int, int, int],
                  when: str) -> None:
    """Pictures of the first prompts with the same noise before and after, for the report."""
    count = min(config.pictures, len(prompts))
    if count == 0:
        return
    folder = Path(config.out) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = pictures_of(policy.predict, sched, Path(config.model), torch.arange(count), shape,
                           guidance=config.guidance_scale, seed=config.seed, batch=config.batch_size)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(folder / f"{i:03d}_{when}.png")
    runs.write_json(folder / "captions.json", [{"caption": prompts[i]} for i in range(count)])


@torch.no_grad()
def pictures_of(predict: Predict, sched: Schedule, model: Path, prompts: Tensor, shape: tuple[int, int, int], *,
                guidance: float, seed: int, batch: int, items: Tensor | None = None) -> Tensor:
    """uint8 [N, H, W, 3] pictures for prompt numbers [N]; items: the numbers that key their noise (default: 0 … N−1)."""
    device = sched.table.device
    vae = backbone.load_vae(model).to(device)
    items = torch.arange(len(prompts)) if items is None else items
    pictures = []
    for index, item in zip(prompts.to(device).split(batch), items.to(device).split(batch), strict=True):
        latents = sample.generate(predict, sched, CounterNoise(seed, PICTURE_EPOCH, item, shape), index, guidance=guidance)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        pictures.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures)
