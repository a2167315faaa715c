"""The TiDAR idea: layout, mask and targets; one short file per pattern, and their registry."""

from tidar.config import UserError
from tidar.patterns.base import PADDING, Documents, MaskMod, ModelBatch, Pattern, Targets
from tidar.patterns.tidar import Tidar

PATTERNS: dict[str, type[Pattern]] = {"tidar": Tidar}


def get_pattern(name: str, **options) -> Pattern:
    """The pattern of that name, made with its options. Raises UserError for an unknown name."""
    if name not in PATTERNS:
        raise UserError(f"tidar.pattern = {name}: must be one of {', '.join(PATTERNS)}")
    return PATTERNS[name](**options)


__all__ = ["PADDING", "PATTERNS", "Documents", "MaskMod", "ModelBatch", "Pattern", "Targets", "get_pattern"]
