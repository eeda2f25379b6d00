"""Runs `fastkd run` inside Ray Train, as docs/ranks.md says; a process of its own, because Ray leaves threads behind.

Its argument is JSON: `store`, a folder of Ray's, and `fits`: of each the words of a command line, `failures` (how often Ray may start the
workers again), and `plant` and `inside` (see `planted`), which act in the first start of the workers alone. The last line on stdout is
JSON, what each of the fits raised (None: nothing).
"""

import json
import sys
import uuid
from pathlib import Path


def loop(config):
    import os

    import fastkd.cli
    from tests.faults.planted import inside, sitecustomize

    mark = Path(f"{config['mark']}-{os.environ['RANK']}")
    if not mark.exists():
        mark.touch()
        for planted, fault in ((sitecustomize, config["plant"]), (inside, config["inside"])):
            if fault:
                planted.plant(**fault)
    code = fastkd.cli.main(config["words"])
    if code not in (0, 75):
        raise RuntimeError(f"fastkd: exit code {code}")


def fit(words, store, failures=0, plant=None, inside=None):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        loop,
        train_loop_config={"words": words, "plant": plant, "inside": inside, "mark": str(Path(store) / uuid.uuid4().hex)},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=store, failure_config=FailureConfig(max_failures=failures)),
    )
    try:
        trainer.fit()
    except Exception as e:
        return str(e)
    return None


if __name__ == "__main__":
    import ray

    asked = json.loads(sys.argv[1])
    Path(asked["store"]).mkdir(exist_ok=True)
    ray.init(num_cpus=2, include_dashboard=False)
    ends = [fit(**one, store=asked["store"]) for one in asked["fits"]]
    ray.shutdown()
    print(json.dumps(ends))
