"""The container's files fit the project."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from server.settings import ServeSettings
from tests.docker.monitoring import DOCKER
from tests.repository import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def copied() -> set[str]:
    """What the image gets of the checkout."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
    return {source.rstrip("/") for line in lines for source in line.split()[:-1]}


def test_every_installed_package_is_copied() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= copied()


def test_the_context_is_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_dependencies_come_before_the_source() -> None:
    order = [
        DOCKERFILE.index(text) for text in ("COPY pyproject.toml constraints.txt", "requirements.txt", "COPY engine")
    ]
    assert order == sorted(order)
    assert "-c constraints.txt" in DOCKERFILE


def test_the_server_is_no_root_and_gets_its_signals() -> None:
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)
    # In the shell's form, a shell would be the first process and keep the signals to itself.
    assert '\nENTRYPOINT ["blockserve"]\nCMD ["serve"]\n' in DOCKERFILE


def test_the_port_is_the_default_one() -> None:
    port = ServeSettings().port
    assert f"\nEXPOSE {port}\n" in DOCKERFILE
    assert f"BLOCKSERVE_PORT={port}\n" in DOCKERFILE
    (target,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0][
        "static_configs"
    ][0]["targets"]
    assert target == f"server:{port}"


def test_what_compose_mounts_is_there() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert set(compose["services"]) == {"server", "prometheus", "grafana"}
    mounts = [volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    assert {mount for mount in mounts if not mount.startswith(".")} == set(compose["volumes"])
    assert all((DOCKER / mount).is_dir() for mount in mounts if mount.startswith("."))
    overlay = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert set(overlay["services"]) <= set(compose["services"])


def test_compose_waits_for_the_drain() -> None:
    server = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]["server"]
    settings = {name.removeprefix("BLOCKSERVE_").lower(): value for name, value in server["environment"].items()}
    drain = ServeSettings.model_validate(settings).drain_timeout
    assert int(server["stop_grace_period"].removesuffix("s")) >= drain + 10


HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
