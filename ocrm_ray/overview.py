"""What ``ocrm-ray check`` shows: the resolved tree, the pools, the predicted step. Reads only."""

from typing import TYPE_CHECKING

from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import dump_yaml, study_runs
from ocrm_ray.cost import cost_lines, measured_cost, predicted_cost
from ocrm_ray.inspection import network_sizes
from ocrm_ray.machine import NetworkSizes, memory_gib, pools_by_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_run(console: "Console", config: RunConfig) -> None:
    """The tree as YAML, then the pools and the prediction."""
    console.print(dump_yaml(config), markup=False, highlight=False, soft_wrap=True)
    _show_pools(console, config)


def show_study(console: "Console", study: StudyConfig) -> None:
    """The study as YAML, then pools and prediction of each arm with the first seed, told once where they are equal."""
    console.print(dump_yaml(study), markup=False, highlight=False, soft_wrap=True)
    runs = study_runs(study)
    console.print(f"{len(runs)} runs: {len(study.arms)} arms x {len(study.seeds)} seeds", highlight=False)
    for arm, seed, config in runs:
        if seed == study.seeds[0]:
            console.print(f"\narm {arm}", markup=False, highlight=False)
            _show_pools(console, config)


def _show_pools(console: "Console", config: RunConfig) -> None:
    sizes = network_sizes(config)
    console.print(pool_table(config, sizes))
    for line in prediction(config, sizes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def prediction(config: RunConfig, sizes: NetworkSizes | None) -> list[str]:
    """The predicted step, from an earlier run in the same folder if there is one."""
    cost = measured_cost(config)
    if cost is None and sizes is not None:
        cost = predicted_cost(config, sizes)
    if cost is None:
        return ["predicted step: not known, a model is not on this machine and no earlier run is in the run folder"]
    return cost_lines(config, cost)


def pool_table(config: RunConfig, sizes: NetworkSizes | None) -> "Table":
    """Pools with their actors, what these take, and what they run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("pool", "actors", "CPUs", "GPUs", "dtype", "memory", "runs"):
        table.add_column(column, justify="right" if column in ("actors", "CPUs", "GPUs", "memory") else "left")
    memory = {} if sizes is None else memory_gib(config, sizes)
    for name, pool in pools_by_name(config).items():
        table.add_row(
            name,
            str(pool.num_actors),
            f"{pool.num_actors * pool.cpus_per_actor:g}",
            f"{pool.num_actors * pool.gpus_per_actor:g}",
            pool.dtype,
            f"{memory[name]:.1f} GiB" if memory else "?",
            _work(config, name),
        )
    return table


def _work(config: RunConfig, pool: str) -> str:
    correction, gold = config.correction, config.gold
    ratios = ", ratios" if correction.strategy == "ocrm" else ""
    refit = ", refit" if correction.strategy != "none" else ""
    critic = ", critic" if config.policy.algorithm == "ppo" else ""
    scorer = gold.kind if gold else "praise" if config.world else "none"
    return {
        "generation": "policy (vLLM)",
        "policy": f"policy{critic}, {config.policy.algorithm} (DeepSpeed)",
        "scoring": f"anchor, SFT model{ratios}",
        "reward": f"reward model{refit}",
        "evaluation": f"gold: {scorer}",
    }[pool]
