"""lpo_fast: fast latent reward models (LRM) and latent preference optimization (LPO) for diffusion models.

    from dataclasses import replace
    from lpo_fast import config, train_lpo
    train_lpo.train(replace(config.sd15().lpo, model="stable-diffusion-v1-5", lrm="lrm_sd15",
                            prompts="prompts.json"))
"""

import logging
import os

for library in ("xformers", "bitsandbytes"):  # they warn at import where they cannot run, e.g. on a CPU
    logging.getLogger(library).setLevel(logging.ERROR)
for library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
