"""Benches: `python -m benches --out DIR [--only NAME] [--quick] [--swap]`, installed as `fastkd.benches`. See `__main__`."""
