"""The manifests, rendered by the real kustomize: valid, restricted, and in agreement with the server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from conf.schema import Config
from serve import metrics

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
NAMESPACE = "hyperpod-ns-inference"
VERSIONS = ("1.29", "1.32", "1.34")  # of Kubernetes
FLUSH_SECONDS = int(re.search(r"^FLUSH_SECONDS = (\d+)", (ROOT / "serve.py").read_text(), re.M)[1])
KUSTOMIZE = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
pytestmark = pytest.mark.skipif(not shutil.which(KUSTOMIZE[0]), reason="neither kustomize nor kubectl on this machine")
overlays = pytest.mark.parametrize("tp", [1, 2, 8])


def render(folder):
    done = subprocess.run([*KUSTOMIZE, folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def overlay(tp):
    return render(K8S / "overlays" / f"tp{tp}")


def pod_of(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


def server_of(objects):
    (container,) = pod_of(objects)["containers"]
    return container


def arguments_of(objects):
    return dict(argument.split("=", 1) for argument in server_of(objects)["args"])


def with_component(name, folder):
    shutil.copytree(K8S, folder / "k8s")
    with (folder / "k8s/overlays/tp2/kustomization.yaml").open("a") as file:
        file.write(f"components: [../../components/{name}]\n")
    return render(folder / "k8s/overlays/tp2")


@pytest.fixture
def autoscaled(tmp_path):
    return with_component("autoscale", tmp_path)


@pytest.fixture
def monitored(tmp_path):
    return with_component("monitoring", tmp_path)


@overlays
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_strict_reading(tp, version):
    objects = overlay(tp)
    kinds = {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"}
    assert set(objects) == kinds
    for one in objects.values():
        kubernetes_validate.validate(one, version, strict=True)


def test_the_validation_refuses_what_is_wrong():
    wrong = overlay(2)["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@overlays
def test_everything_is_of_one_name_label_and_namespace(tp):
    name = f"mini-vllm-gptoss-tp{tp}"
    objects = overlay(tp)
    for one in objects.values():
        assert one["metadata"]["namespace"] == NAMESPACE
        assert one["metadata"]["labels"] == {"app": name}
        assert one["metadata"]["name"].startswith(name)
    selector = {"app": name}
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == selector
    assert objects["Deployment"]["spec"]["template"]["metadata"]["labels"] == selector
    assert objects["Service"]["spec"]["selector"] == selector
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector


@overlays
def test_no_replicas_are_set_so_that_applying_again_leaves_them_alone(tp):
    assert "replicas" not in overlay(tp)["Deployment"]["spec"]


@overlays
def test_a_pod_asks_for_as_many_gpus_as_the_server_has_ranks(tp):
    objects = overlay(tp)
    resources = server_of(objects)["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == str(tp)
    assert int(resources["requests"]["cpu"]) > tp
    assert "cpu" not in resources["limits"]
    assert objects["ConfigMap"]["data"] == {
        "TP": str(tp),
        "MODEL": "gpt-oss-20b",
        "MODEL_PATH": "/mnt/fsx/inference/models/gpt-oss-20b",
    }
    (source,) = server_of(objects)["envFrom"]
    assert source["configMapRef"]["name"] == objects["ConfigMap"]["metadata"]["name"]


@overlays
def test_the_servers_arguments_are_ones_that_it_takes(tp):
    objects = overlay(tp)
    values = objects["ConfigMap"]["data"]
    arguments = [
        argument.replace("$(MODEL)", values["MODEL"])
        .replace("$(MODEL_PATH)", values["MODEL_PATH"])
        .replace("$(TP)", values["TP"])
        for argument in server_of(objects)["args"]
    ]
    assert not any("$" in argument for argument in arguments)
    shown = subprocess.run(
        [sys.executable, "serve.py", *arguments, "--cfg", "job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    assert config["tp"] == tp
    assert config["kernels"]["device"] == "cuda"
    assert config["model"]["path"] == values["MODEL_PATH"]
    assert config["server"]["port"] == server_of(objects)["ports"][0]["containerPort"]


@overlays
def test_the_pod_meets_the_restricted_standard(tp):
    objects = overlay(tp)
    pod, server = pod_of(objects), server_of(objects)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    kinds = {kind for volume in pod["volumes"] for kind in volume} - {"name"}
    assert kinds == {"persistentVolumeClaim", "secret", "emptyDir"}


@overlays
def test_models_and_keys_are_mounted_read_only_and_only_scratch_can_be_written(tp):
    objects = overlay(tp)
    mounts = {mount["name"]: mount for mount in server_of(objects)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(objects)["volumes"]}
    assert set(mounts) == set(volumes)
    assert {name for name, mount in mounts.items() if not mount.get("readOnly")} == {"memory", "cache"}
    assert mounts["memory"]["mountPath"] == "/tmp"
    assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
    assert mounts["cache"]["mountPath"] == "/cache"
    assert volumes["models"]["persistentVolumeClaim"]["readOnly"] is True
    assert arguments_of(objects)["server.api_key_file"].startswith(mounts["api-keys"]["mountPath"] + "/")
    assert objects["ConfigMap"]["data"]["MODEL_PATH"].startswith(mounts["models"]["mountPath"] + "/")
    assert pod_of(objects)["volumes"][0]["name"] == "models"  # deploy.sh says which claim, by place


@overlays
def test_probes_ask_what_they_are_for_and_leave_time_to_load(tp):
    objects = overlay(tp)
    server = server_of(objects)
    startup, readiness, liveness = (server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["httpGet"]["path"] == readiness["httpGet"]["path"] == "/health/ready"
    assert liveness["httpGet"]["path"] == "/health"
    allowed = startup["periodSeconds"] * startup["failureThreshold"]
    assert allowed == 600
    assert objects["Deployment"]["spec"]["progressDeadlineSeconds"] > allowed
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 5
    # A server without progress ends by itself; the kubelet is not to be quicker with one that is only busy.
    assert 30 <= liveness["periodSeconds"] * liveness["failureThreshold"] <= Config().server.step_deadline


@overlays
def test_the_grace_period_holds_pre_stop_drain_and_the_last_answers(tp):
    objects = overlay(tp)
    command, seconds = server_of(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = float(arguments_of(objects)["server.drain_seconds"])
    assert int(seconds) >= 5
    assert pod_of(objects)["terminationGracePeriodSeconds"] >= int(seconds) + drain + FLUSH_SECONDS + 10


@overlays
def test_only_the_http_port_is_open_and_only_inwards(tp):
    objects = overlay(tp)
    policy = objects["NetworkPolicy"]["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}]}]
    assert not policy.get("egress")
    assert [port["targetPort"] for port in objects["Service"]["spec"]["ports"]] == ["http"]
    assert [port["name"] for port in server_of(objects)["ports"]] == ["http"]


def test_prometheus_is_told_where_to_scrape():
    annotations = overlay(2)["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "8000",
        "prometheus.io/path": "/metrics",
    }


def test_the_pod_monitor_scrapes_this_overlays_pods_in_place_of_the_annotations(monitored):
    monitor, template = monitored["PodMonitor"]["spec"], monitored["Deployment"]["spec"]["template"]
    assert monitor["selector"]["matchLabels"] == template["metadata"]["labels"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in server_of(monitored)["ports"]]
    assert endpoint["path"] == "/metrics"
    assert "annotations" not in template["metadata"]


def test_the_alert_of_a_pod_that_is_down_is_about_the_pod_monitors_targets(monitored):
    (group,) = monitored["PrometheusRule"]["spec"]["groups"]
    (down,) = [rule["expr"] for rule in group["rules"] if rule["expr"].startswith("up{")]
    monitor = monitored["PodMonitor"]["metadata"]
    job = f"{monitor['namespace']}/{monitor['name']}"  # the operator's name of the job
    assert re.fullmatch(re.search(r'job=~"([^"]+)"', down)[1], job)


def test_where_a_node_has_no_gpus_to_spare_the_old_pod_goes_first():
    assert overlay(8)["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert overlay(2)["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_autoscaler_scales_the_deployment_of_its_overlay_on_waiting_requests_and_pages(autoscaled):
    scaler = autoscaled["HorizontalPodAutoscaler"]
    kubernetes_validate.validate(scaler, VERSIONS[0], strict=True)
    assert scaler["spec"]["scaleTargetRef"]["name"] == autoscaled["Deployment"]["metadata"]["name"]
    assert scaler["metadata"]["labels"] == {"app": "mini-vllm-gptoss-tp2"}
    names = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    served = [metrics.PREFIX + name for name in ("num_requests_waiting", "kv_cache_usage_perc")]
    assert names == [name.replace(":", "_") for name in served]
    readme = (ROOT / "deploy/README.md").read_text()  # the adapter's rules make the one of the other
    for name, series in zip(names, served, strict=True):
        assert f"seriesQuery: '{series}{{" in readme
        assert f"name: {{as: {name}}}" in readme


def test_the_example_volume_is_the_claim_that_pods_mount():
    objects = {one["kind"]: one for one in yaml.safe_load_all((K8S / "model-volume/volume.yaml").read_text())}
    for one in objects.values():
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)
    claim = objects["PersistentVolumeClaim"]["metadata"]
    mounted = pod_of(overlay(2))["volumes"][0]["persistentVolumeClaim"]
    assert mounted["claimName"] == claim["name"]
    assert objects["PersistentVolume"]["spec"]["claimRef"] == {"namespace": NAMESPACE, "name": claim["name"]}
