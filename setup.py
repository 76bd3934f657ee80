"""Puts the configurations of the checkout into wheels: `detclipv2_jax/configs`."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib) / "detclipv2_jax" / "configs"
            shutil.copytree("configs", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": WithConfigs})
