"""`python -m rwkv_jax COMMAND`: the same as `rwkv-jax COMMAND`."""

from rwkv_jax.cli import run

if __name__ == "__main__":
    run()
