"""`fastkd run`: distil."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkd.cli import several
from fastkd.cli.common import Duration, data_word, emit, out_folder, say, stored, table, verb
from fastkd.cli.options import run_folder_options, taking
from fastkd.cli.run_options import KEYS, OPTIONS, check_given
from fastkd.engine import launch
from fastkd.errors import STOPPED, ConfigError, FastkdError

if TYPE_CHECKING:
    from fastkd.config import RunConfig

CONTINUE = "continue from the last checkpoint with"


@verb("run")
@taking([*OPTIONS, *run_folder_options("METHOD-DATA")])
@click.option("--launcher", type=click.Choice(launch.LAUNCHERS), default="auto", help="auto: join torchrun's ranks; slurm: srun's.")
@click.option("--max-restarts", type=click.IntRange(0), default=3, metavar="N", help="Restarts of all ranks after a crash (--gpus).")
@click.option("--time-limit", type=Duration(), metavar="TIME", help="Stop with a checkpoint after 90s, 45m, 3h50m, 1d.")
@click.option("--dry-run", is_flag=True, help="Check what a run checks (with --gpus but the GPUs), print steps and memory, run nothing.")
def command(
    recipe: str | None, sets: tuple[str, ...], out: Path | None, resume: str, dry_run: bool, as_json: bool,
    gpus: int | None, launcher: str, max_restarts: int, time_limit: float | None, **options: Any,
) -> int:  # fmt: skip
    """Distil a teacher into a student without the teacher's training data.

    With no options the embedded digits teacher is distilled by MUSE. Your own teacher:

    \b
      fastkd run --teacher resnet56 --teacher-weights teacher.safetensors --student resnet20 --data cifar10:DIR

    Exit code 75: stopped with a checkpoint, run it again with --resume.
    """
    if resume != "no" and out is None:
        raise ConfigError("--resume does not say which run; expected --out DIR with the folder of the run to continue.")
    config = configuration(recipe, table(KEYS, options), sets, out if resume != "no" else None, resume)
    rank = launch.is_rank(launcher)
    if out is None and rank:
        raise ConfigError("several ranks need one folder that all of them see; expected --out DIR.")
    if out is None:
        out = out_folder(f"{config.method.get('name', 'muse')}-{data_word(config.data)}")
    if dry_run:
        return show_dry_run(config, gpus or 1, out, resume, as_json)
    if rank:
        if gpus and os.environ.get("RANK") == "0" and os.environ.get("LOCAL_WORLD_SIZE") != str(gpus):
            here = f"{os.environ['LOCAL_WORLD_SIZE']} ranks" if "LOCAL_WORLD_SIZE" in os.environ else "this rank"
            say(f"--gpus {gpus} starts nothing: a launcher has started {here} on this machine already")
        left = launch.time_left(time_limit)
        return several.one_of_them(config, out, lambda: distil(config, out, resume_of_rank(resume), as_json, left))
    if gpus and gpus > 1:
        words = [*again_words(recipe, sets, options), *(["--time-limit", f"{time_limit:f}s"] if time_limit is not None else [])]
        code = several.launched(config, gpus, words, out, resume, max_restarts, as_json)
        if code == STOPPED:
            say_how_to_continue(config, out, gpus)
        elif code not in (0, 2, 4) and saved(out):
            say(f"{CONTINUE}: {again(config, out, gpus)}")
        return code
    return distil(config, out, resume, as_json, time_limit)


def resume_of_rank(resume: str) -> str:
    """A new run whose ranks are started again goes on where the last checkpoint is."""
    return "auto" if resume == "no" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else resume


def again_words(recipe: str | None, sets: tuple[str, ...], options: dict[str, Any]) -> list[str]:
    """The options that decide a run, as the words of a command line."""
    words = ["--recipe", recipe] if recipe else []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None:
            words += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return words + [word for key in sets for word in ("--set", key)]


def configuration(recipe: str | None, options: dict[str, Any], sets: tuple[str, ...], continued: Path | None, resume: str) -> RunConfig:
    """The configuration of a new run, or that of the folder `continued` with what was given written over it."""
    from fastkd import config, methods

    check_given(recipe, options, sets)
    if continued is None or (resume == "auto" and not (continued / "config.json").is_file()):
        return config.resolve(recipe, options, sets, methods=methods.names())
    values = stored(continued, None)
    config.build(values, f"'{continued / 'config.json'}'")
    given = config.merge(options, config.parse_sets(sets))
    for part in ("teacher", "student"):
        spec = (values.get(part) or {}).get("spec")
        if isinstance(spec, str) and spec.startswith("py:") and spec != (given.get(part) or {}).get("spec"):
            raise ConfigError(f"the run in '{continued}' used code ({spec}); code runs only when it is typed: add --{part} {spec}.")
    over = config.merge(config.read_recipe(recipe), given) if recipe else given
    if isinstance(over.get("method"), str):
        over = {**over, "method": {"name": over["method"]}}
    name, was = over.get("method", {}).get("name"), values.get("method", {}).get("name")
    if name is not None and name != was:
        raise ConfigError(f"the run in '{continued}' is of method '{was}', not '{name}'; choose another --out for a new run.")
    return config.build(config.merge(values, over), f"'{continued / 'config.json'}' and options")


def again(config: RunConfig, out: Path, gpus: int = 1) -> str:
    """The exact command that continues a run."""
    words = ["fastkd", "run", "--resume", "--out", str(out), *(["--gpus", str(gpus)] if gpus > 1 else [])]
    for part, spec in (("--teacher", config.teacher.spec), ("--student", config.student.spec)):
        if spec and spec.startswith("py:"):
            words += [part, spec]
    return shlex.join(words)


def distil(config: RunConfig, out: Path, resume: str, as_json: bool, time_limit: float | None = None) -> int:
    """Run, show it, say how it ended and how to go on."""
    from fastkd import assemble, ranks
    from fastkd.cli import summary, terminal

    with terminal.listener(out) as show:
        try:
            outcome = assemble.distil(config, out, resume=resume, listeners=[show], time_limit=time_limit)
        except BaseException as e:
            tell_how_to_continue(e, again(config, out), out)
            raise
    if ranks.rank():
        return outcome.code  # rank 0 speaks
    if as_json:
        emit({"code": outcome.code, "out": str(out), **outcome.summary})
    else:
        summary.show(outcome.summary, out, outcome.code)
    if outcome.code == STOPPED:
        say_how_to_continue(config, out)
    return outcome.code


def say_how_to_continue(config: RunConfig, out: Path, gpus: int = 1) -> None:
    say(f"stopped with a checkpoint; continue with: {again(config, out, gpus)}")


def tell_how_to_continue(e: BaseException, how: str, out: Path) -> None:
    """Add the command that continues the run to an error, where there is a checkpoint and the command line was not at fault."""
    if saved(out) and not (isinstance(e, FastkdError) and e.exit_code in (2, 4)):
        e.add_note(f"{CONTINUE}: {how}")


def saved(out: Path) -> bool:
    """Whether the folder holds a checkpoint."""
    try:
        return any((out / "checkpoints").glob("step-*"))
    except OSError:
        return False


def show_dry_run(config: RunConfig, gpus: int, out: Path, resume: str, as_json: bool) -> int:
    """What a run would do, without doing any of it; `fastkd plan` also measures. With several ranks the GPUs may be elsewhere."""
    from fastkd import assemble
    from fastkd.cli import summary

    if gpus == 1:
        assemble.resolve_device(config.device)
    planned = assemble.dry_run(config, gpus, out, resume=resume)
    if as_json:
        emit(planned)
    else:
        summary.show_plan(planned)
    return 0
