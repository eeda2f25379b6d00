"""The schema of a run, but for `method.*`, which `assemble` checks against the method's own fields; recipes and overrides.

A recipe is TOML that names only what differs from the defaults. It is data: nothing in it is evaluated.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastkd import recipes as shipped
from fastkd.errors import ConfigError, nearest, unknown
from fastkd.recipes import merge

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are not changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherConfig(Section):
    """The trained network. What its weights' metadata says is taken; what is set here wins."""

    spec: str | None = Field(None, description="NAME, timm:NAME, torchvision:NAME or py:FILE:FUNCTION")
    weights: str | None = Field(None, description="safetensors, or .pt/.pth that loads with weights_only")
    mean: tuple[float, ...] | None = Field(None, description="normalisation mean, one number a channel, for inputs in [0, 1]")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="normalisation standard deviation")
    input_size: Positive | None = Field(None, description="height and width in pixels")
    channels: Positive | None = Field(None, description="image channels")
    classes: Annotated[int, Field(ge=2)] | None = Field(None, description="number of classes")
    class_names: str | None = Field(None, description="text file with one class name a line, or JSON list")


class StudentConfig(Section):
    """The network to train."""

    spec: str | None = Field(None, description="as teacher.spec; or ckpt:RUN_DIR")
    weights: str | None = Field(None, description="weights to start from")


class EmbeddingConfig(Section):
    """Label-text embeddings of the class names (NAYER, MUSE)."""

    source: str = Field("auto", description="auto, random, minilm, or a safetensors file with one row a class")
    prompt: str = Field("a photo of {name}", description="text that is embedded for a class")
    norm: Annotated[float, Field(gt=0)] | None = Field(10.0, description="mean row norm the table is rescaled to; none: as supplied")
    seed: int = Field(0, description="of a random table")


class CheckpointConfig(Section):
    """When the state is saved. The end of a run and a stop signal always save."""

    every_minutes: Annotated[float, Field(gt=0)] = Field(10.0, description="minutes between checkpoints")
    every_steps: Positive | None = Field(None, description="steps between checkpoints, in place of minutes")
    keep: Positive = Field(2, description="newest checkpoints that are kept")


class RanksConfig(Section):
    """What stands over the global batch."""

    bn: Literal["global", "rank"] = Field(
        "global", description="BatchNorm of student and generator over the global batch, or each rank's own"
    )


class MemoryConfig(Section):
    """Where synthetic images are kept. What a run computes is the same to the bit; it may differ when a run is continued."""

    images: Literal["auto", "replicated", "sharded"] = Field(
        "auto", description="on every rank, or dealt to the ranks by row; auto: replicated while they fit, see docs/ranks.md"
    )
    tier: Literal["auto", "device", "host"] = Field(
        "auto", description="on the device, or in host memory (pinned for a GPU), brought over in time; auto: device while they fit"
    )


class OpsConfig(Section):
    """Which implementation of the fused ops runs."""

    backend: str = Field("auto", description="auto, reference, cpp, triton or cuda")


class WalkConfig(Section):
    """What everything that walks steps has: runs and tasks."""

    seed: int = Field(0, ge=0, lt=2**63, description="root seed of all draws")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] | None = Field(None, description="none: bf16 on a GPU, fp32 on a CPU")
    deterministic: bool = Field(False, description="deterministic kernels alone: the same bits on the same GPUs, more slowly")
    poll: Positive = Field(10, description="steps between looks at signals and guards")
    graphs: Literal["auto", "off"] = Field(
        "auto", description="CUDA graphs; auto: on a GPU, with one rank and all images there, a step is captured and then replayed"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()


class TaskConfig(WalkConfig):
    """What every task on real data has."""

    data: str = Field("digits", description="training and test images: NAME, NAME:DIR or DIR")
    input_size: Positive | None = Field(None, description="pixels; none: the data's own")
    mean: tuple[float, ...] | None = Field(None, description="normalisation mean; none: the field's constants of the data")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="normalisation standard deviation")


