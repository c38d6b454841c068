"""Run the command line: python -m lpo_fast.train [demo | lrm | lpo] ….

demo (default)      run both stages on the embedded world and evaluate from pixels: minutes on a laptop
lrm                 train a latent reward model from preference pairs
lpo                 align a Stable Diffusion model with a latent reward model
--config FILE.py …  accept a launch line of the official LPO script (official/lpo.py)
--config-path DIR --config-name NAME key=value …  accept one of the official LRM script (official/lrm.py)
--dry-run           added to any of these except demo: check the settings, print the run's memory, disk and
                    work, and exit (preflight/dry_run.py)
"""

import os
import sys
from dataclasses import replace
from typing import Annotated

import tyro

from lpo_fast import cli, config
from lpo_fast.config import LPO, LRM, Demo
from lpo_fast.official import lpo, lrm
from lpo_fast.preflight import settings as checks


def run(settings: Demo | LRM | LPO) -> None:
    """Run one command, and print where its results are.

    Heavy modules are imported here, after the command line has been parsed.
    """
    from lpo_fast import report, train_lpo, train_lrm
    from lpo_fast.lrm import selection
    from lpo_fast.models import loras
    from lpo_fast.preflight import dry_run
    from lpo_fast.run import optimization
    from lpo_fast.shapes import evaluate
    from lpo_fast.system import console, distributed
    if not isinstance(settings, Demo) and settings.dry_run:
        lines = dry_run.report(settings)
        if os.environ.get("RANK", "0") == "0":
            print(*lines, sep="\n", flush=True)
        return
    with optimization.explained_errors():
        match settings:
            case Demo():
                checks.demo(settings)
                result, out = evaluate.demo(settings)
                console.say(evaluate.verdict(result))
            case LRM():
                out = train_lrm.train(settings)
                console.say(f"latent reward model: {out / selection.FINAL}")
            case LPO():
                out = train_lpo.train(settings)
                console.say(f"weights: {out / ('unet' if settings.full else loras.LORA_DIFFUSERS)}")
    if distributed.is_main():
        console.say(f"report: {report.write(out)}")


def recipe(argv: list[str]) -> config.Recipe:
    """Return the defaults of a command line: the recipe for the family of the model that --model names."""
    def value(flag: str) -> str:
        separate = [following for word, following in zip(argv, argv[1:], strict=False) if word == flag]
        joined = [word.partition("=")[2] for word in argv if word.startswith(f"{flag}=")]
        return (separate + joined + [""])[0]
    unet = {}
    if name := value("--model"):
        from lpo_fast.models import locate
        unet = locate.unet_config(name, value("--revision"))
    if unet.get("addition_embed_type") == "text_time":
        return config.sdxl()
    return config.sd21() if unet.get("cross_attention_dim") == 1024 else config.sd15()


def parse(argv: list[str]) -> Demo | LRM | LPO:
    """Return the settings of a command line, in this package's form or an official one; [] is the demo.

    Exits with an error message if the command line is not valid. Raises InputError for official settings that
    are not supported.
    """
    if lpo.is_launch(argv):
        settings, notes = lpo.parse(argv)
        if os.environ.get("RANK", "0") == "0":  # one of the processes
            for note in notes:
                print(f"note: {note}", flush=True)
        return settings
    if any(word.partition("=")[0] in ("--config-path", "--config-name", "-cp", "-cn") for word in argv):
        return replace(lrm.parse([word for word in argv if word != "--dry-run"]), dry_run="--dry-run" in argv)
    defaults = recipe(argv)
    stages = (Annotated[Demo, tyro.conf.subcommand("demo")]
              | Annotated[LRM, tyro.conf.subcommand("lrm", default=defaults.lrm)]
              | Annotated[LPO, tyro.conf.subcommand("lpo", default=defaults.lpo)])
    if not argv or argv[0].startswith("--") and argv[0] != "--help":
        argv = ["demo", *argv]
    settings = cli.parse(stages, argv, "train", description=(
        "Latent reward models and latent preference optimization for Stable Diffusion. Defaults are those of "
        "the recipe for the model that --model names; without one, SD1.5's."))
    if isinstance(settings, LPO):
        cli.lora_flags(settings, defaults.lpo)
    return settings


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a user's error, 128 + n if signal n stopped it."""
    return cli.code(lambda: run(parse(sys.argv[1:] if argv is None else argv)),
                    stopped="stopped outside the training loop")  # inside, a signal saves a state first


if __name__ == "__main__":
    sys.exit(main())
