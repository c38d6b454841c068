"""What a long run needs: optimizer steps that survive what is not finite or does not fit, and signs that training goes wrong.

A step whose gradient is not finite changes nothing: ``torch.amp.GradScaler`` finds out on the device and skips it, in fp16 with
a scale that it lowers, in other precisions with a scale of 1. Such steps are counted, what led to the first of them is kept for
``python -m lpo_fast.guard FILE``, and too many in a row stop the run.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpo_fast import cli, files, ranks, runs, shard
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError

IN_A_ROW = 20  # steps: fp16's scale starts at 2^16 and may need as many halvings
SKIPPED = "skipped.pt"  # in a run's directory
BATCHES = 5  # of prompts, the first ones of a run and its latest, that are compared


class Unscaled(torch.amp.GradScaler):
    """A scale that stays 1: skipped steps do not lower it."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale: float | None = None) -> None:
        """Ready for the next step."""
        super().update(1.0)


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """What skips steps without a finite gradient; see above."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else Unscaled(device.type)


@contextmanager
def told() -> Iterator[None]:
    """InputError where the GPU's memory does not suffice and nothing can be done about it, or for what --deterministic rules
    out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory", f"does not suffice ({str(error).splitlines()[0]})",
                         "see what takes how much with --dry-run, and README's table of settings that save memory") from error
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise InputError("True", f"cannot be had here ({str(error).splitlines()[0][:160]})", "leave it out",
                         "--deterministic") from error


class Update:
    """An optimizer's steps: one without a finite gradient changes nothing, and where the GPU's memory does not suffice for
    ``pairs`` at a time, half as many go through the networks from then on, which leaves the loss as it is."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float, pairs: int,
                 remedy: str, halves: bool = True):
        """remedy: for the user, if memory does not suffice at last. halves: whether passes may be halved."""
        self.optimizer, self.scaler, self.max_norm = optimizer, scaler, max_norm
        self.pairs, self.remedy, self.halves = pairs, remedy, halves
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def __call__(self, gradients: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """One step. gradients: adds to the parameters', with so many pairs at a time, and returns the step's metrics.

        Those metrics and the gradient's norm before it is clipped, [], on the device. Raises InputError if memory is too small.
        """
        while (metrics := self._tried(gradients)) is None:  # by now what the failed pass held is free
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        ranks.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = shard.clip(self.parameters, self.max_norm)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, norm

    def _tried(self, gradients: Callable[[int], Tensor]) -> Tensor | None:
        """The metrics, or None if memory was too small."""
        try:
            return gradients(self.pairs)
        except torch.OutOfMemoryError as error:
            size = f"{self.pairs} pair{'s' * (self.pairs > 1)}"
            if self.pairs == 1 or not self.halves:
                raise InputError(size, f"does not fit into the GPU's memory ({str(error).splitlines()[0]})",
                                 self.remedy, "a training pass of") from error
        runs.say(f"warning: a training pass of {size} does not fit into the GPU's memory: from now on passes are of "
                 f"{self.pairs // 2}, with the same loss; to make room, {self.remedy}")
        self.pairs //= 2
        return None


class Steps:
    """Counts the optimizer steps that were skipped. state: {skipped, in_a_row}, part of a saved run."""

    def __init__(self, out: Path, inputs: Callable[[object], dict[str, object]] | None):
        """inputs: all that made a step, given what ``look`` is given of it, in every process; None: keep none."""
        self.out, self.inputs, self.state = out, inputs, {"skipped": 0, "in_a_row": 0}

    def look(self, step: int, loss: float, norm: float, fed: object) -> InputError | None:
        """A step's loss and gradient norm, and what it was fed. The error that ends the run when too many in a row were
        skipped."""
        if math.isfinite(norm) and math.isfinite(loss):
            self.state["in_a_row"] = 0
            return None
        self.state = {key: count + 1 for key, count in self.state.items()}
        if not math.isfinite(loss) and self.inputs:
            self.keep(step, self.inputs(fed))  # else fp16's range was left, which the scale mends
            self.inputs = None
        if self.state["in_a_row"] < IN_A_ROW:
            return None
        return InputError(str(self.out), f"{self.state['in_a_row']} optimizer steps in a row had no finite gradient, the last "
                          f"of them step {step}; they changed nothing, and the state is saved",
                          f"see python -m lpo_fast.guard {self.out / SKIPPED}, use --mixed-precision bf16, or start again with "
                          "a lower --learning-rate", "--out")

    def keep(self, step: int, inputs: dict[str, object]) -> None:
        """SKIPPED: the inputs of the first such step, and the weights, if the disk has room for them."""
        file, size = self.out / SKIPPED, sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, Tensor))
        if file.exists() or not ranks.main():
            return
        try:
            files.check_room(self.out, 10 * size, "make room")  # states go before
            with files.replacing(file) as aside:
                files.save_pickle(inputs | {"step": step}, aside)
            runs.say(f"warning: step {step} has no finite loss and was skipped; its inputs: {file}")
        except InputError as problem:
            runs.say(f"warning: step {step} has no finite loss and was skipped; its inputs are not kept: {problem}")

    def summary(self, steps: int) -> None:
        """Say how many of a run's steps were skipped, if any."""
        if self.state["skipped"]:
            runs.say(f"{self.state['skipped']} of {steps} optimizer steps had no finite gradient and were skipped")


