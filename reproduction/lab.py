"""JupyterLab as `make lab` starts it."""

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager


class KernelsInRoot(AsyncMappingKernelManager):
    """Starts kernels in the root of the repository, as `make reproduce` does, wherever their notebooks are.

    Relative paths then mean the same in both.
    """

    def cwd_for_path(self, path: str, **kwargs) -> str:
        # Without env, the server asks for the folder of the notebook, to tell the kernel its name.
        return self.root_dir if "env" in kwargs else super().cwd_for_path(path, **kwargs)
