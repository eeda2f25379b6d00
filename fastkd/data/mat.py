"""MATLAB files of version 5, through scipy where it is installed: numbers and structures, nothing in them is executed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fastkd.errors import InputError

_LARGEST = 1 << 32


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The variables `names` of a .mat file.

    Raises:
      InputError: scipy is not installed; the file is missing, damaged or of version 7.3 (HDF5), lacks a variable, or claims more than
        4 GiB for one.
    """
    try:
        io = importlib.import_module("scipy.io")
    except ImportError:
        raise InputError(f"'{path}' is a MATLAB file, which needs scipy to be read; install fastkd[mat].") from None
    if not path.is_file():
        raise InputError(f"'{path}' is no file; expected a MATLAB file with {', '.join(names)}.")
    try:
        shapes = {name: shape for name, shape, _ in io.whosmat(path)}
        missing = [name for name in names if name not in shapes]
        if missing:
            found = ", ".join(sorted(shapes)) or "nothing"
            raise InputError(f"'{path}' has no {', '.join(missing)} (found {found}); it is truncated, or another file.")
        for name in names:
            count = 1
            for side in shapes[name]:
                count *= side
            if not 0 < count <= _LARGEST:
                claim = " x ".join(map(str, shapes[name]))
                raise InputError(f"'{path}': {name} claims {claim} values; expected 1 to {_LARGEST}.")
        return dict(io.loadmat(path, variable_names=list(names), squeeze_me=True))
    except InputError:
        raise
    except Exception as error:  # whatever the reader says of a file that is damaged, the file is the reason
        said = "version 7.3 (HDF5)" if isinstance(error, NotImplementedError) else "truncated, damaged, or no MATLAB file of version 5"
        raise InputError(f"'{path}' cannot be read ({type(error).__name__}): {said}.") from None
