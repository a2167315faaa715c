"""Patterns: layout, attention mask and targets of TiDAR and its variants, one short file each, and their registry."""

from tidar.patterns.base import (
    LOSSES,
    PADDING,
    Blocks,
    Documents,
    KeyRange,
    MaskMod,
    ModelBatch,
    Pattern,
    Share,
    Targets,
    dense_pieces,
    in_either,
    in_range,
    key_ranges,
)
from tidar.patterns.block_diffusion import BlockDiffusion
from tidar.patterns.causal import Causal
from tidar.patterns.checks import check_pattern
from tidar.patterns.registry import (
    DECODABLE,
    EXPERIMENTS,
    PATTERNS,
    checked_pattern,
    configured_pattern,
    experiments,
    get_pattern,
    loss_weights,
)
from tidar.patterns.sharding import TILE, RowSharding, shared_mask_mod
from tidar.patterns.tidar import Tidar
from tidar.patterns.tidar_random import TidarRandom
from tidar.patterns.tidar_split import TidarSplit

__all__ = [
    "DECODABLE",
    "EXPERIMENTS",
    "LOSSES",
    "PADDING",
    "PATTERNS",
    "TILE",
    "BlockDiffusion",
    "Blocks",
    "Causal",
    "Documents",
    "KeyRange",
    "MaskMod",
    "ModelBatch",
    "Pattern",
    "RowSharding",
    "Share",
    "Targets",
    "Tidar",
    "TidarRandom",
    "TidarSplit",
    "check_pattern",
    "checked_pattern",
    "configured_pattern",
    "dense_pieces",
    "experiments",
    "get_pattern",
    "in_either",
    "in_range",
    "key_ranges",
    "loss_weights",
    "shared_mask_mod",
]