class Watch:
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


def replay(file: Path) -> list[str]:
    """Run a skipped step again, on this device, and say what is not finite: inputs, weights, outputs, loss, gradients."""
    kept = files.read_pickle(file, "FILE")
    if not kept.keys() >= {"config", "step", "after", "size", "weights"}:
        raise InputError(str(file), "holds no skipped step", f"name a run's {SKIPPED}", "FILE")
    with told():
        about, lines = (replay_lrm if "rows" in kept else replay_lpo)(kept)
    weights = f"with the weights after {kept['after']} steps"  # metrics are read late, steps may come between
    return [f"step {kept['step']}, {about}, {weights}", *(list(dict.fromkeys(filter(None, lines))) or [
        "all is finite here: the device, its precision or the weights differed"])]


def replay_lpo(kept: dict) -> tuple[str, list[str]]:
    """The step's pairs in words, and what is not finite."""
    from lpo_fast import checkpoint, policy, speed, train_lpo
    from lpo_fast.sample import Pairs
    config = replace(LPO(**kept["config"]), compile="none", attention="sdpa", validation_prompts=())
    device = speed.device()
    pairs = Pairs(*(x.to(device) for x in kept["pairs"]))
    actor, sched = policy.load(config, kept["prompts"], device)
    checkpoint.Trained(actor.unet).load_state_dict(kept["weights"])
    pairs = pairs._replace(prompt=torch.searchsorted(kept["numbers"].to(device), pairs.prompt))
    lines = [broken(f"pairs, {name}", x) for name, x in zip(Pairs._fields, pairs, strict=True) if x.is_floating_point()]
    for first in range(0, len(pairs.t), kept["size"]):
        part = pairs.take(slice(first, first + kept["size"]))
        at = part.x_t, part.t, part.prompt
        lines += [broken("policy's output", actor.train(*at)), broken("reference's output", actor.reference(*at))]
        out = train_lpo.evaluate(actor, sched, part, torch.full_like(part.x_t[:, 0, 0, 0], 1 / len(pairs.t)), beta=config.beta,
                                 eps=config.clip_eps, guidance=config.train_guidance)
        out.loss.backward()
        lines.append(broken("loss", out.loss))
    about = f"{len(pairs.t)} pairs at timesteps {sorted(set(pairs.t.tolist()), reverse=True)}"
    return about, [*lines, *broken_parameters(actor.unet)]


def replay_lrm(kept: dict) -> tuple[str, list[str]]:
    """The step's pairs in words, and what is not finite; the pictures are read again."""
    from lpo_fast import checkpoint, config, pairs, preflight, speed, train_lrm
    settings = LRM(**kept["config"] | {"columns": config.Columns(**kept["config"]["columns"]), "compile": "none"})
    lrm, encoder = train_lrm.load(settings, speed.device())
    checkpoint.Trained(lrm).load_state_dict(kept["weights"])
    source = pairs.PairDataset(preflight.training_pairs(settings)["train"], settings.resolution or encoder.resolution)
    number = {source.pairs.key(i): i for i in range(len(source))}
    batch = pairs.collate([source[number[row]] for row in kept["rows"].tolist()])
    batch = train_lrm.encoded(encoder, batch, kept["step"], settings)
    weight = (~batch["corrupt"].to(encoder.device) / batch["counts"]).sum()
    lines = [broken("VAE's posterior, mean", batch["mean"]), broken("VAE's posterior, standard deviation", batch["std"])]
    for part in train_lrm.parts(batch, kept["size"]):
        loss, _ = train_lrm.pair_loss(lrm, encoder, part, kept["step"], settings, weight)
        loss.backward()
        lines.append(broken("loss", loss))
    return f"rows {kept['rows'].tolist()} of {settings.pairs}", [*lines, *broken_parameters(lrm)]


def broken_parameters(module: torch.nn.Module) -> list[str]:
    """Lines of the parameters that train and of their gradients."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [broken(name, p) for name, p in trained] + [
        broken(f"gradient of {name}", p.grad) for name, p in trained if p.grad is not None]


def broken(name: str, x: Tensor) -> str:
    """A line if not all of a tensor is finite."""
    count = int((~x.isfinite()).sum())
    return f"{name}: {count} of {x.numel()} are not finite" if count else ""


def main(argv: list[str] | None = None) -> int:
    """python -m lpo_fast.guard RUN/skipped.pt: run a skipped step again. Exit code 2 if the file cannot be used."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise InputError(" ".join(argv) or "(none)", "is no single file", f"name a run's {SKIPPED}", "FILE")
        if not Path(argv[0]).is_file():
            raise InputError(argv[0], "no such file", f"name a run's {SKIPPED}", "FILE")
        print("\n".join(replay(Path(argv[0]))))
    return cli.code(run)


if __name__ == "__main__":
    sys.exit(main())
