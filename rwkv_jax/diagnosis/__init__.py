"""The checks of `doctor`. Importing it does not start jax.

facts.py      packages, GPUs, settings, and what jax makes of them
rules.py      what is wrong, and the way out
self_test.py  a small training with known losses, in a process of its own
"""
