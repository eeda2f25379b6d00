"""Small runs of any registered method: a tiny teacher and student, a few steps an epoch, seconds on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastkd import methods, models
from fastkd.data import ImageSet
from fastkd.data.image_set import IGNORE
from fastkd.engine import launch, loop
from fastkd.engine.events import Events
from fastkd.log import Log
from fastkd.method import Augment, Given, Method
from fastkd.nn import Student, instrument
from fastkd.rng import Rng

FIELDS: dict[str, Any] = {
    **{"epochs": 3, "warmup": 1, "batch": 12, "kd_batch": 8, "kd_steps": 3, "g_steps": 2, "g_loops": 1, "gwp_loops": 2, "g_life": 2},
    **{"iterations": 2, "s_steps": 2, "milestones": (1,)},
    **{"hidden": 16, "nz": 8, "loops": 1, "n_images": 24, "reset_l0_at": 2, "lr": 0.05, "lr_g": 1e-3},
    **{"vae_steps": 1, "replay_batch": 4, "bank_batch": 4, "bank_slots": 2, "push_period": 1, "lr_inner": 0.1},
    **{"capacity": 20},  # of SSD-KD's buffer: a batch and a half
    **{"init_images": 12, "bank_rows": 30, "bank_draw": 20, "head_width": 6, "adi_period": 1, "spc": 3},
}
"""Values for whichever of these fields a method has."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in methods.METHODS],
    ("muse", {"resolutions": (8, 16), "cam_at": "below", "res_schedule": "remaining"}),
    (
        "muse",
        {"cam_layer": "pre_last_stage", "cam_norm": "relu_max", "cam_compare": "image", "head": "detached", "kd_resolution": "nominal"},
    ),
    ("muse", {"resolutions": (8, 16), "generators": "shared", "kd_pool_choice": "pixels", "aed_cap": 1.0, "pool_quant": "none"}),
    ("nayer", {"batch": 2}),
    ("nayer", {"redraw_noise": False}),
    (
        "fast",
        {"meta": "reptile", "reptile": 1.0, "generator_name": "g_deep", "meta_latent": True, "redraw_every": 2, "loops": 2, "epochs": 2},
    ),
    ("fast", {"meta": "none", "pool_select": "last"}),
    (
        "ssd",
        {
            **{"evict": "phi", "phi_grad": True, "phi_n": "capacity", "beta_schedule": "linear"},
            **{"delta_view": "plain", "delta_refresh": "epoch"},
        },
    ),
    (
        "ssd",
        {
            **{"replace": "top", "adv_mask": "none", "task_label": "teacher", "w_in_delta": "current", "w_norm": "none"},
            **{"rounds": 3, "epochs": 2},
        },
    ),
    ("ssd", {"sampler": "shuffle", "evict": "fifo", "insert_priority": "max", "w_in_delta": "off", "phi_difficulty": False}),
    ("ssd", {"sampler": "uniform", "evict": "lowest", "w_in_loss": False, "phi_diversity": False, "loops": 2, "capacity": 40}),
    ("dafl", {"variant": "zju", "aug": "crop_flip", "generator_name": "g_large", "gen_mode_in_kd": "eval"}),
    ("dafl", {"optimiser": "adam", "entropy_log": "ln", "bn_eps": 1e-5, "a": 0.0}),
    ("dfq", {"variant": "original", "alpha_schedule": "linear", "cosine_in_warmup": True}),
    ("dfad", {"variant": "zju", "student_mode_in_g": "train"}),
    ("dfad", {"dense": True, "adv_form": "log_l1", "sched_step": "before", "generator_name": "g_dfad_b"}),
    ("zskt", {"variant": "zju"}),
    ("zskt", {"s_batch": "fresh", "kl_reduction": "batchmean", "at_form": "norms", "schedule": "steps", "g_steps": 2}),
    # With the published generator, or Adam for the student, these two magnify rounding on one rank as well: 2e-16 becomes 2e-8 and 2e-9.
    ("zskt", {"s_batch": "before_g", "beta": 0.0, "student_mode_in_g": "eval", "grad_clip": 0.0, "generator_name": "g_fast"}),
    ("mad", {"conditional": True, "norm": 0.1, "mix": "full", "ema_buffers": "copy", "optimiser": "sgd"}),
    ("mad", {"z_shared": True, "ema_update": 2, "g_steps": 2, "beta": 10.0}),
    ("fast", {"rounds": 3, "epochs": 2, "g_steps": 1}),
    ("cmi", {"feature_tap": "stage_inputs", "bank_dtype": "fp32", "rounds": 3, "preinverted": True}),
    ("cmi", {"cr": 0.0, "adv": 0.0, "pool_select": "last"}),
    ("deepinversion", {"tv1": 1e-3, "l2": 1e-3, "pool_select": "best", "clip": False}),
    (
        "deepinversion",
        {
            **{"variant": "official", "half_steps": 1, "lr_schedule": "cosine", "lr_warmup": 1, "labels": "balanced", "flip": True},
            **{"first_bn": 10.0, "bn_student_sub": 1e-3, "tv2": 1e-4, "l2": 1e-5, "l2_norm": "image", "jsd": "textbook"},
        },
    ),
    ("vanilla_kd", {"alpha": 0.5, "beta": 0.1, "attention": 10.0, "budget": "released"}),
    ("vanilla_kd", {"cache_logits": True, "kd_aug": "none"}),
    ("noise", {"dense": True, "kind": "uniform", "loss": "l1"}),
    ("pre", {"leak_latent_grad": False, "feat_recon": True, "replay_dtype": "bf16", "jsd": "textbook"}),
    ("pre", {"latent_sharing": True, "student_mode_in_g": "eval", "generator_name": "g_dafl"}),
    ("mb", {"match": "prior+bn", "bn_form": "gauss_kl", "read": "images", "epochs": 2}),
    ("mb", {"bank_slots": 0}),
    ("lra", {"replay": "vae", "bn_in_inner": "keep", "feat_recon": True}),
    ("lra", {"order": "first", "match": "prior+bn"}),
    ("lra", {"meta_grad_to_theta": False}),
    ("cde", {"host": "cmi", "cond": "acgan", "disc_aug": "strong", "kd_mix": "union", "epochs": 2}),
    ("cde", {"host": "pre", "cond": "none", "feat_recon": True}),
    ("cde", {"host": "pre", "disc_aug": "strong", "vae_steps": 0, "replay_batch": 0}),
    ("cde", {"lambda_fa": 0.0}),
    ("fast", {"dense": True, "segmentation": "generator_name", "adv_start": 1}),
    ("ssd", {"dense": True, "segmentation": "generator_name", "delta_refresh": "epoch"}),
    ("vanilla_kd", {"dense": True, "beta": 0.1, "loss": "l1"}),
]
"""Every method, and the switches that change its steps. dense: with networks that answer for each pixel, see `given`."""


