"""Commands that `cli.py` registers: one file each."""
