"""The dashboard and the alerts ask for metrics that the server has, under labels that they carry."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import BucketStats, Stats
from serve.metrics import Metrics
from tests.fakes import FakeEngine

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "k8s/components/monitoring/alerts.yaml").read_text())
FROM_SCRAPING = {"app", "namespace", "pod"}  # labels of the scrape's target, by Prometheus' usual relabelling of pods


@pytest.fixture(scope="module")
def served():
    """name -> labels of every sample that the server can give."""
    engine = FakeEngine([1])
    engine.stats = Stats(
        running=0,
        waiting=0,
        pages_used=0,
        pages_total=1,
        prefix_query_tokens=0,
        prefix_hit_tokens=0,
        preemptions=0,
        buckets=[BucketStats("decode", 1, 1, 1, 0)],
    )
    metrics = Metrics(engine, "m")
    metrics.finished("stop")
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions():
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [*panels, *(one["definition"] for one in DASHBOARD["templating"]["list"] if "definition" in one)]


def alerts():
    rules = [rule["expr"] for group in ALERTS["spec"]["groups"] for rule in group["rules"]]
    return [expression for expression in rules if not expression.startswith("up{")]


@pytest.mark.parametrize("expression", [*expressions(), *alerts()])
def test_an_expression_names_what_the_server_says(served, expression):
    names = re.findall(r"mini_vllm:\w+", expression)
    assert names
    for name in names:
        assert name in served, name
    for grouping in re.findall(r"by \(([^)]*)\)", expression):
        labels = {label.strip() for label in grouping.split(",")}
        assert labels <= set.union(*(served[name] for name in names)) | FROM_SCRAPING
    assert expression.count("(") == expression.count(")")


def test_every_metric_is_on_the_dashboard(served):
    def family(name):
        return re.sub(r"_(bucket|sum|count|created)$", "", name)

    shown = {family(name) for expression in expressions() for name in re.findall(r"mini_vllm:\w+", expression)}
    assert {family(name) for name in served if not name.endswith("_created")} == shown


def test_panels_have_places_and_names_of_their_own():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len(places)
