"""Keep a run: its directory, metrics, saved states, optimizer steps and profile."""
