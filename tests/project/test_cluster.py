"""The cluster's files: manifests against KubeRay's own schemas, linters, and that every command in them exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config
from support.paths import ROOT

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig, TrainConfig

CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted(CLUSTER.glob("Dockerfile*"))
DOCUMENTS = [ROOT / "docs/gpu.md", ROOT / "docs/kubernetes.md"]
JOBS = {"jobs/link_corpus.py": LinkConfig, "jobs/train.py": TrainConfig}
COMMAND = re.compile(r"\bpython (\S*/)?(?P<script>jobs/\w+\.py)(?P<arguments>[^|&#`\n]*)")


def named(path: Path) -> str:
    return path.name


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return found


def cluster_spec(path: Path) -> dict[str, Any]:
    spec = manifest(path)["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def closed(schema: Any) -> Any:
    """A Kubernetes schema that refuses fields that it does not declare."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not is_open:
        result["additionalProperties"] = False
    return result


@pytest.fixture(scope="module")
def faults() -> Callable[[dict[str, Any]], list[str]]:
    """What is wrong with a manifest by its schema, `rayjob.v1.schema.json` and so on in `KUBERAY_SCHEMAS`."""
    directory = Path(os.environ.get("KUBERAY_SCHEMAS", ""))
    if not (directory / "rayjob.v1.schema.json").is_file():
        pytest.skip("KUBERAY_SCHEMAS names no directory with KubeRay's schemas")

    def check(content: dict[str, Any]) -> list[str]:
        group, version = content["apiVersion"].split("/")
        assert group == "ray.io"
        schema = closed(json.loads((directory / f"{content['kind'].lower()}.{version}.schema.json").read_text()))
        schema["properties"] |= {key: {} for key in ("apiVersion", "kind", "metadata")}
        return [error.message for error in Draft202012Validator(schema).iter_errors(content)]

    return check


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_manifests_fit_kuberay_s_schemas(path: Path, faults: Callable[[dict[str, Any]], list[str]]) -> None:
    assert faults(manifest(path)) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("shutdownAfterJobFinishes:", "shutdownAfterJobFinish:"),
        ("enableInTreeAutoscaling:", "enableAutoscaling:"),
        ("idleTimeoutSeconds:", "idleTimeoutSecond:"),
        ("runAsNonRoot:", "runAsNonroot:"),
        ("sizeLimit:", "limit:"),
        ("secretRef:", "secret:"),
        ("backoffLimit: 2", "backoffLimit: two"),
        ("operator: Exists", "operators: Exists"),
    ],
)
def test_the_schemas_catch_a_wrong_field(right: str, wrong: str, faults: Callable[[dict[str, Any]], list[str]]) -> None:
    text = (CLUSTER / "kuberay/link.yaml").read_text("utf-8")
    assert right in text
    assert faults(yaml.safe_load(text.replace(right, wrong))) != []


