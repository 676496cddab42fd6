"""A composed configuration as the shortest `serve.py` overrides that give it: to start it, and for users to paste."""

import hashlib
import json
import re
from dataclasses import asdict
from enum import Enum
from typing import Any

from hydra import compose
from omegaconf import DictConfig

from conf.schema import Config

GROUPS = ("model", "buckets", "kernels", "server")
ADDRESS = ("server.host", "server.port")


def overrides(config: Config, choices: dict[str, str]) -> list[str]:
    """The overrides, without the address, which the sweep chooses.

    `choices`: the option of each group that Hydra composed with. Hydra must be initialised, as it is within a job.
    """
    words: list[str] = []
    for group in GROUPS:  # the model first: it decides which buckets are the default
        if choices[group] != _composed(words).hydra.runtime.choices[group]:
            words.append(f"{group}={choices[group]}")
    base = _composed(words)
    plain = flat({key: base[key] for key in (*GROUPS, "tp")})
    return words + [
        f"{key}={literal(value)}"
        for key, value in flat(config).items()
        if plain[key] != value and key not in ADDRESS and (key, value) != ("tp", 1)
    ]


def _composed(words: list[str]) -> DictConfig:
    return compose("config", overrides=words, return_hydra_config=True)


def identity(config: Config) -> str:
    """A hash of the configuration without its address: equal for configurations whose servers are the same."""
    values = {key: value for key, value in flat(config).items() if key not in ADDRESS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; enumerations by name."""
    values = asdict(config) if isinstance(config, Config) else config
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if hasattr(value, "items"):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            value = list(value) if not isinstance(value, str | None) and hasattr(value, "__iter__") else value
            flattened[prefix + key] = value.name if isinstance(value, Enum) else value
    return flattened


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    text = str(value)
    return text if re.fullmatch(r"[\w./:+-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
