"""The same application as its user would move it to aiopoll: the worker imports it before it calls trio.run."""

import trio_aiopoll

from ._http_application import application

__all__ = ["application"]

trio_aiopoll.install()
