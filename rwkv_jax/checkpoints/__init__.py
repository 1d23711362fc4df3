"""Files that hold a model or a run.

pth.py      PyTorch's container, without PyTorch
weights.py  official tensor names and the tree of parameters
arrays.py   the arrays of a checkpoint on disk, in pieces
store.py    checkpoints of a run: save, verify, restore. The only module that uses orbax
"""
