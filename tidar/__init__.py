"""Native-PyTorch training of TiDAR language models (arXiv 2511.08923)."""

__version__ = "0.1.0"
