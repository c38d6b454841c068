"""Score pictures and compare two models."""
