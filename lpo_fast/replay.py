"""Run a skipped step again and report which values are not finite: python -m lpo_fast.replay RUN/skipped.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lpo_fast import cli
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.run import optimization
from lpo_fast.run.monitor import SKIPPED
from lpo_fast.system import reading


def replay(file: Path) -> list[str]:
    """Run a skipped step again, on this device.

    Returns lines about the inputs, weights, outputs, loss and gradients that are not finite. Raises
    InputError if the file does not hold a skipped step.
    """
    kept = reading.read_pickle(file, "FILE")
    if not kept.keys() >= {"config", "step", "after", "size", "weights"}:
        raise InputError(str(file), "holds no skipped step", f"name a run's {SKIPPED}", "FILE")
    with optimization.explained_errors():
        about, lines = (replay_lrm if "rows" in kept else replay_lpo)(kept)
    # Metrics are read late: later steps may have run before the weights were saved.
    weights = f"with the weights after {kept['after']} steps"
    return [f"step {kept['step']}, {about}, {weights}", *(list(dict.fromkeys(filter(None, lines))) or [
        "all values are finite here: the device, its precision or the weights differed"])]


def replay_lpo(kept: dict) -> tuple[str, list[str]]:
    """Return a description of the step's pairs, and lines about values that are not finite."""
    from lpo_fast.lpo import policies, steps
    from lpo_fast.lpo.sampling import LatentPairs
    from lpo_fast.run import states
    from lpo_fast.system import devices
    config = replace(LPO(**kept["config"]), compile="none", attention="sdpa", validation_prompts=())
    device = devices.device()
    pairs = LatentPairs(*(x.to(device) for x in kept["pairs"]))
    actor, sched = policies.load(config, kept["prompts"], device)
    states.Trained(actor.unet).load_state_dict(kept["weights"])
    pairs = pairs._replace(prompt=torch.searchsorted(kept["numbers"].to(device), pairs.prompt))
    lines = [broken(f"pairs, {name}", x) for name, x in zip(LatentPairs._fields, pairs, strict=True)
             if x.is_floating_point()]
    for first in range(0, len(pairs.t), kept["size"]):
        part = pairs.take(slice(first, first + kept["size"]))
        at = part.x_t, part.t, part.prompt
        lines += [broken("policy's output", actor.train(*at)),
                  broken("reference's output", actor.reference(*at))]
        out = steps.evaluate(actor, sched, part, torch.full_like(part.x_t[:, 0, 0, 0], 1 / len(pairs.t)),
                             beta=config.beta, eps=config.clip_eps, guidance=config.train_guidance)
        out.loss.backward()
        lines.append(broken("loss", out.loss))
    about = f"{len(pairs.t)} pairs at timesteps {sorted(set(pairs.t.tolist()), reverse=True)}"
    return about, [*lines, *broken_parameters(actor.unet)]


def replay_lrm(kept: dict) -> tuple[str, list[str]]:
    """Return a description of the step's pairs, and lines about values that are not finite.

    The pictures are read again.
    """
    from lpo_fast import config
    from lpo_fast.data import dataset
    from lpo_fast.lrm import steps as lrm_steps
    from lpo_fast.preflight import runs
    from lpo_fast.run import states
    from lpo_fast.system import devices
    settings = LRM(**config.renamed(kept["config"]) | {"columns": config.Columns(**kept["config"]["columns"]),
                                       "compile": "none"})
    lrm, encoder = lrm_steps.load(settings, devices.device())
    states.Trained(lrm).load_state_dict(kept["weights"])
    source = dataset.PairDataset(runs.training_pairs(settings)["train"],
                                 settings.resolution or encoder.resolution)
    number = {source.pairs.key(i): i for i in range(len(source))}
    batch = dataset.collate([source[number[row]] for row in kept["rows"].tolist()])
    batch = lrm_steps.encoded(encoder, batch, kept["step"], settings)
    weight = (~batch["corrupt"].to(encoder.device) / batch["counts"]).sum()
    lines = [broken("VAE's posterior, mean", batch["mean"]),
             broken("VAE's posterior, standard deviation", batch["std"])]
    for part in lrm_steps.parts(batch, kept["size"]):
        loss, _ = lrm_steps.pair_loss(lrm, encoder, part, kept["step"], settings, weight)
        loss.backward()
        lines.append(broken("loss", loss))
    return f"rows {kept['rows'].tolist()} of {settings.pairs}", [*lines, *broken_parameters(lrm)]


def broken_parameters(module: torch.nn.Module) -> list[str]:
    """Return the lines for the trainable parameters and their gradients."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [broken(name, p) for name, p in trained] + [
        broken(f"gradient of {name}", p.grad) for name, p in trained if p.grad is not None]


def broken(name: str, x: Tensor) -> str:
    """Return a line if a tensor has values that are not finite, else ""."""
    count = int((~x.isfinite()).sum())
    return f"{name}: {count} of {x.numel()} are not finite" if count else ""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 if the file cannot be used."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise InputError(" ".join(argv) or "(none)", "is not a single file", f"name a run's {SKIPPED}",
                             "FILE")
        if not Path(argv[0]).is_file():
            raise InputError(argv[0], "no such file", f"name a run's {SKIPPED}", "FILE")
        print("\n".join(replay(Path(argv[0]))))
    return cli.code(run)


if __name__ == "__main__":
    sys.exit(main())
