"""deploy/scripts/deploy.sh: exactly what it asks of the cluster, and what it says when that fails."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import kubernetes_validate
import pytest
import yaml

NAME = "mini-vllm-gptoss-tp2"
K = "kubectl --namespace hyperpod-ns-inference"
IMAGE = "000000000000.dkr.ecr.us-east-1.amazonaws.com/mini-vllm"
HEALTH = f"{K} exec pod-a -- python -c "
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on this machine to render with")


def two_pods(workplace):
    workplace.answer("get pods", "go-template", output="pod-a\npod-b")


def applied(workplace):
    (record,) = [record for record in workplace.records if record["call"][3:5] == ["apply", "--filename"]]
    return {one["kind"]: one for one in yaml.safe_load_all(record["manifest"])}


def without_scratch(calls):
    """Calls with the rendering's folder and the health question left out."""
    return [
        call.split(" python -c ")[0] if " exec " in call else call.split(" --filename ")[0]
        for call in calls
        if not call.startswith("kubectl kustomize")
    ]


@needs_kubectl
@pytest.mark.parametrize("line", ["tp2", "tp2 apply"])
def test_apply_waits_for_the_rollout_and_prints_each_pods_health(workplace, line):
    two_pods(workplace)
    workplace.answer("exec", output='{"status":"ready"}')
    done = workplace.sourced(f"./deploy/scripts/deploy.sh {line}")
    assert done.returncode == 0, done.stderr
    assert without_scratch(workplace.calls) == [
        f"{K} get secret mini-vllm-api-keys",
        "aws ecr get-login-password --region us-east-1",
        f"docker login --username AWS --password-stdin {IMAGE.split('/')[0]}",
        f"docker buildx imagetools inspect {IMAGE}:{workplace.commit}",
        f"{K} apply view-last-applied deployment/{NAME} --output yaml",
        f"{K} apply",
        f"{K} rollout status deployment/{NAME} --timeout=900s",
        workplace.calls[8],
        f"{K} exec pod-a --",
        f"{K} exec pod-b --",
    ]
    assert workplace.calls[8].startswith(f"{K} get pods --selector app={NAME} --output go-template=")
    assert done.stdout.strip().splitlines()[-2:] == ['pod-a: {"status":"ready"}', 'pod-b: {"status":"ready"}']


