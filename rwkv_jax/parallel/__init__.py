"""Which device, host memory or process holds what.

sharding.py     the mesh, where each tensor is cut, and the strategies
layout.py       what a step's device gathers, holds and scatters, by strategy
offload.py      a step whose masters and moments are in the host's memory
distributed.py  several processes that train as one
"""
