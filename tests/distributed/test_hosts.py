"""`multi_node.yaml` on two hosts: two network namespaces of this machine, joined by a virtual cable."""

import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager

import pytest
from launches import command_line, differences, recipe, record

from crrelu_llm.cli.main import main

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments):
    """Runs iproute2's `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts():
    """The names of two network namespaces that reach each other over `cable` and nothing else."""
    names = [f"crrelu-{os.getpid()}-{index}" for index in range(2)]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        first, second = names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["shared", "own"])
def test_two_hosts(workshop, disk):
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    case = "dpo-full"
    names = [case, case if disk == "shared" else f"{case}-host-1"]
    with two_hosts() as hosts:
        running = []
        for rank, (host, name) in enumerate(zip(hosts, names, strict=True)):
            folder = workshop.folder / f"host-{rank}"
            folder.mkdir()
            where = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--main_process_port", "29511"]
            commands = [recipe(workshop, name, "multi_node", case)]
            command = ["ip", "netns", "exec", host, *command_line(folder, "multi_node", commands, *where)]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "HF_HOME": str(folder / "hf")}
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)[-6000:]
    environment = record(workshop, case)["environment"]
    assert (environment["processes"], environment["distribution"]) == (2, "FSDP2")
    assert all((workshop.folder / name / "patched" / "model.safetensors").is_file() for name in names)
    assert main(recipe(workshop, f"{case}-one", None, case)) == 0
    found = differences(workshop, case, f"{case}-one")
    assert found["loss"] < 1e-5 and found["epsilon"] < 1e-5 and found["reload"] < 2e-3, found
