"""What a long run watches: steps without a finite gradient, and signs that training goes wrong.

A step whose gradient is not finite changes nothing: ``torch.amp.GradScaler`` finds out on the device and skips it, in fp16 with
a scale that it lowers, in other precisions with a scale of 1 (a power of two when it has been lowered: exact). Here such steps
are counted, what led to them is kept for ``python -m lpo_fast.guard FILE``, and too many in a row stop the run.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpo_fast import files, ranks, runs
from lpo_fast.config import LPO
from lpo_fast.errors import InputError

IN_A_ROW = 20  # steps: fp16's scale starts at 2^16 and may need as many halvings
KEPT = 3  # files of steps whose loss was not finite
BATCHES = 5  # of prompts, the first ones of a run and its latest, that are compared


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """What skips steps without a finite gradient; see above."""
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


class Steps:
    """Counts the optimizer steps that were skipped. state: {skipped, in_a_row}, part of a saved run."""

    def __init__(self, out: Path, inputs: Callable[[Tensor], dict[str, object]] | None):
        """inputs: of prompt numbers, what else made a step: settings, prompts and their numbers, weights; None: keep none."""
        self.out, self.inputs, self.state = out, inputs, {"skipped": 0, "in_a_row": 0}

    def look(self, step: int, row: dict[str, float], pairs: tuple[Tensor, ...]) -> InputError | None:
        """A step's metrics and its pairs. The error that ends the run when too many in a row were skipped."""
        if math.isfinite(row["grad_norm"]) and math.isfinite(row["train_loss"]):
            self.state["in_a_row"] = 0
            return None
        self.state = {key: count + 1 for key, count in self.state.items()}
        if not math.isfinite(row["train_loss"]) and self.inputs and ranks.main():
            self.keep(step, pairs)  # else fp16's range was left, which the scale mends
        if self.state["in_a_row"] < IN_A_ROW:
            return None
        return InputError(str(self.out), f"{self.state['in_a_row']} optimizer steps in a row had no finite gradient, the last "
                          f"of them step {step}; they changed nothing, and the state is saved",
                          f"see python -m lpo_fast.guard {self.out / 'skipped'}/…, lower --learning-rate or --beta, or use "
                          "--mixed-precision bf16", "--out")

    def keep(self, step: int, pairs: tuple[Tensor, ...]) -> None:
        """skipped/step_{n}.pt: the inputs of a step, of the first few."""
        folder = self.out / "skipped"
        folder.mkdir(exist_ok=True)
        if len(list(folder.glob("step_*.pt"))) < KEPT:
            file, made = folder / f"step_{step}.pt", self.inputs(pairs[-2].unique().cpu())
            files.save_pickle(made | {"step": step, "pairs": [x.cpu() for x in pairs]}, file)
            runs.say(f"warning: step {step} has no finite loss and was skipped; its inputs: {file}")


