"""The paper's findings at small size, from scratch: python -m tidar.benchmarks.paper --output FOLDER"""
