"""The load generator: load.c, built when it is first needed."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ._model import RivalFailed
from ._processes import child_command, cpu_time_of, cpus, talking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from ._model import Contestant, Sample
    from ._processes import Talker

HERE = Path(__file__).resolve().parent


@functools.cache
def _build_directory() -> Path:
    directory = tempfile.mkdtemp(prefix="benchmarks-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@functools.cache
def built(source: str, *options: str) -> Path:
    """The C source of that name in this directory, compiled."""
    target = _build_directory() / "".join((source.removesuffix(".c"), *(word for word in options if word[:2] == "-D")))
    command = ["cc", "-O2", "-Wall", "-std=c11", "-o", str(target), str(HERE / source), *options]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RivalFailed("there is no C compiler (cc)") from None
    except subprocess.CalledProcessError as error:
        raise RivalFailed(f"{source} does not compile: {error.stderr}") from None
    return target


@functools.cache
def certificate() -> str:
    """A file with a key and a certificate that nobody has signed."""
    target = str(_build_directory() / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-keyout", target, "-out", target]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RivalFailed("there is no openssl") from None
    except subprocess.CalledProcessError as error:
        raise RivalFailed(f"openssl: {error.stderr}") from None
    return target


@contextmanager
def serving(benchmark: str, rival: str, parameters: Mapping[str, Any]) -> Iterator[tuple[Talker, int]]:
    """A child that serves; yields it and its port."""
    with talking(child_command("serve", benchmark, rival, parameters), cpus()[0]) as server:
        port = int(server.answer())
        yield server, port


@contextmanager
def under_load(
    benchmark: str,
    rival: str,
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    command: Callable[[], str],
    *,
    tls: bool = False,
) -> Iterator[Contestant]:
    """A server of that benchmark with the load generator connected to it.

    Args:
      shape: connections, how many of them are active, bytes a request, and what else load.c takes.
      command: what to tell the load generator in each round.
      tls: have it talk TLS; the parameters of the server get a ``certificate``.
    """
    if tls:
        parameters = {**parameters, "certificate": certificate()}
    words = [str(built("load.c", "-lm", *(("-DTLS", "-lssl", "-lcrypto") if tls else ())))]
    with serving(benchmark, rival, parameters) as (server, port):
        words += [str(word) for word in (port, *shape)]
        with talking(words, cpus()[1]) as load:
            load.answer()

            def run_round() -> Sample:
                before = cpu_time_of(server.pid)
                sample: Sample = json.loads(load.ask(command()))
                sample["cpu"] = (cpu_time_of(server.pid) - before) / sample["completed"] * 1e6
                return sample

            yield run_round
