"""Optimizer, learning rate, loss scale, gradient norm and skipped steps."""
