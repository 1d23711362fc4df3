"""What each device, the host memory and each process holds.

sharding.py     the mesh, the sharding of each tensor, and the strategies
layout.py       what a device gathers, holds and reduce-scatters in a step, by strategy
offload.py      a step with master weights and moments in host memory
distributed.py  several processes that train one model
"""
