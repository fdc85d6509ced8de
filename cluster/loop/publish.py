"""Publish policies to a running endpoint: switch the links that it follows, and wait until it has.

loop/policies/00003     a policy of the loop; never changed once it is there
loop/serving/main       link to the policy of most users
loop/serving/canary     link to the policy of the canary's users, the same without one
"""

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchard.errors import CheckpointError
from orchard.folders import atomic_dir
from orchard.policy.store import PolicyFacts

MAIN, CANARY = "main", "canary"
"""Names of the variants of the endpoint."""


@dataclass(frozen=True, kw_only=True)
class Policies:
    """Policies of a loop, and the links that an endpoint follows."""

    folder: Path
    """Folder of the loop."""

    def path(self, name: str) -> Path:
        """Return the folder of a policy."""
        return self.folder / "policies" / name

    def link(self, variant: str) -> Path:
        """Return the link that a variant of the endpoint follows."""
        return self.folder / "serving" / variant

    def version(self, name: str) -> str:
        """Return the version of a policy, as the endpoint names it."""
        return str(PolicyFacts.read(self.path(name)).version)

    def keep(self, name: str, source: Path) -> None:
        """Copy a policy into the loop's folder, atomically; one that is there already stays."""
        target = self.path(name)
        if target.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)

    def switch(self, main: str, canary: str) -> None:
        """Switch both links, each atomically."""
        for variant, name in ((MAIN, main), (CANARY, canary)):
            link = self.link(variant)
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary = link.with_name(f".{variant}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(Path("..") / "policies" / name)
            temporary.replace(link)


def wait_until_served(
    url: str,
    wanted: Mapping[str, str],
    *,
    timeout_s: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until each variant of an endpoint answers with the wanted version of its policy.

    Raises:
        CheckpointError: it does not within `timeout_s`; the message has the endpoint's reason.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline, said = time.monotonic() + timeout_s, "it gives no answer"
    while True:
        try:
            with opener.open(f"{url.rstrip('/')}/v1/policy", timeout=10) as reply:
                variants: list[dict[str, Any]] = json.load(reply)["variants"]
            served = {each["name"]: each["policy"] for each in variants}
            if all(served.get(name) == version for name, version in wanted.items()):
                return
            said = "; ".join(each["refused"] for each in variants if each["refused"])
            said = said or f"it serves {served}"
        except (OSError, ValueError, KeyError) as error:
            said = f"it gives no answer ({error})"
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"after {timeout_s:.0f} s the endpoint {url} does not serve {dict(wanted)}: "
                f"{said}; see docs/runbooks/policy-refused.md"
            )
        sleep(0.2)
