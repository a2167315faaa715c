"""Inspection of a pattern for tidar.masks: its mask as text and as a picture, its tiles, the speed of its kernels."""
