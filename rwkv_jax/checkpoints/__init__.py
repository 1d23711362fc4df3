"""Files that hold a model or a run.

pth.py      PyTorch's container, without PyTorch
weights.py  official tensor names and the tree of parameters
arrays.py   the arrays of a checkpoint on disk, a piece at a time
store.py    checkpoints of a run: save, verify, restore. All use of orbax is here
"""
