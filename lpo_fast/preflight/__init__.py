"""Refuse what cannot work before anything is loaded; the dry run."""
