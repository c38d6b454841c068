"""Signs that a run goes wrong: skipped steps, a collapse."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpo_fast.errors import InputError
from lpo_fast.system import console, distributed, writing

IN_A_ROW = 20  # steps: fp16's scale starts at 2^16 and may need as many halvings
SKIPPED = "skipped.pt"  # in a run's directory
BATCHES = 5  # of prompts, the first ones of a run and its latest, that are compared


class SkippedSteps:
    """Counts the optimizer steps that were skipped. state: {skipped, in_a_row}, part of a saved run."""

    def __init__(self, out: Path, inputs: Callable[[object], dict[str, object]] | None):
        """inputs: all that made a step, given what ``look`` is given of it, in every process; None: keep none."""
        self.out, self.inputs, self.state = out, inputs, {"skipped": 0, "in_a_row": 0}

    def look(self, step: int, after: int, loss: float, norm: float, fed: object) -> InputError | None:
        """Count a step by its loss and gradient norm; return the error that ends the run if too many in a row were skipped.

        after: optimizer steps that the weights have taken by now. fed: what the step was given.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self.state["in_a_row"] = 0
            return None
        self.state = {key: count + 1 for key, count in self.state.items()}
        if not math.isfinite(loss) and self.inputs:
            self.keep(self.inputs(fed) | {"step": step, "after": after})  # else fp16's range was left, which the scale mends
            self.inputs = None
        if self.state["in_a_row"] < IN_A_ROW:
            return None
        return InputError(
            str(self.out),
            f"{self.state['in_a_row']} optimizer steps in a row had no finite gradient, the last "
            f"of them step {step}; they changed nothing, and the state is saved",
            f"see python -m lpo_fast.replay {self.out / SKIPPED}, use --mixed-precision bf16, or start again with "
            "a lower --learning-rate",
            "--out",
        )

    def keep(self, inputs: dict[str, object]) -> None:
        """SKIPPED: the inputs of the first such step, and the weights, if the disk has room for them."""
        file, step, size = self.out / SKIPPED, inputs["step"], sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, Tensor))
        if file.exists() or not distributed.is_main():
            return
        try:
            writing.require_disk_space(self.out, 10 * size, "make room")  # states go before
            with writing.replacing(file) as aside:
                writing.save_pickle(inputs, aside)
            console.say(f"warning: step {step} has no finite loss and was skipped; its inputs: {file}")
        except InputError as problem:
            console.say(f"warning: step {step} has no finite loss and was skipped; its inputs are not kept: {problem}")

    def summary(self, steps: int) -> None:
        """Say how many of a run's steps were skipped, if any."""
        if self.state["skipped"]:
            console.say(f"{self.state['skipped']} of {steps} optimizer steps had no finite gradient and were skipped")


class CollapseMonitor:
    """Signs of a collapse, each said once with advice."""

    def __init__(self, clip_eps: float):
        """state: what was seen, part of a saved run: first and latest shares of valid pairs, the first pictures' spread, and
        which signs were said."""
        self.eps, self.state = clip_eps, {"first": [], "shares": [], "spread": None, "said": []}

    def batch(self, metrics: dict[str, float], trained: list[dict[str, float]]) -> list[str]:
        """Warnings after a prompt batch; metrics: ``train_lpo.batch_metrics``, trained: rows of its optimizer steps."""
        found = []
        score = metrics["preference_scores_mean"]
        if not math.isfinite(score):
            found.append(("scores", "the reward model gives scores that are not finite: their pairs are left out; check it "
                          "with python -m lpo_fast.score, or use --mixed-precision bf16"))
        share = metrics["total_valid_samples_num"] / max(metrics["pairs_possible"], 1)
        first, shares = self.state["first"], [*self.state["shares"], share][-BATCHES:]
        self.state |= {"first": (first + [share])[:BATCHES], "shares": shares}
        before, recent = mean(self.state["first"]), mean(shares)
        if recent < before / 5:
            found.append(("valid pairs", f"valid pairs fell from {before:.0%} to {recent:.0%}: candidates have "
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
        first = self.state["spread"] = now if self.state["spread"] is None else self.state["spread"]
        if now < first / 2:
            return self.once([("diversity", f"pictures of one prompt differ by {now:.3f}, less than half of the first "
                               f"validation's {first:.3f}: the model has lost variety; use an earlier checkpoint, a lower "
                               "--learning-rate or fewer epochs")])
        return []

    def once(self, found: list[tuple[str, str]]) -> list[str]:
        """Those that were not said before."""
        new = [(name, text) for name, text in found if name not in self.state["said"]]
        self.state["said"] += [name for name, _ in new]
        return [f"warning: {text}" for _, text in new]
