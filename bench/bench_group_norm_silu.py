"""group_norm_silu, forward and backward, 2nd norm of the first ResNet blocks: SD1.5 (also mid and last up), SD2.1, SDXL."""

from measure import benchmarks

from lpo_fast.verify.operators import OPERATORS

test_group_norm_silu = benchmarks(OPERATORS["group_norm_silu"])
