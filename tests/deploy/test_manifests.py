"""Kubernetes manifests and containers, without a cluster."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import get_top_level_dir_from_compressed_package
from ray.runtime_env import RuntimeEnv

from cluster.cli.serve_config import IMPORT_PATH, check_config
from orchard import config
from orchard.settings import ServeConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "manifests"
RAY = ("rayjob", "rayservice", "raycluster")
CLUSTER_AT = {"rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig", "raycluster": None}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def cluster(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    place = CLUSTER_AT[name]
    return spec[place] if place else spec


def groups(name: str) -> Iterator[dict[str, Any]]:
    yield cluster(name)["headGroupSpec"]
    yield from cluster(name)["workerGroupSpecs"]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Convert a CRD's schema to a JSON Schema that rejects unknown fields."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        made["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    return made


@pytest.fixture
def schema_of(shared_data: Path) -> Callable[[str], dict[str, Any]]:
    folder = shared_data / "kuberay_crds"
    if not folder.is_dir():
        pytest.skip("KubeRay's CRDs are not beside this checkout")

    def find(name: str) -> dict[str, Any]:
        plural = f"{name}s"
        crd = yaml.load((folder / f"ray.io_{plural}.yaml").read_text(), yaml.CSafeLoader)
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {"x-kubernetes-preserve-unknown-fields": True}
        return strict(schema)

    return find


@pytest.mark.slow
@pytest.mark.parametrize("name", RAY)
def test_a_resource_follows_its_crd(name: str, schema_of: Callable[[str], dict[str, Any]]) -> None:
    validator = jsonschema.Draft7Validator(schema_of(name))
    assert [error.message[:300] for error in validator.iter_errors(read(name))] == []
    broken = read(name)
    place = CLUSTER_AT[name]
    spec = broken["spec"][place] if place else broken["spec"]
    spec["workerGroupSpecs"][0]["minReplica"] = 1
    assert any("minReplica" in error.message for error in validator.iter_errors(broken))


@pytest.mark.parametrize("name", RAY)
def test_a_cluster_obeys_what_the_operator_asks_beyond_its_schema(name: str) -> None:
    spec = cluster(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert len(read(name)["metadata"]["name"]) <= 40
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert len(set(names)) == len(names)
    for group in groups(name):
        pod = group["template"]["spec"]
        assert pod.get("restartPolicy", "Never") == "Never"
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["terminationGracePeriodSeconds"] > 30  # Ray drains a node for 30 s
        assert "resources" not in group
        (container,) = pod["containers"]
        check_restricted(container)
        version = re.search(r":(\d+\.\d+\.\d+)", container["image"])
        assert version is not None
        assert version[1] == spec["rayVersion"]
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def check_restricted(container: dict[str, Any]) -> None:
    """Assert what the pod security standard `restricted` asks of each container."""
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", RAY)
def test_the_autoscaler_may_run_in_a_restricted_namespace(name: str) -> None:
    """The operator adds its container to the head's pod, with this context and no other."""
    check_restricted(cluster(name)["autoscalerOptions"])


