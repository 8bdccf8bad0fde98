"""Where a Ray cluster is: what may be said in `--address` and RAY_ADDRESS. Imports no Ray, which takes seconds."""

import os
import re

from pipeline.errors import UsageError

VARIABLE = "RAY_ADDRESS"
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:]+):(\d{1,5})")


def cluster_address(address: str | None) -> str | None:
    """Returns HOST:PORT or `auto` of the cluster that is meant; None where Ray is to run on this machine.

    Ray lets RAY_ADDRESS decide what `auto` is.

    Raises:
        UsageError: it is no address of a cluster, such as that of its dashboard.
    """
    meant = (os.environ.get(VARIABLE) or address) if address == "auto" else address
    if meant in (None, "", "local"):
        return None
    check_address(meant)
    return meant


def check_address(address: str | None) -> None:
    """Refuse, before anything is started, what can't be the address of a Ray cluster.

    Raises:
        UsageError: it says how such an address looks.
    """
    if address in (None, "", "local", "auto"):
        return
    source, remedy = address_source(address), "give HOST:PORT of the cluster's head (6379 as a rule) or auto"
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"{source}: is the address of Ray's dashboard, to which `ray job submit` sends a command. "
            f"{'Unset it' if source.startswith(VARIABLE) else 'Leave it out'} to run on this machine, or {remedy}"
        )
    if address.startswith("ray://"):
        raise UsageError(
            f"{source}: is for Ray's client, through which this command does not run. Run it on a machine of the "
            "cluster with --address auto, such as with `ray job submit --address http://HEAD:8265 -- pipeline …`"
        )
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise UsageError(f"{source}: is no address of a Ray cluster; {remedy}")


def address_source(address: str) -> str:
    """Returns what the address is and who said so, to begin a message with."""
    by_environment = os.environ.get(VARIABLE) == address
    return f"{VARIABLE}={address}" if by_environment else f"--address {address}"
