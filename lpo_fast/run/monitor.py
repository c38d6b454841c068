"""Detect signs that a run is failing: skipped steps, and a collapse."""

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

IN_A_ROW = 20  # skipped steps: fp16's scale starts at 2^16 and may have to be halved that often
SKIPPED = "skipped.pt"  # in the run directory
BATCHES = 5  # the first prompt batches of a run are compared with the latest ones


class SkippedSteps:
    """Count the optimizer steps that were skipped. state: {skipped, in_a_row}, part of a saved run."""

    def __init__(self, out: Path, inputs: Callable[[object], dict[str, object]] | None):
        """Start counting.

        inputs: maps ``fed`` of ``look`` to everything that determines the step, in all processes; None: keep
        no inputs.
        """
        self.out, self.inputs = out, inputs
        self.state = {"skipped": 0, "in_a_row": 0}

    def look(self, step: int, after: int, loss: float, norm: float, fed: object) -> InputError | None:
        """Count a step by its loss and gradient norm; return an error if too many in a row were skipped.

        after: optimizer steps taken by now. fed: the step's inputs.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self.state["in_a_row"] = 0
            return None
        self.state = {key: count + 1 for key, count in self.state.items()}
        if not math.isfinite(loss) and self.inputs:
            # With a finite loss, fp16's scale was too large, which the scaler corrects.
            self.keep(self.inputs(fed) | {"step": step, "after": after})
            self.inputs = None
        if self.state["in_a_row"] < IN_A_ROW:
            return None
        return InputError(
            str(self.out),
            f"{self.state['in_a_row']} optimizer steps in a row had no finite gradient, the last "
            f"of them step {step}; the weights are unchanged, and the state is saved",
            f"run python -m lpo_fast.replay {self.out / SKIPPED}, use --mixed-precision bf16, or start again "
            "with a lower --learning-rate",
            "--out",
        )

    def keep(self, inputs: dict[str, object]) -> None:
        """Write the inputs and weights of the first such step to SKIPPED, if there is enough disk space."""
        file, step = self.out / SKIPPED, inputs["step"]
        size = sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, Tensor))
        if file.exists() or not distributed.is_main():
            return
        try:
            writing.require_disk_space(self.out, 10 * size, "free some space")  # saved states have priority
            with writing.replacing(file) as aside:
                writing.save_pickle(inputs, aside)
            console.say(f"warning: step {step} has no finite loss and was skipped; its inputs: {file}")
        except InputError as problem:
            console.say(f"warning: step {step} has no finite loss and was skipped; its inputs are not saved: "
                        f"{problem}")

    def summary(self, steps: int) -> None:
        """Print how many of ``steps`` were skipped, if any."""
        if self.state["skipped"]:
            console.say(f"{self.state['skipped']} of {steps} optimizer steps had no finite gradient and were "
                        "skipped")


class CollapseMonitor:
    """Detect signs of a collapse; report each one once, with advice.

    state: part of a saved run. It holds the first and the latest shares of valid pairs, the spread of the
    first pictures, and the names of the reported signs.
    """

    def __init__(self, clip_eps: float):
        """Start with no observations. clip_eps: the policy's ratios are clipped to 1 ± clip_eps."""
        self.eps = clip_eps
        self.state = {"first": [], "shares": [], "spread": None, "said": []}

    def batch(self, metrics: dict[str, float], trained: list[dict[str, float]]) -> list[str]:
        """Return the warnings after a prompt batch.

        metrics: of the batch, by name. trained: metrics of each of its optimizer steps.
        """
        found = []
        score = metrics["preference_scores_mean"]
        if not math.isfinite(score):
            found.append(("scores", "the reward model returns scores that are not finite; their pairs are "
                          "not used: check it with python -m lpo_fast.score, or use --mixed-precision bf16"))
        share = metrics["total_valid_samples_num"] / max(metrics["pairs_possible"], 1)
        first = self.state["first"]
        shares = [*self.state["shares"], share][-BATCHES:]
        self.state |= {"first": (first + [share])[:BATCHES], "shares": shares}
        before, recent = mean(self.state["first"]), mean(shares)
        if recent < before / 5:
            found.append(("valid pairs", f"valid pairs fell from {before:.0%} to {recent:.0%}: the reward "
                          "model scores all candidates nearly the same; stop here, or lower --threshold-min "
                          "and --threshold-max"))
        drift = [max(abs(row["train_ratio_win"] - 1), abs(row["train_ratio_lose"] - 1)) for row in trained]
        drift = [value for value in drift if math.isfinite(value)]
        if drift and mean(drift) > 0.9 * self.eps:
            found.append(("ratios", f"the policy's ratios are at their clip bounds ({1 - self.eps:g} … "
                          f"{1 + self.eps:g}), where gradients vanish: it is far from its reference; lower "
                          "--learning-rate, or use an earlier checkpoint"))
        return self.once(found)

    def pictures(self, drawn: list[Image.Image], each: int) -> list[str]:
        """Return the warnings after validation pictures, by their RMS difference within a prompt (0 to 1).

        drawn: ``each`` pictures per prompt, prompt by prompt.
        """
        if not drawn or each < 2:
            return []
        pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in drawn])
        grouped = pixels.reshape(-1, each, pixels[0].size)
        now = float(np.sqrt(grouped.var(1, ddof=1).mean() * 2))
        first = self.state["spread"] = now if self.state["spread"] is None else self.state["spread"]
        if now < first / 2:
            return self.once([("diversity", f"pictures of one prompt differ by {now:.3f}, less than half of "
                               f"the first validation's {first:.3f}: the model has lost diversity; use an "
                               "earlier checkpoint, a lower --learning-rate or fewer epochs")])
        return []

    def once(self, found: list[tuple[str, str]]) -> list[str]:
        """Return the warnings of the signs, (name, text), that were not reported before."""
        new = [(name, text) for name, text in found if name not in self.state["said"]]
        self.state["said"] += [name for name, _ in new]
        return [f"warning: {text}" for _, text in new]
