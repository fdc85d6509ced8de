"""Names, routes, hosts and ports of an endpoint, without Ray; with it in test_serving."""

import socket
from typing import Any

import pytest

from cluster.cli.endpoint import ServeInstance, check_free, refuse_taken_port
from orchard.errors import ConfigError
from orchard.settings import ServeConfig

OTHER = ServeInstance(
    host="127.0.0.1", port=8123, route_of={"theirs": "/", "mine": "/mine"}, proxy_ips=()
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "the route / is taken by the application 'theirs'"),
        ({"application": "theirs", "route": "/x"}, "already serves an application 'theirs' at /;"),
        ({"application": "mine"}, "already serves an application 'mine' at /mine|route / is taken"),
        ({"route": "/x", "port": 8000}, "serve.port = 8000, but Serve .* with port 8123"),
        ({"route": "/x", "host": "0.0.0.0"}, "serve.host = 0.0.0.0, but Serve .* with host 127"),
    ],
)
def test_what_is_taken_on_a_cluster_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_free(ServeConfig(**settings), OTHER)


@pytest.mark.parametrize("settings", [{}, {"port": 8123}, {"port": 0}])
def test_a_name_and_route_of_its_own_can_be_had(settings: dict[str, Any]) -> None:
    check_free(ServeConfig(route="/x", **settings), OTHER)


def test_each_part_of_an_address_is_blamed_for_itself() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        taken = one.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {taken} of 127.0.0.1 cannot be had"):
            refuse_taken_port(ServeConfig(port=taken))
    for host in ("no-such-host.invalid", "300.1.1.1", "::g"):
        with pytest.raises(ConfigError, match=r"serve\.host = .* is not a known host"):
            refuse_taken_port(ServeConfig(host=host, port=0))
    for host in ("192.0.2.1", "2001:db8::1"):  # kept for documentation, no machine's own
        with pytest.raises(ConfigError, match=r"serve\.host = .* is not an address of this"):
            refuse_taken_port(ServeConfig(host=host, port=0))
    refuse_taken_port(ServeConfig(host="localhost", port=0))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_can_be_had() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    refuse_taken_port(ServeConfig(host="::1", port=0))
