"""Accept the official code's launch lines and configs, and write its records."""
