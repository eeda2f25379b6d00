"""From configuration to networks, data and method: what is taken, what is said, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import assemble, config, models
from fastkd.assemble import device
from fastkd.assemble.job import make_method
from fastkd.assemble.networks import load_network, read_names, weights_path
from fastkd.config import TeacherConfig
from fastkd.engine import determinism, events
from fastkd.engine.guards import Guards
from fastkd.errors import ConfigError, InputError, PlaceError
from fastkd.method import Method

TINY = {"epochs": 2, "warmup": 1, "batch": 20, "g_steps": 1, "g_loops": 1, "gwp_loops": 1, "kd_steps": 2, "kd_batch": 16, "hidden": 16}


def tiny(**over):
    return config.resolve(None, {"method": {**TINY}, **over})


@pytest.fixture
def weights(tmp_path):
    """A small network's weights, with and without metadata."""
    torch.manual_seed(0)
    net = models.build("resnet8", classes=10, channels=1, input_size=8)
    bare, full = tmp_path / "bare.safetensors", tmp_path / "full.safetensors"
    models.save_weights(bare, net.state_dict())
    models.save_weights(full, net.state_dict(), assemble.metadata("resnet8", 10, (1, 8, 8), (0.3,), (0.4,), None, data="digits"))
    return bare, full


def test_the_embedded_teacher_reaches_99_percent():
    found = assemble.evaluate(TeacherConfig(weights="embedded:digits-resnet20"), "digits", device="cpu")
    assert found["top1"] >= 0.99 and found["images"] == 500 and found["parameters"] == 269434
    assert weights_path("embedded:digits-resnet20").stat().st_size < 1 << 20


def test_the_embedded_teachers_recipe_is_the_one_in_its_metadata():
    from fastkd.tasks.embedded import RECIPE

    said = models.load_weights(weights_path("embedded:digits-resnet20")).metadata
    assert config.TeachConfig.model_validate_json(said["recipe"]) == RECIPE and "CC BY 4.0" in said["origin"]


def test_a_run_writes_its_folder(tmp_path):
    out = tmp_path / "run"
    kinds: list[str] = []
    outcome = assemble.distil(tiny(), out, listeners=[lambda e: kinds.append(e["kind"])])
    assert outcome.code == 0 and kinds[0] == "start" and kinds[-1] == "done" and kinds.count("epoch") == 2
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "environment.json",
        "events.jsonl",
        "heartbeats",
        "status.json",
        "checkpoints",
        "student.safetensors",
    }
    resolved = json.loads((out / "config.json").read_text())
    assert resolved["method"]["tau"] == 20.0 and resolved["precision"] == "fp32" and resolved["method"]["name"] == "muse"
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    saved = models.load_weights(out / "student.safetensors")
    assert saved.metadata["architecture"] == "wrn10_1" and float(saved.metadata["accuracy"]) == pytest.approx(
        outcome.summary["student"]["top1"]
    )
    assert assemble.evaluate(TeacherConfig(weights=str(out)), "digits")["top1"] == pytest.approx(outcome.summary["student"]["top1"])
    best = models.load_weights(out / "checkpoints" / "best" / "student.safetensors")
    assert best.metadata["note"] == "selected on test data"


def test_the_last_student_counts(tmp_path):
    outcome = assemble.distil(tiny(), tmp_path / "run")
    epochs = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    epochs = [e for e in epochs if e["kind"] == "epoch"]
    assert outcome.summary["student"]["top1"] == epochs[-1]["top1"] and outcome.summary["student"]["best"] >= epochs[-1]["top1"]


def test_a_run_without_data_reports_agreement(tmp_path):
    summary = assemble.distil(tiny(data="none"), None).summary
    assert summary["student"]["top1"] is None and {"agreement", "confidence", "balance"} <= summary.keys()


def test_resume_rules(tmp_path):
    from fastkd.errors import CheckpointError

    with pytest.raises(CheckpointError, match="nothing to resume"):
        assemble.distil(tiny(), tmp_path / "new", resume="must")
    assert assemble.distil(tiny(), tmp_path / "new", resume="auto").code == 0
    with pytest.raises(ConfigError, match="not empty"):
        assemble.distil(tiny(), tmp_path / "new")
    with pytest.raises(ConfigError, match="another seed: it was 0, now 1"):
        assemble.distil(tiny(seed=1), tmp_path / "new", resume="must")
    assert assemble.distil(tiny(checkpoint={"keep": 1}), tmp_path / "new", resume="must").code == 0


