"""The machine: NVIDIA driver and GPUs, jax's settings, and the precision to compute in.

nvidia.py     driver and nvidia-smi, before or without jax
runtime.py    jax's settings before its first use of a device
precision.py  bf16, fp16, tf32 or fp32
"""
