"""Where utterances are explained: in this process, in several processes of this machine, or on a cluster."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Dask makes glibc return freed memory at once; every batch then pays for fresh pages and takes two to three times as
# long. The Makefile sets the same for this process.
MEMORY = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
KEPT = 2**30  # bytes

CHOICES = "the address of a Dask scheduler such as tcp://host:8786, a number of processes such as 2, or jobs as slurm:8"


@contextmanager
def connect(where: str | None = None) -> Iterator:
    """Yield a Dask client, or None to use this process alone.

    Args:
        where: None or "" for this process; "2" for two processes on this machine; "tcp://host:8786" for the scheduler
            at this address; "slurm:8" for eight SLURM jobs, which Dask's own configuration describes (jobqueue.yaml).

    Raises:
        ValueError: `where` is none of these. ImportError: Dask is not installed. OSError: no scheduler answers.
    """
    if not where:
        yield None
        return
    kind, _, number = where.rpartition(":")
    if not (where.isdigit() and int(where) or kind == "slurm" and number.isdigit() and int(number) or "//" in where):
        raise ValueError(f"WORKERS is {where!r}: give {CHOICES}.")
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.comm import get_address_host_port
    except ImportError as error:
        raise ImportError("WORKERS needs Dask: install it with `pip install 'xattn[cluster]'`.") from error
    with ExitStack() as stack:
        cluster = where
        if where.isdigit():
            threads = max(1, (os.cpu_count() or 1) // int(where))
            with dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": KEPT for name in MEMORY}):
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=int(where),
                        threads_per_worker=1,  # a worker explains one utterance at a time with the torch threads below
                        dashboard_address=None,
                        env={"OMP_NUM_THREADS": str(threads)},
                    )
                )
        elif kind == "slurm":
            from dask_jobqueue import SLURMCluster

            cluster = stack.enter_context(SLURMCluster())
            cluster.scale(jobs=int(number))
        else:
            try:
                get_address_host_port(where)
            except ValueError as error:  # no port, or an unknown protocol
                raise ValueError(f"WORKERS is {where!r}: give {CHOICES}.") from error
        try:
            client = stack.enter_context(Client(cluster, timeout=30))
        except (OSError, TimeoutError) as error:
            raise OSError(f"No Dask scheduler answers at {where}: start one there, or change WORKERS.") from error
        yield client
