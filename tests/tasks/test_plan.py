"""A plan against what real runs measure: memory, steps, bytes between ranks; and what it says where something does not fit."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import assemble, config, methods, ranks
from fastkd.engine import dry, probe
from fastkd.engine.events import Events
from fastkd.engine.loop import Settings
from fastkd.engine.loop import run as walk_run
from fastkd.errors import ConfigError
from fastkd.memory import place
from fastkd.tasks import plan as planning
from fastkd.tasks.plan import free, plan
from tests import small


def resolved(recipe, **method):
    return config.resolve(recipe, {"method": method, "device": "cpu"})


SHORT = {"epochs": 2, "warmup": 1, "kd_steps": 2, "kd_batch": 256, "batch": 64, "g_steps": 2}
MUSE = {**SHORT, "g_loops": 1, "gwp_loops": 2}
GAME = {"epochs": 1, "iterations": 2, "s_steps": 2, "batch": 256}


OTHERS = ("nayer", "cmi", "dafl", "deepinversion", "dfq", "lra", "mad", "mb", "ssd", "zskt", "noise", "vanilla_kd", "cde")


def short(name):
    """Those of some short settings that a method has."""
    known = {f.name for f in dataclasses.fields(methods.method_class(name))}
    return {k: v for k, v in {**MUSE, **({} if "kd_batch" in known else GAME), "n_images": 512}.items() if k in known}


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        *[("muse-digits", MUSE), ("fast-digits", SHORT), ("dfad-digits", GAME), ("pre-digits", {**GAME, "vae_steps": 1})],
        *[pytest.param(f"{name}-digits", None, marks=pytest.mark.slow, id=name) for name in OTHERS],
    ],
)
def test_memory_is_within_a_tenth_of_what_a_real_run_measures(recipe, method, tmp_path):
    method = method or short(recipe.removesuffix("-digits"))
    planned = plan(resolved(recipe, **method))
    gc.collect()  # what is freed in the block lowers what it measures
    with probe.Peak(torch.device("cpu")) as measured:  # all that is allocated, from the first network on
        job = assemble.make_job(resolved(recipe, **method))
        outcome = assemble.execute(job, tmp_path / "run", resume="no", listeners=[])
    assert outcome.code == 0
    assert planned["memory"]["rank"] == pytest.approx(measured.bytes, rel=0.1)
    assert planned["total"] == outcome.summary["steps"]


SHARED = {"memory": {"images": "sharded"}, "device": "cpu"}


def freed_here(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that returns when gloo's thread has let its tensors go: what that thread frees, the profiler of this one never sees."""

    def call(*args: Any, **more: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        before = [t._use_count() for t in tensors]
        done, ends = collective(*args, **more), time.monotonic() + 10
        while any(t._use_count() > n for t, n in zip(tensors, before, strict=True)) and time.monotonic() < ends:
            time.sleep(0)
        return done

    return call


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("all_reduce", "all_gather"):
        setattr(dist, name, freed_here(getattr(dist, name)))
    with probe.Peak(torch.device("cpu")) as measured:
        job = assemble.make_job(config.resolve("fast-digits", {**SHARED, "method": SHORT}))
        assert assemble.execute(job, Path(folder) / "run", resume="no", listeners=[]).code == 0
    Path(folder, f"rank-{rank}").write_text(str(measured.bytes))
    small.end_of_rank()


def test_memory_of_a_rank_of_two_is_within_a_tenth_of_what_real_ranks_measure(tmp_path):
    planned = plan(config.resolve("fast-digits", {**SHARED, "method": SHORT}), 2)
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    measured = [int((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert planned["memory"]["rank"] == pytest.approx(max(measured), rel=0.1)


def test_hours_are_those_of_its_steps_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan(resolved("muse-digits", **MUSE))
    assert not list(tmp_path.iterdir())
    steps = planned["steps"]
    assert all(s["seconds"] > 0 and s["peak"] >= 0 for s in steps) and {"learn", "invert", "remember"} <= {s["step"] for s in steps}
    alone = sum(s["times"] * s["seconds"] for s in steps)
    assert planned["hours"] * 3600 == pytest.approx(alone + 2 * planned["evaluation"]["seconds"])
    assert planned["wire"] == 0 and planned["fits"] is True and planned["memory"]["machine"] == planned["memory"]["rank"]


def test_hours_are_near_those_of_a_run():
    method = {"epochs": 2, "kd_steps": 40, "kd_batch": 128, "n_images": 512}
    planned = plan(resolved("noise-digits", **method))
    job = assemble.make_job(resolved("noise-digits", **method))
    outcome = assemble.execute(job, None, resume="no", listeners=[])
    assert sum(outcome.summary["seconds"].values()) == pytest.approx(3600 * planned["hours"], rel=0.8)  # other work may share the cores


def test_ranks_share_the_rows_and_count_what_they_send():
    one, four = (plan(resolved("muse-digits", **MUSE), world) for world in (1, 4))
    assert four["memory"]["machine"] == 4 * four["memory"]["rank"]
    whole, learn = (next(s for s in planned["steps"] if s["step"] == "learn") for planned in (one, four))
    assert learn["peak"] < 0.5 * whole["peak"]
    job = assemble.make_job(resolved("muse-digits", **MUSE))
    weights = 4 * sum(p.numel() for p in job.given.student.parameters())
    head = 4 * (job.given.student.feature_dim + 1) * job.given.embeddings.shape[1]
    sent = learn["wire"] / (2 * 3 / 4)
    assert weights + head < sent < 1.1 * (weights + head)  # gradients, and the statistics of BatchNorm in both directions
    assert four["wire"] == sum(s["times"] * s["wire"] for s in four["steps"])


def test_a_ring_sends_all_but_its_own_piece_twice_for_a_sum_and_once_for_a_gathering():
    with dry.pretended(4), dry.Wire(4) as wire:
        torch.distributed.all_reduce(torch.zeros(100))
        assert wire.take() == 2 * 3 * 400 // 4
        torch.distributed.all_gather([torch.zeros(10) for _ in range(4)], torch.zeros(10))
        assert wire.take() == 3 * 40 and wire.take() == 0
        ranks.swap(torch.zeros(8, 25, dtype=torch.uint8))[1].wait()  # rows of sharded images
        assert wire.take() == 3 * 200 // 4


def test_what_is_held_alone_may_be_too_much(monkeypatch):
    monkeypatch.setattr(planning, "free", lambda device: 10**6)
    monkeypatch.setattr(probe, "probe", lambda *a, **k: pytest.fail("nothing real is made where it cannot fit"))
    planned = plan(resolved("muse-digits", **MUSE))
    assert planned["fits"] is False and planned["hours"] is None and "held for the whole run alone" in planned["why"]


def test_activations_may_be_too_much(monkeypatch):
    held = plan(resolved("muse-digits", **MUSE), probed=False)["memory"]["held"]
    monkeypatch.setattr(planning, "free", lambda device: held + 1_000_000)
    planned = plan(resolved("muse-digits", **MUSE))
    assert planned["fits"] is False and planned["why"].startswith("more than 90%") and planned["hours"] > 0


def test_a_step_that_runs_out_of_memory_does_not_fit(monkeypatch):
    def short(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    monkeypatch.setattr(probe, "probe", short)
    planned = plan(resolved("muse-digits", **MUSE))
    assert planned["fits"] is False and planned["why"].endswith("CUDA out of memory. Tried to allocate 9 GiB")


def test_without_the_probe_it_is_not_known():
    planned = plan(resolved("muse-digits", **MUSE), probed=False)
    assert planned["fits"] is None and planned["hours"] is None and "seconds" not in planned["steps"][0]


def test_a_teacher_without_weights_stands_for_one_of_its_size():
    at = lambda images: plan(config.resolve("muse-imagenet-112", {"device": "cpu", "memory": {"images": images}}), 8, probed=False)  # noqa: E731
    planned, sharded = at("replicated"), at("sharded")
    assert any("the teacher is random" in n for n in planned["notes"])
    assert {s["args"] for s in planned["steps"] if s["step"] == "invert"} == {"112, False", "112, True"}
    pool = 512_000 * 3 * 112 * 112
    assert planned["bytes"]["at"] > pool and planned["total"] > 180_000
    assert pool / 8 < sharded["bytes"]["at"] < pool / 7  # the eight ranks share it
    with pytest.raises(ConfigError, match="the teacher has no weights"):  # it is not known how large it is
        plan(config.resolve(None, {"teacher": {"spec": "resnet20"}, "student": {"spec": "resnet8"}}))


def test_free_memory_is_a_number():
    assert free(torch.device("cpu")) > 10**8


def test_a_peak_counts_what_was_freed_meanwhile():
    with probe.Peak(torch.device("cpu")) as peak:
        a = torch.zeros(250_000)
        del a
        b = torch.zeros(500_000)
    assert peak.bytes == 2_000_000 == b.numel() * 4


@pytest.mark.parametrize("variant", [v for v in small.VARIANTS if not v[1]], ids=small.ident)
def test_every_method_can_be_probed(variant):
    method = small.small(*variant)
    found = probe.probe(method, small.given_to(method), Settings())
    assert all(row["seconds"] > 0 for row in found["steps"]) and found["guards"] > 0 and not found["said"]
    assert walk_run(small.prepared(*variant), Settings(max_steps=2), Events(None), None) == 75


def test_a_run_is_planned_for_the_gpu_that_it_would_use_and_its_host_memory_is_counted_apart(monkeypatch):
    monkeypatch.setattr(place, "host_memory", lambda: 300 * 10**9)
    monkeypatch.setattr(planning, "host_memory", lambda: 300 * 10**9)
    constants = {"classes": 1000, "input_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

    def at(world, gpu, **more):
        asked = config.resolve("fast-imagenet-r50-r18", {"data": "none", "teacher": constants, **more})
        return plan(asked, world, probed=False, device_memory=gpu)

    pool = at(1, 320 << 30)["bytes"]["pool"]
    assert pool > 81e9  # 540,000 images of 224²
    alone = at(1, 80 << 30)
    assert alone["host"]["pool"] > 81e9 and alone["host"]["pool"] + alone["bytes"]["pool"] == pool and alone["bytes"]["pool"] < 1e8
    assert (alone["device"], alone["precision"], alone["fits"]) == ("cuda", "bf16", None)
    assert alone["memory"]["available"] == 80 << 30 and alone["memory"]["held"] == sum(alone["bytes"].values()) < 1e9
    assert alone["memory"]["host"]["machine"] == alone["host"]["pool"] and "in host memory" in " ".join(alone["notes"])
    two = at(2, 100 << 30)
    assert not two["host"] and two["bytes"]["pool"] == pytest.approx(pool / 2, rel=1e-3)
    assert "sharded over 2 ranks" in " ".join(two["notes"])
    four = at(4, 20 << 30, memory={"images": "replicated", "tier": "host"})
    assert four["memory"]["host"]["machine"] == 4 * four["host"]["pool"] and four["fits"] is False
    on_cpu = at(1, None, device="cpu", memory={"tier": "host"})
    assert not on_cpu["host"] and on_cpu["bytes"]["pool"] == pool and "host" not in on_cpu["memory"] and on_cpu["precision"] == "fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are here")
def test_which_device_a_run_would_use():
    for name, world in (("auto", 1), ("cpu", 1), ("cpu", 8)):
        assert (assemble.target(name, world).name, assemble.target(name, world).on_gpu) == ("cpu", False)
    several, stated, named = assemble.target("auto", 8), assemble.target("auto", 1, 24 << 30), assemble.target("cuda:1")
    found = [(t.name, t.memory >> 30, t.here) for t in (several, stated, named)]
    assert found == [("cuda", 80, None), ("cuda", 24, None), ("cuda:1", 80, None)]
    assert "80 GiB is assumed" in named.said[0] and not stated.said
    # Eight ranks share the host's memory, also where nothing of them is running.
    assert several.places("auto", "auto").host_bytes == assemble.target("cuda").places("auto", "auto").host_bytes // 8
    with pytest.raises(ConfigError, match="--device-memory is that of a GPU"):
        assemble.target("cpu", 1, 24 << 30)


def test_steps_are_tried_on_the_cpu_for_a_gpu_that_is_elsewhere(monkeypatch):
    given = {"method": MUSE, "precision": "fp32"}
    here = plan(config.resolve("muse-digits", {**given, "device": "cpu"}))
    there = plan(config.resolve("muse-digits", {**given, "device": "cuda:7"}), device_memory=10 << 30)
    assert (there["device"], there["measured_on"], here["measured_on"]) == ("cuda:7", "cpu", "cpu")
    assert there["memory"]["activations"] == pytest.approx(here["memory"]["activations"], rel=0.05) and there["fits"] is True
    assert there["memory"]["host"]["checkpoint"] == there["checkpoint"]["peak"] > 0
    small = plan(config.resolve("muse-digits", {**given, "device": "cuda:7"}), device_memory=there["memory"]["held"] + 1_000_000)
    assert small["fits"] is False and small["hours"] > 0
    monkeypatch.setattr(planning, "free", lambda device: 10**6)
    monkeypatch.setattr(probe, "probe", lambda *a, **k: pytest.fail("this machine is too small for what the GPU can hold"))
    unknown = plan(config.resolve("muse-digits", {**given, "device": "cuda:7"}), device_memory=10 << 30)
    assert unknown["fits"] is None and "no step can be tried here" in unknown["why"]
