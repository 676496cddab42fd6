# What build.sh and deploy.sh, which source this file, must agree on: the image's tag, and the login to its registry.
# shellcheck shell=bash

# Prints the tag: the commit, and if the image's files have uncommitted changes, a hash of their content too. These
# files are the Dockerfile and what .dockerignore lets in: a changed manifest or setting does not change the image.
image_tag() {
    local paths=(deploy/Dockerfile .dockerignore) path commit index content
    while read -r path; do paths+=("$path"); done < <(sed -n 's/^!//p' .dockerignore)
    commit=$(git rev-parse --short=12 HEAD) || return
    if [[ -z $(git status --porcelain -- "${paths[@]}") ]]; then
        echo "$commit"
        return
    fi
    index=$(mktemp) # a copy of git's index: what the user has staged stays as it is
    cp "$(git rev-parse --git-path index)" "$index"
    content=$(
        export GIT_INDEX_FILE=$index
        git ls-files -z --cached --others --exclude-standard -- "${paths[@]}" |
            git add --all --pathspec-from-file=- --pathspec-file-nul &&
            git ls-files --stage -- "${paths[@]}" | git hash-object --stdin
    ) || return
    rm "$index"
    echo "$commit-dirty-${content:0:12}"
}

# Logs in to REGISTRY with the password that REGISTRY_PASSWORD_COMMAND prints; without a command there is nothing to do.
log_in() {
    local password
    [[ -n ${REGISTRY_PASSWORD_COMMAND:-} ]] || return 0
    password=$(bash -c "$REGISTRY_PASSWORD_COMMAND") || { echo "no password for $REGISTRY: see above" && return 1; } >&2
    docker login --username "${REGISTRY_USER:-}" --password-stdin "$REGISTRY" <<<"$password" ||
        { echo "cannot log in to $REGISTRY" && return 1; } >&2
}
