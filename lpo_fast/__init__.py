"""lpo_fast: fast latent reward models (LRM) and latent preference optimization (LPO) for diffusion models.

    from dataclasses import replace
    from lpo_fast import config, train_lpo
    train_lpo.train(replace(config.sd15().lpo, model="stable-diffusion-v1-5", lrm="lrm_sd15",
                            prompts="prompts.json"))

Folders, each of which imports only from those below it (docs/design.md):

    shapes      the embedded world, on which the whole method runs in minutes
    official    the official launch lines and configs, as settings
    preflight   refuses what cannot work before anything is loaded; --dry-run
    verify      recorded outputs of the official code; the kernels as data
    lpo         stage 2: policy, judging, sampling, batches, steps, checkpoints
    lrm         stage 1: the reward model, encoding, steps, validation
    run         what both loops share: run directory, states, logs, optimizer steps
    data        prompts, pairs, pictures, tables, the latent cache
    evaluation  scorers and comparisons
    models      finding and loading models, text features, LoRA, sharding
    kernels     fused Triton kernels, one file per operator
    method      the paper in plain PyTorch: start reading here
    system      this machine: devices, compilation, processes, files
"""

import logging
import os

for library in ("xformers", "bitsandbytes"):  # they warn at import where they cannot run, e.g. on a CPU
    logging.getLogger(library).setLevel(logging.ERROR)
for library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