@needs_kubectl
def test_what_is_applied_has_the_environments_values(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2").returncode == 0
    objects = applied(workplace)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == f"{IMAGE}:{workplace.commit}"
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "ml.p5.48xlarge"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "fsx-claim"
    assert objects["ConfigMap"]["data"] == {
        "MODEL": "gpt-oss-20b",
        "MODEL_PATH": "/mnt/fsx/inference/models/gpt-oss-20b",
        "TP": "2",
    }
    assert {one["metadata"]["namespace"] for one in objects.values()} == {"hyperpod-ns-inference"}


@needs_kubectl
def test_every_value_gives_way_to_the_environment(workplace):
    two_pods(workplace)
    done = workplace.sourced(
        "./deploy/scripts/deploy.sh tp8",
        MODEL="gpt-oss-120b",
        NAMESPACE="ours",
        MODEL_CLAIM="models",
        REPLICAS="3",
        NODE_SELECTOR="gpu=h100,pool=a",
        IMAGE_TAG="v1",
        REGISTRY="registry.example.org",
        ROLLOUT_SECONDS="60",
    )
    assert done.returncode == 0, done.stderr
    objects = applied(workplace)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "registry.example.org/mini-vllm:v1"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["nodeSelector"] == {"gpu": "h100", "pool": "a"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "models"
    assert "kubectl --namespace ours scale deployment/mini-vllm-gptoss-tp8 --replicas=3" in workplace.calls
    assert objects["ConfigMap"]["data"]["MODEL"] == "gpt-oss-120b"
    assert objects["ConfigMap"]["data"]["MODEL_PATH"] == "/mnt/fsx/inference/models/gpt-oss-120b"
    assert {one["metadata"]["namespace"] for one in objects.values()} == {"ours"}
    assert "kubectl --namespace ours rollout status deployment/mini-vllm-gptoss-tp8 --timeout=60s" in workplace.calls


@needs_kubectl
def test_another_model_after_sourcing_takes_its_own_checkpoint_and_a_path_may_lie_elsewhere(workplace):
    two_pods(workplace)
    assert workplace.sourced("MODEL=gpt-oss-120b ./deploy/scripts/deploy.sh tp2").returncode == 0
    data = applied(workplace)["ConfigMap"]["data"]
    assert data["MODEL_PATH"] == "/mnt/fsx/inference/models/gpt-oss-120b"
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", MODEL_PATH="/mnt/fsx/tuned").returncode == 0
    assert any("MODEL_PATH: /mnt/fsx/tuned" in record.get("manifest", "") for record in workplace.records)


CHOICE = """# a sweep's
- {op: test, path: /spec/template/spec/containers/0/resources/limits/nvidia.com~1gpu, value: '2'}
- {op: add, path: /spec/template/spec/containers/0/args/-, value: 'buckets.decode_rows=[1,2]'}
"""


@needs_kubectl
def test_a_sweeps_choice_is_deployed(workplace):
    two_pods(workplace)
    (workplace.root / "choice.patch.yaml").write_text(CHOICE)
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2 --buckets choice.patch.yaml")
    assert done.returncode == 0, done.stderr
    objects = applied(workplace)
    arguments = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[0] == "model=$(MODEL)"
    assert arguments[-1] == "buckets.decode_rows=[1,2]"


@needs_kubectl
def test_a_choice_of_another_number_of_gpus_is_refused(workplace):
    (workplace.root / "choice.patch.yaml").write_text(CHOICE)
    done = workplace.sourced("./deploy/scripts/deploy.sh tp8 --buckets choice.patch.yaml")
    assert done.returncode == 1
    assert "was choice.patch.yaml measured on as many GPUs as tp8 has?" in done.stderr
    assert not any(" apply " in call for call in workplace.calls)


SWEEP = "+sweep=latency buckets=latency,balanced buckets.decode_rows=[1,2],[4]"


@needs_kubectl
def test_a_sweep_runs_in_a_job_of_the_overlays_gpus(workplace):
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2 sweep", SWEEP=SWEEP, PRIORITY_CLASS="low", LABELS="team=a")
    assert done.returncode == 0, done.stderr
    job = applied(workplace)["Job"]
    for version in ("1.29", "1.32", "1.34"):
        kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"{IMAGE}:{workplace.commit}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    path = "model.path=/mnt/fsx/inference/models/gpt-oss-20b"
    assert container["args"] == ["model=gpt-oss-20b", path, "kernels.device=cuda", "tp=2", *SWEEP.split()]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "fsx-claim"
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "ml.p5.48xlarge"}
    assert pod["priorityClassName"] == "low"
    assert job["spec"]["template"]["metadata"]["labels"]["team"] == "a"
    name = "job/mini-vllm-gptoss-sweep-tp2"
    assert without_scratch(workplace.calls)[-4:] == [
        f"{K} delete --ignore-not-found {name}",
        f"{K} apply",
        f"{K} wait --for=condition=ready pod --selector job-name=mini-vllm-gptoss-sweep-tp2 --timeout=900s",
        f"{K} logs --follow {name}",
    ]


@needs_kubectl
@pytest.mark.parametrize("report", [True, False])
def test_the_jobs_log_ends_with_the_report_and_its_status_is_the_sweeps(workplace, tmp_path, report):
    assert workplace.sourced("./deploy/scripts/deploy.sh tp1 sweep", SWEEP="tp=1 buckets=latency").returncode == 0
    (container,) = applied(workplace)["Job"]["spec"]["template"]["spec"]["containers"]
    assert "tp=1" in container["args"]
    assert container["args"].count("tp=1") == 1
    results = tmp_path / "results"
    results.mkdir()
    (results / "report.md").write_text("the report\n")
    (results / "choice.patch.yaml").write_text("the choice\n")
    (tmp_path / "sweep.py").write_text(f"import sys; print(*sys.argv[1:]); sys.exit({3 * (not report)})")
    script = container["command"][2].replace("python ", f"{sys.executable} ").replace("/results", str(results))
    done = subprocess.run(
        ["sh", "-c", script, "sweep", "a=1", "b=[1, 2]"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"-m a=1 b=[1, 2] sweep.folder={results}\nthe report\nthe choice\n"
    assert done.returncode == 3 * (not report)


@pytest.mark.parametrize("words", ["", "sweep.folder=/mnt", 'a="b"'])
def test_words_that_cannot_be_swept_are_refused(workplace, words):
    done = workplace.sourced("./deploy/scripts/deploy.sh tp1 sweep", SWEEP=words)
    assert done.returncode == 1
    assert "SWEEP: got" in done.stderr
    assert not workplace.calls


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tp2 --buckets nowhere", "--buckets: got 'nowhere', allowed: the choice.patch.yaml of a sweep"),
        ("tp2 --buckets", "--buckets: got '', allowed"),
        ("tp2 logs --buckets random.yaml", "--buckets: got with logs, allowed: with apply and diff"),
        ("--buckets random.yaml tp2", "--buckets: random.yaml has random weights"),
    ],
)
def test_what_is_no_choice_is_refused(workplace, line, message):
    (workplace.root / "random.yaml").write_text("- {op: add, path: /a, value: model.weights=random}\n")
    done = workplace.sourced(f"./deploy/scripts/deploy.sh {line}")
    assert done.returncode == 1
    assert message in done.stderr
    assert not workplace.calls


@needs_kubectl
def test_no_selector_means_any_node(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", NODE_SELECTOR="").returncode == 0
    assert not applied(workplace)["Deployment"]["spec"]["template"]["spec"].get("nodeSelector")


@needs_kubectl
def test_labels_and_priority_reach_the_pods_and_select_nothing(workplace):
    two_pods(workplace)
    labels = {"kueue.x-k8s.io/queue-name": "inference", "team": "a"}
    done = workplace.sourced(
        "./deploy/scripts/deploy.sh tp2", LABELS="kueue.x-k8s.io/queue-name=inference,team=a", PRIORITY_CLASS="serving"
    )
    assert done.returncode == 0, done.stderr
    objects = applied(workplace)
    template = objects["Deployment"]["spec"]["template"]
    for metadata in (*(one["metadata"] for one in objects.values()), template["metadata"]):
        assert metadata["labels"] == {"app": NAME, **labels}
    assert template["spec"]["priorityClassName"] == "serving"
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == {"app": NAME}
    assert objects["Service"]["spec"]["selector"] == {"app": NAME}


@needs_kubectl
def test_without_labels_and_priority_there_are_none(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2").returncode == 0
    objects = applied(workplace)
    assert all(one["metadata"]["labels"] == {"app": NAME} for one in objects.values())
    assert "priorityClassName" not in objects["Deployment"]["spec"]["template"]["spec"]


@needs_kubectl
def test_only_the_namespaces_of_clients_may_ask(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", CLIENT_NAMESPACES="gateway,2024").returncode == 0
    policy = applied(workplace)["NetworkPolicy"]
    kubernetes_validate.validate(policy, "1.29", strict=True)
    names = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["gateway", "2024"]}
    assert policy["spec"]["ingress"] == [
        {"from": [{"namespaceSelector": {"matchExpressions": [names]}}], "ports": [{"protocol": "TCP", "port": "http"}]}
    ]


@needs_kubectl
def test_the_autoscaler_comes_when_asked_for(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", AUTOSCALE="1").returncode == 0
    scaler = applied(workplace)["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == NAME
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 4)


@needs_kubectl
def test_monitoring_and_the_autoscaler_come_together(workplace):
    two_pods(workplace)
    done = workplace.sourced(
        "./deploy/scripts/deploy.sh tp2", AUTOSCALE="1", MONITORING="1", LABELS="release=a", NAMESPACE="ours"
    )
    assert done.returncode == 0, done.stderr
    objects = applied(workplace)
    assert "HorizontalPodAutoscaler" in objects
    for kind in ("PodMonitor", "PrometheusRule"):
        metadata = objects[kind]["metadata"]
        assert (metadata["name"], metadata["namespace"]) == (NAME, "ours")
        assert metadata["labels"] == {"app": NAME, "release": "a"}
    assert objects["PodMonitor"]["spec"]["selector"] == {"matchLabels": {"app": NAME}}


def test_delete_takes_the_operators_objects_where_there_are_some(workplace):
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2 delete", MONITORING="1").returncode == 0
    assert workplace.calls[1:] == [f"{K} delete podmonitor,prometheusrule --selector app={NAME}"]


@needs_kubectl
def test_the_autoscalers_largest_number_is_a_variable(workplace):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", AUTOSCALE="1", AUTOSCALE_MAX="9").returncode == 0
    assert applied(workplace)["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] == 9


@needs_kubectl
@pytest.mark.parametrize("environment", [{}, {"AUTOSCALE": "1"}])
def test_a_redeploy_leaves_the_replicas_as_they_are(workplace, environment):
    two_pods(workplace)
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2", **environment).returncode == 0
    assert "replicas" not in applied(workplace)["Deployment"]["spec"]
    assert not any(" scale " in call for call in workplace.calls)


@needs_kubectl
def test_replicas_that_were_applied_once_are_forgotten_before_applying(workplace):
    two_pods(workplace)
    last = {
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {"replicas": 3, "template": {"spec": {"containers": [{"args": ["replicas: 4"]}]}}},
    }
    workplace.answer("view-last-applied", output=yaml.safe_dump(last))
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2").returncode == 0
    del last["spec"]["replicas"]
    sets, applies = [record for record in workplace.records if "manifest" in record]
    assert sets["call"][3:5] == ["apply", "set-last-applied"]
    assert yaml.safe_load(sets["manifest"]) == last
    assert applies["call"][3:5] == ["apply", "--filename"]


@needs_kubectl
def test_where_the_replicas_would_not_stay_nothing_is_applied(workplace):
    workplace.answer("view-last-applied", output="kind: Deployment\nspec:\n  replicas: 3")
    workplace.answer("set-last-applied", status=1, output="forbidden")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert f"the replicas of {NAME} would not stay as they are" in done.stderr
    assert not any(" apply --filename" in call for call in workplace.calls)


@needs_kubectl
def test_a_failed_rollout_prints_events_and_last_log_lines_and_is_a_failure(workplace):
    two_pods(workplace)
    workplace.answer("rollout status", status=1, output="timed out waiting")
    workplace.answer("get events", output=f"Warning FailedScheduling pod/{NAME}-1 no GPUs\nNormal other/thing fine")
    workplace.answer("--previous", "pod-b", output="cannot start: no checkpoint")
    workplace.answer("logs --selector", output="[pod-a] loading")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    for message in ("no GPUs", "cannot start: no checkpoint", "[pod-a] loading", "did not come up", "rollout undo"):
        assert message in done.stderr
    assert "other/thing" not in done.stderr
    assert not any(" exec " in call for call in workplace.calls)


@needs_kubectl
@pytest.mark.parametrize("broken", ["get pods", "get events", "logs"])
def test_a_reason_that_cannot_be_had_hides_no_other(workplace, broken):
    workplace.answer("rollout status", status=1)
    workplace.answer(broken, status=1, output="forbidden")
    two_pods(workplace)
    workplace.answer("get events", output=f"pod/{NAME}-1 said an event")
    workplace.answer("logs", output="said a log line")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert ("said an event" in done.stderr) is (broken != "get events")
    assert ("said a log line" in done.stderr) is (broken != "logs")
    assert "did not come up" in done.stderr


@needs_kubectl
def test_a_pod_that_is_not_ready_is_named_and_is_a_failure(workplace):
    two_pods(workplace)
    workplace.answer("exec pod-b", status=1, output="draining")
    workplace.answer("exec", output='{"status":"ready"}')
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert "pod-a: {" in done.stdout
    assert "pod-b: not ready: draining" in done.stdout


@needs_kubectl
@pytest.mark.parametrize(
    ("pod", "health"),
    [({"name": "pod-a"}, "pod-a"), ({"name": "pod-b", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "")],
)
def test_a_pod_that_is_being_replaced_is_not_asked(workplace, tmp_path, pod, health):
    workplace.sourced("./deploy/scripts/deploy.sh tp2 status")
    template = workplace.records[2]["call"][-1]
    one = template.replace("{{range .items}}", "").replace("{{end}}{{end}}", "{{end}}")  # kubectl has no list offline
    assert one != template
    (tmp_path / "pod.json").write_text(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": pod}))
    done = subprocess.run(
        ["kubectl", "label", "--local", "-f", tmp_path / "pod.json", "a=b", "--output", one],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == health


@pytest.mark.parametrize("status", [200, 503])
def test_the_question_for_a_pods_health_is_answered_by_its_server(workplace, status):
    workplace.answer("get pods", "go-template", output="pod-a")
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2 status").returncode == 0
    (question,) = [record["call"][-1] for record in workplace.records if "exec" in record["call"]]

    class Pod(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"what it says")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Pod) as pod:
        threading.Thread(target=pod.handle_request, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-c", question.replace("8000", str(pod.server_port))],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == (0 if status == 200 else 1)
    assert (done.stdout + done.stderr).strip() == "what it says"


@needs_kubectl
def test_without_the_keys_nothing_is_applied_and_the_way_to_make_them_is_said(workplace):
    workplace.answer("get secret", status=1, output="not found")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert "kubectl create secret generic mini-vllm-api-keys" in done.stderr
    assert not any(" apply " in call for call in workplace.calls)


@needs_kubectl
def test_uncommitted_changes_deploy_the_image_that_was_built_of_them(workplace):
    two_pods(workplace)
    (workplace.root / "conf").mkdir()
    (workplace.root / "conf/new.py").write_text("new = 1\n")
    built = workplace.sourced("./deploy/scripts/build.sh server --allow-dirty").stdout.split()[-1]
    assert "-dirty-" in built
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2").returncode == 0
    (server,) = applied(workplace)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert server["image"] == built


@needs_kubectl
def test_an_image_that_is_not_there_is_not_deployed_and_the_way_to_build_it_is_said(workplace):
    workplace.answer("imagetools inspect", status=1, output=f"ERROR: {IMAGE}:v1: not found")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2", IMAGE_TAG="v1")
    assert done.returncode == 1
    assert f"no image {IMAGE}:v1: build it with deploy/scripts/build.sh server" in done.stderr
    assert not any(" apply " in call for call in workplace.calls)


@needs_kubectl
@pytest.mark.parametrize("words", [("get-login-password",), ("docker login",), ("imagetools inspect",)])
def test_a_registry_that_does_not_answer_this_machine_is_told_and_no_reason_to_stop(workplace, words):
    two_pods(workplace)
    workplace.answer(*words, status=1, output="docker: command not found")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 0
    assert f"cannot tell whether the image {IMAGE}:{workplace.commit} is there" in done.stderr
    assert "docker: command not found" in done.stderr


@needs_kubectl
def test_manifests_that_the_cluster_refuses_are_not_waited_for(workplace):
    workplace.answer(" apply ", status=1, output="forbidden: quota")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert "forbidden: quota" in done.stderr
    assert "did not take the manifests" in done.stderr
    assert not any("rollout" in call for call in workplace.calls)


def test_manifests_that_do_not_render_are_not_applied(workplace):
    workplace.answer("kustomize", status=1, output="bad yaml")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2")
    assert done.returncode == 1
    assert "bad yaml" in done.stderr
    assert "do not render" in done.stderr
    assert len(workplace.calls) == 1


def test_status_shows_deployment_pods_and_health(workplace):
    two_pods(workplace)
    workplace.answer("exec", output='{"status":"ready"}')
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2 status")
    assert done.returncode == 0
    assert workplace.calls[:2] == [
        f"{K} get deployment {NAME} --output wide",
        f"{K} get pods --selector app={NAME} --output wide",
    ]
    assert "pod-b: {" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [(("get deployment",), "is not deployed"), (("get pods", "go-template"), "cannot list the pods")],
)
def test_status_fails_where_there_is_nothing_to_show(workplace, words, message):
    workplace.answer(*words, status=1)
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2 status")
    assert done.returncode == 1
    assert message in done.stderr


def test_status_without_pods_is_a_failure(workplace):
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2 status")
    assert done.returncode == 1
    assert f"{NAME} has no pods" in done.stdout


def test_logs_follow_all_pods(workplace):
    workplace.answer("logs", output="a line")
    done = workplace.sourced("./deploy/scripts/deploy.sh tp8 logs")
    assert workplace.calls == [
        f"{K} logs --selector app=mini-vllm-gptoss-tp8 --prefix --tail=200 --max-log-requests=20 --follow"
    ]
    assert done.stdout == "a line\n"


def test_delete_takes_what_apply_made_by_its_label(workplace):
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2 delete").returncode == 0
    assert workplace.calls == [
        f"{K} delete deployment,service,poddisruptionbudget,networkpolicy,horizontalpodautoscaler,configmap "
        f"--selector app={NAME}"
    ]


@needs_kubectl
@pytest.mark.parametrize("status", [0, 1, 2])
def test_diff_changes_nothing_and_hands_on_what_diff_says(workplace, status):
    workplace.answer(" diff ", status=status, output="- old")
    assert workplace.sourced("./deploy/scripts/deploy.sh tp2 diff").returncode == status
    assert without_scratch(workplace.calls) == [f"{K} diff"]


@pytest.mark.parametrize("action", ["logs", "delete"])
def test_a_cluster_that_refuses_is_a_failure(workplace, action):
    workplace.answer(action, status=1, output="forbidden")
    assert workplace.sourced(f"./deploy/scripts/deploy.sh tp2 {action}").returncode == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("./deploy/scripts/deploy.sh", "usage: deploy.sh"),
        ("./deploy/scripts/deploy.sh tp2 apply now", "usage: deploy.sh"),
        ("./deploy/scripts/deploy.sh tp3", "no such overlay: tp3"),
        ("./deploy/scripts/deploy.sh tp2 restart", "no such action: restart"),
    ],
)
def test_a_wrong_argument_asks_nothing_of_the_cluster(workplace, line, message):
    done = workplace.sourced(line)
    assert done.returncode != 0
    assert message in done.stderr
    assert workplace.calls == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NODE_SELECTOR": "h100"}, "NODE_SELECTOR: got 'h100'"),
        ({"LABELS": "queue=a,b"}, "LABELS: got 'b'"),
        ({"AUTOSCALE": "1", "AUTOSCALE_MAX": "0"}, "AUTOSCALE_MAX: got '0'"),
        ({"CLIENT_NAMESPACES": "gateway, other"}, "CLIENT_NAMESPACES: got ' other'"),
        ({"REPLICAS": "many"}, "REPLICAS: got 'many'"),
        ({"REPLICAS": "2", "AUTOSCALE": "1"}, "AUTOSCALE and REPLICAS"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_asked(workplace, environment, message):
    done = workplace.sourced("./deploy/scripts/deploy.sh tp2", **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert workplace.calls == []


def test_missing_settings_say_what_to_source(workplace):
    for line in ("./deploy/scripts/deploy.sh tp2", "source deploy/aws/env.sh && ./deploy/scripts/deploy.sh tp2"):
        done = workplace.shell(line)
        assert done.returncode == 1
        assert "source deploy/aws/" in done.stderr
    assert workplace.calls == []


def test_nothing_is_left_behind(workplace, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    workplace.answer("kustomize", status=1)
    workplace.sourced("./deploy/scripts/deploy.sh tp2", TMPDIR=str(scratch))
    assert list(scratch.iterdir()) == []
    assert workplace.git("status", "--porcelain") == ""
