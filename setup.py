"""Only what pyproject.toml cannot say: the extension module that cffi builds."""

import sysconfig

from setuptools import setup

# One wheel for every CPython from 3.10 on, except where the build has no limited API.
options = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}

setup(cffi_modules=["trio_aiopoll/_ring_build.py:ffibuilder"], options=options)
