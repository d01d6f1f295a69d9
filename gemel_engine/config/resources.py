"""Settings of the actor pools of a job."""

from __future__ import annotations

from dataclasses import dataclass

from gemel_engine.config.bounds import Amount, Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Number of actors of a stage, and the resources that each of them reserves in the cluster.

    Attributes:
        min_actors: Number of actors at the start.
        max_actors: Maximum number of actors; the stage grows up to it when it falls behind.
        num_cpus: Number of logical CPUs of one actor.
        num_gpus: Number of GPUs of one actor: a whole number, or a fraction of one GPU that several
            actors share.
        memory_gib: Memory in GiB that Ray reserves for one actor; 0 reserves none. The memory used
            by an actor is in the output of `gemel plan` and in `_report.json`.
        num_threads: Number of CPU threads of the models in one actor; None: Ray's default, which is
            one thread for less than two CPUs.
    """

    min_actors: Count = 1
    max_actors: Count = 1
    num_cpus: Amount = 0.5
    num_gpus: Amount = 0.0
    memory_gib: Amount = 0.0
    num_threads: Count | None = None

    def __post_init__(self) -> None:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors is {self.min_actors}: it must not be above max_actors {self.max_actors}")
        if self.num_gpus > 1 and not float(self.num_gpus).is_integer():
            raise ValueError(f"num_gpus is {self.num_gpus}: give an actor a share of one GPU, or whole ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSettings:
    """Actor pools of the stages."""

    images: PoolSettings = PoolSettings()
    retrieval: PoolSettings = PoolSettings(num_cpus=0.25)
    generation: PoolSettings = PoolSettings()
