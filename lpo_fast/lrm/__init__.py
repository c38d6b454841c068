"""Stage 1: train a latent reward model."""
