"""`python -m convert.inspect`: the same as `convert.describe`.

A file of that name would hide Python's own module from whatever runs in the folder above; a folder
without `__init__.py` does not.
"""

from rwkv_jax.convert.describe import main
from rwkv_jax.errors import run_command

run_command(main)
