"""From text to samples: tokenizer, corpora, token files and the order of samples. Imports no jax.

tokenizer.py     the World tokenizer
corpus.py        jsonl, plain text and Parquet as documents
tokenization.py  from a corpus to a token file, on all cores
binidx.py        Megatron's token file
token_cache.py   cached token files
sampler.py       the official cubic-hash order of samples
dataset.py       a token file with its order of samples
loader.py        prefetching of batches

Three commands, which `rwkv_jax.cli` lists:

make_data.py            text to a shuffled token file
compute_magic_prime.py  the options to train on a token file
arithmetic.py           a corpus of exact arithmetic
"""
