"""The files for Kubernetes and Compose: valid by the published schemas, and true to the app.

Neither engine is on the machines that run this.
"""

import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from machine import Project

CHECK = Path(sys.executable).with_name("check-jsonschema")
OLDEST = "1.30"  # the first whose `preStop` can sleep without a program
RELEASE = ["python", "manage.py", "migrate"]
UVICORNS = {"WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"}  # variables that uvicorn reads itself
SPARE_SECONDS = 3  # for what comes before and after the requests

Manifest = dict[str, Any]


def read_manifests(project: Project) -> list[Manifest]:
    return [
        manifest
        for name in ("deploy/kubernetes.yaml", "deploy/migrate.yaml")
        for manifest in yaml.safe_load_all(project.read(name))
    ]


@pytest.fixture(scope="module")
def manifests(project: Project) -> dict[str, Manifest]:
    """The Kubernetes resources, by kind: there is one of each."""
    found = read_manifests(project)
    by_kind = {manifest["kind"]: manifest for manifest in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(params=["Deployment", "Job"])
def pods(request: pytest.FixtureRequest, manifests: dict[str, Manifest]) -> Manifest:
    """What pods are made of: metadata and spec."""
    found: Manifest = manifests[request.param]["spec"]["template"]
    return found


@pytest.fixture(scope="module")
def services(project: Project) -> dict[str, Manifest]:
    found: dict[str, Manifest] = yaml.safe_load(project.read("compose.yaml"))["services"]
    return found


def only(items: list[Any]) -> Any:
    (item,) = items
    return item


def in_dockerfile(project: Project, pattern: str) -> str:
    return str(only(re.findall(pattern, project.read("Dockerfile"), re.MULTILINE)))


def port(project: Project) -> int:
    return int(in_dockerfile(project, r"\bPORT=(\d+)"))


def shutdown_seconds(project: Project) -> int:
    source = project.read("server/__init__.py")
    return int(only(re.findall(r"^SHUTDOWN_SECONDS = (\d+)$", source, re.MULTILINE)))


def settings(project: Project) -> set[str]:
    """Return the names of all settings; a test of the project compares this file with config.py."""
    return set(re.findall(r"^(?:# )?(\w+)=", project.read(".env.example"), re.MULTILINE))


def seconds(duration: str) -> int:
    amount, unit = only(re.findall(r"^(\d+)([sm])$", duration))
    return int(amount) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_has_a_schema_for_each_manifest_and_each_fits(
    project: Project, version: str
) -> None:
    for manifest in read_manifests(project):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_pods_run_confined_as_the_images_user(project: Project, pods: Manifest) -> None:
    pod = pods["spec"]
    container = only(pod["containers"])

    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(in_dockerfile(project, r"^USER (\d+):\d+$")),
        "runAsGroup": int(in_dockerfile(project, r"^USER \d+:(\d+)$")),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


def test_pods_get_settings_that_exist_and_secrets_by_reference(
    project: Project, pods: Manifest
) -> None:
    container = only(pods["spec"]["containers"])

    assert container["envFrom"] == [{"secretRef": {"name": "todo"}}]
    assert "kubectl create secret generic todo " in project.read("docs/deploying.md")
    assert {each["name"] for each in container.get("env", [])} <= settings(project) | UVICORNS


def test_probes_ask_routes_that_exist_at_the_port_of_the_image(
    project: Project, manifests: dict[str, Manifest]
) -> None:
    container = only(manifests["Deployment"]["spec"]["template"]["spec"]["containers"])
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "liveness", "readiness")
    }
    ports = {probe["httpGet"]["port"] for key, probe in container.items() if key.endswith("Probe")}
    routes = re.findall(r'^@router\.get\("(/\w+)"', project.read("routes/health.py"), re.MULTILINE)

    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert set(paths.values()) == set(routes)
    assert ports == {only(container["ports"])["name"]}
    assert only(container["ports"])["containerPort"] == port(project)
    assert only(manifests["Service"]["spec"]["ports"])["targetPort"] in ports


def test_pods_have_the_time_to_finish_what_they_have_begun(
    project: Project, manifests: dict[str, Manifest]
) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    pause = only(pod["containers"])["lifecycle"]["preStop"]["sleep"]["seconds"]

    needed = pause + shutdown_seconds(project) + SPARE_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= needed


