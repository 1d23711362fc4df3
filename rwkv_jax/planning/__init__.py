"""What a step needs and costs, by compiling it, for devices that are here or not.

memory.py      the memory that a compiled step needs
batch_size.py  the largest micro_bsz that fits
cost.py        FLOPs of a jaxpr, bytes moved by an HLO module
"""
