"""RWKV-7 in Flax NNX, its initialisation and its training loss.

    rwkv7.py           TimeMix, ChannelMix, Block, RWKV7
    initialisation.py  the official initial value of every tensor
    loss.py            head, cross-entropy and L2Wrap, one chunk of tokens at a time

This package does not depend on devices, files or the options of a run; the WKV operation is in
`pallas_kernels`.
"""
