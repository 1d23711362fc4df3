"""The checks of `doctor`. Importing this package does not start jax.

facts.py      packages, GPUs, settings and jax's devices
rules.py      problems, each with a fix
self_test.py  a small training with known losses, in a subprocess
"""
