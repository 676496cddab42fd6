"""deploy/scripts/build.sh: exactly which docker commands it runs, and where it stops."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.standins import ROOT

REGISTRY = "000000000000.dkr.ecr.us-east-1.amazonaws.com"
IMAGE = f"{REGISTRY}/mini-vllm"
LOGIN = f"docker login --username AWS --password-stdin {REGISTRY}"
NODE = "mini-vllm-3505541137"  # the checksum of the default settings
CREATE = (
    f"docker buildx create --name mini-vllm --node {NODE} --driver kubernetes "
    '--driver-opt "namespace=hyperpod-ns-inference" --driver-opt "requests.cpu=8" --driver-opt "requests.memory=32Gi"'
)
BEFORE = ["aws ecr get-login-password --region us-east-1", LOGIN, "docker buildx inspect mini-vllm", CREATE]


def build_of(stage, *rest, builder="mini-vllm", image=IMAGE):
    stages = ["essentials", "cuda", "server"]
    sources = [f"--cache-from type=registry,ref={image}:cache-{one}" for one in stages[: stages.index(stage) + 1]]
    return " ".join(
        [
            f"docker buildx build --builder {builder} --platform linux/amd64 --file deploy/Dockerfile --target {stage}",
            *sources,
            f"--cache-to type=registry,ref={image}:cache-{stage},mode=max,image-manifest=true,oci-mediatypes=true",
            *rest,
            ".",
        ]
    )


def server_of(tag, **where):
    image = where.get("image", IMAGE)
    return build_of(
        "server", f"--build-arg REVISION={tag} --build-arg VERSION=0.1.0 --tag {image}:{tag} --push", **where
    )


def test_the_shell_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("deploy/scripts/*.sh"), *ROOT.glob("deploy/aws/*.sh"), *ROOT.glob("deploy/aws/*.example")]
    assert len(scripts) >= 4
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_server_builds_from_the_caches_and_pushes_the_commit(workplace):
    workplace.answer("get-login-password", output="secret")
    done = workplace.sourced("./deploy/scripts/build.sh server")
    assert done.returncode == 0, done.stderr
    assert workplace.calls == [*BEFORE, server_of(workplace.commit)]
    assert workplace.records[1]["stdin"].strip() == "secret"
    assert "secret" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed {IMAGE}:{workplace.commit}"


def test_all_builds_the_stages_in_turn(workplace):
    assert workplace.sourced("./deploy/scripts/build.sh all").returncode == 0
    only_cached = "--output type=cacheonly"
    assert workplace.calls == [
        *BEFORE,
        build_of("essentials", only_cached),
        build_of("cuda", only_cached),
        server_of(workplace.commit),
    ]


@pytest.mark.parametrize("stage", ["essentials", "cuda"])
def test_a_stage_alone_goes_to_the_cache_and_is_not_called_an_image(workplace, stage):
    done = workplace.sourced(f"./deploy/scripts/build.sh {stage}")
    assert workplace.calls == [*BEFORE, build_of(stage, "--output type=cacheonly")]
    assert "pushed" not in done.stdout


def builder_there(workplace, node):
    workplace.answer("buildx inspect", output=f"Name:   mini-vllm\nDriver: kubernetes\n\nNodes:\nName:   {node}")


def test_a_builder_of_these_settings_is_used_again(workplace):
    builder_there(workplace, NODE)
    assert workplace.sourced("./deploy/scripts/build.sh server").returncode == 0
    assert workplace.calls[2:] == ["docker buildx inspect mini-vllm", server_of(workplace.commit)]


@pytest.mark.parametrize("node", ["mini-vllm0", NODE + "1"])
def test_a_builder_of_other_settings_gives_way_to_a_new_one(workplace, node):
    builder_there(workplace, node)
    assert workplace.sourced("./deploy/scripts/build.sh server").returncode == 0
    assert workplace.calls[3:5] == ["docker buildx rm mini-vllm", CREATE]


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        ("BUILD_NAMESPACE", "builders", "namespace=builders"),
        ("BUILD_CPU", "4", "requests.cpu=4"),
        ("BUILD_MEMORY", "8Gi", "requests.memory=8Gi"),
        ("BUILD_CPU_LIMIT", "16", "limits.cpu=16"),
        ("BUILD_MEMORY_LIMIT", "64Gi", "limits.memory=64Gi"),
        ("BUILD_NODE_SELECTOR", "a=1,b=2", "nodeselector=a=1,b=2"),
        ("BUILD_TOLERATIONS", "key=a,value=b;key=c,operator=Exists", "tolerations=key=a,value=b;key=c,operator=Exists"),
        ("BUILD_SERVICE_ACCOUNT", "builder", "serviceaccount=builder"),
        ("BUILD_ROOTLESS", "true", "rootless=true"),
        ("BUILD_BUILDKIT_IMAGE", "mirror.example.org/buildkit@sha256:0", "image=mirror.example.org/buildkit@sha256:0"),
    ],
)
def test_a_changed_variable_is_one_option_of_a_new_builder(workplace, variable, value, option):
    builder_there(workplace, NODE)
    workplace.sourced("./deploy/scripts/build.sh server", **{variable: value})
    create = workplace.records[4]["call"]
    assert create[:5] == ["docker", "buildx", "create", "--name", "mini-vllm"]
    assert create[create.index(f'"{option}"') - 1] == "--driver-opt"
    assert create[create.index("--node") + 1] != NODE


def test_a_mirrors_base_image_is_built_on(workplace):
    image = "mirror.example.org/python:3.11-slim-bookworm@sha256:0"
    workplace.sourced("./deploy/scripts/build.sh all", BUILD_BASE_IMAGE=image)
    builds = [call for call in workplace.calls if "buildx build" in call]
    assert len(builds) == 3
    assert all(f"--build-arg PYTHON_IMAGE={image}" in call for call in builds)
    assert re.search(r"^ARG PYTHON_IMAGE=", (ROOT / "deploy/Dockerfile").read_text(), re.M)


@pytest.mark.parametrize(("option", "builder"), [("", "mini-vllm"), (" --local", "mini-vllm-local")])
def test_remove_ends_the_builder_and_does_nothing_else(workplace, option, builder):
    assert workplace.shell(f"./deploy/scripts/build.sh remove{option}").returncode == 0
    assert workplace.calls == [f"docker buildx rm {builder}"]


def test_local_builds_with_this_machines_docker(workplace):
    workplace.answer("buildx inspect", status=1)
    assert workplace.sourced("./deploy/scripts/build.sh server --local").returncode == 0
    assert workplace.calls[2:] == [
        "docker buildx inspect mini-vllm-local",
        "docker buildx create --name mini-vllm-local --node mini-vllm-local-518283666 --driver docker-container",
        server_of(workplace.commit, builder="mini-vllm-local"),
    ]


def test_a_dry_run_prints_what_would_run_and_runs_nothing(workplace):
    done = workplace.sourced("./deploy/scripts/build.sh all --dry-run")
    assert done.returncode == 0
    assert workplace.calls == []
    printed = [" ".join(shlex.split(line)[1:]) for line in done.stdout.splitlines() if line.startswith("+")]
    assert printed == [
        f"aws ecr get-login-password --region $AWS_REGION | {LOGIN}",
        CREATE,
        build_of("essentials", "--output type=cacheonly"),
        build_of("cuda", "--output type=cacheonly"),
        server_of(workplace.commit),
    ]


def test_every_setting_gives_way_to_the_environment(workplace):
    done = workplace.sourced(
        "./deploy/scripts/build.sh server",
        REGISTRY="registry.example.org",
        REPOSITORY="ours/gptoss",
        REGISTRY_PASSWORD_COMMAND="",
    )
    assert done.returncode == 0
    assert workplace.calls == [*BEFORE[2:], server_of(workplace.commit, image="registry.example.org/ours/gptoss")]


@pytest.mark.parametrize("change", ["edited", "new"])
def test_a_dirty_image_is_refused_unless_told_and_its_tag_is_of_its_content(workplace, change):
    path = workplace.root / ("pyproject.toml" if change == "edited" else "conf/new.py")
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if change == "edited" else ""
    path.write_text(before + "# one\n")
    refused = workplace.sourced("./deploy/scripts/build.sh server")
    assert refused.returncode == 1
    assert "--allow-dirty" in refused.stderr
    assert workplace.calls == []

    def built():
        done = workplace.sourced("./deploy/scripts/build.sh server --allow-dirty")
        assert done.returncode == 0, done.stderr
        tag = done.stdout.rsplit(":", 1)[1].strip()
        assert re.fullmatch(rf"{workplace.commit}-dirty-[0-9a-f]{{12}}", tag)
        assert workplace.calls[-1] == server_of(tag)
        return tag

    first = built()
    path.write_text(before + "# two\n")
    assert built() != first
    path.write_text(before + "# one\n")
    assert built() == first
    assert workplace.git("diff", "--cached", "--name-only") == ""  # the user's index is left alone


def test_what_is_not_in_the_image_does_not_make_it_dirty(workplace):
    for name in ("deploy/aws/env.sh", "deploy/k8s/base/service.yaml", "notes.txt"):
        with (workplace.root / name).open("a") as file:
            file.write("# ours\n")
    assert workplace.sourced("./deploy/scripts/build.sh server").returncode == 0
    assert workplace.calls[-1] == server_of(workplace.commit)


def test_credentials_do_not_make_the_tree_dirty(workplace):
    assert (workplace.root / "deploy/aws/credentials.sh").exists()
    assert workplace.git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("words", "message", "calls"),
    [
        (("get-login-password",), "no password for", 1),
        (("docker login",), "cannot log in", 2),
        (("buildx rm",), "of other settings was not removed", 4),
        (("--target cuda",), "the stage cuda was not built", 7),
    ],
)
def test_what_fails_ends_the_build_with_its_reason(workplace, words, message, calls):
    builder_there(workplace, "mini-vllm0")
    workplace.answer(*words, status=7, output="the tool's own words")
    done = workplace.sourced("./deploy/scripts/build.sh all")
    assert done.returncode == 1
    assert message in done.stderr
    assert "the tool's own words" in done.stderr
    assert len(workplace.calls) == calls
    assert "pushed" not in done.stdout


def test_a_builder_that_cannot_be_made_ends_the_build(workplace):
    workplace.answer("buildx inspect", status=1)
    workplace.answer("buildx create", status=1, output="forbidden")
    done = workplace.sourced("./deploy/scripts/build.sh server")
    assert done.returncode == 1
    assert "cannot create the builder mini-vllm" in done.stderr
    assert workplace.calls[-1] == CREATE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("./deploy/scripts/build.sh", "which stage?"),
        ("./deploy/scripts/build.sh --dry-run", "which stage?"),
        ("./deploy/scripts/build.sh remove server", "remove stands alone"),
        ("./deploy/scripts/build.sh serve", "unknown argument: serve"),
        ("./deploy/scripts/build.sh server --fast", "unknown argument: --fast"),
    ],
)
def test_a_wrong_argument_is_named_beside_the_usage(workplace, line, message):
    done = workplace.sourced(line)
    assert done.returncode == 1
    assert message in done.stderr
    assert "usage: build.sh" in done.stderr
    assert workplace.calls == []


def test_missing_settings_say_what_to_source(workplace):
    nothing = workplace.shell("./deploy/scripts/build.sh server")
    assert nothing.returncode == 1
    assert "source deploy/aws/env.sh" in nothing.stderr
    no_account = workplace.shell("source deploy/aws/env.sh && ./deploy/scripts/build.sh server")
    assert no_account.returncode == 1
    assert "deploy/aws/credentials.sh" in no_account.stderr
    assert workplace.calls == []


SOURCE = "source deploy/aws/env.sh"


@pytest.mark.parametrize("shell", ["{}", "bash -c '{}'"])
def test_sourcing_again_with_another_account_region_or_namespace_gives_theirs(workplace, shell):
    again = f"export AWS_ACCOUNT_ID=222222222222 AWS_REGION=eu-west-1 NAMESPACE=theirs && {SOURCE}"
    again = shell.format(f"{again} && ./deploy/scripts/build.sh server --dry-run")
    done = workplace.shell(f"export AWS_ACCOUNT_ID=111111111111 && {SOURCE} && {again}")
    assert done.returncode == 0, done.stderr
    assert "222222222222.dkr.ecr.eu-west-1.amazonaws.com/mini-vllm" in done.stdout
    assert "111111111111" not in done.stdout
    assert "namespace=theirs" in done.stdout


def test_a_registry_of_ones_own_stays_whatever_the_account(workplace):
    own = "export REGISTRY=333333333333.dkr.ecr.us-east-1.amazonaws.com AWS_ACCOUNT_ID=111111111111"
    done = workplace.shell(f"{own} && {SOURCE} && export AWS_ACCOUNT_ID=222222222222 && {SOURCE} && printenv REGISTRY")
    assert done.stdout.strip() == "333333333333.dkr.ecr.us-east-1.amazonaws.com"


def test_the_password_is_asked_in_the_region_of_the_last_sourcing(workplace):
    workplace.shell(
        f"export AWS_ACCOUNT_ID=111111111111 && {SOURCE} && export AWS_REGION=eu-west-1 && {SOURCE} "
        "&& ./deploy/scripts/build.sh server"
    )
    assert workplace.calls[0] == "aws ecr get-login-password --region eu-west-1"


def test_help_is_not_an_error(workplace):
    done = workplace.shell("./deploy/scripts/build.sh --help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: build.sh")


def test_nothing_but_the_settings_is_particular_to_one_cloud():
    for path in [*ROOT.glob("deploy/scripts/*"), *ROOT.glob("deploy/k8s/**/*.yaml"), ROOT / "deploy/Dockerfile"]:
        words = path.read_text().lower().replace("deploy/aws/", "")
        assert not re.search(r"\b(aws|ecr|amazon\w*|gcloud|azure)\b", words), path
