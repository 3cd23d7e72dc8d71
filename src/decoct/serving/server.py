"""A server with its model and its port, ready to run."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoct.model import open_model
from decoct.serving.engines import check_engine
from decoct.serving.metrics import Metrics
from decoct.serving.networks import choose_context, open_network
from decoct.serving.text import Text
from decoct.serving.worker import Limits, Worker

_SERVED = ("decoct", "decoct-int8", "transformers", "cuda")


@dataclass(frozen=True, slots=True)
class Server:
    """A model behind a port that is taken already.

    Attributes:
        name: of the model, as clients ask for it.
        about: one line: what computes.
        address: http://host:port.
    """

    name: str
    about: str
    address: str
    _uvicorn: Any
    _socket: socket.socket

    def run(self) -> None:
        """Serve until the process is told to stop."""
        self._uvicorn.run(sockets=[self._socket])

    def stop(self) -> None:
        """From another thread: finish, and let `run` return."""
        self._uvicorn.should_exit = True


def open_server(
    model: str | Path,
    *,
    name: str,
    engine: str = "decoct",
    context: int | None = None,
    num_seats: int = 4,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> Server:
    """Load a model and take a port.

    Args:
        model: folder, .gguf file, or hub id.
        name: of the model, as clients ask for it.
        engine: "decoct", "decoct-int8" or "transformers".
        context: the most tokens that prompt and answer may have together; None: the model's own up to 4096.
        num_seats: sequences that are written at the same time.
        limits: what the server takes on.
        host: to listen on.
        port: 0: a free one.

    Raises:
        ValueError: fastapi or uvicorn is missing, the engine cannot serve, or the port is taken.
    """
    check_engine(engine)
    if engine not in _SERVED:
        raise ValueError(
            f"decoct serve runs the engines decoct, transformers and cuda, not {engine}; use that engine's own server"
        )
    try:
        import uvicorn

        from decoct.serving.app import make_app
    except ImportError:
        raise ValueError("decoct serve needs fastapi and uvicorn: pip install 'decoct[serve]'") from None
    listening = _listen(host, port)
    try:
        opened = open_model(model)
        room = choose_context(opened, context)
        network = open_network(opened, engine, context=room, num_seats=num_seats)
        metrics = Metrics()
        worker = Worker(network, Text(opened), limits or Limits(), metrics)
    except ValueError:
        listening.close()
        raise
    config = uvicorn.Config(make_app(worker, name, metrics), log_level="warning", timeout_graceful_shutdown=5)
    address = f"http://{host}:{listening.getsockname()[1]}"
    return Server(name, network.about, address, uvicorn.Server(config), listening)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from None
