"""Benches: `fastkd bench`, or `python -m benches --out DIR [--only NAME] [--quick] [--swap]`. Installed as `fastkd.benches`.

`suite` runs them, `targets` says what they are held to, `verdicts` compares, `render` writes docs/performance.md, `gpu` is `make gpu`
(and `warm` what it compiles ahead).
Of the methods: `methods`, `pretrained`, `imagenet`, `ablations`, `phases`; `render_methods` writes docs/methods.md.
"""

BENCHES = ("bn_match", "upsample", "generator", "engine", "replay", "cam", "step")
"""The benches in the order in which they run: where time is short, the most telling come first."""
