"""Stage 2: align a policy with a latent reward model."""
