"""Seeds of everything random: a function of what it is for, never of a rank's or a step's state."""

import hashlib


def derive_seed(*key: object) -> int:
    """A seed for torch.Generator.manual_seed, spread evenly over 64 bits, that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
