#!/usr/bin/env python3
"""Drain this Ray node when its cloud says that it will be taken away.

Ray moves work off a node only if it is told. On Kubernetes `ray start` drains itself on
SIGTERM; on virtual machines nobody tells it, so this program asks the cloud's metadata
service every few seconds, and on a notice runs `ray drain-node` with the reason
"preemption" and the time that is left. Pairs then checkpoint and go on elsewhere.

Only the standard library, so that it runs beside anything: as a systemd unit
(m2mkd-drain.service), from the start commands of `ray up`, or as a sidecar. It ends with
0 once Ray has taken the request, and with 1 when the machine's time is up without that.

What is asked, by cloud:
  aws    IMDSv2: a token, then `spot/instance-action`; 404 until there is a notice (about two minutes ahead).
         https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
  gcp    `instance/preempted` with the header `Metadata-Flavor: Google`; TRUE after a notice (about 30 s).
         https://cloud.google.com/compute/docs/instances/preemptible
  azure  scheduled events of type Preempt or Terminate that name this machine (at least 30 s).
         https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

import argparse
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

logger = logging.getLogger("m2mkd-drain")

LINK_LOCAL = "http://169.254.169.254"
"""Where AWS, GCP and Azure serve metadata to a machine."""
REASON = "DRAIN_NODE_REASON_PREEMPTION"
GCP_NOTICE_S = 30.0
"""GCP says that, not when. Counted from when it was seen."""
AZURE_NOTICE_S = 30.0
"""Least notice of Azure; used where an event has started already and has no `NotBefore`."""

MARGIN_S = 10.0
"""`ray drain-node` counts from when it has started, which takes seconds: 3 to 8 were seen on two busy cores."""


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away."""

    message: str
    deadline: float
    """Seconds since the epoch."""


class MetadataError(Exception):
    """The metadata service does not answer, or not as its cloud's does."""


Fetch = Callable[..., tuple[int, Mapping[str, str], str]]


