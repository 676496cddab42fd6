#!/usr/bin/env bash
# Deploy a server on 1, 2 or 8 GPUs to the cluster, watch it, remove it.
set -euo pipefail

usage() {
    cat <<'END'
usage: deploy.sh tp1|tp2|tp8 [apply|status|logs|delete|diff|sweep] [--buckets FILE]

  apply    (the default) deploy the image that build.sh made of this tree, wait until it serves, print each pod's health
  status   the deployment, its pods and their health
  logs     of all pods, following
  delete   everything that apply made; the Secret with the API keys stays
  diff     what apply would change, but for REPLICAS
  sweep    measure configurations on these GPUs in a Job, following its log, which ends with the report and the choice;
           SWEEP has the words of sweep.py, such as 'buckets=latency,balanced sweep.concurrency=1,4'
  --buckets FILE  a sweep's choice.patch.yaml, for apply and diff; without it the model's default buckets

Settings come from the environment: source deploy/aws/env.sh first. Also: IMAGE_TAG, by default this tree's; REPLICAS,
by default as many as there are, at first 1; AUTOSCALE=1 for the HorizontalPodAutoscaler, of at most AUTOSCALE_MAX
pods, by default 4; MONITORING=1 for the Prometheus operator's PodMonitor and alerts, which delete also needs
to remove them; ROLLOUT_SECONDS to wait, by default 900.
END
}

fail() {
    echo "deploy.sh: $*" >&2
    exit 1
}

