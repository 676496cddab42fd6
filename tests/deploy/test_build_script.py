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
CREATE = (
    "docker buildx create --name mini-vllm --driver kubernetes --driver-opt namespace=hyperpod-ns-inference "
    "--driver-opt requests.cpu=8 --driver-opt requests.memory=32Gi"
)
BEFORE = ["aws ecr get-login-password --region us-east-1", LOGIN, "docker buildx inspect mini-vllm"]


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


def test_a_builder_that_is_not_there_is_made_in_the_cluster(workplace):
    workplace.answer("buildx inspect", status=1)
    assert workplace.sourced("./deploy/scripts/build.sh server").returncode == 0
    assert workplace.calls[2:4] == ["docker buildx inspect mini-vllm", CREATE]


def test_a_builders_nodes_are_one_option_whatever_their_number(workplace):
    workplace.answer("buildx inspect", status=1)
    workplace.sourced("./deploy/scripts/build.sh server", BUILD_NODE_SELECTOR="a=1,b=2", BUILD_NAMESPACE="builders")
    create = workplace.records[3]["call"]
    assert create[-2:] == ["--driver-opt", '"nodeselector=a=1,b=2"']
    assert "namespace=builders" in create


def test_local_builds_with_this_machines_docker(workplace):
    workplace.answer("buildx inspect", status=1)
    assert workplace.sourced("./deploy/scripts/build.sh server --local").returncode == 0
    assert workplace.calls[2:] == [
        "docker buildx inspect mini-vllm-local",
        "docker buildx create --name mini-vllm-local --driver docker-container",
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
    assert workplace.calls == [
        "docker buildx inspect mini-vllm",
        server_of(workplace.commit, image="registry.example.org/ours/gptoss"),
    ]


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
        (("--target cuda",), "the stage cuda was not built", 5),
    ],
)
def test_what_fails_ends_the_build_with_its_reason(workplace, words, message, calls):
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