class RunConfig(WalkConfig):
    """Everything that decides a run."""

    method: dict[str, Any] = Field(default_factory=lambda: {"name": "muse"}, description="name, and the method's own fields")
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    data: str | None = Field(None, description="evaluation data: NAME, NAME:DIR, DIR or none")
    real: str | None = Field(
        None,
        description="images for cde, cmi.preinverted, vanilla_kd (none: training split of data): NAME, NAME:DIR or DIR, labelled or not",
    )
    condensed: str | None = Field(None, description="condensed set for cde: safetensors file, folder of fastkd condense, or embedded:NAME")
    embeddings: EmbeddingConfig = EmbeddingConfig()
    ranks: RanksConfig = RanksConfig()
    memory: MemoryConfig = MemoryConfig()
    ops: OpsConfig = OpsConfig()
    channels_last: bool = Field(True, description="teacher and student in the channels_last memory format")


class TeachConfig(TaskConfig):
    """Training a teacher on real data: the recipe that the literature's numbers need (SGD, cosine, weight decay 5e-4)."""

    model: str = Field("resnet20", description="network: NAME, timm:NAME, torchvision:NAME or py:FILE:FUNCTION")
    epochs: Positive = Field(200, description="passes over the training images")
    batch: Positive = Field(256, description="images a step, over all ranks")
    lr: Annotated[float, Field(gt=0)] = Field(0.1, description="peak learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum (Nesterov)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(5e-4, description="SGD weight decay")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps in which the rate rises; cosine to 0 after")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the target spread over all classes")
    aug: Literal["none", "crop", "crop_flip", "resized_crop"] = Field(
        "crop_flip", description="augmentation; sets without flips (digits, SVHN) get none; with labels of pixels none, crop or crop_flip"
    )
    input_size: Positive | None = Field(None, description="pixels, with labels of pixels those of a crop; none: the data's own")


class CondenseConfig(TaskConfig):
    """A condensed set of real data. What is none follows the paper of the method."""

    method: Literal["dm", "dc", "dsa"] = Field("dm", description="mean features (DM), gradients (DC), or gradients with augmentation (DSA)")
    ipc: Positive = Field(10, description="images a class")
    epochs: Positive = Field(20, description="parts of the run; after each the set is tested and a line is written")
    iterations: Positive | None = Field(None, description="networks an epoch; none: 1000 for dm, 50 for dc and dsa")
    batch: Positive = Field(256, description="real images of a class in a step, over all ranks")
    aug: Literal["off", "dsa"] | None = Field(
        None, description="siamese augmentation, without flips where the data have none; none: dsa, but off for dc"
    )
    init: Literal["real", "noise"] | None = Field(None, description="first images; none: real, but noise for dc")
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the images; none: 1 for dm (10 from 100 images a class), 0.1 for dc and dsa"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="of the images' SGD")
    net: Literal["convnet3", "convnet4"] | None = Field(
        None, description="network that judges and tests the images; none: convnet4 from 64 pixels, else convnet3"
    )
    lr_net: Annotated[float, Field(gt=0)] = Field(0.01, description="learning rate of networks that are trained on the set")
    chunk: Positive = Field(4096, description="real images of one pass of dm")
    eval_steps: Positive = Field(1000, description="steps of the network that tests the set")


SAFE_ON_RESUME = frozenset(
    {"checkpoint.every_minutes", "checkpoint.every_steps", "checkpoint.keep", "graphs", "poll", "memory.images", "memory.tier"}
)
"""Keys that may differ when a run is continued; everything else must be as it was."""


