"""python bench/official/time.py --official DIR --python PYTHON [--rounds N] [--out FILE]:
our statement's time beside theirs.

DIR and PYTHON as in check.py. In one process of that environment train_lpo.py itself runs, from ``main`` on,
on the "small" SD1.5 of random_models.py, at 128 pixels and on one thread. A round is a sampling step (text
encoding, STEPS denoising steps with candidates and LRM) and a training step on its pairs. loop.py computes
both too, from equal weights and random numbers, in every other round before the official code, else after it.
Ratio: statement / official.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.official import check as official_check
from bench.official.check import BETA, CANDIDATES, EPS, GUIDANCE, REPO, error, look_at

STEPS, WARM, SIDE = 1, 2, 16  # denoising steps of twenty; rounds that do not count; latents' height and width
PROMPTS = official_check.PROMPTS[:2]
PARTS = {"sample": "sampling step", "train": "training step"}


def make(work: Path) -> None:
    """Model and LRM, which either diffusers loads."""
    import random_models

    from lpo_fast.lrm import checkpoint
    from lpo_fast.models import texts
    model, folder = random_models.make("small", work / "sd"), work / "lrm_sd" / "checkpoint-final"
    unet = model / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": SIDE}))
    parts = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
             "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
             "feature_extractor": [None, None]}
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | parts))
    lrm = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(0))
    checkpoint.save_lrm(lrm, texts.load_tokenizers(model, lrm.family), folder)
    for path in (model, folder):
        official_check.readable_by_old_versions(path)
    (work / "prompts.json").write_text(json.dumps([{"caption": prompt} for prompt in PROMPTS]))


def statement(work: Path):
    """official_loop's models; transformers 4 calls what texts.load_text asks for by another name."""
    import official_loop

    from lpo_fast.config import LPO
    from lpo_fast.models import families, texts

    def load_text(path: Path, family: families.Family, folder: Path | None = None,
                  state: object = None) -> list:
        return [kind.from_pretrained((folder or path) / name) for name, kind in family.encoders]
    texts.load_text = load_text
    config = LPO(model=str(work / "sd"), lrm=str(work / "lrm_sd" / "checkpoint-final"), rank=4,
                 num_candidates=CANDIDATES, guidance_scale=GUIDANCE, beta=BETA, clip_eps=EPS,
                 threshold_shape="none", threshold_min=-1.0)
    ours = official_loop.load(config, PROMPTS, torch.device("cpu"))
    ours.scheduler.timesteps = ours.scheduler.timesteps[:STEPS]
    return ours


def tick() -> np.ndarray:
    """Seconds of the clock and of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


class Beside:
    """The statement and its times, and those of the program around which ``before`` and ``after`` are called.
    """

    def __init__(self, work: Path):
        from official_loop import Random
        self.ours, self.round, self.logged = statement(work), 0, {}
        self.draw = Random((len(PROMPTS), 4, SIDE, SIDE), CANDIDATES, torch.device("cpu"), torch.float32)
        self.times, self.errors = defaultdict(list), defaultdict(float)

    def same_weights(self, unet: torch.nn.Module) -> None:
        """LoRAs that differ from nothing, the same for both."""
        self.theirs = [p for p in unet.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for one, other in zip(self.ours.parameters, self.theirs, strict=True):
            one.data = 0.02 * torch.randn(one.shape, generator=generator)
            other.data.copy_(one)

    def mine(self, part: str) -> None:
        """The statement's turn."""
        torch.manual_seed(self.round)
        start = tick()
        if part == "sample":
            self.pairs, self.scores = self.ours.sample(torch.arange(len(PROMPTS)), self.draw)
        else:
            self.metrics = self.ours.train_step(self.pairs)
        self.times[part, "statement"].append(tick() - start)

    def before(self, part: str) -> None:
        """The program is about to begin."""
        if self.round % 2:
            self.mine(part)
        torch.manual_seed(self.round)
        self.start = tick()

    def after(self, part: str) -> None:
        """The program has done it."""
        self.times[part, "official"].append(tick() - self.start)
        if self.round % 2 == 0:
            self.mine(part)

    def compare(self, what: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        """Keep the largest error."""
        self.errors[what] = max(self.errors[what], error(mine.detach().numpy(), theirs.detach().numpy()))

    def sampled(self, found: tuple[torch.Tensor, ...]) -> None:
        """After the program's sampling run, whose results these are."""
        self.after("sample")
        t, x_t, x_p, context, scores = found
        for name, theirs in {"t": t[:, 0], "x_t": x_t[:, 0], "winner": x_p[:, 0], "loser": x_p[:, 1],
                             "context": context[:, 0]}.items():
            self.compare(name, getattr(self.pairs, name), theirs)
        self.compare("scores", self.scores.flatten(), scores)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the program's optimizer step."""
        self.before("train")
        yield
        self.after("train")
        for one, other in zip(self.ours.parameters, self.theirs, strict=True):
            self.compare("LoRA after the step", one, other)
        self.round += 1

    def log(self, values: dict[str, float]) -> None:
        """What the program logs."""
        for name in self.metrics if "train_loss" in values else ():
            self.compare(name, torch.tensor(self.metrics[name]), torch.tensor(values[name]))


def both(work: Path, code: Path, rounds: int) -> None:
    """Time the official program and then the statement; write times.json."""
    official_check.importable(code)
    from lpo.preference_models import PREFERENCE_MODEL_FUNC_BUILDERS
    beside = Beside(work)
    how = beside.ours.config
    values = {
        "use_xformers": False, "lora_rank": how.rank, "logdir": str(work), "run_name": "official",
        "save_interval": 10**6, "num_epochs": WARM + rounds, "validation_prompts": None,
        "dataloader_num_workers": 0, "dataloader_shuffle": False, "dataloader_pin_memory": False,
        "pretrained.model": str(work / "sd"), "preference_model_func_cfg": {"type": "small"},
        "compare_func_cfg": {"type": "preference_score_compare", "threshold": how.threshold_min},
        "dataset_cfg": {"type": "PromptDataset", "meta_json_path": str(work / "prompts.json"),
                        "pretrained_tokenzier_path": str(work / "sd" / "tokenizer")},
        "sample.num_steps": how.num_steps, "sample.guidance_scale": GUIDANCE,
        "sample.sample_batch_size": len(PROMPTS), "sample.num_sample_each_step": CANDIDATES,
        "train.divert_end_step": STEPS, "train.train_batch_size": 1000, "train.beta": BETA,
        "train.eps": EPS, "train.learning_rate": how.learning_rate, "train.adam_beta1": how.adam_beta1,
        "train.adam_beta2": how.adam_beta2, "train.adam_weight_decay": how.weight_decay,
        "train.adam_epsilon": how.adam_epsilon,
    }
    (work / "config.py").write_text(official_check.CONFIG.format(values=values))
    program = importlib.import_module("train_lpo")

    @PREFERENCE_MODEL_FUNC_BUILDERS.register_module(name="small")
    def build(cfg):
        model = official_check.official_lrm(work, "sd")
        return lambda x, info: model.get_preference_score(x, info["input_ids"], info["timesteps"])

    def encoding_starts(*_):
        if hasattr(beside, "theirs"):  # else it is the null prompt, once
            beside.before("sample")
    accumulate = program.Accelerator.accumulate

    @contextmanager
    def accumulating(self, *models):
        with beside.step(), accumulate(self, *models):
            yield
    program.Accelerator.accumulate = accumulating
    look_at(program.StableDiffusionPipeline, "from_pretrained",
            lambda pipe, *a: pipe.text_encoder.register_forward_pre_hook(encoding_starts))
    look_at(program.Accelerator, "prepare", lambda out, self, unet, *a: beside.same_weights(unet))
    look_at(program, "multi_sample_pipeline", lambda out, *a: beside.sampled(out))
    look_at(program.Accelerator, "log", lambda out, self, values, *a: beside.log(values))
    program.FLAGS(["train_lpo.py", "--config", str(work / "config.py")])
    program.main(None)
    times = {f"{part} {side}": np.stack(found[WARM:]).tolist()
             for (part, side), found in beside.times.items()}
    (work / "times.json").write_text(json.dumps({"times": times, "errors": beside.errors,
                                                 "pairs": len(beside.pairs.t),
                                                 "versions": official_check.versions()}))


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if "model name" in line]
    return f"{len(names)} × {names[0]}"


