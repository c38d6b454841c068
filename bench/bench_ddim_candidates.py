"""ddim_candidates, 4 candidates of 5 prompts: latents of SD1.5 (also NCHW, also with given noise), SD2.1 and SDXL."""

from measure import benchmarks

from lpo_fast.verify.operators import OPERATORS

test_ddim_candidates = benchmarks(OPERATORS["ddim_candidates"])
