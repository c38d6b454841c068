"""Verify that this code computes the method: golden vectors and kernel checks."""
