"""Decoding: draft and verify in one forward pass, with a cache, for batches of any size."""

from tidar.decoding.engine import Completion, Engine, Method
from tidar.decoding.load import load

__all__ = ["Completion", "Engine", "Method", "load"]