def pods(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of a manifest, by its role."""
    spec = cluster_spec(path)
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    submitter = manifest(path)["spec"].get("submitterPodTemplate")
    if submitter is not None:
        yield "submitter", submitter["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_every_pod_is_confined_bounded_and_watched(path: Path) -> None:
    for role, pod in pods(path):
        assert pod["securityContext"]["runAsNonRoot"], role
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, role
        for resource in ("cpu", "memory"):
            assert all(container["resources"][kind][resource] for kind in ("requests", "limits")), role
        if role == "submitter":
            continue
        assert {"readinessProbe", "livenessProbe"} <= container.keys(), role
        assert {"secretRef": {"name": "gemel-s3"}} in container["envFrom"], role
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys(), role
        assert mounts["shared-memory"] == "/dev/shm"
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        assert not any("KEY" in item["name"] or "TOKEN" in item["name"] for item in container["env"]), role


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_the_head_stays_and_the_workers_come_and_go(path: Path) -> None:
    spec = cluster_spec(path)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    affinities = {role: pod["affinity"]["nodeAffinity"] for role, pod in pods(path)}
    for role, affinity in affinities.items():
        kind = "required" if role in ("head", "submitter") else "preferred"
        assert list(affinity) == [f"{kind}DuringSchedulingIgnoredDuringExecution"], role
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])


def test_ray_s_version_is_the_pinned_one() -> None:
    (pin,) = re.findall(r"^ray==(.+)$", (ROOT / "requirements-gpu.txt").read_text("utf-8"), re.MULTILINE)
    assert {cluster_spec(path)["rayVersion"] for path in MANIFESTS} == {pin}


def test_a_job_s_actors_find_room() -> None:
    """Each actor of a job fits into one worker, and all of them into the workers that a manifest may start."""
    for path in MANIFESTS:
        if (entrypoint := manifest(path)["spec"].get("entrypoint")) is None:
            continue
        ((script, config),) = job_configurations(entrypoint)
        groups = {group["groupName"]: group for group in cluster_spec(path)["workerGroupSpecs"]}
        (worker,) = groups["gpu"]["template"]["spec"]["containers"]
        gpus = worker["resources"]["limits"]["nvidia.com/gpu"]
        images = config.resources.images
        if script == "jobs/link_corpus.py":
            generation = config.resources.generation
            assert generation.num_gpus <= gpus
            needed = generation.max_actors * generation.num_gpus + images.max_actors * images.num_gpus
        else:  # images are encoded before the workers start
            needed = max(config.workers.num_workers, images.max_actors * images.num_gpus)
        assert needed <= gpus * groups["gpu"]["maxReplicas"], path.name


def test_the_aws_cluster_is_what_ray_up_takes() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text("utf-8"))
    validate_config(prepare_config(config))
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("path", DOCKERFILES, ids=named)
def test_dockerfiles_pass_hadolint(path: Path) -> None:
    assert run_tool("hadolint", str(path)) == (0, "")


def test_hadolint_has_rules(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN pip install ray\n")
    code, output = run_tool("hadolint", str(tmp_path / "Dockerfile"))
    assert code == 1
    assert "DL3007" in output
    assert "DL3013" in output


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=named)
def test_scripts_pass_shellcheck(path: Path) -> None:
    assert run_tool("shellcheck", str(path)) == (0, "")


def run_tool(name: str, *arguments: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=named)
def test_images_are_made_of_files_that_exist_and_run_as_a_user(path: Path) -> None:
    text = path.read_text("utf-8").replace("\\\n", " ")
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is not in .dockerignore"
    instructions = re.findall(r"^(USER|CMD) (.+)$", text, re.MULTILINE)
    assert instructions[0] == ("USER", "1000")
    (command,) = [json.loads(value) for name, value in instructions if name == "CMD"]
    assert Path(sys.executable).with_name(command[0]).is_file()
    for setting in ("RAY_USAGE_STATS_ENABLED=0", "VLLM_NO_USAGE_STATS=1"):
        assert setting in text


def job_configurations(text: str) -> list[tuple[str, Any]]:
    """The jobs that a text starts with a configuration, resolved with the options that follow."""
    found: list[tuple[str, Any]] = []
    for command in COMMAND.finditer(text.replace("\\\n", " ").replace('"', "")):
        script, arguments = command["script"], command["arguments"].split()
        assert (ROOT / script).is_file(), script
        if script in JOBS:
            config = arguments[0].removeprefix("$PWD/").removeprefix("/app/")
            found.append((script, load_config(JOBS[script], ROOT / config, arguments[1:])))
    return found


def test_every_job_exists_and_takes_its_options() -> None:
    entrypoints = [manifest(path)["spec"].get("entrypoint", "") for path in MANIFESTS]
    texts = [path.read_text("utf-8") for path in (*CLUSTER.glob("*.sh"), *DOCUMENTS)]
    found = Counter(script for text in (*entrypoints, *texts) for script, _ in job_configurations(text))
    assert found == {"jobs/link_corpus.py": 5, "jobs/train.py": 2}


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(SystemExit):
        job_configurations("python /app/jobs/link_corpus.py cluster/configs/link_1_gpu.toml --inputs x")


@pytest.mark.parametrize("path", sorted((CLUSTER / "configs").glob("*.toml")), ids=named)
def test_configurations_are_valid(path: Path) -> None:
    load_config(LinkConfig, path)


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in (CLUSTER / "local_trial.sh", *DOCUMENTS):
        assert set(re.findall(r"`make ([a-z-]+)", path.read_text("utf-8"))) <= targets, path.name


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_local_trial_links_and_trains(tmp_path: Path) -> None:
    if not (ROOT / "build/emoji/demonstrations.stamp").exists():
        pytest.skip("the demo's artifacts are not there: `make test-all` makes them")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([CLUSTER / "local_trial.sh", tmp_path], check=True, env=os.environ | {"PATH": path})
    linked, trained = (json.loads((tmp_path / name / "_report.json").read_text()) for name in ("linked", "trained"))
    assert (linked["rows"], linked["errors"], trained["steps"]) == (100, {}, 2)