class Watch:
    """Signs of a collapse, each said once with advice."""

    def __init__(self, clip_eps: float):
        self.eps, self.said, self.spread = clip_eps, set(), None
        self.shares: deque[float] = deque(maxlen=BATCHES)
        self.first: list[float] = []

    def batch(self, metrics: dict[str, float], trained: list[dict[str, float]]) -> list[str]:
        """Warnings after a prompt batch; metrics: ``train_lpo.batch_metrics``, trained: rows of its optimizer steps."""
        found = []
        score = metrics["preference_scores_mean"]
        if not math.isfinite(score):
            found.append(("scores", "the reward model gives scores that are not finite: their pairs are left out; check it "
                          "with python -m lpo_fast.score, or use --mixed-precision bf16"))
        share = metrics["total_valid_samples_num"] / max(metrics["pairs_possible"], 1)
        if len(self.first) < BATCHES:
            self.first.append(share)
        self.shares.append(share)
        recent = mean(self.shares)
        if recent < mean(self.first) / 5:
            found.append(("valid pairs", f"valid pairs fell from {mean(self.first):.0%} to {recent:.0%}: candidates have "
                          "become alike to the reward model; stop here, or lower --threshold-min and --threshold-max"))
        drift = [max(abs(row["train_ratio_win"] - 1), abs(row["train_ratio_lose"] - 1)) for row in trained]
        drift = [value for value in drift if math.isfinite(value)]
        if drift and mean(drift) > 0.9 * self.eps:
            found.append(("ratios", f"the policy's ratios are at their clip ({1 - self.eps:g} … {1 + self.eps:g}), where "
                          "gradients vanish: it is far from its reference; lower --learning-rate, or take an earlier "
                          "checkpoint"))
        return self.once(found)

    def pictures(self, drawn: list[Image.Image], each: int) -> list[str]:
        """The same after validation pictures, ``each`` of a prompt: by their RMS difference within a prompt, of 0 to 1."""
        if not drawn or each < 2:
            return []
        pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in drawn])
        grouped = pixels.reshape(-1, each, pixels[0].size)
        now = float(np.sqrt(grouped.var(1, ddof=1).mean() * 2))
        first = self.spread = now if self.spread is None else self.spread
        if now < first / 2:
            return self.once([("diversity", f"pictures of one prompt differ by {now:.3f}, less than half of the first "
                               f"validation's {first:.3f}: the model has lost variety; use an earlier checkpoint, a lower "
                               "--learning-rate or fewer epochs")])
        return []

    def once(self, found: list[tuple[str, str]]) -> list[str]:
        """Those that were not said before."""
        new = [(name, text) for name, text in found if name not in self.said]
        self.said |= {name for name, _ in new}
        return [f"warning: {text}" for _, text in new]


def replay(file: Path) -> list[str]:
    """Run a skipped step again, on this device, and say what is not finite: inputs, weights, outputs, loss, gradients."""
    from lpo_fast import checkpoint, policy, speed, train_lpo
    from lpo_fast.sample import Pairs
    kept = files.read_pickle(file, "FILE")
    config, device = LPO(**kept["config"]), speed.device()
    pairs = Pairs(*(x.to(device) for x in kept["pairs"]))
    actor, sched = policy.load(config, kept["prompts"], device)
    checkpoint.Trained(actor.unet).load_state_dict(kept["weights"])
    pairs = pairs._replace(prompt=torch.searchsorted(kept["numbers"].to(device), pairs.prompt))
    lines = [broken(f"pairs, {name}", x) for name, x in zip(Pairs._fields, pairs, strict=True) if x.is_floating_point()]
    lines += [broken(name, p) for name, p in actor.unet.named_parameters() if p.requires_grad]
    at = pairs.x_t, pairs.t, pairs.prompt
    lines += [broken("policy's output", actor.train(*at)), broken("reference's output", actor.reference(*at))]
    out = train_lpo.evaluate(actor, sched, pairs, torch.full((len(pairs.t),), 1 / len(pairs.t), device=device),
                             beta=config.beta, eps=config.clip_eps, guidance=config.train_guidance)
    out.loss.backward()
    lines.append(broken("loss", out.loss))
    lines += [broken(f"gradient of {name}", p.grad) for name, p in actor.unet.named_parameters() if p.grad is not None]
    bad = [line for line in lines if line]
    return [f"step {kept['step']}, {len(pairs.t)} pairs at timesteps {sorted(set(pairs.t.tolist()), reverse=True)}",
            *(bad or [f"all is finite here (loss {out.loss.item():.4g}): the device, its precision or the weights differed"])]


def broken(name: str, x: Tensor) -> str:
    """A line if not all of a tensor is finite."""
    count = int((~x.isfinite()).sum())
    return f"{name}: {count} of {x.numel()} are not finite" if count else ""


def main(argv: list[str] | None = None) -> int:
    """python -m lpo_fast.guard RUN/skipped/step_{n}.pt: run a skipped step again. Exit code 2 if the file cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise InputError(" ".join(argv) or "(none)", "names no single file", "give RUN/skipped/step_N.pt", "FILE")
        print("\n".join(replay(Path(argv[0]))))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
