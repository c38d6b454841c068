"""Stage 2, LPO: policy, judging, sampling, prompt batches, optimizer steps, and checkpoints."""
