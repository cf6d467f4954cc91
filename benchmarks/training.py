"""How long a training waits for its data: the share of a step that is spent on getting the next batch.

Real faces, the recipe `field`, real steps of the optimiser; batches come as in `maskwatch train`, made ahead in
parallel by tf.data. Waiting is the time in which the next batch is asked for and not there yet. Where the same cores
make batches and train, the two slow each other down, which a wait doesn't show: so the same steps are also timed with
one batch that is kept, and the ratio of the two is printed beside.

    python -m benchmarks.training FACES [SCENES] [--arch xception] [--steps 30] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

#: What the data may cost of a step.
BAR = 0.10

#: Steps that don't count: TensorFlow traces, queues fill.
WARM_UP = 3


def measure(data: list[Path], arch: str, steps: int) -> dict[str, Any]:
    """The figures of one network, at the size it is trained at first."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from workers.classification import networks
    from workers.datasets import dataset
    from workers.training import batches, recipes

    settings = recipes.settings_for(recipes.Recipe.FIELD, arch)
    source = batches.batches_for(dataset.load(data).samples, settings)
    model = networks.build(arch, None)
    recipes.compile_model(model, settings, steps)
    feed = iter(batches.epoch_batches(source, 0, steps + WARM_UP, settings))
    waits, trains, kept = [], [], None
    for _ in range(steps + WARM_UP):
        before = time.perf_counter()
        kept = next(feed)
        got = time.perf_counter()
        model.train_on_batch(*kept)
        waits.append(got - before)
        trains.append(time.perf_counter() - got)
    alone = []
    for _ in range(steps):
        before = time.perf_counter()
        model.train_on_batch(*kept)
        alone.append(time.perf_counter() - before)
    waits, trains = waits[WARM_UP:], trains[WARM_UP:]
    step = statistics.mean(waits) + statistics.mean(trains)
    return {
        "arch": arch,
        "side": settings.side_in(0),
        "batch": settings.batch,
        "steps": steps,
        "wait_share": statistics.mean(waits) / step,
        "step_ms": 1000 * step,
        "step_without_data_ms": 1000 * statistics.mean(alone),
        "data_ratio": step / statistics.mean(alone),
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", nargs="+", type=Path, help="as for `maskwatch train`")
    parser.add_argument("--arch", action="append", help="repeatable; all where none is named")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from workers.classification.networks import BUILDERS

    found = [measure(arguments.data, arch, arguments.steps) for arch in arguments.arch or BUILDERS]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        print(
            f"{row['arch']} at {row['side']} px, batch {row['batch']}: step {row['step_ms']:.0f} ms, "
            f"waits {row['wait_share']:.1%} of it for data (bar: {BAR:.0%}); "
            f"{row['data_ratio']:.2f} times a step with one batch that is kept"
        )


if __name__ == "__main__":
    main()
