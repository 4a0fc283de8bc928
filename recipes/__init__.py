"""Runnable training loops, one file each; nothing is imported here, so that `python -m` imports once."""
