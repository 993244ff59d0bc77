"""`blockserve serve`: from the settings to a running service. Exit codes as in `server.exit_codes`."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import ConfigError, ModelConfig
from engine.logs import configure_logging
from engine.model_files import find_model
from engine.process_config import ApiProcessConfig, EngineProcessConfig, write_process_config
from engine.types import EngineInfo
from server.banner import start_banner
from server.children import ChildSpec, module_command
from server.control_server import ControlServer
from server.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from server.metrics_registry import MetricStore
from server.runtime_directory import RuntimeDirectoryError, runtime_directory
from server.settings import ServeSettings
from server.sockets import PortError, bind_ports, server_url
from server.supervisor import Supervisor, SupervisorOptions
from server.version import version_info

log = logging.getLogger(__name__)


def serve(settings: ServeSettings) -> int:
    """Serve until a signal or a failure; returns the exit code."""
    configure_logging(settings.log_config(), "supervisor")
    try:
        model = find_model(settings.model)
        ModelConfig.load(model)
        ports = bind_ports(settings.host, settings.port, settings.front_ends(), stall_timeout_s=settings.stall_timeout)
        with ports as listeners, runtime_directory() as directory:
            specs = plan_children(settings, model, listeners, directory)
            return asyncio.run(_supervise(settings, specs, listeners, directory))
    except (ConfigError, PortError, RuntimeDirectoryError) as error:
        log.error("cannot start: %s", error)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before the supervisor answers signals: a download may take long
        return EXIT_INTERRUPTED


def plan_children(
    settings: ServeSettings, model: Path, listeners: Sequence[socket.socket], directory: Path
) -> list[ChildSpec]:
    """Write each child's configuration into the runtime directory; returns how to start them, engines first.

    There is an API process for each of `listeners`.
    """
    specs = plan_engines(settings, model, directory)
    for index, listener in enumerate(listeners):
        api_config = directory / f"api{index}.json"
        write_process_config(
            api_config,
            ApiProcessConfig(
                index=index,
                model=str(model),
                listen_fd=listener.fileno(),
                engine_sockets=[str(path) for path in engine_sockets(settings, directory)],
                control_path=str(control_socket(directory)),
                settings=settings.model_dump_json(),
                log=settings.log_config(),
            ),
        )
        command = module_command("server.api_process", api_config)
        specs.append(ChildSpec("api", index, command, pass_fds=(listener.fileno(),)))
    return specs


def plan_engines(settings: ServeSettings, model: Path, directory: Path) -> list[ChildSpec]:
    """Write each engine's configuration into the runtime directory; returns how to start them."""
    specs = []
    sockets = engine_sockets(settings, directory)
    for index, (device, engine_socket) in enumerate(zip(settings.engine_devices(), sockets, strict=True)):
        engine_config = directory / f"engine{index}.json"
        write_process_config(
            engine_config,
            EngineProcessConfig(
                index=index,
                name=settings.model_names()[0],
                model=str(model),
                options=settings.engine_options(device),
                socket_path=str(engine_socket),
                control_path=str(control_socket(directory)),
                log=settings.log_config(),
                random_seed=settings.random_weights,
                step_timeout_s=settings.step_timeout,
                threads=settings.engine_threads(),
            ),
        )
        command = module_command("engine.worker", engine_config)
        specs.append(ChildSpec("engine", index, command, stale_files=(engine_socket,)))
    return specs


def engine_sockets(settings: ServeSettings, directory: Path) -> list[Path]:
    """Where each engine listens for front ends."""
    return [directory / f"engine{index}.sock" for index in range(len(settings.engine_devices()))]


def control_socket(directory: Path) -> Path:
    """Where the supervisor listens for its children."""
    return directory / "control.sock"


async def _supervise(
    settings: ServeSettings, specs: list[ChildSpec], listeners: Sequence[socket.socket], directory: Path
) -> int:
    url = server_url(listeners[0])
    name = settings.model_names()[0]

    def announce(info: EngineInfo) -> None:
        log.info("serving %s", name, extra={"url": url, "device": info.device, "dtype": info.dtype})
        if settings.log_format == "plain":
            needs_key = bool(settings.api_keys())
            engines = len(settings.engine_devices())
            banner = start_banner(info, name, version_info().version, url, needs_key=needs_key, engines=engines)
            sys.stdout.write("\n" + banner + "\n")
            sys.stdout.flush()

    def close_listeners() -> None:
        for listener in listeners:
            listener.close()

    options = SupervisorOptions(drain_timeout_s=settings.drain_timeout, step_timeout_s=settings.step_timeout)
    # Closed with the last process that accepts connections: clients are refused at once then, not left to wait.
    supervisor = Supervisor(
        specs,
        options,
        MetricStore(),
        announce,
        on_front_end_stopped=close_listeners,
    )
    keys = len(settings.api_keys())
    log.info("starting", extra={"model": name, "url": url, "pid": os.getpid(), "api_keys": keys})
    async with ControlServer(control_socket(directory), supervisor):
        return await supervisor.run()