def test_a_deterministic_run_admits_no_other_kernels_is_recorded_and_goes_on_as_such(tmp_path, monkeypatch):
    for name in determinism.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    look = Method.step_ends
    monkeypatch.setattr(
        Method, "step_ends",
        lambda m: seen.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)) or look(m),
    )  # fmt: skip
    assert assemble.distil(tiny(deterministic=True), tmp_path / "a").code == 0
    assert set(seen) == {(True, True, False)}
    assert not torch.are_deterministic_algorithms_enabled() and not cudnn.deterministic and cudnn.benchmark  # only for the run
    assert {name: os.environ[name] for name in determinism.ENVIRONMENT} == determinism.ENVIRONMENT
    config_, environment = (json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in ("config", "environment"))
    assert config_["deterministic"] is True and environment["deterministic"] is True
    (start,) = [e for e in events.read(tmp_path / "a" / "events.jsonl") if e["kind"] == "start"]
    assert start["deterministic"] is True
    with pytest.raises(ConfigError, match=r"cannot be continued with another deterministic: it was True, now False"):
        assemble.distil(tiny(), tmp_path / "a", resume="must")
    assert assemble.distil(tiny(), tmp_path / "b").code == 0 and set(seen[-3:]) == {(False, False, True)}


def test_a_kernel_that_is_not_deterministic_is_named(tmp_path, monkeypatch):
    def step(self, *args):
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))

    monkeypatch.setattr(Guards, "step", step)
    assert assemble.distil(tiny(), tmp_path / "a").code == 0
    with pytest.raises(ConfigError, match=r"^deterministic is set, and put_ has no deterministic kernel here; leave it out") as e:
        assemble.distil(tiny(deterministic=True), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "status.json").read_text())["code"] == e.value.exit_code == 2


def test_batchnorm_of_each_rank_alone_says_what_it_gives_up():
    said = " ".join(assemble.make_job(tiny(ranks={"bn": "rank"})).notes)
    assert "several do not give the student of one; running statistics are each rank's own, and those of rank 0 are saved" in said
    assert "ranks.bn" not in " ".join(assemble.make_job(tiny()).notes)


def test_python_entry_point():
    small = {"name": "noise", "n_images": 64, "epochs": 1, "kd_steps": 2, "kd_batch": 16}
    outcome = fastkd.distil(method=small, seed=3)
    assert outcome.code == 0 and outcome.summary["method"] == "noise" and outcome.summary["seed"] == 3


@pytest.mark.parametrize("method", ["muse", "nayer", "fast", "noise"])
def test_a_dry_run_walks_every_step_and_computes_nothing(method):
    planned = assemble.dry_run(config.resolve(None, {"method": {"name": method}}))
    names = {row["step"] for row in planned["steps"]}
    assert {"learn", "anneal", "deal"} <= names and planned["total"] == sum(row["times"] for row in planned["steps"])
    assert planned["bytes"]["teacher"] > 1e6 and planned["bytes"]["student"] > 3e5


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_dry_run_shows_what_one_rank_keeps_of_sharded_images(tier):
    whole, sharded = (
        assemble.dry_run(config.resolve("fast-digits", {"memory": {"images": images, "tier": tier}}), world=4)
        for images in ("replicated", "sharded")
    )
    size = 4800 * 8 * 8  # 24 epochs of 2 calls of 100 images
    part = {"device": "bytes", "host": "host"}[tier]  # four ranks for which no CPU is named would have GPUs
    assert whole[part]["pool"] - sharded[part]["pool"] == size - size // 4 - 64  # a row more for those of others
    where = "in host memory" if tier == "host" else "on the device"
    assert f"a store's images (0.307 MB) are kept {where}, sharded over 4 ranks" in sharded["notes"]


def test_images_in_host_memory_change_no_bit_and_may_move_when_a_run_is_continued(tmp_path):
    for name, tier in (("device", "device"), ("host", "host")):
        outcome = assemble.distil(tiny(memory={"tier": tier}), tmp_path / name)
        assert outcome.code == 0 and ("in host memory" in " ".join(outcome.summary["notes"])) == (tier == "host")
    one, two = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("device", "host"))
    assert one == two
    newest = sorted((tmp_path / "host" / "checkpoints").glob("step-*"))[-1]
    assert (newest / "images-r000.safetensors").exists() and not list((tmp_path / "device").glob("checkpoints/*/images-*"))
    for name, tier in (("device", "host"), ("host", "device")):
        assert assemble.distil(tiny(memory={"tier": tier}), tmp_path / name, resume="must").code == 0
        assert (tmp_path / name / "student.safetensors").read_bytes() == one


