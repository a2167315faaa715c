"""The options: one dataclass per TOML section, loading, checking."""

from tidar.config.errors import (
    UserError,
    aligned,
    first_line,
    named_error,
    print_first_error,
    print_lines,
    printable,
    user_errors_exit,
)
from tidar.config.loading import (
    ArgumentParser,
    in_range,
    load_config,
    make_dump_folder,
    resolve_global_batch_size,
    resolve_micro_batches,
    set_option,
    to_toml,
)
from tidar.config.options import Config
from tidar.config.seeds import derive_seed

__all__ = [
    "ArgumentParser",
    "Config",
    "UserError",
    "aligned",
    "derive_seed",
    "first_line",
    "in_range",
    "load_config",
    "make_dump_folder",
    "named_error",
    "print_first_error",
    "print_lines",
    "printable",
    "resolve_global_batch_size",
    "resolve_micro_batches",
    "set_option",
    "to_toml",
    "user_errors_exit",
]
