"""The method itself, in plain PyTorch: losses, noise, schedule and selection."""
