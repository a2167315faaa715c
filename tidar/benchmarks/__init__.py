"""Measurements that anyone can run: python -m tidar.benchmarks.<name>"""
