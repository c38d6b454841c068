"""lpo_fast: fast latent reward models (LRM) and latent preference optimization (LPO) for diffusion models.

>>> from lpo_fast.train_lpo import train                      # doctest: +SKIP
>>> train(replace(config.sd15().lpo, lrm="lrm_sd15", prompts="prompts.json"))   # doctest: +SKIP
"""

import logging
import os

logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns at import wherever it cannot run, a CPU for instance
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
