"""python bench/official/check.py --official DIR --python PYTHON [--out FILE]:
ours against the official code, run as it is.

DIR is a checkout of Kwai-Kolors/LPO, PYTHON that of an environment in which it runs: torch 2.13.0, diffusers
0.31.0, transformers 4.46.3, peft 0.13.2, huggingface_hub<0.27, accelerate, datasets, mmengine,
ml_collections, absl-py (wandb and torchvision are stubs here). On tiny random models: ``ours`` trains LRMs
and LoRAs by our commands and computes; then the other Python computes the same from the same files
(``official``); ``compare`` writes the table. Error: max|a − b| / max|b|.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle on a blue background", "a green cross on a white background", "a blue square"]
STEPS, CANDIDATES, GUIDANCE, BETA, EPS = 20, 4, 5.0, 500.0, 0.1
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
# fp32: one evaluation; four denoising steps and the VAE; twenty steps
SCORES, PICTURES, WHOLE_RUN = 2e-5, 1e-4, 1e-4


def versions() -> dict[str, str]:
    """Of what computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def pictures(model: Path, lora: Path | None = None) -> np.ndarray:
    """Pictures of diffusers' own pipeline, whatever its version: DDIM without noise from fixed latents."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(PROMPTS, latents=latents, num_inference_steps=4, guidance_scale=GUIDANCE,
                output_type="np").images


def fixed() -> dict[str, torch.Tensor]:
    """The random numbers that both sides use."""
    draw, b = torch.Generator().manual_seed(5), len(PROMPTS)
    return {"x": torch.randn(b, 4, 8, 8, generator=draw), "t": torch.tensor([1, 351, 951]),
            "initial_latents": torch.randn(b, 4, 8, 8, generator=draw),
            "candidate_noise": torch.randn(STEPS, CANDIDATES, b, 4, 8, 8, generator=draw),
            "chosen_candidate": torch.randint(CANDIDATES, (STEPS, b), generator=draw)}


# Our side


def readable_by_old_versions(model: Path) -> None:
    """Text encoders' names and tokenizer files as transformers before 5 has them; ours reads both."""
    from safetensors.torch import load_file, save_file
    for file in model.glob("text_encoder*/model.safetensors"):
        tensors = {n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
                   for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    for file in model.glob("tokenizer*/tokenizer.json"):
        data = json.loads(file.read_text())
        vocab = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        (file.parent / "vocab.json").write_text(json.dumps(vocab))
        (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def make_models(work: Path) -> None:
    """sd/ and sdxl/, whole directories that either diffusers loads."""
    sys.path.insert(0, str(REPO))
    from diffusers import StableDiffusionXLPipeline

    from tests.helpers.models import make_sd, make_sdxl, pipeline
    make_sd(work / "sd")
    bare = make_sdxl(work / "bare", work / "sd")
    whole = pipeline(bare)
    StableDiffusionXLPipeline(**{n: p for n, p in whole.components.items()
                                 if n not in ("image_encoder", "feature_extractor")},
                              add_watermarker=False).save_pretrained(work / "sdxl")
    shutil.rmtree(bare)
    for name in ("sd", "sdxl"):
        readable_by_old_versions(work / name)


def command(*argv: object) -> None:
    """One of our commands; its failure is ours."""
    from lpo_fast import train
    if train.main([str(part) for part in argv]):
        raise SystemExit(f"failed: {argv}")


def ours(work: Path) -> None:
    """Everything of ours, into ours.npz."""
    from lpo_fast.shapes import evaluate
    make_models(work)
    evaluate.write_pairs(work / "pairs.parquet", 64, 0, held_out=False)
    (work / "prompts.json").write_text(json.dumps([{"caption": prompt} for prompt in PROMPTS]))
    found = {}
    for name in ("sd", "sdxl"):
        lrm = work / f"lrm_{name}"
        command("lrm", "--model", work / name, "--pairs", work / "pairs.parquet", "--out", lrm,
                "--batch-size", 16, "--max-steps", 20, "--warmup-steps", 2, "--learning-rate", 3e-3,
                "--num-workers", 0)
        for rank, alpha in ((4, 4), (4, 6)):
            run = work / f"lora_{name}_{alpha}"
            command("lpo", "--model", work / name, "--lrm", lrm / "checkpoint-final",
                    "--prompts", work / "prompts.json", "--out", run, "--rank", rank, "--alpha", alpha,
                    "--epochs", 1, "--num-steps", 4, "--pictures", 0, "--threshold-min", 0,
                    "--threshold-max", 0, "--learning-rate", 3e-3, "--batch-size", 3, "--train-batch-size", 3)
            found[f"pictures {name} {alpha}"] = pictures(work / name, run)
        found[f"pictures {name} base"] = pictures(work / name)
        found |= scores(work, name)
    found |= {"versions": np.array(json.dumps(versions()))} | sampling_and_step(work)
    np.savez(work / "ours.npz", **found)


def scores(work: Path, name: str) -> dict[str, np.ndarray]:
    """S(x, t, prompt) of an LRM that was trained by us, through what LPO calls."""
    from lpo_fast.config import LPO
    from lpo_fast.lpo import judging
    config = LPO(model=str(work / name), lrm=str(work / f"lrm_{name}" / "checkpoint-final"))
    score, io = judging.load_score(config, PROMPTS, torch.device("cpu")), fixed()
    with torch.no_grad():
        return {f"scores {name}": score(io["x"], io["t"], torch.arange(len(PROMPTS))).numpy()}


def sampling_and_step(work: Path) -> dict[str, np.ndarray]:
    """SDXL: a sampling run, its pairs, and loss and gradients of a LoRA step on all of them,
    from a checkpoint of ours.

    The thresholds are such that about half of the pairs are kept; the official run gets the same ones.
    """
    from lpo_fast.config import LPO
    from lpo_fast.lpo import judging, policies, sampling, steps
    from lpo_fast.method import select
    from lpo_fast.models import loras
    from lpo_fast.verify.recordings import Recorded
    start = work / "lora_sdxl_6" / "checkpoint_0" / loras.LORA_OFFICIAL
    config = LPO(model=str(work / "sdxl"), lrm=str(work / "lrm_sdxl" / "checkpoint-final"), rank=4,
                 lora=str(start))
    model, sched = policies.load(config, PROMPTS, torch.device("cpu"))
    score, index = judging.load_score(config, PROMPTS, torch.device("cpu")), torch.arange(len(PROMPTS))
    pairs, drawn = sampling.trajectory(model.predict, score, sched, torch.zeros(1000), Recorded(fixed()),
                                       index, guidance=GUIDANCE, num_candidates=CANDIDATES)
    margin = (drawn.amax(1) - drawn.amin(1)).flatten()
    low, high = (torch.tanh(margin.median() / 2) * torch.tensor([0.9, 1.1])).tolist()
    gap = select.gaps(sched, "sigma", low, high)[pairs.t]
    kept = pairs.take(margin > gap)
    count = len(kept.t)
    out = steps.evaluate(model, sched, kept, torch.full((count,), 1 / count), guidance=GUIDANCE, beta=BETA,
                         eps=EPS)
    out.loss.backward()
    grads = {f"grad {name}": p.grad.numpy() for name, p in model.unet.named_parameters() if p.requires_grad}
    return {"thresholds": np.array([low, high]), "run scores": drawn.flatten(1).numpy(),
            "margin": margin.numpy(), "gap": gap.numpy(), "t": kept.t.numpy(),
            "x_t": kept.x_t.numpy(), "winner": kept.winner.numpy(), "loser": kept.loser.numpy(),
            "loss": out.loss.detach().numpy(), "ratio win": out.ratio_win.detach().mean().numpy(),
            "ratio lose": out.ratio_lose.detach().mean().numpy(),
            "densities": torch.stack([density.detach() for density in out[4:8]]).numpy()} | grads


# The official side: nothing of lpo_fast is imported below


def stub(name: str, **attributes: object) -> None:
    """A module that the official code imports and that is not needed."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def official_lrm(work: Path, name: str):
    """The official LRM class with our directory loaded;
    its projection's width is hard-coded, and so replaced."""
    models = "lpo.preference_models.models"
    unet = json.loads((work / name / "unet" / "config.json").read_text())["block_out_channels"]
    if name == "sd":
        code = importlib.import_module(f"{models}.sd15_preference_model")
        width = json.loads((work / name / "text_encoder" / "config.json").read_text())["hidden_size"]
        torch.save({"text_projection.weight": torch.eye(width)}, work / "clip.bin")
        cfg = code.SD15PreferenceModelConfig(str(work / name), str(work / "clip.bin"), None,
                                             text_embed_dim=width, projection_dim=width)
        model = code.SD15PreferenceModel(cfg)
    else:
        code = importlib.import_module(f"{models}.sdxl_base_preference_model")
        cfg = code.SDXLBasePreferenceModelConfig(str(work / name), str(work / name / "vae"), None,
                                                 projection_dim=12)
        model = code.SDXLBasePreferenceModel(cfg)
    model.visual_projection = torch.nn.Linear(sum(unet) + unet[-1], cfg.projection_dim, bias=False)
    model.load(str(work / f"lrm_{name}" / "checkpoint-final"))
    return model.eval().requires_grad_(False)


def importable(code: Path) -> None:
    """The official code can be imported, and its programs' configs found."""
    import datasets  # noqa: F401
    from accelerate import PartialState  # whatever asks for wandb or torchvision comes before the stubs
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection  # noqa: F401
    stub("wandb")
    compose = {n: lambda *a, **k: None for n in ("Compose", "Resize", "ToTensor", "Normalize")}
    stub("torchvision.transforms", InterpolationMode=types.SimpleNamespace(BILINEAR=None), **compose)
    stub("torchvision", transforms=sys.modules["torchvision.transforms"])
    sys.path[:0] = [str(code / "lpo"), str(code / "lpo" / "train_scripts")]
    PartialState()
    os.chdir(code / "lpo")


def official(work: Path, code: Path) -> None:
    """Everything of the official code, into official.npz."""
    importable(code)
    found = {}
    for name in ("sd", "sdxl"):
        model, io = official_lrm(work, name), fixed()
        ids = model.encode_prompt(PROMPTS)
        ids = ids if isinstance(ids, tuple) else (ids,)
        found[f"scores {name}"] = model.get_preference_score(io["x"], *ids, io["t"]).numpy()
        for alpha in (4, 6):
            found[f"pictures {name} {alpha}"] = pictures(work / name, work / f"lora_{name}_{alpha}")
        found[f"pictures {name} base"] = pictures(work / name)
    np.savez(work / "official.npz", **found, **official_program(work), versions=json.dumps(versions()))


CONFIG = """
from configs import basic_config

def get_config():
    config = basic_config.get_config()
    for key, value in {values!r}.items():
        at, _, last = key.rpartition(".")
        node = config
        for part in filter(None, at.split(".")):
            node = node[part]
        with node.unlocked() if hasattr(node, "unlocked") else config.unlocked():
            node[last] = value
    return config
"""


def official_program(work: Path) -> dict[str, np.ndarray]:
    """train_lpo_sdxl.py itself, from ``main`` on: one prompt batch and one optimizer step,
    resumed from our checkpoint.

    What is random is replaced by ``fixed``, what it does is looked at from outside: the pairs where sampling
    returns them, the gradients where AdamW takes them, the loss where it is logged.
    """
    from lpo.preference_models import PREFERENCE_MODEL_FUNC_BUILDERS
    low, high = np.load(work / "ours.npz")["thresholds"].tolist()
    tiny = {"type": "tiny"}
    values = {
        "use_xformers": False, "lora_rank": 4, "logdir": str(work), "run_name": "official", "num_epochs": 2,
        "resume_from": str(work / "lora_sdxl_6" / "checkpoint_0"),
        "validation_prompts": None, "dataloader_num_workers": 0,
        "dataloader_shuffle": False, "dataloader_pin_memory": False, "pretrained.model": str(work / "sdxl"),
        "pretrained.vae_model_name_or_path": None, "preference_model_func_cfg": tiny,
        "compare_func_cfg": {"type": "preference_score_compare", "threshold": 0.6,
                             "dynamic_threshold": "sigma", "threshold_min": low, "threshold_max": high},
        "dataset_cfg": {"type": "PromptDataset", "meta_json_path": str(work / "prompts.json"),
                        "pretrained_tokenzier_path": str(work / "sdxl" / "tokenizer")},
        "sample.num_steps": STEPS, "sample.guidance_scale": GUIDANCE,
        "sample.sample_batch_size": len(PROMPTS), "sample.num_sample_each_step": CANDIDATES,
        "sample.inner_start_step": 0, "train.train_batch_size": 1000, "train.beta": BETA, "train.eps": EPS,
    }
    (work / "config.py").write_text(CONFIG.format(values=values))
    program = importlib.import_module("train_lpo_sdxl")
    sampler = importlib.import_module("lpo.custom_diffusers.multi_sample_pipeline_sdxl")
    ddim = importlib.import_module("lpo.custom_diffusers.ddim_seperate")
    stock = importlib.import_module("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl")
    io, seen, grads = fixed(), {}, {}

    @PREFERENCE_MODEL_FUNC_BUILDERS.register_module(name="tiny")
    def build(cfg):
        model = official_lrm(work, "sdxl")
        return lambda x, info: model.get_preference_score(x, info["input_ids"], info["input_ids_2"],
                                                          info["timesteps"])

    noise, choices = iter(io["candidate_noise"]), iter(io["chosen_candidate"])
    stock.randn_tensor = lambda *a, **k: io["initial_latents"]
    ddim.randn_tensor = lambda *a, **k: next(noise)
    sampler.torch = types.SimpleNamespace(**vars(torch) | {"randint": lambda *a, **k: next(choices)})
    look_at(program, "multi_sample_pipeline_sdxl", lambda out, *a: seen.update(sampled=out))
    look_at(program, "get_peft_model_state_dict", lambda out, unet, *a: seen.update(unet=unet))
    look_at(program.Accelerator, "log", lambda out, self, values, *a: seen.update(values))
    step = torch.optim.AdamW.step

    def keep_gradients(self, *a, **k):
        grads.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        return step(self, *a, **k)
    torch.optim.AdamW.step = keep_gradients
    program.FLAGS(["train_lpo_sdxl.py", "--config", str(work / "config.py")])
    program.main(None)
    t, x_t, x_p, *_, scored = seen["sampled"]
    named = {f"grad {n}": grads[id(p)].numpy() for n, p in seen["unet"].named_parameters() if p.requires_grad}
    return ({"run scores": scored.view(STEPS, -1).numpy(), "t": t[:, 0].numpy(), "x_t": x_t[:, 0].numpy(),
             "winner": x_p[:, 0].numpy(), "loser": x_p[:, 1].numpy(), "loss": np.array(seen["train_loss"]),
             "ratio win": np.array(seen["train_ratio_win"]), "ratio lose": np.array(seen["train_ratio_lose"])}
            | named)


def look_at(owner: object, name: str, see: Callable) -> None:
    """Call see(result, *arguments) after a function, which continues as before."""
    function = getattr(owner, name)

    def looked_at(*a, **k):
        out = function(*a, **k)
        see(out, *a)
        return out
    setattr(owner, name, looked_at)


# The comparison


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a − b| / max|b|; infinite where shapes differ or a is not finite."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(abs(a - b).max() / abs(b).max())


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """What, error, tolerance. a: ours, b: the official code's."""
    rows = [(f"LRM that we trained, {name}: scores at t = 1, 351, 951",
             error(a[f"scores {name}"], b[f"scores {name}"]), SCORES) for name in ("sd", "sdxl")]
    for name in ("sd", "sdxl"):
        for key, what in (("base", "without LoRA"), ("4", "our LoRA, rank 4, alpha 4"),
                          ("6", "our LoRA, rank 4, alpha 6")):
            one, other = (side[f"pictures {name} {key}"] for side in (a, b))
            moved = ("" if key == "base" else
                     f" (moves pixels by {abs(one - a[f'pictures {name} base']).max():.2f})")
            rows.append((f"pictures by both diffusers, {name}, {what}{moved}", error(one, other), PICTURES))
    count, possible = len(a["t"]), a["margin"].size
    rows.append((f"SDXL sampling run of {STEPS} steps, all {a['run scores'].size} scores",
                 error(a["run scores"], b["run scores"]), WHOLE_RUN))
    same = float(np.array_equal(a["t"], b["t"])) if a["t"].shape == b["t"].shape else 0.0
    rows.append((f"its pairs: which {count} of {possible} are kept", 1.0 - same, 0.0))
    rows += [(f"its pairs: {key}", error(a[key], b[key]), WHOLE_RUN) for key in ("x_t", "winner", "loser")]
    rows += [(f"LoRA step on these pairs: {key} ({float(b[key]):.5f})", error(a[key], b[key]), WHOLE_RUN)
             for key in ("loss", "ratio win", "ratio lose")]
    names = sorted(key for key in b if key.startswith("grad "))
    mine = sorted(key.replace(".default", "") for key in a if key.startswith("grad "))
    if mine != [key.replace(".default", "") for key in names]:
        return [*rows, ("LoRA step: the same parameters train", float("inf"), 0.0)]
    # What the official code loses by subtracting fp32 log densities, times beta, besides two evaluations:
    # there is no float64 step of the official code to judge by, as the golden vectors have.
    tolerance = 4 * SCORES + BETA * 2 * np.finfo(np.float32).eps * max(abs(a["densities"]).max(), 1.0)
    scale = max(abs(b[name]).max() for name in names)
    worst = max(float(abs(a[name] - b[name]).max()) for name in names) / scale
    return [*rows, (f"LoRA step: {len(names)} gradients (largest {scale:.2e})", worst, float(tolerance))]


def report(rows: list[tuple[str, float, float]], sides: list[dict[str, str]],
           args: argparse.Namespace) -> str:
    """The Markdown page."""
    git = ["git", "-C", str(REPO), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    head = ["# Ours against the official code", "",
            f"`python bench/official/check.py --official {args.official} --python "
            f"{args.python}`, commit {commit}, CPU, fp32, tiny random models.", "",
            "The official LRM classes score what our commands trained; `train_lpo_sdxl.py` itself, its "
            "random numbers given, runs a prompt batch and a step from our `checkpoint_0`. Error: max\\|a − "
            "b\\| / max\\|b\\|.", "", "| | " + " | ".join(PACKAGES) + " |", "|---|" + "---|" * len(PACKAGES),
            *(f"| {name} | " + " | ".join(side[p] for p in PACKAGES) + " |"
              for name, side in zip(("ours", "official"), sides, strict=True)), ""]
    table = ["| check | error | tolerance | |", "|---|---|---|---|"]
    table += [f"| {what} | {apart:.1e} | {limit:.0e} | {'ok' if apart <= limit else '**FAIL**'} |"
              for what, apart, limit in rows]
    return "\n".join([*head, *table]) + "\n"


def main() -> int:
    """The driver, or (with --phase) one side."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of Kwai-Kolors/LPO")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "results" / "official-check.md")
    parser.add_argument("--work", type=Path, help="directory of the models (default: a temporary one)")
    parser.add_argument("--phase", choices=("ours", "official"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase == "ours":
        ours(args.work)
    elif args.phase == "official":
        official(args.work, args.official.absolute())
    if args.phase:
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).absolute()
        common = ["--official", args.official.absolute(), "--work", work, "--phase"]
        for phase, python, path in (("ours", sys.executable, str(REPO)), ("official", args.python, "")):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
            subprocess.run([python, __file__, *common, phase], check=True, env=environment)
        sides = [dict(np.load(work / f"{name}.npz")) for name in ("ours", "official")]
    rows = compare(*sides)
    page = report(rows, [json.loads(str(side["versions"])) for side in sides], args)
    args.out.write_text(page)
    print(page)
    # of numpy's bools: sys.exit takes their sum for a message
    return int(sum(apart > limit for _, apart, limit in rows))


if __name__ == "__main__":
    sys.exit(main())
