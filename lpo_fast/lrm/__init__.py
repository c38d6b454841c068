"""Stage 1, the latent reward model (LRM): network, encoding, steps, validation, and checkpoints."""
