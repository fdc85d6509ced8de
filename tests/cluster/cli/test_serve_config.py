"""Every key of a Serve config is checked, and so is what it says twice."""

import copy
from typing import Any

import pytest

from cluster.cli.serve_config import IMPORT_PATH, check_config
from orchard.errors import ConfigError
from serve.app import DEPLOYMENT

CONFIG: dict[str, Any] = {
    "http_options": {"port": 8000, "keep_alive_timeout_s": 5},
    "grpc_options": {"port": 9000},
    "logging_config": {"encoding": "JSON"},
    "applications": [
        {
            "name": "orchard", "route_prefix": "/", "import_path": IMPORT_PATH,
            "args": {
                "policy": "/storage/policy",
                "serve": {"filters": {"cheap": {"column": "price", "op": "<", "value": 3}}},
            },
            "runtime_env": {"working_dir": "file:///code.zip", "env_vars": {"A": "b"}},
            "deployments": [
                {
                    "name": DEPLOYMENT,
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 3},
                    "ray_actor_options": {"num_cpus": 1, "runtime_env": {"env_vars": {}}},
                }
            ],
        },
        {"name": "theirs", "route_prefix": "/theirs", "import_path": "theirs:app",
         "args": {"anything": {"goes": 1}}},
    ],
}  # fmt: skip
APP = ("applications", 0)
ONE = (*APP, "deployments", 0)


def changed(*path: Any, value: object) -> dict[str, Any]:
    """Return the config with one value replaced."""
    tree = copy.deepcopy(CONFIG)
    at: Any = tree
    for key in path[:-1]:
        at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
    at[path[-1]] = value
    return tree


def test_a_config_that_is_right_checks_out_and_others_applications_are_theirs() -> None:
    check_config(CONFIG)
    check_config(changed(*APP, "args", "serve", "follow_s", value=1.0))  # an old name


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ((*ONE, "autoscaling_config", "min_replica"), "min_replicas"),
        ((*ONE, "autoscaling_config", "policy", "policy_functon"), "policy_function"),
        ((*ONE, "request_router_config", "request_router_clas"), "request_router_class"),
        ((*ONE, "ray_actor_options", "runtime_env", "env_var"), "env_vars"),
        ((*ONE, "logging_config", "log_levle"), "log_level"),
        (("grpc_options", "prt"), "port"),
        (("http_options", "keep_alive_timeout"), "keep_alive_timeout_s"),
        (("logging_config", "encodin"), "encoding"),
        ((*APP, "runtime_env", "workingdir"), "working_dir"),
        ((*APP, "runtime_env", "config", "setup_timeout"), "setup_timeout_seconds"),
        ((*APP, "autoscaling_policy", "policy_functon"), "policy_function"),
        ((*APP, "args", "polcy"), "policy"),
        ((*APP, "args", "serve", "filters", "cheap", "colum"), "column"),
        ((*APP, "args", "serve", "variants", "b", "shar"), "share"),
        (("applications", 1, "route_prefx"), "route_prefix"),
    ],
)
def test_a_misspelt_key_is_refused_at_any_depth(path: tuple[Any, ...], meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .*{path[-1]} .* did you mean {meant}"):
        check_config(changed(*path, value=1))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*ONE, "autoscaling_config", "min_replicas"), "many", "min_replicas"),
        ((*ONE, "autoscaling_config", "min_replicas"), 9, "autoscaling_config"),
        ((*ONE, "num_replicas"), 2, "num_replicas"),
        ((*ONE, "name"), "Endpont", "its name is Endpoint"),
        ((*APP, "args", "serve", "replicas"), 2, "autoscaling_config are both set"),
        ((*APP, "args", "serve", "threads"), 4, r"num_cpus = 1 contradict each other"),
        ((*APP, "args", "serve", "port"), 8080, r"http_options\.port = 8000 contradict"),
        ((*APP, "args", "serve", "host"), "127.0.0.1", r"http_options\.host = '0\.0\.0\.0'"),
        ((*APP, "args", "serve", "application"), "other", r"applications\.0\.name = 'orchard'"),
        ((*APP, "args", "serve", "route"), "/other", r"route_prefix = '/' contradict"),
        ((*APP, "args", "serve", "width"), 5000, r"width = 5000, max_width"),
        ((*APP, "args"), {}, r"args\.policy"),
    ],
)
def test_wrong_values_and_contradictions_are_refused(
    path: tuple[Any, ...], value: object, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(changed(*path, value=value))


def test_other_numbers_of_replicas_contradict_each_other() -> None:
    tree = changed(*ONE, "num_replicas", value=3)
    del tree["applications"][0]["deployments"][0]["autoscaling_config"]
    tree["applications"][0]["args"]["serve"]["replicas"] = 2
    with pytest.raises(ConfigError, match=r"replicas = 2 and .*num_replicas = 3 contradict"):
        check_config(tree)
