"""pair_loss, forward and backward, 10 pairs with fp16 outputs: latents of SD1.5 (also NCHW), SD2.1 and SDXL."""

from measure import benchmarks

from lpo_fast.verify.operators import OPERATORS

test_pair_loss = benchmarks(OPERATORS["pair_loss"])
