"""pair_select, 4 candidates of 5 prompts: latents of SD1.5, SD2.1 and SDXL."""

from measure import benchmarks

from lpo_fast.verify.operators import OPERATORS

test_pair_select = benchmarks(OPERATORS["pair_select"])
