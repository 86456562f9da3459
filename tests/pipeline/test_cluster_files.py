"""The files that start a cluster are what Ray and Kubernetes accept."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

from pipeline.sweep_file import load

ROOT = Path(__file__).parents[2]


def test_cluster_file_meets_the_schema_that_ray_ships():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    growing = [t for t in types.values() if t["resources"].get("GPU") and t["max_workers"] > 0]
    assert growing and all(t["min_workers"] == 0 for t in growing)


def test_clusters_run_the_version_of_ray_that_is_pinned():
    pin = next(line.split("==")[1] for line in (ROOT / "constraints.txt").read_text().split()
               if line.startswith("ray=="))
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    job = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    assert f":{pin}-" in cluster["docker"]["image"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pin
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(d.startswith("ray[") and ">=2.60,<2.61" in d for d in project["dependencies"])


def test_job_manifest_has_workers_with_accelerators_and_a_shared_store():
    job = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    head, worker = (part["template"]["spec"] for part in (spec["headGroupSpec"], group))
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for pod in (head, worker):
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert f"--store {mount['mountPath']}" in job["spec"]["entrypoint"]
        assert mount["name"] in {volume["name"] for volume in pod["volumes"]}


def test_the_commands_name_the_machines_that_the_files_can_start():
    job = yaml.safe_load((ROOT / "rayjob.yaml").read_text())["spec"]
    arguments = shlex.split(job["entrypoint"])
    (told,) = machines_told(arguments[arguments.index("--set") + 1])
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (told.count, told.cpus, told.gpus) == (
        group["maxReplicas"], float(limits["cpu"]), int(limits["nvidia.com/gpu"]))
    text = (ROOT / "cluster.yaml").read_text()
    types = yaml.safe_load(text)["available_node_types"].values()
    told = machines_told(re.search("--set '(.*)'", text).group(1))
    assert [(m.count, m.cpus, m.gpus) for m in told] == [
        (t["max_workers"], t["resources"]["CPU"], t["resources"]["GPU"])
        for t in types if t.get("max_workers")]


def machines_told(override: str):
    return load(ROOT / "sweeps/smoke.yaml", [override]).resources.machines
