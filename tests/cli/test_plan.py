"""`fastkd plan`."""

from __future__ import annotations

import json

from fastkd.cli import common, run_options, summary, words
from fastkd.cli.app import app
from tests.cli.conftest import TINY, one_sentence, sets


def test_a_plan_as_json_and_for_people(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("plan", "--device", "cpu", "--gpus", 2, *sets(*TINY), "--json")
    assert done.exit_code == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["ranks"] == 2 and planned["fits"] is True and planned["hours"] > 0 and planned["wire"] > 0
    m = planned["memory"]
    assert m["rank"] == m["held"] + m["guards"] + m["activations"] and m["machine"] == 2 * m["rank"] < m["available"]
    said = cli("plan", "--device", "cpu", "--gpus", 2, *sets(*TINY)).stdout
    assert all(w in said for w in ("learn", "sends", "one takes", "on each of 2 ranks", "of the hungriest step", "fits", "yes:"))
    assert "communication not included" in said and "nothing was written" in said and not list(tmp_path.iterdir())


def test_without_the_probe(cli):
    said = cli("plan", "--device", "cpu", "--no-probe", *sets(*TINY)).stdout
    assert "fits" in said and "not known" in said and "one takes" not in said and "hungriest" not in said


def test_mistakes_are_those_of_a_run(cli):
    done = cli("plan", "--device", "cpu", "--gpus", 8, *sets(*TINY, "method.kd_batch=36"))
    assert done.exit_code == 2 and "36 rows cannot be dealt to 8 ranks" in one_sentence(done.stderr)
    done = cli("plan", "--recipe", "muse-imagenet-113")
    assert done.exit_code == 2 and "did you mean 'muse-imagenet-112'?" in one_sentence(done.stderr)


def test_run_and_plan_take_the_same_options_that_decide_a_run():
    run, plan = ({p.name for p in app.get_command(None, name).params} for name in ("run", "plan"))
    shared = {*run_options.KEYS, "recipe", "sets", "gpus"}
    assert shared <= run and plan == shared | {"probed", "device_memory", "as_json", "debug"}


def test_what_does_not_fit_is_said(capsys):
    step = {"step": "learn", "phase": "distillation", "args": "", "times": 3, "wire": 0}
    planned = {"steps": [step], "bytes": {"at": 10**9}, "epochs": 1, "total": 3, "ranks": 1, "wire": 0, "notes": [], "hours": None}
    memory = {"held": 10**9, "machine": 10**9, "available": 10**8}
    summary.show_plan(planned | {"memory": memory, "fits": False, "why": "too much"})
    assert "no: 1.0 GB of 100.0 MB free; too much" in capsys.readouterr().out


def test_images_in_host_memory_are_shown_apart(cli):
    words = ("plan", "--device-memory", "24GiB", "--no-probe", *sets(*TINY, "memory.tier=host"))
    said = cli(*words).stdout
    assert "device" in said and "host memory" in said and "of this machine's" in said and "on the device" in said
    planned = json.loads(cli(*words, "--json").stdout)
    assert planned["host"]["at"] > 0 and planned["memory"]["available"] == 24 * 2**30


def test_an_amount_of_memory_has_a_unit_that_is_known(cli):
    convert = common.Size().convert
    assert [convert(text, None, None) for text in ("80GiB", "1.5 GB", "512mib", "4096")] == [80 << 30, 1_500_000_000, 512 << 20, 4096]
    for wrong in ("80GX", "0GiB", "GiB", "-1GB"):
        done = cli("plan", f"--device-memory={wrong}")
        assert done.exit_code == 2 and "is not an amount of memory; expected one such as 80GiB" in done.stderr


def test_short_times_in_words():
    assert [words.seconds(s) for s in (0, 3.42e-5, 0.0021, 0.9996, 1.25, 75)] == ["0 us", "34.2 us", "2.1 ms", "1.0 s", "1.2 s", "1:15"]
