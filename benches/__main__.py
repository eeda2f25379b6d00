"""`python -m benches --out DIR`: the benches with nothing but torch and numpy; `fastkd bench` takes the same options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastkd.errors import FastkdError

from . import BENCHES


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from .suite import Request, run

    fields = vars(options) | {"only": tuple(options.only), "threads": tuple(options.threads) or None, "without": tuple(options.without)}
    try:
        return run(Request(**fields)).code
    except FastkdError as error:
        print(f"benches: {error}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches", description="Times of the ops, of a generator step and of the methods' steps.")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for one JSON a bench")
    made.add_argument("--only", choices=BENCHES, action="append", default=[], help="this bench only; may be given again")
    made.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: shows that everything runs, its times mean nothing")
    made.add_argument("--swap", action="store_true", help="the providers in reverse order")
    made.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    made.add_argument("--threads", type=int, metavar="N", action="append", default=[],
                      help="torch threads of a CPU run; may be given again; default: 1, and all cores")  # fmt: skip
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile rows; default: yes, but for --quick")
    made.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, times inside CUDA graphs too")
    made.add_argument("--without", choices=("cuda", "triton", "cpp"), action="append", default=[], help="leave this backend out")
    made.add_argument("--seconds", type=float, metavar="S", help="budget: what does not fit is skipped, and its row says so")
    made.add_argument("--baseline", type=Path, metavar="FILE", help="older record, or folder of them; exit 8 where ours became slower")
    return made


if __name__ == "__main__":
    sys.exit(main())
