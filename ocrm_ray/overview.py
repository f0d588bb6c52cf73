"""What ``ocrm-ray check`` shows: the resolved tree, pools, memory, the predicted step. Reads only."""

from typing import TYPE_CHECKING

from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import dump_yaml, study_runs
from ocrm_ray.cost import cost_lines, step_cost
from ocrm_ray.inspection import network_sizes
from ocrm_ray.machine import memory_gib
from ocrm_ray.memory import memory_lines

if TYPE_CHECKING:
    from rich.console import Console


def show(config: RunConfig | StudyConfig) -> None:
    """Print the tree as YAML, then pools and prediction of the run, or of each arm with its first seed."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(dump_yaml(config))
    if isinstance(config, RunConfig):
        _show_pools(console, config)
        return
    runs = study_runs(config)
    console.print(f"{len(runs)} runs of {len(config.arms)} arms")
    first_runs: dict[str, RunConfig] = {}
    for arm, _, run in runs:
        first_runs.setdefault(arm, run)
    for arm, run in first_runs.items():
        console.print(f"\narm {arm}: seeds {', '.join(map(str, config.seeds_of(arm)))}")
        _show_pools(console, run)


def _show_pools(console: "Console", config: RunConfig) -> None:
    """Pools with their actors and what these take, and the predicted step."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    sizes = network_sizes(config)
    memory = {} if sizes is None else memory_gib(config, sizes)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("pool", "actors", "CPUs", "GPUs", "dtype", "host memory"):
        table.add_column(column, justify="left" if column in ("pool", "dtype") else "right")
    for name, pool in config.pools:
        num_placed = config.pools.num_placed(name)
        cpus, gpus = num_placed * pool.cpus_per_actor, num_placed * pool.gpus_per_actor
        taken = f"{memory[name]:.1f} GiB" if memory else "?"
        table.add_row(name, str(num_placed), f"{cpus:g}", f"{gpus:g}", pool.dtype, taken)
    cost = step_cost(config, sizes)
    unknown = ["predicted step: not known, a model is not on this machine and no earlier run is in the run folder"]
    lines = memory_lines(config, sizes) if sizes else []
    console.print(table, *lines, *(cost_lines(config, cost) if cost else unknown), sep="\n")
