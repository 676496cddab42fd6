"""A sweep from its command line: Hydra around `runner`, signals, exit status."""

import os
import signal
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from conf.schema import ConfigError
from sweep import settings
from sweep.runner import Sweep

INTERRUPTED = 130  # the exit status that shells give a Ctrl-C


def main(server: tuple[str, ...]) -> None:
    """Run the sweep that the command line describes. `server`: the command that starts a server, without overrides."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing a report of its own
    settings.register()
    # The last override varies fastest. With those of `sweep.` last, all loads of one server follow each other.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument.startswith("sweep."))
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with Sweep(Console(), server) as sweep:

            @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="measure")
            def job(composed: DictConfig) -> float:
                return sweep.run(composed)

            job()
            sweep.measure()
    except (Exception, KeyboardInterrupt) as error:
        if interrupted:  # whatever the exception became: OmegaConf raises its own when it is interrupted
            sys.exit(INTERRUPTED)
        if isinstance(error, ConfigError | HydraException | OmegaConfBaseException):
            sys.exit(f"configuration: {error}")
        raise
