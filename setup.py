"""Only what pyproject.toml cannot say: the two extension modules, and what to install if they cannot be built."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from typing import Final

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

INSTALL: Final = """\
    Debian, Ubuntu:  apt-get install gcc libc6-dev python3-dev
    Fedora, RHEL:    dnf install gcc glibc-devel python3-devel
    Alpine:          apk add gcc musl-dev python3-dev"""


class BuildExtension(build_ext):
    """build_ext that says what to install where it fails."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise PlatformError(f"trio_aiopoll waits by Linux's AIO polls and cannot be built for {sys.platform}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            command: str = self.compiler.compiler_so[0]
            if shutil.which(command) is None:
                problem = f"there is no C compiler: {command!r} was not found on PATH"
            else:
                problem = "the C compiler failed; its own message stands above"
            raise type(error)(
                f"{error}\n\n"
                f"trio_aiopoll could not be built, because {problem}.\n"
                f"Building from source needs a C11 compiler and Python's headers:\n\n{INSTALL}\n\n"
                "CC=... chooses another compiler. A wheel, where there is one for this machine, needs none.\n"
            ) from error


# One wheel for every CPython from 3.10 on; a free-threaded CPython has no limited API, and gets a wheel of its own.
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
options = {"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {}

batch = Extension(
    "trio_aiopoll._batch",
    sources=["trio_aiopoll/_batch.c", "trio_aiopoll/_transfer.c"],
    depends=["trio_aiopoll/_transfer.h"],
    extra_compile_args=["-std=c11", "-O2"],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if limited else [],
    py_limited_api=limited,
)

setup(
    ext_modules=[batch],
    cffi_modules=["trio_aiopoll/_ring_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildExtension},
    options=options,
)
