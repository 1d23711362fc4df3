"""The WKV-7 operation (`wkv7`) and its implementations."""

from pallas_kernels.wkv7.api import wkv7

__all__ = ["wkv7"]