words=() choice=''
while (($#)); do
    if [[ $1 == --buckets ]]; then
        [[ -f ${2:-} ]] || fail "--buckets: got '${2:-}', allowed: the choice.patch.yaml of a sweep"
        choice=$2 && shift
    else
        words+=("$1")
    fi
    shift
done
set -- ${words[@]+"${words[@]}"} # bash 3.2 treats an empty array as unset
(($# >= 1 && $# <= 2)) || { usage >&2 && exit 2; }
[[ $1 != -h && $1 != --help ]] || { usage && exit; }
case $1 in tp1 | tp2 | tp8) overlay=$1 ;; *) usage >&2 && fail "no such overlay: $1" ;; esac
action=${2:-apply}
[[ -z $choice || $action == apply || $action == diff ]] || fail "--buckets: got with $action, allowed: with apply and diff"
[[ -z $choice ]] || ! grep -q 'weights=random' "$choice" || fail "--buckets: $choice has random weights"
name=mini-vllm-gptoss-$overlay
secret=mini-vllm-api-keys
[[ -n ${NAMESPACE:-} ]] || fail "NAMESPACE is not set: source deploy/aws/env.sh first"
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=image.sh
source "$root/deploy/scripts/image.sh"

k() {
    kubectl --namespace "$NAMESPACE" "$@"
}

# The variable of this name, label=value,label=value, as {"label": "value", "label": "value"}.
labels() {
    local pair out=''
    IFS=, read -ra pairs <<<"${!1:-}"
    for pair in ${pairs[@]+"${pairs[@]}"}; do # bash 3.2 treats an empty array as unset
        [[ $pair == ?*=* ]] || fail "$1: got '$pair', allowed: label=value, several with commas"
        out+="${out:+, }\"${pair%%=*}\": \"${pair#*=}\""
    done
    echo "{$out}"
}

# CLIENT_NAMESPACES, name,name, as "name", "name".
clients() {
    local name out=''
    IFS=, read -ra names <<<"$CLIENT_NAMESPACES"
    for name in "${names[@]}"; do
        [[ $name =~ ^[a-z0-9-]+$ ]] || fail "CLIENT_NAMESPACES: got '$name', allowed: namespaces, several with commas"
        out+="${out:+, }\"$name\""
    done
    echo "$out"
}

# What both kinds of manifests need: checks, `tag` (the image's), `selected` and `labels`, and a copy of the manifests.
prepare() {
    local variable
    for variable in REGISTRY REPOSITORY MODEL MODEL_FOLDER MODEL_CLAIM; do
        [[ -n ${!variable:-} ]] || fail "$variable is not set: source deploy/aws/credentials.sh and deploy/aws/env.sh first"
    done
    tag=${IMAGE_TAG:-$(cd "$root" && image_tag)}
    selected=$(labels NODE_SELECTOR)
    labels=$(labels LABELS)
    cp -R "$root/deploy/k8s" "$work/k8s"
}

# The overlay with this environment's values, to $work/manifest.yaml.
render() {
    local clients
    [[ -z ${AUTOSCALE:-} || -z ${REPLICAS:-} ]] || fail "AUTOSCALE and REPLICAS: the autoscaler decides, or you"
    [[ ${REPLICAS:-1} =~ ^[0-9]+$ ]] || fail "REPLICAS: got '$REPLICAS', allowed: a number"
    [[ ${AUTOSCALE_MAX:-4} =~ ^[1-9][0-9]*$ ]] || fail "AUTOSCALE_MAX: got '$AUTOSCALE_MAX', allowed: a number above 0"
    prepare
    cat >"$work/k8s/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: $NAMESPACE
resources: [overlays/$overlay]
labels: [{pairs: $labels, includeTemplates: true}]
images: [{name: mini-vllm, newName: "$REGISTRY/$REPOSITORY", newTag: "$tag"}]
configMapGenerator:
  - name: mini-vllm-gptoss
    namespace: hyperpod-ns-inference
    behavior: merge
    literals: ["MODEL=$MODEL", "MODEL_PATH=${MODEL_PATH:-$MODEL_FOLDER/$MODEL}"]
patches:
  - target: {kind: Deployment}
    patch: |-
      [{"op": "add", "path": "/spec/template/spec/nodeSelector", "value": $selected},
       {"op": "replace", "path": "/spec/template/spec/volumes/0/persistentVolumeClaim/claimName", "value": "$MODEL_CLAIM"}]
END
    if [[ -n ${CLIENT_NAMESPACES:-} ]]; then
        clients=$(clients)
        cat >>"$work/k8s/kustomization.yaml" <<END
  - target: {kind: NetworkPolicy}
    patch: |-
      [{"op": "add", "path": "/spec/ingress/0/from", "value": [{"namespaceSelector": {"matchExpressions":
         [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": [$clients]}]}}]}]
END
    fi
    if [[ -n ${PRIORITY_CLASS:-} ]]; then
        cat >>"$work/k8s/kustomization.yaml" <<END
  - target: {kind: Deployment}
    patch: '[{"op": "add", "path": "/spec/template/spec/priorityClassName", "value": "$PRIORITY_CLASS"}]'
END
    fi
    if [[ -n $choice ]]; then
        cp "$choice" "$work/k8s/choice.yaml"
        echo "  - {target: {kind: Deployment}, path: choice.yaml}" >>"$work/k8s/kustomization.yaml"
    fi
    # Components come inside the overlay, so that they get its name and label.
    echo "components: [${AUTOSCALE:+../../components/autoscale,}${MONITORING:+../../components/monitoring}]" \
        >>"$work/k8s/overlays/$overlay/kustomization.yaml"
    if [[ -n ${AUTOSCALE:-} ]]; then
        cat >>"$work/k8s/kustomization.yaml" <<END
  - target: {kind: HorizontalPodAutoscaler}
    patch: '[{"op": "replace", "path": "/spec/maxReplicas", "value": ${AUTOSCALE_MAX:-4}}]'
END
    fi
    kubectl kustomize "$work/k8s" >"$work/manifest.yaml" ||
        fail "the manifests do not render${choice:+: was $choice measured on as many GPUs as $overlay has?}"
}

# The Job that sweeps, to $work/manifest.yaml.
render_sweep() {
    local word given arguments
    prepare
    arguments="\"model=$MODEL\", \"model.path=${MODEL_PATH:-$MODEL_FOLDER/$MODEL}\", \"kernels.device=cuda\""
    [[ " $SWEEP" == *[[:space:]]tp=* ]] || arguments+=", \"tp=${overlay#tp}\""
    read -ra given <<<"$SWEEP"
    for word in "${given[@]}"; do
        [[ $word != *[\"\\]* && $word != sweep.folder=* ]] || fail "SWEEP: got '$word', allowed: no quotes, no sweep.folder"
        arguments+=", \"$word\""
    done
    cat >"$work/k8s/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: $NAMESPACE
nameSuffix: -$overlay
resources: [sweep]
labels: [{pairs: $labels, includeTemplates: true}]
images: [{name: mini-vllm, newName: "$REGISTRY/$REPOSITORY", newTag: "$tag"}]
patches:
  - target: {kind: Job}
    patch: |-
      [{"op": "add", "path": "/spec/template/spec/nodeSelector", "value": $selected},
       {"op": "replace", "path": "/spec/template/spec/volumes/0/persistentVolumeClaim/claimName", "value": "$MODEL_CLAIM"},
       {"op": "add", "path": "/spec/template/spec/containers/0/resources/limits/nvidia.com~1gpu", "value": "${overlay#tp}"},
       {"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": [$arguments]}]
END
    [[ -z ${PRIORITY_CLASS:-} ]] || cat >>"$work/k8s/kustomization.yaml" <<END
  - target: {kind: Job}
    patch: '[{"op": "add", "path": "/spec/template/spec/priorityClassName", "value": "$PRIORITY_CLASS"}]'
END
    kubectl kustomize "$work/k8s" >"$work/manifest.yaml" || fail "the Job does not render"
}

# The manifests set no replicas. If the last applied ones did, then applying these would set 1: drops them from what
# kubectl remembers as applied.
forget_replicas() {
    local last
    last=$(k apply view-last-applied "deployment/$name" --output yaml 2>/dev/null) || return 0 # not deployed yet
    [[ $last == *$'\n  replicas: '* ]] || return 0
    sed '/^  replicas: /d' <<<"$last" | k apply set-last-applied --filename -
}

# Ends here if the image is not in the registry. A registry that does not answer this machine may answer the nodes.
check_image() {
    local image=$REGISTRY/$REPOSITORY:$tag answer
    if ! answer=$(log_in 2>&1 && docker buildx imagetools inspect "$image" 2>&1); then
        [[ $answer != *"$image: not found"* ]] || fail "no image $image: build it with deploy/scripts/build.sh server
    (--allow-dirty for a tag with -dirty-), or name another one in IMAGE_TAG"
        echo "deploy.sh: cannot tell whether the image $image is there: $answer" >&2
    fi
}

# Names of the pods that should serve, without those being replaced, which still drain for a while.
pods() {
    k get pods --selector "app=$name" --output \
        'go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}}{{"\n"}}{{end}}{{end}}'
}

# The health of each pod's server, asked from inside the pod, since the network policy may not admit this machine.
health() {
    local pod answer unhealthy=0 all
    all=$(pods) || fail "cannot list the pods of $name"
    [[ -n $all ]] || { echo "$name has no pods" && return 1; }
    while read -r pod; do
        if answer=$(k exec "$pod" -- python -c "import urllib.error as e, urllib.request as r
try: print(r.urlopen('http://127.0.0.1:8000/health/ready', timeout=5).read().decode())
except e.HTTPError as error: raise SystemExit(error.read().decode())" </dev/null 2>&1); then
            echo "$pod: $answer"
        else
            echo "$pod: not ready: $answer"
            unhealthy=1
        fi
    done <<<"$all"
    return $unhealthy
}

# What may explain why a rollout failed. A step that fails must not keep the next ones from running.
reasons() {
    echo "--- pods"
    k get pods --selector "app=$name" --output wide || true
    echo "--- events"
    k get events --sort-by=.lastTimestamp | grep -F "$name" | tail -n 20 || true
    echo "--- last log lines"
    k logs --selector "app=$name" --tail=30 --prefix || true
    echo "--- last log lines of containers that ended"
    pods | while read -r pod; do k logs "$pod" --previous --tail=30 2>/dev/null </dev/null || true; done || true
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $action in
    apply)
        render
        k get secret "$secret" >/dev/null || fail "no Secret $secret in $NAMESPACE (or no access to it). To make it:
    kubectl create secret generic $secret --namespace $NAMESPACE --from-file=keys=FILE    # one key a line"
        check_image
        forget_replicas || fail "the replicas of $name would not stay as they are"
        k apply --filename "$work/manifest.yaml" || fail "the cluster did not take the manifests"
        [[ -z ${REPLICAS:-} ]] || k scale "deployment/$name" --replicas="$REPLICAS" || fail "$name was not scaled"
        if ! k rollout status "deployment/$name" --timeout="${ROLLOUT_SECONDS:-900}s"; then
            reasons >&2
            fail "$name did not come up; the reason should be above. Back to what ran before: kubectl rollout undo --namespace $NAMESPACE deployment/$name"
        fi
        health
        ;;
    status)
        k get deployment "$name" --output wide || fail "$name is not deployed"
        k get pods --selector "app=$name" --output wide
        health
        ;;
    logs) k logs --selector "app=$name" --prefix --tail=200 --max-log-requests=20 --follow ;;
    delete)
        k delete deployment,service,poddisruptionbudget,networkpolicy,horizontalpodautoscaler,configmap \
            --selector "app=$name"
        # Without the operator the cluster has no such kinds.
        [[ -z ${MONITORING:-} ]] || k delete podmonitor,prometheusrule --selector "app=$name"
        ;;
    sweep)
        [[ -n ${SWEEP:-} ]] || fail "SWEEP: got nothing, allowed: the words of sweep.py, such as '+sweep=latency'"
        render_sweep
        check_image
        job=job/mini-vllm-gptoss-sweep-$overlay
        k delete --ignore-not-found "$job" || fail "an earlier $job stays"
        k apply --filename "$work/manifest.yaml" || fail "the cluster did not take the Job"
        k wait --for=condition=ready pod --selector "job-name=${job#job/}" --timeout="${ROLLOUT_SECONDS:-900}s" ||
            fail "$job does not start: kubectl describe --namespace $NAMESPACE $job"
        k logs --follow "$job"
        ;;
    diff)
        render
        k diff --filename "$work/manifest.yaml" # exits with 1 if there are differences, like diff
        ;;
    *) usage >&2 && fail "no such action: $action" ;;
esac
