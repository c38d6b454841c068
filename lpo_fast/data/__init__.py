"""Data: preference pairs, prompts, pictures, score tables, and the latent cache."""
