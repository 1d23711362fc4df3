"""The memory and cost of a step, by compiling it, for present or absent devices.

memory.py      the memory of a compiled step
batch_size.py  the largest micro_bsz that fits
plans.py       the plan of a run, and its report
cost.py        FLOPs of a jaxpr, bytes moved by an HLO module
"""