def test_a_job_migrates_with_the_image_that_will_serve(manifests: dict[str, Manifest]) -> None:
    web, job = (
        only(manifests[kind]["spec"]["template"]["spec"]["containers"])
        for kind in ("Deployment", "Job")
    )

    assert job["command"] == RELEASE
    assert job["image"] == web["image"]
    assert "command" not in web  # the image's own serves


def test_only_pods_that_serve_get_requests(manifests: dict[str, Manifest]) -> None:
    def has(kind: str, selector: dict[str, str]) -> bool:
        labels = manifests[kind]["spec"]["template"]["metadata"]["labels"]
        return bool(selector) and selector.items() <= labels.items()

    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]

    assert [has("Deployment", each) for each in selectors] == [True, True, True]
    assert [has("Job", each) for each in selectors] == [False, False, False]


def test_the_autoscaler_keeps_two_pods_and_knows_the_sum_of_pools(
    project: Project, manifests: dict[str, Manifest]
) -> None:
    autoscaler, deployment = manifests["HorizontalPodAutoscaler"]["spec"], manifests["Deployment"]
    env = {
        each["name"]: each["value"]
        for each in only(deployment["spec"]["template"]["spec"]["containers"])["env"]
    }

    assert autoscaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert autoscaler["minReplicas"] > manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    pods = autoscaler["maxReplicas"] + deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    connections = pods * int(env["DB_POOL_SIZE"])
    for page in ("deploy/kubernetes.yaml", "docs/deploying.md"):
        assert f" {connections} connections" in project.read(page)


def test_compose_accepts_its_file(project: Project) -> None:
    outcome = project.run(str(CHECK), "--builtin-schema", "vendor.compose-spec", "compose.yaml")

    assert outcome.code == 0, outcome.output


def test_the_app_reaches_postgresql_through_a_pooler_in_transaction_mode(
    project: Project, services: dict[str, Manifest]
) -> None:
    environment = services["app"]["environment"]
    pooler, server = services["pgbouncer"]["environment"], services["postgres"]["environment"]

    assert set(environment) <= settings(project) | UVICORNS
    assert "@pgbouncer:5432/todo" in environment["DATABASE_URL"]
    assert "@postgres:5432/todo" in environment["DATABASE_URL_DIRECT"]
    assert pooler["POOL_MODE"] == "transaction"
    assert (pooler["DB_HOST"], pooler["DB_NAME"]) == ("postgres", server["POSTGRES_DB"])
    assert pooler["DB_USER"] == server["POSTGRES_USER"]


def test_containers_run_as_the_page_says(project: Project, services: dict[str, Manifest]) -> None:
    app, migrate = services["app"], services["migrate"]

    assert migrate["command"] == RELEASE
    assert app["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert seconds(app["stop_grace_period"]) >= shutdown_seconds(project) + SPARE_SECONDS
    for service in (app, migrate):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_mail_goes_to_the_mail_catcher(services: dict[str, Manifest]) -> None:
    url = services["app"]["environment"]["MAIL_URL"]

    assert url == "smtp://mailpit:1025?from=todo@example.com"
    assert services["mailpit"]["ports"] == ["127.0.0.1:8025:8025"]


def test_only_this_machine_can_reach_the_containers(
    project: Project, services: dict[str, Manifest]
) -> None:
    published = {name: each["ports"] for name, each in services.items() if "ports" in each}

    assert published["app"] == [f"127.0.0.1:{port(project)}:{port(project)}"]
    assert all(each.startswith("127.0.0.1:") for ports in published.values() for each in ports)
    assert published.keys().isdisjoint({"postgres", "pgbouncer"})


def test_no_secret_is_in_the_file(services: dict[str, Manifest]) -> None:
    values = [
        value
        for service in services.values()
        for name, value in service.get("environment", {}).items()
        if re.search("PASSWORD|SECRET|DATABASE_URL", name)
    ]

    assert len(values) >= 4
    assert [value for value in values if not re.search(r"\$\{\w+[}:]", value)] == []


def test_images_are_pinned_and_updated(project: Project, services: dict[str, Manifest]) -> None:
    images = [service["image"] for service in services.values() if "image" in service]
    updates = yaml.safe_load(project.read(".github/dependabot.yml"))["updates"]

    assert len(images) == 3
    assert all(re.fullmatch(r"\S+:v?\d+\.\d+\S*@sha256:[0-9a-f]{64}", each) for each in images)
    assert {"docker", "docker-compose"} <= {each["package-ecosystem"] for each in updates}