def report(found: dict, args: argparse.Namespace) -> str:
    """The Markdown page."""
    from measure import environment
    here, times = environment(), {name: np.array(rows) for name, rows in found["times"].items()}
    code = subprocess.run(["git", "-C", args.official, "rev-parse", "--short=12", "HEAD"],
                          capture_output=True, text=True)
    lines = ["# The time of our statement beside the official code's", "",
             f"`python bench/official/time.py --official {args.official} --python "
             f"{args.python} --rounds {args.rounds}`, commit {here['commit']}, official code "
             f"{code.stdout.strip()}, {cpu_name()}, one thread, {here['date']}. Both in one process: "
             f"{', '.join(f'{name} {version}' for name, version in found['versions'].items())}, fp32.", "",
             "`train_lpo.py` itself and `bench/official/loop.py`, SD1.5 with a quarter of every "
             f"width at 128 pixels: {len(PROMPTS)} prompts, {CANDIDATES} candidates, denoising "
             f"steps a sampling step: {STEPS}, pairs a training step: {found['pairs']}. Medians "
             f"(quartiles) of {args.rounds} alternating rounds. Ratio: statement / official. "
             "CPU: seconds of all threads, which a busy machine disturbs less.", "",
             "| | official: clock, CPU s | statement: clock, CPU s | ratio, clock | ratio, CPU |",
             "|---|---|---|---|---|"]
    for part, what in PARTS.items():
        theirs, mine = times[f"{part} official"], times[f"{part} statement"]
        shown = [f"{low:.2f}–{high:.2f}" for low, high in np.percentile(mine / theirs, [25, 75], axis=0).T]
        clock, cpu = np.median(mine / theirs, axis=0)
        seconds = [", ".join(f"{value:.2f}" for value in np.median(side, axis=0)) for side in (theirs, mine)]
        lines.append(f"| {what} | {seconds[0]} | {seconds[1]} | {clock:.3f} ({shown[0]}) | {cpu:.3f} "
                     f"({shown[1]}) |")
    lines += ["", "Largest error, max\\|a − b\\| / max\\|b\\|, in any round: "
              + ", ".join(f"{name} {apart:.0e}" if apart else f"{name} 0" for name, apart in found["errors"]
                          .items()) + ". (The margin is a difference of near-equal ratios.)"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The driver, or (with --work) the other environment's part."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of Kwai-Kolors/LPO")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "results" / "official-time.md")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        both(args.work, args.official.absolute(), args.rounds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                                    "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        subprocess.run([args.python, __file__, "--official", args.official.absolute(), "--rounds",
                        str(args.rounds), "--work", scratch], check=True, env=environment)
        page = report(json.loads((Path(scratch) / "times.json").read_text()), args)
    args.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
