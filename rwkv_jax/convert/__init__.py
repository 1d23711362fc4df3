"""Other programs' files: conversion, and what is in a file. `rwkv_jax.cli` lists the commands.

hf.py            the Hugging Face layout of RWKV-7
hf_tokenizer.py  the World tokenizer for the `tokenizers` library
st.py            safetensors files, and the .st of web-rwkv
describe.py      command: the contents of a model, or the differences of two
verify.py        command: which programs can load a model
pth_to_st.py     command
st_to_pth.py     command
pth_to_hf.py     command
hf_to_pth.py     command
pth_to_orbax.py  command
orbax_to_pth.py  command
"""
