"""How good a model is: scores of held-out rows, tokens per forward pass, and lm-eval's tasks."""

from tidar.evaluation.prompts import held_out_prompts, n_new_tokens
from tidar.evaluation.scores import validate
from tidar.evaluation.speed import decode, measure_speed

__all__ = ["decode", "held_out_prompts", "measure_speed", "n_new_tokens", "validate"]
