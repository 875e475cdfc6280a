"""Where utterances are explained: in this process, in several processes of this machine, or on a cluster."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import platformdirs

from xattn.files import writing

# The environment of every process that explains, unless the user has set these. The Makefile has the same values.
ENVIRONMENT = {
    # Keep freed memory for the next batch, which is a quarter to a third faster. Dask makes glibc return it at once;
    # every batch then pays for fresh pages and takes two to three times as long.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),  # bytes
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    # Idle threads of OpenMP wait in a loop, by default for milliseconds, and take cores from other processes.
    "GOMP_SPINCOUNT": "1000",
}

CHOICES = "the address of a Dask scheduler such as tcp://host:8786, a number of processes such as 2, or jobs as slurm:8"


@contextmanager
def connect(where: str | None = None) -> Iterator:
    """Yield a Dask client, or None to use this process alone.

    Args:
        where: None or "" for this process; "2" for two processes on this machine; "tcp://host:8786" for the scheduler
            at this address; "slurm:8" for eight SLURM jobs, which Dask's own configuration describes (jobqueue.yaml).
            Their logs go to the folder xattn/slurm in the user's cache unless `log-directory` there names another one.

    Raises:
        ValueError: `where` is none of these, or jobqueue.yaml does not give cores and memory. ImportError: Dask is not
            installed. OSError: no scheduler answers, SLURM rejects the jobs, or the folder for their logs could not be
            made.
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
            environment = {f"distributed.nanny.pre-spawn-environ.{name}": each for name, each in ENVIRONMENT.items()}
            with dask.config.set(environment):
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=int(where),
                        threads_per_worker=1,  # a worker explains one utterance at a time with the torch threads below
                        dashboard_address=None,
                        env={"OMP_NUM_THREADS": str(threads)},
                    )
                )
        elif kind == "slurm":
            cluster = stack.enter_context(_slurm_cluster(int(number)))
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


def _slurm_cluster(jobs: int):
    """Submit SLURM jobs with Dask workers. OSError: SLURM rejects them, or the folder for their logs cannot be made."""
    import dask
    from dask_jobqueue import SLURMCluster

    def configured(name):
        return dask.config.get(f"jobqueue.slurm.{name}", None)

    options = {
        "python": configured("python") or shlex.quote(sys.executable),  # Dask does not quote it
        "processes": 1,  # of several workers in a job Dask replaces none
        # A worker explains one utterance at a time, with all cores of its job. The environment that jobs inherit has
        # the number of threads for this machine.
        "worker_extra_args": [*(configured("worker-extra-args") or []), "--nthreads", "1"],
        "job_script_prologue": [
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
            *(configured("job-script-prologue") or []),
        ],
    }
    if configured("log-directory") is None:  # SLURM would put the logs into the current folder
        logs = platformdirs.user_cache_path("xattn") / "slurm"
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)
        # As a directive, because Dask does not quote log_directory.
        options["job_extra_directives"] = [f'--output="{logs}/%x-%j.out"', *(configured("job-extra-directives") or [])]
    cluster = SLURMCluster(**options)
    try:  # Dask would only log a rejected job, and wait forever
        subprocess.run(
            ["sbatch", "--test-only"], input=cluster.job_script(), capture_output=True, check=True, text=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        cluster.close()
        reason = " ".join(getattr(error, "stderr", str(error)).split())
        raise OSError(f"SLURM takes no jobs ({reason}): correct Dask's jobqueue.yaml, or change WORKERS.") from error
    # Unlike `scale`, this replaces a job that ends, for example at its time limit.
    cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
    return cluster