def recipes() -> list[str]:
    """Names of the recipes that come with fastkd: `fastkd.recipes` says where they come from, and what was published for them."""
    return shipped.names()


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by name, or a TOML file by path.

    Raises:
      ConfigError: no such recipe or file, not TOML, or it would run code (`py:`).
    """
    if not name.endswith(".toml") and "/" not in name:
        return shipped.read(name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"the recipe '{name}' is {'a directory' if path.is_dir() else 'not there'}; "
            "expected a TOML file, or the name of a recipe (`fastkd methods NAME` lists those of a method)."
        )
    if path.stat().st_size > 1 << 20:
        raise ConfigError(f"the recipe '{path}' has {path.stat().st_size >> 20} MiB; expected a TOML file below 1 MiB.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"the recipe '{path}' is not TOML: {e}") from None
    for part in ("teacher", "student"):
        spec = values.get(part, {}).get("spec") if isinstance(values.get(part), dict) else None
        if isinstance(spec, str) and spec.startswith("py:"):
            raise ConfigError(f"the recipe '{path}' names code ({part}.spec = '{spec}'); py: is taken from the command line only.")
    return values


def parse_value(text: str) -> Any:
    """The value of `--set a.b=TEXT`: TOML where it is TOML, else the text itself; `none` is None."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nested(path: str, value: Any) -> dict[str, Any]:
    """{'a': {'b': value}} of 'a.b'."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """The table that `--set a.b=c` options write.

    Raises:
      ConfigError: an item without '='.
    """
    out: dict[str, Any] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item} has no value; expected KEY=VALUE, such as --set method.epochs=20.")
        out = merge(out, nested(key.strip(), parse_value(text.strip())))
    return out


def sentence(error: dict[str, Any], model: type[BaseModel], where: str) -> str:
    """One pydantic error as one sentence: the key, what was found, what is expected, the nearest valid key."""
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        inner: type[BaseModel] = model
        for part in path[:-1]:
            inner = inner.model_fields[part].annotation  # type: ignore[assignment]
        keys = sorted(inner.model_fields)
        close = nearest(path[-1], keys)
        prefix = ".".join(path[:-1])
        said = f"; did you mean '{prefix + '.' if prefix else ''}{close}'?" if close else "."
        return f"{where}: unknown key '{key}'{said} Known{' in ' + prefix if prefix else ''}: {', '.join(keys)}."
    found = error.get("input")
    return f"{where}: {key} is {found!r}; {error['msg'][0].lower()}{error['msg'][1:]}."


def build(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """A checked configuration.

    Raises:
      ConfigError: the first thing that is wrong.
    """
    if isinstance(values.get("method"), str):
        values = {**values, "method": {"name": values["method"]}}
    try:
        return RunConfig.model_validate(values)
    except ValidationError as e:
        raise ConfigError(sentence(e.errors()[0], RunConfig, where)) from None  # type: ignore[arg-type]


def _name(method: Any) -> str | None:
    """The method's name in a `method` entry: its name alone, or a table that holds it."""
    name = method.get("name") if isinstance(method, dict) else method
    return name if isinstance(name, str) else None


def resolve(recipe: str | None, options: dict[str, Any], sets: Iterable[str] = (), *, methods: Iterable[str] = ()) -> RunConfig:
    """Recipe, then command-line options, then `--set`, each written over the one before.

    Without a recipe and without a teacher the embedded one of the method is taken: `<method>-digits`.

    Args:
      methods: names of all methods, so that one which is misspelt is told from one that has no such recipe.
    Raises:
      ConfigError: see `build`; or the recipe is of another method.
    """
    over = merge(options, parse_sets(sets))
    name = _name(over.get("method"))
    teacher = over.get("teacher", {})
    if recipe is None and isinstance(teacher, dict) and not teacher.get("spec") and not teacher.get("weights"):
        if over.get("data") not in (None, "none", "digits"):
            raise ConfigError(
                f"data '{over['data']}' needs a teacher of its own: --teacher SPEC --teacher-weights FILE (make one with `fastkd teach`); "
                "the embedded teacher knows digits only."
            )
        recipe = f"{name or 'muse'}-digits"
        if recipe not in recipes():
            known = list(methods)
            if known and name not in known:
                raise ConfigError(unknown("method", str(name), known))
            raise ConfigError(
                f"method '{name}' has no embedded example (no recipe '{recipe}'); "
                "expected --teacher SPEC --teacher-weights FILE, or --recipe NAME_OR_FILE."
            )
    values = read_recipe(recipe) if recipe else {}
    base_name = _name(values.get("method"))
    if name and base_name and name != base_name:
        raise ConfigError(f"the recipe '{recipe}' is for method '{base_name}', --method says '{name}'; leave one of them out.")
    return build(merge(values, over), f"recipe '{recipe}' and options" if recipe else "options")
