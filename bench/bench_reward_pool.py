"""reward_pool, forward and backward, at all maps of 20 candidates: SD1.5 and SD2.1 (both also NCHW), SDXL."""

from measure import benchmarks

from lpo_fast.verify.operators import OPERATORS

test_reward_pool = benchmarks(OPERATORS["reward_pool"])