def test_the_pod_that_submits_may_run_in_a_restricted_namespace() -> None:
    spec = read("rayjob")["spec"]
    pod = spec["submitterPodTemplate"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # the operator refuses others
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    check_restricted(container)
    head = cluster("rayjob")["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["image"] == head["image"]
    assert "command" not in container  # the operator's own, which submits
    assert "args" not in container


def test_replicas_get_the_token_of_operators_from_a_secret() -> None:
    asked = yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"])
    settings = ServeConfig(**asked["applications"][0]["args"]["serve"])
    for group in cluster("rayservice")["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        variables = {one["name"]: one for one in container["env"]}
        assert variables[settings.token_env]["valueFrom"]["secretKeyRef"] == {
            "name": "orchard-serve",
            "key": "token",
        }


def test_the_archive_of_the_code_has_the_one_folder_that_ray_takes_off(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"git archive --format=zip .*", text)
    prefix = re.search(r"--prefix=(\w+/)", command)
    assert prefix is not None
    made = tmp_path / "orchard.zip"
    words = ["git", "archive", "--format=zip", f"--prefix={prefix[1]}", "-o", str(made), "HEAD"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"git makes no archive here: {ended.stderr}")
    assert get_top_level_dir_from_compressed_package(str(made)) == prefix[1].removesuffix("/")


def test_one_group_of_workers_may_be_taken_away() -> None:
    market = {g["groupName"]: g["labels"] for g in cluster("rayjob")["workerGroupSpecs"]}
    assert market["spot"] == {"ray.io/market-type": "spot"}
    assert market["on-demand"] == {"ray.io/market-type": "on-demand"}


def test_the_job_runs_a_command_that_exists_and_resumes() -> None:
    spec = read("rayjob")["spec"]
    first, then = (part.split() for part in spec["entrypoint"].split(" && "))
    assert first == [*then[:3], "sft", *then[4:]]  # a finished warm start is only evaluated
    python, flag, module, command, run, *overrides = then
    assert (python, flag, module, command) == ("python", "-m", "cluster.cli", "train")
    settings = config.load(ROOT / run, overrides)
    assert settings.output.is_absolute()
    ports = {
        port["name"]: port["containerPort"]
        for port in cluster("rayjob")["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert settings.cluster.metrics_port == ports["orchard"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert "deletionStrategy" not in spec
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    grace = float(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for group in groups("rayjob"):
        if group.get("groupName") != "spot":
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] > grace
    RuntimeEnv(**environment)
    assert environment["working_dir"].startswith("file://")  # no path of the pod that submits


def test_the_service_is_our_application_with_arguments_that_it_takes() -> None:
    asked = yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"])
    check_config(asked)  # unknown keys and wrong values, those of the application included
    assert [one["import_path"] for one in asked["applications"]] == [IMPORT_PATH]


def test_the_way_in_bounds_what_serve_does_not() -> None:
    parts = list(yaml.safe_load_all((FOLDER / "serveproxy.yaml").read_text()))
    config_map, deployment, service = parts
    text = config_map["data"]["default.conf"]
    assert text.count("{") - text.count("{1,100}") == text.count("}") - text.count("{1,100}")
    for directive in ("client_header_timeout 10s", "client_body_timeout 30s"):
        assert f"{directive};" in text
    for header in ("X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled"):
        assert f'proxy_set_header {header} "";' in text
    served = read("rayservice")["metadata"]["name"]
    assert f"http://{served}-serve-svc:8000" in text  # the service that KubeRay makes
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert (
        deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    )
    (container,) = pod["spec"]["containers"]
    assert f"listen {container['ports'][0]['containerPort']};" in text


def test_the_operator_gets_the_rules_that_are_tested() -> None:
    rules = yaml.safe_load((ROOT / "cluster/monitoring/rules.yml").read_text())
    assert read("prometheusrule")["spec"] == rules


def test_every_port_that_is_scraped_is_open_somewhere() -> None:
    scraped = {end["port"] for end in read("podmonitor")["spec"]["podMetricsEndpoints"]}
    opened = {
        port["name"]
        for group in groups("rayjob")
        for port in group["template"]["spec"]["containers"][0]["ports"]
    }
    assert scraped <= opened


def test_each_dashboard_is_a_config_map_of_less_than_a_megabyte() -> None:
    made = yaml.safe_load((ROOT / "cluster" / "kustomization.yaml").read_text())
    assert made["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    files = {file for one in made["configMapGenerator"] for file in one["files"]}
    dashboards = sorted((ROOT / "cluster" / "monitoring" / "dashboards").glob("*.json"))
    assert files == {f"monitoring/dashboards/{file.name}" for file in dashboards}
    assert all(file.stat().st_size < 900_000 for file in dashboards)
    assert all((ROOT / "cluster" / name).is_file() for name in made["resources"])


def test_images_hold_pinned_dependencies_and_no_code_and_do_not_run_as_root() -> None:
    for kind in ("cpu", "gpu"):
        lines = (ROOT / "docker" / f"Dockerfile.{kind}").read_text().splitlines()
        copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
        assert all(word.startswith("requirements/") for words in copied for word in words)
        assert all((ROOT / word).is_file() for words in copied for word in words)
        assert "USER 1000" in lines
        assert any(re.fullmatch(r"ARG BASE_IMAGE=\S+:2\.60\.0-\S+", line) for line in lines)


def test_compose_mounts_what_exists_and_pins_what_it_pulls() -> None:
    made = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for service in made["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith(".."):
                assert (ROOT / "docker" / source).exists(), source
            elif not source.startswith("$"):
                assert source in made["volumes"]