def test_metadata_is_taken_and_said_and_options_win(weights):
    bare, full = weights
    found = load_network(TeacherConfig(weights=str(full)))
    assert (found.spec, found.classes, found.shape, found.mean, found.std) == ("resnet8", 10, (1, 8, 8), (0.3,), (0.4,))
    assert any("mean = 0.3" in n and "metadata" in n for n in found.notes)
    found = load_network(TeacherConfig(weights=str(full), mean=(0.5,)))
    assert found.mean == (0.5,) and any("as given; the weights' metadata says 0.3" in n for n in found.notes)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, "does not name its architecture"),
        ({"spec": "resnet8"}, r"^the normalisation and the input size of .* are not known; expected --mean .* --input-size PIXELS"),
        ({"spec": "resnet8", "input_size": 8}, "the normalisation of .* is not known; expected --mean"),
        ({"spec": "resnet8", "mean": (0.3,), "std": (0.4,)}, "input size .* is not known"),
        ({"spec": "resnet8", "mean": (0.3, 0.3), "std": (0.4,), "channels": 1, "input_size": 8}, "mean has 2 and std 1 numbers"),
    ],
)
def test_what_nobody_knows_is_refused_not_guessed(weights, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_network(TeacherConfig(weights=str(weights[0]), **options))


def test_one_number_is_the_normalisation_of_all_channels(tmp_path):
    path = tmp_path / "rgb.safetensors"
    models.save_weights(path, models.build("resnet8", classes=4, channels=3, input_size=8).state_dict(), {})
    found = load_network(TeacherConfig(weights=str(path), spec="resnet8", mean=(0.5,), std=(0.25,), input_size=8))
    assert (found.mean, found.std, found.shape, found.classes) == ((0.5,) * 3, (0.25,) * 3, (3, 8, 8), 4)


def test_class_counts_must_agree(weights, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    with pytest.raises(InputError, match="3 class names for 10 classes"):
        load_network(TeacherConfig(weights=str(weights[1]), class_names=str(names)))
    assert read_names(str(names)) == ["a", "b", "c"]
    names.write_text('["x", "y"]')
    assert read_names(str(names)) == ["x", "y"]
    with pytest.raises(InputError, match="are a directory"):
        read_names(str(tmp_path))
    with pytest.raises(InputError, match=r"found|expected"):
        load_network(TeacherConfig(spec="resnet8", weights=str(weights[1]), classes=7))


def test_a_teacher_of_other_data_is_refused(weights, tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / "set" / name).mkdir(parents=True)
        from PIL import Image

        Image.new("L", (8, 8)).save(tmp_path / "set" / name / "0.png")
    with pytest.raises(InputError, match=r"the teacher has 10 classes, .* has 3"):
        assemble.make_job(tiny(teacher={"weights": str(weights[1])}, student={"spec": "resnet8"}, data=str(tmp_path / "set")))


@pytest.mark.parametrize(
    "table, sentence",
    [
        ({"name": "muze"}, "did you mean 'muse'"),
        ({"name": "muse", "lr_gg": 1}, r"did you mean method\.lr_g\?"),
        ({"name": "muse", "lr": "fast"}, r"method\.lr is 'fast'"),
        ({"name": "muse", "lr": float("nan")}, r"method\.lr is nan"),
        ({"name": "muse", "cam_norm": "max"}, r"method\.cam_norm"),
        ({"name": "muse", "epochs": 0}, r"method\.epochs is 0"),
        ({"name": "muse", "epochs": 5, "warmup": 5}, "the student would never learn"),
    ],
)
def test_wrong_method_tables(table, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_method(table)


def test_a_teacher_without_batch_norm_is_refused_by_methods_that_need_it(tmp_path):
    net = models.build("lenet5", classes=10, channels=1, input_size=32)
    path = tmp_path / "lenet.safetensors"
    models.save_weights(path, net.state_dict(), assemble.metadata("lenet5", 10, (1, 32, 32), (0.3,), (0.4,), None))
    with pytest.raises(ConfigError, match=r"needs a teacher with BatchNorm.*work without: .*noise"):
        assemble.make_job(tiny(teacher={"weights": str(path)}, student={"spec": "lenet5_half"}, data="none"))


@pytest.mark.parametrize("name, error", [("gpu", ConfigError), ("cuda:99", PlaceError), ("mps", ConfigError)])
def test_devices(name, error):
    with pytest.raises(error, match=name):
        assemble.resolve_device(name)


@pytest.mark.parametrize("threads, others, said", [(2, 3.0, True), (2, 0.5, False), (2, None, False), (1, 30.0, False)])
def test_more_threads_than_idle_cores_are_said(monkeypatch, threads, others, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(device, "running_beside", lambda: others)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = device.crowded(torch.device("cpu"))
    assert (found is not None) == said and (not said or "OMP_NUM_THREADS=1" in found)
    assert device.crowded(torch.device("cuda", 0)) is None


def test_what_runs_beside_is_counted_without_this_process(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "9.00 5.00 1.00 4/321 17\n")
    assert device.running_beside(looks=2) == 3
    monkeypatch.setattr(Path, "read_text", lambda path: "no such numbers")
    assert device.running_beside() is None


def test_a_run_that_goes_on_with_other_threads_says_so(tmp_path, monkeypatch):
    assert assemble.distil(tiny(), tmp_path / "a").code == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert assemble.distil(tiny(), tmp_path / "a", resume="must").code == 0
    said = [e["text"] for e in events.read(tmp_path / "a" / "events.jsonl") if e["kind"] == "warning"]
    assert any("continued with 7: equal to rounding" in text for text in said), said


def test_a_student_of_a_run_is_a_student(tmp_path):
    assemble.distil(tiny(), tmp_path / "a")
    job = assemble.make_job(tiny(student={"spec": f"ckpt:{tmp_path / 'a'}"}))
    saved = models.load_weights(tmp_path / "a" / "student.safetensors")
    own = dict(job.given.student.net.state_dict())
    assert own.keys() == saved.state.keys() and all(torch.equal(own[k], saved.state[k]) for k in own)


@pytest.mark.parametrize("name", ["muse", "nayer", "fast", "noise"])
def test_every_value_that_a_method_lists_can_be_set_as_it_is_shown(name):
    import dataclasses
    import typing

    from fastkd.config import parse_sets
    from fastkd.methods import method_class

    hints = typing.get_type_hints(method_class(name))
    for field in dataclasses.fields(method_class(name)):
        for value in typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ():
            made = make_method({"name": name, **parse_sets([f"{field.name}={value}"])})
            assert getattr(made, field.name) == value


def test_a_refused_resume_names_the_key_and_touches_nothing(tmp_path):
    out = tmp_path / "run"
    assemble.distil(tiny(), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"another method\.tau: it was 20\.0, now 5\.0"):
        assemble.distil(config.resolve(None, {"method": {**TINY, "tau": 5.0}}), out, resume="must")
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_method_that_refuses_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="a_aed needs"):
        assemble.distil(config.resolve(None, {"method": {**TINY, "a_ed": 0.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_breaks_says_so_in_its_status(tmp_path, monkeypatch):
    from fastkd.engine import loop

    def broken(*args, **kw):
        raise RuntimeError("planted")

    monkeypatch.setattr(loop, "run", broken)
    with pytest.raises(RuntimeError, match="planted"):
        assemble.distil(tiny(), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("fatal", 1)


@pytest.mark.parametrize(
    "key, value", [("lr", -1), ("tau", 0), ("tau", -1), ("kd_scale", 5), ("momentum", 2), ("cam_sigma", 0), ("aug", "foo"), ("g_steps", 0)]
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key} is"):
        make_method({"name": "muse", key: value})


def test_constants_of_255_and_class_names_in_an_object_are_refused(weights, tmp_path):
    with pytest.raises(ConfigError, match="divide mean and std by 255"):
        load_network(TeacherConfig(weights=str(weights[1]), mean=(78.0,), std=(95.0,)))
    names = tmp_path / "names.json"
    names.write_text('{"0": "a", "1": "b"}')
    with pytest.raises(InputError, match="JSON object"):
        read_names(str(names))


def test_an_unfinished_run_is_no_network(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="is not finished; continue it with: fastkd run --resume"):
        weights_path(str(tmp_path / "run"))
    (tmp_path / "run" / "config.json").write_text('{"teacher": {"spec": "py:own.py:make"}, "student": {"spec": "resnet8"}}')
    with pytest.raises(InputError, match=r"run --resume --out .* --teacher py:own.py:make$"):
        weights_path(str(tmp_path / "run"))


def test_metadata_tells_no_folder_of_this_machine():
    said = assemble.metadata("py:/home/me/net.py:make", 10, (1, 8, 8), [0.5], [0.5], None, teacher="py:/data/t.py:teacher", method="noise")
    assert (said["architecture"], said["teacher"], said["method"]) == ("py:net.py:make", "py:t.py:teacher", "noise")
