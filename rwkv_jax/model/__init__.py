"""The model: RWKV-7 in Flax NNX, its initial values and its training loss.

    rwkv7.py           TimeMix, ChannelMix, Block, RWKV7
    initialisation.py  the official first value of every tensor
    loss.py            head, cross-entropy and L2Wrap, a chunk of tokens at a time

It knows no devices, files or options of a run; the WKV operation is in `pallas_kernels`.
"""
