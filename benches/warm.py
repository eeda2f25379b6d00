"""Compiles ahead what the benches will call: `python -m benches.warm PART PARTS`, one process a part.

Each part makes its share of the calls once, so that Triton and torch.compile find their work on disk when a bench runs. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time

import torch

from . import BENCHES, check, suite


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.warm", description="Fill the caches of Triton and of torch.compile.")
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    parser.add_argument("--only", choices=BENCHES, action="append", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", metavar="NAME")
    options = parser.parse_args(argv)
    began, turn, made = time.monotonic(), itertools.count(), 0
    plan = suite.plan_of(suite.Request(quick=options.quick, device=options.device))
    gate = dataclasses.replace(plan, quick=True, compile=False)
    for name in suite.wanted(options.only):
        module = suite.module_of(name)
        for own in (gate, plan) if hasattr(module, "cases") else ():
            for case in module.cases(own):
                for p in case.providers:
                    wanted = p.kind in ("ours", "compile") and p.backend != "cuda"  # the rest is compiled already
                    if p.call is not None and wanted and next(turn) % options.parts == options.part:
                        torch._dynamo.reset()
                        check.attempt(p.call, p.backend)
                        made += 1
                del case
                if plan.cuda:
                    torch.cuda.empty_cache()  # the parts share one GPU
    print(f"warm: part {options.part} of {options.parts} made {made} calls in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
