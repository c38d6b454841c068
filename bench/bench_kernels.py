"""Time every kernel against its reference, compiled and not, at the shapes of SD1.5, SD2.1 and SDXL.

    pytest bench/bench_kernels.py --benchmark-only [-k pair_loss] [--results bench/results]

The sizes are those of lpo_fast/verify/operators.py: 4 candidates of 5 prompts, 10 pairs with fp16 outputs,
the second norm of the first ResNet blocks. Forward passes are timed, and backward passes where there is one.
"""

from bench.support.measure import benchmarks
from lpo_fast.verify.operators import OPERATORS

test_ddim_candidates = benchmarks(OPERATORS["ddim_candidates"])
test_group_norm_silu = benchmarks(OPERATORS["group_norm_silu"])
test_pair_loss = benchmarks(OPERATORS["pair_loss"])
test_pair_select = benchmarks(OPERATORS["pair_select"])
test_reward_pool = benchmarks(OPERATORS["reward_pool"])
