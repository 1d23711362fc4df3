"""From text to samples: tokenizer, corpora, token files and the order of samples. Imports no jax.

tokenizer.py     the World tokenizer
corpus.py        jsonl, plain text and Parquet as documents
tokenization.py  a corpus to a token file, on all cores
binidx.py        the token file of Megatron
token_cache.py   token files kept for the next run
sampler.py       the official cubic-hash order of samples
dataset.py       a token file with its order of samples
loader.py        batches prepared ahead of the step

Three commands, which `rwkv_jax.cli` lists:

make_data.py            text to a shuffled token file
compute_magic_prime.py  the options to train on a token file
arithmetic.py           a corpus of exact arithmetic
"""
