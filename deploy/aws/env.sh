# Where to build and where to deploy: source this after credentials.sh. A variable that is already set is kept. What is
# made of other variables (the registry's name, of account and region) follows them when this is sourced again.
# Everything that is specific to AWS is in this file; another cloud needs a file like it.
# shellcheck shell=bash

export AWS_REGION="${AWS_REGION:-us-east-1}"
export AWS_ACCOUNT_ID="${AWS_ACCOUNT_ID:-}" # twelve digits; credentials.sh has it

# The registry, and how to log in to it: a command that prints the password. Empty: already logged in.
if [ "${REGISTRY-}" = "${ACCOUNT_REGISTRY-}" ]; then REGISTRY=''; fi # not one that was set by hand
export ACCOUNT_REGISTRY="${AWS_ACCOUNT_ID:+${AWS_ACCOUNT_ID}.dkr.ecr.${AWS_REGION}.amazonaws.com}"
export REGISTRY="${REGISTRY:-${ACCOUNT_REGISTRY}}"
export REPOSITORY="${REPOSITORY:-mini-vllm}"
export REGISTRY_USER="${REGISTRY_USER-AWS}"
export REGISTRY_PASSWORD_COMMAND="${REGISTRY_PASSWORD_COMMAND-aws ecr get-login-password --region \$AWS_REGION}"

# Where the server runs. Selectors: label=value, several with commas; empty for any node.
export NAMESPACE="${NAMESPACE:-hyperpod-ns-inference}"
export NODE_SELECTOR="${NODE_SELECTOR-node.kubernetes.io/instance-type=ml.p5.48xlarge}"

export MONITORING="${MONITORING-}" # 1, where the cluster has the Prometheus operator: scraping and alerts

# The namespaces whose pods may ask the server, several with commas: the gateway's, and the one of Prometheus. Empty: all.
export CLIENT_NAMESPACES="${CLIENT_NAMESPACES-}"

# For a cluster's queues and quotas: labels of everything that is deployed, such as kueue.x-k8s.io/queue-name=inference
# (several with commas), and the pods' priority class. Empty: none.
export LABELS="${LABELS-}"
export PRIORITY_CLASS="${PRIORITY_CLASS-}"

# The checkpoints: a persistent volume claim, mounted read-only at /mnt/fsx, and the folder in it that holds a folder
# for each model. MODEL_PATH, if set, is the path of a checkpoint elsewhere.
export MODEL="${MODEL:-gpt-oss-20b}" # or gpt-oss-120b
export MODEL_CLAIM="${MODEL_CLAIM:-fsx-claim}"
export MODEL_FOLDER="${MODEL_FOLDER:-/mnt/fsx/inference/models}"

# The builder in the cluster; it needs no GPU. Empty: none. After a change of these, build.sh makes a new builder.
export BUILD_NAMESPACE="${BUILD_NAMESPACE-}" # empty: NAMESPACE
export BUILD_NODE_SELECTOR="${BUILD_NODE_SELECTOR-}"
export BUILD_CPU="${BUILD_CPU:-8}"
export BUILD_MEMORY="${BUILD_MEMORY:-32Gi}"
export BUILD_CPU_LIMIT="${BUILD_CPU_LIMIT-}"
export BUILD_MEMORY_LIMIT="${BUILD_MEMORY_LIMIT-}"
export BUILD_TOLERATIONS="${BUILD_TOLERATIONS-}" # key=a,value=b,effect=NoSchedule; several with semicolons
export BUILD_SERVICE_ACCOUNT="${BUILD_SERVICE_ACCOUNT-}"
export BUILD_ROOTLESS="${BUILD_ROOTLESS-}" # true: BuildKit's pod is not privileged

# Images that come from Docker Hub unless a mirror's are named here, best with their digests: Python's, and BuildKit's.
export BUILD_BASE_IMAGE="${BUILD_BASE_IMAGE-}" # of Python 3.11 on Debian; empty: PYTHON_IMAGE in deploy/Dockerfile
export BUILD_BUILDKIT_IMAGE="${BUILD_BUILDKIT_IMAGE-}"
