#!/usr/bin/env bash
# Build stages of deploy/Dockerfile with docker buildx, keep them in the registry's cache, and push the server's image.
set -euo pipefail

usage() {
    cat <<'END'
usage: build.sh essentials|cuda|server|all [--local] [--allow-dirty] [--dry-run]
       build.sh remove [--local] [--dry-run]

  essentials     Python, torch and the other dependencies, into the registry's cache
  cuda           the compiled kernels, likewise
  server         the image, tagged with the commit and pushed; the other stages come from the cache
  all            the three of them in turn
  remove         end the builder and its pod; the caches in the registry stay
  --local        build with this machine's Docker, not in the cluster
  --allow-dirty  build with uncommitted changes; the tag then ends in -dirty- and a hash of the content
  --dry-run      print the commands, run none

Settings come from the environment: source deploy/aws/env.sh first.
END
}

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

# Runs under bash 3.2 too, the version of macOS.
say() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

run() {
    say "$@"
    [[ -n $dry_run ]] || "$@"
}

stages=() where=cluster allow_dirty='' dry_run=''
for argument in "$@"; do
    case $argument in
        essentials | cuda | server | remove) stages+=("$argument") ;;
        all) stages+=(essentials cuda server) ;;
        --local) where=local ;;
        --allow-dirty) allow_dirty=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && fail "unknown argument: $argument" ;;
    esac
done
((${#stages[@]})) || { usage >&2 && fail "which stage?"; }

# The builder. Its node's name holds a checksum of its settings, by which one with other settings is noticed.
builder=mini-vllm driver=kubernetes options=()
if [[ $where == local ]]; then
    builder=mini-vllm-local driver=docker-container
else
    while read -r option value; do
        # An option is a list separated by commas: a value that contains commas needs the quotes.
        [[ -z $value ]] || options+=(--driver-opt "\"$option=$value\"")
    done <<END
namespace ${BUILD_NAMESPACE:-${NAMESPACE:-}}
requests.cpu ${BUILD_CPU:-8}
requests.memory ${BUILD_MEMORY:-32Gi}
limits.cpu ${BUILD_CPU_LIMIT:-}
limits.memory ${BUILD_MEMORY_LIMIT:-}
nodeselector ${BUILD_NODE_SELECTOR:-}
tolerations ${BUILD_TOLERATIONS:-}
serviceaccount ${BUILD_SERVICE_ACCOUNT:-}
rootless ${BUILD_ROOTLESS:-}
image ${BUILD_BUILDKIT_IMAGE:-}
END
fi
node=$builder-$(cksum <<<"$driver ${options[*]-}" | cut -d ' ' -f 1)

if [[ " ${stages[*]} " == *' remove '* ]]; then
    ((${#stages[@]} == 1)) || { usage >&2 && fail "remove stands alone"; }
    run docker buildx rm "$builder" || fail "the builder $builder was not removed"
    exit
fi

[[ -n ${REPOSITORY:-} ]] || fail "REPOSITORY is not set: source deploy/aws/env.sh first"
[[ $where == local || -n ${BUILD_NAMESPACE:-${NAMESPACE:-}} ]] ||
    fail "NAMESPACE is not set: source deploy/aws/env.sh first"
[[ -n ${REGISTRY:-} ]] || fail "REGISTRY is not set: fill in and source deploy/aws/credentials.sh, then deploy/aws/env.sh"
image=$REGISTRY/$REPOSITORY

cd "$(dirname "$0")/../.."
# shellcheck source-path=SCRIPTDIR source=image.sh
source deploy/scripts/image.sh
tag=$(image_tag)
[[ $tag != *-dirty-* || -n $allow_dirty ]] ||
    fail "the image's files have uncommitted changes: commit them, or pass --allow-dirty"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

if [[ -n ${REGISTRY_PASSWORD_COMMAND:-} ]]; then
    echo "+ $REGISTRY_PASSWORD_COMMAND | docker login --username ${REGISTRY_USER:-} --password-stdin $REGISTRY"
    [[ -n $dry_run ]] || log_in || exit
fi

found=''
if [[ -n $dry_run ]]; then
    echo "# unless there is a builder of these settings:"
elif ! found=$(docker buildx inspect "$builder" 2>/dev/null); then
    found=''
fi
if [[ "$found " != *"$node"[!0-9]* ]]; then
    [[ -z $found ]] || run docker buildx rm "$builder" || fail "the builder $builder of other settings was not removed"
    # bash 3.2 treats an empty array as unset
    run docker buildx create --name "$builder" --node "$node" --driver "$driver" ${options[@]+"${options[@]}"} ||
        fail "cannot create the builder $builder"
fi

for stage in "${stages[@]}"; do
    arguments=(--builder "$builder" --platform linux/amd64 --file deploy/Dockerfile --target "$stage")
    for cached in essentials cuda server; do
        arguments+=(--cache-from "type=registry,ref=$image:cache-$cached")
        [[ $cached != "$stage" ]] || break
    done
    # Some registries accept a cache only in the form of an image.
    arguments+=(--cache-to "type=registry,ref=$image:cache-$stage,mode=max,image-manifest=true,oci-mediatypes=true")
    [[ -z ${BUILD_BASE_IMAGE:-} ]] || arguments+=(--build-arg "PYTHON_IMAGE=$BUILD_BASE_IMAGE")
    if [[ $stage == server ]]; then
        arguments+=(--build-arg "REVISION=$tag" --build-arg "VERSION=$version" --tag "$image:$tag" --push)
    else
        arguments+=(--output type=cacheonly)
    fi
    run docker buildx build "${arguments[@]}" . || fail "the stage $stage was not built"
done
[[ -n $dry_run || ${stages[${#stages[@]} - 1]} != server ]] || echo "pushed $image:$tag"