def fetch(
    url: str, headers: Mapping[str, str], method: str = "GET", timeout_s: float = 5.0
) -> tuple[int, Mapping[str, str], str]:
    """Status, headers and text of an answer; 404 is one.

    Raises:
        MetadataError: no answer, or an error other than 404.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    # No proxy: the metadata service is on the machine's own link.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code in (401, 404):
            return error.code, error.headers, error.read().decode(errors="replace")
        raise MetadataError(f"{method} {url}: {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        raise MetadataError(f"{method} {url}: {error}") from error


class Aws:
    """EC2's instance metadata, version 2."""

    token_life_s = 21600

    def __init__(self, url: str) -> None:
        self._url = url
        self._token: str | None = None

    def notice(self) -> Notice | None:
        """A notice, if there is one now."""
        if self._token is None:
            self._token = self._new_token()
        status, _, text = self._action(self._token)
        if status == 401:  # the token has run out
            self._token = self._new_token()
            status, _, text = self._action(self._token)
        if status == 404:
            return None
        if status != 200:
            raise MetadataError(f"{self._url}/latest/meta-data/spot/instance-action: {status} with a new token")
        try:
            action = json.loads(text)
            return Notice(f"AWS will {action['action']} this spot instance", _iso(action["time"]))
        except (ValueError, KeyError, TypeError) as error:
            raise MetadataError(f"spot/instance-action says {text!r}, expected action and time") from error

    def _new_token(self) -> str:
        url = f"{self._url}/latest/api/token"
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(self.token_life_s)}
        status, _, token = fetch(url, headers, method="PUT")
        if status != 200 or not token:
            raise MetadataError(f"PUT {url}: {status}, expected a token")
        return token

    def _action(self, token: str) -> tuple[int, Mapping[str, str], str]:
        return fetch(f"{self._url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})


class Gcp:
    """Compute Engine's metadata server."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/computeMetadata/v1/instance/preempted"

    def notice(self) -> Notice | None:
        """A notice, if there is one now."""
        status, headers, text = fetch(self._url, {"Metadata-Flavor": "Google"})
        if status != 200 or headers.get("Metadata-Flavor") != "Google":
            raise MetadataError(f"{self._url}: {status} without `Metadata-Flavor: Google`; this is not GCP")
        if text.strip() not in ("TRUE", "FALSE"):
            raise MetadataError(f"{self._url} says {text!r}, expected TRUE or FALSE")
        return Notice("GCP preempts this instance", time.time() + GCP_NOTICE_S) if text.strip() == "TRUE" else None


class Azure:
    """Azure's scheduled events. Its first answer may take two minutes: it switches the service on."""

    kinds = ("Preempt", "Terminate")

    def __init__(self, url: str) -> None:
        self._url = url
        self._name: str | None = None

    def notice(self) -> Notice | None:
        """A notice, if there is one now."""
        if self._name is None:
            self._name = self._get("/metadata/instance/compute/name?api-version=2021-02-01&format=text").strip()
        text = self._get("/metadata/scheduledevents?api-version=2020-07-01")
        try:
            events = json.loads(text)["Events"]
            ours = [event for event in events if event["EventType"] in self.kinds and self._name in event["Resources"]]
            times = {event["EventType"]: _rfc(event.get("NotBefore", "")) for event in ours}
        except (ValueError, KeyError, TypeError) as error:
            raise MetadataError(f"scheduledevents says {text!r}, expected Events") from error
        if not times:
            return None
        kind = min(times, key=lambda each: times[each])
        return Notice(f"Azure will {kind.lower()} this machine", times[kind])

    def _get(self, path: str) -> str:
        status, _, text = fetch(self._url + path, {"Metadata": "true"})
        if status != 200:
            raise MetadataError(f"{self._url}{path}: {status}; this is not Azure")
        return text


CLOUDS: Mapping[str, Callable[[str], Aws | Gcp | Azure]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def _iso(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()  # noqa: UP017


def _rfc(text: str) -> float:
    """Empty means that the event has started."""
    return parsedate_to_datetime(text).timestamp() if text else time.time() + AZURE_NOTICE_S


def wait_for_notice(cloud: Aws | Gcp | Azure, every_s: float) -> Notice:
    """Ask until there is a notice. A service that does not answer is reported when that begins and when it ends."""
    was_silent = False
    while True:
        try:
            notice = cloud.notice()
        except MetadataError as error:
            if not was_silent:
                logger.warning("The metadata service does not answer: %s. Asking on.", error)
            was_silent = True
        else:
            if was_silent:
                logger.info("The metadata service answers.")
            was_silent = False
            if notice is not None:
                return notice
        time.sleep(every_s)


def drain_command(
    ray: str, notice: Notice, now: float, margin_s: float, node_id: str | None, address: str | None
) -> list[str]:
    """The command that tells Ray; at least one second is left, because 0 means now and none means never."""
    left = max(1, math.floor(notice.deadline - now - margin_s))
    command = [*shlex.split(ray), "drain-node", "--reason", REASON, "--reason-message", notice.message]
    command += ["--deadline-remaining-seconds", str(left)]
    if address:
        command += ["--address", address]
    return command + (["--node-id", node_id] if node_id else [])


def node_at(ray: str, ip: str, timeout_s: float) -> str:
    """Ray's id of the node that is alive at an address; for sidecars, which no raylet runs beside.

    Raises:
        LookupError: there is none, or several.
    """
    command = [*shlex.split(ray), "list", "nodes", "--format", "json"]
    command += ["--filter", f"node_ip={ip}", "--filter", "state=ALIVE"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if found.returncode != 0:
        raise LookupError(f"`{shlex.join(command)}` ended with {found.returncode}: {found.stderr.strip()[-500:]}")
    # Ray 2.60 says "No resource in the cluster" and not [] where there is none.
    ids = [node["node_id"] for node in json.loads(found.stdout)] if found.stdout.lstrip().startswith("[") else []
    if len(ids) != 1:
        raise LookupError(f"{len(ids)} nodes are alive at {ip}, expected one. Give --node-id.")
    return ids[0]


def drain(notice: Notice, options: argparse.Namespace) -> bool:
    """Tell Ray until it has taken the request, or the time is up."""
    # Without a node id Ray asks the node that it finds itself on: of this cluster, not of another on the machine.
    env = {**os.environ, **({"RAY_ADDRESS": options.address} if options.address else {})}
    while (left := notice.deadline - time.time()) > 0:
        try:
            node_id = options.node_id or (node_at(options.ray, options.node_ip, left) if options.node_ip else None)
            command = drain_command(options.ray, notice, time.time(), options.margin, node_id, options.address)
            ended = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False, env=env)
        except (LookupError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            logger.error("Could not tell Ray: %s", error)
        else:
            if ended.returncode == 0:
                logger.info("Ray drains this node: %s", shlex.join(command))
                return True
            said = (ended.stderr or ended.stdout).strip()[-1000:]
            logger.error("`%s` ended with %d: %s", shlex.join(command), ended.returncode, said)
        time.sleep(min(options.interval, 1.0))
    return False


def arguments() -> argparse.ArgumentParser:
    """The options; all have defaults but the cloud."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cloud", choices=CLOUDS, required=True)
    parser.add_argument("--metadata-url", default=LINK_LOCAL, help="of the metadata service (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between questions (default: %(default)s)")
    parser.add_argument(
        "--margin", type=float, default=MARGIN_S, help="seconds less than there are (default: %(default)g)"
    )
    parser.add_argument("--ray", default="ray", help="command, e.g. 'docker exec m2mkd ray' (default: %(default)s)")
    parser.add_argument("--address", help="host:port of the head; default: what this node has joined")
    node = parser.add_mutually_exclusive_group()
    node.add_argument("--node-id", help="Ray's id of the node to drain; default: the one that this runs on")
    node.add_argument("--node-ip", help="its address instead; needs Ray's dashboard (RAY_API_SERVER_ADDRESS)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Wait for a notice, then drain; exit code 0 once Ray has taken the request."""
    options = arguments().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logger.info("Asking %s at %s every %g s.", options.cloud, options.metadata_url, options.interval)
    notice = wait_for_notice(CLOUDS[options.cloud](options.metadata_url.rstrip("/")), options.interval)
    logger.warning("%s in %.0f s.", notice.message, notice.deadline - time.time())
    if drain(notice, options):
        return 0
    logger.error("The time is up, and Ray has not taken the request.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
