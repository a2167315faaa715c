"""Reading the files of the DeepSpeed script, and converting each of their keys."""

from tidar.migration.keys import Keys, is_text, read_json, shown
from tidar.migration.recipe import Recipe
from tidar.migration.unused import DEEPSPEED_REASONS, REQUIRED, SCRIPT_REASONS, by_path

__all__ = [
    "DEEPSPEED_REASONS",
    "Keys",
    "REQUIRED",
    "Recipe",
    "SCRIPT_REASONS",
    "by_path",
    "is_text",
    "read_json",
    "shown",
]
