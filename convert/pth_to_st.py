"""`python -m convert.pth_to_st`: the command of rwkv_jax/convert/pth_to_st.py."""

import sys
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.convert.pth_to_st import main
from rwkv_jax.errors import run_command

if __name__ == "__main__":
    run_command(main)
