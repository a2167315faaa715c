"""The paper's findings at small size: python -m tidar.benchmarks.paper --output FOLDER"""