def ident(variant: tuple[str, dict[str, Any]]) -> str:
    """A readable test id."""
    return "-".join([variant[0], *(f"{k}={v}" for k, v in variant[1].items())]).replace(" ", "")


def small(name: str, over: dict[str, Any] | None = None) -> Method:
    """A method with small settings."""
    cls = methods.method_class(name, over)
    known = {f.name for f in dataclasses.fields(cls)}
    asked = {k: v for k, v in (over or {}).items() if k != "dense"}
    return cls(**{k: v for k, v in {**FIELDS, **asked}.items() if k in known or k in asked})


def network(dense: bool, spec: str, classes: int, channels: int, size: int) -> nn.Module:
    """A network of `models`, or, of that width, three convolutions that answer for each pixel."""
    if not dense:
        return models.build(spec, classes=classes, channels=channels, input_size=size)
    width = {"resnet8": 8, "wrn10_1": 6}[spec]
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1))


def given(seed: int = 0, *, classes: int = 4, size: int = 16, channels: int = 1, device: str = "cpu", dense: bool = False) -> Given:
    """A random teacher whose running statistics are those of some random images, and a smaller student of another family.

    dense: both answer for each pixel, and the real images have labels of pixels.
    """
    torch.manual_seed(7)
    net = network(dense, "resnet8", classes, channels, size)
    net.train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(16, channels, size, size))
    shape = (channels, size, size)
    embeddings = torch.randn(classes, 6) * 4
    student = Student(network(dense, "wrn10_1", classes, channels, size), shape=shape)
    return Given(
        teacher=instrument(net.to(device), shape=shape),
        student=student.to(device),
        shape=shape,
        classes=classes,
        mean=torch.full((channels,), 0.4, device=device),
        std=torch.full((channels,), 0.3, device=device),
        seed=seed,
        rng=Rng(device),
        log=Log(device),
        device=torch.device(device),
        embeddings=embeddings.to(device),
        augmentation=Augment(True, 2),
        real=real(classes, size, channels, dense=dense),
    )


def real(classes: int = 4, size: int = 16, channels: int = 1, n: int = 28, *, dense: bool = False) -> ImageSet:
    """Random images with labels 0 … classes - 1 over and over; dense: larger ones with labels of pixels, one in nine of them ignored."""
    draws = torch.Generator().manual_seed(3)
    h, w = (size + 4, size + 8) if dense else (size, size)
    images = torch.randint(256, (n, h, w, channels), generator=draws, dtype=torch.uint8)
    if not dense:
        return ImageSet("random", "train", images, torch.arange(n) % classes)
    labels = torch.randint(classes, (n, h, w), generator=draws)
    return ImageSet("random", "train", images, torch.where(torch.rand(n, h, w, generator=draws) < 1 / 9, IGNORE, labels))


def prepared(name: str, over: dict[str, Any] | None = None, seed: int = 0, *, global_bn: bool = True, **kw: Any) -> Method:
    """A method that is built and sealed."""
    method = small(name, over)
    loop.prepare(method, given_to(method, seed, dense=bool((over or {}).get("dense")), **kw), global_bn=global_bn)
    return method


def given_to(method: Method, seed: int = 0, **kw: Any) -> Given:
    """What `given` gives, with the real images that the method chooses."""
    found = given(seed, **kw)
    if method.uses_real():
        found.real = method.choose_real(found.real, found.classes).to(found.device)
    return found


def run(method: Method, out=None, *, resume: bool = False, **settings: Any) -> int:
    """Walk all its epochs, or up to `max_steps`."""
    return loop.run(method, loop.Settings(seed=method.seed, poll=2, every_minutes=1e6, **settings), Events(out), out, resume=resume)


def end_of_rank() -> None:
    """The end of a spawned rank, at once as a run's rank ends: gloo's threads may end the interpreter's own way out with SIGABRT."""
    dist.destroy_process_group()
    launch.leave(0)
