"""fastkd: data-free knowledge distillation of a trained classifier into a smaller student.

`import fastkd` loads neither torch nor the compiled part: names are resolved on first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def distil(recipe: str | None = None, out: str | None = None, **options: Any) -> Any:
    """Distil a student from Python: what `fastkd run` does.

    Args:
      recipe: name of a recipe or path of a TOML file; without one and without a teacher, the embedded digits.
      out: a new folder for the run, or None to write nothing.
      options: configuration by section, e.g. method={"name": "fast", "epochs": 40}, teacher={"spec": …, "weights": …}, seed=1.
    Returns:
      `assemble.Outcome`: exit code, folder and summary.
    Raises:
      fastkd.errors.FastkdError: a mistake in the options, in one sentence.
    """
    from pathlib import Path

    from fastkd import assemble, config, methods

    return assemble.distil(config.resolve(recipe, options, methods=methods.names()), Path(out) if out else None)
