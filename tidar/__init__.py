"""Native-PyTorch training of TiDAR language models (arXiv 2511.08923)."""

import os

# OpenMP threads that wait by spinning take the cores that the others need as soon as the machine has other work.
# Read when torch is imported; what the user sets wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.2.0"
